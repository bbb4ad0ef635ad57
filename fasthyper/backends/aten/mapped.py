"""A function of the generated weights: W[b] = φ(P[b]), P[b] = H·z[b] + W0, and its gradients, a tile at a time.

    y[b]  = W[b] x[b] + bias·z[b] + b0      dx[b] = W[b]ᵀ g[b]
    dP[b] = φ'(P[b]) ∘ (g[b] x[b]ᵀ)         dz[b] = H·dP[b] + bias·g[b]      dH = Σ_b dP[b] ⊗ z[b]      dW0 = Σ_b dP[b]

φ needs P itself, so the only schedule is `generate`. A tile has whole rows P[b,o], because some φ act on rows. The
backward computes P again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import maps, planner
from ...problem import Problem
from . import base_grads, tiling_of
from .generate import is_copied, tile_shape
from .tiling import Affine, Head, Sum, Tiling, accumulate, blocks, head_matrix, outer, put


class Weights(NamedTuple):
    """P of some instances and outputs, and the sums over it."""

    z: Tensor
    weight: Tensor
    base_weight: Tensor | None
    tiling: Tiling

    def of(self, o: slice) -> tuple[Head, Callable[[slice, Tensor], Tensor]]:
        """Return the head of a range of outputs, and the function that computes P of a range of instances."""
        head = Head(self.weight[o], self.tiling)
        base = None if self.base_weight is None else self.tiling.work(self.base_weight[o])

        def p(b: slice, room: Tensor) -> Tensor:
            tile = head.weights(self.tiling.work(self.z[b]), room)
            return tile if base is None else tile.add_(base)

        return head, p

    def room(self, instances: int, outputs: int) -> Tensor:
        """Return the memory of a tile. All blocks use the same, because new memory costs more than a product."""
        size = min(instances, len(self.z)) * min(outputs, len(self.weight)) * self.weight.shape[1]
        return torch.empty(size, dtype=self.tiling.dtype, device=self.z.device)

    def blocks(self, N: int, limit: int) -> tuple[int, int]:
        """Return the instances and the outputs of a tile of P; `limit`: the most outputs."""
        O, I, R = self.weight.shape
        elements = self.tiling.elements
        copied = self.tiling.dtype != self.tiling.sum_dtype or is_copied(self.weight, self.tiling)  # sums convert it
        instances, outputs = tile_shape(len(self.z), N, O, I, R, copied, self.tiling)
        outputs = max(1, min(outputs, limit, elements // max(1, I)))
        return max(1, min(instances, elements // max(1, outputs * I))), outputs


def _tiling(op: str, x: Tensor, R: int, O: int) -> Tiling:
    # P, W or dW, and a temporary of their size: with points, too, a tile may be no larger than with one point.
    return tiling_of(planner.plan(Problem.of(op, x, R, O)._replace(points=1), "generate"))


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    name: str,
) -> Tensor:
    """Return y (B, N, O) of x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    B, N, I = x.shape
    O, _, R = weight.shape
    tiling = _tiling("apply", x, R, O)
    y = x.new_empty(B, N, O)
    weights, affine = Weights(z, weight, base_weight, tiling), Affine(x, z, bias, None, base_bias, tiling)
    instances, outputs = weights.blocks(N, O)
    points = tiling.elements // max(1, instances * max(I, outputs))
    room = weights.room(instances, outputs)
    for o in blocks(O, outputs):
        _, p_of = weights.of(o)
        for b in blocks(B, instances):
            w = maps.value_(name, p_of(b, room)).mT
            for n in blocks(N, points):
                out = tiling.target(y[b, n, o])
                torch.bmm(tiling.work(x[b, n]), w, out=out)
                affine.add(out, b, n, o)
                put(y[b, n, o], out)
    return y


def grads(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    name: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0 and b0, None for each that is not requested."""
    (B, N, I), (O, _, R) = x.shape, weight.shape
    tiling = _tiling("grads", x, R, O)
    shapes = ((B, N, I), (B, R), (O, I, R), (O, R), (O, I))
    dx, dz, dh, _, dw0 = (x.new_empty(s) if k else None for s, k in zip(shapes, mask[:5], strict=True))
    weights = Weights(z, weight, base_weight, tiling)
    # A result in 16 bits cannot hold its own sums, over outputs or over instances: they are in buffers of a tile.
    direct = x.dtype == tiling.sum_dtype
    with_dx = direct or weights.blocks(N, O)[1] >= O
    _instances(weights, x, g, bias, dx if with_dx else None, dz, *((dh, dw0) if direct else (None, None)), name)
    if dx is not None and not with_dx:
        _inputs(weights, g, dx, name)
    if not direct:
        _head(weights, x, g, dh, dw0, name)
    dbias, _, db0 = base_grads(x, z, g, R, (*mask[:4], False, mask[5]), tiling)
    return dx, dz, dh, dbias, dw0, db0


def _dp(name: str, p: Tensor, g: Tensor, x: Tensor, tiling: Tiling, room: Tensor) -> Tensor:
    """Return dP of a tile, with the strides of P, which is lost, in the memory of `room`."""
    dw = outer(g, x, tiling, room) if p.is_contiguous() else outer(x, g, tiling, room).mT
    return maps.vjp_(name, p, dw)


def _instances(
    weights: Weights,
    x: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    dz: Tensor | None,
    dh: Tensor | None,
    dw0: Tensor | None,
    name: str,
) -> None:
    """Compute those of dx, dz, dH and dW0 that are given, from the same tiles. dH and dW0 hold their own sums."""
    z, tiling = weights.z, weights.tiling
    B, N, _ = x.shape
    O, _, R = weights.weight.shape
    instances, outputs = weights.blocks(N, O)
    into_z = Affine(g, z, bias, None, None, tiling)
    sums = None if dh is None else _sums(dh, weights, outputs)
    for t in (sums, dw0, dx if O == 0 else None):
        if t is not None and (B == 0 or t is not sums):
            t.zero_()
    if dx is None and dz is None and dh is None and dw0 is None:
        return
    of_p, of_w = weights.room(instances, outputs), weights.room(instances, outputs)
    for b in blocks(B, instances):
        dz_b = None if dz is None else into_z.start(g[b], R)
        for o in blocks(O, outputs):
            head, p_of = weights.of(o)
            p = p_of(b, of_p)
            if dx is not None:
                w = of_w.as_strided(p.shape, p.stride()).copy_(p)
                _add_dx(dx, b, o, g, maps.value_(name, w), tiling)
            if dz is not None or dh is not None or dw0 is not None:
                dp = _dp(name, p, g[b, :, o], x[b], tiling, of_w)
                if dz_b is not None:
                    head.contract(dz_b, dp)
                if sums is not None:
                    _add_dh(sums[o], dp, tiling.work(z[b]), first=b.start == 0)
                if dw0 is not None:
                    dw0[o] += _sum(dp)
            del head, p_of  # before the next block of the head is copied
        if dz is not None and dz_b is not None:
            dz[b] = dz_b
    if dh is not None and sums is not None and sums is not dh:
        dh.copy_(sums)


def _sum(dp: Tensor) -> Tensor:
    """Return Σ_b dP[b]: as a product, several times faster than a sum of strided rows."""
    if not dp.is_contiguous():
        return _sum(dp.mT).T
    return torch.mv(dp.flatten(1).T, dp.new_ones(len(dp))).view(dp.shape[1:])


def _add_dx(dx: Tensor, b: slice, o: slice, g: Tensor, w: Tensor, tiling: Tiling) -> None:
    """Compute dx[b] += g[b,:,o] W[b,o]; without the sum for the first outputs."""
    N, I = dx.shape[1:]
    for n in blocks(N, tiling.elements // max(1, (b.stop - b.start) * max(I, o.stop - o.start))):
        part, out = tiling.work(g[b, n, o]), dx[b, n]
        if o.start > 0:
            out.baddbmm_(part, w)
        else:
            put(out, torch.bmm(part, w, out=tiling.target(out)))


def _sums(dh: Tensor, weights: Weights, outputs: int) -> Tensor:
    """Return where to sum dH: itself, or a small tensor in which inputs come first, as in the head."""
    O, I, R = dh.shape
    transposed = head_matrix(weights.weight) is None and head_matrix(weights.weight.transpose(0, 1)) is not None
    if transposed and outputs >= O and dh.numel() <= weights.tiling.elements:
        return dh.new_empty(I, O, R).transpose(0, 1)
    return dh


def _add_dh(total: Tensor, dp: Tensor, z: Tensor, first: bool) -> None:
    """Compute dH[o,i,r] += Σ_b dP[b,o,i] z[b,r]; without the sum for the first instances."""
    if not total.is_contiguous():
        total, dp = total.transpose(0, 1), dp.mT
    accumulate(total.flatten(0, 1), dp.flatten(1).T, z, beta=0 if first else 1)


def _inputs(weights: Weights, g: Tensor, dx: Tensor, name: str) -> None:
    """Compute a dx in 16 bits if there are several blocks of outputs."""
    tiling, (B, N, I), O = weights.tiling, dx.shape, g.shape[2]
    instances, outputs = weights.blocks(N, O)
    step = tiling.elements // max(1, instances * max(I, outputs))
    room = weights.room(instances, outputs)
    for b in blocks(B, instances):
        for n in blocks(N, step):
            total = torch.zeros(dx[b, n].shape, dtype=tiling.sum_dtype, device=dx.device)
            for o in blocks(O, outputs):
                w = maps.value_(name, weights.of(o)[1](b, room))
                total += torch.bmm(tiling.work(g[b, n, o]), w)
            dx[b, n] = total


def _head(weights: Weights, x: Tensor, g: Tensor, dh: Tensor | None, dw0: Tensor | None, name: str) -> None:
    """Compute dH and dW0 in 16 bits; each block is rounded once."""
    if dh is None and dw0 is None:
        return
    tiling, (O, I, R) = weights.tiling, weights.weight.shape
    inputs = max(1, min(I, tiling.elements // max(1, R)))
    instances, outputs = weights.blocks(x.shape[1], tiling.elements // max(1, inputs * R))
    of_p, of_w = weights.room(instances, outputs), weights.room(instances, outputs)
    for o in blocks(O, outputs):
        _, p_of = weights.of(o)
        for i in blocks(I, inputs):
            total = None if dh is None else Sum(dh[o, i], tiling)
            base = None if dw0 is None else torch.zeros_like(dw0[o, i], dtype=tiling.sum_dtype)
            for b in blocks(len(x), instances):
                dp = _dp(name, p_of(b, of_p), g[b, :, o], x[b], tiling, of_w)[:, :, i]
                if total is not None:
                    total.add(dp.flatten(1).T, tiling.work(weights.z[b]))
                if base is not None:
                    base += dp.sum(0, dtype=base.dtype)
            if total is not None:
                total.store()
            if dw0 is not None and base is not None:
                dw0[o, i] = base
        del p_of
