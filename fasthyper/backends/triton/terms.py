"""The family over terms by Triton kernels: the loops of `aten.terms.Contraction`, with kernels for all other steps.

    products with H     torch, on tiles of A and M that stay within the workspace
    A, products with M  `outer_sum` and `row_products` read the rows of x, z and g where they are
    sums                `sum_terms` adds what goes to other rows, in the order of these rows: no atomics
    fold                the kernels of the family without indices, on blocks of terms

The order of the terms, the pieces and the places of messages are computed once for each index. A call on a GPU then
waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ... import planner
from ...problem import Plan
from ...terms import Terms, kept, sort
from .. import gpu
from ..aten import terms as aten_terms
from ..aten import tiling_of
from ..aten.term_bases import Bases
from ..aten.terms import INDEX, Contraction, Factor, Sums
from ..aten.tiling import Tiling, blocks
from . import launch, term_calls
from .chunks import Chunk, Cut, Route, cut, cut_evenly, in_order, route, whole


def sum_terms(out: Tensor, rows: Tensor, source: Tensor | None, target: Tensor | None) -> None:
    """Compute out[target[e]] += rows[source[e]] for matrices: each row of out is one sum, in order.

    Rows with many terms are summed in pieces, and then their sums.
    """
    if source is None and target is None:
        out += rows
        return
    all_rows = range(len(out))
    if target is None:
        term_calls.sum_terms_call(out, rows, None, source, None, all_rows, all_rows, 0).launch()
        return
    by = sort(target, len(out))
    order = by.order if source is None else in_order(source, by)
    pieces = planner.get_workspace_limit() // 8 // (4 * rows.shape[1])
    counts = lambda: by.ptr.cpu().diff()
    cuts = kept(target, ("cut of sums", pieces), by, lambda: cut(counts(), out.device, max(1, pieces), len(target)))
    if not cuts.splits:
        term_calls.sum_terms_call(out, rows, by.ptr, order, None, all_rows, range(len(target)), 0).launch()
        return
    for chunk in cuts.chunks:
        some, first = chunk.pieces, chunk.pieces.start
        sums = torch.zeros(len(some), rows.shape[1], dtype=torch.float32, device=out.device)
        term_calls.sum_terms_call(sums, rows, cuts.ptr, order, None, some, chunk.positions, 0, first).launch()
        term_calls.sum_terms_call(out, sums, cuts.pieces_of, None, None, chunk.rows, some, first).launch()


def _room(tiling: Tiling, per_piece: int, P: int, per_term: int) -> tuple[int, int]:
    """Return how many pieces and positions a chunk may have.

    A or M, with the rows of w, their sum and the product that is added to it, has a quarter of the workspace, and
    messages have an eighth. The rest is for H and dH in tiles, and for sums in float32.
    """
    limit, size = planner.get_workspace_limit(), tiling.dtype.itemsize
    pieces = limit // 4 // max(1, per_piece * size + P * (size + 8))
    return max(1, pieces), max(1, limit // 8 // max(1, 4 * per_term))


class Batch(NamedTuple):
    """A chunk, by its number, at one point of its rows, or at all points."""

    number: int
    chunk: Chunk
    n: int


class Messages(NamedTuple):
    """Memory for what the terms of a batch add to the rows of a result, or that result.

    Args:
        into: a row for each position; or the result, if each term has its own row there: (rows, F) or (rows, N, F).
        rows: the row of each term, if it is the result; None for the identity.
        first: the position of the first row.
        is_result: whether it is the result.
    """

    into: Tensor
    rows: Tensor | None
    first: int
    is_result: bool


class Kernels(Contraction):
    """One schedule on one call: `project`, `generate` or `aggregate`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._points = self.N if self.pairs else 1  # positions of a term
        self._rooms = _room(self.tiling, self.columns * self.C, self.P, self.Q + self.C)
        self._known_rows: dict[int, Tensor] = {}
        self._known_cut: Cut | None = None

    def _cut(self, device: torch.device) -> Cut:
        if self._known_cut is None:
            self._known_cut = self._make_cut(device)
        return self._known_cut

    def _make_cut(self, device: torch.device) -> Cut:
        rooms, points, by = self._rooms, self._points, self.by
        if self.index is not None and by is not None:
            make = lambda: cut(by.ptr.cpu().diff() * points, device, *rooms)
            return kept(self.index, ("cut", points, *rooms), by, make)
        if points > 1:
            return cut_evenly(self.terms.num_terms, points, device, *rooms)
        return whole(self.terms.num_terms, min(rooms))

    def batches(self, device: torch.device) -> Iterator[Any]:
        for number, chunk in enumerate(self._cut(device).chunks):
            for n in range(1 if self.pairs else self.N):
                yield Batch(number, chunk, n)

    def _rows(self, f: Factor) -> Tensor | None:
        """Return the row of a factor at each term, in the order of the terms."""
        if self.by is None:
            return f.row_of
        if f.row_of is None:
            return self.by.order
        if id(f.row_of) not in self._known_rows:
            self._known_rows[id(f.row_of)] = in_order(f.row_of, self.by)
        return self._known_rows[id(f.row_of)]

    def _at(self, t: Tensor, f: Factor, b: Batch) -> Tensor:
        """Return the rows (rows, …, F) of a factor, or of sums of its shape, at the points of a batch."""
        t = t.view(-1, self.N, t.shape[-1]) if f.has_points and t.dim() == 2 else t
        return t[:, b.n] if f.has_points and not self.pairs else t

    def _how(self, t: Tensor) -> tuple[str, bool]:
        """Return the arch, and whether float32 may be rounded to TF32."""
        return launch.arch_of(t), gpu.allows_tf32()

    def outer_sum(self, b: Batch, u: Factor, v: Factor, q: slice) -> Tensor:
        pieces = b.chunk.pieces
        left, right = self._at(u.rows, u, b)[..., q], self._at(v.rows, v, b)
        A = torch.empty(len(pieces), q.stop - q.start, self.C, dtype=self.tiling.dtype, device=left.device)
        ptr, where = self._cut(A.device).ptr, (self._rows(u), self._rows(v), pieces.start, self._points)
        term_calls.outer_sum_call(left, right, A, ptr, *where, b.chunk.mean, *self._how(left)).launch()
        return A

    def own(self, b: Batch, w: Factor) -> Tensor:
        rows, row, pieces = self._at(w.rows, w, b), self._cut(w.rows.device).row, b.chunk.pieces
        chosen = slice(pieces.start, pieces.stop)
        return self.tiling.work(rows[chosen] if row is None else rows[row[chosen]])

    def add_to_rows(self, b: Batch, w: Factor, total: Tensor, out: Sums) -> None:
        to, pieces_of, pieces = self._at(out.total, w, b), self._cut(total.device).pieces_of, b.chunk.pieces
        if pieces_of is None:
            to[pieces.start : pieces.stop] += total
        else:
            rows = b.chunk.rows
            term_calls.sum_terms_call(to, total, pieces_of, None, None, rows, pieces, pieces.start).launch()

    def messages(self, b: Batch, f: Factor, out: Sums, features: int) -> Messages:
        """Return the result itself if each term has a row of its own there, which is rounded once."""
        positions = b.chunk.positions
        is_own = f.row_of is None and (f.has_points or self.N == 1)
        if is_own and self.columns >= self.Q:
            return Messages(self._at(out.written(), f, b), self._rows(f), 0, True)
        dtype = self.tiling.dtype if self.columns >= self.Q else self.tiling.sum_dtype
        into = torch.empty(len(positions), features, dtype=dtype, device=f.rows.device)
        return Messages(into, None, positions.start, False)

    def row_products(
        self, b: Batch, M: Tensor, f: Factor, features: slice, to: Messages, part: slice, add: bool
    ) -> None:
        chunk, rows = b.chunk, self._at(f.rows, f, b)[..., features]
        ptr = self._cut(M.device).ptr
        where = ptr, self._rows(f), to.rows, chunk.pieces.start, to.first, self._points
        how = chunk.width, chunk.mean, add, *self._how(M)
        term_calls.row_products_call(M, rows, to.into[..., part], *where, *how).launch()

    def send(self, b: Batch, f: Factor, messages: Messages, out: Sums) -> None:
        if messages.is_result:
            return
        positions, way = b.chunk.positions, self._route(f, messages.into.device)
        segments = range(way.first[b.number], way.first[b.number + 1])
        total = out.total if self.pairs else self._at(out.total, f, b)
        where = way.ptr, way.order, way.row, segments, positions, positions.start
        term_calls.sum_terms_call(total, messages.into, *where).launch()

    def _route(self, f: Factor, device: torch.device) -> Route:
        """Return the route from positions to the rows of a factor; in `generate`, to its points."""
        points, chunks = self._points, self._cut(device).chunks
        if f.row_of is None and points == 1:
            return Route(
                None, None, self._rows(f), [*(chunk.positions.start for chunk in chunks), self.terms.num_terms]
            )

        def make() -> Route:
            rows = self._rows(f)
            rows = torch.arange(self.terms.num_terms, device=device) if rows is None else rows
            if points > 1:
                rows = (rows.unsqueeze(1) * points + torch.arange(points, device=device)).flatten()
            return route(rows, len(f.rows) * points, chunks)

        key = "route", INDEX[self.names[0]], points, *self._rooms
        index, of = (f.row_of, self.by) if f.row_of is not None else (self.index, None)
        return make() if index is None else kept(index, key, of, make)


def _step(x: Tensor, O: int, R: int) -> int:
    """Return how many terms of `fold` fit an eighth of the workspace, with their rows and messages."""
    N, I = x.shape[1:]
    return max(1, planner.get_workspace_limit() // 8 // (2 * x.element_size() * (N * (I + O) + R)))


def _take(t: Tensor, index: Tensor | None, e: range) -> Tensor:
    """Return the rows of some terms."""
    return t[e.start : e.stop] if index is None else t[index[e.start : e.stop]]


class Fold:
    """The schedule `fold` on one call: the kernels of the family without indices, on blocks of terms."""

    def __init__(self, terms: Terms, step: int, tiling: Tiling) -> None:
        self.terms, self.tiling = terms, tiling
        self.step, self.chunks = step, whole(terms.num_terms, step).chunks

    def apply(self, x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        """Return y (T, N, O)."""
        source, cond, target = self.terms[:3]
        y = x.new_empty(self.terms.targets, x.shape[1], weight.shape[0])
        out = Sums(y, self.tiling)
        for number, chunk in enumerate(self.chunks):
            e = chunk.positions
            to = self._into(y, target, e)
            launch.apply(_take(x, source, e), _take(z, cond, e), weight, None, None, None, to)
            self._send(to, target, number, out)
        out.store()
        return y

    def grads(
        self, x: Tensor, z: Tensor | None, weight: Tensor | None, g: Tensor, R: int, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return dx (S, N, I), dz (C, R) and dH (O, I, R) where the mask is set."""
        source, cond, target = self.terms[:3]
        dh = self._weight_grad(x, cast(Tensor, z), g) if mask[2] else None  # before there are sums of dx and dz
        dx = x.new_empty(self.terms.sources, *x.shape[1:]) if mask[0] else None
        dz = x.new_empty(self.terms.conds, R) if mask[1] else None
        out_x, out_z = (None if t is None else Sums(t, self.tiling) for t in (dx, dz))
        for number, chunk in enumerate(self.chunks if mask[0] or mask[1] else ()):
            e = chunk.positions
            to_x, to_z = (None if t is None else self._into(t, i, e) for t, i in ((dx, source), (dz, cond)))
            factors = _take(x, source, e), None if z is None else _take(z, cond, e), weight, None, None
            launch.grads(*factors, _take(g, target, e), to_x, to_z, None)
            for to, index, out in ((to_x, source, out_x), (to_z, cond, out_z)):
                if to is not None and out is not None:
                    self._send(to, index, number, out)
        for out in (out_x, out_z):
            if out is not None:
                out.store()
        return dx, dz, dh

    def _weight_grad(self, x: Tensor, z: Tensor, g: Tensor) -> Tensor:
        source, cond, target = self.terms[:3]
        (I, R), O = (x.shape[2], z.shape[1]), g.shape[2]
        dh = x.new_empty(O, I, R)
        single = len(self.chunks) == 1  # its sum is rounded once, by the kernel
        for o in blocks(O, O if single else self.tiling.elements // (I * R)):
            total = None if single else torch.zeros(dh[o].shape, dtype=torch.float32, device=x.device)
            for chunk in self.chunks:
                e = chunk.positions
                to = dh[o] if total is None else torch.empty_like(total)
                rows = _take(x, source, e), _take(z, cond, e), None, None, None, _take(g[..., o], target, e)
                launch.grads(*rows, None, None, to)
                if total is not None:
                    total += to
            if total is not None:
                dh[o] = total
        return dh

    def _into(self, result: Tensor, index: Tensor | None, e: range) -> Tensor:
        """Return where the messages of some terms are written: the result, if they are its rows."""
        return result[e.start : e.stop] if index is None else result.new_empty(len(e), *result.shape[1:])

    def _send(self, messages: Tensor, index: Tensor | None, number: int, out: Sums) -> None:
        """Add the messages of a chunk to the rows that they are for; a row has all points."""
        if index is None:
            out.written()
            return
        messages, positions = messages.flatten(1), self.chunks[number].positions
        total = out.total.view(-1, messages.shape[1])
        way = kept(index, ("route of terms", self.step), None, lambda: route(index, len(total), self.chunks))
        segments = range(way.first[number], way.first[number + 1])
        where = way.ptr, way.order, way.row, segments, positions, positions.start
        term_calls.sum_terms_call(total, messages, *where).launch()


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    terms: Terms,
    plan: Plan,
) -> Tensor:
    """Return y (T, N, O)."""
    tiling, bases = tiling_of(plan), (bias, base_weight, base_bias)
    with gpu.current(x):
        if plan.schedule != "fold":
            return aten_terms.apply(x, z, weight, *bases, terms, plan.schedule, tiling, Kernels, sum_terms)
        y = Fold(terms, _step(x, weight.shape[0], z.shape[1]), tiling).apply(x, z, weight)
        Bases(terms, tiling, sum_terms).add(y, x, z, *bases)
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
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0 and b0 where the mask is set."""
    tiling, R = tiling_of(plan), cast(Tensor, z if weight is None else weight).shape[-1]
    with gpu.current(x):
        if plan.schedule != "fold":
            call = x, z, weight, bias, base_weight, g, mask
            return aten_terms.grads(*call, terms, plan.schedule, tiling, Kernels, sum_terms)
        dx, dz, dh = Fold(terms, _step(x, g.shape[2], R), tiling).grads(x, z, weight, g, R, mask)
        bases = Bases(terms, tiling, sum_terms)
        bases.add_to_grads(dx, dz, g, bias, base_weight)
        return dx, dz, dh, *bases.grads(x, z, g, R, mask)
