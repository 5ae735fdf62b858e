"""Asymmetric calibration: weights aimed at the full model's outputs given the quantised inputs.

A matrix behind quantised ones sees other inputs than the ones its weights were trained for. Its
target becomes W E[x x̂T] E[x̂ x̂T]^-1, the least-squares map from the inputs x̂ it will see to the
outputs it should give, and GPTQ then works on that target with the Hessian of x̂.
Source: GPTAQ (arXiv 2504.02692), here for all matrices at once from a first quantised model, not
layer after layer, since a repeated layer has inputs from several depths. Judged by
`bench_quantize.py`, row "asymmetric targets".
"""

import torch

DAMP = 0.01  # of the mean diagonal: where x̂ says little, the trained weights stay


def observe(model, weights, batch, layout, names):
    """Return the inputs (n, C) that each named module saw, those of repeated layers one by one."""
    seen = {name: [] for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(
                   lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2)))
               for name in names]
    model.load_state_dict(weights)
    with torch.inference_mode():
        model(batch, layout)
    for handle in handles:
        handle.remove()
    return seen


def paired_moments(model, weights, quantised, batches, layout, names):
    """Return by module (mean x̂ x̂T, mean x x̂T), both (C, C): x of the weights, x̂ of the others."""
    moments, tokens = {}, 0
    for batch in batches:
        full = observe(model, weights, batch, layout, names)
        rough = observe(model, quantised, batch, layout, names)
        tokens += batch.tokens.numel()
        for name in names:
            found = torch.stack([sum(a.T @ b for a, b in zip(pair, rough[name], strict=True))
                                 for pair in (rough[name], full[name])])
            moments[name] = moments.get(name, 0) + found
    return {name: tuple(found / tokens) for name, found in moments.items()}


def asymmetric_targets(weights, moments):
    """Return (weights aimed anew, Hessians by weight); tables that are looked up stay."""
    aimed, hessians = dict(weights), {}
    for module, (hessian, cross) in moments.items():
        name = f"{module}.weight"
        hessians[name] = hessian
        hessian, cross = hessian.double(), cross.double()
        damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
        move = torch.linalg.solve(damped, (cross - hessian).T).T
        w = weights[name].double()
        aimed[name] = (w + w @ move).float()
    return aimed, hessians
