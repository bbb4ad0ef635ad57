"""Compile the Triton kernels of all workloads in several processes, since one after the other takes minutes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from .inputs import Sets, inputs
from .records import FORWARD_BACKWARD
from .steps import step
from .ways import ours
from .workloads import Workload


def precompile(problems: Sequence[tuple[Workload, torch.dtype]]) -> None:
    """Compile the tiles that fasthyper times when it tunes a kernel. Triton keeps them on disk."""
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [(w, pool.submit(_compile, w, dtype)) for w, dtype in problems]
        for w, future in futures:
            if error := future.exception():
                print(f"{w.label} could not be compiled in advance: {error!r}", flush=True)


def _compile(w: Workload, dtype: torch.dtype) -> None:
    """Run a step without timing its tiles, since times mean nothing while other processes compile."""
    from fasthyper.backends.triton import tuning

    def compiled(run: Any, candidate: Any) -> float:
        try:
            run(candidate)
        except Exception:  # this tile does not fit the device
            return float("inf")
        return candidate.seconds

    tuning._time = compiled
    tuning._write = lambda device: None
    way = ours(w, "cuda")[0]
    step(way.function(w, "cuda"), FORWARD_BACKWARD, Sets([inputs(w, dtype, "cuda")]), way.layout)()
    torch.cuda.synchronize()
