"""Every part of train_gpt.py that runs on a GPU, over fake "cuda" tensors, on a machine without.

Fake tensors have a device, a dtype and a shape and no values: what is worked out is where each
result lies. So this finds devices mixed in one operation, copies between host and device, and
values that the host asks for; of values, kernels and time it says nothing. `python -m nogpu` runs
it in a process of its own, for what it changes in torch stays changed.
"""

import contextlib
import dataclasses
import json
import sys
import traceback
import types
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  reads torch.Generator as a type: before that is replaced
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt.py"
SMALL = dict(
    vocab_size=29, train_seq_len=20, eval_seq_len=24, eval_stride=4, model_dim=16, mlp_mult=1.5,
    num_heads=2, num_kv_heads=1, rope_dims=4, num_layers=2, recur_layers=(0,), ve_layers=(1,),
    ve_dim=5, parallel_start_layer=1, xsa_last_n=1, train_batch_tokens=400, micro_batch_tokens=200,
    val_batch_tokens=1600, fp16_max_numel=10, warmup_steps=2)
FRONTIER = dict(ve_enabled=False, lane_routing="learned", skip_rows="orders", attn_gate="sparse",
                smear_gate=True, ns_coefficients="polar", doc_mask=True, row_tokens=100,
                train_seq_schedule=("10@0.1", "20@1"), recur_start_frac=0.35,
                eval_plan="documents")
FULL = dict(warmup_steps=2, train_batch_tokens=2 * 98304, micro_batch_tokens=98304)
SPAN = 6  # rows of a trellis at once: an eighth of the script's, and of its operators
# Faults planted in the script's text: name -> (part that shows it, the text, what stands there).
MUTANTS = {
    "a table on the host": (
        "step", "tables: Any = self.tables[length] if length in self.tables",
        "tables: Any = [t.cpu() for t in self.tables[length]] if length in self.tables"),
    "a mask on the host": ("stream", "later = torch.arange(q.shape[1], device=q.device)",
                           "later = torch.arange(q.shape[1])"),
    "an identity on the host": (
        "quantize_scalar", "one = torch.eye(hessian.shape[1]).to(hessian)",
        "one = torch.eye(hessian.shape[1], dtype=hessian.dtype)"),
    "sums on the host": (
        "collect_inputs", "torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)",
        "torch.zeros(flat.shape[1], flat.shape[1])"),
    "results on the host": ("collect_inputs", "        model(batch, layout)\n    return sums",
                            "        model(batch, layout)\n"
                            "    return {name: x.cpu() for name, x in sums.items()}"),
    "a step that asks for its norm": ("step", "factor = torch.ones_like(norm)",
                                      "factor = torch.full_like(norm, norm.item())"),
    "a step that looks at its loss": ("step", "total += loss.detach()",
                                      "total += loss.detach() if loss > 0 else 0"),
    "a step that picks by a mask": ("step", "total += loss.detach()",
                                    "total += loss.detach()[loss > 0].sum()"),
    "a step that copies there and back": (
        "step", "part.mul_(factor / self.runtime.world_size)",
        "part.mul_((factor / self.runtime.world_size).cpu().to(part.device))"),
    "an index from the host": (
        "step", "total += loss.detach()",
        "total += loss.detach()[None][torch.zeros(1, dtype=torch.int64)][0]"),
}


def place() -> str:
    """Return the innermost named function of the script that led here; "outside" if none did."""
    frame = sys._getframe()
    while frame and (frame.f_code.co_filename != str(SCRIPT) or frame.f_code.co_name[0] == "<"):
        frame = frame.f_back
    return frame.f_code.co_name if frame else "outside"


class Watch(TorchDispatchMode):
    """Above the fake mode: notes what crosses between host and device, and by whose hand."""

    def __init__(self):
        super().__init__()
        self.asked, self.copied, self.operators = Counter(), Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        if function.namespace == "prim":  # where a tensor lies, and the like
            return function(*args, **kwargs)
        if name in ("_local_scalar_dense", "item"):
            return self.answer(args[0])
        try:
            out = function(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self.asked[place()] += 1  # a size that depends on values: the host waits for it
            return args[0].new_empty(args[2] if name == "bincount" else 7)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        # a number of the host goes along by value, unless it is copied in its own right
        apart = [x.device.type for x in tensors if x.ndim or name in ("_to_copy", "copy_")]
        self.operators += any(x.device.type == "cuda" for x in tensors)
        self.copied[place()] += len(set(apart)) > 1
        return out

    def answer(self, tensor):
        """Return what a caller is told of a value that does not exist, so that it goes on."""
        where = place()
        self.asked[where] += tensor.device.type == "cuda"
        if tensor.dtype == torch.bool:  # is all finite: yes; did a factor fail: no
            return where != "factor_hessians" or self.asked[where] % 2 == 1
        return -1 if where == "check_gradients" else 0.01 if tensor.is_floating_point() else 3

    def row(self) -> dict:
        """Return what was seen since the last row."""
        row = dict(operators=self.operators, asked=dict(+self.asked), copied=dict(+self.copied))
        self.asked.clear(), self.copied.clear()
        self.operators = 0
        return row


@contextlib.contextmanager
def fake_torch(watch):
    """Hold what torch's Python side must be told for there to be a GPU without values."""
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator()  # a CPU build has no other
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.Tensor.item = lambda tensor: watch.answer(tensor)
    # in inference mode whole composite operators reach the modes, which fake tensors do not take
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield


def load_script(mutant=None):
    """Return train_gpt.py as a module, with one of MUTANTS planted."""
    source = SCRIPT.read_text(encoding="utf-8")
    if mutant:
        _, old, new = MUTANTS[mutant]
        assert source.count(old) == 1, f"{mutant}: the script has changed, plant it elsewhere"
        source = source.replace(old, new)
    module = sys.modules["train_gpt"] = types.ModuleType("train_gpt")
    module.__file__ = str(SCRIPT)
    exec(compile(source, str(SCRIPT), "exec"), module.__dict__)
    paths = module.trellis_paths()  # worked out from values: before there are none
    module.trellis_paths, module.SPAN = lambda: paths, SPAN
    return module


def runtime_of(module, ranks):
    """Return rank 0's Runtime of so many that all hold the same."""
    class Ranks(module.Runtime):
        def __init__(self):
            self.rank, self.world_size, self.is_main = 0, ranks, True
            self.device, self.compute_dtype = torch.device("cuda:0"), torch.bfloat16
            self.compiles, self.signals = False, module.Signals()

        def synchronize(self):
            pass

        def sum_(self, tensor):
            return tensor

        def agree(self, *values):
            return list(values) if len(values) > 1 else values[0]

        def scatter_sum(self, rows):
            return lambda: rows[:len(rows) // ranks].clone()

        def gather_rows(self, mine):
            return lambda: torch.cat([mine] * ranks)
    return Ranks()


class Shards:
    """Stands in for ShardSet."""

    num_windows = 99

    def __init__(self, length):
        self.length = length

    def windows(self, order):
        return np.zeros((len(order), self.length + 1), np.uint16)


def all_on(device, tensors):
    """Return "" where all tensors (a dict, list or tensor) are on a device, or the first not."""
    wrong = [str(tuple(x.shape)) for x in tree_leaves(tensors)
             if isinstance(x, torch.Tensor) and x.numel() and x.device.type != device]
    return f"not on {device}: {wrong[0]}" if wrong else ""


class Pass:
    """One way through training, calibration, quantiser and evaluation; a method is a part.

    Each part returns (where its results belong, the results).
    """

    def __init__(self, module, settings, ranks):
        self.t, self.config = module, module.Config(**settings)
        self.runtime = runtime_of(module, ranks)

    def build(self):
        with torch.device("cuda"):
            self.model = self.t.GPT(self.config, self.t.attention_sdpa, torch.bfloat16)
        self.model.init_weights(1)
        return "cuda", [*self.model.parameters(), self.model.tables]

    def trainer(self):
        t, config, runtime = self.t, self.config, self.runtime
        self.state = t.TrainState(self.model, t.Optimizers(self.model, config, runtime))
        self.trainer = t.Trainer(self.state, config, runtime, t.Log(False), t.Clock())
        self.state.average = self.t.Average(self.state.optimizers.bank, self.config)
        return "cuda", [self.state.optimizers.bank.weights, self.state.optimizers.momenta,
                        self.state.average.shadow]

    def warm_up(self):
        self.trainer.warm_up()
        return "cuda", self.state.optimizers.bank.weights

    def read(self):
        loader = self.t.Loader(Shards(self.config.row_len), self.config, self.runtime)
        self.batch = loader.read(0, loader.per_rank)
        return "cuda", self.batch

    def step(self):
        """Steps of both layouts: the part in which nothing may cross or be asked for."""
        for phase in self.trainer.phases:
            self.loss = self.trainer.update(self.batch, phase.layout, self.rates())
            self.state.average.update()
        return "cuda", [self.loss, self.trainer.grad_norm, self.trainer.first_bad,
                        self.state.average.shadow]

    def rates(self):
        return self.t.Rates(1.0, 0.95)

    def report(self):
        self.trainer.report(self.loss, self.rates())
        return "cuda", self.trainer.between_steps(None) and []

    def checkpoint(self):
        saved = {name: torch.empty(x.shape) for name, x in self.state.tensors().items()}
        self.state.load(saved, dict(step=1, changed=None), 1)
        self.state.average.apply()
        return "cuda", self.state.tensors()

    def score(self):
        for windows in (self.config.whole_windows, self.config.sliding_windows):
            self.t.score(self.trainer.losses_of, self.text(), windows, self.runtime)
        return "cuda", []

    def text(self):
        count = 5 * self.config.eval_seq_len + 3
        tokens = (np.arange(count + 1) % self.config.vocab_size).astype(np.uint16)
        return self.t.Validation(tokens, np.ones(count, np.uint16), count, "table", count, count,
                                 "")

    def stream(self):
        """Windowed attention, and a model that reads several windows at once."""
        t, config = self.t, self.config
        attend = t.windowed_attention(config.eval_seq_len)
        with torch.device("cuda"):
            model = t.GPT(config, attend, torch.bfloat16, config.stream_plan[0])
        layout = self.trainer.layout
        t.score(lambda batch: model.token_losses(batch, layout), self.text(), config.stream_plan,
                self.runtime)
        return "cuda", model.tables

    def attention(self):
        """What tries the backends at a run's start."""
        for attend in (self.t.attention_sdpa, self.t.attention_math):
            self.t.try_attention("math", attend, self.t.sdpa_only, self.config, self.runtime)
        return "cuda", []

    def collect_fisher(self):
        return "cuda", self.collected({})

    def collect_inputs(self):
        return "cuda", self.collected(dict(step_rule="sdclip"))

    def collected(self, changes):
        """Return the statistics of one batch, which are held against what the rule asks for."""
        calibration = self.t.Calibration(
            self.model, dataclasses.replace(self.config, **changes), self.runtime)
        batch = self.batch.split(calibration.rows)[0]
        found = calibration.collect(self.trainer.layout, batch, 0)
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        assert shapes == calibration.wanted, f"{shapes} where {calibration.wanted} is asked for"
        assert {value.dtype for value in found.values()} == {torch.float32}
        return found

    def quantize(self, **changes):
        """Factors, plans of steps, and codes, solved and rounded; statistics come from files."""
        config = dataclasses.replace(self.config, **changes)
        rule = self.t.STEP_RULES[config.rule](config)
        known = {name: torch.empty(shape) for name, shape in rule.statistics().items()}
        weights = {name: torch.empty(shape) for name, (shape, _) in self.t.weight_forms(
            config).items()}
        self.t.trellis_tables.cache_clear()
        quantizer = self.t.Quantizer(weights, known, config, self.runtime.device)
        on_gpu = [quantizer.rule.codes(group, 1.0, solved) for solved in (True, False)
                  for group in quantizer.groups]
        on_gpu += [[group.w_NRC, group.factors, group.plan]
                   for group in quantizer.groups]
        fault = all_on("cpu", quantizer.codes_at(1.0, False))
        assert not fault, fault
        return "cuda", on_gpu

    def quantize_trellis(self):
        """Some of each sort: a table, matrices whose rows are coupled, matrices whose are not."""
        return self.quantize(fp16_max_numel=150)

    def quantize_scalar(self):
        return self.quantize(trellis=False)

    def quantize_plain_tables(self):
        """Tables without GPTQ's feedback; matrices are not coded here, which saves their time."""
        return self.quantize(embed_gptq=False, fp16_max_numel=10 ** 6)

    def quantize_sdclip(self):
        return self.quantize(step_rule="sdclip")


START = ("build", "trainer", "read")  # what the others build upon
RUN = (*START, "step", "report", "checkpoint", "score")
PARTS = (*RUN, "warm_up", "stream", "attention", "collect_fisher", "collect_inputs",
         "quantize_trellis", "quantize_scalar", "quantize_plain_tables", "quantize_sdclip")
# name of a pass -> (settings, ranks, parts)
PASSES = dict(
    record=(SMALL, 1, PARTS), frontier=(SMALL | FRONTIER, 1, (*RUN, "collect_fisher")),
    ranks=(SMALL, 4, RUN), full=(FULL, 1, PARTS[:PARTS.index("quantize_trellis")]))


def rows_of(name, mutant=None):
    """Yield one row for each part of a pass: what was asked for, what was copied, what went wrong.

    The first part that fails is the last.
    """
    settings, ranks, parts = PASSES[name]
    if mutant:  # one layout is enough
        settings, parts = settings | dict(recur_layers=()), [*START, MUTANTS[mutant][0]]
    module, watch = load_script(mutant), Watch()
    with fake_torch(watch):
        run = Pass(module, settings, ranks)
        for part in parts:
            fault = ""
            try:
                fault = all_on(*getattr(run, part)())
            except Exception as error:
                frames = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
                          if f.filename == str(SCRIPT)]
                fault = f"{type(error).__name__}: {str(error)[:200]} in {frames[-1:]}"
            yield dict(kind=mutant or name, part=part, fault=fault, **watch.row())
            if fault:
                return


def main(names):
    """Print one row a line for the passes named, or for the record's with mutants planted."""
    torch.set_num_threads(1)
    with FakeTensorMode():  # fails here where the guard does not fit this torch
        torch.ones(2, device="cuda", requires_grad=True).sum().backward()
    print(json.dumps(dict(torch=torch.__version__)), flush=True)
    for name in names:
        pass_name, mutant = (name, None) if name in PASSES else ("record", name)
        for row in rows_of(pass_name, mutant):
            print(json.dumps(row), flush=True)
