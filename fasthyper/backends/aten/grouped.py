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
from .tiling import Head, Tiling, blocks, head_matrix

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


def _weights(z: Tensor, weight: Tensor, tiling: Tiling) -> Tensor:
    """Return W (C, O, I)."""
    return _products(z, weight, None, tiling, True)[0]  # type: ignore[return-value]


def _products(
    z: Tensor, weight: Tensor, dW: Tensor | None, tiling: Tiling, wants_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return W (C, O, I), if it is wanted, and the gradient of z from that of W, if there is one."""
    (O, I, R), C = weight.shape, len(z)
    rows = head_matrix(weight)
    if rows is None or R > _LONGEST or z.dtype != tiling.sum_dtype:
        head, dz = Head(weight, tiling), None if dW is None else z.new_zeros(C, R)
        if dz is not None and dW is not None:
            head.contract(dz, dW)
        return (head.weights(z) if wants_W else None), dz
    W = z.new_empty(C, O * I) if wants_W else None
    dz = None if dW is None else z.new_zeros(C, R)
    for at in blocks(O * I, _BLOCK // max(1, R)):
        if W is not None:
            W[:, at].copy_(torch.mm(rows[at], z.T).T)  # few conditions: several times faster than z·Hᵀ
        if dz is not None and dW is not None:
            dz.addmm_(dW.flatten(1)[:, at], rows[at])
    return (None if W is None else W.view(C, O, I)), dz


def apply(x: Tensor, z: Tensor, weight: Tensor, terms: Terms, tiling: Tiling) -> Tensor:
    """Return y (E, 1, O) of x (E, 1, I)."""
    x = x[:, 0]
    W = _weights(z, weight, tiling)
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
    dW = x.new_zeros(C, O, I) if mask[1] or mask[2] else None
    groups = _Groups(terms, I + O, tiling)
    if dW is not None:
        for c, _, (points, of_y) in groups.rows(x, g):
            dW[c].addmm_(of_y.T, points)
    W = dz = dh = None
    if weight is not None and (mask[0] or mask[1]):
        W, dz = _products(z, weight, dW if mask[1] else None, tiling, mask[0])
    if dx is not None and W is not None:
        for c, where, (of_y,) in groups.rows(g):
            groups.multiply(of_y, W[c], dx, where)
    if mask[2] and dW is not None:
        dh = torch.mm(dW.flatten(1).T, z).view(O, I, R)
    return None if dx is None else dx.view(E, 1, I), dz, dh
