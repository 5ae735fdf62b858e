"""Laws of check: a record as made passes, and each fault that reviewers met is caught by its rule.
"""

import json
import re
import sys

import pytest

pytest.importorskip("python_minifier")
pytest.importorskip("jsonschema")
import check  # noqa: E402
import imports  # noqa: E402
import script  # noqa: E402
from published_logs import Facts, legal_ttt, phased_ttt, write  # noqa: E402
from record_toys import copy_record, edit, made_record  # noqa: E402
from test_pack import seeds  # noqa: E402, F401

import records  # noqa: E402

CAP, TIMED = 16_000_000, {"training + calibration <= 600 s"}


def toy_record(seeds, to, track="non_record_16mb"):  # noqa: F811
    """Return a record that may be spoilt."""
    folder = copy_record(made_record(seeds, "--no-figure"), to, track)
    edit(folder / "submission.json", "non_record_16mb", track)
    return folder


@pytest.fixture
def record(seeds, tmp_path):  # noqa: F811
    return toy_record(seeds, tmp_path)


@pytest.fixture
def timed_record(seeds, tmp_path):  # noqa: F811
    """The record in the track with time limits."""
    return toy_record(seeds, tmp_path, "10min_16mb")


def verdicts(folder):
    return {v.rule: v for v in check.judgements(check.load(folder), [])}


def failing(folder):
    return {rule for rule, v in verdicts(folder).items() if v.outcome == "fail"}


def log(folder, seed):
    return folder / f"train_seed{seed}.log"


def edit_result(folder, seed, change):
    """Change the RESULT of a seed's log (a dict), and leave out its events."""
    path = log(folder, seed)
    text, _, result = path.read_text(encoding="utf-8").rpartition("RESULT ")
    facts = json.loads(result)
    change(facts)
    path.write_text(f"{text}RESULT {json.dumps(facts)}\n", encoding="utf-8")
    path.with_suffix(".jsonl").unlink()


def set_train_seconds(folder, seconds):
    """Give seed 2 a log whose training and calibration last so long."""
    def change(facts):
        facts["ledger_seconds"].update(train=seconds - 0.25, calibrate=0.25)
    edit_result(folder, 2, change)


def set_total_bytes(folder, total):
    """Give seed 3 a log whose artifact fills code + artifact up to `total`."""
    artifact = total - (folder / "train_gpt.py").stat().st_size
    path = log(folder, 3)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"(Serialized model int6\+\w+: )\d+", rf"\g<1>{artifact}", text)
    path.write_text(re.sub(r"(Total submission size int6\+\w+: )\d+", rf"\g<1>{total}", text),
                    encoding="utf-8")
    path.with_suffix(".jsonl").unlink()


def test_a_record_as_packed_passes(record, capsys):
    assert records.main(["check", str(record)]) == 0
    assert " 0 fail" in capsys.readouterr().out
    assert records.main(["check", "--json", str(record)]) == 0
    told = json.loads(capsys.readouterr().out)[str(record)]
    assert {"rule", "outcome", "reason"} == set(told[0])


def test_artifact_scores_the_same_to_the_last_digit(record, seeds, tiny_data, capsys,  # noqa: F811
                                                    monkeypatch):
    for name, value in tiny_data.env().items():
        monkeypatch.setenv(name, value)
    artifact = seeds.folder / "runs" / "seed1" / "final_model.int6.ptz"
    found = check.evaluate(check.load(record), artifact)
    assert found.outcome == "pass", found
    monkeypatch.setenv("DATA_PATH", str(record))
    assert check.evaluate(check.load(record), artifact).outcome == "n/a"
    stranger = record / "stranger.ptz"
    stranger.write_bytes(b"x")
    assert check.evaluate(check.load(record), stranger).outcome == "fail"


def lose_last_line(folder):
    text = log(folder, 1).read_text(encoding="utf-8")
    log(folder, 1).write_text(text[:text.rindex("RESULT ")], encoding="utf-8")


def import_sibling(folder):
    text = "import helper\n" + script.unpack_script((folder / "train_gpt.py").read_bytes())
    (folder / "train_gpt.py").write_bytes(script.pack_text(text))
    (folder / "helper.py").write_text("")


def state_another_mean(folder):
    data = json.loads((folder / "submission.json").read_text())
    data["val_bpb"] -= 0.0001
    (folder / "submission.json").write_text(json.dumps(data))


def state_an_old_size(folder):
    size = (folder / "train_gpt.py").stat().st_size
    edit(folder / "README.md", f" {size:,} |", f" {size - 10:,} |")


def count_other_bytes(folder):
    for seed in (1, 2, 3):
        text = log(folder, seed).read_text(encoding="utf-8")
        log(folder, seed).write_text(
            re.sub(r" bytes (\d+) by ", lambda m: f" bytes {int(m[1]) * 1.056:.0f} by ", text),
            encoding="utf-8")


def mix_configurations(folder):
    edit(log(folder, 3), "  matrix_lr: 0.022", "  matrix_lr: 0.03")


FAULTS = {
    lose_last_line: "every seed complete",
    state_another_mean: "submission.json = logs",
    state_an_old_size: "README.md = logs",
    lambda folder: set_total_bytes(folder, CAP + 1): "code + artifact <= 16,000,000 bytes",
    lambda folder: set_train_seconds(folder, 600.01): "training + calibration <= 600 s",
    count_other_bytes: "byte fingerprint",
    import_sibling: "imports nothing beside it",
    lambda folder: (folder / "submission.json").write_text('{"author": '): "submission.json",
    mix_configurations: "one configuration",
    lambda folder: (folder / "requirements.txt").unlink(): "files",
    lambda folder: log(folder, 1).write_bytes(b""): "files",
    lambda folder: edit(folder / "submission.json", '"seeds": [\n  1,', '"seeds": [\n  7,'):
        "submission.json = logs",
    lambda folder: edit(folder / "submission.json", '"blurb"', '"blurbs"'): "submission.json",
    lambda folder: edit(folder / "README.md", "softmax", "something"): "legality statement",
    lambda folder: log(folder, 2).unlink(): "3 seeds or more",
    lambda folder: log(folder, 2).rename(log(folder, 9)): "every seed complete",
    lambda folder: (folder / "train_gpt.py").write_bytes(b"print(1"): "compiles on Python 3.10",
    lambda folder: edit(folder / "submission.json", "2026-01-31", "2026-02-01"): "folder name",
}


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_each_fault_is_caught_by_its_rule(number, seeds, tmp_path, capsys):  # noqa: F811
    spoil, rule = list(FAULTS.items())[number]
    track = "10min_16mb" if rule in TIMED else "non_record_16mb"
    folder = toy_record(seeds, tmp_path, track)
    spoil(folder)
    assert records.main(["check", "--json", str(folder)]) == 1
    found = json.loads(capsys.readouterr().out)[str(folder)]
    assert rule in {v["rule"] for v in found if v["outcome"] == "fail"}


def test_toy_in_the_timed_track_fails_by_machine_and_text_alone(timed_record):
    assert failing(timed_record) == {"8 x H100", "byte fingerprint"}


def test_limits_hold_at_their_last_unit(timed_record):
    set_total_bytes(timed_record, CAP)
    set_train_seconds(timed_record, 600.0)
    found = verdicts(timed_record)
    assert found["code + artifact <= 16,000,000 bytes"].outcome == "pass"
    assert found["training + calibration <= 600 s"].outcome == "pass"


@pytest.mark.parametrize("gain, outcome", [(0.5, "pass"), (0.004, "fail"), (-0.5, "fail")])
def test_significance_is_judged_against_the_base(record, gain, outcome):
    rule = "lower by 0.005 nats at p < 0.01"
    assert verdicts(record)[rule].outcome == "n/a"
    path = record / "submission.json"
    data = json.loads(path.read_text())
    scores = data["seed_results"].values()
    data["base"] = dict(name="old", val_loss=[s["val_loss"] + gain for s in scores],
                        val_bpb=[s["val_bpb"] * (1 + gain / s["val_loss"]) for s in scores])
    path.write_text(json.dumps(data))
    assert verdicts(record)[rule].outcome == outcome


@pytest.mark.parametrize("base", [
    {"name": "x"}, {"name": "x", "val_loss": 1, "val_bpb": 2},
    {"name": "x", "val_loss": [], "val_bpb": []}])
def test_a_base_in_another_form_is_told(record, base):
    path = record / "submission.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), base=base)))
    found = verdicts(record)
    rule = found["lower by 0.005 nats at p < 0.01"]
    assert rule.outcome == "n/a" and "does not obey schema.json" in rule.reason
    assert found["submission.json"].outcome == "fail"


@pytest.mark.parametrize("seeds_stated", [[[1], [2], [3]], ["1", "2", "3"], {"1": 1}])
def test_seeds_in_another_form_are_told(record, seeds_stated):
    path = record / "submission.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), seeds=seeds_stated)))
    assert verdicts(record)["submission.json = logs"].outcome == "fail"


@pytest.mark.parametrize("text, fault", [
    ("match 1:\n  case 1: pass", None), ("def f[T](x): pass", "generic"),
    ("try: pass\nexcept* ValueError: pass", "3.11"), ("x = f'{a[\"b\"]}'", None),
    ("x = f'{a['b']}'", ""), ("x = f'{\"\\n\".join(a)}'", ""), ("x = '\0'", ""), ("x = (", "")])
def test_python_310_is_the_oldest_that_must_read_it(text, fault):
    found = imports.python_faults(text.encode(), "it")
    assert not found if fault is None else found and found[0].startswith("it")


def test_imports_are_judged_by_what_is_listed():
    def faults(text, requirements="numpy>=1\ntorch\n", beside=frozenset()):
        return imports.import_faults(text.encode(), requirements, set(beside))
    assert not faults("import os, numpy.random\nfrom torch import nn")
    assert not faults("try:\n import fast\nexcept ImportError: fast = None")
    assert "imports scipy" in faults("import scipy")[0]
    assert "beside" in faults("import fast", beside=["fast"])[0]
    assert "beside" in faults("try:\n import fast\nexcept ImportError: 0", beside=["fast"])[0]
    assert "beside" in faults("from . import fast")[0]
    assert "imports fast" in faults("import importlib\nimportlib.import_module('fast')")[0]


def test_published_sets_have_their_bytes():
    assert check.expected_bytes(40_540_160) == 151_078_222  # sp8192, whole windows
    assert check.expected_bytes(40_540_802) == check.WHOLE_TEXT_BYTES
    assert check.expected_bytes(12_345) is None


def test_what_is_no_folder_is_one_line(tmp_path, capsys):
    assert records.main(["check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert records.main(["check", str(tmp_path)]) == 1  # a folder, of which every rule is told
    assert "submission.json" in capsys.readouterr().out


def test_newer_pythons_fstrings_are_seen_by_newer_pythons():
    text = "x = f'{a['b']}'"
    assert bool(imports.fstring_faults(text.encode())) == (sys.version_info >= (3, 12))


# -- folders of others -----------------------------------------------------------------------------

def others_record(folder, track="10min_16mb", build=phased_ttt, **changes):
    """Write a record as others publish them: three seeds, the usual keys, nothing of ours."""
    record = folder / f"track_{track}" / "2026-04-14_SP8192_Loop1.5"
    record.mkdir(parents=True)
    code = b"import torch\n"
    scores = {seed: 1.0612 + i / 1e4 for i, seed in enumerate((42, 314, 999))}
    for seed, score in scores.items():
        write(record / f"train_seed{seed}.log",
              build(Facts(seed=seed, sliding=score, steps=4630, code=len(code))))
    (record / "train_gpt.py").write_bytes(code)
    (record / "README.md").write_text("# Loop 1.5\n", encoding="utf-8")
    stated = dict(author="A", github_id="a", name="Loop 1.5", date="2026-04-14T08:00:00Z",
                  track=track, val_bpb=1.0613, val_bpb_std=0.0001, bytes_total=15_898_194,
                  hardware="8xH100 80GB SXM", seeds=[42, 314, 999])
    (record / "submission.json").write_text(json.dumps({**stated, **changes}))
    return record


def test_of_another_folder_facts_are_judged_and_the_rest_is_not_applicable(tmp_path, capsys):
    record = others_record(tmp_path)
    found = verdicts(record)
    assert {rule for rule, v in found.items() if v.outcome == "fail"} == set()
    passed = {rule for rule, v in found.items() if v.outcome == "pass"}
    assert passed >= {"submission.json = logs", "code + artifact <= 16,000,000 bytes",
                      "training + calibration <= 600 s", "evaluation <= 600 s",
                      "every seed complete", "3 seeds or more", "sizes", "folder name", "files"}
    assert found["8 x H100"].outcome == found["script made the logs"].outcome == "n/a"
    assert "8xH100 80GB SXM" in found["8 x H100"].reason
    assert found["submission.json"].outcome == found["legality statement"].outcome == "n/a"
    assert records.main(["check", str(record)]) == 0
    page = capsys.readouterr().out
    assert page.splitlines()[1].split()[1:4] == ["submission.json", "=", "logs"]  # facts first
    assert " more)" not in page


@pytest.mark.parametrize("changes, said", [
    (dict(val_bpb=1.0612),
     "val_bpb is 1.0612, the mean by the logs is 1.0613 (it is the smallest)"),
    (dict(val_bpb=1.07), "val_bpb is 1.07, the mean"),
    (dict(bytes_total=15_898_193), "bytes_total is 15898193, the largest"),
    (dict(val_bpb_std=0.01), "val_bpb_std is 0.01")])
def test_a_claim_that_the_logs_do_not_give_fails_by_name(changes, said, tmp_path):
    found = verdicts(others_record(tmp_path, **changes))
    fails = {rule: v.reason for rule, v in found.items() if v.outcome == "fail"}
    assert list(fails) == ["submission.json = logs"] and said in fails["submission.json = logs"]


def test_both_ways_of_counting_code_are_named(tmp_path):
    record = others_record(tmp_path)
    (record / "train_gpt.py").write_bytes(b"import torch\n" + b"#" * 150_000)
    found = verdicts(record)
    cap = found["code + artifact <= 16,000,000 bytes"]
    assert cap.outcome == "n/a" and "as logged" in cap.reason and "as it lies here" in cap.reason
    assert "13 bytes by the logs, 150,013 as train_gpt.py" in found["sizes"].reason


EXTRA = "no other file runs"


@pytest.mark.parametrize("name, data", [
    ("helper.py", b"x = 1"), ("more/deep/fast.cpython-312-x86_64-linux-gnu.so", b"x"),
    ("__pycache__/helper.cpython-311.pyc", b"x"), ("run", b"#!/bin/sh"), ("payload", b"\x7fELF..")])
def test_another_file_that_could_run_is_a_fault(record, name, data):
    assert verdicts(record)[EXTRA].outcome == "pass"
    path = record / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    found = verdicts(record)[EXTRA]
    assert found.outcome == "fail" and f"{name}: {len(data)} bytes that could run" in found.reason


def test_what_others_lay_beside_their_script_is_a_fault_where_it_is_used(tmp_path):
    folder = others_record(tmp_path)
    (folder / "helper.py").write_text("x = 1")
    found = verdicts(folder)[EXTRA]
    assert found.outcome == "n/a" and "helper.py: 5 bytes" in found.reason
    (folder / "train_gpt.py").write_text('"""Was helper.py."""\nprint("another_helper.py")\n')
    assert verdicts(folder)[EXTRA].outcome == "n/a"
    (folder / "train_gpt.py").write_text('exec(open(f"{HERE}/helper.py").read())\n')
    found = verdicts(folder)[EXTRA]
    assert found.outcome == "fail" and "which train_gpt.py names" in found.reason


def test_a_binary_module_beside_the_script_is_a_sibling(record):
    (record / "fast.cpython-312-x86_64-linux-gnu.so").write_bytes(b"x")
    (record / "train_gpt.py").write_text("try:\n import fast\nexcept ImportError: fast = None\n")
    found = verdicts(record)["imports nothing beside it"]
    assert found.outcome == "fail" and "imports fast, which lies beside" in found.reason


def test_a_script_of_others_is_never_started(tmp_path, monkeypatch):
    record = others_record(tmp_path)
    artifact = tmp_path / "final_model.int6.ptz"
    artifact.write_bytes(bytes(15_898_181))  # as large as the logs say
    monkeypatch.setattr(check, "run_evaluation", lambda *_: pytest.fail("it was started"))
    found = check.judgements(check.load(record), [artifact])
    (verdict,) = [v for v in found if v.rule.endswith("scores the same")]
    assert verdict.outcome == "n/a" and "others" in verdict.reason


def test_a_wrong_total_is_one_fault(tmp_path):
    record = others_record(tmp_path)
    edit(log(record, 42), "quantized+brotli: 15898194", "quantized+brotli: 15898195")
    fails = {rule: v.reason for rule, v in verdicts(record).items() if v.outcome == "fail"}
    told = [rule for rule, reason in fails.items() if "15898195" in reason]
    assert told == ["sizes"]
    assert "every seed complete" not in fails


def test_logs_under_other_names_and_without_an_end_are_read_for_what_they_are(tmp_path):
    record = others_record(tmp_path, build=legal_ttt)
    (record / "logs").mkdir()
    for path in record.glob("train_seed*.log"):
        path.rename(record / "logs" / path.name.replace("train_", "run_"))
    assert verdicts(record)["3 seeds or more"].outcome == "pass"
    path = record / "logs" / "run_seed42.log"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-4]) + "\n")
    found = verdicts(record)
    assert found["submission.json = logs"].outcome == "n/a"
    assert found["every seed complete"].outcome == "fail"
    for path in (record / "logs").iterdir():
        path.unlink()
    assert verdicts(record)["all that logs show"].outcome == "n/a"


def test_every_fault_is_told(timed_record):
    data = json.loads((timed_record / "submission.json").read_text())
    for result in data["seed_results"].values():
        result.update({name: -1 for name in result})
    (timed_record / "submission.json").write_text(json.dumps(data))
    reason = verdicts(timed_record)["submission.json = logs"].reason
    assert reason.count("\n") + 1 == 3 * len(next(iter(data["seed_results"].values())))
