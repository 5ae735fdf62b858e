"""Make a submission folder from the logs of finished seeds.

    python records/records.py script                              # then run the seeds with it
    python records/records.py pack runs/seed1 runs/seed2 runs/seed3 --name Deeper_Lanes \\
        --author "A. Author" --github-id author --blurb "What is new, in a sentence."

Takes runs that ended, of one configuration, made by exactly the script that is shipped.
Then: records.py check FOLDER.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logs import EVENTS_FILE, LogError, Run, counterpart, read_run
from product import REPOSITORY
from record import (
    MACHINE,
    TRACKS,
    RecordError,
    base_settings,
    code_hash,
    configuration,
    final_score,
    numbers,
    results_table,
    schema_faults,
)
from script import PACKED

# Why the evaluation of a run without test-time training is legal, by the conditions of issue #1017.
PLAIN_EVALUATION = {
    "prefix_only": "Attention is causal inside a window and windows share nothing; the model is "
                   "the packed artifact, read back from disk.",
    "normalised": "The score is the cross-entropy of a softmax over the whole vocabulary.",
    "score_before_update": "Nothing is adapted: the weights stay as the artifact holds them.",
    "single_pass": "Windows go from left to right and each token is scored in one of them.",
    "calibration_on_the_clock": "Calibration on training text is counted in the training time.",
}


class Source(NamedTuple):
    """One finished seed: its text log, the same as events (if kept), and what the log says."""

    text: Path
    events: Path | None
    run: Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="a run's folder runs/ID, or its text log")
    parser.add_argument("--name", required=True, help="of the submission; letters, digits, _ and -")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--blurb", required=True, help="what it is, in a sentence")
    parser.add_argument("--track", choices=TRACKS, default="non_record_16mb")
    parser.add_argument("--script", type=Path, default=PACKED,
                        help="what the runs were made with (default: runs/submission/train_gpt.py)")
    parser.add_argument("--base", default="defaults", metavar="NAME",
                        help="what it is compared with: defaults, a preset, or a name of your own "
                             "for --base-logs")
    parser.add_argument("--base-logs", nargs="+", type=Path, metavar="LOG",
                        help="logs of the record to beat: settings and scores are compared")
    parser.add_argument("--legality", type=Path, metavar="JSON",
                        help="why the evaluation is legal, a sentence per condition (needed with "
                             "test-time training; see compliance in records/schema.json)")
    parser.add_argument("--text", type=Path, metavar="MARKDOWN",
                        help="your description, put below the README's blurb")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "records",
                        help="where the track's folder is (default: records/)")
    parser.add_argument("--no-figure", action="store_true")
    parser.add_argument("--report", action="store_true",
                        help="add report.html, the page that records.py report makes")


def find_source(path: Path) -> Source:
    """Return the text log and events of the run that a path names.

    Raises LogError where there is no text log, which is what reviewers read.
    """
    text, folder = (counterpart(path), path) if path.is_dir() else (path, counterpart(path))
    events = folder / EVENTS_FILE
    if not text.is_file():
        raise LogError(f"{path}: no text log at {text}; give the text log, or the run's folder "
                       "with logs/ beside runs/")
    return Source(text, events if events.is_file() else None, read_run(text))


def refuse(sources: Sequence[Source], script_sha256: str) -> None:
    """Raise RecordError with every reason why these runs are no record of that script."""
    runs = [source.run for source in sources]
    faults = [f"{run.path}: incomplete, its last lines are missing; give runs that ended"
              for run in runs if not run.complete]
    faults += [f"{run.path}: made by a script of sha256 {code_hash(run) or 'unknown'}, not by the "
               f"one to ship ({script_sha256[:12]}…); run the seeds with it, or give --script"
               for run in runs if code_hash(run) != script_sha256]
    faults += [f"{run.path}: does not state its seed" for run in runs if run.seed is None]
    seeds = [run.seed for run in runs]
    faults += [f"seed {seed}: {seeds.count(seed)} runs of it; give one" for seed in
               sorted({seed for seed in seeds if seed is not None and seeds.count(seed) > 1})]
    faults += mixed(runs)
    if final_score(runs) is None:
        faults.append("the runs end in different scores: "
                      + ", ".join(f"{run.path.name} in {run.final or 'none'}" for run in runs))
    if faults:
        raise RecordError("\n".join(faults))


def mixed(runs: Sequence[Run]) -> list[str]:
    """Return what differs between runs that should share everything but their seed."""
    faults = []
    views = {"setting": configuration, "data": lambda run: run.data,
             "machine": lambda run: {name: (run.environment or {}).get(name) for name in MACHINE}}
    for what, view in views.items():
        seen = [view(run) for run in runs]
        for name in sorted({name for found in seen for name in found}):
            values = [str(found.get(name, "-")) for found in seen]
            if len(set(values)) > 1:
                pairs = ", ".join(f"{value} in {run.path.name}"
                                  for value, run in zip(values, runs))
                faults.append(f"{what} {name} differs between the seeds: {pairs}")
    return faults


def differences(run: Run, base: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return {setting: (here, in the base)} of those that differ; "-": the base has none."""
    mine = configuration(run)
    return {name: (value, base.get(name, "-")) for name, value in sorted(mine.items())
            if value != base.get(name, "-")}


def placeless(name: str, value: str) -> str:
    """Return a setting as others may read it: of a path on some machine only its name."""
    parts = value.split(",") if name == "preset" else [value]  # presets and files of settings
    return ",".join(f"path/to/{Path(part).name}" if Path(part).is_absolute() else part
                    for part in parts)


def typed(name: str, value: str) -> str:
    """Return a setting as typed before the command."""
    return f"{name.upper()}={shlex.quote(placeless(name, value))}"


def command(run: Run) -> str:
    """Return the line that makes this run, from the folder of the record."""
    preset = run.config.get("preset", "")
    usual = base_settings(preset)
    skipped = {"preset", "run_id", "seed"}
    changed = [typed(name, value) for name, value in sorted(run.config.items())
               if name not in skipped and name in usual and value != usual[name]]
    world = (run.environment or {}).get("world_size", 1)
    launcher = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
    parts = [typed("preset", preset)] * bool(preset) + changed + [f"SEED={run.seed}"]
    return " ".join([*parts, launcher, "train_gpt.py"])


def readme(data: dict[str, Any], run: Run, base: tuple[str, dict[str, str]], extra: str,
           figure: str | None) -> str:
    """Return the README of a record."""
    base_name, settings = base
    rows = [f"| `{name.upper()}` | {placeless(name, here) or 'empty'} | "
            f"{placeless(name, there) or 'empty'} |"
            for name, (here, there) in differences(run, settings).items()]
    changed = [f"| setting | here | {base_name} |", "|---|---|---|", *rows] if rows else \
        [f"Nothing: the settings are those of {base_name}."]
    facts = run.environment or {}
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "cuda", "brotli")
                         if facts.get(name))
    legality = [f"- **{name.replace('_', ' ')}**: {text}"
                for name, text in data["compliance"].items()]
    everything = [f"{name.upper()}={placeless(name, value)}"
                  for name, value in sorted(configuration(run).items())]
    parts = [f"# {data['name'].replace('_', ' ')}", data["blurb"], extra, "## Results",
             f"Score: {data['score']} evaluation of the packed artifact, bits per byte of the "
             "validation text.", results_table(data),
             f"![The runs]({figure})" if figure else "",
             f"## What differs from {base_name}", "\n".join(changed), "## Run it",
             f"In this folder, on {data['hardware']} ({versions}):",
             f"```sh\npip install -r requirements.txt\n{command(run)}\n```",
             "`DATA_PATH` and `TOKENIZER_PATH` say where the shards and the tokenizer are, from "
             "where the command starts. `train_gpt.py` unpacks itself: its text, without comments, "
             "is at the head of each log.", "## Legality", "\n".join(legality), "## All settings",
             "```\n" + "\n".join(everything) + "\n```"]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def statement(path: Path | None, kind: str) -> dict[str, str]:
    """Return the legality statement: the file's, or the one for evaluations that adapt nothing."""
    if path is None and kind == "ttt":
        raise RecordError("the score is of test-time training: say with --legality FILE.json why "
                          "it is legal (compliance in records/schema.json lists the conditions)")
    return PLAIN_EVALUATION if path is None else json.loads(path.read_text(encoding="utf-8"))


def submission(args: argparse.Namespace, runs: Sequence[Run], base_runs: Sequence[Run]) -> dict:
    """Return submission.json's content; raises RecordError where the schema refuses it."""
    kind = str(final_score(runs))
    data = dict(author=args.author, github_id=args.github_id, name=args.name, date=args.date,
                track=args.track, blurb=args.blurb, **numbers(runs, kind))
    if base_runs:
        scores = [run.scores[run.final] for run in base_runs if run.final]
        data["base"] = dict(name=args.base, val_loss=[score.loss for score in scores],
                            val_bpb=[score.bpb for score in scores])
    data["compliance"] = statement(args.legality, kind)
    if faults := schema_faults(data):
        raise RecordError("\n".join(f"submission.json: {fault}" for fault in faults))
    return data


def base_of(args: argparse.Namespace, base_runs: Sequence[Run]) -> tuple[str, dict[str, str]]:
    """Return the base's name and settings; raises RecordError on an unknown name."""
    if base_runs:
        return args.base, dict(base_runs[0].config)
    try:
        return args.base, base_settings("" if args.base == "defaults" else args.base)
    except ValueError as error:
        raise RecordError(f"--base {args.base}: no preset, and no --base-logs given: {error}") \
            from None


def write(folder: Path, args: argparse.Namespace, sources: Sequence[Source], data: dict,
          base: tuple[str, dict[str, str]]) -> None:
    """Write the record's files into a folder that is there and empty."""
    runs = [source.run for source in sources]
    figure = None
    if not args.no_figure:
        from figures import draw_comparison  # matplotlib starts slowly
        title = args.name.replace("_", " ")
        figure = draw_comparison({title: runs}, folder / "runs", title)[0].name
    for source in sources:
        shutil.copyfile(source.text, folder / f"train_seed{source.run.seed}.log")
        if source.events:
            shutil.copyfile(source.events, folder / f"train_seed{source.run.seed}.jsonl")
    shutil.copyfile(args.script, folder / "train_gpt.py")
    shutil.copyfile(REPOSITORY / "requirements.txt", folder / "requirements.txt")
    extra = args.text.read_text(encoding="utf-8") if args.text else ""
    text = readme(data, runs[0], base, extra, figure)
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "submission.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if args.report:
        from report import write_page
        write_page({"runs": runs}, folder / "report.html", args.name.replace("_", " "))


def run(args: argparse.Namespace) -> int:
    """Make the folder, whole or not at all, and name it."""
    if not re.fullmatch(r"[\w-]+", args.name):
        raise RecordError(f"--name {args.name}: it becomes a folder's name; use letters, digits, "
                          "_ and -")
    if not args.script.is_file():
        raise RecordError(f"--script {args.script}: no such file; make it with records.py script "
                          "and run the seeds with it")
    sources = sorted(map(find_source, args.runs), key=lambda source: source.run.seed or 0)
    refuse(sources, hashlib.sha256(args.script.read_bytes()).hexdigest())
    base_runs = [read_run(path) for path in args.base_logs or ()]
    base = base_of(args, base_runs)
    data = submission(args, [source.run for source in sources], base_runs)
    folder = args.out / f"track_{args.track}" / f"{args.date}_{args.name}"
    if folder.exists():
        raise RecordError(f"{folder}: exists; choose another --name or remove it")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part, args, sources, data, base)
    part.rename(folder)
    print(f"{folder}: {len(sources)} seeds, mean bpb {data['val_bpb']:.6f}, "
          f"{data['bytes_total']:,} bytes")
    print(f"next: records.py check {folder}")
    return 0
