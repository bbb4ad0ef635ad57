"""What Triton compiles for the workloads, compiled by many processes at once: one after the other it takes minutes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from .inputs import inputs
from .peers import fused
from .steps import BOTH, step
from .workloads import Workload


def prepare(chosen: Sequence[Workload], dtypes: Sequence[torch.dtype]) -> None:
    """Compile the tiles that ours would time, which Triton keeps on disk."""
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        done = [(w, pool.submit(_compile, w, dtype)) for dtype in dtypes for w in chosen]
        for w, one in done:
            if error := one.exception():
                print(f"{w.label} was not prepared: {error!r}", flush=True)


def _compile(w: Workload, dtype: torch.dtype) -> None:
    """Run a step without timing its tiles: times are of no use while others compile."""
    from fasthyper.backends.triton import tuning

    tuning._time = lambda run, c: run(c) or c.seconds  # type: ignore[assignment]
    tuning._write = lambda device: None
    step(fused, BOTH, [inputs(w, dtype, "cuda")])()
    torch.cuda.synchronize()
