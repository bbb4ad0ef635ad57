"""The CPU and the GPU: time one call with a cold last-level cache, measure the machine's ceilings, limit memory."""

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

from .context import last_level_cache
from .inputs import Sets, inputs, rotated
from .records import COPY, PRODUCT
from .workloads import Workload

Call = Callable[[], Any]


class Ceiling(NamedTuple):
    """A call that shows the machine's best rate, and its amount: flops of a matrix product, bytes of a copy."""

    call: Call
    amount: float


class CPU:
    """Times calls by the system's clock. Consecutive calls take different tensors, so that no cache holds them."""

    kind = "cpu"
    max_bytes = 4 << 30  # of memory that a peer may keep

    def __init__(self) -> None:
        self._cache = last_level_cache() or 32 << 20

    def sets(self, w: Workload, dtype: torch.dtype) -> Sets:
        """Return the sets of tensors for a workload."""
        return rotated(w, dtype, self._cache)

    def prepare(self, call: Call) -> tuple[Call, str]:
        """Return the call to time, and a note for its record. The given call has run before."""
        return call, ""

    def synchronous(self, call: Call) -> Call:
        """Return a call that waits for its own end, for clocks other than `seconds`."""
        return call

    def seconds(self, call: Call) -> float:
        """Return the seconds of one call. Its results are freed after the clock has stopped."""
        start = time.perf_counter()
        results = call()
        seconds = time.perf_counter() - start
        del results
        return seconds

    def ceilings(self, dtype: torch.dtype) -> dict[str, Ceiling]:
        """Return a large matrix product, in the dtype that the CPU computes in, and a copy larger than the cache."""
        return _ceilings("cpu", machine("cpu", dtype).work_dtype, 1024, 2 * self._cache)

    def available_bytes(self) -> int:
        """Return the bytes that can still be allocated, 0 if unknown."""
        return _proc("/proc/meminfo", "MemAvailable:") * 9 // 10

    @contextmanager
    def memory_limit(self) -> Iterator[None]:
        """Make allocations beyond the available memory fail, instead of swapping or killing the process."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        now, free = _proc("/proc/self/status", "VmSize:"), self.available_bytes()
        if now and free:
            resource.setrlimit(resource.RLIMIT_AS, (now + free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def release_memory(self) -> None:
        """Free memory that is no longer used."""
        gc.collect()


class GPU:
    """Times replays of CUDA graphs between two events, without Python. The L2 cache is overwritten before each one."""

    kind = "cuda"
    max_bytes = 40 << 30

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._overwritten = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def sets(self, w: Workload, dtype: torch.dtype) -> Sets:
        """Return one set of tensors, since a CUDA graph always reads the same ones."""
        return Sets([inputs(w, dtype, "cuda")])

    def prepare(self, call: Call) -> tuple[Call, str]:
        """Return the replay of a CUDA graph of the call; the call itself, with a note, if it cannot be captured."""
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

    def synchronous(self, call: Call) -> Call:
        """Return a call that waits for its own end, for other clocks. It does not overwrite the L2 cache."""

        def synchronised() -> None:
            call()
            torch.cuda.synchronize()

        return synchronised

    def seconds(self, call: Call) -> float:
        """Return the seconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._overwritten.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def ceilings(self, dtype: torch.dtype) -> dict[str, Ceiling]:
        """Return a large matrix product and a copy of 1 GiB."""
        found = _ceilings("cuda", dtype, 8192, 1 << 30)
        return {name: ceiling._replace(call=self._captured(ceiling.call)) for name, ceiling in found.items()}

    def available_bytes(self) -> int:
        """Return the bytes that can still be allocated."""
        return torch.cuda.mem_get_info()[0]

    @contextmanager
    def memory_limit(self) -> Iterator[None]:
        """Do nothing: CUDA itself refuses memory that is not available."""
        yield

    def release_memory(self) -> None:
        """Free memory that is no longer used."""
        gc.collect()
        torch.cuda.empty_cache()


def _ceilings(device: str, dtype: torch.dtype, side: int, size: int) -> dict[str, Ceiling]:
    generator = torch.Generator(device).manual_seed(0)  # the default one may belong to a failed capture
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return {
        PRODUCT: Ceiling(partial(torch.mm, a, b, out=torch.empty_like(a)), 2.0 * side**3),
        COPY: Ceiling(partial(torch.empty_like(source).copy_, source), 2.0 * size),
    }


def _proc(path: str, field: str) -> int:
    """Return a field of a file under /proc in bytes, 0 if there is none."""
    try:
        with open(path) as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
    except OSError:
        return 0
