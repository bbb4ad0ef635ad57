"""Products of rows with the matrix of their group, in torch's own operations.

    apply        y[e]  = x[e] M[c(e)]                 for every row e
    weight_grad  dM[c] = Σ_{e: c(e)=c} x[e] ⊗ g[e]

Rows are taken group by group, so that no row has a matrix of its own. Few long groups are one product each; many short
ones are computed together, padded to similar lengths. Narrow matrices of few groups, such as A of adapters, are
multiplied with every row, side by side, and each row keeps the result of its group: that is one product without an
order, and what another group holds, even infinity, does not reach a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...planner import get_workspace_limit
from ...terms import Terms, kept
from .terms import Pieces, cut
from .tiling import accumulate, blocks

_NARROW = 128  # columns of all groups together, up to which every row is multiplied with all of them
_LONG = 16  # rows of a group, on average, from which a product for each group is faster than padding


class _Runs(NamedTuple):
    """The rows of every group, as runs of the sorted order.

    Args:
        order: the rows ``(E,)`` by group; None if they are sorted already.
        ptr: where each run begins, and the end of the last.
    """

    order: Tensor | None
    ptr: list[int]

    @property
    def common(self) -> int | None:
        """The number of rows of each group if it is the same for all and the rows are sorted."""
        counts = {last - first for first, last in pairwise(self.ptr)}
        return counts.pop() if len(counts) == 1 and self.order is None else None

    def blocks(self, step: int) -> Iterator[tuple[Tensor | slice, list[int]]]:
        """Yield where at most `step` rows of the order are, and how many of them each group has.

        Rows that are sorted are not copied, and so come in one block.
        """
        E = self.ptr[-1]
        for e in blocks(E, E if self.order is None else step):
            inside = [min(max(p, e.start), e.stop) for p in self.ptr]
            yield e if self.order is None else self.order[e], [last - first for first, last in pairwise(inside)]


def _take(t: Tensor, rows: Tensor | slice) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _runs(terms: Terms) -> _Runs:
    by, cond = terms.sort("cond"), terms.cond
    assert by is not None
    assert cond is not None

    def make() -> _Runs:
        sorted_already = bool((cond.diff() >= 0).all())
        return _Runs(None if sorted_already else by.order, by.ptr.tolist())

    return kept(cond, "runs", by, make)


def _room(x: Tensor) -> int:
    """Return the elements of the temporary tensors of a block."""
    return max(1, get_workspace_limit() // (4 * x.element_size()))


def _padded(terms: Terms, per_piece: int, per_row: int, room: int) -> Iterator[tuple[Pieces, Tensor, Tensor]]:
    """Yield pieces of groups, their rows (K, width), and which of these are not padding."""
    by = terms.sort("cond")
    assert by is not None
    for pieces in cut(by, terms.num_terms, 1, per_piece, per_row, room):
        if pieces.width:
            pieces = pieces.to(by.order.device)
            nth = torch.arange(pieces.width, device=by.order.device)
            valid = nth < pieces.length[:, None]
            yield pieces, by.order[torch.where(valid, pieces.start[:, None] + nth, pieces.start[:, None])], valid


def _few_long(terms: Terms) -> bool:
    return terms.num_terms >= _LONG * terms.conds


def apply(x: Tensor, weight: Tensor, terms: Terms) -> Tensor:
    """Return y (E, O) of x (E, I) and weight (C, I, O)."""
    (E, I), (C, _, O) = x.shape, weight.shape
    if not E or not C:
        return x.new_zeros(E, O)
    runs = _runs(terms)
    if runs.common is not None:
        return torch.bmm(x.reshape(C, runs.common, I), weight).view(E, O)
    room = _room(x)
    if O * C <= _NARROW:
        return _side_by_side(x, weight, terms, room)
    y = x.new_empty(E, O)
    if _few_long(terms):
        for rows, counts in runs.blocks(room // max(1, I + O)):
            products = y[rows] if isinstance(rows, slice) else y.new_empty(len(rows), O)
            for each in zip(_take(x, rows).split(counts), weight.unbind(), products.split(counts), strict=True):
                torch.mm(each[0], each[1], out=each[2])
            if not isinstance(rows, slice):
                y.index_copy_(0, rows, products)
        return y
    for pieces, rows, valid in _padded(terms, I * O, I + 2 * O, room):
        products = torch.bmm(x[rows], weight[pieces.row])
        y[rows[valid]] = products[valid]
    return y


def _side_by_side(x: Tensor, weight: Tensor, terms: Terms, room: int) -> Tensor:
    (E, I), (C, _, O), cond = x.shape, weight.shape, terms.cond
    assert cond is not None
    y, all_groups = x.new_empty(E, O), weight.transpose(0, 1).reshape(I, C * O)
    for e in blocks(E, room // (C * O + 1)):
        own = torch.arange(0, C * (e.stop - e.start), C, device=x.device) + cond[e]
        torch.index_select((x[e] @ all_groups).view(-1, O), 0, own, out=y[e])
    return y


def weight_grad(x: Tensor, g: Tensor, terms: Terms) -> Tensor:
    """Return dM (C, I, O) of x (E, I) and g (E, O)."""
    (E, I), O, C = x.shape, g.shape[1], terms.conds
    if not E or not C:
        return x.new_zeros(C, I, O)
    runs = _runs(terms)
    if runs.common is not None:
        return torch.bmm(x.reshape(C, runs.common, I).mT, g.reshape(C, runs.common, O))
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(C, I, O, dtype=sum_dtype)
    room = _room(x)
    if _few_long(terms):
        for rows, counts in runs.blocks(room // max(1, 2 * (I + O))):
            for each in zip(total.unbind(), _take(x, rows).split(counts), _take(g, rows).split(counts), strict=True):
                accumulate(each[0], each[1].T, each[2])
        return total.to(x.dtype)
    for pieces, rows, valid in _padded(terms, I * O, 2 * (I + O), room):
        own = torch.where(valid[:, :, None], x[rows], 0).mT.to(sum_dtype)
        total.index_add_(0, pieces.row, torch.bmm(own, g[rows].to(sum_dtype)))
    return total.to(x.dtype)
