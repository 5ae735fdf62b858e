"""Laws of records/logs.py: what a log states is read, what it does not state is named missing."""

import hashlib
import json
import math
import random
import shutil
import time
from string import Formatter

import log_forms
import pytest
import read
import summary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_logs import SOURCE, Facts, family_1471, system_1090, system_1392, write

import train_gpt

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)

BUILDERS = {"#1471 family": family_1471, "#1392": system_1392, "#1090": system_1090}
# What #1090 logs of a model that it packs before the one it submits.
OF_THE_FIRST_MODEL = {"artifact_bytes", "total_bytes", "roundtrip_bpb", "final_bpb", "final_loss",
                      "gap_bpb", *(("roundtrip", name) for name in ("bpb", "loss", "eval_ms"))}
QUICK = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbers(run):
    """Return every number that a Run states, by name, series as (series, step, field)."""
    found = {name: value for name, value in summary.measures(run).items()
             if name not in ("before_ms", "after_ms", "stall_seconds", "tokens_per_second",
                             "evaluation_seconds", "margin_bytes")}  # those compute over series
    found.update(seed=run.seed, parameters=run.parameters, recurrence=run.recurrence_step)
    for kind, score in run.scores.items():
        found.update({(kind, name): value for name, value in score._asdict().items()
                      if name not in ("name", "digits")})
    for series in (run.train, run.validations):
        for point in series:
            found.update({(type(point).__name__, point.step, name): value
                          for name, value in point._asdict().items()})
    return {name: value for name, value in found.items() if value is not None}


# -- our own forms ---------------------------------------------------------------------------------

def plain_kinds():
    """Return the kinds of EVENTS whose lines hold fields, not whole texts."""
    fields = {kind: [name for _, name, _, _ in Formatter().parse(line) if name]
              for kind, line in train_gpt.EVENTS.items()}
    return sorted(kind for kind, names in fields.items() if names and kind not in log_forms.BLOCKS
                  and not any(name.startswith("text_") for name in names))


@pytest.mark.parametrize("kind", plain_kinds())
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_line_of_our_table_is_read_back_as_its_event(kind, data):
    line, given_fields = train_gpt.EVENTS[kind], {}
    for _, name, spec, _ in Formatter().parse(line):
        if name == "outcome":
            given_fields[name] = data.draw(st.sampled_from(["ok", "OVER THE LIMIT"]))
        elif name and spec:
            whole = spec == ".0f"
            given_fields[name] = data.draw(st.integers(0, 10 ** 6) if whole
                                           else st.floats(0, 1e6).map(lambda v: round(v, 3)))
        elif name:
            given_fields[name] = data.draw(st.integers(0, 10 ** 9))
    text = line.format(**given_fields)
    event = log_forms.LineReader().read(text.encode() + b"\n")
    assert event is not None and event["event"] == kind, text
    for _, name, spec, _ in Formatter().parse(line):
        if name:
            assert format(event[name], spec or "") == format(given_fields[name], spec or "")


def test_events_text_and_console_of_one_run_state_the_same(tiny_run, tmp_path):
    events = logs.read_run(tiny_run.folder)
    text = logs.read_run(tiny_run.cwd / "logs" / "tiny.txt")
    console = tmp_path / "console.log"
    console.write_text(tiny_run.outcome.stdout, encoding="utf-8")
    console = logs.read_run(console)
    assert events.missing == [] and events.complete and text.complete and console.complete
    assert text.missing == [] and console.missing == ["configuration", "versions and hardware"]
    whole = numbers(events)
    for run in (text, console):
        assert run.seed == events.seed and run.sizes.total == events.sizes.total
        assert run.ledger == events.ledger and run.verdicts == events.verdicts
        for kind in ("prequant", "prequant_sliding", "roundtrip", "sliding"):
            assert run.bpb(kind) == events.bpb(kind)  # to the last digit: the result line has it
        for name, value in numbers(run).items():
            if name in whole and "train_ms" not in name and "eval_ms" not in name:
                assert value == pytest.approx(whole[name], abs=6e-5), name
    assert text.config == events.config and text.source_sha256 == events.source_sha256
    assert text.environment == events.environment


def test_learning_rate_and_gradient_norm_are_read_where_the_log_has_them(tmp_path):
    event = dict(event="train", step=3, iterations=9, train_loss=2.5, train_seconds=1.25,
                 lr_multiplier=0.75, grad_norm=0.125)
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(event) + "\n")
    assert logs.read_run(path).train == [logs.TrainPoint(3, 2.5, 1250.0, 0.75, 0.125, None)]


def test_a_lone_later_stage_completes_the_run_before_it(tiny_run, tmp_path):
    whole = [json.loads(line) for line in
             (tiny_run.folder / "events.jsonl").read_text().splitlines()]
    cut = [e["event"] for e in whole].index("quantized")
    head = [dict(e, stage="quantize", artifact_max_bytes=5) if e["event"] == "config" else e
            for e in whole[:3]]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in (*whole[:cut], *head, *whole[cut:])))
    run, reference = logs.read_run(path), logs.read_run(tiny_run.folder)
    assert run.train == reference.train and run.scores == reference.scores and run.complete
    assert run.sizes.cap == 5 and run.config["iterations"] == reference.config["iterations"]


def test_of_several_runs_in_a_file_the_last_is_read(tmp_path):
    first, last = Facts(seed=42), Facts(seed=1337, sliding=1.09)
    run = logs.read_run(write(tmp_path / "both.log", family_1471(first) + family_1471(last)))
    assert numbers(run) == numbers(logs.read_run(write(tmp_path / "a.log", family_1471(last))))
    assert any("several runs" in text for text in run.warnings)


def test_a_resumed_run_keeps_its_first_steps(tiny_run, tmp_path):
    whole = [json.loads(line) for line in
             (tiny_run.folder / "events.jsonl").read_text().splitlines()]
    cut = next(i for i, e in enumerate(whole) if e["event"] == "train" and e["step"] == 8)
    again = dict(event="resumed", text="step 7 from x", step=7, path="x")
    path = tmp_path / "events.jsonl"
    rows = (*whole[:cut], dict(event="failed", error="killed"), *whole[:3], again, *whole[cut:])
    path.write_text("".join(json.dumps(e) + "\n" for e in rows))
    run, reference = logs.read_run(path), logs.read_run(tiny_run.folder)
    assert run.train == reference.train and run.complete
    assert any("resumed" in text for text in run.warnings)


# -- published forms -------------------------------------------------------------------------------

def check_common(run, facts):
    assert run.complete and run.warnings == [] and run.seed == facts.seed
    assert run.steps == facts.steps and run.train_ms == pytest.approx(facts.ms(facts.steps), abs=1)
    assert run.recurrence_step == facts.switch
    assert run.bpb("roundtrip") == pytest.approx(facts.roundtrip, abs=1e-8)
    assert (run.sizes.artifact, run.sizes.code, run.sizes.total) \
        == (facts.artifact, facts.code, facts.artifact + facts.code)
    assert run.sizes.margin == 16_000_000 - facts.total
    by_step = {point.step: point for point in run.train}
    for step in (1, 5, 500, 4500):
        assert by_step[step].train_loss == pytest.approx(facts.loss(step), abs=5e-5)
        assert by_step[step].train_ms == pytest.approx(facts.ms(step), abs=1)
        assert by_step[step].tokens == step * run.batch_tokens


def test_family_1471(tmp_path):
    facts = Facts(code=len(SOURCE))
    run = logs.read_run(write(tmp_path / "train.log", family_1471(facts)))
    check_common(run, facts)
    assert run.system == "published" and run.peak_memory_mib == 33093
    assert run.bpb("sliding") == pytest.approx(facts.sliding, abs=1e-8)
    assert run.bpb("prequant") == pytest.approx(facts.prequant, abs=1e-8)
    assert run.calibration_seconds == 9.8 and run.parameters == 37_022_812
    assert run.data == {"train_shards": 128, "val_tokens": 40_540_160}
    assert run.config["ema_decay"] == "0.9965" and run.config["sliding_window_enabled"] == "1"
    # the text between rulers that is as long as the logged code is the code
    assert run.source_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    pace = summary.speeds(run)
    assert pace.before_ms == pytest.approx(facts.before, abs=0.01)
    assert pace.after_ms == pytest.approx(facts.after, abs=0.01)
    assert pace.stall_seconds == pytest.approx(facts.stall / 1000, abs=0.01)
    assert summary.evaluation_seconds(run) == pytest.approx(79.162)  # the final evaluation alone
    assert [p.step for p in run.validations] == [0, 4000, facts.steps]
    assert run.validations[1].train_ms == pytest.approx(facts.ms(4000), abs=1)


def test_system_1392(tmp_path):
    facts = Facts(seed=314, steps=5945, switch=3000, before=95.3, after=102.7, code=143_667,
                  artifact=15_792_991)
    run = logs.read_run(write(tmp_path / "train_seed314.log", system_1392(facts)))
    check_common(run, facts)
    assert run.bpb("sliding") == pytest.approx(facts.sliding, abs=1e-8)  # of the exact line
    assert run.scores["sliding"].eval_ms == 71_237  # of the short one
    assert run.bpb("prequant") == pytest.approx(facts.prequant, abs=5e-5)  # printed short only
    assert run.calibration_seconds is None  # on its own text: no calibration on training data
    assert run.config["matrix_lr"] == "0.02" and run.config["num_kv_heads"] == "4"


def test_system_1090(tmp_path):
    facts = Facts(seed=1337, steps=7926, switch=None, before=611.9)
    run = logs.read_run(write(tmp_path / "train.log", system_1090(facts)))
    check_common(run, facts)
    assert run.final == "ttt"
    assert run.bpb("ttt") == pytest.approx(facts.sliding, abs=5e-5)
    # published as it is, the log ends at the int8 round trip: that is what it says
    cut = logs.read_run(write(tmp_path / "cut.log", system_1090(facts, whole=False)))
    assert cut.sizes.artifact == 24_655_764 and cut.bpb("ttt") is None
    assert cut.bpb("roundtrip") == pytest.approx(facts.roundtrip - 0.01, abs=1e-8)


# -- damage ----------------------------------------------------------------------------------------

@QUICK
@given(system=st.sampled_from(sorted(BUILDERS)), data=st.data())
def test_a_truncated_log_states_nothing_that_the_whole_one_does_not(system, data, tmp_path):
    whole = ("\n".join(BUILDERS[system](Facts())) + "\n").encode()
    path, cut = tmp_path / "train.log", data.draw(st.integers(1, len(whole) - 2))
    path.write_bytes(whole)
    truth = numbers(logs.read_run(path))
    path.write_bytes(whole[:cut])
    try:
        run = logs.read_run(path)
    except logs.LogError:
        return
    stated = numbers(run)
    for name, value in stated.items():
        # a score is printed short, then exact: the short line alone is less, not wrong
        if system == "#1090" and name in OF_THE_FIRST_MODEL or name in ("final_bpb", "final_loss") \
                and system == "#1392" and b"\n" in whole[cut - 1:cut + 1]:
            continue  # behind a round trip's line a run of these systems may have ended, too
        assert value == pytest.approx(truth[name], abs=5.1e-5), name
    assert not run.complete or stated["total_bytes"]


@pytest.mark.parametrize("system", sorted(BUILDERS))
def test_lost_lines_are_named_missing(system, tmp_path):
    lines = BUILDERS[system](Facts())
    stop = next(i for i, line in enumerate(lines) if line.startswith("stopping_early"))
    run = logs.read_run(write(tmp_path / "train.log", lines[:stop - 1]))
    assert not run.complete and run.steps is None and run.sizes.total is None
    for name in ("training steps", "training time", "sliding score", "artifact bytes",
                 "total bytes", "peak memory"):
        assert name in run.missing
    verdicts = {v.rule: v.outcome for v in summary.verdicts([run])}
    assert verdicts.pop("every log is complete") == "fail"
    assert set(verdicts.values()) == {"n/a"}


@QUICK
@given(seed=st.integers(0, 10 ** 6))
def test_interleaved_runs_state_nothing_on_which_they_differ(seed, tmp_path):
    rng, parts = random.Random(seed), []
    for facts in (Facts(seed=42), Facts(seed=1337, sliding=1.09, artifact=15_000_000, steps=4900)):
        parts.append(system_1392(facts))
    mixed, queues = [], [list(part) for part in parts]
    while any(queues):
        queue = rng.choice([q for q in queues if q])
        mixed.append(queue.pop(0))
    run = logs.read_run(write(tmp_path / "train.log", mixed))
    assert run.seed is None and "seed" in run.missing and not run.complete
    assert all(run.bpb(kind) is None for kind in ("prequant", "roundtrip", "sliding"))
    assert run.sizes.artifact is None and run.sizes.total is None and run.steps is None
    assert any("mixed" in text for text in run.warnings)


def test_lines_of_other_ranks_are_left_out_where_they_are_tagged(tmp_path):
    facts, rng = Facts(), random.Random(0)
    lines = [f"[rank0]: {line}" for line in system_1392(facts)]
    for line in system_1392(Facts(seed=1, sliding=2.0)):
        lines.insert(rng.randrange(len(lines)), f"[rank1]: {line}")
    run = logs.read_run(write(tmp_path / "train.log", lines))
    assert run.bpb("sliding") == pytest.approx(facts.sliding, abs=1e-8) and run.complete
    assert any("ranks other than 0" in text for text in run.warnings)


def test_lines_broken_into_each_other_are_left_out_and_counted(tmp_path):
    lines = family_1471(Facts())
    at = next(i for i, line in enumerate(lines) if line.startswith("500/"))
    lines[at] = lines[at][:25] + lines[at + 1]
    run = logs.read_run(write(tmp_path / "train.log", lines))
    assert 500 not in [point.step for point in run.train]
    line = "\n".join(lines[:at + 1]).count("\n") + 1
    assert any("damaged" in text and f"line {line}:" in text for text in run.warnings)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_other_encodings_are_read(encoding, tmp_path):
    facts, path = Facts(), tmp_path / "train.log"
    path.write_bytes("\r\n".join([*system_1392(facts), "é ± ü"]).encode(encoding))
    check_common(logs.read_run(path), facts)


@pytest.mark.parametrize("content, said", [
    (b"", "empty"), (b" \n\n", "empty"), (b"PGOLF\x00\x01\n" + bytes(100), "NUL"),
    (b"hello\nworld\n", "none of its 2 lines"), (b'{"event": "nonsense"}\n', "no event"),
    (b'{"event": \n' * 3, "no event"), ("step".encode("utf-16-le") * 9, "NUL")])
def test_what_is_no_log_is_refused_in_one_line(content, said, tmp_path):
    path = tmp_path / "train.log"
    path.write_bytes(content)
    with pytest.raises(logs.LogError, match=said) as caught:
        logs.read_run(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders(tmp_path, tiny_run):
    with pytest.raises(logs.LogError, match="no such file"):
        logs.read_run(tmp_path / "nothing")
    with pytest.raises(logs.LogError, match="no events.jsonl, .log or .txt"):
        logs.read_run(tmp_path)
    shutil.copy(tiny_run.folder / "events.jsonl", tmp_path)
    assert logs.read_run(tmp_path) == logs.read_run(tmp_path / "events.jsonl")
    for seed in (1, 2):
        write(tmp_path / f"train_seed{seed}.log", system_1392(Facts(seed=seed)))
    (tmp_path / "events.jsonl").unlink()
    with pytest.raises(logs.LogError, match="train_seed1.log, train_seed2.log"):
        logs.read_run(tmp_path)
    assert len(logs.find_logs(tmp_path)) == 2  # the table takes all of them


def survives(path):
    try:
        run = logs.read_run(path)
    except logs.LogError:
        return
    json.dumps(read.as_json([run, run]))
    assert read.report([run], 100)


@QUICK
@given(noise=st.binary(min_size=1, max_size=400), data=st.data())
def test_no_bytes_crash_the_reader(noise, data, tmp_path):
    whole = "\n".join(family_1471(Facts())).encode()
    at = data.draw(st.integers(0, len(whole)))
    path = tmp_path / "train.log"
    path.write_bytes(whole[:at] + noise + whole[at + data.draw(st.integers(0, 200)):])
    survives(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10 ** 20, 10 ** 20) | st.floats()
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4)


@settings(QUICK, max_examples=100)
@given(data=st.data())
def test_no_json_values_crash_the_reader(data, tiny_run, tmp_path):
    whole = [json.loads(line) for line in
             (tiny_run.folder / "events.jsonl").read_text().splitlines()]
    for _ in range(6):
        event = data.draw(st.sampled_from(whole))
        event[data.draw(st.sampled_from(sorted(event)))] = data.draw(JSON_VALUES)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in whole))
    survives(path)


@pytest.mark.slow
@pytest.mark.parametrize("name, unit", [
    ("train.log", b"a library said something on this line, again and again\n"),
    ("train.log", b"17/20000 train_loss: 3.1234 train_time: 10.1m tok/s: 7688000\n"),
    ("train.log", ("\n".join(family_1471(Facts())) + "\n").encode()),
    ("train.log", b"x" * 1000), ("events.jsonl", b'{"event": "train", \n'),
    ("events.jsonl", b'{"event": "train", "step": 1, "train_loss": 6.25}\n')])
def test_a_hundred_megabytes_take_less_than_five_seconds(name, unit, tmp_path):
    path = tmp_path / name
    path.write_bytes(unit * (100_000_000 // len(unit)))
    since = time.perf_counter()
    survives(path)
    assert time.perf_counter() - since < 5


def test_a_log_behind_much_noise_is_read_whole(tmp_path):
    lines, noise = family_1471(Facts()), ["some library said something on this line"] * 200_000
    run = logs.read_run(write(tmp_path / "train.log", [*lines[:40], *noise, *lines[40:]]))
    assert numbers(run) == numbers(logs.read_run(write(tmp_path / "plain.log", lines)))
    assert math.isclose(run.bpb("sliding"), Facts().sliding, abs_tol=1e-8)
