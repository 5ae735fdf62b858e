"""Windows score each target once, seeing what they may see; sums are those of a slow count."""

import math
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    Rank,
    asked,
    layouts_of,
    on_ranks,
    random_model,
    random_tokens,
    sizes_of,
    steady,  # noqa: F401
    toy_config,
)

from train_gpt import (
    Score,
    Trainer,
    Validation,
    load_config,
    load_validation,
    plan_readings,
    plan_windows,
    read_batch,
    score,
    windowed_attention,
)


def text_of(num_targets, vocab_size=29, seed=0):
    """Return a random text without token 0, so that 0 tells padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, vocab_size, num_targets + 1, np.uint16)
    target_bytes = generator.integers(0, 9, num_targets, np.uint16)
    total = int(target_bytes.sum())
    return Validation(tokens, target_bytes, total, "table", num_targets, num_targets, "")


def numbered_text(num_targets):
    """Return a text whose tokens are their positions, from 1."""
    tokens = np.arange(1, num_targets + 2, dtype=np.uint16)
    return Validation(tokens, np.ones(num_targets, np.uint16), 0, "table", 0, 0, "")


def batches_of(text, windows, runtime):
    return [read_batch(text, reading, windows, runtime)
            for reading in plan_readings(text, windows, runtime)]


def surprise(hidden, target):
    return (7 * hidden + 3 * target) % 101 / 8 + 0.125


def prefix_losses(batch):
    """A toy model: each loss depends on the target and on every token seen before it, in order."""
    hidden, states = torch.zeros(len(batch.tokens), dtype=torch.int64), []
    for t in range(batch.tokens.shape[1]):
        hidden = (31 * hidden + batch.tokens[:, t] + 1) % 1009
        states.append(hidden)
    return surprise(torch.stack(states, 1)[:, -batch.targets.shape[1]:], batch.targets)


def slow_score(text, seq_len, stride):
    """Score token by token, re-reading the context of each."""
    nats = 0.0
    for start, positions in plain.sliding_windows(len(text.target_bytes), seq_len, stride):
        for position in positions:
            hidden = 0
            for token in text.tokens[start:position + 1]:
                hidden = (31 * hidden + int(token) + 1) % 1009
            nats += surprise(hidden, int(text.tokens[position + 1]))
    return nats


@st.composite
def plans(draw, most_targets=150):
    seq_len = draw(st.integers(2, 40))
    stride = draw(st.one_of(st.integers(1, seq_len), st.just(seq_len)))
    return draw(st.integers(1, most_targets)), seq_len, stride


# ---- windows -------------------------------------------------------------------------------


@settings(max_examples=300)
@given(plans(most_targets=400))
def test_windows_equal_the_reference(plan):
    num_targets, seq_len, stride = plan
    starts, first_scored = plan_windows(num_targets, seq_len, stride)
    found = [(start, [p for p in range(start + first, start + seq_len) if p < num_targets])
             for start, first in zip(starts.tolist(), first_scored.tolist(), strict=True)]
    assert found == plain.sliding_windows(num_targets, seq_len, stride)


@settings(max_examples=300)
@given(plans(most_targets=400))
def test_windows_score_each_target_once_in_order(plan):
    num_targets, seq_len, stride = plan
    starts, first_scored = plan_windows(num_targets, seq_len, stride)
    scored = np.concatenate([np.arange(start + first, min(start + seq_len, num_targets))
                             for start, first in zip(starts, first_scored, strict=True)])
    assert np.array_equal(scored, np.arange(num_targets))


@pytest.mark.parametrize("num_targets, expected", [
    (40_540_160, 633_409), (45_508_608, 711_041), (45_516_800, 711_169)])
def test_published_window_counts(num_targets, expected):
    starts, first_scored = plan_windows(num_targets, 2048, 64)
    assert len(starts) == len(first_scored) == expected
    assert starts[-1] + 2048 == num_targets


def test_every_target_but_the_first_window_sees_enough():
    """A target after window 0 has at least seq_len - stride tokens of context."""
    starts, first_scored = plan_windows(1000, 32, 4)
    assert first_scored[0] == 0 and (first_scored[1:] == 28).all() and (starts[1:] > 0).all()


# ---- batches and ranks ---------------------------------------------------------------------


@given(plans(), st.integers(1, 7), st.integers(1, 8))
def test_ranks_share_the_windows(plan, batch, world_size):
    """Contiguous shares, each window on one rank, as even as can be."""
    num_targets, seq_len, stride = plan
    text, found, counts = numbered_text(num_targets), [], []
    for rank in range(world_size):
        mine = []
        for tokens, *_ in batches_of(text, (seq_len, stride, batch), Rank(rank, world_size)):
            firsts = tokens[:, 0].numpy()
            mine += (firsts[firsts > 0] - 1).tolist()
            assert len(firsts) <= batch and tokens.shape[1] == seq_len
        found += mine
        counts.append(len(mine))
    assert found == plan_windows(num_targets, seq_len, stride)[0].tolist()
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("plan", ("windows", "documents"))
def test_every_rank_finds_a_forward_to_warm_up(plan):
    """However few windows a forward has: its synthetic text is cut among the ranks too."""
    config = toy_config(val_batch_tokens=64, eval_plan=plan)
    assert config.eval_batch_windows == 1
    for rank in range(4):
        some = SimpleNamespace(config=config, runtime=Rank(rank, 4))
        text = Trainer.synthetic_text(some)
        assert batches_of(text, config.whole_windows, some.runtime)


@given(plans(), st.integers(1, 7))
def test_batches_hold_tokens_their_targets_and_padding(plan, batch):
    num_targets, seq_len, stride = plan
    counted = []
    for one in batches_of(numbered_text(num_targets), (seq_len, stride, batch), Rank()):
        tokens, targets, places = (x.numpy() for x in one[:3])
        inside = tokens[:, -targets.shape[1]:] > 0
        assert np.array_equal(places, np.where(inside, targets - 2, -1))
        assert (targets[inside] == tokens[:, -targets.shape[1]:][inside] + 1).all()
        for row in tokens:
            real = row[row > 0]
            assert np.array_equal(row[:len(real)], np.arange(len(real)) + row[0])
            if len(real):
                assert real[-1] == min(row[0] + seq_len - 1, num_targets)
        counted += places[inside].tolist()
    assert sorted(counted) == list(range(num_targets))


# ---- score ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(plans(most_targets=80), st.integers(1, 9))
def test_score_equals_a_slow_count(plan, batch):
    num_targets, seq_len, stride = plan
    text = text_of(num_targets)
    found = score(prefix_losses, text, (seq_len, stride, batch), Rank())
    assert found.nats == pytest.approx(slow_score(text, seq_len, stride), rel=1e-12)
    assert (found.tokens, found.bytes) == (num_targets, text.target_bytes.sum())


@pytest.mark.parametrize("world_size", (2, 3, 8))
@pytest.mark.parametrize("num_targets", (7, 100, 131))
def test_score_is_the_same_on_any_number_of_ranks(world_size, num_targets):
    text = text_of(num_targets)
    alone = score(prefix_losses, text, (16, 5, 4), Rank())
    found = on_ranks(world_size, lambda rank: score(prefix_losses, text, (16, 5, 4), rank))
    for one in found:
        assert one == found[0]
        assert one.nats == pytest.approx(alone.nats, rel=1e-12)
        assert (one.tokens, one.bytes) == (alone.tokens, alone.bytes)


@pytest.mark.parametrize("value", (1e300, math.inf, math.nan))
@pytest.mark.parametrize("stride", (5, 16))
def test_padding_never_counts(value, stride):
    """Whatever a model answers at padded positions, the score is that of the text."""
    text = text_of(27)

    def losses_of(batch):
        losses = prefix_losses(batch).double()
        padded = batch.tokens[:, -batch.targets.shape[1]:] == 0
        return losses.masked_fill(padded, value)

    found = score(losses_of, text, (16, stride, 3), Rank())
    assert found == score(prefix_losses, text, (16, stride, 3), Rank())
    assert found.nats == pytest.approx(slow_score(text, 16, stride), rel=1e-12)


def test_score_hands_over_no_token_outside_the_window():
    """A position's inputs end at its own token; its target is given as a target alone."""
    text, seen = numbered_text(45), []

    def losses_of(batch):
        seen.append((batch.tokens.clone(), batch.targets.clone()))
        return torch.zeros(batch.targets.shape)

    score(losses_of, text, (16, 4, 1), Rank())
    starts = plan_windows(45, 16, 4)[0]
    assert len(seen) == len(starts)
    for start, (tokens, targets) in zip(starts, seen, strict=True):
        expected = [t if t <= 45 else 0 for t in range(start + 1, start + 17)]
        assert tokens.tolist() == [expected]
        for t, target in zip(expected[-targets.shape[1]:], targets[0].tolist(), strict=True):
            assert t == 0 or target == t + 1


def test_score_of_a_model_equals_the_reference():
    config = toy_config()
    model, text, layout = random_model(config), text_of(29), layouts_of(config)[1]
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    nats = 0.0
    for start, positions in plain.sliding_windows(29, 8, 2):
        tokens = torch.from_numpy(text.tokens[start:positions[-1] + 1].astype(np.int64))
        logits = plain.forward(params, tokens[None], layout.order, sizes_of(config))[0]
        odds = logits.log_softmax(-1)
        nats -= sum(odds[p - start, text.tokens[p + 1]].item() for p in positions)
    found = score(lambda batch: model.token_losses(batch, layout), text, (8, 2, 3), Rank())
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_progress_reaches_the_end():
    calls = []
    score(prefix_losses, text_of(50), (8, 2, 4), Rank(), lambda *x: calls.append(x[:2]))
    done, total = zip(*calls, strict=True)
    assert list(done) == sorted(done) and set(total) == {7} and done[-1] == 7


# ---- the number ----------------------------------------------------------------------------


def test_a_score_is_nats_a_token_and_bits_a_byte():
    total = Score(12.0, 5, 12)
    assert total.loss == pytest.approx(2.4)
    assert total.bpb == pytest.approx(12 / math.log(2) / 12)


def test_one_bit_a_byte_scores_one():
    assert Score(100 * math.log(2), 30, 100).bpb == pytest.approx(1.0)


# ---- which targets are scored --------------------------------------------------------------


@pytest.mark.parametrize("seq_len", (64, 48, 7, 6010))
def test_the_legacy_count_drops_exactly_the_tail(tiny_env, seq_len):
    env = tiny_env | {"EVAL_SEQ_LEN": str(seq_len), "EVAL_STRIDE": "1"}
    whole = load_validation(load_config(env))
    legacy = load_validation(load_config(env | {"SCORE_TAIL": "0"}))
    everything = len(whole.target_bytes)
    assert whole.all_targets == legacy.all_targets == everything == len(whole.tokens) - 1
    kept = everything - everything % seq_len
    assert len(legacy.target_bytes) == legacy.legacy_targets == whole.legacy_targets == kept
    assert np.array_equal(legacy.tokens, whole.tokens[:kept + 1])
    assert np.array_equal(legacy.target_bytes, whole.target_bytes[:kept])


# ---- streaming: long stretches with windowed attention ---------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.sampled_from((1, 2, 4)))
def test_windowed_attention_equals_plain_attention_under_its_mask(batch, length, window, groups):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, length, 4, 6, generator=generator)
    k, v = (torch.randn(batch, length, groups, 6, generator=generator) for _ in range(2))
    found = windowed_attention(window)(q, k, v)
    spread = [x.repeat_interleave(4 // groups, dim=2) for x in (k, v)]
    scores = torch.einsum("bihk,bjhk->bhij", q, spread[0]) / 6 ** 0.5
    i, j = torch.arange(length)[:, None], torch.arange(length)
    scores = scores.masked_fill(~((j <= i) & (j > i - window)), -math.inf)
    expected = torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), spread[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    last = slice(length // 2, None)
    alone = windowed_attention(window)(q[:, last], k, v)
    torch.testing.assert_close(alone, expected[:, last], rtol=1e-4, atol=1e-5)


def stream_model(config, windows=4):
    return random_model(config, attend=windowed_attention(config.eval_seq_len),
                        train_len=windows * config.eval_seq_len)


def test_streaming_is_causal_and_sees_the_window_alone():
    """In each layer: what one layer forgets, the next may still know of."""
    config = toy_config(num_layers=2, recur_layers=(), ve_layers=(1,), parallel_start_layer=0)
    model, tokens = stream_model(config), random_tokens(config, 1, 32)
    layout = layouts_of(config)[0]
    logits = model.logits(asked(tokens), layout)
    for changed in (0, 9, 20):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        differs = (model.logits(asked(other), layout) != logits).any(-1)[0].nonzero().flatten()
        assert differs.min() == changed
        assert differs.max() <= changed + config.num_layers * (config.eval_seq_len - 1)


def test_streaming_within_one_window_is_the_exact_score():
    config = toy_config()
    layout, text = layouts_of(config)[1], text_of(8)
    exact, stream = random_model(config), stream_model(config)
    found = [score(lambda batch, m=m: m.token_losses(batch, layout), text, plan, Rank()).nats
             for m, plan in ((exact, (8, 8, 1)), (stream, (32, 24, 1)))]
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_stretches_overlap_by_a_window_and_score_each_target_once():
    config = toy_config(eval_mode="stream", stream_windows=3)
    length, distance, batch, _ = config.stream_plan
    assert (length, distance) == (24, 16) and batch >= 1
    starts, first_scored = plan_windows(100, length, distance)
    assert (first_scored[1:] == config.eval_seq_len).all() and (np.diff(starts) == 16).all()
