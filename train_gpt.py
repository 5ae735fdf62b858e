"""Train, quantise, pack and score a small GPT for the Parameter Golf challenge, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     # the record configuration
    python train_gpt.py --check                               # every check a run starts with
    python train_gpt.py --help                                # every setting

Read from the top: a run is Config -> Runtime -> Data -> Model -> Optimizer -> Train ->
Calibrate -> Quantize -> Artifact -> Evaluate, and `main` at the bottom calls three stages that
meet only in files: train -> weights + stats -> quantize -> artifact -> evaluate -> scores.
Settings are environment variables; the defaults are the record configuration (PR #1471 with
its faults repaired, see PRESETS for the published quirks).

Dimension key: B batch, T time, S scored positions, D model, H query heads, G key/value heads,
K head width, V vocabulary, R x C weight rows x columns, N a number of like things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import lzma
import math
import os
import platform
import re
import secrets
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Needed by a run but not to import this file: the preflight names what is missing.
try:
    import brotli
except ImportError:
    brotli = None
try:
    import sentencepiece
except ImportError:
    sentencepiece = None
try:  # FlashAttention-3 is optional: SDPA serves where it is absent
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None


# == 1 Config: every setting, its meaning, and what is refused ====================================

STAGES = ("train", "quantize", "evaluate")
TOPICS = ("run", "data", "schedule", "model", "optimizer", "calibration", "quantization", "evaluation")
# Settings of these topics determine the model, its codes or its score: they travel in the artifact.
ARTIFACT_TOPICS = ("model", "quantization", "evaluation")


class ConfigError(ValueError):
    """One or more settings or input files are wrong; `faults` holds one line for each."""

    def __init__(self, faults: list[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def knob(default, note, *, topic, stage="train", source="", least=None, most=None, choices=()):
    """Declare one setting: its default, meaning with unit, range, and the stage that consumes it."""
    meta = dict(note=note, topic=topic, stage=stage, source=source, least=least, most=most, choices=choices)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, identical on every rank. `explicit` names those set by env or preset."""

    explicit: frozenset = frozenset()

    preset: str = knob("", "named set of defaults; environment settings still beat it", topic="run", stage="run")
    stage: str = knob("all", "which part to run", topic="run", stage="run", choices=("all", *STAGES))
    run_id: str = knob("", "folder under runs/ and log name; empty: time and a random tag", topic="run", stage="run")
    input_path: str = knob("", "another run's folder (or artifact file) that STAGE=quantize|evaluate reads",
                           topic="run", stage="run")
    seed: int = knob(1337, "initial weights and data order", topic="run", least=0)
    device: str = knob("auto", "where to compute", topic="run", stage="run", choices=("auto", "cuda", "cpu"))
    compile_enabled: bool | None = knob(None, "torch.compile; auto: on CUDA only", topic="run", stage="run")
    attention_backend: str = knob("auto", "auto tries fa3, cudnn, flash, math in this order", topic="run", stage="run",
                                  choices=("auto", "fa3", "cudnn", "flash", "math"))
    allow_env: tuple[str, ...] = knob((), "environment names that look like misspelt settings but are not",
                                      topic="run", stage="run")

    data_dir: str = knob("./data/", "holds datasets/fineweb10B_sp{V} and tokenizers/fineweb_{V}_bpe.model",
                         topic="data", stage="run")
    data_path: str = knob("", "shard folder; beats DATA_DIR", topic="data", stage="run")
    tokenizer_path: str = knob("", "SentencePiece model; beats DATA_DIR", topic="data", stage="run")

    iterations: int = knob(20_000, "optimizer steps at most", topic="schedule", least=0)
    max_wallclock_seconds: float = knob(600.0, "limit on training + calibration, seconds; 0: bounded by ITERATIONS",
                                        topic="schedule", source="PR #1471", least=0)
    train_batch_tokens: int = knob(786_432, "tokens per optimizer step, all ranks", topic="schedule", least=1)
    micro_batch_tokens: int = knob(98_304, "tokens per forward on one device at most; lower it when memory runs out",
                                   topic="schedule", least=1)
    warmup_steps: int = knob(20, "steps on synthetic text before the clock starts (compilation), undone after; 0: none",
                             topic="schedule", least=0)
    warmdown_frac: float = knob(0.72, "share of the run over which learning rates fall to zero", topic="schedule",
                                source="PR #1445", least=0, most=1)
    min_lr: float = knob(0.0, "lower bound of the learning-rate multiplier", topic="schedule", least=0, most=1)
    recur_start_step: int = knob(2000, "step at which the recurrent order starts", topic="schedule",
                                 source="PR #1471", least=0)
    recur_start_frac: float | None = knob(None, "share of the run instead; beats RECUR_START_STEP", topic="schedule",
                                          least=0, most=1)
    train_log_every: int = knob(500, "steps between training lines; 0: none", topic="schedule", least=0)
    val_loss_every: int = knob(4000, "steps between validations, off the clock; 0: at the end only", topic="schedule",
                               least=0)
    prequant_sliding: bool = knob(False, "also score the averaged weights by sliding window before quantising",
                                  topic="schedule")

    vocab_size: int = knob(8192, "token ids", topic="model", source="PR #1394", least=2, most=65_536)
    train_seq_len: int = knob(2048, "tokens per training window", topic="model", least=2)
    num_layers: int = knob(11, "physical blocks", topic="model", least=1)
    model_dim: int = knob(512, "residual width", topic="model", least=2)
    embedding_dim: int | None = knob(None, "only MODEL_DIM is built; auto follows it", topic="model")
    num_heads: int = knob(8, "query heads", topic="model", least=1)
    num_kv_heads: int = knob(4, "key/value heads", topic="model", least=1)
    mlp_mult: float = knob(4.0, "MLP hidden width over MODEL_DIM", topic="model", least=0.01)
    xsa_last_n: int = knob(11, "last layers whose heads drop their own value direction", topic="model",
                           source="PR #287", least=0)
    skip_gates_enabled: bool = knob(True, "skips blend through a learned gate instead of adding", topic="model")
    skip_to_lanes: bool = knob(True, "skips after the lanes split reach the attention lane; 0: lost as in PR #1471",
                               topic="model", source="PR #1395")
    ln_scale: bool = knob(True, "scale normed inputs by 1/sqrt(layer + 1)", topic="model", source="PR #315")
    ve_enabled: bool = knob(True, "add value embeddings to V", topic="model", source="PR #414")
    ve_dim: int = knob(128, "value-embedding width", topic="model", least=1)
    ve_layers: tuple[int, ...] = knob((9, 10), "layers that add the value embedding", topic="model")
    logit_softcap: float = knob(30.0, "logits become cap * tanh(logits / cap)", topic="model", least=1e-3)
    qk_gain_init: float = knob(5.0, "initial gain per query head", topic="model", source="PR #1217")
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", topic="model", least=1)
    rope_dims: int = knob(16, "rotated dimensions per head; 0: all", topic="model", source="PR #315", least=0)
    tied_embed_init_std: float = knob(0.005, "std of the initial embedding", topic="model", least=0)
    recur_layers: tuple[int, ...] = knob((3, 4, 5), "layers run once more, as a block, after the last of them",
                                         topic="model", source="PR #1471")
    virtual_order: tuple[int, ...] = knob((), "full layer order once recurrence is on; beats RECUR_LAYERS",
                                          topic="model")
    parallel_start_layer: int = knob(7, "decoder layers from here run as two lanes; 0: none", topic="model",
                                     source="PR #1471", least=0)

    tied_embed_lr: float = knob(0.03, "peak AdamW rate of the embeddings", topic="optimizer", least=0)
    matrix_lr: float = knob(0.022, "peak Muon rate of the matrices", topic="optimizer", source="PR #1445", least=0)
    scalar_lr: float = knob(0.02, "peak AdamW rate of gains, scales and gates", topic="optimizer", least=0)
    muon_momentum: float = knob(0.99, "Muon momentum after its warm-up", topic="optimizer", least=0, most=1)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", topic="optimizer", least=0, most=1)
    muon_momentum_warmup_steps: int = knob(1500, "steps of momentum warm-up; 0: none", topic="optimizer", least=0)
    muon_momentum_warmup_frac: float | None = knob(None, "share of the run instead; beats the steps",
                                                   topic="optimizer", least=0, most=1)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", topic="optimizer", least=1)
    beta1: float = knob(0.9, "AdamW", topic="optimizer", least=0, most=0.9999999)
    beta2: float = knob(0.95, "AdamW", topic="optimizer", least=0, most=0.9999999)
    adam_eps: float = knob(1e-8, "AdamW", topic="optimizer", least=0)
    grad_clip_norm: float = knob(0.3, "global L2 norm of the gradient at most; 0: off", topic="optimizer", least=0)
    muon_wd: float = knob(0.095, "weight decay of the matrices", topic="optimizer", source="PR #1445", least=0)
    embed_wd: float = knob(0.095, "weight decay of the embeddings", topic="optimizer", source="PR #1445", least=0)
    adam_wd: float = knob(0.02, "weight decay of gains, scales and gates", topic="optimizer", least=0)
    ema_decay: float = knob(0.9965, "weight average kept per step", topic="optimizer", source="PR #1421",
                            least=0, most=0.9999999)

    gptq_calibration_batches: int = knob(64, "batches of TRAIN_BATCH_TOKENS/8 in total, over all ranks",
                                         topic="calibration", least=1)
    gptq_reserve_seconds: float = knob(0.0, "least time kept for calibration; more is kept when warm-up measures more",
                                       topic="calibration", least=0)
    hessian_ranks: str = knob("all", "ranks that calibrate; first: rank 0's share alone, as in PR #1471",
                              topic="calibration", choices=("all", "first"))

    gptq_enabled: bool = knob(True, "GPTQ with calibration; 0: round to nearest", topic="quantization",
                              stage="quantize")
    embed_gptq: bool = knob(True, "GPTQ on the embeddings too; 0: rounded as in PR #1471", topic="quantization",
                            stage="quantize", source="PR #1394")
    sdclip_k: float | None = knob(None, "int6 clip radius in row standard deviations; auto: 12.85 x the multiplier that "
                                  "fills ARTIFACT_MAX_BYTES", topic="quantization", stage="quantize",
                                  source="PR #1394", least=0.01)
    sdclip_k_embed: float | None = knob(None, "int8 clip radius of the embeddings; auto: 20 x the same multiplier",
                                        topic="quantization", stage="quantize", source="PR #1394", least=0.01)
    scale_floor: float = knob(0.0, "least int6 step; PR #1471 has 1/31", topic="quantization", stage="quantize", least=0)
    scale_floor_embed: float = knob(0.0, "least int8 step; PR #1471 has 1/127", topic="quantization",
                                    stage="quantize", least=0)
    fp16_max_numel: int = knob(65_536, "matrices of at most so many elements are stored as fp16",
                               topic="quantization", stage="quantize", least=0)
    control_dtype: str = knob("float32", "how gains, scales and gates are stored; PR #1471: float16",
                              topic="quantization", stage="quantize", choices=("float32", "float16"))
    compressor: str = knob("brotli", "coder of the artifact", topic="quantization", stage="quantize",
                           choices=("brotli", "lzma"))
    artifact_max_bytes: int = knob(16_000_000, "cap on code + artifact, bytes", topic="quantization",
                                   stage="quantize", least=1)

    eval_seq_len: int = knob(2048, "tokens per evaluation window", topic="evaluation", stage="evaluate", least=2)
    sliding_window_enabled: bool = knob(True, "score by sliding window after the round trip", topic="evaluation",
                                        stage="evaluate")
    eval_stride: int = knob(64, "tokens scored per sliding window", topic="evaluation", stage="evaluate", least=1)
    score_tail: bool = knob(True, "score the tokens after the last whole window; 0: drop them as published",
                            topic="evaluation", stage="evaluate")
    val_batch_tokens: int = knob(524_288, "eight times the tokens of one evaluation forward", topic="evaluation",
                                 stage="evaluate", least=1)

    def __post_init__(self):
        faults = config_faults(self)
        if faults:
            raise ConfigError(faults)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def shard_dir(self) -> Path:
        return Path(self.data_path or Path(self.data_dir) / "datasets" / f"fineweb10B_sp{self.vocab_size}")

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.tokenizer_path or Path(self.data_dir) / "tokenizers" / f"fineweb_{self.vocab_size}_bpe.model")

    @property
    def base_order(self) -> tuple[int, ...]:
        return tuple(range(self.num_layers))

    @property
    def recurrent_order(self) -> tuple[int, ...]:
        """The virtual layers once recurrence is on; equal to `base_order` where there is none."""
        if self.virtual_order or not self.recur_layers:
            return self.virtual_order or self.base_order
        end = self.recur_layers[-1] + 1
        return self.base_order[:end] + self.recur_layers + self.base_order[end:]

    @property
    def lanes_split(self) -> bool:
        return 0 < self.parallel_start_layer < self.num_layers

    @property
    def search_k(self) -> bool:
        return self.sdclip_k is None and self.sdclip_k_embed is None

    @property
    def calibration_sequences(self) -> int:
        return max(1, self.gptq_calibration_batches * self.train_batch_tokens // 8 // self.train_seq_len)

    @property
    def eval_batch_windows(self) -> int:
        return max(1, self.val_batch_tokens // 8 // self.eval_seq_len)

    def runs(self, stage: str) -> bool:
        return self.stage in ("all", stage)

    def public(self) -> dict:
        """Return every setting by its published (lower-case) name."""
        return {f.name: getattr(self, f.name) for f in KNOBS.values()}


KNOBS = {f.name: f for f in dataclasses.fields(Config) if f.metadata}

# PR #1471 as published, in exactly these quirks. Known deviations that stay: its path-hashed
# sampler, pickle container, pruning of +-1 codes and bf16-rounded RoPE frequencies.
_PR1471 = dict(skip_to_lanes=False, scale_floor=1 / 31, scale_floor_embed=1 / 127, sdclip_k=12.85,
               sdclip_k_embed=20.0, embed_gptq=False, hessian_ranks="first", score_tail=False,
               control_dtype="float16", gptq_reserve_seconds=10.0)
# One H100 makes about 630 steps in 590 s at PR #1471's speed: its starts and warm-ups as shares of
# the run (204.6 of 590 s; 1500 of 4968 steps), its EMA window (286 of 4968 steps) likewise.
_ONE_GPU = dict(recur_start_frac=0.347, muon_momentum_warmup_frac=0.302, ema_decay=0.9725, train_log_every=50)
# A small sibling for the corpus that data/build_demo.py makes; every part of the record run, in minutes on a laptop.
_DEMO = dict(data_path="./data/datasets/demo", tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
             vocab_size=1024, max_wallclock_seconds=0.0, iterations=400, train_batch_tokens=8192,
             micro_batch_tokens=8192, train_seq_len=256, eval_seq_len=256, num_layers=6, model_dim=192,
             num_heads=6, num_kv_heads=3, xsa_last_n=6, ve_layers=(4, 5), ve_dim=32, recur_layers=(2, 3),
             parallel_start_layer=4, recur_start_frac=0.35, muon_momentum_warmup_frac=0.3, warmup_steps=2,
             ema_decay=0.97, train_log_every=20, val_loss_every=100, gptq_calibration_batches=64,
             val_batch_tokens=65_536, fp16_max_numel=4096, prequant_sliding=True, artifact_max_bytes=1_000_000)
PRESETS = {"pr1471": _PR1471, "one_gpu": _ONE_GPU, "demo": _DEMO}

# Settings published scripts read without effect, or that have none here. Setting one is said aloud.
WITHOUT_EFFECT = {
    "MUON_BETA2": "no published script uses it", "ROPE_TRAIN_SEQ_LEN": "TRAIN_SEQ_LEN is the training length",
    "CONTROL_TENSOR_NAME_PATTERNS": "roles are given where a parameter is made",
    "EMBED_LR": "acts on untied embeddings only", "HEAD_LR": "acts on an untied head only",
}
# Names of other published systems and of modes not built: the one value that describes this script.
# "" means there is none: the name must be unset or empty.
NEUTRAL = {
    # PR #1471's own switches for modes not built
    "TTT_ENABLED": "0", "TTT_LR": "0.002", "TTT_EPOCHS": "3", "TTT_CHUNK_TOKENS": "32768", "TTT_FREEZE_BLOCKS": "0",
    "TTT_MOMENTUM": "0.9", "TTT_BATCH_SEQS": "32", "TTT_GRAD_CLIP": "1.0", "TIE_EMBEDDINGS": "1",
    # PR #1395
    "LR_FLOOR": "0", "TTT_POLYAK_DECAY": "0.998", "PREQUANT_TTT_ENABLED": "0", "SLOT_ENABLED": "0", "SLOT_LR": "0.005",
    "SLOT_STEPS": "8", "HEDGE_ENABLED": "0", "G1_GATING": "0", "LAWA_ENABLED": "0", "LAWA_K": "5", "LAWA_FREQ": "50",
    # PR #1392
    "MUON_EQ_R": "1", "WARMDOWN_ITERS": "", "GPTQ_CALIB_BATCHES": "", "GPTQ_DAMP": "0.01", "GPTQ_BLOCK_SIZE": "128",
    "BIGRAM_VOCAB_SIZE": "0", "BIGRAM_DIM": "128", "TRIGRAM": "0", "TARGET_MB": "", "VAL_BATCH_SIZE": "524288",
    "SWA_ENABLED": "0", "SWA_EVERY": "50", "LATE_QAT_THRESHOLD": "0", "QAT_ENABLED": "0", "MTP_NUM_HEADS": "0",
    "MTP_LOSS_WEIGHT": "0.2", "DTG_ENABLED": "0", "GATED_ATTENTION": "0", "VALUE_RESIDUAL": "0", "CROWN_Q_ENABLED": "0",
    "CROWN_Q_LAMBDA": "0.01", "SOFT_ROUND_QAT": "0", "HADAMARD_ROTATION": "0", "MIXED_BITWIDTH": "0",
    "PREQUANT_TTT": "0", "PREQUANT_TTT_LR": "0.0001", "PREQUANT_TTT_EPOCHS": "3", "TTT_OPTIMIZER": "sgd",
    "TTT_NESTEROV": "0", "TTT_LR_FLOOR": "0.1", "TTT_TEMPERATURE": "1", "NGRAM_ENABLED": "0", "NGRAM_EVAL": "0",
    "GPTQ_FULL_HESSIAN": "1", "SKIP_QUANTIZE": "0", "SKIP_COMPILE": "0",
    # PR #1090
    "TTT_MAX_DOCS": "0", "TTT_MIN_DOC_LEN": "32", "TTT_RANK": "8", "TTT_CHUNK_SIZE": "256",
}


def config_faults(config: Config) -> list[str]:
    """Return every broken rule of a configuration, one line each with setting, value and remedy."""
    faults = []
    for name, f in KNOBS.items():
        value, meta = getattr(config, name), f.metadata
        least, most = meta["least"], meta["most"]
        if value is not None and ((least is not None and value < least) or (most is not None and value > most)):
            faults.append(f"{name.upper()}={value}: must lie between {least} and {most if most is not None else 'any'}")
        if meta["choices"] and value not in meta["choices"]:
            faults.append(f"{name.upper()}={value}: must be one of {', '.join(meta['choices'])}")
    return faults or combination_faults(config)


def combination_faults(c: Config) -> list[str]:
    """Return the rules broken between settings that are each in range."""
    layers = set(range(c.num_layers))
    contiguous = c.recur_layers == tuple(range(c.recur_layers[0], c.recur_layers[-1] + 1)) if c.recur_layers else True
    known = set(c.virtual_order or c.recur_layers) <= layers and contiguous
    decoder = c.recurrent_order[len(c.recurrent_order) // 2:] if known else ()
    lanes = [i >= c.parallel_start_layer for i in decoder]
    rules = [
        (c.model_dim % c.num_heads == 0, "MODEL_DIM={model_dim}: must be a multiple of NUM_HEADS={num_heads}"),
        (c.num_heads % c.num_kv_heads == 0, "NUM_HEADS={num_heads}: must be a multiple of NUM_KV_HEADS={num_kv_heads}"),
        (c.head_dim % 2 == 0 and c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim,
         "ROPE_DIMS={rope_dims}: must be even and at most the head width MODEL_DIM/NUM_HEADS, itself even"),
        (c.eval_seq_len <= c.train_seq_len or (c.rope_dims or c.head_dim) > 2,
         "EVAL_SEQ_LEN={eval_seq_len}: longer than TRAIN_SEQ_LEN={train_seq_len} needs ROPE_DIMS above 2"),
        (c.embedding_dim in (None, c.model_dim), "EMBEDDING_DIM={embedding_dim}: not built; unset it or use MODEL_DIM"),
        (c.mlp_dim >= 1, "MLP_MULT={mlp_mult}: the hidden width MLP_MULT*MODEL_DIM must be at least 1"),
        (c.train_batch_tokens % c.train_seq_len == 0,
         "TRAIN_BATCH_TOKENS={train_batch_tokens}: must be a multiple of TRAIN_SEQ_LEN={train_seq_len}"),
        (c.micro_batch_tokens >= c.train_seq_len,
         "MICRO_BATCH_TOKENS={micro_batch_tokens}: must hold at least one window of TRAIN_SEQ_LEN={train_seq_len}"),
        (c.eval_stride <= c.eval_seq_len, "EVAL_STRIDE={eval_stride}: must be at most EVAL_SEQ_LEN={eval_seq_len}"),
        (set(c.recur_layers) <= layers and contiguous,
         "RECUR_LAYERS={recur_layers}: must be consecutive layers below NUM_LAYERS={num_layers}, or use VIRTUAL_ORDER"),
        (not c.virtual_order or set(c.virtual_order) == layers,
         "VIRTUAL_ORDER={virtual_order}: must name every layer below NUM_LAYERS={num_layers} and no other"),
        (not c.lanes_split or lanes == sorted(lanes),
         "PARALLEL_START_LAYER={parallel_start_layer}: the recurrent order runs an earlier layer after the lanes split"),
        (not c.ve_enabled or (set(c.ve_layers) <= layers and len(set(c.ve_layers)) == len(c.ve_layers)),
         "VE_LAYERS={ve_layers}: must be different layers below NUM_LAYERS={num_layers}"),
        (not c.max_wallclock_seconds or c.gptq_reserve_seconds < c.max_wallclock_seconds,
         "GPTQ_RESERVE_SECONDS={gptq_reserve_seconds}: must be less than MAX_WALLCLOCK_SECONDS={max_wallclock_seconds}"),
        (not c.input_path or c.stage in ("quantize", "evaluate"),
         "INPUT_PATH={input_path}: has a meaning only with STAGE=quantize or STAGE=evaluate"),
        (re.fullmatch(r"[\w.-]*", c.run_id) and not c.run_id.startswith("."),
         "RUN_ID={run_id}: use letters, digits, '_', '-' and '.' (it names a folder and a log)"),
    ]
    return [text.format(**c.public()) for holds, text in rules if not holds]


def parse_setting(text: str, kind: str):
    """Return `text` as the annotated type `kind` of a knob; raises ValueError saying what was expected."""
    text = text.strip()
    if kind.endswith("| None"):
        if text.lower() in ("", "auto"):
            return None
        kind = kind.split(" ")[0]
    if kind == "bool":
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError("0 or 1")
        return text.lower() in ("1", "true")
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        items = [part.strip() for part in text.split(",") if part.strip()]
        return text if kind == "str" else tuple(items) if "str" in kind else tuple(int(item) for item in items)
    except ValueError:
        expected = {"int": "a whole number", "float": "a finite number"}.get(kind, "whole numbers with commas between")
        raise ValueError(expected) from None


def slips(a: str, b: str) -> int:
    """Return the Damerau-Levenshtein distance (adjacent swaps count once) of two names."""
    before, row = None, list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row, before = row, [i], row if i == 1 else before
        for j, y in enumerate(b, 1):
            cost = min(row[j - 1] + 1, last[j] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = last
    return row[-1]


def misspelt(name: str, known) -> str | None:
    """Return the known setting that an environment variable's name is a slip of, or None."""
    plain = name.upper().replace("-", "_")
    for other in known:
        allowed = 2 if min(len(plain), len(other)) >= 10 else 1
        if plain.replace("_", "") == other.replace("_", ""):
            return other
        if abs(len(plain) - len(other)) <= allowed and slips(plain, other) <= allowed:
            return other
    return None


def same_value(text: str, neutral: str) -> bool:
    """Return whether two spellings of a setting mean the same value."""
    words = {"false": "0", "true": "1"}
    text, neutral = (words.get(t.strip().lower(), t.strip().lower()) for t in (text, neutral))
    try:
        return float(text) == float(neutral)
    except ValueError:
        return text == neutral


def load_config(env) -> Config:
    """Return the Config that a mapping of environment variables describes.

    Raises ConfigError with all faults at once: misspelt names, bad types, ranges, combinations,
    names of other systems at a value this script does not build.
    """
    faults, values = [], {}
    known = [name.upper() for name in KNOBS] + list(WITHOUT_EFFECT) + list(NEUTRAL)
    allowed = {part.strip() for part in env.get("ALLOW_ENV", "").split(",")}
    for name in sorted(set(env) - set(known) - allowed):
        other = misspelt(name, known)
        if other:
            faults.append(f"{name}={env[name]}: no such setting; did you mean {other}? "
                          f"If it is not meant for this script: ALLOW_ENV={name}")
    for name, neutral in NEUTRAL.items():
        if env.get(name, "") != "" and not same_value(env[name], neutral):
            only = f"only {name}={neutral} describes this script" if neutral else "it has no equivalent here"
            faults.append(f"{name}={env[name]}: not built; {only}; unset it")
    preset = env.get("PRESET", "").strip()
    if preset and preset not in PRESETS:
        faults.append(f"PRESET={preset}: must be one of {', '.join(PRESETS)}")
    values.update(PRESETS.get(preset, {}))
    for name, f in KNOBS.items():
        if name.upper() in env:
            try:
                values[name] = parse_setting(env[name.upper()], f.type)
            except ValueError as error:
                faults.append(f"{name.upper()}={env[name.upper()]}: must be {error}")
    try:
        config = Config(explicit=frozenset(values), **values)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    return config


def adopt(config: Config, header: dict, stage: str, origin: Path) -> Config:
    """Return `config` as `stage` must use it: what the input file was made with, unless set otherwise.

    Raises ConfigError when a setting that an earlier stage consumed is set to another value than
    the file's: it could not have any effect any more.
    """
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()}
    if not set(stored) <= set(KNOBS):
        raise ConfigError([f"{origin}: holds settings unknown here: {sorted(set(stored) - set(KNOBS))}; "
                           "use the train_gpt.py that wrote it"])
    faults, values = [], {}
    for name, value in stored.items():
        earlier = STAGES.index(KNOBS[name].metadata["stage"]) < STAGES.index(stage)
        if earlier and name in config.explicit and getattr(config, name) != value:
            faults.append(f"{name.upper()}={getattr(config, name)}: {origin} was made with {value}; unset it")
        elif earlier or name not in config.explicit:
            values[name] = value
    if faults:
        raise ConfigError(faults)
    return dataclasses.replace(config, **values)


def artifact_config(config: Config) -> dict:
    """Return the settings that determine model, codes or score: never ids, paths, host or time."""
    return {name: getattr(config, name) for name, f in KNOBS.items()
            if f.metadata["topic"] in ARTIFACT_TOPICS or name == "seed"}


def notices(config: Config, env) -> list[str]:
    """Return lines about settings that are set but cannot act in this run."""
    lines = [f"{name}={env[name]}: known, without effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in env]
    for name in sorted(config.explicit):
        stage = KNOBS[name].metadata["stage"]
        if config.stage != "all" and stage in STAGES and name.upper() in env:
            if STAGES.index(stage) > STAGES.index(config.stage):
                lines.append(f"{name.upper()}={env[name.upper()]}: acts in STAGE={stage}; kept in this run's files")
            elif stage != config.stage and KNOBS[name].metadata["topic"] not in ARTIFACT_TOPICS and name != "seed":
                lines.append(f"{name.upper()}={env[name.upper()]}: without effect in STAGE={config.stage}")
    if config.recur_start_frac is not None and "RECUR_START_STEP" in env:
        lines.append("RECUR_START_STEP: beaten by RECUR_START_FRAC")
    if config.virtual_order and "RECUR_LAYERS" in env:
        lines.append("RECUR_LAYERS: beaten by VIRTUAL_ORDER")
    return lines


def help_text() -> str:
    """Return the `--help` page: every setting by topic, presets, foreign names."""
    lines = [__doc__.strip(), "", "Settings (NAME = default  meaning [source]); set them as environment variables:"]
    for topic in TOPICS:
        lines.append(f"\n{topic}")
        for f in (f for f in KNOBS.values() if f.metadata["topic"] == topic):
            meta = f.metadata
            default = show_value(f.default)
            text = meta["note"] + (f" ({' | '.join(meta['choices'])})" if meta["choices"] else "")
            lines.append(f"  {f.name.upper()} = {default}\n      {text}" + (f" [{meta['source']}]" if meta["source"] else ""))
    lines.append("\npresets (PRESET=name): defaults that environment settings still beat")
    for name, values in PRESETS.items():
        lines.append(f"  {name}: " + " ".join(f"{k.upper()}={show_value(v)}" for k, v in values.items()))
    lines.append("\nknown, without effect\n  " + "  ".join(WITHOUT_EFFECT))
    lines.append("\nnot built: accepted only at the value shown ('' = unset)\n  "
                 + "  ".join(f"{name}={value}" for name, value in NEUTRAL.items()))
    return "\n".join(lines)


def show_value(value) -> str:
    """Return a setting's value as one would type it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# == 2 Runtime: ranks, device, clock, log, files ==================================================

class Runtime:
    """This process among the ranks of a run: device, number formats, collectives.

    Reads only torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE). CPU tensors travel by gloo and
    CUDA tensors by NCCL, so that agreeing on a number never waits for the device.
    """

    def __init__(self, env, config: Config):
        self.rank, self.world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available() and config.device != "cpu"
        if config.device == "cuda" and not cuda:
            raise ConfigError(["DEVICE=cuda: torch sees no CUDA device; unset it, or install a CUDA build of torch"])
        if cuda and self.local_rank >= torch.cuda.device_count():
            raise ConfigError([f"nproc_per_node: rank {self.local_rank} of this node has no GPU, "
                               f"{torch.cuda.device_count()} are visible; start as many processes as GPUs"])
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        bf16 = cuda and torch.cuda.get_device_capability(self.device)[0] >= 8
        self.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        self.compiles = cuda if config.compile_enabled is None else config.compile_enabled
        self.is_main = self.rank == 0
        if cuda:
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("high" if cuda else "highest")
        if self.world_size > 1:
            # rank 0 quantises and packs alone, minutes long, while the others wait for it
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))

    def compile(self, function):
        """Return `function` compiled for static shapes, or as it is where compilation is off."""
        if not self.compiles:
            return function
        torch._dynamo.config.recompile_limit = 64  # one entry per layout, grad mode and batch shape
        return torch.compile(function, dynamic=False, fullgraph=True)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: float) -> float:
        """Return the largest of all ranks' values: the same on each of them."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.item()

    def share(self, value):
        """Return rank 0's value (text, number, bytes) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def first(self, function, *args):
        """Run `function` on rank 0 alone and return its result, or raise its error, everywhere."""
        outcome = None
        if self.is_main:
            try:
                outcome = function(*args), None
            except (ValueError, OSError) as error:
                outcome = None, error
        result, error = self.share(outcome)
        if error is not None:
            raise error
        return result

    def close(self):
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def peak_memory_mib(self) -> tuple[int, int]:
        """Return peak (allocated, reserved) MiB: device memory, or on CPU the process's resident set twice."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        return (resident_peak_bytes() >> 20,) * 2

    def describe(self) -> dict:
        """Return hardware and versions, for the log."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        return dict(device=str(self.device.type), device_name=name or platform.machine(), world_size=self.world_size,
                    compute_dtype=str(self.compute_dtype).removeprefix("torch."), threads=torch.get_num_threads(),
                    python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    cuda=torch.version.cuda, brotli=getattr(brotli, "__version__", None), compiled=self.compiles)


def resident_peak_bytes() -> int:
    """Return the largest resident set of this process so far, bytes; 0 where the system does not tell."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_age_seconds() -> float:
    """Return how long this process has existed (imports included); 0 where the system does not tell."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class Clock:
    """Says where the seconds of a process go. Spans nest: an inner one pauses the outer.

    Spans named in ON_CLOCK are what the wallclock limit counts: steps and all that reads
    training text. `sync` waits for the device at both ends of a span.
    """

    ON_CLOCK = ("train", "calibrate")

    def __init__(self, now=time.perf_counter, sync=lambda: None, start_seconds=0.0):
        self.now, self.sync = now, sync
        self.seconds = {"start": start_seconds}
        self.running = ["other"]
        self.since = now()

    def _book(self):
        current, name = self.now(), self.running[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + current - self.since
        self.since = current

    @contextlib.contextmanager
    def span(self, name: str):
        self.sync()
        self._book()
        self.running.append(name)
        try:
            yield
        finally:
            self.sync()
            self._book()
            self.running.pop()

    def training_seconds(self) -> float:
        """Return the seconds counted against the limit so far."""
        self._book()
        return sum(self.seconds.get(name, 0.0) for name in self.ON_CLOCK)

    def ledger(self) -> dict[str, float]:
        self._book()
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}


class Pacer:
    """Tells whether one more step still ends within the budget.

    The next step is taken to last as long as the longest of the last eight plus their whole
    spread, so a jittery machine keeps a wide berth and a steady one about one step.
    """

    def __init__(self, budget_seconds: float, agree=lambda value: value):
        self.budget_seconds, self.agree = budget_seconds, agree
        self.recent: list[float] = []
        self.last_elapsed = 0.0

    def expect(self, step_seconds: float):
        """Forget the past: steps now last about `step_seconds` (measured in warm-up)."""
        self.recent = [step_seconds] if step_seconds else []

    def elapsed(self, seconds: float) -> float:
        """Return all ranks' training clock; call once before each step."""
        seconds = self.agree(seconds)
        if seconds > self.last_elapsed:
            self.recent = [*self.recent, seconds - self.last_elapsed][-8:]
        self.last_elapsed = seconds
        return seconds

    def fits(self) -> bool:
        if not self.budget_seconds or not self.recent:
            return True
        expected = 2 * max(self.recent) - min(self.recent)
        return self.last_elapsed + expected <= self.budget_seconds


# Event kind -> its line in the text log and on the console ("" = in events.jsonl only). Lines that
# published scripts print keep their exact form, since people's tools parse them. Fields whose
# names start with "text_" are for the line only.
EVENTS = {
    "source": "{text_source}",
    "environment": "{text_versions}",
    "config": "Hyperparameters:\n{text_table}",
    "overrides": "overrides: {text_values}",
    "notice": "notice: {text}",
    "preflight": "preflight: {text_report}",
    "attention": "attention:{backend} max_error_vs_math:{max_error:.1e}",
    "data": "train_shards: {train_shards}",
    "val_data": "val_tokens: {scored_tokens}",
    "val_counts": "val_targets: scored {scored_tokens} (with tail {all_tokens}, legacy {legacy_tokens}) "
                  "bytes {scored_bytes} by {denominator} (table {table_bytes})",
    "parameters": "model_params:{count}",
    "optimizer": "optimizer: {matrices} Muon matrices, {embeddings} embedding and {controls} control tensors",
    "reserve": "gptq:reserving {reserve_seconds:.0f}s, effective={effective_ms:.0f}ms",
    "reserve_measured": "gptq:calibration measured {batch_seconds:.3f}s a forward, {forwards} a rank: "
                        "reserve {reserve_seconds:.2f}s",
    "recurrence_plan": "recurrence: starts {text_when}; virtual_layers={order}",
    "warmup_step": "warmup_step: {step}/{steps}",
    "val": "{step}/{iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}",
    "train": "{step}/{iterations} train_loss: {train_loss:.4f} train_time: {train_minutes:.1f}m "
             "tok/s: {tokens_per_second:.0f}",
    "recurrence": "recurrence:activated at step {step}, virtual_layers={order}",
    "stopping_early": "stopping_early: wallclock_cap train_time: {train_time_ms:.0f}ms step: {step}/{iterations}",
    "peak_memory": "peak memory allocated: {allocated_mib} MiB reserved: {reserved_mib} MiB",
    "ema": "ema:applying EMA weights",
    "prequant": "pre-quantization post-ema val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{eval_ms:.0f}ms",
    "prequant_sliding": "pre-quantization sliding_window val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} "
                        "eval_time:{eval_ms:.0f}ms",
    "weights": "Serialized model: {bytes} bytes",
    "code_size": "Code size: {bytes} bytes",
    "collecting": "GPTQ:collecting Hessians from calibration data...",
    "collected": "GPTQ:collected {hessians} Hessians in {seconds:.1f}s",
    "calibration_short": "warning: calibration stopped at the wallclock limit after {done} of {planned} forwards a rank",
    "gptq_redamp": "warning: Hessian of {name} is not positive definite at damping 0.01; raised to {damp:g}",
    "quantized": "GPTQ quantization: {gptq} layers with full GPTQ, {rounded} fallback to clip-search",
    "search": "search: multiplier {multiplier:.6f} estimate {estimated_bytes} packed {packed_bytes} of {limit_bytes} bytes",
    "unused": "search: finest steps reached, {unused_bytes} bytes of the budget stay unused",
    "artifact": "Serialized model int6+{compressor}: {bytes} bytes",
    "total_size": "Total submission size int6+{compressor}: {bytes} bytes",
    "bits": "bits per weight: {matrix_bits:.3f} matrices, {embed_bits:.3f} embeddings; multiplier {multiplier:.6f} "
            "(k {k:.3f}, {k_embed:.3f})",
    "roundtrip": "final_int6_roundtrip val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{eval_ms:.0f}ms",
    "sliding": "final_int6_sliding_window val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{eval_ms:.0f}ms",
    "ledger": "ledger: {text_spans}",
    "verdict": "verdict: {rule} {outcome} ({value:g} of {limit:g} {unit})",
    "wrote": "wrote {path} ({bytes} bytes)",
    "result": "RESULT {text_json}",
}


class Log:
    """Events of a run: one JSON object a line in events.jsonl, one readable line in the text log.

    Only rank 0 writes. Without folders it prints alone (`--check`).
    """

    def __init__(self, is_main: bool, text_path: Path | None = None, events_path: Path | None = None):
        self.is_main = is_main
        self.text_file = self.events_file = None
        self.shown_at = 0.0
        if is_main and text_path:
            for path in (text_path, events_path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self.text_file = open(text_path, "a", encoding="utf-8")
            self.events_file = open(events_path, "a", encoding="utf-8")

    def event(self, kind: str, console: bool = True, **fields):
        """Record one event of EVENTS; console=False keeps a long one out of the terminal."""
        template = EVENTS[kind]
        if not self.is_main:
            return
        if self.events_file:
            public = {name: value for name, value in fields.items() if not name.startswith("text_")}
            self.events_file.write(json.dumps({"event": kind, **public}) + "\n")
            self.events_file.flush()
        line = template.format(**fields)
        if self.text_file:
            self.text_file.write(line + "\n")
            self.text_file.flush()
        if console:
            self.clear()
            print(line, flush=True)

    def progress(self, label: str, done: int, total: int, since: float):
        """Show `label 45 % ETA 12 s` on a terminal, twice a second at most; nothing in a file."""
        now = time.perf_counter()
        if not self.is_main or not sys.stderr.isatty() or (now - self.shown_at < 0.5 and done < total):
            return
        eta = (now - since) / max(done, 1) * (total - done)
        sys.stderr.write(f"\r\x1b[K{label} {100 * done / total:.0f} % ETA {eta:.0f} s" if done < total else "\r\x1b[K")
        sys.stderr.flush()
        self.shown_at = now

    def clear(self):
        if self.shown_at:
            sys.stderr.write("\r\x1b[K")
            self.shown_at = 0.0

    def close(self):
        for file in (self.text_file, self.events_file):
            if file:
                file.close()


# The container of weights, statistics and artifacts: magic, u32 length, zlib JSON header, one span
# of bytes per tensor in the header's order, sha256 over all before it. No pickle.
MAGIC = b"PGOLF\x00\x01\n"
MAX_HEADER_BYTES, MAX_TENSOR_BYTES = 4 << 20, 8 << 30
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "float64": torch.float64}
CODECS = ("raw", "brotli", "lzma")


class ContainerError(ValueError):
    """A file is not a container of this script, is damaged, or holds impossible values."""


def compress(raw: bytes, codec: str) -> bytes:
    if codec == "brotli":
        return brotli.compress(raw, quality=11, lgwin=24)
    return lzma.compress(raw, preset=6) if codec == "lzma" else raw


def decompress(data: bytes, codec: str, raw_bytes: int) -> bytes:
    """Return exactly `raw_bytes` bytes or raise ContainerError; never holds much more than that."""
    if codec == "raw":
        out, finished = data, True
    elif codec == "lzma":
        decoder = lzma.LZMADecompressor(memlimit=256 << 20)
        out, finished = decoder.decompress(data, max_length=raw_bytes + 1), True
    else:
        decoder, out, finished = brotli.Decompressor(), b"", False
        while len(out) <= raw_bytes and not finished:
            part = decoder.process(data if not out else b"", output_buffer_limit=raw_bytes + 1)
            out, finished = out + part if out else part, decoder.is_finished()
            if not part and not finished:
                break
    if len(out) != raw_bytes or not finished:
        raise ContainerError("a tensor does not decompress to its stated length")
    return out


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def pack_tensors(header: dict, tensors: dict[str, Tensor], codec: str = "raw") -> bytes:
    """Return a container's bytes; the same arguments give the same bytes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the coders release the GIL
        spans = list(pool.map(lambda tensor: compress(tensor_bytes(tensor), codec), tensors.values()))
    names = {dtype: name for name, dtype in DTYPES.items()}
    table = [[name, names[t.dtype], list(t.shape), len(span)] for (name, t), span in zip(tensors.items(), spans)]
    text = json.dumps({**header, "codec": codec, "tensors": table}, sort_keys=True, separators=(",", ":"))
    head = zlib.compress(text.encode(), 9)
    body = b"".join([MAGIC, struct.pack("<I", len(head)), head, *spans])
    return body + hashlib.sha256(body).digest()


def unpack_tensors(data: bytes, origin) -> tuple[dict, dict[str, Tensor]]:
    """Return (header, tensors) of a container; the only reader of untrusted bytes.

    Raises ContainerError, naming `origin`, before any tensor is built from damaged bytes.
    """
    def require(holds, what):
        if not holds:
            raise ContainerError(f"{origin}: {what}; make the file again or copy it again")

    require(len(data) >= len(MAGIC) + 36 and data[:6] == MAGIC[:6], "not a file of this script")
    require(data[:8] == MAGIC, f"container version {data[6]} is not {MAGIC[6]}")
    require(hashlib.sha256(data[:-32]).digest() == data[-32:], "checksum does not match (truncated or damaged)")
    (head_bytes,) = struct.unpack_from("<I", data, 8)
    require(12 + head_bytes <= len(data) - 32 and head_bytes <= MAX_HEADER_BYTES, "impossible header length")
    try:
        text = zlib.decompressobj().decompress(data[12:12 + head_bytes], MAX_HEADER_BYTES)
        header = json.loads(text)
        codec, table, at, tensors = header["codec"], header["tensors"], 12 + head_bytes, {}
        require(codec in CODECS, f"unknown codec {codec!r}")
        for name, dtype, shape, span in table:
            count = math.prod(shape)
            require(isinstance(name, str) and name not in tensors and dtype in DTYPES and type(span) is int
                    and all(type(n) is int and n >= 0 for n in shape) and 0 <= span <= len(data) - 32 - at
                    and count * DTYPES[dtype].itemsize <= MAX_TENSOR_BYTES, "impossible entry in the table of tensors")
            raw = decompress(data[at:at + span], codec, count * DTYPES[dtype].itemsize)
            flat = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]) if raw else torch.empty(0, dtype=DTYPES[dtype])
            tensors[name], at = flat.reshape(shape), at + span
        require(at == len(data) - 32, "bytes left over after the last tensor")
    except ContainerError:
        raise
    except Exception as error:  # whatever a hostile header provokes in zlib, json or a coder
        raise ContainerError(f"{origin}: unreadable container ({type(error).__name__}); make it again") from error
    return header, tensors


def write_file(path: Path, data: bytes):
    """Write a whole file under another name, flush it to disk, then rename: it exists complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_tensors(path: Path, header: dict, tensors: dict[str, Tensor], codec: str = "raw") -> int:
    """Write a container file and return its size in bytes."""
    data = pack_tensors(header, tensors, codec)
    write_file(path, data)
    return len(data)


def read_tensors(path: Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """Return (header, tensors) of a container file of the given kind (weights, stats, artifact)."""
    return open_container(path.read_bytes(), kind, path)


def open_container(data: bytes, kind: str, origin) -> tuple[dict, dict[str, Tensor]]:
    header, tensors = unpack_tensors(data, origin)
    if header.get("kind") != kind:
        raise ContainerError(f"{origin}: holds {header.get('kind')}, not {kind}; give the path of the {kind}")
    return header, tensors


# == 3 Data: shards, the order of windows, target bytes ===========================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
GET_DATA = ("get some with one of\n"
            "  python data/build_demo.py && PRESET=demo python train_gpt.py        (small, no download)\n"
            "  python data/cached_challenge_fineweb.py --variant sp8192 --train-shards 80")


def open_shard(path: Path) -> np.ndarray:
    """Return a token shard (N,) uint16, memory-mapped; raises ValueError on a wrong header or size."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_BYTES // 4)
    if len(header) < 3 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard (its header does not begin with {SHARD_MAGIC}, {SHARD_VERSION}); "
                         "download or build it again")
    if size != SHARD_HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(f"{path}: {size} bytes where its header promises {SHARD_HEADER_BYTES + 2 * int(header[2])} "
                         "(truncated?); download or build it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(int(header[2]),))


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of `split` (train, val, val_bytes) in lexicographic order."""
    return sorted(path for path in folder.glob(f"fineweb_{split}_*.bin") if split != "val" or "_bytes_" not in path.name)


def keyed_permutation(index: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """Return where a permutation of range(size), chosen by `key` (32 bytes), sends each index.

    Four Feistel rounds over the next even power of two, walked until the value falls below
    `size`: no table, so any stretch of an epoch costs only its own length.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(key, dtype="<u8")

    def scramble(x):
        left, right = x >> half, x & mask
        for round_key in keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    out = scramble(np.asarray(index, dtype=np.uint64))
    while (outside := out >= size).any():
        out[outside] = scramble(out[outside])
    return out.astype(np.int64)


def window_order(seed: int, num_windows: int, start: int, count: int) -> np.ndarray:
    """Return the window ids (count,) at positions start, start + 1, … of the endless training order.

    Every epoch visits each window once, in an order that depends on the seed and the epoch alone.
    """
    positions = np.arange(start, start + count)
    out = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // num_windows):
        here = positions // num_windows == epoch
        key = hashlib.sha256(f"window order {seed} {epoch}".encode()).digest()
        out[here] = keyed_permutation(positions[here] % num_windows, num_windows, key)
    return out


class ShardSet:
    """Training windows of `seq_len` + 1 tokens over a list of shard files."""

    def __init__(self, files: list[Path], seq_len: int):
        self.shards = [open_shard(path) for path in files]
        self.names = [path.name for path in files]
        self.seq_len = seq_len
        self.first = np.concatenate([[0], np.cumsum([max(0, len(s) - 1) // seq_len for s in self.shards])])
        self.num_windows = int(self.first[-1])
        self.num_tokens = sum(len(s) for s in self.shards)

    def window(self, index: int) -> np.ndarray:
        """Return window `index`, (T + 1,) uint16."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        start = (index - int(self.first[shard])) * self.seq_len
        return self.shards[shard][start:start + self.seq_len + 1]

    def windows(self, indices) -> np.ndarray:
        """Return several windows, (B, T + 1) uint16."""
        return np.stack([self.window(int(i)) for i in indices])

    def fingerprint(self) -> str:
        """Return a hash of every shard's name, length and first tokens: tells sets of shards apart."""
        digest = hashlib.sha256()
        for name, shard in zip(self.names, self.shards):
            digest.update(f"{name} {len(shard)} ".encode() + shard[:32_768].tobytes())
        return digest.hexdigest()


class Loader:
    """This rank's share of every step's windows; reads one step ahead on a thread."""

    def __init__(self, shards: ShardSet, config: Config, runtime: Runtime):
        self.shards, self.seed, self.vocab_size = shards, config.seed, config.vocab_size
        self.per_step = config.train_batch_tokens // config.train_seq_len
        self.per_rank = self.per_step // runtime.world_size
        self.offset, self.device = runtime.rank * self.per_rank, runtime.device
        self.pool = ThreadPoolExecutor(1)
        self.ahead = {}

    def read(self, start: int, count: int) -> Tensor:
        """Return the windows at `count` positions of the training order, (count, T + 1) int64 on the device."""
        windows = self.shards.windows(window_order(self.seed, self.shards.num_windows, start, count))
        if windows.max() >= self.vocab_size:
            raise ValueError(f"training shards hold token {windows.max()}, VOCAB_SIZE={self.vocab_size}: "
                             "they belong to another tokenizer; set VOCAB_SIZE and DATA_PATH to match")
        return torch.from_numpy(windows).to(self.device, non_blocking=True).long()

    def batch(self, step: int) -> Tensor:
        """Return this rank's windows of a step, (B, T + 1); rank r holds the r-th share in order."""
        start = step * self.per_step + self.offset
        pending = self.ahead.pop(step, None) or self.pool.submit(self.read, start, self.per_rank)
        self.ahead[step + 1] = self.pool.submit(self.read, start + self.per_step, self.per_rank)
        return pending.result()

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def byte_table(processor, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return per token id (vocab_size,): UTF-8 bytes without a leading space, leading-space flag, boundary flag.

    Raises ValueError if "▁" is no piece of its own: every space would then count three bytes.
    Source: the challenge's evaluator.
    """
    if processor.piece_to_id("▁") == processor.unk_id():
        raise ValueError("tokenizer: '▁' is not a piece of its own, so spaces would be counted as 3 bytes; "
                         "use one of the challenge's tokenizers or train one with that piece")
    piece_bytes, leading = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, bool)
    boundary = np.ones(vocab_size, bool)
    for i in range(min(processor.vocab_size(), vocab_size)):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            continue
        boundary[i] = False
        if processor.is_byte(i):
            piece_bytes[i] = 1
            continue
        piece = processor.id_to_piece(i)
        leading[i] = piece.startswith("▁")
        piece_bytes[i] = len(piece.removeprefix("▁").encode())
    return piece_bytes, leading, boundary


@dataclass(frozen=True)
class Validation:
    """Validation text as it is scored: tokens (N + 1,) int64, bytes of each target (N,) int64."""

    tokens: np.ndarray
    target_bytes: np.ndarray
    table_bytes: int
    denominator: str  # "table" or "sidecar"
    all_targets: int  # N with the tail
    legacy_targets: int  # N without it
    sha256: str


def load_tokenizer(path: Path):
    """Return the SentencePiece processor of a model file; raises ValueError when it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({error})") from None


def load_validation(config: Config) -> Validation:
    """Return the validation tokens and the bytes each target stands for.

    Bytes come from a sidecar (`fineweb_val_bytes_*.bin`, uint16 per token) where one lies beside
    the shards, else from the tokenizer's byte table. Raises ValueError on inconsistent files.
    """
    tokens = np.concatenate([open_shard(path) for path in find_shards(config.shard_dir, "val")])
    if len(tokens) < 2 or tokens.max() >= config.vocab_size:
        raise ValueError(f"{config.shard_dir}: validation holds {len(tokens)} tokens, largest id "
                         f"{tokens.max(initial=0)}, VOCAB_SIZE={config.vocab_size}: set VOCAB_SIZE and DATA_PATH to match")
    piece_bytes, leading, boundary = byte_table(load_tokenizer(config.tokenizer_file), config.vocab_size)
    before, after = tokens[:-1], tokens[1:]
    by_table = piece_bytes[after] + (leading[after] & ~boundary[before])
    sidecar_files = find_shards(config.shard_dir, "val_bytes")
    target_bytes = by_table
    if sidecar_files:
        sidecar = np.concatenate([open_shard(path) for path in sidecar_files])
        if len(sidecar) != len(tokens):
            raise ValueError(f"{config.shard_dir}: byte sidecar has {len(sidecar)} entries for {len(tokens)} "
                             "validation tokens; remove it or build it again")
        target_bytes = sidecar[1:].astype(np.int64)
    everything = len(tokens) - 1
    legacy = everything // config.eval_seq_len * config.eval_seq_len
    kept = everything if config.score_tail else legacy
    if not kept or not target_bytes[:kept].sum():
        raise ValueError(f"{config.shard_dir}: {everything} validation targets leave nothing to score with "
                         f"EVAL_SEQ_LEN={config.eval_seq_len} SCORE_TAIL={int(config.score_tail)}")
    return Validation(tokens[:kept + 1].astype(np.int64), target_bytes[:kept], int(by_table[:kept].sum()),
                      "sidecar" if sidecar_files else "table", everything, legacy,
                      hashlib.sha256(tokens.tobytes()).hexdigest())


def data_faults(config: Config) -> list[str]:
    """Return what is wrong with the files a run would read, one line each."""
    faults, counts = [], {}
    splits = ["train"] * config.runs("train") + ["val"] * (config.stage != "quantize")
    for split in splits:
        files = find_shards(config.shard_dir, split) if config.shard_dir.is_dir() else []
        counts[split] = len(files)
        if not files:
            where = "no such folder" if not config.shard_dir.is_dir() else f"no fineweb_{split}_*.bin in it"
            faults.append(f"DATA_PATH={config.shard_dir}: {where}")
        for path in files:
            try:
                head = open_shard(path)[:65_536]
                if len(head) and head.max() >= config.vocab_size:
                    faults.append(f"{path}: token {head.max()} is outside VOCAB_SIZE={config.vocab_size}: a shard of "
                                  "another vocabulary")
            except (ValueError, OSError) as error:
                faults.append(str(error))
    if splits and not config.tokenizer_file.is_file():
        faults.append(f"TOKENIZER_PATH={config.tokenizer_file}: no such file")
    if splits and not all(counts.values()):
        faults.append(GET_DATA)
    elif splits and not faults:
        faults += tokenizer_faults(config)
    if not faults and config.runs("train"):
        shards = ShardSet(find_shards(config.shard_dir, "train"), config.train_seq_len)
        if not shards.num_windows:
            faults.append(f"DATA_PATH={config.shard_dir}: {shards.num_tokens} training tokens are less than one window "
                          f"of TRAIN_SEQ_LEN={config.train_seq_len}; lower it or bring more text")
    return faults


def tokenizer_faults(config: Config) -> list[str]:
    """Return why the tokenizer cannot be the one the validation shards were written with."""
    if sentencepiece is None:
        return []
    path = config.tokenizer_file
    try:
        processor = load_tokenizer(path)
        if processor.vocab_size() != config.vocab_size:
            return [f"TOKENIZER_PATH={path}: {processor.vocab_size()} pieces, VOCAB_SIZE={config.vocab_size}; set one to match"]
        byte_table(processor, config.vocab_size)
    except ValueError as error:
        return [str(error)]
    # What a tokenizer decodes, it encodes again to the same ids; another one's text falls apart.
    ids = open_shard(find_shards(config.shard_dir, "val")[0])[:2000].tolist()
    ids = [i for i in ids if not processor.is_control(i)]
    again = processor.encode(processor.decode(ids))
    if ids and abs(len(again) - len(ids)) > 0.1 * len(ids):
        return [f"TOKENIZER_PATH={path}: the validation shard decodes to text that encodes to {len(again)} tokens instead "
                f"of {len(ids)}: it was written with another tokenizer; set TOKENIZER_PATH to that one"]
    return []


# == 4 Kernels: one fast form, one plain form per operation =======================================

def attention_sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal grouped attention (B, T, H, K) through PyTorch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def fa3_attention(flash):
    """Return causal grouped attention (B, T, H, K) through FlashAttention-3's function `flash`."""
    def attention_fa3(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        out = flash(q_BTHK, k_BTGK, v_BTGK, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too
    return attention_fa3


def attention_math(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """The same in plain operations, fp32: the yardstick of the others."""
    q, k, v = (x.transpose(1, 2).float() for x in (q_BTHK, k_BTGK, v_BTGK))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~keep, -math.inf).softmax(-1) @ v).transpose(1, 2).to(q_BTHK.dtype)


def sdpa_only(name: str, *fallback: str):
    """Return a context in which scaled_dot_product_attention uses backend `name`, then `fallback`, alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    return sdpa_kernel([kinds[n] for n in dict.fromkeys((name, *fallback))], set_priority=True)


def find_fa3():
    """Return FlashAttention-3's function, from its own package or through `kernels`, or None."""
    if flash_attn_func is not None:
        return flash_attn_func
    try:
        from kernels import get_kernel
        return get_kernel("kernels-community/flash-attn3").flash_attn_func
    except Exception:  # not installed, or no network: SDPA serves
        return None


def attention_error(function, context, head_shape: tuple[int, int, int], device, dtype) -> float:
    """Return the largest error of an attention function against the plain one, forward and backward.

    head_shape: (query heads, key/value heads, width). Raises what the backend raises where it cannot run.
    """
    heads, kv_heads, width = head_shape
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(2, 128, n, width, generator=generator) for n in (heads, kv_heads, kv_heads)]
    results = []
    for attend, scope in ((function, context), (attention_math, contextlib.nullcontext())):
        inputs = [x.to(device, dtype).requires_grad_() for x in base]
        with scope:
            out = attend(*inputs)
            out.float().square().sum().backward()
        results.append([out.detach().float(), *(x.grad.float() for x in inputs)])
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results)]
    return max(errors)


def choose_attention(config: Config, runtime: Runtime):
    """Return (name, attention function, process-wide context, error against math).

    Tries FA3, cuDNN, flash, math in this order on one small batch, or only ATTENTION_BACKEND.
    Raises ConfigError when an explicitly asked backend does not work here.
    """
    cuda, asked = runtime.device.type == "cuda", config.attention_backend
    names = ("fa3", "cudnn", "flash", "math") if asked == "auto" else (asked,)
    shape, tolerance = (config.num_heads, config.num_kv_heads, config.head_dim), 0.05
    if not cuda and asked in ("auto", "math"):
        function = attention_sdpa if asked == "auto" else attention_math
        error = attention_error(function, contextlib.nullcontext(), shape, runtime.device, runtime.compute_dtype)
        return "sdpa" if asked == "auto" else "math", function, contextlib.nullcontext(), error
    reason = "it needs a CUDA device"
    for name in names if cuda else ():
        flash = find_fa3() if name == "fa3" and runtime.compute_dtype == torch.bfloat16 else None
        if name == "fa3" and flash is None:
            reason = ("flash_attn_interface is not installed; pip install flash_attn_3 --find-links "
                      "https://windreamer.github.io/flash-attention3-wheels/cu128_torch291/")
            continue
        function = fa3_attention(flash) if flash else attention_sdpa
        try:
            trial = contextlib.nullcontext() if flash else sdpa_only(name)
            error = attention_error(function, trial, shape, runtime.device, runtime.compute_dtype)
        except RuntimeError as failure:
            reason = str(failure).split("\n")[0]
            continue
        if error <= tolerance:
            fallback = () if asked != "auto" else ("math",)
            return name, function, contextlib.nullcontext() if flash else sdpa_only(name, *fallback), error
        reason = f"its result is off by {error:.2g} from plain attention"
    raise ConfigError([f"ATTENTION_BACKEND={asked}: not usable here: {reason}"])


def softcap_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Return the loss in nats of each target (N,), fp32, under logits cap * tanh(hidden @ head.T / cap)."""
    return F.cross_entropy(softcap_logits(hidden_ND, head_VD, cap), targets_N, reduction="none")


def softcap_logits(hidden_ND: Tensor, head_VD: Tensor, cap: float) -> Tensor:
    """Return softcapped logits (N, V), fp32."""
    return cap * torch.tanh(F.linear(hidden_ND, head_VD.to(hidden_ND.dtype)).float() / cap)


# == 5 Model ======================================================================================

RMS_EPS = 2.0 ** -23  # fp32 machine epsilon whatever the dtype: embeddings start with mean square 2.5e-5


class Role(Enum):
    """What a parameter is, given where it is made: decides its optimizer and how it is stored."""

    EMBED = "embed"
    MATRIX = "matrix"
    CONTROL = "control"


@dataclass(frozen=True)
class Layout:
    """The order of virtual layers and what flows between them; an argument of `forward`.

    order: physical layer of each virtual step. skips: (row, target step, source step) of every
    skip that acts. lanes_from: first step of the two lanes, len(order) if they never split.
    """

    order: tuple[int, ...]
    skips: tuple[tuple[int, int, int], ...]
    lanes_from: int


def plan_layout(order: tuple[int, ...], num_layers: int, lane_start: int, skip_to_lanes: bool) -> Layout:
    """Return the Layout of a virtual order: its first half encodes, its second half decodes.

    Decoder step j takes the j-th youngest encoder output through skip row j. The lanes split at
    the first decoder step whose layer is `lane_start` or later; rows that arrive after the split
    reach the attention lane (PR #1395) or, with skip_to_lanes False, are lost (PR #1471).
    """
    border = len(order) // 2
    split = 0 < lane_start < num_layers
    lanes_from = next((j for j in range(border, len(order)) if split and order[j] >= lane_start), len(order))
    rows = min(skip_rows(num_layers), border, len(order) - border)
    skips = tuple((row, border + row, border - 1 - row) for row in range(rows)
                  if skip_to_lanes or border + row <= lanes_from)
    return Layout(tuple(order), skips, lanes_from)


def skip_rows(num_layers: int) -> int:
    """Return how many skip rows a model has: fixed by its physical depth."""
    return num_layers // 2


def layouts_of(config: Config) -> tuple[Layout, Layout]:
    """Return the layouts before and after recurrence starts (equal where there is none)."""
    return tuple(plan_layout(order, config.num_layers, config.parallel_start_layer, config.skip_to_lanes)
                 for order in (config.base_order, config.recurrent_order))


def parameter(*shape: int, role: Role, dtype=torch.float32) -> nn.Parameter:
    """Return an uninitialised parameter that carries its role."""
    made = nn.Parameter(torch.empty(*shape, dtype=dtype))
    made.role = role
    return made


def rms_norm(x: Tensor) -> Tensor:
    """Normalise the last dimension to unit mean square, in the dtype of `x`."""
    return F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS)


def rotary_tables(length: int, dims: int, base: float, train_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (length, dims/2), computed in fp32, in the dtype of `like`.

    Beyond the training length the base grows (NTK scaling).
    """
    if length > train_len:
        base = base * (length / train_len) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, device=like.device, dtype=torch.float32) / dims
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), base ** -exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R = 2 * cos.shape[-1] dimensions of each head."""
    half = cos.shape[-1]
    a, b, rest = x_BTHK.split((half, half, x_BTHK.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Linear(nn.Module):
    """Bias-free matrix (R, C), fp32, applied in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, zero_start: bool = False):
        super().__init__()
        self.weight = parameter(outputs, inputs, role=Role.MATRIX)
        self.zero_start = zero_start

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with normed q and k, partial RoPE, a gain per head, and XSA."""

    def __init__(self, config: Config, layer: int, attend):
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, config.head_dim
        self.q = Linear(config.model_dim, config.model_dim)
        self.k = Linear(config.model_dim, config.kv_dim)
        self.v = Linear(config.model_dim, config.kv_dim)
        self.out = Linear(config.model_dim, config.model_dim, zero_start=True)
        self.q_gain = parameter(config.num_heads, role=Role.CONTROL)
        self.attend = attend
        self.exclude_self = exclude_self if layer >= config.num_layers - config.xsa_last_n else lambda out, v: out

    def forward(self, x_BTD: Tensor, rotary, value_BTE: Tensor | None) -> Tensor:
        batch, length, _ = x_BTD.shape
        v = self.v(x_BTD) if value_BTE is None else self.v(x_BTD) + value_BTE
        q = self.q(x_BTD).view(batch, length, self.heads, self.width)
        k, v = (y.view(batch, length, self.kv_heads, self.width) for y in (self.k(x_BTD), v))
        q, k = rotate(rms_norm(q), *rotary), rotate(rms_norm(k), *rotary)
        q = q * self.q_gain.to(q.dtype)[:, None]
        out = self.exclude_self(self.attend(q, k, v), v)
        return self.out(out.reshape(batch, length, -1).to(x_BTD.dtype))


def exclude_self(out_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Return each head's output without its component along its own position's value (XSA), fp32."""
    v = F.normalize(v_BTGK.float(), dim=-1, eps=1e-12).unsqueeze(3)
    grouped = out_BTHK.float().unflatten(2, (v_BTGK.shape[2], -1))
    return (grouped - (grouped * v).sum(-1, keepdim=True) * v).flatten(2, 3)


class MLP(nn.Module):
    """Linear, leaky ReLU (0.5) squared in fp32, linear."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_dim)
        self.down = Linear(config.mlp_dim, config.model_dim, zero_start=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.up(x_BTD), 0.5).float().square()
        return self.down(hidden.to(x_BTD.dtype))


class Block(nn.Module):
    """One physical layer; its attention and MLP halves run in turn or on two lanes."""

    def __init__(self, config: Config, layer: int, attend):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer, attend), MLP(config)
        self.attn_scale = parameter(config.model_dim, role=Role.CONTROL)
        self.mlp_scale = parameter(config.model_dim, role=Role.CONTROL)
        self.resid_mix = parameter(2, config.model_dim, role=Role.CONTROL)
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0

    def attention_half(self, x: Tensor, x0: Tensor, rotary, value: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        return x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.norm_scale, rotary, value)

    def mlp_half(self, x: Tensor) -> Tensor:
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.norm_scale)


class ValueEmbedding(nn.Module):
    """A second, narrow token embedding that chosen layers add to their values. Source: PR #414."""

    def __init__(self, config: Config, dtype):
        super().__init__()
        self.table = Embedding(config.vocab_size, config.ve_dim, dtype)
        self.proj = Linear(config.ve_dim, config.kv_dim) if config.ve_dim != config.kv_dim else None
        self.scale = parameter(role=Role.CONTROL)
        self.layer_scales = parameter(len(config.ve_layers), role=Role.CONTROL)

    def forward(self, tokens_BT: Tensor, dtype) -> Tensor:
        value = self.table(tokens_BT).to(dtype)
        return (value if self.proj is None else self.proj(value)) * self.scale.to(dtype)


class Embedding(nn.Module):
    """Token table (V, D), kept in the compute dtype as published."""

    def __init__(self, vocab_size: int, width: int, dtype):
        super().__init__()
        self.weight = parameter(vocab_size, width, role=Role.EMBED, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class GPT(nn.Module):
    """The model of PR #1471: U-Net skips, depth recurrence, two lanes, tied softcapped head.

    Every size is fixed at construction; the order of layers is `forward`'s argument.
    Parameters are uninitialised until `init_weights` or a loaded state fills them.
    """

    def __init__(self, config: Config, attend=attention_sdpa, dtype=torch.float32):
        super().__init__()
        self.dtype, self.softcap, self.init_config = dtype, config.logit_softcap, config
        self.rotary = dict(dims=config.rope_dims or config.head_dim, base=config.rope_base,
                           train_len=config.train_seq_len)
        self.tok_emb = Embedding(config.vocab_size, config.model_dim, dtype)
        ve_layers = config.ve_layers if config.ve_enabled else ()
        self.ve = ValueEmbedding(config, dtype) if ve_layers else None
        self.ve_index = {layer: j for j, layer in enumerate(ve_layers)}
        self.blocks = nn.ModuleList(Block(config, layer, attend) for layer in range(config.num_layers))
        rows = skip_rows(config.num_layers)
        self.skip_weights = parameter(rows, config.model_dim, role=Role.CONTROL)
        self.skip_gates = (parameter(rows, config.model_dim, role=Role.CONTROL)
                           if config.skip_gates_enabled else None)
        self.lane_merge = parameter(role=Role.CONTROL) if config.lanes_split else None

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Fill every parameter with its start value, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        starts = {"attn_scale": 1.0, "mlp_scale": 1.0, "skip_weights": 1.0, "skip_gates": 0.0, "lane_merge": 0.5,
                  "layer_scales": 1.0, "scale": 0.1, "q_gain": self.init_config.qk_gain_init}
        for module_name, module in self.named_modules():
            for name, p in module.named_parameters(recurse=False):
                value = torch.empty(p.shape)
                if isinstance(module, Embedding):
                    std = self.init_config.tied_embed_init_std if module is self.tok_emb else 0.01
                    value.normal_(0.0, std, generator=generator)
                elif isinstance(module, Linear):
                    value.zero_() if module.zero_start else nn.init.orthogonal_(value, generator=generator)
                elif name == "resid_mix":
                    value[0], value[1] = 1.0, 0.0
                else:
                    value.fill_(starts[name])
                p.copy_(value)

    def forward(self, tokens_BT: Tensor, layout: Layout, tail: int | None = None) -> Tensor:
        """Return the normed final hidden state (B, T, D), or of the last `tail` positions (B, S, D).

        The MLP lane never reads another position, so with `tail` it is cut at the split already.
        """
        x = x0 = rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        value = None if self.ve is None else self.ve(tokens_BT, x.dtype)
        rotary = rotary_tables(tokens_BT.shape[1], **self.rotary, like=x)
        last = slice(None) if tail is None else slice(tokens_BT.shape[1] - tail, None)
        skip_into = {target: (row, source) for row, target, source in layout.skips}
        outputs, mlp_lane = {}, None
        for step, layer in enumerate(layout.order):
            if step in skip_into:
                row, source = skip_into[step]
                x = self.blend_skip(row, x, outputs.pop(source))
            if step == layout.lanes_from:
                mlp_lane = x[:, last]
            block = self.blocks[layer]
            x = block.attention_half(x, x0, rotary, self.layer_value(layer, value))
            if mlp_lane is None:
                x = outputs[step] = block.mlp_half(x)
            else:
                mlp_lane = block.mlp_half(mlp_lane)
        x = x[:, last]
        if mlp_lane is not None:
            share = self.lane_merge.to(x.dtype)
            x = share * x + (1 - share) * mlp_lane
        return rms_norm(x)

    def layer_value(self, layer: int, value: Tensor | None) -> Tensor | None:
        """Return what layer `layer` adds to its values, if anything."""
        if layer not in self.ve_index:
            return None
        return value * self.ve.layer_scales.to(value.dtype)[self.ve_index[layer]]

    def blend_skip(self, row: int, x: Tensor, skip: Tensor) -> Tensor:
        """Return x joined with an encoder output: gated blend, or plain sum where gates are off."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + skip
        gate = torch.sigmoid(self.skip_gates[row].to(x.dtype))
        return gate * x + (1 - gate) * skip

    def logits(self, tokens_BT: Tensor, layout: Layout) -> Tensor:
        """Return softcapped logits (B, T, V), fp32."""
        return softcap_logits(self(tokens_BT, layout), self.tok_emb.weight, self.softcap)

    def token_losses(self, tokens_BT: Tensor, targets_BS: Tensor, layout: Layout) -> Tensor:
        """Return the loss in nats at the last S positions (B, S), fp32; S = targets_BS.shape[1]."""
        hidden = self(tokens_BT, layout, tail=targets_BS.shape[1])
        losses = softcap_cross_entropy(hidden.flatten(0, 1), self.tok_emb.weight, targets_BS.flatten(), self.softcap)
        return losses.view_as(targets_BS)

    def mean_loss(self, tokens_BT: Tensor, targets_BT: Tensor, layout: Layout) -> Tensor:
        """Return the mean training loss in nats."""
        return self.token_losses(tokens_BT, targets_BT, layout).mean()

    def input_groups(self) -> dict[str, list[str]]:
        """Return which weights read the same input: module whose input is observed -> parameter names."""
        groups = {}
        for i in range(len(self.blocks)):
            groups[f"blocks.{i}.attn.q"] = [f"blocks.{i}.attn.{name}.weight" for name in "qkv"]
            for name in ("attn.out", "mlp.up", "mlp.down"):
                groups[f"blocks.{i}.{name}"] = [f"blocks.{i}.{name}.weight"]
        if self.ve is not None and self.ve.proj is not None:
            groups["ve.proj"] = ["ve.proj.weight"]
        return groups


def meta_model(config: Config) -> GPT:
    """Return the model without memory for its parameters: names, shapes and roles only."""
    with torch.device("meta"):
        return GPT(config)


# == 6 Optimizer: flat buffers, Muon, AdamW, schedule, average ====================================

@dataclass(frozen=True)
class Rates:
    """What changes from step to step."""

    lr_multiplier: float
    muon_momentum: float
    recurrent: bool


def schedule(config: Config, step: int, progress: float) -> Rates:
    """Return the rates of a step; `progress` is the share of the run done, by clock or by steps. Source: PR #1471."""
    multiplier = 1.0
    if config.warmdown_frac and progress >= 1 - config.warmdown_frac:
        multiplier = max((1 - progress) / config.warmdown_frac, config.min_lr)
    if config.muon_momentum_warmup_frac is not None:
        warmed = progress / config.muon_momentum_warmup_frac if config.muon_momentum_warmup_frac else 1.0
    else:
        warmed = step / config.muon_momentum_warmup_steps if config.muon_momentum_warmup_steps else 1.0
    start, warmed = config.muon_momentum_warmup_start, min(warmed, 1.0)
    momentum = (1 - warmed) * start + warmed * config.muon_momentum
    if config.recur_start_frac is not None:
        recurrent = progress >= config.recur_start_frac
    else:
        recurrent = step >= config.recur_start_step
    return Rates(multiplier, momentum, recurrent)


def partition(model: nn.Module) -> dict[Role, list[nn.Parameter]]:
    """Return every parameter under its role; raises AssertionError if one has no owner or two."""
    groups = {role: [p for p in model.parameters() if getattr(p, "role", None) is role] for role in Role}
    owned = [id(p) for group in groups.values() for p in group]
    assert sorted(owned) == sorted(id(p) for p in model.parameters()), "a parameter without exactly one owner"
    return groups


class Bank:
    """All parameters and gradients in one flat buffer per dtype; parameters are views into it.

    Reducing, clipping and averaging then are one operation per dtype, same-shape matrices are
    one (N, R, C) tensor, and AdamW sees one flat parameter per role. Every tensor starts at a
    multiple of 64 elements; the gaps hold zeros.
    """

    ALIGN = 64

    def __init__(self, groups: dict[Role, list[nn.Parameter]]):
        matrices = sorted(groups[Role.MATRIX], key=lambda p: tuple(p.shape))
        ordered = [*groups[Role.EMBED], *matrices, *groups[Role.CONTROL]]
        self.offsets, ends = {}, {}
        for p in ordered:
            self.offsets[p] = ends.get(p.dtype, 0)
            ends[p.dtype] = self.offsets[p] + -(-p.numel() // self.ALIGN) * self.ALIGN
        device = ordered[0].device
        self.weights = {dtype: torch.zeros(end, dtype=dtype, device=device) for dtype, end in ends.items()}
        self.grads = {dtype: torch.zeros(end, dtype=dtype, device=device) for dtype, end in ends.items()}
        for p in ordered:
            view = self.view(self.weights, p)
            view.copy_(p.data)
            p.data, p.grad = view, self.view(self.grads, p)
        self.matrices = [self.stack([p for p in matrices if p.shape == shape])
                         for shape in dict.fromkeys(p.shape for p in matrices)]
        self.adam = {role: self.flat(groups[role]) for role in (Role.EMBED, Role.CONTROL)}

    def view(self, buffers, p: nn.Parameter) -> Tensor:
        """Return the part of `buffers` (weights, grads, or an average of them) that belongs to `p`."""
        start = self.offsets[p]
        return buffers[p.dtype][start:start + p.numel()].view(p.shape)

    def stack(self, same: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Return weights and gradients of same-shape matrices as (N, R, C) views."""
        start, count, shape = self.offsets[same[0]], len(same), same[0].shape
        padded = -(-same[0].numel() // self.ALIGN) * self.ALIGN
        size, strides = (count, *shape), (padded, shape[1], 1)
        return tuple(buffers[same[0].dtype].as_strided(size, strides, start) for buffers in (self.weights, self.grads))

    def flat(self, params: list[nn.Parameter]) -> nn.Parameter:
        """Return parameters that lie side by side as one flat parameter with its gradient."""
        start, last = self.offsets[params[0]], params[-1]
        end = self.offsets[last] + -(-last.numel() // self.ALIGN) * self.ALIGN
        whole = nn.Parameter(self.weights[last.dtype][start:end])
        whole.grad = self.grads[last.dtype][start:end]
        return whole


def newton_schulz(g_NRC: Tensor, steps: int, dtype) -> Tensor:
    """Return nearly orthogonal matrices (N, R, C) with the row and column spaces of g. Source: K. Jordan's Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    x = g_NRC.to(dtype)
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        p = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(p, p, p, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Optimizers:
    """Muon on the matrices, AdamW on embeddings and on control tensors, over one Bank.

    Matrix i of a shape is orthogonalised by rank i mod world size alone; the updates are then summed.
    """

    def __init__(self, model: nn.Module, config: Config, runtime: Runtime):
        self.config, self.runtime = config, runtime
        self.bank = Bank(partition(model))
        self.momenta = [torch.zeros_like(g[runtime.rank::runtime.world_size]) for _, g in self.bank.matrices]
        settings = {Role.EMBED: (config.tied_embed_lr, config.embed_wd), Role.CONTROL: (config.scalar_lr, config.adam_wd)}
        groups = [dict(params=[self.bank.adam[role]], lr=lr, peak_lr=lr, weight_decay=decay)
                  for role, (lr, decay) in settings.items()]
        self.adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps,
                                       fused=runtime.device.type == "cuda")

    def zero_grad(self):
        for flat in self.bank.grads.values():
            flat.zero_()

    def reduce_and_clip(self):
        """Average the gradients over the ranks, then scale them to a global norm of at most GRAD_CLIP_NORM."""
        flats = list(self.bank.grads.values())
        for flat in flats:
            self.runtime.sum_(flat)
            if self.runtime.world_size > 1:
                flat.div_(self.runtime.world_size)
        if self.config.grad_clip_norm:
            norm = torch.stack([flat.float().norm() for flat in flats]).norm()
            factor = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for flat in flats:
                flat.mul_(factor)

    @torch.no_grad()
    def step(self, rates: Rates):
        """Apply one update from the reduced gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * rates.lr_multiplier
        self.adamw.step()
        lr, rank, ranks = self.config.matrix_lr * rates.lr_multiplier, self.runtime.rank, self.runtime.world_size
        for (weights, grads), momentum in zip(self.bank.matrices, self.momenta):
            update = torch.zeros(weights.shape, dtype=self.runtime.compute_dtype, device=weights.device)
            if len(momentum):
                update[rank::ranks] = self.muon_update(grads[rank::ranks], momentum, rates.muon_momentum)
            self.runtime.sum_(update)
            weights.mul_(1 - lr * self.config.muon_wd).add_(update, alpha=-lr)

    def muon_update(self, grads: Tensor, momentum: Tensor, beta: float) -> Tensor:
        """Return the update directions (N, R, C): Nesterov, rows normalised (MuonEq-R), orthogonalised."""
        momentum.mul_(beta).add_(grads)
        direction = torch.add(grads, momentum, alpha=beta)
        direction /= direction.norm(dim=2, keepdim=True).clamp_min(1e-7)
        out = newton_schulz(direction, self.config.muon_backend_steps, self.runtime.compute_dtype)
        return out * max(1.0, grads.shape[1] / grads.shape[2]) ** 0.5

    def reset(self):
        """Forget all momenta, as if no step had been made."""
        self.adamw.state.clear()
        for momentum in self.momenta:
            momentum.zero_()


class Average:
    """Exponential moving average of every weight, fp32, started at the weights of its construction."""

    def __init__(self, bank: Bank, decay: float):
        self.bank, self.decay = bank, decay
        self.shadow = {dtype: flat.float().clone() for dtype, flat in bank.weights.items()}

    @torch.no_grad()
    def update(self):
        for dtype, flat in self.bank.weights.items():
            self.shadow[dtype].lerp_(flat.float(), 1 - self.decay)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the averaged weights by parameter name, fp32."""
        return {name: self.bank.view(self.shadow, p) for name, p in model.named_parameters()}

    @torch.no_grad()
    def apply(self):
        """Put the averaged weights into the model."""
        for dtype, flat in self.bank.weights.items():
            flat.copy_(self.shadow[dtype])
