"""Token shards, their names and the SentencePiece byte table, without torch.

The shard is the published one: 256 little-endian int32 header words, of which word 0 is the magic
number, word 1 the version and word 2 the token count N, followed by N little-endian uint16 tokens.
train_gpt.py holds its own reader and table, since a submission is one file; a test compares both.
"""

import contextlib
import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_TOKEN = 2**16 - 1
SPACE = "\u2581"  # SentencePiece writes a space as this character
# The one rule of names. `fineweb_val_*.bin` would also take sidecars and a backup `…000000_old.bin`
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_([0-9]+)\.bin")


def shard_name(split, number):
    """Return the name of a shard; split is train, val or val_bytes (a byte sidecar)."""
    return f"fineweb_{split}_{number:06d}.bin"


def find_shards(folder):
    """Return the shards in a folder, {split: [path]}, in the order in which they are read.

    That is by name, as published scripts sort them. Whatever has another name is no shard.
    """
    splits = {"train": [], "val": [], "val_bytes": []}
    for path in sorted(Path(folder).glob("fineweb_*.bin")):
        if match := SHARD_NAME.fullmatch(path.name):
            splits[match[1]].append(path)
    return splits


def run_line(**settings):
    """Return the shell line that runs train_gpt.py with settings, NAME=value."""
    words = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return " ".join([*words, "python train_gpt.py"])


def write_atomic(path, content):
    """Write bytes so that `path` is either complete or as it was before.

    The content goes to `path`.part, reaches the disk, and only then takes the name.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def sha256_of(path):
    """Return the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def header_of(num_tokens):
    """Return the header of a shard of so many tokens, bytes."""
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


class ShardWriter:
    """Writes one shard piece by piece; it has another name, `path`.part, until it is finished."""

    def __init__(self, path):
        self.path, self.num_tokens = Path(path), 0
        self.part = self.path.with_name(self.path.name + ".part")
        self.file = open(self.part, "wb")
        self.file.write(header_of(0))

    def add(self, tokens):
        """Append tokens (N,) uint16."""
        self.file.write(tokens.astype("<u2", copy=False).tobytes())
        self.num_tokens += len(tokens)

    def finish(self):
        """Complete the header, let everything reach the disk, and give the shard its name."""
        self.file.seek(0)
        self.file.write(header_of(self.num_tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.part, self.path)

    def discard(self):
        """Remove what was written; harmless after `finish`."""
        with contextlib.suppress(OSError):  # a full disk refuses the last buffer
            self.file.close()
        self.part.unlink(missing_ok=True)


def write_shard(path, tokens):
    """Write tokens (N,), integers 0..65535, as one shard.

    Raises ValueError when a token does not fit into 16 bits.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"{path}: tokens have shape {tokens.shape} and type {tokens.dtype}, "
                         "must be a flat array of integers; pass token ids")
    if tokens.size and not (tokens.min() >= 0 and tokens.max() <= MAX_TOKEN):
        raise ValueError(f"{path}: token ids span {tokens.min()}..{tokens.max()}, must lie in "
                         f"0..{MAX_TOKEN}; use a tokenizer of at most {MAX_TOKEN + 1} pieces")
    write_atomic(path, header_of(tokens.size) + tokens.astype("<u2").tobytes())


def read_shard(path):
    """Return the tokens (N,) uint16 of one shard.

    Raises ValueError on a wrong magic number or version, or a size other than 1024 + 2N bytes:
    a shard cut short by an interrupted download has been trained on unnoticed before.
    """
    size_bytes = os.path.getsize(path)
    remedy = "fetch or build the shard again"
    if size_bytes < HEADER_BYTES:
        raise ValueError(f"{path}: size is {size_bytes} bytes, a shard has at least "
                         f"{HEADER_BYTES}; {remedy}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    for name, value, rule in (("magic", header[0], MAGIC), ("version", header[1], VERSION)):
        if value != rule:
            raise ValueError(f"{path}: {name} is {value}, must be {rule}; this is no token "
                             f"shard, {remedy}")
    expected_bytes = HEADER_BYTES + 2 * int(header[2])
    if size_bytes != expected_bytes:
        raise ValueError(f"{path}: size is {size_bytes} bytes, must be {expected_bytes} for the "
                         f"{header[2]} tokens in its header; {remedy}")
    return np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)


class ByteTable(NamedTuple):
    """Per token id, arrays (V,); rules in `byte_table`."""

    piece_bytes: np.ndarray  # int32, UTF-8 bytes without the leading space
    leading_space: np.ndarray  # bool, the piece begins with a space
    is_boundary: np.ndarray  # bool, control, unknown or unused: no text, and eats a space after it


def byte_table(processor, vocab_size):
    """Return the ByteTable of a SentencePieceProcessor, arrays (vocab_size,).

    Control, unknown and unused ids have no bytes and are boundaries, as are ids past the
    tokenizer's own; a byte-fallback piece is one byte; any other piece is its UTF-8 length, a
    leading space apart. Raises ValueError for a tokenizer with more pieces than vocab_size, or
    without a piece for the bare space: it would charge three bytes for each lone space (#897).
    """
    num_pieces = processor.get_piece_size()
    if num_pieces > vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, must be at least the tokenizer's "
                         f"{num_pieces} pieces; set it to {num_pieces}")
    if processor.piece_to_id(SPACE) == processor.unk_id():
        raise ValueError(f"tokenizer has no piece for a bare space ({SPACE!r}), must have one; "
                         "use a tokenizer trained by the published recipe")
    table = ByteTable(np.zeros(vocab_size, dtype=np.int32), np.zeros(vocab_size, dtype=bool),
                      np.ones(vocab_size, dtype=bool))
    for token in range(num_pieces):
        if (processor.is_control(token) or processor.is_unknown(token)
                or processor.is_unused(token)):
            continue
        table.is_boundary[token] = False
        if processor.is_byte(token):
            table.piece_bytes[token] = 1
            continue
        piece = processor.id_to_piece(token)
        table.leading_space[token] = piece.startswith(SPACE)
        table.piece_bytes[token] = len(piece.removeprefix(SPACE).encode("utf-8"))
    return table


def target_bytes(tokens, table):
    """Return the bytes (N-1,) int64 that each target tokens[1:] stands for, tokens being (N,).

    A leading space counts unless the token before is a boundary, so the first word of a document
    brings none, and a BOS target costs its nats for no bytes.
    """
    tokens = np.asarray(tokens)
    before, target = tokens[:-1], tokens[1:]
    space = table.leading_space[target] & ~table.is_boundary[before]
    return table.piece_bytes[target].astype(np.int64) + space
