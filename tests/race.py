"""Race arms (settings of train_gpt.py) over seeds at equal tokens and equal bytes, scored alike.

    python tests/race.py prepare TRAIN.jsonl.xz VAL.jsonl.xz TOKENIZER.model FOLDER
    python tests/race.py run --arm "plain:" --arm "no gates: SKIP_GATES_ENABLED=0" --seeds 1,2 \\
        --base "PRESET=demo" --tokens 819200 --bytes 540000 --data FOLDER --targets 300000 \\
        --results records/benchmarks/gates.jsonl --table gates.md
    python tests/race.py table records/benchmarks/gates.jsonl

Every arm trains for the same tokens (--tokens), or as long as the others (--seconds: the limit on
training + calibration), and its artifact, without code, fills the same bytes: --bytes B, or
--bytes-of ARM, what that arm takes by itself with the first seed. Where an arm does not say
otherwise, schedules go by share of the run (PRESET=one_gpu's shares), VOCAB_SIZE is the
tokenizer's, and nothing is validated on the way.

Each finished run is one line of JSON in --results and is never run again, whatever its arm is
called: a run is its settings, seed, tokens or seconds, bytes, data and device. A script edited
since counts as the same unless --strict. Ctrl-C stops the runs in order; the same command goes on
with them, each by the copy of the script that it began with. Products stay in --folder/runs/.

Not collected by pytest; tests/test_race.py tests it.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_full_run
import numpy as np

REPO = Path(__file__).resolve().parents[1]

# What the race sets itself, and where a user says it instead.
OWNED = {"SEED": "--seeds", "RUN_ID": "--folder", "RESUME": "the same command again",
         "STAGE": "nothing: an arm runs whole", "INPUT_PATH": "nothing: an arm runs whole",
         "DATA_DIR": "--data", "DATA_PATH": "--data", "TOKENIZER_PATH": "--tokenizer",
         "ITERATIONS": "--tokens or --seconds", "MAX_WALLCLOCK_SECONDS": "--tokens or --seconds"}
BY_SHARE = {"RECUR_START_FRAC": "RECUR_START_STEP",
            "MUON_MOMENTUM_WARMUP_FRAC": "MUON_MOMENTUM_WARMUP_STEPS"}
UNBOUNDED_STEPS = 10_000_000
POLL_SECONDS, TOLD_EVERY_SECONDS, CHECKPOINT_SECONDS = 0.05, 30, 60
LAST_LINES = 6
# What the table needs of a finished run, and of its "run"
FORM = dict(arm=str, run=dict, scores=dict, artifact_bytes=int, parameters=int, trained_tokens=int,
            tokens_per_second=float, step_ms=float, wall_seconds=float, machine=str,
            script_sha256=str)
RUN_FORM = dict(settings=dict, seed=int, data=dict, device=str)
DIVISORS = ("artifact_bytes", "bytes", "step_ms")
SAME_BYTES = 0.01  # artifacts differ by less than this share
SCORES = ("prequant", "prequant_sliding", "roundtrip", "sliding")  # first in the table
# P(|t| > 2) at 1, 2, 3, 4 degrees of freedom
CHANCE = ("Two standard errors are a low bar for few seeds: arms that do not differ pass it in "
          "30 % of races of 2 seeds, 18 % of 3, 14 % of 4, 12 % of 5, 5 % of very many.")

Line = dict[str, Any]  # a finished run, as the results file holds it
Settings = dict[str, str]


class RaceError(ValueError):
    """What ends a race before it starts; the message says what to do."""


# ---- arms ----------------------------------------------------------------------------------------


def split_words(text: str, where: str, comments: bool = False) -> list[str]:
    """Return the words of a line as a shell would."""
    try:
        return shlex.split(text, comments=comments)
    except ValueError as error:
        raise RaceError(f"{where}: {text.strip()!r}: {str(error).lower()}; words are split as a "
                        "shell does it: close the quote, or put \\ before it") from None


def read_text(path: Path) -> str:
    """Return what a file of ours says; RaceError where it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RaceError(f"{path}: byte {error.start + 1} is 0x{error.object[error.start]:02x}, "
                        "must be UTF-8 text; name another file, or convert it") from None


def parse_settings(words: Iterable[str], where: str) -> Settings:
    """Return {NAME: VALUE} of NAME=VALUE words."""
    found: Settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name):
            raise RaceError(f"{where}: {word!r} is not NAME=VALUE")
        if name in found:
            raise RaceError(f"{where}: {name} is set twice")
        found[name] = value
    return found


def parse_arm(text: str) -> tuple[str, Settings]:
    """Return the name and settings of "name: NAME=VALUE NAME=VALUE"."""
    name, _, settings = text.partition(":")
    if "=" in name or not name.strip():
        raise RaceError(f'--arm {text!r}: begin with a name: --arm "name: NAME=VALUE …"')
    where = f"--arm {name.strip()}"
    return name.strip(), parse_settings(split_words(settings, where), where)


def read_arms(path: Path) -> Iterator[tuple[str, Settings]]:
    """Yield the arms of a file: [name], then lines of NAME=VALUE; # begins a comment."""
    name, words = "", list[str]()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if head := re.fullmatch(r"\s*\[(.+)\]\s*(#.*)?", line):
            if name:
                yield name, parse_settings(words, f"{path} [{name}]")
            name, words = head[1].strip(), []
            continue
        parts = split_words(line, f"{path}:{number}", comments=True)
        if parts and not name:
            raise RaceError(f"{path}:{number}: comes before the first [name]; settings of all arms "
                            "go to --base")
        else:
            words += parts
    if not name:
        raise RaceError(f"{path}: no [name] in it")
    yield name, parse_settings(words, f"{path} [{name}]")


def collect_arms(options: argparse.Namespace) -> dict[str, Settings]:
    """Return the arms of the command line, then of its files; names are unique."""
    listed = [parse_arm(text) for text in options.arm]
    listed += [arm for path in options.arms for arm in read_arms(path)]
    arms = dict(listed)
    if len(arms) < len(listed):
        twice = next(name for name, _ in listed if [n for n, _ in listed].count(name) > 1)
        raise RaceError(f"arm {twice}: given twice; call one of them otherwise")
    if not arms:
        raise RaceError('no arm; give two or more: --arm "name: NAME=VALUE …", or --arms FILE')
    if options.bytes_of not in (None, *arms):
        raise RaceError(f"--bytes-of {options.bytes_of}: no such arm; there are {', '.join(arms)}")
    return arms


def settings_faults(own: Settings, may_cap: bool) -> list[str]:
    """Return which settings are the race's to set; may_cap: ARTIFACT_MAX_BYTES is the arm's."""
    owned = OWNED if may_cap else {**OWNED, "ARTIFACT_MAX_BYTES": "--bytes or --bytes-of"}
    return [f"{name}={own[name]}: the race sets it; use {owned[name]}"
            for name in own if name in owned]


def complete(script, given: Settings, tokens: int | None, vocab_size: int) -> Settings:
    """Return an arm's settings with what the race adds to them, every value in one spelling.

    Raises script.ConfigError for settings that the script refuses, RaceError where whole steps do
    not make `tokens`.
    """
    settings = {"VOCAB_SIZE": str(vocab_size), **given}
    config = script.load_config(settings)
    for share, steps in BY_SHARE.items():
        if getattr(config, share.lower()) is None and steps.lower() not in config.explicit:
            settings[share] = script.preset_settings("one_gpu")[share]
    batch = config.train_batch_tokens
    if tokens is not None and (not tokens or tokens % batch):
        steps = max(1, round(tokens / batch))
        raise RaceError(f"--tokens {tokens} is no whole number of steps of TRAIN_BATCH_TOKENS="
                        f"{batch}; {steps} steps are {steps * batch}")
    config = script.load_config(settings)
    return {name: script.show_value(getattr(config, name.lower())) if name.lower() in script.KNOBS
            else text for name, text in sorted(settings.items())}


def complete_all(script, arms: dict[str, Settings], options: argparse.Namespace,
                 vocab_size: int) -> dict[str, Settings]:
    """Return all arms as `complete` does; raises RaceError with the faults of all of them."""
    base = parse_settings([word for text in options.base for word in split_words(text, "--base")],
                          "--base")
    faults, found = settings_faults(base, options.bytes_of is not None), {}
    faults = [f"--base: {fault}" for fault in faults]
    for name, own in arms.items():
        try:
            wrong = settings_faults(own, name == options.bytes_of)
            found[name] = complete(script, {**base, **own}, options.tokens, vocab_size)
        except script.ConfigError as error:
            wrong = [*wrong, *error.faults]
        except RaceError as error:
            wrong = [*wrong, str(error)]
        faults += [f"arm {name}: {fault}" for fault in wrong]
    if faults:
        raise RaceError("\n".join(faults))
    return found


# ---- data ----------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What all arms read. marks: what tells it from other data, in results."""

    folder: Path
    tokenizer: Path
    vocab_size: int
    marks: dict[str, Any]


def whole_documents(tokens: np.ndarray, bos_id: int, targets: int | None) -> np.ndarray:
    """Return the first documents of tokens (N,), at most `targets` + 1 tokens; None: all."""
    if targets is None or len(tokens) <= targets + 1:
        return tokens
    starts = np.flatnonzero(tokens == bos_id)
    ends = starts[starts > 0]
    if not len(ends) or ends[0] > targets + 1:
        first = f"the first document has {ends[0]}" if len(ends) else \
            f"no document ends in {len(tokens)} tokens (token {bos_id} begins one)"
        raise RaceError(f"--targets {targets}: {first}; ask for more, or leave it out")
    return tokens[:ends[ends <= targets + 1][-1]]


def joined(script, folder: Path, split: str) -> np.ndarray | None:
    """Return the tokens (N,) of all shards of a split, or None where there are none."""
    files = script.find_shards(folder, split)
    try:
        return np.concatenate([script.open_shard(path) for path in files]) if files else None
    except ValueError as error:
        raise RaceError(f"--data {error}") from None


def lay_data(script, options: argparse.Namespace, folder: Path) -> Data:
    """Put what the arms read into the race's folder: links to training shards, short validation."""
    import encoding  # in data/, which gpu_full_run puts on the path
    import shards
    source, tokenizer = options.data, options.tokenizer or options.data / "tokenizer.model"
    train, val = script.find_shards(source, "train"), joined(script, source, "val")
    if not train or val is None:
        raise RaceError(f"--data {source}: no fineweb_{'val' if train else 'train'}_*.bin in it; "
                        "make shards with `race.py prepare`")
    if not tokenizer.is_file():
        raise RaceError(f"--tokenizer {tokenizer}: no such file; name the .model that made the "
                        "shards")
    try:
        processor, train_mark = encoding.load_processor(tokenizer), script.fingerprint(train)
    except ValueError as error:  # both name the file
        raise RaceError(str(error)) from None
    if len(val) < 2:
        raise RaceError(f"--data {source}: its validation is {len(val)} tokens, must be at least "
                        "2; make shards with `race.py prepare`")
    val = whole_documents(val, processor.bos_id(), options.targets)
    parts, sidecar = {"val": val}, joined(script, source, "val_bytes")
    if sidecar is not None:
        parts["val_bytes"] = sidecar[:len(val)]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts.values())).hexdigest()
    marks = dict(train=train_mark[:16], val=digest[:16], targets=len(val) - 1,
                 tokenizer=hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16])
    out = folder / f"data-{key_of(marks)}"
    out.mkdir(parents=True, exist_ok=True)
    for path in train:
        link = out / path.name
        if link.resolve() != path.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    for split, part in parts.items():
        shards.write_shard(out / f"fineweb_{split}_000000.bin", part)
    return Data(out.resolve(), tokenizer.resolve(), processor.vocab_size(), marks)


# ---- the results file ----------------------------------------------------------------------------


def key_of(identity: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for what a run is."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def check_form(found: Any, form: dict[str, type], what: str) -> None:
    """Raise ValueError where an object lacks a key of `form`, or has another kind of value."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is a {type(found).__name__}, must be an object")
    for key, kind in form.items():
        if key not in found:
            raise ValueError(f"{what} has no {key!r}")
        value = found[key]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool) or (key in DIVISORS and value is not None
                                                   and not value > 0):
            raise ValueError(f"{what} has {key!r}: {json.dumps(value)[:40]}")


def check_line(line: Any) -> None:
    """Raise ValueError where a line is not what `measure` returns."""
    check_form(line, FORM, "the line")
    run = line["run"]
    check_form(run, {**RUN_FORM, **({"tokens": int} if "seconds" not in run else
                                    {"seconds": float, "machine": str}),
                     "bytes": int if run.get("bytes", 0) is not None else type(None)}, '"run"')
    check_form(run["data"], dict(targets=int), '"data"')
    check_form(run["settings"], dict.fromkeys(run["settings"], str), '"settings"')
    check_form(line["scores"], dict.fromkeys(line["scores"], float), '"scores"')


def read_results(path: Path) -> list[Line]:
    """Return the runs of a results file, in order; none where there is no file."""
    found = []
    for number, raw in enumerate(read_text(path).splitlines() if path.exists() else (), 1):
        try:
            check_line(line := json.loads(raw))
        except (ValueError, RecursionError) as error:
            raise RaceError(f"{path}:{number}: not a line of this tool ({error}); "
                            "remove it") from None
        found.append({**line, "key": key_of(line["run"])})
    return found


def append_result(path: Path, line: Line) -> None:
    """Add one run to a results file; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({name: v for name, v in line.items() if name != "key"}) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ---- the race ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One run. limit_bytes: of the artifact alone; None: as many as the arm takes by itself."""

    arm: str
    seed: int
    limit_bytes: int | None


def machine_name(device: str) -> str:
    """Return what the runs' speed depends on: the GPU, or the CPU and its cores."""
    if device == "cuda":
        import torch
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


@dataclasses.dataclass(frozen=True)
class Race:
    """What is raced. arms: name -> all its settings; tokens or seconds: what each arm may use."""

    script: Path
    folder: Path
    arms: dict[str, Settings]
    data: Data
    results: Path
    tokens: int | None
    seconds: float | None
    device: str = "cpu"
    jobs: int = 1
    threads: int = 1
    strict: bool = False

    @functools.cached_property
    def machine(self) -> str:
        """Return the machine with how it was shared, which seconds and speeds depend on."""
        shared = f", {self.jobs} runs at once" if self.jobs > 1 else ""
        threads = f", threads: {self.threads}" if self.device == "cpu" else ""
        return machine_name(self.device) + threads + shared

    @functools.cached_property
    def script_sha256(self) -> str:
        return hashlib.sha256(self.script.read_bytes()).hexdigest()

    def identity(self, task: Task) -> dict[str, Any]:
        """Return what makes this run this run."""
        settings = dict(self.arms[task.arm])
        if task.limit_bytes is not None:
            settings.pop("ARTIFACT_MAX_BYTES", None)
        budget = dict(tokens=self.tokens) if self.seconds is None else \
            dict(seconds=self.seconds, machine=self.machine)
        return dict(settings=settings, seed=task.seed, bytes=task.limit_bytes,
                    data=self.data.marks, device=self.device, **budget)

    def run_id(self, task: Task) -> str:
        """Return the name of a run's folder."""
        made_by = dict(script=self.script_sha256) if self.strict else {}
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", task.arm)
        return f"{name}-s{task.seed}-{key_of({**self.identity(task), **made_by})}"

    def run_folder(self, task: Task) -> Path:
        return self.folder / "runs" / self.run_id(task)

    def finished(self, task: Task) -> Line | None:
        """Return the line of a run that is done, called as its arm is called here."""
        key = key_of(self.identity(task))
        for line in reversed(read_results(self.results)):
            if line["key"] == key and not (self.strict
                                           and line["script_sha256"] != self.script_sha256):
                return {**line, "arm": task.arm}
        return None

    def own_script(self, task: Task) -> Path:
        """Return the copy of the script that a run begins and goes on with."""
        folder = self.run_folder(task)
        copy = folder / "train_gpt.py"
        if not (folder / "run.json").exists():  # nothing is begun
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.script, copy)
        return copy

    def environment(self, task: Task) -> Settings:
        """Return a run's environment: ours without stray settings, and those of its arm."""
        script = load_script(self.script)
        names = {*map(str.upper, script.KNOBS), *script.NEUTRAL, *script.WITHOUT_EFFECT}
        env = {name: value for name, value in os.environ.items() if name not in names}
        if self.device == "cpu":
            env["OMP_NUM_THREADS"] = str(self.threads)
        settings = self.arms[task.arm]
        steps = UNBOUNDED_STEPS
        if self.tokens is not None:
            steps = self.tokens // script.load_config(settings).train_batch_tokens
        env |= dict(VAL_LOSS_EVERY="0", CHECKPOINT_EVERY_SECONDS=str(CHECKPOINT_SECONDS),
                    TRAIN_LOG_EVERY=str(max(1, steps // 50) if self.tokens else 10))
        env |= settings
        if task.limit_bytes is not None:
            code_bytes = self.own_script(task).stat().st_size
            env["ARTIFACT_MAX_BYTES"] = str(task.limit_bytes + code_bytes)
        return env | dict(
            SEED=str(task.seed), ITERATIONS=str(steps), RUN_ID=self.run_id(task), RESUME="1",
            MAX_WALLCLOCK_SECONDS=str(self.seconds or 0), STAGE="all",
            DATA_PATH=str(self.data.folder), TOKENIZER_PATH=str(self.data.tokenizer))


@functools.cache
def load_script(path: Path):
    """Return a train_gpt.py as a module; importing it starts nothing."""
    spec = importlib.util.spec_from_file_location(f"raced_{key_of({'path': str(path)})}", path)
    if not spec or not spec.loader or not path.is_file():
        raise RaceError(f"--script {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever its own code does
        raise RaceError(f"--script {path}: cannot be imported ({error!r}); give a "
                        "train_gpt.py") from None
    return module


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run, in order; a line cut short by a crash is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def measure(race: Race, task: Task, wall_seconds: float) -> Line:
    """Return the line of a run that ended well, from its events; RaceError where they lack it."""
    path = race.run_folder(task) / "events.jsonl"
    last = {event["event"]: event for event in read_events(path)}
    try:
        ledger, end = last["result"]["ledger_seconds"], last["val"]
        # a run that was resumed after training knows its seconds from the log alone
        seconds, steps = ledger.get("train") or end["train_seconds"], end["step"]
        tokens = steps * last["config"]["train_batch_tokens"]
        return dict(
            arm=task.arm, run=race.identity(task),
            scores={kind: event["val_bpb"] for kind, event in last.items()
                    if kind != "val" and "val_bpb" in event},
            artifact_bytes=last["artifact"]["bytes"], parameters=last["parameters"]["count"],
            steps=steps, trained_tokens=tokens, train_seconds=round(seconds, 3),
            step_ms=round(1000 * seconds / steps, 3), tokens_per_second=round(tokens / seconds, 1),
            peak_memory_mib=last["peak_memory"]["allocated_mib"],
            wall_seconds=round(wall_seconds, 1), machine=race.machine,
            script_sha256=last["source"]["sha256"],
            finished=time.strftime("%Y-%m-%d", time.gmtime()))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise RaceError(f"{path}: the script ended well, but this log is not of a whole run "
                        f"({error!r})") from None


# ---- running -------------------------------------------------------------------------------------


class Job:
    """A started process of the script."""

    def __init__(self, race: Race, task: Task, *arguments: str):
        self.task, self.since, script = task, time.perf_counter(), race.own_script(task)
        self.folder = race.run_folder(task)
        self.console = self.folder / ("check.txt" if arguments else "console.txt")
        # the lock is the process's: a run that outlived its race is not started a second time
        with open(self.folder / "lock", "w") as lock, open(self.console, "w") as console:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RaceError(f"{self.folder}: another process runs it; wait for it, or end "
                                "it") from None
            # its own session: Ctrl-C reaches the race alone, which then asks once
            self.process = subprocess.Popen(
                [sys.executable, str(script), *arguments], cwd=race.folder,
                env=race.environment(task), stdout=console, stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()], start_new_session=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.since

    def last_lines(self) -> str:
        lines = self.console.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in lines[-LAST_LINES:])

    def progress(self, seconds_limit: float | None) -> tuple[str, float]:
        """Return where a run is, in words and as a share of its training."""
        try:
            event = json.loads(last_line_of(self.folder / "events.jsonl"))
        except ValueError:
            return "starting", 0.0
        if event.get("event") != "train":
            return str(event.get("event")), 0.0
        share = event["train_seconds"] / seconds_limit if seconds_limit else \
            event["step"] / event["iterations"]
        return f"step {event['step']}, {100 * share:.0f} %", share


def last_line_of(path: Path, most_bytes: int = 1 << 16) -> str:
    """Return the last whole line of a file, or "" where there is none."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - most_bytes))
        return ([b""] + file.read().split(b"\n")[:-1])[-1].decode("utf-8", "replace")


def tell(text: str) -> None:
    """Say something with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def shown_seconds(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class Runner:
    """Runs tasks, so many at once; keeps what is finished."""

    def __init__(self, race: Race, lines: Sequence[Line] = ()):
        self.race, self.running, self.failed = race, list[Job](), list[str]()
        self.lines = list(lines)  # finished ones, for the ETA too

    def run(self, tasks: Sequence[Task]) -> None:
        """Run tasks to their ends; a failed one stops no other."""
        waiting, told = deque(tasks), time.perf_counter()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.race.jobs:
                    self.start(waiting.popleft())
                time.sleep(POLL_SECONDS)
                self.settle()
                if self.running and time.perf_counter() - told > TOLD_EVERY_SECONDS:
                    told = time.perf_counter()
                    tell(self.status(waiting))
        finally:
            self.stop()

    def start(self, task: Task) -> None:
        try:
            self.running.append(Job(self.race, task))
            tell(f"{task.arm}, seed {task.seed}: started in {self.running[-1].folder}")
        except RaceError as error:
            self.fail(task, str(error))

    def fail(self, task: Task, why: str) -> None:
        self.failed.append(f"{task.arm}, seed {task.seed}")
        tell(f"{task.arm}, seed {task.seed}: FAILED\n{why}")

    def settle(self) -> None:
        """Take the jobs that have ended: a line each, or what they died of."""
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            if code := job.process.returncode:
                self.fail(job.task, f"{job.last_lines()}\n    exit code {code}; the same command "
                          f"goes on where it stopped, or begins anew once {job.folder} is removed")
                continue
            try:
                line = measure(self.race, job.task, job.seconds)
            except RaceError as error:
                self.fail(job.task, str(error))
                continue
            append_result(self.race.results, line)
            self.lines.append(line)
            scores = ", ".join(f"{kind} {bpb:.4f}" for kind, bpb in line["scores"].items())
            tell(f"{job.task.arm}, seed {job.task.seed}: {scores}, {line['artifact_bytes']:,} "
                 f"bytes, {line['step_ms']:.1f} ms a step, {shown_seconds(job.seconds)}")

    def stop(self) -> None:
        """Ask what still runs to save and end, and wait for it; keeps what ends well."""
        for job in self.running:
            job.process.send_signal(signal.SIGINT)
        for job in self.running:
            tell(f"{job.task.arm}, seed {job.task.seed}: stopping, to go on by the same command")
            job.process.wait()
        self.running = [job for job in self.running if not job.process.returncode]
        self.settle()

    def status(self, waiting: Iterable[Task]) -> str:
        """Return one line: what runs, how far it is, when all is done."""
        at = [(job, *job.progress(self.race.seconds)) for job in self.running]
        arms = [f"{job.task.arm} s{job.task.seed}: {text}" for job, text, _ in at]
        waiting = list(waiting)
        seconds = [job.seconds / share for job, _, share in at if share]  # scoring left out
        seconds = [line["wall_seconds"] for line in self.lines] or seconds
        if not seconds:
            return "; ".join(arms)
        mean = {line["arm"]: statistics.fmean(x["wall_seconds"] for x in self.lines
                                              if x["arm"] == line["arm"]) for line in self.lines}
        usual = statistics.fmean(seconds)
        left = sum(mean.get(task.arm, usual) for task in waiting)
        left += sum(max(0.0, mean.get(job.task.arm, usual) - job.seconds) for job in self.running)
        return (f"{'; '.join(arms)}; {len(waiting)} to come, ETA "
                f"{shown_seconds(left / min(self.race.jobs, len(waiting) + len(at)))}")


def check_arms(race: Race, tasks: Sequence[Task]) -> None:
    """Have the script check the first run of each arm; raises RaceError with all faults."""
    waiting, faults = deque({task.arm: task for task in reversed(tasks)}.values()), []
    while waiting:
        batch = [waiting.popleft() for _ in range(min(race.jobs, len(waiting)))]
        for job in [Job(race, task, "--check") for task in batch]:
            if job.process.wait():
                faults.append(f"arm {job.task.arm}:\n{job.last_lines()}")
    if faults:
        raise RaceError("\n".join(faults))


def run_open(race: Race, tasks: Sequence[Task]) -> tuple[list[Line], list[str]]:
    """Run those tasks that have no line; returns the lines of all that have one, and failures."""
    known = [race.finished(task) for task in tasks]
    waiting = [task for task, line in zip(tasks, known) if line is None]
    tell(f"runs: {len(tasks) - len(waiting)} done before, {len(waiting)} to do")
    check_arms(race, waiting)
    runner = Runner(race, [line for line in known if line])
    runner.run(waiting)
    found = [race.finished(task) for task in tasks]
    return [line for line in found if line], runner.failed


def run_race(race: Race, seeds: Sequence[int], limit_bytes: int | None,
             bytes_of: str | None) -> tuple[list[Line], list[str]]:
    """Run all arms with all seeds; returns the lines in order, and what failed."""
    first, failed = list[Line](), list[str]()
    if bytes_of is not None:
        first, failed = run_open(race, [Task(bytes_of, seeds[0], None)])
        if failed:
            return first, failed
        limit_bytes = first[0]["artifact_bytes"]
        tell(f"equal bytes: {limit_bytes:,}, those of {bytes_of}")
    tasks = [Task(arm, seed, limit_bytes) for seed in seeds for arm in race.arms
             if not (first and (arm, seed) == (bytes_of, seeds[0]))]
    lines, failed = run_open(race, tasks)
    order = list(race.arms)
    return sorted([*first, *lines], key=lambda line: order.index(line["arm"])), failed


# ---- the table -----------------------------------------------------------------------------------

Arms = dict[str, dict[int, Line]]  # name -> seed -> run


def bytes_of_line(line: Line) -> int:
    """Return the bytes that a run was to fill: its own where they set the measure."""
    return line["artifact_bytes"] if line["run"]["bytes"] is None else line["run"]["bytes"]


def by_race(lines: Iterable[Line]) -> list[list[Line]]:
    """Return lines that may be compared together: as much training, bytes and data alike."""
    groups = dict[str, list[Line]]()
    for line in lines:
        apart = {name: v for name, v in line["run"].items() if name not in ("settings", "seed")}
        groups.setdefault(key_of({**apart, "bytes": bytes_of_line(line)}), []).append(line)
    return list(groups.values())


def own_settings(line: Line) -> set[tuple[str, str]]:
    """Return a run's settings but for its own cap."""
    return {pair for pair in line["run"]["settings"].items() if pair[0] != "ARTIFACT_MAX_BYTES"}


def by_arm(lines: Sequence[Line]) -> Arms:
    """Return runs by arm and seed, the last of each; one name with two settings is two arms."""
    arms, shown = Arms(), dict[str, set]()
    for line in lines:
        name, settings = line["arm"], own_settings(line)
        if shown.setdefault(name, settings) != settings:
            more = sorted("=".join(pair) for pair in settings - shown[name])
            name += f" [{' '.join(more) or 'less set'}]"
        arms.setdefault(name, {})[line["run"]["seed"]] = line
    return arms


def score_kinds(arms: Arms) -> list[str]:
    """Return the scores that any run has, in the table's order, and the gap by quantisation."""
    found = {kind for runs in arms.values() for line in runs.values() for kind in line["scores"]}
    kinds = [*(kind for kind in SCORES if kind in found), *sorted(found - {*SCORES})]
    return [*kinds, "gap"] if {"prequant", "roundtrip"} <= found else kinds


def score_of(line: Line, kind: str) -> float | None:
    """Return a score of a run, bpb, or None; "gap": artifact less pre-quant, same windows."""
    scores = line["scores"]
    if kind != "gap":
        return scores.get(kind)
    ends = scores.get("roundtrip"), scores.get("prequant")
    return None if None in ends else ends[0] - ends[1]


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return mean ± sample standard deviation as text; "-" of nothing."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


class Paired(NamedTuple):
    """Differences of one score over the seeds that two arms share. error: standard, of the mean."""

    differences: dict[int, float]
    mean: float
    error: float | None

    @property
    def verdict(self) -> str:
        if self.error is None or abs(self.mean) <= 2 * self.error:
            return "unresolved" if len(self.differences) > 1 else "unresolved (one seed)"
        return "better" if self.mean < 0 else "WORSE"


def paired(runs: dict[int, Line], first: dict[int, Line], kind: str) -> Paired | None:
    """Compare an arm with the first one, seed by seed; None where no seed has both scores."""
    pairs = {seed: (score_of(runs[seed], kind), score_of(first[seed], kind))
             for seed in sorted(runs) if seed in first}
    differences = {seed: a - b for seed, (a, b) in pairs.items() if None not in (a, b)}
    if not differences:
        return None
    values = list(differences.values())
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Paired(differences, statistics.fmean(values), error)


def arm_rows(arms: Arms, kinds: Sequence[str]) -> Iterator[str]:
    """Yield the table of arms: scores, sizes, speed, and cost by step against the first arm's."""
    heads = ["arm", "seeds", *(kind.replace("_", " ") for kind in kinds), "artifact bytes",
             "parameters", "tokens", "tokens/s", "ms/step", "× first"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" + "|---:" * (len(heads) - 1) + "|"
    first = None
    for name, runs in arms.items():
        def values(field, runs=runs):
            return [line[field] for line in runs.values()]
        step_ms = statistics.fmean(values("step_ms"))
        first = first or step_ms
        scores = [[s for line in runs.values() if (s := score_of(line, kind)) is not None]
                  for kind in kinds]
        cells = [name, str(len(runs)), *(mean_and_deviation(found, 4) for found in scores),
                 mean_and_deviation(values("artifact_bytes"), 0),
                 f"{statistics.fmean(values('parameters')):,.0f}",
                 f"{statistics.fmean(values('trained_tokens')):,.0f}",
                 mean_and_deviation(values("tokens_per_second"), 0),
                 mean_and_deviation(values("step_ms"), 1), f"{step_ms / first:.3f}"]
        yield f"| {' | '.join(cells)} |"


def paired_rows(arms: Arms, kinds: Sequence[str]) -> Iterator[str]:
    """Yield the table of differences to the first arm, in bpb."""
    (first_name, first), *others = arms.items()
    if not others:
        return
    yield f"Differences to {first_name}, bpb, seed by seed (negative: better):"
    yield ""
    yield "| arm | score | mean | standard error | verdict | by seed |"
    yield "|---|---|---:|---:|---|---|"
    for name, runs in others:
        for kind in kinds:
            if found := paired(runs, first, kind):
                error = "-" if found.error is None else f"{found.error:.5f}"
                seeds = ", ".join(f"{seed}: {d:+.5f}" for seed, d in found.differences.items())
                yield (f"| {name} | {kind.replace('_', ' ')} | {found.mean:+.5f} | {error} | "
                       f"{found.verdict} | {seeds} |")
    yield ""
    yield "Means under two standard errors are unresolved. " + CHANCE


def notes(arms: Arms, kinds: Sequence[str]) -> Iterator[str]:
    """Yield what a reader must know to trust the tables."""
    lines = [line for runs in arms.values() for line in runs.values()]
    common = set.intersection(*map(own_settings, lines))
    yield f"- all arms: {' '.join(sorted(map('='.join, common))) or 'nothing set'}"
    for name, runs in arms.items():
        own = own_settings(next(iter(runs.values()))) - common
        yield f"- {name}: {' '.join(sorted(map('='.join, own))) or 'nothing else'}"
        took = statistics.fmean(line["artifact_bytes"] for line in runs.values())
        asked = bytes_of_line(lines[0])
        if abs(took / asked - 1) > SAME_BYTES:
            yield f"- NOT EQUAL BYTES: {name} takes {took:,.0f} of {asked:,}"
        if len(runs) < len({line["run"]["seed"] for line in lines}):
            yield f"- {name} lacks seeds that others have"
    if "gap" in kinds:
        yield "- gap: round trip less pre-quant, both over whole windows"
    machines = sorted({line["machine"] for line in lines})
    yield f"- {'machine' if len(machines) == 1 else 'SEVERAL MACHINES'}: {'; '.join(machines)}"
    scripts = sorted({line["script_sha256"][:12] for line in lines})
    yield f"- {'train_gpt.py' if len(scripts) == 1 else 'SEVERAL SCRIPTS'}: {', '.join(scripts)}"


def table(arms: Arms) -> str:
    """Return a race as Markdown; the first arm is what others are compared to."""
    kinds, line = score_kinds(arms), next(iter(next(iter(arms.values())).values()))
    run = line["run"]
    budget = f"{run['tokens']:,} tokens" if "tokens" in run else f"{run['seconds']:g} s"
    head = (f"{budget} of training each, artifacts of {bytes_of_line(line):,} bytes without code, "
            f"{run['data']['targets']:,} validation targets, on {run['device']}. bpb, mean ± "
            "sample standard deviation over seeds.")
    parts = [[head], arm_rows(arms, kinds), paired_rows(arms, kinds), notes(arms, kinds)]
    return "\n\n".join(text for part in parts if (text := "\n".join(part))) + "\n"


def results_table(path: Path, chosen: Sequence[str]) -> str:
    """Return the tables of all races in a results file. chosen: arms in order; empty: all."""
    if not (lines := read_results(path)):
        raise RaceError(f"{path}: no runs in it")
    tables = []
    for group in by_race(lines):
        arms = by_arm(group)
        kept = {name: arms[name] for name in chosen or arms if name in arms}
        tables += [table(kept)] if kept else []
    if not tables:
        raise RaceError(f"--only {','.join(chosen)}: no such arm; there are "
                        f"{', '.join(dict.fromkeys(line['arm'] for line in lines))}")
    return "\n".join(tables)


# ---- the command line ----------------------------------------------------------------------------


def whole_numbers(text: str) -> list[int]:
    """Return different whole numbers with commas between."""
    found = [int(part) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise ValueError(text)
    return found


def add_run_arguments(run: argparse.ArgumentParser) -> None:
    run.add_argument("--arm", action="append", default=[], help='"name: NAME=VALUE …"')
    run.add_argument("--arms", action="append", default=[], type=Path, metavar="FILE",
                     help="[name] sections with NAME=VALUE lines")
    run.add_argument("--base", action="append", default=[], help="settings of all arms")
    run.add_argument("--seeds", type=whole_numbers, default=[1, 2], help="1,2 unless given")
    budget = run.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=int, help="that each arm trains on")
    budget.add_argument("--seconds", type=float, help="of training + calibration, instead")
    size = run.add_mutually_exclusive_group(required=True)
    size.add_argument("--bytes", type=int, help="of every artifact, without code")
    size.add_argument("--bytes-of", metavar="ARM", help="those that this arm takes by itself")
    run.add_argument("--data", type=Path, required=True, help="folder of shards")
    run.add_argument("--tokenizer", type=Path, help="DATA/tokenizer.model unless given")
    run.add_argument("--targets", type=int, help="validation targets at most, whole documents")
    run.add_argument("--results", type=Path, required=True, help="JSON lines, one a run")
    run.add_argument("--table", type=Path, help="Markdown file; it is printed anyway")
    run.add_argument("--folder", type=Path, default=REPO / "runs" / "race", help="for products")
    run.add_argument("--jobs", type=int, default=1, help="runs at once")
    run.add_argument("--threads", type=int, default=1, help="of each run on a CPU")
    run.add_argument("--script", type=Path, default=REPO / "train_gpt.py")
    run.add_argument("--strict", action="store_true", help="repeat runs of another script's hash")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_run_arguments(commands.add_parser("run", help="race arms"))
    shown = commands.add_parser("table", help="tables of a results file, without running")
    shown.add_argument("results", type=Path)
    shown.add_argument("--only", default="", metavar="ARM,ARM", help="these, the first one first")
    made = commands.add_parser("prepare", help="documents as shards")
    for name in ("train", "val", "tokenizer", "folder"):
        made.add_argument(name, help="jsonl or jsonl.xz" if name in ("train", "val") else None)
    made.add_argument("--tokens", type=int, default=25_000_000, help="of training text at most")
    made.add_argument("--val-tokens", type=int, default=1_000_000)
    return parser.parse_args(argv)


def refuse_not_above_0(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(options, name)) is not None and not value > 0:
            raise RaceError(f"--{name.replace('_', '-')} {value}: must be above 0")


def set_up(options: argparse.Namespace) -> Race:
    """Return the race that the command line describes; raises RaceError with all its faults."""
    refuse_not_above_0(options, "tokens", "seconds", "bytes", "targets", "jobs", "threads")
    arms, script = collect_arms(options), load_script(options.script.resolve())
    folder = options.folder.resolve()
    data = lay_data(script, options, folder)
    arms = complete_all(script, arms, options, data.vocab_size)
    wanted = {script.load_config(settings).device for settings in arms.values()}
    cuda = script.torch.cuda.is_available()
    devices = {"cuda" if cuda and name != "cpu" else "cpu" for name in wanted}
    if len(devices) > 1:
        raise RaceError("DEVICE: some arms run on the CPU, others on the GPU; that is no race")
    return Race(options.script.resolve(), folder, arms, data, options.results, options.tokens,
                options.seconds, devices.pop(), options.jobs, options.threads, options.strict)


def run_command(options: argparse.Namespace) -> int:
    """Race, show the table; 1 where a run failed."""
    race = set_up(options)
    lines, failed = run_race(race, options.seeds, options.bytes, options.bytes_of)
    text = table(by_arm(lines)) if lines else "no run is finished\n"
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    if failed:
        print(f"FAILED: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def prepare_command(options: argparse.Namespace) -> int:
    """Make shards of documents."""
    refuse_not_above_0(options, "tokens", "val_tokens")
    try:
        gpu_full_run.prepare(options.train, options.val, options.tokenizer, options.folder,
                             options.tokens, options.val_tokens)
    except ValueError as error:
        raise RaceError(str(error)) from None
    return 0


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    with contextlib.suppress(ValueError):  # outside the main thread: no Ctrl-C either
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.command == "run":
            return run_command(options)
        if options.command == "table":
            print(results_table(options.results, [n for n in options.only.split(",") if n]))
            return 0
        return prepare_command(options)
    except (RaceError, OSError) as error:
        print("error: " + str(error).replace("\n", "\n       "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
