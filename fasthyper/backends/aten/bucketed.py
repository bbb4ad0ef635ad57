"""`generate` for many terms of few conditions, in batched products of processors that multiply bfloat16.

    W[c]  = H·z[c]                      y[t(e)]  += W[c] x[s(e)]       dx[s(e)] += W[c]ᵀ g[t(e)]
    dW[c] = Σ_{e: c(e)=c} g ⊗ x         dz[c] = Σ_{o,i} dW[c,o,i] H[o,i]      dH[o,i] = Σ_c dW[c,o,i] z[c]

The W of a block of conditions is a tile. Conditions with similar numbers of terms are a bucket: one batched product,
padded to the largest number. One pass computes all gradients. What terms send to rows that they share is added in
float32; a row of one term is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import Plan
from ...terms import Sorted, Terms, kept
from .term_bases import SumTerms
from .tiling import Head, Sum, Tiling, blocks

DTYPE = torch.bfloat16
# With fewer terms of a condition on average, or a smaller W, the kernels are faster: they make no padded copies.
_LEAST_TERMS = 48
_LEAST_WEIGHTS = 1 << 11
_BUCKETS = 4  # of a tile, or more: larger blocks of memory are returned to the system, and cleared anew in every call
_PADDING = 2  # a bucket has at most this many times the slots that its terms take


class Bucket(NamedTuple):
    """Some conditions of a block and the slots (conditions · width) of their terms.

    Args:
        conds: their range in the block.
        slots: the term of each slot; for a slot without a term, another term of its condition.
        absent: the slots without a term.
        present: the slots with one.
        terms: their terms.
    """

    conds: slice
    slots: Tensor
    absent: Tensor
    present: Tensor
    terms: Tensor

    def through(self, index: Tensor | None) -> Rows:
        """Return the rows that an index gives to the slots and to the terms."""
        return Rows(self.slots, self.terms) if index is None else Rows(index[self.slots], index[self.terms])


class Rows(NamedTuple):
    """The rows of x or of y: of all slots, and of the slots with a term."""

    slots: Tensor
    terms: Tensor


class Block(NamedTuple):
    """Conditions whose W is a tile."""

    conds: Tensor
    buckets: list[Bucket]


def takes(plan: Plan, x: Tensor, O: int, R: int, terms: Terms) -> bool:
    """Return whether a call is one of few conditions in bfloat16 that has no points, and all that it adds up fits.

    The sums in rows of x and y and, with several blocks, that of dH are in float32.
    """
    I, room = x.shape[2], plan.tile
    if terms.cond is None or x.shape[1] != 1 or plan.schedule != "generate" or not x.dtype == plan.work_dtype == DTYPE:
        return False
    if O * I < _LEAST_WEIGHTS or not 0 < _LEAST_TERMS * terms.conds <= terms.num_terms:
        return False
    of_x = 0 if terms.source is None else terms.sources * I
    of_y = 0 if terms.target is None else terms.targets * O
    of_head = 0 if terms.conds * O * I <= room else O * I * R
    if max(of_x, of_y) > 2 * room or max(O * I, of_head) > room:
        return False
    by = terms.sort("cond")
    assert by is not None
    most = kept(terms.cond, "most", by, lambda: int(by.ptr.diff().max()))
    return most * max(I, O) <= room


def _blocks(terms: Terms, I: int, O: int, tiling: Tiling) -> list[tuple[Tensor, list[tuple[Bucket, Rows, Rows]]]]:
    """Return the blocks, ascending in the number of terms: the conditions, and for each bucket its rows of x and of y.

    Conditions without terms are in none.
    """
    by, room = terms.sort("cond"), tiling.elements
    assert by is not None
    assert terms.cond is not None

    def make() -> list[Block]:
        counts, conds = by.ptr.diff().sort(stable=True)
        conds, counts = conds[counts > 0], counts[counts > 0]
        return [
            Block(conds[some], [_bucket(by, conds[some], b) for b in _similar(counts[some].tolist(), I, O, room)])
            for some in blocks(len(conds), room // (O * I))
        ]

    found = kept(terms.cond, ("buckets", I, O, room), by, make)

    def rows(index: Tensor | None) -> list[list[Rows]]:
        make = lambda: [[b.through(index) for b in block.buckets] for block in found]
        return make() if index is None else kept(index, "rows of buckets", found, make)

    each = zip(found, rows(terms.source), rows(terms.target), strict=True)
    return [(block.conds, list(zip(block.buckets, of_x, of_y, strict=True))) for block, of_x, of_y in each]


def _similar(counts: list[int], I: int, O: int, room: int) -> Iterator[slice]:
    """Cut ascending counts so that a bucket is neither mostly padding nor a large part of a tile."""
    first = taken = 0
    for k, width in enumerate(counts):
        size = (k + 1 - first) * width
        if k > first and (size > _PADDING * (taken + width) or size * max(I, O) > room // _BUCKETS):
            yield slice(first, k)
            first, taken = k, 0
        taken += width
    yield slice(first, len(counts))


def _bucket(by: Sorted, conds: Tensor, some: slice) -> Bucket:
    start, end = by.ptr[conds[some]].unsqueeze(1), by.ptr[conds[some] + 1].unsqueeze(1)
    at = start + torch.arange(int((end - start).max()))
    is_term = (at < end).flatten()
    slots = by.order[at.where(at < end, start)].flatten()
    return Bucket(some, slots, (~is_term).nonzero()[:, 0], is_term.nonzero()[:, 0], slots[is_term])


class _Result:
    """A result (rows, features) of what terms send; `shared`: several terms may send to one row."""

    def __init__(self, like: Tensor, rows: int, features: int, shared: bool, tiling: Tiling, sum_terms: SumTerms):
        self._shared, self._sum_terms, self._dtype = shared, sum_terms, like.dtype
        dtype = tiling.sum_dtype if shared else like.dtype
        self._out = like.new_zeros(rows, features, dtype=dtype) if shared else like.new_empty(rows, features)

    def add(self, messages: Tensor, b: Bucket, rows: Rows) -> None:
        """Add the messages (conditions, width, features) of the slots of a bucket."""
        flat = messages.flatten(0, 1)
        if self._shared:
            self._sum_terms(self._out, flat, b.present, rows.terms)
        else:
            self._out.index_copy_(0, rows.terms, flat.index_select(0, b.present) if len(b.absent) else flat)

    def result(self) -> Tensor:
        """Return the result (rows, 1, features)."""
        return self._out.to(self._dtype).unsqueeze(1)


def _slots(t: Tensor, rows: Rows, b: Bucket) -> Tensor:
    """Return the rows (conditions, width, features) of the slots of a bucket."""
    return t[:, 0].index_select(0, rows.slots).unflatten(0, (b.conds.stop - b.conds.start, -1))


def apply(x: Tensor, z: Tensor, weight: Tensor, terms: Terms, tiling: Tiling, sum_terms: SumTerms) -> Tensor:
    """Return y (T, 1, O) of x (S, 1, I)."""
    O, I, _ = weight.shape
    y, head = _Result(x, terms.targets, O, terms.target is not None, tiling, sum_terms), Head(weight, tiling)
    for conds, buckets in _blocks(terms, I, O, tiling):
        W = head.weights(z.index_select(0, conds)).mT
        for b, of_x, of_y in buckets:
            y.add(torch.bmm(_slots(x, of_x, b), W[b.conds]), b, of_y)
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
    for conds, buckets in each:
        own = z.index_select(0, conds)
        W = head.weights(own) if head is not None and dx is not None else None
        dW = z.new_empty(len(conds), O, I) if mask[1] or mask[2] else None
        for b, of_x, of_y in buckets:
            left = _slots(g, of_y, b)
            if dx is not None and W is not None:
                dx.add(torch.bmm(left, W[b.conds]), b, of_x)
            if dW is not None:
                right = _slots(x, of_x, b)
                for t in (left, right):  # both, because infinity times zero is not a number
                    t.flatten(0, 1).index_fill_(0, b.absent, 0)
                torch.bmm(left.mT, right, out=dW[b.conds])
        if dz is not None and dW is not None and head is not None:
            of_z = torch.zeros(len(conds), R, dtype=tiling.sum_dtype)
            head.contract(of_z, dW, one=True)
            dz[conds] = of_z.to(dz.dtype)
        if total is not None and dW is not None:
            total.add(dW.flatten(1).T, own)
    if total is not None:
        total.store()
    return None if dx is None else dx.result(), dz, dh
