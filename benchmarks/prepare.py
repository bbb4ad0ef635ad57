"""What Triton compiles for the workloads, compiled by many processes at once: one after the other it takes minutes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from .inputs import Sets, inputs
from .peers import ours
from .records import BOTH
from .steps import step
from .workloads import Workload


def prepare(problems: Sequence[tuple[Workload, torch.dtype]]) -> None:
    """Compile the tiles that ours would time, which Triton keeps on disk."""
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        done = [(w, pool.submit(_compile, w, dtype)) for w, dtype in problems]
        for w, one in done:
            if error := one.exception():
                print(f"{w.label} was not prepared: {error!r}", flush=True)


def _compile(w: Workload, dtype: torch.dtype) -> None:
    """Run a step without timing its tiles: times are of no use while others compile."""
    from fasthyper.backends.triton import tuning

    def compiled(run: Any, candidate: Any) -> float:
        try:
            run(candidate)
        except Exception:  # a tile that does not fit this device
            return float("inf")
        return candidate.seconds

    tuning._time = compiled
    tuning._write = lambda device: None
    mine = ours(w, "cuda")[0]
    step(mine.function(w, "cuda"), BOTH, Sets([inputs(w, dtype, "cuda")]), mine.layout)()
    torch.cuda.synchronize()
