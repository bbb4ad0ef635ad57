"""The op family by the kernels: what is computed, in which pieces, with which tiles.

    y   fold(x, z)      dx, dz   dx_dz, or fold(g, z) and fold(g, x) where all of R and O are no tile
    dH  weight_grad

A sum is split where its blocks are too few to fill the device; the parts are float32, and `reduce` adds them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ... import planner
from .. import aten
from . import calls, device, tiles, tuning
from .calls import Call, cdiv
from .tiles import Tile
from .tuning import Block, Candidate


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    y: Tensor,
) -> None:
    """y (B, N, O)."""
    B, N, O = y.shape
    with device.current(x):
        for b, even_z, h in _padded_blocks(z, weight, _instances(B, N, z, 0)):
            rows = _rows(cast(Tensor, even_z), N)
            _fold(x[b], rows, h.permute(1, 2, 0), base_weight, bias, base_bias, y[b].view(-1, O))


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
    """dx (B, N, I), dz (B, R) and dH (O, I, R) as asked for."""
    with device.current(x):
        (B, N, _), even_z = x.shape, None
        if dx is not None or dz is not None:
            of = z if z is not None else cast(Tensor, dz)
            for b, even_z, h in _padded_blocks(z, cast(Tensor, weight), _instances(B, N, of, 0 if dz is None else 4)):
                part = [None if t is None else t[b] for t in (g, dx, dz)]
                _dx_and_dz(x[b], even_z, h, base_weight, bias, *part)
        if dh is not None:
            whole = even_z if even_z is not None and len(even_z) == B else _padded(z, None)[0]
            _weight_grad(x, cast(Tensor, whole), g, dh)


def _room() -> int:
    """Bytes that parts of sums may take; copies with even R, and rows of dz, half of that each."""
    return planner.get_workspace_limit() // 2


def _instances(B: int, N: int, z: Tensor, per_number: int) -> Iterator[slice]:
    """Blocks of instances: all of them, unless copies of z or rows of dz, of so many bytes a number, need more room.

    Only of an odd R are there copies, and only of several points rows.
    """
    R = z.shape[1]
    copies = calls.padded(R) * z.element_size() if R % 16 else 0
    rows = N * R * per_number if N > 1 else 0
    return aten.blocks(B, min(B, _room() // 2 // max(1, copies, rows)))


def _padded_blocks(
    z: Tensor | None, weight: Tensor, blocks: Iterator[slice]
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Blocks of z with an even R, and H with the same; as they are where a copy of H has no room."""
    h: Tensor | None = None
    for b in blocks:
        part = None if z is None else z[b]
        if _has_room(weight):
            part, even_h = _padded(part, weight if h is None else None)
            h = even_h if h is None else h
        yield b, part, weight if h is None else h


def _has_room(t: Tensor) -> bool:
    """Whether a copy with an even R would be no more than its share of the workspace."""
    return t.numel() // t.shape[-1] * calls.padded(t.shape[-1]) * t.element_size() <= _room() // 2


def _padded(z: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """z and H, with R made even where loads of an odd one would be of single numbers: each if its copy has room."""
    out: list[Tensor | None] = [None, None]
    for i, t in enumerate((z, weight)):
        if t is not None and t.shape[-1] % 16 and _has_room(t):
            out[i] = t.new_empty(*t.shape[:-1], calls.padded(t.shape[-1]))
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
    g: Tensor | None,
    dx: Tensor | None,
    dz: Tensor | None,
) -> None:
    """dx (B, N, I) and dz (B, R) as asked for; dz of several points is summed from rows, of some points at a time."""
    B, N, I = x.shape
    g = cast(Tensor, g)
    if dz is None or N == 1:
        _grads_of_rows(x, z, weight, base_weight, bias, g, None if dx is None else dx.view(-1, I), dz)
        return
    total = torch.zeros(dz.shape, dtype=torch.float32, device=dz.device)
    for n in aten.blocks(N, _room() // 2 // (4 * B * dz.shape[1])):  # all, or B is one
        rows = torch.empty(B * (n.stop - n.start), dz.shape[1], dtype=torch.float32, device=dz.device)
        dx_n = None if dx is None else dx[:, n].view(-1, I)
        _grads_of_rows(x[:, n], z, weight, base_weight, bias, g[:, n], dx_n, rows)
        total += rows.view(B, -1, rows.shape[1]).sum(1)
    dz.copy_(total)


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
    """dx (B·N, I) and dz (B·N, R), in one pass where that can be."""
    N, O = x.shape[1], g.shape[2]
    found: tuple[Tile, ...] = ()
    if dx is not None and dz is not None:
        found = calls.dx_dz_tiles(cast(Tensor, z), weight, dz.shape[1], O, device.of(x).part)
        if found:
            return _dx_dz(x, cast(Tensor, z), weight, base_weight, bias, g, dx, dz, found)
    if dx is not None:
        base = None if base_weight is None else base_weight.T
        _fold(g, _rows(cast(Tensor, z), N), weight.permute(0, 2, 1), base, None, None, dx)
    if dz is not None:
        _fold(g, x, weight, None if bias is None else bias.T, None, None, dz)


def _bucket(rows: int) -> int:
    """Rows by powers of two: what a tile was timed for."""
    return rows.bit_length()


def _tuned(
    kind: tuple[object, ...],
    found: Sequence[Tile],
    x: Tensor,
    out: Tensor,
    size: int,
    unit: Callable[[Tile], int],
    block: Callable[[Tile], tuple[int, int, int, int]],
    call: Callable[..., Call],
) -> None:
    """Launch a call with the tile that suits it, its sum in parts that `reduce` adds where blocks are few.

    Args:
        kind: of the call, beside dtype and precision.
        found: the tiles it may take.
        x: a factor, for its device and dtype.
        out: where the sum goes.
        size: what a split cuts.
        unit: multiples of what a split takes of it.
        block: blocks, rows, columns and depth that a tile comes to.
        call: the call, of where its sum goes, what a split takes, tile, part and precision.
    """
    dev, bits = device.of(x), x.dtype.itemsize * 8
    precision = calls.precision_of(x.dtype, dev.part, device.allows_tf32())

    def predicted(tile: Tile) -> Candidate:
        of_tile = Block(*block(tile), cdiv(size, unit(tile)))
        return tuning.candidate(tile, of_tile, out.numel() * 4, _room(), dev.processors, bits)

    def run(chosen: Candidate) -> None:
        step = unit(chosen.tile)
        per_split = cdiv(cdiv(size, chosen.splits), step) * step
        how = (per_split, chosen.tile, dev.part, precision)
        parts = cdiv(size, per_split)
        if parts == 1:
            return call(out, *how).launch()
        partial = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
        call(partial, *how).launch()
        calls.reduce_call(partial, out).launch()

    run(tuning.choose((*kind, x.dtype, precision), [predicted(tile) for tile in found], dev, run))


def _fold(u: Tensor, v: Tensor, h: Tensor, a: Tensor | None, c: Tensor | None, d: Tensor | None, out: Tensor) -> None:
    """Out (B·N, P) from u (B, N, C), v (B, N, K), H (C, K, P), A (P, C), C (P, K), d (P,)."""
    M, C, K, P = len(out), u.shape[2], v.shape[2], out.shape[1]

    def block(tile: Tile) -> tuple[int, int, int, int]:
        columns = min(tile.columns, tiles.power_of_two(P))
        return cdiv(M, tile.rows) * cdiv(P, columns), tile.rows, columns, C * calls.padded(K)

    kind = ("fold", _bucket(M), C, K, P, h.stride(), u.shape[1] > 1)
    found = calls.fold_tiles(v, h, P, device.of(u).part)
    together = lambda tile: calls.depths(K, tile.depth, C)[2]
    _tuned(kind, found, u, out, C, together, block, lambda to, *how: calls.fold_call(u, v, h, a, c, d, to, *how))


def _dx_dz(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    g: Tensor,
    dx: Tensor,
    dz: Tensor,
    found: Sequence[Tile],
) -> None:
    """dx (B·N, I) and dz (B·N, R)."""
    (M, I), O, R = dx.shape, g.shape[2], dz.shape[1]
    block = lambda tile: (cdiv(M, tile.rows), tile.rows, tile.columns, I * tile.depth)
    kind = ("dx_dz", _bucket(M), I, O, R, weight.stride(), x.shape[1] > 1)
    call = lambda to, *how: calls.dx_dz_call(x, z, weight, base, bias, g, dx, to, *how)
    _tuned(kind, found, x, dz, I, lambda tile: calls.COLLECTED, block, call)


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor) -> None:
    """dH (O, I, R)."""
    (O, I, R), M = dh.shape, x.shape[0] * x.shape[1]

    def block(tile: Tile) -> tuple[int, int, int, int]:
        bi, br, bo = calls.weight_grad_block(I, R, O, tile)
        return cdiv(I, bi) * cdiv(R, br) * cdiv(O, bo), bi * br, bo, M

    kind = ("weight_grad", _bucket(M), I, O, R, x.shape[1] > 1)
    found = calls.weight_grad_tiles(z, g, device.of(x).part)
    call = lambda to, *how: calls.weight_grad_call(x, z, g, to, *how)
    _tuned(kind, found, x, dh, M, lambda tile: tile.depth, block, call)
