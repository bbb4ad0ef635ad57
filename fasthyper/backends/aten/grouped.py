"""`generate` for ragged points of few conditions: all of W fits a tile, and a condition's points are one product.

    W[c] = H·z[c]     y[e] = W[c] x[e]     dx[e] = W[c]ᵀ g[e]     dW[c] = Σ_{e: c(e)=c} g[e] ⊗ x[e]
    dz[c] = Σ_{o,i} dW[c,o,i] H[o,i]       dH[o,i] = Σ_c dW[c,o,i] z[c]

H is read once and in place. For an H that is larger than the caches this is several times faster than the kernels,
which pack H for every block of points; for a smaller one, loops over the conditions cost more than they save.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ...problem import Plan
from ...terms import Sorted, Terms, kept
from .tiling import Head, Tiling, blocks

_MOST_CONDS = 512
_LEAST_POINTS = 8  # of a condition, on average


def takes(plan: Plan, x: Tensor, O: int, R: int, terms: Terms) -> bool:
    """Return whether a call is one of ragged points, with a large H and a W that fits a tile, and nothing is cast."""
    ragged = terms.cond is not None and terms.source is None and terms.target is None and x.shape[1] == 1
    few = 0 < terms.conds <= _MOST_CONDS and terms.num_terms >= _LEAST_POINTS * terms.conds
    fits = terms.conds * O * x.shape[2] <= plan.tile and O * x.shape[2] * R > 2 * plan.tile
    return plan.schedule == "generate" and ragged and few and fits and x.dtype == plan.work_dtype


class _Groups:
    """The points of each condition, in blocks of at most a tile."""

    def __init__(self, terms: Terms, features: int, tiling: Tiling) -> None:
        by = terms.sort("cond")
        assert by is not None
        assert terms.cond is not None
        self.by: Sorted = by
        ptr, self.sorted = kept(terms.cond, "groups", by, lambda: (by.ptr.tolist(), _is_sorted(terms.cond)))
        step = max(1, tiling.elements // max(1, features))
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


def _is_sorted(cond: Tensor | None) -> bool:
    assert cond is not None
    return bool((cond.diff() >= 0).all())


def apply(x: Tensor, z: Tensor, weight: Tensor, terms: Terms, tiling: Tiling) -> Tensor:
    """Return y (E, 1, O) of x (E, 1, I)."""
    x = x[:, 0]
    W = Head(weight, tiling).weights(z)
    y = x.new_empty(len(x), weight.shape[0])
    for c, where, (points,) in _Groups(terms, x.shape[1] + weight.shape[0], tiling).rows(x):
        y[where] = points @ W[c].T
    return y.unsqueeze(1)


def grads(
    x: Tensor, z: Tensor, weight: Tensor | None, g: Tensor, mask: tuple[bool, ...], terms: Terms, tiling: Tiling
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx (E, 1, I), dz (C, R) and dH (O, I, R) where the mask is set."""
    x, g = x[:, 0], g[:, 0]
    (E, I), O, (C, R) = x.shape, g.shape[1], z.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if mask[0] else None
    W = None if dx is None or weight is None else Head(weight, tiling).weights(z)
    dW = x.new_zeros(C, O, I) if mask[1] or mask[2] else None
    for c, where, (points, of_y) in _Groups(terms, I + O, tiling).rows(x, g):
        if dx is not None and W is not None:
            dx[where] = of_y @ W[c]
        if dW is not None:
            dW[c].addmm_(of_y.T, points)
    dz = dh = None
    if mask[1] and dW is not None and weight is not None:
        dz = z.new_zeros(C, R)
        Head(weight, tiling).contract(dz, dW)
    if mask[2] and dW is not None:
        dh = torch.mm(dW.flatten(1).T, z).view(O, I, R)
    return None if dx is None else dx.view(E, 1, I), dz, dh
