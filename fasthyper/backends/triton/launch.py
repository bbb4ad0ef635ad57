"""Launch the kernels of a call: which kernels, on which blocks of instances, with which tiles.

    y        fold(x, z)
    dx, dz   dx_dz, or fold(g, z) and fold(g, x) where no tile has all of R and O
    dH       weight_grad

A sum is split where its output has too few blocks to fill the device. Where the last blocks would fill it in part, they
are a call of their own, whose sum is split. The partial sums are float32, and `reduce` adds them in order. Of several
points, dz has a row each, and `reduce_points` adds them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import aten, gpu
from ..gpu import cdiv, padded
from . import calls, layouts, recording, repeat, tiles, tuning
from .recording import Call
from .tiles import Tile
from .tuning import Candidate, Tiling


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    y: Tensor,
) -> None:
    """Compute y (B, N, O)."""
    B, N, O = y.shape

    def launch() -> None:
        for b, z_b, h in _padded_blocks(z, weight, _instances(B, N, z, 0)):
            rows = _rows(cast(Tensor, z_b), N)
            _fold(x[b], rows, h.permute(1, 2, 0), base_weight, bias, base_bias, y[b].view(-1, O))

    repeat.run("apply", (x, z, weight, bias, base_weight, base_bias, y), launch)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
    dh: Tensor | None,
) -> None:
    """Compute dx (B, N, I), dz (B, R) and dH (O, I, R), each where it is given."""

    def launch() -> None:
        (B, N, _), z_b = x.shape, None
        if dx is not None or dz is not None:
            like_z = z if z is not None else cast(Tensor, dz)
            blocks = _instances(B, N, like_z, 0 if dz is None else 4)
            for b, z_b, h in _padded_blocks(z, cast(Tensor, weight), blocks):
                g_b, dx_b, dz_b = (None if t is None else t[b] for t in (g, dx, dz))
                _dx_and_dz(x[b], z_b, h, base_weight, bias, cast(Tensor, g_b), dx_b, dz_b)
        if dh is not None:
            whole_z = cast(Tensor, z)
            if z_b is not None and len(z_b) == B:
                whole_z = z_b
            elif layouts.unit(whole_z, whole_z.shape[1]) == 1:
                whole_z = cast(Tensor, _padded(z, None)[0])
            _weight_grad(x, whole_z, g, dh)

    repeat.run("grads", (x, z, weight, bias, base_weight, g, dx, dz, dh), launch)


def _share() -> int:
    """Return the bytes of one share of the workspace: padded copies have one share, rows of dz another."""
    return gpu.partial_sums_limit() // 2


def arch_of(t: Tensor) -> str:
    """Return the arch whose tiles the device of a tensor takes."""
    return tiles.nearest(gpu.device(t, gpu.INTERPRETED).arch)


def _instances(B: int, N: int, z: Tensor, dz_itemsize: int) -> Iterator[slice]:
    """Return blocks of instances whose padded z and whose rows of dz each fit their share of the workspace.

    z is copied at most where R is no multiple of 16, and dz has rows only where there are several points.
    """
    R = z.shape[1]
    copies = padded(R) * z.element_size() if R % 16 else 0
    rows = N * R * dz_itemsize if N > 1 else 0
    return aten.blocks(B, min(B, _share() // max(1, copies, rows)))


def _padded_blocks(
    z: Tensor | None, weight: Tensor, blocks: Iterator[slice]
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Yield each block with its z and with H, padded along R; both unchanged if H needs no copy or has no room."""
    padded_h: Tensor | None = None
    copies = weight.shape[-1] % 16 and _fits(weight) and not _in_place(z, weight)
    for b in blocks:
        z_b = None if z is None else z[b]
        if copies:
            z_b, copy = _padded(z_b, weight if padded_h is None else None)
            padded_h = copy if padded_h is None else padded_h
        yield b, z_b, weight if padded_h is None else padded_h


def _fits(t: Tensor) -> bool:
    """Return whether a padded copy fits its share of the workspace."""
    return t.numel() // t.shape[-1] * padded(t.shape[-1]) * t.element_size() <= _share()


def _in_place(z: Tensor | None, weight: Tensor) -> bool:
    """Return whether z and H have rows that are read as well as those of padded copies.

    Rows of H of up to 64 bytes are copied all the same: a step of `fold` then has several of them.
    """
    R, size = weight.shape[-1], weight.element_size()
    aligned = weight.is_contiguous() and layouts.in_place(weight, arch_of(weight))
    return aligned and padded(R) * size > 64 and (z is None or layouts.unit(z, R) > 1)


def _padded(z: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return z and H with R padded to a multiple of 16, for wide loads; each unchanged if its copy does not fit."""
    out: list[Tensor | None] = [None, None]
    for i, t in enumerate((z, weight)):
        if t is not None and t.shape[-1] % 16 and _fits(t):
            out[i] = t.new_empty(*t.shape[:-1], padded(t.shape[-1]))
    if any(t is not None for t in out):
        given = [t if o is not None else None for t, o in zip((z, weight), out, strict=True)]
        calls.pad_call(*given, *out).launch()
    return (z if out[0] is None else out[0]), (weight if out[1] is None else out[1])


def _rows(z: Tensor, N: int) -> Tensor:
    return z[:, None].expand(-1, N, -1)


def _dx_and_dz(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    base_weight: Tensor | None,
    bias: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
) -> None:
    """Compute dx (B, N, I) and dz (B, R), each where it is given; dz is the sum of a row for each point."""
    B, N, I = x.shape
    if dz is None or N == 1:
        _grads_of_rows(x, z, weight, base_weight, bias, g, None if dx is None else dx.view(-1, I), dz)
        return
    R = dz.shape[1]
    pieces = list(aten.blocks(N, _share() // (4 * B * R)))  # all points, unless B is one
    parts = _parts(B, pieces[0].stop, R, len(pieces), x)
    out = dz.unsqueeze(1)
    single = len(pieces) * parts == 1
    slots = min(len(pieces) * parts, max(2, parts, _sums_room(B, R)))
    sums = out if single else x.new_empty(B, slots, R, dtype=torch.float32)
    used = 0
    for n in pieces:
        if used + parts > slots:  # B is one here
            calls.reduce_points_call(sums, sums[:, :1]).launch()
            used = 1
        rows = x.new_empty(B * (n.stop - n.start), R, dtype=torch.float32)
        dx_n = None if dx is None else dx[:, n].view(-1, I)
        _grads_of_rows(x[:, n], z, weight, base_weight, bias, g[:, n], dx_n, rows)
        calls.reduce_points_call(rows.view(B, -1, R), sums[:, used : used + parts]).launch()
        used += parts
        del rows  # before the next rows are allocated
    if not single:
        calls.reduce_points_call(sums[:, :used], out).launch()


def _sums_room(B: int, R: int) -> int:
    """Return how many sums over some points, of B instances each, have room beside the rows of dz."""
    return _share() // 8 // (4 * B * R)


_POINTS = 64
"""The least number of points that are summed in a part of their own."""


def _parts(B: int, N: int, R: int, pieces: int, like: Tensor) -> int:
    """Return in how many parts the rows of N points are summed, so that the sums of all pieces fill the device."""
    programs = cdiv(B * R, calls.SUMMED_COLUMNS)
    wanted = 2 * gpu.device(like, gpu.INTERPRETED).processors // programs
    return max(1, min(cdiv(N, _POINTS), wanted, _sums_room(B, R) // pieces))


def _grads_of_rows(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    base_weight: Tensor | None,
    bias: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
) -> None:
    """Compute dx (B·N, I) and dz (B·N, R), in one pass where a tile has all of R and O."""
    N, O = x.shape[1], g.shape[2]
    if dx is not None and dz is not None:
        allowed = calls.dx_dz_tiles(cast(Tensor, z), weight, dz.shape[1], O, arch_of(x))
        if allowed:
            return _dx_dz(x, cast(Tensor, z), weight, base_weight, bias, g, dx, dz, allowed)
    if dx is not None:
        base = None if base_weight is None else base_weight.T
        _fold(g, _rows(cast(Tensor, z), N), weight.permute(0, 2, 1), base, None, None, dx)
    if dz is not None:
        _fold(g, x, weight, None if bias is None else bias.T, None, None, dz)


_ALL = slice(None)


def _rows_of(t: Tensor, rows: slice) -> Tensor:
    """Return some rows of a tensor, or the tensor itself for all."""
    return t if rows == _ALL else t[rows]


def _bucket(rows: int) -> int:
    """Return the power of two of a number of rows: calls of one bucket share the tile that was timed."""
    return gpu.hint(rows).bit_length()


def _tuned(
    key: tuple[object, ...],
    allowed: Sequence[Tile],
    x: Tensor,
    out: Tensor,
    size: int,
    step: Callable[[Tile], int],
    tiling: Callable[[Tile], tuple[int, int, int, int]],
    across: Callable[[Tile], int],
    call: Callable[[slice, Tensor, int, Tile, str, str], Call],
) -> None:
    """Launch a call with the fastest tile, and add its partial sums if the sum is split.

    Args:
        key: identifies the call for tuning, together with its dtype and precision.
        allowed: the tiles that the call may take.
        x: a factor, for its device and dtype.
        out: the output.
        size: length of the axis that a split divides.
        step: returns the number that the length of a split is a multiple of.
        tiling: returns the first four fields of `Tiling`.
        across: returns the last field of `Tiling`. Rows of blocks are rows of `out`.
        call: returns the call for rows of the factors, their output, the length of a split, a tile, an arch and a
            precision.
    """
    device, arch, bits = gpu.device(x, gpu.INTERPRETED), arch_of(x), x.dtype.itemsize * 8
    precision = calls.precision_of(x.dtype, arch, gpu.allows_tf32())

    def predicted(tile: Tile) -> Candidate:
        blocks, rows, columns, depth = map(gpu.hint, tiling(tile))
        # In a trace, the number of rows may be a symbol: other calls have other last blocks.
        apart = 0 if recording.is_traced() else across(tile)
        tiled = Tiling(blocks, rows, columns, depth, gpu.hint(cdiv(size, step(tile))), apart)
        partial = gpu.hint(out.numel()) * 4
        return tuning.candidate(tile, tiled, partial, gpu.partial_sums_limit(), device.processors, bits)

    def run(chosen: Candidate) -> None:
        cut = chosen.whole * chosen.tile.rows
        if cut:
            part(chosen.tile, slice(0, cut), 1)
        part(chosen.tile, slice(cut, None) if cut else _ALL, chosen.splits)

    def part(tile: Tile, rows: slice, splits: int) -> None:
        unit, to = step(tile), _rows_of(out, rows)
        per_split = cdiv(cdiv(size, splits), unit) * unit
        partial = gpu.partial_sums(1 if splits == 1 else cdiv(size, per_split), *to.shape, like=out)
        call(rows, to if partial is None else partial, per_split, tile, arch, precision).launch()
        if partial is not None:
            calls.reduce_call(partial, to).launch()

    run(tuning.choose((*key, x.dtype, precision), [predicted(tile) for tile in allowed], device, run))


def _fold(u: Tensor, v: Tensor, h: Tensor, a: Tensor | None, c: Tensor | None, d: Tensor | None, out: Tensor) -> None:
    """Compute out (B·N, P) from u (B, N, C), v (B, N, K), H (C, K, P), A (P, C), C (P, K), d (P,)."""
    M, C, K, P = out.shape[0], u.shape[2], v.shape[2], out.shape[1]

    def tiling(tile: Tile) -> tuple[int, int, int, int]:
        columns = calls.fold_columns(P, tile)
        return cdiv(M, tile.rows) * cdiv(P, columns), tile.rows, columns, C * padded(K)

    key = ("fold", _bucket(M), C, K, P, h.stride(), u.shape[1] > 1)
    allowed = calls.fold_tiles(v, h, P, arch_of(u))
    step = lambda tile: calls.depths(K, tile.depth, C)[2]
    across = lambda tile: cdiv(P, calls.fold_columns(P, tile)) if u.shape[1] == 1 else 0
    call = lambda rows, to, *args: calls.fold_call(_rows_of(u, rows), _rows_of(v, rows), h, a, c, d, to, *args)
    _tuned(key, allowed, u, out, C, step, tiling, across, call)


def _dx_dz(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    g: Tensor,
    dx: Tensor,
    dz: Tensor,
    allowed: Sequence[Tile],
) -> None:
    """Compute dx (B·N, I) and dz (B·N, R) in one pass."""
    (M, I), O, R = dx.shape, g.shape[2], dz.shape[1]
    tiling = lambda tile: (cdiv(M, tile.rows), tile.rows, tile.columns, I * tile.depth)
    key = ("dx_dz", _bucket(M), I, O, R, weight.stride(), x.shape[1] > 1)
    across = lambda tile: int(x.shape[1] == 1)

    def call(rows: slice, to: Tensor, *args: Any) -> Call:
        x_m, z_m, g_m, dx_m = (_rows_of(t, rows) for t in (x, z, g, dx))
        return calls.dx_dz_call(x_m, z_m, weight, base, bias, g_m, dx_m, to, *args)

    _tuned(key, allowed, x, dz, I, lambda tile: calls.DX_COLUMNS, tiling, across, call)


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor) -> None:
    """Compute dH (O, I, R)."""
    (O, I, R), M = dh.shape, x.shape[0] * x.shape[1]

    def tiling(tile: Tile) -> tuple[int, int, int, int]:
        bi, br, bo = calls.weight_grad_block(I, R, O, tile)
        return cdiv(I, bi) * cdiv(R, br) * cdiv(O, bo), bi * br, bo, M

    key = ("weight_grad", _bucket(M), I, O, R, x.shape[1] > 1)
    allowed = calls.weight_grad_tiles(z, g, arch_of(x))
    call = lambda _, to, *args: calls.weight_grad_call(x, z, g, to, *args)
    _tuned(key, allowed, x, dh, M, lambda tile: tile.depth, tiling, lambda tile: 0, call)
