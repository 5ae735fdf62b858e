"""Judge quantisers at equal file bytes on a trained model (not collected by pytest).

    python tests/bench_quantize.py RUN_FOLDER                     # the ablation table
    python tests/bench_quantize.py RUN_FOLDER --set "STEP_RULE=fisher ROW_POWER=0" --bytes 2000000
    python tests/bench_quantize.py --help

RUN_FOLDER holds final_model.weights and final_model.stats of any run of train_gpt.py (yours too);
the validation shards and tokenizer are named by --data and --tokenizer. Every variant goes through
the script's own quantiser, coder, container and reader. Bytes are those of the artifact's file;
the yardstick is GPTQ with SDClip k = 12.85 and no floor on the matrices, embeddings rounded at
k = 20, Brotli 11. KL is that of the unquantised model's distribution to the quantised one's, mean
over --tokens targets of the validation text in windows that do not overlap; dbpb is the difference
of their scores in bits per byte.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t  # noqa: E402

YARDSTICK = "STEP_RULE=sdclip SDCLIP_K=12.85 SDCLIP_K_EMBED=20 EMBED_GPTQ=0 COMPRESSOR=brotli"
TABLE = [  # at the yardstick's bytes; a number behind @ is a share of them
    ("yardstick", YARDSTICK),
    ("PR #1471's floors", YARDSTICK + " SCALE_FLOOR=0.03225806 SCALE_FLOOR_EMBED=0.00787402"),
    ("GPTQ embeddings, searched k", "STEP_RULE=sdclip COMPRESSOR=brotli"),
    ("the same, entropy coder", "STEP_RULE=sdclip"),
    ("embeddings by frequency only", "ROW_POWER=0 COLUMN_POWER=0"),
    ("rows and tensors by Fisher", "COLUMN_POWER=0"),
    ("default", ""),
    ("default, columns full", "COLUMN_POWER=1"),
    ("default, tensors' means only", "ROW_POWER=0"),
    ("default, embedding rows alike", "EMBED_POWER=0"),
    ("default, embedding rows half", "EMBED_POWER=0.5"),
    ("default, Brotli", "COMPRESSOR=brotli"),
    ("default @ 80 % of the bytes", "@0.8"),
]


class Bench:
    """A run's weights and statistics, and how far a set of weights is from them."""

    def __init__(self, folder: Path, env: dict, num_tokens: int):
        self.header, self.weights = t.read_tensors(folder / "final_model.weights", "weights")
        self.stats_header, self.stats = t.read_tensors(folder / "final_model.stats", "stats")
        self.env = env
        self.config = self.config_of({})
        layouts = t.layouts_of(self.config)
        self.layout = next(x for x in layouts if list(x.order) == self.header["order"])
        text = t.load_validation(self.config)
        windows = min(num_tokens, len(text.target_bytes)) // self.config.eval_seq_len
        self.count = windows * self.config.eval_seq_len
        tokens = torch.from_numpy(text.tokens[:self.count + 1].astype("int64"))
        self.tokens, self.targets = tokens[:-1].view(windows, -1), tokens[1:].view(windows, -1)
        self.bytes = int(text.target_bytes[:self.count].sum())
        self.base = self.log_odds(self.weights)
        self.nats = self.nats_of(self.base)

    def calibrate(self):
        """Collect the statistics anew, from the training shards beside the validation text."""
        runtime = t.Runtime({}, self.config)
        model = t.GPT(self.config)
        t.load_weights(model, self.weights)
        shards = t.ShardSet(t.find_shards(self.config.shard_dir, "train"),
                            self.config.train_seq_len)
        calibration = t.Calibration(model, self.config, runtime)
        self.stats = calibration.run(self.layout, t.Loader(shards, self.config, runtime), t.Clock(),
                                     t.Log(False))
        self.stats_header = dict(readers=calibration.readers)

    def config_of(self, changes: dict) -> t.Config:
        stored = t.stored_settings(self.header, Path("weights"))
        # how the run itself was quantised does not matter here, only what its statistics are of
        env = {name.upper(): t.show_value(value) for name, value in stored.items()
               if t.KNOBS[name].metadata["topic"] != "quantization" or name == "fp16_max_numel"}
        return t.load_config({**env, **self.env, **changes})

    def log_odds(self, weights) -> list[torch.Tensor]:
        model = t.GPT(self.config)
        t.load_weights(model, weights)
        with torch.inference_mode():
            return [model.logits(part, self.layout).log_softmax(-1).half()
                    for part in self.tokens.split(16)]

    def nats_of(self, odds) -> float:
        return -sum(part.float().gather(-1, y[..., None]).double().sum().item()
                    for part, y in zip(odds, self.targets.split(16), strict=True))

    def judge(self, weights) -> tuple[float, float]:
        """Return (KL per token in nats, difference in bits per byte)."""
        odds, kl = self.log_odds(weights), 0.0
        for p, q in zip(self.base, odds, strict=True):
            kl += (p.float().exp() * (p.float() - q.float())).sum().item()
        return kl / self.count, (self.nats_of(odds) - self.nats) / math.log(2) / self.bytes

    def variant(self, changes: dict, limit_bytes: int):
        """Quantise, pack, read back; return (bytes, bits a matrix weight, an embedding's, weights).

        limit_bytes counts the artifact alone; a given k ignores it.
        """
        config = self.config_of(changes)
        known = t.sensitivity_of(self.stats, self.stats_header["readers"], self.weights,
                                 config.fisher_steps)
        quantizer = t.Quantizer(self.weights, known, config, torch.device("cpu"))
        head = dict(self.header, kind="artifact", config=t.artifact_config(config))
        multiplier, packed = t.fit_artifact(quantizer, head, config, limit_bytes,
                                            lambda *told: None)
        header, tensors = t.open_container(packed, "artifact", "bench")
        weights = t.restore_weights(header, tensors, config, "bench")
        return (len(packed), quantizer.bits(multiplier, "int6"), quantizer.bits(multiplier, "int8"),
                weights)


def parse_settings(text: str) -> dict:
    return dict(pair.split("=", 1) for pair in text.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="data/datasets/bench_sp1024")
    parser.add_argument("--tokenizer", default="data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--tokens", type=int, default=500_000, help="validation targets")
    parser.add_argument("--set", action="append", default=[], dest="sets",
                        help="settings of one more variant, instead of the table")
    parser.add_argument("--bytes", type=int, help="file bytes of each variant (the yardstick's)")
    parser.add_argument("--calibrate", metavar="SETTINGS",
                        help="collect the statistics anew with these settings, for example "
                             "'TRAIN_BATCH_TOKENS=8192 GPTQ_CALIBRATION_BATCHES=256'")
    options = parser.parse_args()
    env = dict(DATA_PATH=options.data, TOKENIZER_PATH=options.tokenizer, DEVICE="cpu")
    bench = Bench(options.folder, env, options.tokens)
    if options.calibrate:
        bench.env |= parse_settings(options.calibrate)
        bench.config = bench.config_of({})
        bench.calibrate()
    print(f"{bench.count} targets, unquantised {bench.nats / math.log(2) / bench.bytes:.4f} bpb")
    rows = [(text or "default", text) for text in options.sets] or TABLE[1:]
    yardstick, first = None, ("yardstick", YARDSTICK)
    print(f"{'variant':34} {'bytes':>9} {'matrix':>6} {'embed':>6} {'KL':>9} {'x':>6} "
          f"{'dbpb':>8} {'x':>6} {'s':>5}", flush=True)
    for name, text in [first, *rows]:
        settings, _, share = text.partition("@")
        limit = int(float(share or 1) * (options.bytes or (yardstick or [1 << 30])[0]))
        since = time.perf_counter()
        size, matrix, embed, weights = bench.variant(parse_settings(settings), limit)
        seconds = time.perf_counter() - since
        kl, dbpb = bench.judge(weights)
        yardstick = yardstick or (size, kl, dbpb)
        print(f"{name:34} {size:9} {matrix:6.3f} {embed:6.3f} {kl:9.6f} {kl / yardstick[1]:6.3f} "
              f"{dbpb:8.5f} {dbpb / yardstick[2]:6.3f} {seconds:5.1f}", flush=True)
        print(json.dumps(dict(name=name, settings=settings, bytes=size, kl=kl, dbpb=dbpb)),
              file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
