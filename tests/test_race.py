"""Laws of a race: equal tokens and bytes, each run once, failures apart, honest statistics.

Most run a pretended script in milliseconds: the real one's settings, scores made up.
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import race
import shards
from conftest import REPO, SCRIPT, TINY_MODEL, TINY_RUN

BASE = "TRAIN_BATCH_TOKENS=1024 MICRO_BATCH_TOKENS=1024 TRAIN_SEQ_LEN=64 EVAL_SEQ_LEN=64 DEVICE=cpu"
PRETENDED = """
import sys
REPO = %r
if __name__ != "__main__":
    sys.path.insert(0, REPO)
    from train_gpt import *
else:
    import hashlib, json, os, time
    from pathlib import Path
    env, code = os.environ, Path(__file__).read_bytes()
    softcap = float(env.get("LOGIT_SOFTCAP", 30))
    if "--check" in sys.argv:
        sys.exit("error: no room" if softcap == 17 else 0)
    folder = Path("runs", env["RUN_ID"])
    with open("started.txt", "a") as file:
        print(env["RUN_ID"], file=file)
    begun = (folder / "run.json").exists()
    (folder / "run.json").write_text("{}")
    if softcap == 13:
        sys.exit("error: that number brings no luck")
    while softcap == 31 and not begun:
        time.sleep(0.01)
    seed, steps = int(env["SEED"]), min(int(env["ITERATIONS"]), 50)
    bpb = 1.5 + 0.01 * seed + (0.1 + 0.001 * seed) * (env.get("SKIP_GATES_ENABLED") == "0")
    size = int(env.get("ARTIFACT_MAX_BYTES", 90000)) - len(code) - 7
    batch = int(env.get("TRAIN_BATCH_TOKENS", 1024))
    events = [
        dict(event="source", sha256=hashlib.sha256(code).hexdigest()),
        dict(event="config", seed=seed, train_batch_tokens=batch, env=dict(
            (name, env[name]) for name in ("ITERATIONS", "MAX_WALLCLOCK_SECONDS", "DATA_PATH"))),
        dict(event="parameters", count=1000),
        dict(event="train", step=steps, iterations=steps, train_loss=2.0, train_seconds=1.9),
        dict(event="val", step=steps, val_bpb=9.0, train_seconds=1.9),
        *(dict(event=kind, val_loss=1.0, val_bpb=value) for kind, value in
          (("prequant", bpb), ("roundtrip", bpb + 0.02), ("sliding", bpb - 0.03))),
        dict(event="artifact", bytes=size), dict(event="peak_memory", allocated_mib=5),
        dict(event="result", steps=steps, seed=seed, ledger_seconds=dict(train=2.0))]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + chr(10) for e in events))
""" % str(REPO)


class Track:
    """A folder in which races of the pretended script run."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data
        self.script, self.results = folder / "pretended.py", folder / "results.jsonl"
        self.script.write_text(PRETENDED)

    def arguments(self, *arms, budget="--tokens=51200", size="--bytes=50000", seeds="1,2", more=()):
        return ["run", *(word for arm in arms for word in ("--arm", arm)), budget, size,
                f"--seeds={seeds}", f"--data={self.data.shards}", f"--script={self.script}",
                f"--tokenizer={self.data.tokenizer}", f"--results={self.results}",
                f"--base={BASE}", f"--folder={self.folder / 'race'}", "--jobs=2", *more]

    def run(self, *arms, **options):
        return race.main(self.arguments(*arms, **options))

    def lines(self):
        return race.read_results(self.results)

    def started(self):
        path = self.folder / "race" / "started.txt"
        return path.read_text().split() if path.exists() else []

    def config(self, arm, seed=1):
        run, = (self.folder / "race" / "runs").glob(f"{arm}-s{seed}-*")
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        return events[1]["env"]


@pytest.fixture
def track(tmp_path, tiny_data):
    return Track(tmp_path, tiny_data)


PLAIN, GATES = "plain:", "no gates: SKIP_GATES_ENABLED=0"


def test_a_race_runs_each_arm_with_each_seed_and_says_what_they_differ_by(track, capsys):
    page = track.folder / "table.md"
    assert track.run(PLAIN, GATES, more=["--table", str(page)]) == 0
    lines = track.lines()
    assert sorted((line["arm"], line["run"]["seed"]) for line in lines) == [
        ("no gates", 1), ("no gates", 2), ("plain", 1), ("plain", 2)]
    for line in lines:
        assert line["trained_tokens"] == line["run"]["tokens"] == 51_200
        assert line["artifact_bytes"] == 50_000 - 7 and line["run"]["bytes"] == 50_000
        assert line["step_ms"] == 40 and line["tokens_per_second"] == 25_600
        assert str(track.folder) not in json.dumps(line), "a place on this machine"
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "| plain | 2 | 1.5150 ± 0.0071 | 1.5350 ± 0.0071 | 1.4850 ± 0.0071 |" in text
    assert "| no gates | sliding | +0.10150 | 0.00050 | WORSE | 1: +0.10100, 2: +0.10200 |" in text
    assert "| no gates | gap | +0.00000 | 0.00000 | unresolved" in text
    assert "- no gates: SKIP_GATES_ENABLED=0" in text and "NOT EQUAL" not in text
    assert race.results_table(track.results, ["plain", "no gates"]) == text


def test_a_finished_run_is_not_repeated_whatever_it_is_called(track):
    assert track.run(PLAIN, GATES) == 0
    assert len(track.started()) == 4
    track.script.write_text(PRETENDED + "# edited\n")
    race.load_script.cache_clear()
    assert track.run("other name:", "no gates: SKIP_GATES_ENABLED=false", seeds="1,2,3") == 0
    assert [run.split("-s")[1][0] for run in track.started()[4:]] == ["3", "3"]
    assert track.run(PLAIN, seeds="1", more=["--strict"]) == 0
    assert len(track.started()) == 7 and "SEVERAL SCRIPTS" in race.results_table(track.results, [])


@pytest.mark.parametrize("option, value", [
    ("budget", "--tokens=102400"), ("size", "--bytes=40000"), ("more", ["--targets=3000"])])
def test_other_tokens_bytes_or_text_are_another_race(track, option, value):
    assert track.run(PLAIN, seeds="1") == track.run(PLAIN, seeds="1", **{option: value}) == 0
    assert len(track.lines()) == 2 and len(race.by_race(track.lines())) == 2


def test_a_failed_arm_is_told_and_stops_no_other(track, capsys):
    assert track.run("bad: LOGIT_SOFTCAP=13", PLAIN, seeds="1") == 1
    said = capsys.readouterr()
    assert "error: that number brings no luck" in said.out and "FAILED: bad, seed 1" in said.err
    assert [line["arm"] for line in track.lines()] == ["plain"]
    assert track.run("bad: LOGIT_SOFTCAP=13", PLAIN, seeds="1") == 1, "tried again"
    assert len(track.started()) == 3


@pytest.mark.parametrize("arms, options, message", [
    ((PLAIN, "slip: SKIP_GATE_ENABLED=0"), {}, "did you mean SKIP_GATES_ENABLED"),
    ((PLAIN, "bad: NUM_LAYERS=many"), {}, "arm bad: NUM_LAYERS=many: must be a whole number"),
    ((PLAIN, "late: VE_LAYERS=99"), {}, "VE_LAYERS"),
    ((PLAIN, "mine: SEED=3"), {}, "SEED=3: the race sets it; use --seeds"),
    ((PLAIN, "cap: ARTIFACT_MAX_BYTES=9"), {}, "use --bytes"),
    ((PLAIN, PLAIN), {}, "arm plain: given twice"),
    ((PLAIN,), dict(budget="--tokens=51000"), "50 steps are 51200"),
    ((PLAIN,), dict(size="--bytes-of=none"), "no such arm; there are plain"),
    ((PLAIN,), dict(more=["--targets=1"]), "the first document has"),
    (("NUM_LAYERS=3",), {}, "begin with a name"), (("a: NUM_LAYERS",), {}, "not NAME=VALUE"),
    ((PLAIN,), dict(more=["--jobs=0"]), "--jobs 0: must be above 0"),
    (("a: X='b",), {}, """--arm a: "X='b": no closing quotation"""),
    ((PLAIN,), dict(more=["--base", "X='b"]), """--base: "X='b": no closing quotation"""),
    ((), {}, "no arm; give two or more")])
def test_mistakes_are_refused_before_anything_runs(track, capsys, arms, options, message):
    assert track.run(*arms, **options) == 2
    assert message in capsys.readouterr().err
    assert not track.started() and not track.results.exists()


def test_what_only_the_script_checks_is_refused_too(track, capsys):
    assert track.run(PLAIN, "late: LOGIT_SOFTCAP=17") == 2
    assert "error: arm late:\n           error: no room" in capsys.readouterr().err
    assert not track.started()


def test_interrupted_runs_are_asked_to_end_and_go_on(track):
    command = [sys.executable, str(REPO / "tests" / "race.py"),
               *track.arguments(PLAIN, "long: LOGIT_SOFTCAP=31", seeds="1")]
    # the suite may itself run in a shell's background, where Ctrl-C is ignored
    going = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 30
    while going.poll() is None and time.monotonic() < deadline and (
            len(track.started()) < 2 or not track.lines()):
        time.sleep(0.05)
    going.send_signal(signal.SIGINT)
    said = going.communicate(timeout=60)[0]
    assert going.returncode == 130 and "long, seed 1: stopping" in said, said
    assert [line["arm"] for line in track.lines()] == ["plain"]
    assert track.run(PLAIN, "long: LOGIT_SOFTCAP=31", seeds="1") == 0
    assert [line["arm"] for line in track.lines()] == ["plain", "long"]
    assert len(set(track.started())) == 2 and len(track.started()) == 3


def test_a_run_that_outlived_its_race_is_not_started_twice(track, tiny_data):
    options = race.parse(track.arguments("long: LOGIT_SOFTCAP=31", seeds="1"))
    here = race.set_up(options)
    job = race.Job(here, task := race.Task("long", 1, 50_000))
    try:
        with pytest.raises(race.RaceError, match="another process runs it"):
            race.Job(here, task)
    finally:
        job.process.kill()
        job.process.wait()


def test_bytes_of_an_arm_are_what_its_first_seed_takes(track):
    base = ["--base=ARTIFACT_MAX_BYTES=80000"]
    assert track.run(GATES, PLAIN, size="--bytes-of=plain", more=base) == 0
    first, *others = track.lines()
    taken = 80_000 - len(PRETENDED) - 7
    assert (first["arm"], first["run"]["bytes"], first["artifact_bytes"]) == ("plain", None, taken)
    assert len(others) == 3 and {line["run"]["bytes"] for line in others} == {taken}
    assert len(race.by_race(track.lines())) == 1
    assert {name: sorted(runs) for name, runs in race.by_arm(track.lines()).items()} == {
        "plain": [1, 2], "no gates": [1, 2]}
    assert track.run(GATES, PLAIN, size="--bytes-of=plain", more=base) == 0
    assert len(track.started()) == 4


def test_a_run_resumed_after_training_has_its_speed_and_scores_from_before(track):
    here = race.set_up(race.parse(track.arguments(PLAIN)))
    assert track.run(PLAIN, seeds="1") == 0
    task, line = race.Task("plain", 1, 50_000), track.lines()[0]
    path = here.run_folder(task) / "events.jsonl"
    result = dict(event="result", seed=1, ledger_seconds=dict(evaluate=1.0))
    path.write_text(path.read_text() + '{"event": "resu' + f"\n{json.dumps(result)}\n")
    again = race.measure(here, task, 1.0)
    assert again["scores"] == line["scores"] and again["step_ms"] == 38
    path.write_text('{"event": "result", "ledger_seconds": {}}')
    with pytest.raises(race.RaceError, match="not of a whole run"):
        race.measure(here, task, 1.0)


def test_a_race_at_equal_seconds(track, monkeypatch):
    assert track.run(PLAIN, budget="--seconds=9", seeds="1") == 0
    given, line = track.config("plain"), track.lines()[0]
    assert float(given["MAX_WALLCLOCK_SECONDS"]) == 9 and int(given["ITERATIONS"]) > 1e6
    assert line["run"]["seconds"] == 9 and "2 runs at once" in line["run"]["machine"]
    monkeypatch.setattr(race, "machine_name", lambda device: "another")
    assert track.run(PLAIN, budget="--seconds=9", seeds="1") == 0
    assert len(race.by_race(track.lines())) == 2, "seconds are a machine's own"


def test_schedules_go_by_share_unless_an_arm_says_otherwise(track):
    arms = (PLAIN, "own: RECUR_START_STEP=7", "share: RECUR_START_FRAC=0.50",
            "demo: PRESET=demo DOC_MASK=0")
    found = race.set_up(race.parse(track.arguments(*arms, more=["--base=VOCAB_SIZE=512"]))).arms
    assert {name: s.get("RECUR_START_FRAC") for name, s in found.items()} == {
        "plain": "0.347", "own": None, "share": "0.5", "demo": None}
    assert found["own"]["MUON_MOMENTUM_WARMUP_FRAC"] == "0.302"


def test_stray_settings_of_the_shell_reach_no_arm(track, monkeypatch):
    monkeypatch.setenv("SKIP_GATES_ENABLED", "0")
    monkeypatch.setenv("INNOCENT", "yes")
    here = race.set_up(race.parse(track.arguments(PLAIN)))
    env = here.environment(race.Task("plain", 1, 50_000))
    assert "SKIP_GATES_ENABLED" not in env and env["INNOCENT"] == "yes"
    assert env["OMP_NUM_THREADS"] == "1" and env["VOCAB_SIZE"] == "512"
    assert int(env["ARTIFACT_MAX_BYTES"]) == 50_000 + len(PRETENDED)


# ---- arms and text ------------------------------------------------------------------------------


def test_arms_of_a_file(tmp_path):
    path = tmp_path / "arms.txt"
    path.write_text("# two\n[plain]\n\n[wide one] # wider\n"
                    "MODEL_DIM=96  # of 64\nVE_DIM=32 X='a b'\n")
    assert list(race.read_arms(path)) == [
        ("plain", {}), ("wide one", dict(MODEL_DIM="96", VE_DIM="32", X="a b"))]
    path.write_text("MODEL_DIM=96\n[late]\n")
    with pytest.raises(race.RaceError, match="arms.txt:1: comes before the first"):
        list(race.read_arms(path))


def test_mistakes_in_a_file_of_arms_are_one_line(track, capsys):
    path = track.folder / "arms.txt"
    path.write_text("[it's]\nX='b\n")
    assert track.run(more=["--arms", str(path)]) == 2
    assert f"""error: {path}:2: "X='b": no closing quotation; words are split""" in \
        one_line(capsys)
    path.write_bytes(b"[a]\nX=\xe9\n")
    assert track.run(more=["--arms", str(path)]) == 2
    assert f"error: {path}: byte 7 is 0xe9, must be UTF-8" in one_line(capsys)


# ---- files --------------------------------------------------------------------------------------


def one_line(capsys):
    """Return what was said of an error, which must be a line."""
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture
def shard_copy(track, tiny_data):
    """A copy of the shards, to be spoilt, and the options that race on it."""
    folder = track.folder / "source"
    shutil.copytree(tiny_data.shards, folder)
    shutil.copy(tiny_data.tokenizer, model := folder / "tokenizer.model")
    return folder, [f"--data={folder}", f"--tokenizer={model}"]


@pytest.mark.parametrize("name, keep, message", [
    ("fineweb_val_000000.bin", -2, "(truncated?); download or build it again"),
    ("fineweb_val_000000.bin", 0, "not a token shard"),
    ("fineweb_val_000000.bin", 5, "not a token shard"),
    ("fineweb_train_000000.bin", -2, "(truncated?); download or build it again"),
    ("tokenizer.model", 0, "not a SentencePiece model"),
    ("tokenizer.model", 99, "not a SentencePiece model"),
    ("tokenizer.model", None, "no such file; name the .model that made the shards")])
def test_broken_files_are_one_line(track, shard_copy, capsys, name, keep, message):
    folder, more = shard_copy
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])
    if keep is None:
        path.unlink()
    assert track.run(PLAIN, more=more) == 2
    said = one_line(capsys)
    assert message in said and str(path) in said
    assert not track.started() and not track.results.exists()


def test_validation_without_a_target_is_one_line(track, shard_copy, capsys):
    folder, more = shard_copy
    for tokens in ([], [1]):
        shards.write_shard(folder / "fineweb_val_000000.bin", np.array(tokens, int))
        assert track.run(PLAIN, more=more) == 2
        said = one_line(capsys)
        assert f"its validation is {len(tokens)} tokens, must be at least 2" in said


@pytest.mark.parametrize("text", ["1 +", "raise RuntimeError('no')"])
def test_a_script_that_cannot_be_imported_is_one_line(track, capsys, text):
    track.script.write_text(text)
    race.load_script.cache_clear()
    assert track.run(PLAIN) == 2
    assert "pretended.py: cannot be imported" in one_line(capsys)
    race.load_script.cache_clear()


DOCS = "".join(json.dumps(dict(text=f"document {i} of some")) + "\n" for i in range(9))


def prepared(track, tiny_data, train=DOCS, val=DOCS, tokenizer=None, more=()):
    paths = [track.folder / "train.jsonl", track.folder / "val.jsonl"]
    for path, text in zip(paths, (train, val)):
        path.write_text(text)
    return race.main(["prepare", *map(str, paths), str(tokenizer or tiny_data.tokenizer),
                      str(track.folder / "made"), *more])


def test_documents_become_shards(track, tiny_data):
    assert prepared(track, tiny_data, val=DOCS + "\n", more=["--val-tokens=20"]) == 0
    made = track.folder / "made"
    train, val = (shards.read_shard(made / f"fineweb_{split}_000000.bin")
                  for split in ("train", "val"))
    assert (train == 1).sum() == 9 and val.tolist() == train[:20].tolist()
    assert (made / "tokenizer.model").read_bytes() == tiny_data.tokenizer.read_bytes()
    assert prepared(track, tiny_data, tokenizer=made / "tokenizer.model") == 0


@pytest.mark.parametrize("options, message", [
    (dict(val=""), "val.jsonl: holds no document, must hold at least one; write a line"),
    (dict(train="\n \n"), "train.jsonl: holds no document"),
    (dict(val=DOCS + '{"text": "cu'), "val.jsonl, line 10: not a JSON object"),
    (dict(val='{"body": "x"}'), "--text-key (an option of data/tokenize_corpus.py)"),
    (dict(tokenizer="/dev/null"), "/dev/null: not a SentencePiece model"),
    (dict(tokenizer="none.model"), "none.model: not a SentencePiece model"),
    (dict(more=["--val-tokens=0"]), "--val-tokens 0: must be above 0")])
def test_what_makes_no_shards_is_one_line(track, tiny_data, capsys, options, message):
    assert prepared(track, tiny_data, **options) == 2
    assert message in one_line(capsys)
    assert not (track.folder / "made").exists()


@pytest.mark.parametrize("targets, kept", [(None, 10), (9, 10), (8, 7), (6, 7), (5, 3), (2, 3)])
def test_validation_is_cut_between_documents(targets, kept):
    tokens = np.array([1, 5, 5, 1, 5, 5, 5, 1, 5, 5])
    assert race.whole_documents(tokens, 1, targets).tolist() == tokens[:kept].tolist()


def test_a_cut_sidecar_goes_with_its_tokens(track, tiny_data):
    folder = track.folder / "source"
    shutil.copytree(tiny_data.shards, folder)
    val = shards.read_shard(folder / "fineweb_val_000000.bin")
    shards.write_shard(folder / "fineweb_val_bytes_000000.bin", np.arange(len(val)))
    options = race.parse(track.arguments(PLAIN, more=["--targets=3000", f"--data={folder}"]))
    data = race.lay_data(race.load_script(SCRIPT), options, track.folder / "race")
    cut = shards.read_shard(data.folder / "fineweb_val_000000.bin")
    assert 2000 < len(cut) <= 3001 and (cut == val[:len(cut)]).all() and val[len(cut)] == 1
    sizes = shards.read_shard(data.folder / "fineweb_val_bytes_000000.bin")
    assert sizes.tolist() == list(range(len(cut))) and data.marks["targets"] == len(cut) - 1
    assert all(path.is_symlink() for path in data.folder.glob("fineweb_train_*"))


# ---- statistics ---------------------------------------------------------------------------------


def line_of(arm, seed, sliding, **more):
    run = dict(settings=dict(A=arm), seed=seed, tokens=5, bytes=100, device="cpu",
               data=dict(targets=9))
    return dict(arm=arm, run={**run, **more}, scores=dict(sliding=sliding), artifact_bytes=100,
                parameters=3, trained_tokens=5, tokens_per_second=9.0, step_ms=2.0,
                wall_seconds=9.0, machine="m", script_sha256="s" * 64)


@pytest.mark.parametrize("differences, verdict", [
    ([-0.010, -0.011, -0.009], "better"), ([0.010, 0.011, 0.009], "WORSE"),
    ([-0.010, 0.004, -0.002], "unresolved"), ([0.0, 0.0], "unresolved"),
    ([-0.5], "unresolved (one seed)")])
def test_differences_are_paired_by_seed(differences, verdict):
    first = {seed: line_of("a", seed, 1 + 0.5 * seed) for seed in range(4)}
    runs = {seed: line_of("b", seed, 1 + 0.5 * seed + d) for seed, d in enumerate(differences)}
    found = race.paired(runs, first, "sliding")
    assert found.verdict == verdict and found.mean == pytest.approx(statistics.fmean(differences))
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        assert found.error == pytest.approx(error)


def test_arms_of_one_name_and_other_settings_are_apart():
    lines = [line_of("a", 1, 1.0), line_of("a", 1, 2.0, settings=dict(A="b"))]
    assert list(race.by_arm(lines)) == ["a", "a [A=b]"]
    text = race.table(race.by_arm(lines))
    assert "| a [A=b] | sliding | +1.00000 | - | unresolved (one seed) | 1: +1.00000 |" in text


def test_an_adapted_score_gets_its_column_and_unequal_bytes_a_warning():
    lines = [line_of("a", 1, 1.0), line_of("b", 1, 1.1)]
    lines[1] |= dict(scores=dict(sliding=1.1, adapted=1.05), artifact_bytes=90)
    text = race.table(race.by_arm(lines))
    assert "| arm | seeds | sliding | adapted | artifact bytes |" in text
    assert "| a | 1 | 1.0000 | - | 100 |" in text and "b takes 90 of 100" in text


def test_a_damaged_results_file_is_told_with_its_line(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line_of("a", 1, 1.0)) + '\n{"arm": "b"')
    assert race.main(["table", str(path)]) == 2
    assert f"{path}:2: not a line of this tool" in capsys.readouterr().err
    path.write_text(json.dumps(line_of("a", 1, 1.0)) + "\n")
    assert race.main(["table", str(path), "--only", "b"]) == 2
    assert "no such arm; there are a" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (dict(run={}), '"run" has no \'settings\''), (dict(run=3), "the line has 'run': 3"),
    (dict(scores=[]), "the line has 'scores': []"), (dict(scores=dict(a="x")), "'a': \"x\""),
    (dict(step_ms=0.0), "'step_ms': 0.0"), (dict(artifact_bytes=True), "'artifact_bytes': true"),
    (dict(run=line_of("a", 1, 1.0, settings=dict(A=3))["run"]), '"settings" has \'A\': 3'),
    (dict(run=line_of("a", 1, 1.0, data={})["run"]), '"data" has no \'targets\''),
    (dict(run=line_of("a", 1, 1.0, bytes=0)["run"]), "'bytes': 0"),
    (dict(run=line_of("a", 1, 1.0, seconds="9")["run"]), "'seconds': \"9\"")], ids=str)
def test_a_line_of_another_form_is_told_with_what_is_wrong(tmp_path, capsys, change, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**line_of("a", 1, 1.0), **change}))
    assert race.main(["table", str(path)]) == 2
    said = one_line(capsys)
    assert f"{path}:1: not a line of this tool (" in said and message in said


@pytest.mark.parametrize("text", ['{"run": {}}', "3", "[" * 100_000, "\xff"])
def test_a_line_of_something_else_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "results.jsonl"
    path.write_text(text, encoding="latin-1")
    assert race.main(["table", str(path)]) == 2
    assert str(path) in one_line(capsys)


def test_a_diverged_run_is_a_line(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line_of("a", 1, math.nan, bytes=None)))
    assert race.main(["table", str(path)]) == 0
    assert "| a | 1 | nan |" in capsys.readouterr().out


def test_status_foretells_the_end(track):
    here = race.set_up(race.parse(track.arguments(PLAIN, GATES)))
    runner = race.Runner(here, [dict(line_of("plain", 1, 1.0), wall_seconds=600.0)])
    waiting = [race.Task("plain", 2, 5), race.Task("no gates", 2, 5)]
    assert runner.status(waiting) == "; 2 to come, ETA 10 min"


# ---- the real script ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_script_races(tiny_data, tmp_path):
    own = {"VOCAB_SIZE", "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "ARTIFACT_MAX_BYTES"}
    base = {**TINY_MODEL, **TINY_RUN, "EVAL_STRIDE": 32, "VAL_LOSS_EVERY": 0}
    words = " ".join(f"{name}={value}" for name, value in base.items() if name not in own)
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(REPO / "tests" / "race.py"), "run", "--arm", "plain:", "--arm",
               "deep: NUM_LAYERS=5", f"--base={words}", "--tokens=12288", "--bytes=110000",
               f"--data={tiny_data.shards}", f"--tokenizer={tiny_data.tokenizer}", "--seeds=1",
               f"--results={results}", f"--folder={tmp_path / 'race'}", "--targets=3000",
               "--jobs=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "SEED": "7"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = race.read_results(results)
    assert {line["arm"] for line in lines} == {"plain", "deep"}
    for line in lines:
        assert 0.95 * 110_000 < line["artifact_bytes"] <= 110_000
        assert line["trained_tokens"] == 12_288 and line["run"]["seed"] == 1
        assert {"prequant", "prequant_sliding", "roundtrip", "sliding"} <= {*line["scores"]}
    assert len(list((tmp_path / "race" / "runs").glob("*/final_model.int6.ptz"))) == 2
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "2 done before, 0 to do" in again.stdout
