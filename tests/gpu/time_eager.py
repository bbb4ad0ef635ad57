"""The stage `eager` of `make gpu`: what a call costs the CPU, and its launches, as CSV on stdout.

`queue_us` is the time until the call returns, while the GPU may still work; `step_us` that until the GPU is done too.
Both are those of one call among many.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_common import LAUNCH_BOUND, SMALL, attempt, available, made, report, say, sized
from torch import Tensor

import fasthyper

COLUMNS = ("problem", "backend", "mode", "queue_us", "step_us", "launches", "note")
TIMES = 3 if SMALL else 200


def launches(call: Callable[[], Any]) -> int:
    """Return the number of kernels and copies that a call runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def microseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the microseconds of a call on the CPU, and until the GPU is done."""
    for _ in range(3):
        call()
    best = (float("inf"), float("inf"))
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(TIMES):
            call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        best = min(best, ((queued - start) / TIMES * 1e6, (done - start) / TIMES * 1e6))
    return best


def forward(factors: Sequence[Tensor]) -> Any:
    """Return y."""
    with torch.no_grad():
        return fasthyper.hyper_linear(*factors)


def both(factors: Sequence[Tensor], g: Tensor) -> Any:
    """Return the gradients."""
    return torch.autograd.grad(fasthyper.hyper_linear(*factors), factors, g)


def main() -> int:
    """Print a row for each backend and mode; return 1 if one failed."""
    table = csv.writer(sys.stdout)
    table.writerow(COLUMNS)
    failed = 0
    backends = [name for name in ("triton", "cuda", "materialised") if available(name)]
    for problem, published in LAUNCH_BOUND.items():
        *tensors, g = made(sized(published), torch.bfloat16, affine=False)
        factors = [t.requires_grad_() for t in tensors]
        calls = {"forward": partial(forward, factors), "forward + backward": partial(both, factors, g)}
        for backend in backends:
            texts = []
            for mode, call in calls.items():
                with fasthyper.use_backend(backend, "auto" if backend == "materialised" else "fold"):
                    found, why = attempt(partial(microseconds, call))
                    count, unknown = attempt(partial(launches, call)) if found else (None, "")
                queued, step = found or (float("nan"), float("nan"))
                failed += bool(why)
                table.writerow((problem, backend, mode, f"{queued:.1f}", f"{step:.1f}", count, why or unknown))
                texts.append(f"{mode} {queued:.0f} µs of the CPU, {step:.0f} in all, {count} launches")
            sys.stdout.flush()
            say(f"{problem} {backend}: {'; '.join(texts)}")
            report(failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
