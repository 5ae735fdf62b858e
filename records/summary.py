"""What the numbers of runs amount to: speeds, gaps, times, and a verdict per rule.

Everything here is computed from `logs.Run`; what a log does not state stays None.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from logs import CAP_BYTES, SCORE_KINDS, Run
from product import script

FIRST_STEPS = 10  # logs print the first steps one by one; speeds are taken from behind them
MIN_SEEDS = 3
EARLY = 0.05  # share of a run in which the loss falls so much that nothing else is seen


class Speeds(NamedTuple):
    """Milliseconds a step before and after recurrence starts, and what starting it cost."""

    before_ms: float | None = None
    after_ms: float | None = None
    stall_seconds: float | None = None


class Verdict(NamedTuple):
    """The outcome of one rule: "pass", "fail" or "n/a", and the figures behind it."""

    rule: str
    outcome: str
    reason: str


# Rows of the table and of --json: (name, title, how to print it).
MEASURES = (
    ("steps", "steps", ",d"), ("before_ms", "ms/step before recurrence", ",.2f"),
    ("after_ms", "ms/step with recurrence", ",.2f"),
    ("stall_seconds", "stall at its start, s", ",.1f"), ("tokens_per_second", "tokens/s", ",.0f"),
    ("prequant_bpb", "pre-quant bpb", ".8f"), ("roundtrip_bpb", "round-trip bpb", ".8f"),
    ("gap_bpb", "quantisation gap, bpb", "+.8f"), ("sliding_bpb", "sliding bpb", ".8f"),
    ("ttt_bpb", "test-time training bpb", ".8f"), ("stream_bpb", "stream bpb", ".8f"),
    ("slot_bpb", "slot bpb", ".8f"), ("ngram_bpb", "n-gram bpb", ".8f"),
    ("other_bpb", "other bpb", ".8f"), ("final_bpb", "final bpb", ".8f"),
    ("final_loss", "final loss, nats a token", ".8f"),
    ("artifact_bytes", "artifact, bytes", ",d"), ("code_bytes", "code, bytes", ",d"),
    ("total_bytes", "total, bytes", ",d"), ("margin_bytes", "margin to the cap, bytes", ",d"),
    ("train_seconds", "training, s", ",.3f"), ("calibration_seconds", "calibration, s", ",.3f"),
    ("evaluation_seconds", "evaluation, s", ",.3f"), ("peak_memory_mib", "peak memory, MiB", ",d"))


def setting(run: Run, name: str, default: float = 0.0) -> float:
    """Return a setting as a number; the default where it is none, or not logged."""
    try:
        value = float(run.config.get(name, ""))
    except ValueError:
        return default
    return value if math.isfinite(value) else default


def time_points(run: Run) -> list[tuple[int, float]]:
    """Return (step, training clock in ms) in order of steps, the end of training included."""
    points = {point.step: point.train_ms for point in run.train}
    if run.steps:
        points[run.steps] = run.train_ms if run.train_ms is not None else points.get(run.steps)
    return sorted((step, ms) for step, ms in points.items() if ms is not None)


def pace(points: Sequence[tuple[int, float]]) -> float | None:
    """Return ms a step from the first point to the last; None when they are not two."""
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0]) \
        if len(points) > 1 else None


def speeds(run: Run) -> Speeds:
    """Return the steady pace before and after recurrence starts.

    The interval in which it starts counts for neither: there a script may compile again. What
    that interval lasted beyond its steps at both paces is the stall.
    """
    points, switch = time_points(run), run.recurrence_step
    before = [point for point in points if switch is None or point[0] <= switch]
    after = [point for point in points if switch is not None and point[0] > switch]
    settled = [point for point in before if point[0] >= FIRST_STEPS // 2]
    before_ms = pace(settled if len(settled) > 1 else before)
    after_ms, stall = pace(after), None
    if switch is not None and before and before_ms and after_ms:
        (left, left_ms), (right, right_ms) = before[-1], after[0]
        usual = (switch - left) * before_ms + (right - switch) * after_ms
        stall = (right_ms - left_ms - usual) / 1000
    return Speeds(before_ms, after_ms, stall)


def evaluation_seconds(run: Run) -> float | None:
    """Return what scoring the packed model took, s: as booked, else the final evaluation alone."""
    if run.evaluation_seconds is not None:
        return run.evaluation_seconds
    final = run.scores[run.final] if run.complete and run.final else None
    return None if final is None or final.eval_ms is None else final.eval_ms / 1000


def measures(run: Run) -> dict[str, float | int | None]:
    """Return every number of MEASURES by name."""
    pace_of, batch, sizes = speeds(run), run.batch_tokens, run.sizes
    seconds = None if run.train_ms is None else run.train_ms / 1000
    before, after = run.bpb("prequant"), run.bpb("roundtrip")
    rate = run.steps * batch / seconds if run.steps and batch and seconds else None
    scores = {f"{kind}_bpb": run.bpb(kind) for kind in SCORE_KINDS}
    final = run.final if run.complete and run.final else ""  # of a truncated log nobody knows it
    return dict(
        pace_of._asdict(), **scores, steps=run.steps, tokens_per_second=rate,
        gap_bpb=None if before is None or after is None else after - before,
        final_bpb=run.bpb(final), final_loss=run.scores[final].loss if final else None,
        artifact_bytes=sizes.artifact, code_bytes=sizes.code, total_bytes=sizes.total,
        margin_bytes=sizes.margin, train_seconds=seconds,
        calibration_seconds=run.calibration_seconds,
        evaluation_seconds=evaluation_seconds(run), peak_memory_mib=run.peak_memory_mib)


def decimals_of(run: Run) -> dict[str, int]:
    """Return how many decimals the log gives of each score, by its name in MEASURES."""
    found = {f"{kind}_bpb": score.digits for kind, score in run.scores.items() if score.digits}
    both = [run.scores[kind].digits or 8 for kind in ("prequant", "roundtrip")
            if kind in run.scores]
    found["gap_bpb"] = min(both, default=8)
    if run.final and (digits := run.scores[run.final].digits):
        found["final_bpb"] = found["final_loss"] = digits
    return found


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation; None where a value is missing or there is one."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def short_path(path: Path) -> str:
    """Return a path's last two names: the rest is its owner's machine."""
    return "/".join(path.absolute().parts[1:][-2:])


def name_of(run: Run) -> str:
    """Return what a table or figure calls a run."""
    return f"seed {run.seed}" if run.seed is not None else run.path.stem


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a name per run, the file's own where the seed does not tell runs apart."""
    names = [name_of(run) for run in runs]
    alike = {name for name in names if names.count(name) > 1}
    files = [run.run_id or run.path.stem for run in runs]
    if len(set(files)) < len(files):
        files = [f"{run.path.parent.name}/{run.path.name}" for run in runs]
    return [file if name in alike else name for name, file in zip(names, files)]


def judge(rule: str, runs: Sequence[Run], value_of, limit: float, unit: str,
          leeway_of=lambda run: 0.0) -> Verdict:
    """Return the verdict on `value_of(run) <= limit` for all runs; unknown values give n/a.

    What exceeds the limit by no more than leeway_of(run) passes too, and is told.
    """
    values = [value_of(run) for run in runs]
    over = [f"{name}: {value:,.10g} {unit}" for name, run, value in
            zip(names_of(runs), runs, values)
            if value is not None and value > limit + leeway_of(run)]
    if over:
        return Verdict(rule, "fail", f"{'; '.join(over)} (limit {limit:,.10g})")
    if unknown := [name for name, value in zip(names_of(runs), values) if value is None]:
        return Verdict(rule, "n/a", f"not logged: {', '.join(unknown)}")
    within = "" if max(values) <= limit else ": within one step"
    return Verdict(rule, "pass", f"at most {max(values):,.10g} of {limit:,.10g} {unit}{within}")


def one_step_seconds(run: Run) -> float:
    """Return how far a published script may overrun: the step in which the clock ran out.

    Ours looks ahead and has no such leeway.
    """
    mean = run.train_ms / run.steps if run.train_ms and run.steps else 0.0
    return 0.0 if run.system == "ours" else max(mean, speeds(run).after_ms or 0.0) / 1000


def training_seconds(run: Run) -> float | None:
    """Return what the limit on training counts, s: the steps, and calibration on training text."""
    if run.train_ms is None:
        return None
    seconds = run.train_ms / 1000 + (run.calibration_seconds or 0.0)
    # a calibration that began and whose time is not logged only adds
    unfinished = "collecting" in run.events and run.calibration_seconds is None
    return None if unfinished and seconds <= script().TRAIN_LIMIT_SECONDS else seconds


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Return a verdict per rule of the challenge on what these logs show."""
    product = script()
    seeds = {run.seed for run in runs if run.complete}
    cut = [name for name, run in zip(names_of(runs), runs) if not run.complete]
    found = [
        Verdict("every log is complete", "fail" if cut else "pass",
                f"cut off: {', '.join(cut)}" if cut else f"{len(runs)} of {len(runs)}"),
        judge(f"training + calibration <= {product.TRAIN_LIMIT_SECONDS} s", runs, training_seconds,
              product.TRAIN_LIMIT_SECONDS, "s", one_step_seconds),
        judge(f"evaluation <= {product.EVAL_LIMIT_SECONDS} s", runs, evaluation_seconds,
              product.EVAL_LIMIT_SECONDS, "s"),
        judge(f"code + artifact <= {CAP_BYTES:,} bytes", runs, lambda run: run.sizes.total,
              CAP_BYTES, "bytes")]
    rule = f"{MIN_SEEDS} seeds or more"
    if len(runs) == 1:
        return [*found, Verdict(rule, "n/a", "one log is read")]
    if None in seeds:
        return [*found, Verdict(rule, "n/a", "a log does not state its seed")]
    outcome = "pass" if len(seeds) >= MIN_SEEDS else "fail"
    return [*found, Verdict(rule, outcome, f"{len(seeds)} with a complete log")]
