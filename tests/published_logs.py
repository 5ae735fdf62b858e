"""Handwritten logs in the line forms that other systems publish, with invented numbers.

Each builder takes the facts and prints them as that system's script would, so that a test can ask
the reader for the facts back. The clock runs at `before` ms a step up to the switch of depth,
loses `stall` ms there, and runs at `after` ms a step from then on.
"""

import math
from typing import NamedTuple

BATCH_TOKENS = 786_432


class Facts(NamedTuple):
    """What an invented run did; times in ms, sizes in bytes."""

    seed: int = 42
    steps: int = 4964
    switch: int | None = 2000
    before: float = 102.3
    after: float = 125.9
    stall: float = 12_400.0
    sliding: float = 1.08725556
    gap: float = 0.0168
    code: int = 83_119
    artifact: int = 15_898_181

    def ms(self, step):
        """Return the training clock after `step` steps."""
        if self.switch is None or step <= self.switch:
            return self.before * step
        return self.before * self.switch + self.stall + self.after * (step - self.switch)

    def loss(self, step):
        return 2.8 + 6.2 * math.exp(-step / 300) + 0.4 * math.exp(-step / 3000) \
            + self.seed % 7 / 1000

    def score(self, bpb):
        """Return (loss, bpb): 3.727 bytes a token, as 8192 pieces give."""
        return bpb * math.log(2) * 3.72664, bpb

    @property
    def prequant(self):
        return self.sliding + 0.0001

    @property
    def roundtrip(self):
        return self.prequant + self.gap

    @property
    def total(self):
        return self.artifact + self.code


def logged_steps(facts, first, every):
    return [s for s in range(1, facts.steps + 1) if s <= first or s % every == 0]


def tail(facts, bpb, ms):
    loss, bpb = facts.score(bpb)
    return f"val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{ms:.0f}ms"


def minute_line(facts, step):
    """Return a step's line of the systems that print their clock in minutes."""
    ms = facts.ms(step)
    return f"{step}/20000 train_loss: {facts.loss(step):.4f} train_time: {ms / 60000:.1f}m " \
           f"tok/s: {step * BATCH_TOKENS / ms * 1000:.0f}"


SOURCE = 'import os\nprint("final_int6_roundtrip val_loss:{loss:.8f}")\n'


def family_1471(facts):
    """Lines of PRs #1471, #1445, #1395."""
    settings = dict(ema_decay=0.9965, iterations=20000, max_wallclock_seconds=600.0,
                    recur_layers="3,4,5", seed=facts.seed, sliding_window_enabled=True,
                    train_batch_tokens=BATCH_TOKENS, warmdown_frac=0.72)
    ruler = "=" * 100
    lines = [ruler, "Hyperparameters:", *(f"  {k}: {v}" for k, v in sorted(settings.items())),
             ruler, SOURCE, ruler, "Running Python 3.12.3", ruler, "train_shards: 128",
             "val_tokens: 40540160", "model_params:37022812",
             "gptq:reserving 10s, effective=590000ms"]
    lines += [f"warmup_step: {i}/20" for i in (1, 2, 3, 4, 5, 6, 10, 20)]
    lines.append("0/20000 val_loss: 9.0109 val_bpb: 3.4880")
    for step in logged_steps(facts, 5, 500):
        lines.append(minute_line(facts, step))
        if step == facts.switch:
            lines.append(f"recurrence:activated at step {step}, virtual_layers=[0, 1, 2, 3, 4, 5, "
                         "3, 4, 5, 6, 7, 8, 9, 10]")
        if step % 4000 == 0:
            lines.append(f"{step}/20000 val_loss: 2.9000 val_bpb: 1.1260")
    lines += [f"{facts.steps}/20000 val_loss: 2.8100 val_bpb: 1.0887",
              f"stopping_early: wallclock_cap train_time: {facts.ms(facts.steps):.0f}ms "
              f"step: {facts.steps}/20000",
              "peak memory allocated: 33093 MiB reserved: 33112 MiB", "ema:applying EMA weights",
              "pre-quantization post-ema " + tail(facts, facts.prequant, 1988),
              "Serialized model: 137649029 bytes", f"Code size: {facts.code} bytes",
              "GPTQ:collecting Hessians from calibration data...",
              "GPTQ:collected 66 Hessians in 9.8s",
              "GPTQ quantization: 66 layers with full GPTQ, 0 fallback to clip-search",
              "selective_prune: unpruned=15.98MB target=16.0MB",
              "selective_prune: already fits, no pruning needed",
              f"Serialized model int6+brotli: {facts.artifact} bytes",
              f"Total submission size int6+brotli: {facts.total} bytes",
              "final_int6_roundtrip " + tail(facts, facts.roundtrip, 8340),
              "final_int6_sliding_window " + tail(facts, facts.sliding, 79162)]
    return lines


def both_forms(facts, name, bpb, between):
    """Return the short and the exact line of a score, as PR #1392 and the baseline print them."""
    loss, bpb = facts.score(bpb)
    return [f"final_{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {between}",
            f"final_{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}"]


def step_lines(facts, iterations):
    lines = [f"step:0/{iterations} val_loss:8.3080 val_bpb:3.6100 train_time:0ms step_avg:0.01ms"]
    for step in logged_steps(facts, 10, 500):
        ms = facts.ms(step)
        lines.append(f"step:{step}/{iterations} train_loss:{facts.loss(step):.4f} "
                     f"train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
        if step == facts.switch:
            lines.append(f"depth_recurrence:enabled step:{step} layers:[4, 5]")
    ms = facts.ms(facts.steps)
    return lines + [f"step:{facts.steps}/{iterations} val_loss:2.8100 val_bpb:1.1083 "
                    f"train_time:{ms:.0f}ms step_avg:{ms / facts.steps:.2f}ms",
                    f"stopping_early: wallclock_cap train_time:{ms:.0f}ms "
                    f"step:{facts.steps}/{iterations}",
                    "peak memory allocated: 27077 MiB reserved: 27116 MiB"]


def system_1392(facts):
    """Lines of PR #1392."""
    loss, bpb = facts.score(facts.prequant)
    sliding = both_forms(facts, "int6_sliding_window", facts.sliding, "stride:64 eval_time:71237ms")
    return [
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./fineweb_4096_bpe.model",
        "train_loader:dataset:fineweb10B_sp4096 train_shards:80",
        "val_loader:shards pattern=./fineweb_val_*.bin tokens:45508608", "model_params:34400347",
        "mtp_num_heads:0 mtp_loss_weight:0.2 mtp_params:0",
        "XSA:last_11 active_layers:[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]",
        "world_size:8 grad_accum_steps:1",
        "sdp_backends:cudnn=False flash=True mem_efficient=False math=False",
        "attention_mode:gqa num_heads:8 num_kv_heads:4",
        "tie_embeddings:True embed_lr:0.03 head_lr:0.0 matrix_lr:0.02 scalar_lr:0.02",
        f"train_batch_tokens:{BATCH_TOKENS} train_seq_len:2048 iterations:20000 warmup_steps:20 "
        "max_wallclock_seconds:600.000", f"seed:{facts.seed}",
        *(f"warmup_step:{i}/20" for i in range(1, 21)), *step_lines(facts, 20000),
        "ema:applying EMA weights",
        f"DIAGNOSTIC post_ema val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:1843ms",
        "Serialized model: 132376693 bytes", f"Code size: {facts.code} bytes",
        "gptq:building non-banked model for Hessian collection...",
        "gptq:generating autoregressive calibration data (128 seqs x 2048 tokens, temp=0.8)...",
        "gptq:generated 128 sequences in 428.9s",
        "gptq:collecting hessians from autoregressive data...",
        "gptq:collected hessians for 67 layers (AR self-gen)",
        "selective_prune: 9748453 ±1 candidates, unpruned=15.02MB target=15.9MB",
        "selective_prune: already fits, no pruning needed",
        f"Serialized model int6+brotli: {facts.artifact} bytes",
        f"Total submission size int6+brotli: {facts.total} bytes",
        *both_forms(facts, "int6_roundtrip", facts.roundtrip, "eval_time:7405ms"),
        "ngram_eval: enabled=False order=7 min_order=2 buckets=4194304 entropy=True jm=False "
        "per_order_centers=False depth_signal=False", *sliding,
        sliding[1].replace("int6_sliding_window", "int8_zlib_roundtrip")]


def system_1090(facts, whole=True):
    """Lines of PR #1090; its published log ends after the int8 round trip (whole=False)."""
    int8 = facts.roundtrip - 0.01
    lines = [
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "val_loader:shards pattern=./fineweb_val_*.bin tokens:62021632", "model_params:26502232",
        "world_size:1 grad_accum_steps:8", "attention_mode:gqa num_heads:8 num_kv_heads:4",
        "train_batch_tokens:524288 train_seq_len:2048 iterations:20000 warmup_steps:20 "
        "max_wallclock_seconds:4850.000", f"seed:{facts.seed}", *step_lines(facts, 20000),
        "SWA: started at step 4800 (warmdown_start~4926)", "SWA: averaging 15 checkpoints",
        "SWA: applied", "Serialized model: 106317248 bytes", f"Code size: {facts.code} bytes",
        "Serialized model int8+zlib: 24655764 bytes (payload:27000000 raw_torch:27100000 "
        "payload_ratio:3.91x)", f"Total submission size int8+zlib: {24655764 + facts.code} bytes",
        *both_forms(facts, "int8_zlib_roundtrip", int8, "eval_time:19000ms")]
    if not whole:
        return lines
    loss, bpb = facts.score(facts.sliding)
    return lines + [
        f"Serialized model mixed int5/int6/int8+zstd: {facts.artifact} bytes",
        f"Total mixed submission: {facts.total} bytes (FITS)",
        *both_forms(facts, "mixed_roundtrip", facts.roundtrip, "eval_time:19100ms"),
        "Running LoRA TTT eval (score-then-train per chunk, parallelized)...",
        "TTT: 22 LoRA modules, 270336 params, chunk_size=256",
        "TTT: 50000 docs (100 short, 49900 long), rank 8: 49900",
        "  TTT rank 0: 1000/49900 long docs, bpb=1.2000 elapsed=100s",
        f"final_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f} docs:50000 eval_time:900000ms"]


def baseline(facts):
    """Lines of the challenge's own baseline: one packed model, scored over whole windows."""
    ms = facts.ms(facts.steps)
    return [
        "logs/run.txt", "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./x.model",
        "train_loader:dataset:fineweb10B_sp1024 train_shards:25",
        "val_loader:shards pattern=./fineweb_val_*.bin tokens:62021632", "model_params:17059912",
        "world_size:8 grad_accum_steps:1", "attention_mode:gqa num_heads:8 num_kv_heads:4",
        "tie_embeddings:True embed_lr:0.05 head_lr:0.0 matrix_lr:0.04 scalar_lr:0.04",
        f"train_batch_tokens:{BATCH_TOKENS} train_seq_len:1024 iterations:20000 warmup_steps:20 "
        "max_wallclock_seconds:600.000", f"seed:{facts.seed}",
        *(f"warmup_step:{i}/20" for i in range(1, 21)), *step_lines(facts, 20000)[:-3],
        f"step:{facts.steps}/20000 val_loss:2.0727 val_bpb:1.2276 train_time:{ms:.0f}ms "
        f"step_avg:{ms / facts.steps:.2f}ms",
        f"stopping_early: wallclock_cap train_time:{ms:.0f}ms step:{facts.steps}/20000",
        "peak memory allocated: 10184 MiB reserved: 10588 MiB", "Serialized model: 67224983 bytes",
        f"Code size: {facts.code} bytes", f"Total submission size: {67224983 + facts.code} bytes",
        f"Serialized model int8+zlib: {facts.artifact} bytes (payload:17178912 raw_torch:17224025 "
        "payload_ratio:3.91x)", f"Total submission size int8+zlib: {facts.total} bytes",
        *both_forms(facts, "int8_zlib_roundtrip", facts.sliding, "eval_time:1401ms")]


def legal_ttt(facts):
    """Lines of the systems that adapt after scoring, chunk by chunk, on the packed model."""
    sliding, (loss, bpb) = facts.sliding + 0.002, facts.score(facts.sliding)
    return [
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "val_loader:shards pattern=./fineweb_val_*.bin tokens:62021632", "model_params:26993756",
        "world_size:8 grad_accum_steps:1",
        f"train_batch_tokens:{BATCH_TOKENS} train_seq_len:2048 iterations:9000 warmup_steps:20 "
        "max_wallclock_seconds:600.000", f"seed:{facts.seed}",
        *(f"warmup_step:{i}/20" for i in range(1, 21)), *step_lines(facts, 9000),
        "swa:start step:4400", "late_qat:enabled step:4500 scale:0.1499",
        "ema:applying EMA weights",
        f"DIAGNOSTIC post_ema {tail(facts, facts.prequant, 2100)}",
        "Serialized model: 106158518 bytes", f"Code size: {facts.code} bytes",
        f"Serialized model int6+lzma: {facts.artifact} bytes",
        f"Total submission size int6+lzma: {facts.total} bytes",
        *both_forms(facts, "int6_roundtrip", facts.roundtrip, "eval_time:6012ms"),
        *both_forms(facts, "int6_sliding_window", sliding, "stride:64 eval_time:74321ms"),
        both_forms(facts, "int8_zlib_roundtrip", sliding, "")[1],
        "ttt_sliding:start chunks=1893 chunk_tokens=32768 total_windows=969088 stride=64 "
        "ttt_lr=0.002 ttt_epochs=3 freeze_blocks=0",
        "ttt_sliding:params unfrozen=26993756 frozen=0",
        "  ttt_chunk [1/1893] bpb=1.158345 time=0.5s", "  ttt_chunk [11/1893] bpb=1.145 time=2.7s",
        f"ttt_sliding:done val_loss={loss:.6f} val_bpb={bpb:.6f} elapsed=403.4s",
        f"legal_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:403901ms",
        f"legal_ttt_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}"]


def phased_ttt(facts):
    """Lines of the systems with looped layers, a compressed script and phases of adaptation."""
    settings = dict(ema_decay=0.9965, iterations=20000, max_wallclock_seconds=600.0,
                    phased_ttt_enabled=True, seed=facts.seed, sliding_window_enabled=False,
                    train_batch_tokens=BATCH_TOKENS, ttt_enabled=True)
    lines = ["Hyperparameters:", *(f"  {k}: {v}" for k, v in sorted(settings.items())),
             "train_shards: 128", "val_tokens: 40540160", "model_params:35945671",
             "gptq:reserving 12s, effective=588000ms",
             *(f"warmup_step: {i}/20" for i in range(1, 21)),
             *(f"loop_warmup_step: {i}/20" for i in (1, 2, 3, 20)),
             "0/20000 val_loss: 9.0047 val_bpb: 3.4859"]
    for step in logged_steps(facts, 5, 500):
        lines.append(minute_line(facts, step))
        if step == facts.switch:
            lines.append(f"layer_loop:enabled step:{step} frac:0.350 encoder:[0, 1, 2, 3, 4, 5, 3, "
                         "4] decoder:[5, 3, 4, 5, 6, 7, 8, 9, 10]")
    return lines + [
        f"{facts.steps}/20000 val_loss: 2.7800 val_bpb: 1.0770",
        f"stopping_early: wallclock_cap train_time: {facts.ms(facts.steps):.0f}ms "
        f"step: {facts.steps}/20000",
        "peak memory allocated: 41707 MiB reserved: 47048 MiB", "ema:applying EMA weights",
        "diagnostic pre-quantization post-ema " + tail(facts, facts.prequant, 8110),
        "Serialized model: 135417533 bytes", "Code size (uncompressed): 131,887 bytes",
        f"Code size (compressed): {facts.code:,} bytes",
        "GPTQ:collecting Hessians from calibration data...", "GPTQ:collected 67 Hessians in 3.5s",
        "Quantized weights:", "  gptq (int6)+lqer_asym: blocks.mlp.fc.weight",
        f"Serialized model quantized+brotli: {facts.artifact} bytes",
        f"Total submission size quantized+brotli: {facts.total} bytes",
        "diagnostic quantized " + tail(facts, facts.roundtrip, 10412),
        "ttt_lora:warming up compile", "ttt_lora:compile warmup done (112.5s)",
        "beginning TTT eval timer", "ttt_phased: total_docs:50000 prefix_docs:2000 "
        "suffix_docs:48000 num_phases:3 boundaries:[666, 1333, 2000]",
        "ttp: b769/782 bl:2.3084 bb:1.0815 rl:2.3084 rb:1.0815 dl:7190-8497 gd:0",
        "ttpp: phase:1/3 pd:1104 gd:666 t:222.9s", "tttg: c1/111 lr:0.001000 t:0.3s",
        "ttpr: phase:1/3 t:224.0s", "quantized_ttt_phased " + tail(facts, facts.sliding, 455123),
        "total_eval_time:471.3s"]


FAMILIES = dict(baseline=baseline, family_1471=family_1471, system_1392=system_1392,
                system_1090=system_1090, legal_ttt=legal_ttt, phased_ttt=phased_ttt)


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
