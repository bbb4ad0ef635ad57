"""Divide a call into blocks and splits, and launch it: `fold` computes y, and `grads` all gradients of a layer.

A sum is split where its output has too few blocks to fill the device. The partial sums are float32, in the workspace,
and are added in order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gpu
from ..gpu import Device, cdiv
from . import library
from .library import tile_sizes

_HOPPER_WORK = 1 << 31  # the kernels for sm_90a are faster from this many flops on: predicted, not measured
_LEAST_WORK = 256  # rows of the batch, or numbers of K: with fewer, a block of its own is not worthwhile
_MOST_SPLITS = 32
_ALIGNED = 8  # inputs: a split begins at a multiple, as matrices are read 16 bytes at a time
_SPLIT_COST = 1.2  # time of a split sum, relative to one that is not split: predicted
_LEAST_GAIN = 1.05  # a second launch must be faster by this factor: predicted
HOPPER_DTYPES = (torch.bfloat16, torch.float16)


def _splits(blocks: int, work: int, partial: int, processors: int, limit: int) -> int:
    """Return the number of splits of a sum: those that fill the device, have enough work, and fit the limit.

    Args:
        blocks: number of blocks of the output.
        work: rows of the batch, or numbers of K, that the splits share.
        partial: bytes of the partial sums of one split.
        processors: number of multiprocessors.
        limit: bytes that all partial sums may take, of this sum and of another.
    """
    return max(1, min(processors // max(1, blocks), work // _LEAST_WORK, limit // 2 // max(1, partial), _MOST_SPLITS))


def fold(
    u: Tensor,
    v: Tensor,
    h: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    out: Tensor,
    device: Device,
) -> None:
    """Compute out (B, N, P) from u (B, N, C), v (B, K), H (C, K, P), A (P, C), C (P, K), d (P,): csrc/cuda/fold.h."""
    (B, N, C), (_, K, P) = u.shape, h.shape
    hopper = _is_for_hopper(u.dtype, 2 * B * N * C * K * P, device)
    whole = _whole_waves(B, P, device.processors) if hopper and N == 1 else B
    if whole < B:
        for rows in (slice(whole), slice(whole, B)):
            fold(u[rows], v[rows], h, a, c, d, out[rows], device)
        return
    per_split, wide = fold_launch(B * N, C, K, P, device.processors, gpu.partial_sums_limit(), hopper)
    partial = gpu.partial_sums(cdiv(C, per_split), B * N, P, like=u)
    library.ops().fold(u, v, h, a, c, d, out, partial, per_split, wide, hopper, gpu.allows_tf32())


def _is_for_hopper(dtype: torch.dtype, flops: int, device: Device) -> bool:
    """Return whether the kernels for sm_90a compute a call, if its strides allow it."""
    return dtype in HOPPER_DTYPES and flops >= _HOPPER_WORK and library.has_hopper_kernels(device)


@functools.lru_cache(maxsize=4096)
def fold_launch(M: int, C: int, K: int, P: int, processors: int, limit: int, hopper: bool = False) -> tuple[int, bool]:
    """Return the length of a split of C, and whether blocks are wide: if such blocks still fill the device."""
    sizes = tile_sizes()
    columns = cdiv(P, sizes.hopper_columns if hopper else sizes.columns)
    wide = hopper or cdiv(M, sizes.wide_rows) * columns >= processors
    rows = sizes.hopper_rows if hopper else sizes.wide_rows if wide else sizes.rows
    blocks = cdiv(M, rows) * columns
    return _aligned(cdiv(C, _splits(blocks, C * K, 4 * M * P, processors, limit)), C), wide


def _whole_waves(M: int, P: int, processors: int) -> int:
    """Return the number of rows to launch first: whole waves of blocks, if it is faster to split the last wave; else M.

    A wave is as many blocks as the device has multiprocessors.
    """
    sizes = tile_sizes()
    columns = cdiv(P, sizes.hopper_columns)
    waves, last_wave = divmod(cdiv(M, sizes.hopper_rows) * columns, processors)
    split = waves + _SPLIT_COST * last_wave / processors
    rows = waves * processors // columns * sizes.hopper_rows
    return rows if waves and last_wave and split * _LEAST_GAIN < waves + 1 else M


def _aligned(per_split: int, inputs: int) -> int:
    """Return the inputs of a split, rounded up to a multiple of `_ALIGNED`, or all inputs if these are fewer."""
    return min(inputs, cdiv(per_split, _ALIGNED) * _ALIGNED)


class GradsLaunch(NamedTuple):
    """The launch configuration of `grads`.

    Args:
        wide: whether blocks of dx and dz have many rows.
        hopper: whether the kernels for sm_90a compute the gradients that they can.
        inputs_per_split: length of a split of I, for dx and dz.
        rows_per_split: length of a split of the batch, for the gradients of the parameters.
        parameters: how many numbers the gradients of the parameters have.
    """

    wide: bool
    hopper: bool
    inputs_per_split: int
    rows_per_split: int
    parameters: int


def grads_launch(
    B: int, N: int, R: int, I: int, O: int, dtype: torch.dtype, mask: tuple[bool, ...], device: Device
) -> GradsLaunch | None:
    """Return the launch configuration of a layer's gradients; None where shared memory or the workspace is too small.

    The mask is that of dx, dz, dH, dbias, dW0, db0.
    """
    return _grads_launch(B, N, R, I, O, dtype, mask, device, gpu.partial_sums_limit())


@functools.lru_cache(maxsize=4096)
def _grads_launch(
    B: int, N: int, R: int, I: int, O: int, dtype: torch.dtype, mask: tuple[bool, ...], device: Device, limit: int
) -> GradsLaunch | None:
    sizes, ops, processors = tile_sizes(), library.ops(), device.processors
    M, row = B * N, sizes.row_bytes // dtype.itemsize  # numbers in a row of a tile
    dx, dz = mask[:2]
    parameters = sum(n for n, k in zip((O * I * R, O * R, O * I, O), mask[2:], strict=True) if k)

    hopper = _is_for_hopper(dtype, 2 * M * R * I * O, device)
    wide, inputs = hopper or cdiv(M, sizes.wide_rows) >= processors, I
    if dx or dz:
        shared_memory = lambda wide, inputs: ops.grads_shared(O, inputs, dtype.itemsize, dx, wide)
        wide = wide or sizes.kept_outputs < O or shared_memory(False, _ALIGNED) > device.shared_memory
        blocks = cdiv(M, sizes.wide_rows if wide else sizes.rows)
        inputs = _aligned(cdiv(I, _splits(blocks, I * R, 4 * M * R, processors, limit)), I)
        while inputs > _ALIGNED and shared_memory(wide, inputs) > device.shared_memory:  # a block collects its dx there
            inputs = cdiv(inputs // 2, _ALIGNED) * _ALIGNED
        if shared_memory(wide, inputs) > device.shared_memory:
            return None
        if dz and 4 * M * R * _dz_partial_sums(N, I, inputs) > limit // 2:
            return None

    rows = M
    if parameters:
        columns = sizes.hopper_columns if hopper and row < O else row
        blocks = cdiv(I + mask[3], sizes.inputs) * (cdiv(R, row) + mask[4]) * cdiv(O, columns)
        rows = cdiv(M, _splits(blocks, M, 4 * parameters, processors, limit))
        rows = min(M, cdiv(rows, sizes.hopper_batch) * sizes.hopper_batch)
    return GradsLaunch(wide, hopper, inputs, rows, parameters)


def _dz_partial_sums(N: int, I: int, inputs_per_split: int) -> int:
    """Return how many partial sums dz has for each row; 0 if there is one split and each instance has one point."""
    splits = cdiv(I, inputs_per_split)
    return splits if N > 1 or splits > 1 else 0


def parameter_partial_sums(config: GradsLaunch, M: int, like: Tensor) -> Tensor | None:
    """Return memory for the partial sums of the gradients of the parameters; None where they are not split."""
    if not config.parameters:
        return None
    return gpu.partial_sums(cdiv(M, config.rows_per_split), config.parameters, like=like)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    out: list[Tensor | None],
    config: GradsLaunch,
) -> None:
    """Compute the gradients in `out`, each where it is given: dx, dz, dH, dbias, dW0, db0: csrc/cuda/grads.h."""
    (B, N, I), dz = x.shape, out[1]
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    dz_partial = None
    if dz is not None and (count := _dz_partial_sums(N, I, config.inputs_per_split)):
        dz_partial = torch.empty(count, B * N, R, dtype=torch.float32, device=x.device)
    if z is None:  # dz alone does not need it
        z = x.new_empty(1).expand(B, R)
    partial = parameter_partial_sums(config, B * N, x)
    library.ops().grads(
        x, z, weight, bias, base_weight, g, out[0], dz, dz_partial, *out[2:], partial, config.inputs_per_split,
        config.rows_per_split, config.wide, config.hopper, gpu.allows_tf32(),
    )  # fmt: skip
