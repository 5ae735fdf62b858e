"""Train, quantise, pack and score a small GPT for the Parameter Golf challenge, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     # the record configuration
    python train_gpt.py --check                               # every check a run starts with
    python train_gpt.py --inspect FILE                        # what an artifact or its like holds
    python train_gpt.py --help                                # every setting

Read from the top; each room stands under a banner `# == N Name` and uses only rooms above it:

    1 Config       every setting, presets, the table of stages
    1b Settings    reading, checking and showing them
    2 Runtime      ranks, device, clock, signals, log
    2b Files       the container of weights, statistics and artifacts; the journal
    3 Data         shards, batches, the order of windows, the bytes of the validation text
    4 Kernels      attention and loss, one fast and one plain form each
    5 Model        layouts, phases, GPT
    6 Optimizer    flat buffers, Muon and AdamW by role, schedule, average
    7 Quantize     steps, GPTQ, dependent codes, the search for the byte budget
    8 Coder        codes as bytes and back
    8b Artifact    the inventory of parameters, step rules, the artifact and back
    9 Evaluate     windows, the score
    9b Adapt       test-time training: a score, then the step that learns from it
    10 Train       warm-up and the loop
    11 Calibrate   statistics for the quantiser
    11b Preflight  what is taken, checked and foretold before a run
    11c Report     what a run says of itself
    12 Stages      train -> weights + stats -> quantize -> artifact -> evaluate -> scores; main

Settings are environment variables; the defaults are the record configuration (PR #1471 with
its faults repaired, see PRESETS for the published quirks).

Dimension key: B batch, T time, S scored positions, D model, H query heads, G key/value heads,
K head width, V vocabulary, R x C weight rows x columns, N a number of like things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import hashlib
import inspect
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

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
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None


# == 1 Config: every setting, its meaning, and what is refused ====================================

class Stage(NamedTuple):
    """One part of a run. Stages meet in files alone, see RunFiles and KINDS.

    topic: its settings that determine model, codes or score; they travel in the artifact.
    reads: kind of the file it starts from; writes: kinds it leaves, the first one when it is done.
    text: shards it reads.
    """

    topic: str
    reads: str
    writes: tuple[str, ...]
    text: tuple[str, ...]


STAGES = {
    "train": Stage("model", "", ("weights", "stats"), ("train", "val")),
    "quantize": Stage("quantization", "weights", ("artifact",), ()),
    "evaluate": Stage("evaluation", "artifact", ("scores",), ("val",)),
}
ARTIFACT_TOPICS = tuple(stage.topic for stage in STAGES.values())


class ConfigError(ValueError):
    """One or more settings or input files are wrong; `faults` holds one line for each.

    shared: every rank raises the same, so that rank 0 alone need tell.
    """

    def __init__(self, faults: list[str], shared: bool = False):
        self.faults, self.shared = faults, shared
        super().__init__("\n".join(faults))


def topic(name: str, stage: str):
    """Return the declarer of one topic's settings, which `stage` consumes."""
    def knob(default, note, least=None, most=None, choices=()):
        """Declare one setting: its default, meaning with unit and source, and range."""
        return field(default=default, metadata=dict(
            note=note, topic=name, stage=stage, least=least, most=most, choices=choices))
    return knob


class Windows(NamedTuple):
    """How a text is read to be scored: windows that start every `stride` targets.

    batch: windows of a forward. by_documents: context never crosses a document's start.
    """

    length: int
    stride: int
    batch: int
    by_documents: bool = False


class Span(NamedTuple):
    """A stretch at the start of a run: so many steps, or a share of the run if one is given."""

    steps: int
    frac: float | None = None

    def done(self, step: int, progress: float) -> float:
        """Return which share of it is over, 1 at most, at a step and a share of the run."""
        done, whole = (step, self.steps) if self.frac is None else (progress, self.frac)
        return min(done / whole, 1.0) if whole else 1.0


PRESETS = {
    # PR #1471 as published, in exactly these quirks. Known deviations that stay: its path-hashed
    # sampler, pickle container, pruning of +-1 codes and bf16-rounded RoPE frequencies.
    "pr1471": f"""
        SKIP_TO_LANES=0 SCALE_FLOOR={1 / 31} SCALE_FLOOR_EMBED={1 / 127} SDCLIP_K=12.85
        SDCLIP_K_EMBED=20 EMBED_GPTQ=0 HESSIAN_RANKS=first SCORE_TAIL=0 GPTQ_RESERVE_SECONDS=10
        COMPRESSOR=brotli""",
    # The strongest published training stack (PR #2014 and what led to it), with this script's
    # quantiser: 17 virtual layers, routed lanes, gates, document masking, growing lengths,
    # adapters by document. Not its global phase of adaptation, nor carried adapters.
    "frontier": """
        VIRTUAL_ORDER=0,1,2,3,4,5,3,4,5,3,4,5,6,7,8,9,10 RECUR_START_FRAC=0.35 SKIP_ROWS=orders
        PARALLEL_START_LAYER=8 LANE_ROUTING=learned VE_ENABLED=0 QK_GAIN_INIT=5.25 ATTN_GATE=sparse
        SMEAR_GATE=1 MATRIX_LR=0.026 EMBED_WD=0.085 BETA2=0.99 MUON_MOMENTUM=0.97
        NS_COEFFICIENTS=polar WARMDOWN_FRAC=0.85 MIN_LR=0.1 VAL_LOSS_EVERY=0 DOC_MASK=1
        TRAIN_SEQ_LEN=3072 TRAIN_SEQ_SCHEDULE=1024@0.1,2048@0.7,3072@1 EVAL_SEQ_LEN=3072
        EVAL_PLAN=documents TTT=lora GPTQ_CALIBRATION_BATCHES=32""",
    # One H100 makes about 630 steps in 590 s at PR #1471's speed: its starts and warm-ups as shares
    # of the run (204.6 of 590 s; 1500 of 4968 steps), its EMA window (286 of 4968 steps) likewise.
    "one_gpu": """
        RECUR_START_FRAC=0.347 MUON_MOMENTUM_WARMUP_FRAC=0.302 EMA_DECAY=0.9725 TRAIN_LOG_EVERY=50
        GPTQ_CALIBRATION_BATCHES=16 SEQ_CHANGE_WARMUP_STEPS=4""",
    # A small sibling for the corpus that data/build_demo.py makes: every part of a record run,
    # minutes on a laptop.
    "demo": """
        DATA_PATH=./data/datasets/demo TOKENIZER_PATH=./data/tokenizers/demo_1024_bpe.model
        VOCAB_SIZE=1024 MAX_WALLCLOCK_SECONDS=0 ITERATIONS=200 TRAIN_BATCH_TOKENS=4096
        MICRO_BATCH_TOKENS=4096 TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 NUM_LAYERS=6 MODEL_DIM=128
        NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=6 VE_LAYERS=4,5 VE_DIM=32 RECUR_LAYERS=2,3
        PARALLEL_START_LAYER=4 RECUR_START_FRAC=0.35 MUON_MOMENTUM_WARMUP_FRAC=0.3 WARMUP_STEPS=2
        ATTN_GATE=sparse SMEAR_GATE=1 LANE_ROUTING=learned DOC_MASK=1 ROW_TOKENS=2048
        EVAL_PLAN=documents
        EMA_DECAY=0.95 TRAIN_LOG_EVERY=20 VAL_LOSS_EVERY=100 VAL_BATCH_TOKENS=65536
        FP16_MAX_NUMEL=4096 PREQUANT_SLIDING=1 ARTIFACT_MAX_BYTES=827000""",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, the same on every rank.

    explicit: names of those that the environment or a preset sets; typed: the environment alone.
    """

    explicit: frozenset = frozenset()
    typed: frozenset = frozenset()
    adopted: bool = False  # what earlier stages consumed comes from an input file, see `adopt`

    knob = topic("run", "run")
    preset: str = knob("", f"defaults that environment settings beat: {', '.join(PRESETS)}, a file "
                           "of NAME=VALUE lines, or several with commas, the later one beats")
    stage: str = knob("all", "which part to run", choices=("all", *STAGES))
    run_id: str = knob("", "folder under runs/ and log name; empty: time and a random tag")
    input_path: str = knob("", "run folder or file that STAGE=quantize|evaluate reads")
    resume: bool = knob(False, "go on with run RUN_ID where it stopped")
    checkpoint_every_seconds: float = knob(0.0, "training time between checkpoints; 0: none", 0)
    dist_timeout_seconds: float = knob(1800.0, "longest wait of one rank for another", 1)
    device: str = knob("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    compile_enabled: bool | None = knob(None, "torch.compile; auto: on CUDA only")
    attention_backend: str = knob("auto", "auto: the first that works",
                                  choices=("auto", "fa3", "cudnn", "flash", "math"))
    allow_env: tuple[str, ...] = knob((), "names that look like misspelt settings, are not")

    knob = topic("data", "run")
    data_dir: str = knob("./data/", "holds datasets/fineweb10B_sp{V} and tokenizers/")
    data_path: str = knob("", "shard folder; beats DATA_DIR")
    tokenizer_path: str = knob("", "SentencePiece model; beats DATA_DIR")

    knob = topic("schedule", "train")
    iterations: int = knob(20_000, "optimizer steps at most", 0, 10 ** 9)
    max_wallclock_seconds: float = knob(600.0, "limit on training + calibration; 0: steps only", 0)
    train_batch_tokens: int = knob(786_432, "tokens a step, all ranks", 1, 1 << 32)
    doc_mask: bool = knob(False, "packed rows, attention inside documents alone; PR #1530")
    row_tokens: int = knob(98_304, "tokens of a packed row; DOC_MASK=1", 2, 1 << 24)
    train_seq_schedule: tuple[str, ...] = knob((), "LENGTH@SHARE list: tokens that attention may "
                                               "span until that share of the run; PR #2014")
    seq_change_warmup_steps: int = knob(32, "steps of rising rates after a change of length", 0)
    micro_batch_tokens: int = knob(98_304, "tokens a forward; lower it for memory", 1, 1 << 32)
    warmup_steps: int = knob(20, "compiling steps before the clock, undone; 0: none", 0, 10 ** 6)
    warmdown_frac: float = knob(0.72, "last share of the run: rates fall to 0; PR #1445", 0, 1)
    min_lr: float = knob(0.0, "least learning-rate multiplier", 0, 1)
    recur_start_step: int = knob(2000, "step at which the recurrent order starts; PR #1471", 0)
    recur_start_frac: float | None = knob(None, "share of the run; beats RECUR_START_STEP", 0, 1)
    train_log_every: int = knob(500, "steps between training lines; 0: none", 0)
    val_loss_every: int = knob(4000, "steps between validations, off the clock; 0: at the end", 0)
    prequant_sliding: bool = knob(False, "score the averaged weights by sliding window too")

    knob = topic("optimizer", "train")
    tied_embed_lr: float = knob(0.03, "peak AdamW rate of the embeddings", 0)
    matrix_lr: float = knob(0.022, "peak Muon rate; PR #1445", 0)
    scalar_lr: float = knob(0.02, "peak AdamW rate of gains, scales, gates", 0)
    muon_momentum: float = knob(0.99, "Muon momentum once warm", 0, 1)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = knob(1500, "steps of momentum warm-up; 0: none", 0)
    muon_momentum_warmup_frac: float | None = knob(None, "share of the run; beats the steps", 0, 1)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1, 100)
    ns_coefficients: str = knob("quintic", "of Newton-Schulz; polar: Polar Express; PR #1855",
                                choices=("quintic", "polar"))
    beta1: float = knob(0.9, "AdamW", 0, 0.9999999)
    beta2: float = knob(0.95, "AdamW", 0, 0.9999999)
    adam_eps: float = knob(1e-8, "AdamW", 0)
    grad_clip_norm: float = knob(0.3, "global L2 norm at most; 0: off", 0)
    muon_wd: float = knob(0.095, "weight decay of matrices; PR #1445", 0)
    embed_wd: float = knob(0.095, "weight decay of embeddings; PR #1445", 0)
    adam_wd: float = knob(0.02, "weight decay of gains, scales, gates", 0)
    ema_decay: float = knob(0.9965, "of the weight average, a step; PR #1445", 0, 0.9999999)

    knob = topic("calibration", "train")
    gptq_calibration_batches: int = knob(64, "of TRAIN_BATCH_TOKENS/8, all ranks", 1, 10 ** 6)
    gptq_reserve_seconds: float = knob(0.0, "least time kept to calibrate, or as measured", 0)
    hessian_ranks: str = knob("all", "who calibrates; first: rank 0's share alone (PR #1471)",
                              choices=("all", "first"))

    knob = topic("model", "train")
    seed: int = knob(1337, "initial weights and data order", 0, (1 << 63) - 1)
    vocab_size: int = knob(8192, "token ids; PR #1394", 2, 65_536)
    train_seq_len: int = knob(2048, "tokens per training window", 2, 1 << 20)
    num_layers: int = knob(11, "physical blocks", 1, 1024)
    model_dim: int = knob(512, "residual width", 2, 65_536)
    num_heads: int = knob(8, "query heads", 1, 4096)
    num_kv_heads: int = knob(4, "key/value heads", 1, 4096)
    mlp_mult: float = knob(4.0, "MLP hidden width over MODEL_DIM", 0.01, 256)
    xsa_last_n: int = knob(11, "last layers whose heads drop their own value; PR #287", 0, 1024)
    skip_gates_enabled: bool = knob(True, "skips blend through a gate instead of adding")
    skip_rows: str = knob("depth", "U-Net skips: NUM_LAYERS // 2, or all that the orders can use",
                          choices=("depth", "orders"))
    skip_to_lanes: bool = knob(True, "skips reach the attention lane; PR #1395 (0: #1471)")
    attn_gate: str = knob("none", "sparse: heads times sigmoid of the first inputs; PR #1787",
                          choices=("none", "sparse"))
    gate_window: int = knob(12, "inputs that gates read; as wide as the model: dense", 1, 65_536)
    attn_gate_scale: float = knob(0.5, "of the gate's argument; PR #1787", 0)
    smear_gate: bool = knob(False, "embeddings take in the one before, in a document; PR #1667")
    ln_scale: bool = knob(True, "normed inputs times 1/sqrt(layer + 1); PR #315")
    ve_enabled: bool = knob(True, "add value embeddings to V; PR #414")
    ve_dim: int = knob(128, "value-embedding width", 1, 65_536)
    ve_layers: tuple[int, ...] = knob((9, 10), "layers that add the value embedding")
    logit_softcap: float = knob(30.0, "logits become cap tanh(logits/cap)", 1e-3)
    qk_gain_init: float = knob(5.0, "initial gain per query head; PR #1445")
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", 1)
    rope_dims: int = knob(16, "rotated dimensions a head; 0: all; PR #315", 0)
    tied_embed_init_std: float = knob(0.005, "std of the initial embedding", 0)
    recur_layers: tuple[int, ...] = knob((3, 4, 5), "block of layers run twice; PR #1471")
    virtual_order: tuple[int, ...] = knob((), "recurrent order; beats RECUR_LAYERS")
    lane_routing: str = knob("scalar", "lanes merged by a scalar, or each half's output routed to "
                             "both; PR #1529", choices=("scalar", "learned"))
    parallel_start_layer: int = knob(7, "two lanes from here on; 0: none; PR #1471", 0, 1024)

    knob = topic("quantization", "quantize")
    gptq_enabled: bool = knob(True, "GPTQ with calibration; 0: round to nearest")
    embed_gptq: bool = knob(True, "GPTQ on the embeddings too; 0: rounded (PR #1471); PR #1394")
    step_rule: str = knob("auto", "fisher: steps by sensitivity; auto: sdclip if a k is given",
                          choices=("auto", "fisher", "sdclip"))
    row_power: float = knob(1.0, "of Fisher information in matrices' row steps", 0, 2)
    embed_power: float = knob(1.0, "the same in embeddings' row steps", 0, 2)
    column_power: float = knob(0.5, "of the conditional spread in column steps", 0, 2)
    trellis: bool = knob(True, "dependent codes: finer levels for the bytes; STEP_RULE=fisher")
    couple_rows: bool = knob(True, "GPTQ's feedback from row to row as well; TRELLIS=1")
    sdclip_k: float | None = knob(None, "clip radius, row stds; auto fills the cap; PR #1394", 0.01)
    sdclip_k_embed: float | None = knob(None, "the same of embeddings; PR #1394", 0.01)
    scale_floor: float = knob(0.0, "least int6 step (PR #1471: 1/31)", 0)
    scale_floor_embed: float = knob(0.0, "least int8 step (PR #1471: 1/127)", 0)
    fp16_max_numel: int = knob(65_536, "matrices of so many elements stay fp16; PR #1471", 0)
    control_dtype: str = knob("float16", "storage of gains, scales, gates",
                              choices=("float32", "float16"))
    compressor: str = knob("rans", "coder of the codes", choices=("rans", "brotli", "lzma"))
    artifact_max_bytes: int = knob(16_000_000, "cap on code + artifact", 1, 1 << 40)

    knob = topic("evaluation", "evaluate")
    eval_seq_len: int = knob(2048, "tokens per evaluation window", 2, 1 << 20)
    eval_plan: str = knob("windows", "documents: context never crosses a document's start; "
                          "PR #1530", choices=("windows", "documents"))
    sliding_window_enabled: bool = knob(True, "score by sliding window after the round trip")
    eval_stride: int = knob(64, "tokens scored per sliding window", 1)
    eval_mode: str = knob("exact", "stream: also long stretches, windowed attention",
                          choices=("exact", "stream"))
    stream_windows: int = knob(8, "EVAL_SEQ_LENs in a stretch of EVAL_MODE=stream", 2, 1024)
    score_tail: bool = knob(True, "score the tail after the last whole window; 0: PR #1471")
    val_batch_tokens: int = knob(524_288, "8 times the tokens of a forward", 1, 1 << 32)
    ttt: str = knob("auto", "test-time training, each score before the step that learns from it: "
                    "sgd on all weights, lora by document; auto: sgd if TTT_ENABLED=1",
                    choices=("auto", "none", "sgd", "lora"))
    ttt_enabled: bool = knob(False, "1: TTT=sgd, as published scripts mean it")
    ttt_lr: float | None = knob(None, "auto: 0.002 for sgd (PR #549), 7.5e-5 for lora (#2014)", 0)
    ttt_epochs: int = knob(3, "of sgd over a scored chunk; PR #549", 1, 1000)
    ttt_chunk_tokens: int = knob(32_768, "targets of a chunk of sgd", 1, 1 << 30)
    ttt_batch_seqs: int = knob(32, "sequences of a step of sgd, all ranks", 1, 1 << 20)
    ttt_momentum: float = knob(0.9, "of sgd", 0, 0.9999999)
    ttt_grad_clip: float = knob(1.0, "of sgd: global L2 norm at most; 0: off", 0)
    ttt_freeze_blocks: int = knob(0, "first blocks that sgd leaves as they are", 0, 1024)
    ttt_places: tuple[str, ...] = knob(("k", "o", "mlp", "head"), "lora: of q, k, v, o, mlp, head; "
                                       "PR #2014")
    ttt_rank: int = knob(80, "of lora's adapters", 1, 8192)
    ttt_alpha: float = knob(144.0, "lora: adapters count TTT_ALPHA / TTT_RANK", 0)
    ttt_beta1: float = knob(0.0, "of lora's AdamW", 0, 0.9999999)
    ttt_beta2: float = knob(0.99, "of lora's AdamW", 0, 0.9999999)
    ttt_wd: float = knob(0.5, "weight decay of lora's AdamW", 0)
    ttt_chunks: tuple[str, ...] = knob(("256:8", "2000:24", "48"), "lora: TOKENS:CHUNK list, "
                                       "targets of a chunk in documents up to so many tokens")
    ttt_batch_docs: int = knob(24, "lora: documents at once", 1, 65_536)
    ttt_warm_a: bool = knob(False, "lora: inner halves go on from batch to batch; then documents "
                                   "depend on each other")
    ttt_max_seconds: float = knob(400.0, "for test-time training: chunks grow to fit; 0: none", 0)

    del knob

    adapts = property(lambda c: ("sgd" if c.ttt_enabled else "none") if c.ttt == "auto" else c.ttt)
    ttt_rate = property(lambda c: c.ttt_lr if c.ttt_lr is not None
                        else 0.002 if c.adapts == "sgd" else 7.5e-5)
    head_dim = property(lambda c: c.model_dim // c.num_heads)
    kv_dim = property(lambda c: c.num_kv_heads * c.head_dim)
    mlp_dim = property(lambda c: int(c.mlp_mult * c.model_dim))
    row_len = property(lambda c: c.row_tokens if c.doc_mask else c.train_seq_len)
    row_name = property(lambda c: "ROW_TOKENS" if c.doc_mask else "TRAIN_SEQ_LEN")
    step_rows = property(lambda c: c.train_batch_tokens // c.row_len)
    by_documents = property(lambda c: c.eval_plan == "documents")
    packs = property(lambda c: c.by_documents or (c.doc_mask and c.runs("train")))
    # the splits whose shards this run reads
    text = property(lambda c: STAGES["train" if c.stage == "all" else c.stage].text)
    base_order = property(lambda c: tuple(range(c.num_layers)))
    lanes_split = property(lambda c: 0 < c.parallel_start_layer < c.num_layers)
    codec = property(lambda c: "brotli" if c.compressor == "rans" else c.compressor)  # of the rest
    search_k = property(lambda c: c.sdclip_k is None and c.sdclip_k_embed is None)
    # STEP_RULE=auto stays in files as it is: a later stage may be given a k
    rule = property(lambda c: c.step_rule if c.step_rule != "auto" else
                    "fisher" if c.gptq_enabled and c.search_k else "sdclip")
    eval_batch_windows = property(lambda c: max(1, c.val_batch_tokens // 8 // c.eval_seq_len))
    shard_dir = property(lambda c: Path(
        c.data_path or Path(c.data_dir, f"datasets/fineweb10B_sp{c.vocab_size}")))
    tokenizer_file = property(lambda c: Path(
        c.tokenizer_path or Path(c.data_dir, f"tokenizers/fineweb_{c.vocab_size}_bpe.model")))
    calibration_rows = property(lambda c: max(
        1, c.gptq_calibration_batches * c.train_batch_tokens // 8 // c.row_len))
    whole_windows = property(lambda c: Windows(
        c.eval_seq_len, c.eval_seq_len, c.eval_batch_windows, c.by_documents))
    sliding_windows = property(lambda c: c.whole_windows._replace(stride=c.eval_stride))
    # stretches of STREAM_WINDOWS windows; but the first, each reads one before it scores
    stream_plan = property(lambda c: Windows(
        c.eval_seq_len * c.stream_windows, c.eval_seq_len * (c.stream_windows - 1),
        max(1, c.eval_batch_windows // c.stream_windows)))

    recur_start = property(lambda c: Span(c.recur_start_step, c.recur_start_frac))
    muon_warmup = property(lambda c: Span(c.muon_momentum_warmup_steps,
                                          c.muon_momentum_warmup_frac))

    @property
    def recurrent_order(self) -> tuple[int, ...]:
        """The virtual layers once recurrence is on; equal to `base_order` where there is none."""
        end = 1 + max(self.recur_layers, default=-1)
        looped = self.base_order[:end] + self.recur_layers + self.base_order[end:]
        return self.virtual_order or looped

    @property
    def seq_stages(self) -> list[tuple[int, float]]:
        """(Training length, share of the run at which it ends), in order; ValueError if none."""
        parts = [part.split("@") for part in self.train_seq_schedule]
        return [(int(length), float(end)) for length, end in parts] or [(self.train_seq_len, 1.0)]

    @property
    def chunk_rule(self) -> list[tuple[float, int]]:
        """TTT_CHUNKS as (tokens of a document at most, targets of its chunks); [] if malformed."""
        with contextlib.suppress(ValueError):
            parts = [part.split(":") for part in self.ttt_chunks]
            parts = [part if len(part) > 1 else ["inf", *part] for part in parts]
            rule = [(float(limit), int(chunk)) for limit, chunk in parts]
            limits, chunks = zip(*rule)
            if [*limits] == sorted({*limits}) and limits[-1] == math.inf and min(chunks) > 0:
                return rule
        return []

    # kind of the file that a lone later stage starts from
    reads = property(lambda c: STAGES[c.stage].reads if c.stage in STAGES else "")

    def runs(self, stage: str) -> bool:
        return self.stage in ("all", stage)

    def public(self) -> dict:
        """Return every setting by its published (lower-case) name."""
        return {name: getattr(self, name) for name in KNOBS}


KNOBS: dict[str, Any] = {f.name: f for f in dataclasses.fields(Config) if f.metadata}
ARTIFACT_KNOBS = {name: f for name, f in KNOBS.items() if f.metadata["topic"] in ARTIFACT_TOPICS}
# A general setting -> special ones that beat it.
BEATEN_BY = dict(
    data_dir="data_path tokenizer_path", recur_start_step="recur_start_frac",
    recur_layers="virtual_order", muon_momentum_warmup_steps="muon_momentum_warmup_frac")
# Settings younger than artifacts that can be read -> what a file without them was made with.
SINCE = dict(skip_rows="depth", attn_gate="none", gate_window=12, attn_gate_scale=0.5,
             smear_gate=False, lane_routing="scalar", eval_plan="windows", ttt="auto",
             **{name: KNOBS[name].default for name in KNOBS if name.startswith("ttt_")})

# Settings published scripts read without effect, or that have none here. Setting one is said aloud.
WITHOUT_EFFECT = {
    "MUON_BETA2": "no published script uses it",
    "FISHER_BATCHES": "every calibration batch has gradients",
    "ROPE_TRAIN_SEQ_LEN": "TRAIN_SEQ_LEN is the training length",
    "CONTROL_TENSOR_NAME_PATTERNS": "roles are given where a parameter is made",
    "EMBED_LR": "acts on untied embeddings only", "HEAD_LR": "acts on an untied head only",
}
# Names of other published systems and of modes not built -> the one value that describes this
# script; a bare "NAME=" has none and must stay unset.
NEUTRAL = dict(pair.split("=") for pair in """
    TIE_EMBEDDINGS=1 LR_FLOOR=0
    TTT_POLYAK_DECAY=0.998 PREQUANT_TTT_ENABLED=0 SLOT_ENABLED=0 SLOT_LR=0.005 SLOT_STEPS=8
    HEDGE_ENABLED=0 G1_GATING=0 LAWA_ENABLED=0 LAWA_K=5 LAWA_FREQ=50 MUON_EQ_R=1 WARMDOWN_ITERS=
    GPTQ_CALIB_BATCHES= GPTQ_DAMP=0.01 GPTQ_BLOCK_SIZE=128 BIGRAM_VOCAB_SIZE=0 BIGRAM_DIM=128
    TRIGRAM=0 TARGET_MB= VAL_BATCH_SIZE=524288 SWA_ENABLED=0 SWA_EVERY=50 LATE_QAT_THRESHOLD=0
    QAT_ENABLED=0 MTP_NUM_HEADS=0 MTP_LOSS_WEIGHT=0.2 DTG_ENABLED=0 GATED_ATTENTION=0
    VALUE_RESIDUAL=0 CROWN_Q_ENABLED=0 CROWN_Q_LAMBDA=0.01 SOFT_ROUND_QAT=0 HADAMARD_ROTATION=0
    MIXED_BITWIDTH=0 PREQUANT_TTT=0 PREQUANT_TTT_LR=0.0001 PREQUANT_TTT_EPOCHS=3 TTT_OPTIMIZER=sgd
    TTT_NESTEROV=0 TTT_LR_FLOOR=0.1 TTT_TEMPERATURE=1 NGRAM_ENABLED=0 GPTQ_FULL_HESSIAN=1
    SKIP_QUANTIZE=0 SKIP_COMPILE=0 TTT_MAX_DOCS=0 TTT_MIN_DOC_LEN=32 TTT_CHUNK_SIZE=256
    EMBEDDING_DIM=MODEL_DIM
    """.split())


# == 1b Settings: reading, checking and showing them ==============================================

def config_faults(config: Config) -> list[str]:
    """Return every broken rule of a configuration: setting, value and rule, one line each."""
    broken = [(name, rule) for holds, name, rule in range_rules(config) if not holds]
    # ranges mended, so that combinations can be judged all the same
    c = dataclasses.replace(config, **{name: KNOBS[name].default for name, _ in broken})
    complete = config.runs("train") or config.adopted  # else its file's settings are still to come
    broken += [(name, rule) for holds, name, rule in combination_rules(c) + adaptation_rules(c)
               if not holds and (complete or KNOBS[name].metadata["topic"] == "run")]
    # with the values of the numbers that a rule names
    numbers = {name.upper(): f"{name.upper()}={value}" for name, value in config.public().items()
               if type(value) in (int, float)}
    return [f"{name.upper()}={show_value(getattr(config, name))}: " + re.sub(
        "[A-Z][A-Z0-9_]+(?!=)\\b", lambda found: numbers.get(found[0], found[0]), rule)
            for name, rule in broken]


def range_rules(c: Config) -> list[tuple]:
    """Return (whether it holds, setting, rule) of what binds each setting by itself."""
    rules = []
    for name, f in KNOBS.items():
        least, most, choices = (f.metadata[key] for key in ("least", "most", "choices"))
        if (value := getattr(c, name)) not in (None, f.default):
            rules += [(least is None or value >= least, name, f"must be at least {least}"),
                      (most is None or value <= most, name, f"must be at most {most}"),
                      (value in (choices or [value]), name, f"must be one of {', '.join(choices)}")]
    return rules


def combination_rules(c: Config) -> list[tuple]:
    """Return (whether it holds, setting, rule) of what binds settings that are each in range."""
    layers, recur = set(range(c.num_layers)), c.recur_layers
    block = set(recur) <= layers and all(b == a + 1 for a, b in itertools.pairwise(recur))
    decoder = c.recurrent_order[len(c.recurrent_order) // 2:]
    lanes = [i >= c.parallel_start_layer for i in decoder]
    return [
        (c.model_dim % c.num_heads == 0, "model_dim", "must be a multiple of NUM_HEADS"),
        (c.num_heads % c.num_kv_heads == 0, "num_heads", "must be a multiple of NUM_KV_HEADS"),
        (c.head_dim % 2 == 0, "num_heads", "the head width MODEL_DIM / NUM_HEADS must be even"),
        (c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim, "rope_dims",
         "must be even and at most the head width MODEL_DIM / NUM_HEADS"),
        (c.eval_seq_len <= c.train_seq_len or (c.rope_dims or c.head_dim) > 2, "eval_seq_len",
         "longer than TRAIN_SEQ_LEN needs ROPE_DIMS above 2"),
        (c.gate_window <= c.model_dim or not (c.smear_gate or c.attn_gate != "none"),
         "gate_window", "must be at most MODEL_DIM"),
        (c.mlp_dim >= 1, "mlp_mult", "the hidden width MLP_MULT * MODEL_DIM must be at least 1"),
        (c.train_batch_tokens % c.row_len == 0, "train_batch_tokens",
         f"must be a multiple of {c.row_name}"),
        (c.micro_batch_tokens >= c.row_len, "micro_batch_tokens",
         f"must be at least {c.row_name}"),
        (not c.doc_mask or c.row_tokens >= c.train_seq_len, "row_tokens",
         "must be at least TRAIN_SEQ_LEN"),
        (follows_lengths(c), "train_seq_schedule", "must be LENGTH@SHARE with commas between, "
         "shares rising to 1, the greatest length TRAIN_SEQ_LEN, as in 1024@0.5,2048@1"),
        (not c.train_seq_schedule or c.doc_mask, "train_seq_schedule", "needs DOC_MASK=1"),
        (not c.train_seq_schedule or c.recur_start.frac is not None
         or c.recurrent_order == c.base_order, "train_seq_schedule",
         "needs RECUR_START_FRAC: the start of recurrence as a share of the run too"),
        (c.eval_mode == "exact" or not c.by_documents, "eval_mode", "needs EVAL_PLAN=windows"),
        (c.virtual_order or block, "recur_layers",
         "must be consecutive layers below NUM_LAYERS, or use VIRTUAL_ORDER"),
        (not c.virtual_order or set(c.virtual_order) == layers, "virtual_order",
         "must name every layer below NUM_LAYERS and no other"),
        (not c.lanes_split or lanes == sorted(lanes), "parallel_start_layer",
         "the recurrent order runs an earlier layer after the lanes have split"),
        (not c.ve_enabled or sorted(c.ve_layers) == sorted(set(c.ve_layers) & layers), "ve_layers",
         "must be different layers below NUM_LAYERS"),
        (c.step_rule != "fisher" or (c.gptq_enabled and c.search_k), "step_rule",
         "needs GPTQ_ENABLED=1, and no SDCLIP_K or SDCLIP_K_EMBED"),
        (c.gptq_reserve_seconds < (c.max_wallclock_seconds or math.inf), "gptq_reserve_seconds",
         "must be less than MAX_WALLCLOCK_SECONDS"),
        (not c.input_path or c.reads, "input_path",
         "has a meaning only with STAGE=quantize or STAGE=evaluate"),
        (not c.resume or c.run_id, "resume", "needs the RUN_ID of the run to go on with"),
        (re.fullmatch(r"(?![.-])[A-Za-z0-9_.-]{,200}", c.run_id), "run_id",
         "names a folder: use at most 200 of A-Z, a-z, 0-9, '_', '-', '.'"),
    ]


def adaptation_rules(c: Config) -> list[tuple]:
    """Return `combination_rules` of test-time training."""
    return [
        (not c.ttt_enabled or c.ttt in ("auto", "sgd"), "ttt_enabled", "means TTT=sgd: unset it"),
        (c.adapts != "sgd" or c.ttt_chunk_tokens >= c.eval_seq_len, "ttt_chunk_tokens",
         "must be at least EVAL_SEQ_LEN: whole sequences of a chunk are learned"),
        (c.adapts != "lora" or c.by_documents, "ttt", "adapts to documents: EVAL_PLAN=documents"),
        (set(c.ttt_places) <= {"q", "k", "v", "o", "mlp", "head"}, "ttt_places",
         "must be some of q, k, v, o, mlp, head"),
        (c.chunk_rule, "ttt_chunks", "must be TOKENS:CHUNK with commas between, rising, and the "
         "CHUNK of all longer documents, as in 256:8,2000:24,48"),
        (c.eval_stride <= c.eval_seq_len, "eval_stride", "must be at most EVAL_SEQ_LEN"),
    ]


def follows_lengths(c: Config) -> bool:
    """Return whether TRAIN_SEQ_SCHEDULE is one, and its lengths go with TRAIN_SEQ_LEN."""
    with contextlib.suppress(ValueError):
        lengths, ends = zip(*c.seq_stages)
        return (min(lengths) > 1 and max(lengths) == c.train_seq_len and ends[-1] == 1
                and all(a < b for a, b in itertools.pairwise((0.0, *ends))))
    return False


SWITCHES = {"0": 0, "false": 0, "1": 1, "true": 1}


def parse_setting(text: str, kind):
    """Return `text` as a knob's annotated type; raises ValueError saying what was expected."""
    text, (kind, *optional) = text.strip(), kind.split(" | ")
    if optional and text.lower() in ("", "auto"):
        return None
    if kind == "str":
        return text
    with contextlib.suppress(ValueError, KeyError):
        if "str" not in kind:  # int() would take 1_0, and digits of other scripts
            text = text.replace("_", "?").encode("ascii").decode()
        if kind == "bool":
            return bool(SWITCHES[text.lower()])
        if kind == "int":
            return int(text)
        if kind.startswith("tuple"):
            items = [part.strip() for part in text.split(",") if part.strip()]
            return tuple(items if "str" in kind else map(int, items))
        if math.isfinite(number := float(text)):
            return number
    expected = {"int": "a whole number", "float": "a finite number", "bool": "0 or 1"}
    raise ValueError(expected.get(kind, "whole numbers with commas between"))


def slips(a: str, b: str) -> int:
    """Return how many letters of the longer name are not found in the other, in order."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return max(len(a), len(b)) - sum(block.size for block in blocks)


# First words that no other program's variables have: an unknown name with one is meant for us.
FAMILIES = set("MUON WARMDOWN RECUR GPTQ SDCLIP XSA ROPE EMA QK VE TTT SLOT LAWA SWA QAT".split())


def misspelt(name: str, known) -> str | None:
    """Return the known setting that an environment variable's name is a slip of, or None.

    A longer or shorter form (WARMDOWN_FRACTION) and a wrong member of a family (MUON_LR) count.
    """
    plain, near = name.upper().replace("-", "_"), []
    for other in known:
        shorter = min(len(plain), len(other))
        allowed = 2 if shorter >= 10 else 1
        if plain.replace("_", "") == other.replace("_", ""):
            near.append((0, other))
        elif abs(len(plain) - len(other)) <= allowed and (far := slips(plain, other)) <= allowed:
            near.append((far, other))
        elif shorter >= 8 and plain[:shorter] == other[:shorter]:
            near.append((3, other))
        elif "_" in plain and plain.split("_")[0] == other.split("_")[0] in FAMILIES:
            near.append((4 + slips(plain, other), other))
    return min(near)[1] if near else None


def plain_value(text: str) -> float | str:
    """Return what the text of a setting says, the same for every spelling of a value."""
    text = text.strip().lower()
    with contextlib.suppress(ValueError):
        return float(SWITCHES.get(text, text))
    return text


def name_faults(env, given: dict[str, str], values: dict) -> list[str]:
    """Return faults of names: slips of a setting, and other systems' names at a value not built.

    env: all that is set; given: by presets, whose every name must be known; values: the settings
    that are given, by their own names.
    """
    known = [*map(str.upper, KNOBS), *WITHOUT_EFFECT, *NEUTRAL]
    allowed, faults = parse_setting(env.get("ALLOW_ENV", ""), "tuple[str, ...]"), []
    for name in sorted(set(env).difference(known, allowed)):
        if other := misspelt(name, known):
            faults.append(f"{name}={env[name]}: no such setting; did you mean {other}? "
                          f"If it is not meant for this script: ALLOW_ENV={name}")
        elif name in given:
            faults.append(f"{name}={env[name]}: no such setting; take it out of the preset's file")
    for name, neutral in NEUTRAL.items():
        if knob := KNOBS.get(neutral.lower()):  # the value of that setting
            neutral = show_value(values.get(neutral.lower(), knob.default))
        if env.get(name) and plain_value(env[name]) != plain_value(neutral):
            only = f"only {name}={neutral} describes this script; " if neutral else ""
            faults.append(f"{name}={env[name]}: not built; {only}unset it")
    return faults


def preset_settings(names: str) -> dict[str, str]:
    """Return the settings of presets and of files of NAME=VALUE lines, joined by commas, as text.

    Raises ValueError on a name that is neither and on a line that says no setting, or says one
    again.
    """
    found: dict[str, str] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        lines = PRESETS.get(name, "").split()
        if not lines and Path(name).is_file():
            text = Path(name).read_text(encoding="utf-8-sig", errors="replace")
            lines = [*filter(str.strip, re.sub(r"(?m)(^|\s)#.*", "", text).splitlines())]
        pairs = [[part.strip() for part in line.split("=", 1)] for line in lines]
        times = Counter(key for key, *_ in pairs)
        wrong = [line for line, (key, *value) in zip(lines, pairs) if not value
                 or not key.isidentifier() or key == "PRESET" or times[key] > 1]
        if wrong or not lines:
            raise ValueError(f"{name!r} must be one of {', '.join(PRESETS)}, or the path of a file "
                             "of NAME=VALUE lines, each name once, none of them PRESET: not "
                             f"{''.join(wrong[:1]).strip()[:60]!r}")
        found.update((key, value) for key, value in pairs)
    return found


def load_config(env) -> Config:
    """Return the Config that a mapping of environment variables describes.

    Raises ConfigError with all faults at once: misspelt names, bad types, ranges, combinations,
    names of other systems at a value this script does not build.
    """
    faults, values, given = [], {}, {}
    try:
        given = preset_settings(env.get("PRESET", ""))
    except (ValueError, OSError) as error:
        faults.append(f"PRESET={env['PRESET']}: {error}")
    for source in (given, env):  # where the environment's is no value, the preset's stays
        for name, f in KNOBS.items():
            if name.upper() in source:
                try:
                    values[name] = parse_setting(source[name.upper()], f.type)
                except ValueError as error:
                    faults.append(f"{name.upper()}={source[name.upper()]}: must be {error}")
    typed = frozenset(name for name in KNOBS if name.upper() in env)
    for name in typed:  # what is typed beats what only a preset says
        for special in set(BEATEN_BY.get(name, "").split()) - typed:
            values.pop(special, None)
    config = Config(explicit=frozenset(values), typed=typed, **values)
    faults = name_faults({**given, **env}, given, values) + faults + config_faults(config)
    if faults:
        raise ConfigError(faults, shared=True)
    return config


def adopt(config: Config, header: dict, stage: str, origin: Path) -> Config:
    """Return `config` for `stage`: as its input file was made, unless the stage's settings are set.

    Raises ConfigError when a setting that an earlier stage consumed is set to another value than
    the file's: it could not have any effect any more.
    """
    stored = SINCE | stored_settings(header, origin)
    earlier = ARTIFACT_TOPICS[:[*STAGES].index(stage)]
    consumed = {name for name, f in KNOBS.items() if f.metadata["topic"] in earlier}
    if lacking := sorted(consumed - set(stored)):
        raise ConfigError([f"{origin}: its header lacks {', '.join(lacking)}; use the train_gpt.py "
                           "that wrote it, or make it again"], shared=True)
    faults = [f"{name.upper()}={show_value(getattr(config, name))}: {origin} was made with "
              f"{show_value(stored[name])}; unset it" for name in sorted(config.typed & consumed)
              if getattr(config, name) != stored[name]]
    values = {name: value for name, value in stored.items()
              if name in consumed or name not in config.explicit}
    config = dataclasses.replace(config, adopted=True, **values)
    faults = faults or [f"{origin}: {fault}" for fault in config_faults(config)]
    if faults:
        raise ConfigError(faults, shared=True)
    return config


def stored_settings(header: dict, origin: Path) -> dict:
    """Return the settings in a file's header; raises ConfigError unless each may travel there."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in header["config"].items()}
    for name, value in values.items():
        with contextlib.suppress(KeyError, ValueError):
            if parse_setting(show_value(value), ARTIFACT_KNOBS[name].type) == value:
                continue
        raise ConfigError([f"{origin}: its header holds {name}={value!r}, unknown here; use the "
                           "train_gpt.py that wrote it"])
    return values


def artifact_config(config: Config) -> dict:
    """Return the settings that determine model, codes or score: never ids, paths, host or time.

    Less those at the value that a file without them is taken to have.
    """
    values = {name: getattr(config, name) for name in ARTIFACT_KNOBS}
    return {name: value for name, value in values.items() if SINCE.get(name, ...) != value}


def idle_settings(c: Config) -> list[tuple]:
    """Return (whether it holds, why, settings that have no effect then)."""
    return [
        (not c.gptq_enabled, "GPTQ_ENABLED=0",
         "GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS HESSIAN_RANKS EMBED_GPTQ"),
        (not c.max_wallclock_seconds, "MAX_WALLCLOCK_SECONDS=0", "GPTQ_RESERVE_SECONDS"),
        (not c.ve_enabled, "VE_ENABLED=0", "VE_DIM VE_LAYERS"),
        (c.attn_gate == "none", "ATTN_GATE=none", "ATTN_GATE_SCALE"),
        (c.attn_gate == "none" and not c.smear_gate, "ATTN_GATE=none SMEAR_GATE=0", "GATE_WINDOW"),
        (not c.lanes_split, "PARALLEL_START_LAYER without lanes", "LANE_ROUTING SKIP_TO_LANES"),
        (c.rule != "fisher", "STEP_RULE=sdclip",
         "ROW_POWER EMBED_POWER COLUMN_POWER TRELLIS COUPLE_ROWS"),
        (not c.trellis, "TRELLIS=0", "COUPLE_ROWS"),
        (c.rule == "fisher", "STEP_RULE=fisher", "SCALE_FLOOR SCALE_FLOOR_EMBED"),
        (not (c.sliding_window_enabled or c.prequant_sliding), "SLIDING_WINDOW_ENABLED=0",
         "EVAL_STRIDE"),
        (c.eval_mode != "stream", "EVAL_MODE=exact", "STREAM_WINDOWS"),
        (c.virtual_order, "VIRTUAL_ORDER", "RECUR_LAYERS"),
        (not c.doc_mask, "DOC_MASK=0", "ROW_TOKENS"),
        (not c.train_seq_schedule, "a constant TRAIN_SEQ_LEN", "SEQ_CHANGE_WARMUP_STEPS"),
        (c.adapts == "none", "TTT=none", "TTT_LR TTT_MAX_SECONDS"),
        (c.adapts != "sgd", f"TTT={c.adapts}", "TTT_EPOCHS TTT_CHUNK_TOKENS TTT_BATCH_SEQS "
         "TTT_MOMENTUM TTT_GRAD_CLIP TTT_FREEZE_BLOCKS"),
        (c.adapts != "lora", f"TTT={c.adapts}", "TTT_PLACES TTT_RANK TTT_ALPHA TTT_BETA1 TTT_BETA2 "
         "TTT_WD TTT_CHUNKS TTT_BATCH_DOCS TTT_WARM_A"),
        (c.recur_start.frac is not None, "RECUR_START_FRAC", "RECUR_START_STEP"),
        (c.muon_warmup.frac is not None, "MUON_MOMENTUM_WARMUP_FRAC", "MUON_MOMENTUM_WARMUP_STEPS"),
    ]


def notices(config: Config, env) -> list[str]:
    """Return lines about settings that are set but cannot act in this run."""
    lines = [f"{name}={env[name]}: known, without effect: {why}"
             for name, why in WITHOUT_EFFECT.items() if name in env]
    order, preset = [*STAGES], preset_settings(config.preset)
    yields = [name for name, f in KNOBS.items() if name.upper() in {*preset} - {*env}
              and parse_setting(preset[name.upper()], f.type) != getattr(config, name)]
    if yields:
        lines.append(f"PRESET={config.preset}: {', '.join(map(str.upper, yields))} not as it says, "
                     "but as typed or as the input file has it")
    for name, f in KNOBS.items():
        shown, stage = name.upper(), f.metadata["stage"]
        if shown in env and stage != "run" and not config.runs(stage):
            if order.index(stage) > order.index(config.stage):
                lines.append(f"{shown}: acts in STAGE={stage}; kept in this run's files")
            elif name not in ARTIFACT_KNOBS:
                lines.append(f"{shown}: without effect in STAGE={config.stage}")
    return lines + [f"{name}: without effect under {why}" for holds, why, names
                    in idle_settings(config) for name in names.split() if holds and name in env]


def show_value(value) -> str:
    """Return a setting's value as one would type it."""
    if isinstance(value, bool) or value is None:
        return "auto" if value is None else str(int(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def help_text() -> str:
    """Return the `--help` page: every setting by topic, presets, foreign names."""
    lines = ["usage: NAME=value … python train_gpt.py [ARGUMENT], or under torchrun",
             "--check: every check a run starts with; --help: this page",
             "--inspect FILE: header, and bytes by tensor, of weights, statistics or an artifact",
             "Settings are environment variables: NAME = default, meaning."]
    for topic, knobs in itertools.groupby(KNOBS.items(), lambda knob: knob[1].metadata["topic"]):
        lines.append(f"\n{topic}")
        for name, f in knobs:
            kind = f.type.replace("None", "auto").replace("tuple[", "").replace(", ...]", " list")
            kind = " | ".join(f.metadata["choices"]) or kind
            lines += [f"  {name.upper()} = {show_value(f.default)}",
                      f"      {kind}: {f.metadata['note']}"]
    lines.append("\npresets (PRESET=name): defaults that environment settings still beat")
    lines += [f"  {name}: {' '.join(settings.split())}" for name, settings in PRESETS.items()]
    lines += ["\nknown, without effect", "  " + " ".join(WITHOUT_EFFECT),
              "\nnot built, accepted only at the value shown (none: unset)",
              "  " + " ".join(map("=".join, NEUTRAL.items()))]
    return "\n".join(lines)


# == 2 Runtime: ranks, device, clock, signals, log ================================================

class Runtime:
    """This process among the ranks of a run: device, number formats, collectives.

    Reads only torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE). CPU tensors travel by gloo and
    CUDA tensors by NCCL, so that agreeing on a number never waits for the device.
    """

    def __init__(self, env, config: Config):
        self.rank, local_rank, self.world_size = launched_as(env)
        self.is_main, self.leads_machine, self.signals = self.rank == 0, local_rank == 0, Signals()
        cuda = torch.cuda.is_available() and config.device != "cpu"
        if config.device == "cuda" and not cuda:
            raise ConfigError(["DEVICE=cuda: torch sees none; unset it or install a CUDA build"])
        if cuda and local_rank >= (visible := torch.cuda.device_count()):
            raise ConfigError([f"nproc_per_node: rank {local_rank} of this node has no GPU, "
                               f"{visible} are visible; start as many processes as GPUs"])
        self.device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
        bf16 = cuda and torch.cuda.get_device_capability(self.device)[0] >= 8
        self.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        self.compiles = cuda if config.compile_enabled is None else config.compile_enabled
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            # rank 0 quantises and packs alone, minutes long, while the others wait for it
            limit = timedelta(seconds=config.dist_timeout_seconds)
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
            except (ValueError, RuntimeError) as error:
                raise ConfigError([
                    f"MASTER_ADDR={env['MASTER_ADDR']} MASTER_PORT={env['MASTER_PORT']}: rank "
                    f"{self.rank} of {self.world_size} cannot join the others there: start "
                    "all of them, on a free port and a host that they reach. "
                    + str(error).split("\n")[0]]) from None

    def compile(self, function):
        """Return `function` compiled for static shapes, or as it is where compilation is off."""
        return (torch.compile(function, dynamic=False, fullgraph=True) if self.compiles
                else function)

    @contextlib.contextmanager
    def switches(self, exact: bool = False):
        """Hold torch's process-wide switches as a run needs them, within; exact: no TF32 either."""
        with contextlib.ExitStack() as held:
            held.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            fast = self.device.type == "cuda" and not exact
            torch.set_float32_matmul_precision("high" if fast else "highest")
            if self.compiles:  # one entry per layout, grad mode and batch shape
                held.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield

    def compiled_graphs(self) -> int:
        """Return how many graphs this process has compiled so far."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.compiles else 0

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work, *args) -> float:
        """Return how long this rank takes for work(*args), its device included."""
        self.synchronize()
        since = time.perf_counter()
        work(*args)
        self.synchronize()
        return time.perf_counter() - since

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def scatter_sum(self, rows: Tensor):
        """Start summing `rows` (N, …) over the ranks.

        Returns a function that waits and returns this rank's N / world_size rows of the sum.
        """
        if self.world_size == 1:
            return lambda: rows
        mine = torch.empty_like(rows[:len(rows) // self.world_size])
        # torch 2.13 has renamed this one and the next
        reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = reduce(mine, rows, async_op=True)
        return lambda: (work.wait(), mine)[1]

    def gather_rows(self, mine: Tensor):
        """Start joining all ranks' rows; returns a function that waits and returns them (N, …)."""
        if self.world_size == 1:
            return lambda: mine
        rows = mine.new_empty(len(mine) * self.world_size, *mine.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(rows, mine.contiguous(), async_op=True)
        return lambda: (work.wait(), rows)[1]

    def agree(self, *values: float):
        """Return the largest of all ranks' values, the same on each of them; a list of several."""
        shared = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.item() if len(values) == 1 else shared.tolist()

    def share(self, value):
        """Return rank 0's value (text, number, bytes) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """Return every rank's value on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, function, *args):
        """Run `function` on rank 0 alone, return its result everywhere, raise its mistakes there.

        A ValueError or OSError becomes a ConfigError on every rank; one rank raises it as it is.
        """
        if self.world_size == 1:
            return function(*args)
        result = fault = None
        if self.is_main:
            try:
                result = function(*args)
            except (ValueError, OSError) as error:
                fault = str(error)
        result, fault = self.share((result, fault))
        if fault is not None:
            raise ConfigError([fault], shared=True)
        return result

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

    def peak_memory_mib(self) -> tuple[int, int]:
        """Return peak (allocated, reserved) MiB: device memory; on CPU the resident set twice."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        return (resident_peak_bytes() >> 20,) * 2

    def memory_bytes(self) -> int:
        """Return the memory there is for a run, of the device or the machine; 0: unknown."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not on every system
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return 0

    def notices(self) -> list[str]:
        """Return what this machine has that the run cannot use."""
        if self.device.type == "cuda" and self.compute_dtype == torch.float32:
            return ["this GPU has no bf16: computing in fp32, slowly"]
        if torch.backends.mps.is_available():
            return ["Apple GPU not used: computing on the CPU in fp32"]
        return []

    def describe(self) -> dict:
        """Return hardware and versions, for the log."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else platform.processor()
        return dict(device=self.device.type, device_name=name or platform.machine(),
                    world_size=self.world_size,
                    compute_dtype=str(self.compute_dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(), python=platform.python_version(),
                    torch=torch.__version__, numpy=np.__version__, cuda=torch.version.cuda,
                    brotli=getattr(brotli, "__version__", None), compiled=self.compiles)


LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_as(env) -> tuple[int, int, int]:
    """Return (rank, local rank, world size) by torchrun's variables; alone where there are none.

    Raises ConfigError unless they are all there and fit each other.
    """
    found = {name: env[name] for name in LAUNCH if name in env}
    if not found.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
        return 0, 0, 1
    with contextlib.suppress(ValueError, KeyError):
        rank, local_rank, world_size, port = (
            int(found[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
        if 0 <= local_rank <= rank < world_size and found["MASTER_ADDR"] and 0 <= port < 65_536:
            return rank, local_rank, world_size
    text = " ".join(f"{name}={value!r}" for name, value in found.items())
    raise ConfigError([f"{text}: {', '.join(LAUNCH)} must all be set and fit each other; start "
                       "with torchrun, or unset them"])


def is_main_rank(env) -> bool:
    """Return whether this process is rank 0, also before (or without) a Runtime."""
    with contextlib.suppress(ConfigError):
        return launched_as(env)[0] == 0
    return True  # whatever it is, somebody must say why


def contact_lost(error: Exception) -> bool:
    """Return whether an error means that another rank died, hangs, or left."""
    # gloo raises plain RuntimeErrors; the last is its word after a first collective timed out
    return isinstance(error, dist.DistError) or bool(re.search("(?i)gloo|pair closure", str(error)))


def resident_peak_bytes() -> int:
    """Return the peak resident set of this process, bytes; 0 where the system does not tell."""
    with contextlib.suppress(ImportError):  # absent on Windows
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0


def process_age_seconds() -> float:
    """Return how long this process has existed, imports included; 0 where the system is silent."""
    with contextlib.suppress(Exception):  # no such file, clock or form: another system than Linux
        started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


class Interrupted(BaseException):
    """A signal asked this run to end."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


class Signals:
    """Ends a run in order on SIGTERM, SIGINT, a closed terminal and what schedulers send.

    While `deferred`, the number is kept for the training loop, which saves first; otherwise
    Interrupted is raised on the spot, since files are whole or absent. Another signal a second or
    more after the first (a terminal and torchrun may both send one) ends the process at once.
    """

    def __init__(self):
        self.number, self.since, self.deferred = 0, 0.0, False

    def handle(self, number, *_):
        if not self.number:
            self.number, self.since = number, time.perf_counter()
            if not self.deferred:
                raise Interrupted(number)
        elif time.perf_counter() - self.since > 1:
            os._exit(128 + number)

    def release(self):
        """Defer no longer; raises Interrupted for a signal kept until now."""
        self.deferred = False
        if self.number:
            raise Interrupted(self.number)

    def __enter__(self):
        names = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split()
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # nohup has SIGHUP ignored, and so it stays
        self.before = {number: signal.signal(number, self.handle) for number in numbers
                       if signal.getsignal(number) is not signal.SIG_IGN}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def without_gc():
    """Keep Python's cyclic garbage collector, whose pauses reach half a second, out of a loop."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Clock:
    """Says where the seconds of a process go. Spans nest: an inner one pauses the outer.

    `sync` waits for the device at both ends of a span.
    """

    def __init__(self, now=time.perf_counter, sync=lambda: None, start_seconds=0.0):
        self.now, self.sync, self.since = now, sync, now()
        self.seconds, self.running = Counter(start=start_seconds), "other"

    def _book(self):
        before, self.since = self.since, self.now()
        self.seconds[self.running] += self.since - before

    @contextlib.contextmanager
    def span(self, name: str):
        self.sync()
        self._book()
        outer, self.running = self.running, name
        try:
            yield
        finally:
            self.sync()
            self._book()
            self.running = outer

    def training_seconds(self) -> float:
        """Return the seconds that the wallclock limit counts: steps and all that reads text."""
        self._book()
        return self.seconds["train"] + self.seconds["calibrate"]

    def ledger(self) -> dict[str, float]:
        self._book()
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}


class Pacer:
    """Tells the training clock before each step, and whether one more step ends in the budget.

    The next step is taken to last as long as the longest of the last eight plus their whole
    spread, so a jittery machine keeps a wide berth and a steady one about one step. A step of
    three times the median is a mishap, not the machine's pace, and is left out. Reading the clock
    makes every rank wait for its device and for the others, so far from the end it is due about
    every two seconds, at most 20 steps apart, and carried forward in between, by numbers all ranks
    agreed on. Before each step: `read` where `due`, then `elapsed`.
    """

    def __init__(self, budget_seconds: float, elapsed_seconds: float = 0.0):
        self.budget_seconds, self.expected = budget_seconds or math.inf, 0.0
        self.recent = []  # seconds of a step, at the last eight readings
        self.last_elapsed, self.steps_since, self.next_reading = elapsed_seconds, 0, 0

    def expect(self, step_seconds: float):
        """Steps now last about `step_seconds` (from warm-up; 0: unknown); their jitter stays."""
        if step_seconds and self.expected:
            self.recent = [seconds * step_seconds / self.expected for seconds in self.recent]
        elif step_seconds:
            self.recent = [step_seconds]
        self.expected, self.next_reading = step_seconds or self.expected, 0

    def due(self) -> bool:
        return self.steps_since >= self.next_reading

    def read(self, seconds: float):
        """Take all ranks' training clock."""
        if seconds > self.last_elapsed:
            took = (seconds - self.last_elapsed) / max(1, self.steps_since)
            self.recent = [*self.recent, took][-8:]
        self.last_elapsed, self.steps_since, self.next_reading = seconds, 0, 0
        if len(self.recent) == 8:
            longest = max(self.recent)
            # even steps four times as long leave the budget unspent until then
            safe = (self.budget_seconds - seconds) / (4 * longest) - 1
            self.next_reading = int(min(safe, 2 / longest, 20))

    def elapsed(self) -> float:
        """Return all ranks' training clock as it is known; counts a step."""
        steps, self.steps_since = self.steps_since, self.steps_since + 1
        return self.last_elapsed + (steps * sum(self.recent) / len(self.recent) if steps else 0.0)

    def fits(self) -> bool:
        if not self.recent or self.next_reading > 0:
            return True
        ordered = sorted(self.recent)
        usual = [seconds for seconds in ordered if seconds < 3 * ordered[len(ordered) // 2]]
        # 0.1 s for the operating system's own hiccups, which short steps do not cover
        expected = 2 * usual[-1] - usual[0] + 0.1
        return self.last_elapsed + expected <= self.budget_seconds


SCORE_FORM = "val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{eval_ms:.0f}ms"
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
    "val_name": "val: {name}",
    "eval_plan": "eval_plan: {plan} of {length} tokens at most; {documents} documents",
    "val_counts": "val_targets: scored {scored_tokens} (with tail {all_tokens}, legacy "
                  "{legacy_tokens}) bytes {scored_bytes} by {denominator} (table {table_bytes})",
    "parameters": "model_params:{count}",
    "optimizer": "optimizer: {matrices} Muon matrices, {embeddings} embedding and {controls} "
                 "control tensors",
    "reserve": "gptq:reserving {reserve_seconds:.0f}s, effective={effective_ms:.0f}ms",
    "reserve_measured": "gptq:calibration measured {batch_seconds:.3f}s a batch, {batches} a "
                        "rank: reserve {reserve_seconds:.2f}s",
    "recurrence_plan": "recurrence: starts {text_when}; virtual_layers={order}",
    "length_plan": "train_seq_len: {tokens} starts {text_when}",
    "warmup_step": "warmup_step: {step}/{steps}",
    "val": "{step}/{iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}",
    "train": "{step}/{iterations} train_loss: {train_loss:.4f} train_time: {train_minutes:.1f}m "
             "tok/s: {tokens_per_second:.0f}",
    "recurrence": "recurrence:activated at step {step}, virtual_layers={order}",
    "length": "train_seq_len:{tokens} from step {step}",
    "checkpoint": "checkpoint: step {step} in {path}",
    "resumed": "resumed: {text} (not record-eligible)",
    "recompiled": "warning: {count} graphs were compiled inside the training clock",
    "stopping_early": "stopping_early: wallclock_cap train_time: {train_time_ms:.0f}ms "
                      "step: {step}/{iterations}",
    "peak_memory": "peak memory allocated: {allocated_mib} MiB reserved: {reserved_mib} MiB",
    "ema": "ema:applying EMA weights",
    "prequant": "pre-quantization post-ema " + SCORE_FORM,
    "prequant_sliding": "pre-quantization sliding_window " + SCORE_FORM,
    "weights": "Serialized model: {bytes} bytes",
    "code_size": "Code size: {bytes} bytes",
    "collecting": "GPTQ:collecting Hessians from calibration data...",
    "collected": "GPTQ:collected {hessians} Hessians in {seconds:.1f}s",
    "calibration_short": "warning: calibration stopped at the wallclock limit after {done} of "
                         "{planned} batches a rank",
    "gptq_redamp": "warning: Hessian of {name} not positive definite at damping 0.01; now {damp:g}",
    "quantized": "GPTQ quantization: {gptq} layers with full GPTQ, {rounded} fallback to "
                 "clip-search",
    "search": "search: multiplier {multiplier:.6f} estimate {estimated_bytes} "
              "packed {packed_bytes} of {limit_bytes} bytes",
    "unused": "search: finest steps reached, {unused_bytes} bytes of the budget stay unused",
    "overfull": "warning: the coarsest steps leave {over_bytes} bytes too many; about {parameters} "
                "parameters would fit",
    "artifact": "Serialized model int6+{compressor}: {bytes} bytes",
    "total_size": "Total submission size int6+{compressor}: {bytes} bytes",
    "bits": "bits per weight: {matrix_bits:.3f} matrices, {embed_bits:.3f} embeddings; "
            "multiplier {multiplier:.6f} ({rule} steps, on average of k {k:.3f}, {k_embed:.3f})",
    "roundtrip": "final_int6_roundtrip " + SCORE_FORM,
    "sliding": "final_int6_sliding_window " + SCORE_FORM,
    "stream": "final_int6_stream " + SCORE_FORM,
    "ttt_plan": "ttt: {documents} documents, chunks times {growth}, {tokens_per_target:.1f} tokens "
                "forwarded a target, about {expected_seconds:.0f}s; linked: {linked}",
    "ttt": "{text_form} " + SCORE_FORM,
    "ledger": "ledger: {text_spans}",
    "verdict": "verdict: {rule} {outcome} ({value:.10g} of {limit:.10g} {unit})",
    "interrupted": "stopped by {signal}: what was finished is in {folder}; go on with RESUME=1 "
                   "RUN_ID={run_id}",
    "failed": "failed: {error}",
    "result": "RESULT {text_json}",
}


class Log:
    """Events of a run: one JSON object a line in events.jsonl, one readable line in the text log.

    Only rank 0 writes. paths: events.jsonl, the text log; without them it prints alone.
    """

    def __init__(self, is_main: bool, *paths: Path):
        self.is_main, self.shown_at, self.files = is_main, 0.0, []
        for path in paths if is_main else ():
            path.parent.mkdir(parents=True, exist_ok=True)
            # line-buffered: what was logged is on disk when a run is killed
            self.files.append(open(path, "a", buffering=1, encoding="utf-8"))

    def event(self, kind: str, console: bool = True, **fields):
        """Record one event of EVENTS; console=False keeps a long one out of the terminal."""
        if not self.is_main:
            return
        line = EVENTS[kind].format(**fields)
        public = {name: v for name, v in fields.items() if not name.startswith("text_")}
        record = json.dumps({"event": kind, **public})
        # strict JSON knows no numbers that are not finite: they become text
        record = json.dumps(json.loads(record, parse_constant=lambda text: str(float(text))))
        try:
            for file, text in zip(self.files, (record, line)):
                file.write(text + "\n")
        except OSError as error:  # a full disk: the run is worth more than its log
            self.files = []
            self.show(f"warning: logging to the console only: {error}")
        if console:
            self.clear()
            self.show(line)

    def show(self, line: str):
        """Print a line; a console that takes none (full disk, closed or no stream) ends no run."""
        with contextlib.suppress(OSError, ValueError):
            print(line, flush=True)

    def progress(self, label: str, done: int, total: int, since: float):
        """Show `label 45 % ETA 12 s` on a terminal, twice a second at most; nothing in a file."""
        now = time.perf_counter()
        if done >= total:
            self.clear()
        elif self.is_main and sys.stderr and sys.stderr.isatty() and now - self.shown_at >= 0.5:
            eta = (now - since) / max(done, 1) * (total - done)
            text = f"{label} {100 * done / total:.0f} % ETA {eta:.0f} s"
            sys.stderr.write("\r\x1b[K" + text)  # the carriage return flushes it
            self.shown_at = now

    def clear(self):
        if self.shown_at:
            sys.stderr.write("\r\x1b[K")
            self.shown_at = 0.0

    def close(self):
        for file in self.files:
            file.close()


# == 2b Files: the container, written whole or not at all ==========================================

# The container of weights, statistics and artifacts: magic, u32 length, zlib JSON header, one span
# of bytes per tensor in the header's order, sha256 over all before it. No pickle.
MAGIC = b"PGOLF\x00\x01\n"
# a header of a thousand layers has 400 kB of text; JSON takes 25 times its own length as objects
MAX_HEADER_BYTES, MAX_TENSOR_BYTES = 1 << 20, 4 << 30
DTYPES = {name: getattr(torch, name) for name in "float32 float16 int8 int16 float64".split()}
CODECS = ("raw", "brotli", "lzma")


class ContainerError(ValueError):
    """A file is not a container of this script, is damaged, or holds impossible values."""


def compress(raw: bytes, codec: str) -> bytes:
    if codec == "brotli":
        return brotli.compress(raw, quality=11, lgwin=24)
    return lzma.compress(raw, preset=6) if codec == "lzma" else raw


def decompress(data: bytes, codec: str, raw_bytes: int) -> bytes:
    """Return exactly `raw_bytes` bytes or raise ValueError; never holds much more than that."""
    out, finished = data, True
    if codec == "lzma":
        decoder = lzma.LZMADecompressor(memlimit=256 << 20)
        out = decoder.decompress(data, max_length=raw_bytes + 1)
        finished = decoder.eof and not decoder.unused_data
    elif codec == "brotli":
        decoder = brotli.Decompressor()
        out = decoder.process(data, output_buffer_limit=raw_bytes + 1)
        finished = decoder.is_finished()
    if len(out) != raw_bytes or not finished:
        raise ValueError("a tensor does not decompress to its stated length")
    return out


def pack_tensors(header: dict, tensors: dict[str, Tensor], codec: str = "raw") -> bytes:
    """Return a container's bytes; the same arguments give the same bytes.

    header["raw"] may name tensors that no coder would make smaller.
    """
    def coded(name):
        raw = tensors[name].detach().cpu().numpy().tobytes()
        return compress(raw, "raw" if name in header.get("raw", ()) else codec)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the coders release the GIL
        spans = list(pool.map(coded, tensors))
    names = {dtype: name for name, dtype in DTYPES.items()}
    table = [[name, names[t.dtype], list(t.shape), len(span)]
             for (name, t), span in zip(tensors.items(), spans)]
    header = {**header, "codec": codec, "tensors": table}
    head = zlib.compress(json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), 9)
    body = b"".join([MAGIC, len(head).to_bytes(4, "little"), head, *spans])
    return body + hashlib.sha256(body).digest()


def unpack_tensors(data: bytes, origin) -> tuple[dict, dict[str, Tensor]]:
    """Return (header, tensors) of a container; the only reader of untrusted bytes.

    Raises ContainerError, naming `origin`, before any tensor is built from damaged bytes.
    """
    def require(holds, what):
        if not holds:
            raise ContainerError(f"{origin}: {what}; make the file again or copy it again")

    start, end = len(MAGIC) + 4, len(data) - 32  # of the header; of all that the checksum covers
    require(start <= end and data[:6] == MAGIC[:6], "not a file of this script")
    require(data[:8] == MAGIC, f"container version {data[6]} is not {MAGIC[6]}")
    require(hashlib.sha256(data[:end]).digest() == data[end:], "truncated or damaged (checksum)")
    at = start + int.from_bytes(data[len(MAGIC):start], "little")
    require(at <= end and at - start <= MAX_HEADER_BYTES, "impossible header length")
    left = MAX_TENSOR_BYTES  # of all tensors together
    try:
        header = json.loads(zlib.decompressobj().decompress(data[start:at], MAX_HEADER_BYTES))
        codec, table, tensors = header["codec"], header["tensors"], {}
        require(codec in CODECS, f"unknown codec {codec!r}")
        for name, dtype, shape, span in table:
            require(isinstance(name, str) and name not in tensors and len(shape) <= 4
                    and all(type(n) is int and 0 <= n <= left for n in (*shape, span))
                    and span <= end - at, "impossible entry in the table of tensors")
            raw_bytes = math.prod(shape) * DTYPES[dtype].itemsize
            require(raw_bytes <= left, "more tensor bytes than any model of this script has")
            left -= raw_bytes
            used = "raw" if name in header.get("raw", ()) else codec
            raw = bytearray(decompress(data[at:at + span], used, raw_bytes))
            tensors[name] = torch.from_numpy(np.frombuffer(raw, dtype).reshape(shape))
            at += span
        require(at == end, "bytes left over after the last tensor")
    except ContainerError:
        raise
    except Exception as error:  # whatever a hostile header provokes in zlib, json or a coder
        require(False, f"unreadable container ({type(error).__name__}: {error})")
    return header, tensors


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no second try makes room


def write_file(path: Path, data: bytes, waits=(0.2, 1.0, 3.0)) -> int:
    """Write under another name, flush to disk, rename: the file exists whole or not at all.

    Returns its size in bytes. What fails is tried again after each of `waits`, seconds: file
    systems across a network have their moments.
    """
    part, waits = path.with_name(path.name + ".part"), list(waits)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                sync_file(file)
            os.replace(part, path)
            return len(data)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            if waits and error.errno not in FULL:
                time.sleep(waits.pop(0))
                continue
            room = "make room, then " if error.errno in FULL else ""
            raise OSError(f"{path}: not written ({error.strerror}); files written before are "
                          f"whole: {room}go on with RESUME=1 and this RUN_ID") from None


def sync_file(file):
    """Wait until a file is on its disk; some file systems know no such wait."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


class Journal(dict):
    """Sums (nats, targets, bytes) of finished units of work, in an append-only file across kills.

    Lines of another `task` and a torn last line are ignored.
    """

    def __init__(self, path: Path, task: str):
        self.path, self.task, lines = path, task, path.read_bytes() if path.exists() else b""
        for line in lines.splitlines():
            with contextlib.suppress(Exception):  # whatever a torn or foreign line provokes
                found_task, unit, nats, targets, size = json.loads(line)
                if found_task == task:
                    super().__setitem__(int(unit), [float(nats), int(targets), int(size)])

    def __setitem__(self, unit: int, sums: list):
        super().__setitem__(unit, sums)
        # on a full disk the evaluation goes on; only what a restart could spare is lost
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            # a newline first: the last line may be torn
            file.write(f"\n{json.dumps([self.task, unit, *sums])}\n".encode())


def write_tensors(path: Path, header: dict, tensors: dict[str, Tensor]) -> int:
    """Write a container file, not compressed, and return its size in bytes."""
    return write_file(path, pack_tensors(header, tensors))


def read_tensors(path: Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """Return (header, tensors) of a container file of the given kind (weights, stats, artifact)."""
    return open_container(path.read_bytes(), kind, path)


def inspect_text(path: Path) -> str:
    """Return what a container file holds, as text: its header, then each tensor's bytes in it."""
    data = path.read_bytes()
    header, _ = unpack_tensors(data, path)
    table = header.pop("tensors")
    lines = [f"{name}: {json.dumps(value)}" for name, value in header.items()]
    lines.append(f"{'bytes':>12}  {'type':8} {'shape':14} tensor")
    lines += [f"{span:12,}  {dtype:8} {'x'.join(map(str, shape)):14} {name}"
              for name, dtype, shape, span in table]
    rest = len(data) - sum(row[3] for row in table)
    return "\n".join([*lines, f"{rest:12,}  header, table, checksum", f"{len(data):12,}  in all"])


# Kind of file -> its name in a run's folder, what its header holds besides.
MADE_BY: dict[str, type] = dict(config=dict, order=list, tokenizer_sha256=str, train_sha256=str)
KINDS: dict[str, tuple[str, dict[str, type]]] = dict(
    weights=("final_model.weights", dict(MADE_BY, steps=int)),
    stats=("final_model.stats", MADE_BY),
    artifact=("final_model.int6.ptz", dict(MADE_BY, multiplier=float, coding=int)),
    checkpoint=("checkpoint", dict(order=list, step=int, training_seconds=float)),
    scores=("scores.json", {}))


def open_container(data: bytes, kind: str, origin) -> tuple[dict, dict[str, Tensor]]:
    """Return (header, tensors) of a container's bytes.

    Raises ContainerError on another kind and on a header that lacks what files of its kind hold.
    """
    header, tensors = unpack_tensors(data, origin)
    if (found := header.get("kind")) != kind:
        raise ContainerError(f"{origin}: holds {found}, not {kind}; give the path of the {kind}")
    for name, form in KINDS.get(kind, ("", {}))[1].items():
        if not isinstance(header.get(name), form):
            raise ContainerError(f"{origin}: its header holds no {name}; use the train_gpt.py that "
                                 "wrote it, or make it again")
    return header, tensors


def check_tensors(tensors: dict[str, Tensor], forms: dict, origin):
    """Raise ContainerError unless a file has the tensors of `forms`: name -> (shape, dtype)."""
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name, form in forms.items():
        if found.get(name) != form:
            raise ContainerError(f"{origin}: tensor {name} is missing or not as configured; make "
                                 "the file again")


def check_no_more(left, origin):
    """Raise ContainerError when a file has tensors that nothing asked for."""
    if left:
        raise ContainerError(f"{origin}: tensors the model does not have: {sorted(left)[:3]}")


# == 3 Data: shards, batches, the order of windows, the bytes of the validation text ==============

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
# Published validation texts: (targets in whole windows of 2048, their bytes by the table), or the
# number of tokens where no log gives bytes.
KNOWN_VALIDATION = {
    (62_021_632, 151_080_362): "canonical sp1024", (45_508_608, 151_074_053): "canonical sp4096",
    (45_516_800, 151_077_493): "sp4096, the export of #1395",
    (40_540_160, 151_078_222): "canonical sp8192", 47_853_344: "canonical sp8192 CaseOps"}
WHOLE_TEXT_BYTES = 151_080_891  # of that validation text, raw
OPERATORS = "\ue001\ue002\ue003\ue004"  # of CaseOps (PR #1626 and after); the last escapes one
SAMPLES, SAMPLE_TOKENS = 2000, 400  # of the validation text, decoded and encoded again
BOS_ID = 1  # begins every document of the challenge's shards
GET_DATA = ("get some with one of\n"
            "  python data/build_demo.py && PRESET=demo python train_gpt.py  (small, no download)\n"
            "  python data/cached_challenge_fineweb.py --variant sp8192 && python train_gpt.py  "
            "(26 GB; pip install -r data/requirements.txt)")


class Batch(NamedTuple):
    """Rows of tokens and what is asked of them: all that differs from one forward to the next.

    tokens (B, T) and targets (B, S), int64: what follows each of a row's last S positions. places
    (B, S), int64: the number of each target in its text, -1 where it does not count; None in
    training, where all do. segments (B, N), int64: where the stretches of a packed row begin that
    do not see each other, filled up with T; None where a row is one. longest: tokens of one, at
    most. asked (B, S), int64: positions of a row that targets follow, where not its last S.
    adapters: Adapters of each row.
    """

    tokens: Tensor
    targets: Tensor
    places: Any = None
    segments: Any = None
    longest: int = 0
    asked: Any = None
    adapters: Any = None

    @classmethod
    def of_windows(cls, windows: Tensor) -> Batch:
        """Return the Batch that asks for every next token of windows (B, T + 1)."""
        return cls(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def added(self, place: str, at: int, x: Tensor) -> Any:
        """Return what adapters add to a place's output at a virtual step, None where none does."""
        adapted = self.adapters is not None and place in self.adapters.places
        return self.adapters.added(place, at, x) if adapted else None

    def split(self, rows: int) -> list[Batch]:
        """Return this in parts of `rows` rows."""
        parts: Any = [x.split(rows) if isinstance(x, Tensor) else itertools.repeat(x) for x in self]
        return [Batch(*part) for part in zip(*parts)]


def open_shard(path: Path) -> np.ndarray:
    """Return a token shard (N,) uint16, memory-mapped; ValueError on a wrong header or size."""
    if not path.is_file():  # a pipe would wait for its writer
        raise ValueError(f"{path}: no regular file; put a shard there, or take it away")
    header, size = np.fromfile(path, dtype="<i4", count=3).tolist(), path.stat().st_size
    if len(header) < 3 or header[:2] != [SHARD_MAGIC, SHARD_VERSION]:
        raise ValueError(f"{path}: not a token shard (its header does not begin with "
                         f"{SHARD_MAGIC}, {SHARD_VERSION}); download or build it again")
    promised = SHARD_HEADER_BYTES + 2 * header[2]
    if size != promised:
        raise ValueError(f"{path}: {size} bytes where its header promises {promised} "
                         "(truncated?); download or build it again")
    return np.memmap(path, "<u2", "r", offset=SHARD_HEADER_BYTES, shape=(header[2],))


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of `split` (train, val, val_bytes) in lexicographic order."""
    return sorted(path for path in folder.glob(f"fineweb_{split}_*.bin")
                  if re.fullmatch(rf"fineweb_{split}_[0-9]+\.bin", path.name))


def keyed_permutation(index: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """Return where a permutation of range(size), chosen by `key` (32 bytes), sends each index.

    Four Feistel rounds over the next even power of two, walked until the value falls below
    `size`: no table, so any stretch of an epoch costs only its own length.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = np.frombuffer(key, dtype="<u8")

    def scramble(x):
        left, right = x >> half, x & mask
        for round_key in keys:
            mixed = (right ^ round_key) * 0x9E3779B97F4A7C15
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9
            left, right = right, left ^ ((mixed >> 32) & mask)
        return (left << half) | right

    out = scramble(index.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = scramble(out[outside])
    return out


def window_order(seed: int, num_windows: int, start: int, count: int) -> np.ndarray:
    """Return the window ids (count,) from position `start` on of the endless training order.

    Every epoch visits each window once, in an order that depends on the seed and the epoch alone.
    """
    epochs, positions = np.divmod(np.arange(start, start + count), num_windows)
    out = np.empty_like(positions)
    for epoch in np.unique(epochs):
        key = hashlib.sha256(f"window order {seed} {epoch}".encode()).digest()
        out[epochs == epoch] = keyed_permutation(positions[epochs == epoch], num_windows, key)
    return out


class ShardSet:
    """Training windows of `seq_len` + 1 tokens over a list of shard files."""

    def __init__(self, files: list[Path], seq_len: int):
        self.shards, self.seq_len = [open_shard(path) for path in files], seq_len
        self.first = np.cumsum([0, *(max(0, len(s) - 1) // seq_len for s in self.shards)])
        self.num_windows, self.num_tokens = int(self.first[-1]), sum(map(len, self.shards))

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """Return windows (B, T + 1), uint16, by their indices (B,)."""
        shards = self.first.searchsorted(indices, "right") - 1
        starts = (indices - self.first[shards]) * self.seq_len
        return np.stack([self.shards[shard][start:start + self.seq_len + 1]
                         for shard, start in zip(shards, starts)])


def fingerprint(files: list[Path]) -> str:
    """Return a hash of every shard's name, length and first tokens: tells sets apart."""
    digest = hashlib.sha256()
    for path in files:
        shard = open_shard(path)
        digest.update(f"{path.name} {len(shard)} ".encode() + shard[:32_768].tobytes())
    return digest.hexdigest()


def even_split(count: int, most: int) -> int:
    """Return the largest divisor of `count` that is at most `most` (at least 1)."""
    return max(n for n in range(1, max(1, min(count, most)) + 1) if count % n == 0)


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """Return where documents begin among tokens (T,): at 0, and at every BOS."""
    return np.union1d(0, np.flatnonzero(tokens == BOS_ID))


def filled(starts: list[np.ndarray], length: int, static: bool) -> Tensor:
    """Return starts of segments in rows of `length` tokens as one tensor (rows, N).

    static: N is one of few numbers, the least of them enough for rows of usual text, so that
    compiled graphs see one shape.
    """
    slots, need = -(-length // 24_576) * 64, 1 + max(map(len, starts))  # each row ends in a fill
    while slots < need:
        slots *= 2
    return torch.from_numpy(np.stack([np.pad(
        row, (0, (slots if static else need) - len(row)), constant_values=length)
        for row in starts])).long()


def cut_documents(tokens_BT: np.ndarray, longest: int, static: bool) -> Tensor:
    """Return where segments begin in packed rows, (B, N) as in Batch: with each document, and
    every `longest` tokens inside one (PR #1530). static: as `filled` takes it."""
    starts, length = [], tokens_BT.shape[1]
    for row in tokens_BT:
        begins = document_starts(row)
        ends = np.append(begins[1:], length)
        starts.append(np.concatenate([np.arange(*span, longest) for span in zip(begins, ends)]))
    return filled(starts, length, static)


class Loader:
    """This rank's share of every step's rows; reads one step ahead on a thread."""

    def __init__(self, shards: ShardSet, config: Config, runtime: Runtime):
        self.shards, self.config, self.runtime = shards, config, runtime
        self.per_rank = config.step_rows // runtime.world_size
        self.offset = runtime.rank * self.per_rank
        # (step, length of its segments) -> its rows to come
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def read(self, start: int, count: int, longest: int = 0, parts: int = 1) -> Batch:
        """Return the rows at `count` positions of the training order, on the device.

        longest: tokens of a segment at most, 0 for TRAIN_SEQ_LEN; parts: that each row is cut
        into, as rows of their own. Raises ValueError on a token beyond the vocabulary.
        """
        order = window_order(self.config.seed, self.shards.num_windows, start, count)
        rows = self.shards.windows(order)
        if rows.max() >= self.config.vocab_size:
            raise ValueError(f"training shards hold token {rows.max()}, VOCAB_SIZE="
                             f"{self.config.vocab_size}: set VOCAB_SIZE and DATA_PATH to match")
        return batch_of_rows(rows, self.config, self.runtime, longest, parts)

    def batch(self, step: int, longest: int = 0) -> Batch:
        """Return this rank's rows of a step; rank r holds the r-th share. longest: as in `read`."""
        if any(length != longest for _, length in self.ahead):  # a step's rows stay its rows
            self.ahead.clear()
        for wanted in (step, step + 1):
            if (wanted, longest) not in self.ahead:
                start = wanted * self.config.step_rows + self.offset
                self.ahead[wanted, longest] = self.pool.submit(
                    self.read, start, self.per_rank, longest)
        return self.ahead.pop((step, longest)).result()

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def batch_of_rows(rows: np.ndarray, config: Config, runtime: Runtime, longest: int,
                  parts: int = 1) -> Batch:
    """Return training rows (B, R + 1), uint16, as a Batch on the device; see `Loader.read`."""
    tokens = torch.from_numpy(rows.view(np.int16))  # two bytes a token to the device
    if runtime.device.type == "cuda":
        tokens = tokens.pin_memory()
    batch = Batch.of_windows(tokens.to(runtime.device, non_blocking=True).long() & 0xFFFF)
    if not config.doc_mask:
        return batch
    shape, cut = (len(rows) * parts, -1), rows[:, :-1].reshape(len(rows) * parts, -1)
    longest = longest or config.train_seq_len
    segments = cut_documents(cut, longest, runtime.compiles).to(runtime.device)
    # compiled graphs serve every length of a schedule
    longest = max(longest, config.train_seq_len) if runtime.compiles else longest
    return Batch(batch.tokens.view(shape), batch.targets.view(shape), None, segments, longest)


def byte_table(processor, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return per token id (vocab_size,): bytes, leading-space flag, boundary flag.

    Bytes are UTF-8 without the leading space. Raises ValueError if "▁" is no piece of its own:
    every space would then count three bytes. Source: the challenge's evaluator.
    """
    if processor.piece_to_id("▁") == processor.unk_id():
        raise ValueError("tokenizer: '▁' is not a piece of its own, so a space would count as "
                         "3 bytes; use one of the challenge's, or train one with that piece")
    # 40 million targets on every rank: two bytes each
    piece_bytes, leading = np.zeros(vocab_size, np.uint16), np.zeros(vocab_size, bool)
    boundary = np.ones(vocab_size, bool)
    for i in range(min(processor.vocab_size(), vocab_size)):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            continue
        piece = processor.id_to_piece(i)
        boundary[i], leading[i] = False, piece.startswith("▁")
        piece_bytes[i] = 1 if processor.is_byte(i) else len(piece.removeprefix("▁").encode())
    return piece_bytes, leading, boundary


class Pieces(NamedTuple):
    """What each id of a tokenizer stands for, arrays (V,), in bytes of UTF-8.

    table, leading, boundary: of `byte_table`. inside: what the decoder makes of it behind other
    text; first: as the first of a document. least (in twentieths) and most: raw bytes a sidecar may
    give it. value: of a byte piece, else -1. steady: text without a space.
    """

    table: np.ndarray
    leading: np.ndarray
    boundary: np.ndarray
    inside: np.ndarray
    first: np.ndarray
    least: np.ndarray
    most: np.ndarray
    value: np.ndarray
    unknown: np.ndarray
    operator: np.ndarray
    steady: np.ndarray
    escape: int


def read_pieces(processor) -> Pieces:
    """Return a tokenizer's Pieces; raises ValueError as `byte_table` does."""
    ids = range(processor.vocab_size())
    table, leading, boundary = byte_table(processor, len(ids))
    value = np.array([int(processor.id_to_piece(i)[1:-1], 16) if processor.is_byte(i) else -1
                      for i in ids])  # "<0xE2>"
    byte = value >= 0
    visible = np.flatnonzero(~boundary & ~leading & ~byte)
    anchor = int(visible[0]) if len(visible) else int((value == ord("a")).argmax())
    skip = len(processor.decode([anchor]))
    texts = [text[skip:].encode() for text in processor.decode([[anchor, i] for i in ids])]
    inside = np.where(byte, 1, [len(text) for text in texts])
    first = np.where(byte, 1, [len(t.encode()) for t in processor.decode([[i] for i in ids])])
    marks = [processor.piece_to_id(mark) for mark in OPERATORS]
    operator = np.isin(ids, marks) & (processor.unk_id() not in marks)
    # NFKC makes at most 33 bytes of 3, of ASCII twice as many; it makes 1 of 4, and white space
    # and control characters vanish
    ascii_bytes = np.where(byte, value < 128, [sum(c < 128 for c in text) for text in texts])
    spaced = np.array([b" " in text for text in texts])
    return Pieces(
        table, leading, boundary, inside.astype(np.uint16), first.astype(np.uint16),
        (9 * ascii_bytes + inside).astype(np.uint32), np.where(spaced, 65_535, 4 * inside + 256),
        value, np.array([processor.is_unknown(i) for i in ids]), operator,
        ~spaced & ~byte & ~operator & (inside > 0), marks[-1] if operator.any() else -1)


def count_bytes(tokens: np.ndarray, pieces: Pieces) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bytes of each token (N,), uint16: by the table, decoded, and of raw text.

    The last without operators of CaseOps, but for those the text itself holds: behind an ESC that
    acts. Of a run of ESC every other one acts, from the first on.
    """
    by_table = np.zeros(len(tokens), np.uint16)
    after = pieces.boundary[tokens[:-1]]
    by_table[1:] = pieces.table[tokens[1:]] + (pieces.leading[tokens[1:]] & ~after)
    decoded, begins = pieces.inside[tokens], np.flatnonzero(tokens[:-1] == BOS_ID) + 1
    decoded[begins] = pieces.first[tokens[begins]]
    if pieces.escape < 0:
        return by_table, decoded, decoded
    raw, places = decoded.copy(), np.flatnonzero(tokens == pieces.escape)
    number = np.arange(len(places))
    runs = np.maximum.accumulate(np.where(np.diff(places, prepend=-2) != 1, number, 0))
    literal = places[(number - runs) % 2 == 0] + 1
    literal = literal[literal < len(tokens)]
    raw[pieces.operator[tokens]] = 0
    raw[literal] = decoded[literal]
    return by_table, decoded, raw


def judge_bytes(tokens: np.ndarray, pieces: Pieces, counts, sidecar=None) -> list[tuple[int, str]]:
    """Return why the bytes of a text's tokens (N,) cannot be believed: first bad token, text.

    Exact, over all of them. counts: of `count_bytes`. Without a sidecar (N,) a score divides by
    the byte table, which must then count what the tokens decode to. As in data/encoding.py.
    """
    faults: list[tuple[int, str]] = []
    by_table, decoded, raw = counts

    def bad(where, text):
        if where.any():
            faults.append((int(where.argmax()), text))

    bad(pieces.unknown[tokens], "is the unknown one: text was lost that no byte counts; use a "
        "tokenizer with byte fallback")
    if (place := broken_bytes(pieces.value[tokens])) is not None:
        faults.append((place, "is a byte piece of no UTF-8; build the shards again"))
    if sidecar is not None:
        return faults + judge_sidecar(tokens, pieces, (decoded, raw), sidecar)
    if (marks := pieces.operator[tokens]).any():
        bad(marks, "is an operator of CaseOps and would count as text; bring its byte sidecar, "
            "fineweb_val_bytes_*.bin")
    else:
        counted, true = (int(x.sum(dtype=np.int64)) for x in (by_table, decoded))
        bad(by_table != decoded, "is where they begin to differ: the byte table counts "
            f"{counted} bytes, the tokens decode to {true}; use another tokenizer, or shards with "
            "a byte sidecar")
    return faults


def broken_bytes(values: np.ndarray) -> int | None:
    """Return where a run of byte pieces is no UTF-8; values (N,): of byte pieces, -1 elsewhere."""
    places = np.flatnonzero(values >= 0)
    runs = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    # a space between runs: two broken ones must not mend each other
    content = np.insert(values[places].astype(np.uint8), runs, ord(" ")).tobytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return int(places[error.start - np.searchsorted(runs + np.arange(len(runs)), error.start)])
    return None


def judge_sidecar(tokens: np.ndarray, pieces: Pieces, counts, sidecar) -> list[tuple[int, str]]:
    """Return why a byte sidecar (N,) cannot belong to tokens (N,); counts: decoded and raw bytes.

    A document has no fewer bytes than any text of its tokens. And where pieces without a space
    have other bytes than they decode to, as full-width text gives them, one piece has the same
    ones most times; a sidecar of other tokens has all kinds.
    """
    again = "; fetch or build the byte sidecar again"
    if len(sidecar) != len(tokens):
        return [(min(len(sidecar), len(tokens)), f"ends a byte sidecar of {len(sidecar)} entries "
                 f"for {len(tokens)} tokens, or they it{again}")]
    decoded, raw = counts
    silent = (pieces.boundary | pieces.operator)[tokens] & ((raw == 0) | pieces.boundary[tokens])
    for where, text in (
            (silent & (sidecar > 0), "is a control or an operator, which has none"),
            (sidecar > pieces.most[tokens], "cannot stand for so many")):
        if where.any():
            at = int(where.argmax())
            return [(at, f"has {sidecar[at]} bytes in the byte sidecar and {text}{again}")]
    starts = np.flatnonzero(tokens == BOS_ID)
    if len(starts):
        least = np.where(raw > 0, pieces.least[tokens], 0)
        found, least = (np.add.reduceat(x, starts, dtype=np.int64) for x in (sidecar, least))
        if (few := 20 * found < least - 10).any():
            return [(int(starts[few.argmax()]), "begins a document of fewer bytes in the byte "
                     f"sidecar than any text of its tokens has{again}")]
    places = np.flatnonzero(pieces.steady[tokens])
    off = places[sidecar[places] != decoded[places]]
    if len(places) >= 500 and len(off) > 0.2 * len(places):
        pairs, count = np.unique(tokens[off].astype(np.int64) << 16 | sidecar[off],
                                 return_counts=True)
        usual = np.maximum.reduceat(count, np.flatnonzero(np.diff(pairs >> 16, prepend=-1))).sum()
        if len(off) - usual > 0.2 * len(places):
            return [(int(off[0]), "has neither the bytes it decodes to nor always the same others, "
                     f"as many have: it is the byte sidecar of other tokens{again}")]
    return []


def sample_fault(processor, pieces: Pieces, tokens: np.ndarray, count: int) -> str:
    """Return what is wrong with a text's tokens by samples spread over it, or nothing.

    What a tokenizer decodes, it encodes again to the same ids (all of them, measured); another
    one of the same size gives back 95 % at most. And what is decoded has the bytes counted.
    """
    starts = np.flatnonzero(pieces.boundary[tokens]) + 1
    starts = np.union1d(np.arange(0, len(tokens), 4096), starts)
    starts = np.unique(starts[np.linspace(0, len(starts) - 1, count).astype(int)])
    samples, places = [], []
    for start in starts.tolist():
        ids = tokens[start:start + SAMPLE_TOKENS]
        ids = ids[:np.append(pieces.boundary[ids], True).argmax()]
        whole = np.flatnonzero(pieces.value[ids] < 0)  # no cut within a character
        if len(whole):
            samples.append(ids[whole[0]:whole[-1] + 1].tolist())
            places.append(start)
    texts, foreign = processor.decode(samples), []
    for ids, again, place in zip(samples, processor.encode(texts), places):
        if (Counter(ids) & Counter(again)).total() < 0.98 * len(ids) - 2:
            foreign.append(place)
    if len(foreign) > len(samples) / 1000:
        return (f"another tokenizer wrote it: text at token {foreign[0]} and at {len(foreign)} of "
                f"{len(samples)} places is encoded to other ids; set TOKENIZER_PATH to that one")
    counted = sum(int(pieces.first[ids[0]]) + int(pieces.inside[ids[1:]].sum()) for ids in samples)
    if counted != (true := sum(len(text.encode()) for text in texts)):
        return (f"{len(samples)} samples of it decode to {true} bytes, {counted} are counted; use "
                "another tokenizer")
    return ""


@dataclass(frozen=True, eq=False)
class Validation:
    """Validation text as it is scored: tokens (N + 1,) and bytes of each target (N,), uint16."""

    tokens: np.ndarray
    target_bytes: np.ndarray
    table_bytes: int
    denominator: str  # "table" or "sidecar"
    all_targets: int  # N with the tail
    legacy_targets: int  # N without it
    sha256: str
    name: str = "UNKNOWN"  # of the published text it is
    warnings: tuple[str, ...] = ()


@functools.lru_cache(1)  # once for all scores of a run
def on_device(text: Validation, device) -> Any:
    """Return tokens and bytes of targets on a device, two bytes each."""
    return tuple(torch.from_numpy(values.view(np.int16)).to(device)
                 for values in (text.tokens, text.target_bytes))


def load_tokenizer(path: Path):
    """Return the SentencePiece processor of a model file; raises ValueError when it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({error}); "
                         "download or build it again") from None


def name_validation(by_table: np.ndarray, denominator: int) -> str:
    """Return the name of a published validation text, or UNKNOWN. by_table: target bytes (N,)."""
    whole = len(by_table) // 2048 * 2048
    if name := KNOWN_VALIDATION.get((whole, int(by_table[:whole].sum()))):
        return name
    near = abs(denominator - WHOLE_TEXT_BYTES) < 2e-4 * WHOLE_TEXT_BYTES
    return KNOWN_VALIDATION.get(len(by_table) + 1, "UNKNOWN") if near else "UNKNOWN"


def load_validation(config: Config, judged: bool = True) -> Validation:
    """Return the validation tokens and the bytes each target stands for.

    Bytes come from a sidecar (`fineweb_val_bytes_*.bin`, uint16 per token) where one lies beside
    the shards, else from the tokenizer's byte table. Raises ValueError where they, the tokens or
    the tokenizer cannot belong to each other; judged False: another process looks for that.
    """
    folder, vocab_size = config.shard_dir, config.vocab_size
    processor = load_tokenizer(config.tokenizer_file)
    if (count := processor.vocab_size()) != vocab_size:
        raise ValueError(f"TOKENIZER_PATH={config.tokenizer_file}: {count} pieces, VOCAB_SIZE="
                         f"{vocab_size}; set one to match")
    pieces, shards = read_pieces(processor), find_shards(folder, "val")
    tokens = np.concatenate([open_shard(path) for path in shards])
    if len(tokens) < 2 or tokens.max() >= vocab_size:
        raise ValueError(f"{folder}: {len(tokens)} validation tokens to {tokens.max(initial=0)}, "
                         f"VOCAB_SIZE={vocab_size}: set VOCAB_SIZE and DATA_PATH to match")
    sidecars = [open_shard(path) for path in find_shards(folder, "val_bytes")]
    sidecar, counts = np.concatenate(sidecars) if sidecars else None, count_bytes(tokens, pieces)
    faults = judge_bytes(tokens, pieces, counts, sidecar) if judged else []
    fault = "; ".join(f"token {place} {text}" for place, text in faults)
    if judged and (fault := fault or sample_fault(processor, pieces, tokens, SAMPLES)):
        raise ValueError(f"{folder}: validation text, read with TOKENIZER_PATH="
                         f"{config.tokenizer_file}: {fault}")
    by_table, _, raw = (column[1:] for column in counts)
    target_bytes = by_table if sidecar is None else sidecar[1:]
    warnings = [f"{path.name}: holds {size} tokens" for path in shards
                if (size := len(open_shard(path))) < config.eval_seq_len]
    scored, given_back = (int(x.sum(dtype=np.int64)) for x in (target_bytes, raw))
    if abs(scored - given_back) > 1e-4 * given_back:
        warnings.append(f"the score divides by {scored} bytes, the tokens give back {given_back}: "
                        f"{100 * (scored / given_back - 1):+.3f} %, by what normalisation dropped "
                        "before they were made, if the sidecar is right")
    whole = len(target_bytes)
    legacy = whole - whole % config.eval_seq_len
    kept = whole if config.score_tail else legacy
    if not target_bytes[:kept].sum():
        raise ValueError(f"{folder}: {whole} validation targets leave nothing to score with "
                         f"EVAL_SEQ_LEN={config.eval_seq_len} SCORE_TAIL={int(config.score_tail)}")
    return Validation(tokens[:kept + 1], target_bytes[:kept], int(by_table[:kept].sum()),
                      "sidecar" if sidecars else "table", whole, legacy,
                      hashlib.sha256(tokens.tobytes()).hexdigest(),
                      name_validation(by_table, scored), tuple(warnings))


def vocabulary_faults(config: Config, path: Path, tokens: np.ndarray) -> list[str]:
    """Return a line where a shard's tokens (N,) are beyond the vocabulary."""
    largest, size = tokens.max(initial=0), config.vocab_size
    text = f"{path}: token {largest} is outside VOCAB_SIZE={size}: a shard of another vocabulary"
    return [text] if largest >= size else []


def data_faults(config: Config) -> list[str]:
    """Return what can be seen of faults in the files a run would read, one line each."""
    folder, faults = config.shard_dir, []
    shards = {split: find_shards(folder, split) for split in config.text}
    for split, files in shards.items():
        if not files:
            where = f"no fineweb_{split}_*.bin in it" if folder.is_dir() else "no such folder"
            faults.append(f"DATA_PATH={folder}: {where}")
        for path in files:
            try:
                faults += vocabulary_faults(config, path, open_shard(path)[:65_536])
            except (ValueError, OSError) as error:
                faults.append(str(error))
    if config.text and not config.tokenizer_file.is_file():
        faults.append(f"TOKENIZER_PATH={config.tokenizer_file}: no such file; give a .model file")
    if not all(shards.values()):
        faults.append(GET_DATA)
    return faults


def unread_files(config: Config) -> list[str]:
    """Return a line about files beside the shards that look like some and are none."""
    folder, splits = config.shard_dir, ("train", "val", "val_bytes")
    shards = [path for split in splits for path in find_shards(folder, split)]
    others = sorted(path.name for path in set(folder.glob("*.bin")).difference(shards))
    text = f"{folder}: not read, no fineweb_SPLIT_NUMBER.bin: {', '.join(others[:5])}"
    return [text] if others else []


def training_faults(config: Config, files: list[Path]) -> list[str]:
    """Return which training shards another tokenizer wrote, by some samples of each."""
    processor = load_tokenizer(config.tokenizer_file)
    pieces, faults = read_pieces(processor), []
    for path in files:  # a few stretches of each: all would be gigabytes
        shard = open_shard(path)
        places = np.linspace(0, max(0, len(shard) - 4096), 4).astype(int)
        tokens = np.concatenate([shard[at:at + 4096] for at in places])
        faults += (found := vocabulary_faults(config, path, tokens))
        if len(tokens) and not found and (fault := sample_fault(processor, pieces, tokens, 40)):
            faults.append(f"{path}: {fault}")
    return faults


# == 4 Kernels: one fast form, one plain form per operation =======================================

class Cut(NamedTuple):
    """How packed rows are cut into segments, as attention wants to know it; see `Batch`."""

    bounds: Tensor  # (B * N,) int32: where segments begin in the flattened rows, and end
    longest: int
    places: Tensor  # (B, T): each position within its segment
    padded: Tensor  # (B * N, longest): flattened positions of each segment, and of what follows
    back: Tensor  # (B, T): where each position lies in that


def cut_rows(segments: Tensor, length: int, longest: int) -> Cut:
    """Return the Cut of rows of `length` tokens; segments (B, N) and longest as in `Batch`."""
    (rows, slots), device = segments.shape, segments.device
    row = torch.arange(rows, device=device)[:, None]
    at = torch.arange(length, device=device).expand(rows, length).contiguous()
    number = torch.searchsorted(segments, at, right=True) - 1  # of the segment, in its row
    places, begins = at - segments.gather(1, number), segments + length * row
    padded = begins[..., None] + torch.arange(longest, device=device)
    return Cut(begins.flatten().int(), longest, places,
               padded.flatten(0, 1).clamp_max(rows * length - 1),
               (number + slots * row) * longest + places)


def by_segments(dense, packed=None):
    """Return an attention that, given a Cut, stays within segments, through packed(q, k, v, cut).

    dense: causal attention of whole rows, which must do for segments too where `packed` is None:
    each a row, filled up with whatever follows it, which nothing of the segment sees.
    """
    def attention_padded(q_BTHK, k_BTGK, v_BTGK, cut: Cut):
        out = dense(*(x.flatten(0, 1)[cut.padded] for x in (q_BTHK, k_BTGK, v_BTGK)))
        return out.flatten(0, 1)[cut.back]

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cut: Any = None) -> Tensor:
        if cut is None:
            return dense(q_BTHK, k_BTGK, v_BTGK)
        return (packed or attention_padded)(q_BTHK, k_BTGK, v_BTGK, cut)
    return attend


def varlen_attention(function, **options):
    """Return attention within segments through a variable-length function of FlashAttention."""
    def attention_varlen(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cut: Cut) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
        out = function(*flat, cut.bounds, cut.bounds, cut.longest, cut.longest, **options)
        return (out[0] if isinstance(out, tuple) else out).view(q_BTHK.shape)
    return attention_varlen


def torch_varlen():
    """Return attention within segments through PyTorch's own FlashAttention; None before 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    causal = dict(window_size=(-1, 0)) if "window_size" in takes else dict(is_causal=True)
    if "enable_gqa" in takes:
        return varlen_attention(varlen_attn, enable_gqa=True, **causal)

    def repeated(q, k, v, *cut):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, *cut, **causal)
    return varlen_attention(repeated)


def causal_sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal grouped attention (B, T, H, K) through PyTorch's scaled_dot_product_attention.

    Like every attention here it takes queries of the last positions alone as well.
    """
    before = k_BTGK.shape[1] - q_BTHK.shape[1]  # SDPA's causal mask starts at the first of both
    if before and 8 * q_BTHK.shape[1] <= k_BTGK.shape[1]:
        return attention_math(q_BTHK, k_BTGK, v_BTGK)
    if before:
        q_BTHK = F.pad(q_BTHK, (0, 0, 0, 0, before, 0))
    return grouped_sdpa(q_BTHK, k_BTGK, v_BTGK, is_causal=True)[:, before:]


attention_sdpa = by_segments(causal_sdpa)


def grouped_sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, **mask) -> Tensor:
    """Call PyTorch's scaled_dot_product_attention in this script's order of axes."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(
        q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask).transpose(1, 2)


def windowed_attention(window: int):
    """Return causal grouped attention in which a position sees itself and `window` - 1 before it.

    Positions are cut into blocks of `window`: each attends to its own block and the one before.
    """
    def attention_windowed(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        length, queries = k_BTGK.shape[1], q_BTHK.shape[1]
        q_BTHK = F.pad(q_BTHK, (0, 0, 0, 0, length - queries, 0))
        fill = 0, 0, 0, 0, 0, -length % window
        q, k, v = (F.pad(x, fill).unflatten(1, (-1, window)) for x in (q_BTHK, k_BTGK, v_BTGK))
        k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), x), dim=2) for x in (k, v))
        i = torch.arange(window, device=q.device)[:, None]
        j = torch.arange(2 * window, device=q.device)
        near = (j > i) & (j <= i + window)  # key j stands at position j - window of the block
        later = torch.arange(q.shape[1], device=q.device).repeat(len(q)) > 0  # has one before it
        sees = near & ((j >= window) | later[:, None, None])
        out = grouped_sdpa(*(x.flatten(0, 1) for x in (q, k, v)), attn_mask=sees[:, None])
        return out.unflatten(0, (len(q), -1)).flatten(1, 2)[:, length - queries:length]
    return attention_windowed


def fa3_attention(**options):
    """Return causal grouped attention (B, T, H, K) through FlashAttention-3."""
    def attention_fa3(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        out = flash_attn_func(q_BTHK, k_BTGK, v_BTGK, causal=True, **options)
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too
    return attention_fa3


def attention_math(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, window: int = 0) -> Tensor:
    """The same in plain operations, fp32: the yardstick of the others. window: 0 for all before."""
    q, k, v = (x.transpose(1, 2).float() for x in (q_BTHK, k_BTGK, v_BTGK))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores, before = q @ k.mT * q.shape[-1] ** -0.5, k.shape[2] - q.shape[2]
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(before)
    keep &= keep.new_ones(keep.shape).triu(before - (window or k.shape[2]) + 1)
    return (scores.masked_fill(~keep, -math.inf).softmax(-1) @ v).transpose(1, 2).to(q_BTHK.dtype)


def windowed_form(name: str, window: int):
    """Return the windowed attention that goes with a backend of causal attention."""
    return (fa3_attention(window_size=(window - 1, 0)) if name == "fa3"
            else windowed_attention(window))


def sdpa_only(*names: str):
    """Return a context in which SDPA uses the first of these backends that can, and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "math": SDPBackend.MATH}
    return sdpa_kernel([kinds[name] for name in names], set_priority=True)


def attention_inputs(config: Config, runtime: Runtime, length: int) -> list[Tensor]:
    """Return random q, k, v of two rows, the same on every machine."""
    generator, heads = torch.Generator().manual_seed(0), config.num_kv_heads
    return [torch.randn(2, length, count, config.head_dim, generator=generator).to(
        runtime.device, runtime.compute_dtype) for count in (config.num_heads, heads, heads)]


def trial_cut(length: int, longest: int, runtime: Runtime) -> Cut:
    """Return a Cut of two rows into segments of `longest` tokens but for the first and last."""
    begins = [[0, *range(first, length, longest)] for first in (1, longest // 2 + 1)]
    slots = 1 + max(map(len, begins))
    filled_up = [row + [length] * (slots - len(row)) for row in begins]
    return cut_rows(torch.tensor(filled_up, device=runtime.device), length, longest)


def attention_error(function, config: Config, runtime: Runtime, window: int = 0,
                    cut: Any = None) -> float:
    """Return the largest error of an attention function against the plain one, both directions.

    Errors of output, of the last queries alone and of gradients are relative to the largest value.
    cut: of two rows of 128, to be told both. Raises what a backend that cannot run does.
    """
    results, yardstick = [], functools.partial(attention_math, window=window)
    if cut is not None:
        function, yardstick = (functools.partial(form, cut=cut)
                               for form in (function, by_segments(yardstick)))
    for attend in (function, yardstick):
        inputs = [x.requires_grad_() for x in attention_inputs(config, runtime, 128)]
        found = [attend(*inputs)]
        found += torch.autograd.grad(found[0].float().square().sum(), inputs, retain_graph=True)
        found += [attend(inputs[0][:, -32:], *inputs[1:])] if cut is None else []
        results.append([x.detach().float() for x in found])
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(*results)]
    return torch.stack(errors).max().item()  # a NaN stays one, and is above any tolerance


def try_attention(name: str, attend, scope, config: Config, runtime: Runtime) -> float:
    """Run all that a run will ask of a backend, at its lengths; return its error against math.

    scope(*names) -> context in which those backends alone serve. Raises what one that cannot does.
    """
    cut = functools.partial(trial_cut, runtime=runtime)
    with scope(name):
        error = attention_error(attend, config, runtime)
        if config.packs:
            error = max(error, attention_error(attend, config, runtime, 0, cut(128, 20)))
        if config.runs("train"):
            inputs = [x.requires_grad_() for x in attention_inputs(config, runtime, config.row_len)]
            given = [cut(config.row_len, config.train_seq_len)] * config.doc_mask
            torch.autograd.grad(attend(*inputs, *given).float().sum(), inputs)
        with torch.inference_mode():
            length = config.eval_seq_len
            q, *others = attention_inputs(config, runtime, length)
            attend(q, *others, *[cut(length, length)] * config.by_documents)
            attend(q[:, -config.eval_stride:], *others)
    if config.eval_mode == "stream" and config.runs("evaluate"):  # masks need another kernel
        length, distance, *_ = config.stream_plan
        with scope(name, "math"):
            error = max(error, attention_error(windowed_form(name, 32), config, runtime, 32))
            with torch.inference_mode():
                q, *others = attention_inputs(config, runtime, length)
                windowed_form(name, config.eval_seq_len)(q[:, -distance:], *others)
    return error


FA3_NEEDS = ("FlashAttention-3 on a GPU with bf16: pip install flash_attn_3 --find-links "
             "https://windreamer.github.io/flash-attention3-wheels/cu128_torch291/")


def attention_backends(config: Config, runtime: Runtime) -> dict[str, tuple]:
    """Return name -> (function, scope) of the backends to try, best first; scope: `try_attention`.

    ATTENTION_BACKEND names the only one.
    """
    def anywhere(*_):
        return contextlib.nullcontext()

    if runtime.device.type == "cuda":
        flash = by_segments(causal_sdpa, torch_varlen())
        names = ("flash", "cudnn", "math") if config.packs else ("cudnn", "flash", "math")
        found: dict[str, tuple] = {name: (attention_sdpa, sdpa_only) for name in names}
        found["flash"] = flash, sdpa_only
        if flash_attn_func and runtime.compute_dtype == torch.bfloat16:
            packed = varlen_attention(flash_attn_varlen_func, causal=True)
            found = dict(fa3=(by_segments(fa3_attention(), packed), anywhere)) | found
    else:
        found = dict(sdpa=(attention_sdpa, anywhere), math=(by_segments(attention_math), anywhere))
    asked = config.attention_backend
    return {name: form for name, form in found.items() if asked in ("auto", name)}


def choose_attention(config: Config, runtime: Runtime):
    """Return (name, attention function, process-wide context, error against math).

    Takes the first of `attention_backends` that can do all this run needs. Raises ConfigError when
    none can, or the ranks come to different ones.
    """
    asked, chosen = config.attention_backend, None
    reason = f"it needs {FA3_NEEDS}" if asked == "fa3" else "it needs a CUDA device"
    for name, (attend, scope) in attention_backends(config, runtime).items():
        try:
            error = try_attention(name, attend, scope, config, runtime)
            reason = f"its result is off by {error:.2g} from plain attention"
        except RuntimeError as failure:
            error, reason = math.inf, str(failure).split("\n")[0]
        if error <= 0.05:
            names = (name, "math") if config.eval_mode == "stream" else (name,)
            chosen = name, attend, scope(*names), error
            break
    found = runtime.gather((chosen and chosen[0], reason))
    for rank, (name, why) in enumerate(found):
        if name is None:
            raise ConfigError([f"ATTENTION_BACKEND={asked}: not usable here: {why}"], shared=True)
        if name != found[0][0]:
            raise ConfigError([f"ATTENTION_BACKEND={asked}: rank 0 comes to {found[0][0]}, rank "
                               f"{rank} to {name}; set it to one that works on both"], shared=True)
    return chosen


def softcap_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, cap: float,
                          added: Any = None) -> Tensor:
    """Return the loss in nats of each target (N,), fp32, under the softcapped logits."""
    logits = softcap_logits(hidden_ND, head_VD, cap, added)
    return F.cross_entropy(logits, targets_N, reduction="none")


def softcap_logits(hidden_ND: Tensor, head_VD: Tensor, cap: float, added: Any = None) -> Tensor:
    """Return softcapped logits (N, V), fp32: cap * tanh(z / cap), z = hidden @ head.T + added."""
    logits = F.linear(hidden_ND, head_VD.to(hidden_ND.dtype)).float()
    return cap * torch.tanh((logits if added is None else logits + added) / cap)


# == 5 Model ======================================================================================

# Its notable parts, each with the setting that governs it:
#   tied, softcapped head            LOGIT_SOFTCAP           value embedding            VE_*
#   depth recurrence                 RECUR_*, VIRTUAL_ORDER  U-Net skips, gated         SKIP_*
#   two lanes, merged at the end     PARALLEL_START_LAYER    rotation of a part         ROPE_*
#   heads that drop their own value  XSA_LAST_N              a gain per query head      QK_GAIN_INIT
#   grouped keys and values          NUM_KV_HEADS            shrinking normed inputs    LN_SCALE
#   leaky ReLU squared               MLP_MULT                every layer also reads x0  always
#   gates on head outputs            ATTN_GATE, GATE_WINDOW  smeared embeddings         SMEAR_GATE
#   lanes that feed each other       LANE_ROUTING            documents apart, packed    DOC_MASK

class Role(Enum):
    """What a parameter is, given where it is made: decides its optimizer and how it is stored."""

    EMBED = "embed"
    MATRIX = "matrix"
    CONTROL = "control"


class Step(NamedTuple):
    """One virtual layer: its physical layer, and what happens around it."""

    layer: int
    saves: bool = False  # its output waits for a skip
    skip: int | None = None  # row by which the youngest waiting output joins before it
    splits: bool = False  # the lanes begin here
    last: bool = False  # what follows its keys and values concerns scored positions alone


class Layout(NamedTuple):
    """The virtual layers of a forward pass and what flows between them; an argument of it."""

    steps: tuple[Step, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(step.layer for step in self.steps)


class Phase(NamedTuple):
    """A part of training: from the end of `start` on, in this layout, on rows of this length."""

    start: Span
    layout: Layout
    seq_len: int


def plan_layout(order: tuple[int, ...], config: Config) -> Layout:
    """Return the Layout of a virtual order: its first half encodes, its second half decodes.

    The lanes split at the first decoder step whose layer is PARALLEL_START_LAYER or later; skips
    that arrive after the split reach the attention lane (PR #1395) or, with SKIP_TO_LANES=0, are
    lost (PR #1471).
    """
    border, end = len(order) // 2, len(order)
    skips = min(skip_rows(config), border)
    late = (at for at in range(border, end)
            if config.lanes_split and order[at] >= config.parallel_start_layer)
    lanes_from = next(late, end)
    if not config.skip_to_lanes:
        skips = min(skips, lanes_from - border + 1)
    return Layout(tuple(
        Step(layer, saves=at < border, skip=at - border if 0 <= at - border < skips else None,
             splits=at == lanes_from, last=at == end - 1) for at, layer in enumerate(order)))


def skip_rows(config: Config) -> int:
    """Return how many skip rows a model has: by its physical depth, or by what its orders use."""
    if config.skip_rows == "depth":
        return config.num_layers // 2
    return max(len(order) // 2 for order in (config.base_order, config.recurrent_order))


def phases(config: Config) -> list[Phase]:
    """Return the parts of training in order; the last one's layout is the model's from then on."""
    layouts = [(Span(0), plan_layout(config.base_order, config)),
               (config.recur_start, plan_layout(config.recurrent_order, config))]
    layouts = layouts[:1] if layouts[0][1] == layouts[1][1] else layouts
    if not config.train_seq_schedule:
        return [Phase(start, layout, config.train_seq_len) for start, layout in layouts]
    begins = [0.0, *(end for _, end in config.seq_stages[:-1])]
    lengths = [(Span(0, begin), length) for begin, (length, _) in zip(begins, config.seq_stages)]

    def latest(parts, share):
        return [part for start, part in parts if (start.frac or 0.0) <= share][-1]

    shares = sorted({start.frac or 0.0 for start, _ in [*layouts, *lengths]})
    return [Phase(Span(0, share), latest(layouts, share), latest(lengths, share))
            for share in shares]


def parameter(role: Role, start, *shape: int, dtype=torch.float32) -> nn.Parameter:
    """Return an uninitialised parameter that carries its role and its start for `init_weights`.

    start: values spread over the shape, or a function of torch.nn.init.
    """
    made: Any = nn.Parameter(torch.empty(shape, dtype=dtype))
    made.role, made.start = role, start
    return made


def rms_norm(x: Tensor) -> Tensor:
    """Normalise the last dimension to unit mean square, in the dtype of `x`."""
    # fp32 machine epsilon whatever the dtype: embeddings start with mean square 2.5e-5
    return F.rms_norm(x, x.shape[-1:], eps=2.0 ** -23)


def rotary_tables(length: int, dims: int, base: float, train_len: int,
                  like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (length, dims/2), computed in fp32, in the dtype of `like`.

    Beyond the training length the base grows (NTK scaling).
    """
    if length > train_len:
        base = base * (length / train_len) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, device=like.device, dtype=torch.float32) / dims
    positions = torch.arange(length, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, base ** -exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R dimensions of each head; cos, sin (…, T, R/2)."""
    half = cos.shape[-1]
    a, b, rest = x_BTHK.split((half, half, x_BTHK.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Pass(NamedTuple):
    """What every layer of one forward shares."""

    batch: Batch
    x0: Tensor  # (B, T, D): the normed embeddings
    rotary: tuple[Tensor, Tensor]  # cos and sin (T, R/2), of packed rows (B, T, R/2)
    cut: Any  # of packed rows, a Cut
    value: Any  # (B, T, G * K): the value embedding, if there is one
    value_scales: Any  # a scale for each layer that adds it
    asked: slice  # the positions whose targets are asked for
    kept: slice  # those whose outputs matter: all, in the last layer the ones asked for
    at: int = 0  # the virtual step

    def adapted(self, place: str, x: Tensor, out: Tensor) -> Tensor:
        """Return a place's output with what the batch's adapters make of its input."""
        added = self.batch.added(place, self.at, x)
        return out if added is None else out + added


class Adapters(NamedTuple):
    """Low-rank additions to a frozen model, a set of its own for each row of a batch.

    places: q, k, v, o, mlp or head -> A (N, B, r, in) and B (N, B, out, r), N virtual steps, of the
    head 1. Source: PR #1530.
    """

    places: dict[str, list[Tensor]]
    scale: float

    def added(self, place: str, at: int, x: Tensor) -> Tensor:
        """Return what is added to a place's output, (B, T, out), for its input (B, T, in)."""
        inner, outer = (half[at].to(x.dtype) for half in self.places[place])
        return self.scale * ((x @ inner.mT) @ outer.mT)


class Linear(nn.Module):
    """Bias-free matrix (R, C), fp32, applied in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, start=nn.init.orthogonal_):
        super().__init__()
        self.weight = parameter(Role.MATRIX, start, outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with normed q and k, partial RoPE, a gain per head, and XSA."""

    def __init__(self, config: Config, layer: int, attend):
        super().__init__()
        dim, kv_dim, self.attend = config.model_dim, config.kv_dim, attend
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.q, self.k, self.v = Linear(dim, dim), Linear(dim, kv_dim), Linear(dim, kv_dim)
        self.out = Linear(dim, dim, start=0.0)
        self.q_gain = parameter(Role.CONTROL, config.qk_gain_init, config.num_heads)
        excludes = layer >= config.num_layers - config.xsa_last_n
        self.exclude_self = exclude_self if excludes else lambda out, v: out
        self.gate: Any = None
        if config.attn_gate != "none":
            self.gate = parameter(Role.CONTROL, 0.0, config.num_heads, config.gate_window)
        self.gate_scale = config.attn_gate_scale
        adds = config.ve_enabled and layer in config.ve_layers
        self.value_row = config.ve_layers.index(layer) if adds else None

    def forward(self, x_BTD: Tensor, here: Pass) -> Tensor:
        """Return what heads read at the S positions kept, (B, S, D)."""
        x_BSD = x_BTD[:, here.kept]
        v = here.adapted("v", x_BTD, self.v(x_BTD))  # (B, T, G * K)
        if self.value_row is not None:
            v = v + here.value * here.value_scales[self.value_row]
        q = here.adapted("q", x_BSD, self.q(x_BSD)).unflatten(-1, (self.heads, -1))  # (B, S, H, K)
        k = here.adapted("k", x_BTD, self.k(x_BTD)).unflatten(-1, (self.kv_heads, -1))
        v = v.unflatten(-1, (self.kv_heads, -1))  # as k: (B, T, G, K)
        q = rotate(rms_norm(q), *(table[..., here.kept, :] for table in here.rotary))
        q, k = q * self.q_gain.to(q.dtype)[:, None], rotate(rms_norm(k), *here.rotary)
        out = self.attend(q, k, v) if here.cut is None else self.attend(q, k, v, here.cut)
        out = self.exclude_self(out, v[:, here.kept])  # (B, S, H, K)
        if self.gate is not None:
            first = x_BSD[..., :self.gate.shape[1]]
            gate = torch.sigmoid(self.gate_scale * F.linear(first, self.gate.to(first.dtype)))
            out = out * gate[..., None]  # (B, S, H, 1)
        return here.adapted("o", x_BSD, self.out(out.flatten(2).to(x_BTD.dtype)))


def exclude_self(out_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Return each head's output less its component along its own position's value (XSA), fp32."""
    v = F.normalize(v_BTGK.float(), dim=-1).unsqueeze(3)  # (B, T, G, 1, K)
    grouped = out_BTHK.float().unflatten(2, (v_BTGK.shape[2], -1))  # (B, T, G, H / G, K)
    return (grouped - (grouped * v).sum(-1, keepdim=True) * v).flatten(2, 3)


class MLP(nn.Module):
    """Linear, leaky ReLU (0.5) squared in fp32, linear."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_dim)
        self.down = Linear(config.mlp_dim, config.model_dim, start=0.0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.up(x_BTD), 0.5).float().square()
        return self.down(hidden.to(x_BTD.dtype))


class Block(nn.Module):
    """One physical layer: what its two halves add to a stream. How they follow is Lanes' matter."""

    def __init__(self, config: Config, layer: int, attend):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer, attend), MLP(config)
        self.attn_scale = parameter(Role.CONTROL, 1.0, config.model_dim)
        self.mlp_scale = parameter(Role.CONTROL, 1.0, config.model_dim)
        self.resid_mix = parameter(Role.CONTROL, [[1.0], [0.0]], 2, config.model_dim)
        self.layer, self.norm_scale = layer, (layer + 1) ** -0.5 if config.ln_scale else 1.0

    def mix(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def attended(self, x: Tensor, here: Pass) -> Tensor:
        return self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.norm_scale, here)

    def fed_forward(self, x: Tensor, here: Pass) -> Tensor:
        normed = rms_norm(x) * self.norm_scale
        return self.mlp_scale.to(x.dtype) * here.adapted("mlp", normed, self.mlp(normed))


class OneStream:
    """How a block's halves act on the residual stream: attention, then the MLP on its sum.

    Other ways have several streams; skips join the first one.
    """

    def split(self, x: Tensor, here: Pass) -> tuple[Tensor, ...]:
        return (x,)

    def step(self, block: Block, streams: tuple[Tensor, ...], here: Pass) -> tuple[Tensor, ...]:
        x = block.mix(streams[0], here.x0)
        added = block.attended(x, here)
        x = x[:, here.kept] + added
        return (x + block.fed_forward(x, here),)

    def merge(self, streams: tuple[Tensor, ...]) -> Tensor:
        return streams[0]


class ScalarLanes(OneStream):
    """Attention and MLP on a lane each, merged by one learned share. Source: PR #1471."""

    def __init__(self, share: Any):
        self.share = share

    def split(self, x, here):
        return x, x[:, here.asked]  # the MLP's never reads another position

    def step(self, block, streams, here):
        x = block.mix(streams[0], here.x0)
        added = block.attended(x, here)
        return x[:, here.kept] + added, streams[1] + block.fed_forward(streams[1], here)

    def merge(self, streams):
        share = self.share.to(streams[0].dtype)
        return share * streams[0] + (1 - share) * streams[1]


class RoutedLanes(OneStream):
    """Two lanes; each keeps a share of itself and takes in shares of what both halves add.

    Attention reads the first lane mixed with x0, the MLP the second, both as they enter. keep
    (layers, 2 lanes), route (layers, 2 lanes, 2 halves). Source: PR #1529.
    """

    def __init__(self, keep: Any, route: Any):
        self.keep, self.route = keep, route

    def split(self, x, here):
        return x, x

    def step(self, block, streams, here):
        added = block.attended(block.mix(streams[0], here.x0), here)
        fed, dtype = block.fed_forward(streams[1][:, here.kept], here), added.dtype
        keep, route = self.keep[block.layer].to(dtype), self.route[block.layer].to(dtype)
        return tuple(keep[i] * lane[:, here.kept] + route[i, 0] * added + route[i, 1] * fed
                     for i, lane in enumerate(streams))

    def merge(self, streams):
        return 0.5 * (streams[0] + streams[1])


class SmearGate(nn.Module):
    """Adds to each embedding a gated share of the one before, in its document and segment.

    Source: PR #1667, masked as in PR #1855.
    """

    def __init__(self, window: int):
        super().__init__()
        self.weight = parameter(Role.CONTROL, 0.0, window)
        self.scale = parameter(Role.CONTROL, 0.0)

    def forward(self, x_BTD: Tensor, begins_BT: Tensor) -> Tensor:
        """Return embeddings with what they take in; begins: where nothing goes before."""
        weight, scale = self.weight.to(x_BTD.dtype), self.scale.to(x_BTD.dtype)
        gate = scale * torch.sigmoid(x_BTD[..., :len(weight)] @ weight)
        gate = gate.masked_fill(begins_BT, 0.0)
        return x_BTD + gate[..., None] * F.pad(x_BTD, (0, 0, 1, -1))


class ValueEmbedding(nn.Module):
    """A second, narrow token embedding that chosen layers add to their values. Source: PR #414."""

    def __init__(self, config: Config, dtype):
        super().__init__()
        self.table = Embedding(config.vocab_size, config.ve_dim, dtype, 0.01)
        self.proj = Linear(config.ve_dim, config.kv_dim) if config.ve_dim != config.kv_dim else None
        self.scale = parameter(Role.CONTROL, 0.1)
        self.layer_scales = parameter(Role.CONTROL, 1.0, len(config.ve_layers))

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return values (B, T, G * K) and a scale for each layer that adds them."""
        value = self.table(tokens_BT)
        value = value if self.proj is None else self.proj(value)
        return value * self.scale.to(value.dtype), self.layer_scales.to(value.dtype)


class Embedding(nn.Module):
    """Token table (V, D), kept in the compute dtype as published."""

    def __init__(self, vocab_size: int, width: int, dtype, std: float):
        super().__init__()
        start = functools.partial(nn.init.normal_, std=std)
        self.weight = parameter(Role.EMBED, start, vocab_size, width, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class GPT(nn.Module):
    """The model of PR #1471: U-Net skips, depth recurrence, two lanes, tied softcapped head.

    Every size is fixed at construction; the order of layers is `forward`'s argument.
    Parameters are uninitialised until `init_weights` or a loaded state fills them. train_len: from
    which length on rotation slows down (TRAIN_SEQ_LEN unless given).
    """

    def __init__(self, config: Config, attend=attention_sdpa, dtype=torch.float32,
                 train_len: int | None = None):
        super().__init__()
        self.softcap = config.logit_softcap
        self.tok_emb = Embedding(config.vocab_size, config.model_dim, dtype,
                                 config.tied_embed_init_std)
        adds = config.ve_enabled and config.ve_layers
        self.ve: Any = ValueEmbedding(config, dtype) if adds else None
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.num_layers))
        size = skip_rows(config), config.model_dim
        self.skip_weights = parameter(Role.CONTROL, 1.0, *size)
        self.skip_gates = parameter(Role.CONTROL, 0.0, *size) if config.skip_gates_enabled else None
        self.smear: Any = SmearGate(config.gate_window) if config.smear_gate else None
        self.stream = self.lanes = OneStream()
        # not in the lanes' own hands: files know these by their names
        if config.lanes_split and config.lane_routing == "scalar":
            self.lane_merge = parameter(Role.CONTROL, 0.5)
            self.lanes = ScalarLanes(self.lane_merge)
        elif config.lanes_split:
            self.lane_keep = parameter(Role.CONTROL, 1.1, config.num_layers, 2)
            self.lane_route = parameter(Role.CONTROL, 1.0, config.num_layers, 2, 2)
            self.lanes = RoutedLanes(self.lane_keep, self.lane_route)
        self.rotary = functools.partial(
            rotary_tables, dims=config.rope_dims or config.head_dim, base=config.rope_base,
            train_len=train_len or config.train_seq_len, like=self.tok_emb.weight)
        # worked out here, not in every kernel that needs them: of all lengths that a run has
        lengths, _ = zip(*config.seq_stages)
        self.tables = {length: self.rotary(length) for length in (
            config.train_seq_len, config.eval_seq_len, *lengths, train_len) if length}

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Fill every parameter with its start value, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        parameters: Any = self.parameters()
        for p in parameters:
            if callable(p.start):
                p.copy_(p.start(torch.empty(p.shape), generator=generator))
            else:
                p.copy_(torch.tensor(p.start))

    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """Return the normed final hidden state where targets are asked for, (B, S, D)."""
        tokens, lanes, waiting = batch.tokens, self.stream, []
        x0, length = self.tok_emb(tokens), batch.longest or tokens.shape[1]
        value, scales = (None, None) if self.ve is None else self.ve(tokens)
        tables: Any = self.tables[length] if length in self.tables else self.rotary(length)
        cut, begins = None, tokens == BOS_ID
        if batch.segments is not None:
            cut = cut_rows(batch.segments, tokens.shape[1], batch.longest)
            begins = begins | (cut.places == 0)
        # positions count from the segment's start
        places = slice(tokens.shape[1]) if cut is None else cut.places
        tables = tuple(table[places] for table in tables)
        x0 = rms_norm(x0 if self.smear is None else self.smear(x0, begins))
        asked = slice(0 if batch.asked is not None
                      else tokens.shape[1] - batch.targets.shape[1], None)
        here = Pass(batch, x0, tables, cut, value, scales, asked, slice(None))
        streams = lanes.split(x0, here)
        for at, step in enumerate(layout.steps):
            here = here._replace(at=at, kept=asked if step.last else slice(None))
            block: Any = self.blocks[step.layer]
            if step.skip is not None:
                x, *others = streams
                streams = self.blend_skip(step.skip, x, waiting.pop()), *others
            if step.splits:
                lanes, streams = self.lanes, self.lanes.split(streams[0], here)
            streams = lanes.step(block, streams, here)
            if step.saves:
                waiting.append(streams[0])
        hidden = rms_norm(lanes.merge(streams))
        if batch.asked is None:
            return hidden
        return hidden.gather(1, batch.asked[..., None].expand(-1, -1, hidden.shape[-1]))

    def blend_skip(self, row: int, x: Tensor, skip: Tensor) -> Tensor:
        """Return x joined with an encoder output: gated blend, or plain sum where gates are off."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + skip
        gate = torch.sigmoid(self.skip_gates[row].to(x.dtype))
        return gate * x + (1 - gate) * skip

    def head(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the final hidden state (B, S, D) and the head that reads it (V, D)."""
        return self(batch, layout), self.tok_emb.weight

    def logits(self, batch: Batch, layout: Layout) -> Tensor:
        """Return softcapped logits where targets are asked for, (B, S, V), fp32."""
        hidden, head = self.head(batch, layout)
        return softcap_logits(hidden, head, self.softcap, batch.added("head", 0, hidden))

    def token_losses(self, batch: Batch, layout: Layout) -> Tensor:
        """Return the loss in nats of each target (B, S), fp32."""
        hidden, head = self.head(batch, layout)
        added = batch.added("head", 0, hidden)
        return softcap_cross_entropy(
            hidden.flatten(0, 1), head, batch.targets.flatten(), self.softcap,
            None if added is None else added.flatten(0, 1)).view_as(batch.targets)

    def mean_loss(self, batch: Batch, layout: Layout) -> Tensor:
        """Return the mean training loss in nats."""
        return self.token_losses(batch, layout).mean()


# == 6 Optimizer: flat buffers, Muon, AdamW, schedule, average ====================================

# Role -> the settings of its peak learning rate and of its weight decay. Matrices get Muon, the
# others AdamW, all of a role as one flat parameter.
RATES = {Role.EMBED: ("tied_embed_lr", "embed_wd"), Role.MATRIX: ("matrix_lr", "muon_wd"),
         Role.CONTROL: ("scalar_lr", "adam_wd")}
# (a, b, c) of each Newton-Schulz iteration X <- a X + (b P + c P P) X with P = X XT; the last one
# goes on. Sources: K. Jordan's Muon; Polar Express (arXiv 2505.16932), as in PR #1855.
NEWTON_SCHULZ = dict(
    quintic=[(3.4445, -4.7750, 2.0315)],
    polar=[(8.156554524902461, -22.48329292557795, 15.878769915207462),
           (4.042929935166739, -2.808917465908714, 0.5000178451051316),
           (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
           (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
           (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)])


@dataclass(frozen=True)
class Rates:
    """What changes from step to step."""

    lr_multiplier: float
    muon_momentum: float


def schedule(config: Config, step: int, progress: float, since: float = math.inf) -> Rates:
    """Return the rates of a step; `progress` is the share of the run done, by clock or by steps.

    since: steps made at this training length, if it changed. Sources: PR #1471, PR #2014.
    """
    multiplier = 1.0
    if config.warmdown_frac and progress >= 1 - config.warmdown_frac:
        multiplier = max((1 - progress) / config.warmdown_frac, config.min_lr)
    multiplier *= min(1.0, (since + 1) / max(1, config.seq_change_warmup_steps))
    warmed = config.muon_warmup.done(step, progress)
    momentum = (1 - warmed) * config.muon_momentum_warmup_start + warmed * config.muon_momentum
    return Rates(multiplier, momentum)


def partition(model: nn.Module) -> dict[Role, list[nn.Parameter]]:
    """Return every parameter under its role; raises AssertionError if one has none."""
    groups: dict[Role, list[nn.Parameter]] = {role: [] for role in Role}
    for p in model.parameters():
        role = getattr(p, "role", None)
        assert role, "a parameter without owner"
        groups[role].append(p)
    return groups


class Stack(NamedTuple):
    """Parameters of a role that lie side by side in the flat buffer of their dtype.

    Of matrices, all of one shape. at: where each begins.
    """

    params: list[nn.Parameter]
    at: list[int]
    span: slice


def room(p: nn.Parameter) -> int:
    """Return the elements set aside for `p`: its own, rounded up to a multiple of 64."""
    return -(-p.numel() // 64) * 64


def lay_out(groups: dict[Role, list[nn.Parameter]], shares: int) -> list[Stack]:
    """Return where every parameter lies: embeddings, matrices by shape, controls.

    The number of matrices of a shape is rounded up to a multiple of `shares`.
    """
    shapes: dict[Any, list] = {}
    for p in sorted(groups[Role.MATRIX], key=lambda p: p.shape):
        shapes.setdefault(p.shape, []).append(p)
    stacks, ends = [], Counter()  # where each dtype's buffer ends so far
    for params in (groups[Role.EMBED], *shapes.values(), groups[Role.CONTROL]):
        dtype = params[0].dtype
        start, *at, end = itertools.accumulate(map(room, params), initial=ends[dtype])
        if params[0].role is Role.MATRIX:
            end += -len(params) % shares * room(params[0])
        stacks.append(Stack(params, [start, *at], slice(start, end)))
        ends[dtype] = end
    return stacks


class Bank:
    """All parameters and gradients in one flat buffer per dtype; parameters are views into it.

    Clipping and averaging then are one operation per buffer, same-shape matrices are one
    (N, R, C) tensor, and AdamW sees one flat parameter per role. The gaps hold zeros.
    """

    def __init__(self, groups: dict[Role, list[nn.Parameter]], shares: int = 1):
        stacks = lay_out(groups, shares)
        ends = {stack.params[0].dtype: stack.span.stop for stack in stacks}
        self.weights = {dtype: torch.zeros(end, dtype=dtype, device=stacks[0].params[0].device)
                        for dtype, end in ends.items()}
        self.grads = {dtype: torch.zeros_like(flat) for dtype, flat in self.weights.items()}
        self.offsets, self.matrices = {}, []
        self.adam: dict[Role, Any] = {}
        for params, at, span in stacks:
            self.offsets.update(zip(params, at))
            for p in params:
                view = self.view(self.weights, p)
                view.copy_(p.data)
                p.data, p.grad = view, self.view(self.grads, p)
            first: Any = params[0]
            weights, grads = self.weights[first.dtype][span], self.grads[first.dtype][span]
            if first.role is Role.MATRIX:  # weights (N, R, C), gradients (N, room), how many
                weights, grads = (flat.view(-1, room(first)) for flat in (weights, grads))
                self.matrices.append((as_matrices(weights, first.shape), grads, len(params)))
            else:
                self.adam[first.role] = whole = nn.Parameter(weights)
                whole.grad = grads

    def view(self, buffers, p: nn.Parameter) -> Tensor:
        """Return the part of `buffers` (weights, grads, an average of them) that belongs to `p`."""
        return buffers[p.dtype][self.offsets[p]:][:p.numel()].view(p.shape)


def as_matrices(rows: Tensor, shape) -> Tensor:
    """Return rows (N, room) as the matrices (N, R, C) they begin with."""
    return rows[:, :math.prod(shape)].unflatten(1, shape)


def newton_schulz(g_NRC: Tensor, coefficients, dtype) -> Tensor:
    """Return nearly orthogonal matrices (N, R, C) with the row and column spaces of g.

    coefficients: (a, b, c) of each iteration. Source: K. Jordan's Muon.
    """
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    x = (g_NRC.mT if tall else g_NRC).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        p = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(p, p, p, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizers:
    """Muon on the matrices, AdamW on embeddings and on control tensors, over one Bank.

    Of each shape a rank owns an equal run of matrices: it alone receives their summed gradients,
    holds their momenta and orthogonalises them; the updates are then gathered while AdamW works.
    """

    def __init__(self, model: nn.Module, config: Config, runtime: Runtime):
        self.runtime, self.clip_norm = runtime, config.grad_clip_norm
        self.bank = Bank(partition(model), runtime.world_size)
        self.momenta = [weights.new_zeros(len(weights) // runtime.world_size, *weights.shape[1:])
                        for weights, *_ in self.bank.matrices]
        rates = {role: [getattr(config, name) for name in names] for role, names in RATES.items()}
        self.muon_lr, self.muon_decay = rates[Role.MATRIX]
        table, steps = NEWTON_SCHULZ[config.ns_coefficients], config.muon_backend_steps
        self.iterations = (table + table[-1:] * steps)[:steps]
        groups = [dict(params=[p], lr=rates[role][0], peak_lr=rates[role][0],
                       weight_decay=rates[role][1]) for role, p in self.bank.adam.items()]
        self.adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2),
                                       eps=config.adam_eps, fused=runtime.device.type == "cuda")

    def reduce_and_clip(self) -> Tensor:
        """Average gradients over the ranks and scale them to a global norm of GRAD_CLIP_NORM.

        Returns the norm before scaling, on the device. Of the matrices, only what this rank owns.
        """
        started = [self.runtime.scatter_sum(grads) for _, grads, _ in self.bank.matrices]
        shared = [self.runtime.sum_(p.grad) for p in self.bank.adam.values()]
        self.owned = [wait() for wait in started]  # (N, room)
        # by the 64: on a CPU the norm of a long vector is up to 2e-3 low
        squares = [torch.stack([g.float().unflatten(-1, (-1, 64)).norm(dim=-1).square().sum()
                                for g in part]).sum() for part in (self.owned, shared)]
        norm = (self.runtime.sum_(squares[0]) + squares[1]).sqrt() / self.runtime.world_size
        factor = torch.ones_like(norm)
        if self.clip_norm:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for part in (*self.owned, *shared):
            part.mul_(factor / self.runtime.world_size)
        return norm

    @torch.no_grad()
    def step(self, rates: Rates):
        """Apply one update from the reduced gradients."""
        lr, beta = self.muon_lr * rates.lr_multiplier, rates.muon_momentum
        started = [self.runtime.gather_rows(
            self.muon_update(as_matrices(grads, momentum.shape[1:]), momentum, beta))
            for grads, momentum in zip(self.owned, self.momenta)]
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * rates.lr_multiplier
        self.adamw.step()
        for (weights, *_), wait in zip(self.bank.matrices, started):
            weights.mul_(1 - lr * self.muon_decay).add_(wait(), alpha=-lr)

    def muon_update(self, grads: Tensor, momentum: Tensor, beta: float) -> Tensor:
        """Return updates (N, R, C): Nesterov, rows normalised (MuonEq-R), orthogonalised."""
        momentum.mul_(beta).add_(grads)
        direction = torch.add(grads, momentum, alpha=beta)
        direction /= direction.norm(dim=2, keepdim=True).clamp_min(1e-7)
        out = newton_schulz(direction, self.iterations, self.runtime.compute_dtype)
        return out * max(1.0, grads.shape[1] / grads.shape[2]) ** 0.5

    def tensors(self) -> dict[str, Tensor]:
        """Return all momenta by name, whatever the number of ranks; every rank must call it."""
        found = {f"momentum.{i}": self.runtime.gather_rows(momentum)()[:count] for i, (
            momentum, (*_, count)) in enumerate(zip(self.momenta, self.bank.matrices))}
        for role, p in self.bank.adam.items():
            for key, value in self.adamw.state[p].items():
                found[f"adam.{role.value}.{key}"] = value.float()
        return found

    def load(self, tensors: dict[str, Tensor]):
        """Take over momenta as `tensors` gave them."""
        for i, momentum in enumerate(self.momenta):
            mine = tensors[f"momentum.{i}"][self.runtime.rank * len(momentum):][:len(momentum)]
            momentum.zero_()[:len(mine)].copy_(mine)
        if not any(name.startswith("adam.") for name in tensors):
            return  # before the first step AdamW has none
        for role, p in self.bank.adam.items():
            kinds = {"step": torch.float32, "exp_avg": p.dtype, "exp_avg_sq": p.dtype}
            self.adamw.state[p] = {key: tensors[f"adam.{role.value}.{key}"].to(p.device, dtype)
                                   for key, dtype in kinds.items()}

    def reset(self):
        """Forget all momenta and gradients, as if no step had been made."""
        self.adamw.state.clear()
        for tensor in (*self.momenta, *self.bank.grads.values()):
            tensor.zero_()


class Average:
    """Exponential moving average of every weight, fp32, from the weights at its construction on."""

    def __init__(self, bank: Bank, config: Config):
        self.bank, self.decay = bank, config.ema_decay
        self.shadow = {dtype: flat.float().clone() for dtype, flat in bank.weights.items()}

    @torch.no_grad()
    def update(self):
        for dtype, flat in self.bank.weights.items():
            self.shadow[dtype].lerp_(flat.float(), 1 - self.decay)

    @torch.no_grad()
    def apply(self):
        """Put the averaged weights into the model."""
        for dtype, flat in self.bank.weights.items():
            flat.copy_(self.shadow[dtype])


# == 7 Quantize: steps, GPTQ, the budget ==========================================================

GPTQ_DAMP, GPTQ_BLOCK = 0.01, 128
INT8_MAX_CODE = 127
# The search's range: below 0.35 int6 rows would clip at 4.5 standard deviations.
MULTIPLIER_RANGE = (0.35, 4.0)


class QuantSpec(NamedTuple):
    """How matrices of one kind become codes: range +-max_code, radius of k row stds, least step.

    power: of Fisher information in their rows' steps.
    """

    max_code: int
    k: float
    floor: float
    gptq: bool
    power: float = 1.0


def clip_radius(w_NRC: Tensor, spec: QuantSpec, multiplier: float) -> Tensor:
    """Return the clip radius (N, R), fp32, in weight units: multiplier * k stds of the row."""
    return (multiplier * spec.k * w_NRC.float().std(dim=2)).clamp_min(1e-6)


def step_sizes(radius_NR: Tensor, spec: QuantSpec) -> Tensor:
    """Return steps (N, R), fp32, in weight units: the radius spans the code range, or the floor.

    Raises ValueError on a step that fp16, in which steps are stored, cannot hold. Source: PR #1394.
    """
    # a row of zeros has no radius that fp16 could hold: the least fp16 number keeps it divisible
    steps = (radius_NR / spec.max_code).clamp_min(max(spec.floor, 2.0 ** -24))
    if not torch.isfinite(steps.half()).all():
        raise ValueError("weights are not finite or too large for fp16 steps: training diverged; "
                         "lower the learning rates")
    return steps


def round_to_nearest(w_NRC: Tensor, radius_NR: Tensor, steps_NR: Tensor, max_code: int) -> Tensor:
    """Return codes (N, R, C) int8, each weight clipped to its row's radius and rounded alone."""
    clipped = w_NRC.clamp(-radius_NR[:, :, None], radius_NR[:, :, None])
    return (clipped / steps_NR[:, :, None]).round().clamp(-max_code, max_code).to(torch.int8)


class Factors(NamedTuple):
    """What GPTQ needs of Hessians (N, C, C).

    The order of columns, the upper Cholesky factor of the inverse, which inputs never act, and
    the damping used.
    """

    order_NC: Tensor
    upper_NCC: Tensor
    dead_NC: Tensor
    damp_N: Tensor


def factor_hessians(hessian_NCC: Tensor, ordered: bool = True) -> Factors:
    """Return factors of Hessians, columns by descending diagonal, damped by 1 % of its mean.

    ordered False: columns stay where they are. Worked out in float64, returned in the Hessians'
    dtype. Damping rises tenfold for a matrix that is not positive definite; raises ValueError after
    100 %.
    Source: GPTQ (arXiv 2210.17323) with act-order.
    """
    hessian = hessian_NCC.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1.0)
    mean = diagonal.mean(dim=1, keepdim=True)
    damp = torch.full_like(mean, GPTQ_DAMP)
    diagonal.add_(damp * mean)
    # equal keys keep their places
    order = (diagonal * ordered).argsort(dim=1, descending=True, stable=True)
    hessian = hessian.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    while True:
        lower, info = torch.linalg.cholesky_ex(hessian.flip(1, 2))
        failed = info > 0
        finite = torch.isfinite(hessian).all()
        if finite and not failed.any():
            break
        if damp.max() > 0.99 or not finite:
            raise ValueError("calibration Hessian is not positive definite even when damped: "
                             "statistics are damaged or not finite; calibrate again")
        extra = torch.where(failed[:, None], 9 * damp, 0.0)
        hessian.diagonal(dim1=1, dim2=2).add_(extra * mean)
        damp += extra
    # from behind, H = R RT with R upper: its inverse is the upper factor of H^-1
    one = torch.eye(hessian.shape[1]).to(hessian)
    upper = torch.linalg.solve_triangular(lower.flip(1, 2), one, upper=True)
    return Factors(order, upper.to(hessian_NCC.dtype), dead, damp[:, 0])


OCTAVE = 8  # codes per doubling of a step: at most 4.4 % from the one meant, a loss of second order
LEAST_FISHER = 1e-3  # of a tensor's mean: rows that calibration hardly met are not thrown away
LARGEST_CODE = 120  # at a row's largest weight: leaves GPTQ's feedback room below 127


def steps_from_codes(codes: Tensor) -> Tensor:
    """Return 2 ** (codes / OCTAVE), fp32: read from one table, so alike on every machine."""
    table = torch.tensor([2.0 ** (code / OCTAVE) for code in range(-128, 128)])
    return table.to(codes.device)[codes.long() + 128]


def sensitive_steps(fisher_NR: Tensor, factors: Factors, row_power: float, column_power: float):
    """Return log2 of row steps (N, R) and of column steps (N, C) that equalise expected loss.

    fisher: mean squared gradient of each row's output. An error e in column c of row r costs
    fisher_r (e / d_c)^2 with d the diagonal of the inverse Hessian's factor; the bits of a row are
    best spent with steps ~ fisher^(-1/2) d (reverse water-filling). row_power: 0 keeps only a
    tensor's mean; column_power: share of d that columns follow, the rest is in the rows.
    """
    spread = factors.upper_NCC.diagonal(dim1=1, dim2=2).gather(1, factors.order_NC.argsort(1))
    spread = spread.double().log2()
    level = spread.mean(dim=1, keepdim=True)
    fisher = fisher_NR.double()
    mean = fisher.mean(dim=1, keepdim=True).clamp_min(1e-30)
    share = (fisher / mean + LEAST_FISHER).log2()
    return level - 0.5 * (mean.log2() + row_power * share), column_power * (spread - level)


def couple_rows(outputs_NRR: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an error in each row costs (N, R) once later rows answer, and answers (N, R, R).

    outputs: mean g gT of the gradients of a matrix's outputs. By the Kronecker factors of the
    Fisher information, an error E costs tr(outputs E inputs ET): GPTQ's feedback from column to
    column has a twin from row to row. answers[n, r, s] times an error in row s is what row r takes
    off (1 if r is s); three rows are coded at once: only rows below them answer. Sources: K-FAC
    (arXiv 1503.05671), two-sided feedback as in YAQA (arXiv 2505.22988).
    """
    # gradients are small: a row without any counts as 1, as a dead input does, against a mean of 1
    outputs = outputs_NRR.double()
    scale = outputs.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)[:, None]
    factors = factor_hessians(outputs / scale[:, None], ordered=False)
    count, rows = factors.dead_NC.shape
    upper = torch.eye(rows + -rows % 3).to(scale).repeat(count, 1, 1)
    upper[:, :rows, :rows] = factors.upper_NCC
    threes = upper.unfold(1, 3, 3).unfold(2, 3, 3).diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)
    inverse = torch.linalg.inv(threes)
    cost = inverse.square().sum(3).flatten(1)[:, :rows]
    answers = (inverse @ upper.unflatten(1, (-1, 3))).flatten(1, 2)[:, :rows, :rows].mT
    cost = (scale * cost).masked_fill(factors.dead_NC, 0.0)
    return cost.to(outputs_NRR.dtype), answers.to(outputs_NRR.dtype)


# Dependent codes. A state, moved by the parity of each code down a column, says whether the next
# code counts whole levels or those between (a code k is k or k - 1/2), so levels lie twice as dense
# as the steps of one code. In any three codes exactly one path leads from each state to each other.
# A path is a whole column.
TRELLIS = torch.tensor([[0, 2], [2, 0], [4, 6], [6, 4], [5, 7], [7, 5], [1, 3], [3, 1]])


def couples(rows: int, columns: int) -> bool:
    """Return whether a matrix's rows are coupled: where they are more than columns, little is won.

    Measured: 0.3 dB for the MLP's first matrix, 0.6 to 1.6 dB for the others, at a step a row.
    """
    return rows <= columns


def trellis_paths() -> Tensor:
    """Return which subset of levels the three codes between two states are of, (3, 8 to, 8 from).

    Subset 2 h + p holds the codes of parity p counted in states of kind h = state // 4.
    """
    paths = torch.empty(3, 8, 8, dtype=torch.int64)
    for origin, *parities in itertools.product(range(8), (0, 1), (0, 1), (0, 1)):
        state, subsets = origin, []
        for parity in parities:
            subsets.append(2 * (state // 4) + parity)
            state = int(TRELLIS[state, parity])
        paths[:, state, origin] = torch.tensor(subsets)
    return paths


CODING = 2  # raised whenever codes come to mean other weights
UNCOUPLED = torch.empty(0)  # answers of rows that are not coupled
SPAN = 48  # rows coded before the span above is decided: 0.5 % more error than no limit; 24: 1.9 %


@functools.cache  # a copy to a GPU would wait for it
def trellis_tables(origins: int, device, dtype) -> tuple[Tensor, Tensor]:
    """Return which of (3 rows, 4 subsets, origins) ways between states take, (3, 8 to * 8 from).

    Then by how much each subset's levels are off even numbers. origins: 8 where each state has aims
    of its own, 1 where all share them.
    """
    choices = origins * trellis_paths() + torch.arange(8) % origins
    choices = (choices + 4 * origins * torch.arange(3)[:, None, None]).flatten(1)
    offset = torch.tensor([0.0, 1.0, -0.5, 0.5]).view(4, 1, 1, 1)
    return choices.to(device), offset.to(device, dtype)


def best_paths(aims: Tensor, total: Tensor, live: Tensor, inner: Tensor | None):
    """Return levels and errors (2, L, 8, P, N) of the best way to each state, its cost, its origin.

    Through L rows, of P pairs of a column and a span and N matrices (see TrellisWave). aims (L, 8
    or 1, P, N): what codes stand for, in steps, by the state a path comes from; total (8, P, N):
    what it has cost so far; live (L, 1, 1, P, 1): 0 where a row counts nothing. inner (L, L, P, N):
    answers within the rows; as aims depend on the errors above, each state carries on its own
    (per-survivor processing; R. Raheli, A. Polydoros, C. Tzou, IEEE Trans. Comm. 1995). Viterbi's
    algorithm, three codes at a time. Sources: trellis-coded quantisation (M. Marcellin,
    T. Fischer, IEEE Trans. Comm. 1990), Ungerboeck's 8-state code, the idea of VVC's dependent
    quantisation with levels between the whole ones in place of its doubled zero.
    """
    choices, offset = trellis_tables(aims.shape[1], aims.device, aims.dtype)
    every = torch.arange(8, device=aims.device)[:, None, None]
    turns, ways = [], []
    for row in range(0, len(aims), 3):
        aim, aims = aims[:3, None], aims[3:]
        nearest = aim.clamp(2 - INT8_MAX_CODE, INT8_MAX_CODE - 2)
        level = 2 * ((nearest - offset) / 2).round() + offset  # (3, 4 subsets, 8 or 1, P, N)
        error = ((aim - level) * live[row:row + 3]).flatten(0, 2)
        costs = error.square()[choices].sum(0).unflatten(0, (8, 8))
        total, origin = (total + costs).min(1)
        taken = choices[:, 8 * every + origin].flatten(0, 1)
        way = torch.stack([x.gather(0, taken) for x in (level.flatten(0, 2), error)])
        turns.append((origin, way := way.unflatten(1, (3, 8))))
        if inner is not None:
            aims = aims.gather(1, origin.expand(len(aims), -1, -1, -1)) - (
                inner[row + 3:, row:row + 3, None] * way[1]).sum(1)
    state = every.expand_as(total)
    for origin, way in reversed(turns):
        ways.append(way.gather(2, state.expand(2, 3, -1, -1, -1)))
        state = origin.gather(0, state)
    return torch.cat(ways[::-1], dim=1), total, state


class TrellisWave:
    """GPTQ's feedback through columns in which codes depend on each other, and maybe rows.

    A span of a column is coded after the span above, which is decided then, and after the span
    beside it in the column before is decided. So column c codes span s at time 2 c + s, many spans
    at once: P pairs of a span and a column, N matrices. Even spans lie before odd ones and columns
    from the last, so that those of a time are neighbours. Behind the rows is an empty span, which
    decides the last and stands above the first.
    """

    def __init__(self, work_NCR: Tensor, answers_NRR: Tensor | None):
        self.rows = work_NCR.shape[2]
        self.half = (-(-self.rows // SPAN) + 2) // 2
        span = torch.arange(2 * self.half, device=work_NCR.device).view(-1, 2).T.flatten()
        self.order, self.place = span, span.argsort()  # which span lies there; where a span lies
        self.above = self.place[span - 1]
        live = self.in_spans(torch.ones_like(work_NCR[0, 0]))
        self.live = live.T[:, None, None, :, None].contiguous()
        self.answers = None
        if answers_NRR is not None:
            both = self.in_spans(self.in_spans(answers_NRR).permute(0, 2, 3, 1))
            both = both.permute(3, 1, 0, 4, 2)  # (S rows, S columns, N, L rows, L columns)
            self.answers = (  # to errors of spans decided, of the span above, within the span
                both.permute(0, 2, 3, 1, 4).flatten(3).contiguous(),
                both[torch.arange(len(span), device=span.device), self.above],
                both.diagonal(dim1=0, dim2=1).permute(1, 2, 3, 0).contiguous())

    def in_spans(self, x: Tensor) -> Tensor:
        """Return (..., S, L) of (..., R)."""
        padded = F.pad(x, (0, len(self.order) * SPAN - self.rows))
        return padded.unflatten(-1, (-1, SPAN))[..., self.order, :]

    def in_rows(self, x_SCNL: Tensor) -> Tensor:
        """Return (N, C, R), columns from the first."""
        return x_SCNL[self.place].permute(2, 1, 0, 3).flatten(2)[..., :self.rows].flip(1)

    def code(self, work_NCR: Tensor, upper_NCC: Tensor, scale_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels (N, C, R) of columns and what they leave.

        work: in steps of rows; scale: the columns' steps; upper: their part of GPTQ's factor.
        """
        count, columns, _ = work_NCR.shape
        goals = self.in_spans(work_NCR.flip(1)).permute(2, 1, 0, 3)  # (S, C, N, L)
        self.goals, self.levels = goals.contiguous(), torch.zeros_like(goals)
        self.left = goals.new_zeros(len(goals), count, columns, SPAN)
        self.decided = goals.new_zeros(columns, count, len(goals), SPAN)
        self.upper = upper_NCC.flip(1, 2).permute(2, 0, 1)[:, :, None].contiguous()
        self.scale = scale_NC.flip(1).T[..., None]
        # of each column: what the span coded last was to be, its ways by their last states
        self.goal = goals.new_zeros(columns, count, SPAN)
        self.ways = goals.new_zeros(2, SPAN, 8, columns, count)
        self.total = goals.new_full((8, columns, count), math.inf)
        self.total[0] = 0.0
        for diagonal in range(columns - 1, -self.half, -1):
            column, span = max(diagonal, 0), max(-diagonal, 0)
            pairs = min(columns - column, self.half - span)
            for first in (span, self.half + span):
                self.step(slice(first, first + pairs), slice(column, column + pairs))
        return self.in_rows(self.levels), self.in_rows(self.left.transpose(1, 2))

    def step(self, spans: slice, columns: slice):
        """Code pairs of spans and columns, decide the spans above."""
        goal = self.goals[spans, columns].diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # (P, N, L)
        goal = goal - (self.upper[columns] @ self.left[spans])[:, :, 0]
        aims, inner = (goal / self.scale[columns])[..., None], None
        ways = self.ways[..., columns, :]
        if self.answers is not None:
            far, near, inner = self.answers
            aims = aims - far[spans] @ self.decided[columns].flatten(2)[..., None]
            aims, inner = aims - near[spans] @ ways[1].permute(2, 3, 0, 1), inner[:, :, spans]
        found, total, origin = best_paths(aims.permute(2, 3, 0, 1).contiguous(),
                                          self.total[:, columns], self.live[..., spans, :], inner)
        best = total.argmin(0, keepdim=True)
        came = origin.gather(0, best)  # the state in which the span above ends
        level, error = ways.gather(2, came.expand(2, SPAN, -1, -1, -1))[:, :, 0].permute(0, 2, 3, 1)
        above = self.above[spans]
        column = torch.arange(columns.start, columns.stop, device=above.device)
        self.levels[above, column], self.decided[column, :, above] = level, error
        self.left[above, :, column] = self.goal[columns] - level * self.scale[columns]
        self.goal[columns], self.ways[..., columns, :] = goal, found
        self.total[:, columns] = (total - total.gather(0, best)).where(origin == came, math.inf)


def trellis_levels(codes_RC: Tensor) -> Tensor:
    """Return the levels (R, C), fp32, in steps, that int8 codes stand for, a path a column."""
    levels, following = codes_RC.float(), TRELLIS.to(codes_RC.device)
    state = torch.zeros_like(codes_RC[0]).long()
    for row, parity in zip(levels, codes_RC.long() & 1):
        row -= 0.5 * (state >= 4)
        state = following[state, parity]
    return levels


def rounded_columns(work_NCR: Tensor, upper_NCC: Tensor, scale_NC: Tensor, max_code: int):
    """Return levels and what they leave, as `TrellisWave.code` does, of codes rounded alone."""
    left, levels = work_NCR.clone(), torch.empty_like(work_NCR)
    for j in range(left.shape[1]):
        scale = scale_NC[:, j, None]
        levels[:, j] = (left[:, j] / scale).round_().clamp_(-max_code, max_code)
        left[:, j] -= levels[:, j] * scale
        left[:, j + 1:] -= upper_NCC[:, j, j + 1:, None] * left[:, j, None]
    return levels, left


def gptq(w_NRC: Tensor, factors: Factors, steps_NR: Tensor, max_code: int,
         columns_NC: Tensor | None = None, trellis: Tensor | None = None) -> Tensor:
    """Return codes (N, R, C) int8: column by column, each rounding error fed forward to the rest.

    A weight's step is its row's times its column's (1 where none are given). Weights and factors
    share a dtype, in which the feedback runs. Work is laid out (N, C, R), so that a column is
    contiguous. trellis: codes depend on each other down a column, and max_code does not apply; the
    answers of `couple_rows`, by which errors reach the rows below as well, or UNCOUPLED.
    Source: GPTQ (arXiv 2210.17323), blocks of 128 columns.
    """
    order = factors.order_NC[:, :, None]
    upper, steps = factors.upper_NCC, steps_NR.to(w_NRC.dtype)[:, :, None]
    upper = upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]  # what an error of 1 moves
    work = w_NRC.masked_fill(factors.dead_NC[:, None, :], 0.0) / steps
    work = work.transpose(1, 2).take_along_dim(order, 1)
    scale = torch.ones_like(upper[:, 0]) if columns_NC is None else columns_NC.to(w_NRC.dtype)
    scale = scale.gather(1, factors.order_NC)
    code: Any = (functools.partial(rounded_columns, max_code=max_code) if trellis is None else
                 TrellisWave(work, trellis * steps.mT / steps if trellis.numel() else None).code)
    codes = torch.empty_like(work, dtype=torch.int8)
    for start in range(0, work.shape[1], GPTQ_BLOCK):
        at, after = slice(start, start + GPTQ_BLOCK), slice(start + GPTQ_BLOCK, None)
        levels, left = code(work[:, at], upper[:, at, at], scale[:, at])
        codes[:, at] = levels.ceil()  # a level between whole ones is of the code above
        work[:, after] -= upper[:, at, after].transpose(1, 2) @ left
    return codes.take_along_dim(order.argsort(1), 1).transpose(1, 2).contiguous()


def moved_aims(factors: Factors, steps_NR: Tensor, columns_NC: Tensor, answers: Tensor) -> Tensor:
    """Return by how many steps GPTQ's feedback moves what codes stand for, rms (N, R or 1, C).

    Every error on the way counts as one of rounding, a twelfth of a squared step.
    """
    upper, order = factors.upper_NCC, factors.order_NC
    scale = columns_NC.to(upper.dtype).gather(1, order)
    shares = upper * (scale / upper.diagonal(dim1=1, dim2=2))[:, :, None] / scale[:, None]
    moved = (shares.square().sum(1) - 1).gather(1, order.argsort(1))[:, None]
    if answers.numel():
        steps = steps_NR.to(upper.dtype)[:, :, None]
        moved = moved + ((answers * steps.mT / steps).square().sum(2, keepdim=True) - 1)
    return (moved.clamp_min(0.0) / 12).sqrt()


def dequantize(codes: Tensor, steps: Tensor, columns: Any = 1.0, trellis: bool = False) -> Tensor:
    """Return the weights (R, C), fp32, that codes and steps of rows and columns stand for."""
    levels = trellis_levels(codes) if trellis else codes.float()
    return levels * steps[..., None] * columns


def gaussian_bits(step: float, max_code: int) -> float:
    """Return the bits of a unit Gaussian rounded to multiples of `step`, clipped at +-max_code."""
    edges = (np.arange(-max_code, max_code) + 0.5) * step
    shares = np.diff([0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0])
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def fit_budget(estimate_at, pack_at, limit_bytes: int, report) -> tuple[float, bytes]:
    """Return (multiplier, packed bytes): steps whose packed size is at most the limit, and near it.

    estimate_at(multiplier) -> bytes, cheap and falling; pack_at(multiplier) -> bytes object, the
    real coder; report(multiplier, estimate, packed_bytes) is told of each packing. Bisects the
    estimate, corrected by the ratio the real coder showed, then the real sizes once one is over and
    one within the limit, until at most 0.1 % is unused.
    Outside MULTIPLIER_RANGE it returns the nearest end, fitting or not.
    """
    estimates, seen, target = {}, {}, float(limit_bytes)
    for turn in range(60):  # two or three do
        if len(seen) < 2:
            multiplier = solve_estimate(estimate_at, target, estimates)
        else:  # between the nearest sizes found on both sides
            (fine, more), (coarse, best) = seen[False], seen[True]
            share = (len(more) - 0.9996 * limit_bytes) / (len(more) - len(best))
            multiplier = fine * (coarse / fine) ** share
            if turn > 4:  # sizes of tiny models jump about by up to 1 %: look around as well
                multiplier *= 1 + 0.01 * (0.618 * turn % 1 - 0.5)
            estimates[multiplier] = estimate_at(multiplier)
        packed = pack_at(multiplier)
        report(multiplier, estimates[multiplier], len(packed))
        fits, unused = len(packed) <= limit_bytes, limit_bytes - len(packed)
        if multiplier == MULTIPLIER_RANGE[0 if fits else 1] or 0 <= unused <= 0.001 * limit_bytes:
            return multiplier, packed
        if fits not in seen or abs(unused) < abs(limit_bytes - len(seen[fits][1])):
            seen[fits] = multiplier, packed
        target = estimates[multiplier] * 0.9996 * limit_bytes / len(packed)
    return seen.get(True) or (MULTIPLIER_RANGE[1], pack_at(MULTIPLIER_RANGE[1]))


def solve_estimate(estimate_at, target_bytes: float, known: dict[float, float]) -> float:
    """Return the least multiplier, to 0.02 % of the bytes, with an estimate <= `target_bytes`.

    The coarsest multiplier if none has. `known` keeps estimates between calls. Bisection in the
    logarithm, interpolated: bytes fall almost evenly whenever the steps double.
    """
    finest, coarsest = MULTIPLIER_RANGE
    guess = finest
    for turn in range(24):
        for multiplier in (finest, coarsest, guess):
            if multiplier not in known:
                known[multiplier] = estimate_at(multiplier)
        below = min((m for m in known if known[m] <= target_bytes), default=coarsest)
        if below == finest or known[below] > target_bytes or known[below] >= 0.9998 * target_bytes:
            return below
        above = max(m for m in known if known[m] > target_bytes)
        share = (known[above] - 0.9999 * target_bytes) / (known[above] - known[below])
        share = 0.5 if turn % 4 == 3 else min(max(share, 0.02), 0.98)
        guess = above * (below / above) ** share
    return below


# == 8 Coder: codes as bytes and back =============================================================

CLASSES, PER_OCTAVE, LEAST_CLASS = 48, 4, -12  # of codes by their size: 48 quarter octaves
RANS_BITS, RANS_LANES, RANS_LEAST = 14, 1024, 1 << 16


def size_classes(codes_RC: Tensor) -> list[Tensor]:
    """Return the size class of each row (R,) and of each column (C,) of codes, int8.

    A class is the logarithm of a root mean square, quarter octaves; columns relative to the rows.
    """
    squares = codes_RC.double().square()
    rows = squares.mean(1).clamp_min(2.0 ** -6)
    columns = (squares / rows[:, None]).mean(0).clamp_min(2.0 ** -6)
    return [(0.5 * PER_OCTAVE * x.log2()).round().to(torch.int8) for x in (rows, columns)]


def element_classes(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the class 0..CLASSES - 1 of each element, (R * C,) int16: which histogram codes it."""
    both = rows.to(torch.int16)[:, None] + columns.to(torch.int16) - LEAST_CLASS
    return both.clamp(0, CLASSES - 1).flatten()


def class_counts(codes: Tensor, classes: Tensor) -> Tensor:
    """Return how often each code (as code + 128) occurs in each class, (CLASSES, 256)."""
    cells = classes.long() * 256 + (codes.flatten().long() + 128)
    return torch.bincount(cells, minlength=256 * CLASSES).view(CLASSES, 256)


def counted_bytes(counts: Tensor) -> float:
    """Return the bytes an ideal coder needs with one histogram per row of `counts`."""
    counts = counts.double()
    bits = torch.special.entr(counts / counts.sum(-1, keepdim=True).clamp_min(1)).sum(-1)
    return float((bits * counts.sum(-1)).sum() / math.log(2) / 8)


def entropy_bytes(codes: Tensor) -> float:
    """Return the order-0 entropy of int8 codes in bytes: what one ideal histogram coder needs."""
    return counted_bytes(torch.bincount(codes.flatten().int() + 128, minlength=256)[None])


def rans_tables(counts: Tensor) -> np.ndarray:
    """Return frequencies (CLASSES, 256) that sum to 2 ** RANS_BITS where a class is used."""
    whole, tables = 1 << RANS_BITS, np.zeros((CLASSES, 256), np.int64)
    for table, row in zip(tables, counts.numpy()):
        if row.any():
            table[:] = np.maximum(row * whole // row.sum(), row > 0)
            while (over := table.sum() - whole) > 0:  # many rare codes: the commonest pay
                table[table.argmax()] -= min(over, table.max() // 2)
            table[table.argmax()] += whole - table.sum()
    return tables


def rans_lanes(count: int) -> int:
    """Return how many of `count` codes are coded at once."""
    return max(1, min(RANS_LANES, count >> 13))


def rans_cells(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequency and first slot, uint64, of each cell class * 256 + code."""
    starts = np.cumsum(tables, axis=1) - tables
    return tables.ravel().astype(np.uint64), starts.ravel().astype(np.uint64)


def rans_encode(symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray):
    """Return (stream, states), uint16 words: symbols (n,) under their classes' frequencies.

    Interleaved range asymmetric numeral systems, last symbol first. Source: J. Duda,
    arXiv 1311.2540; F. Giesen, arXiv 1402.3392 (interleaving).
    """
    frequencies, starts = rans_cells(tables)
    cells, lanes = classes.astype(np.int64) * 256 + symbols, rans_lanes(len(symbols))
    state, words = np.full(lanes, RANS_LEAST, np.uint64), [np.zeros(0, np.uint16)]
    for at in reversed(range(0, len(cells), lanes)):
        cell = cells[at:at + lanes]
        x, frequency = state[:len(cell)], frequencies[cell]
        full = x >= frequency << 32 - RANS_BITS
        words.append(x[full].astype(np.uint16))
        x = np.where(full, x >> 16, x)
        state[:len(x)] = (x // frequency << RANS_BITS) + x % frequency + starts[cell]
    return np.concatenate(words[::-1]), state.astype("<u4").view("<u2")


def rans_decode(stream: np.ndarray, states: np.ndarray, classes: np.ndarray, tables: np.ndarray):
    """Return the symbols (n,) uint8 that `rans_encode` was given; ValueError on damaged input."""
    lanes, whole, read = rans_lanes(len(classes)), 1 << RANS_BITS, 0
    state = states.view("<u4").astype(np.uint64)
    used = np.unique(classes)
    if (tables < 0).any() or (tables[used].sum(1) != whole).any() or len(state) != lanes:
        raise ValueError("impossible frequencies or states")
    frequencies, starts = rans_cells(tables)
    lookup = np.zeros((CLASSES, whole), np.uint8)
    for k in used:
        lookup[k] = np.repeat(np.arange(256), tables[k])
    symbols, rows = np.empty(len(classes), np.uint8), classes.astype(np.int64)
    for at in range(0, len(rows), lanes):
        row = rows[at:at + lanes]
        x = state[:len(row)]
        slot = x & (whole - 1)
        symbols[at:at + lanes] = symbol = lookup[row, slot]
        cell = row * 256 + symbol
        x = frequencies[cell] * (x >> RANS_BITS) + slot - starts[cell]
        low = np.flatnonzero(x < RANS_LEAST)
        words = stream[read:read + len(low)]
        if len(words) < len(low):
            raise ValueError("the stream of codes ends early")
        x[low] = x[low] << 16 | words
        state[:len(x)], read = x, read + len(low)
    if read != len(stream) or (state != RANS_LEAST).any():
        raise ValueError("the stream of codes does not end where it should")
    return symbols


def encode_codes(codes: Tensor, classes: Tensor, coder: str) -> dict[str, Tensor]:
    """Return codes (n,) int8 as tensors of an artifact, coded by their classes (n,).

    A container coder (brotli, lzma) gets one stream per class, so that each holds like with like.
    """
    if coder != "rans":
        return {f"codes.{k}": codes[classes == k] for k in classes.unique().tolist()}
    tables = rans_tables(class_counts(codes, classes))
    symbols = codes.numpy().view(np.uint8) ^ 128  # code + 128
    stream, states = rans_encode(symbols, classes.numpy(), tables)
    found = dict(tables=tables, states=states, stream=stream)
    return {name: torch.from_numpy(array.astype(np.int16)) for name, array in found.items()}


def decode_codes(tensors: dict[str, Tensor], classes: Tensor, coder: str) -> Tensor:
    """Take an artifact's coded tensors out of `tensors`; return the codes (n,) int8.

    Raises ValueError or KeyError on tensors that `encode_codes` does not make.
    """
    if coder != "rans":
        codes = torch.zeros(len(classes), dtype=torch.int8)
        for k in classes.unique().tolist():
            codes[classes == k] = tensors.pop(f"codes.{k}")
        return codes
    tables, states, stream = (tensors.pop(name).numpy() for name in ("tables", "states", "stream"))
    if any(x.dtype != np.int16 or x.ndim != n for x, n in ((tables, 2), (states, 1), (stream, 1))):
        raise ValueError("tables, states or stream of another form")
    symbols = rans_decode(stream.view(np.uint16), states.view("<u2"), classes.numpy(),
                          tables.reshape(CLASSES, 256).astype(np.int64))
    return torch.from_numpy((symbols ^ 128).view(np.int8))


# == 8b Artifact: which tensor is stored how, the model as bytes and back =========================

CODED = INT6, INT8 = "int6", "int8"  # kinds of codes; other kinds are dtypes


@dataclass(frozen=True)
class Entry:
    """One parameter of a model: its shape, its role, and how it is stored (CODED or a dtype)."""

    shape: tuple[int, ...]
    role: Role
    kind: str

    numel = property(lambda self: math.prod(self.shape))


@functools.cache
def inventory(config: Config) -> dict[str, Entry]:
    """Return every parameter of the model by name, in its order; nothing is allocated."""
    kinds = {Role.EMBED: INT8, Role.MATRIX: INT6, Role.CONTROL: config.control_dtype}
    with torch.device("meta"):
        parameters: Any = GPT(config).named_parameters()
    small = config.fp16_max_numel
    return {name: Entry(tuple(p.shape), p.role, "float16" if p.role is Role.MATRIX
                        and p.numel() <= small else kinds[p.role]) for name, p in parameters}


def coded(config: Config) -> dict[str, Entry]:
    """Return the parameters that become codes."""
    return {name: entry for name, entry in inventory(config).items() if entry.kind in CODED}


def count_parameters(config: Config, *roles: Role) -> int:
    """Return the number of weights of these roles, or of all."""
    return sum(e.numel for e in inventory(config).values() if e.role in (roles or Role))


def weight_forms(config: Config) -> dict:
    """Return name -> (shape, dtype) of the tensors in a file of averaged weights."""
    return {name: (entry.shape, torch.float32) for name, entry in inventory(config).items()}


def quant_specs(c: Config) -> dict[str, QuantSpec]:
    """Return how each kind of codes is made at multiplier 1."""
    return {INT6: QuantSpec(31, c.sdclip_k or 12.85, c.scale_floor, c.gptq_enabled, c.row_power),
            INT8: QuantSpec(INT8_MAX_CODE, c.sdclip_k_embed or 20.0, c.scale_floor_embed,
                            c.gptq_enabled and c.embed_gptq, c.embed_power)}


@dataclass
class Group:
    """Same-shape tensors of a kind that are quantised together.

    factors: of their Hessians, where GPTQ or the step rule needs them. plan: what the step rule
    knows of them before there is a multiplier.
    """

    names: list[str]
    kind: str
    spec: QuantSpec
    w_NRC: Tensor
    factors: Any = None
    plan: Any = None

    def stack(self, known: dict[str, Tensor], kind: str) -> Tensor:
        """Return a statistic of all its tensors as one."""
        return torch.stack([known[kind + name] for name in self.names]).to(self.w_NRC.device)


class ClipSteps:
    """Steps by SDClip: k standard deviations of a row span its codes. Source: PR #1394.

    A step rule says which statistics of the weights it needs, plans a group's steps from them,
    makes codes at a multiplier, and reads back the steps it had stored.
    """

    gradients = False  # does calibration need them
    column_bytes = 0.2  # what a column of codes takes besides its codes, as seen

    def __init__(self, config: Config):
        self.config = config
        self.trellis = self.gradients and config.trellis  # do codes depend on each other

    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each statistic by name: "inputs." mean x xT of a weight's inputs.

        Of the value embedding GPTQ takes PT P of its projection P, as published.
        """
        specs = quant_specs(self.config)
        return {f"inputs.{name}": 2 * entry.shape[1:] for name, entry in coded(self.config).items()
                if specs[entry.kind].gptq and name != VALUE_TABLE}

    def plan(self, groups: list[Group], known: dict[str, Tensor]):
        """Fill the groups' plans."""

    def max_code(self, spec: QuantSpec) -> int:
        return spec.max_code

    def codes(self, group: Group, multiplier: float, solved: bool) -> tuple[Tensor, ...]:
        """Return codes (N, R, C) and what is stored of their steps: of rows, maybe of columns.

        solved False: rounded to nearest, quick and near in size.
        """
        w, spec, most = group.w_NRC, group.spec, group.spec.max_code
        radius = clip_radius(w, spec, multiplier)
        steps = step_sizes(radius, spec)
        stored = steps.half()
        if solved and spec.gptq:
            return gptq(w, group.factors, stored, most), stored
        # int8 tables are rounded against the fp32 step, as published
        return round_to_nearest(w, radius, steps if group.kind == INT8 else stored, most), stored

    def step_forms(self, rows: int, columns: int) -> dict[str, tuple]:
        """Return name -> (shape, dtype) of the steps of so many rows and columns in an artifact."""
        return {"steps": ((rows,), torch.float16)}

    def read_steps(self, stored: dict[str, Tensor], multiplier: float) -> tuple[Tensor, Tensor]:
        """Return the steps of rows and of columns, fp32, from an artifact's tensors."""
        return stored["steps"].float(), torch.ones(len(stored["column_classes"]))


class Plan(NamedTuple):
    """Steps by sensitivity of a Group at multiplier 1.

    answers: of `couple_rows`, where rows are coupled. rows_NR, columns_NC: log2 steps, OCTAVE codes
    a doubling. moved_NRC: of `moved_aims`.
    """

    answers: Tensor
    rows_NR: Tensor
    columns_NC: Tensor
    moved_NRC: Tensor


class FisherSteps(ClipSteps):
    """Steps of rows and columns that equalise the loss expected of rounding; they never clip."""

    gradients, column_bytes = True, 0.6

    def statistics(self):
        """Return shapes: besides "inputs." (x xT), weighted by gradients here, these.

        "fisher." mean squared gradient of each row's output; "outputs." mean g gT of the gradients
        of the outputs of matrices whose rows may be coupled.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, entry in coded(self.config).items():
            rows, columns = entry.shape
            shapes |= {f"fisher.{name}": (rows,), f"inputs.{name}": (columns, columns)}
            if entry.role is Role.MATRIX and couples(rows, columns):
                shapes[f"outputs.{name}"] = rows, rows
        return shapes

    def plan(self, groups, known):
        """Plan steps that are on average those of SDClip's k."""
        ends, offsets, weights = [], 0.0, 0
        for group in groups:
            w, spec, factors = group.w_NRC, group.spec, group.factors
            costs, answers = self.costs(group, known)
            rows, columns = sensitive_steps(costs, factors, spec.power, self.config.column_power)
            usual = (clip_radius(w, spec, 1.0) / spec.max_code).double().log2()
            alive = w.std(dim=2) > 0  # the others need no bits
            offsets += float((usual - rows)[alive].sum()) * w.shape[2]
            weights += int(alive.sum()) * w.shape[2]
            # coupled rows of small weights may have to answer large errors of others
            ends.append((usual - 6, usual + (99 if answers.numel() else 4)))
            moved = moved_aims(factors, 2 ** rows, 2 ** columns, answers)
            columns = (OCTAVE * columns).round().clamp(-127, 127).to(torch.int8)
            group.plan = Plan(answers, rows, columns, moved)
        shift = offsets / max(1, weights)
        for group, (least, most) in zip(groups, ends):
            rows = (OCTAVE * (group.plan.rows_NR + shift).clamp(least, most)).round()
            group.plan = group.plan._replace(rows_NR=rows)

    def costs(self, group: Group, known: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what errors in a group's rows cost, and how rows below answer them."""
        if (self.config.couple_rows and self.trellis and group.spec.gptq
                and couples(*group.w_NRC.shape[1:])
                and all(f"outputs.{name}" in known for name in group.names)):
            return couple_rows(group.stack(known, "outputs."))
        return group.stack(known, "fisher."), UNCOUPLED

    def max_code(self, spec):
        return INT8_MAX_CODE

    def codes(self, group, multiplier, solved):
        """As ClipSteps, but of codes only rounded, noise stands for GPTQ's feedback."""
        w, factors, plan, most = group.w_NRC, group.factors, group.plan, INT8_MAX_CODE
        columns = steps_from_codes(plan.columns_NC)
        largest = (w.abs() / columns[:, None, :]).amax(2) / (LARGEST_CODE * multiplier)
        rows = torch.maximum(plan.rows_NR, (OCTAVE * largest.double().log2()).ceil())
        rows = rows.clamp(-127, 127).to(torch.int8)
        steps = multiplier * steps_from_codes(rows)
        if solved and (group.spec.gptq or self.trellis):
            if not group.spec.gptq:  # no feedback
                factors = factor_hessians(torch.eye(w.shape[2]).to(w).expand_as(factors.upper_NCC))
            codes = gptq(w, factors, steps, most, columns, plan.answers if self.trellis else None)
        else:
            codes = w / steps[:, :, None] / columns[:, None, :]
            if group.spec.gptq:
                random = torch.Generator(w.device).manual_seed(0)
                codes += plan.moved_NRC * torch.randn(w.shape, generator=random, device=w.device)
            codes = codes.round().clamp(-most, most).to(torch.int8)
        return codes, rows, plan.columns_NC

    def step_forms(self, rows, columns):
        return {"steps": ((rows,), torch.int8), "column_steps": ((columns,), torch.int8)}

    def read_steps(self, stored, multiplier):
        rows, columns = stored["steps"], stored["column_steps"]
        return multiplier * steps_from_codes(rows), steps_from_codes(columns)


STEP_RULES = {"fisher": FisherSteps, "sdclip": ClipSteps}
VALUE_TABLE = "ve.table.weight"


class Quantizer:
    """Averaged weights and what is known of them, ready to become codes at any step multiplier.

    weights: name -> fp32 tensor; known: statistics by the names of the step rule (empty without
    calibration). Same-shape tensors of a kind are worked on at once, on `device`.
    """

    def __init__(self, weights: dict[str, Tensor], known: dict, config: Config, device):
        self.weights, self.config, self.memo, self.redamped = weights, config, {}, {}
        self.rule, self.specs = STEP_RULES[config.rule](config), quant_specs(config)
        self.order, self.groups, self.gptq_names, by_form = list(coded(config)), [], [], {}
        for name, entry in coded(config).items():
            by_form.setdefault((entry.kind, entry.shape), []).append(name)
        # of the value embedding, where calibration has none: PT P of its projection P, as published
        projection = weights.get("ve.proj.weight", torch.eye(config.ve_dim))
        known = {f"inputs.{VALUE_TABLE}": projection.T @ projection} | known
        for (kind, _), names in by_form.items():
            w = torch.stack([weights[name] for name in names]).to(device)
            self.groups.append(group := Group(names, kind, self.specs[kind], w))
            self.gptq_names += names if group.spec.gptq else []
            if group.spec.gptq or self.rule.gradients:
                group.factors = factor_hessians(group.stack(known, "inputs."))
                damps = zip(names, group.factors.damp_N.tolist())
                self.redamped.update((name, damp) for name, damp in damps if damp > GPTQ_DAMP)
        self.rule.plan(self.groups, known)

    def codes_at(self, multiplier: float, solved: bool = True) -> dict[str, tuple]:
        """Return name -> (codes (R, C) int8, stored row steps, column steps) at a step multiplier.

        solved: see the step rule. The last result is kept.
        """
        if (multiplier, solved) not in self.memo:
            found = {}
            for group in self.groups:
                parts = [part.cpu() for part in self.rule.codes(group, multiplier, solved)]
                found.update(zip(group.names, zip(*parts)))
            self.memo = {(multiplier, solved): found}
        return self.memo[multiplier, solved]

    def classes_at(self, multiplier: float, solved: bool = True):
        """Return all codes (n,), their classes (n,), and steps and classes by names in a file."""
        codes, *steps = zip(*(self.codes_at(multiplier, solved)[name] for name in self.order))
        rows, columns = zip(*map(size_classes, codes))
        side = dict(zip(("steps", "column_steps"), steps), row_classes=rows, column_classes=columns)
        return (torch.cat([code.flatten() for code in codes]),
                torch.cat([*map(element_classes, rows, columns)]),
                {name: torch.cat(parts) for name, parts in side.items()})

    def tensors_at(self, multiplier: float, solved: bool = True) -> dict[str, Tensor]:
        """Return the artifact's tensors: small ones by name, steps, classes and coded codes.

        solved False: all but the codes.
        """
        tensors = {name: self.weights[name].to(DTYPES[entry.kind])
                   for name, entry in inventory(self.config).items() if entry.kind not in CODED}
        if bad := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
            raise ValueError(f"{', '.join(bad[:3])}: not finite or too large for float16: training "
                             "diverged, or set CONTROL_DTYPE=float32 FP16_MAX_NUMEL=0")
        codes, classes, side = self.classes_at(multiplier, solved)
        coded_codes = encode_codes(codes, classes, self.config.compressor) if solved else {}
        return tensors | side | coded_codes

    def bits(self, multiplier: float, kind: str) -> float:
        """Return the mean order-0 entropy in bits of a code of the given kind."""
        codes = [found[0] for name, found in self.codes_at(multiplier).items()
                 if inventory(self.config)[name].kind == kind]
        return 8 * sum(map(entropy_bytes, codes)) / max(1, sum(c.numel() for c in codes))


def fit_artifact(quantizer: Quantizer, header: dict, limit_bytes: int,
                 report) -> tuple[float, bytes]:
    """Return (multiplier, artifact bytes): searched under the limit, or at 1 where k is given."""
    config, codec = quantizer.config, quantizer.config.codec
    header = {**header, "raw": ["stream"], "coding": CODING}

    def pack_at(multiplier):
        tensors = quantizer.tensors_at(multiplier)
        return pack_tensors({**header, "multiplier": multiplier}, tensors, codec)

    if not config.search_k:
        return 1.0, pack_at(1.0)
    rest = len(pack_tensors(header, quantizer.tensors_at(1.0, solved=False), codec))

    def estimate_at(multiplier):
        return rest + counted_bytes(class_counts(*quantizer.classes_at(multiplier, False)[:2]))

    return fit_budget(estimate_at, pack_at, limit_bytes, report)


def restore_weights(header: dict, tensors: dict[str, Tensor], config: Config, origin) -> dict:
    """Return the fp32 weights by parameter name that an artifact stands for.

    Raises ContainerError where a tensor is missing, extra, or of another shape than the model's,
    and where codes mean something else.
    """
    if header["coding"] != CODING:
        raise ContainerError(f"{origin}: coded by another train_gpt.py; use the one that wrote it")
    rule, codes_of = STEP_RULES[config.rule](config), coded(config)
    rows, columns = ([entry.shape[axis] for entry in codes_of.values()] for axis in (0, 1))
    plain = {name: (entry.shape, DTYPES[entry.kind]) for name, entry in inventory(config).items()
             if name not in codes_of}
    forms = plain | rule.step_forms(sum(rows), sum(columns)) | dict(
        row_classes=((sum(rows),), torch.int8), column_classes=((sum(columns),), torch.int8))
    check_tensors(tensors, forms, origin)
    left = {name: tensor for name, tensor in tensors.items() if name not in forms}
    state = {name: tensors[name].float() for name in plain}
    steps = rule.read_steps(tensors, header["multiplier"])
    classes = [*map(element_classes, tensors["row_classes"].split(rows),
                    tensors["column_classes"].split(columns))]
    try:
        codes = decode_codes(left, torch.cat(classes), config.compressor)
    except (ValueError, LookupError, RuntimeError, TypeError) as error:
        raise ContainerError(f"{origin}: its codes are damaged ({error}); make it again") from None
    parts = codes.split([len(c) for c in classes]), steps[0].split(rows), steps[1].split(columns)
    for (name, entry), code, step, column in zip(codes_of.items(), *parts):
        state[name] = dequantize(code.view(entry.shape), step, column, rule.trellis)
    for name, weight in state.items():
        if not torch.isfinite(weight).all():
            raise ContainerError(f"{origin}: {name} holds values that are not finite")
    check_no_more(left, origin)
    return state


def calibration_of(config: Config, origin: Path) -> dict[str, Tensor]:
    """Return the statistics in a file; raises ConfigError unless they serve the step rule."""
    _, means = read_tensors(origin, "stats")
    if lacking := [name for name in STEP_RULES[config.rule](config).statistics()
                   if name not in means]:
        raise ConfigError([f"{origin}: lacks {', '.join(lacking[:3])}: made with another version, "
                           "STEP_RULE, EMBED_GPTQ or FP16_MAX_NUMEL; use those or calibrate"])
    # those of steps by sensitivity are all there are; they serve the other rules as well
    every = FisherSteps(config).statistics()
    check_tensors(means, {name: (shape, torch.float32) for name, shape in every.items()
                          if name in means}, origin)
    return means


def fitting_parameters(config: Config, artifact_bytes: int, limit_bytes: int) -> int:
    """Return how many parameters would fit the limit at the bytes a parameter takes here."""
    return int(count_parameters(config) * max(0, limit_bytes) / artifact_bytes)


def predict_artifact_bytes(config: Config, code_bytes: int) -> tuple[int, str]:
    """Return (code + artifact bytes, remark) as expected for Gaussian weight rows, untrained."""
    # bytes of the header, tables and states; of a column of codes, a row has 1.3; all as seen
    fixed, specs, rule = 2500, quant_specs(config), STEP_RULES[config.rule](config)
    weights: Counter = Counter()
    for entry in inventory(config).values():
        weights[entry.kind] += entry.numel
        if entry.kind in specs:
            fixed += int(1.3 * entry.shape[0] + rule.column_bytes * entry.shape[1])
        else:
            fixed += entry.numel * DTYPES[entry.kind].itemsize

    overhead = {"rans": 1.001, "brotli": 1.012, "lzma": 1.05}[config.compressor]  # as seen

    def total(multiplier):
        bits = sum(weights[kind] * gaussian_bits(multiplier * s.k / s.max_code, rule.max_code(s))
                   for kind, s in specs.items())
        return code_bytes + fixed + int(bits / 8 * overhead)

    if not config.search_k:
        smaller = "; the scale floor makes it smaller" * any(s.floor for s in specs.values())
        return total(1.0), f"at the given k{smaller}"
    limit, (finest, coarsest) = config.artifact_max_bytes, map(total, MULTIPLIER_RANGE)
    if coarsest > limit:
        fitting = fitting_parameters(config, coarsest - code_bytes, limit - code_bytes)
        return coarsest, (f"does not fit at the coarsest steps: a model of about {fitting} "
                          "parameters would, or set a larger ARTIFACT_MAX_BYTES")
    if finest < limit:
        return finest, f"{limit - finest} bytes of the budget stay unused at the finest steps"
    return int(0.9995 * limit), "the search fills the budget"


# == 9 Evaluate: windows and the score ============================================================

@dataclass(frozen=True)
class Score:
    """Sums over scored targets: nats (natural-log loss), tokens, bytes."""

    nats: float
    tokens: int
    bytes: int

    loss = property(lambda self: self.nats / self.tokens)
    bpb = property(lambda self: self.nats / math.log(2) / self.bytes)


def plan_windows(num_targets: int, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, first scored position inside each window): each target is scored once.

    Window 0 scores all it holds, each later one its positions from seq_len - stride on; the last
    may run past the end and is padded there. stride = seq_len: windows do not overlap.
    """
    starts = np.arange(0, max(num_targets - (seq_len - stride), 1), stride)
    return starts, np.where(starts == 0, 0, seq_len - stride)


def plan_documents(begins: np.ndarray, num_targets: int, length: int, stride: int):
    """Return (starts, first scored positions, ends) of windows over documents that start at begins.

    Each document is read as `plan_windows` reads a text; no window reaches past its document.
    """
    sizes = np.diff(begins, append=num_targets)
    plans = [plan_windows(size, length, stride) for size in sizes.tolist()]
    starts, firsts = (np.concatenate(parts) for parts in zip(*plans))
    counts = [len(at) for at, _ in plans]
    starts, ends = starts + np.repeat(begins, counts), np.repeat(begins + sizes, counts)
    return starts, firsts, np.minimum(starts + length, ends)


class Reading(NamedTuple):
    """One forward of a plan: which targets its rows (B, T) ask for, and what lies in which row.

    The row of a window begins at its start; a packed row holds several windows, one after another.
    """

    starts: np.ndarray  # of the windows
    ends: np.ndarray
    first: int = 0  # first scored position of each row
    packed: bool = False  # all windows in one row


def plan_readings(text: Validation, windows: tuple, runtime: Runtime) -> list[Reading]:
    """Return this rank's part of a plan; windows: as Windows.

    All forwards of one kind have one shape where they are compiled.
    """
    return group_windows(plan_text(text, windows), windows, runtime)


def plan_text(text: Validation, windows: tuple):
    """Return (starts, first scored positions, ends) of all windows over a text, as arrays."""
    length, stride, _, by_documents = Windows(*windows)
    begins = document_starts(text.tokens[:-1]) if by_documents else np.zeros(1, np.int64)
    return plan_documents(begins, len(text.target_bytes), length, stride)


def group_windows(plan: tuple, windows: tuple, runtime: Runtime) -> list[Reading]:
    """Return this rank's part of windows (starts, first scored positions, ends), in forwards."""
    (length, _, batch, by_documents), readings = Windows(*windows), []
    at, end = (len(plan[0]) * i // runtime.world_size for i in (runtime.rank, runtime.rank + 1))
    starts, firsts, ends = (part[at:end] for part in plan)
    for first in np.unique(firsts).tolist():
        mine = firsts == first
        if first == 0 and by_documents:  # as many windows a row as there is room for
            sizes, begin, used = (ends - starts)[mine].tolist(), 0, 0
            for i, size in enumerate([*sizes, math.inf]):
                if used + size > batch * length:
                    some = slice(begin, i)
                    readings.append(Reading(starts[mine][some], ends[mine][some], 0, True))
                    begin, used = i, 0
                used += size
        else:
            readings += [Reading(starts[mine][i:i + batch], ends[mine][i:i + batch], first)
                         for i in range(0, mine.sum(), batch)]
    return readings


def read_batch(text: Validation, reading: Reading, windows: tuple, runtime: Runtime) -> Batch:
    """Return the Batch of a reading, cut out of the text on the device.

    Rows are filled up with what counts nothing, compiled batches to their one shape as well.
    """
    length, _, batch, _ = Windows(*windows)
    (starts, ends, first, packed), tokens = reading, on_device(text, runtime.device)[0]
    sizes, segments = ends - starts, None
    if packed:
        used = sizes.sum()
        width = batch * length if runtime.compiles else used
        begins = np.cumsum(sizes) - sizes
        row = np.pad(np.arange(used) + np.repeat(starts - begins, sizes), (0, width - used),
                     constant_values=-1)
        where = torch.from_numpy(row[None]).to(runtime.device)
        begins = np.append(begins, np.arange(used, width, length))  # the fill is cut as well
        segments = filled([begins], width, runtime.compiles).to(runtime.device)
    else:
        fill = 0, (batch if runtime.compiles else len(starts)) - len(starts)
        at, held = (torch.from_numpy(np.pad(x, fill)).to(runtime.device)[:, None]
                    for x in (starts, sizes))
        place = torch.arange(length, device=runtime.device)
        where = (at + place).masked_fill(place >= held, -1)
    read, places = tokens[where.clamp_min(0)].long() & 0xFFFF, where[:, first:]
    return Batch(read * (where >= 0), tokens[places + 1].long() & 0xFFFF, places, segments,
                 length if packed else 0)


STRETCH_TOKENS = 1 << 18  # of forwards between two notes in the journal: what a kill may cost


def score(losses_of, text: Validation, windows: tuple, runtime: Runtime,
          progress=None, journal=None) -> Score:
    """Return the Score of a text. windows: as Windows.

    losses_of(batch) -> nats (B, S) of its targets. Sums are float64, one for each unit of work, a
    stretch of forwards. journal: mapping of a unit to its nats, targets and bytes; what it holds
    is not computed again.
    """
    journal = {} if journal is None else journal
    readings, (length, _, batch, _) = plan_readings(text, windows, runtime), Windows(*windows)
    sums, since = torch.zeros(3, dtype=torch.float64), time.perf_counter()
    sizes = on_device(text, runtime.device)[1]
    at_once = max(1, STRETCH_TOKENS // (batch * length))
    with torch.inference_mode():
        for unit, at in enumerate(range(0, len(readings), at_once)):
            if unit not in journal:
                batches = [read_batch(text, reading, windows, runtime)
                           for reading in readings[at:at + at_once]]
                journal[unit] = add_up([(losses_of(one), one.places) for one in batches], sizes)
            sums += torch.tensor(journal[unit], dtype=torch.float64)
            if progress:
                progress(min(at + at_once, len(readings)), len(readings), since)
    return total_score(sums, runtime)


def total_score(sums: Tensor, runtime: Runtime) -> Score:
    """Return the Score of all ranks' nats, targets and bytes (3,), float64."""
    nats, *counts = runtime.sum_(sums).tolist()
    return Score(nats, *map(int, counts))


def add_up(scored: list[tuple[Tensor, Tensor]], target_bytes: Tensor) -> list:
    """Return [nats, targets, bytes] of what counts among losses (B, S) at places (B, S)."""
    sums = [(losses.double().masked_fill(places < 0, 0.0).sum(), (places >= 0).sum(),
             (target_bytes[places.clamp_min(0)].long() & 0xFFFF).masked_fill(places < 0, 0).sum())
            for losses, places in scored]
    return [torch.stack(parts).sum().item() for parts in zip(*sums)]


# == 9b Adapt: test-time training, each score before the step that learns from it ================

class Documents(NamedTuple):
    """Documents that adapt side by side: where each begins, and how many targets it has."""

    begins: np.ndarray
    sizes: np.ndarray


class Pace:
    """Keeps test-time training within TTT_MAX_SECONDS.

    Before it starts, chunks grow by factors of two until the time foretold fits; should the
    machine slow down after that, what is left is scored without learning.
    """

    def __init__(self, limit_seconds: float, now=time.perf_counter):
        self.limit_seconds, self.now, self.began = limit_seconds or math.inf, now, now()
        self.growth, self.foretold_seconds = 1, 0.0

    def fit(self, tokens_at, tokens_per_second: float):
        """Choose the growth while it helps; tokens_at(growth) -> tokens of the slowest rank."""
        tokens, most = tokens_at(1), self.limit_seconds * tokens_per_second
        while tokens > most and (fewer := tokens_at(2 * self.growth)) < tokens:
            tokens, self.growth = fewer, 2 * self.growth
        self.foretold_seconds, self.began = tokens / tokens_per_second, self.now()

    def late(self) -> bool:
        return self.now() - self.began > self.limit_seconds


def deal(costs: list[int], ranks: int) -> list[list[int]]:
    """Return which units each rank does: the costliest one left goes to the least laden rank."""
    load, dealt = [0] * ranks, [[] for _ in range(ranks)]
    for unit in sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit)):
        rank = load.index(min(load))
        load[rank] += costs[unit]
        dealt[rank].append(unit)
    return dealt


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Test-time training of a model on the text that it is scored on.

    By construction one function adds a loss to the score and only then lets it be learned from.
    """

    model: GPT
    layout: Layout
    text: Validation
    config: Config
    runtime: Runtime

    # both on the device, whichever text was scored last
    tokens = property(lambda self: on_device(self.text, self.runtime.device)[0])
    target_bytes = property(lambda self: on_device(self.text, self.runtime.device)[1])

    def by_stream(self, progress) -> Score:
        """Return the Score of chunks of the text, each scored, then learned by SGD: TTT=sgd.

        A chunk is scored by the windows whose first scored position lies in it; then all weights
        make TTT_EPOCHS passes over its whole sequences, every target of which has been scored.
        Source: PR #549.
        """
        config, runtime, size = self.config, self.runtime, self.config.ttt_chunk_tokens
        windows = config.sliding_windows._replace(batch=config.ttt_batch_seqs)
        plan = plan_text(self.text, windows)
        chunks = -(-len(self.text.target_bytes) // size)
        bounds = np.searchsorted(plan[0] + plan[1], np.arange(chunks + 1) * size)
        blocks: Any = self.model.blocks[:config.ttt_freeze_blocks]
        blocks.requires_grad_(False)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, config.ttt_rate, config.ttt_momentum)
        sums, since = torch.zeros(3, dtype=torch.float64), time.perf_counter()
        pace = Pace(config.ttt_max_seconds)
        for chunk in range(chunks):
            some = slice(*bounds[chunk:chunk + 2])
            mine = group_windows(tuple(part[some] for part in plan), windows, runtime)
            with torch.inference_mode():
                for reading in mine:
                    batch = read_batch(self.text, reading, windows, runtime)
                    losses = self.model.token_losses(batch, self.layout)
                    sums += torch.tensor(add_up([(losses, batch.places)], self.target_bytes))
            progress(chunk + 1, chunks, since)
            if chunk + 1 < chunks and not runtime.agree(pace.late()):
                cosine = 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))
                optimizer.param_groups[0]["lr"] = config.ttt_rate * cosine
                self.learn(self.text.tokens[chunk * size:(chunk + 1) * size + 1], optimizer)
        return total_score(sums, self.runtime)

    def learn(self, tokens: np.ndarray, optimizer):
        """Make TTT_EPOCHS passes of SGD over the whole sequences among scored tokens (N + 1,)."""
        config, runtime, length = self.config, self.runtime, self.config.eval_seq_len
        learned = optimizer.param_groups[0]["params"]
        rows = [tokens[at:at + length + 1] for at in range(0, len(tokens) - length, length)]
        cut = dataclasses.replace(config, doc_mask=config.by_documents)
        for at in [*range(0, len(rows), config.ttt_batch_seqs)] * config.ttt_epochs:
            some = rows[at:at + config.ttt_batch_seqs]
            optimizer.zero_grad()
            for row in some[runtime.rank::runtime.world_size]:
                batch = batch_of_rows(row[None], cut, runtime, length)
                (self.model.mean_loss(batch, self.layout) / len(some)).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
            flat = runtime.sum_(torch.cat([grad.float().flatten() for grad in grads]))
            if config.ttt_grad_clip:
                flat *= (config.ttt_grad_clip / (flat.norm() + 1e-6)).clamp_max(1.0)
            for p, grad in zip(learned, flat.split([p.numel() for p in learned])):
                p.grad = grad.view_as(p).to(p.dtype)
            optimizer.step()

    def by_document(self, log: Log, journal) -> Score:
        """Return the Score of documents, each adapted to while it is scored: TTT=lora.

        They are independent of each other unless TTT_WARM_A. journal: as `score` takes it, a unit
        for each batch of documents; with TTT_WARM_A what it holds is done again. Sources: PRs
        #1530, #2014.
        """
        config, ranks, carried = self.config, self.runtime.world_size, None
        self.model.requires_grad_(False)
        units, pace = self.plan(), Pace(config.ttt_max_seconds)

        def costs(growth):
            return [self.forward_tokens(unit.sizes, growth) for unit in units]

        def slowest(growth):
            found = costs(growth)
            return max(sum(found[i] for i in mine) for mine in deal(found, ranks))

        # a killed run goes on by the plan that it began with, kept as unit -1
        growth, seconds = self.runtime.agree(*journal.get(-1, [0, 0])[:2])
        if growth:
            pace.growth, pace.foretold_seconds = int(growth), seconds
        else:
            pace.fit(slowest, self.tokens_per_second())
        journal[-1] = [pace.growth, round(pace.foretold_seconds), 0]
        found = costs(pace.growth)
        mine = sorted(deal(found, ranks)[self.runtime.rank])  # longest first
        log.event("ttt_plan", growth=pace.growth, expected_seconds=pace.foretold_seconds,
                  documents=sum(len(unit.sizes) for unit in units), linked=config.ttt_warm_a,
                  tokens_per_target=sum(found) / len(self.text.target_bytes))
        sums, since = torch.zeros(3, dtype=torch.float64), time.perf_counter()
        for done, unit in enumerate(mine):
            if config.ttt_warm_a or unit not in journal:
                adapters = self.new_adapters(len(units[unit].sizes), carried)
                journal[unit] = self.adapt(units[unit], adapters, pace)
                carried = adapters if config.ttt_warm_a else None
            sums += torch.tensor(journal[unit], dtype=torch.float64)
            log.progress("ttt", done + 1, len(mine), since)
        return total_score(sums, self.runtime)

    def plan(self) -> list[Documents]:
        """Return batches of TTT_BATCH_DOCS documents, longest first, equal ones in text order."""
        begins = document_starts(self.text.tokens[:-1])
        sizes = np.diff(begins, append=len(self.text.target_bytes))
        order, at_once = np.argsort(-sizes, kind="stable"), self.config.ttt_batch_docs
        return [Documents(begins[some], sizes[some])
                for some in np.split(order, range(at_once, len(order), at_once))]

    def chunks(self, sizes: np.ndarray, growth: int) -> np.ndarray:
        """Return how many targets documents of these sizes are scored at a time."""
        limits, chunks = map(np.array, zip(*self.config.chunk_rule))
        return np.minimum(growth * chunks[limits.searchsorted(sizes)], self.config.eval_seq_len)

    def forward_tokens(self, sizes: np.ndarray, growth: int) -> int:
        """Return how many tokens adapting a batch of documents forwards, its padding included."""
        chunks, longest = self.chunks(sizes, growth), self.config.eval_seq_len
        steps = np.arange(1, 1 + (-(-sizes // chunks)).max())
        ends = np.minimum(steps[:, None] * chunks, sizes).max(1)
        return len(sizes) * int(np.minimum(ends, longest).sum())

    def tokens_per_second(self) -> float:
        """Return forwarded tokens a second of adapting, the slowest rank's, on random tokens."""
        length, chunk = self.config.eval_seq_len, self.config.chunk_rule[-1][1]
        size = length + 2 * min(chunk, length)
        ids = np.random.default_rng(0).integers(self.config.vocab_size, size=size + 1)
        made = dataclasses.replace(self, text=dataclasses.replace(
            self.text, tokens=ids.astype(np.uint16), target_bytes=np.ones(size, np.uint16)),
            config=dataclasses.replace(self.config, ttt_chunks=(str(length),)))
        count = min(self.config.ttt_batch_docs, len(document_starts(self.text.tokens[:-1])))
        documents = Documents(np.zeros(count, np.int64), np.full(count, size))
        for _ in range(2):  # the first one warms the library up
            seconds = self.runtime.seconds_of(
                made.adapt, documents, made.new_adapters(count), Pace(0))
        return made.forward_tokens(documents.sizes, 1) / self.runtime.agree(seconds)

    def new_adapters(self, count: int, carried: Any = None) -> Adapters:
        """Return Adapters for `count` documents: outer halves 0, inner ones alike, or `carried`."""
        config, dim = self.config, self.config.model_dim
        generator, places = torch.Generator().manual_seed(config.seed), {}
        widths = dict(q=dim, k=config.kv_dim, v=config.kv_dim, o=dim, mlp=dim,
                      head=config.vocab_size)
        for place in config.ttt_places:
            steps = 1 if place == "head" else len(self.layout.steps)
            inner = torch.empty(steps, 1, config.ttt_rank, dim)
            inner.uniform_(-dim ** -0.5, dim ** -0.5, generator=generator)
            inner = inner.repeat(1, count, 1, 1).to(self.runtime.device)
            if carried is not None:
                inner.copy_(carried.places[place][0].detach()[:, :count])
            outer = inner.new_zeros(steps, count, widths[place], config.ttt_rank)
            places[place] = [inner.requires_grad_(), outer.requires_grad_()]
        return Adapters(places, config.ttt_alpha / config.ttt_rank)

    def adapt(self, documents: Documents, adapters: Adapters, pace: Pace) -> list:
        """Return [nats, targets, bytes] of documents, each adapted to chunk after chunk of itself.

        A chunk is scored in the window of the last EVAL_SEQ_LEN tokens up to its end; then one
        step of AdamW on that same loss, unless it is its document's last.
        """
        config, sizes = self.config, documents.sizes
        halves = [half for pair in adapters.places.values() for half in pair]
        betas = config.ttt_beta1, config.ttt_beta2
        optimizer = torch.optim.AdamW(halves, config.ttt_rate, betas, 1e-10, config.ttt_wd)
        sums, done = torch.zeros(3, dtype=torch.float64), np.zeros_like(sizes)
        while (done < sizes).any():
            late = pace.late()
            chunks = self.chunks(sizes, config.eval_seq_len if late else pace.growth)
            ends = np.minimum(done + chunks, sizes)
            learns = (ends < sizes) & (config.ttt_rate > 0) & (not late)
            batch = self.read(documents.begins, done, ends)
            with torch.set_grad_enabled(bool(learns.any())):
                losses = self.model.token_losses(batch._replace(adapters=adapters), self.layout)
            # into the sum before any step sees it
            sums += torch.tensor(add_up([(losses.detach(), batch.places)], self.target_bytes))
            if learns.any():
                counted = batch.places >= 0
                means = (losses * counted).sum(1) / counted.sum(1).clamp_min(1)
                (means * torch.from_numpy(learns).to(means)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            done = ends
        return sums.tolist()

    def read(self, begins: np.ndarray, done: np.ndarray, ends: np.ndarray) -> Batch:
        """Return the Batch that asks for documents' targets done … ends, in windows up to there."""
        firsts = np.maximum(0, ends - self.config.eval_seq_len)
        begin, first, end, at = (torch.from_numpy(x).to(self.runtime.device)[:, None]
                                 for x in (begins, firsts, ends, done))
        where, place = (begin.new_tensor(range(int(n))) for n in ((ends - firsts).max(),
                                                                  (ends - done).max()))
        where, place = first + where, at + place
        places = (begin + place).masked_fill(place >= end, -1)
        return Batch(self.tokens[begin + where.minimum(end - 1)].long() & 0xFFFF,
                     self.tokens[places + 1].long() & 0xFFFF, places,
                     longest=self.config.eval_seq_len, asked=place.minimum(end - 1) - first)


# == 10 Train =====================================================================================

def micro_batch_sequences(config: Config, world_size: int) -> int:
    """Return rows per forward on one rank: its share split evenly within MICRO_BATCH_TOKENS."""
    share = config.step_rows // world_size
    return even_split(share, config.micro_batch_tokens // config.row_len)


@dataclass
class TrainState:
    """Everything that training changes: what a checkpoint holds."""

    model: GPT
    optimizers: Optimizers
    average: Any = None  # an Average, once warm-up is over
    phase: int = 0
    step: int = 0
    changed: Any = None  # the step at which the training length last changed

    def views(self):
        """Yield (name, tensor to read or fill) of every weight and of its average."""
        for name, p in self.model.named_parameters():
            yield f"weight.{name}", p.detach()
            yield f"average.{name}", self.optimizers.bank.view(self.average.shadow, p)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, their average and all momenta by name; every rank must call it."""
        return self.optimizers.tensors() | {name: view.float() for name, view in self.views()}

    def load(self, tensors: dict[str, Tensor], header: dict, phase: int):
        """Go on from what `tensors` gave, at the step its file's header tells."""
        self.step, self.phase, self.changed = header["step"], phase, header["changed"]
        for name, view in self.views():
            view.copy_(tensors[name])
        self.optimizers.load(tensors)


class Trainer:
    """The training loop and its warm-up."""

    def __init__(self, state: TrainState, config: Config, runtime: Runtime, log: Log, clock: Clock):
        self.state, self.config, self.runtime = state, config, runtime
        self.log, self.clock, self.phases = log, clock, phases(config)
        self.micro = micro_batch_sequences(config, runtime.world_size)
        self.mean_loss = runtime.compile(state.model.mean_loss)
        self.token_losses = runtime.compile(state.model.token_losses)
        self.step_seconds = [0.0] * len(self.phases)  # of each phase, from warm-up; 0: unknown
        self.grad_norm = torch.zeros((), device=runtime.device)
        self.first_bad = torch.full((), -1, device=runtime.device)  # step of the first bad norm
        self.saved_seconds, self.last_checkpoint = 0.0, "none"

    layout = property(lambda self: self.phases[self.state.phase].layout)  # as trained now

    def losses_of(self, batch: Batch) -> Tensor:
        """Return the nats of each target, as `score` asks for them."""
        return self.token_losses(batch, self.layout)

    def update(self, batch: Batch, layout: Layout, rates: Rates) -> Tensor:
        """Make one optimizer step on this rank's rows; returns their mean loss, on the device."""
        optimizers, parts = self.state.optimizers, batch.split(self.micro)
        for flat in optimizers.bank.grads.values():
            flat.zero_()
        total = torch.zeros((), device=self.runtime.device)
        for part in parts:
            loss = self.mean_loss(part, layout)
            (loss / len(parts)).backward()
            total += loss.detach()
        self.grad_norm = optimizers.reduce_and_clip()
        bad = (self.first_bad < 0) & ~self.grad_norm.isfinite()
        self.first_bad = torch.where(bad, self.state.step, self.first_bad)
        optimizers.step(rates)
        return total / len(parts)

    def synthetic(self, rows: int, longest: int, parts: int = 1) -> Batch:
        """Return training rows of random tokens, as `Loader.read`; data order and RNG stay."""
        shape, config = (rows, self.config.row_len + 1), self.config
        ids = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.uint16)
        return batch_of_rows(ids, config, self.runtime, longest, parts)

    def synthetic_text(self) -> Validation:
        """Return random tokens that fill a forward of the evaluation on every rank."""
        size = self.runtime.world_size * math.prod(self.config.whole_windows[1:3])
        ids = np.random.default_rng(0).integers(self.config.vocab_size, size=size + 1)
        return Validation(ids.astype(np.uint16), np.zeros(size, np.uint16), 0, "table", size, size,
                          "")

    def warm_up(self):
        """Compile every graph, time each phase's step on synthetic text, then undo all of it."""
        config, runtime, optimizers = self.config, self.runtime, self.state.optimizers
        saved = {dtype: flat.clone() for dtype, flat in optimizers.bank.weights.items()}
        steps = max(config.warmup_steps, 2 * len(self.phases))
        turns = itertools.cycle(enumerate(self.phases))
        for step, (phase, (_, layout, seq_len)) in zip(range(1, steps + 1), turns):
            batch = self.synthetic(config.step_rows // runtime.world_size, seq_len)
            self.step_seconds[phase] = runtime.agree(
                runtime.seconds_of(self.update, batch, layout, schedule(config, 0, 0.0)))
            if step <= 6 or step % 10 == 0 or step == steps:
                self.log.event("warmup_step", step=step, steps=steps)
        if runtime.compiles:  # the evaluation graphs too, in the shape that validation uses
            text, windows = self.synthetic_text(), config.whole_windows
            with torch.inference_mode():
                batch = read_batch(text, plan_readings(text, windows, runtime)[0], windows, runtime)
                for phase in self.phases:
                    self.token_losses(batch, phase.layout)
        for dtype, flat in optimizers.bank.weights.items():
            flat.copy_(saved[dtype])
        optimizers.reset()
        self.first_bad.fill_(-1)

    def train(self, loader: Loader, budget_seconds: float, validation, checkpoint: Path):
        """Train until ITERATIONS, or until one more step would pass `budget_seconds` (0: none).

        validation() returns the Score of the weights as they are. Raises Interrupted after a
        signal, once `checkpoint` is written, and ConfigError when the gradients or the validation
        loss are not finite.
        """
        state, config, clock, log = self.state, self.config, self.clock, self.log
        every, whole = config.val_loss_every, budget_seconds or max(1, config.iterations)
        began, graphs = time.perf_counter(), self.runtime.compiled_graphs()
        self.saved_seconds = clock.training_seconds()  # above 0 when resumed
        pacer = Pacer(budget_seconds, self.saved_seconds)
        pacer.expect(self.step_seconds[state.phase])
        with without_gc(), clock.span("train"):
            while True:
                if pacer.due():
                    pacer.read(self.between_steps(checkpoint))
                elapsed = pacer.elapsed()
                progress = (elapsed if budget_seconds else state.step) / whole
                if (phase := self.due_phase(progress)) != state.phase:
                    pacer.expect(self.step_seconds[phase])
                last = state.step >= config.iterations or not pacer.fits()
                if phase != state.phase and not last:  # else an order never trained were scored
                    self.enter(phase)
                if last or (every and state.step % every == 0):
                    self.validate(validation, elapsed)
                if last:
                    break
                since = math.inf if state.changed is None else state.step - state.changed
                rates = schedule(config, state.step, progress, since)
                batch = loader.batch(state.step, self.phases[state.phase].seq_len)
                loss = self.update(batch, self.layout, rates)
                state.average.update()
                state.step += 1
                log.progress("training", round(1000 * progress), 1000, began)
                self.report(loss, rates)
        self.check_gradients()
        if recompiled := self.runtime.compiled_graphs() - graphs:
            log.event("recompiled", count=recompiled)
        if state.step < config.iterations:
            log.event("stopping_early", train_time_ms=1000 * clock.training_seconds(),
                      step=state.step, iterations=config.iterations)

    def enter(self, phase: int):
        """Go over to a phase, saying what changes with it."""
        state, old, new = self.state, self.phases[self.state.phase], self.phases[phase]
        state.phase = phase
        if new.layout != old.layout:
            self.log.event("recurrence", step=state.step, order=list(new.layout.order))
        if new.seq_len != old.seq_len:
            state.changed = state.step
            self.log.event("length", step=state.step, tokens=new.seq_len)

    def due_phase(self, progress: float) -> int:
        """Return the phase that this step belongs to; none is ever gone back to."""
        begun = sum(phase.start.done(self.state.step, progress) == 1.0 for phase in self.phases)
        return max(self.state.phase, begun - 1)

    def validate(self, validation, elapsed: float):
        """Score the weights as they are, off the clock."""
        with self.clock.span("validation"):
            found = validation()
        step = self.state.step
        self.log.event("val", step=step, iterations=self.config.iterations, val_loss=found.loss,
                       val_bpb=found.bpb, train_seconds=round(elapsed, 3))
        if not math.isfinite(found.loss):
            raise self.diverged("the validation loss is", step, lambda p: p)

    def between_steps(self, checkpoint: Path) -> float:
        """Return all ranks' training clock, having done what must not wait.

        Writes `checkpoint` where one is due, or before it raises Interrupted after a signal.
        """
        runtime, every = self.runtime, self.config.checkpoint_every_seconds
        runtime.synchronize()
        elapsed, number = runtime.agree(self.clock.training_seconds(), runtime.signals.number)
        self.check_gradients()
        if number or (every and elapsed - self.saved_seconds >= every):
            self.write_checkpoint(checkpoint, elapsed)
        if number:
            raise Interrupted(int(number))
        return elapsed

    def write_checkpoint(self, path: Path, elapsed: float):
        """Write everything that training changes, off the training clock."""
        state, self.saved_seconds = self.state, elapsed
        with self.clock.span("checkpoint"):
            header = dict(kind="checkpoint", step=state.step, training_seconds=elapsed,
                          order=list(self.layout.order), changed=state.changed,
                          phase=state.phase)
            try:
                self.runtime.first(write_tensors, path, header, state.tensors())
            except (ConfigError, OSError) as error:  # the run is worth more than its checkpoint
                return self.log.event("notice", text=f"no checkpoint at step {state.step}: {error}")
        self.last_checkpoint = f"{path} of step {state.step}"
        self.log.event("checkpoint", step=state.step, path=str(path))

    def check_gradients(self):
        """Raise ConfigError when any step's gradients were not finite, naming step and tensors."""
        if (step := int(self.first_bad)) >= 0:
            raise self.diverged("gradients are", step, lambda p: p.grad)

    def diverged(self, what: str, step: int, tensor_of) -> ConfigError:
        """Return the error that says what is not finite since when, and in which tensors now."""
        names = [name for name, p in self.state.model.named_parameters()
                 if not tensor_of(p).isfinite().all()]
        return ConfigError([f"{what} not finite at step {step} (tensors: "
                            f"{', '.join(names[:3]) or 'none yet'}{'…' * (len(names) > 3)}): "
                            "training diverged; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR. "
                            f"Last good checkpoint: {self.last_checkpoint}"], shared=True)

    def report(self, loss: Tensor, rates: Rates):
        """Log the mean loss over ranks at the steps TRAIN_LOG_EVERY names."""
        step, config, every = self.state.step, self.config, self.config.train_log_every
        if not every or step > 5 and step % every:
            return
        mean = self.runtime.sum_(loss.double().cpu()).item() / self.runtime.world_size
        self.check_gradients()
        seconds, tokens = self.clock.training_seconds(), step * config.train_batch_tokens
        recurrent = self.layout != self.phases[0].layout
        self.log.event("train", step=step, iterations=config.iterations, train_loss=mean,
                       tokens_per_second=tokens / max(seconds, 1e-9), train_minutes=seconds / 60,
                       train_seconds=round(seconds, 3), tokens=tokens,
                       grad_norm=self.grad_norm.item(), recurrent=recurrent,
                       **dataclasses.asdict(rates))


# == 11 Calibrate =================================================================================

def collect_inputs(model: GPT, batch: Batch, layout: Layout, wanted) -> dict[str, Tensor]:
    """Return the sum of x xT over all tokens, fp32, of what weights read; wanted: "inputs.NAME".

    A layer that runs twice contributes both inputs. The tied table reads the final hidden state.
    """
    sums: dict[str, Tensor] = {}

    def see(name, tied, module, inputs, out):
        flat = (out if tied else inputs[0]).flatten(0, -2).float()
        if name not in sums:
            sums[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        sums[name].addmm_(flat.T, flat)

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name in wanted:
            module = model.get_submodule(name.removeprefix("inputs.").removesuffix(".weight"))
            tied = isinstance(module, Embedding)
            hooks.enter_context((model if tied else module).register_forward_hook(
                functools.partial(see, name, tied)))
        model(batch, layout)
    return sums


def outer(x: Tensor) -> Tensor:
    """Return the sum of x xT (C, C), fp32, over all leading axes."""
    flat = x.detach().flatten(0, -2).float()
    return flat.T @ flat


def watch_gradients(name: str, add, wanted):
    """Return a forward hook of weight `name`'s module that adds what is wanted of it."""
    def on_output(module, inputs, out):
        def see(grad):
            if isinstance(module, Embedding):
                return add(f"inputs.{name}", outer(grad))
            square = grad.detach().float().square()
            mean = square.flatten(0, -2).mean(0).clamp_min(1e-30)
            add(f"fisher.{name}", square.flatten(0, -2).sum(0))
            weights = (square / mean).mean(-1, keepdim=True)
            add(f"inputs.{name}", outer(inputs[0].float() * weights.sqrt()))
            if f"outputs.{name}" in wanted:
                add(f"outputs.{name}", outer(grad))
        out.requires_grad_().register_hook(see)
    return on_output


def collect_fisher(model: GPT, batch: Batch, layout: Layout, wanted,
                   seed: int) -> dict[str, Tensor]:
    """Return sums over tokens of what quantisation errors cost, fp32, by weight.

    wanted: names of statistics. Gradients g are of the loss on labels drawn from the model itself
    (the true Fisher information). "fisher.": squared gradients of a matrix's outputs (R,); of the
    head's, in closed form; how often a looked-up row is read. "inputs.": x xT (C, C), each token
    weighted by its squared gradients over the batch's mean ones; of a table its outputs' g gT, and
    of the tied one the head's x xT as well. "outputs.": g gT (R, R).
    """
    sums, counts = {}, Counter()
    names = [name.removeprefix("fisher.") for name in wanted if name.startswith("fisher.")]

    def add(name, value):
        counts[name] += 1
        sums[name] = sums[name] + value if name in sums else value

    with contextlib.ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            hooks.enter_context(module.register_forward_hook(watch_gradients(name, add, wanted)))
        hooks.enter_context(model.register_forward_hook(
            lambda *call: add("inputs.tok_emb.weight", outer(call[-1]))))
        hooks.callback(model.requires_grad_, True)
        model.requires_grad_(False)  # gradients of activations alone are wanted
        logits = model.logits(batch, layout).flatten(0, 1)
        with torch.no_grad():
            odds = logits.softmax(-1)
            generator = torch.Generator(odds.device).manual_seed(seed)
            labels = torch.multinomial(odds, 1, generator=generator)[:, 0]
            slope = 1 - (logits / model.softcap).square()
            add("fisher.tok_emb.weight", (odds * (1 - odds) * slope.square()).sum(0))
            if model.ve is not None:
                read = torch.bincount(batch.tokens.flatten(), minlength=logits.shape[1])
                add("fisher.ve.table.weight", read.float())
        F.cross_entropy(logits, labels, reduction="sum").backward()
    # a layer that runs twice has both inputs in its Hessian: here the mean, lest both count twice
    for name, count in counts.items():
        if not name.startswith("inputs."):
            sums[name] *= 1 / count
    return sums


class Calibration:
    """What the step rule needs to know of the weights, from training rows, split over ranks."""

    GRADIENT_TOKENS = 16_384  # of a backward at most: it holds several copies of the logits

    def __init__(self, model: GPT, config: Config, runtime: Runtime):
        self.model, self.config, self.runtime = model, config, runtime
        rule = STEP_RULES[config.rule](config)
        self.gradients, self.wanted = rule.gradients, rule.statistics()
        tokens = min(config.micro_batch_tokens, self.GRADIENT_TOKENS if rule.gradients else 1 << 32)
        self.eighth = max(1, config.step_rows // 8)  # of a step: what one batch counts here
        self.rows = even_split(self.eighth, tokens // config.row_len)
        # long rows are cut into shorter ones, a forward each
        part = even_split(config.row_len, tokens) if config.doc_mask else config.row_len
        self.parts = config.row_len // part if 4 * part >= min(tokens, config.row_len) else 1
        self.batch_seconds, self.longest = 0.0, phases(config)[-1].seq_len

    def shares(self) -> list[tuple[int, int]]:
        """Return (position in the training order, count) of each batch of this rank."""
        size, total = self.rows, self.config.calibration_rows
        shares = [(at, min(size, total - at)) for at in range(0, total, size)]
        if self.config.hessian_ranks == "all":  # consecutive rows
            return shares[self.runtime.rank::self.runtime.world_size]
        # PR #1471: rank 0's eighth of each of the first training batches, read by rank 0 alone
        step = self.config.step_rows
        return [(at // self.eighth * step + at % self.eighth, count) for at, count in shares
                if self.runtime.rank == 0]

    def batches(self) -> int:
        """Return the most batches any rank reads."""
        return int(self.runtime.agree(len(self.shares())))

    def hessians(self) -> int:
        """Return of how many weights the inputs are known in the end."""
        return sum(name.startswith("inputs.") for name in self.wanted)

    def collect(self, layout: Layout, batch: Batch, position: int) -> dict[str, Tensor]:
        """Return the sums of one batch at a position of the training order."""
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(batch.split(len(batch.tokens) if self.parts == 1 else 1)):
            found = (collect_fisher(self.model, part, layout, self.wanted,
                                    self.config.seed + position * self.parts + i)
                     if self.gradients else collect_inputs(self.model, part, layout, self.wanted))
            sums = {name: sums[name] + value if name in sums else value
                    for name, value in found.items()}
        return sums

    def measure(self, layout: Layout, batch: Batch):
        """Time one batch of synthetic rows."""
        for _ in range(2):  # the first one warms the library up
            seconds = self.runtime.seconds_of(self.collect, layout, batch, 0)
        self.batch_seconds = self.runtime.agree(seconds)

    def reserve_seconds(self) -> float:
        """Return the training time to keep: as measured, a fifth and a quarter second more."""
        return max(self.config.gptq_reserve_seconds,
                   1.2 * self.batches() * self.batch_seconds + 0.25)

    def run(self, layout: Layout, loader: Loader, clock: Clock, log: Log) -> dict[str, Tensor]:
        """Return means over the tokens of all ranks, within what the wallclock limit leaves."""
        shares, planned, tokens = self.shares(), self.batches(), 0
        limit, device = self.config.max_wallclock_seconds, self.runtime.device
        sums = {name: torch.zeros(shape, device=device) for name, shape in self.wanted.items()}
        for done in range(planned):
            spent = self.runtime.agree(clock.training_seconds())
            if limit and done and spent + 1.2 * self.batch_seconds > limit:
                log.event("calibration_short", done=done, planned=planned)
                break
            if done < len(shares):
                at, count = shares[done]
                batch = loader.read(at, count, self.longest, self.parts)
                for name, value in self.collect(layout, batch, at).items():
                    sums[name] += value
                tokens += batch.tokens.numel()
        total = self.runtime.sum_(torch.tensor(tokens, dtype=torch.float64)).item()
        return {name: self.runtime.sum_(value) / total for name, value in sums.items()}


# == 11b Preflight: what is checked and told before a run ========================================

class RunFiles:
    """Where a run keeps its products; each stage meets the next one only here."""

    def __init__(self, run_id: str):
        self.folder = Path("runs", run_id)
        self.identity, self.events = self.folder / "run.json", self.folder / "events.jsonl"
        self.text_log = Path("logs", f"{run_id}.txt")

    def __getattr__(self, kind: str) -> Path:
        if kind not in KINDS:
            raise AttributeError(kind)
        return self.folder / KINDS[kind][0]

    def done(self, stage: str, config: Config) -> bool:
        """Return whether a stage has left all it makes."""
        return all(getattr(self, kind).exists() for kind in STAGES[stage].writes
                   if kind != "stats" or config.gptq_enabled)

    def source(self, config: Config, kind: str) -> Path:
        """Return where a stage reads its file: INPUT_PATH (a run or the file), or this run's."""
        given = Path(config.input_path or self.folder)
        return given if given.is_file() else given / getattr(self, kind).name


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a run reads, taken once before it starts: nothing of it is read again."""

    source: str  # this script's text
    code_bytes: int
    code_sha256: str
    tokenizer_sha256: str = ""
    text: Any = None  # Validation
    shards: Any = None  # ShardSet of the training text
    train_sha256: str = ""  # its fingerprint
    warnings: tuple[str, ...] = ()  # of what was read


def take_inputs(config: Config, judged: bool = True) -> tuple[Inputs, list[str]]:
    """Return what this run reads and every fault of it, one line each.

    judged False: another process of this machine looks at what the tokens say.
    """
    code = Path(__file__).read_bytes()
    # a packed script runs from its unpacked text, while __file__ is the file that counts
    source = Path(take_inputs.__code__.co_filename).read_text(encoding="utf-8")
    found: dict[str, Any] = dict(source=source, code_bytes=len(code),
                                 code_sha256=hashlib.sha256(code).hexdigest())
    faults = data_faults(config)
    try:
        if config.text and sentencepiece and not faults:
            tokenizer = hashlib.sha256(config.tokenizer_file.read_bytes()).hexdigest()
            text, warnings = load_validation(config, judged), unread_files(config)
            found.update(text=text, tokenizer_sha256=tokenizer)
            if "train" in config.text:
                files = find_shards(config.shard_dir, "train")
                shards, row = ShardSet(files, config.row_len), config.row_name
                found.update(shards=shards, train_sha256=fingerprint(files))
                warnings += [f"{path.name}: holds no row of {row} tokens" for path, count
                             in zip(files, np.diff(shards.first)) if not count]
                faults = training_faults(config, files) if judged else []
                if not shards.num_windows:
                    faults = [f"DATA_PATH={config.shard_dir}: {shards.num_tokens} training tokens "
                              f"are less than one row of {row}={config.row_len}; lower it or "
                              "bring more text"]
            if config.packs and BOS_ID not in text.tokens:
                faults.append(f"DATA_PATH={config.shard_dir}: no token {BOS_ID} (BOS) in the "
                              "validation text: nothing tells its documents apart; use DOC_MASK=0 "
                              "EVAL_PLAN=windows, or shards whose documents begin with it")
            found.update(warnings=(*text.warnings, *warnings))
    except (ValueError, OSError) as error:
        faults = [str(error)]
    return Inputs(**found), faults


@contextlib.contextmanager
def claimed(files: RunFiles):
    """Hold a run's folder for this process alone, within; the system lets go when it dies.

    Raises ConfigError, saying who holds it, when another process does. Where the file system or
    the machine knows no locks, nothing is claimed.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    with open(files.folder / "claim", "a+", encoding="utf-8") as file:
        try:
            import fcntl  # absent on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError([f"RUN_ID={files.folder.name}: {files.folder} is in use by "
                               f"{file.read().strip()}; wait for it, stop it, or choose another "
                               "RUN_ID"], shared=True) from None
        except (ImportError, OSError):
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder closed meanwhile: the lock goes anyway
                (files.folder / "claim").unlink()


def file_faults(config: Config, files: RunFiles) -> list[str]:
    """Return missing inputs, products that would be overwritten, and a full or closed disk."""
    faults, source = [], files.source(config, config.reads) if config.reads else None
    if source and not source.is_file():
        faults.append(f"STAGE={config.stage}: {source} does not exist; set RUN_ID or INPUT_PATH "
                      "to a run that has it")
    elif source and config.stage == "quantize" and config.gptq_enabled:
        try:
            calibration_of(config, source.with_name(files.stats.name))
        except (ValueError, OSError) as error:
            faults.append(f"STAGE=quantize: {error}; run STAGE=train again, or GPTQ_ENABLED=0")
    products = [getattr(files, STAGES[stage].writes[0]) for stage in STAGES if config.runs(stage)]
    products += [files.checkpoint] * config.runs("train")
    if not config.resume and (made := [path for path in products if path.exists()]):
        faults.append(f"RUN_ID={config.run_id}: {made[0]} exists and would be overwritten; choose "
                      "another RUN_ID, or go on with RESUME=1")
    free, need = shutil.disk_usage(".").free, disk_need_bytes(config)
    if free < need:
        faults.append(f"disk: {free >> 20} MiB free here, this run writes up to {need >> 20} MiB; "
                      "free some space")
    if not os.access(".", os.W_OK):
        faults.append(f"{Path.cwd()}: not writable, and logs/ and runs/ go here; start elsewhere")
    return faults


def identity(config: Config, inputs: Inputs) -> dict[str, str]:
    """Return what all ranks, or a run and its resumption, must share: settings, code, data."""
    found = {name.upper(): show_value(value) for name, value in config.public().items()}
    found["train_gpt.py"] = inputs.code_sha256
    if inputs.text:
        found.update({"val shards": inputs.text.sha256, "tokenizer": inputs.tokenizer_sha256})
        found["bytes scored"] = str(inputs.text.target_bytes.sum())  # a sidecar may differ alone
    if inputs.shards:
        found["train shards"] = inputs.train_sha256
    return found


def resume_faults(config: Config, files: RunFiles, inputs: Inputs) -> list[str]:
    """Return what differs between this run and the one it would go on with."""
    now = identity(config, inputs)
    try:
        before = json.loads(files.identity.read_bytes())
        free = {name.upper() for name, f in KNOBS.items() if f.metadata["topic"] in ("run", "data")}
        return [f"RESUME=1: {name} is {now[name]}, {files.folder} began with {before.get(name)}; "
                "go on with what it began with, or choose another RUN_ID"
                for name in now if name not in free and now[name] != before.get(name)]
    except (ValueError, AttributeError, RecursionError) as error:
        return [f"RESUME=1: {files.identity} is damaged ({error}); choose another RUN_ID"]


def rank_faults(found: dict[str, str], runtime: Runtime) -> list[str]:
    """Return in what settings, code or data the ranks' identities differ."""
    first, *others = runtime.gather(found)
    return [f"{name}: rank {rank} has {other.get(name)}, rank 0 has {value}; start every rank with "
            "the same settings, code and data" for rank, other in enumerate(others, 1)
            for name, value in first.items() if other.get(name) != value]


def disk_need_bytes(config: Config) -> int:
    """Return the bytes a run may write: weights, Hessians, a checkpoint twice, artifact, logs."""
    need = 8 << 20
    if config.runs("train"):
        copies = 7 if config.checkpoint_every_seconds else 1
        need += copies * 4 * count_parameters(config)
        sizes = FisherSteps(config).statistics().values()
        need += 4 * sum(map(math.prod, sizes)) * config.gptq_enabled
    return need + (config.artifact_max_bytes if config.runs("quantize") else 0)


def package_faults(config: Config) -> list[str]:
    """Return missing packages, and a coder that does not give back what it got."""
    faults, sample = [], bytes(range(256)) * 8
    if sentencepiece is None and config.text:
        faults.append("sentencepiece is not installed: pip install sentencepiece")
    if config.codec == "brotli" and brotli is None:
        return [*faults, f"COMPRESSOR={config.compressor}: brotli is not installed: pip install "
                "'brotli>=1.2'"]
    try:
        if decompress(compress(sample, config.codec), config.codec, 2048) != sample:
            raise ValueError("other bytes come back")
    except Exception as error:  # a coder too old for bounded decompression, say
        faults.append(f"COMPRESSOR={config.compressor}: round trip failed ({error}); "
                      "pip install -U 'brotli>=1.2'")
    return faults


def device_faults(config: Config, runtime: Runtime) -> list[str]:
    """Return faults between the settings and the number of ranks."""
    if config.runs("train") and config.step_rows % runtime.world_size:
        return [f"nproc_per_node: {runtime.world_size} ranks do not divide the {config.step_rows} "
                f"rows of a step (TRAIN_BATCH_TOKENS={config.train_batch_tokens} / "
                f"{config.row_name}={config.row_len})"]
    return []


def preflight(config: Config, runtime: Runtime, files: RunFiles) -> tuple[Inputs, list[str]]:
    """Return what the run reads, and every fault, of all ranks, that would end the run later."""
    inputs, data = take_inputs(config, judged=runtime.leads_machine)
    faults = package_faults(config) + device_faults(config, runtime) + data
    if runtime.is_main:
        faults += file_faults(config, files)
        if config.resume and files.identity.exists() and not data:
            faults += resume_faults(config, files, inputs)
    every = list(dict.fromkeys(fault for found in runtime.gather(faults) for fault in found))
    return inputs, every or rank_faults(identity(config, inputs), runtime)


def forward_flops_per_token(config: Config, order: tuple[int, ...]) -> float:
    """Return FLOPs of one token's forward pass: matrix products and causal attention."""
    widths = 2 * config.model_dim + 2 * config.kv_dim + 2 * config.mlp_dim + config.train_seq_len
    return 2 * config.model_dim * (len(order) * widths + config.vocab_size)


def matmul_flops_per_second(runtime: Runtime) -> float:
    """Return the rate of one large matrix product on this device, measured over about 0.2 s."""
    size = 4096 if runtime.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=runtime.device, dtype=runtime.compute_dtype)
    runtime.seconds_of(torch.mm, a, a)  # warms the library up
    seconds = []
    while sum(seconds) < 0.2:
        seconds.append(runtime.seconds_of(torch.mm, a, a))
    return len(seconds) * 2 * size ** 3 / sum(seconds)


def predict_steps(config: Config, runtime: Runtime) -> tuple[int, float]:
    """Return (steps, seconds a step) as expected before training, from one matrix product.

    A rough guess: PR #1471's step runs at 36 % of its GPU's measured matrix rate; eager CPU steps
    were seen near 40 %.
    """
    share, limit = 0.36 if runtime.device.type == "cuda" else 0.4, config.max_wallclock_seconds
    flops = 3 * forward_flops_per_token(config, config.recurrent_order) * config.train_batch_tokens
    seconds = flops / (share * matmul_flops_per_second(runtime) * runtime.world_size)
    return min(config.iterations, int(limit / seconds)) if limit else config.iterations, seconds


def saved_activation_bytes(config: Config, runtime: Runtime) -> int:
    """Return the bytes one eager training forward keeps for its backward.

    Found by tracing it without memory, as on a CPU whatever the device.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage  # held: a freed one's key could come again
        return tensor

    with FakeTensorMode(), torch.device("cpu"):
        model = GPT(config, dtype=runtime.compute_dtype)
        sequences = micro_batch_sequences(config, runtime.world_size)
        batch = Batch.of_windows(torch.zeros(sequences, config.row_len + 1, dtype=torch.int64))
        if config.doc_mask:  # about as many segments as there will be
            longest = config.train_seq_len
            begins = torch.zeros(sequences, config.row_len // longest + 2, dtype=torch.int64)
            batch = batch._replace(segments=begins, longest=longest)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.mean_loss(batch, phases(config)[-1].layout)
    return sum(storage.nbytes() for key, storage in seen.items() if key not in weights)


def predict_peak_bytes(config: Config, runtime: Runtime) -> int:
    """Return the expected peak memory of training on one rank: the device's, or the process's.

    0 where it cannot be told.
    """
    embeds, matrices, controls = (count_parameters(config, role) for role in Role)
    # bytes each of weights, gradients, the warm-up's copy, moments; 4 of the average
    state = ((5 * runtime.compute_dtype.itemsize + 4) * embeds + 24 * controls
             + (16 + 4 / runtime.world_size) * matrices)
    try:
        activations = saved_activation_bytes(config, runtime)
    except Exception:  # tracing leans on torch's internals, and a forecast must not end a run
        return 0
    if runtime.compiles:  # PR #1471's logs show 33,093 MiB where eager graphs keep 57,902
        return int(state + 0.56 * activations)
    # eager: the backward's own temporaries and the allocator add 40 %, as the demo shows on a CPU
    resident = resident_peak_bytes() if runtime.device.type == "cpu" else 0
    return int(resident + state + 1.4 * activations)


def forecast_faults(config: Config, runtime: Runtime, report: dict) -> list[str]:
    """Return why a run that `predict` foresees cannot be: too long a step, too little memory.

    Both are rough, hence the margins.
    """
    if not config.runs("train"):
        return []
    faults, limit, seconds = [], config.max_wallclock_seconds, report["step_ms"] / 1000
    have, need = runtime.memory_bytes() >> 20, report["peak_mib"]

    def remedy(name, share):
        tokens = int(getattr(config, name) * share) // config.row_len * config.row_len
        lower = f"lower it to {tokens}, or " if tokens else ""
        return f"{name.upper()}={getattr(config, name)}: {lower}try a smaller model (PRESET=demo): "

    if limit and seconds > 2 * limit:
        faults.append(remedy("train_batch_tokens", limit / seconds / 20) + f"a step takes about "
                      f"{seconds:.1f} s here; or raise MAX_WALLCLOCK_SECONDS={limit:g}")
    if have and need > 1.3 * have:
        faults.append(remedy("micro_batch_tokens", have / need / 2) + f"a forward needs about "
                      f"{need} MiB here, there are {have}")
    return faults


def predict(config: Config, runtime: Runtime, code_bytes: int) -> dict:
    """Return what can be told before a run, without data; `text_report` says it in a line."""
    parameters = count_parameters(config)
    report, text = dict[str, Any](parameters=parameters), f"{parameters} parameters"
    if config.runs("train"):
        steps, seconds = predict_steps(config, runtime)
        peak_mib = predict_peak_bytes(config, runtime) >> 20
        report.update(steps=steps, step_ms=round(1000 * seconds, 1), peak_mib=peak_mib)
        rule = "a rough guess" if config.max_wallclock_seconds else "bounded by ITERATIONS"
        text += (f"; {steps} steps of about {1000 * seconds:.0f} ms ({rule}); peak memory about "
                 f"{peak_mib} MiB on {runtime.device.type}")
    if config.runs("quantize"):
        report["total_bytes"], remark = predict_artifact_bytes(config, code_bytes)
        text += (f"; code + artifact about {report['total_bytes']} of {config.artifact_max_bytes} "
                 f"bytes: {remark}")
    return dict(report, text_report=text)


# == 11c Report: what a run says of itself =======================================================

TRAIN_LIMIT_SECONDS, EVAL_LIMIT_SECONDS = 600, 600  # the challenge's rules


@dataclass(frozen=True)
class Session:
    """What every stage needs."""

    config: Config
    runtime: Runtime
    log: Log
    clock: Clock
    files: RunFiles
    inputs: Inputs
    attend: Any = attention_sdpa
    backend: str = "sdpa"
    facts: dict = field(default_factory=dict)  # of the stages, for the result

    def build_model(self, attend=None, train_len: int | None = None) -> GPT:
        with torch.device(self.runtime.device):
            return GPT(self.config, attend or self.attend, self.runtime.compute_dtype, train_len)

    def build_stream_model(self, weights: GPT) -> GPT:
        """Return a model of the same weights that reads any length, EVAL_SEQ_LEN tokens back."""
        window = self.config.eval_seq_len
        attend = windowed_form(self.backend, window)
        # no rotation slows down: distances stay short
        model = self.build_model(attend, window * self.config.stream_windows)
        model.load_state_dict(weights.state_dict())
        return model


def log_head(session: Session, env, report: dict):
    """Log source, versions, hardware and configuration: what repeating the run needs."""
    config, runtime, log = session.config, session.runtime, session.log
    log.event("source", console=False, text_source=session.inputs.source,
              sha256=session.inputs.code_sha256)
    facts, table = runtime.describe(), b""
    if runtime.device.type == "cuda":
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # it may hang, or be none
            table = subprocess.run(["nvidia-smi"], capture_output=True, timeout=5).stdout
    versions = f"{json.dumps(facts)}\n{table.decode(errors='replace')}"
    log.event("environment", console=False, text_versions=versions, **facts)
    shown = {name: show_value(value) for name, value in config.public().items()}
    lines = "\n".join(f"  {name}: {value}" for name, value in sorted(shown.items()))
    log.event("config", console=False, text_table=lines, **config.public())
    changed = {name: shown[name] for name in sorted(config.explicit)
               if getattr(config, name) != KNOBS[name].default}
    text = " ".join(f"{name.upper()}={value}" for name, value in changed.items())
    log.event("overrides", text_values=text or "none", values=changed)
    for line in notices(config, env) + runtime.notices():
        log.event("notice", text=line)
    for line in session.inputs.warnings:
        session.facts.setdefault("warnings", []).append(line)
        log.event("notice", text=f"warning: {line}")
    log.event("preflight", **report)


def describe_data(session: Session):
    """Log what the run reads: what it trains on, what is scored and by which bytes."""
    inputs, text, log = session.inputs, session.inputs.text, session.log
    if shards := inputs.shards:
        log.event("data", train_shards=len(shards.shards), tokens=shards.num_tokens,
                  windows=shards.num_windows, sha256=inputs.train_sha256)
    if text:
        scored = len(text.target_bytes)
        log.event("val_data", scored_tokens=scored)
        log.event("val_name", name=text.name)
        documents = len(document_starts(text.tokens[:-1]))
        log.event("eval_plan", plan=session.config.eval_plan, length=session.config.eval_seq_len,
                  documents=documents)
        session.facts.update(eval_plan=session.config.eval_plan)
        log.event("val_counts", scored_tokens=scored, all_tokens=text.all_targets,
                  legacy_tokens=text.legacy_targets, scored_bytes=int(text.target_bytes.sum()),
                  table_bytes=text.table_bytes, denominator=text.denominator, sha256=text.sha256)


def timed_score(session: Session, kind: str, losses_of, windows, journal=None) -> dict:
    """Score the text and log it as event `kind` with its time. windows: as `score` takes them."""
    return timed(session, kind, lambda: score(
        losses_of, session.inputs.text, windows, session.runtime,
        functools.partial(session.log.progress, kind), journal))


def timed(session: Session, kind: str, scored, **texts) -> dict:
    """Log the Score that scored() returns as event `kind` with its time; returns its facts."""
    since, found = time.perf_counter(), scored()
    facts = dict(val_loss=found.loss, val_bpb=found.bpb, tokens=found.tokens, bytes=found.bytes)
    session.facts[f"{kind}_bpb"] = found.bpb
    session.log.event(kind, **facts, eval_ms=1000 * (time.perf_counter() - since), **texts)
    return facts


def describe_phases(session: Session, trainer: Trainer, budget: float):
    """Say when the recurrent order starts, or that it never can."""
    steps, step_seconds = session.config.iterations, trainer.step_seconds[0]
    if budget and step_seconds:
        steps = min(steps, int(budget / step_seconds))
    for before, ((start, frac), layout, length) in itertools.pairwise(trainer.phases):
        never = start >= steps if frac is None else frac >= 1
        when = f"at step {start} of about {steps}" if frac is None else f"at {frac:g} of the run"
        if never:
            when = f"NEVER ({when}); set RECUR_START_FRAC below 1 to have it"
        if layout != before.layout:
            session.log.event("recurrence_plan", text_when=when, never=never, expected_steps=steps,
                              order=list(layout.order))
        if length != before.seq_len:
            session.log.event("length_plan", text_when=when, tokens=length)


def describe_artifact(session: Session, quantizer: Quantizer, multiplier: float, size: int) -> dict:
    """Log sizes, steps and bits of a written artifact and return them."""
    log, config, code_bytes = session.log, quantizer.config, session.inputs.code_bytes
    total = size + code_bytes
    unused = config.artifact_max_bytes - total
    if config.search_k and multiplier == MULTIPLIER_RANGE[0] and unused > 0:
        log.event("unused", unused_bytes=unused)
    if config.search_k and unused < 0:
        fitting = fitting_parameters(config, size, unused + size)
        log.event("overfull", over_bytes=-unused, parameters=fitting)
    bits: dict[str, Any] = dict(matrix_bits=quantizer.bits(multiplier, INT6),
                                embed_bits=quantizer.bits(multiplier, INT8))
    k, k_embed = (multiplier * quantizer.specs[kind].k for kind in (INT6, INT8))
    log.event("bits", multiplier=multiplier, k=k, k_embed=k_embed, rule=config.rule, **bits)
    path = str(session.files.artifact)
    log.event("artifact", compressor=config.compressor, bytes=size, path=path)
    log.event("total_size", compressor=config.compressor, bytes=total)
    sizes = dict(artifact_bytes=size, code_bytes=code_bytes, total_bytes=total)
    return dict(multiplier=multiplier, **sizes, **bits)


def close_run(session: Session):
    """Log memory, the ledger, a verdict per limit of the challenge, and the result line."""
    config, log, facts = session.config, session.log, session.facts
    spent: dict[str, Any] = session.clock.ledger()
    allocated, reserved = session.runtime.peak_memory_mib()
    log.event("peak_memory", allocated_mib=allocated, reserved_mib=reserved)
    text = " ".join(f"{name}={seconds:.1f}s" for name, seconds in spent.items())
    log.event("ledger", text_spans=text, **spent)
    kept = {}
    for rule, value, limit, unit in (
            ("training + calibration", facts.get("training_seconds"), TRAIN_LIMIT_SECONDS, "s"),
            ("evaluation", spent.get("evaluate"), EVAL_LIMIT_SECONDS, "s"),
            ("code + artifact", facts.get("total_bytes"), config.artifact_max_bytes, "bytes")):
        if value is not None:
            kept[rule] = value <= limit
            log.event("verdict", rule=rule, outcome="ok" if kept[rule] else "OVER THE LIMIT",
                      value=value, limit=limit, unit=unit)
    result: dict[str, Any] = dict(run_id=config.run_id, preset=config.preset, seed=config.seed,
                                  code_sha256=session.inputs.code_sha256, **facts,
                                  peak_memory_mib=allocated, ledger_seconds=spent, verdicts=kept)
    log.event("result", text_json=json.dumps(result), **result)
    log.close()


# == 12 Stages: train, quantize, evaluate, main ===================================================

def train_stage(session: Session):
    """Train, average, calibrate; write weights, then statistics."""
    config, runtime, log, clock = session.config, session.runtime, session.log, session.clock
    files, inputs = session.files, session.inputs
    with clock.span("setup"):
        trainer = start_training(session)
        state, loader = trainer.state, Loader(inputs.shards, config, runtime)
        calibration = Calibration(state.model, config, runtime) if config.gptq_enabled else None
    with clock.span("warmup"):
        budget = warm_up_and_budget(session, trainer, calibration)
    state.average = Average(state.optimizers.bank, config)
    trained = config.resume and resume_training(session, trainer)
    if not trained:
        runtime.signals.deferred = True
        trainer.train(loader, budget, lambda: score(
            trainer.losses_of, inputs.text, config.whole_windows, runtime), files.checkpoint)
        log.event("ema")
        state.average.apply()
        # as the model holds them: embeddings rounded to its dtype, as scored and as calibrated
        averaged = {name: p.detach().float() for name, p in state.model.named_parameters()}
        log.event("weights", bytes=leave(session, trainer, "weights", averaged))
        log.event("code_size", bytes=inputs.code_bytes)
        # of use until the weights are written
        runtime.first(lambda: files.checkpoint.unlink(missing_ok=True))
    runtime.signals.release()
    if calibration:
        log.event("collecting")
        with clock.span("calibrate"):
            found = calibration.run(trainer.layout, loader, clock, log)
        log.event("collected", hessians=calibration.hessians(), seconds=clock.seconds["calibrate"])
        leave(session, trainer, "stats", found)
    loader.close()
    session.facts.update(steps=state.step)
    if not trained:  # else the seconds before the interruption are not known
        session.facts.update(training_seconds=round(clock.training_seconds(), 3))
    with clock.span("validation"):
        timed_score(session, "prequant", trainer.losses_of, config.whole_windows)
        if config.prequant_sliding:
            timed_score(session, "prequant_sliding", trainer.losses_of, config.sliding_windows)


def leave(session: Session, trainer: Trainer, kind: str, tensors: dict[str, Tensor]) -> int:
    """Write a product of training with what later stages must know of it; returns its bytes."""
    inputs = session.inputs
    header = dict(kind=kind, config=artifact_config(session.config), steps=trainer.state.step,
                  order=list(trainer.layout.order), tokenizer_sha256=inputs.tokenizer_sha256,
                  train_sha256=inputs.train_sha256)
    with session.clock.span("write"):
        return session.runtime.first(write_tensors, getattr(session.files, kind), header, tensors)


def phase_of(header: dict, config: Config, origin) -> int:
    """Return the phase a file was made in; ContainerError where its settings give no such."""
    for number, phase in reversed([*enumerate(phases(config))]):
        if [*phase.layout.order] == header["order"] and number == header.get("phase", number):
            return number
    raise ContainerError(f"{origin}: layer order {header['order'][:99]} is not one its settings "
                         "give; make the file again")


def resume_training(session: Session, trainer: Trainer) -> bool:
    """Go on from this run's averaged weights or checkpoint; returns whether training is over."""
    files, runtime, state = session.files, session.runtime, trainer.state
    trained, started = runtime.share((files.weights.exists(), files.checkpoint.exists()))
    if not (trained or started):
        return False
    path, kind = (files.weights, "weights") if trained else (files.checkpoint, "checkpoint")
    # every rank reads rank 0's bytes
    header, tensors = open_container(runtime.first(path.read_bytes), kind, path)
    step = header["steps" if trained else "step"]
    phase = phase_of(header, session.config, path)
    try:
        if trained:
            check_tensors(tensors, weight_forms(session.config), path)
            state.step, state.phase = step, phase
            state.model.load_state_dict(tensors)
        else:
            state.load(tensors, header, phase)
            session.clock.seconds["train"] = header["training_seconds"]
            trainer.last_checkpoint = f"{path} of step {step}"
    except (KeyError, RuntimeError) as error:
        raise ContainerError(f"{path}: does not fit this model ({error})") from None
    session.facts.update(resumed=True)
    session.log.event("resumed", text=f"step {step} from {path}", step=step, path=str(path))
    return trained


def start_training(session: Session) -> Trainer:
    """Return a Trainer over a freshly initialised model."""
    config, runtime, log = session.config, session.runtime, session.log
    model = session.build_model()
    model.init_weights(config.seed)
    groups = partition(model)
    log.event("parameters", count=sum(p.numel() for p in model.parameters()))
    log.event("optimizer", matrices=len(groups[Role.MATRIX]), embeddings=len(groups[Role.EMBED]),
              controls=len(groups[Role.CONTROL]))
    return Trainer(TrainState(model, Optimizers(model, config, runtime)), config, runtime, log,
                   session.clock)


def warm_up_and_budget(session: Session, trainer: Trainer, calibration) -> float:
    """Warm up, time calibration, and return the schedule's budget in seconds (0: steps only)."""
    config, log, budget = session.config, session.log, session.config.max_wallclock_seconds
    if config.warmup_steps:
        trainer.warm_up()
    if budget and calibration:
        batch = trainer.synthetic(calibration.rows, calibration.longest, calibration.parts)
        calibration.measure(trainer.phases[-1].layout, batch)
        reserve = calibration.reserve_seconds()
        log.event("reserve_measured", batch_seconds=calibration.batch_seconds,
                  batches=calibration.batches(), reserve_seconds=reserve)
        budget -= reserve
        if budget <= 0:
            raise ConfigError([f"MAX_WALLCLOCK_SECONDS={config.max_wallclock_seconds}: calibration "
                               f"alone needs {reserve:.1f} s; raise it or lower "
                               "GPTQ_CALIBRATION_BATCHES"])
        log.event("reserve", reserve_seconds=reserve, effective_ms=1000 * budget)
    describe_phases(session, trainer, budget)
    return budget


def quantize_stage(session: Session) -> dict:
    """Turn averaged weights and Hessians into the artifact; no data, no forward; rank 0 alone."""
    # GPTQ's error feedback needs all of fp32
    with session.clock.span("quantize"), session.runtime.switches(exact=True):
        facts = session.runtime.first(quantize_files, session)
    session.facts.update(facts)
    return facts


def quantize_files(session: Session) -> dict:
    """Read weights and statistics, write the artifact; returns its sizes and steps."""
    log, files = session.log, session.files
    source = files.source(session.config, kind := STAGES["quantize"].reads)
    header, weights = read_tensors(source, kind)
    config = adopt(session.config, header, "quantize", source)
    check_tensors(weights, forms := weight_forms(config), source)
    check_no_more(set(weights) - set(forms), source)
    if not all(torch.isfinite(w).all() for w in weights.values()):
        raise ValueError(f"{source}: weights not finite: training diverged; lower learning rates")
    stats = source.with_name(files.stats.name)
    known = calibration_of(config, stats) if config.gptq_enabled else {}
    quantizer = Quantizer(weights, known, config, session.runtime.device)
    for name, damp in quantizer.redamped.items():
        log.event("gptq_redamp", name=name, damp=damp)
    log.event("quantized", gptq=len(quantizer.gptq_names), rounded=0)
    head = {n: header[n] for n in MADE_BY} | dict(kind="artifact", config=artifact_config(config))
    limit = config.artifact_max_bytes - session.inputs.code_bytes

    def report(multiplier, estimate, packed_bytes):
        log.event("search", multiplier=multiplier, estimated_bytes=int(estimate),
                  packed_bytes=packed_bytes, limit_bytes=limit)

    multiplier, packed = fit_artifact(quantizer, head, limit, report)
    write_file(files.artifact, packed)
    return describe_artifact(session, quantizer, multiplier, len(packed))


def load_artifact(session: Session) -> tuple[Session, GPT, Layout, str]:
    """Read the artifact (rank 0, for all) into a fresh model.

    Returns the session it asks for, the model, its layout and the file's sha256.
    """
    source = session.files.source(session.config, "artifact")
    data = session.runtime.first(source.read_bytes)
    header, tensors = open_container(data, "artifact", source)
    config = adopt(session.config, header, "evaluate", source)
    if session.inputs.tokenizer_sha256 != header["tokenizer_sha256"]:
        raise ConfigError([f"TOKENIZER_PATH={config.tokenizer_file}: not the tokenizer that "
                           f"{source} was trained with; set TOKENIZER_PATH to that one"])
    session = dataclasses.replace(session, config=config)
    # refuses before a hostile header's sizes are built
    state = restore_weights(header, tensors, config, source)
    model = session.build_model()
    model.load_state_dict(state)
    layout = phases(config)[phase_of(header, config, source)].layout
    return session, model, layout, hashlib.sha256(data).hexdigest()


def evaluate_stage(session: Session):
    """Score the artifact on the validation text: whole windows, then sliding ones."""
    runtime, clock, scores = session.runtime, session.clock, {}
    with clock.span("setup"):
        session, model, layout, digest = load_artifact(session)
        config, text = session.config, session.inputs.text

    def losses_of(model):
        return functools.partial(runtime.compile(model.token_losses), layout=layout)

    kinds = {"roundtrip": (losses_of(model), config.whole_windows)}
    if config.sliding_window_enabled:
        kinds["sliding"] = kinds["roundtrip"][0], config.sliding_windows
    if config.eval_mode == "stream":  # another estimator: more context, no restart at each window
        kinds["stream"] = losses_of(session.build_stream_model(model)), config.stream_plan
    path = session.files.folder / f"evaluation.{runtime.rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with clock.span("evaluate"):
        for kind, (losses, windows) in kinds.items():
            task = f"{kind} {digest} {text.sha256} {windows} of {runtime.world_size}"
            scores[kind] = timed_score(session, kind, losses, windows, Journal(path, task))
        if config.adapts != "none":
            values = [config.eval_seq_len, *(getattr(config, name) for name in KNOBS
                                             if name.startswith("ttt_"))]
            task = f"ttt {digest} {text.sha256} {values} of {runtime.world_size}"
            scores["ttt"] = adapted_score(session, model, layout, Journal(path, task))
    data = json.dumps(dict(scores, val_sha256=text.sha256), indent=1).encode()
    runtime.first(write_file, session.files.scores, data)
    path.unlink(missing_ok=True)  # what was finished is in the scores now
    tokens, size = (scores["roundtrip"][name] for name in ("tokens", "bytes"))
    session.facts.update(val_tokens=tokens, val_bytes=size, val_sha256=text.sha256)


def adapted_score(session: Session, model: GPT, layout: Layout, journal) -> dict:
    """Score the text with test-time training; `model` is not the artifact's any more after it."""
    config, log = session.config, session.log
    adaptation = Adaptation(model, layout, session.inputs.text, config, session.runtime)
    progress = functools.partial(log.progress, "ttt")
    if config.adapts == "sgd":
        return timed(session, "ttt", lambda: adaptation.by_stream(progress), text_form="legal_ttt")
    return timed(session, "ttt", lambda: adaptation.by_document(log, journal),
                 text_form="quantized_ttt_phased")


WORK = {"train": train_stage, "quantize": quantize_stage, "evaluate": evaluate_stage}


def start(env, check: bool) -> tuple[Config, Runtime, RunFiles, Inputs, dict]:
    """Read settings, join the ranks, check everything; raises ConfigError with all faults."""
    config = load_config(env)
    runtime = Runtime(env, config)
    tag = runtime.share(time.strftime("%Y%m%d-%H%M%S-") + os.urandom(3).hex())
    config = dataclasses.replace(config, run_id=config.run_id or tag)
    files = RunFiles(config.run_id)
    if kind := config.reads:
        source = files.source(config, kind)
        if runtime.share(source.is_file()):  # rank 0's disk holds the files
            header = runtime.first(lambda: read_tensors(source, kind)[0])
            config = adopt(config, header, config.stage, source)
    inputs, faults = preflight(config, runtime, files)
    report = (predict(config, runtime, inputs.code_bytes)
              if runtime.is_main and (check or not faults) else {})
    if check and runtime.is_main:
        Log(True).show("\n".join(["check: " + report["text_report"], *notices(config, env),
                                  *(f"warning: {line}" for line in inputs.warnings)]))
    if report:
        faults += forecast_faults(config, runtime, report)
    if faults := runtime.share(faults):
        raise ConfigError(faults, shared=True)
    return config, runtime, files, inputs, report


def run(env, check: bool):
    """Run the stages STAGE asks for; with `check`, only everything that is checked before."""
    age, began = process_age_seconds(), time.perf_counter()
    config, runtime, files, inputs, report = start(env, check)
    name, attend, scope, error = choose_attention(config, runtime)
    if check:
        if runtime.is_main:
            val = f"check: val: {inputs.text.name}\n" if inputs.text else ""
            Log(True).show(f"{val}check: all is well; attention {name}, max error against math "
                           f"{error:.1e}")
        return runtime.close()
    with contextlib.ExitStack() as held, runtime.switches(), scope, runtime.signals:
        runtime.first(held.enter_context, claimed(files))
        # with nothing made yet that could be resumed, a training begins anew
        begins = not files.identity.exists() or (config.runs("train") and not config.resume)
        if runtime.is_main and begins:
            write_file(files.identity, json.dumps(identity(config, inputs), indent=1).encode())
        log = Log(runtime.is_main, files.events, files.text_log)
        clock = Clock(sync=runtime.synchronize, start_seconds=age + time.perf_counter() - began)
        session = Session(config, runtime, log, clock, files, inputs, attend, name)
        log_head(session, env, report)
        if config.resume and begins:
            log.event("notice", text=f"RESUME=1: {files.folder} holds no run; this one is new")
        log.event("attention", backend=name, max_error=error)
        describe_data(session)
        try:
            for stage in filter(config.runs, WORK):
                if config.resume and runtime.share(files.done(stage, config)):
                    log.event("resumed", text=f"{stage} was finished before", stage=stage)
                    session.facts.update(resumed=True)
                else:
                    WORK[stage](session)
        except Interrupted as stop:
            log.event("interrupted", signal=str(stop), run_id=config.run_id,
                      folder=str(files.folder))
            raise
        except BaseException as error:
            log.event("failed", console=False, error=f"{type(error).__name__}: {error}")
            raise
        close_run(session)
    runtime.close()


def main(argv: list[str], env) -> int:
    """Run the script; every user mistake ends in clear lines and a non-zero exit code."""
    try:
        match argv:
            case _ if "--help" in argv or "-h" in argv:
                Log(True).show(help_text())
            case [] | ["--check"]:
                run(env, check=bool(argv))
            case ["--inspect", path]:
                Log(True).show(inspect_text(Path(path)))
            case _:
                print(f"error: unknown arguments {' '.join(argv)}: one of --check, --inspect FILE, "
                      "--help; settings are environment variables", file=sys.stderr)
                return 2
        return 0
    except (ValueError, OSError) as error:
        faults, shared = getattr(error, "faults", [str(error)]), getattr(error, "shared", False)
    except Interrupted as stop:
        return 128 + stop.number
    except KeyboardInterrupt:  # before the run took signals over: nothing is begun
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        shared, detail = False, str(error).split("\n")[0]
        if contact_lost(error):
            faults = ["lost touch with another rank, whose own message says why; go on with "
                      f"RESUME=1 and this RUN_ID. {detail}"]
        elif (isinstance(error, (MemoryError, torch.OutOfMemoryError))
              or "can't allocate memory" in str(error)):
            faults = ["out of memory; lower MICRO_BATCH_TOKENS (the result stays the same) or, "
                      "when scoring, VAL_BATCH_TOKENS, TTT_BATCH_DOCS or TTT_BATCH_SEQS; "
                      f"STAGE=evaluate scores what is packed. {detail}"]
        else:
            raise  # not the user's mistake: a traceback is what helps
    if not shared or is_main_rank(env):
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
    return 1


if __name__ == "__main__":
    streams: Any = [stream for stream in (sys.stdout, sys.stderr) if stream]
    for stream in streams:  # what a narrow console cannot hold is replaced
        stream.reconfigure(errors="backslashreplace")
    exit_code = main(sys.argv[1:], os.environ)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Everything is on disk. Tearing down the interpreter under gloo's threads now and then aborted
    # a finished two-rank run (3 of about 130 under load), which torchrun reports as failed.
    os._exit(exit_code)
