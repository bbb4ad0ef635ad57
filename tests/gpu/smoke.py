"""The stages `smoke` of `make gpu`: are results right at all?

    python tests/gpu/smoke.py cuda | triton | fresh

Every kernel of a backend is compared with float64; memory that nothing wrote holds NaN; five repeats must be equal to
the bit. The first call chooses the kernels in Python, later ones repeat it. `fresh` is a process whose first backward
is that of the kernels for Hopper.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits from cuBLAS; read when it is initialised

import torch
from gpu_common import NAMES, SMALL, available, described, error, exact, made, report, say, sized

import fasthyper
from fasthyper.backends.cuda import library

REPEATS = 5
# B, N, R, I, O: ordinary sizes; boxes of tensor descriptors that are larger than the tensor (R = 8, O = 10); tails of
# every axis; several points; split sums; products of 48 and 96 columns; heads whose rows are aligned, but no multiple
# of 16; one of everything. Rows of 16 bytes take the kernels for Hopper.
SIZES = (
    (520, 1, 64, 27, 32),
    (150, 1, 8, 9, 12),
    (64, 1, 50, 33, 10),
    (130, 1, 8, 5, 10),
    (300, 1, 128, 64, 64),
    (70, 1, 25, 7, 20),
    (40, 7, 128, 16, 136),
    (9, 5, 64, 12, 70),
    (200, 1, 16, 24, 72),
    (4000, 1, 32, 16, 24),
    (257, 1, 101, 3, 50),
    (200, 1, 48, 24, 96),
    (130, 1, 96, 16, 48),
    (90, 1, 40, 9, 40),
    (77, 1, 104, 10, 24),
    (1, 1, 1, 1, 1),
)
ALLOWED = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 1e-5}
"""Relative errors, by norms: one rounding of the result, and for the kernels in float32 three products in TF32."""
NEVER = 1 << 60  # flops: no problem is large enough for the kernels for Hopper


def cases(backend: str) -> Iterator[tuple[torch.dtype, tuple[int, ...], bool]]:
    """Yield dtype, sizes and whether Hopper's kernels take the call. The backend `triton` compiles for each."""
    for hopper in (False, True) if backend == "cuda" else (False,):
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            if hopper and dtype == torch.float32:
                continue
            few = SMALL or (backend == "triton" and dtype != torch.bfloat16)
            for sizes in SIZES[: 2 if few else None]:
                yield dtype, sized(sizes), hopper


def poison() -> bool:
    """Fill memory with NaN when it is allocated; return whether that works."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return bool(torch.empty(1000, device="cuda").isnan().all())


def faults(backend: str, dtype: torch.dtype, sizes: tuple[int, ...], schedule: str | None = "fold") -> list[str]:
    """Return what is wrong with the results of a problem, in the schedule `fold` or in the planner's."""
    tensors = made(sizes, dtype)
    expected, factors, g = exact(tensors), [t.requires_grad_() for t in tensors[:-1]], tensors[-1]
    runs = []
    with fasthyper.use_backend(backend, schedule):
        for _ in range(REPEATS):
            x, z, weight, bias, base_weight, base_bias = factors
            y = fasthyper.hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
            runs.append((y.detach(), *torch.autograd.grad(y, factors, g)))
    found = []
    for k, name in enumerate(("y", *(f"d{name}" for name in NAMES))):
        off = error(runs[0][k], expected[k])
        if not off <= ALLOWED[dtype]:
            found.append(f"{name} is off by {off:.2g}")
        if differing := [i + 1 for i in range(1, REPEATS) if not torch.equal(runs[0][k], runs[i][k])]:
            found.append(f"{name} differs in run {', '.join(map(str, differing))}")
    return found


def check(backend: str) -> int:
    """Check all cases of a backend; print a line for each."""
    if not available(backend):
        return 3
    passed = bad = 0
    if not poison():
        say("outputs are not poisoned: this torch does not fill new memory")
        bad = 1
    for dtype, sizes, hopper in cases(backend):
        if backend == "cuda":
            library.ops().force("hopper_work", 0 if hopper else NEVER)
        try:
            # Python chooses the kernels of a forced schedule; with the planner's, later calls of CUDA's need no Python.
            schedules = ("fold", None) if backend == "cuda" else ("fold",)
            found = [fault for schedule in schedules for fault in faults(backend, dtype, sizes, schedule)]
        except Exception as failure:
            found = [described(failure)]
        text = f"{backend}{' hopper' if hopper else ''} {str(dtype)[6:]} {sizes}"
        if found:
            say(f"{text}: {'; '.join(found)}")
        else:
            print(f"ok   {text}", flush=True)
        passed, bad = passed + (not found), bad + bool(found)
    report(passed=passed, bad=bad)
    return 1 if bad else 0


def fresh() -> int:
    """Run Hopper's backward first: autograd's thread has no CUDA context until something gives it one."""
    if not available("cuda"):
        return 3
    dtype, sizes = torch.bfloat16, sized((300, 1, 128, 64, 64))
    tensors = made(sizes, dtype)
    expected = exact(tensors)
    x, z, weight, bias, base_weight, base_bias, g = tensors
    factors = [t.requires_grad_() for t in tensors[:-1]]
    memory = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")  # so that backward's tensors need no cudaMalloc
    del memory
    library.ops().force("hopper_work", 0)
    with fasthyper.use_backend("cuda", "fold"):
        y = fasthyper.hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
        results = (y.detach(), *torch.autograd.grad(y, factors, g))
    errors = {f"d{name}": error(t, e) for name, t, e in zip(("y", *NAMES), results, expected, strict=True)}
    bad = [f"{name} is off by {off:.2g}" for name, off in errors.items() if not off <= ALLOWED[dtype]]
    say(f"the first backward of a process, by Hopper's kernels: {'; '.join(bad) or 'right'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(fresh() if sys.argv[1] == "fresh" else check(sys.argv[1]))
