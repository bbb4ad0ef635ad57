"""How a call is timed on a device, with none of it in the last-level cache; and what the device does at best."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from fasthyper.planner import machine

from .inputs import Sets, inputs, rotated
from .records import COPY, PRODUCT, last_level_cache
from .workloads import Workload

Call = Callable[[], Any]


class Ceiling(NamedTuple):
    """What a machine does best, and how much of it one call is: flops of a product, bytes of a copy."""

    call: Call
    amount: float


class CPU:
    """Calls by the system's clock; each takes other tensors than the one before, so that they are in no cache."""

    kind = "cpu"
    most_bytes = 4 << 30  # what a peer may keep

    def __init__(self) -> None:
        self._cache = last_level_cache() or 32 << 20

    def sets(self, w: Workload, dtype: torch.dtype) -> Sets:
        """Tensors to take in turns."""
        return rotated(w, dtype, self._cache)

    def ready(self, call: Call) -> tuple[Call, str]:
        """What to time in the place of a call that has run before, and what to say of it."""
        return call, ""

    def once(self, call: Call) -> Call:
        """A call that is over when it returns, for who has a clock of its own."""
        return call

    def seconds(self, call: Call) -> float:
        """Of one call; what it returns is freed after the clock has stopped."""
        start = time.perf_counter()
        results = call()
        seconds = time.perf_counter() - start
        del results
        return seconds

    def ceilings(self, dtype: torch.dtype) -> dict[str, Ceiling]:
        """A large product, in float32 where there are none of 16 bits, and a copy of what fits in no cache."""
        return _ceilings("cpu", machine("cpu", dtype).work_dtype, 1024, 2 * self._cache)

    def free(self) -> int:
        """Bytes to be had; 0 where the system does not tell."""
        return _proc("/proc/meminfo", "MemAvailable:") * 9 // 10

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Memory that is not there is refused, instead of swapped or of ending the process."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        now, free = _proc("/proc/self/status", "VmSize:"), self.free()
        if now and free:
            resource.setrlimit(resource.RLIMIT_AS, (now + free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def tidy(self) -> None:
        """Give back what nobody holds."""
        gc.collect()


class GPU:
    """Replays of CUDA graphs between two events, so that Python is not timed, after the L2 cache was overwritten."""

    kind = "cuda"
    most_bytes = 40 << 30

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._overwritten = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def sets(self, w: Workload, dtype: torch.dtype) -> Sets:
        """Tensors: one set, since a graph has it fixed."""
        return Sets([inputs(w, dtype, "cuda")])

    def ready(self, call: Call) -> tuple[Call, str]:
        """The call as a graph, after what it sets up at first; as it is, where it is not to be captured."""
        try:
            return self._captured(call), ""
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            return call, "not a CUDA graph"

    def _captured(self, call: Call) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def once(self, call: Call) -> Call:
        """A replay that is over when it returns, for who has a clock of its own: the L2 cache is as it was left."""

        def replayed() -> None:
            call()
            torch.cuda.synchronize()

        return replayed

    def seconds(self, call: Call) -> float:
        """Of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._overwritten.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def ceilings(self, dtype: torch.dtype) -> dict[str, Ceiling]:
        """A large product, and a copy of a gigabyte."""
        found = _ceilings("cuda", dtype, 8192, 1 << 30)
        return {name: ceiling._replace(call=self._captured(ceiling.call)) for name, ceiling in found.items()}

    def free(self) -> int:
        """Bytes to be had."""
        return torch.cuda.mem_get_info()[0]

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Memory that is not there is refused anyway."""
        yield

    def tidy(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        torch.cuda.empty_cache()


def _ceilings(device: str, dtype: torch.dtype, side: int, size: int) -> dict[str, Ceiling]:
    generator = torch.Generator(device).manual_seed(0)  # the default one may be of a graph that could not be captured
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return {
        PRODUCT: Ceiling(partial(torch.mm, a, b, out=torch.empty_like(a)), 2.0 * side**3),
        COPY: Ceiling(partial(torch.empty_like(source).copy_, source), 2.0 * size),
    }


def _proc(path: str, field: str) -> int:
    """Bytes that Linux tells under a name, 0 where it tells nothing."""
    try:
        with open(path) as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
    except OSError:
        return 0
