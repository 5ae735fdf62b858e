"""The candidates by name: their inputs at given sizes, and how each is put into the script."""

from __future__ import annotations

import contextlib
from typing import Callable, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from candidates import loss, mlp, qk, xsa

CAP = 30.0


class Sizes(NamedTuple):
    """Sizes of a model and a batch, by the letters of the script's dimension key."""

    batch: int
    length: int
    dim: int
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    width: int
    half: int  # rotated pairs a head


FULL = Sizes(48, 2048, 512, 8192, 2048, 8, 4, 64, 8)  # 98,304 tokens: one of eight GPUs' share
# No size a multiple of a block; the last has one token, and rotates whole heads.
ODD = [Sizes(2, 35, 24, 77, 140, 6, 3, 12, 4), Sizes(1, 130, 40, 129, 132, 3, 1, 20, 1),
       Sizes(1, 1, 8, 5, 9, 2, 2, 6, 3)]


class Candidate(NamedTuple):
    """A fused and a plain form of one signature.

    inputs: (sizes, make) -> arguments, where make(*shape) gives random numbers of the dtype under
    test. patches: what takes the fused form's place in the script, by dotted name. learned: how
    many of the arguments, from the first on, have a gradient.
    """

    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: Callable[..., tuple]
    patches: dict[str, Callable]
    learned: int = 2


def loss_inputs(s: Sizes, make) -> tuple:
    tokens = s.batch * s.length
    hidden, head = make(tokens, s.dim), make(s.vocab, s.dim)
    return hidden, head, torch.arange(tokens, device=hidden.device) * 7919 % s.vocab, CAP


def mlp_inputs(s: Sizes, make) -> tuple:
    up, down = make(s.hidden, s.dim) * s.dim ** -0.5, make(s.dim, s.hidden) * s.hidden ** -0.5
    return make(s.batch, s.length, s.dim), up, down


def qk_inputs(s: Sizes, make) -> tuple:
    angles = make(s.length, s.half) * 3
    q = make(s.batch, s.length, s.heads, s.width)
    return q, make(s.heads) + 5, angles.cos(), angles.sin()


def xsa_inputs(s: Sizes, make) -> tuple:
    out, v = (make(s.batch, s.length, n, s.width) for n in (s.heads, s.kv_heads))
    v[0, 1:2] = 0.0  # has no direction
    return out, v


CANDIDATES = {  # the largest expected gain first
    "mlp": Candidate(mlp.fused, mlp.plain, mlp_inputs, {
        "MLP.forward": lambda self, x_BTD: mlp.fused(x_BTD, self.up.weight, self.down.weight)},
        learned=3),
    "xsa": Candidate(xsa.fused, xsa.plain, xsa_inputs, {"exclude_self": xsa.fused}),
    "qk": Candidate(qk.fused, qk.plain, qk_inputs, {"Attention.forward": qk.attention_forward}),
    "loss": Candidate(loss.fused, loss.plain, loss_inputs, {"softcap_cross_entropy": loss.fused}),
}


@contextlib.contextmanager
def swapped(script, names):
    """Put the named candidates into the module `script`: build and compile the model inside."""
    with contextlib.ExitStack() as stack:
        for name in names:
            for path, replacement in CANDIDATES[name].patches.items():
                *owners, attribute = path.split(".")
                owner = getattr(script, owners[0]) if owners else script
                stack.enter_context(mock.patch.object(owner, attribute, replacement))
        yield
