"""`pytest benchmarks`: every way on every workload, with pytest-benchmark's options and tables.

Each test is one way; the ways of a workload are one group. An id is `workload-layers-R-mode-dtype-way`, for example
`qm9-mpnn-64-to-64-R128-forward-and-backward-float32-fasthyper`, and `-k` chooses by parts of it:

    pytest benchmarks -k "qm9 and mpnn"

All ways take the same tensors, in as many sets as it takes to keep them out of a CPU's cache, and results are checked
before they are timed. Unlike `make bench`, tests run one after the other: on a busy machine, compare with care.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from fasthyper.measure import peak_temporary_bytes

from .devices import CPU, GPU
from .inputs import Sets
from .records import MODES, SIZES
from .steps import Truth, step
from .ways import OURS, Way, ours, peers
from .workloads import WORKLOADS, Workload

MAX_SECONDS = 2.0  # of one call; slower peers are skipped
DTYPES = ("float32", "bfloat16", "float16")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each workload, mode, dtype and way that the options choose."""
    option = metafunc.config.getoption
    kind = option("device")
    dtypes, modes = _names(option("dtypes"), DTYPES), _names(option("modes"), MODES)
    cases = []
    for w in (w for w in WORKLOADS if not w.large):
        w = w if kind == "cpu" else w.as_published()
        for mode in modes:
            for dtype in (getattr(torch, name) for name in dtypes):
                own = [way for way in ours(w, kind) if way.role != "again"]
                others = [way for way in peers(w, dtype, kind) if option("compiled") or not way.compiled]
                for way in (*own, *others):
                    name = f"{w.label} R{w.R} {mode} {_name(dtype)} {way.name}"
                    cases.append(pytest.param(w, mode, dtype, way, id=_id(name)))
    metafunc.parametrize(("w", "mode", "dtype", "way"), cases)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := set(names) - set(known):
        raise pytest.UsageError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    return names


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _id(name: str) -> str:
    """Return a name in letters, digits, dots and hyphens, which need no quotes on a command line."""
    name = name.replace("⊗", "outer").replace("·", "times").replace("→", "to").replace("+", "and")
    return re.sub(r"[^\w.]+", "-", name).strip("-")


@lru_cache(maxsize=1)
def _sets(w: Workload, dtype: torch.dtype, device: CPU | GPU) -> Sets:
    return device.sets(w, dtype)


@lru_cache(maxsize=1)
def _truth(w: Workload, mode: str, dtype: torch.dtype, device: CPU | GPU) -> Truth:
    return Truth(w, mode, _sets(w, dtype, device)[0])


def test_throughput(
    w: Workload,
    mode: str,
    dtype: torch.dtype,
    way: Way,
    device: CPU | GPU,
    benchmark: Any,
    report_memory: Callable[[str, str, int], None],
) -> None:
    """Check the results of one way, then measure its time and memory."""
    if reason := way.reason_to_skip(w, dtype, device.max_bytes):
        pytest.skip(reason)
    torch._dynamo.reset()
    sets = _sets(w, dtype, device)
    run = step(way.function(w, device.kind), mode, sets, way.layout)
    sets.rewind()
    start = time.perf_counter()
    results = run()
    first = time.perf_counter() - start
    _truth(w, mode, dtype, device).check(way.name, results, way.layout)
    del results
    call, _ = device.prepare(run)
    if way.name != OURS and (seconds := device.seconds(call)) > MAX_SECONDS:
        pytest.skip(f"one call took {seconds:.1f} s")
    benchmark.group = f"{w.label}, R = {w.R}: {mode}, {_name(dtype)}"
    size = peak_temporary_bytes(run, device.kind)
    sizes = {name: getattr(w, name) for name in SIZES}
    benchmark.extra_info.update(sizes, way=way.name, source=w.source, temporary_bytes=size, first_call_seconds=first)
    report_memory(benchmark.group, way.name, size)
    benchmark(device.synchronous(call))
