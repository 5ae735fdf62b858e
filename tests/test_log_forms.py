"""Laws of the published forms: every common line is read for what it says; so are whole logs."""

import random
import time

import log_forms
import pytest
import summary
from published_logs import FAMILIES, Facts, write

import records

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)

SCORE = dict(val_loss=2.8, val_bpb=1.0834)
# A line of each form that is read, and its reading, where None says that the line tells no figure
# of the run.
LINES = {
    "peak memory allocated: 10184 MiB reserved: 10588 MiB":
        ("peak_memory", {"allocated_mib": 10184}),
    "peak memory: 10184 MiB": ("peak_memory", {"allocated_mib": 10184}),
    "Serialized model: 67224983 bytes": ("weights", {"bytes": 67224983}),
    "Serialized model (raw): 67,224,983 bytes": ("weights", {"bytes": 67224983}),
    "Code size: 47642 bytes": ("code_size", {"bytes": 47642}),
    "Code size (uncompressed): 131,887 bytes": ("code_readable", {"bytes": 131887}),
    "Code size (compressed): 31,887 bytes": ("code_packed", {"bytes": 31887}),
    "step:200/20000 val_loss:2.8000 val_bpb:1.0834 train_time:8600ms step_avg:43.00ms":
        ("val", {**SCORE, "step": 200, "iterations": 20000, "train_time_ms": 8600}),
    "step:200/20000 val_loss:2.8000 val_bpb:1.0834 train_time:8600ms zero_frac:0.2":
        ("val", {**SCORE, "train_time_ms": 8600}),
    "warmup_step:3/20": ("warmup_step", {"step": 3, "steps": 20}),
    "warmup_step: 3/20": ("warmup_step", {"step": 3, "steps": 20}),
    "step:200/20000 train_loss:2.8000 train_time:8600ms step_avg:43.00ms":
        ("train", {"step": 200, "train_loss": 2.8, "train_time_ms": 8600}),
    "step:200/20000 train_loss:2.8000 train_time:8600ms step_avg:43.00ms tok/s:6000000":
        ("train", {"step": 200, "train_loss": 2.8, "train_time_ms": 8600}),
    "step:200/20000 loss:2.8000 t:8600ms step_avg:43.00ms":
        ("train", {"step": 200, "train_loss": 2.8, "train_time_ms": 8600}),
    "train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 "
    "max_wallclock_seconds:600.000": ("settings", {"train_batch_tokens": "524288",
                                                   "max_wallclock_seconds": "600.000"}),
    "world_size:8 grad_accum_steps:1": ("settings", {"world_size": "8", "grad_accum_steps": "1"}),
    "seed:1337": ("settings", {"seed": "1337"}),
    "stopping_early: wallclock_cap train_time:600038ms step:13780/20000":
        ("stopping_early", {"train_time_ms": 600038, "step": 13780, "iterations": 20000}),
    "stopping_early: wallclock_cap train_time: 588099ms step: 4961/20000":
        ("stopping_early", {"train_time_ms": 588099, "step": 4961}),
    "final_int8_zlib_roundtrip_exact val_loss:2.80000000 val_bpb:1.08340000":
        ("roundtrip", {**SCORE, "digits": 8}),
    "Total submission size: 67272625 bytes": ("total_unnamed", {"bytes": 67272625}),
    "Total submission size: 15900000 bytes (15.90 MB)": ("total_unnamed", {"bytes": 15900000}),
    "Total submission size int8+zlib: 15863489 bytes": ("total_size", {"bytes": 15863489}),
    "Total submission int6+zstd: 15863489 bytes": ("total_size", {"bytes": 15863489}),
    "swa:start step:5150": ("averaging", {"step": 5150}),
    "final_int6_roundtrip val_loss:2.8000 val_bpb:1.0834 eval_time:6012ms":
        ("roundtrip", {**SCORE, "eval_ms": 6012, "digits": 4}),
    "final_int8_zlib_roundtrip val_loss:2.8000 val_bpb:1.0834 eval_time:1401ms":
        ("roundtrip", {**SCORE, "eval_ms": 1401}),
    "200/20000 val_loss: 2.8000 val_bpb: 1.0834": ("val", {**SCORE, "step": 200}),
    "gptq:reserving 12s, effective=588000ms": ("reserve", {"effective_ms": 588000}),
    "final_int6_roundtrip_exact val_loss:2.80000000 val_bpb:1.08340000": ("roundtrip", SCORE),
    "final_int6_sliding_window_exact val_loss:2.80000000 val_bpb:1.08340000": ("sliding", SCORE),
    "200/20000 train_loss: 2.8000 train_time: 0.4m tok/s: 6000000":
        ("train", {"step": 200, "train_loss": 2.8, "tokens_per_second": 6000000}),
    "GPTQ:collected 67 Hessians in 3.5s": ("collected", {"hessians": 67, "seconds": 3.5}),
    "final_int6_sliding_window val_loss:2.8000 val_bpb:1.0834 stride:64 eval_time:74321ms":
        ("sliding", {**SCORE, "eval_ms": 74321}),
    "final_int6_sliding_window val_loss:2.8000 val_bpb:1.0834 eval_time:74321ms stride:64":
        ("sliding", {**SCORE, "eval_ms": 74321}),
    "DIAGNOSTIC post_ema val_loss:2.8000 val_bpb:1.0834 eval_time:2100ms":
        ("prequant", {**SCORE, "eval_ms": 2100}),
    "late_qat:enabled step:4500 scale:0.1499": None,
    "gptq (int6): blocks.attn.c_k.weight, blocks.attn.c_q.weight, blocks.mlp.proj.weight": None,
    "loop_warmup_step: 3/20": None,
    "layer_loop:enabled step:2000 frac:0.350 encoder:[0, 1, 2] decoder:[5, 3]":
        ("recurrence", {"step": 2000}),
    "Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 "
    "payload_ratio:3.91x)": ("artifact", {"bytes": 15815847}),
    "Total submission size quantized+brotli: 15948123 bytes": ("total_size", {"bytes": 15948123}),
    "Serialized model quantized+brotli: 15916236 bytes": ("artifact", {"bytes": 15916236}),
    "Serialized model int6+zstd: 15916236 bytes": ("artifact", {"bytes": 15916236}),
    "Total submission size int6+zstd: 15948123 bytes": ("total_size", {"bytes": 15948123}),
    "pre-quantization post-ema val_loss:2.80000000 val_bpb:1.08340000 eval_time:1988ms":
        ("prequant", SCORE),
    "gptq (int8): tok_emb.weight": None,
    "ttt_lora:compile warmup done (112.5s)": ("ttt_began", {}),
    "Serialized model int6+lzma: 15916236 bytes": ("artifact", {"bytes": 15916236}),
    "Total submission size int6+lzma: 15948123 bytes": ("total_size", {"bytes": 15948123}),
    "diagnostic quantized val_loss:2.80000000 val_bpb:1.08340000 eval_time:10412ms":
        ("roundtrip", {**SCORE, "eval_ms": 10412}),
    "ttt_chunk [11/1893] bpb=1.145112 time=2.7s": ("ttt_began", {}),
    "diagnostic pre-quantization post-ema val_loss:2.80000000 val_bpb:1.08340000 eval_time:1ms":
        ("prequant", SCORE),
    "tttg: c1/111 lr:0.001000 t:0.3s": None,
    "quantized_ttt_phased val_loss:2.80000000 val_bpb:1.08340000 eval_time:455123ms":
        ("ttt", {**SCORE, "eval_ms": 455123}),
    "ttp: b769/782 bl:2.3084 bb:1.0815 rl:2.3084 rb:1.0815 dl:7190-8497 gd:0": ("ttt_began", {}),
    "quantized_sliding_window val_loss:2.80000000 val_bpb:1.08340000 eval_time:91234ms":
        ("sliding", {**SCORE, "eval_ms": 91234}),
    "quantized val_loss:2.80000000 val_bpb:1.08340000 eval_time:10412ms": ("roundtrip", SCORE),
    "ttpp: phase:1/3 pd:1104 gd:666 t:222.9s": ("ttt_began", {}),
    "ttpr: phase:1/3 t:224.0s": None,
    "ttt_sliding:done val_loss=2.800000 val_bpb=1.083400 elapsed=403.4s":
        ("ttt", {**SCORE, "eval_ms": 403400, "digits": 6}),
    "ttt_sliding:done val_loss=2.800000 val_bpb=1.083400 elapsed=403.4sttt_sliding:done "
    "val_loss=2.800000 val_bpb=1.083400 elapsed=403.5s": ("ttt", {**SCORE, "eval_ms": 403400}),
    "ttt_sliding:params unfrozen=26993756 frozen=0": None,
    "ttt_phased: total_docs:50000 prefix_docs:2000 suffix_docs:48000 num_phases:3 "
    "boundaries:[666, 1333, 2000]": ("ttt_began", {}),
    "gptq (int6)+lqer_asym: blocks.mlp.fc.weight": None,
    "gptq:calibrated 67 layers in 12.5s": ("collected", {"seconds": 12.5}),
    "ttt_sliding:start chunks=1893 chunk_tokens=32768 total_windows=969088 stride=64 ttt_lr=0.002 "
    "ttt_epochs=3 freeze_blocks=0": ("ttt_began", {}),
    "Total submission size int6+brotli: 15948123 bytes": ("total_size", {"bytes": 15948123}),
    "Serialized model int6+brotli: 15916236 bytes": ("artifact", {"bytes": 15916236}),
    "gptq_quantize: 66 GPTQ layers, 1 naive layers": None,
    "legal_ttt val_loss:2.8000 val_bpb:1.0834 eval_time:403901ms":
        ("ttt", {**SCORE, "eval_ms": 403901}),
    "legal_ttt_exact val_loss:2.80000000 val_bpb:1.08340000": ("ttt", SCORE),
    "gptq (int7)+lqer_asym: tok_emb.weight": None,
    "Serialized model quantized+pergroup: 15916236 bytes": ("artifact", {"bytes": 15916236}),
    "Total submission size quantized+pergroup: 15948123 bytes": ("total_size", {"bytes": 15948123}),
    "swa:applying averaged 13 checkpoints": None,
    "gptq:reserving 14000ms from training budget, effective=586000ms": None,
    "Serialized model int6+zstd-22: 15916236 bytes (payload:26000000 raw_torch:26060000 "
    "payload_ratio:4.08x)": ("artifact", {"bytes": 15916236}),
    "GPTQ quantization: 66 layers with full GPTQ, 0 fallback to clip-search":
        ("quantized", {"gptq": 66}),
    "final_int6_ttt_exact val_loss:2.80000000 val_bpb:1.08340000": ("ttt", SCORE),
    "final_sliding_window_exact val_loss:2.80000000 val_bpb:1.08340000": ("sliding", SCORE),
    "gptq (int7)+awqgrpint8+lqer_asym: tok_emb.weight": None,
    "quantized_ttt val_loss:2.80000000 val_bpb:1.08340000 eval_time:345678ms": ("ttt", SCORE),
    "final_int6_ttt val_loss:2.8000 val_bpb:1.0834 stride:64 eval_time:403901ms":
        ("ttt", {**SCORE, "eval_ms": 403901}),
    "legal_ttt_exact val_loss:2.80000000 val_bpb:1.08340000 eval_time:403901ms":
        ("ttt", {**SCORE, "eval_ms": 403901}),
    "gptq:calibrating with 256 batches (training data)...": ("collecting", {"batches": 256}),
    "ttt:done val_loss=2.800000 val_bpb=1.083400 elapsed=403.4s": ("ttt", {"eval_ms": 403400}),
    "Total submission size int6+zstd-22: 15948123 bytes": ("total_size", {"bytes": 15948123}),
    "gptq:generated 64 sequences in 172.9s": None,
    # rarer ones that decide a final score
    "recurrence:activated at step 3000 virtual_layers=[0, 1, 2]": ("recurrence", {"step": 3000}),
    "sliding_eval [ 50%] 12/24 windows running_bpb=1.1": ("sliding_began", {}),
    "final_slot_exact val_loss:2.80000000 val_bpb:1.08340000": ("slot", SCORE),
    "final_sliding_window+slot24steps val_loss:2.8000 val_bpb:1.0834 stride:64 eval_time:9ms":
        ("slot", SCORE),
    "slot_sliding:done val_loss=2.800000 val_bpb=1.083400 elapsed=9.4s": ("slot", SCORE),
    "ngram_eval_exact val_loss:2.80000000 val_bpb:1.08340000": ("ngram", SCORE),
    "final_int6_sliding_window_ngram5_exact val_loss:2.80000000 val_bpb:1.08340000":
        ("ngram", SCORE),
    "final_int6_sliding_window_s64_exact val_loss:2.80000000 val_bpb:1.08340000":
        ("sliding", SCORE),
    "final_sliding val_loss:2.8000 val_bpb:1.0834 (stride=64 T=2048) time:71000ms":
        ("sliding", {**SCORE, "eval_ms": 71000}),
    "final_int6_zstd-22_roundtrip_exact val_bpb:1.0834": ("roundtrip", {"val_bpb": 1.0834}),
    "final_int6_zstd-22_roundtrip val_loss:2.8000 val_bpb:1.0834 eval:2345ms":
        ("roundtrip", {**SCORE, "eval_ms": 2345}),
    "Final BPB: final_int6_sliding_window_exact val_loss:2.80000000 val_bpb:1.08340000":
        ("sliding", SCORE),
    "post-prequant-ttt val_loss:2.80000000 val_bpb:1.08340000 eval_time:9ms": ("ttt", SCORE),
    "final_xnor val_loss:2.8000 val_bpb:1.0834": ("other", SCORE),
    "neural_only_sw val_loss:2.8000 val_bpb:1.0834": ("aside", SCORE),
    "ema_eval val_bpb:1.0834 eval_time:9ms": ("aside", {"val_bpb": 1.0834}),
    "Using ema weights (val_bpb=1.083412)": ("aside", {"val_bpb": 1.083412}),
    "prequant_ttt:epoch 1/6 val_bpb=1.083400 lr=0.0005 time=21.5s": ("aside", {}),
    "ttt_progress: batch 1/9 batch_loss:2.8 batch_bpb:1.1 running_loss:2.8 running_bpb:1.1": (
        "ttt_began", {}),
    "depth_recurrence:enabled step:3000 layers:[4, 5]": ("recurrence", {"step": 3000}),
    "total_eval_time:471.3s": ("total_eval", {"seconds": 471.3}),
}
STAMPS = ("", "[05:21:58] ", "1776143349.278 ", "2026-04-14T05:21:58Z ",
          "2026-04-14 05:21:58,123 - ")


@pytest.mark.parametrize("line", LINES)
def test_published_lines_are_read_for_what_they_say(line):
    expected = LINES[line]
    for stamp in STAMPS:
        reader = log_forms.LineReader()
        reader.has_steps = True
        raw = (stamp + line + "\n").encode()
        event = None if reader.is_plain(raw) else reader.read(raw)
        assert reader.spoilt == reader.unread == []
        if expected is None:
            assert event is None
        else:
            kind, fields = expected
            assert event is not None and event["event"] == kind
            assert {name: event.get(name) for name in fields} == pytest.approx(fields)


# -- whole logs ------------------------------------------------------------------------------------

def read(folder, lines, name="train.log"):
    return logs.read_run(write(folder / name, lines))


# By family: the final score's kind, what it took, s, and whether it prints a round trip of its own.
ENDS = {"baseline": ("roundtrip", 1.401), "family_1471": ("sliding", 79.162),
        "system_1392": ("sliding", 71.237), "system_1090": ("ttt", 900.0),
        "legal_ttt": ("ttt", 403.4), "phased_ttt": ("ttt", 471.3)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stamp", STAMPS[:3])
def test_whole_logs_of_every_family_are_read_right_without_a_false_alarm(family, stamp, tmp_path):
    facts = Facts(switch=None if family in ("baseline", "system_1090") else 2000)
    if family == "baseline":
        facts = facts._replace(gap=facts.sliding - facts.prequant)  # its one score
    run = read(tmp_path, [stamp + line for line in FAMILIES[family](facts)])
    kind, seconds = ENDS[family]
    assert run.complete and run.warnings == run.notes == []
    assert (run.final, run.seed, run.steps) == (kind, facts.seed, facts.steps)
    digits = run.scores[kind].digits
    assert digits == (4 if family == "system_1090" else 8)
    assert run.bpb(kind) == round(facts.sliding, digits)
    assert run.scores[kind].loss == round(facts.score(facts.sliding)[0], digits)
    if family not in ("baseline", "system_1090"):
        assert run.bpb("prequant") == pytest.approx(facts.prequant, abs=5.1e-5)
    assert run.bpb("roundtrip") == pytest.approx(facts.roundtrip, abs=1e-8)
    assert (run.sizes.artifact, run.sizes.code, run.sizes.total) \
        == (facts.artifact, facts.code, facts.total)
    found, pace = summary.measures(run), summary.speeds(run)
    assert found["evaluation_seconds"] == pytest.approx(seconds)
    assert found["train_seconds"] == pytest.approx(facts.ms(facts.steps) / 1000, abs=1e-3)
    assert pace.before_ms == pytest.approx(facts.before, abs=0.02)
    if facts.switch:
        assert pace.after_ms == pytest.approx(facts.after, abs=0.02)
        assert pace.stall_seconds == pytest.approx(facts.stall / 1000, abs=0.05)


@pytest.mark.parametrize("lost, family", [(1, "phased_ttt"), (5, "legal_ttt"), (1, "family_1471"),
                                          (3, "legal_ttt"), (1, "system_1090")])
def test_a_stage_that_was_to_come_makes_a_log_incomplete(lost, family, tmp_path):
    lines = FAMILIES[family](Facts())
    if family == "phased_ttt":
        lines = lines[:-1]
    run = read(tmp_path, lines[:-lost])
    assert not run.complete and "final score" in run.missing
    assert summary.measures(run)["final_bpb"] is None
    assert any("was to come" in note for note in run.notes)


def test_a_traceback_behind_the_last_score_is_told(tmp_path):
    lines = FAMILIES["legal_ttt"](Facts())
    at = next(i for i, line in enumerate(lines) if line.startswith("final_int6_sliding"))
    run = read(tmp_path, [*lines[:at], "Traceback (most recent call last):", '  File "x.py"'])
    assert not run.complete and any("traceback" in text for text in run.warnings)
    whole = read(tmp_path, ["Traceback (most recent call last):", *lines])
    assert whole.complete and whole.warnings == []


def test_a_score_under_a_wrong_name_overwrites_nothing(tmp_path):
    facts = Facts()
    lines = FAMILIES["legal_ttt"](facts)
    wrong = next(i for i, line in enumerate(lines) if line.startswith("final_int8_zlib"))
    for changed in (lines, [*lines[:wrong], *lines[wrong + 1:], lines[wrong]]):
        run = read(tmp_path, changed)
        assert run.bpb("roundtrip") == pytest.approx(facts.roundtrip, abs=1e-8)
        assert run.final == "ttt"
    lone = [line for line in lines if "int6_roundtrip" not in line]
    run = read(tmp_path, lone)  # then nobody knows the round trip
    assert run.bpb("roundtrip") is None and "round-trip score" in run.missing and run.complete


def test_a_disputed_score_is_final_under_its_own_name_and_noted(tmp_path):
    lines = [*FAMILIES["legal_ttt"](Facts()),
             "final_slot_exact val_loss:1.80000000 val_bpb:0.70000000"]
    run = read(tmp_path, lines)
    assert run.final == "slot" and run.scores["slot"].name == "final_slot" and run.complete
    assert any("disputed" in note for note in run.notes)


def test_a_name_that_nobody_knows_is_told_not_used(tmp_path):
    lines = FAMILIES["baseline"](Facts())
    run = read(tmp_path, [*lines, "something new val_loss:1.8000 val_bpb:0.7000"])
    assert run.final == "roundtrip"
    assert any("something new" in text and f"line {len(lines) + 1}" in text
               for text in run.warnings)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_runs_behind_each_other_the_last_is_read_and_said(family, tmp_path):
    first, last = Facts(seed=1, sliding=1.1, artifact=15_000_000), Facts(seed=2)
    run = read(tmp_path, FAMILIES[family](first) + FAMILIES[family](last))
    alone = read(tmp_path, FAMILIES[family](last), "alone.log")
    assert (run.seed, run.scores, run.sizes, run.train) \
        == (alone.seed, alone.scores, alone.sizes, alone.train)
    assert run.complete and any("several runs" in text for text in run.warnings)


def heap(folder, count, rng):
    """Write a heap of logs, whole, cut, interleaved, stamped, concatenated; return their truth.

    {path: the facts that may be stated, or None where two runs are mixed}
    """
    truth, builders = {}, list(FAMILIES.values())
    for i in range(count):
        build, facts = rng.choice(builders), Facts(seed=i, sliding=round(1.05 + i / 1e4, 8))
        lines, damage = build(facts), i % 5
        if damage == 1:
            lines = lines[:rng.randrange(20, len(lines))]
        elif damage == 2:
            stamp = rng.choice(STAMPS[1:])
            lines = [stamp + line for line in lines]
        elif damage == 3:
            lines = build(Facts(seed=-1, sliding=1.2)) + lines
        elif damage == 4:
            queues = [lines, build(facts._replace(seed=-1, sliding=1.2, artifact=1, steps=4900))]
            lines = []
            while any(queues):
                lines.append(rng.choice([q for q in queues if q]).pop(0))
        path = write(folder / f"run{i}.log", lines)
        truth[path] = None if damage == 4 else facts
    return truth


def check_against(run, facts):
    """Check that a run of the heap states nothing but the truth, or nothing."""
    final = summary.measures(run)["final_bpb"]
    if facts is None:
        assert final is None and run.seed is None and run.sizes.artifact is None and run.warnings
        return
    assert run.seed in (None, facts.seed) and run.steps in (None, facts.steps)
    assert final is None or abs(final - facts.sliding) < 5.1e-5 or run.final == "roundtrip"
    assert final is not None or "final score" in run.missing
    assert run.sizes.artifact in (None, facts.artifact, 24_655_764)  # #1090's first model
    for point in run.train:
        assert point.train_loss == pytest.approx(facts.loss(point.step), abs=5.1e-5)


def test_a_mixed_heap_gives_no_wrong_figure(tmp_path):
    for path, facts in heap(tmp_path, 60, random.Random(0)).items():
        check_against(logs.read_run(path), facts)


@pytest.mark.slow
def test_a_thousand_logs_are_read_in_ten_seconds(tmp_path, capsys):
    heap(tmp_path, 1000, random.Random(1))
    since = time.perf_counter()
    assert records.main(["read", str(tmp_path)]) == 0
    assert time.perf_counter() - since < 10
