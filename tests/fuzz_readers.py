"""Throw mutated files and settings at every reader; not collected by pytest.

    python tests/fuzz_readers.py --inputs 100000          # minutes
    python tests/fuzz_readers.py --inputs 5000 --coverage # slower; tells what the readers saw
    python tests/fuzz_readers.py --atheris 200000         # guided by coverage; needs atheris

An input counts as handled when the reader returns, or raises its own error in short words. Every
other exception, a reader that takes longer than LIMIT_SECONDS and memory beyond LIMIT_BYTES are
told with the input's number, which repeats it (`--inputs 1 --first NUMBER`); exit code 1.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "records")]

LIMIT_SECONDS = 20
# Every seed below holds less than 1 MiB and the model it is for as little: this is room for the
# allocator and for a header of the largest size that is read at all.
LIMIT_BYTES = 64 << 20
READERS = """unpack_tensors decompress open_container check_tensors check_no_more restore_weights
    decode_codes rans_decode stored_settings adopt config_faults combination_rules parse_setting
    load_config name_faults Journal.__init__ open_shard resume_faults read_shard read_run find_log
    plain_lines lines_of read_events read_text LineReader.read""".split()
# JSON values a header, a log or a journal may not expect in the place they come to
WORDS = [None, True, False, 0, 1, -1, 2, 7, 2 ** 31, 2 ** 32, 2 ** 63, -2 ** 63, 10 ** 400, 0.5,
         1e308, float("nan"), float("inf"), "", "x", "0", "codes.0", "int8", "float32", "rans",
         "brotli", "lzma", "raw", "tok_emb.weight", "\0", "▁" * 50, [], [0], [-1], [[]], {},
         {"a": 1}, [2 ** 31] * 4, list(range(64)), "9" * 5000]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return data with a few bytes flipped, set, removed, doubled, moved, or cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        elif kind == 2:
            del out[at:at + size]
        elif kind == 3:
            out[at:at] = out[at:at + size]
        elif kind == 4:
            out[at:at] = rng.randbytes(size)
        elif kind == 5:
            start = rng.randrange(len(out) + 1)
            out[at:at + size] = out[start:start + size]
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def mutate_value(value, rng: random.Random):
    """Return a JSON value with one place in it replaced, removed or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        out = copy.copy(value)
        key = rng.choice(list(out)) if isinstance(out, dict) else rng.randrange(len(out))
        kind = rng.random()
        if kind < 0.1:
            del out[key]
        elif kind < 0.15 and isinstance(out, list):
            out.insert(key, copy.deepcopy(out[key]))
        elif kind < 0.2 and isinstance(out, dict):
            out[str(rng.choice(WORDS))[:40]] = out.pop(key)
        else:
            out[key] = mutate_value(out[key], rng)
        return out
    if type(value) in (int, float) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 100, -value, value))
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0xé\n") + value[at + 1:]
    return rng.choice(WORDS)


class Containers:
    """Artifacts, weights and statistics of a toy model in every coder and rule of steps."""

    def __init__(self, script, toys):
        import torch
        self.script, self.seeds = script, []
        for compressor in script.KNOBS["compressor"].metadata["choices"]:
            for given in (dict(sdclip_k=8.0, sdclip_k_embed=12.0, gptq_enabled=False), {}):
                config = toys.toy_config(
                    num_layers=2, xsa_last_n=2, ve_layers=(1,), recur_layers=(0,),
                    fp16_max_numel=20, parallel_start_layer=1, compressor=compressor, **given)
                weights = {name: p.detach().float().clone() for name, p in
                           toys.random_model(config).named_parameters()}
                tables = {name: w for name, w in weights.items() if w.ndim == 2}
                known = toys.statistics(
                    {name: torch.eye(w.shape[1]) for name, w in tables.items()},
                    {name: torch.ones(len(w)) for name, w in tables.items()})
                quantizer = script.Quantizer(weights, known, config, "cpu")
                head = dict(kind="artifact", config=script.artifact_config(config),
                            order=list(config.base_order), tokenizer_sha256="0", train_sha256="1")
                _, packed = script.fit_artifact(quantizer, head, 10 ** 6, lambda *_: None)
                self.seeds.append(("artifact", packed))
        made = dict(head, kind="weights", steps=3)
        self.seeds.append(("weights", script.pack_tensors(made, weights)))
        made, head_input = dict(head, kind="stats"), {"inputs.tok_emb.weight": torch.eye(16)}
        self.seeds.append(("stats", script.pack_tensors(made, head_input)))
        self.config = script.load_config(dict(STAGE="evaluate", DEVICE="cpu"))
        self.errors = script.ContainerError, script.ConfigError
        for kind, data in self.seeds:  # what is mutated must be well before
            self.read(kind, data)

    def make(self, rng):
        """Return (kind, bytes); every second one with its checksum right again."""
        kind, data = rng.choice(self.seeds)
        if rng.random() < 0.5:
            return kind, mutate_bytes(data, rng)
        if rng.random() < 0.25:  # any bytes under a right checksum
            body = mutate_bytes(data[:-32], rng)
            return kind, body + sha256(body).digest()
        return kind, self.rebuild(data, rng)

    def rebuild(self, data, rng):
        """Return the container with header, table, or what a coder is given changed."""
        magic, start = data[:8], 12 + struct.unpack("<I", data[8:12])[0]
        header, at, spans = json.loads(zlib.decompress(data[12:start])), start, []
        for *_, size in header["tensors"]:
            spans.append(data[at:at + size])
            at += size
        what = rng.random()
        if what < 0.5:
            header = mutate_value(header, rng)
        else:
            i = rng.randrange(len(spans))
            name, dtype, shape, _ = header["tensors"][i]
            codec = "raw" if name in header.get("raw", ()) else header["codec"]
            if what < 0.85:  # the tensor's own bytes, coded well
                size = self.script.math.prod(shape) * self.script.DTYPES[dtype].itemsize
                raw = mutate_bytes(self.script.decompress(spans[i], codec, size), rng)
                raw = raw[:size].ljust(size, b"\0") if rng.random() < 0.8 else raw
                spans[i] = self.script.compress(raw, codec)
            else:
                spans[i] = mutate_bytes(spans[i], rng)
            header["tensors"][i][3] = len(spans[i])
        head = zlib.compress(json.dumps(header).encode(), 1)
        if rng.random() < 0.03:
            head = mutate_bytes(head, rng)
        body = magic + struct.pack("<I", len(head)) + head + b"".join(spans)
        return body + sha256(body).digest()

    def read(self, kind, data):
        script = self.script
        header, tensors = script.open_container(data, kind, "file")
        if kind == "stats":
            return
        stage = "quantize" if kind == "weights" else "evaluate"
        config = script.adopt(self.config, header, stage, "file")
        if kind == "weights":
            return script.check_tensors(tensors, script.weight_forms(config), "file")
        script.restore_weights(header, tensors, config, "file")


class Files:
    """What several readers that take a path share: a file to write to."""

    def __init__(self, folder, script):
        self.path, self.script, self.errors = folder / type(self).__name__, script, (ValueError,)


class Shards(Files):
    """Token shards, by the script's reader and by the builder's."""

    def make(self, rng):
        tokens = rng.choice((0, 1, 7, 500))
        header = bytearray(struct.pack("<3i", 20240520, 1, tokens).ljust(1024, b"\0"))
        if rng.random() < 0.5:
            struct.pack_into("<i", header, rng.choice((0, 4, 8)),
                             rng.choice((0, -1, 1, 2, -500, -512, 2 ** 31 - 1, -2 ** 31)))
            return bytes(header) + rng.randbytes(2 * tokens)
        return mutate_bytes(bytes(header) + rng.randbytes(2 * tokens), rng)

    def read(self, data):
        import shards
        self.path.write_bytes(data)
        found = []
        for reader in (self.script.open_shard, shards.read_shard):
            with contextlib.suppress(ValueError):
                found.append(reader(self.path).tolist())
        assert len(found) in (0, 2) and found[:1] == found[1:], "the two readers differ"
        self.script.open_shard(self.path)


class Logs(Files):
    """Events and text logs, our own and published ones, by the record tools."""

    def __init__(self, folder, script):
        import published_logs
        super().__init__(folder, script)
        facts = published_logs.Facts(steps=60, switch=20)
        self.texts = ["\n".join(getattr(published_logs, name)(facts)).encode() for name in
                      ("family_1471", "system_1392", "system_1090")]
        ours = [dict(event="train", step=i, iterations=9, train_loss=5.0, train_seconds=i,
                     train_minutes=0.1, tokens=i, tokens_per_second=1.0) for i in range(9)]
        ours += [dict(event="val", step=9, iterations=9, val_loss=5.0, val_bpb=1.5),
                 dict(event="ledger", train=1.0), dict(event="config", seed=1, run_id="x"),
                 dict(event="result", steps=9, total_bytes=9, verdicts={"x": True})]
        self.events = ours

    def make(self, rng):
        if rng.random() < 0.5:
            return ".txt", mutate_bytes(rng.choice(self.texts), rng)
        events = self.events
        for _ in range(rng.choice((1, 3))):
            events = mutate_value(events, rng)
        lines = events if isinstance(events, list) else [events]
        data = "\n".join(map(json.dumps, lines)).encode()
        return ".jsonl", mutate_bytes(data, rng) if rng.random() < 0.3 else data

    def read(self, suffix, data):
        import logs
        path = self.path.with_suffix(suffix)
        path.write_bytes(data)
        logs.read_run(path)


class Journals(Files):
    """An evaluation's journal and a run's identity: damage there is never an error."""

    LINES = b'\n["task", 0, 1.5, 64, 99]\n\n["task", 1, 2.5, 64, 9]\n\n["other", 0, 1.0, 6, 9]\n'

    def __init__(self, folder, script):
        super().__init__(folder, script)
        self.errors = ()
        self.config = script.Config(stage="quantize", resume=True, run_id="x", device="cpu",
                                    tokenizer_path=str(folder / "none"))
        self.inputs, _ = script.take_inputs(self.config)
        self.identity = script.identity(self.config, self.inputs)
        os.chdir(folder)
        self.files = script.RunFiles("x")
        self.files.folder.mkdir(parents=True, exist_ok=True)

    def make(self, rng):
        if rng.random() < 0.6:
            line = json.dumps(mutate_value(["task", 0, 1.5, 64, 99], rng)).encode()
            return "journal", mutate_bytes(self.LINES + line, rng)
        data = json.dumps(mutate_value(self.identity, rng)).encode()
        return "identity", mutate_bytes(data, rng) if rng.random() < 0.5 else data

    def read(self, kind, data):
        if kind == "journal":
            self.path.write_bytes(data)
            journal = self.script.Journal(self.path, "task")
            assert all(list(map(type, sums)) == [float, int, int] for sums in journal.values())
        else:
            self.files.identity.write_bytes(data)
            assert all(isinstance(line, str)
                       for line in self.script.resume_faults(self.config, self.files, self.inputs))


class Settings(Files):
    """Environments: every setting at hostile values, names that are slips, foreign names."""

    VALUES = ["", "auto", "0", "1", "-1", "0x10", "1e400", "nan", "1_000", "٣", "2,3", "3,2,1", ",",
              "true", "x" * 3000, "9" * 5000, "1" + "0" * 30, "0,0", "1,1000000000", "\n", "\0",
              "evaluate", "../x", "demo", "pr1471", "65536", "1024", "1e-300"]

    def make(self, rng):
        names = [*map(str.upper, self.script.KNOBS), *self.script.NEUTRAL, "MATRIX_LRR",
                 "ITERATION", "GPTQ_X"]
        pool = [*self.VALUES, *(str(rng.randrange(10 ** rng.randrange(1, 9))) for _ in range(9))]
        return ({rng.choice(names): rng.choice(pool) for _ in range(rng.randrange(1, 9))},)

    def read(self, env):
        self.script.load_config(env)


def resident_peak(reset=False) -> int:
    """Return this process's peak resident bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def too_slow(*_):
    raise TimeoutError(f"no answer within {LIMIT_SECONDS} s")


def attempt(target, case) -> str:
    """Give one case to its reader; returns how it ended: "read", or the error's type."""
    signal.alarm(LIMIT_SECONDS)
    try:
        target.read(*case)
        return "read"
    except target.errors as error:
        if len(str(error)) > 20_000 or not str(error):
            raise AssertionError(f"an error of {len(str(error))} characters") from error
        return type(error).__name__
    finally:
        signal.alarm(0)


def as_case(made):
    return made if isinstance(made, tuple) else (made,)


def fuzz(targets, first: int, count: int) -> dict[str, list[int]]:
    """Try `count` numbered inputs, each target in its turn; returns faults: what -> numbers."""
    ended, slowest, largest = {type(t).__name__: Counter() for t in targets}, 0.0, 0
    faults = defaultdict(list)
    # four containers for one of each other kind
    turns = [targets[0]] * 4 + list(targets[1:])
    began = time.monotonic()
    for number in range(first, first + count):
        target, rng = turns[number % len(turns)], random.Random(number)
        case = as_case(target.make(rng))
        before, since = resident_peak(reset=True), time.monotonic()
        try:
            ended[type(target).__name__][attempt(target, case)] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            faults[f"{type(error).__name__} in {place.name}, line {place.lineno}"].append(number)
        slowest = max(slowest, time.monotonic() - since)
        took = resident_peak() - before
        largest = max(largest, took)
        if took > LIMIT_BYTES:
            faults[f"{type(target).__name__}: too much memory"].append(number)
        if sys.stderr.isatty() and number % 500 == 0:
            print(f"\r{number - first}/{count}", end="", file=sys.stderr)
    print(f"{count} inputs in {time.monotonic() - began:.0f} s; slowest {slowest:.2f} s, most "
          f"memory {largest / 2 ** 20:.1f} MiB")
    for kind, counts in ended.items():
        print(f"  {kind}: " + ", ".join(f"{n} {how}" for how, n in counts.most_common()))
    for what, numbers in faults.items():
        print(f"FAULT {what}: {len(numbers)} inputs, first {numbers[:3]}")
    return faults


def report_coverage(cov):
    """Print lines and branches of each reader that were run."""
    target = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        cov.json_report(outfile=str(Path(folder, "report.json")), ignore_errors=True)
        report = json.loads(Path(folder, "report.json").read_text())
    total = Counter()
    for file, found in report["files"].items():
        for name, region in found.get("functions", {}).items():
            if name in READERS:
                s = region["summary"]
                total.update({key: s[key] for key in ("covered_lines", "num_statements",
                                                      "covered_branches", "num_branches")})
                print(f"  {Path(file).name} {name}: lines {s['covered_lines']}/"
                      f"{s['num_statements']}, branches {s['covered_branches']}/"
                      f"{s['num_branches']}; missed lines {region['missing_lines']}", file=target)
    print(target.getvalue() + "readers together: lines {covered_lines}/{num_statements}, branches "
          "{covered_branches}/{num_branches}".format(**total))


def guided(containers, count: int):
    """Let atheris search, guided by the coverage of the script, for containers that break it."""
    import atheris
    script = containers.script
    for name in ("unpack_tensors", "decompress", "open_container", "restore_weights",
                 "decode_codes", "rans_decode", "stored_settings", "adopt", "check_tensors"):
        setattr(script, name, atheris.instrument_func(getattr(script, name)))

    def one(data):
        kind = "artifact" if data[:1] < b"\xe0" else "weights"
        body = data[1:]
        with contextlib.suppress(*containers.errors):
            containers.read(kind, body + sha256(body).digest())

    def mutate(data, most, seed):
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        kind, seed_data = rng.choice(containers.seeds[:-1])
        tag = b"\0" if kind == "artifact" else b"\xff"
        return (tag + containers.rebuild(seed_data, rng)[:-32])[:most]

    # atheris itself grows by 50 kB a run; the readers do not, as the other mode shows
    atheris.Setup([sys.argv[0], f"-atheris_runs={count}", "-max_len=65536", "-rss_limit_mb=8192",
                  f"-artifact_prefix={tempfile.gettempdir()}/",
                   f"-timeout={LIMIT_SECONDS}"], one, custom_mutator=mutate)
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--atheris", type=int, default=0, metavar="RUNS")
    args, cov = parser.parse_args(), None
    if args.coverage:
        import coverage
        cov = coverage.Coverage(branch=True, data_file=None, include=[
            str(REPO / "train_gpt.py"), str(REPO / "records/*"), str(REPO / "data/shards.py")])
        cov.start()
    sys.path.insert(0, str(REPO / "data"))
    import torch
    import toys

    import train_gpt
    torch.set_num_threads(1)
    containers = Containers(train_gpt, toys)
    if args.atheris:
        guided(containers, args.atheris)  # exits by itself
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets = [containers, *(kind(folder, train_gpt)
                                 for kind in (Shards, Logs, Journals, Settings))]
        faults = fuzz(targets, args.first, args.inputs)
        os.chdir(REPO)
    if cov:
        cov.stop()
        report_coverage(cov)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
