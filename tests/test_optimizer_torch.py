"""Where the script's optimizers coincide with PyTorch's own, whole steps give the same weights."""

import math

import plain
import pytest
import torch
from toys import (
    Rank,
    on_ranks,
    random_model,
    steady,  # noqa: F401
    toy_config,
)

from train_gpt import Optimizers, Rates, Role, partition

EVEN = dict(ve_dim=6, grad_clip_norm=0.0)  # every matrix has an even number of columns


def turned_gradient(shape, start, angles):
    """Return gradients whose momentum has equally long rows, whatever the momentum's coefficient.

    All are one matrix of unit rows, turned by one angle in every plane of neighbouring columns
    and scaled: such turns add up to a turn again. So row normalisation, which torch's Muon lacks,
    divides by one number, and Newton-Schulz, which begins by normalising, does not see it.
    """
    rows, columns = shape
    unit = torch.nn.functional.normalize(start, dim=1).view(rows, columns // 2, 2)
    found = []
    for step, angle in enumerate(angles):
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, sin], [-sin, cos]])
        found.append((unit @ turn).reshape(rows, columns) * (1 + step))
    return found


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon (2.9 has)")
@pytest.mark.parametrize("world_size", (1, 2))
def test_muon_steps_equal_torchs(world_size):
    """Nesterov momentum, orthogonalisation in bf16, scale by shape and decay, over six steps."""
    config = toy_config(**EVEN, matrix_lr=0.05, muon_wd=0.3)
    rates = [Rates(multiplier, 0.9) for multiplier in (1.0, 1.0, 0.8, 0.6, 0.4, 0.2)]
    angles = [0.0, 0.5, 1.3, 1.1, 0.2, -0.7]

    def gradients(p, number):
        generator = torch.Generator().manual_seed(number)
        return turned_gradient(p.shape, torch.randn(p.shape, generator=generator), angles)

    def work(runtime):
        runtime.compute_dtype = torch.bfloat16
        model = random_model(config)
        optimizers, matrices = Optimizers(model, config, runtime), partition(model)[Role.MATRIX]
        grads = [gradients(p, i) for i, p in enumerate(matrices)]
        for step, rate in enumerate(rates):
            for p, own in zip(matrices, grads, strict=True):
                p.grad.copy_(own[step])
            optimizers.reduce_and_clip()
            optimizers.step(rate)
        return [p.detach() for p in matrices]

    weights = partition(random_model(config))[Role.MATRIX]
    starts = [w.detach().clone() for w in weights]
    theirs = torch.optim.Muon(weights, lr=1.0, weight_decay=0.3, momentum=0.9, ns_steps=5)
    grads = [gradients(p, i) for i, p in enumerate(weights)]
    for step, rate in enumerate(rates):
        theirs.param_groups[0]["lr"] = config.matrix_lr * rate.lr_multiplier
        for p, own in zip(weights, grads, strict=True):
            p.grad = own[step].clone()
        theirs.step()
    for ours in on_ranks(world_size, work):
        for found, expected, start in zip(ours, weights, starts, strict=True):
            moved = (expected - start).norm()
            assert (found - expected).norm() < 0.02 * moved, tuple(start.shape)


@pytest.mark.parametrize("world_size", (1, 2))
def test_banked_muon_equals_plain_muon_over_twenty_steps(world_size):
    """One batched orthogonalisation per shape changes no weight by more than 1e-6, in fp32."""
    config = toy_config(grad_clip_norm=0.0)
    rates = [Rates(1 - step / 20, 0.9 + 0.004 * step) for step in range(20)]

    def gradients(step, number, shape):
        generator = torch.Generator().manual_seed(1000 * step + number)
        return torch.randn(shape, generator=generator)

    def work(runtime):
        model = random_model(config)
        optimizers, matrices = Optimizers(model, config, runtime), partition(model)[Role.MATRIX]
        for step, rate in enumerate(rates):
            for i, p in enumerate(matrices):
                p.grad.copy_(gradients(step, i, p.shape))
            optimizers.reduce_and_clip()
            optimizers.step(rate)
        return [p.detach() for p in matrices]

    expected = []
    for i, p in enumerate(partition(random_model(config))[Role.MATRIX]):
        weight, buffer = p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)
        for step, rate in enumerate(rates):
            weight, buffer = plain.muon_step(
                weight, gradients(step, i, p.shape).double(), buffer,
                config.matrix_lr * rate.lr_multiplier, rate.muon_momentum, config.muon_wd,
                config.muon_backend_steps, torch.float64)
        expected.append(weight.float())
    for ours in on_ranks(world_size, work):
        for found, weight in zip(ours, expected, strict=True):
            torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_adamw_follows_changing_rates_and_a_restart_like_torchs(dtype):
    """Tables in either dtype; after `reset` the moments and the step count start again."""
    config = toy_config(grad_clip_norm=0.0, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    model, twin = random_model(config, dtype=dtype), random_model(config, dtype=dtype)
    optimizers = Optimizers(model, config, Rank())
    groups = [dict(params=partition(twin)[role], lr=lr, peak=lr, weight_decay=decay)
              for role, lr, decay in ((Role.EMBED, config.tied_embed_lr, config.embed_wd),
                                      (Role.CONTROL, config.scalar_lr, config.adam_wd))]

    def fresh():
        return torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6, foreach=False)

    theirs = fresh()
    for step, multiplier in enumerate((1.0, 0.5, 0.25, 1.0, 0.1)):
        if step == 3:
            optimizers.reset()
            theirs = fresh()
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad.copy_(grad)
            q.grad = grad.clone()
        for group in theirs.param_groups:
            group["lr"] = group["peak"] * multiplier
        optimizers.reduce_and_clip()
        optimizers.step(Rates(multiplier, 0.9))
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.role is not Role.MATRIX:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
