"""Laws of the whole script: stages and files, repeatability, ranks, refusals, the clock.

Long runs are subprocesses, as users start them. What only has to be refused is called in this
process through `main`, which takes its arguments and environment as values.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import shards
import torch
from conftest import (
    REPO,
    SCRIPT,
    TINY_ARTIFACT_BYTES,
    VAL_TOKENS,
    VOCAB_SIZE,
    Outcome,
    TinyRun,
    base_env,
    read_events,
    run_script,
    train_tokenizer,
)

import train_gpt

PARAMETERS = 222_996  # of TINY_MODEL
INT6_MATRICES = 4 * 6  # q, k, v, out, up and down of each layer; the projection of VE stays fp16
SCORE_TAIL = r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms"
VAL_LINE = r"\d+/\d+ val_loss: \d+\.\d{4} val_bpb: \d+\.\d{4}"
TRAIN_LINE = r"\d+/\d+ train_loss: \d+\.\d{4} train_time: \d+\.\dm tok/s: \d+"
PUBLISHED_LINES = [  # in the order published scripts print them, but for the next one
    r"Hyperparameters:", r"  adam_eps: .+", r"train_shards: \d+", r"val_tokens: \d+",
    r"model_params:\d+", r"warmup_step: 1/\d+", VAL_LINE, TRAIN_LINE,
    r"recurrence:activated at step \d+, virtual_layers=\[0, 1, 2, 1, 2, 3\]",
    r"ema:applying EMA weights",
    r"Serialized model: \d+ bytes", r"Code size: \d+ bytes",
    r"GPTQ:collecting Hessians from calibration data\.\.\.",
    r"GPTQ:collected \d+ Hessians in \d+\.\ds", f"pre-quantization post-ema {SCORE_TAIL}",
    r"GPTQ quantization: \d+ layers with full GPTQ, \d+ fallback to clip-search",
    r"Serialized model int6\+rans: \d+ bytes",
    r"Total submission size int6\+rans: \d+ bytes", f"final_int6_roundtrip {SCORE_TAIL}",
    f"final_int6_sliding_window {SCORE_TAIL}", r"RESULT \{.+\}"]
TRAIN_ONLY = dict(STAGE="train", WARMUP_STEPS=0, GPTQ_ENABLED=0, VAL_LOSS_EVERY=0,
                  PREQUANT_SLIDING=0)
PEAK_MEMORY_LINE = r"peak memory allocated: \d+ MiB reserved: \d+ MiB"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in this process as the subprocesses do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(env, cwd, args=()) -> Outcome:
    """Call the script's main in this process, in folder `cwd`."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            rc = train_gpt.main(list(args), {k: str(v) for k, v in env.items()})
    finally:
        os.chdir(before)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else None
    return Outcome(rc, out.getvalue(), err.getvalue(), result)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder):
    """Return every file below a folder with its hash."""
    return {str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def scores_of(run: TinyRun) -> dict:
    return json.loads((run.folder / "scores.json").read_text())


def train_losses(run: TinyRun) -> list[float]:
    return [event["train_loss"] for event in run.events("train")]


def model_free(env) -> dict:
    """Return only the settings that say where files are."""
    return {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "DEVICE")}


# ---- one full run --------------------------------------------------------------------------


def test_full_run_leaves_every_product(tiny_run):
    names = {"final_model.weights", "final_model.stats", "final_model.int6.ptz", "scores.json",
             "events.jsonl", "run.json"}
    assert {path.name for path in tiny_run.folder.iterdir()} == names
    found = {path for path in snapshot(tiny_run.cwd)}
    assert found == {f"runs/tiny/{name}" for name in names} | {"logs/tiny.txt"}


def test_result_is_the_last_line_and_agrees_with_the_scores(tiny_run):
    result, scores = tiny_run.outcome.result, scores_of(tiny_run)
    assert tiny_run.outcome.stdout.splitlines()[-1].startswith("RESULT ")
    assert tiny_run.outcome.stderr == ""
    for kind in ("roundtrip", "sliding"):
        assert result[f"{kind}_bpb"] == scores[kind]["val_bpb"]
        assert scores[kind]["tokens"] == VAL_TOKENS - 1, "every target once, the tail too"
        nats = scores[kind]["val_loss"] * scores[kind]["tokens"]
        bpb = nats / math.log(2) / scores[kind]["bytes"]
        assert scores[kind]["val_bpb"] == pytest.approx(bpb, rel=1e-12)
    assert result["steps"] == 12 and all(result["verdicts"].values())


def test_sizes_in_the_result_are_those_of_the_files(tiny_run, tiny_env):
    result, cap = tiny_run.outcome.result, int(tiny_env["ARTIFACT_MAX_BYTES"])
    assert result["artifact_bytes"] == (tiny_run.folder / "final_model.int6.ptz").stat().st_size
    assert result["code_bytes"] == cap - TINY_ARTIFACT_BYTES
    assert result["total_bytes"] == result["code_bytes"] + result["artifact_bytes"]
    low, high = train_gpt.MULTIPLIER_RANGE
    assert low < result["multiplier"] < high, "the tiny budget must end the search in its range"
    assert 0.999 * cap <= result["total_bytes"] <= cap


def test_training_learns_and_quantising_costs_little(tiny_run):
    vals = [event["val_loss"] for event in tiny_run.events("val")]
    assert abs(vals[0] - math.log(VOCAB_SIZE)) < 0.05, "an untrained model guesses evenly"
    assert vals == sorted(vals, reverse=True) and vals[-1] < vals[0] - 1
    result = tiny_run.outcome.result
    assert abs(result["roundtrip_bpb"] - result["prequant_bpb"]) < 0.02
    assert abs(result["sliding_bpb"] - result["prequant_sliding_bpb"]) < 0.02


def test_recurrence_starts_in_the_middle_of_the_run(tiny_run):
    (event,) = tiny_run.events("recurrence")
    assert event["step"] == 6 and event["order"] == [0, 1, 2, 1, 2, 3]
    (plan,) = tiny_run.events("recurrence_plan")
    assert plan["never"] is False
    header, _ = train_gpt.read_tensors(tiny_run.folder / "final_model.int6.ptz", "artifact")
    assert header["order"] == [0, 1, 2, 1, 2, 3], "the artifact knows its layer order"


def test_events_are_json_lines_of_declared_kinds(tiny_run):
    kinds = [event["event"] for event in tiny_run.events()]
    assert set(kinds) <= set(train_gpt.EVENTS)
    assert kinds[:3] == ["source", "environment", "config"] and kinds[-1] == "result"
    (config,) = tiny_run.events("config")
    assert set(train_gpt.KNOBS) <= set(config), "the log holds the complete configuration"
    assert not any(key.startswith("text_") for event in tiny_run.events() for key in event)


def test_the_text_log_keeps_the_published_lines(tiny_run):
    lines = (tiny_run.cwd / "logs" / "tiny.txt").read_text(encoding="utf-8").splitlines()
    at = lines.index("Hyperparameters:")  # above it is the source, which holds these lines too
    for form in PUBLISHED_LINES:
        while at < len(lines) and not re.fullmatch(form, lines[at]):
            at += 1
        assert at < len(lines), f"no line of the form {form!r} in its place"
    assert sum(bool(re.fullmatch(PEAK_MEMORY_LINE, line)) for line in lines) == 1
    table = lines[lines.index("Hyperparameters:") + 1:]
    names = [line.split(":")[0] for line in table[:len(train_gpt.KNOBS)]]
    assert names == [f"  {name}" for name in sorted(train_gpt.KNOBS)]


def test_the_ledger_accounts_for_the_clock(tiny_run):
    result = tiny_run.outcome.result
    ledger = result["ledger_seconds"]
    assert result["training_seconds"] == pytest.approx(ledger["train"] + ledger["calibrate"],
                                                       abs=0.01)
    spans = {"start", "setup", "warmup", "validation", "write", "quantize", "evaluate"}
    assert spans <= set(ledger)


def test_artifact_holds_no_trace_of_the_run(tiny_run, tiny_env):
    """What does not decide model, codes or score would make equal models differ in bytes."""
    header, _ = train_gpt.read_tensors(tiny_run.folder / "final_model.int6.ptz", "artifact")
    topics = {train_gpt.KNOBS[name].metadata["topic"] for name in header["config"]}
    assert topics - {"run"} <= {"model", "quantization", "evaluation"}
    text = json.dumps(header)
    assert "run_id" not in text and tiny_env["DATA_PATH"] not in text and "tiny.model" not in text


# ---- the same digits again -----------------------------------------------------------------


@pytest.fixture(scope="module")
def staged_run(tiny_env, nursery, shared):
    """The tiny run as three forked processes, one for each stage."""
    def make(cwd):
        env = {**tiny_env, "RUN_ID": "staged"}
        for stage in ("train", "quantize", "evaluate"):
            run = nursery.run({**env, "STAGE": stage}, cwd)
            assert run.rc == 0, run.stderr
        return TinyRun(cwd, "staged", Outcome(run.rc, run.stdout, run.stderr, None))
    return shared("staged_run", make)


def test_three_processes_give_the_full_runs_bytes_and_digits(tiny_run, staged_run):
    """Also: the same settings in another folder, another process, under another name."""
    for name in ("final_model.weights", "final_model.stats", "final_model.int6.ptz", "scores.json"):
        assert sha256(staged_run.folder / name) == sha256(tiny_run.folder / name), name
    assert train_losses(staged_run) == train_losses(tiny_run)


def test_the_same_run_twice_gives_the_same_digits(tiny_run, tiny_env, tmp_path):
    again = run_here({**tiny_env, "RUN_ID": "again"}, tmp_path)
    assert again.rc == 0, again.stderr
    second = TinyRun(tmp_path, "again", again)
    assert scores_of(second) == scores_of(tiny_run)
    assert sha256(second.folder / "final_model.int6.ptz") == sha256(
        tiny_run.folder / "final_model.int6.ptz")


def test_another_seed_is_another_run(tiny_run, tiny_env, tmp_path):
    other = run_here({**tiny_env, **TRAIN_ONLY, "RUN_ID": "seed", "SEED": 7, "ITERATIONS": 1},
                     tmp_path)
    assert other.rc == 0, other.stderr
    assert train_losses(TinyRun(tmp_path, "seed", other))[0] != train_losses(tiny_run)[0]


@pytest.mark.parametrize("settings", ["as trained", "none"])
def test_requantising_gives_the_same_bytes(tiny_run, tiny_env, tmp_path, settings):
    """INPUT_PATH names another run; the model's settings travel in its files."""
    env = tiny_env if settings == "as trained" else {"DEVICE": "cpu"}
    done = run_here({**env, "STAGE": "quantize", "RUN_ID": "again", "INPUT_PATH": tiny_run.folder},
                    tmp_path)
    assert done.rc == 0, done.stderr
    assert sha256(tmp_path / "runs" / "again" / "final_model.int6.ptz") == sha256(
        tiny_run.folder / "final_model.int6.ptz")


def test_a_given_k_switches_the_search_off(tiny_run, tmp_path):
    done = run_here({"STAGE": "quantize", "RUN_ID": "k", "INPUT_PATH": tiny_run.folder,
                     "SDCLIP_K": 20, "DEVICE": "cpu"}, tmp_path)
    assert done.rc == 0, done.stderr
    assert not [e for e in read_events(tmp_path, "k") if e["event"] == "search"]
    assert done.result["multiplier"] == 1
    assert done.result["artifact_bytes"] < tiny_run.outcome.result["artifact_bytes"]


def test_a_model_that_does_not_fit_is_a_verdict_not_a_crash(tiny_run, tmp_path):
    done = run_here({"STAGE": "quantize", "RUN_ID": "big", "INPUT_PATH": tiny_run.folder,
                     "DEVICE": "cpu", "ARTIFACT_MAX_BYTES": SCRIPT.stat().st_size + 20_000},
                    tmp_path)
    assert done.rc == 0, done.stderr
    assert done.result["verdicts"]["code + artifact"] is False
    assert "OVER THE LIMIT" in done.stdout
    assert done.result["multiplier"] == train_gpt.MULTIPLIER_RANGE[1]
    over, fitting = re.search(r"(\d+) bytes too many; about (\d+) parameters", done.stdout).groups()
    assert int(over) == done.result["total_bytes"] - SCRIPT.stat().st_size - 20_000
    share = 20_000 / done.result["artifact_bytes"]
    count = int(re.search(r"model_params:(\d+)", tiny_run.outcome.stdout)[1])
    assert int(fitting) == int(count * share)


def test_bytes_that_cannot_be_used_are_named(tiny_run, tmp_path):
    done = run_here({"STAGE": "quantize", "RUN_ID": "small", "INPUT_PATH": tiny_run.folder,
                     "DEVICE": "cpu", "ARTIFACT_MAX_BYTES": 16_000_000}, tmp_path)
    assert done.rc == 0, done.stderr
    (event,) = [e for e in read_events(tmp_path, "small") if e["event"] == "unused"]
    assert event["unused_bytes"] == 16_000_000 - done.result["total_bytes"] > 0
    assert done.result["multiplier"] == train_gpt.MULTIPLIER_RANGE[0]


@pytest.fixture(scope="module")
def val_only(tiny_data, tmp_path_factory):
    """A folder with the validation shard alone."""
    folder = tmp_path_factory.mktemp("val_only")
    shutil.copy(tiny_data.shards / "fineweb_val_000000.bin", folder)
    return folder


def test_an_artifact_scores_alike_anywhere_without_training_data(tiny_run, tiny_data, val_only,
                                                                 tmp_path):
    artifact = shutil.copy(tiny_run.folder / "final_model.int6.ptz", tmp_path / "received.ptz")
    done = run_script({"STAGE": "evaluate", "RUN_ID": "check", "INPUT_PATH": artifact,
                       "DATA_PATH": val_only, "TOKENIZER_PATH": tiny_data.tokenizer,
                       "DEVICE": "cpu"}, tmp_path)
    assert done.rc == 0, done.stderr
    assert scores_of(TinyRun(tmp_path, "check", done)) == scores_of(tiny_run)


RELOAD = """
import hashlib, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import train_gpt
env = {"STAGE": "evaluate", "INPUT_PATH": sys.argv[2], "TOKENIZER_PATH": sys.argv[5],
       "DEVICE": "cpu"}
config = train_gpt.load_config(env)
with open(sys.argv[5], "rb") as file:
    tokenizer = hashlib.sha256(file.read()).hexdigest()
session = train_gpt.Session(config, train_gpt.Runtime(env, config), None, None,
                            train_gpt.RunFiles("unused"), train_gpt.Inputs("", 0, "", tokenizer))
_, model, layout, _ = train_gpt.load_artifact(session)
tokens = torch.from_numpy(np.load(sys.argv[3]))
with torch.inference_mode():
    np.save(sys.argv[4], model.logits(train_gpt.Batch(tokens, tokens), layout).numpy())
"""


def test_reloaded_logits_equal_those_in_memory_bit_for_bit(tiny_run, tiny_data, tmp_path,
                                                           monkeypatch):
    made = []

    class Spy(train_gpt.Quantizer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
    monkeypatch.setattr(train_gpt, "Quantizer", Spy)
    done = run_here({"STAGE": "quantize", "RUN_ID": "spy", "INPUT_PATH": tiny_run.folder,
                     "DEVICE": "cpu"}, tmp_path)
    (quantizer,) = made
    header, weights = train_gpt.read_tensors(tiny_run.folder / "final_model.weights", "weights")
    config = train_gpt.adopt(train_gpt.load_config({"STAGE": "quantize"}), header, "quantize", "")
    codes = quantizer.codes_at(done.result["multiplier"])
    model = train_gpt.GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in codes:
                code, rows, columns = codes[name]
                table = torch.tensor([2.0 ** (c / 8) for c in range(-128, 128)])
                steps = done.result["multiplier"] * table[rows.long() + 128]
                levels = [plain.trellis_levels(column) for column in code.T.tolist()]
                p.copy_(torch.tensor(levels).T * steps[:, None] * table[columns.long() + 128])
            else:
                p.copy_(weights[name].to(train_gpt.DTYPES[train_gpt.inventory(config)[name].kind]).float())
    layout = train_gpt.plan_layout(tuple(header["order"]), config)
    tokens = torch.randint(VOCAB_SIZE, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.logits(train_gpt.Batch(tokens, tokens), layout).numpy()
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    subprocess.run([sys.executable, "-c", RELOAD, str(REPO),
                    str(tiny_run.folder / "final_model.int6.ptz"), str(tmp_path / "tokens.npy"),
                    str(tmp_path / "logits.npy"), str(tiny_data.tokenizer)],
                   env=base_env(tmp_path), cwd=tmp_path, check=True)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected)


# ---- ranks and micro-batches ---------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tiny_env, shared):
    def make(cwd):
        outcome = run_script({**tiny_env, "RUN_ID": "pair"}, cwd, nproc=2)
        assert outcome.rc == 0, outcome.stderr
        return TinyRun(cwd, "pair", outcome)
    return shared("two_ranks", make)


@pytest.mark.parametrize("micro_tokens", [512, 64])
def test_micro_batches_do_not_change_the_loss_curve(tiny_run, tiny_env, tmp_path, micro_tokens):
    split = run_here({**tiny_env, **TRAIN_ONLY, "RUN_ID": "split",
                      "MICRO_BATCH_TOKENS": micro_tokens}, tmp_path)
    assert split.rc == 0, split.stderr
    losses = train_losses(TinyRun(tmp_path, "split", split))
    assert losses == pytest.approx(train_losses(tiny_run), rel=2e-4)
    assert split.result["prequant_bpb"] == pytest.approx(tiny_run.outcome.result["prequant_bpb"],
                                                         rel=2e-4)


@pytest.mark.parametrize("micro_tokens", [1024, 512, 64])
def test_micro_batches_do_not_change_the_gradient(tiny_env, micro_tokens):
    """Clipping and both optimizers forgive a gradient of another length, so it is looked at."""
    config = train_gpt.load_config({**tiny_env, "MICRO_BATCH_TOKENS": str(micro_tokens),
                                    "GRAD_CLIP_NORM": "0"})
    runtime = train_gpt.Runtime({}, config)
    layout = train_gpt.phases(config)[1].layout
    model = train_gpt.GPT(config)
    model.init_weights(3)
    with torch.no_grad():  # the zero starts would hide most of the network
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)), alpha=0.02)
    windows = torch.randint(VOCAB_SIZE, (16, 65), generator=torch.Generator().manual_seed(5))
    batch = train_gpt.Batch.of_windows(windows)
    whole = model.mean_loss(batch, layout)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    optimizers = train_gpt.Optimizers(model, config, runtime)
    state = train_gpt.TrainState(model, optimizers)
    trainer = train_gpt.Trainer(state, config, runtime, None, None)
    loss = trainer.update(batch, layout, train_gpt.schedule(config, 0, 0.0))
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-7)


def test_two_ranks_train_like_one(tiny_run, two_ranks):
    """Half a batch on each of two ranks is the batch that one rank sees."""
    assert train_losses(two_ranks) == pytest.approx(train_losses(tiny_run), rel=2e-4)
    assert two_ranks.outcome.result["sliding_bpb"] == pytest.approx(
        tiny_run.outcome.result["sliding_bpb"], rel=2e-3)


def test_two_ranks_print_once_and_leave_the_same_files(tiny_run, two_ranks):
    assert {path.name for path in two_ranks.folder.iterdir()} == {
        path.name for path in tiny_run.folder.iterdir()}
    lines = two_ranks.outcome.stdout.splitlines()
    assert sum(line.startswith("RESULT ") for line in lines) == 1
    kinds = [[e["event"] for e in run.events() if e["event"] != "search"]
             for run in (tiny_run, two_ranks)]
    assert kinds[0] == kinds[1]
    assert "Warning" not in two_ranks.outcome.stderr, "torch renames its collectives"


def test_calibration_does_not_depend_on_the_number_of_ranks(tiny_run, two_ranks):
    """Hessians are summed over ranks, each doing its share: sums differ by training's rounding."""
    _, one = train_gpt.read_tensors(tiny_run.folder / "final_model.stats", "stats")
    _, two = train_gpt.read_tensors(two_ranks.folder / "final_model.stats", "stats")
    assert set(one) == set(two)
    for name in one:  # labels drawn near a tie may differ by a rounding, and with them gradients
        assert (one[name] - two[name]).norm() < 5e-2 * one[name].norm(), name


def test_scores_do_not_depend_on_the_number_of_ranks(two_ranks, tiny_env, tmp_path):
    alone = run_here({**model_free(tiny_env), "STAGE": "evaluate", "RUN_ID": "alone",
                      "INPUT_PATH": two_ranks.folder}, tmp_path)
    one, two = scores_of(TinyRun(tmp_path, "alone", alone)), scores_of(two_ranks)
    for kind in ("roundtrip", "sliding"):
        assert [one[kind][key] for key in ("tokens", "bytes")] == [
            two[kind][key] for key in ("tokens", "bytes")]
        assert one[kind]["val_loss"] == pytest.approx(two[kind]["val_loss"], rel=1e-6)


def test_data_order_is_the_same_for_every_world_size(tiny_env):
    config = train_gpt.load_config(tiny_env)
    files = train_gpt.find_shards(config.shard_dir, "train")
    shards = train_gpt.ShardSet(files, config.train_seq_len)
    steps = range(config.iterations)

    def batches(world_size):
        ranks = [SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
                 for rank in range(world_size)]
        loaders = [train_gpt.Loader(shards, config, rank) for rank in ranks]
        out = [torch.cat([loader.batch(step).tokens for loader in loaders]) for step in steps]
        for loader in loaders:
            loader.close()
        return torch.stack(out)
    whole = batches(1)
    assert torch.equal(whole, batches(2)) and torch.equal(whole, batches(4))
    assert torch.equal(whole, batches(16))


def test_world_size_that_does_not_divide_is_refused(tiny_env, tmp_path):
    done = run_script({**tiny_env, "TRAIN_BATCH_TOKENS": 15 * 64, "RUN_ID": "odd"}, tmp_path,
                      nproc=2)
    assert done.rc != 0 and snapshot(tmp_path) == {}
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "2 ranks do not divide the 15 rows" in said[0]
    assert str(SCRIPT) + '", line' not in done.stderr, "no traceback of the script"


@pytest.mark.slow
def test_a_fault_that_only_another_rank_meets_is_told(tiny_env, data_copy, tmp_path):
    """One foreign token, deep in a shard, in a window that rank 1 of 2 reads first."""
    path = data_copy / "shards" / "fineweb_train_000000.bin"
    rewrite(path, lambda tokens: np.tile(tokens, 4))
    shards = train_gpt.ShardSet(train_gpt.find_shards(path.parent, "train"), 64)
    order = train_gpt.window_order(1337, shards.num_windows, 0, 12 * 16)
    deep = next(window for i, window in enumerate(order.tolist())
                if i % 16 >= 8 and 65_536 < 64 * window < len(shards.shards[0]) - 64)
    rewrite(path, lambda tokens: np.where(np.arange(len(tokens)) == 64 * deep + 9, VOCAB_SIZE,
                                          tokens))
    done = run_script({**pointing_at(tiny_env, data_copy), "RUN_ID": "deep"}, tmp_path, nproc=2)
    assert done.rc != 0
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert any(f"VOCAB_SIZE={VOCAB_SIZE}" in line for line in said), done.stderr
    assert {p.name for p in (tmp_path / "runs" / "deep").iterdir()} == {"events.jsonl", "run.json"}


# ---- one folder, many runs -----------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x",
                                    lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:]])
def test_damaged_statistics_are_told_before_the_run(tiny_run, tiny_env, tmp_path, damage):
    shutil.copytree(tiny_run.folder, tmp_path / "made")
    stats = tmp_path / "made" / "final_model.stats"
    stats.write_bytes(damage(stats.read_bytes()))
    done = run_here({**model_free(tiny_env), "STAGE": "quantize", "RUN_ID": "again",
                     "INPUT_PATH": tmp_path / "made"}, tmp_path)
    assert done.rc == 1 and str(stats) in done.stderr and "checksum" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_that_left_nothing_yields_its_folder_and_its_identity(tiny_env, tmp_path):
    """Else the next one's own checkpoint could not be resumed: other settings began the folder."""
    identity = tmp_path / "runs" / "x" / "run.json"
    identity.parent.mkdir(parents=True)
    identity.write_text('{"SEED": "7"}')
    env = {**tiny_env, "RUN_ID": "x", "STAGE": "train", "ITERATIONS": 1, "GPTQ_ENABLED": 0}
    assert run_here(env, tmp_path).rc == 0
    assert json.loads(identity.read_text())["SEED"] == "1337"
    assert run_here({**env, "RESUME": 1}, tmp_path).rc == 0


@pytest.mark.parametrize("stage", ["all", "train", "quantize", "evaluate"])
def test_a_finished_run_is_never_overwritten(tiny_run, tiny_env, tmp_path, stage):
    shutil.copytree(tiny_run.cwd, tmp_path / "copy")
    before = snapshot(tmp_path / "copy")
    done = run_here({**tiny_env, "RUN_ID": "tiny", "STAGE": stage}, tmp_path / "copy")
    assert done.rc == 1 and "would be overwritten" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert snapshot(tmp_path / "copy") == before


def test_runs_without_a_name_get_a_folder_each(tiny_env, tmp_path):
    env = {**tiny_env, **TRAIN_ONLY, "ITERATIONS": 1}
    for count in (1, 2):
        done = run_here(env, tmp_path)
        assert done.rc == 0, done.stderr
        assert len(list((tmp_path / "runs").iterdir())) == count
        assert len(list((tmp_path / "logs").iterdir())) == count
        assert (tmp_path / "runs" / done.result["run_id"] / "final_model.weights").is_file()


# ---- check, help, import -------------------------------------------------------------------


def test_check_writes_nothing(tiny_env, tmp_path):
    done = run_here(tiny_env, tmp_path, ["--check"])
    assert done.rc == 0 and done.stderr == ""
    assert f"{PARAMETERS} parameters" in done.stdout
    assert str(tiny_env["ARTIFACT_MAX_BYTES"]) in done.stdout and "MiB" in done.stdout
    assert snapshot(tmp_path) == {}


def test_check_without_data_tells_what_it_can(tiny_env, tmp_path):
    done = run_here({**tiny_env, "DATA_PATH": tmp_path / "none"}, tmp_path, ["--check"])
    assert done.rc == 1 and f"{PARAMETERS} parameters" in done.stdout
    assert "no such folder" in done.stderr
    assert snapshot(tmp_path) == {}


def test_check_counts_the_record_models_parameters(tmp_path):
    done = run_here({"DEVICE": "cpu"}, tmp_path, ["--check"])
    assert done.rc == 1 and "37022812 parameters" in done.stdout


def test_without_data_the_last_lines_are_the_commands_that_get_some(tmp_path):
    done = run_script({}, tmp_path)
    assert done.rc == 1 and snapshot(tmp_path) == {}
    lines = done.stderr.splitlines()
    assert "data/build_demo.py" in lines[-2] and "PRESET=demo" in lines[-2]
    assert "cached_challenge_fineweb.py" in lines[-1]
    assert "Traceback" not in done.stderr


def test_help_lists_every_setting_with_its_default(tmp_path):
    done = run_here({}, tmp_path, ["--help"])
    assert done.rc == 0 and done.stderr == ""
    for name, knob in train_gpt.KNOBS.items():
        default = train_gpt.show_value(knob.default)
        assert f"  {name.upper()} = {default}\n" in done.stdout, name
        assert knob.metadata["note"] in done.stdout
    for name in (*train_gpt.PRESETS, *train_gpt.NEUTRAL, *train_gpt.WITHOUT_EFFECT):
        assert name in done.stdout


@pytest.mark.parametrize("argument", ["--chek", "check", "PRESET=demo"])
def test_an_unknown_argument_is_refused(tmp_path, argument):
    done = run_here({}, tmp_path, [argument])
    assert done.rc == 2 and argument in done.stderr and "--help" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


IMPORT_PROBE = """
import os, sys
import numpy, torch, torch.distributed
for name in ("brotli", "sentencepiece", "flash_attn_interface"):
    try:
        __import__(name)
    except ImportError:
        pass

def refuse(*args, **kwargs):
    raise AssertionError("importing the script touched the environment or a device")

class Closed:
    __getitem__ = __contains__ = __iter__ = __len__ = get = keys = items = copy = refuse

def watch(event, args):
    if event == "open":
        path, flags = str(args[0]), args[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if writes or not path.endswith((".py", ".pyc", ".so", ".pyd")):
            raise AssertionError(f"importing the script opened {path}")
    if event.split(".")[0] in ("socket", "subprocess") or event in ("os.mkdir", "os.rename"):
        raise AssertionError(f"importing the script did {event}")

def state():
    return (torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.get_float32_matmul_precision(), torch.cuda.is_initialized(),
            torch.distributed.is_initialized(), os.getcwd())

before, rng = state(), torch.get_rng_state()
torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = refuse
os.environ, os.getenv = Closed(), refuse
sys.path.insert(0, sys.argv[1])
sys.addaudithook(watch)
import train_gpt
assert state() == before and torch.equal(torch.get_rng_state(), rng)
print("imported", len(train_gpt.KNOBS))
"""


def test_importing_does_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-B", "-c", IMPORT_PROBE, str(REPO)], cwd=tmp_path,
                          env=base_env(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"imported {len(train_gpt.KNOBS)}\n" and done.stderr == ""
    assert snapshot(tmp_path) == {}


# ---- what is refused -----------------------------------------------------------------------


def assert_refused(done: Outcome, cwd, *words, lines=1):
    """Assert an exit code, `lines` clear lines with all of `words`, and no file written."""
    assert done.rc == 1, done.stdout[-2000:]
    said = done.stderr.splitlines()
    assert all(word in done.stderr for word in words), done.stderr
    assert said[0].startswith("error: ") and len(said) == lines, done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(cwd) == {}


@pytest.fixture
def data_copy(tiny_data, tmp_path_factory):
    """A copy of the tiny corpus that a test may damage, with the settings that point to it."""
    folder = tmp_path_factory.mktemp("data_copy")
    shutil.copytree(tiny_data.shards, folder / "shards")
    shutil.copy(tiny_data.tokenizer, folder / "tiny.model")
    return folder


def pointing_at(env, folder):
    return {**env, "DATA_PATH": folder / "shards", "TOKENIZER_PATH": folder / "tiny.model"}


def test_a_missing_data_folder_is_refused(tiny_env, tmp_path):
    done = run_here({**tiny_env, "DATA_PATH": tmp_path / "none"}, tmp_path)
    assert_refused(done, tmp_path, "DATA_PATH", "no such folder", "build_demo.py", lines=4)


def test_an_empty_data_folder_is_refused(tiny_env, tmp_path, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    done = run_here({**tiny_env, "DATA_PATH": empty}, tmp_path)
    assert_refused(done, tmp_path, str(empty), "fineweb_train_*.bin", "fineweb_val_*.bin", lines=5)


@pytest.mark.parametrize("shard", ["fineweb_train_000001.bin", "fineweb_val_000000.bin"])
@pytest.mark.parametrize("damage", ["magic", "version", "short", "shorter", "header", "empty",
                                    "long"])
def test_a_damaged_shard_is_refused(tiny_env, data_copy, tmp_path, shard, damage):
    path = data_copy / "shards" / shard
    whole = path.read_bytes()
    path.write_bytes({"magic": b"\x00" + whole[1:], "version": whole[:4] + b"\x02" + whole[5:],
                      "short": whole[:-1], "shorter": whole[:2000], "header": whole[:600],
                      "empty": b"", "long": whole + b"\x00\x00"}[damage])
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, str(path), "again")


def rewrite(path, change):
    tokens = shards.read_shard(path)
    shards.write_shard(path, change(tokens))


@pytest.mark.parametrize("shard", ["fineweb_train_000001.bin", "fineweb_val_000000.bin"])
def test_a_shard_of_another_vocabulary_is_refused(tiny_env, data_copy, tmp_path, shard):
    path = data_copy / "shards" / shard
    rewrite(path, lambda tokens: np.where(np.arange(len(tokens)) % 50 == 49, VOCAB_SIZE, tokens))
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, str(path), f"VOCAB_SIZE={VOCAB_SIZE}")


def test_foreign_tokens_deep_in_a_shard_end_the_run_in_one_line(tiny_env, data_copy, tmp_path):
    path = data_copy / "shards" / "fineweb_train_000000.bin"
    other = np.full(20_000, VOCAB_SIZE)  # behind the first tokens, and between the samples
    rewrite(path, lambda tokens: np.concatenate([*[tokens] * 3, other, *[tokens] * 2]))
    done = run_here({**pointing_at(tiny_env, data_copy), "RUN_ID": "deep"}, tmp_path)
    assert done.rc == 1 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and f"VOCAB_SIZE={VOCAB_SIZE}" in done.stderr
    assert {p.name for p in (tmp_path / "runs" / "deep").iterdir()} == {"events.jsonl", "run.json"}


def test_a_tokenizer_without_the_space_piece_is_refused(tiny_env, tiny_documents, data_copy,
                                                        tmp_path):
    train_tokenizer([text.replace(" ", "") for text in tiny_documents], data_copy / "tiny.model")
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, "tokenizer", "'▁' is not a piece")


def test_a_tokenizer_of_other_text_is_refused(tiny_env, tiny_documents, data_copy, tmp_path):
    """Same number of pieces, other pieces: every byte count would be wrong without a sign."""
    train_tokenizer([text[::-1] for text in tiny_documents], data_copy / "tiny.model")
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, "TOKENIZER_PATH", "another tokenizer")


def test_a_tokenizer_of_another_size_is_refused(tiny_env, tiny_documents, data_copy, tmp_path):
    train_tokenizer(tiny_documents, data_copy / "tiny.model", vocab_size=500)
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, "TOKENIZER_PATH", "500 pieces", "VOCAB_SIZE=512")


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_a_tokenizer_that_is_none_is_refused(tiny_env, data_copy, tmp_path, content):
    (data_copy / "tiny.model").unlink()
    if content is not None:
        (data_copy / "tiny.model").write_bytes(content)
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, "TOKENIZER_PATH", "tiny.model")


def test_a_byte_sidecar_of_another_length_is_refused(tiny_env, data_copy, tmp_path):
    path = data_copy / "shards" / "fineweb_val_bytes_000000.bin"
    shards.write_shard(path, np.ones(VAL_TOKENS - 5, dtype=np.int64))
    done = run_here(pointing_at(tiny_env, data_copy), tmp_path)
    assert_refused(done, tmp_path, "sidecar")


def test_less_text_than_a_window_is_refused(tiny_env, tmp_path):
    done = run_here({**tiny_env, "TRAIN_SEQ_LEN": 65_536, "TRAIN_BATCH_TOKENS": 65_536,
                     "MICRO_BATCH_TOKENS": 65_536}, tmp_path)
    assert_refused(done, tmp_path, "TRAIN_SEQ_LEN=65536", "less than one row")


@pytest.mark.parametrize(("changes", "words"), [
    ({"NUM_LAYER": "5"}, ("NUM_LAYER=5", "NUM_LAYERS")),
    ({"WARMDOWN_FARC": "0.5"}, ("WARMDOWN_FARC=0.5", "WARMDOWN_FRAC")),
    ({"ITERATIONS": "ten"}, ("ITERATIONS=ten", "whole number")),
    ({"MATRIX_LR": "nan"}, ("MATRIX_LR=nan", "finite")),
    ({"NUM_KV_HEADS": "3"}, ("NUM_HEADS=4", "NUM_KV_HEADS")),
    ({"SLOT_ENABLED": "1"}, ("SLOT_ENABLED=1", "not built")),
    ({"PRESET": "record"}, ("PRESET=record", "pr1471")),
    ({"RUN_ID": "../elsewhere"}, ("RUN_ID=../elsewhere",)),
    ({"ATTENTION_BACKEND": "fa3"}, ("ATTENTION_BACKEND=fa3", "pip install")),
    ({"INPUT_PATH": "somewhere"}, ("INPUT_PATH", "STAGE=quantize")),
])
def test_a_wrong_setting_is_refused(tiny_env, tmp_path, changes, words):
    assert_refused(run_here({**tiny_env, **changes}, tmp_path), tmp_path, *words)


def test_all_wrong_settings_are_told_at_once(tiny_env, tmp_path):
    changes = {"NUM_LAYER": "5", "ITERATIONS": "ten", "SLOT_ENABLED": "1"}
    done = run_here({**tiny_env, **changes}, tmp_path)
    assert_refused(done, tmp_path, *changes, lines=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused(tiny_env, tmp_path):
    done = run_here({**tiny_env, "DEVICE": "cuda"}, tmp_path)
    assert_refused(done, tmp_path, "DEVICE=cuda")


def damaged_artifacts(whole: bytes) -> dict[str, bytes]:
    """Return damaged or foreign forms of an artifact by name."""
    found = {f"truncated to {n}": whole[:n] for n in (0, 5, 40, 3000, len(whole) - 1)}
    for place in (0, 6, 9, 20, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        found[f"bit flipped at {place}"] = bytes(flipped)
    endless = whole[:8] + struct.pack("<I", 2**32 - 1) + whole[12:-32]
    found["impossible header length"] = endless + hashlib.sha256(endless).digest()
    found["foreign: zip"] = b"PK\x03\x04" + bytes(5000)
    found["foreign: text"] = b"PGOLF is the name of this challenge, and this is a text.\n" * 9
    return found


def test_a_damaged_or_foreign_artifact_is_refused(tiny_run, tiny_env, tmp_path, tmp_path_factory):
    whole = (tiny_run.folder / "final_model.int6.ptz").read_bytes()
    given = tmp_path_factory.mktemp("given") / "given.ptz"
    for name, content in damaged_artifacts(whole).items():
        given.write_bytes(content)
        done = run_here({**model_free(tiny_env), "STAGE": "evaluate", "INPUT_PATH": given},
                        tmp_path)
        assert done.rc == 1 and str(given) in done.stderr, name
        assert_refused(done, tmp_path)


@pytest.mark.parametrize(("stage", "product", "word"), [
    ("evaluate", "final_model.weights", "holds weights"),
    ("evaluate", "final_model.stats", "holds stats"),
    ("quantize", "final_model.int6.ptz", "holds artifact")])
def test_a_product_of_another_kind_is_refused(tiny_run, tiny_env, tmp_path, stage, product, word):
    done = run_here({**model_free(tiny_env), "STAGE": stage,
                     "INPUT_PATH": tiny_run.folder / product}, tmp_path)
    assert_refused(done, tmp_path, word)


@pytest.mark.parametrize("stage", ["quantize", "evaluate"])
def test_a_stage_without_its_input_is_refused(tiny_env, tmp_path, stage):
    done = run_here({**tiny_env, "STAGE": stage, "RUN_ID": "never"}, tmp_path)
    assert_refused(done, tmp_path, f"STAGE={stage}", "does not exist", "INPUT_PATH")


@pytest.mark.parametrize(("stage", "name", "value"), [
    ("evaluate", "NUM_LAYERS", "9"), ("quantize", "NUM_LAYERS", "9"),
    ("evaluate", "SDCLIP_K", "9"), ("evaluate", "COMPRESSOR", "lzma"), ("quantize", "SEED", "5")])
def test_a_setting_that_comes_too_late_is_refused(tiny_run, tiny_env, tmp_path, stage, name, value):
    """What an earlier stage consumed is fixed in its file."""
    done = run_here({**model_free(tiny_env), "STAGE": stage, "INPUT_PATH": tiny_run.folder,
                     name: value}, tmp_path)
    assert_refused(done, tmp_path, f"{name}={value}", str(tiny_run.folder))


def test_evaluation_settings_may_still_change_in_evaluation(tiny_run, tiny_env, tmp_path):
    done = run_here({**model_free(tiny_env), "STAGE": "evaluate", "RUN_ID": "legacy",
                     "INPUT_PATH": tiny_run.folder, "SCORE_TAIL": 0, "EVAL_STRIDE": 32}, tmp_path)
    assert done.rc == 0, done.stderr
    legacy = (VAL_TOKENS - 1) // 64 * 64
    assert scores_of(TinyRun(tmp_path, "legacy", done))["sliding"]["tokens"] == legacy
    counts = next(e for e in read_events(tmp_path, "legacy") if e["event"] == "val_counts")
    assert (counts["all_tokens"], counts["legacy_tokens"]) == (VAL_TOKENS - 1, legacy)


# ---- the clock -----------------------------------------------------------------------------


def bounded(tiny_env, seconds):
    return {**tiny_env, "RUN_ID": "bounded", "MAX_WALLCLOCK_SECONDS": seconds,
            "ITERATIONS": 1_000_000, "TRAIN_LOG_EVERY": 100, "VAL_LOSS_EVERY": 0,
            "PREQUANT_SLIDING": 0, "STAGE": "train"}


def assert_bounded(done: Outcome, cwd, seconds):
    assert done.rc == 0, done.stderr
    assert 0.5 * seconds < done.result["training_seconds"] <= seconds
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("stopping_early")]
    form = r"stopping_early: wallclock_cap train_time: (\d+)ms step: (\d+)/1000000"
    train_ms, steps = map(int, re.fullmatch(form, line).groups())
    assert steps == done.result["steps"] > 0
    assert train_ms <= 1000 * done.result["training_seconds"] + 1
    run = TinyRun(cwd, "bounded", done)
    (reserve,) = run.events("reserve")
    assert train_ms <= reserve["effective_ms"] < 1000 * seconds, "training leaves the reserve"
    (recurrence,) = run.events("recurrence")
    assert 0 < recurrence["step"] < steps, "half of the clock, not of ITERATIONS"


def test_the_clock_bounds_training_and_calibration(tiny_env, tmp_path):
    assert_bounded(run_here(bounded(tiny_env, 8), tmp_path), tmp_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_clock_bounds_training_on_every_world_size(tiny_env, tmp_path, nproc):
    assert_bounded(run_script(bounded(tiny_env, 12), tmp_path, nproc=nproc), tmp_path, 12)


def test_a_limit_below_calibration_is_refused_before_training(tiny_env, tmp_path):
    env = {**tiny_env, "MAX_WALLCLOCK_SECONDS": 0.2, "RUN_ID": "short"}
    done = run_here(env, tmp_path)
    assert done.rc == 1 and "MAX_WALLCLOCK_SECONDS=0.2" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not [e for e in read_events(tmp_path, "short") if e["event"] == "train"]


def test_recurrence_that_can_never_start_says_so(tiny_env, tmp_path):
    env = {**tiny_env, **TRAIN_ONLY, "RUN_ID": "never", "ITERATIONS": 2,
           "RECUR_START_FRAC": "auto", "RECUR_START_STEP": 2000}
    done = run_here(env, tmp_path)
    assert done.rc == 0, done.stderr
    run = TinyRun(tmp_path, "never", done)
    (plan,) = run.events("recurrence_plan")
    assert plan["never"] is True and run.events("recurrence") == []
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("recurrence: ")]
    assert "never" in line.lower() and "2000" in line and "RECUR_START_FRAC" in line
    kinds = [event["event"] for event in run.events()]
    assert kinds.index("recurrence_plan") < kinds.index("train")


# ---- the published system, tiny ------------------------------------------------------------


@pytest.fixture(scope="module")
def pr1471_run(tiny_env, shared):
    def make(cwd):
        outcome = run_here({**tiny_env, "PRESET": "pr1471", "RUN_ID": "a"}, cwd)
        assert outcome.rc == 0, outcome.stderr
        return TinyRun(cwd, "a", outcome)
    return shared("pr1471_run", make)


def test_streaming_is_scored_beside_the_exact_numbers(tiny_run, tiny_data, tmp_path):
    done = run_here({"STAGE": "evaluate", "INPUT_PATH": tiny_run.folder, "EVAL_MODE": "stream",
                     "STREAM_WINDOWS": "3", "RUN_ID": "stream", "DEVICE": "cpu",
                     **tiny_data.env()}, tmp_path)
    for kind in ("roundtrip", "sliding"):
        assert done.result[f"{kind}_bpb"] == tiny_run.outcome.result[f"{kind}_bpb"]
    scores = json.loads((tmp_path / "runs" / "stream" / "scores.json").read_text())
    assert scores["stream"]["tokens"] == scores["sliding"]["tokens"]
    assert scores["stream"]["bytes"] == scores["sliding"]["bytes"]
    # its context is between a window's half and more than a window: near the exact numbers
    assert abs(scores["stream"]["val_bpb"] - scores["sliding"]["val_bpb"]) < 0.05
    assert "final_int6_stream val_loss:" in done.stdout


def coded_tensors(run: TinyRun):
    """Return an artifact's small tensors by name, and name -> (codes, steps) of the others."""
    header, tensors = train_gpt.read_tensors(run.folder / "final_model.int6.ptz", "artifact")
    config = train_gpt.adopt(train_gpt.load_config({"STAGE": "evaluate"}), header, "evaluate", "")
    order, shapes = zip(*((name, entry.shape) for name, entry in train_gpt.coded(config).items()))
    rows, columns = zip(*shapes, strict=True)
    pairs = zip(tensors.pop("row_classes").split(rows),
                tensors.pop("column_classes").split(columns), strict=True)
    classes = [train_gpt.element_classes(*pair) for pair in pairs]
    codes = train_gpt.decode_codes(tensors, torch.cat(classes), config.compressor)
    parts = codes.split([len(c) for c in classes]), tensors.pop("steps").split(rows)
    coded = {name: (code.view(shape), step)
             for name, shape, code, step in zip(order, shapes, *parts, strict=True)}
    return tensors, coded


def test_pr1471_solves_the_matrices_and_rounds_the_embeddings(pr1471_run):
    (collected,) = pr1471_run.events("collected")
    (quantized,) = pr1471_run.events("quantized")
    assert collected["hessians"] == quantized["gptq"] == INT6_MATRICES
    assert quantized["rounded"] == 0, "its log counts matrices alone"
    _, weights = train_gpt.read_tensors(pr1471_run.folder / "final_model.weights", "weights")
    _, coded = coded_tensors(pr1471_run)
    for name in ("tok_emb.weight", "ve.table.weight"):
        w = weights[name]
        radius = 20 * w.std(dim=1, keepdim=True)
        steps = (radius / 127).clamp_min(1 / 127)
        codes = (w.clamp(-radius, radius) / steps).round().clamp(-127, 127)
        assert torch.equal(coded[name][0], codes.to(torch.int8)), name


def test_pr1471_has_its_floors_its_dtype_and_its_count(pr1471_run):
    controls, coded = coded_tensors(pr1471_run)
    for name, (_, step) in coded.items():
        floor = torch.tensor(1 / 127 if step.shape[0] == VOCAB_SIZE else 1 / 31).half()
        assert (step >= floor).all(), name
    assert controls and all(t.dtype == torch.float16 for t in controls.values())
    assert scores_of(pr1471_run)["roundtrip"]["tokens"] == (VAL_TOKENS - 1) // 64 * 64
    assert pr1471_run.events("search") == [] and pr1471_run.outcome.result["multiplier"] == 1


def test_the_default_solves_the_embeddings_too(tiny_run):
    (collected,) = tiny_run.events("collected")
    (quantized,) = tiny_run.events("quantized")
    assert collected["hessians"] == quantized["gptq"] == INT6_MATRICES + 2, "both tables"
    assert quantized["rounded"] == 0
