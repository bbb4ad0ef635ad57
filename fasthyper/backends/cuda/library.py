"""The compiled library of csrc/cuda: its operators, and what Python needs to know before it calls them."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor


def emulating() -> bool:
    """Return whether the emulator runs the kernels, on CPU tensors."""
    return os.environ.get("FASTHYPER_EMULATED", "0") == "1"


@functools.cache
def ops() -> Any:
    """Return the operators of the library."""
    return torch.ops.fasthyper_cuda_emulated if emulating() else torch.ops.fasthyper_cuda


def index(t: Tensor) -> int:
    """Return the number of a tensor's GPU, or 0."""
    return t.device.index or 0


def bits(mask: tuple[bool, ...]) -> int:
    """Return a number with a bit for each entry of a mask."""
    return sum(1 << k for k, wanted in enumerate(mask) if wanted)


@functools.lru_cache(maxsize=4096)
def fits(device: int, sizes: tuple[int, ...], dtype: torch.dtype, mask: tuple[bool, ...], workspace: int) -> bool:
    """Return whether the gradients of a layer fit shared memory and the workspace.

    Args:
        device: the number of the GPU.
        sizes: B, N, R, I and O.
        dtype: that of all tensors.
        mask: which of dx, dz, dH, dbias, dW0 and db0 are requested.
        workspace: bytes.
    """
    return bool(ops().fits(device, *sizes, dtype.itemsize, bits(mask), workspace))


@functools.lru_cache(maxsize=4096)
def fits_primary(device: int, sizes: tuple[int, ...], dtype: torch.dtype, workspace: int) -> bool:
    """Return whether one launch computes two layers, of the sizes B, N, R, I, J and O: narrow ones, with a small a."""
    return bool(ops().fits_primary(device, *sizes, dtype.itemsize, workspace))


@functools.cache
def activation(name: str) -> int:
    """Return the number that stands for an activation in calls of the operators."""
    return int(ops().activation(name))
