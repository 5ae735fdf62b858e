"""Measure tokenize_corpus against SentencePiece alone: python tests/bench_tokenize.py FILE.jsonl.xz

Prints the throughput of SentencePiece's own batched encode on texts held in memory, of the whole
tool from .jsonl.xz and from .jsonl on the same texts, in turns, and the tool's peak memory on two
sizes of text. No test: pytest does not collect it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "data"))
import documents  # noqa: E402
import encoding  # noqa: E402
import tokenize_corpus  # noqa: E402

VAL_DOCS = 50


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def encode_alone(tokenizer, texts, workers):
    """SentencePiece's batched encode at its fastest: all texts at once, arrays out."""
    encoding.load_processor(tokenizer).encode(texts, out_type="numpy", num_threads=workers)


def arguments(files, args, out, options):
    return [*map(str, files), "--tokenizer", str(args.tokenizer), "--out", str(out), "--name",
            "bench", "--val-docs", str(VAL_DOCS), "--workers", str(args.workers), "--fresh",
            *options]


def run_tool(files, args, out, options):
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        assert tokenize_corpus.main(arguments(files, args, out, options)) == 0


def measure_speed(packed, args, folder, options):
    """Print MB/s of the three ways, medians of runs that take turns."""
    texts = [d.text for d in documents.read_documents(packed, documents.Source())]
    text_mb = sum(map(len, texts)) / 1e6
    plain = [write_jsonl(folder / "texts.jsonl", texts)]
    ways = {"SentencePiece alone": lambda: encode_alone(args.tokenizer, texts, args.workers),
            f"tool, {''.join(packed[0].suffixes)}": lambda: run_tool(packed, args, folder, options),
            "tool, .jsonl": lambda: run_tool(plain, args, folder, options)}
    seconds = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, action in ways.items():
            seconds[name].append(seconds_of(action))
    print(f"{text_mb:.1f} MB of text in {len(texts):,} documents, {args.workers} workers, "
          f"{args.repeats} runs each, options: {' '.join(options) or 'none'}")
    alone = statistics.median(seconds["SentencePiece alone"])
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"  {name:22s} {text_mb / median:6.2f} MB/s   {alone / median:.3f} of alone   "
              f"({min(found):.2f} to {max(found):.2f} s)")


def write_jsonl(path, texts):
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text.decode()}, ensure_ascii=False) + "\n")
    return path


def measure_memory(packed, args, folder, options):
    """Print the tool's peak resident memory on some MB of text, in a process of its own."""
    texts, size_bytes = [], 0
    stream = documents.read_documents(packed, documents.Source())
    for size_mb in sorted(args.memory_mb):
        while size_bytes < size_mb * 1_000_000:
            texts.append(next(stream).text)
            size_bytes += len(texts[-1])
        path = write_jsonl(folder / "memory.jsonl", texts)
        command = [sys.executable, str(REPO / "data/tokenize_corpus.py"),
                   *arguments([path], args, folder, options)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        print(f"  {size_bytes / 1e6:6.1f} MB of text: peak memory "
              f"{usage.ru_maxrss / 1024:.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=tokenize_corpus.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[50, 200])
    args, options = parser.parse_known_args()  # whatever else goes to the tool
    with tempfile.TemporaryDirectory() as folder:
        measure_speed(args.files[:1], args, Path(folder), options)
        measure_memory(args.files, args, Path(folder), options)


if __name__ == "__main__":
    main()
