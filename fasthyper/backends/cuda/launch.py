"""How a call is cut into blocks, and the launch itself: `fold` for y, `grads` for all that backward asks for.

A sum is split where its blocks are too few to fill the device; the parts are float32, in the workspace, and added in
order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ... import planner
from ..triton.device import allows_tf32
from .device import Device

_ROWS, _WIDE_ROWS = 32, 128  # of a block of the two shapes: csrc/cuda/kernels.h
_DEEP = 64  # O from which on a block of few rows does not keep g
_COLUMNS = 64
_HOPPER_ROWS, _HOPPER_COLUMNS, _HOPPER_BATCH = 256, 128, 64  # of the kernels for sm_90a
_HOPPER_WORK = 1 << 31  # flops from which their pipelines are worth filling: predicted, not measured
_INPUTS = 4  # of a block of weight_grad
_LEAST_WORK = 256  # rows of the batch, or numbers of K, that are worth a block of their own
_MOST_SPLITS = 32
_EVEN = 8
_SPLIT_COST, _WORTH_IT = 1.2, 1.05  # of a split sum, and gain from which on it is worth a launch: predicted
HOPPER_DTYPES = (torch.bfloat16, torch.float16)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def room() -> int:
    """Bytes that parts of sums may take: of one, half of that."""
    return planner.get_workspace_limit() // 2


def _row_of(dtype: torch.dtype) -> int:
    """Numbers in a row of a tile: 128 bytes."""
    return 128 // dtype.itemsize


def _splits(blocks: int, work: int, part: int, processors: int, room: int) -> int:
    """Parts of a sum: as many as fill the device, have work enough, and have room for their results."""
    return max(1, min(processors // max(1, blocks), work // _LEAST_WORK, room // 2 // max(1, part), _MOST_SPLITS))


def fold(
    u: Tensor,
    v: Tensor,
    h: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    out: Tensor,
    dev: Device,
) -> None:
    """Out (B, N, P) from u (B, N, C), v (B, K), H (C, K, P), A (P, C), C (P, K), d (P,); see csrc/cuda/fold.h."""
    (B, N, C), (_, K, P) = u.shape, h.shape
    hopper = dev.hopper and u.dtype in HOPPER_DTYPES and 2 * B * N * C * K * P >= _HOPPER_WORK
    whole = _whole_waves(B, P, dev.processors) if hopper and N == 1 else B
    if whole < B:
        for rows in (slice(whole), slice(whole, B)):
            fold(u[rows], v[rows], h, a, c, d, out[rows], dev)
        return
    per_split, wide = fold_launch(B * N, C, K, P, dev.processors, room(), hopper)
    splits = cdiv(C, per_split)
    partial = torch.empty(splits, B * N, P, dtype=torch.float32, device=u.device) if splits > 1 else None
    dev.ops.fold(u, v, h, a, c, d, out, partial, per_split, wide, hopper, allows_tf32())


@functools.lru_cache(maxsize=4096)
def fold_launch(M: int, C: int, K: int, P: int, processors: int, room: int, hopper: bool = False) -> tuple[int, bool]:
    """C of a split, and whether blocks have many rows: where that still makes one for each multiprocessor."""
    columns = cdiv(P, _HOPPER_COLUMNS if hopper else _COLUMNS)
    wide = hopper or cdiv(M, _WIDE_ROWS) * columns >= processors
    blocks = cdiv(M, _HOPPER_ROWS if hopper else _WIDE_ROWS if wide else _ROWS) * columns
    return _even(cdiv(C, _splits(blocks, C * K, 4 * M * P, processors, room)), C), wide


def _whole_waves(M: int, P: int, processors: int) -> int:
    """Rows whose blocks fill the device a whole number of times, where the rest is better split; else all."""
    columns = cdiv(P, _HOPPER_COLUMNS)
    waves, rest = divmod(cdiv(M, _HOPPER_ROWS) * columns, processors)
    split = waves + _SPLIT_COST * rest / processors
    rows = waves * processors // columns * _HOPPER_ROWS
    return rows if waves and rest and split * _WORTH_IT < waves + 1 else M


def _even(per_split: int, inputs: int) -> int:
    """Inputs of a split, a multiple of eight where there are several: matrices are read 16 bytes at a time."""
    return min(inputs, cdiv(per_split, _EVEN) * _EVEN)


class GradsLaunch(NamedTuple):
    """How the blocks of `grads` are cut.

    Args:
        wide: whether blocks of dx and dz have many rows.
        hopper: whether the kernels for sm_90a are to do what they can of it.
        inputs: I of a split of dz.
        rows: of the batch, of a split of the parameters' gradients.
        parts: numbers of one part of those.
    """

    wide: bool
    hopper: bool
    inputs: int
    rows: int
    parts: int


def grads_launch(
    B: int, N: int, R: int, I: int, O: int, dtype: torch.dtype, mask: tuple[bool, ...], dev: Device
) -> GradsLaunch | None:
    """How all gradients of a layer are cut; None where a block or the workspace has no room.

    The mask is that of dx, dz, dH, dbias, dW0, db0.
    """
    return _grads_launch(B, N, R, I, O, dtype, mask, dev, room())


@functools.lru_cache(maxsize=4096)
def _grads_launch(
    B: int, N: int, R: int, I: int, O: int, dtype: torch.dtype, mask: tuple[bool, ...], dev: Device, room: int
) -> GradsLaunch | None:
    M, row = B * N, _row_of(dtype)
    dx, dz = mask[:2]
    parts = sum(n for n, k in zip((O * I * R, O * R, O * I, O), mask[2:], strict=True) if k)

    hopper = dev.hopper and dtype in HOPPER_DTYPES and 2 * M * R * I * O >= _HOPPER_WORK
    wide, inputs = hopper or cdiv(M, _WIDE_ROWS) >= dev.processors, I
    if dx or dz:
        shared = lambda wide, inputs: dev.ops.grads_shared(O, inputs, dtype.itemsize, dx, wide)
        wide = wide or O > _DEEP or shared(False, _EVEN) > dev.shared
        blocks = cdiv(M, _WIDE_ROWS if wide else _ROWS)
        splits = _splits(blocks, I * R, 4 * M * R, dev.processors, room)
        inputs = _even(cdiv(I, splits), I)
        while inputs > _EVEN and shared(wide, inputs) > dev.shared:  # dx of a split is collected there
            inputs = cdiv(inputs // 2, _EVEN) * _EVEN
        if shared(wide, inputs) > dev.shared or _dz_parts(M, N, R, I, inputs, dz) > room // 2:
            return None

    rows = M
    if parts:
        columns = _HOPPER_COLUMNS if hopper and row < O else row
        blocks = cdiv(I + mask[3], _INPUTS) * (cdiv(R, row) + mask[4]) * cdiv(O, columns)
        rows = cdiv(M, _splits(blocks, M, 4 * parts, dev.processors, room))
        rows = min(M, cdiv(rows, _HOPPER_BATCH) * _HOPPER_BATCH)
    return GradsLaunch(wide, hopper, inputs, rows, parts)


def _dz_parts(M: int, N: int, R: int, I: int, inputs: int, dz: bool) -> int:
    """Bytes of the parts of dz: none where it comes whole."""
    splits = cdiv(I, inputs)
    return 4 * splits * M * R if dz and (N > 1 or splits > 1) else 0


def parts_of(how: GradsLaunch, M: int, x: Tensor) -> Tensor | None:
    """Room for the parts of the parameters' gradients; None where they come whole."""
    splits = cdiv(M, how.rows)
    if splits == 1 or not how.parts:
        return None
    return torch.empty(splits, how.parts, dtype=torch.float32, device=x.device)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    out: list[Tensor | None],
    how: GradsLaunch,
    dev: Device,
) -> None:
    """The gradients in `out`: dx, dz, dH, dbias, dW0, db0, each where there is one; see csrc/cuda/grads.h."""
    (B, N, I), dz = x.shape, out[1]
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    z_parts = None
    if _dz_parts(B * N, N, R, I, how.inputs, dz is not None):
        z_parts = torch.empty(cdiv(I, how.inputs), B * N, R, dtype=torch.float32, device=x.device)
    if z is None:  # dz alone does not read it
        z = x.new_empty(1).expand(B, R)
    parts = parts_of(how, B * N, x)
    dev.ops.grads(
        x, z, weight, bias, base_weight, g, out[0], dz, z_parts, *out[2:], parts, how.inputs, how.rows, how.wide,
        how.hopper, allows_tf32(),
    )  # fmt: skip
