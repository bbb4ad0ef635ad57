"""Measure the costs of a call: its time, and its temporary memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved_seconds(fns: Sequence[Callable[[], Any]], times: int, device: torch.device) -> list[float]:
    """Time functions in turns, so that a change of the machine's speed affects all of them alike.

    Args:
        fns: each called without arguments, once before the first timed call.
        times: timed calls of each.
        device: where they run.

    Returns:
        The median seconds of each function.
    """
    for fn in fns:
        fn()
    seconds: list[list[float]] = [[] for _ in fns]
    for _ in range(times):
        for fn, found in zip(fns, seconds, strict=True):
            start = clock(device)
            fn()
            found.append(clock(device) - start)
    return [statistics.median(found) for found in seconds]


def peak_temporary_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the peak of the memory that `fn()` allocates and releases again before it returns.

    Outputs, gradients and everything else that outlives the call do not count; what autograd keeps from forward to
    backward does. If a first call sets something up, call `fn` once before.

    On the CPU, the profiler's memory events are followed block by block: releasing memory that was allocated before
    the call changes nothing. Memory that C++ code allocates without torch's allocator is not seen. On a GPU, the result
    is the peak of the caching allocator minus the memory in use at the end: it is too small where temporaries are
    released before the results are allocated.

    Args:
        fn: called once, without arguments.
        device: where `fn` allocates: `"cpu"` or a CUDA device.

    Raises:
        ValueError: for any other device.

    Example:
        Two temporaries of 4,000 bytes exist at the same time; the result is not temporary.

        >>> import torch
        >>> x = torch.ones(1000)
        >>> peak_temporary_bytes(lambda: (x + x) * (x * x))
        8000
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _peak_on_cpu(fn)
    if device.type == "cuda":
        return _peak_on_cuda(fn, device)
    raise ValueError(f"device: memory is measured on cpu and cuda, not on {device.type!r}")


def _peak_on_cpu(fn: Callable[[], Any]) -> int:
    # Without this, Kineto writes to stderr at each start and stop. It reads the variable once, at the first profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = fn()
    # `result` is deleted after the profiler has stopped, so that its memory does not count as temporary.
    born: dict[int, int] = {}
    changes: list[int] = []
    for _, pointer, size in sorted(_allocations(profiler), key=lambda event: event[0]):
        if size > 0:
            born[pointer] = len(changes)
            changes.append(size)
        elif born.pop(pointer, None) is not None:
            changes.append(size)
    for index in born.values():
        changes[index] = 0
    del result
    return max(accumulate(changes, initial=0))


def _allocations(profiler: profile) -> list[tuple[int, int, int]]:
    """Return (time in ns, address, signed bytes) of every CPU memory event; flat events have no address."""
    kineto = getattr(profiler.profiler, "kineto_results", None)
    if kineto is None:
        raise RuntimeError("this build of torch records no profiler events, so memory cannot be measured")
    events = []
    nodes = list(kineto.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            fields = node.extra_fields
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
    return events


def _peak_on_cuda(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del result
    return peak
