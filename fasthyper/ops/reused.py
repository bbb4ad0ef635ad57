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


_VIEWS = {f"{name}Backward0" for name in ("View", "SplitWithSizes", "Split", "Slice", "Transpose", "Select", "Permute")}


class _Part:
    """What H or W0 is: its own tensor or that of which it is a view, and how autograd and memory see it.

    An address alone would not do: memory is used again, and tensors share it that have gradients of their own.
    """

    __slots__ = ("of", "state")

    def __init__(self, t: Tensor) -> None:
        self.of, self.state = TensorWeakRef(_base(t)), _state(t)

    def is_(self, t: Tensor) -> bool:
        return self.of() is _base(t) and self.state is not None and self.state == _state(t)


class _Kept:
    """W as long as calls may meet it. A backward pass takes it: results may live longer, and a step may follow."""

    def __init__(self, w: Tensor) -> None:
        self.w: Tensor | None = w


class _Met:
    """The z of a layer's last call, how many calls have met it, and W, if it is written out."""

    __slots__ = ("base_weight", "calls", "kept", "state", "weight", "z")

    def __init__(self, z: Tensor, state: tuple[object, ...], weight: Tensor, base_weight: Tensor | None) -> None:
        self.z, self.state, self.calls = weakref.ref(z), state, 1
        self.weight, self.base_weight = _Part(weight), None if base_weight is None else _Part(base_weight)
        self.kept: weakref.ref[_Kept] | None = None

    def same(self, z: Tensor, state: tuple[object, ...], weight: Tensor, base_weight: Tensor | None) -> bool:
        if self.z() is not z or self.state != state or not self.weight.is_(weight):
            return False
        if self.base_weight is None or base_weight is None:
            return self.base_weight is base_weight
        return self.base_weight.is_(base_weight)


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
    found = _weights(origin, z, weight, base_weight)
    if found is None:
        return None
    w, kept_w = found
    given = x, z, weight, bias, base_weight, base_bias
    shapes.check(shapes.LINEAR, dict(zip(_ARGUMENTS, given, strict=True)), optional=_ARGUMENTS[3:])
    with autocast.off(x):
        y = kept.product(w, x, z, bias, base_bias)
    assert y.grad_fn is not None
    metadata: Any = y.grad_fn.metadata
    metadata[_KEY] = kept_w  # autograd saves the memory of W, and not the tensor with its node
    return y


def _weights(origin: Tensor, z: Tensor, weight: Tensor, base_weight: Tensor | None) -> tuple[Tensor, _Kept] | None:
    if (
        torch.compiler.is_compiling()  # the first, because Dynamo does not trace `grad_fn`
        or origin.grad_fn is None
        or weight.shape[-1] < _FEWEST
        or MISSING
        or not torch.is_grad_enabled()
    ):
        return None
    parts = z, weight, base_weight
    if any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in parts) or transformed():
        return None
    known, key = _thread.met, weight.data_ptr()
    state = origin._version, z.dtype
    met = known.get(key)
    kept_w = None if met is None or met.kept is None else met.kept()
    w = None if kept_w is None else kept_w.w
    spent = kept_w is not None and w is None
    if met is None or spent or not met.same(origin, state, weight, base_weight):
        if len(known) >= _MOST:
            known.clear()
        known[key] = _Met(origin, state, weight, base_weight)
        return None
    met.calls += 1
    if met.calls <= _CALLS or not _fits(z, weight) or checkpoints.may_be_active():
        return None
    if w is None or kept_w is None:
        with autocast.off(z):
            w = _Weights.apply(*parts)
        kept_w = _Kept(w)
        node: Any = w.grad_fn
        node.kept = met.kept = weakref.ref(kept_w)
    return w, kept_w


def _base(t: Tensor) -> Tensor:
    return t if t._base is None else t._base


def _state(t: Tensor) -> tuple[object, ...] | None:
    """Return what is the same in two calls with one parameter, or with two views of it; None if this is unknown."""
    views = []
    if t._base is not None:
        node, end = t.grad_fn, t._base.grad_fn
        while node is not None and node is not end and node.name() != "torch::autograd::AccumulateGrad":
            if node.name() not in _VIEWS:  # such as a Function of the user, with another gradient
                return None
            views.append(node.name())
            node = node.next_functions[0][0]
    return t.data_ptr(), checkpoints.version(t), t.shape, t.stride(), t.requires_grad, *views


def _fits(z: Tensor, weight: Tensor) -> bool:
    B, (O, I, _) = z.shape[0], weight.shape
    size = kept.COPIES * B * O * I * z.element_size()
    return 0 < size <= planner.get_workspace_limit() and backends.current() == (AUTO, AUTO)


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
        if (kept_w := ctx.kept()) is not None:
            kept_w.w = None
        z, weight = ctx.parts
        if (z._version, weight._version) != ctx.versions:
            raise RuntimeError("z or weight has been changed in place since the forward, and its gradient needs it")
        with autocast.off(dw):
            return kept.grads_of_parts(dw, z, weight, ctx.needs_input_grad)
