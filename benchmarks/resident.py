"""Peak resident memory of a step of fasthyper, in its own process. It includes memory that C++ allocates itself.

    python -m benchmarks.resident DTYPE BACKEND THREADS WORKLOAD ...

prints for each workload, in JSON, the peak bytes, without inputs and results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fasthyper

from .context import ROOT
from .inputs import Sets, inputs
from .records import FORWARD_BACKWARD
from .steps import step
from .ways import fused, ours
from .workloads import Workload

CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes(workloads: Sequence[Workload], dtype: str, backend: str, threads: int) -> list[int | None]:
    """Run this module and return the bytes of each workload, or None for all if the system has no /proc."""
    if not CLEAR_REFS.exists():
        return [None] * len(workloads)
    problems = (json.dumps(dataclasses.asdict(w)) for w in workloads)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.resident", dtype, backend, str(threads), *problems],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # malloc returns freed blocks at once: otherwise they would hide later allocations
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    if done.returncode:
        raise RuntimeError(f"resident memory could not be measured: {done.stderr.strip()[-2000:]}")
    return [int(line) for line in done.stdout.split()]


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _measure(w: Workload, dtype: torch.dtype, backend: str, threads: int) -> int:
    torch.set_num_threads(threads)
    fasthyper.set_backend(backend)
    first = Workload("first", 64, min(w.N, 8), min(w.R, 64), 64, 64, source="")
    step(fused, FORWARD_BACKWARD, Sets([inputs(first, dtype)]))()  # sets up libraries and thread pools
    run = step(ours(w, "cpu")[0].function(w), FORWARD_BACKWARD, Sets([inputs(w, dtype)]))
    if w.draw:
        run()  # sorts the terms, once
    CLEAR_REFS.write_text("5")  # resets VmHWM, the peak
    before = _status("VmRSS")
    results = run()
    return max(0, _status("VmHWM") - before - sum(t.untyped_storage().nbytes() for t in results))


def main() -> None:
    """Measure each problem of the command line in a child process."""
    dtype, backend, threads, *problems = sys.argv[1:]
    for problem in problems:
        w = Workload(**json.loads(problem))
        # Fork, since importing torch takes seconds. That is safe: this process has started no threads.
        if (child := os.fork()) == 0:
            print(_measure(w, getattr(torch, dtype), backend, int(threads)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the step failed at {problem}")


if __name__ == "__main__":
    main()
