"""Operands and comparisons for the tests of the kernels for sm_90a, which run on a GPU or by the emulator."""

from __future__ import annotations

import os

import pytest
import torch

from fasthyper import compiled

DEVICE = os.environ.get("FASTHYPER_TEST_DEVICE", "cpu")
LIBRARY = "cuda_emulated" if DEVICE == "cpu" else "cuda"
OPS = getattr(torch.ops, f"fasthyper_{LIBRARY}")
DTYPES = [torch.bfloat16, torch.float16]


def why_not() -> str | None:
    if why := compiled.load(LIBRARY):
        return why
    other = DEVICE != "cpu" and torch.cuda.get_device_capability() != (9, 0)
    return "this GPU is not of compute capability 9.0" if other else None


on_hopper = pytest.mark.skipif(why_not() is not None, reason=f"{LIBRARY}: {why_not()}")


def normal(seed, *sizes, dtype, scale=1.0):
    numbers = torch.randn(*sizes, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return (numbers * scale).to(DEVICE, dtype)


def aligned_rows(seed, *sizes, dtype, scale=1.0):
    """Return random numbers in rows that begin at multiples of 16 bytes."""
    return normal(seed, *sizes[:-1], -(-sizes[-1] // 8) * 8, dtype=dtype, scale=scale)[..., : sizes[-1]]


def close(result, expected, products, dtype):
    """Assert that errors are those of rounding each product and the result once."""
    eps = torch.finfo(dtype).eps
    scale = expected.abs().max().item() + 1e-30
    assert torch.isfinite(result).all()
    assert (result.double() - expected).abs().max().item() <= 4 * eps * scale, products
