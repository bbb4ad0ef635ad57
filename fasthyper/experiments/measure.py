"""What a call costs beside time: the memory it needs for a while and gives back."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_temporary_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes held at any one moment of `fn()` by what is gone again when it returns.

    So outputs and gradients do not count, nor anything else that `fn` leaves behind, but whatever autograd
    keeps from forward to backward does. Call `fn` once before, where a first call sets things up.

    On the CPU the profiler's memory events are followed block by block, so that freeing memory that was there
    before changes nothing; what C++ allocates without torch's allocator is not seen. On a GPU it is the
    caching allocator's peak minus what is held at the end: less, where temporaries are gone before the
    results come.

    Args:
        fn: called once, without arguments.
        device: where `fn` allocates: `"cpu"` or a CUDA device.

    Raises:
        ValueError: for any other device.

    Example:
        Two temporaries of 4,000 bytes are alive together; the result is not temporary.

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
    # Kineto announces each start and stop on stderr otherwise; it reads this once, at its first profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = fn()
    # `result` stays alive until the profiler has stopped: what it holds must not look temporary.
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
    """(time in ns, address, signed bytes) of every CPU memory event: the flat events carry no address."""
    kineto = getattr(profiler.profiler, "kineto_results", None)
    if kineto is None:
        raise RuntimeError("this build of torch records no profiler events: memory cannot be measured")
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
