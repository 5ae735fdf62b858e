"""Turn documents into token shards in the published format, ready for train_gpt.py.

    python data/tokenize_corpus.py docs.jsonl --tokenizer data/tokenizers/fineweb_8192_bpe.model
    python data/tokenize_corpus.py my_texts/ --train-tokenizer --vocab-size 4096 --val-docs 500

Reads .jsonl (key "text"), .txt, either of them packed as .xz, .gz or .zst, .parquet, and folders
of these. The first --val-docs documents, in the order given, are validation; the rest is training.
To choose them, name a file of validation documents first. A BOS precedes each document, no EOS
follows, and documents run on across shards.

Written under --out: datasets/NAME/ with fineweb_{train,val}_000000.bin and so on, byte sidecars
fineweb_val_bytes_000000.bin (the raw bytes that each validation token stands for) and
manifest.json (documents, bytes, tokens, SHA-256 of every file); tokenizers/NAME.model. A run that
was stopped, however roughly, goes on when the same command is given again, and ends in the same
bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from documents import (
    MAX_DOCUMENT_BYTES,
    PACKED_SUFFIXES,
    SUFFIXES,
    DataError,
    Document,
    Source,
    find_files,
    read_documents,
    shuffled,
)

try:
    import caseops
    import encoding
    import integrity
    import numpy as np
    import sentencepiece
    import shards
    MISSING = None
except ModuleNotFoundError as error:  # told by main, so that --help works without them
    MISSING = error.name

TOOL_VERSION = 1  # raise it whenever the same command would give other bytes
SHARD_TOKENS = 100_000_000  # of every published shard but the last
VAL_DOCS = 50_000  # of the published document list; another number leaks validation text (#2127)
BATCH_BYTES = 1 << 20  # of text handed to SentencePiece at once, per worker
BATCHES_AHEAD = 3  # hides reading and writing behind the encoding, and bounds memory
SENTENCE_BYTES = 4192  # SentencePiece's trainer passes over longer ones
TEXT_PER_PACKED_BYTE = 5  # a guess, good enough to size the shuffle's files
PARTS = ("val", "train")
PIP_LINE = "python -m pip install -r data/requirements.txt"


# ---- encoding, many documents at a time ------------------------------------------------------


class Encoded(NamedTuple):
    """One document as it goes into the shards; no tokens where it is dropped."""

    tokens: np.ndarray  # (N,) uint16, the first a BOS
    raw_bytes: np.ndarray | None  # (N,) uint16 in validation, if there is a sidecar
    counts: dict[str, int]  # what it adds to the part's counts


class Encoder:
    """Documents to Encoded; what comes out does not depend on the number of workers."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, use_caseops: bool,
                 sidecar: bool, workers: int):
        self.processor, self.use_caseops = processor, use_caseops
        self.sidecar, self.workers = sidecar, workers
        self.rules = encoding.byte_rules(processor)

    def stream(self, documents: Iterable[Document], part: str) -> Iterator[Encoded]:
        """Yield the documents of a part encoded, in order, some batches being under way."""
        encode = self.encode_val if part == "val" else self.encode_train
        with ThreadPoolExecutor(2) as pool:  # one batch's ragged end overlaps the next's start
            pending: deque[Any] = deque()
            for batch in batches(documents, BATCH_BYTES * self.workers):
                pending.append(pool.submit(encode, batch))
                if len(pending) > BATCHES_AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()

    def texts(self, batch: list[Document]) -> list[bytes]:
        """Return what the tokenizer gets to see of each document."""
        if not self.use_caseops:
            return [document.text for document in batch]
        return [caseops.encode_utf8(document.text) for document in batch]

    def encode_train(self, batch: list[Document]) -> list[Encoded]:
        """Return documents as tokens alone."""
        found = encoding.encode_batch(self.processor, self.texts(batch), self.workers)
        return [pack(document, tokens) for document, tokens in zip(batch, found)]

    def encode_val(self, batch: list[Document]) -> list[Encoded]:
        """Return documents as tokens with their raw bytes, counts telling both denominators.

        Raises DataError where what a score would divide by cannot be believed: the byte table
        without a sidecar, else the sidecar.
        """
        texts = self.texts(batch)
        found = encoding.spans_batch(self.processor, texts, self.workers)
        decoded = self.processor.decode([spans.token_ids.tolist() for spans in found],
                                        num_threads=self.workers)
        tokens = [np.insert(spans.token_ids, 0, encoding.BOS_ID) for spans in found]
        raw_bytes = [self.raw_bytes(text, spans) for text, spans in zip(texts, found)]
        counts = self.check_bytes(batch, tokens, raw_bytes)
        starts = np.cumsum([0, *map(len, tokens[:-1])])
        by_table, by_text = (np.add.reduceat(column, starts, dtype=np.int64).tolist()
                             for column in (counts.table, counts.text))
        encoded = []
        for i, (document, text) in enumerate(zip(batch, texts)):
            normalised, surface_bytes = decoded[i].encode(), int(raw_bytes[i].sum())
            encoded.append(pack(
                document, tokens[i], raw_bytes[i].astype(np.uint16) if self.sidecar else None,
                table_bytes=by_table[i], text_bytes=by_text[i], surface_bytes=surface_bytes,
                edge_bytes=len(document.text) - surface_bytes,
                normalised_documents=int(normalised != text),
                resized_documents=int(len(normalised) != len(text))))
        return encoded

    def raw_bytes(self, text: bytes, spans: encoding.Spans) -> np.ndarray:
        """Return the raw bytes (N,) int64 under the tokens of a text, BOS first."""
        edges = caseops.original_offsets(text)[spans.edges] if self.use_caseops else spans.edges
        return np.insert(np.diff(edges), 0, 0)

    def check_bytes(self, batch: list[Document], tokens: list[np.ndarray],
                    raw_bytes: list[np.ndarray]) -> encoding.Counts:
        """Return the bytes of all documents' tokens in one row.

        Raises DataError, naming the document, where those of some cannot be believed.
        """
        counts, found = self.judge(tokens, raw_bytes)
        if not found:
            return counts
        ends = np.cumsum(list(map(len, tokens)))
        i = int(np.searchsorted(ends, found[0].position, side="right"))
        alone = self.judge(tokens[i:i + 1], raw_bytes[i:i + 1])[1][0]  # with its own numbers
        if self.rules.is_operator[tokens[i][alone.position]]:
            remedy = "it holds a CaseOps operator itself: give --caseops, which marks such"
        elif self.sidecar:
            remedy = "shorten its white space or control characters, or give --no-sidecar"
        else:
            remedy = "leave --no-sidecar away, or use another tokenizer"
        raise fault(batch[i], f"{alone.text}; {remedy}")

    def judge(self, tokens: list[np.ndarray], raw_bytes: list[np.ndarray]
              ) -> tuple[encoding.Counts, list[encoding.Fault]]:
        """Return the bytes of some documents, and why not to believe them, by place."""
        stream = np.concatenate(tokens)
        counts = encoding.count_bytes(stream, self.rules)
        sidecar = np.concatenate(raw_bytes) if self.sidecar else None
        found = encoding.byte_faults(stream, self.rules, counts, sidecar)
        return counts, sorted(found, key=lambda fault: fault.position)


def fault(document: Document, what: str) -> DataError:
    return DataError(f"{document.path}, line {document.line}: {what}")


def pack(document: Document, tokens: np.ndarray, raw_bytes: np.ndarray | None = None,
         **val_counts: int) -> Encoded:
    """Return a document with its counts; one whose tokens are only a BOS is dropped."""
    size_bytes = len(document.text)
    if len(tokens) == 1:
        return Encoded(tokens[:0], None, dict(dropped_documents=1, dropped_bytes=size_bytes))
    return Encoded(tokens, raw_bytes, dict(documents=1, bytes=size_bytes, tokens=len(tokens),
                                           **val_counts))


def batches(documents: Iterable[Document], size_bytes: int) -> Iterator[list[Document]]:
    """Yield documents in lists of at least size_bytes, but for the last."""
    batch, held = [], 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= size_bytes:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


# ---- progress, so that a stopped run can go on -----------------------------------------------


@dataclass
class Progress:
    """Where a run stands, as of its last finished shard."""

    settings: dict[str, Any]  # everything the bytes depend on
    tokenizer_sha256: str = ""
    part: str = PARTS[0]
    documents: int = 0  # of this part, in finished shards and wholly so
    offset: int = 0  # tokens of the next one that finished shards hold already
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {p: {} for p in PARTS})
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: tokens, bytes, sha256


class Product:
    """The folder of one data set, its tokenizer, and the state of the run that makes them."""

    def __init__(self, out: Path, name: str):
        self.out, self.name = out, name
        self.folder = out / "datasets" / name
        self.tokenizer = out / "tokenizers" / f"{name}.model"
        self.progress_path = self.folder / "progress.json"
        self.manifest_path = self.folder / "manifest.json"
        self.shuffle_folder = self.folder / "shuffle.part"
        self.progress = Progress({})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; DataError when another process does. Ends with the process, too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.parent.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows cannot lock a folder; there two runs must not meet
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise DataError(f"{self.folder}: another run is writing here; wait for it, or give "
                            "another --name") from None
        finally:
            os.close(handle)

    def read(self, path: Path, like: dict[str, Any]) -> dict[str, Any] | None:
        """Return the content of a JSON file of ours, None where there is none.

        Ours has all that `like` has, each value of its kind, and a hash of every file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        is_ours = isinstance(found, dict) and all(
            type(found.get(key)) is type(value) for key, value in like.items())
        return found if is_ours and integrity.file_entries(found, "sha256") == found["files"] \
            else None

    def save(self) -> None:
        shards.write_atomic(self.progress_path, json_bytes(asdict(self.progress)))

    def open(self, settings: dict[str, Any], fresh: bool) -> bool:
        """Load what an earlier run left, or begin; True when everything is there already.

        Raises DataError when the folder holds anything else, or an earlier run with other
        settings: shards of two corpora must never mix.
        """
        left = self.read(self.progress_path, asdict(Progress({})))
        found = left or self.read(self.manifest_path, dict(
            settings={}, tokenizer_sha256="", files={}, splits={}, datasets=[]))
        if found is None:
            self.refuse_foreign_files(settings)
        if left and not left["files"]:
            found = left = None  # nothing is lost by beginning anew, whatever the settings were
        if found and not fresh:
            self.refuse_other_settings(found["settings"], settings)
            self.refuse_changed_files(found)
            if not left:
                return True
            self.progress = Progress(**left)
        else:
            self.progress = Progress(settings)
            self.save()  # from here on what lies in the folder is ours to remove
        self.manifest_path.unlink(missing_ok=True)
        shutil.rmtree(self.shuffle_folder, ignore_errors=True)
        ours = itertools.chain(*shards.find_shards(self.folder).values())
        for path in [*ours, *self.folder.glob("*.bin.part")]:
            if path.name not in self.progress.files:
                path.unlink()
        return False

    def refuse_foreign_files(self, settings: dict[str, Any]) -> None:
        if strange := sorted(p.name for p in self.folder.glob("fineweb_*.bin")):
            raise DataError(f"{self.folder}: holds {strange[0]} from elsewhere; give another "
                            "--name, or empty the folder")
        if self.tokenizer.exists() and (shards.sha256_of(self.tokenizer)
                                        != settings["tokenizer"].get("sha256")):
            raise DataError(f"{self.tokenizer}: another tokenizer has this name; give another "
                            "--name, or move it away")

    def refuse_other_settings(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            told = "; ".join(f"{key} was {short(old.get(key))}, is {short(new.get(key))}"
                             for key in changed)
            raise DataError(f"{self.folder}: begun with other settings ({told}); give the earlier "
                            "ones, another --name, or --fresh to build anew")

    def refuse_changed_files(self, found: dict[str, Any]) -> None:
        """Raise DataError when a finished file is gone or differs."""
        sums = {self.folder / name: entry["sha256"] for name, entry in found["files"].items()}
        if found["tokenizer_sha256"]:
            sums[self.tokenizer] = found["tokenizer_sha256"]
        for path, expected in sums.items():
            if not path.is_file() or shards.sha256_of(path) != expected:
                what = "has changed since it was written" if path.is_file() else "is missing"
                raise DataError(f"{path}: {what}; give --fresh to build anew")


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- shards ----------------------------------------------------------------------------------


class PartWriter:
    """Cuts one part's documents into shards, each with its sidecar shard if there is one."""

    def __init__(self, product: Product, part: str, shard_tokens: int, sidecar: bool):
        self.product, self.shard_tokens = product, shard_tokens
        self.splits = [part, "val_bytes"] if sidecar and part == "val" else [part]
        self.first_offset = product.progress.offset
        self.number = 0
        while self.file_names()[0] in product.progress.files:
            self.number += 1
        self.writers: list[shards.ShardWriter] = []

    def file_names(self) -> list[str]:
        return [shards.shard_name(split, self.number) for split in self.splits]

    def add(self, document: Encoded) -> None:
        """Append a document, finishing shards as they fill.

        Of the first document after a restart, finished shards may hold some or all tokens.
        """
        columns: tuple[Any, ...] = document.tokens, document.raw_bytes
        offset, self.first_offset = self.first_offset, 0
        while offset < len(document.tokens):
            if not self.writers:
                self.writers = [shards.ShardWriter(self.product.folder / name)
                                for name in self.file_names()]
            end = offset + self.shard_tokens - self.writers[0].num_tokens
            for writer, column in zip(self.writers, columns):
                writer.add(column[offset:end])
            offset = min(end, len(document.tokens))
            if self.writers[0].num_tokens == self.shard_tokens:
                self.finish_shard(offset)
        progress = self.product.progress
        progress.documents += 1
        counts = progress.counts[progress.part]
        for key, value in document.counts.items():
            counts[key] = counts.get(key, 0) + value

    def finish_shard(self, offset: int) -> None:
        """Give the shard its name and note where it ended: `offset` tokens into this document."""
        progress = self.product.progress
        for writer in self.writers:
            writer.finish()
            progress.files[writer.path.name] = dict(
                tokens=writer.num_tokens, bytes=writer.path.stat().st_size,
                sha256=shards.sha256_of(writer.path))
            say(f"wrote {writer.path.name}: {writer.num_tokens:,} "
                f"{'tokens' if writer is self.writers[0] else 'byte counts'}")
        self.writers, self.number = [], self.number + 1
        progress.offset = offset
        self.product.save()

    def close(self) -> None:
        """Finish the last shard and note that the part is complete."""
        progress = self.product.progress
        if self.writers:
            self.finish_shard(0)
        following = [*PARTS, "done"][PARTS.index(progress.part) + 1]
        progress.part, progress.documents, progress.offset = following, 0, 0
        self.product.save()

    def discard(self) -> None:
        for writer in self.writers:
            writer.discard()


class Display:
    """One status line on a terminal, twice a second; nothing in a file."""

    def __init__(self) -> None:
        self.start = self.shown = time.monotonic()
        self.first_bytes: int | None = None
        self.active = sys.stderr.isatty()

    def update(self, part: str, counts: dict[str, int]) -> None:
        now = time.monotonic()
        if not self.active or now - self.shown < 0.5:
            return
        read = counts.get("bytes", 0)
        self.first_bytes = read if self.first_bytes is None else self.first_bytes
        speed = (read - self.first_bytes) / 1e6 / max(1e-9, now - self.start)
        self.shown = now
        print(f"\r{part}: {counts.get('documents', 0):,} documents, {read / 1e6:,.1f} MB of text, "
              f"{counts.get('tokens', 0):,} tokens, {speed:.1f} MB/s ", end="", file=sys.stderr,
              flush=True)

    def close(self) -> None:
        if self.active:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- one run ---------------------------------------------------------------------------------


def make_settings(args: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """Return everything that the bytes of the product depend on."""
    say(f"reading {len(files)} file{'s' if len(files) > 1 else ''} once for their SHA-256")
    inputs = [dict(name=path.name, bytes=path.stat().st_size, sha256=shards.sha256_of(path))
              for path in files]
    if args.train_tokenizer:
        tokenizer = dict(train=encoding.RECIPE, vocab_size=args.vocab_size,
                         sample_bytes=args.sample_mb * 1_000_000)
    else:
        tokenizer = dict(sha256=shards.sha256_of(args.tokenizer))
    return dict(tool_version=TOOL_VERSION, sentencepiece=sentencepiece.__version__, inputs=inputs,
                text_key=args.text_key, txt_lines=args.txt_lines, tokenizer=tokenizer,
                caseops=args.caseops, sidecar=args.sidecar, val_docs=args.val_docs,
                shuffle_seed=args.shuffle_seed, shard_tokens=args.shard_tokens)


def check_val_docs(files: list[Path], source: Source, val_docs: int) -> None:
    """Raise DataError unless something is left for training; reads one document more than that."""
    found = sum(1 for _ in itertools.islice(read_documents(files, source), val_docs + 1))
    if found > val_docs:
        return
    remedies = ["give more text"]
    if not source.txt_lines and any(".txt" in path.suffixes for path in files):
        remedies.append("--txt-lines if each line of a .txt file is a document")
    if found > 1:
        remedies.append(f"fewer, say --val-docs {max(1, found // 100)}")
    raise DataError(f"--val-docs is {val_docs:,}, the input has only {found:,} "
                    f"document{'s' * (found != 1)}, so none is left for training; "
                    f"{', or '.join(remedies)}")


def training_sentences(documents: Iterable[Document], use_caseops: bool,
                       max_bytes: int) -> Iterator[str]:
    """Yield text for the tokenizer's trainer, max_bytes of it, long documents cut at white space.

    The trainer passes over what is longer than SENTENCE_BYTES; cut, it is not lost.
    """
    for document in documents:
        if max_bytes <= 0:
            return
        max_bytes -= len(document.text)
        text = caseops.encode_utf8(document.text) if use_caseops else document.text
        while len(text) > SENTENCE_BYTES:
            cut = text.rfind(b" ", 0, SENTENCE_BYTES) + 1 or SENTENCE_BYTES
            # bytes of a character split by a cut without white space are left out
            yield text[:cut].decode(errors="ignore")
            text = text[cut:]
        yield text.decode(errors="ignore")


def make_tokenizer(args: argparse.Namespace, product: Product,
                   documents: Callable[[], Iterator[Document]]) -> Any:
    """Return the processor of the product's tokenizer, copied or trained unless it is there."""
    progress = product.progress
    if not progress.tokenizer_sha256:
        if args.train_tokenizer:
            train = itertools.islice(documents(), args.val_docs, None)
            texts = list(training_sentences(train, args.caseops, args.sample_mb * 1_000_000))
            say(f"training a tokenizer of {args.vocab_size} pieces on "
                f"{sum(map(len, texts)) / 1e6:,.1f} million characters")
            operators = caseops.OPERATORS if args.caseops else ()
            model = encoding.train_tokenizer(texts, args.vocab_size, operators)
        else:
            model = args.tokenizer.read_bytes()
        shards.write_atomic(product.tokenizer, model)
        progress.tokenizer_sha256 = shards.sha256_of(product.tokenizer)
        product.save()
    processor = encoding.load_processor(product.tokenizer)
    if args.train_tokenizer:
        encoding.check_tokenizer(processor, product.tokenizer, "the training text is too small or "
                                 "has no spaces: give more, or --tokenizer with a published one")
        if (pieces := processor.get_piece_size()) < args.vocab_size:
            say(f"note: the tokenizer has {pieces:,} pieces, not the {args.vocab_size:,} of "
                "--vocab-size: its training text repeats no more; more text gives more pieces")
    return processor


def check_tokenizer(processor: Any, path: Path, use_caseops: bool) -> None:
    """Raise ValueError for a given tokenizer that cannot serve."""
    encoding.check_tokenizer(processor, path)
    if use_caseops and not encoding.operator_ids(processor):
        raise DataError(f"{path}: has no pieces for the CaseOps operators U+E001 to U+E004; use a "
                        "CaseOps tokenizer, --train-tokenizer, or leave --caseops away")


def write_part(encoder: Encoder, product: Product, documents: Iterable[Document],
               shard_tokens: int) -> None:
    """Write what is still missing of the part that progress stands in."""
    progress = product.progress
    part, display = progress.part, Display()
    writer = PartWriter(product, part, shard_tokens, encoder.sidecar)
    rest = itertools.islice(documents, progress.documents, None)
    try:
        for document in encoder.stream(rest, part):
            writer.add(document)
            display.update(part, progress.counts[part])
        writer.close()
    finally:
        display.close()
        writer.discard()
    if not progress.counts[part].get("documents"):
        raise DataError(f"no document of the {part} part yields a token, all are empty or white "
                        "space; give other text")


def build(args: argparse.Namespace, product: Product, files: list[Path], source: Source) -> None:
    """Build or go on building, and write the manifest last."""
    def documents() -> Iterator[Document]:
        return read_documents(files, source)

    processor = make_tokenizer(args, product, documents)
    encoder = Encoder(processor, args.caseops, args.sidecar, args.workers)
    if product.progress.part == "val":
        val = itertools.islice(documents(), args.val_docs)
        write_part(encoder, product, val, args.shard_tokens)
    if product.progress.part == "train":
        train: Iterator[Document] = itertools.islice(documents(), args.val_docs, None)
        if args.shuffle_seed is not None:
            text_bytes = sum(path.stat().st_size * (TEXT_PER_PACKED_BYTE if path.suffix in
                                                    PACKED_SUFFIXES else 1) for path in files)
            train = shuffled(train, args.shuffle_seed, product.shuffle_folder, text_bytes)
        write_part(encoder, product, train, args.shard_tokens)
    shards.write_atomic(product.manifest_path, json_bytes(make_manifest(product, processor)))
    product.progress_path.unlink()


def make_manifest(product: Product, processor: Any) -> dict[str, Any]:
    """Return the manifest: the published one's keys first, then what makes it checkable."""
    progress, settings = product.progress, product.progress.settings
    splits = {part: dict(sorted(counts.items())) for part, counts in progress.counts.items()}
    stats = {}
    for kind, per_part in (
            ("docs", {part: splits[part]["documents"] for part in PARTS}),
            ("files", {part: sum(name.rpartition("_")[0] == f"fineweb_{part}"
                                 for name in progress.files) for part in PARTS}),
            ("tokens", {part: splits[part]["tokens"] for part in PARTS})):
        stats[f"{kind}_total"] = sum(per_part.values())
        stats.update({f"{kind}_{part}": count for part, count in per_part.items()})
    ids = dict(vocab_size=processor.get_piece_size(), bos_id=processor.bos_id(),
               eos_id=processor.eos_id())
    folder, digits = product.folder.relative_to(product.out).as_posix(), "[0-9]" * 6
    dataset = dict(name=product.name, tokenizer_name=product.name,
                   tokenizer_kind="sentencepiece_bpe", path=folder,
                   train_glob=f"{folder}/fineweb_train_{digits}.bin",
                   val_glob=f"{folder}/fineweb_val_{digits}.bin", **ids, stats=stats)
    if settings["sidecar"]:
        dataset["val_bytes_glob"] = f"{folder}/fineweb_val_bytes_{digits}.bin"
    model_path = product.tokenizer.relative_to(product.out).as_posix()
    return dict(
        version="1", num_docs=stats["docs_total"], num_val_docs=stats["docs_val"],
        shuffle_seed=settings["shuffle_seed"], shard_size=settings["shard_tokens"],
        append_eos=False, docs_jsonl=settings["inputs"][0]["name"],
        docs_meta=dict(inputs=settings["inputs"]), tokenizer_specs=[settings["tokenizer"]],
        tokenizers=[dict(name=product.name, kind="sentencepiece_bpe", **ids,
                         source_spec=settings["tokenizer"], model_path=model_path)],
        datasets=[dataset], settings=settings, splits=splits,
        tokenizer_sha256=progress.tokenizer_sha256, files=progress.files)


def say(line: str) -> None:
    print(f"tokenize: {line}", flush=True)


def summarise(product: Product, seconds: float) -> None:
    """Print the manifest's figures and the training command."""
    manifest = json.loads(product.manifest_path.read_text(encoding="utf-8"))
    for part, counts in manifest["splits"].items():
        per_token = counts["bytes"] / counts["tokens"]
        say(f"{part}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
            f"{counts['tokens']:,} tokens ({per_token:.3f} bytes each)")
        if dropped := counts.get("dropped_documents"):
            say(f"{part}: {dropped:,} documents ({counts['dropped_bytes']:,} bytes) yield no token "
                "and were dropped")
    val = manifest["splits"]["val"]
    say(f"val: {val['surface_bytes']:,} raw bytes stand behind tokens, {val['edge_bytes']:,} were "
        f"trimmed at documents' edges; the byte table counts {val['table_bytes']:,}")
    say(f"val: normalisation changes {val['normalised_documents']:,} documents, the byte count of "
        f"{val['resized_documents']:,}")
    counted, text = val["surface_bytes"], val.get("text_bytes", 0)  # older manifests lack it
    if manifest["settings"]["sidecar"] and text and (
            abs(counted - text) > encoding.WARN_DRIFT_FRAC * text):
        say(f"WARNING: a score will divide by {counted:,} bytes, of which the tokens give back "
            f"{text:,} ({encoding.percent(counted, text)}): say so beside it; --no-sidecar, or a "
            "tokenizer that keeps white space, avoids it")
    say("on a laptop or a small GPU put PRESET=demo before the last line: a model of that size")
    say(f"ready in {seconds:.0f} s; next:")
    print(shards.run_line(DATA_PATH=product.folder, TOKENIZER_PATH=product.tokenizer,
                          VOCAB_SIZE=manifest["datasets"][0]["vocab_size"]), flush=True)


# ---- command line ----------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, must be at least 1")
    return value


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders of documents: "
        + " ".join(SUFFIXES))
    add("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece .model file")
    add("--train-tokenizer", action="store_true", help="train one on the training documents, by "
        "the published recipe")
    add("--vocab-size", type=positive, metavar="V", help="pieces of the tokenizer to be trained")
    add("--sample-mb", type=positive, default=100, metavar="MB",
        help="text it is trained on, from the first training documents (default: 100)")
    add("--name", help="of the data set and tokenizer (default: the first input's)")
    add("--out", type=Path, default=Path(__file__).resolve().parent,
        help="folder that gets datasets/NAME/ and tokenizers/NAME.model (default: this script's)")
    add("--val-docs", type=positive, default=VAL_DOCS, metavar="N",
        help=f"documents for validation, the first ones (default: {VAL_DOCS}, as published)")
    add("--shuffle-seed", type=int, metavar="SEED", help="shuffle the training documents by this "
        "seed (default: leave them in order); needs the text's size in free disk meanwhile")
    add("--caseops", action="store_true", help="write capitals as CaseOps operators; needs a "
        "tokenizer that has them")
    add("--no-sidecar", dest="sidecar", action="store_false", help="write no byte sidecars: "
        "train_gpt.py then divides by the bytes of the normalised text, as with published shards")
    add("--text-key", default="text", metavar="KEY", help="JSON key or parquet column that is the "
        "document (default: text)")
    add("--txt-lines", action="store_true", help="each line of a .txt file is a document (default: "
        "each file is)")
    add("--max-document-mb", type=positive, default=MAX_DOCUMENT_BYTES >> 20, metavar="MB",
        help="refuse larger documents (default: %(default)s); each MB takes 45 MB of memory")
    add("--shard-tokens", type=positive, default=SHARD_TOKENS, metavar="N",
        help=f"per shard file (default: {SHARD_TOKENS}, as published)")
    add("--workers", type=positive, default=cores(), metavar="N", help="threads that encode "
        "(default: all cores); the result does not depend on it")
    add("--fresh", action="store_true", help="throw away what an earlier run of this tool left "
        "under this name")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error where options contradict each other; derive the name."""
    if bool(args.tokenizer) == args.train_tokenizer:
        parser.error("give either --tokenizer FILE or --train-tokenizer --vocab-size V")
    if args.train_tokenizer != bool(args.vocab_size):
        parser.error("--train-tokenizer and --vocab-size go together")
    if args.caseops and not args.sidecar:
        parser.error("--caseops needs its sidecar: operators have no bytes, which no byte table "
                     "can tell; leave --no-sidecar away")
    if args.name is None:
        args.name = re.split(r"\.(?:jsonl|ndjson|txt|parquet)\b", args.inputs[0].resolve().name)[0]
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", args.name):
        parser.error(f"--name is {args.name!r}, must be letters, digits and . _ + - only")


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked early, then build or say that it is there."""
    start = time.monotonic()
    files = find_files(args.inputs)
    source = Source(args.text_key, args.txt_lines, args.max_document_mb << 20)
    if args.tokenizer:
        check_tokenizer(encoding.load_processor(args.tokenizer), args.tokenizer, args.caseops)
    elif not encoding.VOCAB_RANGE[0] <= args.vocab_size <= encoding.VOCAB_RANGE[1]:
        raise DataError(f"--vocab-size is {args.vocab_size}, must lie in "
                        f"{encoding.VOCAB_RANGE[0]}..{encoding.VOCAB_RANGE[1]}")
    check_val_docs(files, source, args.val_docs)
    settings = make_settings(args, files)
    product = Product(args.out, args.name)
    with product.locked():
        if product.open(settings, args.fresh):
            say(f"{product.folder}: built already and unchanged; --fresh builds it again")
        else:
            if finished := len(product.progress.files):
                say(f"{product.folder}: going on after {finished} finished files")
            build(args, product, files, source)
        summarise(product, time.monotonic() - start)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status; faults of the user's making end in one line."""
    args = parse_args(argv)
    try:
        if MISSING:
            raise DataError(f"the package {MISSING} is missing; install it with: {PIP_LINE}")
        run(args)
    except ValueError as error:
        print(f"tokenize_corpus: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"tokenize_corpus: {error.strerror or error}: {error.filename or args.out}; make "
              "room or rights there, or choose another --out; the same command then goes on",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenize_corpus: stopped; the same command goes on from the last finished shard",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
