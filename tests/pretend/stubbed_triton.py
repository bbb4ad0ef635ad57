"""Triton without a GPU: kernels are neither compiled nor run; all Python up to the launch is Triton's own."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fasthyper.backends import triton as backend
from fasthyper.backends.triton import tuning


class Launch:
    """What a kernel is launched with: its name, its grid, and its arguments with addresses in the place of tensors."""

    def __init__(self, name: str, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self.name, self.grid, self.values = name, grid, [_plain(value) for value in values]
        self.given = values  # no later tensor has the address of one that is kept


def _plain(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        address = value.base.data_ptr()
        return ("address", address, value.base.dtype, *map(tuple, (value.shape, value.strides, value.block_shape)))
    if isinstance(value, Tensor):
        return ("address", value.data_ptr())
    return value


launches: list[Launch] | None = None
"""The launches since it was set to an empty list; None if they are not wanted."""


class Driver:
    """What Triton asks its driver before a launch."""

    utils = launcher_cls = None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> None:
        return None

    def is_active(self) -> bool:
        return True


class Kernel:
    """A compiled kernel that does nothing."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, pointers: frozenset[int]) -> None:
        self.name, self.pointers = name, pointers

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        if launches is not None:
            values = rest[4:]  # after the kernel's metadata, the launch's, and two hooks
            values = [("address", v) if k in self.pointers and isinstance(v, int) else v for k, v in enumerate(values)]
            launches.append(Launch(self.name, (x, y, z), tuple(values)))


def compile_(self: JITFunction, key: Any, signature: dict[str, str], device: int, *rest: Any, **options: Any) -> Kernel:
    pointers = frozenset(k for k, kind in enumerate(signature.values()) if kind.startswith("*"))
    kernel = Kernel(self.__name__, pointers)
    self.device_caches[device][0][key] = kernel
    return kernel


def start() -> None:
    """Let the backend `triton` find the pretended GPU, and make its kernels do nothing."""
    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]
    JITFunction._do_compile = compile_  # type: ignore[method-assign]
    tuning._time, tuning._write, tuning._read = (lambda run, c: 1.0), (lambda d: None), (lambda d: {})
    why = backend.unavailable()
    assert why is None, why
