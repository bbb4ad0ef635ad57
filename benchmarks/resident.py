"""Peak resident memory of a step of ours, in a process of its own: what C++ allocates by itself counts, too.

    python -m benchmarks.resident DTYPE BACKEND THREADS B,N,R,I,O ...

prints for each problem the bytes beyond inputs and results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fasthyper

from .inputs import Sets, inputs
from .peers import fused
from .records import BOTH, ROOT
from .steps import step
from .workloads import Workload

FORGET = Path("/proc/self/clear_refs")


def resident_bytes(workloads: Sequence[Workload], dtype: str, backend: str, threads: int) -> list[int | None]:
    """Run this file and return what it prints for each workload; None where the system does not tell."""
    if not FORGET.exists():
        return [None] * len(workloads)
    problems = (f"{w.B},{w.N},{w.R},{w.I},{w.O}" for w in workloads)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.resident", dtype, backend, str(threads), *problems],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # freed blocks go back at once, so that none of them hides what is allocated next
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
    step(fused, BOTH, Sets([inputs(first, dtype)]))()  # libraries and thread pools are set up
    run = step(fused, BOTH, Sets([inputs(w, dtype)]))
    FORGET.write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    results = run()
    return max(0, _status("VmHWM") - before - sum(t.untyped_storage().nbytes() for t in results))


def main() -> None:
    dtype, backend, threads, *problems = sys.argv[1:]
    for problem in problems:
        w = Workload("this", *map(int, problem.split(",")), source="")
        # A fork for each, since importing torch takes seconds; nothing has run in parallel here, so that it is safe.
        if (child := os.fork()) == 0:
            print(_measure(w, getattr(torch, dtype), backend, int(threads)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the step failed at {problem}")


if __name__ == "__main__":
    main()
