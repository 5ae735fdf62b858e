"""What tells, without reading it all, that a file on disk is the one that was promised."""

import hashlib
import json
from pathlib import Path

import shards

RECORD_NAME = "download.json"  # in a variant's folder: what was fetched, and its hashes
WORDS_BYTES = 12  # of a header that say anything: magic, version, token count


def git_blob_of(path: Path) -> str:
    """Return the git object id of a small file, which is the hash the hub gives for it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def shard_tokens(path: Path) -> int:
    """Return how many tokens a shard holds; reads the start of its header alone.

    Raises ValueError where that start is not what a shard of this size begins with.
    """
    size_bytes = path.stat().st_size
    num_tokens = max(0, size_bytes - shards.HEADER_BYTES) // 2
    with open(path, "rb") as file:
        found = file.read(WORDS_BYTES)
    known = shards.header_of(num_tokens)[:WORDS_BYTES]
    if size_bytes < shards.HEADER_BYTES or found[:8] != known[:8]:
        raise ValueError(f"{path}: does not begin with a shard's header ({shards.MAGIC}, "
                         f"{shards.VERSION}); fetch or build it again")
    promised = int.from_bytes(found[8:], "little")
    if size_bytes != shards.HEADER_BYTES + 2 * promised:
        raise ValueError(f"{path}: has {size_bytes} bytes, its header promises "
                         f"{shards.HEADER_BYTES + 2 * promised} ({promised} tokens); fetch or "
                         "build it again")
    return num_tokens


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, {} where there is none; ValueError when it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, must hold an object; delete it")
    return found


def file_entries(found: dict, *keys: str) -> dict[str, dict]:
    """Return those of found["files"] that are objects with these keys.

    Another tool's file of the same name may hold anything there, or lack it.
    """
    files = found.get("files")
    return {name: entry for name, entry in (files.items() if isinstance(files, dict) else ())
            if isinstance(entry, dict) and all(key in entry for key in keys)}
