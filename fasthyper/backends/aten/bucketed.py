"""`generate` for many terms of few conditions, in batched products of processors that multiply bfloat16.

    W[c]  = H·z[c]                      y[t(e)]  += W[c] x[s(e)]       dx[s(e)] += W[c]ᵀ g[t(e)]
    dW[c] = Σ_{e: c(e)=c} g ⊗ x         dz[c] = Σ_{o,i} dW[c,o,i] H[o,i]      dH[o,i] = Σ_c dW[c,o,i] z[c]

The W of a block of conditions is a tile. Conditions with similar numbers of terms are a bucket: one batched product,
padded to the largest number. One pass computes all gradients. What terms send to rows that they share is added in
float32; a row of one term is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import Plan
from ...terms import Terms, kept
from .term_bases import SumTerms
from .tiling import Head, Sum, Tiling, blocks

DTYPE = torch.bfloat16
# With fewer terms of a condition on average, or a smaller W, the kernels are faster: they make no padded copies.
_LEAST_TERMS = 48
_LEAST_WEIGHTS = 1 << 11
_PIECES = 4  # of a tile, or more: larger blocks of memory are returned to the system, and cleared anew in every call
_PADDING = 1.1  # a bucket has at most this many times the slots that its terms take
_SLOTS = 1 << 12  # of a bucket, or more if it is one condition: making it takes several times its memory


class Bucket(NamedTuple):
    """Some of the ascending conditions and the slots (conditions · width) of their terms.

    Args:
        conds: the range of the conditions.
        width: the slots of each: the largest number of terms.
        absent: the slots without a term.
        before: how many of these precede each condition and the end.
    """

    conds: slice
    width: int
    absent: Tensor
    before: list[int]


class Buckets(NamedTuple):
    """All conditions with terms, ascending in their number. They are the same for all sizes of layers.

    What is kept with the indices of terms is this and the rows of the slots, of 32 bits: it takes about as much memory
    as the order of the terms.

    Args:
        conds: the conditions.
        most: the largest number of terms, or 0.
        buckets: their buckets.
        of: the number of the bucket of each.
    """

    conds: Tensor
    most: int
    buckets: list[Bucket]
    of: list[int]

    @classmethod
    def find(cls, terms: Terms) -> Buckets:
        """Return those of a call."""
        by = terms.sort("cond")
        assert by is not None
        assert terms.cond is not None

        def make() -> Buckets:
            counts, conds = by.ptr.diff().sort(stable=True)
            conds, each = conds[counts > 0], counts[counts > 0].tolist()
            found = [_bucket(each, some, conds.device) for some in _similar(each)]
            of = [k for k, b in enumerate(found) for _ in range(b.conds.start, b.conds.stop)]
            return cls(conds, max(each, default=0), found, of)

        return kept(terms.cond, "buckets", by, make)

    def rows(self, terms: Terms, index: Tensor | None) -> list[Tensor]:
        """Return, for each bucket, the values of an index of the terms in the slots.

        A slot without a term has those of another term of its condition.
        """
        by = terms.sort("cond")
        assert by is not None
        assert terms.cond is not None

        def of(b: Bucket) -> Tensor:
            start, end = by.ptr[self.conds[b.conds]].unsqueeze(1), by.ptr[self.conds[b.conds] + 1].unsqueeze(1)
            at = start + torch.arange(b.width, device=start.device)
            slots = by.order[at.where(at < end, start).flatten()]
            return (slots if index is None else index[slots]).int()

        make = lambda: [of(b) for b in self.buckets]
        return kept(terms.cond, "slots", self, make) if index is None else kept(index, "rows of slots", self, make)

    def pieces(self, block: slice, most: int, of_x: list[Tensor], of_y: list[Tensor]) -> Iterator[Piece]:
        """Cut the buckets of a block of conditions so that a piece has at most this many slots, or one condition."""
        for k in range(self.of[block.start], self.of[block.stop - 1] + 1):
            b = self.buckets[k]
            first, last = max(b.conds.start, block.start), min(b.conds.stop, block.stop)
            for some in blocks(last - first, most // b.width):
                conds = slice(first + some.start, first + some.stop)
                start, stop = conds.start - b.conds.start, conds.stop - b.conds.start
                slots = slice(start * b.width, stop * b.width)
                absent = b.absent[b.before[start] : b.before[stop]]
                absent = absent - slots.start if start and len(absent) else absent
                own = slice(conds.start - block.start, conds.stop - block.start)
                yield Piece(own, of_x[k][slots], of_y[k][slots], absent)


def _similar(counts: list[int]) -> Iterator[slice]:
    """Cut ascending counts into buckets with little padding."""
    first = taken = 0
    for k, width in enumerate(counts):
        size = (k + 1 - first) * width
        if k > first and (size > _PADDING * (taken + width) or size > _SLOTS):
            yield slice(first, k)
            first, taken = k, 0
        taken += width
    yield slice(first, len(counts))


def _bucket(counts: list[int], some: slice, device: torch.device) -> Bucket:
    own, width = counts[some], counts[some.stop - 1]
    is_absent = torch.arange(width, device=device) >= torch.tensor(own, device=device).unsqueeze(1)
    before = list(accumulate((width - n for n in own), initial=0))
    return Bucket(some, width, is_absent.flatten().nonzero()[:, 0], before)


class Piece(NamedTuple):
    """One batched product: some conditions of a block and the slots of their terms.

    Args:
        conds: their range in the block.
        of_x: the row of x of each slot, of 32 bits.
        of_y: the row of y.
        absent: the slots without a term.
    """

    conds: slice
    of_x: Tensor
    of_y: Tensor
    absent: Tensor

    def rows(self, t: Tensor, index: Tensor) -> Tensor:
        """Return the rows (conditions, width, features) of t (rows, 1, features) in the slots."""
        return t[:, 0].index_select(0, index).unflatten(0, (self.conds.stop - self.conds.start, -1))

    def clear(self, t: Tensor) -> Tensor:
        """Write zeros to the slots without a term of t (conditions, width, features); return it as rows."""
        flat = t.flatten(0, 1)
        return flat.index_fill_(0, self.absent, 0) if len(self.absent) else flat


def takes(plan: Plan, x: Tensor, O: int, R: int, terms: Terms) -> bool:
    """Return whether a call is one of few conditions in bfloat16 that has no points, and all that it adds up fits.

    The sums in rows of x and y and, with several blocks, that of dH are in float32.
    """
    I, room = x.shape[2], plan.tile
    if terms.cond is None or x.shape[1] != 1 or plan.schedule != "generate" or not x.dtype == plan.work_dtype == DTYPE:
        return False
    if O * I < _LEAST_WEIGHTS or not 0 < _LEAST_TERMS * terms.conds <= terms.num_terms < 1 << 31:
        return False
    of_x = 0 if terms.source is None else terms.sources * I
    of_y = 0 if terms.target is None else terms.targets * O
    of_head = 0 if terms.conds * O * I <= room else O * I * R
    if max(of_x, of_y) > 2 * room or max(O * I, of_head) > room:
        return False
    return Buckets.find(terms).most * max(I, O) <= room


def _blocks(terms: Terms, I: int, O: int, tiling: Tiling) -> list[tuple[Tensor, Iterator[Piece]]]:
    """Return the blocks, ascending in the number of terms: the conditions, and their pieces.

    Conditions without terms are in none.
    """
    found, room = Buckets.find(terms), tiling.elements
    most, rows = room // _PIECES // max(I, O), (found.rows(terms, terms.source), found.rows(terms, terms.target))
    return [(found.conds[b], found.pieces(b, most, *rows)) for b in blocks(len(found.conds), room // (O * I))]


class _Result:
    """A result (rows, features) of what terms send; `shared`: several terms may send to one row."""

    def __init__(self, like: Tensor, rows: int, features: int, shared: bool, tiling: Tiling, sum_terms: SumTerms):
        self._shared, self._sum_terms, self._dtype = shared, sum_terms, like.dtype
        if shared:
            self._out = like.new_zeros(rows, features, dtype=tiling.sum_dtype)
        else:  # each row is written, by its only term
            self._out = like.new_empty(rows, features)

    def add(self, messages: Tensor, p: Piece, rows: Tensor) -> None:
        """Add the messages (conditions, width, features) of the slots of a piece to these rows; may clear some."""
        if self._shared:
            self._sum_terms(self._out, p.clear(messages), None, rows.long())
        else:  # a slot without a term repeats the message of one
            self._out.index_copy_(0, rows.long(), messages.flatten(0, 1))

    def result(self) -> Tensor:
        """Return the result (rows, 1, features)."""
        return self._out.to(self._dtype).unsqueeze(1)


def apply(x: Tensor, z: Tensor, weight: Tensor, terms: Terms, tiling: Tiling, sum_terms: SumTerms) -> Tensor:
    """Return y (T, 1, O) of x (S, 1, I)."""
    O, I, _ = weight.shape
    y, head = _Result(x, terms.targets, O, terms.target is not None, tiling, sum_terms), Head(weight, tiling)
    for conds, pieces in _blocks(terms, I, O, tiling):
        W = head.weights(z.index_select(0, conds)).mT
        for p in pieces:
            y.add(torch.bmm(p.rows(x, p.of_x), W[p.conds]), p, p.of_y)
    return y.result()


def grads(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    terms: Terms,
    tiling: Tiling,
    sum_terms: SumTerms,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx (S, 1, I), dz (C, R) and dH (O, I, R) where the mask is set."""
    I, O, (C, R) = x.shape[2], g.shape[2], z.shape
    head = None if weight is None else Head(weight, tiling)
    dx = _Result(x, terms.sources, I, terms.source is not None, tiling, sum_terms) if mask[0] else None
    dz = z.new_zeros(C, R) if mask[1] else None
    dh = z.new_empty(O, I, R) if mask[2] else None
    each = _blocks(terms, I, O, tiling)
    total = None if dh is None else Sum(dh, tiling, one=len(each) == 1)
    for conds, pieces in each:
        own = z.index_select(0, conds)
        W = head.weights(own) if head is not None and dx is not None else None
        dW = z.new_empty(len(conds), O, I) if mask[1] or mask[2] else None
        for p in pieces:
            left = p.rows(g, p.of_y)
            if dx is not None and W is not None:
                dx.add(torch.bmm(left, W[p.conds]), p, p.of_x)
            if dW is not None:
                right = p.rows(x, p.of_x)
                p.clear(left), p.clear(right)  # both, because infinity times zero is not a number
                torch.bmm(left.mT, right, out=dW[p.conds])
        if dz is not None and dW is not None and head is not None:
            of_z = z.new_zeros(len(conds), R, dtype=tiling.sum_dtype)
            head.contract(of_z, dW, one=True)
            dz[conds] = of_z.to(dz.dtype)
        if total is not None and dW is not None:
            total.add(dW.flatten(1).T, own)
    if total is not None:
        total.store()
    return None if dx is None else dx.result(), dz, dh
