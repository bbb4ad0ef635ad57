"""What the launches have to know of a device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """How many blocks a device works on at a time, and what shared memory each may have.

    Args:
        processors: multiprocessors.
        shared: bytes that a block may have.
        hopper: whether it has the instructions of sm_90a.
        ops: the operators that launch there.
    """

    processors: int
    shared: int
    hopper: bool
    ops: Any

    @classmethod
    def of(cls, t: Tensor) -> Device:
        """The device of a tensor; for a tensor on the CPU, the emulator, small so that small problems are split."""
        if t.device.type != "cuda":
            return cls(4, 227 << 10, True, torch.ops.fasthyper_cuda_emulated)
        return _device(t.device.index)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    hopper = (properties.major, properties.minor) == (9, 0) and torch.ops.fasthyper_cuda.generation() == 90
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        hopper,
        torch.ops.fasthyper_cuda,
    )
