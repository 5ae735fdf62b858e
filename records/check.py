"""Judge submission folders rule by rule: pass, fail, or n/a with the reason.

    python records/records.py check records/track_*/*
    python records/records.py check FOLDER --evaluate runs/seed1337/final_model.int6.ptz

Every number is computed again from the logs. Exit code 1 when a rule fails. `--evaluate` scores an
artifact anew with the folder's script, on the data that DATA_PATH and TOKENIZER_PATH name.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compare import analyse
from imports import import_faults, python_faults
from logs import CAP_BYTES, LogError, Run, Score, read_run
from pack import mixed
from product import REPOSITORY, script
from record import (
    TRACKS,
    RecordError,
    code_hash,
    final_score,
    numbers,
    results_table,
    same_number,
    schema_faults,
)
from script import ScriptError, unpack_script
from stats_tests import RECORD_NATS, RECORD_P
from summary import MIN_SEEDS, Verdict, evaluation_seconds, judge, training_seconds

NEEDED_FILES = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
FOLDER_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})_[\w-]+")
WHOLE_TEXT_BYTES = 151_080_891  # of the challenge's 50,000 validation documents
BPB_ERROR = 2e-8  # losses are logged with eight digits


class Record(NamedTuple):
    """A record folder as far as it can be read; what cannot is told by `faults`."""

    folder: Path
    submission: Any  # of submission.json; None when it is no JSON
    readme: str
    code: bytes  # of train_gpt.py
    logs: dict[int, Run]  # by the seed in the file's name
    events: dict[int, Run]
    faults: dict[str, str]  # file -> why it cannot be read

    @property
    def runs(self) -> list[Run]:
        return list(self.logs.values())

    @property
    def track(self) -> str | None:
        name = self.folder.parent.name.removeprefix("track_")
        return name if name in TRACKS else None

    def stated(self, name: str) -> Any:
        return self.submission.get(name) if isinstance(self.submission, dict) else None


def load(folder: Path) -> Record:
    """Read a folder; raises RecordError when it is none."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: no folder; give a record folder, records/track_…/DATE_Name")
    faults: dict[str, str] = {}

    def read(name: str, reader: Callable, default: Any) -> Any:
        try:
            return reader(folder / name)
        except (ValueError, OSError) as error:
            faults[name] = "not there" if isinstance(error, FileNotFoundError) else str(error)
            return default

    found: dict[str, dict[int, Run]] = {"log": {}, "jsonl": {}}
    for suffix, runs in found.items():
        for path in sorted(folder.glob(f"train_seed*.{suffix}")):
            seed = re.fullmatch(r"train_seed(-?\d+)", path.stem)
            run = read(path.name, read_run, None) if seed else None
            if seed and run:
                runs[int(seed[1])] = run
    data = read("submission.json", lambda path: json.loads(path.read_text(encoding="utf-8")), None)
    text = read("README.md", lambda path: path.read_text(encoding="utf-8"), "")
    code = read("train_gpt.py", Path.read_bytes, b"")
    return Record(folder.resolve(), data, text, code, found["log"], found["jsonl"], faults)


def verdict(rule: str, faults: Sequence[str], reason: str) -> Verdict:
    """Return fail with the first faults, or pass with the reason."""
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return Verdict(rule, "fail", "; ".join(faults[:3]) + more) if faults else \
        Verdict(rule, "pass", reason)


def files_present(record: Record) -> Verdict:
    faults = [f"{name}: {fault}" for name, fault in record.faults.items()
              if name != "submission.json" or fault == "not there"]
    faults += [f"{name}: not there" for name in NEEDED_FILES
               if name not in record.faults and not (record.folder / name).is_file()]
    faults += ["train_seed<N>.log: none"] * (not record.logs)
    return verdict("files", faults, f"{', '.join(NEEDED_FILES)}, {len(record.logs)} logs")


def folder_name(record: Record) -> Verdict:
    named = FOLDER_NAME.fullmatch(record.folder.name)
    faults = ["" if named else f"{record.folder.name}: must be YYYY-MM-DD_Name",
              "" if record.track else f"{record.folder.parent.name}/: must be track_"
              + " or track_".join(TRACKS)]
    for what, here in (("date", named and named[1]), ("track", record.track)):
        if record.submission is not None and here and record.stated(what) != here:
            faults.append(f"submission.json says {what} {record.stated(what)}, the folder {here}")
    return verdict("folder name", [fault for fault in faults if fault],
                   f"{record.folder.parent.name}/{record.folder.name}")


def schema(record: Record) -> Verdict:
    if record.submission is None:
        fault = record.faults.get("submission.json", "not there")
        return Verdict("submission.json", "fail", f"no valid JSON: {fault}")
    return verdict("submission.json", schema_faults(record.submission), "obeys schema.json")


def complete(record: Record) -> Verdict:
    faults = [f"{run.path.name}: its last lines are missing" for run in record.runs
              if not run.complete]
    faults += [f"{run.path.name}: logs seed {run.seed}" for seed, run in record.logs.items()
               if run.seed != seed]
    faults += [f"{run.path.name}: {warning}" for run in record.runs for warning in run.warnings]
    return verdict("every seed complete", faults or ["no log"] * (not record.logs),
                   f"seeds {', '.join(map(str, record.logs))}")


def computed(record: Record) -> dict[str, Any]:
    """Return the numbers of submission.json as the logs give them; raises RecordError."""
    kind = final_score(record.runs)
    if kind is None:
        raise RecordError("the logs do not end in one kind of score")
    stated = record.stated("seeds")
    order = stated if isinstance(stated, list) and set(stated) == set(record.logs) else record.logs
    return numbers([record.logs[seed] for seed in order], kind)


def json_agrees(record: Record) -> Verdict:
    rule = "submission.json = logs"
    if not isinstance(record.submission, dict):
        return Verdict(rule, "n/a", "submission.json cannot be read")
    faults = []
    try:
        found = computed(record)
    except RecordError as error:
        return Verdict(rule, "fail", str(error))
    for name, value in found.items():
        if name == "seed_results":
            faults += seed_faults(record.stated(name), value)
        elif not same_number(record.stated(name), value):
            faults.append(f"{name} is {record.stated(name)}, the logs give {value}")
    return verdict(rule, faults, f"{len(found)} keys")


def seed_faults(stated: Any, found: dict[str, dict[str, Any]]) -> list[str]:
    """Return where seed_results departs from the logs."""
    stated = stated if isinstance(stated, dict) else {}
    faults = [f"seed_results has seed {seed}, of which there is no log"
              for seed in stated if seed not in found]
    for seed, values in found.items():
        entry = stated.get(seed) if isinstance(stated.get(seed), dict) else {}
        faults += [f"seed {seed} {name} is {entry.get(name)}, its log gives {value}"
                   for name, value in values.items() if not same_number(entry.get(name), value)]
    return faults


def readme_agrees(record: Record) -> Verdict:
    rule = "README.md = logs"
    try:
        table = results_table(computed(record))
    except RecordError as error:
        return Verdict(rule, "n/a", str(error))
    lines = set(record.readme.splitlines())
    faults = [f"lacks the line: {line}" for line in table.splitlines() if line not in lines]
    return verdict(rule, faults, "its table is the logs' one")


def events_agree(record: Record) -> Verdict:
    rule = "events = logs"
    if not record.events:
        return Verdict(rule, "n/a", "no train_seed<N>.jsonl")
    faults = [f"train_seed{seed}.jsonl: has no log" for seed in record.events
              if seed not in record.logs]
    for seed, run in record.events.items():
        log = record.logs.get(seed, run)
        pairs = {"bpb": (run.bpb(run.final or ""), log.bpb(log.final or "")),
                 "sizes": (run.sizes, log.sizes), "settings": (run.config, log.config)}
        faults += [f"train_seed{seed}: {what} differ between .jsonl and .log"
                   for what, (a, b) in pairs.items() if a != b]
    return verdict(rule, faults, f"{len(record.events)} of {len(record.logs)} seeds")


def one_configuration(record: Record) -> Verdict:
    return verdict("one configuration", mixed(record.runs),
                   f"{len(record.runs)} seeds share settings, data and machine")


def enough_seeds(record: Record) -> Verdict:
    count = len(record.logs)
    return verdict(f"{MIN_SEEDS} seeds or more", [f"{count}"] * (count < MIN_SEEDS), f"{count}")


def code_ran(record: Record) -> Verdict:
    rule, digest = "script made the logs", hashlib.sha256(record.code).hexdigest()
    faults = [f"{run.path.name}: made by a script of sha256 {code_hash(run) or 'unknown'}, not "
              f"{digest}" for run in record.runs if code_hash(run) != digest]
    return verdict(rule, faults, f"sha256 {digest[:16]}…")


def sizes(record: Record) -> Verdict:
    code, faults = len(record.code), []
    for run in record.runs:
        logged, artifact, total = run.sizes.code, run.sizes.artifact, run.sizes.total
        if logged != code:
            faults.append(f"{run.path.name}: code of {logged} bytes, train_gpt.py has {code}")
        if artifact is None or total != artifact + code:
            faults.append(f"{run.path.name}: total {total}, artifact {artifact} + code {code}")
    return verdict("sizes", faults, f"code {code} bytes, totals add up")


def cap(record: Record) -> Verdict:
    def total(run):
        return None if run.sizes.artifact is None else run.sizes.artifact + len(record.code)
    return judge(f"code + artifact <= {CAP_BYTES:,} bytes", record.runs, total, CAP_BYTES, "bytes")


def timed(record: Record, what: str, value_of: Callable, limit: float) -> Verdict:
    rule = f"{what} <= {limit} s"
    if record.track != "10min_16mb":
        return Verdict(rule, "n/a", "a rule of track 10min_16mb")
    return judge(rule, record.runs, value_of, limit, "s")


def train_time(record: Record) -> Verdict:
    return timed(record, "training + calibration", training_seconds, script().TRAIN_LIMIT_SECONDS)


def eval_time(record: Record) -> Verdict:
    return timed(record, "evaluation", evaluation_seconds, script().EVAL_LIMIT_SECONDS)


def machine(record: Record) -> Verdict:
    rule = "8 x H100"
    if record.track != "10min_16mb":
        return Verdict(rule, "n/a", "a rule of track 10min_16mb")
    facts = [run.environment or {} for run in record.runs]
    faults = [f"{run.path.name}: {fact.get('world_size')} x {fact.get('device_name')}"
              for run, fact in zip(record.runs, facts)
              if fact.get("world_size") != 8 or "H100" not in str(fact.get("device_name"))]
    return verdict(rule, faults, "as logged")


def significance(record: Record) -> Verdict:
    rule = f"lower by {RECORD_NATS} nats at p < {RECORD_P}"
    base, kind = record.stated("base"), final_score(record.runs)
    if not isinstance(base, dict) or kind is None:
        return Verdict(rule, "n/a", "no base to compare with" if kind else "no score")
    old = [Run(Path(f"base{i}"), "text", "published", scores={kind: Score(loss, bpb)})
           for i, (loss, bpb) in enumerate(zip(base["val_loss"], base["val_bpb"]))]
    found = analyse(record.runs, old)
    test = found["test_nats"]
    if test is None or test["p_margin"] is None:
        return Verdict(rule, "n/a", "needs two runs a side with losses in nats")
    reason = f"{test['difference']:+.6f} nats against {base['name']}, p = {test['p_margin']:.3g}"
    return Verdict(rule, "pass" if found["record"] else "fail", reason)


def compiles(record: Record) -> Verdict:
    try:
        faults = python_faults(record.code, "train_gpt.py")
        faults = faults or python_faults(unpack_script(record.code).encode(), "its unpacked text")
    except ScriptError as error:
        faults = [str(error)]
    return verdict("compiles on Python 3.10", faults, "loader and program")


def imports_alone(record: Record) -> Verdict:
    rule = "imports nothing beside it"
    needed = record.folder / "requirements.txt"
    listed = needed.read_text(encoding="utf-8", errors="replace") if needed.is_file() else ""
    beside = {path.stem for path in record.folder.iterdir() if path.name != "train_gpt.py"
              and (path.suffix == ".py" or path.is_dir())}
    try:
        texts = record.code, unpack_script(record.code).encode()
        faults = [fault for text in dict.fromkeys(texts)
                  for fault in import_faults(text, listed, beside)]
    except (ScriptError, SyntaxError, ValueError) as error:
        return Verdict(rule, "n/a", f"cannot be parsed: {error}")
    return verdict(rule, faults, "standard library and requirements.txt")


def coverage(record: Record) -> Verdict:
    rule, faults, counts = "every token scored", [], []
    for run in [*record.runs, *record.events.values()]:
        counted, score = run.events.get("val_counts", {}), run.scores.get(run.final or "")
        everything = counted.get("all_tokens")
        if everything is None:
            return Verdict(rule, "n/a", f"{run.path.name}: does not count its targets")
        counts.append(everything)
        scored = {counted.get("scored_tokens"), score.tokens if score and score.tokens else
                  counted.get("scored_tokens")}
        if scored == {counted.get("legacy_tokens")} and scored != {everything}:
            faults.append(f"{run.path.name}: drops the tail, {counted['scored_tokens']} of "
                          f"{everything}")
        elif scored != {everything}:
            faults.append(f"{run.path.name}: scored {sorted(map(str, scored))} of {everything}")
    return verdict(rule, faults, f"{max(counts, default=0):,} targets")


def catalogue() -> Any:
    """Return data/catalogue.py, the table of published validation sets."""
    if str(REPOSITORY / "data") not in sys.path:
        sys.path.append(str(REPOSITORY / "data"))
    return importlib.import_module("catalogue")


def expected_bytes(tokens: int) -> int | None:
    """Return the bytes of that many targets of a published validation set, or None."""
    for variant in catalogue().VARIANTS.values():
        for known in variant.fingerprints:
            if known.tokens and tokens == known.tokens - 1:
                return WHOLE_TEXT_BYTES
            if tokens == known.targets:
                return known.target_bytes
    return None


def byte_fingerprint(record: Record) -> Verdict:
    """Right denominators: loss, tokens and bytes give the bpb; known texts have their bytes."""
    rule, faults, unknown = "byte fingerprint", [], []
    for run in record.runs:
        tokens, size, score = run.data.get("val_tokens"), run.data.get("val_bytes"), \
            run.scores.get(run.final or "")
        if not (tokens and size and score and score.loss and score.bpb):
            return Verdict(rule, "n/a", f"{run.path.name}: lacks tokens, bytes or a score")
        bpb = score.loss / math.log(2) * tokens / size
        if abs(bpb - score.bpb) > BPB_ERROR * max(1.0, bpb / score.loss):
            faults.append(f"{run.path.name}: loss over {tokens} tokens and {size} bytes is "
                          f"{bpb:.8f} bpb, not {score.bpb:.8f}")
        known = expected_bytes(tokens)
        if known is None:
            unknown.append(f"{tokens} targets of {size} bytes are no published validation set")
        elif size != known:
            faults.append(f"{run.path.name}: {size} bytes for {tokens} targets, published {known}")
    if unknown and record.track == "10min_16mb":
        faults += unknown[:1]
    if unknown and not faults:
        return Verdict(rule, "n/a", f"{unknown[0]}; losses and scores agree")
    return verdict(rule, faults, "the published text's bytes")


def legality(record: Record) -> Verdict:
    stated = record.stated("compliance")
    if not isinstance(stated, dict) or not stated:
        return Verdict("legality statement", "fail", "submission.json has no compliance")
    faults = [f"{name}: not in README.md" for name, text in stated.items()
              if str(text) not in record.readme]
    return verdict("legality statement", faults, f"{len(stated)} conditions")


FOLDER_RULES = (files_present, folder_name, schema, complete, enough_seeds, legality, compiles,
                imports_alone)
LOG_RULES = (one_configuration, code_ran, json_agrees, readme_agrees, events_agree, sizes, cap,
             train_time, eval_time, machine, significance, coverage, byte_fingerprint)


def evaluate(record: Record, artifact: Path) -> Verdict:
    """Score an artifact with the folder's script and compare with the seed that made it.

    n/a where it cannot give the same digits: other data, torch or number of threads.
    """
    rule = f"{artifact.name} scores the same"
    size = artifact.stat().st_size
    sources = [run for run in record.runs if run.sizes.artifact == size]
    if not sources:
        return Verdict(rule, "fail", f"{artifact}: no log has an artifact of {size} bytes")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train_gpt.py").write_bytes(record.code)
        again, fault = run_evaluation(Path(folder), artifact, sources[0])
    if again is None:
        return Verdict(rule, "n/a", fault)
    facts = ("device_name", "world_size", "torch", "threads", "compiled")
    environment = again.environment or {}
    for source in sources:
        told = source.environment or {}
        other = [f"{name} {environment.get(name)}, logged {told.get(name)}" for name in facts
                 if environment.get(name) != told.get(name)]
        data = record.events.get(source.seed or 0, source).data.get("val_sha256")
        if data not in (None, again.data.get("val_sha256")):
            other.append("other validation data")
        if other:
            return Verdict(rule, "n/a", f"not the same digits here: {'; '.join(other)}")
        if again.bpb(source.final or "") == source.bpb(source.final or ""):
            return Verdict(rule, "pass", f"seed {source.seed}: {again.bpb(source.final or '')!r}")
    return Verdict(rule, "fail", f"{again.bpb(again.final or '')!r}, logged "
                   + ", ".join(repr(run.bpb(run.final or "")) for run in sources))


def run_evaluation(folder: Path, artifact: Path, source: Run) -> tuple[Run | None, str]:
    """Run the evaluation stage in a folder that holds nothing but the script."""
    told = source.environment or {}
    places = {"DATA_PATH": "data_path", "TOKENIZER_PATH": "tokenizer_path", "DATA_DIR": "data_dir"}
    settings = {name: os.environ.get(name) or source.config.get(key, "")
                for name, key in places.items()}
    env = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    env.update({name: str(Path(value).resolve()) for name, value in settings.items() if value},
               STAGE="evaluate", INPUT_PATH=str(artifact.resolve()), RUN_ID="again",
               OMP_NUM_THREADS=str(told.get("threads", 1)), DEVICE=source.config["device"])
    world = int(told.get("world_size", 1))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [sys.executable, *(launcher if world > 1 else ()), "train_gpt.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return read_run(folder / "runs" / "again"), ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--evaluate", nargs="+", type=Path, default=[], metavar="ARTIFACT",
                        help="score these artifacts of the record again (takes its time)")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def judgements(record: Record, artifacts: Sequence[Path]) -> list[Verdict]:
    """Return a verdict per rule."""
    found = [rule(record) for rule in FOLDER_RULES]
    if not record.logs:
        return [*found, Verdict("all that logs show", "n/a", "no log can be read")]
    found += [rule(record) for rule in LOG_RULES]
    if not artifacts:
        note = "give --evaluate ARTIFACT to have it scored again"
        return [*found, Verdict("artifact scores the same", "n/a", note)]
    return found + [evaluate(record, artifact) for artifact in artifacts]


def run(args: argparse.Namespace) -> int:
    """Print the verdicts; 1 when any rule of any folder fails."""
    if missing := [path for path in args.evaluate if not path.is_file()]:
        raise LogError(f"--evaluate {missing[0]}: no such file; give a run's final_model.int6.ptz")
    found = {str(folder): judgements(load(folder), args.evaluate) for folder in args.folders}
    if args.json:
        print(json.dumps({folder: [v._asdict() for v in verdicts]
                          for folder, verdicts in found.items()}, indent=1))
    for folder, verdicts in () if args.json else found.items():
        print(folder)
        width = max(len(v.rule) for v in verdicts)
        print("\n".join(f"  {v.outcome:4}  {v.rule:{width}}  {v.reason}" for v in verdicts))
        count = [sum(v.outcome == outcome for v in verdicts) for outcome in ("pass", "fail", "n/a")]
        print(f"  {count[0]} pass, {count[1]} fail, {count[2]} n/a")
    return int(any(v.outcome == "fail" for verdicts in found.values() for v in verdicts))
