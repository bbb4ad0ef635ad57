"""The compiled library of csrc/cuda: its operators, and the constants that its kernels are compiled with."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gpu
from ..gpu import Device


def emulating() -> bool:
    """Return whether the emulator runs the kernels, on CPU tensors."""
    return os.environ.get("FASTHYPER_EMULATED", "0") == "1"


def device(t: Tensor) -> Device:
    """Return the GPU of a tensor, or the emulator."""
    return gpu.device(t, gpu.EMULATED)


@functools.cache
def ops() -> Any:
    """Return the operators of the library."""
    return torch.ops.fasthyper_cuda_emulated if emulating() else torch.ops.fasthyper_cuda


@functools.cache
def has_hopper_kernels(device: Device) -> bool:
    """Return whether the library has kernels for sm_90a, and the device runs them."""
    return device.arch == "sm_90" and ops().generation() == 90


class TileSizes(NamedTuple):
    """The sizes of the tiles of csrc/cuda; csrc/cuda/library.cu has each under the same name.

    Args:
        rows: rows m of a block of `fold`, or of dx and dz, where there are few rows.
        wide_rows: the same where there are enough rows to fill the device.
        columns: outputs of a block of `fold`.
        kept_outputs: the largest O for which a block of few rows keeps all of g.
        inputs: inputs i of a block of the gradient of H.
        row_bytes: bytes of a row of a tile in shared memory.
        hopper_rows: rows of a block of `fold` for sm_90a.
        hopper_columns: outputs of a block of `fold` or of the gradient of H for sm_90a.
        hopper_batch: rows m of a step of the gradient of H for sm_90a; splits are multiples of it.
    """

    rows: int
    wide_rows: int
    columns: int
    kept_outputs: int
    inputs: int
    row_bytes: int
    hopper_rows: int
    hopper_columns: int
    hopper_batch: int


@functools.cache
def tile_sizes() -> TileSizes:
    """Return the sizes of the tiles."""
    return TileSizes(*(ops().constant(name) for name in TileSizes._fields))


@functools.cache
def activation(name: str) -> int:
    """Return the number that stands for an activation in calls of the operators."""
    return ops().constant(name)
