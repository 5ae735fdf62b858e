"""Laws of the container, the atomic writer, the clock, the pacer, the log and the ranks."""

import ast
import contextlib
import hashlib
import json
import lzma
import os
import random
import re
import socket
import string
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import brotli
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import CODECS, DTYPES, EVENTS, Clock, ContainerError, Log, Pacer

REPO = Path(train_gpt.__file__).parent


# ---- container ---------------------------------------------------------------------------------


def bits_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits_of(found[name]), bits_of(tensor)), name


def sample_tensors():
    """Return tensors of every dtype and of awkward shapes and contents."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (20 * torch.randn(3, 5, generator=generator)).to(dtype)
               for name, dtype in DTYPES.items()}
    strange = torch.tensor([0x7FC00001, -0x800000, -2**31, 1], dtype=torch.int32)
    return tensors | {
        "a scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "": torch.zeros(1, 1, 1),
        "transposed, ▁ in its name": torch.arange(6.0).reshape(2, 3).T,
        "nan, infinity, -0, subnormal": strange.view(torch.float32),
        "trained": torch.nn.Parameter(torch.ones(2, 2))}


@pytest.mark.parametrize("codec", CODECS)
def test_container_gives_back_header_and_tensors_bit_by_bit(codec, tmp_path):
    tensors, path = sample_tensors(), tmp_path / "new folder" / "file"
    header = dict(kind="x", config=dict(seed=1, ve_layers=[9, 10], rate=0.1), text="ü▁")
    size = train_gpt.write_file(path, train_gpt.pack_tensors(header, tensors, codec))
    assert size == path.stat().st_size
    found_header, found = train_gpt.read_tensors(path, "x")
    assert {name: found_header[name] for name in header} == header
    assert_same_tensors(found, tensors)
    found["float32"].add_(1)  # its own writable memory


@given(st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
                max_size=5), st.sampled_from(CODECS), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_any_shapes_and_bytes_survive_the_container(kinds, codec, seed):
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for i, (dtype, shape) in enumerate(kinds):
        raw = torch.randint(0, 256, (*shape, DTYPES[dtype].itemsize), generator=generator)
        tensors[f"t{i}"] = raw.to(torch.uint8).view(DTYPES[dtype]).reshape(shape)
    data = train_gpt.pack_tensors({"kind": "x"}, tensors, codec)
    assert_same_tensors(train_gpt.open_container(data, "x", "file")[1], tensors)


@pytest.mark.parametrize("codec", CODECS)
def test_same_arguments_give_the_same_bytes(codec):
    first = train_gpt.pack_tensors(dict(a=1, b=2), sample_tensors(), codec)
    assert train_gpt.pack_tensors(dict(b=2, a=1), sample_tensors(), codec) == first


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_and_every_truncation_is_noticed(codec):
    tensors = {"w": torch.arange(12, dtype=torch.int8), "s": torch.ones(2)}
    data, rng = train_gpt.pack_tensors({"kind": "x"}, tensors, codec), random.Random(0)
    train_gpt.unpack_tensors(data, "file")
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), data[:at], data + data[:at + 1]):
            with pytest.raises(ContainerError, match="file: "):
                train_gpt.unpack_tensors(damaged, "file")


def hostile(header, body=b"", head=None, head_bytes=None) -> bytes:
    """Return a container with any header and a correct checksum."""
    head = zlib.compress(json.dumps(header).encode()) if head is None else head
    length = struct.pack("<I", len(head) if head_bytes is None else head_bytes)
    data = train_gpt.MAGIC + length + head + body
    return data + hashlib.sha256(data).digest()


def assert_refused_in_memory(data: bytes, most_bytes: int):
    """Require a ContainerError while the interpreter's own memory grows by so much at most."""
    tracemalloc.start()
    try:
        with pytest.raises(ContainerError):
            train_gpt.unpack_tensors(data, "file")
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


def table(*entries, codec="raw", **more):
    return {"codec": codec, "tensors": list(entries), **more}


HOSTILE_HEADERS = {
    "negative size": table(["w", "int8", [-1], 4]),
    "two negatives": table(["w", "int8", [-2, -2], 4]),
    "huge": table(["w", "int8", [2**40], 4]), "overflow": table(["w", "int8", [2**32, 2**32], 4]),
    "huge and empty": table(["w", "int8", [0, 10**30], 0]),
    "fraction": table(["w", "int8", [4.0], 4]),
    "true": table(["w", "int8", [True, 4], 4]), "shape is text": table(["w", "int8", "4", 4]),
    "shape is nested": table(["w", "int8", [[4]], 4]), "no shape": table(["w", "int8", None, 4]),
    "negative span": table(["w", "int8", [4], -4]),
    "span past the end": table(["w", "int8", [9], 9]),
    "span is text": table(["w", "int8", [4], "4"]), "span is true": table(["w", "int8", [1], True]),
    "spans go back": table(["v", "int8", [4], 4], ["w", "int8", [4], -4], ["x", "int8", [4], 4]),
    "too short": table(["w", "int8", [3], 4]), "too long": table(["w", "float32", [2], 4]),
    "bytes left over": table(["w", "int8", [3], 3]), "no tensors": table(),
    "unknown type": table(["w", "object", [4], 4]),
    "type is a list": table(["w", ["int8"], [4], 4]),
    "name twice": table(["w", "int8", [2], 2], ["w", "int8", [2], 2]),
    "name is a number": table([1, "int8", [4], 4]), "short entry": table(["w", "int8", [4]]),
    "entry is a number": table(7), "table is a number": {"codec": "raw", "tensors": 7},
    "no table": {"codec": "raw"}, "no codec": {"tensors": [["w", "int8", [4], 4]]},
    "unknown codec": table(["w", "int8", [4], 4], codec="zip"),
    "codec is a list": table(["w", "int8", [4], 4], codec=["raw"]),
    "header is a list": [1, 2], "header is nothing": None}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_header_with_a_right_checksum_is_refused(name):
    assert_refused_in_memory(hostile(HOSTILE_HEADERS[name], b"\1\2\3\4"), 1 << 20)


@pytest.mark.parametrize("name", ["too short", "overflow", "unknown codec", "header is a list"])
def test_refusal_of_a_container_names_the_file(name):
    with pytest.raises(ContainerError, match="some/file: "):
        train_gpt.unpack_tensors(hostile(HOSTILE_HEADERS[name], b"\1\2\3\4"), "some/file")


@pytest.mark.parametrize("codec", CODECS)
def test_huge_stated_length_over_a_tiny_stream_is_refused_in_little_memory(codec):
    for stream in (b"", b"\0", train_gpt.compress(b"tiny", codec)):
        data = hostile(table(["w", "float32", [2**31], len(stream)], codec=codec), stream)
        assert_refused_in_memory(data, 16 << 20)  # xz alone holds its 8 MiB dictionary


@pytest.mark.parametrize("codec", ["brotli", "lzma"])
def test_stream_that_is_cut_or_followed_by_more_is_refused(codec):
    stream = train_gpt.compress(bytes(range(100)), codec)
    for body in (stream[:-1], stream + b"\0\0\0\0", stream + stream):
        header = table(["w", "int8", [100], len(body)], codec=codec)
        assert_refused_in_memory(hostile(header, body), 16 << 20)


@pytest.mark.parametrize("codec", ["brotli", "lzma"])
def test_bomb_in_a_stream_is_refused_in_little_memory(codec):
    zeros = bytes(48 << 20)
    bomb = dict(brotli=lambda: brotli.compress(zeros, quality=1),
                lzma=lambda: lzma.compress(zeros, preset=0))[codec]()
    for shape in ([], [1000], [0]):
        header = table(["w", "int8", shape, len(bomb)], codec=codec)
        assert_refused_in_memory(hostile(header, bomb), 8 << 20)


def test_xz_stream_that_asks_for_a_huge_dictionary_is_refused_in_little_memory():
    stream = bytearray(lzma.compress(b"\1\2\3\4"))
    end = 12 + 4 * (stream[12] + 1)  # the block header follows 12 bytes of stream header
    assert stream[14:16] == b"\x21\x01"  # LZMA2, one byte of properties
    stream[16] = 40  # 4 GiB
    stream[end - 4:end] = struct.pack("<I", zlib.crc32(stream[12:end - 4]))
    header = table(["w", "int8", [4], len(stream)], codec="lzma")
    assert_refused_in_memory(hostile(header, bytes(stream)), 64 << 20)


def test_bomb_spread_over_many_tensors_is_refused(monkeypatch):
    """The limit holds for the file as a whole: a table has room for thousands of tensors."""
    monkeypatch.setattr(train_gpt, "MAX_TENSOR_BYTES", 1 << 20)
    span = brotli.compress(bytes(1 << 20))
    entries = [[f"t{i}", "int8", [1 << 20], len(span)] for i in range(64)]
    assert_refused_in_memory(hostile(table(*entries, codec="brotli"), span * 64), 16 << 20)


@pytest.mark.parametrize("text", [
    b'{"codec": "raw", "tensors": [], "x": "' + b" " * (48 << 20) + b'"}', b"[" * 500_000,
    b"9" * 4_000_000, b"\xff\xfe", b"", b"{}" * 9, b'{"codec": NaN}'],
    ids=["bomb", "nesting", "number", "no text", "nothing", "more text", "nan"])
def test_hostile_header_text_is_refused_in_little_memory(text):
    assert_refused_in_memory(hostile(None, head=zlib.compress(text)), 32 << 20)


def test_header_length_that_leaves_the_file_is_refused():
    for length in (2**32 - 1, 10_000, 0):
        assert_refused_in_memory(hostile(table(), head_bytes=length), 1 << 20)
    assert_refused_in_memory(hostile(None, head=b"not zlib"), 1 << 20)


def test_other_container_version_and_foreign_files_are_told_apart():
    data = train_gpt.pack_tensors({}, {})
    later = bytearray(data[:-32])
    later[6] += 1
    with pytest.raises(ContainerError, match="file: .*version 2"):
        train_gpt.unpack_tensors(bytes(later) + hashlib.sha256(later).digest(), "file")
    for foreign in (b"", b"PK\3\4" + bytes(100), data[:20]):
        with pytest.raises(ContainerError, match="file: (?!.*version)"):
            train_gpt.unpack_tensors(foreign, "file")


def test_file_of_another_kind_is_refused_naming_both_kinds_and_the_file(tmp_path):
    path = tmp_path / "final_model.stats"
    train_gpt.write_tensors(path, {"kind": "stats"}, {})
    with pytest.raises(ContainerError, match="final_model.stats: .*stats.*weights"):
        train_gpt.read_tensors(path, "weights")


# ---- writing files -----------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file_and_leaves_none_that_looks_finished(
        failing, error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    old, new = tmp_path / "artifact", tmp_path / "other"
    train_gpt.write_file(old, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.os, failing, fail)
        for path in (old, new):
            with pytest.raises(type(error)):
                train_gpt.write_file(path, b"longer than old")
    assert old.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".part"} == {"artifact"}
    train_gpt.write_file(old, b"new")  # what was left behind is no obstacle
    assert old.read_bytes() == b"new" and not (tmp_path / "artifact.part").exists()


# ---- clock -------------------------------------------------------------------------------------


class FakeTime:
    """A clock that goes on only when told; `pending` seconds of device work end at `sync`."""

    def __init__(self):
        self.seconds = self.pending = 0.0

    def now(self):
        return self.seconds

    def sync(self):
        self.seconds, self.pending = self.seconds + self.pending, 0.0

    def work(self, seconds):
        self.seconds += seconds


def test_inner_span_pauses_the_outer_one():
    time = FakeTime()
    clock = Clock(time.now, start_seconds=4.0)
    time.work(1)
    with clock.span("train"):
        time.work(10)
        with clock.span("validation"):
            time.work(100)
            assert clock.training_seconds() == 10
            with clock.span("train"):
                time.work(0.5)
        time.work(20)
        assert clock.training_seconds() == 30.5
    time.work(2)
    with clock.span("calibrate"):
        time.work(7)
    assert clock.training_seconds() == 37.5  # steps and calibration, nothing else
    assert clock.ledger() == dict(start=4, other=3, train=30.5, validation=100, calibrate=7)


@given(st.recursive(st.integers(0, 9), lambda inner: st.tuples(
    st.sampled_from(["train", "calibrate", "validation", "write"]), st.lists(inner, max_size=4))))
@settings(max_examples=80, deadline=None, database=None, derandomize=True)
def test_ledger_books_every_second_once_under_the_innermost_span(plan):
    time, expected = FakeTime(), {}
    clock = Clock(time.now, start_seconds=2.0)

    def follow(part, name):
        if isinstance(part, int):
            expected[name] = expected.get(name, 0) + part
            return time.work(part)
        with clock.span(part[0]):
            for inner in part[1]:
                follow(inner, part[0])

    follow(plan, "other")
    ledger = clock.ledger()
    assert {name: s for name, s in ledger.items() if s} == \
        {name: s for name, s in (expected | {"start": 2.0}).items() if s}
    assert clock.training_seconds() == expected.get("train", 0) + expected.get("calibrate", 0)


def test_device_work_in_flight_is_booked_where_it_was_started():
    time = FakeTime()
    clock = Clock(time.now, time.sync)
    with clock.span("train"):
        time.pending = 3
        with clock.span("validation"):
            time.pending = 50
        time.pending = 4
    assert clock.ledger() == dict(start=0, other=0, train=7, validation=50)


def test_span_ends_when_its_body_fails():
    time = FakeTime()
    clock = Clock(time.now)
    with contextlib.suppress(ValueError), clock.span("train"):
        time.work(1)
        raise ValueError
    time.work(10)
    assert clock.training_seconds() == 1 and clock.ledger()["other"] == 10


# ---- pacer -------------------------------------------------------------------------------------

BUDGET = 590.0


def look(pacer, read):
    """Return the clock before a step, as the training loop takes it."""
    if pacer.due():
        pacer.read(read())
    return pacer.elapsed()


class Simulated:
    """A training loop whose steps last what a random number says, on ranks in lock step.

    steps: how many mean steps the budget holds. jitter: a step lasts mean * (1 ± jitter).
    late: one step lasts five means and ends before the last tenth of the budget. switch: share
    of the run from which steps last a quarter longer, as recurrence makes them.
    """

    def __init__(self, seed, steps, jitter, ranks=1, late=False, switch=None):
        rng, self.mean, self.done = random.Random(seed), BUDGET / steps, 0
        self.drift = 0.0  # of the clock carried forward from the true one, seconds
        clocks = [rng.uniform(0, 0.3) * self.mean * r for r in range(ranks)]
        pacers, reads = [Pacer(BUDGET) for _ in clocks], [0] * ranks
        late_at = rng.uniform(0, 0.9 * BUDGET - 10 * self.mean) if late else BUDGET
        switch_at = BUDGET * (2 if switch is None else switch)
        self.tell(pacers)
        while True:
            before = list(reads)

            def read(r):
                reads[r] += 1
                return max(clocks)

            (elapsed,) = {look(pacer, lambda r=r: read(r)) for r, pacer in enumerate(pacers)}
            assert len({now - then for now, then in zip(reads, before, strict=True)}) == 1
            if reads != before:  # read by every rank, else carried forward alike
                assert elapsed == max(clocks)
            self.drift = max(self.drift, abs(elapsed - max(clocks)))
            if max(clocks) >= switch_at:
                self.mean, switch_at = 1.25 * self.mean, 2 * BUDGET
                self.tell(pacers)
            (fits,) = {pacer.fits() for pacer in pacers}  # the same answer on every rank
            if not fits:
                break
            seconds = max(self.mean * rng.uniform(1 - jitter, 1 + jitter) for _ in clocks)
            if max(clocks) >= late_at:
                seconds, late_at = 5 * self.mean, BUDGET
            clocks[:] = [own + seconds for own in clocks]
            self.done += 1
        self.unused, self.readings = BUDGET - max(clocks), reads[0]

    def tell(self, pacers):
        for pacer in pacers:
            pacer.expect(self.mean)


runs_of = pytest.mark.parametrize("steps, ranks", [(40, 1), (40, 2), (100, 1), (630, 2), (1500, 1)])


@runs_of
@pytest.mark.parametrize("switch", [None, 0.35])
def test_no_run_passes_its_limit_on_a_jittery_machine(steps, ranks, switch):
    for seed in range(100):
        run = Simulated(seed, steps, 0.5, ranks, late=True, switch=switch)
        assert run.unused >= 0, (seed, run.unused / run.mean)
        assert run.done > 0.4 * steps  # and it did train


@runs_of
@pytest.mark.parametrize("switch", [None, 0.35, 0.98])
def test_steady_run_leaves_at_most_a_step_and_a_half_unused(steps, ranks, switch):
    for seed in range(20):
        run = Simulated(seed, steps, 0.02, ranks, switch=switch)
        assert 0 <= run.unused <= 1.5 * run.mean + 0.2, (seed, run.unused / run.mean)


@runs_of
def test_one_late_step_does_not_cost_a_steady_run_its_last_steps(steps, ranks):
    for seed in range(20):
        run = Simulated(seed, steps, 0.02, ranks, late=True)
        assert 0 <= run.unused <= 1.5 * run.mean + 0.2, (seed, run.unused / run.mean)


@pytest.mark.parametrize("steps", [40, 100])
def test_no_run_passes_its_limit_when_the_layout_switches_near_the_end(steps):
    for seed in range(100):
        run = Simulated(seed, steps, 0.5, switch=random.Random(seed).uniform(0.9, 1))
        assert run.unused >= 0, (seed, run.unused / run.mean)


def test_a_first_estimate_may_come_after_the_first_steps():
    """Warm-up did not time the first layout: the estimate of the next replaces what was seen."""
    pacer, clock = Pacer(100.0), iter((0.0, 1.0, 2.0))
    pacer.expect(0.0)
    for _ in range(3):
        look(pacer, lambda: next(clock))
    pacer.expect(3.0)
    assert pacer.recent == [3.0] and pacer.expected == 3.0


def test_without_a_budget_every_step_fits():
    pacer = Pacer(0.0)
    for seconds in (0.0, 1e3, 1e9):
        assert look(pacer, lambda: seconds) == seconds and pacer.fits()  # noqa: B023


def test_spent_budget_takes_no_step_however_short():
    pacer = Pacer(10.0)
    pacer.expect(0.001)
    assert look(pacer, lambda: 9.9) == 9.9
    look(pacer, lambda: 10.0)
    assert not pacer.fits()


def test_the_clock_is_read_seldom_far_from_the_end_and_never_strays_far():
    """A record run's steps: about one reading in two seconds, one a step at the end."""
    for seed in range(5):
        run = Simulated(seed, 4700, 0.02, 2)
        assert run.readings < 0.1 * run.done
        assert run.drift < 4 and 0 <= run.unused <= 1.5 * run.mean + 0.2
    assert Simulated(0, 4700, 0.5, 2, late=True, switch=0.35).unused >= 0


# ---- log ---------------------------------------------------------------------------------------

A_ORDER = [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
TAIL = dict(val_loss=2.806434567, val_bpb=1.087390104, eval_ms=1988.4)
TAIL_LINE = "val_loss:2.80643457 val_bpb:1.08739010 eval_time:1988ms"
PUBLISHED_LINES = [
    ("data", dict(train_shards=128), "train_shards: 128"),
    ("val_data", dict(scored_tokens=40540160), "val_tokens: 40540160"),
    ("parameters", dict(count=37022812), "model_params:37022812"),
    ("reserve", dict(reserve_seconds=10.0, effective_ms=590000.0),
     "gptq:reserving 10s, effective=590000ms"),
    ("warmup_step", dict(step=6, steps=20), "warmup_step: 6/20"),
    ("val", dict(step=4000, iterations=20000, val_loss=2.906051, val_bpb=1.12599),
     "4000/20000 val_loss: 2.9061 val_bpb: 1.1260"),
    ("train", dict(step=500, iterations=20000, train_loss=3.21987, train_minutes=0.8529,
                   tokens_per_second=7688123.4),
     "500/20000 train_loss: 3.2199 train_time: 0.9m tok/s: 7688123"),
    ("recurrence", dict(step=2000, order=A_ORDER), "recurrence:activated at step 2000, "
     "virtual_layers=[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]"),
    ("stopping_early", dict(train_time_ms=590043.2, step=4964, iterations=20000),
     "stopping_early: wallclock_cap train_time: 590043ms step: 4964/20000"),
    ("peak_memory", dict(allocated_mib=33093, reserved_mib=33112),
     "peak memory allocated: 33093 MiB reserved: 33112 MiB"),
    ("ema", {}, "ema:applying EMA weights"),
    ("prequant", TAIL, f"pre-quantization post-ema {TAIL_LINE}"),
    ("weights", dict(bytes=137649029), "Serialized model: 137649029 bytes"),
    ("code_size", dict(bytes=83119), "Code size: 83119 bytes"),
    ("collecting", {}, "GPTQ:collecting Hessians from calibration data..."),
    ("collected", dict(hessians=66, seconds=10.62), "GPTQ:collected 66 Hessians in 10.6s"),
    ("quantized", dict(gptq=66, rounded=0),
     "GPTQ quantization: 66 layers with full GPTQ, 0 fallback to clip-search"),
    ("artifact", dict(compressor="brotli", bytes=15898181),
     "Serialized model int6+brotli: 15898181 bytes"),
    ("total_size", dict(compressor="brotli", bytes=15981300),
     "Total submission size int6+brotli: 15981300 bytes"),
    ("roundtrip", TAIL, f"final_int6_roundtrip {TAIL_LINE}"),
    ("sliding", TAIL, f"final_int6_sliding_window {TAIL_LINE}")]


@pytest.fixture
def log(tmp_path):
    log = Log(True, tmp_path / "runs" / "run" / "events.jsonl", tmp_path / "logs" / "run.txt")
    yield log
    log.close()


def text_of(log):
    return Path(log.files[1].name).read_text(encoding="utf-8")


def events_of(log):
    """Return the events, read as strict JSON: other tools know no NaN."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = Path(log.files[0].name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def fields_of(template):
    """Return {field: format} of a template."""
    return {name: spec for _, name, spec, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("kind, fields, line", PUBLISHED_LINES,
                         ids=[kind for kind, _, _ in PUBLISHED_LINES])
def test_published_lines_keep_their_exact_form(kind, fields, line, log, capsys):
    log.event(kind, **fields)
    assert text_of(log) == capsys.readouterr().out == line + "\n"
    assert events_of(log) == [{"event": kind, **fields}]


@pytest.mark.parametrize("kind", EVENTS)
def test_every_event_makes_one_json_line_and_shows_its_fields(kind, log, capsys):
    formats = fields_of(EVENTS[kind])
    fields = {name: 0.0625 if spec else f"<{name}>" for name, spec in formats.items()}
    log.event(kind, **fields)
    (event,) = events_of(log)
    assert event["event"] == kind
    assert event.keys() - {"event"} == {name for name in fields if not name.startswith("text_")}
    shown = text_of(log)
    assert all(format(fields[name], spec) in shown for name, spec in formats.items())
    assert "{" not in shown and capsys.readouterr().out == shown


def test_every_emitter_gives_the_fields_its_line_shows():
    calls = [node for node in ast.walk(ast.parse(Path(train_gpt.__file__).read_text("utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "event"
             and isinstance(node.args[0], ast.Constant)]
    assert len(calls) > 20
    for call in calls:
        kind, given = call.args[0].value, {word.arg for word in call.keywords}
        assert kind in EVENTS, f"line {call.lineno}: {kind}"
        missing = set(fields_of(EVENTS[kind])) - given
        assert not missing or None in given, f"line {call.lineno}: {kind} lacks {missing}"


def test_events_stay_json_when_a_loss_is_not_finite(log):
    log.event("val", step=1, iterations=2, val_loss=float("nan"), val_bpb=float("inf"))
    (event,) = events_of(log)
    assert event["step"] == 1
    assert text_of(log) == "1/2 val_loss: nan val_bpb: inf\n"


def test_only_rank_zero_writes(tmp_path, capsys):
    log = Log(False, tmp_path / "events.jsonl", tmp_path / "logs" / "x.txt")
    log.event("ema")
    log.progress("training", 1, 2, 0.0)
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_log_goes_on_where_an_earlier_one_stopped(log):
    log.event("ema")
    again = Log(True, *(Path(file.name) for file in log.files))
    again.event("collecting", console=False)
    again.close()
    assert [event["event"] for event in events_of(log)] == ["ema", "collecting"]


def test_without_folders_and_terminal_the_log_prints_whole_lines_alone(capsys):
    log = Log(True)
    log.event("notice", text="hello")
    log.event("source", console=False, text_source="print()")
    log.progress("training", 1, 2, 0.0)
    log.close()
    assert capsys.readouterr() == ("notice: hello\n", "")


# ---- ranks -------------------------------------------------------------------------------------

# Each rank prints what every collective gave it.
TWO_RANKS = """
import os, torch, train_gpt
torch.set_num_threads(1)
runtime = train_gpt.Runtime(os.environ, train_gpt.load_config({"DEVICE": "cpu"}))
rank = runtime.rank
def mistake():
    raise FileNotFoundError("no such shard")
found = [runtime.agree(1.5 - rank), runtime.sum_(torch.tensor([1.0 + rank])).item(),
         runtime.share(f"rank {rank}"), runtime.gather(rank), runtime.first(lambda: rank)]
try:
    runtime.first(mistake)
except train_gpt.ConfigError as error:
    found.append(error.faults)
print(found, runtime.is_main)
runtime.close()
"""


def test_two_ranks_agree_on_everything_also_on_a_mistake():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        ranks.append(subprocess.Popen([sys.executable, "-c", TWO_RANKS], env=env, cwd=REPO,
                                      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate(timeout=100) for process in ranks]
    expected = [1.5, 3.0, "rank 0", [0, 1], 0, ["no such shard"]]
    assert [out for out, _ in outputs] == [f"{expected} True\n", f"{expected} False\n"], outputs


def test_one_rank_agrees_with_itself_and_keeps_its_mistakes():
    runtime = train_gpt.Runtime({}, train_gpt.load_config({"DEVICE": "cpu"}))
    tensor = torch.ones(2)
    assert runtime.is_main and runtime.sum_(tensor) is tensor
    assert [runtime.agree(0.5), runtime.share("x"), runtime.gather(3)] == [0.5, "x", [3]]
    with pytest.raises(FileNotFoundError):
        runtime.first(Path("/no/such/file").read_bytes)
    runtime.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_where_there_is_none_is_refused_with_a_remedy():
    with pytest.raises(train_gpt.ConfigError, match="DEVICE=cuda: .*unset"):
        train_gpt.Runtime({}, train_gpt.load_config({"DEVICE": "cuda"}))


# ---- what a run would need ---------------------------------------------------------------------


@pytest.mark.parametrize("step_ms, peak_mib, changes, names", [
    (100.0, 100, {}, []), (1_300_000.0, 100, {}, ["TRAIN_BATCH_TOKENS"]),
    (100.0, 1 << 30, {}, ["MICRO_BATCH_TOKENS"]),
    (1e9, 1 << 40, {}, ["TRAIN_BATCH_TOKENS", "MICRO_BATCH_TOKENS"]),
    (1e9, 100, dict(max_wallclock_seconds=0.0), []),
    (1e9, 1 << 40, dict(stage="evaluate"), [])])
def test_a_run_that_cannot_make_a_step_is_not_well(step_ms, peak_mib, changes, names):
    config = train_gpt.Config(device="cpu", **changes)
    runtime = train_gpt.Runtime({}, config)
    assert runtime.memory_bytes() > 1 << 28
    found = train_gpt.forecast_faults(config, runtime, dict(step_ms=step_ms, peak_mib=peak_mib))
    assert [fault.split("=")[0] for fault in found] == names
    for fault in found:
        assert "PRESET=demo" in fault
        if lower := re.search(r"lower it to (\d+)", fault):
            assert int(lower[1]) % 2048 == 0 and int(lower[1]) >= 2048


@pytest.mark.parametrize("world", ["highest", "high"])
def test_torchs_switches_come_back_as_they_were(monkeypatch, world):
    """A score must not depend on which stages ran before it."""
    torch.set_float32_matmul_precision(world)
    runtime = train_gpt.Runtime({}, train_gpt.Config(device="cpu"))
    monkeypatch.setattr(runtime, "device", torch.device("cuda"))  # where they differ
    seen = []
    try:
        with runtime.switches():
            seen.append(torch.get_float32_matmul_precision())
            with contextlib.suppress(KeyError), runtime.switches(exact=True):
                seen.append(torch.get_float32_matmul_precision())
                raise KeyError
            seen.append(torch.get_float32_matmul_precision())
        assert seen == ["high", "highest", "high"]
        assert torch.get_float32_matmul_precision() == world
    finally:
        torch.set_float32_matmul_precision("highest")
