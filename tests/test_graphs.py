"""Which graphs a run compiles, where, and what they hold: whole runs, with no code generated."""

import json
import signal
from collections import Counter

import pytest
import torch
import watch_graphs
from conftest import read_events
from toys import layouts_of, random_model, random_tokens, steady, toy_config  # noqa: F401

import train_gpt
from train_gpt import (
    Batch,
    Clock,
    Log,
    Optimizers,
    Runtime,
    Trainer,
    TrainState,
    batch_of_rows,
    schedule,
)

WATCH = "import watch_graphs; watch_graphs.install(train_gpt)\n"
# Two layers, one of them twice; two forwards a step; a validation on each side of the switch and
# at the end, whose last batch is a partial one.
SHALLOW = dict(COMPILE_ENABLED=1, NUM_LAYERS=2, RECUR_LAYERS="0", PARALLEL_START_LAYER=1,
               VE_LAYERS="1", XSA_LAST_N=1, MICRO_BATCH_TOKENS=512, WARMUP_STEPS=1, ITERATIONS=6,
               VAL_LOSS_EVERY=2)
FRONTIER = dict(VE_ENABLED=0, LANE_ROUTING="learned", SKIP_ROWS="orders", ATTN_GATE="sparse",
                SMEAR_GATE=1)
# What a model may be built of besides, and everything a run may do after training.
LATER = dict(TRELLIS=0, EVAL_SEQ_LEN=96, EVAL_MODE="stream",
             PREQUANT_SLIDING=1)
TABLES = {"sin", "cos", "pow", "outer", "exp", "log", "__pow__", "__rpow__", "float_power"}


class Compiled:
    """A run that has ended and the graphs it compiled."""

    def __init__(self, nursery, env, folder, before=""):
        self.ended = nursery.run(env, folder, before=WATCH + before)
        path = folder / watch_graphs.OUT
        assert path.exists(), self.ended.stderr
        self.graphs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.unlink()
        self.events = read_events(folder, env["RUN_ID"])
        self.config = train_gpt.load_config({name: str(value) for name, value in env.items()})

    def counts(self):
        """Return how many graphs of which function each span of the run's clock compiled."""
        return Counter((graph["span"], graph["function"]) for graph in self.graphs)


@pytest.fixture(scope="module")
def whole(nursery, small_env, tmp_path_factory):
    """A run of all that the later stages can do, the published frontier's parts in its model."""
    folder = tmp_path_factory.mktemp("graphs_whole")
    env = {name: value for name, value in small_env.items() if "SDCLIP" not in name}
    return Compiled(nursery, {**env, **SHALLOW, **FRONTIER, **LATER}, folder)


@pytest.fixture(scope="module")
def resumed(nursery, small_env, tmp_path_factory):
    """A run of the record's model that goes on from a checkpoint before the switch of depth."""
    folder, env = tmp_path_factory.mktemp("graphs_resumed"), {**small_env, **SHALLOW}
    stop = f"at_event('train', signal_self({int(signal.SIGTERM)}), 2)"
    first = nursery.run({**env, "COMPILE_ENABLED": 0}, folder, before=stop)
    assert first.rc == 128 + signal.SIGTERM, first.stderr
    return Compiled(nursery, {**env, "RESUME": 1}, folder)


def test_the_runs_did_what_they_are_to_show(whole, resumed):
    for run in (whole, resumed):
        assert run.ended.rc == 0, run.ended.stderr
        kinds = Counter(event["event"] for event in run.events)
        assert kinds["recurrence"] == 1 and kinds["val"] >= 3 and kinds["collected"] == 1
        assert kinds["sliding"] == 1 and kinds["resumed"] == (run is resumed)
        sequences = train_gpt.micro_batch_sequences(run.config, 1)
        assert sequences < run.config.step_rows, "several forwards a step"
        windows = -(-run.events[-1]["val_tokens"] // run.config.eval_seq_len)
        assert windows % run.config.eval_batch_windows, "a partial batch"
    assert whole.events[-1]["stream_bpb"] > 0


def test_training_is_a_graph_for_each_layout_and_length(whole, resumed):
    for name, run in dict(whole=whole, resumed=resumed).items():
        forms = {(phase.layout, phase.seq_len) for phase in train_gpt.phases(run.config)}
        assert len(forms) == 2
        counts = run.counts()
        assert counts["warmup", "mean_loss"] == 2, name
        assert sum(n for (_, function), n in counts.items() if function == "mean_loss") == 2, name


def test_only_warm_up_and_new_shapes_of_the_evaluation_compile(whole, resumed):
    """Sliding windows score their ends: one more graph. A stream's windows: a first one and ends.

    Nothing is compiled again by the switch of depth, a validation, a partial batch, calibration,
    exact arithmetic in the quantiser, or a fresh model of the same sizes after it.
    """
    warm = {("warmup", "mean_loss"): 2, ("warmup", "token_losses"): 2}
    assert resumed.counts() == warm | {("evaluate", "token_losses"): 1}
    assert whole.counts() == warm | {("validation", "token_losses"): 1,
                                     ("evaluate", "token_losses"): 2}


def test_the_script_counts_no_recompilation_either(whole, resumed):
    for run in (whole, resumed):
        assert "recompiled" not in {event["event"] for event in run.events}


def test_graphs_are_whole_and_hold_no_tables(whole, resumed):
    """No break, and nothing of the rotary tables: they are worked out once, not in each kernel."""
    for name, run in dict(whole=whole, resumed=resumed).items():
        for graph in run.graphs:
            where = name, graph["span"], graph["function"], graph["sizes"]
            assert graph["breaks"] == {}, where
            assert {"linear", "scaled_dot_product_attention"} < set(graph["calls"]), where
            assert TABLES & set(graph["calls"]) == set(), where


# ---- one model, one count -------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Watch what this test compiles; `watch.rows()` tells."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    watch = watch_graphs.Watch()
    monkeypatch.setattr(torch, "compile", watch.compiled)
    yield watch
    torch._dynamo.reset()


TOY = dict(compile_enabled=True, num_layers=2, recur_layers=(0,), parallel_start_layer=1,
           ve_layers=(1,), xsa_last_n=1, warmup_steps=0)


def trainer_of(**changes):
    config = toy_config(**{**TOY, **changes})
    runtime, model = Runtime({}, config), random_model(config)
    state = TrainState(model, Optimizers(model, config, runtime))
    return Trainer(state, config, runtime, Log(False), Clock())


def test_a_layouts_graph_serves_every_length_of_a_schedule(watch):
    """The graphs of packed rows and documents: none is compiled after warm-up."""
    trainer = trainer_of(doc_mask=True, row_tokens=32, recur_start_frac=0.5, eval_plan="documents",
                         train_seq_schedule=("2@0.2", "4@0.7", "8@1"), sliding_window_enabled=False)
    assert [(phase.seq_len, len(phase.layout.steps)) for phase in trainer.phases] == [
        (2, 2), (4, 2), (4, 3), (8, 3)]
    trainer.warm_up()
    warm = Counter(row["function"] for row in watch.rows())
    assert warm == dict(mean_loss=2, token_losses=2)
    for seed, phase in enumerate(trainer.phases):
        ids = random_tokens(trainer.config, 2, 33, seed).numpy().astype("uint16")
        batch = batch_of_rows(ids, trainer.config, trainer.runtime, phase.seq_len)
        trainer.update(batch, phase.layout, schedule(trainer.config, 0, 0.0))
    assert Counter(row["function"] for row in watch.rows()) == warm


def test_the_watch_sees_tables_in_a_graph(watch):
    """A length that the model has no tables of is worked out in the graph."""
    trainer = trainer_of()
    trainer.state.model.tables.clear()
    batch = Batch.of_windows(random_tokens(trainer.config, 2, 9))
    trainer.mean_loss(batch, trainer.layout)
    assert {"sin", "cos"} <= TABLES & set(watch.rows()[0]["calls"])
    assert TABLES & {"pow", "__pow__", "__rpow__"} & set(watch.rows()[0]["calls"])


def test_the_watch_sees_what_makes_the_compiler_start_again(watch):
    """Precision of products, other rows, gradients or none; not a second model of these sizes."""
    trainer, other = trainer_of(), trainer_of()
    layout, plain = layouts_of(trainer.config)[1], layouts_of(trainer.config)[0]
    batch = Batch.of_windows(random_tokens(trainer.config, 4, 9))
    counts = []

    def count(losses, batch, layout=layout):
        losses(batch, layout)
        counts.append(len(watch.rows()))

    with torch.inference_mode():
        count(trainer.token_losses, batch)
        count(other.token_losses, batch)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            count(other.token_losses, batch)
        finally:
            torch.set_float32_matmul_precision(before)
        count(trainer.token_losses, batch)
        count(trainer.token_losses, batch.split(3)[1])
        count(trainer.token_losses, batch, plain)
    assert counts == [1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("changes", ({}, dict(
    lane_routing="learned", skip_rows="orders", attn_gate="sparse", smear_gate=True)),
    ids=("record", "frontier"))
def test_graphs_differentiated_ahead_of_time_give_the_same_gradients(changes):
    """What the compiler makes of a forward before it generates code."""
    config = toy_config(**{**TOY, **changes})
    model, layout = random_model(config), layouts_of(config)[1]
    batch = Batch.of_windows(random_tokens(config, 2, 9))
    found = []
    torch._dynamo.reset()
    for loss in (model.mean_loss, torch.compile(model.mean_loss, dynamic=False, fullgraph=True,
                                                backend="aot_eager")):
        value = loss(batch, layout)
        found.append([value, *torch.autograd.grad(value, [*model.parameters()])])
    torch._dynamo.reset()
    for eager, ahead in zip(*found):
        torch.testing.assert_close(ahead, eager, rtol=1e-5, atol=1e-6)
