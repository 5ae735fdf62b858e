"""CaseOps: capitals written as operators before lower-case words, exactly invertible.

Words are maximal runs of ASCII letters. A lower-case word stays; one of two or more letters, all
capitals, becomes ALLCAPS + lower; any other word takes TITLE before a capital first letter and
CAPNEXT before each later capital. A literal operator character is preceded by ESC. Source: the
challenge's `lossless_caps_caseops_v1` (PR #1626 and after).
"""

import re

import numpy as np

OPERATORS = ("\ue001", "\ue002", "\ue003", "\ue004")
TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS

_TO_RESTORE = re.compile("\ue004([\ue001-\ue004])|\ue002([a-z]+)|[\ue001\ue003]([a-z])")
# In UTF-8 operators are three bytes each; ESC takes the operator behind it out of the count
_OPERATOR_UTF8 = re.compile(rb"\xee\x80\x84(\xee\x80[\x81-\x84])|\xee\x80[\x81-\x84]")
_LEAD_BYTES = (0xEE, 0x80)  # with which all four begin
_TITLE, _ALLCAPS, _CAPNEXT, _ESC = (operator.encode()[2] for operator in OPERATORS)


def _marks(raw: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where operators go in UTF-8 bytes (N,), ascending, and the last byte of each."""
    letter = (raw | 0x20) - np.uint8(ord("a")) < 26  # in uint8, whatever is below "a" wraps round
    bounds = np.flatnonzero(np.diff(letter, prepend=False, append=False))
    starts, lengths = bounds[::2], bounds[1::2] - bounds[::2]  # of the words
    capitals = np.flatnonzero(upper)
    word = np.searchsorted(starts, capitals, side="right") - 1
    all_capitals = (np.bincount(word, minlength=len(starts)) == lengths) & (lengths > 1)
    is_first, in_all_capitals = capitals == starts[word], all_capitals[word]
    marked = is_first | ~in_all_capitals
    marks = np.where(in_all_capitals, _ALLCAPS, np.where(is_first, _TITLE, _CAPNEXT))
    literal = np.flatnonzero((raw[:-2] == _LEAD_BYTES[0]) & (raw[1:-1] == _LEAD_BYTES[1])
                             & (raw[2:] >= _TITLE) & (raw[2:] <= _ESC))
    places = np.concatenate([capitals[marked], literal])
    order = np.argsort(places, kind="stable")
    return places[order], np.concatenate([marks[marked], np.full(len(literal), _ESC)])[order]


def encode_utf8(text: bytes) -> bytes:
    """Return UTF-8 text without ASCII capitals, operators in their place.

    Whole arrays at a time: word by word in Python it is slower than the tokenizer behind it.
    """
    raw = np.frombuffer(text, dtype=np.uint8)
    upper = raw - np.uint8(ord("A")) < 26
    places, marks = _marks(raw, upper)
    slots = (places + 3 * np.arange(len(places)))[:, None] + np.arange(3)  # of the operators' bytes
    out = np.empty(len(raw) + slots.size, dtype=np.uint8)
    out[slots[:, :2]], out[slots[:, 2]] = _LEAD_BYTES, marks
    is_text = np.ones(len(out), dtype=bool)
    is_text[slots] = False
    out[is_text] = raw | (upper.astype(np.uint8) << 5)
    return out.tobytes()


def to_caseops(text: str) -> str:
    """Return text without ASCII capitals, operators in their place."""
    return encode_utf8(text.encode("utf-8")).decode("utf-8")


def _restore(match: re.Match[str]) -> str:
    literal, word, letter = match.groups()
    return literal or (word or letter).upper()


def from_caseops(text: str) -> str:
    """Return the text that `to_caseops` was given.

    An operator that governs nothing, which only a model can write, stays as it is.
    """
    return _TO_RESTORE.sub(_restore, text)


def original_offsets(encoded: bytes) -> np.ndarray:
    """Return how many original bytes lie before each byte of CaseOps text in UTF-8.

    (len + 1,) int64: operators stand for no bytes, an escaped one for its own, and a letter for
    one whatever its case.
    """
    counts = np.ones(len(encoded) + 1, dtype=np.int64)
    counts[0] = 0
    for match in _OPERATOR_UTF8.finditer(encoded):
        counts[match.start() + 1:match.start() + 4] = 0
    return np.cumsum(counts)
