"""Print one table of runs: speed, scores, bytes, times, and a verdict per rule.

LOG is a text log (ours or a published one), an events.jsonl, a run's folder, or a folder with one
log per seed. A number that a log does not state is shown as "-" and named below the table.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from logs import Run, find_log, read_run
from summary import MEASURES, mean_and_std, measures, names_of, training_seconds, verdicts

MARKS = {"pass": "ok  ", "fail": "FAIL", "n/a": "n/a "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def seed_logs(paths: Sequence[Path]) -> list[Path]:
    """Return the logs that paths name; a folder with several logs stands for all of them."""
    found: list[Path] = []
    for path in paths:
        several = sorted(path.glob("*.log")) if path.is_dir() else []
        found += several if len(several) > 1 else [find_log(path)]
    return found


def shown(value: float | None, form: str) -> str:
    """Return a number as the table prints it; whole-number forms round a mean."""
    if value is None:
        return "-"
    return format(round(value) if form.endswith("d") else value, form)


def columns_of(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return titles and columns of cells: the measures' names, each run, mean and std."""
    values = [measures(run) for run in runs]
    rows = [row for row in MEASURES if any(v[row[0]] is not None for v in values)]
    titles, columns = [""], [[title for _, title, _ in rows]]
    for name, value in zip(names_of(runs), values):
        titles.append(name)
        columns.append([shown(value[key], form) for key, _, form in rows])
    if len(runs) > 1:
        both = [mean_and_std([value[key] for value in values]) for key, _, _ in rows]
        for title, part in (("mean", 0), ("std", 1)):
            titles.append(title)
            columns.append([shown(pair[part], row[2].lstrip("+")) for pair, row in zip(both, rows)])
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


def remarks(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know besides the numbers: time ledgers, gaps, contradictions."""
    lines = []
    for name, run in zip(names_of(runs), runs):
        lines.append(f"{name}: {run.path} ({run.system}{'' if run.complete else ', INCOMPLETE'})")
        lines += [f"  time: {ledger_line(run)}"] if run.ledger else []
        lines += [f"  not in this log: {', '.join(run.missing)}"] if run.missing else []
        lines += [f"  warning: {text}" for text in run.warnings]
    return lines


def report(runs: Sequence[Run], width: int) -> str:
    """Return the whole page."""
    rules = [f"{MARKS[v.outcome]}  {v.rule}: {v.reason}" for v in verdicts(runs)]
    return "\n".join([table(*columns_of(runs), width), "", *rules, "", *remarks(runs)])


def as_json(runs: Sequence[Run]) -> dict:
    """Return everything that the page says, for machines."""
    values = [measures(run) for run in runs]
    pairs = {key: mean_and_std([value[key] for value in values]) for key, _, _ in MEASURES}
    return dict(
        runs=[dict(value, name=name, path=str(run.path), system=run.system, seed=run.seed,
                   training_seconds=training_seconds(run), ledger_seconds=run.ledger,
                   source_sha256=run.source_sha256, data=run.data, environment=run.environment,
                   config=run.config, complete=run.complete, missing=run.missing,
                   warnings=run.warnings)
              for name, run, value in zip(names_of(runs), runs, values)],
        mean={key: pair[0] for key, pair in pairs.items()},
        std={key: pair[1] for key, pair in pairs.items()},
        verdicts=[verdict._asdict() for verdict in verdicts(runs)])


def run(args: argparse.Namespace) -> int:
    runs = [read_run(path) for path in seed_logs(args.logs)]
    if args.json:
        print(json.dumps(as_json(runs), indent=1))
    else:
        print(report(runs, shutil.get_terminal_size((100, 24)).columns))
    return 0
