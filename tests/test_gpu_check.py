"""The agenda for a GPU is tried on a CPU, and its report holds whatever was found in time."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, TINY_MODEL, TINY_RUN
from gpu_report import report

SCRIPT = REPO / "tests" / "gpu_check.sh"


def run_check(*args, **env):
    return subprocess.run(["bash", str(SCRIPT), *map(str, args)], text=True, timeout=600,
                          capture_output=True, env={**os.environ, "PYTHON": sys.executable,
                                                    "OMP_NUM_THREADS": "1", **env})


def test_report_of_an_empty_folder_says_that_nothing_finished(tmp_path):
    assert report(tmp_path).startswith("full run: did not finish")


def test_report_keeps_what_was_found_before_the_cut(tmp_path):
    step = dict(row="step", side="ours", layers=14, ms=110.0, low_ms=109.0, high_ms=111.5,
                tflops=330.0, roof_share=0.42)
    whole = [dict(row="speedup", depth="after", ours_over_plain=1.2), step]
    lines = "".join(json.dumps(row) + "\n" for row in whole) + '{"row": "swap", "cand'
    (tmp_path / "bench.jsonl").write_text(lines)
    (tmp_path / "sections.txt").write_text("step 0 80\nswap 124 200\n")
    (tmp_path / "kernels.jsonl").write_text(json.dumps(
        dict(candidate="mlp", dtype="bfloat16", sizes=[1], agrees=False)) + "\n")
    events = [dict(event="recurrence", step=100), *(
        dict(event="train", step=step, train_seconds=0.1 * step + 0.02 * max(0, step - 100))
        for step in (1, 2, 20, 60, 100, 120, 160, 200))]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    text = report(tmp_path)
    for part in ("before the switch: 100.0 ms", "after the switch: 120.0 ms", "110.00 ms",
                 "42 % of the roof (PR #1471, H100: 125.7)", "ours over plain after the switch: "
                 "1.200", "mlp bfloat16 [1]: WRONG", "swap 124 200 s"):
        assert part in text, part


@pytest.mark.parametrize("args, message", [
    ((), "tests/gpu_check.sh OUT DATA"), (("OUT", "nowhere"), "DATA=nowhere: no tokenizer.model"),
    (("OUT", "nowhere", "--small"), "--small: the only option is --tiny")])
def test_wrong_arguments_end_in_one_line(tmp_path, args, message):
    done = run_check(*(tmp_path if a == "OUT" else a for a in args))
    assert done.returncode == 2 and message in done.stdout + done.stderr


@pytest.mark.slow
def test_whole_agenda_at_toy_size(tmp_path, tiny_data):
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny_data.shards, data)
    shutil.copy(tiny_data.tokenizer, data / "tokenizer.model")
    settings = {**TINY_MODEL, **TINY_RUN, "RECUR_START_STEP": 6, "TRAIN_LOG_EVERY": 2}
    settings.pop("RECUR_START_FRAC")
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    done = run_check(out, data, "--tiny", FULL_RUN_SETTINGS=words)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "console.txt").read_text()
    text = (out / "report.txt").read_text()
    for part in ("ok: switched, packed, scored", "after the switch:", "ours  ", "plain ",
                 "ours over plain", "mlp bfloat16", "evaluation", "loader", "gptq", "packing"):
        assert part in text, part
    assert "WRONG" not in text and len(list(out.iterdir())) <= 8


@pytest.mark.slow
def test_candidates_are_swapped_into_the_step_at_toy_size():
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "bench_step.py"), "--tiny", "--sections",
         "candidates"], text=True, capture_output=True, timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("swap ") == 2 and done.stdout.count("verdict=drop") == 1
