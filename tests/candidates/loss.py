"""Softcapped cross-entropy: loss and gradient in one pass over the logits.

The bf16 logits are written once by the library's matrix product. One program then takes one row:
it reads the row into registers, finds the loss and writes the gradient over the row, so nothing
of size N x V in fp32 ever reaches memory and the backward is two matrix products.

The stored gradient is that of the mean over the rows. The gradient arriving from a mean is then
one (or 1 / number of micro-batches), so scaling by it rounds nothing and the rounding points are
the plain form's: bf16 logits, fp32 loss, bf16 gradient. Any other weighting of the rows is right
too, with one rounding more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from candidates._triton import jit, tl


def plain(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Return the loss in nats of each target (N,), fp32, under the softcapped logits."""
    raw_NV = F.linear(hidden_ND, head_VD.to(hidden_ND.dtype)).float()
    return F.cross_entropy(cap * torch.tanh(raw_NV / cap), targets_N, reduction="none")


@jit
def loss_kernel(logits, targets, losses, cap, scale, V, WITH_GRAD: tl.constexpr,
                BLOCK_V: tl.constexpr):
    """Of one row of logits: store the loss and, over the row, the gradient of scale * loss."""
    row = logits + tl.program_id(0).to(tl.int64) * V  # N x V passes 2^31 at 262,144 x 8192
    at = tl.arange(0, BLOCK_V)
    inside = at < V
    target = tl.load(targets + tl.program_id(0))
    chosen = tl.load(row + target).to(tl.float32)  # before the row is overwritten
    raw = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    below = 2.0 / (1.0 + tl.exp(raw * (2.0 / cap)))  # 1 - tanh(raw / cap), safe for any raw
    capped = tl.where(inside, cap - cap * below, -float("inf"))
    top = tl.max(capped, 0)
    mass = tl.exp(capped - top)
    total = tl.sum(mass, 0)
    expected = cap - cap * (2.0 / (1.0 + tl.exp(chosen * (2.0 / cap))))
    tl.store(losses + tl.program_id(0), top + tl.log(total) - expected)
    if WITH_GRAD:
        slope = below * (2.0 - below)  # 1 - tanh^2, without cancellation
        grad = (mass * (scale / total) - tl.where(at == target, scale, 0.0)) * slope
        tl.store(row + at, grad.to(logits.dtype.element_ty), mask=inside)


@torch.library.custom_op("candidates::softcap_loss", mutates_args=())
def softcap_loss(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, cap: float,
                 with_grad: bool) -> tuple[Tensor, Tensor]:
    """Return losses (N,), fp32, and their mean's gradient by the logits (N, V), or an empty one."""
    logits, rows, vocab = hidden_ND @ head_VD.T, len(hidden_ND), len(head_VD)
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = max(16, 1 << (vocab - 1).bit_length())
    warps = min(32, max(4, block // 512))  # 16 values a thread at V = 8192: two rows share an SM
    loss_kernel[(rows,)](logits, targets_N.contiguous(), losses, cap, 1.0 / rows, vocab, with_grad,
                         block, num_warps=warps)
    return losses, logits if with_grad else logits.new_empty(0)


@softcap_loss.register_fake
def _(hidden_ND, head_VD, targets_N, cap, with_grad):
    rows = hidden_ND.shape[0]
    shape = (rows, head_VD.shape[0]) if with_grad else (0,)
    return hidden_ND.new_empty(rows, dtype=torch.float32), hidden_ND.new_empty(shape)


def keep_gradient(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def loss_backward(ctx, grad_N, _):
    hidden_ND, head_VD, by_logits_NV = ctx.saved_tensors
    weight = (grad_N * len(hidden_ND))[:, None]
    by_hidden = ((by_logits_NV @ head_VD) * weight).to(hidden_ND.dtype)
    by_head = by_logits_NV.T @ (hidden_ND * weight).to(hidden_ND.dtype)
    return by_hidden, by_head, None, None, None


softcap_loss.register_autograd(loss_backward, setup_context=keep_gradient)


def fused(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Return what `plain` returns."""
    with_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    return softcap_loss(hidden_ND, head_VD.to(hidden_ND.dtype), targets_N, cap, with_grad)[0]
