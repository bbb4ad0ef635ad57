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
largest number. `Contraction` is the loop; another backend replaces its steps by kernels, all but the products with H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...terms import Sorted, Terms, kept
from .term_bases import Bases, SumTerms, sum_terms
from .tiling import Tiling, accumulate, blocks

AXES = {"g": 0, "x": 1, "z": 2}
"""The axis of H that belongs to each factor."""
INDEX = {"x": "source", "z": "cond", "g": "target"}
FACTORS = {"aggregate": "gxz", "fold": "gxz", "project": "xgz", "generate": "zgx"}
"""The factors w, u, v of each schedule."""
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

    def to(self, device: torch.device) -> Pieces:
        """Return them on a device."""
        return Pieces(self.row.to(device), self.start.to(device), self.length.to(device), self.width)


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

    @property
    def has_points(self) -> bool:
        """Whether each point has a row of its own."""
        return self.rows.dim() == 3

    def where(self, e: Tensor, n: Tensor | int) -> Tensor:
        """Return the row of each term, among rows · N for x and g."""
        row = e if self.row_of is None else self.row_of[e]
        return row * self.points + n if self.has_points else row

    def take(self, row: Tensor, n: Tensor | int, q: slice, tiling: Tiling) -> Tensor:
        """Return some features of rows."""
        rows = self.rows[..., q]
        return tiling.work(rows[row, n] if self.has_points else rows[row])

    def of_terms(self, e: Tensor, n: Tensor | int, q: slice, tiling: Tiling) -> Tensor:
        """Return some features of the rows of terms."""
        return self.take(e if self.row_of is None else self.row_of[e], n, q, tiling)


class Sums:
    """Sums of messages in the rows of a result; 16-bit sums are rounded once, unless float32 sums take too much."""

    def __init__(self, out: Tensor, tiling: Tiling) -> None:
        fits = out.dtype == tiling.sum_dtype or out.numel() > 2 * tiling.elements
        self._dtype = out.dtype if fits else tiling.sum_dtype
        self._out = out.flatten(0, -2)
        self._total: Tensor | None = None
        self._written = False

    @property
    def total(self) -> Tensor:
        """The sums so far (rows, features), for x and g a row for each point."""
        if self._total is None:
            direct = self._dtype == self._out.dtype
            self._total = self._out.zero_() if direct else torch.zeros_like(self._out, dtype=self._dtype)
        return self._total

    def written(self) -> Tensor:
        """Return the result (rows, features) for a caller that writes each row once and adds nothing."""
        self._written = True
        return self._out

    def add(self, row: Tensor, messages: Tensor) -> None:
        self.total.index_add_(0, row, messages.to(self.total.dtype))

    def store(self) -> None:
        if not self._written and self.total is not self._out:
            self._out.copy_(self.total)


class _Batch(NamedTuple):
    """Pieces at one point, or at all points of their rows: the terms and points of each slot, and the rows."""

    e: Tensor
    n: Tensor | int
    valid: Tensor | None
    row: Tensor
    row_n: int


class Contraction:
    """One schedule on one call: loops over batches of pieces and over tiles of the products with H.

    The loops are `collect`, `weight_grad` and `expand`. The other public methods are their steps, on one batch: a
    subclass with kernels replaces them all, and the type of a batch.
    """

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
        self.weight = None if weight is None else weight.permute(axes)
        self.tiling, self.terms, self.N = tiling, terms, points
        self.of_terms = schedule == "fold"  # a row for each term
        self.index = None if self.of_terms else getattr(terms, INDEX[self.names[0]])
        self.by = None if self.index is None else terms.sort(INDEX[self.names[0]])
        self.pairs = self.names[0] == "z"  # a row of z has all points of its terms
        self.columns = max(1, min(self.Q, tiling.elements // max(1, self.P * self.C)))
        self._matrix: Tensor | None = None

    def collect(self, u: Factor, v: Factor, w: Factor, out: Sums) -> None:
        """Compute out_w."""
        for b in self.batches(u.rows.device):
            total: Tensor | None = None
            for q in self._slabs():
                A = self.outer_sum(b, u, v, q).flatten(1)
                if total is None:
                    total = torch.zeros(len(A), self.P, dtype=self.tiling.sum_dtype, device=A.device)
                accumulate(total, A, self._head(q).T)
                del A  # before the next tile is allocated
            if total is not None:
                self.add_to_rows(b, w, total, out)

    def weight_grad(self, u: Factor, v: Factor, w: Factor, dh: Tensor) -> None:
        """Compute dH (O, I, R)."""
        dh = dh.permute([AXES[name] for name in self.names])
        for q in self._slabs():
            shape = self.P, (q.stop - q.start) * self.C
            total = torch.zeros(shape, dtype=self.tiling.sum_dtype, device=dh.device)
            for b in self.batches(dh.device):
                accumulate(total, self.own(b, w).T, self.outer_sum(b, u, v, q).flatten(1))
            dh[:, q] = total.view(self.P, q.stop - q.start, self.C)

    def expand(self, u: Factor, v: Factor, w: Factor, out_u: Sums | None, out_v: Sums | None) -> None:
        """Compute out_u and out_v, those that are given."""
        for b in self.batches(w.rows.device):
            to_u = None if out_u is None else self.messages(b, u, out_u, self.Q)
            to_v = None if out_v is None else self.messages(b, v, out_v, self.C)
            if to_v is not None and not self.Q:  # a sum of nothing
                to_v.zero_()
            own = self.own(b, w)
            for q in self._slabs():
                M = torch.mm(own, self._head(q)).view(len(own), q.stop - q.start, self.C)
                if to_u is not None:
                    self.row_products(b, M, v, slice(0, self.C), to_u, q, False)
                if to_v is not None:
                    self.row_products(b, M.mT, u, q, to_v, slice(0, self.C), q.start > 0)
                del M  # before the next tile is allocated
            if out_u is not None and to_u is not None:
                self.send(b, u, to_u, out_u)
            if out_v is not None and to_v is not None:
                self.send(b, v, to_v, out_v)
            del to_u, to_v

    def _slabs(self) -> Iterator[slice]:
        return blocks(self.Q, self.columns)

    def _head(self, q: slice) -> Tensor:
        """Return H[:, q] as a matrix (P, q·c); a copy where strides or dtype need one, made once if it is all of H."""
        assert self.weight is not None
        if q.stop - q.start < self.Q:
            return self.tiling.work(self.weight[:, q]).reshape(self.P, (q.stop - q.start) * self.C)
        if self._matrix is None:
            self._matrix = self.tiling.work(self.weight).reshape(self.P, self.Q * self.C)
        return self._matrix

    def _pieces(self, device: torch.device) -> Iterator[Pieces]:
        points = self.N if self.pairs else 1
        sizes = points, self.columns * self.C + self.P, self.Q + self.C, self.tiling.elements
        pieces = (each.to(device) for each in cut(self.by, self.terms.num_terms, *sizes))
        if self.index is None:
            return pieces
        return iter(kept(self.index, ("pieces", *sizes), self.by, lambda: list(pieces)))

    def batches(self, device: torch.device) -> Iterator[Any]:
        """Return all pieces, a tile's worth at a time."""
        points = self.N if self.pairs else 1
        for row, start, length, width in self._pieces(device):
            slot = torch.arange(width, device=device)
            valid = slot < length.unsqueeze(1)
            at = torch.where(valid, start.unsqueeze(1) + slot, start.unsqueeze(1))
            n = at % points if points > 1 else 0
            at = at // points if points > 1 else at
            e = at if self.by is None else self.by.order[at]
            full = valid.all() if device.type == "cpu" else False  # on a GPU, this would wait for it
            for row_n in range(1 if self.pairs else self.N):
                yield _Batch(e, n if self.pairs else row_n, None if full else valid, row, row_n)

    def outer_sum(self, b: Any, u: Factor, v: Factor, q: slice) -> Tensor:
        """Return A (K, q, C) of K pieces."""
        left, right = u.of_terms(b.e, b.n, q, self.tiling), v.of_terms(b.e, b.n, slice(None), self.tiling)
        if b.valid is not None:
            absent = ~b.valid.unsqueeze(2)  # both are zero there, because infinity times zero is not a number
            left, right = left.masked_fill(absent, 0), right.masked_fill(absent, 0)
        return torch.bmm(left.mT, right)

    def _row(self, b: _Batch, w: Factor) -> Tensor:
        return w.row_of[b.row] if self.of_terms and w.row_of is not None else b.row

    def own(self, b: Any, w: Factor) -> Tensor:
        """Return w (K, P) of the pieces' rows."""
        return w.take(self._row(b, w), b.row_n, slice(None), self.tiling)

    def add_to_rows(self, b: Any, w: Factor, total: Tensor, out: Sums) -> None:
        """Add a sum (K, P) for each piece to its row."""
        row = self._row(b, w)
        out.add(row * w.points + b.row_n if w.has_points else row, total)

    def messages(self, b: Any, f: Factor, out: Sums, features: int) -> Any:
        """Return memory for what the terms of a batch add to rows of `out`, with `features` numbers for each term."""
        return torch.empty(*b.e.shape, features, dtype=self.tiling.dtype, device=b.e.device)

    def row_products(self, b: Any, M: Tensor, f: Factor, features: slice, to: Any, part: slice, add: bool) -> None:
        """Compute to[e, a] = Σ_b M[k, a, b] f[e, b] for the terms e of all pieces k, or add it.

        `features` are those of f, and `part` those of `to`.
        """
        rows, to = f.of_terms(b.e, b.n, features, self.tiling), to[..., part]
        to.baddbmm_(rows, M.mT) if add else torch.bmm(rows, M.mT, out=to)

    def send(self, b: Any, f: Factor, messages: Any, out: Sums) -> None:
        """Add the messages of a batch to the rows that they are for."""
        row = f.where(b.e, b.n)
        if b.valid is not None and row.device.type == "cpu":
            row, messages = row[b.valid], messages[b.valid]
        elif b.valid is not None:  # a GPU does not wait for the number of those that are valid
            messages = messages.masked_fill(~b.valid.unsqueeze(2), 0)
        out.add(row.flatten(), messages.flatten(0, -2))


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    terms: Terms,
    schedule: str,
    tiling: Tiling,
    contraction: type[Contraction] = Contraction,
    sum_terms: SumTerms = sum_terms,
) -> Tensor:
    """Return y (T, N, O) by a schedule."""
    (O, I, R), N = weight.shape, x.shape[1]
    y = x.new_empty(terms.targets, N, O)
    out = Sums(y, tiling)
    named = {"x": Factor(x, terms.source, N), "z": Factor(z, terms.cond, N), "g": Factor(y, terms.target, N)}
    w, u, v = (named[name] for name in FACTORS[schedule])
    run = contraction(schedule, weight, (O, I, R), terms, N, tiling)
    if run.names[0] == "g":
        run.collect(u, v, w, out)
    else:
        run.expand(u, v, w, out, None)
    out.store()
    Bases(terms, tiling, sum_terms).add(y, x, z, bias, base_weight, base_bias)
    return y


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    terms: Terms,
    schedule: str,
    tiling: Tiling,
    contraction: type[Contraction] = Contraction,
    sum_terms: SumTerms = sum_terms,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0 and b0 by a schedule, where the mask is set."""
    O, N, I = g.shape[2], x.shape[1], x.shape[2]
    R = cast(Tensor, z if weight is None else weight).shape[-1]
    dx = x.new_empty(terms.sources, N, I) if mask[0] else None
    dz = x.new_empty(terms.conds, R) if mask[1] else None
    dh = x.new_empty(O, I, R) if mask[2] else None
    z = x.new_empty(terms.conds, R) if z is None else z  # only dz is requested, which does not read it
    named = {"x": Factor(x, terms.source, N), "z": Factor(z, terms.cond, N), "g": Factor(g, terms.target, N)}
    sums = {name: Sums(out, tiling) for name, out in (("x", dx), ("z", dz)) if out is not None}
    run = contraction(schedule, weight, (O, I, R), terms, N, tiling)
    w, u, v = (named[name] for name in run.names)
    own, *others = (sums.get(name) for name in run.names)
    if own is not None:
        run.collect(u, v, w, own)
    if any(out is not None for out in others):
        run.expand(u, v, w, others[0], others[1])
    if dh is not None:
        run.weight_grad(u, v, w, dh)
    for out in sums.values():
        out.store()
    bases = Bases(terms, tiling, sum_terms)
    bases.add_to_grads(dx, dz, g, bias, base_weight)
    return dx, dz, dh, *bases.grads(x, z, g, R, mask)
