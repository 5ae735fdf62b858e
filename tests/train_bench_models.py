"""Train the models that tests/bench_quantize.py judges quantisers on (not collected by pytest).

    python tests/train_bench_models.py --seed 1 --steps 1900    # once; the same line again goes on

Real recurrence, lanes and value embeddings at about 5 million parameters, on English documents:
make the shards first, with the 1,024-piece tokenizer of the challenge, from a training file and a
validation file of documents, as data/README.md tells ("Your own text"):

    python data/tokenize_corpus.py VAL.jsonl TRAIN.jsonl.xz --val-docs N --name bench_sp1024 …

Weights and statistics land in runs/bench_s<seed>/. A copy of train_gpt.py is kept there too and
used to go on, so that editing the script does not spoil a run that takes hours on two cores.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SETTINGS = dict(
    STAGE="train", VOCAB_SIZE=1024, MODEL_DIM=256, NUM_LAYERS=6, NUM_HEADS=4, NUM_KV_HEADS=2,
    XSA_LAST_N=6, VE_LAYERS="4,5", VE_DIM=64, RECUR_LAYERS="2,3", PARALLEL_START_LAYER=4,
    TRAIN_SEQ_LEN=512, EVAL_SEQ_LEN=512, TRAIN_BATCH_TOKENS=8192, MICRO_BATCH_TOKENS=8192,
    MAX_WALLCLOCK_SECONDS=0, RECUR_START_FRAC=0.35, MUON_MOMENTUM_WARMUP_FRAC=0.3,
    EMA_DECAY=0.99, WARMUP_STEPS=2, VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=20, FP16_MAX_NUMEL=4096,
    VAL_BATCH_TOKENS=65_536, GPTQ_CALIBRATION_BATCHES=256,
    CHECKPOINT_EVERY_SECONDS=120,
    DEVICE="cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1900, help="of 8,192 tokens")
    parser.add_argument("--data", default="data/datasets/bench_sp1024", help="shard folder")
    parser.add_argument("--tokenizer", default="data/tokenizers/fineweb_1024_bpe.model")
    options = parser.parse_args()
    folder = REPO / "runs" / f"bench_s{options.seed}"
    script = folder / "train_gpt.py"
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / "train_gpt.py", script)
    env = {**os.environ, **{name: str(value) for name, value in SETTINGS.items()},
           "SEED": str(options.seed), "ITERATIONS": str(options.steps), "DATA_PATH": options.data,
           "TOKENIZER_PATH": options.tokenizer, "RUN_ID": folder.name, "RESUME": "1"}
    return subprocess.run([sys.executable, str(script)], env=env, cwd=REPO).returncode


if __name__ == "__main__":
    sys.exit(main())
