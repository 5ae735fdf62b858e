"""Laws of CaseOps: exactly invertible, and every original byte counted once."""

import re

import caseops
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

T, A, C, E = "\ue001", "\ue002", "\ue003", "\ue004"
ANY_TEXT = st.text()
TRICKY = st.text(alphabet=f"abzABZ {T}{A}{C}{E}éÉß.1'")
TEXTS = st.one_of(ANY_TEXT, TRICKY)


@pytest.mark.parametrize(("text", "expected"), [
    ("plain words", "plain words"),
    ("The NASA", f"{T}the {A}nasa"),
    ("A I", f"{T}a {T}i"),
    ("iPhone McDonald", f"i{C}phone {T}mc{C}donald"),
    ("USAs aBC", f"{T}u{C}s{C}as a{C}b{C}c"),
    ("it's O'NEIL", f"it's {T}o'{A}neil"),
    ("ÉTÉ naÏve", f"É{T}tÉ naÏve"),
    (f"x{T}Y{E}", f"x{E}{T}{T}y{E}{E}"),
    ("B2B AB1CD", f"{T}b2{T}b {A}ab1{A}cd"),
])
def test_worked_examples(text, expected):
    assert caseops.to_caseops(text) == expected
    assert caseops.from_caseops(expected) == text


@given(TEXTS)
def test_inverse_restores_every_text(text):
    assert caseops.from_caseops(caseops.to_caseops(text)) == text


@given(TEXTS)
def test_no_ascii_capital_is_left_and_other_characters_keep_their_order(text):
    encoded = caseops.to_caseops(text)
    assert not re.search("[A-Z]", encoded)
    lower = re.sub("[A-Z]", lambda m: m[0].lower(), text)
    drop = f"[{T}{A}{C}{E}]"
    assert re.sub(drop, "", encoded) == re.sub(drop, "", lower)


def slow_encode(text):
    """Character by character, written from the rule alone."""
    out = []
    for run in re.findall("[A-Za-z]+|[^A-Za-z]", text):
        if not (run.isascii() and run.isalpha()):
            out.append((E if run in caseops.OPERATORS else "") + run)
        elif len(run) > 1 and all(c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for c in run):
            out.append(A + run.lower())
        else:
            for place, c in enumerate(run):
                mark = "" if c.islower() else C if place else T
                out.append(mark + c.lower())
    return "".join(out)


@given(TEXTS)
def test_transform_follows_the_rule(text):
    assert caseops.to_caseops(text) == slow_encode(text)


@given(TEXTS)
def test_offsets_count_every_original_byte_once(text):
    encoded = caseops.to_caseops(text)
    offsets = caseops.original_offsets(encoded.encode())
    assert offsets[0] == 0 and offsets[-1] == len(text.encode())
    assert len(offsets) == len(encoded.encode()) + 1
    assert set(np.diff(offsets)) <= {0, 1}


@given(TEXTS, st.data())
def test_offsets_of_a_prefix_are_its_own_original_bytes(text, data):
    cut = data.draw(st.integers(0, len(text)))
    # cut between words: a word's operator depends on the letters behind it
    while 0 < cut < len(text) and re.match("[A-Za-z]{2}", text[cut - 1:cut + 1]):
        cut += 1
    head = caseops.to_caseops(text[:cut]).encode()
    whole = caseops.to_caseops(text).encode()
    assert whole.startswith(head)
    assert caseops.original_offsets(whole)[len(head)] == len(text[:cut].encode())


@pytest.mark.parametrize("stray", [T, A, C, E, f"{T} a", f"{A}1", f"{C}{T}a"])
def test_operators_that_govern_nothing_are_harmless(stray):
    assert caseops.from_caseops(stray) == stray.replace(f"{T}a", "A")
