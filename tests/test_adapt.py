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
import read
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
           ttt_max_seconds=0.0)
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
    """What happens, in order: ("score", {place: nats}) and ("step", {place: weight in the loss})."""

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
    config, text = toy(ttt_beta1=0.0, ttt_lr=0.01), text_of(SIZES)
    made = adaptation(config, text)
    found_nats = score_of(config, text, model=made.model).nats
    found, start = joined(watch.scores()), row_of(made.new_adapters(1), 0)
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    moved = 0.0
    for begin, size in zip(begins_of(SIZES).tolist(), SIZES):
        def slow(rate, begin=begin, size=size):
            return np.array(plain.adapt_to_document(
                slow_params(made.model), tokens[begin:begin + size + 1], made.layout.order,
                sizes_of(config), start, 2.0, chunk_of(size), 8, rate, (0.0, 0.99), 1e-10, 0.5)[0])
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
    for at in (i for i in range(2, len(text.tokens), 13 if stream else 9) if text.tokens[i] != BOS):
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


@settings(max_examples=80)
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


@settings(max_examples=60)
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
