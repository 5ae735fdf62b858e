"""Queries and keys: RMS norm, partial rotation and gain per head in one pass each way.

One program takes 64 tokens of one head. An element's partner in its rotated pair is read a second
time, from L1, which spares a shuffle and lets one formula serve rotated and plain dimensions. The
gradient by the gains is summed per program and then over programs: no atomics, one order always.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from candidates._triton import jit, tl, triton

EPS, BLOCK_N = 2.0 ** -23, 64


def plain(x_BTHK: Tensor, gain_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (B, T, H, K): unit mean square, pairs (i, i + R/2) of the first R turned, times gain.

    cos, sin: (T, R/2), in the dtype of x.
    """
    x, half = F.rms_norm(x_BTHK, x_BTHK.shape[-1:], eps=EPS), cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)
    return turned * gain_H.to(turned.dtype)[:, None]


@jit
def turn_kernel(x, gain, cos, sin, grad, out, by_gain, N, T, H, eps, K: tl.constexpr,
                HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """Of BLOCK_N tokens of one head: out = the result, or the gradient by x and by the gain."""
    block, head = tl.program_id(0), tl.program_id(1)
    n, k = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mate = tl.where(k < HALF, k + HALF, tl.where(k < 2 * HALF, k - HALF, k))
    inside = (n < N)[:, None] & (k < K)[None, :]
    row = (n.to(tl.int64) * H + head)[:, None] * K
    spot = (n % T)[:, None] * HALF + (k % HALF)[None, :]
    turned = inside & (k < 2 * HALF)[None, :]
    c = tl.load(cos + spot, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + spot, mask=turned, other=0.0).to(tl.float32)
    s = tl.where((k < HALF)[None, :], s, -s)
    a = tl.load(x + row + k[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + row + mate[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gain + head).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a, 1) / K + eps)[:, None]
    result = (a * c + b * s) * r
    if BACKWARD:
        d = tl.load(grad + row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        e = tl.load(grad + row + mate[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(by_gain + block * H + head, tl.sum(tl.sum(d * result, 1), 0))
        back = (d * c - e * s) * g  # turned back
        result = r * (back - a * r * (tl.sum(back * a * r, 1) / K)[:, None])
    else:
        result *= g
    tl.store(out + row + k[None, :], result.to(out.dtype.element_ty), mask=inside)


def launch(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor,
           grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (result, nothing) or, where `grad` is given, the gradients by x and by the gain."""
    x, (batch, length, heads, width) = x.contiguous(), x.shape
    tokens = batch * length
    blocks = triton.cdiv(tokens, BLOCK_N)
    out, given = torch.empty_like(x), x if grad is None else grad.contiguous()
    by_gain = torch.empty(blocks, heads, dtype=torch.float32, device=x.device)
    turn_kernel[(blocks, heads)](
        x, gain, cos.contiguous(), sin.contiguous(), given, out, by_gain, tokens, length, heads,
        EPS, width, cos.shape[-1], grad is not None, BLOCK_N, triton.next_power_of_2(width),
        num_warps=4)
    return out, by_gain


@torch.library.custom_op("candidates::norm_turn", mutates_args=())
def norm_turn(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `plain`'s result, worked out in fp32 and rounded once."""
    return launch(x, gain, cos, sin, None)[0]


@norm_turn.register_fake
def _(x, gain, cos, sin):
    return x.new_empty(x.shape)


@torch.library.custom_op("candidates::norm_turn_backward", mutates_args=())
def norm_turn_backward(grad: Tensor, x: Tensor, gain: Tensor, cos: Tensor,
                       sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by the gain."""
    by_x, by_gain = launch(x, gain, cos, sin, grad)
    return by_x, by_gain.sum(0).to(gain.dtype)


@norm_turn_backward.register_fake
def _(grad, x, gain, cos, sin):
    return x.new_empty(x.shape), gain.new_empty(gain.shape)


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return (*norm_turn_backward(grad, *ctx.saved_tensors), None, None)


norm_turn.register_autograd(backward, setup_context=keep_inputs)


def fused(x_BTHK: Tensor, gain_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `plain` returns."""
    return norm_turn(x_BTHK, gain_H.to(x_BTHK.dtype), cos, sin)


def attention_forward(self, x_BTD, here):
    """The script's Attention.forward with `fused` in it."""
    v = self.v(x_BTD)
    if self.value_row is not None:
        v = v + here.value * here.value_scales[self.value_row]
    q = self.q(x_BTD[:, here.kept]).unflatten(-1, (self.heads, -1))
    k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (self.k(x_BTD), v))
    q = fused(q, self.q_gain, *(table[here.kept] for table in here.rotary))
    k = fused(k, q.new_ones(self.kv_heads), *here.rotary)
    out = self.exclude_self(self.attend(q, k, v), v[:, here.kept])
    return self.out(out.flatten(2).to(x_BTD.dtype))
