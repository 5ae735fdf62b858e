"""Laws of test-time training: each score before the step that learns from it, and the right step.

What is learned from is watched from outside: scores where they are added up, steps where the
optimizer makes them, and by perturbing the text.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import signal
from typing import NamedTuple

import numpy as np
import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    Rank,
    layouts_of,
    on_ranks,
    random_model,
    sizes_of,
    steady,  # noqa: F401
    toy_config,
)

import records
import train_gpt
from train_gpt import (
    Adaptation,
    ConfigError,
    Documents,
    Journal,
    Log,
    Pace,
    Validation,
    Windows,
    adopt,
    artifact_config,
    config_faults,
    deal,
    load_config,
    notices,
    score,
)

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)

BOS = 1
PLACES = ("q", "k", "v", "o", "mlp", "head")
# Every part of the model, in four layers; documents of 1 … 21 targets in windows of 8.
TOY = dict(num_layers=4, recur_layers=(1, 2), ve_layers=(2,), parallel_start_layer=2, xsa_last_n=3,
           attn_gate="sparse", gate_window=5, smear_gate=True, lane_routing="learned",
           skip_rows="orders", eval_plan="documents", ttt="lora", ttt_places=PLACES, ttt_rank=3,
           ttt_alpha=6.0, ttt_lr=0.03, ttt_chunks=("5:1", "12:2", "4"), ttt_batch_docs=3,
           ttt_max_seconds=0.0, rope_dims=4)  # which may turn slower in longer windows
SGD = dict(ttt="sgd", ttt_lr=0.1, ttt_chunk_tokens=20, ttt_batch_seqs=2, ttt_epochs=2,
           ttt_grad_clip=0.5)
SIZES = (7, 1, 21, 3, 12, 16, 2, 9, 5, 13)


def toy(**changes):
    return toy_config(**TOY | changes)


def text_of(sizes, vocab_size=29, seed=0):
    """Return a text of documents with so many targets each; token 1 begins them and nothing else.

    A document's last target is the next one's first token.
    """
    generator = np.random.default_rng(seed)
    count = sum(sizes)
    tokens = generator.integers(2, vocab_size, count + 1)
    tokens[np.cumsum([0, *sizes[:-1]])] = BOS
    return Validation(tokens.astype(np.uint16), generator.integers(0, 9, count, np.uint16), 0,
                      "table", count, count, "")


def begins_of(sizes):
    return np.cumsum([0, *sizes[:-1]])


def owners(sizes):
    """Return the document of each target."""
    return np.repeat(np.arange(len(sizes)), sizes)


def adaptation(config, text, runtime=None, model=None):
    model = model or random_model(config)
    return Adaptation(model, layouts_of(config)[1], text, config, runtime or Rank())


def silence(*_):
    pass


def score_of(config, text, runtime=None, model=None, journal=None):
    """Return the Score of a text by the way of `config.ttt`."""
    made = adaptation(config, text, runtime, model)
    if config.ttt == "sgd":
        return made.by_stream(silence)
    with contextlib.redirect_stdout(io.StringIO()):
        return made.by_document(Log(False), {} if journal is None else journal)


class Watch:
    """What happens, in order: ("score", {place: nats}), ("step", {place: weight in its loss})."""

    def __init__(self, monkeypatch):
        self.happened, self.made, self.backward = [], [], []
        add_up = train_gpt.add_up

        def watched_add_up(scored, target_bytes):
            self.happened.append(("score", self.by_place(scored)))
            return add_up(scored, target_bytes)

        monkeypatch.setattr(train_gpt, "add_up", watched_add_up)
        # no synthetic tokens among what happens
        monkeypatch.setattr(Adaptation, "tokens_per_second", lambda made: 1.0)
        monkeypatch.setattr(train_gpt.GPT, "token_losses", self.watched(train_gpt.GPT.token_losses))
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            monkeypatch.setattr(train_gpt.torch.optim, kind.__name__, self.stepping(kind))

    def watched(self, token_losses):
        def wrapped(model, batch, layout):
            losses = token_losses(model, batch, layout)
            if losses.requires_grad:
                losses.retain_grad()
                self.backward.append((batch, losses))
            return losses
        return wrapped

    def stepping(watch, kind):  # noqa: N805
        class Stepping(kind):
            def __init__(self, params, *args):
                params = [*params]
                watch.made.append([p.detach().clone() for p in params])
                super().__init__(params, *args)

            def step(self):
                learned = {}
                for batch, losses in watch.backward:
                    places = batch.targets if batch.places is None else batch.places
                    for place, weight in zip(places.flatten().tolist(),
                                             losses.grad.flatten().tolist()):
                        if weight or place < 0:
                            learned[place] = learned.get(place, 0.0) + weight
                watch.backward.clear()
                watch.happened.append(("step", learned))
                super().step()
        return Stepping

    @staticmethod
    def by_place(scored):
        pairs = [pair for losses, places in scored
                 for pair in zip(places.flatten().tolist(), losses.flatten().tolist())]
        found = {place: nats for place, nats in pairs if place >= 0}
        assert len(found) == sum(place >= 0 for place, _ in pairs), "a target twice in one forward"
        return found

    def scores(self):
        """Return the scores of each forward, in order, and forget what happened."""
        found = [scores for kind, scores in self.happened if kind == "score"]
        self.happened.clear()
        self.made.clear()
        return found


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def joined(scores):
    """Return {place: nats} of all forwards; each target is in one of them."""
    found = {}
    for some in scores:
        assert not found.keys() & some.keys()
        found.update(some)
    return found


# ---- 1 what adapters change, and what they do not ------------------------------------------------


def full_batch(made, sizes, length=8):
    """Return a Batch that asks for the last targets of some documents, in ragged windows."""
    sizes = np.array(sizes)
    ends = np.minimum(sizes, length + 3)
    return made.read(begins_of(SIZES)[:len(sizes)], np.maximum(0, ends - 4), ends)


@pytest.mark.parametrize("gates", [{}, dict(attn_gate="none", smear_gate=False, ve_enabled=False,
                                            lane_routing="scalar", parallel_start_layer=0)])
@pytest.mark.parametrize("which", [0, 1])
def test_adapters_that_begin_change_no_bit(gates, which):
    config = toy(**gates)
    layout, model = layouts_of(config)[which], random_model(config)
    made = dataclasses.replace(adaptation(config, text_of(SIZES), model=model), layout=layout)
    plain_batch = full_batch(made, SIZES[:5])
    adapters = made.new_adapters(5)
    adapted = plain_batch._replace(adapters=adapters)
    for forward in (model.logits, model.token_losses):
        assert torch.equal(forward(adapted, layout), forward(plain_batch, layout))
    assert set(adapters.places) == set(PLACES)
    for place, (inner, outer) in adapters.places.items():
        assert not outer.any() and inner.abs().max() <= config.model_dim ** -0.5
        assert inner.std() > 0.4 * config.model_dim ** -0.5  # of U(-b, b): 0.577 b
        assert len(inner) == (1 if place == "head" else len(layout.order))
        assert all(torch.equal(inner[:, i], inner[:, 0]) for i in range(5))


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_of_every_place_and_step_changes_its_row_alone(place):
    config = toy(ttt_places=(place,))
    made = adaptation(config, text_of(SIZES))
    batch = full_batch(made, SIZES[:5])
    before = made.model.token_losses(batch, made.layout)
    for at in range(1 if place == "head" else len(made.layout.steps)):
        adapters = made.new_adapters(5)
        with torch.no_grad():
            adapters.places[place][1][at, 2] = 0.3
        after = made.model.token_losses(batch._replace(adapters=adapters), made.layout)
        differs = (after != before).any(1)
        assert differs.tolist() == [False, False, True, False, False]


def whole_documents(chunk):
    """Return sizes whose last chunk is a whole one where the window has begun to move."""
    return [7, 1, 8 + 2 * chunk, 8, 3, 8 + chunk, 5, 8 + 4 * chunk]


@pytest.mark.parametrize("chunk", (2, 4, 8))
def test_a_rate_of_nought_is_document_aligned_scoring(chunk):
    """Stride = chunk; a last chunk that is short sees more than the last window would."""
    # packed windows that begin inside a document have a token before them, alone they have none
    config = toy(ttt_lr=0.0, ttt_chunks=(str(chunk),), smear_gate=chunk < 8)
    text = text_of(whole_documents(chunk))
    model = random_model(config)
    found = score_of(config, text, model=model)
    layout = layouts_of(config)[1]
    expected = score(lambda batch: model.token_losses(batch, layout), text,
                     Windows(8, chunk, 4, True), Rank())
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
    learned = score_of(dataclasses.replace(config, ttt_lr=0.03), text)
    assert chunk == 8 or abs(learned.nats - found.nats) > 1e-3 * found.nats


def test_a_chunk_is_read_in_the_last_tokens_up_to_its_end(watch):
    config, text = toy(ttt_lr=0.0), text_of(SIZES)
    model = random_model(config)
    score_of(config, text, model=model)
    found, params = joined(watch.scores()), slow_params(model)
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    for begin, size in zip(begins_of(SIZES).tolist(), SIZES):
        nats, _, _ = plain.adapt_to_document(
            params, tokens[begin:begin + size + 1], layouts_of(config)[1].order, sizes_of(config),
            {"head": [torch.zeros(1, 3, 16).double(), torch.zeros(1, 29, 3).double()]}, 1.0,
            chunk_of(size), 8, 0.0, (0.0, 0.99), 1e-10, 0.0)
        assert [found[begin + i] for i in range(size)] == pytest.approx(nats, rel=1e-4)


def chunk_of(size):
    """Return what TTT_CHUNKS of these tests means, for a document of its own length."""
    return 1 if size <= 5 else 2 if size <= 12 else 4


def slow_params(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


# ---- 2 gradients and steps -----------------------------------------------------------------------


def random_adapters(made, count, seed=1):
    """Return adapters whose halves are all random, another set for each row."""
    adapters, generator = made.new_adapters(count), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapters.places.values():
            for half in pair:
                half.copy_(0.2 * torch.randn(half.shape, generator=generator))
    return adapters


def row_of(adapters, row):
    """Return one document's halves as plain.py takes them."""
    return {place: [half[:, row].detach().double().clone() for half in pair]
            for place, pair in adapters.places.items()}


class Steps(torch.optim.AdamW):
    """AdamW that keeps what it was given and what it made, at each step: the halves in order."""

    kept = []

    def step(self):
        halves = self.param_groups[0]["params"]
        before = [half.detach().clone() for half in halves]
        grads = [half.grad.clone() for half in halves]
        super().step()
        self.kept.append((before, grads, [half.detach().clone() for half in halves]))


@pytest.mark.parametrize("routing", ("learned", "scalar"))
@pytest.mark.parametrize("which", (0, 1))
def test_gradients_and_steps_equal_merged_dense_matrices(routing, which, monkeypatch):
    """Every place of every virtual step, of documents side by side; their scores as well."""
    config = toy(lane_routing=routing, ttt_beta1=0.6, ttt_wd=0.5, ttt_lr=0.02)
    sizes, text, rule = (11, 6, 14), text_of((11, 6, 14)), dict(eps=1e-10, weight_decay=0.5)
    made = dataclasses.replace(adaptation(config, text), layout=layouts_of(config)[which])
    adapters = random_adapters(made, 3)
    starts = [row_of(adapters, row) for row in range(3)]
    monkeypatch.setattr(torch.optim, "AdamW", Steps)
    monkeypatch.setattr(Steps, "kept", [])
    documents = Documents(begins_of(sizes), np.array(sizes))
    nats = made.adapt(documents, adapters, Pace(0))[0]
    tokens, expected = torch.from_numpy(text.tokens.astype(np.int64)), 0.0
    for row, (begin, size) in enumerate(zip(begins_of(sizes), sizes)):
        found, grads, _ = plain.adapt_to_document(
            slow_params(made.model), tokens[begin:begin + size + 1], made.layout.order,
            sizes_of(config), starts[row], 2.0, chunk_of(size), 8, 0.02, (0.6, 0.99), **rule)
        expected += sum(found)
        assert len(grads) == -(-size // chunk_of(size)) - 1
        for place, pair in zip(adapters.places, zip(*[iter(Steps.kept[0][1])] * 2)):
            for found_half, slow_half in zip(pair, grads[0][place]):
                for at in range(len(slow_half)):  # of each virtual step
                    spread = slow_half[at].abs().max()
                    assert spread > 1e-5, (place, at)
                    torch.testing.assert_close(found_half[at, row].double(), slow_half[at],
                                               rtol=1e-3, atol=1e-4 * spread.item())
    assert nats == pytest.approx(expected, rel=2e-4)
    moments = [(torch.zeros_like(half).double(),) * 2 for half in Steps.kept[0][0]]
    for number, (before, grads, after) in enumerate(Steps.kept, 1):
        stepped = [plain.adamw_step(w.double(), g.double(), *moment, number, 0.02, (0.6, 0.99),
                                    **rule) for w, g, moment in zip(before, grads, moments)]
        moments = [(first, second) for _, first, second in stepped]
        for made_here, (slow, _, _) in zip(after, stepped):
            torch.testing.assert_close(made_here.double(), slow, rtol=1e-5, atol=1e-6)


def test_scores_while_learning_equal_the_slow_form(watch):
    """From adapters as they begin; TTT_ALPHA / TTT_RANK, the last step of AdamW and all."""
    # of a first token alone q and k have rounding for a gradient, which AdamW makes a step
    config, text = toy(ttt_lr=0.01, ttt_chunks=("12:2", "4")), text_of(SIZES)
    made = adaptation(config, text)
    found_nats = score_of(config, text, model=made.model).nats
    found, start = joined(watch.scores()), row_of(made.new_adapters(1), 0)
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    moved = 0.0
    for begin, size in zip(begins_of(SIZES).tolist(), SIZES):
        def slow(rate, begin=begin, size=size):
            return np.array(plain.adapt_to_document(
                slow_params(made.model), tokens[begin:begin + size + 1], made.layout.order,
                sizes_of(config), start, 2.0, max(2, chunk_of(size)), 8, rate, (0.0, 0.99), 1e-10,
                0.5)[0])
        nats = slow(0.01)
        assert [found[begin + i] for i in range(size)] == pytest.approx(nats, abs=0.01, rel=0.01)
        moved += np.abs(nats - slow(0.0)).sum()
    assert sum(found.values()) == pytest.approx(found_nats, rel=1e-7)
    assert moved > 0.1 * found_nats / len(SIZES), "adapting matters here"


# ---- 3 causality ---------------------------------------------------------------------------------


def changed(text, at):
    tokens = text.tokens.copy()
    tokens[at] = 2 + (tokens[at] - 1) % 27
    assert tokens[at] != text.tokens[at] and tokens[at] != BOS
    return dataclasses.replace(text, tokens=tokens)


WAYS = {"lora": {}, "warm": dict(ttt_warm_a=True), "sgd": SGD,
        "sgd over documents' middles": dict(SGD, eval_plan="windows", eval_stride=3),
        "sgd, every token a window": dict(SGD, eval_stride=1, ttt_chunk_tokens=16)}


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_token_leaves_every_earlier_score_as_it_was(way, watch):
    """In the order of evaluation; of other documents all, where they are independent."""
    config, text, owner = toy(**WAYS[way]), text_of(SIZES), owners(SIZES)

    def scores(text):
        score_of(config, text)
        return watch.scores()

    before, reached, beyond = scores(text), 0, 0
    by_place = joined(before)
    stream = config.ttt == "sgd"
    for at in (i for i in range(2, len(text.tokens), 13) if text.tokens[i] != BOS):
        after = scores(changed(text, at))
        assert [*map(len, after)] == [*map(len, before)]
        target = at - 1  # what token `at` is the target of
        turn = next(i for i, some in enumerate(before) if target in some)
        assert before[:turn] == after[:turn], "scored before the token was in any forward's targets"
        differing = {p for p, nats in joined(after).items() if nats != by_place[p]}
        assert target in differing
        if stream:
            assert min(differing) >= target
        assert {p for p in before[turn] if p in differing} <= {
            p for p in before[turn] if p >= target and (stream or owner[p] == owner[target])}
        if way == "lora":
            assert {owner[p] for p in differing} == {owner[target]}
        assert all(p >= target for p in differing if owner[p] == owner[target])
        reached += any(p > target + 8 for p in differing if owner[p] == owner[target])
        beyond += any(owner[p] != owner[target] for p in differing)
    assert reached, "what is learned reaches beyond the window"
    assert bool(beyond) == (way != "lora"), "documents depend on each other, or not at all"


@pytest.mark.parametrize("way", WAYS)
def test_a_target_is_in_the_sum_before_any_step_sees_it(way, watch):
    """Which targets a step learned from is told by the gradient at their losses."""
    sizes = [2 * size for size in SIZES] if WAYS[way].get("ttt") == "sgd" else SIZES
    vocab_size = sum(sizes) + 3
    config, text = toy(**WAYS[way], vocab_size=vocab_size), text_of(sizes, vocab_size)
    if config.ttt == "sgd":  # tokens that tell their places
        numbers = np.arange(len(text.tokens)) + 1
        keep = text.tokens == BOS if config.by_documents else np.zeros(len(numbers), bool)
        text = dataclasses.replace(text, tokens=np.where(keep, BOS, numbers + 1).astype(np.uint16))
        place_of = dict(zip(text.tokens[1:].tolist(), range(len(text.tokens) - 1)))
        place_of[BOS] = 0  # several places; told by none
    score_of(config, text)
    scored, learned, steps, last = set(), set(), 0, {}
    for kind, found in watch.happened:
        if kind == "score":
            assert not scored & found.keys()
            scored |= found.keys()
            last = found
        elif config.ttt == "sgd":
            places = {place_of[token] for token in found if token != BOS}
            assert places <= scored and places
            chunk = max(places) // config.ttt_chunk_tokens
            assert chunk == min(places) // config.ttt_chunk_tokens
            assert scored >= set(range((chunk + 1) * config.ttt_chunk_tokens))
            assert sum(found.values()) == pytest.approx(1.0)
            learned, steps = learned | places, steps + 1
        else:
            assert {p for p in found if p >= 0} <= last.keys() <= scored
            assert found.get(-1, 0.0) == 0.0
            weights, owner = {}, owners(sizes)
            for place, weight in found.items():
                if place >= 0:
                    weights.setdefault(owner[place], []).append(weight)
            for document, each in weights.items():
                size = sum(owner[p] == document for p in last)
                assert each == pytest.approx([1 / size] * size), "the mean of its chunk"
            learned, steps = learned | {p for p in found if p >= 0}, steps + 1
    assert scored == set(range(sum(sizes))) and steps
    if config.ttt == "sgd":
        chunk, total = config.ttt_chunk_tokens, sum(sizes)
        whole = {p for p in range(total) if p // chunk < (total - 1) // chunk
                 and p % chunk < chunk // 8 * 8}
        named = {place_of[t] for t in text.tokens[1:].tolist() if t != BOS}
        assert learned == whole & named
        rows = sum(-(-(chunk // 8) // 2) for _ in range((total - 1) // chunk))
        assert steps == 2 * rows
    else:
        last_chunks = {p for begin, size in zip(begins_of(sizes), sizes)
                       for p in range(begin + (size - 1) // chunk_of(size) * chunk_of(size),
                                      begin + size)}
        assert learned == set(range(sum(sizes))) - last_chunks


class Mock(torch.nn.Module):
    """A model in name: a loss is a hash of its row up to the position, plus what was learned."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.blocks = torch.nn.ModuleList()

    def token_losses(self, batch, layout):
        hidden, states = torch.zeros(len(batch.tokens), dtype=torch.int64), []
        for t in range(batch.tokens.shape[1]):
            hidden = (31 * hidden + batch.tokens[:, t] + 1) % 1009
            states.append(hidden)
        states = torch.stack(states, 1)
        if batch.asked is not None:
            states = states.gather(1, batch.asked)
        fixed = surprise(states[:, -batch.targets.shape[1]:], batch.targets)
        learned = self.weight
        if batch.adapters is not None:
            learned = sum(outer.sum((0, 2, 3)) for _, outer in batch.adapters.places.values())
            learned = learned[:, None]
        return fixed + learned

    def mean_loss(self, batch, layout):
        return self.token_losses(batch, layout).mean()


def surprise(hidden, target):
    return (7 * hidden + 3 * target) % 101 / 8 + 0.125


def slow_hash_score(text, sizes, chunk_for, length):
    """Score target by target, each chunk in its window."""
    nats = 0.0
    for begin, size in zip(begins_of(sizes).tolist(), sizes):
        for target in range(size):
            chunk = chunk_for(size)
            end, hidden = min((target // chunk + 1) * chunk, size), 0
            for token in text.tokens[begin + max(0, end - length):begin + target + 1].tolist():
                hidden = (31 * hidden + token + 1) % 1009
            nats += surprise(hidden, int(text.tokens[begin + target + 1]))
    return nats


@st.composite
def cases(draw):
    """Return sizes of documents, EVAL_SEQ_LEN, a chunk rule as pairs, documents at once."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    limits = sorted(draw(st.sets(st.integers(1, 25), max_size=2)))
    rule = [(limit, draw(st.integers(1, 12))) for limit in [*limits, math.inf]]
    return sizes, draw(st.integers(2, 12)), rule, draw(st.integers(1, 5))


def rule_text(rule):
    return tuple(f"{limit}:{chunk}" if limit < math.inf else str(chunk) for limit, chunk in rule)


@settings(max_examples=50)
@given(cases(), st.sampled_from((0.0, 0.1)), st.booleans())
def test_each_target_is_scored_once_in_its_window(case, rate, warm):
    sizes, length, rule, at_once = case
    config = toy(eval_seq_len=length, ttt_chunks=rule_text(rule), ttt_batch_docs=at_once,
                 ttt_lr=rate, ttt_places=("k",), ttt_warm_a=warm and rate == 0)
    text, scored = text_of(sizes), []
    made = adaptation(config, text, model=Mock())
    units = made.plan()
    for unit in units:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt, "add_up", lambda pairs, sizes, add_up=train_gpt.add_up: (
                scored.extend(p for _, places in pairs for p in places.flatten().tolist()),
                add_up(pairs, sizes))[1])
            made.adapt(unit, made.new_adapters(len(unit.sizes)), Pace(0))
    assert sorted(p for p in scored if p >= 0) == list(range(sum(sizes)))
    longest_first = [size for unit in units for size in unit.sizes.tolist()]
    assert longest_first == sorted(sizes, reverse=True)
    assert {len(unit.sizes) for unit in units[:-1]} <= {at_once}
    found = score_of(config, text, model=Mock())
    assert (found.tokens, found.bytes) == (sum(sizes), int(text.target_bytes.sum()))

    def chunk_for(size):
        return min(length, next(chunk for limit, chunk in rule if size <= limit))

    expected = slow_hash_score(text, sizes, chunk_for, length)
    steps = any(size > chunk_for(size) for size in sizes)
    if rate and steps:
        assert found.nats < expected, "each mock step lowers what follows"
    else:
        assert found.nats == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 9), st.data())
def test_each_target_is_scored_once_by_the_stream(sizes, length, data):
    stride, chunk = data.draw(st.integers(1, length)), data.draw(st.integers(1, 40))
    plan = data.draw(st.sampled_from(("windows", "documents")))
    config = toy(**SGD | dict(eval_seq_len=length, eval_stride=stride, ttt_chunk_tokens=chunk,
                              eval_plan=plan))
    text, scored = text_of(sizes), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "add_up", lambda pairs, sizes, add_up=train_gpt.add_up: (
            scored.extend(p for _, places in pairs for p in places.flatten().tolist()),
            add_up(pairs, sizes))[1])
        found = score_of(config, text, model=Mock())
    assert sorted(p for p in scored if p >= 0) == list(range(sum(sizes)))
    assert (found.tokens, found.bytes) == (sum(sizes), int(text.target_bytes.sum()))


# ---- 4 ranks and batches -------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("way", ("lora", "sgd", "sgd over documents' middles"))
def test_ranks_score_alike(way, world_size):
    config, text = toy(**WAYS[way]), text_of(SIZES)
    alone = score_of(config, text)
    found = on_ranks(world_size, lambda rank: score_of(config, text, rank))
    assert all(one == found[0] for one in found)
    assert (found[0].tokens, found[0].bytes) == (alone.tokens, alone.bytes)
    still = score_of(dataclasses.replace(config, ttt_lr=0.0), text)
    assert abs(alone.nats - still.nats) > 3e-4 * still.nats
    assert found[0].nats == pytest.approx(alone.nats, rel=1e-5)


def test_documents_side_by_side_are_scored_as_alone(watch):
    """Also: the same document twice, in two batches and in one, has the same scores."""
    sizes = (*SIZES, 12)
    text = text_of(sizes)
    tokens, begins = text.tokens.copy(), begins_of(sizes)
    tokens[begins[-1]:begins[-1] + 12] = tokens[begins[4]:begins[4] + 12]
    tokens[-1] = tokens[begins[5]]  # the last target of both
    text = dataclasses.replace(text, tokens=tokens)
    found = []
    for at_once in (1, 2, 3, 11):  # chunks as in test_scores_while_learning_equal_the_slow_form
        score_of(toy(ttt_batch_docs=at_once, ttt_lr=0.01, ttt_chunks=("12:2", "4")), text)
        found.append(joined(watch.scores()))
        one, two = ([found[-1][begins[i] + j] for j in range(12)] for i in (4, 10))
        assert one == (two if at_once == 1 else pytest.approx(two, abs=1e-3))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-3)


def test_every_batch_begins_anew(watch):
    config, text = toy(), text_of(SIZES)
    score_of(config, text)
    assert len(watch.made) == math.ceil(len(SIZES) / 3)
    for halves in watch.made:
        for i, half in enumerate(halves):
            if i % 2:  # an outer one
                assert not half.any()
            else:
                assert all(torch.equal(row, watch.made[0][i][:, 0]) for row in half.unbind(1))


def test_warm_inner_halves_go_on_and_outer_ones_begin_anew(watch):
    score_of(toy(ttt_warm_a=True), text_of(SIZES))
    first, *others = watch.made
    for halves in others:
        assert all(not outer.any() for outer in halves[1::2])
        assert all(not torch.equal(inner, before[:, :inner.shape[1]])
                   for inner, before in zip(halves[::2], first[::2]))
        first = halves


def test_documents_side_by_side_are_scored_as_alone_beyond_the_training_length(watch):
    config = dict(eval_seq_len=16, train_seq_len=8, ttt_lr=0.0, ttt_chunks=("4",))
    found = []
    for at_once in (1, 3):
        score_of(toy(**config, ttt_batch_docs=at_once), text_of(SIZES))
        found.append(joined(watch.scores()))
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_warm_inner_halves_go_on_in_batches_of_any_cost():
    """A short document may cost more than a longer one: its chunks are shorter."""
    config = toy(ttt_warm_a=True, ttt_chunks=("6:1", "8"), ttt_batch_docs=3)
    assert score_of(config, text_of((8, 8, 8, 6, 6))).tokens == 36


def test_windows_inside_documents_are_scored_alike_in_any_batch():
    config, text = toy(), text_of((21, 30, 12))
    model, layout = random_model(config), layouts_of(config)[1]
    found = [score(lambda batch: model.token_losses(batch, layout), text,
                   Windows(8, 8, batch, True), Rank()).nats for batch in (1, 2, 5)]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


# ---- 5 SGD ---------------------------------------------------------------------------------------


SGD_CASES = {
    "published": {}, "documents": dict(eval_plan="documents"),
    "frozen": dict(ttt_freeze_blocks=2), "no clip": dict(ttt_grad_clip=0.0),
    "all frozen": dict(ttt_freeze_blocks=4), "whole windows": dict(eval_stride=8),
    "one epoch, one sequence": dict(ttt_epochs=1, ttt_batch_seqs=1, ttt_momentum=0.0),
    "one chunk": dict(ttt_chunk_tokens=1000), "exact chunks": dict(ttt_chunk_tokens=24)}


@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd_equals_a_transcription(case, watch):
    """Of SPEC 3.11: chunks, windows, cosine, momentum, clipping, epochs, what is never learned."""
    sizes = (13, 4, 21, 10)
    config = toy(**{**SGD, "eval_plan": "windows", "eval_stride": 4, **SGD_CASES[case]})
    text, model = text_of(sizes), random_model(config)
    start = slow_params(model)
    begins = begins_of(sizes).tolist() if config.by_documents else [0]
    found = score_of(config, text, model=model)
    by_place, params = joined(watch.scores()), slow_params(model)
    nats, learned = plain.sgd_while_scoring(
        start, torch.from_numpy(text.tokens.astype(np.int64)), layouts_of(config)[1].order,
        sizes_of(config), plain.windows_of_documents(begins, 48, 8, config.eval_stride), begins, 8,
        config.ttt_chunk_tokens, 0.1, config.ttt_momentum, config.ttt_grad_clip,
        config.ttt_epochs, config.ttt_batch_seqs, config.ttt_freeze_blocks)
    assert [by_place[p] for p in range(48)] == pytest.approx(nats, rel=2e-3, abs=2e-3)
    assert found.nats == pytest.approx(sum(nats), rel=2e-4)
    for name, value in params.items():
        torch.testing.assert_close(value, learned[name], rtol=1e-3, atol=2e-3)
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 9
        still = layer < config.ttt_freeze_blocks or case == "one chunk"
        assert torch.equal(value, start[name]) == still, name


# ---- 6 the clock, the units, their costs ---------------------------------------------------------


@given(st.integers(1, 10**6), st.floats(0.001, 1e4), st.integers(1, 64))
def test_chunks_grow_by_doubling_until_the_time_foretold_fits(tokens, limit, most):
    """Or until growing spares nothing more."""
    def tokens_at(growth):
        return max(tokens // growth, most)

    pace = Pace(limit, now=lambda: 5.0)
    pace.fit(tokens_at, 100.0)
    assert pace.growth in {2 ** i for i in range(40)}
    assert pace.foretold_seconds == tokens_at(pace.growth) / 100
    assert (pace.foretold_seconds <= limit
            or tokens_at(2 * pace.growth) == tokens_at(pace.growth))
    smaller = [2 ** i for i in range(40) if 2 ** i < pace.growth]
    assert all(tokens_at(growth) / 100 > limit for growth in smaller)


def test_the_clock_starts_where_the_plan_is_made_and_no_limit_is_none():
    times = iter((0.0, 100.0, 109.9, 110.1))
    pace = Pace(10.0, now=lambda: next(times))
    pace.fit(lambda growth: 1, 1.0)
    assert [pace.late(), pace.late()] == [False, True]
    times = iter((0.0, 1e12))
    assert not Pace(0.0, now=lambda: next(times)).late()


def slow_machine(monkeypatch, reading_seconds):
    """Let each reading of the clock in Pace be so many seconds after the one before."""
    clock = {"now": 0.0}

    def now():
        clock["now"] += reading_seconds
        return clock["now"]

    monkeypatch.setattr(train_gpt, "Pace", lambda limit: Pace(limit, now))
    return clock


@pytest.mark.parametrize("way", ("lora", "warm", "sgd"))
@pytest.mark.parametrize("seconds", (8.0, 1000.0))
def test_a_slow_machine_scores_the_rest_without_learning(way, seconds, watch, monkeypatch):
    config, text = toy(**{**WAYS[way], "ttt_max_seconds": 20.0}), text_of(SIZES)
    monkeypatch.setattr(Adaptation, "tokens_per_second", lambda made: 1e6)
    score_of(config, text)
    whole = sum(kind == "step" for kind, _ in watch.happened)
    watch.scores()
    slow_machine(monkeypatch, seconds)
    found = score_of(config, text)
    kinds = [kind for kind, _ in watch.happened]
    steps = kinds.count("step")
    assert steps < whole and (steps == 0) == (seconds > 20)
    last = max((i for i, kind in enumerate(kinds) if kind == "step"), default=-1)
    assert steps <= (2 if way == "sgd" else 1) * 20 / seconds  # of an epoch each
    assert (kinds[last:].count("score") > 1 or last == -1)
    assert joined(watch.scores()).keys() == set(range(sum(SIZES)))
    assert (found.tokens, found.bytes) == (sum(SIZES), int(text.target_bytes.sum()))


def test_growth_that_fits_is_what_is_done(watch, monkeypatch):
    """Chunks are longer then, EVAL_SEQ_LEN at most, and still each target is scored once."""
    text, forwards = text_of(SIZES), []
    made = adaptation(toy(), text)
    tokens = sum(made.forward_tokens(unit.sizes, 1) for unit in made.plan())
    for speed in (1e9, tokens / 6.0, 1.0):
        monkeypatch.setattr(Adaptation, "tokens_per_second", lambda made, speed=speed: speed)
        out = io.StringIO()
        config = toy(ttt_max_seconds=5.0)
        with contextlib.redirect_stdout(out):
            adaptation(config, text).by_document(Log(True), {})
        growth = int(re.search(r"chunks times (\d+),", out.getvalue())[1])
        assert f"ttt: {len(SIZES)} documents" in out.getvalue()
        assert "linked: False" in out.getvalue()
        scores = watch.scores()
        joined(scores)
        forwards.append((growth, len(scores)))
        for some in scores:
            assert len(some) <= 3 * min(8, 4 * growth)
    growths, counts = zip(*forwards)
    assert growths[0] == 1 < growths[1] < growths[2] == 8
    assert counts[0] > counts[1] > counts[2]


def test_speed_is_measured_on_synthetic_tokens_and_leaves_no_trace(monkeypatch):
    """Whatever the text is, the same forwards; the weights and the score are as before."""
    texts = text_of(SIZES), text_of(SIZES, seed=5)
    model, seen = random_model(toy()), []
    before = slow_params(model)
    token_losses = train_gpt.GPT.token_losses
    monkeypatch.setattr(train_gpt.GPT, "token_losses", lambda model, batch, layout: (
        seen.append(batch.tokens.tolist()), token_losses(model, batch, layout))[1])
    for text in texts:
        made = adaptation(toy(), text, model=model)
        assert made.tokens_per_second() > 0 and made.text is text
        assert torch.equal(made.tokens, torch.from_numpy(text.tokens.view(np.int16)))
    half = len(seen) // 2
    assert half > 1 and seen[:half] == seen[half:]
    assert all(torch.equal(value, before[name]) for name, value in slow_params(model).items())


@settings(max_examples=200)
@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_units_are_dealt_once_and_evenly(costs, ranks):
    dealt = deal(costs, ranks)
    assert len(dealt) == ranks and sorted(unit for mine in dealt for unit in mine) == [
        *range(len(costs))]
    loads = [sum(costs[unit] for unit in mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0)
    assert deal([*costs], ranks) == dealt
    assert all(costs[a] >= costs[b] for mine in dealt for a, b in zip(mine, mine[1:]))


@settings(max_examples=60)
@given(cases(), st.sampled_from((1, 2, 4, 8)))
def test_forward_tokens_are_what_is_forwarded(case, growth):
    sizes, length, rule, _ = case
    config = toy(eval_seq_len=length, ttt_chunks=rule_text(rule), ttt_lr=0.0, ttt_places=("k",))
    model, seen = Mock(), []
    made = adaptation(config, text_of(sizes), model=model)
    losses = model.token_losses
    model.token_losses = lambda batch, layout: (seen.append(batch.tokens.numel()),
                                                losses(batch, layout))[1]
    pace = Pace(0)
    pace.growth = growth
    for unit in made.plan():
        seen.clear()
        made.adapt(unit, made.new_adapters(len(unit.sizes)), pace)
        done, slow = [0] * len(unit.sizes), 0
        chunks = [min(length, growth * next(c for limit, c in rule if size <= limit))
                  for size in unit.sizes]
        while any(d < size for d, size in zip(done, unit.sizes)):
            done = [min(d + c, size) for d, c, size in zip(done, chunks, unit.sizes)]
            slow += len(done) * max(min(d, length) for d in done)
        assert sum(seen) == slow == made.forward_tokens(unit.sizes, growth)


def test_the_length_of_chunks_is_the_documents_own():
    """Not that of the longest document beside it."""
    made = adaptation(toy(), text_of(SIZES), model=Mock())
    assert made.chunks(np.array([1, 5, 6, 12, 13, 99]), 1).tolist() == [1, 1, 2, 2, 4, 4]
    assert made.chunks(np.array([5, 12, 13]), 4).tolist() == [4, 8, 8]


@pytest.mark.parametrize(("given_rule", "rule"), [
    ("48", [(math.inf, 48)]), ("256:8,48", [(256, 8), (math.inf, 48)]),
    ("256:8,2000:24,48", [(256, 8), (2000, 24), (math.inf, 48)])])
def test_chunk_rules_that_are_taken(given_rule, rule):
    config = load_config({"TTT_CHUNKS": given_rule, "TTT": "lora", "EVAL_PLAN": "documents"})
    assert config.chunk_rule == rule


@pytest.mark.parametrize("rule", ["256:8", "256:8,100:4,48", "256:8,256:9,48", "8,256:8", "0",
                                  "256:0,48", "x", "48,48", "256:-8,48", "256:8.5,48"])
def test_chunk_rules_that_are_refused(rule):
    with pytest.raises(ConfigError, match=f"TTT_CHUNKS={re.escape(rule)}.*rising"):
        load_config({"TTT_CHUNKS": rule})


def test_a_chunk_rule_of_three_numbers_is_refused():
    with pytest.raises(ConfigError, match="TTT_CHUNKS"):
        load_config({"TTT_CHUNKS": "256:8:1,48"})


# ---- 7 a killed run goes on ----------------------------------------------------------------------


def count_adapting(monkeypatch, after=None):
    """Count batches of documents adapted to; the one after `after` is interrupted inside."""
    calls, adapt = [], Adaptation.adapt

    def counted(made, documents, adapters, pace):
        calls.append(documents.sizes.tolist())
        if after is not None and len(calls) > after:
            raise KeyboardInterrupt
        return adapt(made, documents, adapters, pace)

    monkeypatch.setattr(Adaptation, "adapt", counted)
    monkeypatch.setattr(Adaptation, "tokens_per_second", lambda made: 1e6)
    return calls


@pytest.mark.parametrize("warm", (False, True))
@pytest.mark.parametrize("after", (0, 1, 3))
def test_a_killed_run_goes_on_with_the_same_digits(tmp_path, warm, after):
    config, text = toy(ttt_warm_a=warm), text_of(SIZES)
    whole = score_of(config, text)
    units = math.ceil(len(SIZES) / 3)
    path = tmp_path / "journal"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_adapting(patch, after)
        score_of(config, text, journal=Journal(path, "task"))
    assert len(Journal(path, "task")) == after + 1, "and the plan"
    for task in ("another", "task"):
        with pytest.MonkeyPatch.context() as patch:
            calls = count_adapting(patch)
            assert score_of(config, text, journal=Journal(path, task)) == whole
        assert len(calls) == (units if warm or task == "another" else units - after)
    with pytest.MonkeyPatch.context() as patch:
        calls = count_adapting(patch)
        assert score_of(config, text, journal=Journal(path, "task")) == whole
    assert len(calls) == (units if warm else 0)


def test_a_killed_run_goes_on_by_the_plan_that_it_began_with(tmp_path):
    """Else a slower machine makes half of a score by one rule and half by another."""
    config, text, found = toy(ttt_max_seconds=5.0), text_of(SIZES), []
    for after, speed in ((None, 1e9), (2, 1e9), (None, 40.0)):
        path = tmp_path / ("whole" if after is None and not found else "journal")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            count_adapting(patch, after)
            patch.setattr(Adaptation, "tokens_per_second", lambda made, speed=speed: speed)
            found.append(score_of(config, text, journal=Journal(path, "task")))
    assert len(found) == 2 and found[1] == found[0]


# ---- 8 settings ----------------------------------------------------------------------------------


def refused(env):
    with pytest.raises(ConfigError) as caught:
        load_config(env)
    return str(caught.value)


def test_the_kind_that_is_meant():
    by_documents = {"EVAL_PLAN": "documents"}
    for env, kind, rate in (({}, "none", 0.002), ({"TTT_ENABLED": "1"}, "sgd", 0.002),
                            ({"TTT_ENABLED": "1", "TTT": "sgd"}, "sgd", 0.002),
                            ({"TTT_ENABLED": "0", "TTT": "sgd"}, "sgd", 0.002),
                            ({"TTT": "lora", **by_documents}, "lora", 7.5e-5),
                            ({"TTT": "sgd", "TTT_LR": "0.005"}, "sgd", 0.005),
                            ({"TTT": "lora", "TTT_LR": "0", **by_documents}, "lora", 0.0)):
        config = load_config(env)
        assert (config.adapts, config.ttt_rate) == (kind, rate) or kind == "none"
        assert config.adapts == kind


@pytest.mark.parametrize(("env", "words"), [
    ({"TTT_ENABLED": "1", "TTT": "lora", "EVAL_PLAN": "documents"}, "TTT_ENABLED=1"),
    ({"TTT_ENABLED": "1", "TTT": "none"}, "TTT_ENABLED=1"),
    ({"TTT": "lora"}, "TTT=lora.*EVAL_PLAN=documents"),
    ({"TTT": "lora", "EVAL_PLAN": "windows"}, "TTT=lora.*EVAL_PLAN=documents"),
    ({"TTT": "slot"}, "TTT=slot.*none"), ({"TTT_PLACES": "x"}, "TTT_PLACES=x.*q, k, v, o, mlp"),
    ({"TTT_PLACES": "k,out"}, "TTT_PLACES=k,out"), ({"TTT_BATCH_DOCS": "0"}, "TTT_BATCH_DOCS=0"),
    ({"TTT_RANK": "0"}, "TTT_RANK=0"), ({"TTT_LR": "-1"}, "TTT_LR=-1"),
    ({"TTT_MAX_SECONDS": "-1"}, "TTT_MAX_SECONDS"), ({"TTT_BETA2": "1"}, "TTT_BETA2=1"),
    ({"TTT_CHUNK_TOKENS": "0"}, "TTT_CHUNK_TOKENS=0"),
    ({"TTT": "sgd", "EVAL_STRIDE": "4096"}, "EVAL_STRIDE=4096")])
def test_settings_that_contradict_are_refused(env, words):
    assert re.search(words, refused(env))


SGD_ALONE = ("EPOCHS", "CHUNK_TOKENS", "BATCH_SEQS", "MOMENTUM", "GRAD_CLIP", "FREEZE_BLOCKS")
LORA_ALONE = ("PLACES", "RANK", "ALPHA", "BETA1", "BETA2", "WD", "CHUNKS", "BATCH_DOCS", "WARM_A")
BOTH = ("LR", "MAX_SECONDS")


@pytest.mark.parametrize(("kind", "idle"), [("none", SGD_ALONE + LORA_ALONE + BOTH),
                                            ("sgd", LORA_ALONE), ("lora", SGD_ALONE)])
def test_settings_without_effect_are_said_aloud(kind, idle):
    values = {f"TTT_{name}": train_gpt.show_value(train_gpt.KNOBS[f"ttt_{name.lower()}"].default)
              for name in SGD_ALONE + LORA_ALONE + BOTH}
    env = {"TTT": kind, "EVAL_PLAN": "documents", **values}
    said = [line for line in notices(load_config(env), env) if line.startswith("TTT_")]
    assert sorted(said) == sorted(f"TTT_{name}: without effect under TTT={kind}" for name in idle)
    assert {*values, "TTT", "TTT_ENABLED"} == {
        name.upper() for name in train_gpt.KNOBS if name.startswith("ttt")}


def older_header():
    """Return the header of an artifact from before there was any test-time training."""
    kept = artifact_config(load_config({}))
    return {"config": {name: value for name, value in kept.items() if not name.startswith("ttt")}}


def test_an_older_artifact_reads_as_without():
    header = older_header()
    config = adopt(load_config({"STAGE": "evaluate"}), header, "evaluate", "old")
    assert config.adapts == "none" and config_faults(config) == []
    env = {"STAGE": "evaluate", "TTT": "sgd", "TTT_EPOCHS": "5"}
    config = adopt(load_config(env), header, "evaluate", "old")
    assert (config.adapts, config.ttt_epochs, config.ttt_momentum) == ("sgd", 5, 0.9)


def test_chunks_shorter_than_a_sequence_are_refused_or_said_aloud():
    env = {"TTT": "sgd", "TTT_CHUNK_TOKENS": "1024", "EVAL_SEQ_LEN": "2048"}
    with contextlib.suppress(ConfigError):
        assert any("TTT_CHUNK_TOKENS" in line for line in notices(load_config(env), env))


def test_the_published_switch_acts_on_an_older_artifact():
    config = load_config({"STAGE": "evaluate", "TTT_ENABLED": "1"})
    assert adopt(config, older_header(), "evaluate", "old").adapts == "sgd"


# ---- 9 whole runs --------------------------------------------------------------------------------


SCORE_TAIL = r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms"
KINDS = {
    "lora": (dict(TTT="lora", EVAL_PLAN="documents", TTT_CHUNKS="30:16,32", TTT_RANK="4",
                  TTT_LR="0.003", TTT_BATCH_DOCS="16"), "quantized_ttt_phased"),
    "sgd": (dict(TTT_ENABLED="1", TTT_CHUNK_TOKENS="1024", TTT_LR="0.01", TTT_EPOCHS="1"),
            "legal_ttt")}


class Adapted(NamedTuple):
    """A finished run: its folder, output, result, events and scores."""

    cwd: object
    stdout: str
    result: dict
    events: list
    scores: dict


def run_of(nursery, env, cwd, **more) -> Adapted:
    ended = nursery.run(env, cwd, **more)
    assert ended.rc == 0, ended.stderr
    folder = cwd / "runs" / env["RUN_ID"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    result = json.loads(ended.stdout.splitlines()[-1].removeprefix("RESULT "))
    return Adapted(cwd, ended.stdout, result, events,
                   json.loads((folder / "scores.json").read_text()))


@pytest.fixture(scope="module", params=KINDS)
def adapted(request, nursery, small_env, shared):
    """A run of all stages with test-time training: (its kind, what it left). Read-only."""
    env = {**small_env, **KINDS[request.param][0]}
    return request.param, shared(f"adapted_{request.param}",
                                 lambda cwd: run_of(nursery, env, cwd))


def evaluation(small_env, run, **changes):
    names = ("DATA_PATH", "TOKENIZER_PATH", "DEVICE")
    return {**{name: small_env[name] for name in names}, "STAGE": "evaluate", "RUN_ID": "x",
            "INPUT_PATH": run.cwd / "runs" / "x", **changes}


def test_a_run_tells_its_score(adapted):
    kind, run = adapted
    lines = run.stdout.splitlines()
    (at,) = (i for i, line in enumerate(lines)
             if re.fullmatch(f"{KINDS[kind][1]} {SCORE_TAIL}", line))
    assert any(line.startswith("final_int6_sliding_window ") for line in lines[:at])
    (event,) = (event for event in run.events if event["event"] == "ttt")
    found = run.scores["ttt"]
    assert run.result["ttt_bpb"] == found["val_bpb"] == event["val_bpb"]
    for name in ("tokens", "bytes"):
        assert found[name] == run.scores["roundtrip"][name] == event[name]
    assert 0 < abs(found["val_bpb"] - run.scores["sliding"]["val_bpb"]) < 0.1
    assert found["val_bpb"] < run.scores["roundtrip"]["val_bpb"] and event["eval_ms"] > 0
    assert "without effect" not in "\n".join(l for l in lines if "TTT" in l)
    plans = [event for event in run.events if event["event"] == "ttt_plan"]
    assert len(plans) == (kind == "lora")
    for plan in plans:
        assert plan["growth"] == 1 and plan["linked"] is False and plan["documents"] > 20
        assert plan["tokens_per_target"] > 1 and plan["expected_seconds"] > 0


def test_without_it_the_other_scores_are_the_same(adapted, nursery, small_env, tmp_path):
    _, run = adapted
    changes = {"TTT": "none"} if adapted[0] == "lora" else {"TTT_ENABLED": "0"}
    other = run_of(nursery, evaluation(small_env, run, **changes), tmp_path)
    assert "ttt" not in other.scores and "ttt_bpb" not in other.result
    assert {kind: found for kind, found in run.scores.items() if kind != "ttt"} == other.scores
    assert not any(event["event"].startswith("ttt") for event in other.events)


def test_the_records_tool_shows_it_as_the_final_score(adapted, tmp_path, capsys):
    _, run = adapted
    console = tmp_path / "console.log"
    console.write_text(run.stdout)
    for path in (run.cwd / "runs" / "x", run.cwd / "logs" / "x.txt", console):
        found = logs.read_run(path)
        assert found.final == "ttt" and found.bpb("ttt") == run.result["ttt_bpb"], path
    assert records.main(["read", "--json", str(run.cwd / "runs" / "x")]) in (0, 1)
    page = json.loads(capsys.readouterr().out)["runs"][0]
    assert page["final_bpb"] == run.result["ttt_bpb"]
    records.main(["read", str(run.cwd / "runs" / "x")])
    assert f"{run.result['ttt_bpb']:.8f}" in capsys.readouterr().out


def test_evaluating_its_artifact_gives_the_same_bits_even_when_killed(nursery, small_env, adapted,
                                                                      tmp_path):
    """The settings travel in the artifact; with sgd the text is read from its beginning again."""
    kind, run = adapted
    if kind == "sgd":
        killer = "at_call(train_gpt.Adaptation, 'learn', signal_self(), 3)"
    else:
        killer = "at_call(train_gpt.Adaptation, 'adapt', signal_self(), 5)"
    env = evaluation(small_env, run)
    assert nursery.run(env, tmp_path, before=killer).rc == -signal.SIGKILL
    journal = (tmp_path / "runs" / "x" / "evaluation.0.jsonl").read_text()
    assert journal.count('["ttt') == (3 if kind == "lora" else 0)
    assert run_of(nursery, env, tmp_path).scores == run.scores


@pytest.mark.slow
def test_another_window_takes_nothing_from_the_journal(nursery, small_env, shared, tmp_path):
    run = shared("adapted_lora", lambda cwd: run_of(
        nursery, {**small_env, **KINDS["lora"][0]}, cwd))
    env = evaluation(small_env, run, EVAL_STRIDE=16)
    killer = "at_call(train_gpt.Adaptation, 'adapt', signal_self(), 4)"
    killed = nursery.run({**env, "EVAL_SEQ_LEN": 16}, tmp_path, before=killer)
    assert killed.rc == -signal.SIGKILL, killed.stderr
    assert run_of(nursery, env, tmp_path).scores["ttt"] == run.scores["ttt"]
