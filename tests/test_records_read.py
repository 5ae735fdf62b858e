"""Laws of `records.py read` and `compare`: the numbers, the verdicts, the statistics."""

import json
import math
import os
import statistics
import subprocess
import sys

import pytest
import read
import stats_tests
import summary
from conftest import REPO
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published_logs import Facts, family_1471, system_1090, system_1392, write

import records

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)

SEEDS = (42, 1337, 2024)
SCORES = st.lists(st.floats(0.9, 1.3).map(lambda v: round(v, 6)), min_size=2, max_size=8)


def three_logs(folder, form=family_1471):
    """Write a log per seed and return their paths."""
    folder.mkdir(exist_ok=True)
    return [write(folder / f"train_seed{seed}.log",
                  form(Facts(seed=seed, sliding=1.0872 + 0.0003 * i)))
            for i, seed in enumerate(SEEDS)]


def call(capsys, *argv):
    """Run the tool; return (exit code, standard output, standard error)."""
    code = records.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def outcomes(runs):
    return {v.rule.split(" ")[0]: v.outcome for v in summary.verdicts(runs)}


# -- read ------------------------------------------------------------------------------------------

def test_the_json_is_the_logs_numbers_with_mean_and_sample_std(tmp_path, capsys):
    code, out, _ = call(capsys, "read", "--json", *three_logs(tmp_path))
    page = json.loads(out)
    values = [1.0872, 1.0875, 1.0878]
    assert code == 0 and [run["seed"] for run in page["runs"]] == list(SEEDS)
    assert [run["sliding_bpb"] for run in page["runs"]] == pytest.approx(values)
    assert page["mean"]["sliding_bpb"] == pytest.approx(statistics.fmean(values))
    assert page["std"]["sliding_bpb"] == pytest.approx(statistics.stdev(values))
    assert page["mean"]["gap_bpb"] == pytest.approx(0.0168)
    run, facts = page["runs"][0], Facts()
    seconds = facts.ms(facts.steps) / 1000
    assert run["tokens_per_second"] == pytest.approx(facts.steps * 786_432 / seconds, rel=1e-5)
    assert run["training_seconds"] == pytest.approx(seconds + 9.8, abs=1e-3)


def test_the_table_shows_every_number_of_the_json(tmp_path, capsys):
    paths = three_logs(tmp_path, system_1392)
    page = json.loads(call(capsys, "read", "--json", *paths)[1])
    table = call(capsys, "read", *paths)[1]
    for key, title, form in summary.MEASURES:
        for value in (*(run[key] for run in page["runs"]), page["mean"][key]):
            if value is not None:
                line = next(row for row in table.splitlines() if row.startswith(title))
                digits = 4 if key in ("prequant_bpb", "gap_bpb") else 8  # printed short only
                assert read.shown(value, form, digits) in line, title


def test_a_table_is_broken_to_the_width_of_the_terminal(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / f"{i}.log", family_1471(Facts(seed=i))) for i in range(12)]
    monkeypatch.setenv("COLUMNS", "80")
    table = call(capsys, "read", *paths)[1].split("\nok ")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert all(f"seed {i}" in table for i in range(12))


def test_a_mean_over_a_missing_number_is_not_stated(tmp_path):
    lines = family_1471(Facts())
    whole = logs.read_run(write(tmp_path / "a.log", lines))
    cut = logs.read_run(write(tmp_path / "b.log", lines[:-1]))
    page = read.as_json([whole, cut])
    assert page["mean"]["sliding_bpb"] is None and page["mean"]["roundtrip_bpb"] is not None


@pytest.mark.parametrize("milliseconds, outcome, said", [
    (590_200, "pass", "at most 600 of"), (590_210, "pass", "within one step"),
    (590_310, "pass", "within one step"), (590_330, "fail", "600.13 s")])  # a step takes 119 ms
def test_calibration_counts_as_training_and_a_published_run_may_finish_its_step(
        milliseconds, outcome, said, tmp_path):
    steps = Facts().steps
    facts = Facts(switch=None, before=milliseconds / steps)  # and 9.8 s of calibration
    run = logs.read_run(write(tmp_path / "a.log", family_1471(facts)))
    found = next(v for v in summary.verdicts([run]) if v.rule.startswith("training"))
    assert found.outcome == outcome and said in found.reason
    strict = summary.judge("training", [run], summary.training_seconds, 600, "s")
    assert strict.outcome == ("pass" if milliseconds == 590_200 else "fail")


@pytest.mark.parametrize("excess", [0, 1])
def test_one_byte_over_the_cap_fails(excess, tmp_path):
    facts = Facts()._replace(artifact=16_000_000 - Facts().code + excess)
    run = logs.read_run(write(tmp_path / "a.log", family_1471(facts)))
    assert outcomes([run])["code"] == ("fail" if excess else "pass")
    assert run.sizes.margin == -excess


def test_evaluation_over_its_limit_fails(tmp_path):
    run = logs.read_run(write(tmp_path / "a.log", system_1090(Facts(switch=None))))
    assert summary.evaluation_seconds(run) == pytest.approx(900)  # the final one alone
    assert outcomes([run])["evaluation"] == "fail"


def test_seeds_are_counted_once_and_only_in_complete_logs(tmp_path):
    runs = [logs.read_run(path) for path in three_logs(tmp_path)]
    assert outcomes(runs)["3"] == "pass"
    assert outcomes([runs[0], runs[1], runs[1]])["3"] == "fail"
    cut = logs.read_run(write(tmp_path / "cut.log", family_1471(Facts(seed=2024))[:-1]))
    assert outcomes([runs[0], runs[1], cut])["3"] == outcomes([cut])["every"] == "fail"
    assert outcomes([runs[0]])["3"] == "n/a"  # nobody claims anything by one log


def test_our_own_run_is_read_with_its_ledger_and_every_verdict(tiny_run, capsys):
    code, out, _ = call(capsys, "read", tiny_run.folder)
    assert code == 0 and "time: " in out and "quantize" in out
    verdicts = outcomes([logs.read_run(tiny_run.folder)])
    assert verdicts == {"every": "pass", "training": "pass", "evaluation": "pass", "code": "pass",
                        "3": "n/a"}


def test_an_unreadable_log_does_not_stop_the_rest(tmp_path, capsys):
    paths = three_logs(tmp_path)
    paths[1].write_bytes(b"")
    code, out, err = call(capsys, "read", *paths, tmp_path / "none.log")
    assert code == 2 and "seed 42" in out and "seed 2024" in out
    assert err.count("\n") == 2 and f"{paths[1]}: empty" in err and "none.log: no such file" in err


def test_the_same_run_twice_counts_once_and_is_told(tmp_path, tiny_run, capsys):
    paths = three_logs(tmp_path)
    (tmp_path / "train.log").write_bytes(paths[1].read_bytes())
    code, out, _ = call(capsys, "read", "--json", tmp_path)
    page = json.loads(out)
    assert code == 0 and sorted(run["seed"] for run in page["runs"]) == sorted(SEEDS)
    assert len(page["notes"]) == 1 and "the same run as" in page["notes"][0]
    text = tiny_run.cwd / "logs" / "tiny.txt"  # text rounds what events state in full
    assert len(json.loads(call(capsys, "read", "--json", text, tiny_run.folder)[1])["runs"]) == 1
    assert "dropped" in call(capsys, "compare", *paths, paths[0], "--", *paths[:2])[1]


def test_a_run_of_both_groups_is_told(tmp_path, capsys):
    paths = three_logs(tmp_path)
    page = call(capsys, "compare", *paths, "--", *paths[:2])[1]
    assert page.count("of the other group") == 2


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("name", ["a.log", "events.jsonl"])
def test_a_file_of_a_byte_order_mark_alone_is_empty(mark, name, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(mark)
    code, _, err = call(capsys, "read", path)
    assert code == 2 and f"{path}: empty" in err and err.count("\n") == 1


def test_logs_are_found_where_people_put_them(tmp_path, capsys):
    for name in ("a/logs/x.txt", "b/train.log", "c/train_seed1.log"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        write(path, family_1471(Facts(seed=len(name))))
        (path.parent / "requirements.txt").write_text("torch\n")
        assert [log for log in logs.find_logs(tmp_path / name[0])] == [path]
    assert len(logs.find_logs(tmp_path)) == 3
    (tmp_path / "b" / "train.log").unlink()
    code, _, err = call(capsys, "read", tmp_path / "b")
    assert code == 2 and "no events.jsonl, .log or .txt" in err


def test_digits_are_those_of_the_log(tmp_path, capsys):
    table = call(capsys, "read", write(tmp_path / "a.log", system_1090(Facts(switch=None))))[1]
    final = next(line for line in table.splitlines() if line.startswith("final bpb"))
    assert final.split()[-1] == "1.0873"  # not 1.08730000


@pytest.mark.parametrize("command", [["read"], ["check"]])
def test_a_reader_that_leaves_early_and_a_narrow_encoding_are_no_faults(command, tmp_path):
    folder = tmp_path / "\u00fc"
    paths = three_logs(folder)
    tool = [sys.executable, str(REPO / "records" / "records.py"), *command]
    tool += [str(folder)] if command == ["check"] else [str(p) for p in paths]
    env = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(tool, env=env, capture_output=True)
    assert done.returncode in (0, 1) and done.stderr == b"" and len(done.stdout) > 200
    with subprocess.Popen(tool, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as left:
        left.stdout.close()
        assert left.stderr.read() == b""


# -- compare ---------------------------------------------------------------------------------------

def plain_welch(a, b):
    """Return Welch's t and its degrees of freedom, from the textbook."""
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    t = (statistics.fmean(a) - statistics.fmean(b)) / math.sqrt(sum(parts))
    return t, sum(parts) ** 2 / sum(p * p / (len(x) - 1) for p, x in zip(parts, (a, b)))


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES, st.sampled_from([0.0, 0.005]))
def test_p_values_are_those_of_students_distribution(a, b, margin):
    from scipy import stats
    assume(statistics.stdev(a) > 1e-4 and statistics.stdev(b) > 1e-4)
    found = stats_tests.welch(a, b, margin)
    assert found.difference == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    assert found.p_two_sided == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    t, freedom = plain_welch(a, b)
    assert found.p_two_sided == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-6)
    t, freedom = plain_welch(a, [value - margin for value in b])
    assert found.p_margin == pytest.approx(stats.t.cdf(t, freedom), rel=1e-6, abs=1e-12)


def test_nothing_is_said_about_single_runs_or_without_a_spread():
    assert stats_tests.welch([1.0], [1.1, 1.2]).p_two_sided is None
    assert stats_tests.welch([1.0, 1.0], [1.1, 1.1]).p_margin is None
    assert stats_tests.seeds_to_decide([1.0], [1.1, 1.2], 0.005) is None


@settings(max_examples=40, deadline=None)
@given(SCORES, SCORES, st.floats(0.001, 0.1))
def test_the_seeds_still_needed_decide_and_fewer_do_not(a, b, gain):
    from scipy import stats
    assume(statistics.stdev(a) > 1e-3 and statistics.stdev(b) > 1e-3)
    shift = statistics.fmean(a) - statistics.fmean(b) + 0.005 + gain
    a = [value - shift for value in a]  # better than b by more than the margin
    more = stats_tests.seeds_to_decide(a, b, 0.005)

    def p_with(extra):
        return stats.ttest_ind_from_stats(
            statistics.fmean(a), statistics.stdev(a), len(a) + extra,
            statistics.fmean(b) - 0.005, statistics.stdev(b), len(b), equal_var=False,
            alternative="less").pvalue

    tried = range(stats_tests.MOST_SEEDS + 1 if more is None else more)
    assert all(p_with(extra) >= 0.01 for extra in tried)
    assert more is None or p_with(more) < 0.01


def test_a_clear_gain_is_a_record_and_a_small_one_is_not(tmp_path, capsys):
    old = [write(tmp_path / f"{seed}.log", family_1471(
        Facts(seed=seed, sliding=1.0889 + seed * 1e-7))) for seed in SEEDS]
    for gain, record in ((0.006, True), (0.0015, False)):  # times 2.58 nats a bpb
        new = [write(tmp_path / f"{gain}_{seed}.log", family_1471(
            Facts(seed=seed, sliding=1.0889 - gain + seed * 1e-7))) for seed in SEEDS]
        code, out, _ = call(capsys, "compare", "--json", *new, "--", *old)
        found = json.loads(out)
        assert code == 0 and found["record"] is record
        assert found["test_bpb"]["difference"] == pytest.approx(-gain, abs=1e-7)
        nats = -gain * math.log(2) * 3.72664
        assert found["test_nats"]["difference"] == pytest.approx(nats, rel=1e-3)
        assert (found["more_seeds"] == 0) is record  # below the margin no number helps
    page = call(capsys, "compare", *new, "--", *old)[1]
    assert "FAIL" in page and "no number of new runs" in page


def test_other_tokenizers_are_compared_in_the_old_ones_tokens(tmp_path, capsys):
    new = three_logs(tmp_path / "new")
    old = [write(tmp_path / f"{seed}.log", [
        line.replace("val_loss:2.", "val_loss:1.") for line in family_1471(Facts(seed=seed))])
        for seed in SEEDS[:2]]
    found = json.loads(call(capsys, "compare", "--json", *new, "--", *old)[1])
    loss, bpb = Facts().score(Facts().sliding)
    assert "tokenizers differ" in found["unit"] and found["same_tokenizer"] is False
    page = call(capsys, "compare", *new, "--", *old)[1]
    assert "the tokenizers differ: compared in bits per byte" in page
    expected = found["test_bpb"]["difference"] * (loss - 1) / bpb
    assert found["test_nats"]["difference"] == pytest.approx(expected, rel=1e-6)


def test_settings_that_differ_are_listed_side_by_side(tmp_path, capsys):
    new = [write(tmp_path / f"{seed}.log", [
        line.replace("warmdown_frac: 0.72", "warmdown_frac: 0.5").replace("600.0", "600")
        for line in family_1471(Facts(seed=seed))]) for seed in SEEDS]
    old = three_logs(tmp_path / "old")
    found = json.loads(call(capsys, "compare", "--json", *new, "--", *old)[1])
    assert found["settings"] == {"warmdown_frac": ["0.5", "0.72"]}  # neither seed nor 600 = 600.0
    page = call(capsys, "compare", "--names", "short", "long", *new, "--", *old)[1]
    assert any(line.split() == ["warmdown_frac", "0.5", "0.72"] for line in page.splitlines())


# -- the command line ------------------------------------------------------------------------------

@pytest.mark.parametrize("command", sorted(set(records.COMMANDS) - {"pack"}))  # it takes much
def test_help_of_each_command_is_one_screen(command, capsys):
    with pytest.raises(SystemExit) as left:
        records.main([command, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and len(out.splitlines()) <= 30
    assert max(map(len, out.splitlines())) <= 100


def test_every_command_is_listed(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(name in out for name in records.COMMANDS)


@pytest.mark.parametrize("argv, said", [
    (["reed"], "unknown command 'reed'"), (["read", "nothing.log"], "nothing.log: no such file"),
    (["plot", "nothing.log"], "nothing.log: no such file"),
    (["compare", "a", "--", "b", "--names", "x", "x"], "--names x x: give two different names")])
def test_mistakes_end_in_one_line(argv, said, capsys):
    code, out, err = call(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err


def test_runs_without_a_common_score_are_refused(tmp_path, capsys):
    lines = family_1471(Facts())
    new, old = write(tmp_path / "a.log", lines), write(tmp_path / "b.log", lines[:20])
    code, _, err = call(capsys, "compare", new, "--", old)
    assert code == 2 and str(old) in err and err.count("\n") == 1
