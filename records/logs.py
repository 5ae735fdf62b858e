"""Read what a training run left behind: a text log, an events.jsonl, or the run's folder.

`read_run` understands our own runs and the published logs that `log_forms` lists, whole,
truncated or interleaved. A number that the log does not state is None and named in `missing`;
nothing is guessed, and lines that contradict each other count as no statement at all.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from log_forms import DISPUTED, FINAL_KINDS, SCORES, Event, LineReader, score_form
from product import script

CAP_BYTES = 16_000_000
MAX_LINE_BYTES, MAX_SOURCE_BYTES = 1 << 20, 4 << 20
MAX_EVENTS = 120_000  # a run prints some ten thousand; what comes after so many is left out
STAGE_ORDER = ("roundtrip", "sliding", "ttt", "slot", "ngram")
SCORE_KINDS = tuple(dict.fromkeys(form.kind for form in SCORES))
EVENTS_FILE = "events.jsonl"  # of a run's folder
NO_LOGS = ("requirements", "readme", "license")  # how text files begin that are no logs
# How a last line looks that lost its end: like a statement of a log, without a full stop or unit.
CUT = re.compile(rb"[A-Za-z0-9\[][\w ./+\[-]*[:=_](?!.*(?:[.!)\]}=]|\dm?s)\s*$)")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # what PowerShell's > writes first
MARKS = (*UTF16_MARKS, b"\xef\xbb\xbf")
RULER = b"=" * 100  # what published scripts print around their own source
# Events of which a run has one; two that differ are a contradiction, unless they are of two names.
SINGLE = {"settings", "data", "val_data", "val_counts", "parameters", "reserve", "weights",
          "recurrence", "stopping_early", "peak_memory", "code_size", "code_packed", "collected",
          "artifact", "total_size", "total_unnamed", "total_eval", "ledger", "result"}
# What a run prints before its first step: behind an end it begins another run.
FEW_STEPS = 10
OPENINGS = {"settings", "data", "val_data", "parameters"}
HEADS = {"source", "environment", "config"}


class LogError(ValueError):
    """A log that cannot be read at all; the message names the file, the fault and the remedy."""


class NoSuchLog(LogError):
    """What is named can never become the log of one run, however long one waits."""


class TrainPoint(NamedTuple):
    """One logged step. train_ms: the training clock at its end; tokens: of all ranks so far."""

    step: int
    train_loss: float | None
    train_ms: float | None
    lr_multiplier: float | None
    grad_norm: float | None
    tokens: int | None


class ValPoint(NamedTuple):
    """One validation of the live weights."""

    step: int
    val_loss: float | None
    val_bpb: float | None
    train_ms: float | None
    tokens: int | None


class Score(NamedTuple):
    """A final score: loss in nats per token, bpb, and what it was taken over where logged."""

    loss: float | None
    bpb: float | None
    eval_ms: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    name: str | None = None  # as the log calls it; None where it is the kind's own
    digits: int | None = None  # decimals of bpb in the log; None: all


@dataclass(frozen=True)
class Sizes:
    """Bytes of the artifact, the code and both; `cap` is the limit the run was given.

    Published scripts state no cap: theirs is the challenge's.
    """

    artifact: int | None = None
    code: int | None = None
    total: int | None = None
    cap: int | None = None

    @property
    def margin(self) -> int | None:
        return None if self.total is None or self.cap is None else self.cap - self.total

    @property
    def made(self) -> int | None:
        """What artifact and code are together."""
        return None if self.artifact is None or self.code is None else self.artifact + self.code

    @property
    def fault(self) -> str | None:
        """Why the total that the log states cannot be right, or None."""
        if self.made is None or self.total in (None, self.made):
            return None
        return f"total of {self.total} bytes is not artifact {self.artifact} + code {self.code}"


@dataclass
class Run:
    """What a log says about one run. Settings are text, written as one would type them."""

    path: Path
    system: str  # "ours" or "published"
    run_id: str | None = None
    seed: int | None = None
    config: dict[str, str] = field(default_factory=dict)
    source_sha256: str | None = None
    parameters: int | None = None
    # those that the log states of train_shards, train_tokens, train_sha256, val_tokens, val_bytes
    # and val_sha256
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] | None = None
    train: list[TrainPoint] = field(default_factory=list)
    validations: list[ValPoint] = field(default_factory=list)
    recurrence_step: int | None = None
    steps: int | None = None
    train_ms: float | None = None  # the steps alone
    calibration_seconds: float | None = None  # on training text only: it counts as training
    evaluation_seconds: float | None = None  # where the log states it as a whole
    scores: dict[str, Score] = field(default_factory=dict)  # by kind, in the log's order
    sizes: Sizes = field(default_factory=Sizes)
    ledger: dict[str, float] | None = None
    peak_memory_mib: int | None = None
    verdicts: dict[str, str] = field(default_factory=dict)
    events: dict[str, Event] = field(default_factory=dict)  # the last of each kind, as logged
    complete: bool = False
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what makes its numbers doubtful
    notes: list[str] = field(default_factory=list)

    def bpb(self, kind: str) -> float | None:
        return self.scores[kind].bpb if kind in self.scores else None

    @property
    def final(self) -> str | None:
        """Kind of the score that the run is submitted with, its last stage's; or None."""
        found = [kind for kind in self.scores if kind in FINAL_KINDS and self.bpb(kind) is not None]
        return found[-1] if found else None

    @property
    def batch_tokens(self) -> int | None:
        text = self.config.get("train_batch_tokens", "")
        return int(text) if text.isdigit() else None


def setting_text(value: Any) -> str:
    """Return a setting as one would type it; what different logs print for it becomes equal."""
    value = {"True": True, "False": False, "None": None}.get(value, value) \
        if isinstance(value, str) else value
    text = script().show_value(tuple(value) if isinstance(value, list) else value)
    try:
        return f"{float(text):.15g}"  # 600, 600.0 and 600.000 are one value
    except (ValueError, OverflowError):
        return text


def known(fields: Event | None, name: str) -> Any:
    """Return a finite number of an event, or None."""
    value = (fields or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -1e300 < value < 1e300 else None  # no NaN, and no int beyond floats


def whole(fields: Event | None, name: str) -> int | None:
    value = known(fields, name)
    return int(value) if value is not None and value == int(value) else None


def same(old: Any, new: Any, digits: int | None = None) -> bool:
    """Return whether two statements agree, fractions as far as both are printed.

    digits: the fewer decimals of both; by default told from the numbers, as 4 or 8.
    """
    if isinstance(old, float) and isinstance(new, float):
        if digits is None:
            shorter = min(len(repr(value).partition(".")[2]) for value in (old, new))
            digits = 4 if shorter <= 4 else 8
        return abs(old - new) <= 0.51 * 10.0 ** -digits
    return old == new


def both_settings(earlier: dict[str, str], later: dict[str, str]) -> dict[str, str]:
    """Return the settings of a run whose later stage was started alone: each from its own stage."""
    stages, knobs = list(script().STAGES), script().KNOBS
    first = stages.index(later["stage"]) if later.get("stage") in stages else 0
    own = {name: value for name, value in later.items()
           if name in knobs and knobs[name].metadata["stage"] in stages[first:]}
    return {**later, **earlier, **own}


@dataclass
class Session:
    """The events of one start of a script, series by step."""

    last: dict[str, Event] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    train: dict[int, Event] = field(default_factory=dict)
    validations: dict[int, Event] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    contradictions: dict[str, str] = field(default_factory=dict)  # what -> both statements
    has_head: bool = True  # begins with what a script prints first

    @property
    def began(self) -> bool:
        return bool(self.train or self.validations or {"artifact", "result"} & self.last.keys())

    @property
    def ended(self) -> bool:
        return bool({"stopping_early", "total_size", "result", *FINAL_KINDS} & self.last.keys())

    @property
    def is_new_run(self) -> bool:
        """Whether this trains from its first step on, rather than going on with an earlier one."""
        return self.settings.get("stage") not in ("quantize", "evaluate") \
            and "resumed" not in self.last and (self.has_head or bool(self.train))

    def is_left_by(self, event: Event) -> bool:
        """Return whether an event is another run's, or a later start's of the same run.

        Of two runs that write into one file at once the slower is still warming up when the other
        has made a few steps: that is no new start.
        """
        kind, first = event["event"], whole(event, "step") in (0, 1)
        restart = kind in HEADS or kind == "warmup_step" and first or kind == "settings" and bool(
            self.settings.keys() & event.keys() & {"seed", "world_size"})
        opens = restart or kind in OPENINGS \
            or kind in ("train", "val") and first and not self.contradictions
        return kind in HEADS and self.began or opens and self.ended \
            or restart and max(self.train, default=0) >= FEW_STEPS

    def continued_by(self, later: "Session") -> "Session":
        """Return this session with a later part of the same run behind it."""
        ended = {"failed", "interrupted"}
        before = {kind: event for kind, event in self.last.items() if kind not in ended}
        return Session({**before, **later.last}, both_settings(self.settings, later.settings),
                       {**self.train, **later.train}, {**self.validations, **later.validations},
                       {**self.verdicts, **later.verdicts},
                       {**self.contradictions, **later.contradictions})

    def add(self, event: Event) -> None:
        kind = event["event"]
        if kind in ("train", "val"):
            self.add_point(self.train if kind == "train" else self.validations, event)
        elif kind == "verdict":
            self.verdicts[str(event.get("rule"))] = str(event.get("outcome"))
        elif kind in SCORE_KINDS:
            self.add_score(event)
        elif kind in ("settings", "config"):
            texts = {name: setting_text(value) for name, value in event.items() if name != "event"}
            self.merge("setting", self.settings, texts)
        elif kind in SINGLE and kind in self.last:
            old = self.last[kind]
            if old.get("compressor") == event.get("compressor"):
                self.merge(kind, old, event)
            else:  # of several packed models the last one counts
                self.last[kind] = event
        elif kind.endswith("_began"):
            self.last.setdefault(kind, event)
        else:
            self.last[kind] = event

    def add_score(self, event: Event) -> None:
        """Take in a score as its form says; `last` keeps scores in the order of their stages."""
        kind, form = event["event"], score_form(str(event.get("name") or ""))
        old = self.last.get(kind)
        ahead = [k for k in form.yields_to if k in self.last] if form else []
        if any(agree(self.last[k], event) for k in ahead) or ahead and old \
                and old.get("name") != event.get("name"):
            return  # another stage's value under a wrong name
        if old is None or old.get("name") != event.get("name") and not agree(old, event):
            self.last.pop(kind, None)
            self.last[kind] = event
        elif agree(old, event):
            finer = event if (event.get("digits") or 0) > (old.get("digits") or 0) else old
            numbers: Event = {name: finer[name] for name in ("val_loss", "val_bpb", "digits")
                       if name in finer}
            old.update(dict(event, **dict(old, **numbers)))
        else:
            self.merge(kind, old, {name: v for name, v in event.items() if name != "digits"})
        self.last.pop("crash", None)
        self.last.pop(f"{kind}_began", None)

    def add_point(self, points: dict[int, Event], event: Event) -> None:
        step, name = whole(event, "step"), f"{event['event']}_loss"
        if step is None:
            return
        first = points.setdefault(step, event)
        if first is not event and not same(first.get(name), event.get(name)):
            self.contradictions.setdefault(f"{name} at step {step}",
                                           f"{first.get(name)} and {event.get(name)}")
            points[step] = {**first, name: None, "val_bpb": None}

    def merge(self, what: str, old: dict, new: dict) -> None:
        """Put a second statement into the first; what they disagree on becomes None."""
        for name, value in new.items():
            if name not in old or same(old[name], value):
                digits = len(repr(value)) - len(repr(old.get(name)))
                old[name] = value if digits > 0 or name not in old else old[name]
            else:
                self.contradictions.setdefault(f"{what} {name}", f"{old[name]} and {value}")
                old[name] = None


def agree(a: Event, b: Event) -> bool:
    """Return whether two scores are one, as far as both are printed."""
    digits = [e["digits"] for e in (a, b) if e.get("digits")]
    return all(isinstance(e.get("val_bpb"), float) for e in (a, b)) and all(
        same(a[name], b[name], min(digits, default=8)) for name in ("val_loss", "val_bpb")
        if name in a and name in b)


class SourceText:
    """Collects the lines before the first step, to find the program's own text among them."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.found: dict[int, str] = {}  # bytes of a text -> its sha256
        self.size, self.is_open = 0, True

    def feed(self, raw: bytes) -> None:
        if raw[:1] == b"=" and raw.rstrip() == RULER:
            self.cut()
        else:
            self.lines.append(raw)
            self.size += len(raw)
            self.is_open = self.size < MAX_SOURCE_BYTES  # no program is longer

    def cut(self) -> None:
        """End a text here: note its length and hash (the line's own newline left out)."""
        text = b"".join(self.lines)[:-1]
        self.found[len(text)] = hashlib.sha256(text).hexdigest()
        self.lines, self.size = [], 0


class Collector:
    """Sorts events into sessions and turns them into a Run."""

    def __init__(self) -> None:
        self.sessions, self.texts = [Session()], SourceText()
        self.warnings: list[str] = []

    def add(self, event: Event) -> None:
        if self.sessions[-1].is_left_by(event):
            self.sessions.append(Session(has_head=event["event"] in {*HEADS, "warmup_step"}))
            self.texts.is_open = True
        self.sessions[-1].add(event)
        self.texts.is_open &= not self.sessions[-1].train

    def whole_session(self) -> Session:
        """Return the last training with the later stages that were logged behind it."""
        kept = self.sessions[0]
        for later in self.sessions[1:]:
            if later.is_new_run:
                self.warnings.append("the file holds several runs; this is the last one")
                kept = later
            else:
                kept = kept.continued_by(later)
        if "resumed" in kept.last:
            self.warnings.append("the run was interrupted and resumed")
        return kept

    def run(self, path: Path, system: str) -> Run:
        """Return everything as one Run; raises LogError when no event was of any use."""
        session, run = self.whole_session(), Run(path, system)
        fill_identity(run, session)
        fill_series(run, session)
        fill_scores(run, session)
        fill_end(run, session)
        if run.source_sha256 is None and run.sizes.code is not None:
            # a text as long as the logged code is that code; nothing less shows it to be whole
            run.source_sha256 = self.texts.found.get(run.sizes.code)
        run.warnings += dict.fromkeys(self.warnings)
        run.warnings += [f"{what}: the log says both {said}: lines of several ranks or runs are "
                         "mixed" for what, said in list(session.contradictions.items())[:5]]
        run.missing = missing_of(run)
        return run


def fill_identity(run: Run, session: Session) -> None:
    """Who ran what on which data and machine."""
    last, result = session.last, session.last.get("result", {})
    run.config = {name: text for name, text in session.settings.items() if text is not None}
    seed = run.config.get("seed", "")
    run.seed = int(seed) if seed.lstrip("-").isdigit() else whole(result, "seed")
    run.run_id = run.config.get("run_id") or result.get("run_id")
    run.source_sha256 = last.get("source", {}).get("sha256") or result.get("code_sha256")
    run.parameters = whole(last.get("parameters"), "count")
    run.environment = fields_of(last.get("environment"))
    train, text = last.get("data", {}), last.get("val_counts", {})
    stated = dict(train_shards=train.get("train_shards", run.config.get("train_shards")),
                  train_tokens=train.get("tokens"), train_sha256=train.get("sha256"),
                  val_tokens=text.get("scored_tokens",
                                      last.get("val_data", {}).get("scored_tokens")),
                  val_bytes=text.get("scored_bytes"),
                  val_sha256=text.get("sha256", result.get("val_sha256")))
    run.data = {name: value for name, value in stated.items() if value is not None}
    run.events = last
    run.peak_memory_mib = whole(last.get("peak_memory"), "allocated_mib")
    run.verdicts = session.verdicts


def fields_of(event: Event | None) -> dict[str, Any] | None:
    """Return an event without its name."""
    return {name: v for name, v in event.items() if name != "event"} if event else None


def fill_series(run: Run, session: Session) -> None:
    """Steps, validations, where recurrence starts, and what training took."""
    batch, last = run.batch_tokens, session.last
    stop, result = last.get("stopping_early"), last.get("result", {})
    ledger = result.get("ledger_seconds") or fields_of(last.get("ledger"))
    for step, event in sorted(session.train.items()):
        run.train.append(TrainPoint(
            step, known(event, "train_loss"), train_ms_of(event, batch),
            known(event, "lr_multiplier"), known(event, "grad_norm"),
            step * batch if batch else None))
    run.steps = whole(stop, "step") or whole(result, "steps")
    reached = max([*session.train, *session.validations], default=0)
    iterations = {whole(e, "iterations") for e in session.validations.values()}
    if run.steps is None and reached in iterations:
        run.steps = reached
    run.ledger = {name: value for name in ledger
                  if (value := known(ledger, name)) is not None} \
        if isinstance(ledger, dict) else None
    run.train_ms = known(stop, "train_time_ms")
    if run.ledger and "train" in run.ledger and run.train_ms is None:
        run.train_ms = 1000 * run.ledger["train"]
    times = {0: 0.0, **{point.step: point.train_ms for point in run.train}}
    if run.train_ms is None and run.steps:
        run.train_ms = times.get(run.steps)
    times.setdefault(run.steps or 0, run.train_ms)
    for step, event in sorted(session.validations.items()):
        ms = train_ms_of(event, batch)
        run.validations.append(ValPoint(
            step, known(event, "val_loss"), known(event, "val_bpb"),
            times.get(step) if ms is None else ms, step * batch if batch else None))
    run.recurrence_step = whole(last.get("recurrence"), "step")
    spent = None if "collected_own" in last else known(last.get("collected"), "seconds")
    run.calibration_seconds = (run.ledger or {}).get("calibrate", spent)


def train_ms_of(event: Event, batch_tokens: int | None) -> float | None:
    """Return the training clock of a step, ms.

    PR #1471's lines print minutes to one digit, but also the mean tokens a second from the start:
    with the batch size that gives the clock to seven digits.
    """
    if (seconds := known(event, "train_seconds")) is not None:
        return 1000 * seconds
    rate = known(event, "tokens_per_second")
    if "train_time_ms" not in event and rate and batch_tokens:
        return 1000 * event["step"] * batch_tokens / rate
    return known(event, "train_time_ms")


def fill_scores(run: Run, session: Session) -> None:
    """Scores in the order of their stages, and what the final one took."""
    last = session.last
    for kind, event in last.items():
        exact = known(last.get("result"), f"{kind}_bpb")
        bpb = known(event, "val_bpb") if kind in SCORE_KINDS and kind != "aside" else None
        if bpb is None:
            continue
        digits = whole(event, "digits")
        if exact is not None and same(exact, float(bpb)):
            bpb, digits = exact, None  # the result line has what the score's own line rounds
        run.scores[kind] = Score(
            known(event, "val_loss"), bpb, known(event, "eval_ms"), whole(event, "tokens"),
            whole(event, "bytes"), event.get("name"), digits)
    told = last.get("total_eval")
    run.evaluation_seconds = (run.ledger or {}).get("evaluate", known(told, "seconds"))
    if run.evaluation_seconds is None and (ms := known(told, "eval_ms")) is not None:
        run.evaluation_seconds = ms / 1000
    if run.final in DISPUTED:
        run.notes.append(f"its final score is {run.scores[run.final].name}: whether this kind is "
                         "legal is disputed")


def fill_sizes(run: Run, session: Session) -> None:
    """Bytes of artifact and code, and the total that is made of them.

    Of a code size before and after compression the packed one counts. A total without a name is
    that of the raw weights, unless it is the sum of artifact and code.
    """
    artifact, code, packed, total, unnamed = (
        whole(session.last.get(kind), "bytes") for kind in
        ("artifact", "code_size", "code_packed", "total_size", "total_unnamed"))
    code = code if packed is None else packed
    if total is None and unnamed == Sizes(artifact, code).made:
        total = unnamed
    cap = run.config.get("artifact_max_bytes", "" if run.system == "ours" else str(CAP_BYTES))
    run.sizes = Sizes(artifact, code, total, int(cap) if cap.isdigit() else None)
    run.warnings += [run.sizes.fault] if run.sizes.fault else []


def fill_end(run: Run, session: Session) -> None:
    """Whether the log reached its run's own end.

    Ours end in a result; published ones in a score of the packed model, unless the log says that
    another was to come: by a setting, or by a stage that began and gave none.
    """
    last = session.last
    fill_sizes(run, session)
    if "failed" in last:
        run.warnings.append(f"the run failed: {last['failed'].get('error')}")
    if "crash" in last:
        run.warnings.append("the run ended in a Python error (a traceback behind its last score)")
    if "cut" in last:
        run.warnings.append("the log ends in the middle of a line")
    stopped = {"failed", "interrupted", "crash", "cut"} & last.keys()
    wanted = {kind.removesuffix("_began") for kind in last if kind.endswith("_began")}
    settings = {"sliding": "sliding_window_enabled", "ttt": "ttt_enabled"}
    wanted |= {kind for kind, name in settings.items() if run.config.get(name) == "1"}
    final = run.final and score_form(run.scores[run.final].name or "")
    done = STAGE_ORDER.index(run.final) if run.final in STAGE_ORDER else len(STAGE_ORDER)
    waiting = [kind for kind in wanted - set(run.scores) if STAGE_ORDER.index(kind) > done]
    if waiting and final:
        run.notes.append(f"a {' and a '.join(sorted(waiting))} score was to come")
    run.complete = not stopped and ("result" in last if run.system == "ours" else
                                    bool(final and final.packed) and not waiting)


def missing_of(run: Run) -> list[str]:
    """Name what a reader of the log would look for in vain."""
    stated = {
        "configuration": run.config, "seed": run.seed, "source hash": run.source_sha256,
        "versions and hardware": run.environment, "training data": run.data.get("train_shards"),
        "validation tokens": run.data.get("val_tokens"),
        "validation fingerprint": run.data.get("val_sha256"),
        "training steps": run.steps, "training time": run.train_ms, "loss by step": run.train,
        "validations": run.validations, "pre-quantisation score": run.bpb("prequant"),
        "round-trip score": run.bpb("roundtrip"), "sliding score": run.bpb("sliding"),
        "final score": run.final if run.complete else None,
        "artifact bytes": run.sizes.artifact, "code bytes": run.sizes.code,
        "total bytes": run.sizes.total, "peak memory": run.peak_memory_mib,
        "time ledger": run.ledger}
    return [name for name, value in stated.items() if value is None or value in ({}, [])]


def plain_lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines as UTF-8 bytes; raises LogError when it is empty or no text."""
    with open(path, "rb") as file:
        head = file.read(4096)
        mark = next((mark for mark in MARKS if head.startswith(mark)), b"")
        if not head.removeprefix(mark).strip():
            raise LogError(f"{path}: empty; give the log of a run that was started")
        if mark in UTF16_MARKS:
            file.seek(0)
            text = io.TextIOWrapper(file, encoding="utf-16", errors="replace")
            yield from (line.encode("utf-8", "replace") for line in text)
            return
        if b"\0" in head:
            raise NoSuchLog(f"{path}: no text (it holds NUL bytes); give a .txt or .log file, an "
                            "events.jsonl, or a run's folder; UTF-16 without its mark: convert it")
        file.seek(len(mark))
        yield from file


def read_events(path: Path) -> Run:
    """Read an events.jsonl."""
    collector, kinds, damaged, foreign = Collector(), script().EVENTS, 0, 0
    for count, raw in enumerate(plain_lines(path)):
        if count == MAX_EVENTS:
            collector.warnings.append(f"only the first {MAX_EVENTS:,} lines were read")
            break
        try:
            event = json.loads(raw)
            kind = event["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += bool(raw.strip())
            continue
        if isinstance(kind, str) and kind in kinds:
            collector.add(event)
        else:
            foreign += 1
    if damaged:
        collector.warnings.append(f"{damaged} lines are no JSON event; left out")
    if foreign:
        collector.warnings.append(f"{foreign} events are of kinds this script does not know")
    return collector.run(path, "ours")


def read_text(path: Path) -> Run:
    """Read a text log, published or ours."""
    collector, reader = Collector(), LineReader()
    texts, is_plain = collector.texts, reader.is_plain
    for reader.line_number, raw in enumerate(plain_lines(path), 1):
        event = None
        if is_plain(raw) or len(raw) > MAX_LINE_BYTES:
            if texts.is_open:
                texts.feed(raw)
            continue
        event = reader.read(raw)
        if event and event["event"] == "environment":
            texts.cut()
        elif texts.is_open:
            texts.feed(raw)
        if event:
            collector.add(event)
        if reader.considered >= MAX_EVENTS:
            collector.warnings.append(f"only {MAX_EVENTS:,} lines of a training run were read, up "
                                      f"to line {reader.line_number:,}")
            break
    if not raw.endswith(b"\n") and event is None and CUT.match(raw):
        collector.add({"event": "cut"})
    if not reader.understood:
        raise LogError(f"{path}: none of its {reader.line_number} lines is one that a training "
                       "run prints; give a .txt or .log file, an events.jsonl, or a run's folder")
    collector.warnings += remarks_of(reader)
    return collector.run(path, "ours" if reader.is_ours else "published")


def remarks_of(reader: LineReader) -> list[str]:
    """Return what a reader should know of the lines that gave no event."""
    found = [(reader.spoilt, "damaged lines left out: truncated or interleaved writing"),
             (reader.unread, "lines seem to matter and are in no known form")]
    texts = [f"{len(lines)} {what} (the first is line {lines[0][0]}: {lines[0][1]})"
             for lines, what in found if lines]
    if reader.foreign_ranks:
        texts.append(f"{reader.foreign_ranks} lines of ranks other than 0 left out")
    return texts


def logs_in(folder: Path) -> list[Path]:
    """Return a folder's logs: its events.jsonl, else its logs, else those of logs/ in it."""
    if (events := folder / EVENTS_FILE).is_file():
        return [events]
    for place in (folder, folder / "logs"):
        for pattern in ("*.log", "*.txt"):
            if found := sorted(file for file in place.glob(pattern)
                               if not file.name.lower().startswith(NO_LOGS)):
                return found
    return []


def find_logs(path: Path) -> list[Path]:
    """Return the logs that `path` names: itself, those in it, or those in each folder in it.

    Raises LogError where there is none.
    """
    if not path.exists():
        raise LogError(f"{path}: no such file; give a log, an events.jsonl or a run's folder")
    if not path.is_dir():
        return [path]
    found = logs_in(path) or [log for folder in sorted(path.iterdir()) if folder.is_dir()
                              for log in logs_in(folder)]
    if not found:
        raise LogError(f"{path}: no events.jsonl, .log or .txt in it, its logs/ or the folders in "
                       "it; give a log or a run's folder")
    return found


def find_log(path: Path) -> Path:
    """Return the one log that `path` names."""
    found = find_logs(path)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4])
        raise NoSuchLog(f"{path}: holds {len(found)} logs ({names}...); give one of them")
    return found[0]


def counterpart(path: Path) -> Path:
    """Return where the rest of a run is: of its folder runs/ID the text log logs/ID.txt, and of
    that log the folder.
    """
    root = path.absolute().parent.parent
    return root / "logs" / f"{path.absolute().name}.txt" if path.is_dir() \
        else root / "runs" / path.stem


def read_run(path: str | Path) -> Run:
    """Read one run; raises LogError, with one clear line, when nothing can be read."""
    log = find_log(Path(path))
    try:
        with open(log, "rb") as file:
            is_events = log.suffix == ".jsonl" or file.read(10) == b'{"event": '
        run = read_events(log) if is_events else read_text(log)
    except OSError as error:
        raise LogError(f"{log}: cannot be read ({error.strerror or error})") from error
    if not (run.events or run.train or run.validations or run.config):
        raise LogError(f"{log}: holds no event of a training run; give another file")
    return run
