"""The entropy coder: exact inverses, near the entropy, and hostile input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import steady  # noqa: F401

from train_gpt import (
    CLASSES,
    RANS_BITS,
    class_counts,
    counted_bytes,
    decode_codes,
    element_classes,
    encode_codes,
    entropy_bytes,
    rans_decode,
    rans_encode,
    rans_tables,
    size_classes,
)


def some_codes(rows, columns, seed, spread=1.0):
    """Return codes whose rows and columns differ in size, as trained matrices' do."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2 ** (spread * torch.randn(rows, 1, generator=generator)
                  + 0.5 * spread * torch.randn(1, columns, generator=generator) + 1.5)
    values = torch.randn(rows, columns, generator=generator) * scale
    return values.round().clamp(-127, 127).to(torch.int8)


def classes_of(codes):
    return element_classes(*size_classes(codes))


@settings(max_examples=30)
@given(st.data())
def test_decoding_gives_back_any_codes_of_any_classes(data):
    count = data.draw(st.integers(0, 400) | st.integers(20_000, 40_000))  # one lane and several
    rng = np.random.default_rng(data.draw(st.integers(0, 2 ** 32)))
    alphabet = rng.integers(-128, 128, data.draw(st.integers(1, 256)))
    codes = torch.from_numpy(rng.choice(alphabet, count).astype(np.int8))
    some = rng.integers(0, CLASSES, data.draw(st.integers(1, 9)))
    classes = torch.from_numpy(rng.choice(some, count).astype(np.int16))
    for coder in ("rans", "brotli"):
        tensors = encode_codes(codes, classes, coder)
        assert torch.equal(decode_codes(tensors, classes, coder), codes)
        assert not tensors  # each of them was used


@given(st.lists(st.integers(0, 10 ** 9), min_size=256, max_size=256), st.integers(0, 256))
def test_frequencies_sum_to_the_whole_and_keep_every_code(counts, zeros):
    counts[:zeros] = [0] * zeros
    rows = torch.zeros(CLASSES, 256, dtype=torch.int64)
    rows[3] = torch.tensor(counts)
    tables = rans_tables(rows)
    assert tables[3].sum() == (1 << RANS_BITS if any(counts) else 0)
    assert ((tables[3] > 0) == (np.array(counts) > 0)).all()
    assert not tables[[k for k in range(CLASSES) if k != 3]].any()


def test_the_stream_is_as_long_as_the_histograms_allow():
    codes = some_codes(1024, 512, seed=1)
    classes, flat = classes_of(codes), codes.flatten()
    ideal = counted_bytes(class_counts(flat, classes))
    tensors = encode_codes(flat, classes, "rans")
    size = sum(2 * tensors[name].numel() for name in ("stream", "states"))
    assert ideal <= size < 1.002 * ideal


def test_classes_pay_where_rows_differ_and_cost_nothing_where_they_do_not():
    for spread, most, least in ((1.0, 0.92, 0.5), (0.0, 1.0005, 0.99)):
        codes = some_codes(512, 512, seed=2, spread=spread)
        ideal = counted_bytes(class_counts(codes.flatten(), classes_of(codes)))
        assert least * entropy_bytes(codes) < ideal < most * entropy_bytes(codes)


def test_counted_bytes_are_the_entropy_of_one_class():
    codes = some_codes(64, 64, seed=3)
    counts = class_counts(codes.flatten(), torch.full((64 * 64,), 5))
    assert counted_bytes(counts) == pytest.approx(entropy_bytes(codes), rel=1e-9)


def test_a_class_is_the_size_of_its_codes():
    """Doubling a row moves it four classes up; a row of zeros has the least class of all."""
    codes = torch.ones(4, 8, dtype=torch.int8)
    codes[1], codes[2], codes[3] = 2, 4, 0
    rows, columns = size_classes(codes)
    assert rows.tolist() == [0, 4, 8, -12] and (columns[0] == columns).all()
    assert classes_of(codes).view(4, 8)[3].max() == 0 < classes_of(codes).min() + 1


@settings(max_examples=40)
@given(st.integers(0, 10 ** 6), st.integers(0, 15), st.sampled_from(("stream", "states")))
def test_a_flipped_bit_is_noticed_or_changes_codes_within_the_alphabet(place, bit, part):
    """The container's checksum is the guard; the decoder alone must end and never run away."""
    codes = some_codes(20, 32, seed=4)
    classes = classes_of(codes)
    symbols = (codes.flatten().numpy().astype(np.int16) + 128).astype(np.uint8)
    tables = rans_tables(class_counts(codes.flatten(), classes))
    stream, states = rans_encode(symbols, classes.numpy(), tables)
    damaged = {"stream": stream.copy(), "states": states.copy()}
    damaged[part][place % len(damaged[part])] ^= 1 << bit
    with pytest.raises(ValueError, match="stream of codes"):
        rans_decode(damaged["stream"], damaged["states"], classes.numpy(), tables)


@pytest.mark.parametrize("change", ["negative", "too much", "states", "short", "long"])
def test_impossible_tables_and_lengths_are_refused(change):
    codes = some_codes(40, 64, seed=5)
    classes = classes_of(codes).numpy()
    tables = rans_tables(class_counts(codes.flatten(), torch.from_numpy(classes)))
    symbols = (codes.flatten().numpy().astype(np.int16) + 128).astype(np.uint8)
    stream, states = rans_encode(symbols, classes, tables)
    if change == "negative":
        tables[classes[0], :2] += (-1 - tables[classes[0], 0], 1 + tables[classes[0], 0])
    elif change == "too much":
        tables[classes[0], 0] += 1
    stream = {"short": stream[:-1], "long": np.append(stream, stream[:1])}.get(change, stream)
    states = np.append(states, states) if change == "states" else states
    with pytest.raises(ValueError):
        rans_decode(stream, states, classes, tables)
