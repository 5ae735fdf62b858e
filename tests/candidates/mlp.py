"""MLP with leaky ReLU (0.5) squared in the epilogue of a matrix product, in both directions.

Forward: one kernel writes the pre-activation and the activation from the product's accumulators.
Backward: one kernel computes the gradient by the activation tile by tile, never stores it, and
writes the gradient by the pre-activation together with the activation, recomputed from the saved
pre-activation. The other four products are the library's. Rounding points are those of the plain
form, so every tensor in memory is what PyTorch would have written there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from candidates._triton import jit, tl, triton


def plain(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Return (B, T, D): linear, leaky ReLU (0.5) squared in fp32, linear."""
    hidden = F.leaky_relu(F.linear(x_BTD, up_HD.to(x_BTD.dtype)), 0.5).float().square()
    return F.linear(hidden.to(x_BTD.dtype), down_DH.to(x_BTD.dtype))


class Tile(NamedTuple):
    """Rows, columns and depth of one program's tile, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Depth is the same in all, so that sums run in one order and every tile gives the same bits. The
# first is used: two programs fit a Hopper SM, one stores its two outputs while the other multiplies
TILES = [Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)]


@jit
def activation_kernel(left, right, saved, pre, act, M, N, K, step_k, step_n,
                      BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr):
    """Of left (M, K) @ right (K, N), one tile, store by rows of N:

    forward: pre = the product, act = leaky(pre)^2; backward, where the product is the gradient by
    act and `saved` the pre-activation: pre = the gradient by it, act = leaky(saved)^2.
    """
    across = tl.cdiv(N, BLOCK_N)  # neighbours share rows of `left`; `right` stays in L2 anyway
    first_m = tl.program_id(0) // across * BLOCK_M
    first_n = tl.program_id(0) % across * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # outside the matrices any row or column will do, it is never stored; % keeps columns adjacent
    row, column = tl.minimum(m, M - 1 - first_m), (first_n + n) % N
    lefts = left + first_m.to(tl.int64) * K + (row[:, None] * K + k[None, :])
    rights = right + k[:, None] * step_k + column[None, :] * step_n
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        within = k < K - start
        a = tl.load(lefts, mask=within[None, :], other=0.0)
        b = tl.load(rights, mask=within[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        lefts += BLOCK_K
        rights += BLOCK_K * step_k
    kind = pre.dtype.element_ty
    corner = first_m.to(tl.int64) * N + first_n  # 64 bits once, 32 for each element
    at = m[:, None] * N + n[None, :]
    inside = (m < M - first_m)[:, None] & (n < N - first_n)[None, :]
    rounded = product.to(kind)
    before = rounded
    if BACKWARD:
        before = tl.load(saved + corner + at, mask=inside, other=0.0)
    u = before.to(tl.float32)
    leaky = tl.where(u > 0, u, 0.5 * u)
    tl.store(act + corner + at, (leaky * leaky).to(kind), mask=inside)
    if BACKWARD:
        by_leaky = (rounded.to(tl.float32) * (2.0 * leaky)).to(kind).to(tl.float32)
        rounded = tl.where(u > 0, by_leaky, 0.5 * by_leaky).to(kind)
    tl.store(pre + corner + at, rounded, mask=inside)


def launch(left_MK: Tensor, right_KN: Tensor, saved_MN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (pre, act) of `activation_kernel`; backward where `saved_MN` is given."""
    (rows, depth), columns, tile = left_MK.shape, right_KN.shape[1], TILES[0]
    left_MK = left_MK.contiguous()
    pre, act = left_MK.new_empty(rows, columns), left_MK.new_empty(rows, columns)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    activation_kernel[grid](
        left_MK, right_KN, pre if saved_MN is None else saved_MN, pre, act, rows, columns, depth,
        *right_KN.stride(), saved_MN is not None, tile.rows, tile.columns, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages)
    return pre, act


@torch.library.custom_op("candidates::mlp_forward", mutates_args=())
def mlp_forward(x_MD: Tensor, up_HD: Tensor, down_DH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (M, D) and the pre-activation (M, H) that the backward needs."""
    pre, act = launch(x_MD, up_HD.T, None)
    return act @ down_DH.T, pre


@mlp_forward.register_fake
def _(x_MD, up_HD, down_DH):
    return (x_MD.new_empty(x_MD.shape[0], down_DH.shape[0]),
            x_MD.new_empty(x_MD.shape[0], up_HD.shape[0]))


@torch.library.custom_op("candidates::mlp_backward", mutates_args=())
def mlp_backward(grad_MD: Tensor, down_DH: Tensor, pre_MH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient by the pre-activation and the activation, both (M, H)."""
    return launch(grad_MD, down_DH, pre_MH)


@mlp_backward.register_fake
def _(grad_MD, down_DH, pre_MH):
    return torch.empty_like(pre_MH), torch.empty_like(pre_MH)


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad_MD, _):
    x_MD, up_HD, down_DH, pre_MH = ctx.saved_tensors
    by_pre, act = mlp_backward(grad_MD, down_DH, pre_MH)
    return by_pre @ up_HD, by_pre.T @ x_MD, grad_MD.T @ act


mlp_forward.register_autograd(backward, setup_context=keep_inputs)


def fused(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Return what `plain` returns."""
    weights = up_HD.to(x_BTD.dtype), down_DH.to(x_BTD.dtype)
    return mlp_forward(x_BTD.flatten(0, -2), *weights)[0].unflatten(0, x_BTD.shape[:-1])
