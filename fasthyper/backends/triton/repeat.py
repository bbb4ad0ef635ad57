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
from . import recording

_MOST, _MOST_LAUNCHES = 4096, 64  # calls, and launches of one: more take longer than the Python that chooses them
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


class _Memory(NamedTuple):
    """The address of a tensor, and the first and the last address of its storage, which may be free by now."""

    address: int
    begin: int
    end: int


class _Kept(NamedTuple):
    """A launch without its tensors: all arguments, and the position and the memory of each tensor and descriptor."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[tuple[int, _Memory]]
    descriptors: list[tuple[int, _Memory, TensorDescriptor]]


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
            with recording.recording(_keep) as record:
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


def _keep(call: recording.Call, kernel: Any) -> _Kept:
    given = {**call.args, **call.constants}
    kept = _Kept(kernel, call.grid, [given[name] for name in call.kernel.arg_names], [], [])
    for position, value in enumerate(kept.arguments):
        if isinstance(value, Tensor):
            kept.pointers.append((position, _memory(value)))
        elif isinstance(value, TensorDescriptor):
            described = copy.copy(value)
            described.base = _Address(0, value.base.dtype)
            kept.descriptors.append((position, _memory(value.base), described))
        else:
            continue
        kept.arguments[position] = None
    return kept


def _memory(t: Tensor) -> _Memory:
    storage = t.untyped_storage()
    return _Memory(t.data_ptr(), storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def _repeat(record: recording.Record, tensors: Sequence[Tensor | None]) -> Repeat | None:
    """Return the launches of a record as a function of tensors; None if they cannot be repeated."""
    launches: list[_Kept] = record.launches
    if record.spoiled or len(launches) > _MOST_LAUNCHES:
        return None
    ranges = [(0, 0) if t is None else (t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors]
    slots_of = lambda m: [slot for slot, (begin, end) in enumerate(ranges) if begin <= m.address < end]
    memories = [memory for kept in launches for _, memory in kept.pointers]
    memories += [memory for kept in launches for _, memory, _ in kept.descriptors]
    if any(len(slots_of(memory)) > 1 for memory in memories):
        return None  # tensors overlap
    pieces, temporary = _pieces([memory for memory in memories if not slots_of(memory)])

    def place(position: int, memory: _Memory) -> _Place:
        for slot in slots_of(memory):
            return _Place(position, slot, memory.address - ranges[slot][0])
        begin = max(begin for begin in pieces if begin <= memory.address)
        return _Place(position, len(ranges), pieces[begin] + memory.address - begin)

    if temporary > planner.get_workspace_limit():
        return None
    repeated = []
    for kernel, grid, arguments, pointers, descriptors in launches:
        described = [(place(position, memory), of) for position, memory, of in descriptors]
        repeated.append(_Launch(kernel, grid, arguments, [place(*pointer) for pointer in pointers], described))
    return Repeat(repeated, temporary)


def _pieces(memories: Sequence[_Memory]) -> tuple[dict[int, int], int]:
    """Return the offsets of temporary memory by its first address, and the bytes of all.

    Storages that overlap were not alive at the same time, and make one piece: they may overlap again.
    """
    pieces: dict[int, int] = {}
    first = last = temporary = 0
    for _, begin, end in sorted(memories, key=lambda memory: memory.begin):
        if not pieces or begin >= last:
            temporary += gpu.cdiv(last - first, _PIECE) * _PIECE
            pieces[begin], first, last = temporary, begin, end
        last = max(last, end)
    return pieces, temporary + gpu.cdiv(last - first, _PIECE) * _PIECE


def _extent(t: Tensor) -> int:
    """Return the bytes from the first number of a tensor to the end of its last one."""
    return (sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
