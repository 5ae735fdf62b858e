"""README's demo, run as README gives it, and what the demo promises. Minutes long.

The command is executed word for word in a copy of the repository, whose .venv already sees the
packages of the running interpreter: README's commands reuse a .venv that is there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import REPO, Outcome, TinyRun, base_env

pytestmark = pytest.mark.slow

COPIED = ("train_gpt.py", "README.md", "requirements.txt", "data/*.py", "data/requirements.txt")
MAX_BPB_OVER_XZ, MAX_QUANTISATION_BPB, MIN_RECURRENT_FRAC = 0.92, 0.02, 0.4
MAX_SECONDS, SLOW_MACHINE = 240, 2  # on two free cores; a busy machine may take twice as long


def readme_block(marker):
    """Return the first code block after `<!-- marker -->` in README.md."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\s*```\w*\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no code block after <!-- {marker} -->"
    return found[1]


def unthreaded_env(cwd, **changes):
    """Return the environment of a plain terminal: unlike the tiny runs, all cores are used."""
    env = {k: v for k, v in base_env(cwd).items() if k != "OMP_NUM_THREADS"}
    return {**env, "HOME": str(cwd.parent), **changes}  # pip's cache stays out of the clone


def finish(command, cwd, env) -> Outcome:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True,
                          encoding="utf-8", timeout=3600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else None
    return Outcome(done.returncode, done.stdout, done.stderr, result)


def fill(folder):
    """Give a folder what the demo needs of the repository, and a .venv with the packages."""
    for path in (path for pattern in COPIED for path in REPO.glob(pattern)):
        target = folder / path.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    venv.create(folder / ".venv", with_pip=True)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / ".venv" / "lib" / name / "site-packages"
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")


@pytest.fixture(scope="module")
def demo(shared):
    """The finished run of README's demo command."""
    if os.name == "nt":
        pytest.skip("README's commands are for a POSIX shell")

    def make(clone):
        fill(clone)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        outcome = finish(["bash", "-euo", "pipefail", "-c", readme_block("demo command")], clone,
                         unthreaded_env(clone, PATH=path))
        assert outcome.rc == 0, outcome.stderr
        return TinyRun(clone, outcome.result["run_id"], outcome)

    return shared("demo", make)


@pytest.fixture(scope="module")
def check(demo):
    """What `--check` says about the demo."""
    outcome = finish([sys.executable, "train_gpt.py", "--check"], demo.cwd,
                     unthreaded_env(demo.cwd, PRESET="demo"))
    assert outcome.rc == 0, outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def manifest(demo):
    return json.loads((demo.cwd / "data/datasets/demo/manifest.json").read_text())


def test_the_readme_builds_the_corpus_and_runs_the_preset():
    block = readme_block("demo command")
    assert "data/build_demo.py" in block and "PRESET=demo" in block and ".venv" in block


def test_it_beats_xz(demo, manifest, say):
    bpb, xz_bpb = demo.outcome.result["sliding_bpb"], manifest["yardsticks"]["xz_val_bpb"]
    say(f"demo: sliding {bpb:.4f} bpb, {bpb / xz_bpb:.3f} of xz's {xz_bpb}")
    assert bpb <= MAX_BPB_OVER_XZ * xz_bpb


def test_it_scores_the_whole_validation_text(demo, manifest):
    scores = json.loads((demo.folder / "scores.json").read_text())
    for kind in ("roundtrip", "sliding"):
        assert scores[kind]["tokens"] == manifest["splits"]["val"]["tokens"] - 1
        assert scores[kind]["bytes"] == manifest["splits"]["val"]["bytes"]


def test_quantising_costs_little(demo):
    result = demo.outcome.result
    assert result["sliding_bpb"] <= result["prequant_sliding_bpb"] + MAX_QUANTISATION_BPB


def test_recurrence_is_on_for_much_of_the_run(demo):
    (event,), steps = demo.events("recurrence"), demo.outcome.result["steps"]
    assert steps - event["step"] >= MIN_RECURRENT_FRAC * steps
    order = event["order"]
    assert len(order) > len(set(order)), "some layers run twice"


def test_the_search_ends_inside_its_range(demo):
    result, (config,) = demo.outcome.result, demo.events("config")
    assert 0.36 < result["multiplier"] < 3.9
    assert 3.0 < result["matrix_bits"] < 3.8
    assert 0.999 * config["artifact_max_bytes"] <= result["total_bytes"]
    assert result["total_bytes"] <= config["artifact_max_bytes"]


def test_it_takes_minutes(demo, say):
    spent = demo.outcome.result["ledger_seconds"]
    total = sum(spent.values())
    say(f"demo: {total:.0f} s of training and scoring, aim {MAX_SECONDS}; {spent}")
    assert total <= SLOW_MACHINE * MAX_SECONDS


def test_the_same_digits_twice_without_a_compiler(demo):
    """Again, with nothing on the PATH: no compiler is needed, and the digits are the same."""
    empty = demo.cwd / "empty"
    empty.mkdir()
    again = finish([sys.executable, "train_gpt.py"], demo.cwd,
                   unthreaded_env(demo.cwd, PATH=str(empty), PRESET="demo", RUN_ID="again"))
    assert again.rc == 0, again.stderr
    second = TinyRun(demo.cwd, "again", again)
    for name in ("final_model.int6.ptz", "scores.json"):
        assert (second.folder / name).read_bytes() == (demo.folder / name).read_bytes(), name


def test_check_predicts_the_size(demo, check):
    predicted = int(re.search(r"code \+ artifact about (\d+) of", check)[1])
    assert predicted == pytest.approx(demo.outcome.result["total_bytes"], rel=0.02)


def test_check_predicts_the_peak_memory(demo, check, say):
    predicted = int(re.search(r"peak memory about (\d+) MiB", check)[1])
    (event,) = demo.events("peak_memory")
    say(f"demo: peak {event['allocated_mib']} MiB, predicted {predicted}")
    assert predicted == pytest.approx(event["allocated_mib"], rel=0.25)


def test_the_repository_stays_clean(demo):
    """Everything a run and the data tool write lies where .gitignore expects it."""
    ignored = (REPO / ".gitignore").read_text().split()
    allowed = {".venv", "empty", *(p.split("/")[0] for p in COPIED)}
    new = {path.name for path in Path(demo.cwd).iterdir()} - allowed
    assert {f"/{name}/" for name in new} <= set(ignored)
