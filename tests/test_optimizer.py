"""Flat buffers, Muon, AdamW, schedule, average and the undone warm-up, against plain.py."""

from pathlib import Path

import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    Rank,
    layouts_of,
    on_ranks,
    random_model,
    random_tokens,
    steady,  # noqa: F401
    toy_config,
)

from train_gpt import (
    NEWTON_SCHULZ,
    Average,
    Bank,
    Batch,
    Clock,
    Config,
    Log,
    Optimizers,
    Rates,
    Role,
    Score,
    Trainer,
    TrainState,
    as_matrices,
    micro_batch_sequences,
    newton_schulz,
    partition,
    phases,
    schedule,
)

# ---- partition and flat buffers ------------------------------------------------------------


def averaged(average, model):
    """Return the averaged weights by parameter name."""
    return {name: average.bank.view(average.shadow, p) for name, p in model.named_parameters()}


def test_every_parameter_has_one_owner():
    model = random_model(toy_config())
    groups = partition(model)
    owned = [id(p) for group in groups.values() for p in group]
    assert len(set(owned)) == len(owned)
    assert set(owned) == {id(p) for p in model.parameters()}
    assert all(p.role is role for role, group in groups.items() for p in group)


def test_a_parameter_without_role_is_refused():
    model = random_model(toy_config())
    model.extra = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(AssertionError, match="owner"):
        partition(model)


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def banked(request):
    """A model with tables of either dtype, the values it had, and its bank."""
    model = random_model(toy_config(), dtype=request.param)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, before, Bank(partition(model))


def lies_in(view, flat):
    offset = (view.data_ptr() - flat.data_ptr()) // flat.element_size()
    return 0 <= offset and offset + view.numel() <= flat.numel()


def test_parameters_and_gradients_become_aligned_views(banked):
    model, before, bank = banked
    used = {dtype: torch.zeros(len(flat), dtype=torch.int) for dtype, flat in bank.weights.items()}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        flat, grads = bank.weights[p.dtype], bank.grads[p.dtype]
        assert lies_in(p, flat) and lies_in(p.grad, grads) and p.is_contiguous()
        offset = (p.data_ptr() - flat.data_ptr()) // p.element_size()
        assert offset % 64 == 0 and offset == bank.offsets[p]
        assert (p.grad.data_ptr() - grads.data_ptr()) // p.element_size() == offset
        used[p.dtype][offset:offset + p.numel()] += 1
    for dtype, counts in used.items():
        assert counts.max() == 1  # no two parameters overlap
        assert not bank.weights[dtype][counts == 0].any()


def test_stacks_and_flat_groups_alias_the_parameters(banked):
    model, _, bank = banked
    groups = partition(model)
    assert sum(len(weights) for weights, *_ in bank.matrices) == len(groups[Role.MATRIX])
    for weights, grads, count in bank.matrices:
        assert count == len(weights)
        weights.fill_(7.0)
        as_matrices(grads, weights.shape[1:]).fill_(3.0)
    assert all((p == 7).all() and (p.grad == 3).all() for p in groups[Role.MATRIX])
    for role, flat in bank.adam.items():
        assert not (flat == 7).any()
        flat.data.fill_(5.0)
        flat.grad.fill_(2.0)
        assert all((p == 5).all() and (p.grad == 2).all() for p in groups[role])
    assert all((p == 7).all() for p in groups[Role.MATRIX])


def test_every_matrix_of_a_stack_is_one_parameter(banked):
    model, _, bank = banked
    places = {p.data_ptr(): tuple(p.shape) for p in partition(model)[Role.MATRIX]}
    stacked = [(w.data_ptr(), tuple(w.shape)) for weights, *_ in bank.matrices for w in weights]
    assert dict(stacked) == places and len(stacked) == len(places)


def test_backward_accumulates_in_place(banked):
    model, _, bank = banked
    windows, layout = random_tokens(toy_config(), 2, 9), layouts_of(toy_config())[1]
    places = [p.grad.data_ptr() for p in model.parameters()]
    seen = []
    for _ in range(2):
        model.mean_loss(Batch.of_windows(windows), layout).backward()
        seen.append({dtype: flat.clone() for dtype, flat in bank.grads.items()})
    assert places == [p.grad.data_ptr() for p in model.parameters()]
    for dtype, once in seen[0].items():
        assert once.any()
        torch.testing.assert_close(seen[1][dtype], 2 * once)


# ---- Newton-Schulz and Muon ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 30), (2, 30, 5), (1, 1, 7), (1, 7, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_newton_schulz_equals_the_reference_per_matrix(shape, dtype, tolerance):
    g = torch.randn(shape, dtype=dtype)
    found = newton_schulz(g, NEWTON_SCHULZ["quintic"] * 5, dtype)
    assert found.dtype == dtype
    for i in range(shape[0]):
        expected = plain.newton_schulz(g[i], 5, dtype)
        torch.testing.assert_close(found[i], expected, rtol=tolerance, atol=tolerance)


def test_newton_schulz_flattens_the_spectrum_in_bf16():
    found = newton_schulz(torch.randn(4, 24, 60), NEWTON_SCHULZ["quintic"] * 5, torch.bfloat16)
    singular = torch.linalg.svdvals(found.double())
    assert found.dtype == torch.bfloat16
    assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_muon_equals_torch_where_rows_are_equally_long(shape):
    """Torch's Muon knows no row normalisation; a constant gradient with unit rows needs none."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    config = toy_config(model_dim=16, matrix_lr=0.05, muon_wd=0.3)
    optimizers = Optimizers(random_model(config), config, Rank(dtype=torch.bfloat16))
    grad = torch.nn.functional.normalize(torch.randn(shape), dim=1)
    weight = torch.nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.9, ns_steps=5)
    momentum, ours = torch.zeros(1, *shape), torch.zeros(1, *shape)
    for _ in range(3):
        weight.grad = grad.clone()
        theirs.step()
        ours -= optimizers.muon_update(grad[None], momentum, 0.9)
    assert (ours[0] - weight).norm() < 0.02 * weight.norm()


# ---- a whole step --------------------------------------------------------------------------

STEPS = [Rates(1.0, 0.92), Rates(0.7, 0.95), Rates(0.1, 0.99)]


def random_grads(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    grads = {name: scale * torch.randn(p.shape, generator=generator)
             for name, p in model.named_parameters()}
    grads["blocks.2.mlp.down.weight"].zero_()
    return grads


class Reference:
    """The optimizer of plain.py, one tensor at a time."""

    def __init__(self, model, config):
        self.config, self.step = config, 0
        self.roles = {name: p.role for name, p in model.named_parameters()}
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.shadow = dict(self.weights)
        zero = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.first, self.second = dict(zero), dict(zero)

    def update(self, grads, rates):
        c, self.step = self.config, self.step + 1
        clipped, _ = plain.clip(list(grads.values()), c.grad_clip_norm)
        for (name, w), g in zip(self.weights.items(), clipped, strict=True):
            if self.roles[name] is Role.MATRIX:
                self.weights[name], self.first[name] = plain.muon_step(
                    w, g, self.first[name], c.matrix_lr * rates.lr_multiplier,
                    rates.muon_momentum, c.muon_wd, c.muon_backend_steps, torch.float32)
                continue
            embed = self.roles[name] is Role.EMBED
            lr, decay = (c.tied_embed_lr, c.embed_wd) if embed else (c.scalar_lr, c.adam_wd)
            self.weights[name], self.first[name], self.second[name] = plain.adamw_step(
                w, g, self.first[name], self.second[name], self.step, lr * rates.lr_multiplier,
                (c.beta1, c.beta2), c.adam_eps, decay)
        self.shadow = {name: plain.ema_step(self.shadow[name], w, c.ema_decay)
                       for name, w in self.weights.items()}


@pytest.mark.parametrize("changes, scale", [
    ({}, 1.0), ({}, 1e-5), (dict(grad_clip_norm=0.0), 1.0),
    (dict(muon_backend_steps=3, beta1=0.5, beta2=0.6, adam_eps=1e-3, muon_wd=0.5, embed_wd=0.4,
          adam_wd=0.3, ema_decay=0.5), 1.0)])
def test_steps_equal_the_reference(changes, scale):
    """Clip, Muon, AdamW and the average over three steps of changing rates, tensor by tensor."""
    config = toy_config(**changes)
    model = random_model(config)
    reference, optimizers = Reference(model, config), Optimizers(model, config, Rank())
    average = Average(optimizers.bank, config)
    for step, rates in enumerate(STEPS):
        grads = random_grads(model, step, scale)
        for name, p in model.named_parameters():
            p.grad.copy_(grads[name])
        optimizers.reduce_and_clip()
        optimizers.step(rates)
        average.update()
        reference.update(grads, rates)
        for name, p in model.named_parameters():
            expected = reference.weights[name]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in averaged(average, model).items():
        torch.testing.assert_close(value, reference.shadow[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adamw_equals_torch_on_separate_tensors():
    """One flat parameter for all control tensors changes nothing: AdamW is elementwise."""
    config = toy_config(grad_clip_norm=0.0)
    model, twin = random_model(config), random_model(config)
    optimizers = Optimizers(model, config, Rank())
    groups = [dict(params=partition(twin)[Role.EMBED], lr=0.03, weight_decay=0.095),
              dict(params=partition(twin)[Role.CONTROL], lr=0.02, weight_decay=0.02)]
    separate = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(3):
        grads = random_grads(model, step)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            p.grad.copy_(grads[name])
            q.grad = grads[name].clone()
        optimizers.reduce_and_clip()
        optimizers.step(Rates(1.0, 0.9))
        separate.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.role is not Role.MATRIX:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("world_size", (1, 2))
def test_the_gradient_norm_is_exact_at_the_records_shapes(world_size):
    """An fp32 norm of a million elements at once is 1e-4 to 2e-3 low on a CPU."""
    config = toy_config(model_dim=256, num_layers=4, mlp_mult=4, recur_layers=(), ve_layers=(3,),
                        parallel_start_layer=2, xsa_last_n=2, grad_clip_norm=0.0)

    def work(runtime):
        model = random_model(config)
        optimizers = Optimizers(model, config, runtime)
        grads = random_grads(model, 3)
        for name, p in model.named_parameters():
            p.grad.copy_(grads[name])
        exact = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().item()
        return optimizers.reduce_and_clip().item(), exact

    for found, exact in on_ranks(world_size, work):
        assert found == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("scale", (1.0, 4e-3, 1e-4))
@pytest.mark.parametrize("world_size", (1, 2))
def test_reduced_gradients_are_the_clipped_mean_over_ranks(scale, world_size):
    config = toy_config(grad_clip_norm=0.3)

    def work(runtime):
        model = random_model(config)
        optimizers, grads = Optimizers(model, config, runtime), random_grads(model, runtime.rank)
        for name, p in model.named_parameters():
            p.grad.copy_(scale * grads[name])
        optimizers.reduce_and_clip()
        for (_, whole, _), mine in zip(optimizers.bank.matrices, optimizers.owned, strict=True):
            whole.copy_(runtime.gather_rows(mine)())
        return grads, {name: p.grad for name, p in model.named_parameters()}

    given_grads, reduced = zip(*on_ranks(world_size, work), strict=True)
    mean = {name: scale * sum(grads[name] for grads in given_grads) / world_size
            for name in given_grads[0]}
    expected, norm = plain.clip(list(mean.values()), 0.3)
    assert (norm > 0.3) == (scale > 1e-3)
    for name, value in zip(mean, expected, strict=True):
        for found in reduced:
            tiny = 1e-6 * value.abs().max().item()
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=tiny)


@pytest.mark.parametrize("world_size", (2, 3, 12))
def test_ranks_together_equal_one_rank(world_size):
    """Ranks get other gradients and own other matrices (some stacks have fewer than ranks)."""
    config = toy_config()

    def work(runtime):
        model = random_model(config)
        optimizers = Optimizers(model, config, runtime)
        mine = range(runtime.rank, 12, runtime.world_size)
        for step, rates in enumerate(STEPS):
            parts = [random_grads(model, 12 * step + i) for i in mine]
            for name, p in model.named_parameters():
                p.grad.copy_(sum(part[name] for part in parts) / len(parts))
            optimizers.reduce_and_clip()
            optimizers.step(rates)
        held = [len(momentum) for momentum in optimizers.momenta]
        return {name: p.detach() for name, p in model.named_parameters()}, held

    (alone, all_momenta), = on_ranks(1, work)
    together = on_ranks(world_size, work)
    for weights, held in together:
        for name, weight in weights.items():
            assert torch.equal(weight, together[0][0][name])
            torch.testing.assert_close(weight, alone[name], rtol=1e-4, atol=2e-5)
        assert held == [-(-count // world_size) for count in all_momenta]  # an equal share each


@pytest.mark.parametrize("steps", (3, 5, 7))
def test_polar_express_maps_singular_values_near_one(steps):
    """Five iterations take all of [.001, 1] into [.8589, 1.1411], as computed elsewhere."""
    config = toy_config(ns_coefficients="polar", muon_backend_steps=steps)
    iterations = Optimizers(random_model(config), config, Rank()).iterations
    s = torch.logspace(-3, 0, 2000, dtype=torch.float64)
    for a, b, c in iterations:
        s = a * s + b * s ** 3 + c * s ** 5
    assert len(iterations) == steps
    if steps == 5:
        assert s.min().item() == pytest.approx(0.8589, abs=1e-4)
        assert s.max().item() == pytest.approx(1.1411, abs=1e-4)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(2, 24, 60), iterations, torch.float32))
    assert steps < 5 or ((values > 0.8) & (values < 1.2)).all()


# ---- schedule ------------------------------------------------------------------------------

shares = st.floats(0, 1)


def test_published_rates():
    rates = schedule(Config(), 2000, 204.6 / 590)
    assert rates.lr_multiplier == pytest.approx(0.907, abs=5e-4)
    assert rates.muon_momentum == 0.99
    assert schedule(Config(), 750, 0.1) == Rates(1.0, pytest.approx(0.955))
    assert schedule(Config(), 0, 0.0) == Rates(1.0, 0.92)
    assert schedule(Config(), 5000, 1.0).lr_multiplier == 0.0


@given(shares, shares, shares)
def test_learning_rate_equals_the_reference(progress, warmdown_frac, min_lr):
    config = toy_config(warmdown_frac=warmdown_frac, min_lr=min_lr)
    expected = plain.lr_multiplier(progress, warmdown_frac, min_lr)
    assert schedule(config, 0, progress).lr_multiplier == pytest.approx(expected)


@given(shares, shares, shares)
def test_learning_rate_never_rises(warmdown_frac, a, b):
    config = toy_config(warmdown_frac=warmdown_frac)
    early, late = (schedule(config, 0, progress).lr_multiplier for progress in sorted((a, b)))
    assert 1 >= early >= late >= 0


@given(st.integers(0, 4000), st.integers(0, 2000))
def test_momentum_by_steps_equals_the_reference(step, warmup_steps):
    config = toy_config(muon_momentum_warmup_steps=warmup_steps)
    expected = plain.muon_momentum(step, warmup_steps)
    assert schedule(config, step, 0.5).muon_momentum == pytest.approx(expected)


@given(shares, shares, st.integers(0, 4000))
def test_momentum_by_share_of_the_run_ignores_steps(progress, frac, step):
    config = toy_config(muon_momentum_warmup_frac=frac)
    share = 1.0 if frac == 0 else min(progress / frac, 1.0)
    found = schedule(config, step, progress).muon_momentum
    assert found == pytest.approx(0.92 + share * 0.07)


@given(st.integers(0, 100), st.integers(0, 100), shares, shares)
def test_recurrence_starts_once_by_step_or_by_share(step, start, progress, frac):
    by_step, by_share = toy_config(recur_start_step=start), toy_config(recur_start_frac=frac)
    for config, begun in ((by_step, step >= start), (by_share, progress >= frac)):
        trainer = trainer_of(config)
        trainer.state.step = step
        assert trainer.due_phase(progress) == begun
        trainer.state.phase = 1
        assert trainer.due_phase(progress) == 1, "no phase is gone back to"


def test_phases_are_the_orders_of_the_run():
    first, recurrent = phases(Config())
    assert (first.start.done(0, 0.0), recurrent.start) == (1.0, (2000, None))
    assert [first.layout, recurrent.layout] == layouts_of(Config())
    (only,) = phases(toy_config(recur_layers=()))
    assert only.layout.order == tuple(range(11))


# ---- average -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_average_follows_the_reference_in_fp32(dtype):
    model = random_model(toy_config(), dtype=dtype)
    bank = Bank(partition(model))
    average = Average(bank, toy_config(ema_decay=0.75))
    expected = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn(p.shape))
                expected[name] = plain.ema_step(expected[name], p.float(), 0.75)
        average.update()
    state = averaged(average, model)
    assert list(state) == [name for name, _ in model.named_parameters()]
    for name, value in state.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
    average.apply()
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name].to(p.dtype))


# ---- gradients of a step, warm-up ----------------------------------------------------------


class Windows:
    """Stands in for Loader: the same random windows for every reader of a step."""

    def batch(self, step, longest=0):
        return Batch.of_windows(random_tokens(toy_config(), 8, 9, seed=step))


def trainer_of(config, dtype=torch.float32):
    model = random_model(config, dtype=dtype)
    optimizers = Optimizers(model, config, Rank(dtype=dtype))
    average = Average(optimizers.bank, config)
    state = TrainState(model, optimizers, average)
    return Trainer(state, config, Rank(dtype=dtype), Log(False), Clock())


@given(st.integers(1, 400), st.integers(1, 500), st.integers(1, 8))
def test_micro_batches_split_evenly_within_their_limit(windows, most, world_size):
    config = toy_config(train_batch_tokens=8 * windows * world_size, micro_batch_tokens=8 * most)
    size = micro_batch_sequences(config, world_size)
    assert windows % size == 0 and size <= most
    assert not any(windows % n == 0 for n in range(size + 1, min(windows, most) + 1))


@pytest.mark.parametrize("micro_batch_tokens", (8, 16, 39))
def test_micro_batches_change_no_gradient(micro_batch_tokens):
    def gradients(**changes):
        config = toy_config(grad_clip_norm=0.0, **changes)
        trainer = trainer_of(config)
        loss = trainer.update(Windows().batch(0), layouts_of(config)[1], Rates(0.0, 0.9))
        return loss, trainer.state.optimizers.bank.grads[torch.float32]

    whole, parts = gradients(), gradients(micro_batch_tokens=micro_batch_tokens)
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-4 * whole[1].std().item())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_warm_up_leaves_no_trace(dtype):
    trainer = trainer_of(toy_config(warmup_steps=4), dtype)
    optimizers, random_state = trainer.state.optimizers, torch.get_rng_state()
    before = {d: flat.clone() for d, flat in optimizers.bank.weights.items()}
    trainer.warm_up()
    assert all(torch.equal(flat, before[d]) for d, flat in optimizers.bank.weights.items())
    assert not any(flat.any() for flat in optimizers.bank.grads.values())
    assert not any(momentum.any() for momentum in optimizers.momenta)
    assert len(optimizers.adamw.state) == 0 and trainer.state.step == 0
    assert torch.equal(random_state, torch.get_rng_state())
    assert len(trainer.step_seconds) == 2 and all(trainer.step_seconds), "each was timed"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_is_the_same_bit_for_bit_with_and_without_warm_up(dtype):
    def train(warmup_steps):
        config = toy_config(iterations=2, recur_start_step=1, warmup_steps=warmup_steps)
        trainer = trainer_of(config, dtype)
        if warmup_steps:
            trainer.warm_up()
        trainer.train(Windows(), 0.0, lambda: Score(1.0, 1, 1), Path("never-written"))
        assert trainer.state.step == 2
        return [*trainer.state.optimizers.bank.weights.values(),
                *trainer.state.average.shadow.values()]

    cold, warm = train(0), train(4)
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))


def test_training_lowers_the_loss():
    """All parts together learn four windows by heart."""
    config = toy_config(warmdown_frac=0.3, recur_start_step=5)
    trainer = trainer_of(config)
    batch, layout = Batch.of_windows(random_tokens(config, 4, 9)), layouts_of(config)[1]
    losses = [trainer.update(batch, layout, schedule(config, i, i / 40)) for i in range(40)]
    assert losses[-1].item() < 0.5 * losses[0].item()
