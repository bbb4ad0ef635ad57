"""W of a `hyper_linear` written out once, for a graph of derivatives: where there are points, and W fits the workspace.

Every order of derivatives multiplies points with the same W. The ops of the family would generate it again in each of
their calls, and contract each gradient of W with the head. Here W is a node of autograd's graph: it is computed once,
and the sum of its gradients is contracted once. Plain first order never comes here; its kernels have W in tiles.

    W[b] = H·z[b] + W0      y[b,n] = W[b] x[b,n] + bias·z[b] + b0
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .. import compiled, planner
from ..backends.contract import Wanted
from ..problem import AUTO, Problem
from . import autocast, checkpoints
from .register import MISSING, Arguments, choice, current_node, transformed, vmapped

COPIES = 3  # W, its gradient, and the next summand of this gradient
_FEWEST = 16  # features of z from which on W pays for all derivatives, though the first order alone has another order
_KEY = "fasthyper.kept"

Parts = tuple[Tensor, Tensor, Tensor | None]
"""What W is made of: z, H and W0."""


class _Call(Arguments, Protocol):
    @property
    def x(self) -> Tensor: ...

    @property
    def z(self) -> Tensor: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def base_weight(self) -> Tensor | None: ...


class _CallOfApply(_Call, Protocol):
    @property
    def base_bias(self) -> Tensor | None: ...


class _CallOfGrads(_Call, Protocol):
    @property
    def g(self) -> Tensor: ...


def fits(args: _Call) -> bool:
    """Return whether a call that is differentiated more than once keeps W.

    It does if instances have points, the planner would generate W, torch multiplies this dtype as it is, and W and its
    gradients fit the workspace. A forced backend or schedule keeps its own order. Under vmap, W has unknown size; with
    symbolic sizes, the answer would be frozen into compiled code.
    """
    return choice(args) == (AUTO, AUTO) and not MISSING and not vmapped() and room(args.x, args.weight) > 0


def room(x: Tensor, weight: Tensor) -> int:
    """Return the limit of the workspace if the sizes are such that a call keeps W, or else 0.

    csrc/eager.cpp calls this, and stores the answers.
    """
    (B, N, I), (O, _, R) = x.shape, weight.shape
    if MISSING or any(isinstance(size, torch.SymInt) for size in (B, N, R, I, O)) or N < 2 or 0 in (B, R, I, O):
        return 0
    limit = planner.get_workspace_limit()
    if COPIES * B * O * I * x.element_size() > limit:
        return 0
    problem = Problem.of("apply", x, R, O)
    plan = planner.plan(problem)
    planned = plan.schedule == "generate" or (R >= _FEWEST and not problem.shared_x)
    return limit if planned and plan.work_dtype == x.dtype else 0


def apply(args: _CallOfApply) -> Tensor:
    """Return y = W x + bias·z + b0."""
    with autocast.off(args.x):
        return product(_weights(args), args.x, args.z, args.bias, args.base_bias)


def product(w: Tensor, x: Tensor, z: Tensor, bias: Tensor | None, base_bias: Tensor | None) -> Tensor:
    """Return y[b,n] = W[b] x[b,n] + bias·z[b] + b0."""
    if bias is not None:
        return torch.baddbmm(F.linear(z, bias, base_bias).unsqueeze(1), x, w.mT)
    y = torch.bmm(x, w.mT)
    return y if base_bias is None else y + base_bias


def grads(args: _CallOfGrads, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Return the requested gradients of x, z, H and W0 through W; a generated bias adds its own to that of z."""
    dz = dh = dbase = None
    with autocast.off(args.x):
        dx = torch.bmm(args.g, _weights(args)) if wanted.x else None
        needs = wanted.z, wanted.weight, wanted.base_weight
        if any(needs):
            dz, dh, dbase = grads_of_parts(torch.bmm(args.g.mT, args.x), args.z, args.weight, needs)
    return dx, dz, dh, dbase


def _weights(args: _Call) -> Tensor:
    """Return W, which all backwards of one forward share as long as a graph has it.

    The node of the forward refers to it weakly: a strong reference would keep W after the graph is freed.
    """
    parts = args.z, args.weight, args.base_weight
    node = current_node()
    if node is None or transformed() or not torch.is_grad_enabled():
        return generate(*parts)
    memo: _Memo | None = node.metadata.get(_KEY)
    w = None if memo is None else memo.of(parts)
    if w is None:
        w = _Generate.apply(*parts)
        node.metadata[_KEY] = _Memo(w, parts)
    return w


class _Memo:
    """Weak references to W and to its parts, with the versions of the parts."""

    def __init__(self, w: Tensor, parts: Parts) -> None:
        self._w = TensorWeakRef(w)
        self._parts = _refer(parts)
        self._versions = [*map(checkpoints.version, parts)]

    def of(self, parts: Parts) -> Tensor | None:
        """Return W if it is alive and made of these parts, which have not been changed since."""
        same = all((None if r is None else r()) is t for r, t in zip(self._parts, parts, strict=True))
        return self._w() if same and self._versions == [*map(checkpoints.version, parts)] else None


def _refer(parts: Parts) -> list[TensorWeakRef | None]:
    return [None if t is None else TensorWeakRef(t) for t in parts]


class _Generate(torch.autograd.Function):
    """W[b] = H·z[b] + W0."""

    @staticmethod
    def forward(ctx, z, weight, base_weight):
        ctx.save_for_backward(z, weight)
        return generate(z, weight, base_weight)

    @staticmethod
    def backward(ctx, dw):
        z, weight = ctx.saved_tensors
        with autocast.off(dw):
            return grads_of_parts(dw, z, weight, ctx.needs_input_grad)


def generate(z: Tensor, weight: Tensor, base_weight: Tensor | None) -> Tensor:
    O, I, R = weight.shape
    base = None if base_weight is None else base_weight.reshape(O * I)
    return F.linear(z, weight.reshape(O * I, R), base).view(-1, O, I)


def grads_of_parts(dw: Tensor, z: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of z, H and W0 from that of W."""
    O, I, R = weight.shape
    flat = dw.reshape(-1, O * I)
    dz = flat @ weight.reshape(O * I, R) if needs[0] else None
    dh = (flat.mT @ z).view(O, I, R) if needs[1] else None
    return dz, dh, dw.sum(0) if needs[2] else None


if compiled.load("eager") is None:
    _library = torch.library.Library("fasthyper_eager", "IMPL")
    _library.impl("room", room, "CompositeExplicitAutograd")
