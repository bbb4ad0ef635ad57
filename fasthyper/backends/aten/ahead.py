"""Make a tile on a GPU while the last one is used, each on a stream of its own.

    other stream     make 0   make 1   make 2   make 3
    caller's stream           use 0    use 1    use 2    use 3

Tiles take turns in two rooms: tile k + 2 is made where tile k was, after the use of tile k. Events tell the device so,
and the host waits for nothing. The other stream begins after all that the caller's has to do before, and at the end the
caller's waits for it. So the memory of the call may be freed as if there were one stream, and a graph that captures one
captures both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ... import planner

T = TypeVar("T")
_LEAST_SECONDS = 10e-6  # about what the host needs for a tile's events and changes of stream; no GPU has measured it


class _Thread(threading.local):
    """The other streams, by device and whether their work is captured.

    cuBLAS keeps memory for each stream. That of captured work belongs to graphs, which may run beside other work.
    """

    def __init__(self) -> None:
        self.streams: dict[tuple[int, bool], torch.cuda.Stream] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        key = device.index, torch.cuda.is_current_stream_capturing()
        if key not in self.streams:
            self.streams[key] = torch.cuda.Stream(device)
        return self.streams[key]


_thread = _Thread()


def is_worth_it(t: Tensor, flops: int) -> bool:
    """Return whether to make tiles ahead: on a GPU, where both the making and the use of one take so many flops.

    cuBLAS promises the same bits every time to a process with one stream, so deterministic algorithms have one.
    """
    if not t.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    return flops / planner.machine("cuda", t.dtype).flops >= _LEAST_SECONDS


def make_ahead(
    tiles: Sequence[T], make: Callable[[T, Tensor], Tensor], rooms: Sequence[Tensor]
) -> Generator[tuple[T, Tensor], None, None]:
    """Yield each tile with what was made of it; the next one is made while the caller uses it.

    Args:
        tiles: at least one.
        make: makes a tile in the memory that it is given, on the other stream. It reads nothing that the caller writes
            after the first tile is asked for.
        rooms: memory for each of two tiles, on the device of all tensors.
    """
    device = rooms[0].device
    this, other = torch.cuda.current_stream(device), _thread.stream(device)
    made = torch.cuda.Event(), torch.cuda.Event()
    used = torch.cuda.Event(), torch.cuda.Event()

    def start(k: int) -> Tensor:
        if k >= 2:
            other.wait_event(used[k % 2])
        with torch.cuda.stream(other):
            result = make(tiles[k], rooms[k % 2])
        made[k % 2].record(other)
        return result

    other.wait_stream(this)
    try:
        following = start(0)
        for k, tile in enumerate(tiles):
            result = following
            if k + 1 < len(tiles):
                following = start(k + 1)
            this.wait_event(made[k % 2])
            yield tile, result
            used[k % 2].record(this)
    finally:
        this.wait_stream(other)
