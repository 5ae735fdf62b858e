"""Print one table of runs: speed, scores, bytes, times, and a verdict per rule.

LOG is a text log (ours or a published one), an events.jsonl, a run's folder, or a folder with
several logs or runs. A number that a log does not state is shown as "-" and named below the table;
a run that was given twice counts once. Exit code 2 when a log could not be read.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from logs import LogError, Run, find_logs, read_run
from summary import (
    MEASURES,
    decimals_of,
    mean_and_std,
    measures,
    names_of,
    training_seconds,
    verdicts,
)

MARKS = {"pass": "ok  ", "fail": "FAIL", "n/a": "n/a "}
SAME_LOSS, SAME_TIME = 5.1e-5, 5e-3  # of two logs of one run: nats or bpb; share of the time
FINAL_TITLE = "final score is of"
Found = TypeVar("Found")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def read_all(paths: Sequence[Path], named: Callable[[Path], str] = str
             ) -> tuple[list[Run], list[str], list[str]]:
    """Return the runs of all logs that paths name, notes on what was dropped, and errors.

    named: how notes call a log.
    """
    runs, notes, errors = list[Run](), list[str](), list[str]()
    known: dict[tuple, list[Run]] = {}

    def tried(function: Callable[[Path], Found], path: Path) -> Found | None:
        try:
            return function(path)
        except LogError as error:
            errors.append(str(error))
            return None

    for path in paths:
        for log in tried(find_logs, path) or ():
            run = tried(read_run, log)
            if run is None:
                continue
            alike = known.setdefault((run.seed, run.steps, run.sizes), [])
            if first := next((other for other in alike if same_run(run, other)), None):
                notes.append(f"{named(log)}: the same run as {named(first.path)}; dropped")
            else:
                runs.append(run)
                alike.append(run)
    return runs, notes, errors


def read_group(paths: Sequence[Path], named: Callable[[Path], str] = str
               ) -> tuple[list[Run], list[str]]:
    """Return the runs of all logs that paths name, and notes; raises LogError on any error."""
    runs, notes, errors = read_all(paths, named)
    if errors:
        raise LogError(errors[0])
    return runs, notes


def read_pair(new: Sequence[Path], old: Sequence[Path], named: Callable[[Path], str] = str
              ) -> tuple[list[Run], list[Run], list[str]]:
    """Return the runs of two groups, and notes, also on runs that stand in both."""
    (ours, notes), (theirs, more) = read_group(new, named), read_group(old, named)
    both = [f"{named(run.path)}: the same run as {named(other.path)} of the other group"
            for run in theirs for other in ours if same_run(run, other)]
    return ours, theirs, [*notes, *more, *both]


def same_run(a: Run, b: Run) -> bool:
    """Return whether two logs are of one run: by its losses and its clock.

    Text logs round what events state in full: losses to four digits, times to three or more.
    """
    if (a.seed, a.steps, a.sizes, a.scores.keys()) != (b.seed, b.steps, b.sizes, b.scores.keys()):
        return False
    points = {point.step: point for point in b.train}
    pairs = [(point, points[point.step]) for point in a.train if point.step in points]
    last = [pair[-1:] for pair in (a.train, b.train)]
    losses = [(x.train_loss, y.train_loss) for x, y in pairs]
    losses += [(score.bpb, b.scores[kind].bpb) for kind, score in a.scores.items()]
    times = [(x.train_ms, y.train_ms) for x, y in pairs[-1:]] + [(a.train_ms, b.train_ms)]
    known = [(x, y) for x, y in losses if x is not None and y is not None]
    return bool(known) and [p[0].step for p in last if p] == [p[0].step for p in last[::-1] if p] \
        and all(abs(x - y) < SAME_LOSS for x, y in known) \
        and all(abs(x - y) <= SAME_TIME * y for x, y in times if x is not None and y is not None)


def shown(value: float | None, form: str, decimals: int | None = None) -> str:
    """Return a number as the table prints it; whole-number forms round a mean.

    decimals: how many a log gives, where they are fewer than the form's.
    """
    if value is None:
        return "-"
    if decimals is not None and form.endswith(".8f"):
        form = form.replace("8", str(min(8, decimals)))
    text = format(round(value) if form.endswith("d") else value, form)
    return text.lstrip("-") if set(text) <= set("-0.,") else text  # no "-0.0"


def rows_of(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return those of MEASURES that a run states."""
    values = [measures(run) for run in runs]
    return [row for row in MEASURES if any(v[row[0]] is not None for v in values)]


def columns_of(runs: Sequence[Run], rows: Sequence[tuple[str, str, str]]
               ) -> tuple[list[str], list[list[str]]]:
    """Return titles and columns of cells: the measures' names, each run, mean and std."""
    values, decimals = [measures(run) for run in runs], [decimals_of(run) for run in runs]
    titles, columns = [""], [[FINAL_TITLE, *(title for _, title, _ in rows)]]
    for name, run, value, digits in zip(names_of(runs), runs, values, decimals):
        titles.append(name)
        columns.append([run.final or "-", *(shown(value[key], form, digits.get(key))
                                         for key, _, form in rows)])
    if len(runs) > 1:
        both = [mean_and_std([value[key] for value in values]) for key, _, _ in rows]
        most = [max(digits.get(key, 8) for digits in decimals) for key, _, _ in rows]
        for title, part in (("mean", 0), ("std", 1)):
            titles.append(title)
            columns.append(["", *(shown(pair[part], form.lstrip("+"), digits) for pair, digits,
                                  (_, _, form) in zip(both, most, rows))])
    return titles, columns


def table(titles: Sequence[str], columns: Sequence[Sequence[str]], width: int) -> str:
    """Return aligned text; what does not fit in `width` characters goes on below."""
    sizes = [max(map(len, (title, *cells))) for title, cells in zip(titles, columns)]
    blocks, begin = [], 1
    while begin < len(columns):
        end, used = begin, sizes[0]
        while end < len(columns) and (end == begin or used + 2 + sizes[end] <= width):
            used += 2 + sizes[end]
            end += 1
        lines = []
        for cells in zip(*([title, *cells] for title, cells in zip(titles, columns))):
            parts = [cells[0].ljust(sizes[0])]
            parts += [cells[i].rjust(sizes[i]) for i in range(begin, end)]
            lines.append("  ".join(parts).rstrip())
        lines.insert(1, "-" * used)
        blocks.append("\n".join(lines))
        begin = end
    return "\n\n".join(blocks)


def ledger_line(run: Run) -> str:
    spent = sorted((run.ledger or {}).items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in spent if seconds >= 0.05)


def final_name(run: Run) -> str | None:
    """Return what the log itself calls its final score, else its kind."""
    return run.scores[run.final].name or run.final if run.final else None


def remarks(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know besides the numbers: time ledgers, gaps, contradictions."""
    lines = []
    for name, run in zip(names_of(runs), runs):
        state = f"final score: {final_name(run)}" if run.complete else "INCOMPLETE"
        lines.append(f"{name}: {run.path} ({run.system}; {state})")
        lines += [f"  time: {ledger_line(run)}"] if run.ledger else []
        lines += [f"  not in this log: {', '.join(run.missing)}"] if run.missing else []
        lines += [f"  note: {text}" for text in run.notes]
        lines += [f"  warning: {text}" for text in run.warnings]
    return lines


def report(runs: Sequence[Run], width: int, notes: Sequence[str] = ()) -> str:
    """Return the whole page."""
    rules = [f"{MARKS[v.outcome]}  {v.rule}: {v.reason}" for v in verdicts(runs)]
    cells = columns_of(runs, rows_of(runs))
    return "\n".join([table(*cells, width), "", *rules, "", *remarks(runs),
                      *(f"note: {note}" for note in notes)])


def as_json(runs: Sequence[Run]) -> dict:
    """Return everything that the page says, for machines."""
    values = [measures(run) for run in runs]
    pairs = {key: mean_and_std([value[key] for value in values]) for key, _, _ in MEASURES}
    return dict(
        runs=[dict(value, name=name, path=str(run.path), system=run.system, seed=run.seed,
                   training_seconds=training_seconds(run), ledger_seconds=run.ledger,
                   source_sha256=run.source_sha256, data=run.data, environment=run.environment,
                   config=run.config, complete=run.complete, final=run.final,
                   final_name=final_name(run), missing=run.missing, warnings=run.warnings,
                   notes=run.notes)
              for name, run, value in zip(names_of(runs), runs, values)],
        mean={key: pair[0] for key, pair in pairs.items()},
        std={key: pair[1] for key, pair in pairs.items()},
        verdicts=[verdict._asdict() for verdict in verdicts(runs)])


def run(args: argparse.Namespace) -> int:
    runs, notes, errors = read_all(args.logs)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if runs and args.json:
        print(json.dumps(dict(as_json(runs), notes=notes, errors=errors), indent=1))
    elif runs:
        print(report(runs, shutil.get_terminal_size((100, 24)).columns, notes))
    return 2 if errors else 0
