"""Measure tokenize_corpus against SentencePiece alone.

    python tests/bench_tokenize.py train_*.jsonl.xz --tokenizer fineweb_8192_bpe.model
    python tests/bench_tokenize.py val.jsonl.xz --compare fineweb_*.model

The first prints the throughput of SentencePiece's own batched encode on texts held in memory, and
of the whole tool from .jsonl.xz and from .jsonl on the same texts (the first file's), in turns; and
the tool's peak memory on two sizes of text. The second prints what tokenizers make of the texts: a
table of tokens, bytes a token, and what normalisation changes. No test: pytest does not collect it.
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
import caseops  # noqa: E402
import documents  # noqa: E402
import encoding  # noqa: E402
import tokenize_corpus  # noqa: E402

VAL_DOCS = 50
# The system's ru_maxrss of a child begins at its parent's size; this is the process's own (Linux)
PEAK_MEMORY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import tokenize_corpus
status = tokenize_corpus.main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""


def seconds_of(action) -> tuple[float, float]:
    """Return the wall and the CPU seconds of an action; the latter hold on a busy machine too."""
    start, start_cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - start_cpu


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
    medians = {name: [statistics.median(column) for column in zip(*found)]
               for name, found in seconds.items()}
    alone, alone_cpu = medians["SentencePiece alone"]
    for name, (wall, cpu) in medians.items():
        walls = [wall for wall, _ in seconds[name]]
        print(f"  {name:20s} {text_mb / wall:6.2f} MB/s, {alone / wall:.3f} of alone "
              f"({min(walls):.2f} to {max(walls):.2f} s); CPU {cpu:.2f} s, {alone_cpu / cpu:.3f}")


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
        command = [sys.executable, "-c", PEAK_MEMORY, str(REPO / "data"),
                   *arguments([path], args, folder, options)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              check=True)
        print(f"  {size_bytes / 1e6:6.1f} MB of text: peak memory "
              f"{int(done.stderr.split()[-2]) / 1024:.0f} MiB")


def compare_tokenizers(files, tokenizers):
    """Print one row of a Markdown table per file and tokenizer; bytes a token count the BOS."""
    print("| text | tokenizer | tokens | raw bytes | bytes a token | documents | changed by "
          "normalisation | in length | bytes by which |\n|---|---|---|---|---|---|---|---|---|")
    for path in files:
        raws = [d.text for d in documents.read_documents([path], documents.Source())]
        for model in tokenizers:
            print(f"| {path.name} | {model.stem} | {table_row(raws, model)} |")


def table_row(raws, model):
    """Return the figures of one tokenizer on some documents; CaseOps counts as undone again."""
    processor = encoding.load_processor(model)
    undo, texts = str, raws
    if processor.piece_to_id(caseops.TITLE) != processor.unk_id():
        undo, texts = caseops.from_caseops, [caseops.encode_utf8(raw) for raw in raws]
    tokens = sum(map(len, encoding.encode_batch(processor, texts, tokenize_corpus.cores())))
    read_back = [undo(encoding.normalised_text(processor, text.decode())).encode()
                 for text in texts]
    raw_bytes = sum(map(len, raws))
    pairs = list(zip(raws, read_back))
    figures = (f"{tokens:,}", f"{raw_bytes:,}", f"{raw_bytes / tokens:.4f}", f"{len(raws):,}",
               f"{sum(a != b for a, b in pairs):,}", f"{sum(len(a) != len(b) for a, b in pairs):,}",
               f"{sum(len(b) - len(a) for a, b in pairs):+,}")
    return " | ".join(figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokenizer", type=Path)
    what.add_argument("--compare", type=Path, nargs="+", metavar="TOKENIZER")
    parser.add_argument("--workers", type=int, default=tokenize_corpus.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[50, 200])
    args, options = parser.parse_known_args()  # whatever else goes to the tool
    if args.compare:
        return compare_tokenizers(args.files, args.compare)
    with tempfile.TemporaryDirectory() as folder:
        if args.repeats:
            measure_speed(args.files[:1], args, Path(folder), options)
        measure_memory(args.files, args, Path(folder), options)


if __name__ == "__main__":
    main()
