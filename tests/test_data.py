"""Laws of shards, of the order of windows, of the bytes each target stands for, of data faults."""

import os
import types
from collections import Counter
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from conftest import REPO, load_shards_module, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    Loader,
    ShardSet,
    load_config,
    load_validation,
    open_shard,
    take_inputs,
    window_order,
)

sentencepiece = pytest.importorskip("sentencepiece")
shards = load_shards_module()

VOCAB, BOS = 400, 1
PUBLISHED_TOKENIZERS = sorted((REPO.parent / "shared" / "tokenizers").glob("*.model"))
NO_PUBLISHED = pytest.param(None, marks=pytest.mark.skip(reason="no published tokenizer here"))


def fake_runtime(rank=0, world_size=1):
    return types.SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))


def write_numbered(folder, sizes, name="train"):
    """Write shards whose tokens count on from 0 through all of them; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([0, *sizes])
    for i, size in enumerate(sizes):
        tokens = np.arange(ends[i], ends[i] + size)
        shards.write_shard(folder / f"fineweb_{name}_{i:06d}.bin", tokens)
    return train_gpt.find_shards(folder, name)


# ---- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[], [0], [1, 65_535, 7], list(range(5000))])
def test_what_the_shard_writer_writes_is_read_back(tmp_path, tokens):
    path = tmp_path / "fineweb_train_000000.bin"
    shards.write_shard(path, tokens)
    found = open_shard(path)
    assert found.dtype == np.uint16 and found.tolist() == tokens
    assert found.tolist() == shards.read_shard(path).tolist()


@pytest.mark.parametrize("change", [
    lambda b: b[:-2], lambda b: b[:-1], lambda b: b + b"\0\0", lambda b: b[:1024],
    lambda b: b[:500], lambda b: b"", lambda b: b"\1" + b[1:], lambda b: b[:4] + b"\2" + b[5:],
    lambda b: b[:7], lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:]],
    ids=["truncated", "half a token", "too long", "header alone", "short", "empty", "magic",
         "version", "seven bytes", "negative count"])
def test_damaged_shard_is_refused_by_both_readers_naming_file_and_remedy(tmp_path, change):
    path = tmp_path / "fineweb_train_000000.bin"
    shards.write_shard(path, [1, 2, 3])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="fineweb_train_000000.bin: .*again"):
        open_shard(path)
    with pytest.raises(ValueError):
        shards.read_shard(path)


def test_shards_are_found_in_order_and_each_split_alone(tmp_path):
    names = ["train_000010", "train_000002", "val_000000", "val_000001", "val_bytes_000000"]
    for name in names:
        (tmp_path / f"fineweb_{name}.bin").touch()
    (tmp_path / "fineweb_val_000002.bin.part").touch()

    def found(split):
        paths = train_gpt.find_shards(tmp_path, split)
        return [path.stem.removeprefix("fineweb_") for path in paths]

    assert found("train") == ["train_000002", "train_000010"]
    assert found("val") == ["val_000000", "val_000001"]
    assert found("val_bytes") == ["val_bytes_000000"]


# ---- the order of windows ----------------------------------------------------------------------


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_each_epoch_visits_every_window_once(num_windows):
    order = window_order(7, num_windows, 0, 3 * num_windows).reshape(3, num_windows)
    assert (np.sort(order, axis=1) == np.arange(num_windows)).all()


@given(st.integers(0, 2**40), st.integers(1, 70), st.lists(st.integers(0, 40), max_size=6),
       st.integers(0, 10**12))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_order_is_pure_in_seed_and_position_however_it_is_split(seed, num_windows, counts, start):
    whole = window_order(seed, num_windows, start, sum(counts))
    parts, at = [np.empty(0, np.int64)], start
    for count in counts:
        parts.append(window_order(seed, num_windows, at, count))
        at += count
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert all(0 <= i < num_windows for i in whole)


def test_order_differs_by_seed_and_by_epoch():
    size = 500
    orders = [window_order(seed, size, epoch * size, size)
              for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # a random pair agrees in one place on average


@pytest.mark.parametrize("size", [64, 1000, 4096])
def test_order_mixes(size):
    positions = np.arange(size)
    for seed in range(5):
        order = window_order(seed, size, 0, size)
        assert abs(np.corrcoef(positions, order)[0, 1]) < 5 / size ** 0.5
        steps = Counter(np.diff(order).tolist())
        assert max(steps.values()) < 0.1 * size  # no stride
        # what comes early is spread over all of the text: quarters of it meet quarters of the epoch
        table = np.histogram2d(positions, order, bins=4)[0]
        assert (abs(table - size / 16) < 5 * (size / 16) ** 0.5).all()


# ---- windows -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 12))
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_windows_partition_the_targets_of_each_shard(tmp_path_factory, sizes, seq_len):
    found = ShardSet(write_numbered(tmp_path_factory.mktemp("s"), sizes), seq_len)
    windows = [found.windows([i])[0].tolist() for i in range(found.num_windows)]
    expected, end = [], 0
    for size in sizes:  # they overlap by one token, and none crosses into the next shard
        start, end = end, end + size
        starts = range(start, end - seq_len, seq_len)
        expected += [list(range(at, at + seq_len + 1)) for at in starts]
    assert windows == expected and found.num_tokens == sum(sizes)
    if windows:
        assert found.windows(range(len(windows))).tolist() == windows


def test_fingerprint_tells_texts_apart_and_not_folders(tmp_path):
    def fingerprint(folder, sizes):
        return train_gpt.fingerprint(write_numbered(tmp_path / folder, sizes))

    same = fingerprint("a", [30, 20])
    assert fingerprint("b", [30, 20]) == same
    others = {fingerprint("c", [20, 30]), fingerprint("d", [30, 21]), fingerprint("e", [50])}
    assert len(others | {same}) == 4


# ---- batches -----------------------------------------------------------------------------------

STEP_ENV = dict(TRAIN_SEQ_LEN="8", EVAL_SEQ_LEN="8", EVAL_STRIDE="8", TRAIN_BATCH_TOKENS="64",
                MICRO_BATCH_TOKENS="64", VOCAB_SIZE="1000", SEED="3")


def batches(folder, steps, rank=0, world_size=1, **changes):
    """Return this rank's batches of some steps, as lists."""
    config = load_config(STEP_ENV | changes)
    files = train_gpt.find_shards(folder, "train")
    loader = Loader(ShardSet(files, config.train_seq_len), config, fake_runtime(rank, world_size))
    found = [loader.batch(step) for step in steps]
    loader.close()
    assert all(torch.equal(b.tokens[:, 1:], b.targets[:, :-1]) for b in found)
    windows = [torch.cat((b.tokens, b.targets[:, -1:]), 1) for b in found]
    assert all(w.dtype == torch.int64 and w.shape == (8 // world_size, 9) for w in windows)
    return [w.tolist() for w in windows]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Folder of 25 windows of 8 tokens: an epoch ends within a step of eight windows."""
    folder = tmp_path_factory.mktemp("numbered")
    write_numbered(folder, [100, 5, 107])
    return folder


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_single_rank_batch_in_rank_order(numbered, world_size):
    whole = batches(numbered, range(8))
    parts = [batches(numbered, range(8), rank, world_size) for rank in range(world_size)]
    assert [sum(shares, []) for shares in zip(*parts, strict=True)] == whole


def test_steps_walk_through_the_epochs_window_by_window(numbered):
    starts = [window[0] for batch in batches(numbered, range(25)) for window in batch]
    windows = ShardSet(train_gpt.find_shards(numbered, "train"), 8)
    expected = Counter(windows.windows(range(windows.num_windows))[:, 0].tolist())
    assert windows.num_windows == 25
    for epoch in range(8):  # 25 steps of eight are eight epochs of 25
        assert Counter(starts[25 * epoch:25 * epoch + 25]) == expected


def test_reading_ahead_does_not_change_what_a_step_gets(numbered):
    each_fresh = {step: batches(numbered, [step])[0] for step in (0, 1, 2, 5, 6, 40)}
    for steps in ([0, 1, 2, 5, 6, 40], [6, 5, 0, 1, 1, 40, 2], [5, 5, 6, 6]):
        assert batches(numbered, steps) == [each_fresh[step] for step in steps]


def test_data_order_depends_on_the_seed_and_not_on_the_folder(numbered, tmp_path):
    moved = tmp_path / "elsewhere" / "deep"
    write_numbered(moved, [100, 5, 107])
    assert batches(moved, range(3)) == batches(numbered, range(3))
    assert batches(numbered, range(3), SEED="4") != batches(numbered, range(3))


def test_batch_with_a_token_of_another_vocabulary_is_refused(numbered):
    with pytest.raises(ValueError, match="VOCAB_SIZE=100"):
        batches(numbered, range(4), VOCAB_SIZE="100")


# ---- bytes per target --------------------------------------------------------------------------

DOCUMENTS = ["Naïve café: the cat sat on  the mat, 1234 times.", "The mat, the mat, THE MAT!",
             "x", " leading space", "日本語 and ▁ and 🙂\ttab", "the the the cat cat sat on on mat"]


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory, tiny_documents):
    """A tokenizer of VOCAB pieces, trained by the published recipe on a few kilobytes."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(tiny_documents[:40] + DOCUMENTS, path, vocab_size=VOCAB)
    return path


@pytest.fixture(scope="module", params=["small", *(PUBLISHED_TOKENIZERS or [NO_PUBLISHED])],
                ids=lambda value: Path(str(value)).stem)
def tokenizer(request, small_tokenizer):
    return small_tokenizer if request.param == "small" else request.param


def plain_table(processor, vocab_size):
    def kind(i):
        for name in ("control", "unknown", "unused", "byte"):
            if getattr(processor, f"is_{name}")(i):
                return name
        return "normal"

    pieces = [(processor.id_to_piece(i), kind(i)) for i in range(processor.vocab_size())]
    return plain.byte_table(pieces, vocab_size)


def write_documents(folder, tokenizer, documents, extra=()):
    """Write documents, a BOS before each, as training and validation shard; returns the tokens."""
    processor = train_gpt.load_tokenizer(tokenizer)
    tokens = [t for text in documents for t in (BOS, *processor.encode(text))] + list(extra)
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        shards.write_shard(folder / f"fineweb_{split}_000000.bin", np.array(tokens))
    return tokens


def sidecar_of(tokenizer, tokens):
    """Return the bytes of text that each token stands for."""
    pieces = train_gpt.read_pieces(train_gpt.load_tokenizer(tokenizer))
    return train_gpt.count_bytes(np.asarray(tokens), pieces)[2]


def text_env(folder, tokenizer, **changes):
    """Return settings that read `folder`, in small windows."""
    vocab_size = train_gpt.load_tokenizer(tokenizer).vocab_size()
    return STEP_ENV | dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(tokenizer),
                           VOCAB_SIZE=str(vocab_size)) | changes


def test_byte_table_is_the_same_in_script_builder_and_reference(tokenizer):
    processor = train_gpt.load_tokenizer(tokenizer)
    size = processor.vocab_size() + 3
    found = train_gpt.byte_table(processor, size)
    for reference in (shards.byte_table(processor, size), plain_table(processor, size).values()):
        for mine, other in zip(found, reference, strict=True):
            assert mine.shape == (size,) and (mine == other).all()
    assert found[2][-3:].all() and not found[0][-3:].any()  # ids past the tokenizer's own


def test_target_bytes_are_the_references_and_the_texts(tokenizer, tmp_path):
    processor = train_gpt.load_tokenizer(tokenizer)
    every_piece = range(0, processor.vocab_size(), max(1, processor.vocab_size() // 500))
    tokens = write_documents(tmp_path, tokenizer, DOCUMENTS, extra=every_piece)
    table = plain_table(processor, processor.vocab_size())
    expected = [plain.byte_cost(a, b, table) for a, b in zip(tokens, tokens[1:], strict=False)]
    pieces = train_gpt.read_pieces(processor)
    assert train_gpt.count_bytes(np.array(tokens, np.uint16), pieces)[0][1:].tolist() == expected
    builders = shards.target_bytes(tokens, shards.byte_table(processor, processor.vocab_size()))
    assert builders.tolist() == expected


def test_bytes_of_a_document_are_those_of_its_utf8_text(small_tokenizer, tmp_path):
    for i, document in enumerate(["the cat sat", "日本語 and 🙂", "1234 times, the mat!"]):
        folder = tmp_path / str(i)
        write_documents(folder, small_tokenizer, [document])
        text = load_validation(load_config(text_env(folder, small_tokenizer)))
        assert text.target_bytes.sum() == len(document.encode())


def test_tokenizer_without_a_piece_for_the_space_is_refused(small_tokenizer, tmp_path):
    path = tmp_path / "no_space.model"
    train_tokenizer(["".join(text.split()) for text in DOCUMENTS[:4]], path, vocab_size=320)
    processor = train_gpt.load_tokenizer(path)
    assert processor.piece_to_id("▁") == processor.unk_id()
    with pytest.raises(ValueError, match="'▁'.*use one"):
        train_gpt.byte_table(processor, 400)
    write_documents(tmp_path / "text", path, DOCUMENTS * 3)
    (fault,) = take_inputs(load_config(text_env(tmp_path / "text", path)))[1]
    assert "'▁'" in fault


# ---- validation --------------------------------------------------------------------------------


@pytest.fixture
def text_folder(small_tokenizer, tmp_path):
    write_documents(tmp_path / "text", small_tokenizer, DOCUMENTS * 4)
    return tmp_path / "text"


def test_tail_is_scored_or_dropped_as_asked(small_tokenizer, text_folder):
    tokens = open_shard(text_folder / "fineweb_val_000000.bin").tolist()
    assert len(tokens) % 8 != 1  # there is a tail
    whole = (len(tokens) - 1) // 8 * 8
    for score_tail, kept in (("1", len(tokens) - 1), ("0", whole)):
        config = load_config(text_env(text_folder, small_tokenizer, SCORE_TAIL=score_tail))
        text = load_validation(config)
        assert text.tokens.tolist() == tokens[:kept + 1] and len(text.target_bytes) == kept
        assert (text.all_targets, text.legacy_targets) == (len(tokens) - 1, whole)
        assert text.table_bytes == text.target_bytes.sum()


def test_validation_is_its_shards_one_after_the_other(small_tokenizer, text_folder):
    config = load_config(text_env(text_folder, small_tokenizer))
    whole = load_validation(config)
    tokens = open_shard(text_folder / "fineweb_val_000000.bin").tolist()
    for i, part in enumerate((tokens[:5], [], tokens[5:6], tokens[6:])):
        shards.write_shard(text_folder / f"fineweb_val_{i:06d}.bin", part)
    split = load_validation(config)
    assert split.tokens.tolist() == whole.tokens.tolist() and split.sha256 == whole.sha256
    assert split.target_bytes.tolist() == whole.target_bytes.tolist()


def test_byte_sidecar_beside_the_shards_is_the_denominator(small_tokenizer, text_folder):
    config = load_config(text_env(text_folder, small_tokenizer))
    plainly = load_validation(config)
    sidecar = sidecar_of(small_tokenizer, plainly.tokens)
    sidecar[5] += 3  # what normalisation shrank
    cut = 50  # sidecar files need not be cut where the shards are
    shards.write_shard(text_folder / "fineweb_val_bytes_000000.bin", sidecar[:cut])
    shards.write_shard(text_folder / "fineweb_val_bytes_000001.bin", sidecar[cut:])
    text = load_validation(config)
    assert text.denominator == "sidecar" and text.target_bytes.tolist() == sidecar[1:].tolist()
    assert text.tokens.tolist() == plainly.tokens.tolist()
    assert text.table_bytes == plainly.table_bytes  # still told, for comparison
    legacy = load_validation(load_config(text_env(text_folder, small_tokenizer, SCORE_TAIL="0")))
    assert legacy.target_bytes.tolist() == sidecar[1:1 + legacy.legacy_targets].tolist()


@pytest.mark.parametrize("more", [-1, 1])
def test_byte_sidecar_of_another_length_is_refused(small_tokenizer, text_folder, more):
    count = len(open_shard(text_folder / "fineweb_val_000000.bin"))
    shards.write_shard(text_folder / "fineweb_val_bytes_000000.bin", [1] * (count + more))
    with pytest.raises(ValueError, match=f"sidecar.* {count + more} .* {count} "):
        load_validation(load_config(text_env(text_folder, small_tokenizer)))


def test_text_too_short_to_score_is_refused(small_tokenizer, tmp_path):
    dropped = {"SCORE_TAIL": "0"}
    for tokens, changes in (([], {}), ([BOS], {}), ([BOS, BOS, BOS], {}), ([BOS, 300], dropped)):
        shards.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_validation(load_config(text_env(tmp_path, small_tokenizer, **changes)))


def test_validation_of_another_vocabulary_is_refused(small_tokenizer, text_folder):
    shards.write_shard(text_folder / "fineweb_val_000001.bin", [VOCAB])
    with pytest.raises(ValueError, match=f"{VOCAB}, VOCAB_SIZE={VOCAB}"):
        load_validation(load_config(text_env(text_folder, small_tokenizer)))


# ---- faults that a run finds before it starts --------------------------------------------------


def faults_of(folder, tokenizer, **changes):
    return take_inputs(load_config(text_env(folder, tokenizer, **changes)))[1]


def test_good_data_has_no_fault(small_tokenizer, text_folder, tiny_data):
    assert not faults_of(text_folder, small_tokenizer)
    assert not faults_of(tiny_data.shards, tiny_data.tokenizer)


@pytest.mark.parametrize("make", [False, True], ids=["missing folder", "empty folder"])
def test_fault_of_absent_data_ends_with_the_commands_that_get_some(small_tokenizer, tmp_path, make):
    folder = tmp_path / "none"
    if make:
        folder.mkdir()
    found = faults_of(folder, small_tokenizer)
    assert found[0].startswith(f"DATA_PATH={folder}: ")
    last = str(train_gpt.ConfigError(found)).splitlines()[-2:]
    assert "python data/build_demo.py && PRESET=demo python train_gpt.py" in last[0]
    assert "cached_challenge_fineweb.py --variant sp8192" in last[1]


def test_missing_tokenizer_is_a_fault_beside_those_of_the_shards(small_tokenizer, text_folder):
    missing = dict(TOKENIZER_PATH="/no/t.model")
    (fault,) = faults_of(text_folder, small_tokenizer, **missing)
    assert fault.startswith("TOKENIZER_PATH=/no/t.model: ")
    (text_folder / "fineweb_val_000000.bin").unlink()
    no_val, again, remedy = faults_of(text_folder, small_tokenizer, **missing)
    assert "fineweb_val_*.bin" in no_val and again == fault and "build_demo.py" in remedy


def test_every_damaged_shard_is_named(small_tokenizer, text_folder):
    good = (text_folder / "fineweb_val_000000.bin").read_bytes()
    (text_folder / "fineweb_train_000001.bin").write_bytes(good[:-2])
    (text_folder / "fineweb_train_000002.bin").write_bytes(b"\0" + good[1:])
    (text_folder / "fineweb_train_000003.bin").write_bytes(good[:9])
    shards.write_shard(text_folder / "fineweb_val_000001.bin", [BOS, VOCAB])
    found = faults_of(text_folder, small_tokenizer)
    names = [Path(fault.split(": ")[0]).stem.removeprefix("fineweb_") for fault in found]
    assert names == ["train_000001", "train_000002", "train_000003", "val_000001"]
    assert str(VOCAB) in found[3] and f"VOCAB_SIZE={VOCAB}" in found[3]


def test_damaged_byte_sidecar_is_found_before_the_run(small_tokenizer, text_folder):
    sidecar = text_folder / "fineweb_val_bytes_000000.bin"
    tokens = open_shard(text_folder / "fineweb_val_000000.bin")
    shards.write_shard(sidecar, sidecar_of(small_tokenizer, tokens))
    assert not faults_of(text_folder, small_tokenizer)
    sidecar.write_bytes(sidecar.read_bytes()[:-2])
    (fault,) = faults_of(text_folder, small_tokenizer)
    assert sidecar.name in fault


def test_stage_asks_only_for_what_it_reads(small_tokenizer, text_folder):
    (text_folder / "fineweb_train_000000.bin").unlink()
    assert faults_of(text_folder, small_tokenizer)
    assert faults_of(text_folder, small_tokenizer, STAGE="train")
    assert not faults_of(text_folder, small_tokenizer, STAGE="evaluate")
    missing = load_config(dict(STAGE="quantize", DATA_PATH="/no", TOKENIZER_PATH="/no"))
    assert not take_inputs(missing)[1]


def test_tokenizer_of_another_vocabulary_is_a_fault(small_tokenizer, text_folder):
    (fault,) = faults_of(text_folder, small_tokenizer, VOCAB_SIZE=str(VOCAB + 1))
    assert f"{VOCAB} pieces" in fault and f"VOCAB_SIZE={VOCAB + 1}" in fault


def test_tokenizer_that_did_not_write_the_shards_is_a_fault(small_tokenizer, tmp_path,
                                                            tiny_documents):
    """Even one of as many pieces, trained on other pages of the same book."""
    other = tmp_path / "other.model"
    train_tokenizer(tiny_documents[40:80], other, vocab_size=VOCAB)
    write_documents(tmp_path / "text", small_tokenizer, tiny_documents[:20])
    (fault,) = faults_of(tmp_path / "text", other)
    assert f"TOKENIZER_PATH={other}: " in fault and "another tokenizer" in fault


def test_published_tokenizers_of_one_vocabulary_are_told_apart(tmp_path, tiny_documents):
    same_size = [path for path in PUBLISHED_TOKENIZERS if "8192" in path.name]
    if len(same_size) < 2:
        pytest.skip("needs two published tokenizers of 8192 pieces")
    for i, writer in enumerate(same_size):
        folder = tmp_path / str(i)
        tokens = np.array(write_documents(folder, writer, tiny_documents[:20]), np.uint16)
        if "caseops" in writer.name:
            shards.write_shard(folder / "fineweb_val_bytes_000000.bin", sidecar_of(writer, tokens))
        assert [bool(faults_of(folder, reader)) for reader in same_size] == \
            [reader != writer for reader in same_size]


def test_tokenizer_that_wrote_tiny_documents_is_accepted(small_tokenizer, tmp_path):
    """Run together, the documents would read "the cat" and encode to fewer tokens."""
    write_documents(tmp_path / "text", small_tokenizer, ["t", "h", "e", " c", "at"] * 100)
    assert not faults_of(tmp_path / "text", small_tokenizer)


def test_file_that_is_no_tokenizer_is_a_fault(small_tokenizer, text_folder, tmp_path):
    broken = tmp_path / "broken.model"
    for content in (b"", b"<html>404</html>", Path(small_tokenizer).read_bytes()[:1000]):
        broken.write_bytes(content)
        found = faults_of(text_folder, small_tokenizer, TOKENIZER_PATH=str(broken))
        assert any(str(broken) in fault for fault in found)


def test_less_text_than_a_window_is_a_fault(small_tokenizer, text_folder):
    shards.write_shard(text_folder / "fineweb_train_000000.bin", [BOS] * 8)
    (fault,) = faults_of(text_folder, small_tokenizer)
    assert "8 training tokens" in fault and "TRAIN_SEQ_LEN=8" in fault


def test_known_validation_texts_are_those_of_the_catalogue(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "data"))
    import catalogue
    known = {(k.targets, k.target_bytes) if k.target_bytes else k.tokens: k.label
             for v in catalogue.VARIANTS.values() for k in v.fingerprints
             if k.target_bytes or k.tokens}
    assert known == train_gpt.KNOWN_VALIDATION


@pytest.mark.parametrize("targets, total, name", [
    (40_540_802, 151_078_222, "canonical sp8192"), (40_540_802, 151_078_223, "UNKNOWN"),
    (47_853_343, 1, "UNKNOWN"), (47_853_343, 151_080_000, "canonical sp8192 CaseOps"),
    (47_853_343, 163_000_000, "UNKNOWN"), (100, 300, "UNKNOWN")])
def test_validation_is_named_by_its_bytes_in_whole_windows(targets, total, name):
    by_table = np.zeros(targets, np.uint16)
    whole = targets // 2048 * 2048
    by_table[:max(1, whole)][:total // 4] = 4
    by_table[0] += total - int(by_table[:max(1, whole)].sum())
    by_table[whole:] += 7 * (whole > 0)  # the tail does not matter
    assert train_gpt.name_validation(by_table, total) == name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None)])
@pytest.mark.parametrize("split", ["train", "val", "val_bytes"])
def test_what_is_no_regular_file_is_no_shard(text_folder, small_tokenizer, make, split):
    """A pipe would wait for its writer without end."""
    path = text_folder / f"fineweb_{split}_000009.bin"
    make(path)
    (fault,) = faults_of(text_folder, small_tokenizer)
    assert f"{path}: no regular file" in fault
