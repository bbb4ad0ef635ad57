"""What the kernels have to know of a device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import interpreting
from .tiles import INTERPRETER, PARTS

_INTERPRETED_PROCESSORS = 4  # few, so that small problems are split


class Device(NamedTuple):
    """A device's name, its part (whose tiles it takes), and how many blocks it works on at a time."""

    name: str
    part: str
    processors: int


@functools.cache
def _of(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    processors = properties.multi_processor_count
    if torch.version.hip is not None:
        return Device(properties.name, "gfx942", processors)
    cc = properties.major * 10 + properties.minor
    # The newest part that is no newer; sm_120 has neither wgmma nor tcgen05, and takes what sm_80 takes.
    known = [int(part[3:]) for part in PARTS if part.startswith("sm_")]
    part = 80 if cc >= 120 else max(n for n in known if n <= cc)
    return Device(properties.name, f"sm_{part}", processors)


def of(t: Tensor) -> Device:
    """Return the device of a tensor."""
    if t.device.type != "cuda":
        assert interpreting()
        return Device("interpreter", INTERPRETER, _INTERPRETED_PROCESSORS)
    return _of(t.device.index)


@contextlib.contextmanager
def current(t: Tensor) -> Iterator[None]:
    """Make the tensor's device the current one: Triton launches there, on its current stream."""
    if not t.is_cuda:
        yield
        return
    with torch.cuda.device(t.device):
        torch.cuda.set_device(t.device)  # also where it is current already: a new thread has no context yet
        yield


def allows_tf32() -> bool:
    """Whether torch may round operands of float32 products to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
