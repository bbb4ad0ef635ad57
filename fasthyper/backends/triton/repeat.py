"""Repeat the launches of a call without the Python that chose them.

The second call with given shapes, strides and alignments is recorded: its launches, and the place of each tensor among
their arguments. (The first one may have timed tiles.) Later calls launch the same compiled kernels on their own
tensors. Each call allocates its temporary memory anew, in one piece.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import planner
from .. import gpu
from . import calls

_MOST = 4096
_PIECE = 512  # bytes; temporary tensors begin at multiples of it, as those of torch's allocator do
_SEEN, _NEVER = "seen once", "never repeated"
_known: dict[tuple[object, ...], Repeat | str] = {}


class _Thread(threading.local):
    """The devices that have been made current in a thread. A new thread has no context of CUDA."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()


class _Address(NamedTuple):
    """What the launcher of a tensor descriptor reads of its base."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Place(NamedTuple):
    """Where the address of an argument comes from: a slot, and an offset in bytes."""

    position: int
    slot: int
    offset: int


class _Launch(NamedTuple):
    """A launch of a compiled kernel: all arguments, with None in the place of each tensor and descriptor."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[_Place]
    descriptors: list[tuple[_Place, TensorDescriptor]]


class Repeat(NamedTuple):
    """The launches of a call. Its slots are the call's tensors, and temporary memory of some bytes, if any."""

    launches: list[_Launch]
    temporary: int

    def run(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        """Launch the kernels on other tensors, with the shapes, strides and alignments of those recorded."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        if self.temporary:
            memory = torch.empty(self.temporary, dtype=torch.uint8, device=device)
            addresses.append(memory.data_ptr())
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        for kernel, grid, arguments, pointers, descriptors in self.launches:
            values = arguments.copy()
            for position, slot, offset in pointers:
                values[position] = addresses[slot] + offset
            for (position, slot, offset), described in descriptors:
                values[position] = one = copy.copy(described)
                one.base = _Address(addresses[slot] + offset, described.base.dtype)
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)


def run(kind: str, tensors: Sequence[Tensor | None], launch: Callable[[], None]) -> None:
    """Run the launches of a call: those recorded for calls like it, or else those of `launch`.

    Args:
        kind: distinguishes calls whose tensors are alike.
        tensors: all tensors of the call, those that it writes to included. The first one is not None.
        launch: chooses the kernels and launches them.
    """
    first = tensors[0]
    assert first is not None
    if not first.is_cuda:  # Triton's interpreter
        return launch()
    device = first.device
    if _is_watched():
        with gpu.current(first):
            return launch()
    key = _key(kind, tensors, device)
    known = _known.get(key)
    if isinstance(known, Repeat) and device.index in _thread.devices and torch.cuda.current_device() == device.index:
        return known.run(tensors, device)
    with gpu.current(first):
        _thread.devices.add(device.index)
        if isinstance(known, Repeat):
            known.run(tensors, device)
        elif known == _SEEN and not torch.cuda.is_current_stream_capturing():
            with calls.recording() as record:
                launch()
            _known[key] = _repeat(record, tensors) or _NEVER
        else:
            launch()
            if len(_known) >= _MOST:
                _known.clear()
            _known.setdefault(key, _SEEN)


def forget() -> None:
    """Forget all launches, as after a change of what they depend on."""
    _known.clear()


def _is_watched() -> bool:
    """Return whether a profiler has hooks for launches, which need Triton's own way."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _key(kind: str, tensors: Sequence[Tensor | None], device: torch.device) -> tuple[object, ...]:
    """Return all that the launches of a call depend on."""
    layouts = [None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return kind, device.index, planner.get_workspace_limit(), gpu.allows_tf32(), deterministic, *layouts


def _repeat(record: calls.Record, tensors: Sequence[Tensor | None]) -> Repeat | None:
    """Return the launches of a record as a function of tensors; None if they cannot be repeated."""
    if record.spoiled:
        return None
    ranges = [(0, 0) if t is None else (t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors]
    pieces: dict[int, int] = {}  # offsets of temporary tensors by the address of their storage
    temporary = 0
    launches = []

    def place(position: int, t: Tensor) -> _Place:
        nonlocal temporary
        address = t.data_ptr()
        slots = [slot for slot, (begin, end) in enumerate(ranges) if begin <= address < end]
        if len(slots) > 1:
            raise LookupError  # tensors overlap
        if slots:
            return _Place(position, slots[0], address - ranges[slots[0]][0])
        storage = t.untyped_storage()
        if storage.data_ptr() not in pieces:
            pieces[storage.data_ptr()] = temporary
            temporary += gpu.cdiv(storage.nbytes(), _PIECE) * _PIECE
        return _Place(position, len(ranges), pieces[storage.data_ptr()] + address - storage.data_ptr())

    try:
        for call, kernel in record.launches:
            given = {**call.args, **call.constants}
            arguments = [given[name] for name in call.kernel.arg_names]
            pointers, descriptors = [], []
            for position, value in enumerate(arguments):
                if isinstance(value, Tensor):
                    pointers.append(place(position, value))
                elif isinstance(value, TensorDescriptor):
                    described = copy.copy(value)
                    described.base = _Address(0, value.base.dtype)
                    descriptors.append((place(position, value.base), described))
                else:
                    continue
                arguments[position] = None
            launches.append(_Launch(kernel, call.grid, arguments, pointers, descriptors))
    except LookupError:
        return None
    return Repeat(launches, temporary) if temporary <= planner.get_workspace_limit() else None


def _extent(t: Tensor) -> int:
    """Return the bytes from the first number of a tensor to the end of its last one."""
    return (sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
