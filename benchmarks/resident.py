"""Peak resident memory of one step of ours, in a process of its own: what C++ allocates by itself counts, too.

python benchmarks/resident.py B N R I O DTYPE BACKEND THREADS      prints bytes beyond inputs and results
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from peers import factors, fused, step
from workloads import Workload

import fasthyper

FORGET = Path("/proc/self/clear_refs")


def resident_bytes(w: Workload, dtype: str, backend: str, threads: int) -> int | None:
    """Run this file for a workload and return what it prints; None where the system does not tell."""
    if not FORGET.exists():
        return None
    sizes = map(str, (w.B, w.N, w.R, w.I, w.O))
    done = subprocess.run(
        [sys.executable, __file__, *sizes, dtype, backend, str(threads)],
        capture_output=True,
        text=True,
        check=False,
        # freed blocks go back at once, so that none of them hides what is allocated next
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    if done.returncode:
        raise RuntimeError(f"resident memory of {w.label}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout)


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    *sizes, dtype, backend, threads = sys.argv[1:]
    w = Workload("this", *map(int, sizes), source="")
    torch.set_num_threads(int(threads))
    fasthyper.set_backend(backend)
    first = Workload("first", 64, min(w.N, 8), min(w.R, 64), 64, 64, source="")
    step(fused, *factors(first, getattr(torch, dtype)))()  # libraries and thread pools are set up
    run = step(fused, *factors(w, getattr(torch, dtype)))
    FORGET.write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    results = run()
    print(max(0, _status("VmHWM") - before - sum(t.untyped_storage().nbytes() for t in results)))


if __name__ == "__main__":
    main()
