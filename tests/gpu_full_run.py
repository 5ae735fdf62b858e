"""Run the default configuration on one GPU, on your own text: check what only a GPU tells.

    python tests/gpu_full_run.py prepare DOCS.jsonl.xz VAL.jsonl.xz sp8192.model FOLDER
    python tests/gpu_full_run.py run FOLDER [NAME=VALUE ...]

`prepare` (needs only numpy and sentencepiece) tokenises documents into shards. `run` trains the
full default model at 98,304 tokens a step, one GPU's share of the record batch, 200 steps with
recurrence from step 100, calibrates, quantises, packs and scores; then it fails unless the depth
switch compiled nothing, every product exists and all verdicts hold. Not collected by pytest.
"""

import importlib.util
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict(TRAIN_BATCH_TOKENS="98304", ITERATIONS="200", RECUR_START_STEP="100",
                MAX_WALLCLOCK_SECONDS="0", TRAIN_LOG_EVERY="10", VAL_LOSS_EVERY="100",
                RUN_ID="gpu_full_run", TORCH_LOGS="recompiles")


def shard_writer():
    """Return data/shards.py as a module."""
    spec = importlib.util.spec_from_file_location("shards", ROOT / "data" / "shards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(train_docs, val_docs, tokenizer, folder, max_tokens=25_000_000, max_val_tokens=300_000):
    """Write one training and one validation shard from jsonl(.xz) documents."""
    import sentencepiece
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = (("train", train_docs, max_tokens), ("val", val_docs, max_val_tokens))
    for split, path, limit in parts:
        opener = lzma.open if path.endswith(".xz") else open
        tokens = []
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                tokens += [processor.bos_id(), *processor.encode(json.loads(line)["text"])]
                if len(tokens) >= limit:
                    break
        shard_writer().write_shard(folder / f"fineweb_{split}_000000.bin",
                                   np.array(tokens[:limit], dtype=np.uint16))
        print(f"{split}: {min(len(tokens), limit)} tokens")
    shutil.copy(tokenizer, folder / "tokenizer.model")


def run(folder, *overrides):
    """Run the script, then check its log; returns the exit code."""
    folder = Path(folder).resolve()
    env = {**os.environ, **SETTINGS, "DATA_PATH": str(folder),
           "TOKENIZER_PATH": str(folder / "tokenizer.model"),
           **dict(pair.split("=", 1) for pair in overrides)}
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    faults = [] if done.returncode == 0 else [f"exit code {done.returncode}"]
    after_start = done.stdout.split("recurrence: starts", 1)[-1].split("ema:applying", 1)[0]
    if "Recompiling function" in after_start:
        faults.append("something compiled between the first step and the last")
    if not re.search(r"recurrence:activated at step \d+", done.stdout):
        faults.append("recurrence never switched on")
    result = re.search(r"^RESULT (.*)$", done.stdout, re.M)
    facts = json.loads(result[1]) if result else {}
    if not all(facts.get("verdicts", {"": False}).values()):
        faults.append(f"verdicts: {facts.get('verdicts')}")
    print("\n".join(f"FAILED: {fault}" for fault in faults) or "ok: switched, packed, scored")
    return bool(faults)


if __name__ == "__main__":
    commands = {"prepare": prepare, "run": run}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
