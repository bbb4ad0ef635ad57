"""The op family by the kernels: what is computed, in which pieces, with which tiles.

    y   fold(x, z)      dx, dz   dx_dz, or fold(g, z) and fold(g, x) where all of R and O are no tile
    dH  weight_grad

A sum is split where its blocks are too few to fill the device; the parts are float32, and `reduce` adds them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from ... import planner
from ...kernels import tiles
from ...kernels.tiles import Tile
from ...problem import Problem
from .. import aten
from . import DTYPES, calls, device, tuning
from .calls import cdiv
from .tuning import Candidate


def _left_to_aten(x: Tensor, R: int, O: int) -> bool:
    return x.dtype not in DTYPES or 0 in (*x.shape, R, O) or x.shape[0] * x.shape[1] >= 1 << 31


def _plan(op: str, x: Tensor, R: int, O: int, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3) -> str:
    B, N, I = x.shape
    shared = B > 1 and x.stride(0) == 0
    return planner.plan(Problem(op, B, N, R, I, O, x.dtype, "cuda", shared, needs, "triton"), schedule).schedule


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    *,
    schedule: str,
) -> Tensor:
    """y (B, N, O)."""
    O, _, R = weight.shape
    if not _left_to_aten(x, R, O):
        schedule = _plan("apply", x, R, O, schedule)
        if schedule == "fold":
            B, N, _ = x.shape
            y = x.new_empty(B, N, O)
            with device.current(x):
                for b, even_z, h in _padded_blocks(z, weight, _instances(B, N, z, 0)):
                    out = y[b].view(-1, O)
                    _fold(x[b], _rows(cast(Tensor, even_z), N), h.permute(1, 2, 0), base_weight, bias, base_bias, out)
            return y
    return aten.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, z, H, bias, W0, b0 as asked for by the mask."""
    (B, N, I), O = x.shape, g.shape[2]
    R = cast(Tensor, z if weight is None else weight).shape[-1]
    dx, dz, dh = mask[:3]
    if not _left_to_aten(x, R, O) and (dx or dz or dh):
        schedule = _plan("grads", x, R, O, schedule, (dx, dz, dh))
    if _left_to_aten(x, R, O) or schedule != "fold":
        return aten.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    out = [x.new_empty(shape) if k else None for shape, k in zip(((B, N, I), (B, R), (O, I, R)), mask, strict=False)]
    with device.current(x):
        _grads(x, z, weight, bias, base_weight, g, *out)
    rest: tuple[Tensor | None, ...] = (None, None, None)
    if any(mask[3:]):
        tile = aten.tile_of(planner.plan(Problem("grads", B, N, R, I, O, x.dtype, x.device.type)))
        rest = aten.base_grads(x, z, g, R, mask, tile)
    return *out, *rest


def _grads(
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


def _precision(x: Tensor) -> str:
    return calls.precision_of(x.dtype, device.of(x).part, device.allows_tf32())


def _per_split(size: int, splits: int, unit: int) -> int:
    return cdiv(cdiv(size, splits), unit) * unit


def _split(out: Tensor, parts: int, launch: Callable[[Tensor], None]) -> None:
    """Write `out`, or parts of it that `reduce` sums."""
    if parts == 1:
        launch(out)
        return
    partial = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    launch(partial)
    calls.reduce_call(partial, out).launch()


def _bucket(rows: int) -> int:
    """Rows by powers of two: what a tile was timed for."""
    return rows.bit_length()


def _fold(u: Tensor, v: Tensor, h: Tensor, a: Tensor | None, c: Tensor | None, d: Tensor | None, out: Tensor) -> None:
    """Out (B·N, P) from u (B, N, C), v (B, N, K), H (C, K, P), A (P, C), C (P, K), d (P,)."""
    dev, precision = device.of(u), _precision(u)
    C, K, P = u.shape[2], v.shape[2], out.shape[1]
    bits = u.dtype.itemsize * 8

    def predicted(tile: Tile) -> Candidate:
        together = calls.depths(K, tile.depth, C)[2]
        columns = min(tile.columns, tiles.power_of_two(P))
        blocks = cdiv(len(out), tile.rows) * cdiv(P, columns)
        work = 2.0 * tile.rows * columns * C * calls.padded(K)
        tile_ = tile._replace(columns=columns)
        found = tuning.candidate(tile_, blocks, work, cdiv(C, together), out.numel() * 4, _room(), dev.processors, bits)
        return found._replace(tile=tile)

    def run(chosen: Candidate) -> None:
        together = calls.depths(K, chosen.tile.depth, C)[2]
        per_split = _per_split(C, chosen.splits, together)
        how = (per_split, chosen.tile, dev.part, precision)
        _split(out, cdiv(C, per_split), lambda to: calls.fold_call(u, v, h, a, c, d, to, *how).launch())

    kind = ("fold", u.dtype, precision, _bucket(len(out)), C, K, P, h.stride(), u.shape[1] > 1)
    found = calls.fold_tiles(v, h, P, dev.part)
    run(tuning.choose(kind, [predicted(tile) for tile in found], dev, run))


def _dx_dz(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    g: Tensor,
    dx: Tensor,
    dz: Tensor,
    found: tuple[Tile, ...],
) -> None:
    """dx (B·N, I) and dz (B·N, R)."""
    dev, precision = device.of(x), _precision(x)
    O, I, R = g.shape[2], dx.shape[1], dz.shape[1]
    unit = calls.COLLECTED
    bits = x.dtype.itemsize * 8

    def predicted(tile: Tile) -> Candidate:
        work = 2.0 * tile.rows * I * tile.depth * tile.columns
        blocks = cdiv(len(dx), tile.rows)
        return tuning.candidate(tile, blocks, work, cdiv(I, unit), dz.numel() * 4, _room(), dev.processors, bits)

    def run(chosen: Candidate) -> None:
        per_split = _per_split(I, chosen.splits, unit)
        how = (per_split, chosen.tile, dev.part, precision)
        launch = lambda to: calls.dx_dz_call(x, z, weight, base, bias, g, dx, to, *how).launch()
        _split(dz, cdiv(I, per_split), launch)

    kind = ("dx_dz", x.dtype, precision, _bucket(len(dx)), I, O, R, weight.stride(), x.shape[1] > 1)
    run(tuning.choose(kind, [predicted(tile) for tile in found], dev, run))


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor) -> None:
    """dH (O, I, R)."""
    dev, precision = device.of(x), _precision(x)
    O, I, R = dh.shape
    M = x.shape[0] * x.shape[1]
    bits = x.dtype.itemsize * 8

    def predicted(tile: Tile) -> Candidate:
        bi, br, bo = calls.weight_grad_block(I, R, O, tile)
        work = 2.0 * bi * br * bo * M
        blocks = cdiv(I, bi) * cdiv(R, br) * cdiv(O, bo)
        tile_ = tile._replace(rows=bi * br, columns=bo)
        found = tuning.candidate(
            tile_, blocks, work, cdiv(M, tile.depth), dh.numel() * 4, _room(), dev.processors, bits
        )
        return found._replace(tile=tile)

    def run(chosen: Candidate) -> None:
        per_split = _per_split(M, chosen.splits, chosen.tile.depth)
        how = (per_split, chosen.tile, dev.part, precision)
        _split(dh, cdiv(M, per_split), lambda to: calls.weight_grad_call(x, z, g, to, *how).launch())

    kind = ("weight_grad", x.dtype, precision, _bucket(M), I, O, R, x.shape[1] > 1)
    run(tuning.choose(kind, [predicted(tile) for tile in calls.weight_grad_tiles(z, g, dev.part)], dev, run))
