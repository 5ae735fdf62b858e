"""What a line of a log says: one event (a dict with "event" and fields), whoever printed it.

The lines of our script, which are those of PR #1471's family too, are read by turning the
script's own table `EVENTS` around: each template becomes a pattern. LINES holds the other published
forms in the same notation, SCORES what the name of a final score means. A ":" before a field also
stands for ": " and "="; fields that follow the known ones are passed over, but for those that
EXTRAS names.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any, NamedTuple

from product import script

Event = dict[str, Any]
# (kind, template). "{rest}" is anything.
LINES = (
    ("val", "step:{step}/{iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}"),
    ("train", "step:{step}/{iterations} train_loss:{train_loss:.4f}"),
    ("train", "step:{step}/{iterations} loss:{train_loss:.4f}"),
    ("recurrence", "depth_recurrence:enabled step:{step:.0f}{rest}"),
    ("recurrence", "layer_loop:enabled step:{step:.0f}{rest}"),
    ("recurrence", "looping:enabled step:{step:.0f}{rest}"),
    ("recurrence", "recurrence:activated at step {step} virtual_layers={order}"),
    ("data", "train_loader:dataset:{dataset} train_shards:{train_shards}"),
    ("val_data", "val_loader:shards pattern={pattern} tokens:{scored_tokens:.0f}"),
    *(("settings", f"{first}:{{text_pairs}}") for first in (
        "seed", "world_size", "attention_mode", "tie_embeddings", "train_batch_tokens",
        "iterations")),
    ("peak_memory", "peak memory:{allocated_mib} MiB"),
    ("averaging", "swa:start step:{step}"),
    ("averaging", "SWA: started at step {step} {rest}"),
    ("collecting", "gptq:calibrating with {batches} batches (training data){rest}"),
    ("collecting", "gptq:calibrating with {batches} batches (train data){rest}"),
    ("collected", "gptq:calibrated {hessians} layers in {seconds:.1f}s"),
    ("collected_own", "gptq:generating autoregressive calibration data {rest}"),
    ("weights", "Serialized model (raw): {bytes:.0f} bytes"),
    ("artifact", "Serialized {compressor}: {bytes:.0f} bytes"),
    ("artifact", "serialized_model_{compressor}:{bytes:.0f} bytes"),
    ("code_packed", "Code size (compressed): {bytes:.0f} bytes"),
    ("code_readable", "Code size (uncompressed): {bytes:.0f} bytes"),
    ("total_unnamed", "Total submission size: {bytes:.0f} bytes"),
    ("total_size", "Total submission size {compressor}: {bytes:.0f} bytes"),
    ("total_size", "Total submission {compressor}: {bytes:.0f} bytes"),
    ("total_size", "Total mixed submission: {bytes:.0f} bytes"),
    ("total_eval", "total_eval_time:{seconds:.1f}s"),
    ("total_eval", "total_eval_time:{eval_ms:.0f}ms"),
    *((f"{kind}_began", start + "{rest}") for kind, start in (
        ("ttt", "ttt_sliding:start "), ("ttt", "ttt_phased: "), ("ttt", "ttt_lora:"),
        ("ttt", "ttt:start"), ("ttt", "ttp: "), ("ttt", "ttpp: "), ("ttt", "ttt_chunk ["),
        ("ttt", "ttt_progress: "), ("ttt", "Running LoRA TTT eval"), ("slot", "slot_sliding:start"),
        ("ngram", "ngram_eval:chunk "), ("ngram", "ngram_eval ["), ("sliding", "sliding_eval ["))),
    ("crash", "Traceback (most recent call last):"),
)


class ScoreForm(NamedTuple):
    """What a score's name says.

    name: pattern of the whole name, small letters, without `_exact`. packed: it is of the packed
    model, so that the run's last one of this kind is its final score. yields_to: where one of
    these kinds was seen, it does not overwrite an earlier score of its own kind.
    """

    name: str
    kind: str
    packed: bool = True
    yields_to: tuple[str, ...] = ()


LATER = ("sliding", "ttt", "slot", "ngram", "other")  # what may follow a round trip
SCORES = (  # the first that fits
    ScoreForm("(diagnostic )?pre-quantization post-ema|diagnostic post_ema", "prequant", False),
    ScoreForm("pre-quantization sliding_window", "prequant_sliding", False),
    ScoreForm("post-prequant-ttt|pre-quantization .*ttt.*", "ttt", False),
    # of other averages or of a part: told by nobody as the run's score
    ScoreForm("diagnostic post_swa|raw model|(ema|swa|lawa)_eval|best_averaging:.*|"
              "using .* weights|neural_only.*|prequant_ttt:.*|.*_progress.*", "aside", False),
    ScoreForm(".*slot.*", "slot"), ScoreForm(".*ngram.*", "ngram"), ScoreForm(".*ttt.*", "ttt"),
    ScoreForm(".*stream.*", "stream", False), ScoreForm(".*sliding.*|.*_sw", "sliding"),
    ScoreForm("(diagnostic )?quantized|.*roundtrip.*|final_.*_standard", "roundtrip", True, LATER),
    ScoreForm("(storage_pass_)?final.*", "other"))
FINAL_KINDS = tuple(dict.fromkeys(form.kind for form in SCORES if form.packed))
DISPUTED = ("slot", "ngram")  # whose legality is in dispute
# Fields behind a form's own that count: by kind of event, name -> field, a time in ms.
TIMES = {"ms": 1.0, "s": 1000.0, "m": 60_000.0}
EVALUATION = dict.fromkeys(("eval_time", "time", "eval", "elapsed", "t"), "eval_ms")
CLOCKED = dict.fromkeys(("train_time", "t"), "train_time_ms")
EXTRAS = {"train": CLOCKED, "val": CLOCKED}
# Kinds whose text is no line of fields: LineReader knows them by their first line.
BLOCKS = ("source", "environment", "config")
OURS = ("preflight", "ledger", "verdict", "result")  # kinds that only our script prints
NUMBER = r"(-?(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|inf)|nan)"
FRACTION = r"(-?(?:\d+\.\d+|inf)|nan)"
# One more field behind the known ones (a second line broken into this one is none); a remark.
EXTRA = re.compile(r" \(?(?!step[: ]|train_loss|val_)([A-Za-z][\w/]*)[:=] ?([^\s:=]+)")
MORE = "((?:" + EXTRA.pattern.replace("([", "(?:[") + r")*)(?: \([^()]*\))?"
ANY_SCORE = re.compile(
    r"(?:([A-Za-z][\w.+()/: -]{0,60}?)[: ]+\(?)?"
    rf"(?:val_loss[:=] ?{FRACTION} )?val_bpb[:=] ?{FRACTION}\)?{MORE}")
HAS_SCORE = re.compile(r"val_bpb[:=] ?\d+\.\d")
# What starts like a line that the reader needs; a second one in a line was broken into it.
KNOWN_START = re.compile(
    r"(?:step:)?\d+/\d+ (?:train|val)_loss:|final_\w+ val_loss|Code size: |Serialized model|"
    r"Total submission|pre-quantization post|stopping_early: ")
RANK_TAG = re.compile(rb"\[(?:rank|default)?(\d+)\]: ?")
DAYTIME = r"\d\d:\d\d:\d\d(?:[.,]\d+)?"
STAMP = re.compile((
    rf"(?:\[?\d{{4}}-\d\d-\d\d[T ]{DAYTIME}(?:Z|[+-]\d\d:?\d\d)?\]?|\[{DAYTIME}\]|{DAYTIME}|"
    r"\d{9,10}\.\d+)(?: -)?(?: \[?INFO\]?:?(?: -)?)? ").encode())
SETTING = re.compile(r"  ([a-z][a-z0-9_]*): ?(.*)")
# Fields printed without a format are one word or a list, so that the halves of two lines broken
# into each other are not read as one; but for these.
WORDS = {"outcome": "(ok|OVER THE LIMIT)", "rest": "(.*)", **dict.fromkeys(
    ("text", "error", "rule", "path", "pattern", "dataset", "compressor"), "(.+?)")}


class Form(NamedTuple):
    """One readable line: its kind, literal start, whole pattern, and a reader per field.

    ends: what its last field is, "text", "fraction" or "" for one that is followed by a unit: of
    the last line of a truncated log only the latter is sure to be whole.
    """

    kind: str
    prefix: str
    pattern: re.Pattern
    fields: tuple[tuple[str, Callable[[str], Any]], ...]
    ends: str


def number(text: str) -> int | float:
    text = text.replace(",", "")
    try:
        return int(text)
    except ValueError:
        return float(text)


def number_form(spec: str) -> tuple[str, Callable[[str], Any]]:
    """Return pattern and reader of a number printed as `spec` says: ".4f" has a fraction."""
    return (FRACTION, float) if re.fullmatch(r"\.[1-9]f", spec) else (NUMBER, number)


def literal(text: str) -> Any:
    """Return a field printed without a format: a number, a list of numbers, else the text."""
    try:
        return number(text)
    except ValueError:
        return json.loads(text) if re.fullmatch(r"\[[\d, ]*\]", text) else text


def spans(text: str) -> dict[str, float]:
    """Return {"train": 590.0} of "train=590.0s"; raises ValueError on anything else."""
    found = [part.partition("=") for part in text.split()]
    if not all(equals and seconds.endswith("s") for _, equals, seconds in found):
        raise ValueError(f"not a list of name=seconds: {text[:60]}")
    return {name: float(seconds[:-1]) for name, _, seconds in found}


def assignments(text: str) -> dict[str, dict[str, str]]:
    """Return the overrides line's NAME=value pairs as that event's `values`."""
    found = re.findall(r"(?:^| )([A-Z][A-Z0-9_]*)=(.*?)(?= [A-Z][A-Z0-9_]*=|$)", text)
    return {"values": {name.lower(): value for name, value in found}}


def pairs(text: str) -> dict[str, str]:
    """Return {"seed": "42"} of "seed:42"."""
    return dict(part.split(":") for part in text.split())  # type: ignore[misc]


# Fields that hold a whole event's fields as text.
WHOLE_TEXTS: dict[str, Callable[[str], dict]] = {
    "text_spans": spans, "text_json": json.loads, "text_values": assignments, "text_pairs": pairs}


def form_of(kind: str, template: str) -> Form:
    """Return the pattern that reads back what `template` (a str.format one) printed."""
    pattern, fields, ends = "", list[tuple[str, Callable[[str], Any]]](), ""
    for text, name, spec, _ in Formatter().parse(template):
        text, ends = re.escape(text), ""
        if name == "text_pairs":
            pattern = rf"({text}[^\s:]+(?: [a-z]\w*:[^\s:]+)*)"
        elif name:
            free = "(.*)" if name.startswith("text_") else r"(\S+|\[[\d, ]*\])"
            pattern += re.sub(r":(?:\\ )?$", "[:=] ?", text)
            pattern += number_form(spec)[0] if spec else WORDS.get(name, free)
        else:
            pattern += text
        if name:
            reader = number_form(spec)[1] if spec else WHOLE_TEXTS.get(name, literal)
            fields.append((name, reader))
            ends = "fraction" if reader is float else "free" if name in WORDS else "text"
    pattern += MORE if ends != "free" and "text_" not in template else ""
    prefix = template.split("{")[0].rstrip(": ")
    ends = "text" if ends == "free" else ends
    return Form(kind, prefix, re.compile(pattern), tuple(fields), ends)


@functools.cache
def table() -> dict[str, list[Form]]:
    """Return all forms but the scores' by the first character of their line; digits under "0"."""
    scores = {form.kind for form in SCORES}
    own = [(kind, template) for kind, template in script().EVENTS.items()
           if template and kind not in (*BLOCKS, *scores)]
    by_start: dict[str, list[Form]] = {}
    for kind, template in (*own, *LINES):
        form = form_of(kind, template)
        by_start.setdefault(form.prefix[:1] or "0", []).append(form)
    return by_start


@functools.cache
def gate() -> tuple[frozenset[bytes], Callable[[bytes], object]]:
    """Return two tests that let through every line worth a closer look, and few others.

    The first is the set of those lines' first two bytes; the second, slower one sees more.
    """
    prefixes = [form.prefix for forms in table().values() for form in forms]
    words = {"Hyperparameters:", '{"device": ', *(prefix[:12] for prefix in prefixes if prefix)}
    digits = "0123456789"
    heads = {*(word[:2] for word in words), "\x1b[", "\r\x1b", "[r", "[d",
             *(a + b for a in "[" + digits for b in digits + "/" if a + b != "[/")}
    special = (r"\d+/\d+ (?:train|val)_", r"\r?\x1b\[K", RANK_TAG.pattern.decode())
    pattern = "|".join((*map(re.escape, sorted(words)), *special))
    return frozenset(head.encode() for head in heads), re.compile(pattern.encode()).match


@functools.cache
def score_form(name: str) -> ScoreForm | None:
    """Return what a score's name means, or None where nobody knows."""
    plain = name.lower().removesuffix("_exact")
    return next((form for form in SCORES if re.fullmatch(form.name, plain)), None)


def decimals(text: str | None) -> int:
    return len((text or "").partition(".")[2])


class LineReader:
    """Turns lines of a text log into events; an object, since a settings block spans lines.

    `spoilt` holds lines that were broken into each other, `unread` those that seem to say
    something the reader should know, as (line number, text); `foreign_ranks` counts those that a
    launcher tagged with a rank other than 0.
    """

    def __init__(self) -> None:
        self.forms, (self.heads, self.gate) = table(), gate()
        self.spoilt, self.unread = list[tuple[int, str]](), list[tuple[int, str]]()
        self.in_settings, self.has_steps, self.is_ours = False, False, False
        self.foreign_ranks, self.line_number, self.considered, self.understood = 0, 0, 0, 0

    def is_plain(self, raw: bytes) -> bool:
        """Return whether a line can be passed over; quick, for callers with much to read."""
        return raw[:2] not in self.heads and not self.in_settings and b"val_bpb" not in raw

    def read(self, raw: bytes) -> Event | None:
        """Return the event that a line tells, or None."""
        bare = unstamped(raw)
        if bare is not raw and self.is_plain(bare) \
                or not (self.in_settings or b"val_bpb" in bare or self.gate(bare)):
            return None
        raw = bare
        if b"\x1b[K" in raw:  # a progress display shared the console
            raw = raw.rpartition(b"\x1b[K")[2]
        if tag := RANK_TAG.match(raw):
            if int(tag[1]):
                self.foreign_ranks += 1
                return None
            raw = unstamped(raw[tag.end():])
        if not (self.in_settings or b"val_bpb" in raw or self.gate(raw)):
            return None
        self.considered += 1
        event = self.read_text(raw.decode("utf-8", "replace").rstrip(), raw.endswith(b"\n"))
        if event:
            self.understood += 1
            self.has_steps |= event["event"] in ("train", "val")
        return event

    def read_text(self, line: str, ended: bool) -> Event | None:
        """Return a line's event; one that was not `ended` may have lost its last characters."""
        if self.in_settings:
            if ended and (setting := SETTING.fullmatch(line)):
                return {"event": "settings", setting[1]: setting[2]}
            self.in_settings = False
        if line == "Hyperparameters:":
            self.in_settings = True
            return {"event": "config"}
        if line.startswith('{"device": '):
            return self.whole("environment", json.loads, line)
        start = "0" if line[:1].isdigit() else line[:1]
        for form in self.forms.get(start, ()):
            if line.startswith(form.prefix) and (found := form.pattern.fullmatch(line)) \
                    and (ended or is_whole(line, form.ends, found.groups())):
                return self.event_of(form, found.groups())
        event = self.read_score(line, ended) if "val_bpb" in line else None
        if event is None:
            self.note(line, ended)
        return event

    def event_of(self, form: Form, values: tuple[str, ...]) -> Event | None:
        event: Event = {"event": form.kind}
        self.is_ours |= form.kind in OURS
        for (name, convert), text in zip(form.fields, values):
            if name in WHOLE_TEXTS:
                return self.whole(form.kind, convert, text)
            if name != "rest":
                event[name] = convert(text)
        return {**event, **extras(EXTRAS.get(form.kind, {}), values[-1] or "")}

    def read_score(self, line: str, ended: bool) -> Event | None:
        """Return the event of a score's line; two ranks may have printed it into one."""
        at = line.find(line.split(" ")[0], 1)
        parts = [line[:at], line[at:]] if at > 0 else [line]
        found = [match for part in parts if (match := ANY_SCORE.fullmatch(part.strip()))]
        form = score_form(found[0][1] or "") if found else None
        values = {match.group(2, 3) for match in found}
        if form is None or len(found) < len(parts) or len(values) > 1 \
                or not (ended or is_whole(line, "fraction", values.pop())):
            return None
        name, loss, bpb, more = found[0].groups()
        event: Event = {"event": form.kind, "name": name.removesuffix("_exact"),
                        "digits": decimals(bpb), "val_bpb": float(bpb)}
        event.update({"val_loss": float(loss)} if loss else {}, **extras(EVALUATION, more))
        return event

    def whole(self, kind: str, convert: Callable[[str], Any], text: str) -> Event | None:
        """Return an event all of whose fields are one text, or note the line as spoilt."""
        try:
            fields = convert(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            self.spoilt.append((self.line_number, text[:60]))
            return None
        return {"event": kind, **fields}

    def note(self, line: str, ended: bool) -> None:
        """Remember a line that no form fits, if it seems to matter.

        Before the first step a log may hold its program's text, where anything stands.
        """
        if not self.has_steps:
            return
        starts = [match.start() for match in KNOWN_START.finditer(line)]
        if len(starts) > 1 or starts and (starts[0] or not ended):
            self.spoilt.append((self.line_number, line[:60]))
        elif starts or HAS_SCORE.search(line):
            self.unread.append((self.line_number, line[:60]))


def unstamped(raw: bytes) -> bytes:
    """Return a line without the time that stands in front of it."""
    stamp = STAMP.match(raw)
    return raw[stamp.end():] if stamp else raw


def is_whole(line: str, ends: str, values: Iterable[str | None]) -> bool:
    """Return whether a line that lacks its end of line can have lost nothing."""
    if line.endswith(("s", ")")):  # a unit, a bracket
        return ends != "text"
    fractions = [value for value in values if value and re.fullmatch(FRACTION, value)]
    return ends == "" or ends == "fraction" and len(fractions) > 1 \
        and len(set(map(decimals, fractions))) == 1 and line.endswith(fractions[-1])


def extras(wanted: dict[str, str], more: str) -> Event:
    """Return those fields behind a form's own that count, times in ms."""
    found: Event = {}
    for name, text in EXTRA.findall(more) if wanted else ():
        timed = re.fullmatch(r"([\d.]+)(ms|s|m)\)?", text)
        if name in wanted and timed:
            found[wanted[name]] = number(timed[1]) * TIMES[timed[2]]
    return found
