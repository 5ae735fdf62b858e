"""Compare and time the candidates: one JSON line for each (candidate, dtype, sizes).

    export PYTHONPATH=.:tests
    TRITON_INTERPRET=1 python -m candidates.check odd        (on a CPU, no GPU needed)
    python -m candidates.check full                          (98,304 tokens, on a GPU, timed)

Errors are norms relative to the plain form in fp64 on the same inputs; `plain` is that of the
plain form in the dtype under test. A candidate may be at most ALLOWED times as wrong.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any, Iterator

import torch
from torch import Tensor

from candidates.table import CANDIDATES, FULL, ODD, Candidate, Sizes, swapped

ALLOWED = 1.2
# Below this a relative error is the noise of the dtype's own arithmetic, in whatever order.
NOISE = {torch.float32: 2e-6, torch.bfloat16: 1e-4}
ROUNDS, CALLS = 5, 10


def arguments(candidate: Candidate, sizes: Sizes, dtype, device, seed: int = 0) -> tuple:
    generator = torch.Generator(device).manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return candidate.inputs(sizes, make)


def leaves(candidate: Candidate, args: tuple, dtype) -> tuple:
    """Return the arguments in `dtype`, the learned ones ready for a gradient."""
    args = tuple(x.detach().to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
                 for x in args)
    for x in args[:candidate.learned]:
        x.requires_grad_()
    return args


def values(candidate: Candidate, form, args: tuple, dtype) -> list[Tensor]:
    """Return the output and all gradients of a weighted mean of it, worked out in `dtype`."""
    args = leaves(candidate, args, dtype)
    out = form(*args)
    weight = torch.ones_like(out) if out.ndim == 1 else torch.linspace(
        -1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    (out * weight).mean().backward()
    return [out.detach(), *(x.grad for x in args[:candidate.learned])]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Return the relative error of each tensor; nan where it holds a nan."""
    return [((f.double() - t.double()).norm() / t.double().norm().clamp_min(1e-30)).item()
            for f, t in zip(found, truth, strict=True)]


def compare(name: str, sizes: Sizes, dtype, device) -> dict:
    """Return a row: errors of value and gradients of both forms, and whether they agree."""
    candidate = CANDIDATES[name]
    args = arguments(candidate, sizes, dtype, device)
    exact = torch.float64 if sizes != FULL else torch.float32  # fp64 at full size fills the card
    truth = values(candidate, candidate.plain, args, exact)
    plain = errors(values(candidate, candidate.plain, args, dtype), truth)
    fused = errors(values(candidate, candidate.fused, args, dtype), truth)
    bounds = [max(ALLOWED * p, NOISE[dtype]) for p in plain]
    return dict(candidate=name, dtype=str(dtype).removeprefix("torch."), sizes=list(sizes),
                agrees=all(f <= bound for f, bound in zip(fused, bounds, strict=True)),
                fused=fused, plain=plain)


def milliseconds(compiled, args: tuple, learned: int, backward: bool) -> float:
    """Return the mean device time of CALLS calls of a compiled loss, with or without backward."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        loss = compiled(*args)
        if backward:
            torch.autograd.grad(loss, args[:learned])
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def timed(name: str, device) -> dict:
    """Return a row: median times of both forms at full size, compiled alike, taken in turns.

    Each is (forward, forward + backward); spread_ms is the widest of a form's own rounds.
    """
    candidate = CANDIDATES[name]
    args = leaves(candidate, arguments(candidate, FULL, torch.bfloat16, device), torch.bfloat16)
    forms = {"fused": candidate.fused, "plain": candidate.plain}
    compiled = {form: torch.compile(lambda *a, f=function: f(*a).float().mean(), fullgraph=True,
                                    dynamic=False) for form, function in forms.items()}
    taken: dict[tuple[str, bool], list[float]] = {}
    for turn in range(ROUNDS + 1):
        for form, function in compiled.items():
            for backward in (False, True):
                spent = milliseconds(function, args, candidate.learned, backward)
                if turn:  # the first compiles
                    taken.setdefault((form, backward), []).append(spent)
    times = {f"{form}_ms": [round(statistics.median(taken[form, b]), 4) for b in (False, True)]
             for form in forms}
    spread = max(max(spent) - min(spent) for spent in taken.values())
    return dict(candidate=name, **times, spread_ms=round(spread, 4),
                saved_ms=round(times["plain_ms"][1] - times["fused_ms"][1], 4))


def in_script(device) -> dict:
    """Return a row: errors of a small model's loss and gradients, all candidates in the script.

    The model is compiled without a graph break, ahead of time autograd included.
    """
    import train_gpt
    sizes: dict[str, Any] = dict(
        vocab_size=77, train_seq_len=20, model_dim=24, num_heads=4, num_kv_heads=2, rope_dims=4,
        num_layers=4, recur_layers=(1, 2), parallel_start_layer=3, xsa_last_n=3, ve_layers=(2, 3),
        ve_dim=6)
    config = train_gpt.Config(**sizes)
    layout = train_gpt.phases(config)[1].layout
    tokens = torch.arange(63, device=device).view(3, 21) * 31 % 77
    found = []
    for names in ((), CANDIDATES):
        with swapped(train_gpt, names):
            with torch.device(device):
                model = train_gpt.GPT(config)
            model.init_weights(0)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1 * torch.cos(torch.arange(p.numel(), device=device)).view(p.shape))
            step = torch.compile(model.mean_loss, backend="aot_eager", fullgraph=True)
            loss = step(train_gpt.Batch.of_windows(tokens), layout)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters()
                                           if p.grad is not None)])
    worst = max(errors(found[1], found[0]))
    return dict(candidate="in the script", dtype="float32", agrees=worst <= 1e-4, worst=worst)


def rows(mode: str) -> Iterator[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in CANDIDATES:
        if mode == "odd":
            for sizes in ODD:
                for dtype in (torch.float32, torch.bfloat16):
                    yield compare(name, sizes, dtype, device)
        else:
            yield compare(name, FULL, torch.bfloat16, device)
            yield timed(name, device)
    if mode == "odd":
        yield in_script(device)


def main(mode: str) -> int:
    """Print the rows of a mode; returns 1 if a candidate disagrees with its plain form."""
    failed = 0
    for row in rows(mode):
        print(json.dumps(row), flush=True)
        failed |= not row.get("agrees", True)
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:] not in (["odd"], ["full"]):
        sys.exit(__doc__)
    if sys.argv[1] == "odd" and not torch.cuda.is_available():
        from candidates import interpret
        interpret.mend()
    sys.exit(main(sys.argv[1]))
