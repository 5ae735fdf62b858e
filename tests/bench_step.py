"""Time the script's step against a plain implementation of the same mathematics, in turns.

    python tests/bench_step.py [--tiny] [--sections step,parts,...] [--rows FILE.jsonl]

Sections, most important first: `step` (ours and plain at both depths), `memory`, `candidates`
(ours with each kernel of tests/candidates put in; needs Triton and a GPU, or its interpreter),
`frontier` (steps of PRESET=frontier by depth and training length, packed rows and not),
`evaluation` (sliding windows), `parts` (optimizer, loader), `artifact` (GPTQ, search, packing,
reading), `overlay` (losses of both sides over 200 steps). Prints one line a figure as it is found,
with the share of this device's own matrix rate where that means something; --rows writes them as
JSON too. --tiny takes sizes a CPU finishes in seconds.

The plain side has the same model, compiled alike, with the same attention, and what one writes
first around it: a parameter is its own tensor, Muon works matrix by matrix (`muon_step` of
plain.py), torch's AdamW, clipping and averaging go tensor by tensor, and the loss is read every
step.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import plain  # noqa: E402
from candidates.table import CANDIDATES, swapped  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import Batch, Config, Layout, Rates, Role, Runtime  # noqa: E402

FULL = dict(train_batch_tokens=98_304, compile_enabled=None)  # one of eight GPUs' share
TINY = dict(train_batch_tokens=512, micro_batch_tokens=512, train_seq_len=64, eval_seq_len=64,
            eval_stride=8, val_batch_tokens=2048, vocab_size=256, num_layers=4, model_dim=64,
            num_heads=4, num_kv_heads=2, ve_layers=(2, 3), ve_dim=16, recur_layers=(1, 2),
            parallel_start_layer=2, fp16_max_numel=1024, device="cpu")
RATES = Rates(1.0, 0.95)
# Of one side: blocks of steps, taken in turns with the other sides' blocks.
BLOCKS, BLOCK_STEPS, WARM_STEPS = 7, 10, 3


class Bench:
    """What every section needs: settings, device, attention, and the list of rows."""

    def __init__(self, tiny: bool, rows_path: Path | None):
        self.tiny, self.config = tiny, Config(**(TINY if tiny else FULL))
        self.runtime = Runtime({}, self.config)
        self.device = self.runtime.device
        if not tiny and self.device.type == "cpu":  # a window takes seconds there
            self.config = dataclasses.replace(self.config, val_batch_tokens=8192)
        backend, self.attend, self.scope, _ = train_gpt.choose_attention(self.config, self.runtime)
        self.layouts = {name: phase.layout for name, phase in zip(
            ("before", "after"), train_gpt.phases(self.config), strict=True)}
        self.rows_file = open(rows_path, "a", encoding="utf-8") if rows_path else None
        self.roof = train_gpt.matmul_flops_per_second(self.runtime)
        self.tell("device", backend=backend, tokens=self.config.train_batch_tokens,
                  matrix_tflops=self.roof / 1e12, **self.runtime.describe())

    def tell(self, kind: str, **fields):
        """Print a row, and write it where rows are kept."""
        fields = {name: float(f"{value:.5g}") if isinstance(value, float) else value
                  for name, value in fields.items()}
        print(f"{kind:10} " + " ".join(f"{name}={value}" for name, value in fields.items()),
              flush=True)
        if self.rows_file:
            self.rows_file.write(json.dumps({"row": kind, **fields}) + "\n")
            self.rows_file.flush()

    def windows(self, count: int) -> Batch:
        """Return windows of tokens as unevenly frequent as those of text."""
        weights = 1.0 / (torch.arange(self.config.vocab_size) + 10.0)
        shape = count, self.config.train_seq_len + 1
        drawn = torch.multinomial(weights, shape[0] * shape[1], replacement=True,
                                  generator=torch.Generator().manual_seed(0))
        return Batch.of_windows(drawn.view(shape).to(self.device))

    def model(self) -> train_gpt.GPT:
        """Return a model without zeros: a GPU multiplies those faster."""
        with torch.device(self.device):
            model = train_gpt.GPT(self.config, self.attend, self.runtime.compute_dtype)
        model.init_weights(0)
        with torch.no_grad():
            for p in train_gpt.partition(model)[Role.MATRIX]:
                if not p.any():
                    p.normal_(0.0, 0.02)
        return model

    def flops(self, layout: Layout) -> float:
        """Return FLOPs of a step: products three times the forward's, attention 3.5 times."""
        c = self.config
        attention = 2 * c.model_dim * len(layout.order) * c.train_seq_len
        forward = train_gpt.forward_flops_per_token(c, layout.order)
        return c.train_batch_tokens * (3 * forward + 0.5 * attention)


# ---- the two sides -------------------------------------------------------------------------


class Ours:
    """The script's own trainer."""

    def __init__(self, bench: Bench):
        config, runtime = bench.config, bench.runtime
        self.model = bench.model()
        optimizers = train_gpt.Optimizers(self.model, config, runtime)
        self.average = train_gpt.Average(optimizers.bank, config)
        state = train_gpt.TrainState(self.model, optimizers, self.average)
        self.trainer = train_gpt.Trainer(state, config, runtime, train_gpt.Log(False),
                                         train_gpt.Clock())

    def step(self, batch: Batch, layout: Layout) -> torch.Tensor:
        loss = self.trainer.update(batch, layout, RATES)
        self.average.update()
        return loss

    def optimize(self):
        optimizers = self.trainer.state.optimizers
        optimizers.reduce_and_clip()
        optimizers.step(RATES)
        self.average.update()


class Plain:
    """A straightforward trainer of the same model."""

    def __init__(self, bench: Bench):
        c, self.config, self.runtime = bench.config, bench.config, bench.runtime
        self.model = bench.model()
        self.mean_loss = bench.runtime.compile(self.model.mean_loss)
        self.micro = train_gpt.micro_batch_sequences(c, 1)
        groups = train_gpt.partition(self.model)
        self.matrices = groups[Role.MATRIX]
        self.buffers = [torch.zeros_like(p) for p in self.matrices]
        self.shadow = [p.detach().float().clone() for p in self.model.parameters()]
        self.adamw = torch.optim.AdamW(
            [dict(params=groups[Role.EMBED], lr=c.tied_embed_lr, weight_decay=c.embed_wd),
             dict(params=groups[Role.CONTROL], lr=c.scalar_lr, weight_decay=c.adam_wd)],
            betas=(c.beta1, c.beta2), eps=c.adam_eps)

    def step(self, batch: Batch, layout: Layout) -> float:
        self.model.zero_grad()
        parts, total = batch.split(self.micro), 0.0
        for part in parts:
            loss = self.mean_loss(part, layout) / len(parts)
            loss.backward()
            total += loss.item()
        self.optimize()
        return total

    @torch.no_grad()
    def optimize(self):
        c = self.config
        for p in self.model.parameters():
            if p.grad is None:  # a skip row that acts in the other layout only
                p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip_norm)
        for i, p in enumerate(self.matrices):
            weight, self.buffers[i] = plain.muon_step(
                p, p.grad, self.buffers[i], c.matrix_lr, RATES.muon_momentum, c.muon_wd,
                c.muon_backend_steps, self.runtime.compute_dtype)
            p.copy_(weight)
        self.adamw.step()
        for i, p in enumerate(self.model.parameters()):
            self.shadow[i] = plain.ema_step(self.shadow[i], p.float(), c.ema_decay)


# ---- timing --------------------------------------------------------------------------------


def seconds_of(bench: Bench, call: Callable[[], object], times: int) -> float:
    """Return the mean seconds of a call, the device's work included."""
    bench.runtime.synchronize()
    since = time.perf_counter()
    for _ in range(times):
        call()
    bench.runtime.synchronize()
    return (time.perf_counter() - since) / times


def timed(bench: Bench, call: Callable, *args):
    """Return what a call returns, and its seconds."""
    made: list = []
    seconds = seconds_of(bench, lambda: made.append(call(*args)), 1)
    return made[0], seconds


def in_turns(bench: Bench, calls: dict[str, Callable[[], object]],
             block_steps: int = BLOCK_STEPS) -> dict[str, list[float]]:
    """Return seconds of each block of each call, after warming all up."""
    for call in calls.values():
        seconds_of(bench, call, WARM_STEPS)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    blocks = 3 if bench.tiny else BLOCKS
    for _ in range(blocks):
        for name, call in calls.items():
            taken[name].append(seconds_of(bench, call, 2 if bench.tiny else block_steps))
    return taken


def stepper(side: Ours | Plain, windows: torch.Tensor, layout: Layout,
            names=()) -> Callable[[], object]:
    """Return a call that makes one step of a side, with the named candidates in the script.

    They must be in it at each call, and at no other side's: compiled code checks what it was
    traced from, and would be compiled anew.
    """
    def call():
        with swapped(train_gpt, names):
            side.step(windows, layout)
    return call


def free(bench: Bench):
    """Give memory of what is no longer used back to the device."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- sections ------------------------------------------------------------------------------


def step(bench: Bench):
    """Whole steps at both depths: ours and plain."""
    free(bench)
    batch = bench.windows(bench.config.step_rows)
    sides: dict[str, Ours | Plain] = {}
    for name, side in (("ours", Ours), ("plain", Plain)):
        sides[name] = side(bench)
        for depth, layout in bench.layouts.items():
            since = time.perf_counter()
            seconds_of(bench, stepper(sides[name], batch, layout), 1)
            bench.tell("compile", side=name, depth=depth, seconds=time.perf_counter() - since)
    for depth, layout in bench.layouts.items():
        taken = in_turns(bench, {name: stepper(side, batch, layout)
                                 for name, side in sides.items()})
        median = {name: statistics.median(spent) for name, spent in taken.items()}
        for name, seconds in median.items():
            rate = bench.flops(layout) / seconds
            bench.tell("step", side=name, depth=depth, layers=len(layout.order),
                       ms=1000 * seconds, low_ms=1000 * min(taken[name]),
                       high_ms=1000 * max(taken[name]), tflops=rate / 1e12,
                       roof_share=rate / bench.roof,
                       tokens_per_second=bench.config.train_batch_tokens / seconds)
        bench.tell("speedup", depth=depth, ours_over_plain=median["plain"] / median["ours"])


def frontier(bench: Bench):
    """Steps of PRESET=frontier at both depths and all its lengths, documents as long as text's."""
    free(bench)
    given: dict[str, Any] = dict(TINY, row_tokens=256) if bench.tiny else dict(FULL)
    lengths = (16, 32, 64) if bench.tiny else (1024, 2048, 3072)
    preset = train_gpt.load_config({"PRESET": "frontier"})
    order = (0, 1, 2, 1, 2, 3) if bench.tiny else preset.virtual_order
    given.update(virtual_order=order, train_seq_schedule=(), ve_enabled=False,
                 train_seq_len=lengths[-1], eval_seq_len=lengths[-1],
                 parallel_start_layer=2 if bench.tiny else 8)
    config = dataclasses.replace(preset, **given)
    rows = np.random.default_rng(0).integers(2, config.vocab_size, size=(
        config.step_rows, config.row_len + 1), dtype=np.uint16)
    rows[np.random.default_rng(1).random(rows.shape) < 1 / 811] = train_gpt.BOS_ID
    for masked, some in ((True, lengths), (False, lengths[-1:])):
        c = dataclasses.replace(config, doc_mask=masked)
        backend, attend, scope, _ = train_gpt.choose_attention(c, bench.runtime)
        with scope:
            one = copy.copy(bench)
            one.config, one.attend = c, attend
            side, before = Ours(one), bench.runtime.compiled_graphs()
            for depth, layout in dict(zip(("before", "after"), dict.fromkeys(
                    phase.layout for phase in train_gpt.phases(c)))).items():
                for length in some:
                    cut = rows if masked else rows[:, :-1].reshape(-1, length)
                    cut = cut if masked else np.pad(cut, ((0, 0), (0, 1)), mode="edge")
                    batch = train_gpt.batch_of_rows(cut, c, bench.runtime, length)
                    seconds_of(bench, stepper(side, batch, layout), 1)  # compiles
                    spent = in_turns(bench, {"ours": stepper(side, batch, layout)})["ours"]
                    bench.tell("frontier", depth=depth, layers=len(layout.order), length=length,
                               masked=masked, backend=backend,
                               ms=1000 * statistics.median(spent),
                               graphs=bench.runtime.compiled_graphs() - before)
        del side
        free(bench)


def overlay(bench: Bench):
    """Losses of both sides from one start, on the same windows, the depth switched half-way."""
    free(bench)
    steps, per_step = 10 if bench.tiny else 200, bench.config.step_rows
    ours, other = Ours(bench), Plain(bench)
    other.model.load_state_dict(ours.model.state_dict())
    batches, far = bench.windows(4 * per_step).split(per_step), []
    for i in range(steps):
        layout = bench.layouts["after" if i >= steps // 2 else "before"]
        batch = batches[i % 4]
        a, b = ours.step(batch, layout), other.step(batch, layout)
        far.append(float(a) - b)
        if i % (steps // 10) == 0:
            bench.tell("overlay", step=i, ours=float(a), plain=b)
    bench.tell("overlay", steps=steps, mean_difference=statistics.mean(far),
               largest_difference=max(map(abs, far)))


def memory(bench: Bench):
    """Peak memory of one side alone, a few steps at the greater depth."""
    if bench.device.type != "cuda":
        bench.tell("memory", skipped="on a CPU the process has one peak for all")
        return
    batch = bench.windows(bench.config.step_rows)
    for name, side in (("ours", Ours), ("plain", Plain)):
        free(bench)
        one = side(bench)
        for _ in range(2):
            one.step(batch, bench.layouts["after"])
        allocated, reserved = bench.runtime.peak_memory_mib()
        bench.tell("memory", side=name, allocated_mib=allocated, reserved_mib=reserved)
        del one


def parts(bench: Bench):
    """The optimizer with clipping and average, of both sides, and the loader."""
    free(bench)
    sides: dict[str, Ours | Plain] = {"ours": Ours(bench), "plain": Plain(bench)}
    for side in sides.values():
        for p in side.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.normal_(0.0, 1e-3)
    taken = in_turns(bench, {name: side.optimize for name, side in sides.items()})
    for name, spent in taken.items():
        bench.tell("optimizer", side=name, ms=1000 * statistics.median(spent))
    del sides
    free(bench)
    c = bench.config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fineweb_train_000000.bin")
        count = 4 * c.train_batch_tokens + 1
        head = np.zeros(256, "<i4")
        head[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, count
        tokens = np.random.default_rng(0).integers(0, c.vocab_size, count).astype("<u2")
        path.write_bytes(head.tobytes() + tokens.tobytes())
        shards = train_gpt.ShardSet([path], c.train_seq_len)
        loader = train_gpt.Loader(shards, c, bench.runtime)
        steps = iter(range(10 ** 9))
        spent = in_turns(bench, {"loader": lambda: loader.batch(next(steps))})["loader"]
        loader.close()
    bench.tell("loader", ms=1000 * statistics.median(spent), batch_tokens=c.train_batch_tokens)


def plain_sliding(bench: Bench, logits_of, text: train_gpt.Validation) -> float:
    """Return the nats of a text by the obvious loop: whole windows' logits, cut on the host."""
    c, total = bench.config, 0.0
    windows = plain.sliding_windows(len(text.target_bytes), c.eval_seq_len, c.eval_stride)
    tokens = torch.from_numpy(np.pad(text.tokens.astype(np.int64), (0, c.eval_seq_len)))
    with torch.inference_mode():
        for at in range(0, len(windows), c.eval_batch_windows):
            some = windows[at:at + c.eval_batch_windows]
            rows = [tokens[start:start + c.eval_seq_len + 1] for start, _ in some]
            rows += [rows[-1]] * (c.eval_batch_windows - len(rows))  # one static shape
            batch = Batch.of_windows(torch.stack(rows).to(bench.device))
            logits = logits_of(batch, bench.layouts["after"])
            losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(),
                                     reduction="none").view(len(rows), -1).double()
            for row, (start, scored) in enumerate(some):
                total += losses[row, scored[0] - start:scored[-1] - start + 1].sum().item()
    return total


def evaluation(bench: Bench):
    """Sliding windows over a stretch of text: ours and the plain loop, which must agree.

    The first window is scored whole by both; what it alone takes is measured and taken off.
    """
    free(bench)
    c, model = bench.config, bench.model()
    windows, batches = (c.eval_seq_len, c.eval_stride, c.eval_batch_windows), 8
    further = c.eval_stride * c.eval_batch_windows * batches
    drawn = bench.windows(-(-(c.eval_seq_len + further) // c.train_seq_len) + 1)
    tokens = drawn.tokens.flatten().cpu().numpy().astype(np.uint16)
    texts = {}
    for name, count in (("first", c.eval_seq_len), ("all", c.eval_seq_len + further)):
        texts[name] = train_gpt.Validation(tokens[:count + 1], np.ones(count, np.uint16), count,
                                           "table", count, count, "")
    losses, logits = (bench.runtime.compile(f) for f in (model.token_losses, model.logits))

    def ours(text):
        return train_gpt.score(lambda batch: losses(batch, bench.layouts["after"]), text, windows,
                               bench.runtime).nats

    def obvious(text):
        return plain_sliding(bench, logits, text)

    sides = {"ours": ours, "plain": obvious}
    nats = {name: call(texts["all"]) for name, call in sides.items()}  # and compile
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(5):
        for name, call in sides.items():
            spent = [seconds_of(bench, lambda text=text, call=call: call(text), 1)
                     for text in texts.values()]
            taken[name].append(spent[1] - spent[0])
    median = {name: statistics.median(spent) for name, spent in taken.items()}
    for name, seconds in median.items():
        bench.tell("evaluation", side=name, scored_tokens_per_second=further / seconds,
                   seconds=seconds, nats=nats[name])
    bench.tell("speedup", evaluation=median["plain"] / median["ours"],
               relative_difference=abs(nats["ours"] / nats["plain"] - 1))


def trained_like(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return weights as training leaves them: rows of many sizes, a few directions, light tails."""
    w = torch.randn(shape, generator=generator)
    if w.ndim < 2:
        return w
    low = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1],
                                                                      generator=generator)
    w = (w + 0.3 * low) * (1 + 0.1 * torch.randn(shape, generator=generator).square())
    return 0.03 * w * 2 ** (0.5 * torch.randn(shape[0], 1, generator=generator))


def column_loop(w: torch.Tensor, factors, steps: torch.Tensor):
    """GPTQ of one matrix as one writes it first: no blocks, no batches."""
    work, upper = w[:, factors.order_NC[0]].clone(), factors.upper_NCC[0]
    for j in range(w.shape[1]):
        code = (work[:, j] / steps).round_().clamp_(-127, 127)
        error = (work[:, j] - code * steps) / upper[j, j]
        work[:, j + 1:] -= error[:, None] * upper[j, j + 1:]


def over_entropy(packed: bytes, codes: dict[str, torch.Tensor]) -> float:
    """Return a file's bytes over those of order-0 entropy (a histogram a tensor) and the rest."""
    header, _ = train_gpt.unpack_tensors(packed, "bench")
    coder = {"stream", "states", "tables", "codes", "row_classes", "column_classes"}
    spent = sum(span for name, *_, span in header["tensors"] if name.split(".")[0] in coder)
    ideal = sum(train_gpt.entropy_bytes(code) for code in codes.values())
    return len(packed) / (len(packed) - spent + ideal)


def read_back(packed: bytes, config: Config):
    header, tensors = train_gpt.unpack_tensors(packed, "bench")
    train_gpt.restore_weights(header, tensors, config, "bench")


def artifact(bench: Bench):
    """From weights and Hessians to the artifact and back, at this model's shapes."""
    free(bench)
    generator, hessians = torch.Generator().manual_seed(0), {}
    outputs: dict[str, torch.Tensor] = {}
    weights = {name: trained_like(entry.shape, generator)
               for name, entry in train_gpt.inventory(bench.config).items()}

    def moments(size):
        x = torch.randn(2 * size, size, generator=generator)
        x *= 2 ** torch.randn(size, generator=generator)
        return x.T @ x / len(x)

    for name, weight in weights.items():
        if weight.ndim == 2:
            hessians[name] = moments(weight.shape[1])
            if len(weight) <= weight.shape[1]:
                outputs[name] = moments(len(weight))
    fisher = {name: torch.rand(len(weights[name]), generator=generator) ** 2 for name in hessians}
    known = {kind + name: value for kind, found in (
        ("inputs.", hessians), ("fisher.", fisher), ("outputs.", outputs))
        for name, value in found.items()}
    count = sum(w.numel() for w in weights.values())
    for side, changes in (("scalar", dict(trellis=False)), ("trellis", dict(couple_rows=False)),
                          ("coupled rows", {})):
        config = dataclasses.replace(bench.config, **changes)
        quantizer, factor = timed(bench, train_gpt.Quantizer, weights, known, config, bench.device)
        _, codes = timed(bench, quantizer.codes_at, 1.0)
        bench.tell("gptq", side=side, factor_seconds=factor, codes_seconds=codes, weights=count)
    spent = 0.0
    for group in quantizer.groups:
        steps = 2.0 ** (group.plan.rows_NR.float() / train_gpt.OCTAVE)
        for i, name in enumerate(group.names):
            factors = train_gpt.factor_hessians(hessians[name][None].to(bench.device))
            spent += timed(bench, column_loop, group.w_NRC[i], factors, steps[i])[1]
    bench.tell("gptq", side="plain column loop", codes_seconds=spent, weights=count)
    for coder in ("rans", "brotli"):
        quantizer.config = config = dataclasses.replace(bench.config, compressor=coder)
        head, told = dict(config=train_gpt.artifact_config(config), order=[], kind="artifact"), []
        limit = int(0.43 * count)
        (multiplier, packed), seconds = timed(
            bench, train_gpt.fit_artifact, quantizer, head, limit,
            lambda *line, told=told: told.append(line))
        _, read = timed(bench, read_back, packed, config)
        codes_of = {name: found[0] for name, found in quantizer.codes_at(multiplier).items()}
        bench.tell("packing", codec=coder, seconds=seconds, passes=len(told), bytes=len(packed),
                   limit_bytes=limit, over_entropy=over_entropy(packed, codes_of),
                   read_seconds=read)


def candidates(bench: Bench):
    """Ours with each waiting kernel, and with all, against ours as it is: keep or drop."""
    if bench.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        bench.tell("candidates", skipped="they need a GPU, or TRITON_INTERPRET=1 with --tiny")
        return
    free(bench)
    batch, layout = bench.windows(bench.config.step_rows), bench.layouts["after"]
    base = Ours(bench)
    alone = [] if bench.tiny else [[name] for name in CANDIDATES]  # the interpreter is slow
    for names in ([], list(CANDIDATES), *alone):
        with swapped(train_gpt, names):
            side = Ours(bench)
        calls = {"base": stepper(base, batch, layout),
                 "with": stepper(side, batch, layout, names)}
        taken = in_turns(bench, calls, block_steps=5)
        before, after = (statistics.median(taken[name]) for name in calls)
        saved, spread = 1 - after / before, (max(taken["base"]) - min(taken["base"])) / before
        verdict = "keep" if saved >= max(0.01, spread) else "drop"
        bench.tell("swap", candidate="+".join(names) or "none (the same twice)",
                   base_ms=1000 * before, with_ms=1000 * after, saved_share=saved,
                   spread_share=spread, verdict=verdict if names else "-")
        del side, calls
        free(bench)


SECTIONS = {f.__name__: f for f in (
    step, frontier, memory, candidates, evaluation, parts, artifact, overlay)}


def chosen(text: str) -> Iterator[Callable[[Bench], None]]:
    """Yield the sections named in a list with commas; SystemExit names an unknown one."""
    for name in text.split(","):
        if name not in SECTIONS:
            sys.exit(f"--sections {name}: no such section; there are {', '.join(SECTIONS)}")
        yield SECTIONS[name]


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--rows", type=Path, help="append every row to this file, as JSON")
    options = parser.parse_args(argv)
    sections = list(chosen(options.sections))
    torch.manual_seed(0)
    bench = Bench(options.tiny, options.rows)
    if bench.device.type == "cpu" and not options.tiny:
        print("no GPU: full sizes take hours on a CPU; --tiny takes seconds", file=sys.stderr)
    with bench.scope:
        for section in sections:
            section(bench)


if __name__ == "__main__":
    main(sys.argv[1:])
