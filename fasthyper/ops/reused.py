"""W of a layer that meets the same z again and again, as in a recurrent network: written out once, where it fits.

Each call of a layer generates W anew, in tiles. From the fourth call with one z on, W is a node of autograd's graph,
which all further calls multiply with: it is computed once, and the sum of its gradients is contracted with the head
once. The results' graph alone keeps W, so that it lives as long as a backward may need it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .. import backends, planner
from ..problem import AUTO
from . import autocast, checkpoints, kept, shapes
from .register import MISSING, transformed

_CALLS = 3  # as many cost about what W written out costs, so that one call more is never much slower
_FEWEST = 48  # features of z; with fewer, to generate W costs little more than to read it
_MOST = 1 << 12
_KEY = "fasthyper.reused"
_ARGUMENTS = ("x", "z", "weight", "bias", "base_weight", "base_bias")


class _Met:
    """The z of a layer's last call, how many calls have met it, and W, if it is written out."""

    __slots__ = ("calls", "state", "w", "z")

    def __init__(self, z: Tensor, state: tuple[object, ...]) -> None:
        self.z, self.state, self.calls = weakref.ref(z), state, 1
        self.w: TensorWeakRef | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.met: dict[int, _Met] = {}  # by the memory of the head


_thread = _Thread()


def product(
    origin: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
) -> Tensor | None:
    """Return y of a call that meets a z for the fourth time or more, or None: the op computes it.

    `origin` is z as the caller has it, before a cast; the others are arguments of the op.
    """
    w = _weights(origin, z, weight, base_weight)
    if w is None:
        return None
    given = x, z, weight, bias, base_weight, base_bias
    shapes.check(shapes.LINEAR, dict(zip(_ARGUMENTS, given, strict=True)), optional=_ARGUMENTS[3:])
    with autocast.off(x):
        y = kept.product(w, x, z, bias, base_bias)
    assert y.grad_fn is not None
    metadata: Any = y.grad_fn.metadata
    metadata[_KEY] = w  # autograd saves the memory of W, and not the tensor with its node
    return y


def _weights(origin: Tensor, z: Tensor, weight: Tensor, base_weight: Tensor | None) -> Tensor | None:
    if torch.compiler.is_compiling() or origin.grad_fn is None or weight.shape[-1] < _FEWEST:
        return None
    if MISSING or not torch.is_grad_enabled():
        return None
    parts = z, weight, base_weight
    if any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in parts) or transformed():
        return None
    known, key = _thread.met, weight.data_ptr()
    state = origin._version, z.dtype, _identity(weight), base_weight is None or _identity(base_weight)
    met = known.get(key)
    if met is None or met.z() is not origin or met.state != state:
        if len(known) >= _MOST:
            known.clear()
        known[key] = _Met(origin, state)
        return None
    met.calls += 1
    if met.calls <= _CALLS or not _fits(z, weight) or checkpoints.may_be_active():
        return None
    w = None if met.w is None else met.w()
    if w is None:
        with autocast.off(z):
            w = _Weights.apply(*parts)
        met.w = TensorWeakRef(w)
    return w


def _identity(t: Tensor) -> tuple[object, ...]:
    """Return what tells whether a parameter is the same: a view is made anew in each call, and has the same version."""
    return t.data_ptr(), t._version, t.shape, t.stride()


def _fits(z: Tensor, weight: Tensor) -> bool:
    B, (O, I, _) = z.shape[0], weight.shape
    size = kept.COPIES * B * O * I * z.element_size()
    return size <= planner.get_workspace_limit() and backends.current() == (AUTO, AUTO)


class _Weights(torch.autograd.Function):
    """W[b] = H·z[b] + W0.

    Several backward passes may come here, one for each result, where each call for itself would allow them: what this
    node needs is not freed after the first, unlike saved tensors.
    """

    @staticmethod
    def forward(ctx, z, weight, base_weight):
        ctx.parts, ctx.versions = (z, weight), (z._version, weight._version)
        return kept.generate(z, weight, base_weight)

    @staticmethod
    def backward(ctx, dw):
        z, weight = ctx.parts
        if (z._version, weight._version) != ctx.versions:
            raise RuntimeError("z or weight has been changed in place since the forward, and its gradient needs it")
        with autocast.off(dw):
            return kept.grads_of_parts(dw, z, weight, ctx.needs_input_grad)
