"""Laws of pack: a record says what its logs say, and is made of nothing that does not belong."""

import json
import re
import shlex
import shutil
import statistics
from pathlib import Path

import conftest
import pytest

pytest.importorskip("python_minifier")
jsonschema = pytest.importorskip("jsonschema")
import pack as pack_module  # noqa: E402
import record as record_module  # noqa: E402
from conftest import REPO, read_events  # noqa: E402
from record_toys import QUICK, SEEDS, Seeds, edit, finished_seeds, made_record, pack  # noqa: E402


@pytest.fixture(scope="module")
def seeds(tiny_env, nursery, shared):
    return shared("seeds", lambda folder: finished_seeds(tiny_env, folder, nursery))


@pytest.fixture(scope="module")
def record(seeds):
    return made_record(seeds, "--no-figure")


@pytest.fixture
def spoilt(seeds, tmp_path):
    """A copy of the seeds that a test may change."""
    for name in ("logs", "runs"):
        shutil.copytree(seeds.folder / name, tmp_path / name)
    return Seeds(tmp_path, seeds.script)


def results(seeds):
    """Return each seed's RESULT event."""
    return {seed: next(e for e in read_events(seeds.folder, f"seed{seed}")
                       if e["event"] == "result") for seed in SEEDS}


def test_numbers_are_those_the_runs_reported(seeds, record):
    data, told = json.loads((record / "submission.json").read_text()), results(seeds)
    for seed, result in told.items():
        entry = data["seed_results"][str(seed)]
        assert entry["val_bpb"] == result["sliding_bpb"]
        assert entry["pre_quant_val_bpb"] == result["prequant_bpb"]
        assert entry["total_bytes"] == result["total_bytes"]
        assert abs(entry["train_seconds"] - result["training_seconds"]) < 0.002
    scores = [result["sliding_bpb"] for result in told.values()]
    assert data["val_bpb"] == statistics.fmean(scores)
    assert data["val_bpb_std"] == statistics.stdev(scores)
    assert data["bytes_total"] == max(result["total_bytes"] for result in told.values())
    assert data["bytes_code"] == (record / "train_gpt.py").stat().st_size


def test_logs_and_script_are_the_runs_own_bytes(seeds, record):
    assert (record / "train_gpt.py").read_bytes() == seeds.script.read_bytes()
    for seed in SEEDS:
        assert (record / f"train_seed{seed}.log").read_bytes() \
            == (seeds.folder / "logs" / f"seed{seed}.txt").read_bytes()


def test_readme_names_every_changed_setting_and_the_machine(record):
    text = (record / "README.md").read_text(encoding="utf-8")
    for name, value in {**conftest.TINY_MODEL, **conftest.TINY_RUN, **QUICK}.items():
        assert f"| `{name}` | {value} |" in text or f"\n{name}={value}\n" in text
    assert "## Legality" in text and "torch " in text


def test_schema_describes_every_key_that_is_written(record):
    data = json.loads((record / "submission.json").read_text())
    schema = json.loads(record_module.SCHEMA.read_text())
    assert set(data) <= set(schema["properties"])
    jsonschema.Draft202012Validator.check_schema(schema)
    for key in schema["required"]:
        rest = {name: value for name, value in data.items() if name != key}
        assert any(key in fault for fault in record_module.schema_faults(rest))


def test_readme_command_makes_the_same_score_from_the_folder(record, seeds, tiny_data, tmp_path):
    folder = Path(shutil.copytree(record, tmp_path / "copy"))
    line = next(line for line in (folder / "README.md").read_text().splitlines()
                if line.endswith("train_gpt.py") and "=" in line)
    settings = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
    done = conftest.run_script({**settings, **tiny_data.env()}, folder,
                               script=folder / "train_gpt.py")
    assert done.rc == 0, done.stderr
    assert done.result["sliding_bpb"] == results(seeds)[int(settings["SEED"])]["sliding_bpb"]


def refused(seeds, capsys, *more, runs=None):
    """Return the message of a pack that must fail and leave nothing."""
    out = seeds.folder / "none"
    assert pack(seeds, out, "--no-figure", *more, runs=runs) == 2
    assert not list(out.rglob("*.json"))
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_refuses_another_script(spoilt, capsys, tmp_path):
    other = tmp_path / "other.py"
    other.write_bytes(spoilt.script.read_bytes() + b"\n")
    message = refused(spoilt._replace(script=other), capsys)
    assert "made by a script of sha256" in message and message.count("seed") >= 3


def test_refuses_an_incomplete_seed(spoilt, capsys):
    log = spoilt.folder / "logs" / "seed2.txt"
    log.write_text(re.sub(r"(?m)^RESULT .*\n", "", log.read_text(encoding="utf-8")),
                   encoding="utf-8")
    assert "seed2.txt: incomplete" in refused(spoilt, capsys)


def test_refuses_mixed_configurations(spoilt, capsys):
    edit(spoilt.folder / "logs" / "seed3.txt", "  matrix_lr: 0.022", "  matrix_lr: 0.03")
    message = refused(spoilt, capsys)
    assert "setting matrix_lr differs" in message and "0.03 in seed3.txt" in message


def test_refuses_one_seed_twice_and_missing_files(spoilt, capsys):
    assert "seed 1: 2 runs" in refused(spoilt, capsys, runs=[spoilt.runs()[0]] * 2)
    assert "no text log" in refused(spoilt, capsys, runs=[str(spoilt.folder / "runs" / "x")])
    assert "no such file" in refused(spoilt._replace(script=spoilt.folder / "x.py"), capsys)
    assert "--base nonsense" in refused(spoilt, capsys, "--base", "nonsense")
    assert "--name ../x" in refused(spoilt, capsys, "--name", "../x")


def test_a_run_is_found_from_inside_its_folder_and_by_both_halves(seeds, monkeypatch):
    wanted = pack_module.find_source(seeds.folder / "runs" / "seed1")
    assert wanted.events == seeds.folder / "runs" / "seed1" / "events.jsonl"
    assert pack_module.find_source(wanted.text)[:2] == wanted[:2]
    monkeypatch.chdir(seeds.folder / "runs")
    assert pack_module.find_source(Path("seed1")).text == wanted.text


@pytest.mark.parametrize("name, value, shown", [
    ("data_path", "/a/b c/d", "path/to/d"), ("input_path", "/a/b", "path/to/b"),
    ("preset", "demo,/a/b.env", "demo,path/to/b.env"), ("data_dir", "./data/", "./data/"),
    ("matrix_lr", "0.02", "0.02")])
def test_of_a_place_on_some_machine_only_the_name_is_told(name, value, shown):
    assert pack_module.placeless(name, value) == shown
    assert pack_module.typed(name, value) == f"{name.upper()}={shlex.quote(shown)}"


def test_never_overwrites_a_record(seeds, record, capsys):
    assert pack(seeds, record.parents[1], "--no-figure") == 2
    assert "exists" in capsys.readouterr().err


def test_text_log_names_its_events_and_its_base(seeds, tmp_path):
    logs = [str(seeds.folder / "logs" / f"seed{seed}.txt") for seed in SEEDS]
    assert pack(seeds, tmp_path, "--no-figure", "--report", "--base", "itself", "--base-logs",
                *logs, runs=logs) == 0
    folder = next(tmp_path.glob("track_*/*"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>Toy Run</h1>" in page and 'id="bytes"' in page and 'id="samples"' in page
    assert len(list(folder.glob("train_seed*.jsonl"))) == 3
    base = json.loads((folder / "submission.json").read_text())["base"]
    assert base["name"] == "itself" and len(base["val_bpb"]) == 3
    assert "Nothing: the settings are those of itself." in (folder / "README.md").read_text()


def test_requirements_are_the_repositorys(record):
    assert (record / "requirements.txt").read_bytes() == (REPO / "requirements.txt").read_bytes()
