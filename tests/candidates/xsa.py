"""XSA: each head's output less its component along its own position's value, one pass each way.

One program takes 32 tokens of one key/value head with all query heads of its group, so the values
and the gradient by them are read and written once. Arithmetic is fp32; the result has the dtype
of the attention's output, where the script's plain form returns fp32 and rounds right after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from candidates._triton import jit, tl, triton

EPS, BLOCK_N = 1e-12, 32


def plain(out_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Return (B, T, H, K) in the dtype of the output; fp32 inside. Source: PR #287."""
    v = F.normalize(v_BTGK.float(), dim=-1, eps=EPS).unsqueeze(3)
    grouped = out_BTHK.float().unflatten(2, (v_BTGK.shape[2], -1))
    return (grouped - (grouped * v).sum(-1, keepdim=True) * v).flatten(2, 3).to(out_BTHK.dtype)


@jit
def exclude_kernel(heads, values, grad, out, by_values, N, G, eps, K: tl.constexpr,
                   GROUP: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):
    """Of BLOCK_N tokens of one value head: out = the result, or the gradients by both inputs."""
    group = tl.program_id(1)
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    spot = n.to(tl.int64) * G + group
    at_value = spot[:, None] * K + k[None, :]
    v = tl.load(values + at_value, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(v * v, 1))
    scale = 1.0 / tl.maximum(length, eps)
    v *= scale[:, None]
    by_unit = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for member in tl.static_range(GROUP):
        at = (spot[:, None] * GROUP + member) * K + k[None, :]
        o = tl.load(heads + at, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(o * v, 1)[:, None]
        result = o - along * v
        if BACKWARD:
            d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            d_along = tl.sum(d * v, 1)[:, None]
            result = d - d_along * v
            by_unit -= along * d + d_along * o
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if BACKWARD:  # through the normalisation: below eps the scale is a constant
        radial = tl.where(length > eps, tl.sum(by_unit * v, 1), 0.0)
        found = (by_unit - radial[:, None] * v) * scale[:, None]
        tl.store(by_values + at_value, found.to(by_values.dtype.element_ty), mask=inside)


def launch(out: Tensor, v: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (result, nothing) or, where `grad` is given, the gradients by `out` and by `v`."""
    out, v, (batch, length, groups, width) = out.contiguous(), v.contiguous(), v.shape
    result, by_values, tokens = torch.empty_like(out), torch.empty_like(v), batch * length
    given = out if grad is None else grad.contiguous()
    exclude_kernel[(triton.cdiv(tokens, BLOCK_N), groups)](
        out, v, given, result, by_values, tokens, groups, EPS, width, out.shape[2] // groups,
        grad is not None, BLOCK_N, triton.next_power_of_2(width), num_warps=4)
    return result, by_values


@torch.library.custom_op("candidates::exclude_self", mutates_args=())
def exclude_self(out: Tensor, v: Tensor) -> Tensor:
    """Return `plain`'s result."""
    return launch(out, v, None)[0]


@exclude_self.register_fake
def _(out, v):
    return out.new_empty(out.shape)


@torch.library.custom_op("candidates::exclude_self_backward", mutates_args=())
def exclude_self_backward(grad: Tensor, out: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by both inputs."""
    return launch(out, v, grad)


@exclude_self_backward.register_fake
def _(grad, out, v):
    return out.new_empty(out.shape), v.new_empty(v.shape)


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return exclude_self_backward(grad, *ctx.saved_tensors)


exclude_self.register_autograd(backward, setup_context=keep_inputs)


def fused(out_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Return what `plain` returns."""
    return exclude_self(out_BTHK, v_BTGK)
