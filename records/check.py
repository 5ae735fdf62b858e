"""Judge submission folders rule by rule: pass, fail, or n/a with the reason.

    python records/records.py check records/track_*/*
    python records/records.py check FOLDER --evaluate runs/seed1337/final_model.int6.ptz

Every number is computed again from the logs; facts come before form. A folder that `pack` made is
held to all of schema.json; of others, what they do not state is n/a. Exit code 1 when a rule
fails. `--evaluate` scores an artifact anew with the folder's script, on the data that DATA_PATH
and TOKENIZER_PATH name.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compare import analyse
from imports import import_faults, named_files, python_faults, runnable
from logs import CAP_BYTES, LogError, Run, Score, find_logs, read_run
from pack import mixed
from product import REPOSITORY, script
from read import same_run
from record import (
    RESULTS_MARK,
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
from summary import (
    MIN_SEEDS,
    Verdict,
    evaluation_seconds,
    judge,
    measures,
    one_step_seconds,
    training_seconds,
)

MODULE_SUFFIXES = {".py", ".pyc", ".so", ".pyd"}  # x.so and x.cpython-312.so are module x
NEEDED_FILES = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
FOLDER_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})_[\w.+-]+")
SEED_NAME = re.compile(r".*seed[_-]?(-?\d+)", re.IGNORECASE)
OUR_KEYS = {"code_sha256", "seed_results", "compliance"}  # which `pack` writes, and hardly another
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
    def is_ours(self) -> bool:
        """Whether `pack` made it, so that it must state everything."""
        stated = self.submission if isinstance(self.submission, dict) else {}
        return OUR_KEYS <= stated.keys() or RESULTS_MARK in self.readme

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
        for i, path in enumerate(log_files(folder, suffix)):
            run = read(str(path.relative_to(folder)), lambda _, path=path: read_run(path), None)
            if run and not any(same_run(run, other) for other in runs.values()):
                named = SEED_NAME.fullmatch(path.stem)
                seed = int(named[1]) if named else run.seed
                runs[-1 - i if seed is None or seed in runs else seed] = run
    data = read("submission.json", lambda path: json.loads(path.read_text(encoding="utf-8")), None)
    text = read("README.md", lambda path: path.read_text(encoding="utf-8"), "")
    code = read("train_gpt.py", Path.read_bytes, b"")
    return Record(folder.resolve(), data, text, code, found["log"], found["jsonl"], faults)


def log_files(folder: Path, suffix: str) -> list[Path]:
    """Return a folder's logs: train_seed<N>.log as the rules name them, else any."""
    named = sorted(folder.glob(f"train_seed*.{suffix}"))
    try:
        return named or (find_logs(folder) if suffix == "log" else [])
    except LogError:
        return []


def verdict(rule: str, faults: Sequence[str], reason: str, known: bool = True) -> Verdict:
    """Return fail with all faults, a line each, or pass with the reason.

    known=False: of a folder that need not state it, what is lacking is no fault: n/a.
    """
    if not faults:
        return Verdict(rule, "pass", reason)
    return Verdict(rule, "fail" if known else "n/a", "\n".join(faults))


def files_present(record: Record) -> Verdict:
    faults = [f"{name}: {fault}" for name, fault in record.faults.items()
              if name != "submission.json" or fault == "not there"]
    needed = NEEDED_FILES if record.is_ours else NEEDED_FILES[:-1]
    faults += [f"{name}: not there" for name in needed
               if name not in record.faults and not (record.folder / name).is_file()]
    faults += ["train_seed<N>.log: none"] * (not record.logs)
    return verdict("files", faults, f"{', '.join(needed)}, {len(record.logs)} logs")


def folder_name(record: Record) -> Verdict:
    named = FOLDER_NAME.fullmatch(record.folder.name)
    faults = ["" if named else f"{record.folder.name}: must be YYYY-MM-DD_Name",
              "" if record.track else f"{record.folder.parent.name}/: must be track_"
              + " or track_".join(TRACKS)]
    for what, here in (("date", named and named[1]), ("track", record.track)):
        stated = record.stated(what)
        plain = str(stated)[:10] if what == "date" else str(stated).removeprefix("track_")
        if here and plain != here and (stated is not None or record.is_ours):
            faults.append(f"submission.json says {what} {stated}, the folder {here}")
    return verdict("folder name", [fault for fault in faults if fault],
                   f"{record.folder.parent.name}/{record.folder.name}")


def schema(record: Record) -> Verdict:
    if record.submission is None:
        fault = record.faults.get("submission.json", "not there")
        return Verdict("submission.json", "fail", f"no valid JSON: {fault}")
    return verdict("submission.json", schema_faults(record.submission), "obeys schema.json",
                   record.is_ours)


def complete(record: Record) -> Verdict:
    faults = [f"{run.path.name}: its last lines are missing" for run in record.runs
              if not run.complete]
    faults += [f"{run.path.name}: logs seed {run.seed}" for seed, run in record.logs.items()
               if run.seed != seed and (record.is_ours or None is not run.seed != seed >= 0)]
    faults += [f"{run.path.name}: {warning}" for run in record.runs for warning in run.warnings
               if warning != run.sizes.fault]  # which `sizes` tells
    return verdict("every seed complete", faults or ["no log"] * (not record.logs),
                   f"seeds {', '.join(str(run.seed) for run in record.runs)}")


def computed(record: Record) -> dict[str, Any]:
    """Return the numbers of submission.json as the logs give them; raises RecordError."""
    kind = final_score(record.runs)
    if kind is None:
        raise RecordError("the logs do not end in one kind of score")
    stated = record.stated("seeds")
    whole = isinstance(stated, list) and all(isinstance(seed, int) for seed in stated)
    order = stated if whole and set(stated) == set(record.logs) else record.logs
    return numbers([record.logs[seed] for seed in order], kind)


def json_agrees(record: Record) -> Verdict:
    rule = "submission.json = logs"
    if not isinstance(record.submission, dict):
        return Verdict(rule, "n/a", "submission.json cannot be read")
    if not record.is_ours:
        return claims_agree(record, rule)
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


def claims_agree(record: Record, rule: str) -> Verdict:
    """Compare what another's submission.json states with its logs, to the digits it states."""
    kind = final_score(record.runs)
    if kind is None or not all(run.complete for run in record.runs):
        return Verdict(rule, "n/a", "the logs do not all end in one kind of score: "
                       + ", ".join(f"{run.path.name} in {run.final or 'none'}"
                                   f"{'' if run.complete else ' (incomplete)'}"
                                   for run in record.runs))
    faults, compared = [], []
    for name, ways in logged_values(record.runs, kind).items():
        stated = record.stated(name)
        if isinstance(stated, bool) or not isinstance(stated, (int, float)):
            continue
        compared.append(name)
        means = [what for what, value in ways.items() if equals_as_stated(stated, value)]
        usual, expected = next(iter(ways.items()))
        if name.startswith("val_") and usual not in means or not means:
            remark = f" (it is {means[0]})" if means else ""
            faults.append(f"{name} is {stated}, {usual} by the logs is {expected:.10g}{remark}")
    if not compared:
        return Verdict(rule, "n/a", "it states no number that the logs give")
    return verdict(rule, faults, f"{', '.join(compared)}: as logged ({kind})")


def logged_values(runs: Sequence[Run], kind: str) -> dict[str, dict[str, float]]:
    """Return, by key of a submission.json, what people mean by it: what it is -> value."""
    found = [measures(run) for run in runs]

    def ways(name: str, first: str) -> dict[str, float]:
        values = [value for one in found if (value := one.get(name)) is not None]
        if not values:
            return {}
        every = {"the mean": statistics.fmean(values), "the largest": max(values),
                 "the smallest": min(values),
                 **{f"{run.path.name}'s": value for run, value in zip(runs, values)}}
        return {first: every[first], **every}

    keys = {"val_bpb": ways("final_bpb", "the mean"), "val_loss": ways("final_loss", "the mean"),
            "pre_quant_val_bpb": ways("prequant_bpb", "the mean"),
            "bytes_total": ways("total_bytes", "the largest"),
            "bytes_code": ways("code_bytes", "the largest"),
            "artifact_bytes_mean": ways("artifact_bytes", "the mean"),
            "artifact_bytes_max": ways("artifact_bytes", "the largest"),
            "eval_time_seconds": ways("evaluation_seconds", "the largest"),
            "step_stop": ways("steps", "the largest")}
    if len(runs) > 1 and (scores := [run.bpb(kind) or 0.0 for run in runs]):
        keys["val_bpb_std"] = {"the sample deviation": statistics.stdev(scores),
                               "the population deviation": statistics.pstdev(scores)}
    return {name: values for name, values in keys.items() if values}


def equals_as_stated(stated: float, logged: float) -> bool:
    """Return whether a number, rounded to the decimals of the stated one, is that one."""
    decimals = len(repr(float(stated)).partition(".")[2]) if isinstance(stated, float) else 0
    return abs(stated - logged) <= 0.501 * 10.0 ** -decimals


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
    if not record.is_ours:
        return Verdict(rule, "n/a", "it has no table that pack wrote")
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
    return verdict("one configuration", mixed(record.runs) if record.is_ours else
                   [fault for fault in mixed(record.runs) if not fault.startswith("machine")],
                   f"{len(record.runs)} seeds share settings, data and machine")


def enough_seeds(record: Record) -> Verdict:
    rule, count = f"{MIN_SEEDS} seeds or more", len(record.logs)
    if not record.is_ours and record.track == "non_record_16mb":
        return Verdict(rule, "n/a", f"{count}; a rule of track 10min_16mb")
    return verdict(rule, [f"{count}"] * (count < MIN_SEEDS), f"{count}")


def code_ran(record: Record) -> Verdict:
    rule, digest = "script made the logs", hashlib.sha256(record.code).hexdigest()
    faults = [f"{run.path.name}: made by a script of sha256 {code_hash(run) or 'unknown'}, not "
              f"{digest}" for run in record.runs if code_hash(run) != digest]
    return verdict(rule, faults, f"sha256 {digest[:16]}…", record.is_ours)


def sizes(record: Record) -> Verdict:
    code, faults = len(record.code), []
    if not record.is_ours:
        return sums_agree(record)
    for run in record.runs:
        logged, artifact, total = run.sizes.code, run.sizes.artifact, run.sizes.total
        if logged != code:
            faults.append(f"{run.path.name}: code of {logged} bytes, train_gpt.py has {code}")
        if artifact is None or total != artifact + code:
            faults.append(f"{run.path.name}: total {total}, artifact {artifact} + code {code}")
    return verdict("sizes", faults, f"code {code} bytes, totals add up")


def sums_agree(record: Record) -> Verdict:
    """Hold another's sums against their parts, and say how it counts its code."""
    logged = {run.sizes.code for run in record.runs}
    faults = [f"{run.path.name}: {run.sizes.fault}" for run in record.runs if run.sizes.fault]
    by_logs = " or ".join(f"{code:,}" for code in sorted(filter(None, logged))) or "unknown"
    same = logged == {len(record.code)}
    return verdict("sizes", faults, f"code {by_logs} bytes by the logs"
                   + (", the file's size" if same else f", {len(record.code):,} as train_gpt.py "
                      "lies here (packed or not, or changed since)"))


def cap(record: Record) -> Verdict:
    rule = f"code + artifact <= {CAP_BYTES:,} bytes"

    def total(run):
        return None if run.sizes.artifact is None else run.sizes.artifact + len(record.code)
    by_file = judge(rule, record.runs, total, CAP_BYTES, "bytes")
    if record.is_ours:
        return by_file
    by_logs = judge(rule, record.runs, lambda run: run.sizes.total, CAP_BYTES, "bytes")
    reasons = f"{by_logs.reason}, as logged; {by_file.reason}, with train_gpt.py as it lies here"
    known = {found.outcome for found in (by_logs, by_file)} - {"n/a"}
    return Verdict(rule, known.pop() if len(known) == 1 else "n/a", reasons)


def timed(record: Record, what: str, value_of: Callable, limit: float,
          leeway_of: Callable[[Run], float] = lambda run: 0.0) -> Verdict:
    rule = f"{what} <= {limit} s"
    if record.track != "10min_16mb":
        return Verdict(rule, "n/a", "a rule of track 10min_16mb")
    return judge(rule, record.runs, value_of, limit, "s", leeway_of)


def train_time(record: Record) -> Verdict:
    return timed(record, "training + calibration", training_seconds, script().TRAIN_LIMIT_SECONDS,
                 one_step_seconds)


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
    if not any(facts):
        said = record.stated("hardware")
        return Verdict(rule, "n/a", "not logged" + (f"; submission.json says {said}" if said
                                                    else ""))
    return verdict(rule, faults, "as logged")


def significance(record: Record) -> Verdict:
    rule = f"lower by {RECORD_NATS} nats at p < {RECORD_P}"
    base, kind = record.stated("base"), final_score(record.runs)
    if not isinstance(base, dict) or kind is None or not record.is_ours:
        return Verdict(rule, "n/a", "no base to compare with" if kind else "no score")
    if any(fault.startswith("base") for fault in schema_faults(record.submission)):
        return Verdict(rule, "n/a", "the base in submission.json does not obey schema.json")
    old = [Run(Path(f"base{i}"), "published", scores={kind: Score(loss, bpb)})
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
    # another's script may be for a newer Python: a fault only where this one refuses it, too
    return verdict("compiles on Python 3.10", faults, "loader and program",
                   record.is_ours or not compiles_here(record.code))


def compiles_here(code: bytes) -> bool:
    try:
        compile(code, "train_gpt.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def imports_alone(record: Record) -> Verdict:
    rule = "imports nothing beside it"
    needed = record.folder / "requirements.txt"
    listed = needed.read_text(encoding="utf-8", errors="replace") if needed.is_file() else ""
    beside = {path.name.partition(".")[0] for path in record.folder.iterdir()
              if path.name != "train_gpt.py" and (path.suffix in MODULE_SUFFIXES or path.is_dir())}
    try:
        texts = record.code, unpack_script(record.code).encode()
        faults = [fault for text in dict.fromkeys(texts)
                  for fault in import_faults(text, listed, beside)]
    except (ScriptError, SyntaxError, ValueError) as error:
        return Verdict(rule, "n/a", f"cannot be parsed: {error}")
    unlisted = all("beside" not in fault for fault in faults) and not listed
    return verdict(rule, faults, "standard library and requirements.txt",
                   record.is_ours or not unlisted)


def nothing_else_runs(record: Record) -> Verdict:
    """Hold that all code is in train_gpt.py, whose bytes are counted.

    In another's folder such a file may be there for the reader: a fault where the script names it.
    """
    rule, extra = "no other file runs", [path for path in runnable(record.folder)
                                         if path != record.folder / "train_gpt.py"]
    try:
        text = named_files(unpack_script(record.code))
    except (ScriptError, SyntaxError, ValueError):
        text = ""
    named = [path for path in extra
             if re.search(rf"(?<![\w.-]){re.escape(path.name)}(?![\w.-])", text)]
    faults = [f"{path.relative_to(record.folder)}: {path.stat().st_size:,} bytes that could run"
              f"{', which train_gpt.py names,' if path in named else ''} and are not counted; put "
              "them into train_gpt.py or remove them" for path in extra]
    return verdict(rule, faults, "all code is in train_gpt.py", record.is_ours or bool(named))


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
    if not isinstance(stated, dict) or not stated or not record.is_ours:
        return Verdict("legality statement", "fail" if record.is_ours else "n/a",
                       "submission.json has no compliance in the form of schema.json")
    faults = [f"{name}: not in README.md" for name, text in stated.items()
              if str(text) not in record.readme]
    return verdict("legality statement", faults, f"{len(stated)} conditions")


# Facts, what the logs show of the claim; then form, what a reader needs besides.
FACTS = (json_agrees, cap, train_time, eval_time, complete, enough_seeds, one_configuration,
         code_ran, sizes, events_agree, readme_agrees, machine, significance, coverage,
         byte_fingerprint)
FORM = (files_present, folder_name, schema, legality, compiles, imports_alone, nothing_else_runs)
OF_FOLDERS = (complete, enough_seeds)  # facts that can be judged without a log


def evaluate(record: Record, artifact: Path) -> Verdict:
    """Score an artifact with the folder's script and compare with the seed that made it.

    n/a where it cannot give the same digits: other data, torch or number of threads.
    """
    rule = f"{artifact.name} scores the same"
    if not record.is_ours:
        return Verdict(rule, "n/a", "the folder is not of pack's making: no script of others is "
                       "started")
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
               OMP_NUM_THREADS=str(told.get("threads", 1)),
               DEVICE=source.config.get("device", "auto"))
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
    form = [rule(record) for rule in FORM]
    if not record.logs:
        facts = [rule(record) for rule in OF_FOLDERS]
        return [*facts, Verdict("all that logs show", "n/a", "no log can be read"), *form]
    facts = [rule(record) for rule in FACTS]
    facts += [evaluate(record, artifact) for artifact in artifacts]
    if not artifacts:
        note = "give --evaluate ARTIFACT to have it scored again"
        facts.append(Verdict("artifact scores the same", "n/a", note))
    return facts + form


def page(folder: str, verdicts: Sequence[Verdict]) -> str:
    """Return one folder's verdicts as text, a fault a line."""
    width = max(len(v.rule) for v in verdicts)
    indent = "\n" + " " * (width + 10)
    lines = [f"  {v.outcome:4}  {v.rule:{width}}  {v.reason}".replace("\n", indent)
             for v in verdicts]
    count = [sum(v.outcome == outcome for v in verdicts) for outcome in ("pass", "fail", "n/a")]
    return "\n".join([folder, *lines, f"  {count[0]} pass, {count[1]} fail, {count[2]} n/a"])


def run(args: argparse.Namespace) -> int:
    """Print the verdicts; 1 when any rule of any folder fails."""
    if missing := [path for path in args.evaluate if not path.is_file()]:
        raise LogError(f"--evaluate {missing[0]}: no such file; give a run's "
                       f"{script().KINDS['artifact'][0]}")
    found = {str(folder): judgements(load(folder), args.evaluate) for folder in args.folders}
    if args.json:
        print(json.dumps({folder: [v._asdict() for v in verdicts]
                          for folder, verdicts in found.items()}, indent=1))
    for folder, verdicts in () if args.json else found.items():
        print(page(folder, verdicts))
    return int(any(v.outcome == "fail" for verdicts in found.values() for v in verdicts))
