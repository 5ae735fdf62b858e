"""What a line of a log says: one event (a dict with "event" and fields), whoever printed it.

The lines of our script, which are those of PR #1471's family too, are read by turning the
script's own table `EVENTS` around: each template becomes a pattern. Other published forms stand
below in the same notation, under the kind of event they mean.
"""

import json
import re
from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any, NamedTuple

from product import script

Event = dict[str, Any]
SHORT = "val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}"
EXACT = "val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}"
CLOCK = "train_time:{train_time_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms"
# (kind, template). Sources: PRs #1392 and #1090, and the first baseline, whose lines they keep.
PUBLISHED = (
    ("val", "step:{step}/{iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} " + CLOCK),
    ("train", "step:{step}/{iterations} train_loss:{train_loss:.4f} " + CLOCK),
    ("stopping_early", "stopping_early: wallclock_cap train_time:{train_time_ms:.0f}ms "
                       "step:{step}/{iterations}"),
    ("recurrence", "depth_recurrence:enabled step:{step} layers:{order}"),
    ("prequant", "DIAGNOSTIC post_ema " + SHORT + " eval_time:{eval_ms:.0f}ms"),
    ("data", "train_loader:dataset:{dataset} train_shards:{train_shards}"),
    ("val_data", "val_loader:shards pattern={pattern} tokens:{scored_tokens:.0f}"),
    ("settings", "world_size:{world_size:.0f} grad_accum_steps:{grad_accum_steps:.0f}"),
    ("settings", "attention_mode:{attention_mode} num_heads:{num_heads:.0f} "
                 "num_kv_heads:{num_kv_heads:.0f}"),
    ("settings", "tie_embeddings:{tie_embeddings} embed_lr:{embed_lr:g} head_lr:{head_lr:g} "
                 "matrix_lr:{matrix_lr:g} scalar_lr:{scalar_lr:g}"),
    ("settings", "train_batch_tokens:{train_batch_tokens:.0f} train_seq_len:{train_seq_len:.0f} "
                 "iterations:{iterations:.0f} warmup_steps:{warmup_steps:.0f} "
                 "max_wallclock_seconds:{max_wallclock_seconds:.3f}"),
    ("settings", "seed:{seed:.0f}"),
    ("averaging", "swa:start step:{step}"),
    ("averaging", "SWA: started at step {step} (warmdown_start~{warmdown_start})"),
    ("ema", "SWA: applied"),
    ("ema", "lawa:applying LAWA averaging k={k}"),
    ("collected_own", "gptq:generated {sequences} sequences in {seconds:.1f}s"),
    ("collected_own", "gptq:collected hessians for {hessians} layers (AR self-gen)"),
    ("pruned", "selective_prune: pruning {pruned}/{candidates} {what}"),
    ("artifact", "Serialized model {compressor}: {bytes:.0f} bytes"),
    ("artifact", "Serialized model {compressor}: {bytes:.0f} bytes (payload:{payload})"),
    ("total_size", "Total submission size {compressor}: {bytes:.0f} bytes"),
    ("total_size", "Total mixed submission: {bytes:.0f} bytes ({fits})"),
    *(("score", start + tail + end) for start in ("final_{name} ", "legal_{name} ")
      for tail in (SHORT, EXACT) for end in (" {how}:{eval_ms:.0f}ms", "")),
)
# Which event of ours a published score's name means; the first that its name contains.
SCORE_KINDS = {"sliding": "sliding", "ttt": "ttt", "slot": "slot", "roundtrip": "roundtrip"}
# Kinds whose text is no line of fields: LineReader knows them by their first line.
BLOCKS = ("source", "environment", "config")
# Whose log it is, by the start of a line that only this system prints; the first that was seen.
SYSTEM_MARKS = (
    ("preflight: ", "ours"), ("ledger: ", "ours"), ("verdict: ", "ours"), ("RESULT ", "ours"),
    ("DIAGNOSTIC post_ema ", "#1392"), ("depth_recurrence:enabled ", "#1392"),
    ("gptq:generated ", "#1392"), ("Total mixed submission", "#1090"), ("SWA: started", "#1090"),
    ("pre-quantization post-ema ", "#1471 family"), ("recurrence:activated ", "#1471 family"),
    ("Hyperparameters:", "#1471 family"), ("step:", "baseline family"))
# A line that starts like one with a number the reader needs; unless a form fits, it is damaged.
SPOILT = re.compile(r"(?:step:)?\d+/\d+ (?:train|val)_loss:|final_\w+ val_loss|Code size: |"
                    r"Serialized model|Total submission|pre-quantization |stopping_early: ")
NUMBER = r"(-?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|inf)|nan)"
RANK_TAG = re.compile(rb"\[(?:rank|default)?(\d+)\]: ?")
SETTING = re.compile(r"  ([a-z][a-z0-9_]*): ?(.*)")
# Fields printed without a format are one word or a list, so that the halves of two lines broken
# into each other are not read as one; but for these.
WORDS = {"outcome": "(ok|OVER THE LIMIT)", **dict.fromkeys(
    ("text", "error", "rule", "path", "pattern", "dataset", "compressor", "what", "how", "payload"),
    "(.+?)")}


class Form(NamedTuple):
    """One readable line: its kind, literal start, whole pattern, and a reader per field.

    open_ended: a part of such a line can look like a whole one.
    """

    kind: str
    prefix: str
    pattern: re.Pattern
    fields: tuple[tuple[str, Callable[[str], Any]], ...]
    open_ended: bool


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def number_form(spec: str) -> tuple[str, Callable[[str], Any]]:
    """Return pattern and reader of a number printed as `spec` says: ".4f" has four decimals."""
    decimals = re.fullmatch(r"\.([1-9])f", spec)
    if decimals:
        return rf"(-?(?:\d+\.\d{{{decimals[1]}}}|inf)|nan)", float
    return NUMBER, number


def literal(text: str) -> Any:
    """Return a field printed without a format: a number, a list of numbers, else the text."""
    try:
        return number(text)
    except ValueError:
        return json.loads(text) if re.fullmatch(r"\[[\d, ]*\]", text) else text


def spans(text: str) -> dict[str, float]:
    """Return {"train": 590.0} of "train=590.0s"; raises ValueError on anything else."""
    pairs = [part.partition("=") for part in text.split()]
    if not all(equals and seconds.endswith("s") for _, equals, seconds in pairs):
        raise ValueError(f"not a list of name=seconds: {text[:60]}")
    return {name: float(seconds[:-1]) for name, _, seconds in pairs}


def assignments(text: str) -> dict[str, dict[str, str]]:
    """Return the overrides line's NAME=value pairs as that event's `values`."""
    pairs = re.findall(r"(?:^| )([A-Z][A-Z0-9_]*)=(.*?)(?= [A-Z][A-Z0-9_]*=|$)", text)
    return {"values": {name.lower(): value for name, value in pairs}}


# Fields that hold a whole event's fields as text.
WHOLE_TEXTS: dict[str, Callable[[str], dict]] = {
    "text_spans": spans, "text_json": json.loads, "text_values": assignments}


def form_of(kind: str, template: str) -> Form:
    """Return the pattern that reads back what `template` (a str.format one) printed."""
    pattern, fields = "", list[tuple[str, Callable[[str], Any]]]()
    for text, name, spec, _ in Formatter().parse(template):
        pattern += re.escape(text)
        if name:
            free = "(.*)" if name.startswith("text_") else r"(\S+|\[[\d, ]*\])"
            words = WORDS.get(name, free), WHOLE_TEXTS.get(name, literal)
            part, reader = number_form(spec) if spec else words
            pattern += part
            fields.append((name, reader))
    prefix = template.split("{")[0]
    open_ended = template.endswith("}") and not re.search(r"\.[1-9]f}$", template)
    return Form(kind, prefix, re.compile(pattern), tuple(fields), open_ended)


def table() -> dict[str, list[Form]]:
    """Return all forms by the first character of their line; digits stand under "0"."""
    own = [(kind, template) for kind, template in script().EVENTS.items()
           if template and kind not in BLOCKS]
    by_start: dict[str, list[Form]] = {}
    for kind, template in (*own, *PUBLISHED):
        form = form_of(kind, template)
        by_start.setdefault(form.prefix[:1] or "0", []).append(form)
    return by_start


def gate(prefixes: Iterable[str]) -> tuple[frozenset[bytes], Callable[[bytes], object]]:
    """Return two tests that let through every line worth a closer look, and few others.

    The first is the set of those lines' first two bytes; the second, slower one sees more.
    """
    words = {"Hyperparameters:", '{"device": ', *(prefix[:12] for prefix in prefixes if prefix)}
    digits = "0123456789"
    heads = {*(word[:2] for word in words), "\x1b[", "\r\x1b", "[r", "[d",
             *(a + b for a in "[" + digits for b in digits + "/" if a + b != "[/")}
    special = (r"\d+/\d+ (?:train|val)_", r"\r?\x1b\[K", RANK_TAG.pattern.decode())
    pattern = "|".join((*map(re.escape, sorted(words)), *special))
    return frozenset(head.encode() for head in heads), re.compile(pattern.encode()).match


class LineReader:
    """Turns lines of a text log into events; an object, since a settings block spans lines.

    `heads` holds the first two bytes of every line that can matter outside a settings block, for
    callers with much to read. `spoilt` counts lines that begin like a known one but do not go on
    like it; `foreign_ranks` those that a launcher tagged with a rank other than 0.
    """

    def __init__(self) -> None:
        self.forms = table()
        self.heads, self.gate = gate(f.prefix for forms in self.forms.values() for f in forms)
        self.spoilt, self.first_spoilt, self.foreign_ranks = 0, 0, 0
        self.in_settings, self.line_number, self.considered = False, 0, 0
        self.seen: set[str] = set()  # literal starts of the lines understood

    def read(self, raw: bytes) -> Event | None:
        """Return the event that a line tells, or None."""
        if not self.in_settings and not self.gate(raw):
            return None
        if b"\x1b[K" in raw:  # a progress display shared the console
            raw = raw.rpartition(b"\x1b[K")[2]
        if tag := RANK_TAG.match(raw):
            if int(tag[1]):
                self.foreign_ranks += 1
                return None
            raw = raw[tag.end():]
        self.considered += 1
        return self.read_text(raw.decode("utf-8", "replace").rstrip(), raw.endswith(b"\n"))

    def read_text(self, line: str, ended: bool) -> Event | None:
        """Return a line's event; one that was not `ended` may have lost its last characters."""
        if self.in_settings:
            if ended and (setting := SETTING.fullmatch(line)):
                return {"event": "settings", setting[1]: setting[2]}
            self.in_settings = False
        if line == "Hyperparameters:":
            self.in_settings = True
            self.seen.add(line)
            return {"event": "config"}
        if line.startswith('{"device": '):
            return self.whole("environment", json.loads, line)
        start = "0" if line[:1].isdigit() else line[:1]
        for form in self.forms.get(start, ()):
            if line.startswith(form.prefix) and (ended or not form.open_ended) \
                    and (found := form.pattern.fullmatch(line)):
                return self.event_of(form, found.groups())
        if SPOILT.match(line):
            self.count_spoilt()
        return None

    @property
    def system(self) -> str:
        """Return whose log the lines so far are of."""
        named = [system for mark, system in SYSTEM_MARKS
                 if any(start.startswith(mark) for start in self.seen)]
        return named[0] if named else "unknown"

    def event_of(self, form: Form, values: tuple[str, ...]) -> Event | None:
        event: Event = {"event": form.kind}
        self.seen.add(form.prefix)
        for (name, convert), text in zip(form.fields, values):
            if name in WHOLE_TEXTS:
                return self.whole(form.kind, convert, text)
            event[name] = convert(text)
        if form.kind == "score":
            name = str(event["name"])
            kinds = [kind for part, kind in SCORE_KINDS.items() if part in name]
            event.update(event=kinds[0] if kinds else "score", name=name.removesuffix("_exact"))
        elif form.prefix.startswith("final_"):
            event["name"] = form.prefix.split()[0].removeprefix("final_")
        return event

    def whole(self, kind: str, convert: Callable[[str], Any], text: str) -> Event | None:
        """Return an event all of whose fields are one text, or count the line as spoilt."""
        try:
            fields = convert(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            self.count_spoilt()
            return None
        return {"event": kind, **fields}

    def count_spoilt(self) -> None:
        self.spoilt += 1
        self.first_spoilt = self.first_spoilt or self.line_number
