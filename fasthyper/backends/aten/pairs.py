"""All pairs of two sets in torch's own operations, an output o and a block of rows (b, m) at a time.

    P[bm,r] = Σ_i x[b,m,i] H[o,i,r]            V[bm,r] = Σ_n g[b,m,n,o] z[b,n,r]

    y[b,m,n,o] = Σ_r P[bm,r] z[b,n,r]          dx[b,m,i] = Σ_{o,r} V[bm,r] H[o,i,r]
    dz[b,n,r] = Σ_{m,o} g[b,m,n,o] P[bm,r]     dH[o,i,r] = Σ_{b,m} x[b,m,i] V[bm,r]

This is the schedule `project`. With x and z in each other's place, so that z · H is first, it is `generate`. P is
computed again in backward: to keep it takes B·M·O·R numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import planner
from ...problem import Pairs
from .tiling import Tiling, accumulate, accumulate_batches, blocks, multiplies

# MKL writes a product at half the speed if the rows of the result do not start at such multiples.
_ALIGNED = 8
# Blocks of fewer rows make slow products. A block of y is copied fastest, in whole lines, if it has all outputs.
_FEWEST_ROWS = 256
_TILES_OF_Y = 3
_FEWEST_OUTPUTS = 16  # of a tile that has a part of each line


class Factors(NamedTuple):
    """x (B, M, I), z (B, N, R), H (O, P, Q). P is I or, with an appended one, I + 1; so are Q and R."""

    x: Tensor
    z: Tensor
    weight: Tensor

    def swapped(self) -> Factors:
        """Return the factors with x and z in each other's place."""
        return Factors(self.z, self.x, self.weight.mT)


class Sums(NamedTuple):
    """Where to add the gradients, which start at zero."""

    x: Tensor | None
    z: Tensor | None
    weight: Tensor | None

    def swapped(self) -> Sums:
        return Sums(self.z, self.x, None if self.weight is None else self.weight.mT)


def apply(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, *, schedule: str) -> Tensor:
    """Return y (B, M, N, O)."""
    f = Factors(x, z, weight)
    y = x.new_empty(*x.shape[:2], z.shape[1], len(weight))
    swap, tiling = _plan("pairs", f, (True, True, True), schedule)
    _apply(f.swapped() if swap else f, bias, y.transpose(1, 2) if swap else y, tiling)
    return y


def grads(
    x: Tensor, z: Tensor, weight: Tensor, g: Tensor, mask: list[bool], *, schedule: str
) -> tuple[Tensor | None, ...]:
    """Return dx, dz, dH and dbias, None for each that is not requested."""
    f = Factors(x, z, weight)
    swap, tiling = _plan("pairs_grads", f, (mask[0], mask[1], mask[2]), schedule)
    into = Sums(*(x.new_zeros(t.shape) if wanted else None for t, wanted in zip(f, mask, strict=False)))
    if swap:
        _grads(f.swapped(), g.transpose(1, 2), into.swapped(), tiling)
    else:
        _grads(f, g, into, tiling)
    return *into, _bias_grad(f, g, tiling) if mask[3] else None


def _plan(op: str, f: Factors, needs: tuple[bool, bool, bool], schedule: str) -> tuple[bool, Tiling]:
    """Return whether to swap x and z, and the tiling."""
    B, M, I = f.x.shape
    N, R = f.z.shape[1:]
    plan = planner.plan_pairs(Pairs(op, B, M, N, I, R, len(f.weight), f.x.dtype, f.x.device.type, needs), schedule)
    sum_dtype = torch.float32 if plan.work_dtype == torch.bfloat16 else plan.work_dtype
    return plan.schedule == "generate", Tiling(plan.tile, plan.work_dtype, sum_dtype)


class Cut(NamedTuple):
    """How many instances, rows m and columns n a block has, and how many outputs a tile of y."""

    instances: int
    rows: int
    columns: int
    outputs: int

    @classmethod
    def of(cls, f: Factors, room: int, whole_lines: bool = True) -> Cut:
        """Cut so that the blocks of x, z and P have at most `room` elements, and those of y a few times as many.

        With `whole_lines`, a tile of y has all outputs if it can.
        """
        B, M, _ = f.x.shape
        N = f.z.shape[1]
        O, P, Q = f.weight.shape
        of_y = _TILES_OF_Y * room
        columns = max(1, min(N, room // _padded(Q), room // _FEWEST_ROWS))
        together = max(1, room // max(_padded(P), _padded(Q), columns))
        if whole_lines:
            together = min(together, max(_FEWEST_ROWS, of_y // max(1, O * columns)))
        instances = max(1, min(B, together // max(1, M), room // (_padded(Q) * columns)))
        rows = min(max(1, M), together)
        return cls(instances, rows, columns, max(1, min(O, of_y // (instances * rows * columns))))

    def blocks(self, f: Factors) -> Iterator[tuple[slice, slice, slice]]:
        for b in blocks(len(f.x), self.instances):
            for m in blocks(f.x.shape[1], self.rows):
                for n in blocks(f.z.shape[1], self.columns):
                    yield b, m, n


def _padded(size: int) -> int:
    return max(1, -(-size // _ALIGNED)) * _ALIGNED


def _zeros(like: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Return zeros (b, m, features), with more features so that rows are aligned."""
    return torch.zeros(*like.shape[:2], _padded(features), dtype=dtype, device=like.device)


def _packed(t: Tensor, features: int, tiling: Tiling) -> Tensor:
    """Return a block (b, m, features) of x or z in the work dtype, with an appended one if it lacks a feature."""
    out = _zeros(t, features, tiling.dtype)
    out[..., : t.shape[2]] = t
    out[..., t.shape[2] : features] = 1
    return out


def _parts(f: Factors, tiling: Tiling) -> Iterator[slice]:
    """Cut the rows of H[o] so that a part is at most a tile."""
    return blocks(f.weight.shape[1], tiling.elements // max(1, f.weight.shape[2]))


def _outputs_first(t: Tensor) -> Tensor:
    """View a block (b, m, n, o) as (o, bmn), which torch copies fastest, or if it cannot, as (o, b, m, n)."""
    return t.flatten(0, 2).T if t.is_contiguous() else t.permute(3, 0, 1, 2)


def _apply(f: Factors, bias: Tensor | None, y: Tensor, tiling: Tiling) -> None:
    cut = Cut.of(f, tiling.elements)
    O, P, Q = f.weight.shape
    for b, m, n in cut.blocks(f):
        x, z = _packed(f.x[b, m], P, tiling), _packed(f.z[b, n], Q, tiling)
        p = _zeros(x, Q, tiling.dtype)
        for outputs in blocks(O, cut.outputs):
            out = y[b, m, n, outputs]
            tile = torch.empty(out.shape[3], *out.shape[:3], dtype=p.dtype, device=p.device)
            for k, of_one in enumerate(tile, outputs.start):
                _project(x, f, k, p, tiling)
                torch.bmm(p, z.mT, out=of_one)
            if bias is not None:
                tile += bias[outputs, None, None, None]
            target = _outputs_first(out)
            target.copy_(tile.view(target.shape))
            del tile, of_one  # before the next tile is allocated


def _project(x: Tensor, f: Factors, o: int, p: Tensor, tiling: Tiling) -> None:
    """Compute P of one output."""
    rows, out = x.flatten(0, 1), p.flatten(0, 1)[:, : f.weight.shape[2]]
    parts = [*_parts(f, tiling)]
    if not parts:
        out.zero_()
    elif len(parts) == 1:
        torch.mm(rows[:, parts[0]], tiling.work(f.weight[o]), out=out)
    else:
        total = _zeros(p, out.shape[1], tiling.sum_dtype).flatten(0, 1)[:, : out.shape[1]]
        for i in parts:
            accumulate(total, rows[:, i], tiling.work(f.weight[o, i]))
        out.copy_(total)


def _grads(f: Factors, g: Tensor, into: Sums, tiling: Tiling) -> None:
    """Compute the gradients that are given, each of them rounded to its dtype once."""
    cut = Cut.of(f, tiling.elements)
    rounds = f.x.dtype != tiling.sum_dtype
    if rounds:  # a single block needs no second loop for dH, which costs more than to read parts of lines
        single = Cut.of(f, tiling.elements, whole_lines=False)
        enough = single.outputs >= min(len(f.weight), _FEWEST_OUTPUTS)
        cut = single if enough and len([*single.blocks(f)]) == 1 else cut
    dz_in_parts = rounds and cut.rows < f.x.shape[1]
    dh_in_parts = rounds and len([*cut.blocks(f)]) > 1
    together = Sums(into.x, None if dz_in_parts else into.z, None if dh_in_parts else into.weight)
    if any(t is not None for t in together):
        _by_rows(f, g, together, cut, tiling)
    if dz_in_parts and into.z is not None:
        swapped = f.swapped()
        _by_rows(swapped, g.transpose(1, 2), Sums(into.z, None, None), Cut.of(swapped, tiling.elements), tiling)
    if dh_in_parts and into.weight is not None:
        _by_outputs(f, g, into.weight, cut, tiling)


def _by_rows(f: Factors, g: Tensor, into: Sums, cut: Cut, tiling: Tiling) -> None:
    """Add to the gradients, a block of rows at a time: the sum of dx over n and o is one tile."""
    _, P, Q = f.weight.shape
    for b in blocks(len(f.x), cut.instances):
        for m in blocks(f.x.shape[1], cut.rows):
            x = _packed(f.x[b, m], P, tiling)
            dx = None if into.x is None else _zeros(x, P, tiling.sum_dtype)
            for n in blocks(f.z.shape[1], cut.columns):
                z = _packed(f.z[b, n], Q, tiling)
                dz = None if into.z is None else _zeros(z, Q, tiling.sum_dtype)
                _block(f, x, z, g[b, m, n], Sums(dx, dz, into.weight), cut.outputs, tiling)
                if into.z is not None and dz is not None:
                    into.z[b, n] += dz[..., : into.z.shape[2]]
            if into.x is not None and dx is not None:
                into.x[b, m] = dx[..., : into.x.shape[2]]


def _block(f: Factors, x: Tensor, z: Tensor, g: Tensor, into: Sums, outputs: int, tiling: Tiling) -> None:
    """Add the terms of one block (b, m, n) to the gradients."""
    O, _, Q = f.weight.shape
    buffer = _zeros(x, Q, tiling.dtype)  # P, then V
    rows, v = x.flatten(0, 1), buffer.flatten(0, 1)[:, :Q]
    for o, of_one in _by_output(g, range(O), outputs, tiling):
        if into.z is not None:
            _project(x, f, o, buffer, tiling)
            accumulate_batches(into.z, of_one.mT, buffer)
        if into.x is not None or into.weight is not None:
            torch.bmm(of_one, z, out=buffer)
        for i in _parts(f, tiling):
            if into.x is not None:
                accumulate(into.x.flatten(0, 1)[:, i], v, tiling.work(f.weight[o, i]).T)
            if into.weight is not None:
                _add_once(into.weight[o, i], rows[:, i].T, v, tiling)


def _by_output(g: Tensor, outputs: range, step: int, tiling: Tiling) -> Iterator[tuple[int, Tensor]]:
    """Yield each output and its contiguous g (b, m, n), which is copied for `step` outputs at a time."""
    for some in blocks(len(outputs), step):
        source = g[..., outputs[some.start] : outputs[some.stop - 1] + 1]
        tile = torch.empty(source.shape[3], *source.shape[:3], dtype=tiling.dtype, device=g.device)
        first = _outputs_first(source)
        tile.view(first.shape).copy_(first)
        yield from zip(outputs[some], tile, strict=True)
        del tile  # before the next tile is allocated


def _add_once(out: Tensor, a: Tensor, b: Tensor, tiling: Tiling) -> None:
    """Add a·b to zeros, or to a sum that has the dtype of sums."""
    if out.dtype == tiling.sum_dtype:
        return accumulate(out, a, b)
    if multiplies(a, b):
        torch.mm(a, b, out=out)
        return None
    total = torch.empty(out.shape, dtype=tiling.sum_dtype, device=out.device)
    accumulate(total, a, b, beta=0)
    out.copy_(total)


def _by_outputs(f: Factors, g: Tensor, dh: Tensor, cut: Cut, tiling: Tiling) -> None:
    """Compute dH a tile at a time, as the sum over all blocks."""
    O, P, Q = f.weight.shape
    for i in _parts(f, tiling):
        size = i.stop - i.start
        for some in blocks(O, min(cut.outputs, tiling.elements // (size * max(1, Q)))):
            total = torch.zeros(some.stop - some.start, size, Q, dtype=tiling.sum_dtype, device=dh.device)
            for b, m, n in cut.blocks(f):
                x, z = _packed(f.x[b, m], P, tiling), _packed(f.z[b, n], Q, tiling)
                buffer = _zeros(x, Q, tiling.dtype)
                for o, of_one in _by_output(g[b, m, n], range(O)[some], len(total), tiling):
                    torch.bmm(of_one, z, out=buffer)
                    accumulate(total[o - some.start], x.flatten(0, 1)[:, i].T, buffer.flatten(0, 1)[:, :Q])
            dh[some, i] = total


def _bias_grad(f: Factors, g: Tensor, tiling: Tiling) -> Tensor:
    """Return Σ g, block by block: torch would convert all of a 16-bit g at once."""
    cut = Cut.of(f, tiling.elements)
    total = torch.zeros(g.shape[3], dtype=tiling.sum_dtype, device=g.device)
    for b, m, n in cut.blocks(f):
        for outputs in blocks(g.shape[3], cut.outputs):
            total[outputs] += g[b, m, n, outputs].sum((0, 1, 2), dtype=tiling.sum_dtype)
    return total.to(g.dtype)
