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
of their scores in bits per byte. --rows keeps the lines as JSON; --summary makes one table of such
files from several seeds:

    python tests/bench_quantize.py --summary rows1.jsonl rows2.jsonl rows3.jsonl
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from candidates import gptaq  # noqa: E402

import train_gpt as t  # noqa: E402

AIM_WINDOWS = 256  # of training text, for asymmetric targets

YARDSTICK = "STEP_RULE=sdclip SDCLIP_K=12.85 SDCLIP_K_EMBED=20 EMBED_GPTQ=0 COMPRESSOR=brotli"
PLAIN = "TRELLIS=0 UNWEIGHTED "
TABLE = [  # at the yardstick's bytes; a number behind @ is a share of them
    ("yardstick", YARDSTICK),
    ("PR #1471's floors", YARDSTICK + " SCALE_FLOOR=0.03225806 SCALE_FLOOR_EMBED=0.00787402"),
    ("GPTQ embeddings, searched k", "STEP_RULE=sdclip COMPRESSOR=brotli"),
    ("+ entropy coder", "STEP_RULE=sdclip"),
    ("+ embeddings by frequency", PLAIN + "ROW_POWER=0 COLUMN_POWER=0"),
    ("+ rows and tensors by Fisher", PLAIN + "COLUMN_POWER=0"),
    ("+ columns by water-filling", PLAIN),
    ("+ tokens by their gradients", "TRELLIS=0"),
    ("+ trellis", "COUPLE_ROWS=0"),
    ("+ rows coupled = default", ""),
    ("default, asymmetric targets", "ASYMMETRIC"),
    ("default, columns full", "COLUMN_POWER=1"),
    ("default, columns alike", "COLUMN_POWER=0"),
    ("default, tensors' means only", "ROW_POWER=0"),
    ("default, embedding rows alike", "EMBED_POWER=0"),
    ("default, embedding rows half", "EMBED_POWER=0.5"),
    ("default, Brotli", "COMPRESSOR=brotli"),
    ("default @ 80 % of the bytes", "@0.8"),
    ("default @ 70 % of the bytes", "@0.7"),
]


class Bench:
    """A run's weights and statistics, and how far a set of weights is from them."""

    def __init__(self, folder: Path, env: dict, num_tokens: int):
        self.header, self.weights = t.read_tensors(folder / "final_model.weights", "weights")
        self.sha256 = hashlib.sha256((folder / "final_model.weights").read_bytes()).hexdigest()
        _, stats = t.read_tensors(folder / "final_model.stats", "stats")
        self.stats = dict.fromkeys(t.STEP_RULES, stats)
        self.folder, self.env = folder, env
        self.config = self.config_of({})
        self.layout = t.phases(self.config)[t.phase_of(self.header, self.config, folder)].layout
        text = t.load_validation(self.config)
        windows = min(num_tokens, len(text.target_bytes)) // self.config.eval_seq_len
        self.count = windows * self.config.eval_seq_len
        tokens = torch.from_numpy(text.tokens[:self.count + 1].astype("int64"))
        self.tokens, self.targets = tokens[:-1].view(windows, -1), tokens[1:].view(windows, -1)
        self.bytes = int(text.target_bytes[:self.count].sum())
        self.base = self.log_odds(self.weights)
        self.nats = self.nats_of(self.base)

    def loader(self) -> t.Loader:
        shards = t.ShardSet(t.find_shards(self.config.shard_dir, "train"),
                            self.config.train_seq_len)
        return t.Loader(shards, self.config, t.Runtime({}, self.config))

    def calibrate(self, settings: str):
        """Collect the statistics anew, as each rule does, or read those kept with the run."""
        self.env |= parse_settings(settings)
        for rule in self.stats:
            kept = self.folder / f"bench.{rule}.stats"
            source = hashlib.sha256(Path(t.__file__).read_bytes()).hexdigest()
            made = dict(settings=settings, data=self.env["DATA_PATH"], weights=self.sha256,
                        source=source)
            header = dict(self.header, kind="stats", **made)
            if kept.exists():
                found, stats = t.read_tensors(kept, "stats")
                if all(found.get(name) == value for name, value in made.items()):
                    self.stats[rule] = stats
                    continue
            config = self.config_of(dict(STEP_RULE=rule))
            model = t.GPT(config)
            model.load_state_dict(self.weights)
            calibration = t.Calibration(model, config, t.Runtime({}, config))
            self.stats[rule] = calibration.run(self.layout, self.loader(), t.Clock(), t.Log(False))
            t.write_tensors(kept, header, self.stats[rule])

    def aim(self, quantised):
        """Return (weights, statistics) with targets for the inputs that quantised weights give."""
        loader = self.loader()
        batches = [loader.read(at, 4) for at in range(0, AIM_WINDOWS, 4)]
        names = [name.removesuffix(".weight") for name, entry in t.coded(self.config).items()
                 if entry.role is t.Role.MATRIX]
        moments = gptaq.paired_moments(t.GPT(self.config), self.weights, quantised, batches,
                                       self.layout, names)
        return gptaq.asymmetric_targets(self.weights, moments)

    def config_of(self, changes: dict) -> t.Config:
        stored = t.stored_settings(self.header, Path("weights"))
        # how the run itself was quantised does not matter here, only what its statistics are of
        env = {name.upper(): t.show_value(value) for name, value in stored.items()
               if t.KNOBS[name].metadata["topic"] != "quantization" or name == "fp16_max_numel"}
        return t.load_config({**env, **self.env, **changes})

    def log_odds(self, weights) -> list[torch.Tensor]:
        model = t.GPT(self.config)
        model.load_state_dict(weights)
        with torch.inference_mode():
            return [model.logits(part, self.layout).log_softmax(-1).half()
                    for part in t.Batch(self.tokens, self.targets).split(16)]

    def nats_of(self, odds) -> float:
        return -sum(part.float().gather(-1, y[..., None]).double().sum().item()
                    for part, y in zip(odds, self.targets.split(16), strict=True))

    def judge(self, weights) -> tuple[float, float]:
        """Return (KL per token in nats, difference in bits per byte)."""
        odds, kl = self.log_odds(weights), 0.0
        for p, q in zip(self.base, odds, strict=True):
            kl += (p.float().exp() * (p.float() - q.float())).sum().item()
        return kl / self.count, (self.nats_of(odds) - self.nats) / math.log(2) / self.bytes

    def variant(self, changes: dict, limit_bytes: int, markers: set[str]):
        """Quantise, pack, read back; return (bytes, bits a matrix weight, an embedding's, weights).

        limit_bytes counts the artifact alone; a given k ignores it.
        """
        hessians = {}
        if "UNWEIGHTED" in markers:
            stats = self.stats["sdclip"]
            assert stats is not self.stats["fisher"], "UNWEIGHTED needs --calibrate"
            hessians = {name.removeprefix("inputs."): value for name, value in stats.items()
                        if name != "inputs.tok_emb.weight"}
        found = self.quantise(changes, limit_bytes, self.weights, hessians)
        if "ASYMMETRIC" in markers:
            found = self.quantise(changes, limit_bytes, *self.aim(found[-1]))
        return found

    def quantise(self, changes: dict, limit_bytes: int, weights, hessians):
        config = self.config_of(changes)
        known = self.stats[config.rule] | {f"inputs.{name}": h for name, h in hessians.items()}
        quantizer = t.Quantizer(weights, known, config, torch.device("cpu"))
        head = dict(self.header, kind="artifact", config=t.artifact_config(config))
        multiplier, packed = t.fit_artifact(quantizer, head, limit_bytes,
                                            lambda *told: None)
        header, tensors = t.open_container(packed, "artifact", "bench")
        weights = t.restore_weights(header, tensors, config, "bench")
        return (len(packed), quantizer.bits(multiplier, "int6"), quantizer.bits(multiplier, "int8"),
                weights)


def parse_settings(text: str) -> dict:
    return dict(pair.split("=", 1) for pair in text.split())


def equal_gap_share(rows: list[dict]) -> float | None:
    """Return the share of the yardstick's bytes at which the default loses as much as it does.

    Interpolated in the logarithm of KL between the two rows around it; None outside them.
    """
    bytes_of = {row["name"]: row["bytes"] for row in rows}
    points = sorted((row["bytes"] / bytes_of["yardstick"], math.log(row["kl_ratio"]))
                    for row in rows if row["settings"] == "" or row["settings"][0] == "@")
    for (low, worse), (high, better) in zip(points, points[1:]):
        if better <= 0 <= worse:
            return low + (high - low) * worse / (worse - better)
    return None


def summary(seeds: list[list[dict]]) -> str:
    """Return a Markdown table of variants: means over seeds, with the least and the largest."""
    def found(name, field):
        return [row[field] for rows in seeds for row in rows if row["name"] == name]

    def mean(name, field):
        return sum(found(name, field)) / len(found(name, field))

    def spread(name, field):
        return (f"{mean(name, field):.3f} ({min(found(name, field)):.3f}-"
                f"{max(found(name, field)):.3f})")

    lines = ["| variant | bytes | bits: matrices | embeddings | KL | KL / yardstick | dbpb "
             "| dbpb / yardstick | s |", "|---|" + "---:|" * 8]
    for name in dict.fromkeys(row["name"] for rows in seeds for row in rows):
        lines.append(f"| {name} | {mean(name, 'bytes'):,.0f} | {mean(name, 'matrix_bits'):.3f} | "
                     f"{mean(name, 'embed_bits'):.3f} | {mean(name, 'kl'):.6f} | "
                     f"{spread(name, 'kl_ratio')} | {mean(name, 'dbpb'):.5f} | "
                     f"{spread(name, 'dbpb_ratio')} | {mean(name, 'seconds'):.0f} |")
    lines.append("")
    for rows in seeds:
        share, first = equal_gap_share(rows), rows[0]
        gap = f"{100 * share:.1f} % of the bytes" if share else "bytes that were not tried"
        lines.append(f"- weights {first['weights_sha256']}: {first['bpb']:.4f} bpb unquantised, "
                     f"{first['tokens']:,} targets; default as good as the yardstick at {gap}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=Path, help="file that gets each line as JSON too")
    parser.add_argument("--summary", type=Path, nargs="+", help="files of --rows, one per seed")
    parser.add_argument("--data", default="data/datasets/bench_sp1024")
    parser.add_argument("--tokenizer", default="data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--tokens", type=int, default=500_000, help="validation targets")
    parser.add_argument("--set", action="append", default=[], dest="sets",
                        help="settings of one more variant, instead of the table; @0.8: at that "
                             "share of the bytes, ASYMMETRIC: with candidates/gptaq.py, "
                             "UNWEIGHTED: matrices' Hessians count all tokens alike")
    parser.add_argument("--bytes", type=int, help="file bytes of each variant (the yardstick's)")
    parser.add_argument("--calibrate", metavar="SETTINGS",
                        help="collect statistics for both step rules anew with these settings, "
                             "for example 'TRAIN_BATCH_TOKENS=8192 GPTQ_CALIBRATION_BATCHES=256', "
                             "or take those that a call with the same settings left in the folder; "
                             "without it the run's own serve all variants")
    options = parser.parse_args(argv)
    if options.summary:
        print(summary([[json.loads(line) for line in path.read_text().splitlines()]
                       for path in options.summary]))
        return 0
    if not options.folder:
        parser.error("which run's folder?")
    env = dict(DATA_PATH=options.data, TOKENIZER_PATH=options.tokenizer, DEVICE="cpu")
    bench = Bench(options.folder, env, options.tokens)
    if options.calibrate:
        bench.calibrate(options.calibrate)
    print(f"{bench.count} targets, unquantised {bench.nats / math.log(2) / bench.bytes:.4f} bpb")
    names = {settings.strip(): name for name, settings in TABLE}
    rows = [(names.get(text.strip(), text), text) for text in options.sets] or TABLE[1:]
    yardstick, first = None, ("yardstick", YARDSTICK)
    print(f"{'variant':34} {'bytes':>9} {'matrix':>6} {'embed':>6} {'KL':>9} {'x':>6} "
          f"{'dbpb':>8} {'x':>6} {'s':>5}", flush=True)
    for name, text in [first, *rows]:
        settings, _, share = text.partition("@")
        limit = int(float(share or 1) * (options.bytes or (yardstick or [1 << 30])[0]))
        since = time.perf_counter()
        markers = {word for word in settings.split() if "=" not in word}
        assert markers <= {"ASYMMETRIC", "UNWEIGHTED"}, f"no such marker: {markers}"
        changes = parse_settings(" ".join(set(settings.split()) - markers))
        size, matrix, embed, weights = bench.variant(changes, limit, markers)
        seconds = time.perf_counter() - since
        kl, dbpb = bench.judge(weights)
        yardstick = yardstick or (size, kl, dbpb)
        print(f"{name:34} {size:9} {matrix:6.3f} {embed:6.3f} {kl:9.6f} {kl / yardstick[1]:6.3f} "
              f"{dbpb:8.5f} {dbpb / yardstick[2]:6.3f} {seconds:5.1f}", flush=True)
        if options.rows:
            row = dict(name=name, settings=text, bytes=size, matrix_bits=matrix, embed_bits=embed,
                       kl=kl, dbpb=dbpb, kl_ratio=kl / yardstick[1],
                       dbpb_ratio=dbpb / yardstick[2], seconds=seconds, tokens=bench.count,
                       bpb=bench.nats / math.log(2) / bench.bytes, weights_sha256=bench.sha256)
            with open(options.rows, "a") as file:
                print(json.dumps(row), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
