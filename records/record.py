"""What a record folder says, computed from its logs: the numbers of submission.json, the table of
README.md. `pack` writes them and `check` computes them again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import OWN_TO_A_RUN
from logs import Run
from product import script
from summary import evaluation_seconds, measures, training_seconds

SCHEMA = Path(__file__).with_name("schema.json")
TRACKS = ("10min_16mb", "non_record_16mb")
# Not part of a configuration: what tells seeds apart, and where files lie on one machine.
PLACES = {"data_dir", "data_path", "tokenizer_path"}
RESULTS_MARK = "<!-- results: written by records.py pack, compared by records.py check -->"
# Columns of the results table: title, name in seed_results, form.
COLUMNS = (("steps", "steps", ",d"), ("train s", "train_seconds", ".1f"),
           ("eval s", "eval_seconds", ".1f"), ("pre-quant bpb", "pre_quant_val_bpb", ".6f"),
           ("round-trip bpb", "roundtrip_val_bpb", ".6f"), ("loss", "val_loss", ".6f"),
           ("**bpb**", "val_bpb", ".6f"), ("artifact", "artifact_bytes", ",d"),
           ("code", "code_bytes", ",d"), ("total", "total_bytes", ",d"))
# Facts of a machine that decide a run's numbers.
MACHINE = ("device", "device_name", "world_size", "compute_dtype", "torch", "compiled")


class RecordError(ValueError):
    """A record cannot be made; the message names what is wrong and the remedy."""


def code_hash(run: Run) -> str | None:
    """Return the sha256 of the script file that made a log, or None where it does not say."""
    return run.source_sha256 or run.events.get("result", {}).get("code_sha256")


def configuration(run: Run) -> dict[str, str]:
    """Return the settings that all seeds of a record share."""
    return {name: value for name, value in run.config.items() if name not in OWN_TO_A_RUN | PLACES}


def final_score(runs: Sequence[Run]) -> str | None:
    """Return the kind of score that all runs end in, or None where they do not agree."""
    kinds = {run.final for run in runs}
    return kinds.pop() if len(kinds) == 1 else None


def seed_result(run: Run, kind: str) -> dict[str, Any]:
    """Return one entry of seed_results; numbers that a log lacks are None."""
    found, score = measures(run), run.scores[kind]
    return dict(val_bpb=score.bpb, val_loss=score.loss, pre_quant_val_bpb=found["prequant_bpb"],
                roundtrip_val_bpb=found["roundtrip_bpb"], steps=run.steps,
                train_seconds=rounded(training_seconds(run)),
                eval_seconds=rounded(evaluation_seconds(run)),
                artifact_bytes=run.sizes.artifact, code_bytes=run.sizes.code,
                total_bytes=run.sizes.total)


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def numbers(runs: Sequence[Run], kind: str) -> dict[str, Any]:
    """Return the part of submission.json that logs determine.

    Raises RecordError where a log lacks a score or a size.
    """
    results = {str(run.seed): seed_result(run, kind) for run in runs}
    for run in runs:
        needed = seed_result(run, kind)
        for name in ("val_bpb", "val_loss", "artifact_bytes", "code_bytes", "total_bytes"):
            if needed[name] is None:
                raise RecordError(f"{run.path}: does not state {name}; give the log of a whole run")
    columns = {name: [result[name] for result in results.values()] for _, name, _ in COLUMNS}

    def mean(name):
        return None if None in columns[name] else statistics.fmean(columns[name])

    def spread(name):
        return statistics.stdev(columns[name]) if len(runs) > 1 else None

    def most(name):
        return None if None in columns[name] else max(columns[name])

    text = runs[0].data
    return dict(
        score=kind, val_bpb=mean("val_bpb"), val_bpb_std=spread("val_bpb"),
        val_loss=mean("val_loss"), val_loss_std=spread("val_loss"),
        pre_quant_val_bpb=mean("pre_quant_val_bpb"), roundtrip_val_bpb=mean("roundtrip_val_bpb"),
        seeds=[run.seed for run in runs], seed_results=results,
        bytes_code=most("code_bytes"), bytes_total=most("total_bytes"),
        artifact_bytes_mean=mean("artifact_bytes"), artifact_bytes_max=most("artifact_bytes"),
        wallclock_seconds=most("train_seconds"), eval_time_seconds=most("eval_seconds"),
        val_tokens=text.get("val_tokens"), val_bytes=text.get("val_bytes"),
        hardware=hardware(runs[0]), pytorch_version=(runs[0].environment or {}).get("torch"),
        code_sha256=code_hash(runs[0]))


def hardware(run: Run) -> str:
    """Return the devices of a run in words."""
    facts = run.environment or {}
    world = facts.get("world_size", 1)
    name = facts.get("device_name", "unknown")
    if facts.get("device") == "cpu":
        return f"{world} x CPU ({name}), threads a process: {facts.get('threads', 'unknown')}"
    return f"{world} x {name}"


def results_table(found: dict[str, Any]) -> str:
    """Return the Markdown table of a submission's seeds, their mean and standard deviation."""
    results = found["seed_results"]

    def cell(value, form):
        return "-" if value is None else format(value, form)

    rows = [["seed", *(title for title, _, _ in COLUMNS)], ["---:"] * (len(COLUMNS) + 1)]
    for seed, result in results.items():
        rows.append([seed, *(cell(result[name], form) for _, name, form in COLUMNS)])
    means = {name: found.get(name) for name in ("pre_quant_val_bpb", "roundtrip_val_bpb",
                                                "val_loss", "val_bpb")}
    spreads = {name: found[f"{name}_std"] for name in ("val_loss", "val_bpb")}
    for title, values in (("mean", means), ("std", spreads)):
        rows.append([title, *(format(values[name], ".6f") if values.get(name) is not None else ""
                              for _, name, _ in COLUMNS)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    largest = f"Code and artifact of the largest seed: {found['bytes_total']:,} bytes."
    return "\n".join([RESULTS_MARK, *lines, "", largest])


def base_settings(preset: str) -> dict[str, str]:
    """Return the settings that the script has by default, or with a preset, as text."""
    from logs import setting_text
    product = script()
    config = product.load_config({"PRESET": preset} if preset else {})
    return {name: setting_text(value) for name, value in config.public().items()}


def same_number(stated: Any, computed: Any) -> bool:
    """Return whether a stated value is the computed one; fractions to eight places."""
    if isinstance(stated, bool) or isinstance(computed, bool):
        return stated is computed
    if isinstance(computed, float) and isinstance(stated, (int, float)):
        return math.isclose(stated, computed, rel_tol=0, abs_tol=1e-8)
    return stated == computed


def schema_faults(data: Any) -> list[str]:
    """Return what in a submission.json does not obey schema.json, a line each."""
    import jsonschema  # type: ignore[import-untyped]
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    faults = sorted(validator.iter_errors(data), key=lambda error: list(map(str, error.path)))
    return [f"{'.'.join(map(str, error.path)) or 'top level'}: {error.message}"
            for error in faults]
