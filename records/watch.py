"""Show a run while it runs: loss, scores, time to go, memory, what comes next.

    python records/records.py watch runs/ID

RUN is a run's folder or its log, which need not be there yet. Ends by itself: exit code 0 when the
run is finished, 1 when it failed, was stopped, or has been silent for --patience seconds. Without
a terminal it prints a line whenever something has changed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from logs import LogError, NoSuchLog, Run, find_log, known, read_run
from summary import EARLY, name_of, setting, speeds, time_points

CURVE_ROWS, BAR_CHARACTERS, MARGIN = 10, 30, 9
LONGEST = 10_000_000  # s; what a machine can still be told to sleep
PUBLISHED_QUIET = 60.0  # s; a published log has no last line: silence behind its score ends it
# What a run does, in order: what it is called, the event (or score) that shows it done, the STAGE
# that it belongs to ("": any), and the setting that asks for it: name, value, and whether it is
# asked for where the log does not say.
STAGES = (("warm-up", "warmup_step", "train", None), ("training", "weights", "train", None),
          ("calibration", "collected", "train", ("gptq_enabled", "1", True)),
          ("the score before packing", "prequant", "train", None),
          ("the sliding score before packing", "prequant_sliding", "train",
           ("prequant_sliding", "1", False)),
          ("quantisation", "quantized", "quantize", None),
          ("packing", "artifact", "quantize", None),
          ("the round-trip score", "roundtrip", "evaluate", None),
          ("the sliding score", "sliding", "evaluate", ("sliding_window_enabled", "1", True)),
          ("the stream score", "stream", "evaluate", ("eval_mode", "stream", False)),
          ("the result", "result", "", None))
TRAINED = 1  # index in STAGES


class Progress(NamedTuple):
    """How far training is: steps, of how many (None: unknown), seconds on its clock and to go."""

    step: int
    steps: int | None
    spent: float | None
    left: float | None
    step_ms: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS",
                        help="how often to look")
    parser.add_argument("--patience", type=float, default=900.0, metavar="SECONDS",
                        help="how long nothing may happen")


def progress(run: Run) -> Progress:
    """Return how far training is, from the pace of its last steps."""
    seen = [point.step for point in run.train] + [point.step for point in run.validations]
    step = run.steps or max(seen, default=0)
    clock, found = time_points(run), speeds(run)
    spent = clock[-1][1] / 1000 if clock else None
    pace = found.after_ms or found.before_ms or \
        (clock[-1][1] / clock[-1][0] if clock and clock[-1][0] else None)
    plan = run.events.get("recurrence_plan", {})
    steps = run.steps or known(plan, "expected_steps") or setting(run, "iterations") or None
    left = None
    if pace and spent is not None and not run.steps:
        of_steps = (steps - step) * pace / 1000 if steps else float("inf")
        budget = known(run.events.get("reserve"), "effective_ms")
        limit = budget / 1000 if budget else setting(run, "max_wallclock_seconds")
        left = max(0.0, min(of_steps, limit - spent if limit else float("inf")))
        left = None if left == float("inf") else left
        if limit and left is not None and limit - spent < of_steps:  # the clock ends it
            steps = step + round(1000 * left / pace)
    return Progress(step, int(steps) if steps else None, spent, left, pace)


def stage_of(run: Run) -> int:
    """Return the index in STAGES of what the run is doing."""
    done = [i for i, (_, kind, *_) in enumerate(STAGES)
            if kind in run.events or kind in run.scores]
    if run.steps is not None or run.train:
        done.append(TRAINED if run.steps is not None else TRAINED - 1)
    return stage_behind(run, max(done, default=-1)) or len(STAGES) - 1


def stage_behind(run: Run, stage: int) -> int | None:
    """Return the index of the next stage that the run's settings ask for; None behind the last."""
    whole = run.config.get("stage", "all")
    for i, (_, _, part, asked) in enumerate(STAGES[stage + 1:], stage + 1):
        name, value, usual = asked or ("", "", True)
        here = run.config[name] == value if name in run.config else usual
        if here and (part in ("", whole) or whole == "all"):
            return i
    return None


def next_events(run: Run, at: Progress) -> list[str]:
    """Return what comes next, each with the time until then where the pace gives it."""
    stage = stage_of(run)
    if stage != TRAINED:
        behind = stage_behind(run, stage)
        return [] if behind is None else [f"then {STAGES[behind][0]}"]
    coming = []
    every, share = setting(run, "val_loss_every"), setting(run, "recur_start_frac")
    if every:
        coming.append((int((at.step // every + 1) * every), "validation"))
    if at.steps and share and run.recurrence_step is None \
            and not run.events.get("recurrence_plan", {}).get("never"):
        coming.append((round(share * at.steps), "recurrence"))
    if at.steps:
        coming = [(step, what) for step, what in coming if at.step < step < at.steps]
        coming.append((at.steps, "end of training"))
    return [f"{what} at step {step:,}" + (f" ({clock_text((step - at.step) * at.step_ms / 1000)})"
                                          if at.step_ms else "")
            for step, what in sorted(coming)]


def clock_text(seconds: float) -> str:
    """Return a time as 45 s, 12:05 or 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    if not hours and rest < 60:
        return f"{rest} s"
    return (f"{hours}:{rest // 60:02}" if hours else f"{rest // 60}") + f":{rest % 60:02}"


def status(run: Run, at: Progress) -> str:
    """Return a run's state in one line."""
    parts = [name_of(run), "finished" if run.complete else STAGES[stage_of(run)][0]]
    if at.step:
        parts.append(f"step {at.step:,}" + (f" of {at.steps:,}" if at.steps else ""))
    if run.train and run.train[-1].train_loss is not None:
        parts.append(f"loss {run.train[-1].train_loss:.4f}")
    if run.validations and run.validations[-1].val_bpb is not None:
        parts.append(f"{run.validations[-1].val_bpb:.4f} bpb at step {run.validations[-1].step:,}")
    if at.left is not None:
        parts.append(f"{clock_text(at.left)} of training to go")
    if run.final:
        parts.append(f"{run.final} {run.bpb(run.final):.6f} bpb")
    return ", ".join(parts)


def memory_text(run: Run) -> str:
    """Return what memory the run took, or is expected to take; "" where nobody knows."""
    if run.peak_memory_mib is not None:
        return f"memory {run.peak_memory_mib:,} MiB at most"
    peak = known(run.events.get("preflight"), "peak_mib")
    return f"memory about {peak:,} MiB at most, as predicted" if peak else ""


def plot(points: Sequence[tuple[float, float]], width: int, dot: str) -> list[str]:
    """Return a curve as lines of text, with its largest and least value at the left."""
    last = points[-1][0]
    later = [point for point in points if point[0] >= EARLY * last]
    points = later if len(later) > 1 else points
    first, low, high = points[0][0], min(y for _, y in points), max(y for _, y in points)
    columns, grid = max(10, width - MARGIN - 1), dict[tuple[int, int], str]()
    for x, y in points:
        column = round((x - first) / (last - first or 1) * (columns - 1))
        grid[round((high - y) / (high - low or 1) * (CURVE_ROWS - 1)), column] = dot
    labels = {0: f"{high:.3f}", CURVE_ROWS - 1: f"{low:.3f}"}
    lines = [f"{labels.get(row, ''):>{MARGIN - 2}} |"
             + "".join(grid.get((row, column), " ") for column in range(columns)).rstrip()
             for row in range(CURVE_ROWS)]
    left, right = f"{first:,.0f}", f"step {last:,.0f}"
    return [*lines, " " * MARGIN + left + right.rjust(max(1, columns - len(left)))]


def page(run: Run, width: int, dot: str) -> str:
    """Return the whole screen."""
    at = progress(run)
    lines = [status(run, at)]
    if at.steps:
        filled = round(BAR_CHARACTERS * min(1.0, at.step / at.steps))
        times = [f"{clock_text(at.spent)} trained"] if at.spent is not None else []
        times += [f"{at.step_ms:,.1f} ms a step"] if at.step_ms else []
        lines.append(f"[{'#' * filled}{'-' * (BAR_CHARACTERS - filled)}] "
                     f"{100 * at.step / at.steps:.0f} %  " + ", ".join(times))
    lines += [f"next: {', '.join(coming)}"] if (coming := next_events(run, at)) \
        and not run.complete else []
    lines += [text] if (text := memory_text(run)) else []
    lines += [f"warning: {text}" for text in run.warnings]
    for title, points in (
            ("training loss, nats a token", [(p.step, p.train_loss) for p in run.train]),
            ("validation, bits per byte", [(p.step, p.val_bpb) for p in run.validations])):
        there = [(float(x), y) for x, y in points if y is not None]
        if len(there) > 1:
            lines += ["", title, *plot(there, width, dot)]
    scores = [f"{kind} {score.bpb:.6f}" for kind, score in run.scores.items() if kind != "aside"]
    lines += ["", f"scores, bits per byte: {', '.join(scores)}"] if scores else []
    return "\n".join(line[:width] for line in lines)


def end_of(run: Run | None, silent: float, patience: float, fault: str = ""
           ) -> tuple[int, str] | None:
    """Return exit code and reason when there is nothing more to watch.

    fault: why the log cannot be read at present.
    """
    quiet = silent >= min(PUBLISHED_QUIET, patience)
    if run and run.complete and (run.system == "ours" or quiet):
        return 0, "the run is finished"
    if run and "crash" in run.events and quiet:  # what goes on behind a traceback has caught it
        return 1, "the run ended: in a Python error, whose traceback is in the log"
    if run and (stopped := {"failed", "interrupted"} & run.events.keys()):
        event = run.events[stopped.pop()]
        return 1, f"the run ended: {event.get('error') or 'it was stopped'}"
    if silent >= patience:
        return 1, f"nothing has happened for {clock_text(silent)}" + (fault and f": {fault}")
    return None


def watch(path: Path, every: float, patience: float, show: Callable[[Run | None], None],
          clock: Callable[[], float] = time.monotonic,
          sleep: Callable[[float], None] = time.sleep) -> tuple[int, str]:
    """Show a run whenever its log grows, until it ends; returns exit code and reason.

    Raises LogError where waiting will bring no log.
    """
    since, size, run, fault = clock(), -1, None, ""
    while True:
        try:
            log = find_log(path)
            now = log.stat().st_size
            if now != size:
                run, size, since = read_run(log), now, clock()
                show(run)
            fault = ""
        except (LogError, OSError) as error:  # not there yet, or still empty
            if run is None and isinstance(error, NoSuchLog):
                raise
            fault = str(error)
            if run is None:
                show(None)
        if end := end_of(run, clock() - since, patience, fault):
            return end
        sleep(every)


def run(args: argparse.Namespace) -> int:
    for name in ("every", "patience"):
        if not 0 < (value := getattr(args, name)) <= LONGEST:
            raise LogError(f"--{name} {value}: seconds, must be above 0 and at most {LONGEST:,}")
    on_terminal, dot, said = sys.stdout.isatty(), "*", ""
    try:
        "\u2022".encode(sys.stdout.encoding or "ascii")
        dot = "\u2022"
    except UnicodeEncodeError:
        pass

    def show(found: Run | None) -> None:
        nonlocal said
        columns = shutil.get_terminal_size((100, 24)).columns
        if on_terminal:
            text = page(found, columns, dot) if found else f"waiting for {args.run}"
            print(f"\x1b[H\x1b[2J{text}", flush=True)
        else:
            line = status(found, progress(found)) if found else f"waiting for {args.run}"
            if line != said:
                print(line, flush=True)
            said = line

    code, reason = watch(args.run, args.every, args.patience, show)
    print(reason)
    return code
