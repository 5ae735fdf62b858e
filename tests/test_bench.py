"""The speed measurements run on a CPU too, at toy size: they cannot rot until a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_quantize
import bench_step
import pytest

SCRIPT = Path(bench_step.__file__)


@pytest.fixture(scope="module")
def rows(shared):
    """Rows of a tiny run, by kind."""
    return shared("bench_rows", tiny_rows)


def tiny_rows(folder):
    path = folder / "rows.jsonl"
    done = subprocess.run([sys.executable, str(SCRIPT), "--tiny", "--rows", str(path)], text=True,
                          capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert row["row"] in done.stdout
        found.setdefault(row["row"], []).append(row)
    return found


def test_both_sides_are_timed_at_both_depths(rows):
    assert {(r["side"], r["depth"], r["layers"]) for r in rows["step"]} == {
        (side, depth, layers) for side in ("ours", "plain")
        for depth, layers in (("before", 4), ("after", 6))}
    for row in rows["step"]:
        assert row["low_ms"] <= row["ms"] <= row["high_ms"]
        assert row["tokens_per_second"] == pytest.approx(512e3 / row["ms"], rel=1e-3)
        assert 0 < row["roof_share"] < 1
    by_depth = {(r["side"], r["depth"]): r["ms"] for r in rows["step"]}
    for row in rows["speedup"][:2]:
        ours, plain = (by_depth[side, row["depth"]] for side in ("ours", "plain"))
        assert row["ours_over_plain"] == pytest.approx(plain / ours, rel=1e-3)


def test_evaluation_of_both_sides_gives_one_sum(rows):
    assert rows["speedup"][-1]["relative_difference"] < 1e-6


def test_both_sides_learn_alike_over_a_depth_switch(rows):
    """What is compared is the same mathematics: one start, the same windows, ten steps."""
    *steps, last = rows["overlay"]
    assert [row["step"] for row in steps] == list(range(10))
    assert steps[-1]["ours"] < steps[0]["ours"] and last["largest_difference"] < 1e-4


def test_every_part_is_timed(rows):
    assert {r["side"] for r in rows["optimizer"]} == {"ours", "plain"}
    for kind, field in (("loader", "ms"), ("gptq", "codes_seconds"), ("packing", "seconds")):
        assert rows[kind][0][field] > 0
    assert [r["side"] for r in rows["gptq"]] == ["scalar", "trellis", "coupled rows",
                                                  "plain column loop"]
    for row in rows["packing"]:
        assert 0.99 * row["limit_bytes"] < row["bytes"] <= row["limit_bytes"]
        assert 0.8 < row["over_entropy"] < 1.2


# ---- quantisers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_quantisers_are_judged_at_equal_bytes(tiny_run, tiny_env, tmp_path, capsys):
    """On a run of the script: every line within the yardstick's bytes, then one table of all."""
    rows = tmp_path / "rows.jsonl"
    assert bench_quantize.main([
        str(tiny_run.folder), "--data", tiny_env["DATA_PATH"], "--tokenizer",
        tiny_env["TOKENIZER_PATH"], "--tokens", "1024", "--rows", str(rows), "--calibrate",
        "GPTQ_CALIBRATION_BATCHES=4", "--set", "", "--set", "TRELLIS=0", "--set",
        "TRELLIS=0 ASYMMETRIC", "--set", "@0.9"]) == 0
    assert "yardstick" in capsys.readouterr().out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["name"] for row in found] == [
        "yardstick", "+ rows coupled = default", "+ tokens by their gradients",
        "TRELLIS=0 ASYMMETRIC", "@0.9"]
    whole = found[0]["bytes"]
    for row, share in zip(found[1:], (1, 1, 1, 0.9), strict=True):
        assert 0.99 * share * whole <= row["bytes"] <= share * whole
        assert row["kl"] > 0 and row["kl_ratio"] == pytest.approx(row["kl"] / found[0]["kl"])
    assert bench_quantize.main(["--summary", str(rows), str(rows)]) == 0
    table = capsys.readouterr().out
    assert f"| + tokens by their gradients | {found[2]['bytes']:,} |" in table
    assert table.count(found[0]["weights_sha256"]) == 2


def test_unknown_section_is_refused():
    with pytest.raises(SystemExit, match="--sections stp: no such section; there are step,"):
        bench_step.main(["--tiny", "--sections", "stp"])
