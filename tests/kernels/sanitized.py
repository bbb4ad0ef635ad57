"""Call every CUDA kernel on sizes that no tile shape divides. `make gpu` runs this under compute-sanitizer."""

from __future__ import annotations

import torch

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


def main() -> None:
    """Run all sizes in all dtypes, and wait for the GPU."""
    library.ops().force("hopper_work", 0)  # the kernels for sm_90a then compute small sizes, too
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for sizes in SIZES:
            layer(*sizes, dtype)
            primary(*sizes, dtype)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
