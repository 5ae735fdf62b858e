"""Print what tests/gpu_check.sh has found so far, most important first.

    python tests/gpu_report.py FOLDER

Reads whatever of full_run.txt, events.jsonl, bench.jsonl, kernels.jsonl and sections.txt is there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Iterator

# (layers, length) -> ms a step of each GPU's share, packed rows: logs of PR #2014
PUBLISHED_FRONTIER_MS = {(11, 1024): 91.7, (11, 2048): 96.9, (17, 2048): 141.1, (17, 3072): 146.1}
PUBLISHED_MS = {11: 102.3, 14: 125.7}  # PR #1471 on H100s with FlashAttention-3


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def rows_of(path: Path) -> list[dict]:
    """Return the JSON objects of a file, one a line; a line cut short is left out."""
    found = []
    for line in text_of(path).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def full_run_lines(folder: Path) -> Iterator[str]:
    """Yield whether the run switched, packed and scored, its scores, and ms a step by depth."""
    log, events = text_of(folder / "full_run.txt"), rows_of(folder / "events.jsonl")
    ends = re.findall(r"^(FAILED: .*|ok: .*)$", log, re.M)
    yield "full run: " + ("; ".join(ends) or "did not finish")
    facts = next((e for e in events if e["event"] == "result"), {})
    names = ("steps", "prequant_bpb", "roundtrip_bpb", "sliding_bpb", "total_bytes",
             "peak_memory_mib")
    if facts:
        yield "  " + " ".join(f"{name}={facts[name]}" for name in names if name in facts)
    switch = next((e["step"] for e in events if e["event"] == "recurrence"), None)
    train = [e for e in events if e["event"] == "train"]
    spans: dict[str, list[float]] = {}
    for a, b in zip(train, train[1:]):
        if b["step"] - a["step"] > 1:  # single steps are logged at the start, and are slow
            late = switch is not None and a["step"] > switch
            early = switch is None or b["step"] <= switch
            if late or early:
                pace = 1000 * (b["train_seconds"] - a["train_seconds"]) / (b["step"] - a["step"])
                spans.setdefault("after" if late else "before", []).append(pace)
    for depth, paces in spans.items():
        paces.sort()
        yield f"  {depth} the switch: {paces[len(paces) // 2]:.1f} ms a step, by the run's clock"
    for event in events:
        if event["event"] in ("recompiled", "failed"):
            yield f"  {event}"


def step_lines(rows: list[dict]) -> Iterator[str]:
    """Yield the step table."""
    yield "step at 98,304 tokens unless --tiny (device rows name the machine)"
    for row in rows:
        if row["row"] == "device":
            yield (f"  on {row['device_name']}, torch {row['torch']}, attention {row['backend']}, "
                   f"{row['matrix_tflops']} TFLOP/s in one product, {row['tokens']} tokens")
        if row["row"] == "step":
            published = PUBLISHED_MS.get(row["layers"])
            context = f" (PR #1471, H100: {published})" if published else ""
            yield (f"  {row['side']:5} {row['layers']:2} layers {row['ms']:8.2f} ms "
                   f"[{row['low_ms']:.2f}, {row['high_ms']:.2f}] {row['tflops']} TFLOP/s "
                   f"{100 * row['roof_share']:.0f} % of the roof{context}")
        if row["row"] == "frontier":
            published = PUBLISHED_FRONTIER_MS.get((row["layers"], row["length"]))
            context = f" (PR #2014, 8×H100: {published})" if published and row["masked"] else ""
            yield (f"  frontier, {row['layers']} layers, length {row['length']}, "
                   f"{'documents apart' if row['masked'] else 'whole windows'}, "
                   f"{row['backend']}: {row['ms']:.2f} ms{context}")
        if row["row"] == "speedup" and "ours_over_plain" in row:
            yield f"  ours over plain {row['depth']} the switch: {row['ours_over_plain']:.3f}"


def kernel_lines(kernels: list[dict], rows: list[dict]) -> Iterator[str]:
    """Yield what each candidate saves in the step, alone, and whether it is right."""
    yield "candidates"
    for row in rows:
        if row["row"] == "swap":
            yield (f"  {row['candidate']:24} {row['verdict']:4} saves "
                   f"{100 * row['saved_share']:.2f} % of the step, spread "
                   f"{100 * row['spread_share']:.2f} %")
    for row in kernels:
        if "agrees" in row:
            verdict = "equal to its plain form" if row["agrees"] else "WRONG"
            yield f"  {row['candidate']} {row['dtype']} {row.get('sizes', '')}: {verdict}"
        else:
            yield (f"  {row['candidate']}: forward, and with backward: fused {row['fused_ms']} ms, "
                   f"plain {row['plain_ms']} ms, spread {row['spread_ms']} ms")


def other_lines(rows: list[dict]) -> Iterator[str]:
    """Yield evaluation, memory, optimizer, loader, GPTQ, packing as they were printed."""
    yield "parts"
    told = {"device", "step", "compile", "swap", "frontier"}
    for row in rows:
        if row["row"] not in told and "ours_over_plain" not in row:
            fields = " ".join(f"{k}={v}" for k, v in row.items() if k != "row")
            yield f"  {row['row']:10} {fields}"


def report(folder: Path) -> str:
    """Return the report of a folder, whatever is missing in it."""
    rows, kernels = (rows_of(folder / f"{name}.jsonl") for name in ("bench", "kernels"))
    sections = text_of(folder / "sections.txt").split("\n")
    ended = [f"  {line} s" for line in sections if line]
    return "\n".join([*full_run_lines(folder), *step_lines(rows), *kernel_lines(kernels, rows),
                      *other_lines(rows), "sections: name, exit code (124: cut short), seconds",
                      *ended, ""])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(report(Path(sys.argv[1])), end="")
