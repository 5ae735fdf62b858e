"""Check token shards: that they are whole, are what they are called, and count their bytes right.

Looks at headers, sizes and, where a manifest.json or download.json lies beside the shards, hashes;
at token ids; at documents (validation decodes and encodes again to the same tokens, so does a
sample of training, and no validation document is in training); at the bytes a score divides by,
the byte table's or the sidecar's, over all of validation: what the tokens decode to. Names known
validation sets. With --docs, the documents the shards were made from, it compares those too, and
tells how far the counted bytes are from the raw ones. The exit code is 0 when there is no FAULT.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import catalogue

try:
    import caseops
    import documents
    import encoding
    import integrity
    import numpy as np
    import shards
    MISSING = ""
except ImportError as error:  # reported by main, so that --help works without them
    MISSING = error.name or "numpy"

OK, NOTE, SKIP, WARN, FAULT = "ok", "note", "skip", "WARN", "FAULT"
PIP_LINE = "python -m pip install -r data/requirements.txt"
QUICK_DOCUMENTS = 200  # looked at with --quick, spread over validation
BATCH_DOCUMENTS = 512
CHUNK_TOKENS = 1 << 22
MIN_SAME_FRAC = 0.98  # of documents that encode to their own tokens; another tokenizer: under 0.1
SAMPLE_DOCUMENTS = 40  # of each training shard, encoded again
OTHER_NAMES = (catalogue.MANIFEST_NAME, "download.json", "progress.json")  # of our tools, no shards
MIX = np.uint64(0x9E3779B97F4A7C15) if not MISSING else 0


class Finding(NamedTuple):
    """What one check found; level is OK, NOTE, SKIP, WARN or FAULT."""

    level: str
    check: str
    text: str


class Files(NamedTuple):
    """The shards of one folder by split, in order, and the tokenizer they belong to."""

    folder: Path
    tokenizer: Path
    splits: dict[str, list[Path]]


class Validation(NamedTuple):
    """Validation as one stream of N tokens, D documents."""

    tokens: "np.ndarray"  # (N,) uint16
    rules: "encoding.Rules"
    counts: "encoding.Counts"
    sidecar: "np.ndarray | None"  # uint16, (N,) unless it is another text's
    starts: "np.ndarray"  # (D,) int64, where each BOS stands
    ends: "np.ndarray"  # (D,) int64, one past each document

    def sums(self, per_token: "np.ndarray") -> "np.ndarray":
        """Return the sum (D,) of a value per token over each document."""
        total = np.concatenate([[0], np.cumsum(per_token, dtype=np.int64)])
        return total[self.ends] - total[self.starts]

    def document(self, index: int) -> "np.ndarray":
        """Return the tokens of a document without its BOS."""
        return self.tokens[self.starts[index] + 1:self.ends[index]]


class ShardReport(NamedTuple):
    """What reading one training shard gave; documents are those that begin in it."""

    largest_id: int
    num_documents: int
    num_empty: int
    broken: int | None  # position of a byte piece that is no UTF-8, from the first BOS on
    shared: frozenset[int]  # validation documents that are here, too


class Known(NamedTuple):
    """What a training shard is compared with."""

    bos_id: int
    byte_values: "np.ndarray"  # (65536,) int16; -1 where an id is no byte piece
    keys: "np.ndarray"  # sorted quick keys of validation documents
    digests: dict[bytes, int]  # hash -> validation document


# ---- files -------------------------------------------------------------------------------------


def find_files(folder: Path, tokenizer: Path | None) -> Files:
    """Return the shards in a folder; ValueError when there are none or the tokenizer is missing."""
    splits = shards.find_shards(folder)
    if not splits["val"]:
        raise ValueError(f"{folder}: no fineweb_val_000000.bin in it; fetch it with "
                         "data/cached_challenge_fineweb.py or build one with "
                         "data/tokenize_corpus.py")
    tokenizer = tokenizer or guess_tokenizer(folder)
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer}: no such file; name the shards' tokenizer with --tokenizer")
    return Files(folder, tokenizer, splits)


def guess_tokenizer(folder: Path) -> Path:
    """Return where the tools put the tokenizer of a folder <data>/datasets/<name>."""
    data = folder.resolve().parents[1]
    names = [v.tokenizer for v in catalogue.VARIANTS.values() if Path(v.folder).name == folder.name]
    names += [name for name in promised(folder) if name.startswith("tokenizers/")]
    return next((data / name for name in names), data / "tokenizers" / f"{folder.name}.model")


def promised(folder: Path) -> dict[str, str]:
    """Return the sha256 of files by name, as download.json and manifest.json tell them."""
    found: dict[str, str] = {}
    for name in (catalogue.MANIFEST_NAME, integrity.RECORD_NAME):
        entries = integrity.file_entries(integrity.read_json(folder / name), "sha256")
        found |= {file: entry["sha256"] for file, entry in entries.items()}
    return found


def check_names(files: Files) -> Iterator[Finding]:
    """Say which files are no shards, and where shards are not numbered 0, 1, 2 and so on."""
    read = {path.name for paths in files.splits.values() for path in paths}
    others = sorted(path.name for path in files.folder.iterdir()
                    if path.name not in read and path.name not in OTHER_NAMES)
    if others:
        yield Finding(NOTE, "names", f"not read, being no fineweb_val_000000.bin or the like: "
                                     f"{', '.join(others[:5])}{' …' * (len(others) > 5)}; "
                                     "other scripts may read some, move them away")
    for split, paths in files.splits.items():
        numbers = [int(path.stem.rpartition("_")[2]) for path in paths]
        if numbers != list(range(len(paths))):
            yield Finding(NOTE, "names", f"the {split} shards, in the order of their names, are "
                                         f"not numbered 0 to {len(paths) - 1}: one is missing or "
                                         "there twice")


def check_headers(files: Files) -> Iterator[Finding]:
    """Compare every shard's header with its size."""
    counts, faults = dict.fromkeys(files.splits, 0), 0
    for split, paths in files.splits.items():
        for path in paths:
            try:
                found = integrity.shard_tokens(path)
            except ValueError as error:
                faults += 1
                yield Finding(FAULT, "headers", str(error))
                continue
            counts[split] += found
            if not found:
                yield Finding(NOTE, "headers", f"{path}: is empty, a header without tokens")
    told = ", ".join(f"{len(paths)} {split} ({counts[split]:,} tokens)"
                     for split, paths in files.splits.items() if paths)
    yield Finding(NOTE if faults else OK, "headers", f"{told}; {faults} of them broken"
                  if faults else told)


def check_hashes(files: Files, jobs: int, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Compare every file that a manifest beside the shards promises with its hash."""
    expected = {files.folder / Path(name).name: sha256
                for name, sha256 in promised(files.folder).items()
                if shards.SHARD_NAME.fullmatch(Path(name).name)}
    if not expected:
        yield Finding(SKIP, "hashes", "no manifest.json or download.json beside the shards")
        return
    gone = [path for path in expected if not path.is_file()]
    yield from (Finding(FAULT, "hashes", f"{path}: is promised but not here") for path in gone)
    here = [path for path in expected if path not in gone]
    found = in_parallel(shards.sha256_of, here, jobs, "hashes", tell)
    wrong = [path for path, sha256 in zip(here, found) if sha256 != expected[path]]
    yield from (Finding(FAULT, "hashes", f"{path}: has changed since it was written; fetch or "
                                         "build it again") for path in wrong)
    every = sum(map(len, files.splits.values()))
    level = OK if len(expected) == every else NOTE
    yield Finding(level, "hashes", f"{len(here) - len(wrong)} of {every} shards are as promised")


def check_tokenizer_hash(files: Files) -> Iterator[Finding]:
    """Compare the tokenizer with the one a manifest beside the shards names."""
    named = [sha256 for name, sha256 in promised(files.folder).items() if name.endswith(".model")]
    manifest = integrity.read_json(files.folder / catalogue.MANIFEST_NAME)
    named += [manifest["tokenizer_sha256"]] if manifest.get("tokenizer_sha256") else []
    if not named:
        return
    if shards.sha256_of(files.tokenizer) in named:
        yield Finding(OK, "tokenizer", f"{files.tokenizer} is the one named beside the shards")
    else:
        yield Finding(FAULT, "tokenizer", f"{files.tokenizer}: is not the one these shards were "
                                          "made with (by its sha256); give that one")


# ---- validation --------------------------------------------------------------------------------


def load_validation(files: Files, processor) -> Validation:
    """Return validation with its bytes counted; ValueError on ids beyond the tokenizer's."""
    tokens = np.concatenate([shards.read_shard(path) for path in files.splits["val"]])
    sidecars = [shards.read_shard(path) for path in files.splits["val_bytes"]]
    where = files.splits["val"][0]
    check_ids(where.parent, int(tokens.max(initial=0)), processor)
    starts, ends = document_bounds(tokens, processor.bos_id())
    if not len(tokens):
        raise ValueError(f"{where}: holds no token, nor do the other validation shards; fetch or "
                         "build them again")
    if not len(starts) or starts[0]:
        raise ValueError(f"{where}: does not begin with BOS ({processor.bos_id()}); build it again "
                         "with a BOS before each document")
    rules = encoding.byte_rules(processor)
    return Validation(tokens, rules, encoding.count_bytes(tokens, rules),
                      np.concatenate(sidecars) if sidecars else None, starts, ends)


def check_ids(where: Path, largest: int, processor) -> None:
    if largest >= processor.get_piece_size():
        raise ValueError(f"{where}: token {largest} is beyond the tokenizer's "
                         f"{processor.get_piece_size()} pieces; give the tokenizer they belong to")


def document_bounds(tokens: "np.ndarray", bos_id: int) -> tuple["np.ndarray", "np.ndarray"]:
    """Return where documents start (at their BOS) and end, two (D,) int64."""
    starts = np.flatnonzero(tokens == bos_id)
    return starts, np.append(starts[1:], len(tokens))[:len(starts)]


def fingerprint(validation: Validation) -> Finding:
    """Name the validation set by its counts."""
    num_tokens = len(validation.tokens)
    targets = catalogue.whole_targets(num_tokens)
    columns = [c for c in (validation.counts.table, validation.sidecar) if c is not None]
    counted = [int(column[1:targets + 1].sum(dtype=np.int64)) for column in columns]
    names = [catalogue.name_validation(num_tokens, num_bytes) for num_bytes in counted]
    name = next((name for name in names if name != catalogue.UNKNOWN), catalogue.UNKNOWN)
    hint = catalogue.nearest_note(num_tokens, counted[0]) if name == catalogue.UNKNOWN else ""
    return Finding(NOTE if name == catalogue.UNKNOWN else OK, "val",
                   f"{name} ({num_tokens:,} tokens, {len(validation.starts):,} documents; "
                   f"{targets:,} targets in whole windows, {counted[0]:,} bytes by the table"
                   f"{f', {counted[1]:,} by the sidecar' if counted[1:] else ''})"
                   f"{': ' + hint if hint else ''}")


def spread(count: int, most: int | None) -> "np.ndarray":
    """Return at most `most` of range(count), evenly spread, ascending; all of it for None."""
    if most is None or count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


def batches(items: Iterable, size: int) -> Iterator[list]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def check_bytes(validation: Validation) -> Iterator[Finding]:
    """Compare what a score divides by with what the tokens decode to, over all of them."""
    stream, sidecar = (validation.tokens, validation.rules, validation.counts), validation.sidecar
    faults = encoding.byte_faults(*stream, sidecar)
    if sidecar is not None and not faults:
        faults = encoding.foreign_sidecar(*stream, sidecar)
    for fault in faults:
        index = int(np.searchsorted(validation.starts, fault.position, side="right")) - 1
        yield Finding(FAULT, fault.check, f"{fault.text}; first at token {fault.position}, in "
                                          f"document {index}; {fault.remedy}")
    table, decoded = (int(column.sum(dtype=np.int64)) for column in validation.counts[:2])
    if np.array_equal(validation.counts.table, validation.counts.decoded):
        yield Finding(OK, "bytes", f"the byte table counts {table:,}, as many as the tokens decode "
                                   "to, each of them")
    elif sidecar is not None:
        yield Finding(NOTE, "bytes", f"the byte table counts {table:,}, the tokens decode to "
                                     f"{decoded:,}: keep the sidecar, without it a score is wrong")
    if sidecar is not None and len(sidecar) == len(validation.tokens):
        yield sidecar_drift(validation.sums(sidecar), validation.sums(validation.counts.text))


def sidecar_drift(sums: "np.ndarray", sizes: "np.ndarray") -> Finding:
    """Return how far a sidecar's documents (D,) are from what their tokens give back (D,)."""
    counted, text = int(sums.sum()), int(sizes.sum())
    off, drift = np.abs(sums - sizes), abs(counted - text) / max(1, text)
    told = (f"{counted:,} bytes, the tokens decode to {text:,} ({counted - text:+,}, "
            f"{encoding.percent(counted, text)}); {np.count_nonzero(off):,} of {len(sums):,} "
            "documents differ")
    if drift > encoding.QUIET_DRIFT_FRAC:
        worst = int(off.argmax())
        told += f", document {worst} most ({sums[worst]:,} bytes, it decodes to {sizes[worst]:,})"
    if drift > encoding.WARN_DRIFT_FRAC:
        return Finding(WARN, "sidecar", f"{told}: a score divides by text that the tokens do not "
                                        "hold; say so beside it")
    return Finding(NOTE if drift > encoding.QUIET_DRIFT_FRAC else OK, "sidecar", told)


def check_documents(validation: Validation, processor, most: int | None, jobs: int,
                    tell: Callable[[str], None]) -> Iterator[Finding]:
    """Decode documents: the counted sum must be each text's bytes, and encoding must undo it."""
    sums = validation.sums(validation.counts.decoded)
    chosen = spread(len(validation.starts), most)
    wrong: list[tuple[int, int]] = []
    other = num_bytes = 0
    for done, batch in enumerate(batches(chosen.tolist(), BATCH_DOCUMENTS)):
        tell(f"documents {done * BATCH_DOCUMENTS} of {len(chosen)}")
        sizes, same = read_again([validation.document(i) for i in batch], processor, jobs)
        wrong += [(i, size) for i, size in zip(batch, sizes) if size != sums[i]]
        other += same.count(False)
        num_bytes += sum(sizes)
    looked = f"{len(chosen):,} of {len(validation.starts):,} documents"
    if wrong:
        index, size = wrong[0]
        yield Finding(FAULT, "decoded", f"{len(wrong)} of {looked} decode to other bytes than "
                      f"their pieces; document {index} is {size} bytes of text, counted as "
                      f"{sums[index]}; build the shards again")
    else:
        yield Finding(OK, "decoded", f"{looked} decode to the bytes that their pieces count, "
                                     f"{num_bytes:,}")
    if other > (1 - MIN_SAME_FRAC) * len(chosen):
        yield Finding(FAULT, "tokens", f"{other} of {looked} encode to other tokens: another "
                                       "tokenizer wrote the shards; give that one")
    else:
        yield Finding(NOTE if other else OK, "tokens",
                      f"{len(chosen) - other:,} of {len(chosen):,} documents encode to their own "
                      "tokens again")


def read_again(tokens: "list[np.ndarray]", processor, jobs: int) -> tuple[list[int], list[bool]]:
    """Return of each document its text's bytes, and whether that encodes to the same tokens."""
    is_control = control_ids(processor)
    ids = [found[~is_control[found]].tolist() for found in tokens]
    texts = processor.decode(ids, num_threads=jobs)
    again = processor.encode(texts, num_threads=jobs)
    return [len(text.encode("utf-8")) for text in texts], [a == b for a, b in zip(again, ids)]


@lru_cache(maxsize=1)  # asked for with each batch, of one tokenizer
def control_ids(processor) -> "np.ndarray":
    """Return which ids are control pieces, (V,) bool."""
    return np.array([processor.is_control(i) for i in range(processor.get_piece_size())])


def check_controls(validation: Validation, processor) -> Iterator[Finding]:
    """Look for control ids other than BOS, and for documents without a token."""
    counts = np.bincount(validation.tokens, minlength=processor.get_piece_size())
    for i in np.flatnonzero(counts).tolist():
        if processor.is_control(i) and i != processor.bos_id():
            yield Finding(NOTE, "ids", f"{counts[i]} tokens {i} ({processor.id_to_piece(i)})")
    if empty := int((validation.ends - validation.starts == 1).sum()):
        yield Finding(NOTE, "ids", f"{empty} documents are a BOS alone")


# ---- against the documents ---------------------------------------------------------------------


class Distance:
    """Sums over documents compared with their shards."""

    def __init__(self):
        self.compared = self.other = self.changed = self.resized = 0
        self.raw_bytes = self.table_bytes = 0
        self.sidecar_bytes = self.sidecar_off = 0

    def add(self, raw: bytes, text: bytes, spans: "encoding.Spans", table: int,
            sidecar: int | None, processor) -> None:
        """Count one document: raw, as it is tokenised, and how; bytes by table and sidecar."""
        normalised = processor.decode(spans.token_ids.tolist()).encode("utf-8")
        self.compared += 1
        self.changed += normalised != text
        self.resized += len(normalised) != len(text)
        self.raw_bytes += len(raw)
        self.table_bytes += table
        if sidecar is not None:
            edges = caseops.original_offsets(text)[spans.edges] if raw != text else spans.edges
            self.sidecar_bytes += sidecar
            self.sidecar_off += sidecar != edges[-1] - edges[0]

    def findings(self, has_sidecar: bool, caseops_text: bool) -> Iterator[Finding]:
        if self.other:
            yield Finding(FAULT, "docs", f"{self.other} of {self.compared} documents have other "
                          "tokens than the shards; give the documents and tokenizer they were "
                          "made from")
        else:
            yield Finding(OK, "docs", f"{self.compared:,} documents are the shards', token by "
                                      "token")
        if not caseops_text:
            off = self.table_bytes - self.raw_bytes
            share = 100 * abs(off) / max(1, self.raw_bytes)
            yield Finding(NOTE, "raw", f"normalisation changes {self.changed:,} of "
                          f"{self.compared:,} documents, {self.resized:,} in length; the table "
                          f"counts {off:+,} of {self.raw_bytes:,} raw bytes ({share:.4f} %)")
        if has_sidecar:
            yield Finding(NOTE if self.sidecar_off else OK, "raw", "the sidecar counts "
                          f"{self.sidecar_bytes - self.raw_bytes:+,} of {self.raw_bytes:,} raw "
                          f"bytes; {self.sidecar_off:,} of {self.compared:,} documents differ "
                          "from the text under their tokens")


def check_against_documents(validation: Validation, processor, paths: list[Path],
                            most: int | None, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Compare validation, document by document, with the text it was made from."""
    found, distance, raw_sums = documents.find_files(paths), Distance(), None
    sums = validation.sums(validation.counts.table)
    if validation.sidecar is not None and len(validation.sidecar) == len(validation.tokens):
        raw_sums = validation.sums(validation.sidecar)
    wanted, index = len(sums) if most is None else min(most, len(sums)), 0
    ways: list[Callable] = [bytes]
    if encoding.operator_ids(processor):
        ways.append(caseops.encode_utf8)
    for batch in batches(documents.read_documents(found, documents.Source()), BATCH_DOCUMENTS):
        tell(f"compared with {index} of {wanted} documents")
        raws = [document.text for document in batch]
        if len(ways) > 1:
            ways = ways_of(raws, ways, validation, index, processor)
        texts = [ways[0](raw) for raw in raws]
        for raw, text, spans in zip(raws, texts, encoding.spans_batch(processor, texts)):
            if len(spans.token_ids) and index < wanted:  # others are not in the shards
                distance.add(raw, text, spans, int(sums[index]),
                             None if raw_sums is None else int(raw_sums[index]), processor)
                distance.other += not np.array_equal(spans.token_ids, validation.document(index))
                index += 1
        if index >= wanted:
            break
    if index < wanted:
        yield Finding(FAULT, "docs", f"only {index} documents for the {wanted} of validation")
    yield from distance.findings(raw_sums is not None, ways[0] is caseops.encode_utf8)


def ways_of(raws: list[bytes], ways: list[Callable], validation: Validation, index: int,
            processor) -> list[Callable]:
    """Return which ways of writing documents, plain or CaseOps, give most of the shards' tokens.

    A CaseOps tokenizer serves for both, so that it has the operators tells nothing.
    """
    right = []
    for way in ways:
        found = [t for t in encoding.encode_batch(processor, list(map(way, raws))) if len(t) > 1]
        right.append(sum(np.array_equal(tokens[1:], validation.document(index + i))
                         for i, tokens in enumerate(found[:len(validation.starts) - index])))
    return [way for way, count in zip(ways, right) if count == max(right)]


# ---- training ----------------------------------------------------------------------------------


def document_keys(tokens: "np.ndarray", starts: "np.ndarray", ends: "np.ndarray") -> "np.ndarray":
    """Return a key (D,) uint64 per document, from its length and four of its tokens.

    Equal documents have equal keys; a hash of the few that meet decides.
    """
    last, key = ends - 1, np.zeros(len(starts), np.uint64)
    for probe in (ends - starts, tokens[np.minimum(starts + 1, last)],
                  tokens[np.minimum(starts + 2, last)], tokens[(starts + ends) // 2],
                  tokens[last]):
        key = (key ^ probe.astype(np.uint64)) * MIX
        key ^= key >> np.uint64(29)
    return key


def digest_of(tokens: "np.ndarray") -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def known_of(validation: Validation) -> Known:
    """Return what training shards are compared with; empty documents are left out."""
    byte_values = np.full(1 << 16, -1, np.int16)  # training may hold ids beyond the tokenizer's
    byte_values[:len(validation.rules.byte_values)] = validation.rules.byte_values
    full = np.flatnonzero(validation.ends - validation.starts > 1)
    starts, ends = validation.starts[full], validation.ends[full]
    digests = {digest_of(validation.tokens[a:b]): int(i) for i, a, b in zip(full, starts, ends)}
    keys = np.unique(document_keys(validation.tokens, starts, ends))
    return Known(validation.rules.bos_id, byte_values, keys, digests)


def head_of(path: Path, bos_id: int) -> "np.ndarray":
    """Return the tokens of a shard before its first BOS: the end of an earlier document."""
    if not integrity.shard_tokens(path):
        return np.empty(0, "<u2")  # nothing to map
    tokens = np.memmap(path, "<u2", "r", offset=shards.HEADER_BYTES)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        if len(found := np.flatnonzero(tokens[start:start + CHUNK_TOKENS] == bos_id)[:1]):
            return np.asarray(tokens[:start + found[0]])
    return np.asarray(tokens)


def owned_tokens(tokens: "np.ndarray", later: list[Path], bos_id: int) -> "np.ndarray":
    """Return the documents that begin in a shard's tokens, the last one to its end."""
    starts = np.flatnonzero(tokens == bos_id)
    if not len(starts):
        return tokens[:0]
    parts = [tokens[starts[0]:]]
    for path in later:
        parts.append(head_of(path, bos_id))
        if len(parts[-1]) < integrity.shard_tokens(path):
            break
    return np.concatenate(parts) if any(map(len, parts[1:])) else parts[0]


def scan_shard(paths: list[Path], known: Known, index: int) -> ShardReport:
    """Read one training shard."""
    here = shards.read_shard(paths[index])
    tokens = owned_tokens(here, paths[index + 1:], known.bos_id)
    starts, ends = document_bounds(tokens, known.bos_id)
    found = np.flatnonzero(np.isin(document_keys(tokens, starts, ends), known.keys))
    numbers = (known.digests.get(digest_of(tokens[starts[i]:ends[i]])) for i in found)
    return ShardReport(int(here.max(initial=0)), len(starts), int((ends - starts == 1).sum()),
                       encoding.broken_bytes(tokens, known.byte_values),
                       frozenset(number for number in numbers if number is not None))


def in_parallel(work: Callable, items: list, jobs: int, what: str,
                tell: Callable[[str], None]) -> list:
    """Return work(item) for all items, over `jobs` processes."""
    results: list = []
    if jobs == 1 or len(items) < 2:
        for item in items:
            tell(f"{what} {len(results)} of {len(items)}")
            results.append(work(item))
        return results
    with ProcessPoolExecutor(min(jobs, len(items))) as pool:
        for result in pool.map(work, items):
            results.append(result)
            tell(f"{what} {len(results)} of {len(items)}")
    return results


def check_training(files: Files, validation: Validation, processor, max_shared: int, jobs: int,
                   tell: Callable[[str], None]) -> Iterator[Finding]:
    """Look at every training document: ids, byte pieces, and whether validation holds it too."""
    paths = files.splits["train"]
    if not paths:
        yield Finding(SKIP, "training", "no training shards here")
        return
    known = known_of(validation)
    reports = in_parallel(partial(scan_shard, paths, known), list(range(len(paths))), jobs,
                          "training shards", tell)
    for path, report in zip(paths, reports):
        if report.largest_id >= processor.get_piece_size():
            yield Finding(FAULT, "training", f"{path}: token {report.largest_id} is beyond the "
                          f"tokenizer's {processor.get_piece_size()} pieces; another tokenizer's")
        elif report.broken is not None:
            yield Finding(FAULT, "training", f"{path}: a document does not decode: its byte "
                          f"pieces are no UTF-8, {report.broken} tokens after the first BOS")
    yield from check_start(paths, known.bos_id)
    if all(report.largest_id < processor.get_piece_size() for report in reports):
        yield from check_sample(paths, processor)
    count = sum(report.num_documents for report in reports)
    empty = sum(report.num_empty for report in reports)
    yield Finding(NOTE if empty else OK, "training", f"{count:,} documents"
                  f"{f', {empty:,} of them empty' if empty else ', ids in range, all decode'}")
    shared = sorted(frozenset[int]().union(*(report.shared for report in reports)))
    level = OK if not shared else NOTE if len(shared) <= max_shared else FAULT
    yield Finding(level, "disjoint", f"{len(shared):,} of {len(known.digests):,} different "
                  f"validation documents are in training, too{named(shared)}")


def check_start(paths: list[Path], bos_id: int) -> Iterator[Finding]:
    """Look whether training begins with a document; empty shards before it hold none."""
    heads = [shards.read_shard(path)[:1].tolist() for path in paths]
    first = next((i for i, head in enumerate(heads) if head), None)
    if first is None:
        yield Finding(FAULT, "training", f"no training shard holds a token, {paths[0]} is empty; "
                                         "build them again")
    elif heads[first] != [bos_id]:
        yield Finding(FAULT, "training", f"{paths[first]}: does not begin with BOS ({bos_id}): "
                                         "its first document is cut off; build it again")


def check_sample(paths: list[Path], processor) -> Iterator[Finding]:
    """Encode documents of each training shard again: another tokenizer's give other tokens."""
    for path in paths:
        tokens = shards.read_shard(path)
        starts, ends = document_bounds(tokens, processor.bos_id())
        chosen = spread(len(starts) - 1, SAMPLE_DOCUMENTS)  # the last may go on in the next shard
        sample = [tokens[starts[i] + 1:ends[i]] for i in chosen if ends[i] - starts[i] > 1]
        same = read_again(sample, processor, 1)[1] if sample else []
        if 2 * same.count(False) > len(same):
            yield Finding(FAULT, "training", f"{path}: {same.count(False)} of {len(same)} of its "
                          "documents encode to other tokens: another tokenizer wrote it; build it "
                          "again with validation's, or move it away")


def named(numbers: list[int]) -> str:
    return f": {', '.join(map(str, numbers[:5]))}{' …' if len(numbers) > 5 else ''}" * bool(numbers)


# ---- the command -------------------------------------------------------------------------------


def check_all(files: Files, args: argparse.Namespace, tell: Callable[[str], None]
              ) -> Iterator[Finding]:
    """Run every check that makes sense after the ones before it."""
    yield from check_names(files)
    headers = list(check_headers(files))
    yield from headers
    if args.quick:
        yield Finding(SKIP, "hashes", "with --quick")
    else:
        yield from check_hashes(files, args.jobs, tell)
    yield from check_tokenizer_hash(files)
    if any(finding.level == FAULT for finding in headers):
        yield Finding(SKIP, "content", "until every shard is whole")
        return
    processor = encoding.load_processor(files.tokenizer)
    encoding.check_tokenizer(processor, files.tokenizer, "give the shards' own, or build them "
                             "again with another tokenizer")
    validation = load_validation(files, processor)
    most = QUICK_DOCUMENTS if args.quick else None
    yield fingerprint(validation)
    yield from check_controls(validation, processor)
    yield from check_bytes(validation)
    yield from check_documents(validation, processor, most, args.jobs, tell)
    if args.docs:
        yield from check_against_documents(validation, processor, args.docs, most, tell)
    if args.quick:
        yield Finding(SKIP, "training", "with --quick")
    else:
        yield from check_training(files, validation, processor, args.max_shared, args.jobs, tell)


def tell_on_terminal(line: str) -> None:
    """Rewrite the last line of a terminal; silent elsewhere. "" clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?",
                        help="where the shards lie (the default variant's, as fetched)")
    parser.add_argument("--variant", default=catalogue.DEFAULT_VARIANT,
                        help=f"a published one, when no folder is given "
                        f"({catalogue.DEFAULT_VARIANT})")
    parser.add_argument("--tokenizer", type=Path, help="the shards' model (found by its name)")
    parser.add_argument("--docs", type=Path, nargs="+", default=[], metavar="PATH",
                        help="the documents behind the shards: validation is compared with the "
                        "first of them")
    parser.add_argument("--quick", action="store_true",
                        help=f"seconds: no hashes, no training text, {QUICK_DOCUMENTS} documents")
    parser.add_argument("--max-shared", type=int, default=0, metavar="N",
                        help="validation documents that may be in training, too (0)")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1),
                        help="processes; each takes about 1 GB at full shards (cores, at most 8)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        default=os.environ.get("DATA_DIR") or Path(__file__).parent,
                        help="holds datasets/ and tokenizers/ (DATA_DIR, else this folder)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def run(args: argparse.Namespace) -> int:
    """Print every finding; return the number of faults."""
    folder = args.folder or Path(args.data_dir) / catalogue.find_variant(args.variant).folder
    files = find_files(folder, args.tokenizer)
    print(f"verify: {files.folder} with {files.tokenizer}", flush=True)
    faults = 0
    for finding in check_all(files, args, tell_on_terminal):
        faults += finding.level == FAULT
        tell_on_terminal("")
        print(f"{finding.level:6}{finding.check}: {finding.text}", flush=True)
    print(f"verify: {faults or 'no'} fault{'s' * (faults != 1)}")
    return faults


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if MISSING:
        print(f"verify: {MISSING} is not installed; {PIP_LINE}", file=sys.stderr)
        return 1
    try:
        return 1 if run(args) else 0
    except ValueError as error:
        print(f"verify: {error}", file=sys.stderr)
    except OSError as error:
        print(f"verify: {error.filename}: {error.strerror or error}; check the path and its "
              "permissions", file=sys.stderr)
    except KeyboardInterrupt:
        print("verify: stopped", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
