"""`generate` for ragged points of few conditions: all of W fits a tile, and a condition's points are one product.

    W[c] = H·z[c]     y[e] = W[c] x[e]     dx[e] = W[c]ᵀ g[e]     dW[c] = Σ_{e: c(e)=c} g[e] ⊗ x[e]
    dz[c] = Σ_{o,i} dW[c,o,i] H[o,i]       dH[o,i] = Σ_c dW[c,o,i] z[c]

H is read in place, and once: a block of it is in cache for both of its products. For an H that is larger than the
caches this is several times faster than the kernels, which pack H for every block of points; for a smaller one, loops
over the conditions cost more than they save.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ...problem import Plan
from ...terms import Sorted, Terms, kept
from .tiling import Head, Tiling, accumulate, blocks, head_matrix

_MOST_CONDS = 512
_LEAST_POINTS = 8  # of a condition, on average
_BLOCK = 1 << 19  # numbers of H that are in cache for two products
_LONGEST = 1024  # features of z up to which H·zᵀ is faster than z·Hᵀ


def takes(plan: Plan, x: Tensor, O: int, R: int, terms: Terms) -> bool:
    """Return whether a call is one of ragged points, with a large H and a W that fits a tile, and nothing is cast."""
    ragged = terms.cond is not None and terms.source is None and terms.target is None and x.shape[1] == 1
    few = 0 < terms.conds <= _MOST_CONDS and terms.num_terms >= _LEAST_POINTS * terms.conds
    fits = terms.conds * O * x.shape[2] <= plan.tile and O * x.shape[2] * R > 2 * plan.tile
    return plan.schedule == "generate" and ragged and few and fits and x.dtype == plan.work_dtype


class _Groups:
    """The points of each condition: all of them where they lie together, otherwise gathered in blocks of a tile."""

    def __init__(self, terms: Terms, features: int, tiling: Tiling) -> None:
        by = terms.sort("cond")
        assert by is not None
        assert terms.cond is not None
        self.by: Sorted = by
        ptr, self.sorted = kept(terms.cond, "groups", by, lambda: (by.ptr.tolist(), _is_sorted(terms.cond)))
        step = terms.num_terms if self.sorted else max(1, tiling.elements // max(1, features))
        self.blocks: list[tuple[int, slice]] = [
            (c, slice(first + e.start, first + e.stop))
            for c, (first, last) in enumerate(pairwise(ptr))
            for e in blocks(last - first, step)
        ]

    @property
    def several(self) -> bool:
        """Whether a condition has more than one block."""
        return len({c for c, _ in self.blocks}) < len(self.blocks)

    def rows(self, *tensors: Tensor) -> Iterator[tuple[int, Tensor | slice, list[Tensor]]]:
        """Yield each block's condition, where its points are, and their rows of each tensor."""
        for c, at in self.blocks:
            where = at if self.sorted else self.by.order[at]
            yield c, where, [t[where] for t in tensors]

    def multiply(self, rows: Tensor, matrix: Tensor, out: Tensor, where: Tensor | slice) -> None:
        """Compute out[where] = rows · matrix, in place if the points lie together."""
        if self.sorted:
            torch.mm(rows, matrix, out=out[where])
        else:
            out[where] = rows @ matrix


def _is_sorted(cond: Tensor | None) -> bool:
    assert cond is not None
    return bool((cond.diff() >= 0).all())


def _multiply(
    z: Tensor, weight: Tensor, W: Tensor | None, dW: Tensor | None, dz: Tensor | None, tiling: Tiling
) -> None:
    """Write W (C, O, I), and add to dz, a sum, what dW gives, where they are given; H is read once for both."""
    rows = head_matrix(weight)
    if rows is None or z.shape[1] > _LONGEST or z.dtype != tiling.sum_dtype:
        head = Head(weight, tiling)
        if W is not None:
            W.copy_(head.weights(z))
        if dz is not None and dW is not None:
            head.contract(dz, dW, one=True)
        return
    for at in blocks(len(rows), _BLOCK // max(1, z.shape[1])):
        if W is not None:
            W.flatten(1)[:, at] = torch.mm(rows[at], z.T).T  # few conditions: several times faster than z·Hᵀ
        if dz is not None and dW is not None:
            dz.addmm_(dW.flatten(1)[:, at], rows[at])


def apply(x: Tensor, z: Tensor, weight: Tensor, terms: Terms, tiling: Tiling) -> Tensor:
    """Return y (E, 1, O) of x (E, 1, I)."""
    x = x[:, 0]
    W = x.new_empty(len(z), *weight.shape[:2])
    _multiply(z, weight, W, None, None, tiling)
    y = x.new_empty(len(x), weight.shape[0])
    groups = _Groups(terms, x.shape[1] + weight.shape[0], tiling)
    for c, where, (points,) in groups.rows(x):
        groups.multiply(points, W[c].T, y, where)
    return y.unsqueeze(1)


def grads(
    x: Tensor, z: Tensor, weight: Tensor | None, g: Tensor, mask: tuple[bool, ...], terms: Terms, tiling: Tiling
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx (E, 1, I), dz (C, R) and dH (O, I, R) where the mask is set."""
    x, g = x[:, 0], g[:, 0]
    (E, I), O, (C, R) = x.shape, g.shape[1], z.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if mask[0] else None
    groups = _Groups(terms, I + O, tiling)
    dW = _weights_grad(x, g, C, groups, tiling) if mask[1] or mask[2] else None
    W = x.new_empty(C, O, I) if mask[0] else None
    dz = z.new_zeros(C, R, dtype=tiling.sum_dtype) if mask[1] else None
    dh = None
    if weight is not None and (mask[0] or mask[1]):
        _multiply(z, weight, W, dW, dz, tiling)
    if dx is not None and W is not None:
        for c, where, (of_y,) in groups.rows(g):
            groups.multiply(of_y, W[c], dx, where)
    if mask[2] and dW is not None:
        dh = torch.mm(dW.flatten(1).T, z).view(O, I, R)
    return None if dx is None else dx.view(E, 1, I), None if dz is None else dz.to(z.dtype), dh


def _weights_grad(x: Tensor, g: Tensor, C: int, groups: _Groups, tiling: Tiling) -> Tensor:
    """Return dW (C, O, I): sums are rounded once, whatever the number of a condition's blocks."""
    dW = x.new_zeros(C, g.shape[1], x.shape[1], dtype=tiling.sum_dtype if groups.several else x.dtype)
    for c, _, (points, of_y) in groups.rows(x, g):
        accumulate(dW[c], of_y.T, points)
    return dW.to(x.dtype)
