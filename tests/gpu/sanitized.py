"""Call every CUDA kernel on sizes that no tile shape divides, for the stages `memcheck` and its like of `make gpu`.

    compute-sanitizer python tests/gpu/sanitized.py [--no-hopper]

racecheck and synccheck do not know mbarriers, so that their reports on the kernels for Hopper may be wrong.
"""

from __future__ import annotations

import sys

import torch
from gpu_common import SMALL, available, sized

from fasthyper.backends import cuda
from fasthyper.backends.cuda import library

# B, N, R, I, O. Every axis has a tail, some sums are split, and some rows are whole multiples of 16 bytes, which the
# kernels for sm_90a need.
SIZES = (
    (70, 1, 25, 7, 20),
    (9, 5, 64, 12, 70),
    (150, 1, 8, 9, 12),
    (300, 1, 72, 24, 40),
    (40, 7, 128, 16, 136),
    (200, 1, 16, 24, 72),
    (70, 1, 32, 16, 24),
    (70, 1, 64, 8, 200),
)


def layer(B: int, N: int, R: int, I: int, O: int, dtype: torch.dtype) -> None:
    """Run the forward and all gradients of a layer."""
    shapes = ((B, N, I), (B, R), (O, I, R), (O, R), (O, I), (B, N, O))
    x, z, weight, bias, base_weight, g = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    y = cuda.apply(x, z, weight, bias, base_weight, schedule="fold")
    results = (y, *cuda.grads(x, z, weight, bias, base_weight, g, (True,) * 6, schedule="fold"))
    assert all(bool(t.isfinite().all()) for t in results if t is not None)


def primary(B: int, N: int, R: int, I: int, O: int, dtype: torch.dtype) -> None:
    """Run the forward and all gradients of two fused layers, if the fused kernels support these sizes."""
    J = 10
    made = lambda *shapes: tuple(torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    x, z, g = made((B, N, I), (B, R), (B, N, O))
    first, second = made((J, I, R), (J, R), (J, I), (J,)), made((O, J, R), (O, R), (O, J), (O,))
    if cuda.fuses(x, z, first, second, "gelu"):
        _, a = cuda.primary(x, z, first, second, "gelu")
        cuda.primary_grads(x, z, first, second, "gelu", a, g, (True,) * 10)


def main(hopper: bool) -> int:
    """Run all sizes in all dtypes, and wait for the GPU."""
    if not available("cuda"):
        return 3
    library.ops().force("hopper_work", 0 if hopper else 1 << 60)  # 0: for small sizes, too
    for sizes in SIZES[: 2 if SMALL else None]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layer(*sized(sizes), dtype)
            primary(*sized(sizes), dtype)
            torch.cuda.synchronize()
        print(f"called with {sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main("--no-hopper" not in sys.argv))
