"""What several test files share: a tiny corpus, a tiny model's settings, finished runs.

The corpus is made from the documentation inside the Python installation, so the tests need no
download. Whatever a fixture of session scope returns is read-only: copy a folder to change it.
The suite runs in several processes; what takes long is made once for all of them (`shared`).
"""

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import shards
from forks import Nursery
from hypothesis import settings

# before torch is imported: the tests' tensors gain nothing by threads, and fill the processors
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("any machine", deadline=None)  # a busy one is slow now and then
settings.load_profile("any machine")

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "train_gpt.py"
VOCAB_SIZE, SEQ_LEN, BOS_ID = 512, 64, 1
TRAIN_BYTES, VAL_TOKENS = 150_000, 6_011  # the latter is no multiple of SEQ_LEN: there is a tail
# Bytes the tiny model's artifact may have: about 3.4 bits a weight, inside the search's range.
TINY_ARTIFACT_BYTES = 110_000

TINY_MODEL = dict(
    VOCAB_SIZE=VOCAB_SIZE, TRAIN_SEQ_LEN=SEQ_LEN, EVAL_SEQ_LEN=SEQ_LEN, EVAL_STRIDE=16,
    NUM_LAYERS=4, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, XSA_LAST_N=4, ROPE_DIMS=8,
    VE_LAYERS="2,3", VE_DIM=16, RECUR_LAYERS="1,2", PARALLEL_START_LAYER=2)
TINY_RUN = dict(
    MAX_WALLCLOCK_SECONDS=0, ITERATIONS=12, TRAIN_BATCH_TOKENS=1024, MICRO_BATCH_TOKENS=1024,
    WARMUP_STEPS=2, RECUR_START_FRAC=0.5, MUON_MOMENTUM_WARMUP_FRAC=0.3, EMA_DECAY=0.8,
    TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=6, VAL_BATCH_TOKENS=32_768, PREQUANT_SLIDING=1,
    GPTQ_CALIBRATION_BATCHES=16, FP16_MAX_NUMEL=1024, DEVICE="cpu")


# ---- several processes -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared(request, tmp_path_factory):
    """A function (name, make) -> make(a new folder); of the suite's processes only one makes it.

    The others wait and get a copy of what was returned; the folder is the same one. Read-only.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base  # one of several

    def get(name, make):
        folder, done = base / f"shared-{name}", base / f"shared-{name}.done"
        with open(base / f"shared-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                done.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(done.read_bytes())

    return get


@pytest.fixture
def say(record_property):
    """A function that prints a line at the end of the suite, whichever process ran the test."""
    return lambda text: record_property("said", text)


def pytest_terminal_summary(terminalreporter):
    reports = [r for found in terminalreporter.stats.values() for r in found
               if getattr(r, "when", "") == "call"]
    for text in [text for r in reports for kind, text in r.user_properties if kind == "said"]:
        terminalreporter.write_line(text)


# ---- a tiny corpus and runs --------------------------------------------------------------------


class TinyData(NamedTuple):
    """Where the tiny corpus lies: two training shards and a validation shard, and the tokenizer."""

    shards: Path
    tokenizer: Path

    def env(self) -> dict[str, str]:
        return dict(DATA_PATH=str(self.shards), TOKENIZER_PATH=str(self.tokenizer))


def train_tokenizer(documents, path, **changes):
    """Train a SentencePiece tokenizer by the published recipe, in 512 pieces, but for `changes`."""
    import encoding  # needs sentencepiece, without which some tests are skipped
    path.write_bytes(encoding.train_tokenizer(documents, **{"vocab_size": VOCAB_SIZE, **changes}))


@pytest.fixture(scope="session")
def tiny_documents():
    """Return paragraphs of the language reference, most of TRAIN_BYTES and some for validation."""
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    paragraphs = [p for p in dict.fromkeys(paragraphs) if 40 <= len(p.encode()) <= 4000]
    kept, size = [], 0
    for paragraph in paragraphs:
        kept.append(paragraph)
        size += len(paragraph.encode())
        if size > TRAIN_BYTES:
            break
    return kept


@pytest.fixture(scope="session")
def tiny_data(shared, tiny_documents):
    return shared("tiny_data", lambda folder: write_tiny_data(folder, tiny_documents))


def write_tiny_data(folder, tiny_documents):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer, out = folder / "tiny.model", folder / "shards"
    out.mkdir()
    train_tokenizer(tiny_documents, tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = [t for text in tiny_documents for t in (BOS_ID, *processor.encode(text))]
    val, train = tokens[:VAL_TOKENS], tokens[VAL_TOKENS:]
    half = len(train) // 2 + 7  # no multiple of a window
    shards.write_shard(out / "fineweb_train_000000.bin", np.array(train[:half]))
    shards.write_shard(out / "fineweb_train_000001.bin", np.array(train[half:]))
    shards.write_shard(out / "fineweb_val_000000.bin", np.array(val))
    return TinyData(out, tokenizer)


@pytest.fixture(scope="session")
def tiny_env(tiny_data):
    """Settings of a tiny model in which every part of a run acts."""
    cap = SCRIPT.stat().st_size + TINY_ARTIFACT_BYTES
    values = {**TINY_MODEL, **TINY_RUN, **tiny_data.env(), "ARTIFACT_MAX_BYTES": cap}
    return {name: str(value) for name, value in values.items()}


class Outcome(NamedTuple):
    """What a started script left: exit code, output, its RESULT line as a dict (or None)."""

    rc: int
    stdout: str
    stderr: str
    result: dict | None


def base_env(cwd):
    """Return the environment a subprocess needs besides settings.

    One thread: the tiny tensors gain nothing from more, and a busy machine loses by them.
    """
    return {"PATH": os.environ.get("PATH", ""), "HOME": str(cwd), "OMP_NUM_THREADS": "1"}


def run_script(env, cwd, nproc=1, args=(), timeout=300, script=SCRIPT) -> Outcome:
    """Run the script in a subprocess with no settings but `env`; nproc > 1 through torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *(launcher if nproc > 1 else ()), str(script), *args]
    settings = {name: str(value) for name, value in env.items()}
    done = subprocess.run(command, env={**base_env(cwd), **settings}, cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else None
    return Outcome(done.returncode, done.stdout, done.stderr, result)


def read_events(cwd, run_id) -> list[dict]:
    """Return the events of a run, in order."""
    text = (Path(cwd) / "runs" / run_id / "events.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class TinyRun(NamedTuple):
    """A finished run of `tiny_env`: the folder it was started in, its run id, its outcome."""

    cwd: Path
    run_id: str
    outcome: Outcome

    @property
    def folder(self) -> Path:
        return self.cwd / "runs" / self.run_id

    def events(self, kind=None) -> list[dict]:
        return [e for e in read_events(self.cwd, self.run_id) if kind in (None, e["event"])]


@pytest.fixture(scope="session")
def tiny_run(tiny_env, shared):
    """One finished run of all stages on one rank. Read-only."""
    def make(cwd):
        outcome = run_script({**tiny_env, "RUN_ID": "tiny"}, cwd)
        assert outcome.rc == 0, outcome.stderr
        return TinyRun(cwd, "tiny", outcome)
    return shared("tiny_run", make)


# Every stage of the tiny model in about a second: no search, no validation on the way.
SMALL_RUN = dict(RUN_ID="x", WARMUP_STEPS=0, ITERATIONS=8, VAL_LOSS_EVERY=0, PREQUANT_SLIDING=0,
                 EVAL_STRIDE=32, GPTQ_CALIBRATION_BATCHES=4, SDCLIP_K=6, SDCLIP_K_EMBED=10,
                 ARTIFACT_MAX_BYTES=1_000_000)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """A process that forks runs of the script."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def small_env(tiny_env):
    return {**tiny_env, **SMALL_RUN}


@pytest.fixture(scope="session")
def small_run(nursery, small_env, shared):
    """The folder of an undisturbed run of `small_env`. Read-only."""
    def make(cwd):
        run = nursery.run(small_env, cwd)
        assert run.rc == 0, run.stderr
        return cwd
    return shared("small_run", make)
