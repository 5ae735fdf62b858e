"""Statistics equal a slow gathering of every layer's inputs, and ranks share the same windows."""

import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    Rank,
    asked,
    layouts_of,
    meta_model,
    on_ranks,
    random_model,
    random_tokens,
    sizes_of,
    steady,  # noqa: F401
    toy_config,
)

from train_gpt import (
    Batch,
    Calibration,
    ClipSteps,
    Clock,
    FisherSteps,
    Log,
    Role,
    collect_fisher,
    collect_inputs,
    load_config,
)

VARIANTS = {
    "record": {}, "lost skips": dict(skip_to_lanes=False), "no lanes": dict(parallel_start_layer=0),
    "no gates": dict(skip_gates_enabled=False), "one key head": dict(num_kv_heads=1),
    "no value embedding": dict(ve_enabled=False), "loop of two": dict(recur_layers=(4, 5))}


@pytest.fixture
def slow_stats(monkeypatch):
    """Return a function that sums x xT of every observed input while plain.py runs the model."""
    sums, attention, mlp = {}, plain.attention, plain.mlp

    def record(name, x):
        for row in x.detach():
            sums[name] = sums.get(name, 0) + torch.outer(row, row)

    def recording_attention(params, layer, z, tokens, sizes):
        prefix = f"blocks.{layer}.attn."
        out = params[prefix + "out.weight"]
        eye = torch.eye(len(out), dtype=out.dtype)
        heads = attention(params | {prefix + "out.weight": eye}, layer, z, tokens, sizes)
        for name in ("q", "k", "v"):
            record(f"inputs.{prefix}{name}.weight", z)
        record(f"inputs.{prefix}out.weight", heads)
        return heads @ out.T

    def recording_mlp(params, layer, z):
        prefix = f"blocks.{layer}.mlp."
        up, down = params[prefix + "up.weight"], params[prefix + "down.weight"]
        eye = torch.eye(len(up), dtype=up.dtype)
        hidden = mlp(params | {prefix + "down.weight": eye}, layer, z)
        record(f"inputs.{prefix}up.weight", z)
        record(f"inputs.{prefix}down.weight", hidden)
        return hidden @ down.T

    monkeypatch.setattr(plain, "attention", recording_attention)
    monkeypatch.setattr(plain, "mlp", recording_mlp)

    def gather(config, model, tokens_BT, order):
        params = {name: p.detach().double() for name, p in model.named_parameters()}
        sizes = sizes_of(config)
        sums.clear()
        for tokens_T in tokens_BT:
            encoded = plain.encode(params, tokens_T, order, sizes)
            x = plain.decode(params, tokens_T, order, sizes, config.skip_to_lanes, encoded)
            record("inputs.tok_emb.weight", plain.rms_norm(x))
            if config.ve_enabled:
                record("inputs.ve.proj.weight", params["ve.table.weight"][tokens_T])
        return dict(sums)

    return gather


def assert_same_stats(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        value, tiny = value.float(), 1e-4 * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=tiny, msg=name)


def added(parts):
    """Return the sum by name over several batches' statistics."""
    parts = list(parts)
    assert all(set(part) == set(parts[0]) for part in parts)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


# ---- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("depth", (0, 1), ids=("plain", "recurrent"))
def test_stats_equal_a_slow_gathering(slow_stats, changes, depth):
    config = toy_config(**changes)
    model, layout = random_model(config), layouts_of(config)[depth]
    batches = [random_tokens(config, 2, 8, seed) for seed in (1, 2)]
    wanted = ClipSteps(config).statistics()
    found = added(collect_inputs(model, asked(batch), layout, wanted) for batch in batches)
    assert set(found) == set(wanted)
    assert_same_stats(found, slow_stats(config, model, torch.cat(batches), layout.order))


def test_a_repeated_layer_contributes_both_inputs():
    """Inputs of q, k, v have a fixed mean square, so the trace counts how often a layer ran."""
    config = toy_config()
    model, layout = random_model(config), layouts_of(config)[1]
    names = [f"inputs.blocks.{i}.attn.q.weight" for i in range(11)]
    tokens = random_tokens(config, 4, 8)
    found = collect_inputs(model, asked(tokens), layout, names)
    for i, name in enumerate(names):
        runs = found[name].trace().item() / (tokens.numel() * config.model_dim / (i + 1))
        assert runs == pytest.approx(2 if i in (3, 4, 5) else 1, rel=1e-4)


def test_only_what_is_asked_is_observed_and_nothing_stays_hooked():
    config = toy_config()
    model, layout = random_model(config), layouts_of(config)[0]
    tokens = random_tokens(config, 1, 8)
    asked_for = ["inputs.blocks.2.mlp.up.weight", "inputs.tok_emb.weight"]
    found = collect_inputs(model, asked(tokens), layout, asked_for)
    assert set(found) == set(asked_for)
    with pytest.raises(IndexError):
        collect_inputs(model, asked(tokens + config.vocab_size), layout, asked_for)
    assert not any(module._forward_pre_hooks or module._forward_hooks
                   for module in model.modules())
    assert not any(value.requires_grad for value in found.values())


def test_stats_are_symmetric_and_fp32_in_a_bf16_model():
    config = toy_config()
    model = random_model(config, dtype=torch.bfloat16)
    found = collect_inputs(model, asked(random_tokens(config, 2, 8)), layouts_of(config)[1],
                           ClipSteps(config).statistics())
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, value.T), name


# ---- which matrices ------------------------------------------------------------------------


@pytest.mark.parametrize("env, matrices", [
    ({"PRESET": "pr1471"}, 66), ({}, 67), ({"EMBED_GPTQ": "0"}, 66), ({"FP16_MAX_NUMEL": "0"}, 68),
    ({"FP16_MAX_NUMEL": "131072"}, 45)])
def test_published_counts_of_hessians(env, matrices):
    """Six matrices a layer; the table reads the head's input; of the value table PT P serves."""
    config = load_config(dict(env, STEP_RULE="sdclip"))
    calibration = Calibration(meta_model(config), config, Rank())
    assert len(calibration.wanted) == matrices == calibration.hessians()
    assert ("inputs.tok_emb.weight" in calibration.wanted) == config.embed_gptq


def test_the_record_knows_the_inputs_of_every_coded_weight():
    config = load_config({})
    calibration = Calibration(meta_model(config), config, Rank())
    assert calibration.hessians() == 66 + 2 and calibration.gradients


# ---- which windows -------------------------------------------------------------------------


MODEL = meta_model(toy_config())  # its sizes have no part in which windows are read


def calibration_of(config, rank=0, world_size=1):
    return Calibration(MODEL, config, Rank(rank, world_size))


def positions_of(calibration):
    return [start + i for start, count in calibration.shares() for i in range(count)]


def test_published_windows():
    record, published = load_config({}), load_config({"PRESET": "pr1471"})
    shares = [(config, rank) for config in (record, published) for rank in (0, 1)]
    shares = [Calibration(meta_model(c), c, Rank(rank, 8)).shares() for c, rank in shares]
    assert shares[0] == [(64 * i, 8) for i in range(48)]
    assert shares[1] == [(64 * i + 8, 8) for i in range(48)]
    assert shares[2] == [(384 * i, 48) for i in range(64)] and shares[3] == []


settings_of_calibration = st.fixed_dictionaries(dict(
    train_batch_tokens=st.integers(1, 12).map(lambda n: 64 * n),
    micro_batch_tokens=st.integers(8, 200), gptq_calibration_batches=st.integers(1, 9)))


@given(settings_of_calibration)
def test_ranks_share_the_same_windows_whatever_their_number(changes):
    config = toy_config(**changes)
    windows = config.gptq_calibration_batches * config.train_batch_tokens // 64
    for world_size in (1, 2, 3, 4, 8):
        ranks = [calibration_of(config, rank, world_size) for rank in range(world_size)]
        found = [position for one in ranks for position in positions_of(one)]
        assert sorted(found) == list(range(windows))
        forwards = [len(one.shares()) for one in ranks]
        assert max(forwards) - min(forwards) <= 1
        counts = [count for one in ranks for _, count in one.shares()]
        assert 8 * max(counts) <= min(config.micro_batch_tokens, config.train_batch_tokens / 8)


@given(settings_of_calibration, st.sampled_from((1, 2, 8)))
def test_the_first_rank_alone_reads_its_eighth_of_each_batch(changes, world_size):
    """As in PR 1471, on any number of ranks and whatever fits into one forward."""
    config = toy_config(**changes, hessian_ranks="first")
    eighth = config.train_batch_tokens // 64
    expected = [8 * eighth * batch + i for batch in range(config.gptq_calibration_batches)
                for i in range(eighth)]
    assert positions_of(calibration_of(config, 0, world_size)) == expected
    assert all(positions_of(calibration_of(config, rank, world_size)) == []
               for rank in range(1, world_size))


# ---- the collected means -------------------------------------------------------------------

BIG = dict(step_rule="sdclip", train_batch_tokens=192, micro_batch_tokens=16,
           gptq_calibration_batches=5)


class Windows:
    """Stands in for Loader: the window at a position is the same for every reader."""

    def read(self, start, count, *_):
        config = toy_config()
        rows = [random_tokens(config, 1, 9, seed=start + i) for i in range(count)]
        return Batch.of_windows(torch.cat(rows))


class Seconds(Clock):
    """A clock that shows the given training seconds, one after the other."""

    def __init__(self, *seconds):
        super().__init__()
        self.left = list(seconds)

    def training_seconds(self):
        return self.left.pop(0) if self.left else 0.0


def collect(config, runtime, clock=None, log=None, batch_seconds=0.0):
    model = random_model(config)
    calibration = Calibration(model, config, runtime)
    calibration.batch_seconds = batch_seconds
    layout = layouts_of(config)[1]
    return calibration.run(layout, Windows(), clock or Clock(), log or Log(False))


@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
@pytest.mark.parametrize("changes", (BIG, dict(BIG, micro_batch_tokens=64, hessian_ranks="first")))
def test_means_are_the_same_on_any_number_of_ranks(slow_stats, world_size, changes):
    config = toy_config(**changes)
    found = on_ranks(world_size, lambda runtime: collect(config, runtime))
    positions = positions_of(calibration_of(config))
    assert len(positions) == 15
    tokens = torch.cat([Windows().read(p, 1).tokens for p in positions])
    expected = slow_stats(config, random_model(config), tokens, config.recurrent_order)
    for means in found:
        assert_same_stats(means, {name: value / tokens.numel() for name, value in expected.items()})
        assert all(torch.equal(means[name], found[0][name]) for name in means)


class Events(Log):
    def __init__(self):
        super().__init__(False)
        self.seen = []

    def event(self, kind, console=True, **fields):
        self.seen.append((kind, fields))


@pytest.mark.parametrize("seconds, done", [
    ((0.0, 5.0, 9.0), 2), ((0.0, 8.7, 8.7, 8.9), 3), ((99.0, 99.0), 1)])
def test_calibration_stops_at_the_limit_and_says_so(seconds, done):
    """A batch takes one second; what was collected until then is averaged; one always runs."""
    config, log = toy_config(**BIG, max_wallclock_seconds=10.0), Events()
    short = collect(config, Rank(), Seconds(*seconds), log, batch_seconds=1.0)
    (kind, fields), = log.seen
    assert kind == "calibration_short" and fields["done"] == done
    model, layout = random_model(config), layouts_of(config)[1]
    shares = calibration_of(config).shares()
    batches = [Windows().read(*share) for share in shares[:done]]
    assert fields["planned"] == len(shares)
    sums = added(collect_inputs(model, batch, layout, short) for batch in batches)
    tokens = sum(batch.tokens.numel() for batch in batches)
    assert_same_stats(short, {name: value / tokens for name, value in sums.items()})


def test_without_a_limit_calibration_is_never_cut():
    config, log = toy_config(**BIG), Events()
    collect(config, Rank(), Seconds(*[1e6] * 50), log, batch_seconds=100.0)
    assert not log.seen


@pytest.mark.parametrize("world_size", (1, 3, 8))
def test_the_reserve_covers_every_batch_of_the_busiest_rank(world_size):
    config = toy_config(**BIG)

    def reserve(runtime):
        calibration = Calibration(MODEL, config, runtime)
        calibration.batch_seconds = 2.0
        return calibration.reserve_seconds(), len(calibration.shares())

    found = on_ranks(world_size, reserve)
    busiest = max(forwards for _, forwards in found)
    assert all(seconds == found[0][0] > 2.0 * busiest for seconds, _ in found)
    asked = Calibration(MODEL, toy_config(**BIG, gptq_reserve_seconds=1e4), Rank())
    assert asked.reserve_seconds() == 1e4


# ---- Fisher information --------------------------------------------------------------------


def fisher_names(model):
    return [name for name, p in model.named_parameters()
            if p.ndim == 2 and p.role is not Role.CONTROL]


def slow_gradients(model, layout, tokens, labels):
    """Return name -> [(input, gradient of the output) of each use], by zeros added to outputs."""
    added, handles = {}, []

    def watch(name, module):
        def on_output(_, inputs, out):
            zero = torch.zeros_like(out, requires_grad=True)
            added.setdefault(name, []).append((inputs[0], zero))
            return out + zero
        handles.append(module.register_forward_hook(on_output))
    for name in fisher_names(model):
        watch(name, model.get_submodule(name.removesuffix(".weight")))
    logits = model.logits(asked(tokens), layout).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: [(x.flatten(0, -2).detach(), zero.grad.flatten(0, 1)) if x.is_floating_point()
                   else (None, zero.grad.flatten(0, 1)) for x, zero in uses]
            for name, uses in added.items()}


def test_fisher_information_equals_a_slow_gathering():
    config = toy_config()
    model, layout = random_model(config), layouts_of(config)[1]
    tokens = random_tokens(config, 3, 8)
    names = fisher_names(model)
    found = collect_fisher(model, asked(tokens), layout, FisherSteps(config).statistics(), seed=7)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        odds = model.logits(asked(tokens), layout).flatten(0, 1).softmax(-1)
    labels = torch.multinomial(odds, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    slow = slow_gradients(model, layout, tokens, labels)
    expected = {}
    for name in names:
        uses = slow[name]
        if name in ("tok_emb.weight", "ve.table.weight"):
            ((_, grads),) = uses
            expected[f"inputs.{name}"] = grads.T @ grads
            continue
        # a layer that runs twice: the mean of both
        expected[f"fisher.{name}"] = sum(g.square().sum(0) for _, g in uses) / len(uses)
        squares = [(x, g.square(), g.square().mean(0).clamp_min(1e-30)) for x, g in uses]
        weighted = [(x, (square / mean).mean(1)) for x, square, mean in squares]
        expected[f"inputs.{name}"] = sum((x * w[:, None]).T @ x for x, w in weighted)
        rows, columns = model.get_parameter(name).shape
        if rows <= columns:
            expected[f"outputs.{name}"] = sum(g.T @ g for _, g in uses) / len(uses)
    with torch.no_grad():
        hidden = model(asked(tokens), layout).flatten(0, 1)
    expected["inputs.tok_emb.weight"] += hidden.T @ hidden
    assert set(found) == set(expected) | {"fisher.tok_emb.weight", "fisher.ve.table.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6 * value.abs().max(),
                                   msg=name)
    assert found["fisher.ve.table.weight"].tolist() == torch.bincount(
        tokens.flatten(), minlength=config.vocab_size).tolist()


def test_the_heads_information_is_the_expected_square_over_all_labels():
    config = toy_config(logit_softcap=3.0)  # a cap that bends the logits
    model, layout = random_model(config), layouts_of(config)[0]
    tokens = random_tokens(config, 1, 5)
    found = collect_fisher(model, asked(tokens), layout, ["fisher.tok_emb.weight"], seed=0)
    with torch.no_grad():
        hidden = model(asked(tokens), layout).flatten(0, 1)
    raw = (hidden @ model.tok_emb.weight.detach().T).requires_grad_()
    odds = (3 * torch.tanh(raw / 3)).log_softmax(-1)
    expected = torch.zeros(config.vocab_size)
    for label in range(config.vocab_size):
        (grad,) = torch.autograd.grad(odds[:, label].sum(), raw, retain_graph=True)
        expected += (odds[:, label:label + 1].exp() * grad.square()).sum(0).detach()
    torch.testing.assert_close(found["fisher.tok_emb.weight"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", (2, 3))
def test_fisher_information_is_the_same_on_any_number_of_ranks(world_size):
    config = toy_config(**dict(BIG, step_rule="fisher"))
    alone = collect(config, Rank())
    assert len(calibration_of(config).shares()) == 15
    for means in on_ranks(world_size, lambda runtime: collect(config, runtime)):
        assert list(means) == list(alone)
        assert_same_stats(means, alone)
