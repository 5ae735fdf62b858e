"""Packed rows: documents do not see each other, in training, in calibration and in the score.

The slow forms are in plain.py: segments counted token by token, attention under a mask over the
whole row, windows planned document by document.
"""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import signal
from collections import Counter

import numpy as np
import plain
import pytest
import shards
import torch
from conftest import read_events
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import FRONTIER, doubles, exact  # noqa: F401
from toys import (
    Rank,
    layouts_of,
    on_ranks,
    random_model,
    random_tokens,
    sizes_of,
    steady,  # noqa: F401
    toy_config,
)

import train_gpt
from train_gpt import (
    GPT,
    Batch,
    Calibration,
    Clock,
    ConfigError,
    Loader,
    Log,
    Optimizers,
    ShardSet,
    Trainer,
    TrainState,
    Validation,
    attention_math,
    attention_sdpa,
    batch_of_rows,
    by_segments,
    collect_fisher,
    collect_inputs,
    cut_documents,
    cut_rows,
    load_config,
    phases,
    plan_documents,
    plan_readings,
    plan_windows,
    read_batch,
    schedule,
    score,
    varlen_attention,
)

BOS = 1
in_float64 = pytest.mark.usefixtures("exact")


def rank_that(compiles, rank=0, world_size=1):
    """Return a pretended rank; where it compiles, shapes are those of compiled graphs."""
    runtime = Rank(rank, world_size)
    runtime.compiles = compiles
    return runtime


def masked_config(**changes):
    """Return a toy whose rows hold 21 tokens, and four rows a step."""
    rows = dict(doc_mask=True, row_tokens=21, train_batch_tokens=84, micro_batch_tokens=84,
                rope_dims=4)
    return toy_config(**{**rows, **changes})


def row_of(*sizes, seed=0, vocab_size=29, first=True):
    """Return a row of documents of these sizes and the token after it; first False: its middle."""
    tokens = np.random.default_rng(seed).integers(2, vocab_size, sum(sizes) + 1, np.uint16)
    tokens[np.cumsum([0, *sizes])] = BOS
    tokens[0] = tokens[0] if first else 2
    return tokens


# Rows of 21 tokens that begin with a document and in the middle of one, with documents of one
# token, of a segment's length and of several segments.
ROWS = np.stack([row_of(5, 1, 8, 7), row_of(3, 18, first=False, seed=1)])


@st.composite
def packed_rows(draw):
    length, rows = draw(st.integers(2, 45)), draw(st.integers(1, 3))
    one = st.lists(st.sampled_from((BOS, 2, 2, 2, 3, 4)), min_size=length, max_size=length)
    tokens = np.array([draw(one) for _ in range(rows)], np.uint16)
    return tokens, draw(st.integers(2, length))


# ---- where rows are cut ------------------------------------------------------------------------


@settings(max_examples=300)
@given(packed_rows())
def test_rows_are_cut_at_documents_and_at_every_length_inside_one(case):
    tokens, longest = case
    length, found = tokens.shape[1], cut_documents(tokens, longest, False).tolist()
    expected = [plain.segment_starts(row, longest) for row in tokens.tolist()]
    most = max(map(len, expected)) + 1
    assert found == [row + [length] * (most - len(row)) for row in expected]
    for row in found:  # a partition into segments of one to `longest` tokens, then fills
        sizes = np.diff(row)
        assert row[0] == 0 and row[-1] == length and (sizes >= 0).all() and sizes.max() <= longest
        assert (np.diff((sizes > 0).astype(int)) <= 0).all()


@settings(max_examples=60)
@given(packed_rows())
def test_a_compiled_graph_sees_the_same_starts_in_one_shape(case):
    tokens, longest = case
    found, short = (cut_documents(tokens, longest, static) for static in (True, False))
    assert found.shape == (len(tokens), 64) and (found[:, -1] == tokens.shape[1]).all()
    assert torch.equal(found[:, :short.shape[1]], short)
    assert (found[:, short.shape[1]:] == tokens.shape[1]).all()


@pytest.mark.parametrize("documents, slots", [(63, 64), (64, 128), (128, 256)])
def test_more_documents_than_usual_take_the_next_shape(documents, slots):
    found = cut_documents(np.full((2, documents), BOS), 7, True)
    assert found.shape == (2, slots) and found[0, documents - 1] == documents - 1
    assert (found[:, documents:] == documents).all(), "a fill at least"


@settings(max_examples=100)
@given(packed_rows())
def test_a_cut_knows_every_positions_segment_and_place(case):
    tokens, longest = case
    rows, length = tokens.shape
    segments = cut_documents(tokens, longest, False)
    cut = cut_rows(segments, length, longest)
    flat = cut.padded.flatten()
    assert flat[cut.back.flatten()].tolist() == list(range(rows * length))
    for row, one in enumerate(tokens):
        numbers, places = plain.segments_of(torch.from_numpy(one.astype(int)),
                                            dict(longest=longest))
        assert torch.equal(cut.places[row], places)
        assert torch.equal(cut.back[row],
                           (numbers + row * segments.shape[1]) * longest + places)
    bounds = cut.bounds.tolist()
    assert bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] == rows * length
    assert cut.bounds.dtype == torch.int32, "as FlashAttention takes them"


# ---- attention ---------------------------------------------------------------------------------


def looped_varlen(q_NHK, k_NGK, v_NGK, cu_q, cu_k, longest_q, longest_k, **options):
    """Stand in for FlashAttention's variable-length call: one segment after the other."""
    assert options == dict(causal=True) and torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
    sizes = cu_q.diff().tolist()
    assert max(sizes) <= longest_q == longest_k and sum(sizes) == len(q_NHK)
    parts = [attention_math(*(x[None, begin:begin + size] for x in (q_NHK, k_NGK, v_NGK)))[0]
             for begin, size in zip(cu_q.tolist(), sizes) if size]
    return torch.cat(parts), "log-sum-exp"


FORMS = {"sdpa": attention_sdpa, "math": by_segments(attention_math),
         "varlen": by_segments(None, varlen_attention(looped_varlen, causal=True))}


@in_float64
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
@pytest.mark.parametrize("static", (False, True))
def test_attention_within_segments_equals_a_mask_over_the_row(form, kv_heads, static):
    """In value and in all gradients; fills make segments of no length, which do nothing."""
    generator = torch.Generator().manual_seed(kv_heads)
    q, k, v, weight = (torch.randn(2, 21, heads, 6, generator=generator, dtype=torch.float64)
                       for heads in (4, kv_heads, kv_heads, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    segments = cut_documents(ROWS[:, :-1], 7, static)
    found = FORMS[form](*inputs, cut_rows(segments, 21, 7))
    rows = []
    for b in range(2):
        numbers, _ = plain.segments_of(torch.from_numpy(ROWS[b, :-1].astype(int)), dict(longest=7))
        heads = [plain.causal_attention(q[b, :, h], k[b, :, h * kv_heads // 4],
                                        v[b, :, h * kv_heads // 4], numbers) for h in range(4)]
        rows.append(torch.stack(heads, 1))
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ("sdpa", "math"))
def test_a_backend_is_tried_on_packed_rows_where_a_run_has_some(name):
    """One that forgets the cut is told by its error, and is not taken."""
    config = masked_config(attention_backend=name)
    (attend, scope), = train_gpt.attention_backends(config, Rank()).values()
    error = functools.partial(train_gpt.try_attention, name, scope=scope, runtime=Rank())
    assert error(attend, config=config) < 1e-5

    def forgetful(q, k, v, cut=None):
        return attend(q, k, v)

    assert error(forgetful, config=config) > 0.05
    assert error(forgetful, config=dataclasses.replace(config, doc_mask=False)) < 1e-5


# ---- the model on packed rows ------------------------------------------------------------------

MODELS = {
    "the frontier's 17": FRONTIER,
    "the frontier's, with value embedding": {**FRONTIER, "ve_enabled": True},
    "scalar lanes": dict(smear_gate=True, attn_gate="sparse", gate_window=5),
    "lost skips, no XSA": dict(skip_to_lanes=False, xsa_last_n=0, num_kv_heads=1),
    "no lanes": dict(parallel_start_layer=0, num_kv_heads=4, rope_dims=2, smear_gate=True),
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
depths = pytest.mark.parametrize("depth", (0, 1), ids=("plain", "looped"))


def assert_same_gradients(model, found, expected):
    for (name, p), mine, other in zip(model.named_parameters(), found, expected, strict=True):
        other = torch.zeros_like(p) if other is None else other
        mine = torch.zeros_like(p) if mine is None else mine
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9, msg=name)


def gradients_of(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


@in_float64
@models
@depths
@pytest.mark.parametrize("longest", (7, 8))
def test_losses_and_gradients_equal_the_reference_under_its_mask(changes, depth, longest):
    config = masked_config(**changes)
    model = random_model(config, dtype=torch.float64).double()
    batch = batch_of_rows(ROWS, config, Rank(), longest)
    assert batch.tokens.shape == (2, 21) and batch.longest == longest
    params = {name: p.requires_grad_() for name, p in doubles(model).items()}
    order = (config.base_order, config.recurrent_order)[depth]
    expected = plain.loss(params, batch.tokens, batch.targets, order,
                          sizes_of(config) | dict(longest=longest), config.skip_to_lanes)
    loss = model.mean_loss(batch, layouts_of(config)[depth])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert_same_gradients(model, gradients_of(loss, model.parameters()),
                          gradients_of(expected, params.values()))


@in_float64
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_attention_gives_the_models_losses_and_gradients(form):
    config = masked_config(**FRONTIER)
    found = []
    for attend in (FORMS[form], attention_sdpa):
        model = random_model(config, dtype=torch.float64, attend=attend).double()
        loss = model.mean_loss(batch_of_rows(ROWS, config, Rank(), 7), layouts_of(config)[1])
        found.append([loss, *gradients_of(loss, model.parameters())])
    (loss, *mine), (same, *others) = found
    assert loss.item() == pytest.approx(same.item(), rel=1e-11)
    assert_same_gradients(model, mine, others)


@in_float64
def test_compiled_shapes_give_the_same_losses():
    """More fills, and rotary tables and padding of the longest length, whatever this one is."""
    config = masked_config(**FRONTIER)
    model, layout = random_model(config, dtype=torch.float64), layouts_of(config)[1]
    batches = [batch_of_rows(ROWS, config, rank_that(on), 5) for on in (False, True)]
    assert [batch.longest for batch in batches] == [5, 8]
    with torch.no_grad():
        eager, compiled = (model.token_losses(batch, layout) for batch in batches)
    torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-12)


@in_float64
@pytest.mark.parametrize("longest", (9, 16, 21))
def test_compiled_rows_hold_segments_longer_than_those_of_training(longest):
    """As SGD at test time cuts them, EVAL_SEQ_LEN being above TRAIN_SEQ_LEN."""
    config = masked_config(**FRONTIER)
    model, layout = random_model(config, dtype=torch.float64), layouts_of(config)[1]
    batches = [batch_of_rows(ROWS, config, rank_that(on), longest) for on in (False, True)]
    assert [batch.longest for batch in batches] == [longest, longest]
    with torch.no_grad():
        eager, compiled = (model.token_losses(batch, layout) for batch in batches)
    torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-12)


@in_float64
@models
@depths
def test_packed_documents_are_the_documents_alone(changes, depth):
    """Losses, and the gradient: that of the sum over the documents, each a batch of its own."""
    config, sizes = masked_config(**changes), (5, 1, 8, 7)
    model = random_model(config, dtype=torch.float64).double()
    layout, row, losses = layouts_of(config)[depth], ROWS[:1], []
    packed = model.token_losses(batch_of_rows(row, config, Rank(), 8), layout)
    windows = torch.from_numpy(row.astype(np.int64))
    for begin, size in zip(np.cumsum([0, *sizes]), sizes):
        alone = Batch.of_windows(windows[:, begin:begin + size + 1])
        losses.append(model.token_losses(alone, layout))
    alone = torch.cat(losses, 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
    assert_same_gradients(model, *(gradients_of(x.sum(), model.parameters())
                                   for x in (packed, alone)))


def losses_of(model, layout, rows, config, longest=8):
    with torch.no_grad():
        return model.token_losses(batch_of_rows(rows, config, Rank(), longest), layout)


@models
@depths
def test_a_changed_document_leaves_every_other_ones_losses_bit_equal(changes, depth):
    config = masked_config(**changes)
    model, layout = random_model(config), layouts_of(config)[depth]
    before, bounds = losses_of(model, layout, ROWS, config), (0, 5, 6, 14, 21)
    for begin, end in zip(bounds, bounds[1:]):
        other = ROWS.copy()
        other[0, begin + 1:end] = (other[0, begin + 1:end] + 1) % 20 + 2
        after = losses_of(model, layout, other, config)
        same = after == before
        same[0, begin:end] = True
        assert same.all(), "the next one, those before and the other row"
        assert end - begin == 1 or not torch.equal(after, before)


@in_float64
@models
@depths
def test_a_changed_token_reaches_its_segment_from_there_on_alone(changes, depth):
    """Not even the segment that goes on with its document."""
    config = masked_config(**changes)
    model, layout = random_model(config, dtype=torch.float64), layouts_of(config)[depth]
    for row in ROWS:
        starts = [*plain.segment_starts(row[:-1].tolist(), 8), 21]
        before = losses_of(model, layout, row[None], config)[0]
        for t in range(21):
            if row[t] == BOS:
                continue
            batch = batch_of_rows(row[None], config, Rank(), 8)
            other = batch._replace(tokens=batch.tokens.clone())
            other.tokens[0, t] = 2 + (row[t] + 7) % 20
            with torch.no_grad():
                moved = (model.token_losses(other, layout)[0] - before).abs() > 1e-9
            ends = [end for end in starts if end > t]
            assert set(moved.nonzero().flatten().tolist()) == {*range(t, ends[0])}, t


# ---- reading rows ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards of documents of 1 to 30 tokens, together 13 rows of 21, no token unused."""
    folder, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(5)
    for i, size in enumerate((131, 153)):
        tokens = generator.integers(2, 29, size)
        tokens[np.cumsum(generator.integers(1, 31, 5)) - 1] = BOS
        shards.write_shard(folder / f"fineweb_train_{i:06d}.bin", tokens)
    return train_gpt.find_shards(folder, "train")


def loader_of(corpus, runtime=None, **changes):
    config = masked_config(**changes)
    return Loader(ShardSet(corpus, config.row_len), config, runtime or Rank())


def read_steps(loader, lengths):
    found = [loader.batch(step, longest) for step, longest in enumerate(lengths)]
    loader.close()
    return found


LENGTHS = [2] * 3 + [5] * 3 + [8] * 7  # changes within the first epoch: 13 steps are four


def test_every_row_comes_once_an_epoch_through_all_lengths(corpus):
    every = ShardSet(corpus, 21)
    rows = Counter(map(bytes, every.windows(np.arange(13))))
    assert every.num_windows == 13 and len(rows) == 13
    found = []
    for batch, longest in zip(read_steps(loader_of(corpus), LENGTHS), LENGTHS):
        windows = torch.cat((batch.tokens, batch.targets[:, -1:]), 1).numpy().astype(np.uint16)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        found += map(bytes, windows)
        expected = [plain.segment_starts(row.tolist(), longest) for row in windows[:, :-1]]
        cuts = [[start for start in row if start < 21] for row in batch.segments.tolist()]
        assert cuts == expected and batch.longest == longest
    for epoch in range(4):
        assert Counter(found[13 * epoch:13 * epoch + 13]) == rows


@pytest.mark.parametrize("world_size", (2, 4))
def test_ranks_read_the_rows_of_one_in_the_same_order_and_cuts(corpus, world_size):
    whole = read_steps(loader_of(corpus), LENGTHS)
    parts = [read_steps(loader_of(corpus, Rank(rank, world_size)), LENGTHS)
             for rank in range(world_size)]
    for one, *shares in zip(whole, *parts):
        assert torch.equal(torch.cat([share.tokens for share in shares]), one.tokens)
        cuts = [[s for s in row if s < 21] for share in shares for row in share.segments.tolist()]
        assert cuts == [[s for s in row if s < 21] for row in one.segments.tolist()]


def test_a_change_of_length_reads_the_step_ahead_again(corpus):
    """What was fetched in advance has the old length; the step gets the same rows all the same."""
    loader, asked_for = loader_of(corpus), []
    read = loader.read
    loader.read = lambda start, count, longest: (asked_for.append((start // 4, longest)),
                                                 read(start, count, longest))[1]
    found = read_steps(loader, [8, 8, 3, 3])
    assert asked_for[:5] == [(0, 8), (1, 8), (2, 8), (2, 3), (3, 3)]  # the next may not have begun
    fresh = [loader_of(corpus).read(4 * step, 4, longest)
             for step, longest in enumerate((8, 8, 3, 3))]
    for mine, other in zip(found, fresh):
        assert all(torch.equal(a, b) for a, b in zip((mine.tokens, mine.segments),
                                                     (other.tokens, other.segments)))


def trainer_of(config, runtime=None):
    model, runtime = random_model(config), runtime or Rank()
    state = TrainState(model, Optimizers(model, config, runtime))
    return Trainer(state, config, runtime, Log(False), Clock())


@pytest.mark.parametrize("ranks, micro_tokens", [(1, 42), (1, 21), (2, 42), (2, 21)])
def test_splits_and_ranks_change_no_gradient(corpus, ranks, micro_tokens):
    """Segments are split with their rows, though a split row keeps the batch's fills."""
    def step(tokens, runtime):
        config, gradients = masked_config(**FRONTIER, micro_batch_tokens=tokens), []
        trainer, loader = trainer_of(config, runtime), loader_of(corpus, runtime)
        optimizers = trainer.state.optimizers
        reduce = optimizers.reduce_and_clip
        optimizers.reduce_and_clip = lambda: (
            gradients.extend(p.grad.clone() for p in trainer.state.model.parameters()), reduce())[1]
        loss = trainer.update(loader.batch(0, 5), layouts_of(config)[1], schedule(config, 0, 0.0))
        loader.close()
        return loss, gradients

    loss, gradients = step(84, Rank())
    losses, shares = zip(*on_ranks(ranks, lambda runtime: step(micro_tokens, runtime)))
    torch.testing.assert_close(sum(losses) / ranks, loss)
    for one, *parts in zip(gradients, *shares, strict=True):
        tiny = 1e-5 * one.abs().max().item() + 1e-7
        torch.testing.assert_close(sum(parts) / ranks, one, rtol=1e-3, atol=tiny)


def test_without_masking_a_row_is_what_it_was(corpus):
    batch = loader_of(corpus, doc_mask=False, train_batch_tokens=64).batch(0, 8)
    assert batch.tokens.shape == (8, 8)
    assert (batch.places, batch.segments, batch.longest) == (None, None, 0)


# ---- lengths and orders ------------------------------------------------------------------------


def stages_of(config):
    return [(phase.start.frac or 0.0, phase.seq_len, len(phase.layout.steps))
            for phase in phases(config)]


def frontier(**changes):
    return load_config({"PRESET": "frontier", **{k: str(v) for k, v in changes.items()}})


def test_the_frontiers_stages():
    config = frontier()
    assert stages_of(config) == [(0, 1024, 11), (.1, 2048, 11), (.35, 2048, 17), (.7, 3072, 17)]
    assert [phase.layout for phase in phases(config)] == [
        layouts_of(config)[looped] for looped in (0, 0, 1, 1)]
    due = trainer_of(toy_like(config))  # by the share of the run, each from its very start on
    due.config, due.phases = config, phases(config)
    for share, phase in ((0, 0), (.0999, 0), (.1, 1), (.3499, 1), (.35, 2), (.6999, 2), (.7, 3),
                         (1, 3)):
        due.state.phase = 0
        assert due.due_phase(share) == phase, share


def toy_like(config):
    return masked_config(train_seq_schedule=("4@0.1", "5@0.7", "8@1"), recur_start_frac=0.35)


@pytest.mark.parametrize("start, expected", [
    (0.0, [(0, 4, 14), (.5, 8, 14)]), (0.25, [(0, 4, 11), (.25, 4, 14), (.5, 8, 14)]),
    (0.5, [(0, 4, 11), (.5, 8, 14)]), (0.75, [(0, 4, 11), (.5, 8, 11), (.75, 8, 14)])])
def test_lengths_and_orders_change_in_the_order_of_their_shares(start, expected):
    lengths = ("4@0.5", "8@1")
    assert stages_of(masked_config(train_seq_schedule=lengths, recur_start_frac=start)) == expected


def test_a_schedule_needs_no_recurrence():
    config = masked_config(train_seq_schedule=("4@0.5", "8@1"), recur_layers=())
    assert stages_of(config) == [(0, 4, 11), (.5, 8, 11)] and not train_gpt.config_faults(config)


def test_the_frontiers_rates():
    config = frontier()
    for share, multiplier in ((0, 1), (.1, 1), (.15, 1), (.35, .7647), (.9149, .1001), (.915, .1),
                              (1, .1)):
        found = schedule(config, 0, share).lr_multiplier
        assert found == pytest.approx(multiplier, abs=5e-5), share
    for since in range(40):  # the k-th step after a change of length has k/32 of the rate
        rate = schedule(config, 0, .7, since).lr_multiplier
        assert rate == pytest.approx(min(1, (since + 1) / 32) * .3 / .85)
    at_once = schedule(frontier(SEQ_CHANGE_WARMUP_STEPS=0), 0, .7, 0)
    assert at_once.lr_multiplier == pytest.approx(.3 / .85)


# ---- plans of documents ------------------------------------------------------------------------


@st.composite
def texts(draw, most=120):
    """A text, and how it is read: length, stride, windows of a forward."""
    size = draw(st.integers(2, most))
    tokens = np.array(draw(st.lists(st.sampled_from((BOS, 2, 3, 4, 5, 6, 7)), min_size=size,
                                    max_size=size)), np.uint16)
    length = draw(st.integers(2, 30))
    stride = draw(st.one_of(st.integers(1, length), st.just(length)))
    return text_of(tokens), (length, stride, draw(st.integers(1, 4)), True)


def text_of(tokens):
    sizes = np.random.default_rng(0).integers(0, 9, len(tokens) - 1, np.uint16)
    return Validation(np.asarray(tokens, np.uint16), sizes, 0, "table", len(sizes), len(sizes), "")


@settings(max_examples=200)
@given(texts())
def test_a_plan_of_documents_equals_the_reference(case):
    text, (length, stride, *_) = case
    tokens, num_targets = text.tokens.tolist(), len(text.target_bytes)
    begins = np.array(plain.segment_starts(tokens[:-1], math.inf))
    starts, firsts, ends = plan_documents(begins, num_targets, length, stride)
    found = [(start, [*range(start + first, end)]) for start, first, end
             in zip(starts.tolist(), firsts.tolist(), ends.tolist(), strict=True)]
    expected = plain.document_windows(tokens, length, stride)
    assert found == expected
    assert plain.count_scored(expected, num_targets) == [1] * num_targets
    assert (ends - starts <= length).all()


@given(st.integers(1, 200), st.integers(2, 40), st.data())
def test_one_document_is_read_like_a_text(num_targets, length, data):
    stride = data.draw(st.integers(1, length))
    starts, firsts, ends = plan_documents(np.zeros(1, np.int64), num_targets, length, stride)
    expected = plan_windows(num_targets, length, stride)
    assert (starts == expected[0]).all() and (firsts == expected[1]).all()
    assert (ends == np.minimum(starts + length, num_targets)).all()


def contexts(batch, text):
    """Return (target, start of the text it is told) of all that a batch scores, checked."""
    found, asked = [], batch.targets.shape[1]
    for b, row in enumerate(batch.places.tolist()):
        for column, place in enumerate(row):
            if place < 0:
                continue
            at = column + batch.tokens.shape[1] - asked
            starts = [0] if batch.segments is None else batch.segments[b].tolist()
            begin = max(start for start in starts if start <= at)
            told = batch.tokens[b, begin:at + 1].tolist()
            assert told == text.tokens[place - (at - begin):place + 1].tolist()
            assert batch.targets[b, column] == text.tokens[place + 1]
            found.append((place, place - (at - begin)))
    return found


@settings(max_examples=150)
@given(texts(), st.integers(1, 4), st.booleans())
def test_ranks_score_each_target_once_with_the_planned_context(case, world_size, compiles):
    """No context crosses a document's start: the reference's windows lie within documents."""
    text, windows = case
    length, stride, batch, _ = windows
    found = []
    for rank in range(world_size):
        runtime = rank_that(compiles, rank, world_size)
        for reading in plan_readings(text, windows, runtime):
            one = read_batch(text, reading, windows, runtime)
            shape = (1, batch * length) if reading.packed else (batch, length)
            fits = one.tokens.shape == shape if compiles else one.tokens.numel() <= batch * length
            assert fits and (one.longest, one.segments is None) == (
                (length, False) if reading.packed else (0, True))
            if reading.packed:
                bounds = one.segments[0].tolist()
                assert bounds[-1] == one.tokens.shape[1] and max(np.diff(bounds)) <= length
            found += contexts(one, text)
    expected = [(place, start) for start, places in plain.document_windows(
        text.tokens.tolist(), length, stride) for place in places]
    assert sorted(found) == sorted(expected)


def segment_losses(batch):
    """A toy model: a loss depends on its target and all tokens of its segment so far, in order."""
    losses = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for b, row in enumerate(batch.tokens.tolist()):
        starts, hidden = (set() if batch.segments is None else set(batch.segments[b].tolist())), 0
        for t, token in enumerate(row):
            hidden = (31 * (0 if t in starts else hidden) + token + 1) % 1009
            losses[b, t] = hidden
    return (7 * losses[:, -batch.targets.shape[1]:] + 3 * batch.targets) % 101 / 8 + 0.125


@settings(max_examples=80)
@given(texts(most=60), st.booleans())
def test_the_score_by_documents_equals_a_slow_count(case, compiles):
    text, windows = case
    nats = 0.0
    for start, places in plain.document_windows(text.tokens.tolist(), *windows[:2]):
        for place in places:
            hidden = 0
            for token in text.tokens[start:place + 1].tolist():
                hidden = (31 * hidden + token + 1) % 1009
            nats += (7 * hidden + 3 * int(text.tokens[place + 1])) % 101 / 8 + 0.125
    found = score(segment_losses, text, windows, rank_that(compiles))
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert (found.tokens, found.bytes) == (len(text.target_bytes), text.target_bytes.sum())


@pytest.mark.parametrize("world_size", (2, 3, 8))
@pytest.mark.parametrize("stride", (3, 8))
def test_ranks_score_documents_like_one(world_size, stride):
    text, windows = text_of(row_of(3, 20, 1, 8, 9, 2, 30, seed=3)), (8, stride, 2, True)
    alone = score(segment_losses, text, windows, Rank())
    for one in on_ranks(world_size, lambda rank: score(segment_losses, text, windows, rank)):
        assert one.nats == pytest.approx(alone.nats, rel=1e-12)
        assert (one.tokens, one.bytes) == (alone.tokens, alone.bytes)


SIZES = (5, 1, 8, 7, 2, 8, 3, 6, 6)  # documents, none longer than a window of 8


@models
def test_short_documents_score_as_texts_of_their_own(changes):
    """By documents, all together; by windows, each a text: stride = length, whatever the shapes."""
    config = masked_config(**changes, eval_plan="documents", eval_stride=8)
    model, layout = random_model(config), layouts_of(config)[1]
    whole, bounds = text_of(row_of(*SIZES)), np.cumsum([0, *SIZES])

    def losses(batch):
        return model.token_losses(batch, layout)

    alone = [score(losses, text_of(whole.tokens[begin:end + 1]), (8, 8, 4), Rank()).nats
             for begin, end in zip(bounds, bounds[1:])]
    for compiles in (False, True):
        for windows in (config.whole_windows, (8, 8, 1, True), (8, 8, 3, True)):
            found = score(losses, whole, windows, rank_that(compiles))
            assert found.nats == pytest.approx(sum(alone), rel=1e-5)
            assert found.tokens == sum(SIZES)
    crossing = score(losses, whole, (8, 8, 4), Rank())
    assert abs(crossing.nats - sum(alone)) > 1e-3, "another plan, another score"


@models
@pytest.mark.parametrize("stride", (1, 3))
def test_compiled_shapes_and_eager_ones_score_alike(changes, stride):
    """Also windows beyond the training length, with documents of several windows."""
    config = masked_config(**{**changes, "rope_dims": 4}, eval_seq_len=11)
    model, layout = random_model(config), layouts_of(config)[1]
    text, windows = text_of(row_of(3, 20, 1, 8, 9, 2, 13)), (11, stride, 2, True)
    eager, compiled = (score(lambda batch: model.token_losses(batch, layout), text, windows,
                             rank_that(on)) for on in (False, True))
    assert compiled.nats == pytest.approx(eager.nats, rel=1e-5) and compiled.tokens == 56


@in_float64
def test_the_score_by_documents_equals_the_reference_model():
    """Windows longer than in training: all rotate by the base of that length, short ones too."""
    config = masked_config(**FRONTIER, eval_seq_len=11)
    model, layout = random_model(config, dtype=torch.float64), layouts_of(config)[1]
    text, nats = text_of(row_of(3, 12, 1, 9)), 0.0
    sizes = sizes_of(config) | dict(longest=11)
    for start, places in plain.document_windows(text.tokens.tolist(), 11, 4):
        tokens = torch.from_numpy(text.tokens[start:places[-1] + 1].astype(np.int64))
        odds = plain.forward(doubles(model), tokens[None], layout.order, sizes)[0].log_softmax(-1)
        nats -= sum(odds[p - start, text.tokens[p + 1]].item() for p in places)
    found = score(lambda batch: model.token_losses(batch, layout), text, (11, 4, 2, True), Rank())
    assert found.nats == pytest.approx(nats, rel=1e-10)


# ---- calibration -------------------------------------------------------------------------------


@models
def test_inputs_of_a_packed_row_are_those_of_its_documents(changes):
    """The table's hidden states among them."""
    config = masked_config(**changes, step_rule="sdclip")
    model, layout = random_model(config), layouts_of(config)[1]
    wanted = Calibration(model, config, Rank()).wanted
    found = collect_inputs(model, batch_of_rows(ROWS[:1], config, Rank(), 8), layout, wanted)
    expected = Counter()
    windows = torch.from_numpy(ROWS[:1].astype(np.int64))
    for begin, size in zip((0, 5, 6, 14), (5, 1, 8, 7)):
        batch = Batch.of_windows(windows[:, begin:begin + size + 1])
        for name, value in collect_inputs(model, batch, layout, wanted).items():
            expected[name] = expected[name] + value
    assert set(found) == set(wanted) == set(expected) and "inputs.tok_emb.weight" in wanted
    for name, value in found.items():
        tiny = 1e-5 * value.abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=tiny, msg=name)


def collected(corpus, monkeypatch, limit, world_size=1, **changes):
    """Return what calibration finds on several ranks, and the sizes of its forwards."""
    monkeypatch.setattr(Calibration, "GRADIENT_TOKENS", limit)
    config, forwards = masked_config(**FRONTIER, gptq_calibration_batches=6, **changes), []

    def counted(collect):
        def collecting(model, batch, *args):
            forwards.append(tuple(batch.tokens.shape))
            assert batch.segments is not None and batch.longest == 8
            return collect(model, batch, *args)
        return collecting

    monkeypatch.setattr(train_gpt, "collect_fisher", counted(collect_fisher))
    monkeypatch.setattr(train_gpt, "collect_inputs", counted(collect_inputs))

    def work(runtime):
        loader = loader_of(corpus, runtime)
        calibration = Calibration(random_model(config), config, runtime)
        found = calibration.run(layouts_of(config)[1], loader, Clock(), Log(False))
        loader.close()
        return found

    return on_ranks(world_size, work), forwards


@pytest.mark.parametrize("rule", ("sdclip", "fisher"))
def test_long_rows_are_cut_so_that_no_backward_holds_more_than_its_limit(
        corpus, monkeypatch, rule):
    _, forwards = collected(corpus, monkeypatch, 10, step_rule=rule)
    rows = masked_config(gptq_calibration_batches=6).calibration_rows
    expected = [(1, 7)] * (3 * rows) if rule == "fisher" else [(1, 21)] * rows
    assert rows == 3 and forwards == expected, "gradients alone need the memory"


@pytest.mark.parametrize("rule", ("sdclip", "fisher"))
def test_ranks_calibrate_on_the_same_packed_rows(corpus, monkeypatch, rule):
    """With the same labels for each part of a row, whoever reads it."""
    (alone,), forwards = collected(corpus, monkeypatch, 10, step_rule=rule)
    for found in collected(corpus, monkeypatch, 10, 2, step_rule=rule)[0]:
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any(value.any() for value in alone.values()) and forwards


def test_what_is_collected_of_a_row_is_the_sum_over_its_parts(corpus, monkeypatch):
    monkeypatch.setattr(Calibration, "GRADIENT_TOKENS", 10)
    config = masked_config(**FRONTIER, step_rule="fisher")
    model, layout = random_model(config), layouts_of(config)[1]
    calibration, batch = Calibration(model, config, Rank()), loader_of(corpus).read(2, 1, 8, 3)
    found, expected = calibration.collect(layout, batch, 2), Counter()
    for i, part in enumerate(batch.split(1)):
        seed = config.seed + 6 + i  # of the labels: a part's place among all parts
        for name, value in collect_fisher(model, part, layout, calibration.wanted, seed).items():
            expected[name] = expected[name] + value
    assert set(found) == set(expected) == set(calibration.wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_parts_of_a_row_are_its_stretches_cut_again(corpus):
    """What calibration reads of a row in three parts, documents that go on starting again."""
    loader = loader_of(corpus)
    whole, parts = loader.read(2, 2, 5), loader.read(2, 2, 5, 3)
    assert torch.equal(parts.tokens.view(2, 21), whole.tokens) and parts.tokens.shape == (6, 7)
    assert torch.equal(parts.targets.view(2, 21), whole.targets)
    for row, starts in zip(parts.tokens.tolist(), parts.segments.tolist()):
        assert [s for s in starts if s < 7] == plain.segment_starts(row, 5)


# ---- settings and presets ----------------------------------------------------------------------


def faults_of(env):
    with pytest.raises(ConfigError) as caught:
        load_config({name: str(value) for name, value in env.items()})
    return str(caught.value)


SCHEDULED = dict(DOC_MASK=1, RECUR_START_FRAC=0.4, TRAIN_SEQ_SCHEDULE="1024@0.5,2048@1")


def test_a_schedule_as_told_is_accepted():
    assert load_config({name: str(value) for name, value in SCHEDULED.items()}).seq_stages == [
        (1024, 0.5), (2048, 1.0)]


@pytest.mark.parametrize("value", [
    "1024", "1024@", "@1", "x@1", "2048@x", "1024@0.5", "1024@0.5,2048@0.9", "1024@0.5,2048@0.5",
    "1024@0.6,1536@0.4,2048@1", "1024@0.5,1536@1", "1024@0.5,4096@1", "1024@0,2048@1",
    "1024@-0.5,2048@1", "1@0.5,2048@1", "0@0.5,2048@1", "-5@0.5,2048@1", "1024@nan,2048@1",
    "1024@0.5,2048@inf", "1024@0.5@0.7,2048@1", "1024.5@0.5,2048@1", "1024@0.5;2048@1"])
def test_a_malformed_schedule_is_refused_in_one_clear_line(value):
    lines = faults_of({**SCHEDULED, "TRAIN_SEQ_SCHEDULE": value}).splitlines()
    assert len([line for line in lines if "TRAIN_SEQ_SCHEDULE" in line]) == 1
    assert f"TRAIN_SEQ_SCHEDULE={value}: must be LENGTH@SHARE" in "\n".join(lines)
    assert "TRAIN_SEQ_LEN=2048" in "\n".join(lines)


@pytest.mark.parametrize("changes, told", [
    (dict(DOC_MASK=0), "TRAIN_SEQ_SCHEDULE=1024@0.5,2048@1: needs DOC_MASK=1"),
    (dict(RECUR_START_FRAC="auto"), "TRAIN_SEQ_SCHEDULE=1024@0.5,2048@1: needs RECUR_START_FRAC"),
    (dict(ROW_TOKENS=1024, TRAIN_BATCH_TOKENS=98_304), "ROW_TOKENS=1024: must be at least "
                                                       "TRAIN_SEQ_LEN=2048"),
    (dict(ROW_TOKENS=5000), "TRAIN_BATCH_TOKENS=786432: must be a multiple of ROW_TOKENS=5000"),
    (dict(MICRO_BATCH_TOKENS=4096), "MICRO_BATCH_TOKENS=4096: must be at least ROW_TOKENS=98304"),
    (dict(EVAL_MODE="stream", EVAL_PLAN="documents"), "EVAL_MODE=stream: needs EVAL_PLAN=windows"),
    (dict(EVAL_PLAN="rows"), "EVAL_PLAN=rows: must be one of windows, documents")])
def test_settings_that_do_not_go_together_are_refused_in_a_clear_line(changes, told):
    assert told in faults_of({**SCHEDULED, **changes})


@pytest.mark.parametrize("changes, refused", [
    (dict(DOC_MASK=1, ROW_TOKENS=256), True), (dict(EVAL_PLAN="documents"), True), ({}, False)])
def test_a_text_that_tells_no_documents_apart_is_refused(tiny_data, tiny_env, tmp_path, changes,
                                                         refused):
    shutil.copytree(tiny_data.shards, tmp_path / "shards")
    path = tmp_path / "shards" / "fineweb_val_000000.bin"
    tokens = shards.read_shard(path)
    shards.write_shard(path, tokens[tokens != BOS])
    env = {**tiny_env, "DATA_PATH": str(tmp_path / "shards"), **changes}
    config = load_config({name: str(value) for name, value in env.items()})
    faults = train_gpt.take_inputs(config, judged=False)[1]
    assert len(faults) == refused
    if refused:
        assert "no token 1 (BOS) in the validation text" in faults[0]
        assert "DOC_MASK=0 EVAL_PLAN=windows" in faults[0]


def test_the_preset_is_the_published_model():
    config = frontier()
    assert train_gpt.count_parameters(config) == 35_945_671
    assert {name: getattr(config, name) for name in FRONTIER} == FRONTIER
    assert [len(layout.steps) for layout in layouts_of(config)] == [11, 17]
    assert (config.row_len, config.step_rows, config.calibration_rows) == (98_304, 8, 32)
    assert config.whole_windows == (3072, 3072, 21, True) and config.packs


def test_the_preset_composes_with_one_gpu():
    config = load_config({"PRESET": "frontier,one_gpu"})
    assert stages_of(config) == [
        (0, 1024, 11), (.1, 2048, 11), (.347, 2048, 17), (.7, 3072, 17)]
    assert (config.seq_change_warmup_steps, config.ema_decay) == (4, 0.9725)
    assert train_gpt.count_parameters(config) == 35_945_671


@depths
def test_the_preset_starts_at_the_loss_of_an_even_guess(depth):
    """At a sixth of its width, on a packed row."""
    config = frontier(DEVICE="cpu", MODEL_DIM=96, ROPE_DIMS=4, VOCAB_SIZE=1024, ROW_TOKENS=384,
                      TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, TRAIN_SEQ_SCHEDULE="32@0.5,64@1",
                      TRAIN_BATCH_TOKENS=384)
    model = GPT(config)
    model.init_weights(config.seed)
    rows = random_tokens(config, 1, 385).numpy().astype(np.uint16)
    with torch.no_grad():
        loss = model.mean_loss(batch_of_rows(rows, config, Rank(), 32), layouts_of(config)[depth])
    assert loss.item() == pytest.approx(math.log(1024), abs=0.05)


# ---- whole runs --------------------------------------------------------------------------------

# Two steps each of: 16 tokens, 32, 32 looped, 64 looped.
MASKED_RUN = dict(DOC_MASK=1, ROW_TOKENS=256, TRAIN_SEQ_SCHEDULE="16@0.25,32@0.75,64@1",
                  SEQ_CHANGE_WARMUP_STEPS=4, EVAL_PLAN="documents", SMEAR_GATE=1,
                  ATTN_GATE="sparse", LANE_ROUTING="learned", MICRO_BATCH_TOKENS=512)
PRODUCTS = ("final_model.weights", "final_model.stats", "final_model.int6.ptz", "scores.json")


def products(folder):
    return {name: hashlib.sha256((folder / "runs/x" / name).read_bytes()).hexdigest()
            for name in PRODUCTS}


def train_events(folder):
    return {event["step"]: {key: event[key] for key in ("train_loss", "lr_multiplier")}
            for event in read_events(folder, "x") if event["event"] == "train"}


@pytest.fixture(scope="module")
def masked_env(small_env):
    return {**small_env, **MASKED_RUN}


@pytest.fixture(scope="module")
def masked_run(nursery, masked_env, shared):
    """The folder and the RESULT of an undisturbed run. Read-only."""
    def make(cwd):
        run = nursery.run(masked_env, cwd)
        assert run.rc == 0, run.stderr
        return cwd, json.loads(run.stdout.splitlines()[-1].removeprefix("RESULT "))
    return shared("masked_run", make)


def test_a_run_goes_through_its_lengths_and_says_how_it_scored(masked_run):
    folder, result = masked_run
    events = read_events(folder, "x")
    changes = [(event["step"], event.get("tokens", "looped")) for event in events
               if event["event"] in ("length", "recurrence")]
    assert changes == [(2, 32), (4, "looped"), (6, 64)]
    plans = [event for event in events if event["event"] == "length_plan"]
    assert [plan["tokens"] for plan in plans] == [32, 64]
    plan, = (event for event in events if event["event"] == "eval_plan")
    log = (folder / "logs/x.txt").read_text(encoding="utf-8")
    assert plan["plan"] == result["eval_plan"] == "documents" and plan["length"] == 64
    assert f"eval_plan: documents of 64 tokens at most; {plan['documents']} documents" in log
    assert all(result["verdicts"].values())


def test_rates_rise_again_after_a_change_of_length_alone(masked_run, masked_env):
    config = load_config({name: str(value) for name, value in masked_env.items()})
    rates = {step: event["lr_multiplier"] for step, event in train_events(masked_run[0]).items()}
    full = {step: schedule(config, step - 1, (step - 1) / 8).lr_multiplier for step in rates}
    found = {step: rate / full[step] for step, rate in rates.items()}
    assert found == pytest.approx({1: 1, 2: 1, 3: .25, 4: .5, 5: .75, 6: 1, 7: .25, 8: .5})


def test_the_run_scores_every_target_by_documents(masked_run):
    folder, result = masked_run
    scores = json.loads((folder / "runs/x/scores.json").read_text())
    counts = {kind: scores[kind]["tokens"] for kind in ("roundtrip", "sliding")}
    assert counts == dict.fromkeys(counts, 6010) and result["val_tokens"] == 6010
    assert scores["sliding"]["val_bpb"] < scores["roundtrip"]["val_bpb"], "more context"


def test_an_artifact_can_be_scored_by_either_plan(nursery, tiny_data, masked_run, tmp_path):
    """As it was made, and as asked for: the plan is a setting of the evaluation."""
    env = {**tiny_data.env(), "DEVICE": "cpu", "STAGE": "evaluate", "RUN_ID": "x",
           "INPUT_PATH": masked_run[0] / "runs/x"}
    for plan, changes in (("documents", {}), ("windows", dict(EVAL_PLAN="windows"))):
        cwd = tmp_path / plan
        cwd.mkdir()
        run = nursery.run({**env, **changes}, cwd)
        assert run.rc == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1].removeprefix("RESULT "))
        assert result["eval_plan"] == plan
        same = result["sliding_bpb"] == masked_run[1]["sliding_bpb"]
        assert same == (plan == "documents")


def test_a_run_stopped_in_every_stage_of_its_schedule_ends_with_the_same_bytes(
        nursery, masked_env, masked_run, tmp_path):
    env = dict(masked_env)
    for phase, (steps, length) in enumerate(((1, 16), (3, 32), (5, 32), (7, 64))):
        stop = f"at_event('train', signal_self({int(signal.SIGTERM)}), {1 if steps == 1 else 2})"
        run = nursery.run(env, tmp_path, before=stop)
        assert run.rc == 128 + signal.SIGTERM, run.stderr
        header, _ = train_gpt.read_tensors(tmp_path / "runs/x/checkpoint", "checkpoint")
        assert (header["step"], header["phase"]) == (steps, phase)
        assert header["changed"] == {16: None, 32: 2, 64: 6}[length]
        env["RESUME"] = 1
    run = nursery.run(env, tmp_path)
    assert run.rc == 0, run.stderr
    assert products(tmp_path) == products(masked_run[0])
    assert train_events(tmp_path) == train_events(masked_run[0])


def test_two_ranks_train_on_packed_rows_like_one(nursery, masked_env, masked_run, tmp_path):
    for rank in nursery.start_ranks([masked_env] * 2, tmp_path):
        run = rank.wait()
        assert run.rc == 0, run.stderr
    pair, alone = (train_events(folder) for folder in (tmp_path, masked_run[0]))
    assert pair.keys() == alone.keys()
    for step, event in alone.items():
        assert pair[step] == pytest.approx(event, rel=2e-4)
    scores = [json.loads((folder / "runs/x/scores.json").read_text())
              for folder in (tmp_path, masked_run[0])]
    assert scores[0]["sliding"]["val_bpb"] == pytest.approx(scores[1]["sliding"]["val_bpb"],
                                                            rel=2e-3)


@pytest.mark.slow
def test_a_schedule_that_returns_to_a_length_goes_on_where_it_stopped(
        nursery, masked_env, tmp_path):
    """The phase is told by its number: two of this schedule have the same length and order."""
    env = {**masked_env, "TRAIN_SEQ_SCHEDULE": "64@0.25,32@0.75,64@1", "RECUR_START_FRAC": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    assert nursery.run(env, whole).rc == 0
    stop = f"at_event('train', signal_self({int(signal.SIGTERM)}), 1)"
    assert nursery.run(env, parts, before=stop).rc == 128 + signal.SIGTERM
    assert nursery.run({**env, "RESUME": 1}, parts).rc == 0
    assert products(parts) == products(whole)
