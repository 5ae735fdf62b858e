"""Make a page to send: one HTML file that shows runs, whole, without a network.

    python records/records.py report RUN... [-- OTHER...] --out report.html

Result table and verdicts, curves to hover and zoom, where time and bytes went, settings that
differ, what the model writes, and the command. Artifacts are looked for beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import analyse, check_names, differing_settings, rewrite, ruling, score_words
from figures import COLOURS, MOST_NAMED, X_AXES, Y_AXES, thinned
from logs import LogError, Run, counterpart
from product import REPOSITORY, script
from read import columns_of, final_name, read_group, read_pair, rows_of
from summary import EARLY, measures, names_of, short_path, verdicts

TEMPLATE = Path(__file__).with_name("report_page.html")
OUT = Path("report.html")
PARTS = (("training", "train_seconds"), ("calibration", "calibration_seconds"),
         ("evaluation", "evaluation_seconds"))  # where a log keeps no ledger
SMALLEST_PART = 0.005  # share of a run's time or of an artifact below which nothing is drawn
PROMPTS = ("", "The ")
SAMPLED = dict[str, Any](number=2, tokens=64, temperature=0.8, seed=0)  # of each prompt
__all__ = ["add_arguments", "rewrite", "run"]  # `rewrite`: -- is short for --against, as in compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--against", nargs="+", metavar="OTHER", type=Path, default=[],
                        help="runs to compare with; -- is short for it")
    parser.add_argument("--names", nargs=2, default=("new", "old"), metavar=("NEW", "OLD"),
                        help="what to call the groups")
    parser.add_argument("--title", default="", help="default: the runs' names")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE",
                        help="default: report.html here; overwritten")
    parser.add_argument("--artifact", type=Path, metavar="FILE",
                        help="default: the one beside the first run that has one")
    parser.add_argument("--no-samples", action="store_true", help="do not let the model write")


def curve(run: Run, y_name: str) -> list[tuple]:
    """Return (value, one x per axis of X_AXES) of a run's points; what is unknown is None."""
    points_of, field, _ = Y_AXES[y_name]
    rows = [(getattr(point, field), *(axis(point) for axis in X_AXES.values()))
            for point in points_of(run)]
    rows = thinned([row for row in rows if row[0] is not None])
    return [tuple(None if value is None else float(f"{value:.7g}") for value in row)
            for row in rows]


def charts(groups: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return what the page's script draws: axes, and per chart the runs' curves.

    A few runs of one group have a colour each, and so has each of several groups; beyond that
    colours come again with another dash.
    """
    lines = list[dict[str, Any]]()
    for number, (group, runs) in enumerate(groups.items()):
        for i, (name, run) in enumerate(zip(names_of(runs), runs)):
            own = len(groups) == 1
            place = i if own else number
            lines.append(dict(name=name if own else f"{group}: {name}",
                              colour=place % MOST_NAMED, run=run,
                              dash=place // MOST_NAMED if own else i % 4))
    found = []
    for title, (_, _, marked) in Y_AXES.items():
        curves = list[dict[str, Any]](
            dict(name=line["name"], colour=line["colour"], dash=line["dash"], points=points)
            for line in lines if (points := curve(line["run"], title)))
        if any(len(c["points"]) > 1 for c in curves):
            found.append(dict(title=title, marked=marked, curves=curves))
    return dict(axes=list(X_AXES), charts=found, early=EARLY)


def time_bars(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return per run what its time went to, longest first: its ledger, else the known parts."""
    bars = list[dict[str, Any]]()
    for name, run in zip(names, runs):
        found = measures(run)
        parts = dict(run.ledger or {title: float(value) for title, key in PARTS
                                    if (value := found[key])})
        whole = sum(parts.values())
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        if whole:
            bars.append(dict(name=name, whole=whole, parts=[
                dict(name=part, value=value, share=value / whole) for part, value in ordered
                if value >= SMALLEST_PART * whole]))
    spans = dict.fromkeys(part["name"] for bar in bars for part in bar["parts"])
    colours = {span: i % len(COLOURS) for i, span in enumerate(spans)}
    for part in (part for bar in bars for part in bar["parts"]):
        part["colour"] = colours[part["name"]]
    return bars


def find_artifact(runs: Sequence[Run]) -> Path | None:
    """Return the first artifact that lies beside a run, or None."""
    for run in runs:
        for place in (run.path.parent, counterpart(run.path)):
            if (path := place / script().KINDS["artifact"][0]).is_file():
                return path
    return None


def opened(path: Path) -> Any:
    """Return the Artifact of a file."""
    from artifact import open_artifact  # as below: needs torch
    return open_artifact(path)


def tensor_rows(artifact: Any) -> dict[str, Any]:
    """Return an artifact's bytes by kind of tensor, largest first, and tensor by tensor."""
    from inspect_artifact import merged, stored_in
    stored, size = stored_in(artifact), artifact.path.stat().st_size
    kinds: dict[str, list] = {}
    for tensor in stored:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", tensor.name), []).append(tensor)
    groups = [(merged(tensors, name), len(tensors)) for name, tensors in kinds.items()]

    def row(tensor: Any, count: int) -> dict[str, Any]:
        return dict(name=tensor.name, kind=tensor.kind, count=count, weights=tensor.weights,
                    bytes=tensor.bytes, share=tensor.bytes / size, bits=tensor.bits)

    grouped = sorted((row(tensor, count) for tensor, count in groups), key=lambda r: -r["bytes"])
    return dict(path=short_path(artifact.path), bytes=size, groups=grouped,
                tensors=[row(tensor, 1) for tensor in stored])


def written_texts(artifact: Any) -> list[dict[str, str]]:
    """Return what a model writes behind each of PROMPTS."""
    from artifact import find_tokenizer
    from sample import samples
    tokenizer = find_tokenizer(artifact, None)
    return [dict(prompt=prompt, text=text) for prompt in PROMPTS
            for text in samples(artifact, tokenizer, prompt, **SAMPLED)]


def settings_table(groups: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return the settings that differ: between two groups, else from the script's defaults.

    Of places on a machine only the names are compared, as only they are shown.
    """
    from pack import differences, placeless
    members = [[replace(run, config={name: placeless(name, value)
                                     for name, value in run.config.items()}) for run in runs]
               for runs in groups.values()]
    if len(members) > 1:
        pairs = differing_settings(*members[:2])
        return dict(titles=list(groups), rows=[(name, *pair) for name, pair in pairs.items()])
    runs = members[0]
    between = differing_settings(runs, runs)
    rows = [(name, pair[0], "") for name, pair in between.items()]
    if all(run.system == "ours" and run.config for run in runs):
        from record import base_settings
        changed = differences(runs[0], base_settings(""))
        rows += [(name, *pair) for name, pair in changed.items() if name not in between]
    return dict(titles=["here", "default"], rows=rows)


def comparison(groups: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    """Return what can be said about the difference of two groups: (outcome or "", text) each."""
    if len(groups) < 2:
        return []
    names = list(groups)
    try:
        found = analyse(*groups.values())
    except LogError as error:
        return [("", f"not compared: {error}")]
    test = found["test_bpb"]
    lines = [("", f"{names[0]} minus {names[1]}, mean {score_words(found)}: "
              f"{test['difference']:+.6f} bits per byte")]
    if found["test_nats"]:
        lines.append(("", f"{found['test_nats']['difference']:+.6f} {found['unit']}"))
    word, _, reason = ruling(found).partition(" ")
    return [*lines, ({"ok": "pass", "FAIL": "fail"}.get(word, word), reason.strip())]


def command_of(run: Run) -> str | None:
    """Return the line that makes a run of ours again; None where its log does not say."""
    from pack import command
    return command(run) if run.system == "ours" and run.config else None


def tried(function: Callable[[Any], Any], value: Any, notes: list[str], lost: str = "") -> Any:
    """Return function(value), or None with a note of why not. lost: what the page lacks then."""
    if value is None:
        return None
    try:
        return function(value)
    except (ValueError, OSError, RuntimeError) as error:
        notes.append(lost + "; ".join(str(error).splitlines()))
        return None


def without_places(runs: Sequence[Run], more: Iterable[Path]) -> Callable[[str], str]:
    """Return what leaves of each path in a text its last two names.

    Paths end at a space, but for quoted ones and those that are known: of the runs, of their
    settings, and `more`.
    """
    values = [value for run in runs for value in run.config.values() if value[:1] == "/"]
    given = [os.environ[name] for name in ("TOKENIZER_PATH", "DATA_PATH") if os.environ.get(name)]
    paths = [*(run.path for run in runs), *map(Path, [*values, *given]), *more,
             REPOSITORY, Path.cwd(), Path.home()]
    known = {str(path) for path in paths if len(path.parts) > 2}
    for path in map(Path.absolute, paths):
        known |= {str(place) for place in (path, *path.parents) if place.name}
    longest = sorted(known, key=len, reverse=True)
    name = r"[^\s/:;,'\"()]+"
    pattern = re.compile(
        rf"(?<=')/[^']+(?=')|(?<![\w.~/-])(?:(?:{'|'.join(map(re.escape, longest))})"
        rf"(?![\w-]|\.\w)|/{name})(?:/{name})*")
    return lambda text: pattern.sub(lambda found: short_path(Path(found[0])), text)


def contents(groups: Mapping[str, Sequence[Run]], notes: Sequence[str], artifact: Path | None,
             with_samples: bool) -> dict[str, Any]:
    """Return everything that the page shows, by the names that its template uses."""
    runs, notes = [run for members in groups.values() for run in members], list(notes)
    names = [name if len(groups) == 1 else f"{group}: {name}"
             for group, members in groups.items() for name in names_of(members)]
    rows, tables = rows_of(runs), []
    for group, members in groups.items():
        titles, (heads, *columns) = columns_of(members, rows)
        titles = titles[1:]
        if len(members) > MOST_NAMED:  # mean and deviation first: the rest may need scrolling
            titles, columns = ([*cells[-2:], *cells[:-2]] for cells in (titles, columns))
        tables.append(dict(name=group, titles=titles, columns=columns, heads=heads,
                           verdicts=[v._asdict() for v in verdicts(members)]))
    plain = without_places(runs, [artifact] if artifact else [])
    about = [dict(name=name, path=short_path(run.path), final=final_name(run),
                  notes=[plain(text) for text in run.notes], complete=run.complete,
                  missing=run.missing, warnings=[plain(text) for text in run.warnings])
             for name, run in zip(names, runs)]
    model = tried(opened, artifact, notes)
    tensors = tried(tensor_rows, model, notes)
    texts = tried(written_texts, model if with_samples else None, notes)
    command = tried(command_of, runs[0], notes, "no command: ")
    told = [(outcome, plain(text)) for outcome, text in comparison(groups)]
    bars = time_bars(runs, names)
    spans = {part["name"]: part for bar in bars for part in bar["parts"]}
    finals = [bpb for run in runs if (bpb := measures(run)["final_bpb"]) is not None]
    return dict(
        groups=tables, several=len(groups) > 1, about=about, charts=charts(groups),
        bars=bars, spans=list(spans.values()), tensors=tensors, texts=texts, sampled=SAMPLED,
        settings=settings_table(groups), comparison=told, command=command,
        notes=[plain(note) for note in dict.fromkeys(notes)], number=len(runs),
        mean=statistics.fmean(finals) if len(groups) == 1 and len(finals) == len(runs) else None)


def render(title: str, found: Mapping[str, Any], made_by: str) -> str:
    """Return the page; names and texts of logs are escaped, the data can end no script."""
    import jinja2
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                trim_blocks=True, lstrip_blocks=True)
    template = loader.from_string(TEMPLATE.read_text(encoding="utf-8"))
    data = json.dumps(found["charts"], separators=(",", ":")).replace("<", "\\u003c")
    return template.render(**found, title=title, made_by=made_by, data=data,
                           light=COLOURS, dark=DARK_COLOURS)


# COLOURS on a dark ground: the same hues, each light enough for text.
DARK_COLOURS = ("#5CB3F0", "#FF9A55", "#45C9A0", "#E594C6", "#EDEDED", "#D9B04C", "#A9A9A9")


def write_page(groups: Mapping[str, Sequence[Run]], out: Path, title: str = "",
               notes: Sequence[str] = (), artifact: Path | None = None,
               with_samples: bool = True, made_by: str = "") -> Path:
    """Write the page of groups of runs; returns its path."""
    runs = [run for members in groups.values() for run in members]
    found = contents(groups, notes, artifact or find_artifact(runs), with_samples)
    heading = title or (" against ".join(groups) if len(groups) > 1
                        else ", ".join(names_of(runs)[:3]) + ", …" * (len(runs) > 3))
    page = render(heading, found, made_by)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")
    return out


def by_seed(run: Run) -> tuple[bool, int]:
    return run.seed is None, run.seed or 0


def run(args: argparse.Namespace) -> int:
    if args.artifact and not args.artifact.is_file():
        raise LogError(f"--artifact {args.artifact}: no such file; give a run's "
                       f"{script().KINDS['artifact'][0]}")
    if args.out.is_dir():
        raise LogError(f"--out {args.out}: is a folder; give a file, such as {args.out / OUT}")
    check_names(args.names)
    if args.against:
        new, old, notes = read_pair(args.runs, args.against, short_path)
        groups = {args.names[0]: sorted(new, key=by_seed), args.names[1]: sorted(old, key=by_seed)}
    else:
        new, notes = read_group(args.runs, short_path)
        groups = {"runs": sorted(new, key=by_seed)}
    words = ["records.py", "report", *map(short_path, args.runs)]
    words += ["--", *map(short_path, args.against)] if args.against else []
    out = write_page(groups, args.out, args.title, notes, args.artifact, not args.no_samples,
                     shlex.join(words))
    print(f"{out}: {len(new)} runs{' against ' + str(len(old)) if args.against else ''}, "
          f"{out.stat().st_size:,} bytes")
    return 0
