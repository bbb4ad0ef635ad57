"""The family over terms in torch's own operations, in four orders.

The values of one index are rows. A row ρ has its own factor w (features p) and its terms, whose other factors are u
(features q) and v (features c). With the axes of H in the order p, q, c:

    collect   A[ρ,q,c] = Σ_{e in ρ} u[e,q] v[e,c]     out_w[ρ,p] = Σ_{q,c} H[p,q,c] A[ρ,q,c]
                                                      dH[p,q,c]  = Σ_ρ w[ρ,p] A[ρ,q,c]
    expand    M[ρ,q,c] = Σ_p H[p,q,c] w[ρ,p]          out_u[e,q] = Σ_c M[ρ,q,c] v[e,c]
                                                      out_v[e,c] = Σ_q M[ρ,q,c] u[e,q]

| schedule    | rows    | w | u, v | collect returns | expand returns |
|-------------|---------|---|------|-----------------|----------------|
| `aggregate` | targets | g | x, z | y               | dx, dz         |
| `project`   | sources | x | g, z | dx              | y, dz          |
| `generate`  | conds   | z | g, x | dz              | y, dx          |
| `fold`      | terms   | g | x, z | y               | dx, dz         |

Rows with many terms are cut into pieces. Pieces with similar numbers of terms are computed together, padded to the
largest number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...terms import Sorted, Terms
from .tiling import Tiling, accumulate, blocks

AXES = {"g": 0, "x": 1, "z": 2}
"""The axis of H that belongs to each factor."""
FACTORS = {"aggregate": "gxz", "fold": "gxz", "project": "xgz", "generate": "zgx"}
"""The factors w, u, v of each schedule."""
ROWS_OF = {"aggregate": "target", "project": "source", "generate": "cond", "fold": None}
"""The index whose values are the rows of a schedule; None for the terms themselves."""
_MOST_TERMS = 4096  # of a piece
_SHORT = 8  # a chunk pads its pieces to at most twice their terms, but never minds so few terms


class Pieces(NamedTuple):
    """Pieces of rows, each with at most `width` terms (or pairs of a term and a point).

    Args:
        row: (K,).
        start: (K,), the position of the first term in the sorted order.
        length: (K,), the number of terms.
        width: the largest length.
    """

    row: Tensor
    start: Tensor
    length: Tensor
    width: int


def cut(by: Sorted | None, terms: int, points: int, per_piece: int, per_term: int, room: int) -> Iterator[Pieces]:
    """Cut rows into pieces and group those with similar counts.

    Args:
        by: the terms by row; None if each term is a row.
        terms: E.
        points: entries of each term: N if a row contains all points of its terms, else 1.
        per_piece: numbers that one piece takes in a tile.
        per_term: numbers that one term of a piece takes in a tile.
        room: numbers that a tile may hold.
    """
    most = max(1, min(_MOST_TERMS, room // max(1, per_term)))
    if by is None and points == 1:
        for each in blocks(terms, min(room // max(1, per_piece), most)):
            row = torch.arange(each.start, each.stop)
            yield Pieces(row, row, torch.ones_like(row), 1)
        return
    ptr = (torch.arange(terms + 1) if by is None else by.ptr.cpu()) * points
    counts = ptr.diff()
    pieces = (counts + most - 1) // most
    row = torch.repeat_interleave(pieces)
    nth = torch.arange(len(row)) - (pieces.cumsum(0) - pieces)[row]
    count = torch.minimum(counts[row] - nth * most, torch.tensor(most))
    start = ptr[row] + nth * most
    by_count = torch.argsort(count, stable=True)
    sorted_counts = count[by_count].tolist()
    first = 0
    while first < len(sorted_counts):
        last, width = first, 0
        while last < len(sorted_counts):
            width = sorted_counts[last]
            size = last + 1 - first
            full = size * per_piece > room or size * width * per_term > room
            if last > first and (full or width > max(_SHORT, 2 * sorted_counts[first])):
                break
            last += 1
        chosen = by_count[first:last]
        yield Pieces(row[chosen], start[chosen], count[chosen], sorted_counts[last - 1])
        first = last


class Factor(NamedTuple):
    """A factor: its rows (rows, N, features), or (rows, features) for z, and the index of each term's row."""

    rows: Tensor
    row_of: Tensor | None
    points: int

    def where(self, e: Tensor, n: Tensor | int) -> Tensor:
        """Return the row of each term, among rows · N for x and g."""
        row = e if self.row_of is None else self.row_of[e]
        return row * self.points + n if self.rows.dim() == 3 else row

    def take(self, row: Tensor, n: Tensor | int, q: slice, tiling: Tiling) -> Tensor:
        """Return some features of rows."""
        rows = self.rows[..., q]
        return tiling.work(rows[row, n] if rows.dim() == 3 else rows[row])

    def of_terms(self, e: Tensor, n: Tensor | int, q: slice, tiling: Tiling) -> Tensor:
        """Return some features of the rows of terms."""
        return self.take(e if self.row_of is None else self.row_of[e], n, q, tiling)


class Sums:
    """Sums of messages in the rows of a result; 16-bit sums are rounded once, unless float32 sums take too much."""

    def __init__(self, out: Tensor, tiling: Tiling) -> None:
        fits = out.dtype == tiling.sum_dtype or out.numel() > 2 * tiling.elements
        self._out = out.flatten(0, -2)
        self._total = self._out.zero_() if fits else torch.zeros_like(self._out, dtype=tiling.sum_dtype)

    def add(self, row: Tensor, messages: Tensor) -> None:
        self._total.index_add_(0, row, messages.to(self._total.dtype))

    def store(self) -> None:
        if self._total is not self._out:
            self._out.copy_(self._total)


class _Batch(NamedTuple):
    """Pieces at one point, or at all points of their rows: the terms and points of each slot, and the rows."""

    e: Tensor
    n: Tensor | int
    valid: Tensor | None
    row: Tensor
    row_n: int


class Contraction:
    """One schedule on one call: loops over tiles of the products with H."""

    def __init__(
        self,
        schedule: str,
        weight: Tensor | None,
        sizes: tuple[int, int, int],
        terms: Terms,
        points: int,
        tiling: Tiling,
    ) -> None:
        self.names = FACTORS[schedule]
        axes = [AXES[name] for name in self.names]
        self.P, self.Q, self.C = (sizes[axis] for axis in axes)
        self.head = None if weight is None else weight.permute(axes)
        self.tiling, self.terms, self.N = tiling, terms, points
        self.of_terms = schedule == "fold"  # a row for each term
        rows_of = ROWS_OF[schedule]
        self.by = None if rows_of is None else terms.sort(rows_of)
        self.pairs = self.names[0] == "z"  # a row of z has all points of its terms
        self.columns = max(1, min(self.Q, tiling.elements // max(1, self.P * self.C)))
        self.room = tiling.elements

    def batches(self, device: torch.device) -> Iterator[_Batch]:
        points = self.N if self.pairs else 1
        per_piece = self.columns * self.C + self.P
        for pieces in cut(self.by, self.terms.num_terms, points, per_piece, self.Q + self.C, self.room):
            row, start, length = (t.to(device) for t in pieces[:3])
            slot = torch.arange(pieces.width, device=device)
            valid = slot < length.unsqueeze(1)
            at = torch.where(valid, start.unsqueeze(1) + slot, start.unsqueeze(1))
            n = at % points if points > 1 else 0
            at = at // points if points > 1 else at
            e = at if self.by is None else self.by.order[at]
            full = valid.all() if device.type == "cpu" else False
            for row_n in range(1 if self.pairs else self.N):
                yield _Batch(e, n if self.pairs else row_n, None if full else valid, row, row_n)

    def _slabs(self) -> Iterator[slice]:
        return blocks(self.Q, self.columns)

    def _head(self, q: slice) -> Tensor:
        assert self.head is not None
        return self.tiling.work(self.head[:, q]).reshape(self.P, (q.stop - q.start) * self.C)

    def _pairs(self, b: _Batch, u: Factor, v: Factor, q: slice) -> tuple[Tensor, Tensor]:
        """Return u and v (K, D, features) of a batch, zero for slots without a term."""
        left, right = u.of_terms(b.e, b.n, q, self.tiling), v.of_terms(b.e, b.n, slice(None), self.tiling)
        if b.valid is not None:
            absent = ~b.valid.unsqueeze(2)  # both are zero there, because infinity times zero is not a number
            left, right = left.masked_fill(absent, 0), right.masked_fill(absent, 0)
        return left, right

    def _own(self, b: _Batch, w: Factor) -> Tensor:
        """Return w (K, P) of a batch's rows."""
        row = w.row_of[b.row] if self.of_terms and w.row_of is not None else b.row
        return w.take(row, b.row_n, slice(None), self.tiling)

    def _where(self, b: _Batch, w: Factor) -> Tensor:
        row = w.row_of[b.row] if self.of_terms and w.row_of is not None else b.row
        return row * w.points + b.row_n if w.rows.dim() == 3 else row

    def collect(self, u: Factor, v: Factor, w: Factor, out: Sums) -> None:
        """Compute out_w."""
        for b in self.batches(u.rows.device):
            total = torch.zeros(len(b.row), self.P, dtype=self.tiling.sum_dtype, device=u.rows.device)
            for q in self._slabs():
                a, c = self._pairs(b, u, v, q)
                A = torch.bmm(a.mT, c)
                accumulate(total, A.flatten(1), self._head(q).T)
            out.add(self._where(b, w), total)

    def weight_grad(self, u: Factor, v: Factor, w: Factor, dh: Tensor) -> None:
        """Compute dH (O, I, R)."""
        dh = dh.permute([AXES[name] for name in self.names])
        for q in self._slabs():
            shape = self.P, (q.stop - q.start) * self.C
            total = torch.zeros(shape, dtype=self.tiling.sum_dtype, device=dh.device)
            for b in self.batches(dh.device):
                a, c = self._pairs(b, u, v, q)
                accumulate(total, self._own(b, w).T, torch.bmm(a.mT, c).flatten(1))
            dh[:, q] = total.view(self.P, q.stop - q.start, self.C)

    def expand(self, u: Factor, v: Factor, w: Factor, out_u: Sums | None, out_v: Sums | None) -> None:
        """Compute out_u and out_v, those that are given."""
        for b in self.batches(w.rows.device):
            K, D = b.e.shape
            empty = {"dtype": self.tiling.dtype, "device": w.rows.device}
            to_u = None if out_u is None else torch.empty(K, D, self.Q, **empty)  # type: ignore[call-overload]
            to_v = None if out_v is None else torch.zeros(K, D, self.C, **empty)  # type: ignore[call-overload]
            own = self._own(b, w)
            for q in self._slabs():
                M = torch.mm(own, self._head(q)).view(K, q.stop - q.start, self.C)
                if to_u is not None:
                    to_u[:, :, q] = torch.bmm(v.of_terms(b.e, b.n, slice(None), self.tiling), M.mT)
                if to_v is not None:
                    to_v.baddbmm_(u.of_terms(b.e, b.n, q, self.tiling), M)
            for out, messages, factor in ((out_u, to_u, u), (out_v, to_v, v)):
                if out is not None and messages is not None:
                    row = factor.where(b.e, b.n)
                    if b.valid is not None:
                        row, messages = row[b.valid], messages[b.valid]
                    out.add(row.flatten(), messages.flatten(0, -2))
