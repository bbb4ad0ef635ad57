"""Shared by the schedules: blocks, tiles in the work dtype, sums in float32, and the bias and base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import processor
from ...problem import Plan


def blocks(size: int, step: int) -> Iterator[slice]:
    """Cut range(size) into slices of at most `step` (at least 1)."""
    step = max(1, step)
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


def head_matrix(weight: Tensor) -> Tensor | None:
    """View (O, I, R) as (O·I, R); None where the view, or a matrix product with it, would copy."""
    O, I, R = weight.shape
    s, t, u = weight.stride()
    merges = O <= 1 or I <= 1 or s == t * I
    unit = u == 1 or R <= 1 or (t if I > 1 else s) == 1
    return weight.flatten(0, 1) if merges and unit else None


class Tiling(NamedTuple):
    """How many elements a tile may hold, its dtype, and the dtype of sums over tiles."""

    elements: int
    dtype: torch.dtype
    sum_dtype: torch.dtype

    def work(self, t: Tensor) -> Tensor:
        """Convert an operand, at most a tile of it, to the work dtype."""
        return t.to(self.dtype)

    def target(self, out: Tensor) -> Tensor:
        """Return where to compute a tile of an output: the output itself if possible, else a buffer; see `put`."""
        if out.dtype == self.dtype and out.is_contiguous():
            return out
        return torch.empty(out.shape, dtype=self.dtype, device=out.device)


def tiling_of(plan: Plan) -> Tiling:
    """Return the size and the dtypes of a plan's tiles."""
    low = plan.work_dtype in (torch.bfloat16, torch.float16)
    return Tiling(plan.tile, plan.work_dtype, torch.float32 if low else plan.work_dtype)


class Head:
    """A block (O, I, R) of the head, as a matrix that a product with z or with dW reads without a copy.

    Rows are (o, i), or (i, o) where the block is the transposed view of a head. A block in another dtype or with other
    strides is copied: at once if it is at most a tile, else a range of inputs of one output at a time.
    """

    def __init__(self, weight: Tensor, tiling: Tiling):
        self._weight, self._tiling = weight, tiling
        self._swapped = False
        self._rows = None
        if weight.dtype == tiling.dtype:
            self._rows = head_matrix(weight)
            if self._rows is None:
                self._rows = head_matrix(weight.transpose(0, 1))
                self._swapped = self._rows is not None
        if self._rows is None and weight.numel() <= tiling.elements:
            self._rows = tiling.work(weight).contiguous().flatten(0, 1)

    def _pieces(self) -> Iterator[tuple[int, slice, Tensor]]:
        O, I, R = self._weight.shape
        for o in range(O):
            for i in blocks(I, self._tiling.elements // max(R, 1)):
                yield o, i, self._tiling.work(self._weight[o, i])

    def weights(self, z: Tensor, room: Tensor | None = None) -> Tensor:
        """Return W[b,o,i] = Σ_r H[o,i,r] z[b,r] for a block of instances, in the memory of `room` if it is given."""
        O, I, _ = self._weight.shape
        if self._rows is not None:
            w = torch.mm(z, self._rows.T, out=None if room is None else cut(room, len(z), O * I))
            return w.view(len(z), I, O).mT if self._swapped else w.view(len(z), O, I)
        w = z.new_empty(len(z), O, I) if room is None else cut(room, len(z), O, I)
        for o, i, h in self._pieces():
            w[:, o, i] = torch.mm(z, h.T)
        return w

    def contract(self, total: Tensor, dw: Tensor, one: bool = False) -> None:
        """Compute total[b,r] += Σ_{o,i} dW[b,o,i] H[o,i,r]; `one`: total has no other products of tiles."""
        if self._rows is not None:
            a = (dw.mT if self._swapped else dw).flatten(1)
            if one and total.dtype != a.dtype == self._rows.dtype:
                total += a @ self._rows
                return None
            return accumulate(total, a, self._rows)
        for o, i, h in self._pieces():
            accumulate(total, dw[:, o, i], h)


def put(out: Tensor, tile: Tensor) -> None:
    """Write a finished tile to the output, unless it was computed there."""
    if tile.data_ptr() != out.data_ptr():
        out.copy_(tile)


def cut(room: Tensor, *shape: int) -> Tensor:
    """Return a tensor of this shape in the memory of a larger one with one axis."""
    return room[: math.prod(shape)].view(shape)


def outer(g: Tensor, x: Tensor, tiling: Tiling, room: Tensor | None = None) -> Tensor:
    """Return dW[b,o,i] = Σ_n g[b,n,o] x[b,n,i] for a block of instances, in the memory of `room` if it is given."""
    B, N, O = g.shape
    I = x.shape[2]
    if N == 1:  # several times faster than a batched product with K = 1
        out = torch.empty(B, O, I, dtype=tiling.dtype, device=x.device) if room is None else cut(room, B, O, I)
        return torch.mul(tiling.work(g).mT, tiling.work(x), out=out)
    dw = torch.empty(B, O, I, dtype=tiling.dtype, device=x.device) if room is None else cut(room, B, O, I)
    if g.dtype == x.dtype == tiling.dtype and g.is_contiguous() and x.is_contiguous():
        return torch.bmm(g.mT, x, out=dw)  # reads both in place
    direct = tiling.dtype == tiling.sum_dtype
    wide = max(1, O, I)
    instances = max(1, tiling.elements // (wide * max(1, min(N, _POINTS))))
    points = tiling.elements // (wide * min(instances, max(1, B)))
    # The sums of many points are in float32, for so many outputs that they and a product are at most a tile.
    outputs = O if direct or points >= N else tiling.elements // 2 // (instances * max(1, I))
    for b in blocks(B, instances):
        for o in blocks(O, outputs):
            if points >= N:
                torch.bmm(_operand(g[b], tiling).mT, _operand(x[b], tiling), out=dw[b])
                continue
            total = dw[b] if direct else torch.empty_like(dw[b, o], dtype=tiling.sum_dtype)
            total.zero_()
            for n in blocks(N, points):
                accumulate_batches(total, _operand(g[b, n, o], tiling).mT, _operand(x[b, n], tiling))
            put(dw[b, o], total)
            del total  # before the next is allocated
    return dw


def _operand(t: Tensor, tiling: Tiling) -> Tensor:
    """Convert an operand of a batched product; in 16 bits a product would copy other strides itself, slower."""
    t = tiling.work(t)
    return t if tiling.dtype == tiling.sum_dtype else t.contiguous()


# Points up to which a product is bound by adding it up.
_POINTS = 512
# Elements of a product that is rounded before it is added, so that it is still in cache.
ROUNDED = 1 << 18
# A product of fewer numbers is faster in float32.
_SMALL = 1 << 19
# Elements of an operand that are converted at a time, and the least depth of their product.
_CONVERTED, _DEEP = 1 << 17, 256


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Return whether a product of matrices, or of batches of them, is fastest in bfloat16, with a rounded result.

    Float16 is left out: a product may leave its range where the sum of several does not.
    """
    bfloat16 = a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu"
    return bfloat16 and a.numel() * b.shape[-1] >= _SMALL and processor.has_fast(torch.bfloat16)


def accumulate(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """Compute total = beta·total + a·b; the sum has the dtype of total, even if a and b have fewer bits.

    Processors that multiply bfloat16 round each product: torch has none with a result in float32. The errors of many
    products add up to about one rounding of the sum.
    """
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda and a.dtype == b.dtype:
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.add_(product) if beta else total.copy_(product)
    elif multiplies(a, b):
        for rows in blocks(len(a), ROUNDED // max(1, b.shape[1])):
            product = torch.mm(a[rows], b)
            total[rows].add_(product) if beta else total[rows].copy_(product)
    else:
        for k in blocks(max(1, len(b)), max(_DEEP, _CONVERTED // max(1, b.shape[1]))):
            total.addmm_(a[:, k].to(total.dtype), b[k].to(total.dtype), beta=beta)
            beta = 1


def accumulate_batches(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a·b for each instance, in the dtype of total."""
    if total.is_cuda and a.dtype != total.dtype:
        total.add_(torch.bmm(a, b, out_dtype=total.dtype))
    elif multiplies(a, b):
        for some in blocks(len(a), ROUNDED // max(1, total[0].numel())):
            total[some] += torch.bmm(a[some], b[some])
    else:
        total.baddbmm_(a.to(total.dtype), b.to(total.dtype))


def _has_features_first(t: Tensor) -> bool:
    """Return whether the last axis, the features of z, is the slowest in memory."""
    return t.stride(-1) > max(t.stride()[:-1])


def _matrix_like(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new matrix (O·I, R) with features as the slowest axis if they are that of a block (O, I, R)."""
    O, I, R = out.shape
    if _has_features_first(out):
        return torch.empty(R, O * I, dtype=dtype, device=out.device).T
    return torch.empty(O * I, R, dtype=dtype, device=out.device)


class Sum:
    """A sum of products a·b into a block (o, i, R) of dH, rounded once, at the end; `one`: it is a single product."""

    def __init__(self, out: Tensor, tiling: Tiling, one: bool = False):
        O, I, R = out.shape
        direct = out.dtype == (tiling.dtype if one else tiling.sum_dtype)
        self._out = out
        self._total = out.view(O * I, R) if direct else _matrix_like(out, tiling.sum_dtype)
        self._empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        total, beta = self._total, 0 if self._empty else 1
        if _has_features_first(total) and total.dtype != a.dtype and not total.is_cuda:
            # few features, the slowest axis: the product is bound by reading, and is in float32 while it is in cache
            for some in blocks(len(a), ROUNDED // max(1, a.shape[1])):
                total[some].addmm_(a[some].to(total.dtype), b.to(total.dtype), beta=beta)
        else:
            accumulate(total, a, b, beta)
        self._empty = False

    def add_rows(self, rows: Tensor) -> None:
        """Add Σ rows[b], as `add` does with a z of ones."""
        total = rows.sum(0, dtype=self._total.dtype).unsqueeze(1)
        if self._empty:
            self._total.copy_(total)
        else:
            self._total += total
        self._empty = False

    def store(self) -> None:
        if self._empty:
            self._out.zero_()
        elif self._out.dtype != self._total.dtype:
            self._out.copy_(self._total.view(self._out.shape))


class Affine(NamedTuple):
    """The terms that are added to T(x, z, H), tile by tile: W0 x + bias·z + b0."""

    x: Tensor
    z: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None
    tiling: Tiling

    def add(self, y: Tensor, b: slice, n: slice, o: slice) -> None:
        """Add the block [b, n, o] in place."""
        if self.base_weight is None and self.bias is None and self.base_bias is None:
            return
        work, room = self.tiling.work, self.tiling.elements // max(1, self.x.shape[2], self.z.shape[1])
        for piece in blocks(o.stop - o.start, room):
            out, of = y[:, :, piece], slice(o.start + piece.start, o.start + piece.stop)
            if self.base_weight is not None:
                out += torch.matmul(work(self.x[b, n]), work(self.base_weight[of]).T)
            if self.bias is not None:
                out += torch.mm(work(self.z[b]), work(self.bias[of]).T).unsqueeze(1)
            if self.base_bias is not None:
                out += work(self.base_bias[of])

    def start(self, g: Tensor, R: int) -> Tensor:
        """Return the start of a sum of dz for a block of instances: the term of the generated bias, or zeros."""
        B, N, O = g.shape
        total = torch.zeros(B, R, dtype=self.tiling.sum_dtype, device=g.device)
        if self.bias is None:
            return total
        for o in blocks(O, self.tiling.elements // max(1, R)):
            bias = self.tiling.work(self.bias[o])
            for b, n in boxes(B, N, o.stop - o.start, self.tiling):
                accumulate(total[b], self.tiling.work(g[b, n, o]).sum(1, dtype=total.dtype), bias)
        return total


def boxes(B: int, N: int, features: int, tiling: Tiling) -> Iterator[tuple[slice, slice]]:
    """Cut instances and points into blocks whose `features` columns are at most a tile."""
    room = max(1, tiling.elements // max(1, features))
    for b in blocks(B, max(1, room // max(1, N))):
        for n in blocks(N, room):
            yield b, n
