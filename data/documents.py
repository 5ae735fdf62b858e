"""Reading documents from people's files, one at a time, in bounded memory.

What is read, by suffix (.xz, .gz and .zst may follow any of the text suffixes):
  .jsonl .ndjson  one JSON object a line; its key "text" is the document
  .txt            the file is one document, or each of its lines is
  .parquet        the column "text" (needs pyarrow)
  a folder        all such files in it and below, sorted by path

A fault names the file and the line. A document larger than the limit is a fault too, found without
reading it all: SentencePiece needs some 45 bytes of memory for each byte of a document.
"""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".txt")
PACKED_SUFFIXES = (".xz", ".gz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, *(t + p for t in TEXT_SUFFIXES for p in PACKED_SUFFIXES), ".parquet")
READ_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 16 << 20
# A JSON line spends up to 6 characters on one byte of text (\u0001), and has other keys
JSON_LINE_FACTOR = 8
PARQUET_ROWS = 256  # read at once
BUCKET_BYTES = 64 << 20  # text sorted at once when shuffling
MAX_BUCKETS = 512  # open files
UTF8_BOM = b"\xef\xbb\xbf"
# For folders of .py, .md and the like: naming each file would be refused as well
RENAME = ("copy text under names ending in .txt (x.py as x.py.txt: each file is one document), or "
          'write one .jsonl with a line {"text": "..."} a document')


class DataError(ValueError):
    """A fault in the user's files, told in one line."""


class Source(NamedTuple):
    """How to read files: which key or column, what a .txt document is, how large one may be."""

    text_key: str = "text"
    txt_lines: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES


class Document(NamedTuple):
    """One document, valid UTF-8, and where it stands (lines and parquet rows count from 1)."""

    text: bytes
    path: Path
    line: int


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files to read, in the order given, folders expanded and sorted by path.

    Raises DataError on a missing path, an unknown suffix, a folder without readable files, and a
    file named twice.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*")
                            if p.is_file() and p.name.endswith(SUFFIXES))
            if not inside:
                raise DataError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}; "
                                f"{RENAME}")
            files += inside
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder; check its name")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: cannot tell what it holds, its name must end in one of "
                            f"{', '.join(SUFFIXES)}; {RENAME}")
        else:
            files.append(path)
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise DataError(f"{path}: read twice, its documents would repeat; name it once")
        seen.add(path.resolve())
    return files


def read_documents(files: Sequence[Path], source: Source) -> Iterator[Document]:
    """Yield the documents of all files in order; raises DataError on what cannot be read."""
    for path in files:
        read = _read_parquet if path.suffix == ".parquet" else _read_text
        for document in read(path, source):
            if len(document.text) > source.max_document_bytes:
                raise _too_large(path, document.line, source)
            yield document


def _too_large(path: Path, line: int, source: Source) -> DataError:
    remedy = "split it, or raise --max-document-mb (encoding needs 45 bytes of memory per byte)"
    if ".txt" in path.suffixes and not source.txt_lines:
        remedy = "give --txt-lines if each line is a document, else " + remedy
    return DataError(f"{path}, line {line}: this document is larger than the limit of "
                     f"{source.max_document_bytes} bytes; {remedy}")


# ---- text files ------------------------------------------------------------------------------


def _open_zstd(path: Path) -> Any:
    try:
        try:
            from compression import zstd  # type: ignore[import-not-found]  # Python 3.14
        except ImportError:
            from backports import zstd
    except ImportError:
        raise DataError(f"{path}: reading .zst needs a package; install it with: "
                        "python -m pip install backports.zstd, or unpack the file") from None
    return zstd.open(path, "rb")


def _open_plain(path: Path) -> Any:
    return open(path, "rb", buffering=0)  # the caller buffers


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": _open_plain, ".xz": lzma.open, ".gz": gzip.open, ".zst": _open_zstd}
UNPACK_ERRORS = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)


def _read_text(path: Path, source: Source) -> Iterator[Document]:
    """Yield the documents of a text file, packed or not."""
    packing = path.suffix if path.suffix in PACKED_SUFFIXES else ""
    kind = Path(path.name.removesuffix(packing)).suffix
    line = 1
    is_txt = kind == ".txt"
    with io.BufferedReader(OPENERS[packing](path), READ_BYTES) as file:
        if is_txt and not source.txt_lines:
            lines = _whole_file(file, path, source)
        else:
            lines = _lines(file, path, source, 1 if is_txt else JSON_LINE_FACTOR)
        try:
            for line, raw in lines:
                if is_txt:
                    _decode(raw, path, line)
                    yield Document(raw, path, line)
                else:
                    yield Document(_text_of_json(raw, path, line, source.text_key), path, line)
        except Exception as error:
            # zstd's own error is known by name only: its package may not be installed
            if not isinstance(error, UNPACK_ERRORS) and type(error).__name__ != "ZstdError":
                raise
            raise DataError(f"{path}, after line {line}: cannot be unpacked further ({error}); "
                            "the file is cut short or damaged, fetch it again") from None


def _lines(file: BinaryIO, path: Path, source: Source,
           factor: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line without its end) of all lines that are not blank."""
    limit = factor * source.max_document_bytes
    line = 0
    while raw := file.readline(limit + 2):
        line += 1
        if len(raw) > limit and not raw.endswith(b"\n"):
            raise _too_large(path, line, source)
        raw = (raw.removeprefix(UTF8_BOM) if line == 1 else raw).removesuffix(b"\n")
        raw = raw.removesuffix(b"\r")
        if raw and not raw.isspace():
            yield line, raw


def _whole_file(file: BinaryIO, path: Path, source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield (1, content) of a file that is one document."""
    raw = file.read(source.max_document_bytes + 1)
    if len(raw) > source.max_document_bytes:
        raise _too_large(path, 1, source)
    yield 1, raw.removeprefix(UTF8_BOM)


def _decode(raw: bytes, path: Path, line: int) -> str:
    """Return text; DataError, naming the line within it, where bytes are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(f"{path}, line {line}: byte {error.start + 1} of this document is "
                        f"0x{raw[error.start]:02x}, no valid UTF-8 ({error.reason}); convert the "
                        "file to UTF-8, or drop the line") from None


def _text_of_json(raw: bytes, path: Path, line: int, key: str) -> bytes:
    """Return the document of one JSON line."""
    try:
        record = json.loads(_decode(raw, path, line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: not a JSON object ({error}); the line is cut short "
                        "or not JSONL, repair or drop it") from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"it has {', '.join(list(record)[:8])}" if isinstance(record, dict) else (
            f"it is a {type(record).__name__}")
        raise DataError(f"{path}, line {line}: must be an object whose {key!r} is a string, "
                        f"{found}; name the right key with --text-key")
    return _encode(text, path, line)


def _encode(text: str, path: Path, line: int) -> bytes:
    """Return UTF-8; DataError on a lone surrogate, which JSON escapes can write but UTF-8 not."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {line}: character {error.start + 1} of the text is "
                        f"U+{ord(text[error.start]):04X}, half of a surrogate pair, which has no "
                        "UTF-8 form; replace it, or drop the line") from None


# ---- parquet ---------------------------------------------------------------------------------


def _read_parquet(path: Path, source: Source) -> Iterator[Document]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{path}: reading parquet needs a package; install it with: "
                        "python -m pip install pyarrow") from None
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if source.text_key not in names:
                raise DataError(f"{path}: has no column {source.text_key!r}, it has "
                                f"{', '.join(names[:8])}; name the right one with --text-key")
            for batch in table.iter_batches(PARQUET_ROWS, columns=[source.text_key]):
                for text in batch.column(0).to_pylist():
                    line += 1
                    if not isinstance(text, str):
                        raise DataError(f"{path}, row {line}: {source.text_key!r} is a "
                                        f"{type(text).__name__}, must be a string; drop the row, "
                                        "or name another column with --text-key")
                    yield Document(_encode(text, path, line), path, line)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after row {line}: cannot be read further ({error}); fetch or "
                        "write the file again") from None



# ---- shuffling -------------------------------------------------------------------------------


def shuffle_key(seed: int, index: int) -> int:
    """Return the 64-bit number that decides where document `index` goes under a seed."""
    digest = hashlib.blake2b(f"document order {seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def shuffled(documents: Iterable[Document], seed: int, folder: Path,
             expected_bytes: int) -> Iterator[Document]:
    """Yield documents sorted by `shuffle_key`, through files in `folder` (made, then removed).

    The files are ranges of the key, each read and sorted on its own: memory stays near
    BUCKET_BYTES when the documents' text is about `expected_bytes`; disk takes the text once.
    """
    num_buckets = min(MAX_BUCKETS, max(1, expected_bytes // BUCKET_BYTES))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        paths = [folder / f"{i:03d}" for i in range(num_buckets)]
        with contextlib.ExitStack() as stack:
            buckets = [stack.enter_context(open(path, "wb")) for path in paths]
            for index, document in enumerate(documents):
                key = shuffle_key(seed, index)
                _write_record(buckets[key * num_buckets >> 64], key, index, document)
        for path in paths:
            for _, _, document in sorted(_records(path)):
                yield document
            path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Of a document on disk: key, index, line, and the lengths of the path and the text that follow
_RECORD = struct.Struct("<QQQIQ")


def _write_record(file: BinaryIO, key: int, index: int, document: Document) -> None:
    path = os.fsencode(document.path)
    file.write(_RECORD.pack(key, index, document.line, len(path), len(document.text)))
    file.write(path)
    file.write(document.text)


def _records(path: Path) -> Iterator[tuple[int, int, Document]]:
    """Yield what `shuffled` wrote into one of its files."""
    with open(path, "rb") as file:
        while head := file.read(_RECORD.size):
            key, index, line, path_bytes, text_bytes = _RECORD.unpack(head)
            origin = Path(os.fsdecode(file.read(path_bytes)))
            yield key, index, Document(file.read(text_bytes), origin, line)
