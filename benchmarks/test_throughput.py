"""`pytest benchmarks`: every way on every workload under pytest-benchmark, with its usual options.

One test is one way; those of a workload are a group. All get the same tensors, so many sets in turns that none is in a
CPU's cache, and what a way gives is checked before it is timed. Other than `make bench`, tests run one after the other:
on a machine that others use, too, ratios are worth less than there.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from typing import Any

import pytest
import torch

from fasthyper.experiments.measure import peak_temporary_bytes

from .devices import CPU, GPU
from .inputs import Sets
from .peers import OURS, Peer, ours, peers
from .records import MODES
from .steps import Truth, step
from .workloads import WORKLOADS, Workload

PATIENCE = 2.0  # seconds of a call; what takes longer is left out
DTYPES = ("float32", "bfloat16", "float16")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each workload, mode, dtype and way that is asked for."""
    option = metafunc.config.getoption
    kind = option("device")
    dtypes, modes = (tuple(part.strip() for part in option(name).split(",")) for name in ("dtypes", "modes"))
    for given, known in ((dtypes, DTYPES), (modes, MODES)):
        if unknown := set(given) - set(known):
            raise pytest.UsageError(f"{', '.join(unknown)}: not of {', '.join(known)}")
    cases = []
    for w in (w for w in WORKLOADS if not w.large):
        w = w if kind == "cpu" else w.as_published()
        for mode in modes:
            for dtype in (getattr(torch, name) for name in dtypes):
                first = [p for p in ours(w, kind) if p.role != "again"]
                for peer in (*first, *(p for p in peers(w, dtype, kind) if option("compiled") or not p.compiled)):
                    name = f"{w.label} R{w.R} {mode} {dtype} {peer.name}".replace("torch.", "")
                    cases.append(pytest.param(w, mode, dtype, peer, id=_plain(name)))
    metafunc.parametrize(("w", "mode", "dtype", "peer"), cases)


def _plain(text: str) -> str:
    """An id to type on a command line."""
    text = text.replace("⊗", "outer").replace("·", "times").replace("→", "to").replace("+", "and")
    return re.sub(r"[^\w.]+", "-", text).strip("-")


@lru_cache(maxsize=1)
def _sets(w: Workload, dtype: torch.dtype, device: CPU | GPU) -> Sets:
    return device.sets(w, dtype)


@lru_cache(maxsize=1)
def _truth(w: Workload, mode: str, dtype: torch.dtype, device: CPU | GPU) -> Truth:
    return Truth(w, mode, _sets(w, dtype, device)[0])


def test_throughput(
    w: Workload, mode: str, dtype: torch.dtype, peer: Peer, device: CPU | GPU, benchmark: Any, remember: Any
) -> None:
    """One way: right, then how fast, and with how much memory."""
    if why := peer.unfit(w, dtype, device.most_bytes):
        pytest.skip(why)
    torch._dynamo.reset()
    sets = _sets(w, dtype, device)
    run = step(peer.function(w, device.kind), mode, sets, peer.layout)
    sets.rewind()
    start = time.perf_counter()
    results = run()
    first = time.perf_counter() - start
    _truth(w, mode, dtype, device).check(peer.name, results, peer.layout)
    del results
    call, _ = device.ready(run)
    if peer.name != OURS and (seconds := device.seconds(call)) > PATIENCE:
        pytest.skip(f"one call took {seconds:.1f} s")
    benchmark.group = f"{w.label}, R = {w.R}: {mode}, {str(dtype).removeprefix('torch.')}"
    size = peak_temporary_bytes(run, device.kind)
    sizes = {name: getattr(w, name) for name in ("B", "N", "R", "I", "O", "neighbours", "hidden")}
    benchmark.extra_info.update(sizes, way=peer.name, source=w.source, temporary_bytes=size, first_call_seconds=first)
    remember(benchmark.group, peer.name, size)
    benchmark(device.once(call))
