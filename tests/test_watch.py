"""Laws of watch: what it shows of a growing log is true, and it ends by itself."""

import json
import subprocess
import sys

import conftest
import pytest
import watch
from published_logs import Facts, family_1471, write

import records

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)


def grown(tiny_run, tmp_path, kind, step=None):
    """Return a run's folder whose events end with the first of a kind (at a step)."""
    rows = tiny_run.events()
    at = next(i for i, e in enumerate(rows) if e["event"] == kind and step in (None, e.get("step")))
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:at + 1]))
    return logs.read_run(path)


def test_progress_and_what_comes_next_while_training(tiny_run, tmp_path):
    run = grown(tiny_run, tmp_path, "train", 4)
    at = watch.progress(run)
    assert (at.step, at.steps) == (4, 12)
    assert at.left == pytest.approx(8 * at.step_ms / 1000)
    text = watch.page(run, 100, "*")
    assert "training, step 4 of 12" in text and "33 %" in text and "as predicted" in text
    next_line = next(line for line in text.splitlines() if line.startswith("next: "))
    assert [part.split(" (")[0] for part in next_line.removeprefix("next: ").split(", ")] == [
        "recurrence at step 6", "validation at step 6", "end of training at step 12"]


@pytest.mark.parametrize("kind, doing, coming", [
    ("warmup_step", "training", None), ("weights", "calibration", "the score before packing"),
    ("artifact", "the round-trip score", "the sliding score"), ("sliding", "the result", None)])
def test_each_stage_is_named(kind, doing, coming, tiny_run, tmp_path):
    run = grown(tiny_run, tmp_path, kind)
    assert f", {doing}" in watch.page(run, 200, "*").splitlines()[0]
    assert coming is None or watch.next_events(run, watch.progress(run)) == [f"then {coming}"]


def test_a_run_bounded_by_the_clock_ends_with_it(tmp_path):
    facts = Facts(switch=None)
    lines = [line for line in family_1471(facts)
             if not line.startswith(("stopping", "4964/", "4500/", "4000/"))]
    at = next(i for i, line in enumerate(lines) if line.startswith("3500/"))
    run = logs.read_run(write(tmp_path / "a.log", lines[:at + 1]))
    found = watch.progress(run)  # 590 s are for the steps
    assert found.left == pytest.approx(590 - facts.ms(3500) / 1000, abs=0.1)
    assert found.steps == pytest.approx(590_000 / facts.before, abs=2)


def test_the_curve_falls_from_the_left_to_the_right():
    lines = watch.plot([(x, 9.0 - x) for x in range(9)], 60, "*")
    assert len(lines) == watch.CURVE_ROWS + 1 and max(map(len, lines)) <= 60
    columns = [line.index("*") for line in lines if "*" in line]
    assert columns == sorted(columns) and lines[0].split()[0] == "8.000"
    assert lines[-2].split()[0] == "1.000" and lines[-1].endswith("step 8")


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"),
                                           (3599.6, "1:00:00"), (3723, "1:02:03")])
def test_times(seconds, text):
    assert watch.clock_text(seconds) == text


def run_with(tmp_path, times, act, patience=50.0):
    """Watch with a clock that jumps by ten seconds a look; act(look) may change the log."""
    now, shown = [0.0], []

    def sleep(_):
        now[0] += 10
        act(int(now[0] // 10))
        assert now[0] < 10 * times, "it does not end"
    end = watch.watch(tmp_path, 10, patience, shown.append, lambda: now[0], sleep)
    return end, shown, now[0]


def test_it_waits_for_a_log_and_ends_with_the_run(tiny_run, tmp_path):
    rows = [json.dumps(row) + "\n" for row in tiny_run.events()]

    def grow(look):
        if look >= 2:
            with open(tmp_path / "events.jsonl", "a") as file:
                file.writelines(rows[(look - 2) * 12:(look - 1) * 12])
    (code, reason), shown, _ = run_with(tmp_path, 30, grow)
    assert code == 0 and "finished" in reason
    assert shown[0] is None and shown[-1].complete and len(shown) > 3


def test_it_ends_when_the_run_fails_or_is_silent(tiny_run, tmp_path):
    rows = [json.dumps(row) + "\n" for row in tiny_run.events()[:20]]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(rows))
    (code, reason), _, seconds = run_with(tmp_path, 30, lambda look: None)
    assert code == 1 and "nothing has happened" in reason and seconds == 50
    path.write_text("".join(rows) + '{"event": "failed", "error": "out of memory"}\n')
    (code, reason), _, seconds = run_with(tmp_path, 30, lambda look: None)
    assert code == 1 and "out of memory" in reason and seconds == 0


def test_a_published_log_is_finished_when_nothing_follows_its_score(tmp_path):
    write(tmp_path / "train.log", family_1471(Facts()))
    (code, _), _, seconds = run_with(tmp_path, 30, lambda look: None, patience=500)
    assert code == 0 and seconds == watch.PUBLISHED_QUIET


@pytest.mark.parametrize("patience", [20.0, 500.0])
def test_patience_below_the_quiet_of_published_logs_is_enough(patience, tmp_path):
    write(tmp_path / "train.log", family_1471(Facts()))
    (code, reason), _, seconds = run_with(tmp_path, 30, lambda look: None, patience)
    assert (code, reason) == (0, "the run is finished")
    assert seconds == min(patience, watch.PUBLISHED_QUIET)


def test_a_traceback_ends_a_published_run_unless_more_follows(tmp_path):
    lines = family_1471(Facts())
    path = write(tmp_path / "train.log", [*lines[:58], "Traceback (most recent call last):",
                                          "ValueError: no"])
    (code, reason), _, seconds = run_with(tmp_path, 30, lambda look: None, patience=500)
    assert code == 1 and "Python error" in reason and seconds == watch.PUBLISHED_QUIET
    whole = [*lines[:58], "Traceback (most recent call last):", "ValueError: no", *lines[58:]]
    (code, _), _, _ = run_with(
        tmp_path, 30, lambda look: look == 3 and write(path, whole), patience=500)
    assert code == 0


def test_what_never_becomes_a_log_is_told_at_once_and_what_may_at_the_end(tiny_run, tmp_path):
    with pytest.raises(logs.LogError, match="NUL"):
        run_with(tiny_run.folder / "final_model.int6.ptz", 2, lambda look: None)
    for name in "ab":
        write(tmp_path / f"{name}.log", family_1471(Facts()))
    with pytest.raises(logs.LogError, match="holds 2 logs"):
        run_with(tmp_path, 2, lambda look: None)
    (tmp_path / "b.log").unlink()
    (code, _), shown, _ = run_with(  # one that was read is watched to its end
        tmp_path, 30, lambda look: look == 1 and write(tmp_path / "c.log", ["x"]))
    assert code == 0 and shown[-1].complete
    (tmp_path / "a.log").write_text("no word of training\n")
    (tmp_path / "c.log").unlink()
    (code, reason), _, _ = run_with(tmp_path, 30, lambda look: None)
    assert code == 1 and reason.startswith("nothing has happened for 50 s: ")
    assert "none of its 1 lines" in reason


@pytest.mark.parametrize("kind, changes, now, then", [
    ("roundtrip", dict(sliding_window_enabled=False), "the result", None),
    ("artifact", dict(sliding_window_enabled=False), "the round-trip score", "the result"),
    ("artifact", dict(sliding_window_enabled=False, eval_mode="stream"), "the round-trip score",
     "the stream score"),
    ("sliding", dict(eval_mode="stream"), "the stream score", "the result"),
    ("collected", dict(prequant_sliding=True), "the score before packing",
     "the sliding score before packing"),
    ("collected", dict(prequant_sliding=False), "the score before packing", "quantisation"),
    ("collected", dict(prequant_sliding=False, stage="train"), "the score before packing",
     "the result"),
    ("weights", dict(gptq_enabled=False, prequant_sliding=False), "the score before packing",
     "quantisation")])
def test_what_is_announced_follows_the_settings(kind, changes, now, then, tiny_run, tmp_path):
    grown(tiny_run, tmp_path, kind)
    path = tmp_path / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, **(changes if row["event"] == "config" else {})})
                            + "\n" for row in rows))
    run = logs.read_run(path)
    assert watch.status(run, watch.progress(run)).split(", ")[1] == now
    assert watch.next_events(run, watch.progress(run)) == [f"then {then}"] * bool(then)


def test_a_real_run_is_followed_from_its_first_line_to_its_last(small_env, tmp_path):
    settings = {name: str(value) for name, value in small_env.items()}
    env = {**conftest.base_env(tmp_path), **settings, "RUN_ID": "seen"}
    with subprocess.Popen([sys.executable, str(conftest.SCRIPT)], env=env, cwd=tmp_path,
                          stdout=subprocess.DEVNULL) as running:
        tool = [sys.executable, str(conftest.REPO / "records" / "records.py"), "watch",
                str(tmp_path / "runs" / "seen"), "--every", "0.1", "--patience", "120"]
        done = subprocess.run(tool, env=conftest.base_env(tmp_path), capture_output=True, text=True,
                              timeout=200)
        assert running.wait(60) == 0
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "the run is finished", done.stderr
    assert "finished, step 8" in lines[-2] and "sliding" in lines[-2]


@pytest.mark.parametrize("name", ["--every", "--patience"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e18"])
def test_numbers_that_make_no_sense_are_refused(name, value, tmp_path, capsys):
    assert records.main(["watch", str(tmp_path), f"{name}={value}"]) == 2
    err = capsys.readouterr().err
    assert f"{name} {float(value)}: seconds, must be above 0" in err and err.count("\n") == 1
