"""Laws of interrupted and failing runs: what was paid for survives, and the end says why.

Runs are forked (see forks.py) and disturbed at named points. Undisturbed ones of the same settings
are the yardstick: bytes and digits must come out the same.
"""

import hashlib
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPO, SCRIPT, run_script
from forks import Ended
from toys import toy_config

import train_gpt
from train_gpt import ConfigError, Journal

RESUME = dict(RESUME=1)
OFTEN = dict(CHECKPOINT_EVERY_SECONDS=1e-4)  # a checkpoint before each step
KINDS = {"final_model.weights": "weights", "final_model.stats": "stats",
         "final_model.int6.ptz": "artifact", "checkpoint": "checkpoint"}
PRODUCTS = {"final_model.weights", "final_model.stats", "final_model.int6.ptz", "scores.json"}
LOST_TOUCH = "lost touch with another rank"


def products(cwd) -> dict[str, str]:
    """Return the hash of each product of run x; requires that what looks finished is whole."""
    folder = cwd / "runs" / "x"
    for path in folder.glob("*"):
        if path.name in KINDS:
            train_gpt.read_tensors(path, KINDS[path.name])
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in PRODUCTS if (folder / name).exists()}


def complete(cwd) -> dict[str, str]:
    """Return the products of a run that has all of them and left nothing half-written."""
    found = products(cwd)
    assert set(found) == PRODUCTS and not list(cwd.rglob("*.part"))
    return found


@pytest.fixture(scope="module")
def whole(small_run):
    """What nothing disturbed: the folder and the products of one rank."""
    return small_run, complete(small_run)


@pytest.fixture(scope="module")
def whole_of_two(nursery, small_env, shared):
    """The products of two ranks, whose sums are rounded otherwise."""
    def make(cwd):
        for rank in nursery.start_ranks([small_env] * 2, cwd):
            assert rank.wait().rc == 0
        return complete(cwd)
    return shared("whole_of_two", make)


def errors(run: Ended) -> list[str]:
    """Return the causes that a run gave; it may not have shown a traceback."""
    assert "Traceback" not in run.stderr, run.stderr
    return [line for line in run.stderr.splitlines() if line.startswith("error: ")]


def events(cwd, kind) -> list[dict]:
    lines = (cwd / "runs/x/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# ---- killed runs go on -------------------------------------------------------------------------


def test_a_run_killed_in_every_stage_ends_with_the_bytes_of_an_undisturbed_one(
        nursery, small_env, whole, tmp_path):
    """Killed in training, in calibration (weights there, no statistics), and so on, in turn."""
    env, left = {**small_env, **OFTEN, "WARMUP_STEPS": 2}, set()
    for kind, nth, new in (("train", 5, set()), ("collecting", 1, {"final_model.weights"}),
                           ("quantized", 1, {"final_model.stats"}),
                           ("roundtrip", 1, {"final_model.int6.ptz"})):
        killed = nursery.run(env, tmp_path, before=f"at_event('{kind}', signal_self(), {nth})")
        left, env = left | new, {**env, **RESUME}
        assert killed.rc == -signal.SIGKILL and set(products(tmp_path)) == left
        assert (tmp_path / "runs/x/checkpoint").exists() == (kind == "train"), "until weights exist"
    last = nursery.run(env, tmp_path)
    assert last.rc == 0 and products(tmp_path) == whole[1]
    assert "not record-eligible" in last.stdout and events(tmp_path, "result")[0]["resumed"]
    losses = {event["step"]: event["train_loss"] for event in events(tmp_path, "train")}
    assert losses == {event["step"]: event["train_loss"] for event in events(whole[0], "train")}


def test_a_run_stopped_before_its_first_step_goes_on(nursery, small_env, whole, tmp_path):
    """AdamW has no moments yet, and a checkpoint without them is whole."""
    before = "at_call(train_gpt.Trainer, 'train', signal_self(signal.SIGTERM))"
    run = nursery.run(small_env, tmp_path, before=before)
    assert run.rc == 128 + signal.SIGTERM and (tmp_path / "runs/x/checkpoint").exists()
    again = nursery.run({**small_env, **RESUME}, tmp_path)
    assert again.rc == 0, again.stderr
    assert products(tmp_path) == whole[1]


def test_a_resumed_run_has_the_clock_of_the_first_part(nursery, small_env, tmp_path):
    env = {**small_env, **OFTEN}
    nursery.run(env, tmp_path, before="at_event('train', signal_self(), 6)")
    header, _ = train_gpt.read_tensors(tmp_path / "runs/x/checkpoint", "checkpoint")
    spent = {event["step"]: event["train_seconds"] for event in events(tmp_path, "train")}
    saved = round(header["training_seconds"], 3)  # as in the log
    assert spent[header["step"]] <= saved <= spent[6] and header["step"] == 5
    stop = "at_event('ema', signal_self())"
    nursery.run({**env, **RESUME}, tmp_path, before=stop)
    first, second = (event for event in events(tmp_path, "train") if event["step"] == 6)
    assert first["train_seconds"] == spent[6] and second["train_seconds"] > saved


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "collecting", "quantized", "roundtrip"])
def test_two_ranks_killed_anywhere_end_with_the_bytes_of_undisturbed_ones(
        nursery, small_env, whole_of_two, tmp_path, kind):
    env = {**small_env, **OFTEN}
    before = f"at_event('{kind}', signal_self(), {3 if kind == 'train' else 1})"
    first, other = nursery.start_ranks([env] * 2, tmp_path, (before, before))
    assert first.wait().rc == -signal.SIGKILL
    assert other.wait().rc in (1, -signal.SIGKILL)  # 1 where rank 0 alone comes by
    for rank in nursery.start_ranks([{**env, **RESUME}] * 2, tmp_path):
        assert rank.wait().rc == 0
    assert products(tmp_path) == whole_of_two


# Tells each stretch that is scored, and makes stretches of one batch.
TELL = """
train_gpt.STRETCH_TOKENS = 1
note = train_gpt.Journal.__setitem__
train_gpt.Journal.__setitem__ = lambda *args: (note(*args), print("scored", args[1]))
"""


def test_a_killed_evaluation_goes_on_where_it_was_with_the_same_digits(
        nursery, small_env, whole, tmp_path):
    evaluate = {**small_env, "STAGE": "evaluate", "INPUT_PATH": whole[0] / "runs/x",
                "VAL_BATCH_TOKENS": 8192}
    for name in ("SDCLIP_K", "SDCLIP_K_EMBED"):
        del evaluate[name]
    runs = {name: tmp_path / name for name in ("once", "again")}
    for cwd in runs.values():
        cwd.mkdir()
    once = nursery.run(evaluate, runs["once"], TELL)
    killed = nursery.run(evaluate, runs["again"],
                         TELL + "at_call(train_gpt.Journal, '__setitem__', signal_self(), 9)")
    assert killed.rc == -signal.SIGKILL
    with open(runs["again"] / "runs/x/evaluation.0.jsonl", "ab") as journal:
        journal.write(b'\n["slid')  # a torn line
    again = nursery.run({**evaluate, **RESUME}, runs["again"], TELL)
    assert again.rc == once.rc == 0, again.stderr
    stretches = [[line for line in run.stdout.splitlines() if line.startswith("scored ")]
                 for run in (once, again)]
    assert len(stretches[0]) > 12 and stretches[1] == stretches[0][8:], "8 were finished"
    assert products(runs["again"]) == products(runs["once"])
    assert not list(runs["again"].rglob("evaluation.*")), "the scores hold it now"


@pytest.mark.parametrize("line", [
    '["other task", 0, 1.5, 8, 9]', '["task", 0, 1.5', '["task", 0, null, 8, 9]', '["task", 0]',
    "7", "{}", '["task", Infinity, 1.5, 8, 9]', '["task", 0, "x", 8, 9]', "[" * 100_000, "null",
    "9" * 5000, "\0", '["task", 0, {}, 8, 9]', '"task"', '[["task"], 0, 1.5, 8, 9]',
    '["task", 0, 1.5, 8]', '["task", 0, 1.5, 8, 9, 10]', '["task", 0, 1.5, Infinity, 9]'])
def test_a_journal_ignores_what_it_did_not_write(tmp_path, line):
    path = tmp_path / "journal"
    Journal(path, "task")[1] = [2.5, 8, 9]
    with open(path, "a") as file:
        file.write(line)
    journal = Journal(path, "task")
    assert journal == {1: [2.5, 8, 9]}
    journal[2] = [3.5, 4, 5]
    assert Journal(path, "task") == {1: [2.5, 8, 9], 2: [3.5, 4, 5]}


def test_a_run_goes_on_only_as_it_began(nursery, small_env, tmp_path):
    env = {**small_env, **RESUME}
    stop = "at_event('train', signal_self())"
    assert nursery.run(small_env, tmp_path, before=stop).rc == -signal.SIGKILL
    other = nursery.run({**env, "MATRIX_LR": 0.5}, tmp_path)
    assert other.rc == 1 and errors(other) == [
        "error: RESUME=1: MATRIX_LR is 0.5, runs/x began with 0.022; go on with what it began "
        "with, or choose another RUN_ID"]
    code = tmp_path / "train_gpt.py"
    code.write_text(SCRIPT.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    other = nursery.run(env, tmp_path, script=code)
    assert other.rc == 1 and ["RESUME=1: train_gpt.py is" in line for line in errors(other)] == [
        True]
    (tmp_path / "runs/x/run.json").write_text("[1, 2")
    other = nursery.run(env, tmp_path)
    assert other.rc == 1 and "run.json is damaged" in errors(other)[0]


def test_resuming_needs_the_name_of_the_run():
    with pytest.raises(ConfigError, match="RESUME=1: needs the RUN_ID"):
        train_gpt.load_config({"RESUME": "1"})


# ---- signals -----------------------------------------------------------------------------------


def test_a_signal_saves_says_where_and_ends_the_run(nursery, small_env, whole, tmp_path):
    """The same run is started again after each of five signals, in each stage one."""
    env, left = {**small_env, "WARMUP_STEPS": 2}, set()
    for number, kind, nth, new in (
            (signal.SIGTERM, "warmup_step", 2, set()), (signal.SIGINT, "train", 3, {"checkpoint"}),
            (signal.SIGTERM, "ema", 1, {"final_model.weights"}),  # after the last look at the clock
            (signal.SIGINT, "quantized", 1, {"final_model.stats"}),
            (signal.SIGTERM, "roundtrip", 1, {"final_model.int6.ptz"})):
        before = f"at_event('{kind}', signal_self({int(number)}), {nth})"
        run = nursery.run(env, tmp_path, before)
        left, env = (left | new) - ({"checkpoint"} if kind == "ema" else set()), {**env, **RESUME}
        assert run.rc == 128 + number and run.stderr == ""
        assert run.stdout.splitlines()[-1] == (f"stopped by {number.name}: what was finished is in "
                                               "runs/x; go on with RESUME=1 RUN_ID=x")
        found = {path.name for path in (tmp_path / "runs/x").iterdir()}
        assert found & (PRODUCTS | {"checkpoint"}) == left
        assert ("checkpoint: step 3 in runs/x/checkpoint" in run.stdout) == (kind == "train")
    assert nursery.run(env, tmp_path).rc == 0
    assert products(tmp_path) == whole[1]


def test_a_second_signal_leaves_at_once_and_an_echo_of_the_first_does_not(
        nursery, small_env, tmp_path):
    """A terminal and torchrun may both send the first one."""
    send = "lambda: [os.kill(os.getpid(), 15), time.sleep({}), os.kill(os.getpid(), 2)]"
    for name, seconds, rc, saved in (("echo", 0.05, 143, True), ("second", 1.1, 130, False)):
        cwd = tmp_path / name
        cwd.mkdir()
        run = nursery.run(small_env, cwd, f"at_event('train', {send.format(seconds)}, 3)")
        assert run.rc == rc and run.stderr == ""
        assert (cwd / "runs/x/checkpoint").exists() == ("stopped by" in run.stdout) == saved


@pytest.mark.parametrize("name", ["preflight", "predict"])
def test_an_interrupt_before_the_run_leaves_nothing_and_no_traceback(
        nursery, small_env, tmp_path, name):
    run = nursery.run(small_env, tmp_path, f"at_call(train_gpt, '{name}', signal_self(2))")
    assert (run.rc, run.stdout, run.stderr) == (130, "", "") and not list(tmp_path.iterdir())


# ---- ranks -------------------------------------------------------------------------------------


def in_step(nth: int, action: str) -> str:
    return f"at_call(train_gpt.Trainer, 'update', {action}, {nth})"


def test_two_ranks_stop_together_on_one_ranks_signal(nursery, small_env, tmp_path):
    """What one rank was told ends all of them after the same step, saved."""
    ranks = nursery.start_ranks([small_env] * 2, tmp_path, (in_step(4, "signal_self(15)"), ""))
    runs = [rank.wait(60) for rank in ranks]
    assert [run.rc for run in runs] == [143, 143] and not any(errors(run) for run in runs)
    assert sum("stopped by SIGTERM" in run.stdout for run in runs) == 1
    header, _ = train_gpt.read_tensors(tmp_path / "runs/x/checkpoint", "checkpoint")
    assert header["step"] == 4


def test_when_a_rank_dies_the_other_says_so_and_the_run_can_go_on(
        nursery, small_env, whole_of_two, tmp_path):
    env = {**small_env, **OFTEN}
    survivor, dead = (rank.wait(60) for rank in nursery.start_ranks(
        [env] * 2, tmp_path, ("", in_step(4, "signal_self()"))))
    assert dead.rc == -signal.SIGKILL and survivor.rc == 1
    (cause,) = errors(survivor)
    assert LOST_TOUCH in cause and "RESUME=1" in cause
    assert [rank.wait(60).rc for rank in nursery.start_ranks([{**env, **RESUME}] * 2, tmp_path)] \
        == [0, 0]
    assert products(tmp_path) == whole_of_two


def test_when_a_rank_fails_its_own_cause_is_told(nursery, small_env, tmp_path):
    before = in_step(4, "fail(ValueError('shard 7: unreadable'))")
    other, failed = (rank.wait(60) for rank in nursery.start_ranks(
        [small_env] * 2, tmp_path, ("", before)))
    assert (other.rc, failed.rc) == (1, 1)
    assert errors(failed) == ["error: shard 7: unreadable"]
    (cause,) = errors(other)
    assert LOST_TOUCH in cause and "whose own message says why" in cause


@pytest.mark.slow
@pytest.mark.parametrize("rank, point, action, cause", [
    (0, "train_gpt, 'fit_artifact'", "fail(MemoryError())", "out of memory"),
    (0, "train_gpt, 'fit_artifact'", "signal_self()", None),
    (0, "train_gpt, 'write_tensors'", "fail(OSError(28, 'No space left'))", "No space left"),
    (1, "train_gpt, 'collect_inputs'", "signal_self()", None),
    (1, "train_gpt, 'load_artifact'", "signal_self()", None),
    (1, "train_gpt, 'preflight'", "signal_self()", None),
    (1, "train_gpt, 'load_config'", "signal_self()", None)])
def test_a_rank_that_ends_anywhere_ends_the_others(nursery, small_env, tmp_path, rank, point,
                                                   action, cause):
    env, befores = {**small_env, "DIST_TIMEOUT_SECONDS": 10}, ["", ""]
    befores[rank] = f"at_call({point}, {action})"
    ranks = nursery.start_ranks([env] * 2, tmp_path, befores)
    runs = [child.wait(60) for child in ranks]
    assert all(run.rc for run in runs)
    told = [line for run in runs for line in errors(run)]
    assert sum(LOST_TOUCH in line for line in told) <= 1 and len(told) in (1, 2)
    assert cause is None or any(cause in line for line in told)


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_other_after_the_limit(nursery, small_env, tmp_path, stopped):
    env, befores = {**small_env, "DIST_TIMEOUT_SECONDS": 4}, ["", ""]
    befores[stopped] = in_step(4, "signal_self(signal.SIGSTOP)")
    ranks = nursery.start_ranks([env] * 2, tmp_path, befores)
    try:
        survivor = ranks[1 - stopped].wait(60)
    finally:
        ranks[stopped].kill()
    assert survivor.rc == 1 and survivor.seconds > 4
    (cause,) = errors(survivor)
    assert LOST_TOUCH in cause


def test_ranks_with_other_settings_code_or_data_refuse_to_start(
        nursery, small_env, tiny_data, tmp_path):
    data, code = tmp_path / "data", tmp_path / "train_gpt.py"
    shutil.copytree(tiny_data.shards, data)
    shard = data / "fineweb_train_000001.bin"
    raw = bytearray(shard.read_bytes())
    raw[2000] ^= 1  # one token
    shard.write_bytes(raw)
    code.write_text(SCRIPT.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    for changes, script, names in (
            (dict(SEED=3, MATRIX_LR=0.5), SCRIPT, ["SEED", "MATRIX_LR"]),
            (dict(DATA_PATH=data), SCRIPT, ["DATA_PATH", "train shards"]),
            ({}, code, ["train_gpt.py"])):
        one, other = nursery.start_ranks([small_env, {**small_env, **changes}], tmp_path,
                                         scripts=(SCRIPT, script))
        one, other = one.wait(60), other.wait(60)
        assert (one.rc, other.rc) == (1, 1) and errors(other) == []
        found = errors(one)
        assert sorted(line.split(": ")[1] for line in found) == sorted(names), found
        assert all("rank 1 has" in line and "start every rank with the same" in line
                   for line in found)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torchrun", "rank"])
def test_under_torchrun_all_ranks_end_and_the_run_can_go_on(
        small_env, whole_of_two, tmp_path, victim):
    """torchrun passes a SIGTERM on, and terminates the siblings of a rank that died."""
    script, whom, number = tmp_path / "disturbed.py", "os.getpid()", signal.SIGKILL
    if victim == "torchrun":
        whom, number = "os.getppid()", signal.SIGTERM
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]\n"
        "import train_gpt\nfrom forks import at_call\nif os.environ['RANK'] == '1':\n"
        f"    act = lambda: os.kill({whom}, {int(number)})\n"
        "    at_call(train_gpt.Trainer, 'update', act, 5)\n"
        "os._exit(train_gpt.main([], os.environ))\n")
    env = {**small_env, **(OFTEN if victim == "rank" else {})}  # torchrun's signal saves by itself
    run = run_script(env, tmp_path, nproc=2, script=script)
    assert run.rc != 0 and (tmp_path / "runs/x/checkpoint").exists()
    assert run_script({**env, **RESUME}, tmp_path, nproc=2).rc == 0
    assert products(tmp_path) == whole_of_two


# ---- numbers -----------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_name_step_and_tensor_and_keep_the_checkpoint(
        nursery, small_env, tmp_path):
    """A weight becomes NaN before step 5; up to there all was well."""
    poison = """
update = train_gpt.Trainer.update
def poisoned(trainer, *args):
    if trainer.state.step == 5:
        trainer.state.model.get_parameter("skip_weights").data[0] = float("nan")
    return update(trainer, *args)
train_gpt.Trainer.update = poisoned
"""
    run = nursery.run({**small_env, **OFTEN}, tmp_path, poison)
    (cause,) = errors(run)
    assert run.rc == 1 and "not finite at step 5" in cause and "skip_weights" in cause
    assert cause.endswith("Last good checkpoint: runs/x/checkpoint of step 5")
    header, tensors = train_gpt.read_tensors(tmp_path / "runs/x/checkpoint", "checkpoint")
    assert header["step"] == 5 and all(t.isfinite().all() for t in tensors.values())
    assert products(tmp_path) == {} and events(tmp_path, "failed")


def test_a_last_step_that_ruins_the_weights_leaves_no_product(nursery, small_env, tmp_path):
    """Its own gradients were finite: only the validation after it shows the ruin."""
    run = nursery.run({**small_env, "MATRIX_LR": 1e38, "ITERATIONS": 1}, tmp_path)
    (cause,) = errors(run)
    assert run.rc == 1 and "validation loss" in cause and "step 1" in cause and "MATRIX_LR" in cause
    assert products(tmp_path) == {}


def toy_quantizer(control_dtype, changes):
    config = toy_config(control_dtype=control_dtype, gptq_enabled=False, fp16_max_numel=200)
    model = train_gpt.GPT(config)
    model.init_weights(0)
    weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for name, value in changes.items():
        weights[name].view(-1)[0] = value
    return train_gpt.Quantizer(weights, {}, config, "cpu")


@pytest.mark.parametrize("name, dtype", [("blocks.1.attn.q_gain", "float16"),
                                         ("blocks.1.resid_mix", "float16"),
                                         ("ve.proj.weight", "float32")])
@pytest.mark.parametrize("value", [65_520.0, -1e6, float("inf")])
def test_what_fp16_cannot_hold_is_refused_at_packing(name, dtype, value):
    toy_quantizer(dtype, {name: 65_504.0}).tensors_at(1.0)
    with pytest.raises(ValueError, match=f"{name}: .*float16"):
        toy_quantizer(dtype, {name: value}).tensors_at(1.0)


def test_an_indefinite_hessian_is_damped_counted_and_logged(nursery, small_env, whole, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(whole[0] / "runs/x", source)
    header, means = train_gpt.read_tensors(source / "final_model.stats", "stats")
    ill = "inputs.blocks.2.mlp.down.weight"
    means[ill] = torch.eye(len(means[ill]))
    means[ill][0, 1] = means[ill][1, 0] = 1.05  # eigenvalues 2.05 and -0.05
    train_gpt.write_tensors(source / "final_model.stats", header, means)
    run = nursery.run({**small_env, "STAGE": "quantize", "INPUT_PATH": source}, tmp_path)
    assert run.rc == 0, run.stderr
    (event,) = events(tmp_path, "gptq_redamp")
    assert event["name"] == ill.removeprefix("inputs.") and event["damp"] > train_gpt.GPTQ_DAMP


LITTLE_MEMORY = """
def starve():
    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20),) * 2)
at_event('train', starve, 2)
"""


@pytest.mark.parametrize("before", [
    pytest.param(LITTLE_MEMORY, id="cpu", marks=pytest.mark.slow), pytest.param(
        in_step(3, "fail(train_gpt.torch.OutOfMemoryError('CUDA out of memory.'))"), id="cuda")])
def test_running_out_of_memory_names_the_setting_to_change(nursery, small_env, tmp_path, before):
    tokens = 16_384 if before == LITTLE_MEMORY else 1024
    env = {**small_env, "TRAIN_BATCH_TOKENS": tokens, "MICRO_BATCH_TOKENS": tokens}
    run = nursery.run(env, tmp_path, before, timeout=60)
    (cause,) = errors(run)
    assert run.rc == 1 and "MICRO_BATCH_TOKENS" in cause
    products(tmp_path)


# ---- disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", pytest.param("replace", marks=pytest.mark.slow)])
def test_a_full_disk_at_any_write_loses_nothing(nursery, small_env, whole, tmp_path, call):
    """The same run is started again after each failed write, until it gets through."""
    env, made = {**small_env, **RESUME}, ["run.json", "final_model.weights", "final_model.stats",
                                          "final_model.int6.ptz", "scores.json"]
    for i, name in enumerate(made):
        full = f"fail(OSError(28, 'No space left on device')), {min(i, 1) + 1}"
        run = nursery.run(env, tmp_path, f"at_call(os, '{call}', {full})")
        (cause,) = errors(run)
        assert run.rc == 1 and cause.startswith(f"error: runs/x/{name}: not written (No space")
        assert "RESUME=1" in cause and not list(tmp_path.rglob("*.part"))
        found = products(tmp_path)
        assert found == {kept: whole[1][kept] for kept in made[1:i]}
    assert nursery.run(env, tmp_path).rc == 0
    assert products(tmp_path) == whole[1]


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
        nursery, small_env, whole, tmp_path):
    """No file may be larger than the largest product: a checkpoint is."""
    most = max((whole[0] / "runs/x" / name).stat().st_size for name in PRODUCTS)
    run = nursery.run({**small_env, **OFTEN}, tmp_path, f"limit_file_bytes({most})")
    assert run.rc == 0 and "no checkpoint at step 1: runs/x/checkpoint: not written" in run.stdout
    assert products(tmp_path) == whole[1] and not list(tmp_path.rglob("checkpoint*"))


FULL_LOG = """
init = train_gpt.Log.__init__
def full(log, *args):
    init(log, *args)
    log.files[1] = open("/dev/full", "a", buffering=1)
train_gpt.Log.__init__ = full
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("before, warnings", [
    pytest.param(FULL_LOG, 1, id="log"),
    pytest.param("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 0, id="console",
                 marks=pytest.mark.slow)])
def test_a_log_that_cannot_be_written_does_not_end_the_run(
        nursery, small_env, whole, tmp_path, before, warnings):
    run = nursery.run(small_env, tmp_path, before)
    assert run.rc == 0 and run.stderr == ""
    assert run.stdout.count("warning: logging to the console only") == warnings
    assert products(tmp_path) == whole[1]


def test_a_closed_folder_is_refused_before_the_run(nursery, small_env, tmp_path):
    tmp_path.chmod(0o555)
    try:
        run = nursery.run(small_env, tmp_path, "obey_permissions()")
    finally:
        tmp_path.chmod(0o755)
    (cause,) = errors(run)
    assert run.rc == 1 and "not writable" in cause and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, kept", [
    ("collecting", ["final_model.weights"]), pytest.param("train", [], marks=pytest.mark.slow)])
def test_a_folder_closed_during_the_run_ends_it_and_nothing_is_lost(
        nursery, small_env, whole, tmp_path, kind, kept):
    before = f"obey_permissions()\nat_event('{kind}', lambda: os.chmod('runs/x', 0o555))"
    run = nursery.run(small_env, tmp_path, before)
    (tmp_path / "runs/x").chmod(0o755)
    (cause,) = errors(run)
    assert run.rc == 1 and "not written (Permission denied)" in cause
    assert products(tmp_path) == {name: whole[1][name] for name in kept}
    assert nursery.run({**small_env, **RESUME}, tmp_path).rc == 0
    assert products(tmp_path) == whole[1]


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 300, 600, 1300, 1700])
def test_a_really_full_disk_loses_nothing(nursery, small_env, whole, tmp_path, kib):
    """On a file system of so many KiB, which then gets room; the check before a run is off."""
    def mount(*options):
        return subprocess.run(["mount", *options, str(runs)], capture_output=True).returncode

    runs = tmp_path / "runs"
    runs.mkdir()
    if mount("-t", "tmpfs", "-o", f"size={kib}k", "none"):
        pytest.skip("mounting needs root")
    try:
        run = nursery.run(small_env, tmp_path, "train_gpt.disk_need_bytes = lambda config: 0")
        assert run.rc == 1 and "No space left" in errors(run)[0]
        found = products(tmp_path)
        assert found == {name: whole[1][name] for name in found}
        assert not list(tmp_path.rglob("*.part")) and mount("-o", "remount,size=64m") == 0
        assert nursery.run({**small_env, **RESUME}, tmp_path).rc == 0
        assert products(tmp_path) == whole[1]
    finally:
        subprocess.run(["umount", str(runs)], check=True)


# ---- again and again ---------------------------------------------------------------------------


@pytest.mark.slow
def test_five_runs_give_one_artifact(nursery, tiny_env, tmp_path):
    """With the search for the finest steps, as the tiny run has it."""
    found = set()
    for i in range(5):
        cwd = tmp_path / str(i)
        cwd.mkdir()
        assert nursery.run({**tiny_env, "RUN_ID": "x"}, cwd).rc == 0
        found.add(tuple(sorted(products(cwd).items())))
    assert len(found) == 1

