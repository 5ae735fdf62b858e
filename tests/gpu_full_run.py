"""Run the default configuration on one GPU, on your own text: check what only a GPU tells.

    python tests/gpu_full_run.py prepare DOCS.jsonl.xz VAL.jsonl.xz sp8192.model FOLDER
    python tests/gpu_full_run.py run FOLDER [NAME=VALUE ...]

`prepare` (needs only numpy and sentencepiece) tokenises documents into shards. `run` trains the
full default model at 98,304 tokens a step, one GPU's share of the record batch, 200 steps with
recurrence from step 100, calibrates, quantises, packs and scores; then it fails unless the depth
switch compiled nothing, every product exists and all verdicts hold. Not collected by pytest.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))  # pytest's own path has it; run by hand this must
SETTINGS = dict(TRAIN_BATCH_TOKENS="98304", ITERATIONS="200", RECUR_START_STEP="100",
                MAX_WALLCLOCK_SECONDS="0", TRAIN_LOG_EVERY="10", VAL_LOSS_EVERY="100",
                RUN_ID="gpu_full_run", TORCH_LOGS="recompiles")


def first_tokens(path, processor, limit):
    """Return the first `limit` tokens (N,) uint16 of a file's documents; ValueError without any."""
    import documents
    import encoding
    parts, count = [], 0
    try:
        found = documents.read_documents(documents.find_files([Path(path)]), documents.Source())
        for document in found:
            parts += encoding.encode_batch(processor, [document.text])
            count += len(parts[-1])
            if count >= limit:
                break
    except documents.DataError as error:
        own = " (an option of data/tokenize_corpus.py)" if "--" in str(error) else ""
        raise ValueError(f"{error}{own}") from None
    if not parts:
        raise ValueError(f"{path}: holds no document, must hold at least one; write a line "
                         '{"text": "..."} for each')
    return np.concatenate(parts)[:limit]


def prepare(train_docs, val_docs, tokenizer, folder, max_tokens=25_000_000, max_val_tokens=300_000):
    """Write one training and one validation shard from jsonl(.xz) documents.

    Raises ValueError, before it writes, for a tokenizer or documents that make no shards.
    """
    import encoding
    import shards
    processor = encoding.load_processor(Path(tokenizer))
    encoding.check_tokenizer(processor, tokenizer)
    parts = dict(train=first_tokens(train_docs, processor, max_tokens),
                 val=first_tokens(val_docs, processor, max_val_tokens))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in parts.items():
        shards.write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
        print(f"{split}: {len(tokens)} tokens")
    shards.write_atomic(folder / "tokenizer.model", Path(tokenizer).read_bytes())


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
    try:
        sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
    except (ValueError, OSError) as fault:
        sys.exit(f"error: {fault}")
