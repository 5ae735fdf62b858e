"""The steady step: the host never waits for a result. What compiles: test_graphs.py."""

import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import (
    random_model,
    random_tokens,
    steady,  # noqa: F401
    toy_config,
)

import train_gpt
from train_gpt import Average, Clock, Log, Optimizers, Rates, Runtime, Trainer, TrainState

# Operators whose result (or its size) the host must know before it goes on: on a GPU each waits.
# Copies to the host and `tolist` cannot be told on a CPU; the test on a GPU sees them.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select",
           "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def waits(function, args):
    """Return whether an operator makes the host wait; indexing does where an index is a mask."""
    name = function._schema.name.removeprefix("aten::")
    masks = args[1] if name in INDEXING else ()
    return name in WAITING or any(i is not None and i.dtype == torch.bool for i in masks)


class HostReads(TorchDispatchMode):
    """Counts waiting operators by the innermost function of the script that led to them."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args):
            self.places[self.place()] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def place():
        frame = sys._getframe()
        while frame and frame.f_code.co_filename != train_gpt.__file__:
            frame = frame.f_back
        return frame.f_code.co_name if frame else "outside"


class Windows:
    """Stands in for Loader: random windows of a step."""

    def __init__(self, config):
        self.config = config

    def batch(self, step, longest=0):
        length = self.config.train_seq_len + 1
        return train_gpt.Batch.of_windows(
            random_tokens(self.config, self.config.step_rows, length, seed=step))


def trainer_of(config):
    runtime = Runtime({}, config)
    model = random_model(config)
    optimizers = Optimizers(model, config, runtime)
    # as on a GPU; the CPU's other AdamW reads its step counter, which lies on the host there
    for group in optimizers.adamw.param_groups:
        group["fused"] = True
    average = Average(optimizers.bank, config)
    state = TrainState(model, optimizers, average)
    return Trainer(state, config, runtime, Log(False), Clock())


# ---- the host ------------------------------------------------------------------------------


def test_the_guard_sees_what_waits():
    x = torch.arange(3.0)
    for read in (lambda: x.sum().item(), lambda: bool(x[1] > 0), lambda: float(x[0]), x.nonzero,
                 lambda: x[x > 1], lambda: x.masked_fill_(x > 1, 0.0)[x > 0], x.unique,
                 lambda: torch.equal(x, x), lambda: torch.repeat_interleave(x.long())):
        with HostReads() as guard:
            read()
        assert guard.places.total() >= 1
    with HostReads() as guard:
        torch.where(x > 1, x, 0).clamp(max=x.mean()).add_(x)[x.long()].masked_fill_(x > 1, 0.0)
    assert not guard.places


@pytest.mark.parametrize("micro_batch_tokens", (64, 16))
def test_no_step_reads_anything_back(micro_batch_tokens):
    trainer = trainer_of(toy_config(micro_batch_tokens=micro_batch_tokens))
    loader = Windows(trainer.config)
    for step, phase in enumerate(trainer.phases):
        batch = loader.batch(step)
        with HostReads() as guard:
            trainer.update(batch, phase.layout, Rates(1.0, 0.9))
            trainer.state.average.update()
        assert guard.places == {}


@pytest.mark.parametrize("budget_seconds", (0.0, 1000.0), ids=("by steps", "by time"))
def test_the_loop_reads_the_clock_seldom_and_nothing_else(budget_seconds):
    """Far from the end: a reading at each of the first steps, then one in about twenty."""
    steps = 90
    trainer = trainer_of(toy_config(iterations=steps, train_log_every=0, val_loss_every=0,
                                    recur_start_step=10 ** 6, num_layers=2, recur_layers=()))
    ticks = itertools.count()  # a machine of any speed: a millisecond between any two looks
    trainer.clock = Clock(now=lambda: next(ticks) / 1000)
    readings, ask = [], trainer.between_steps
    trainer.between_steps = lambda path: (readings.append(trainer.state.step), ask(path))[1]
    with HostReads() as guard:
        trainer.train(Windows(trainer.config), budget_seconds,
                      lambda: train_gpt.Score(1.0, 1, 1), Path("never-written"))
    assert set(guard.places) <= {"agree", "check_gradients"}
    assert guard.places["check_gradients"] <= len(readings) + 1  # and once after the last step
    assert len([step for step in readings if step >= 10]) <= 1 + (steps - 10) // 15


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    trainer = trainer_of(toy_config(device="cuda", compile_enabled=False))
    batch = train_gpt.Batch(*(x.cuda() for x in Windows(trainer.config).batch(0)[:2]))
    layout = trainer.phases[0].layout
    trainer.update(batch, layout, Rates(1.0, 0.9))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update(batch, layout, Rates(1.0, 0.9))
        trainer.state.average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
