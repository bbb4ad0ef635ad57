"""The GPU kernels, Triton's and CUDA's, beyond the tests of the op family, which run on every backend.

Without a GPU, the kernels run in Triton's interpreter and in the emulator of csrc/cuda, each in its own test run
(`make test`): the interpreter is chosen when triton is imported, and one run with both would take twice as long.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasthyper
from fasthyper import planner
from fasthyper.backends import BACKENDS, cuda, triton
from fasthyper.problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = (True,) * 6
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
# Sizes around tiles of 16, 32 and 64: all 1; several tiles of rows, columns and K, with and without a tail; few
# features, so that a step takes several columns; split-K; dx and dz in separate kernels; one output; several points.
SIZES = [
    (1, 1, 1, 1, 1),
    (33, 1, 20, 6, 10),
    (17, 1, 48, 5, 33),
    (9, 1, 50, 19, 12),
    (70, 1, 8, 9, 17),
    (40, 1, 3, 40, 20),
    (20, 1, 5, 7, 40),
    (65, 1, 6, 12, 1),
    (100, 1, 2, 2, 3),
    (6, 3, 5, 4, 6),
    (3, 11, 18, 7, 5),
]


@pytest.fixture(scope="session", params=["triton", "cuda"])
def kernels(request):
    """Return the module of a backend with kernels that can run here."""
    module = BACKENDS[request.param]
    if module.unavailable() is not None:
        pytest.skip(f"{request.param} kernels: {module.unavailable()}")
    return module


def everything(kernels, x, z, weight, bias, base_weight, g):
    """Return y, dx, dz, dH, dbias, dW0 and db0."""
    y = kernels.apply(x, z, weight, bias, base_weight, schedule="fold")
    return y, *kernels.grads(x, z, weight, bias, base_weight, g, ALL, schedule="fold")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_tiles(kernels, sizes, dtype, factors, oracle):
    args = factors(sizes, dtype, NAMES)
    oracle.check_linear(args, everything(kernels, *args))


@settings(max_examples=8 if torch.cuda.is_available() else 30)  # on a GPU, each compiles Triton kernels
@given(
    # With expanded strides, up to 60 terms of a sum are equal, and round in the same direction.
    sizes=st.tuples(*(st.integers(1, most) for most in (20, 3, 36, 20, 36))),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(("contiguous", "transposed", "swapped", "sliced", "expanded")),
)
def test_any_sizes_and_strides(kernels, sizes, dtype, strides, factors, oracle):
    args = factors(sizes, dtype, NAMES, strides)
    oracle.check_linear(args, everything(kernels, *args))


@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(20, 1, 6, 7, 20), (4, 5, 6, 7, 8)], ids=str)
def test_only_gradients_asked_for_are_returned(kernels, sizes, mask, factors):
    x, z, weight, g = factors(sizes, torch.float32)
    all_of_them = kernels.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    some = kernels.grads(x, z, weight, None, None, g, tuple(map(bool, mask)) + (False,) * 3, schedule="fold")
    for wanted, expected, got in zip(mask, all_of_them, some, strict=False):
        assert (got is not None) == bool(wanted)
        if wanted:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sizes", [(40, 1, 8, 40, 20), (200, 1, 6, 7, 5), (5, 9, 20, 7, 8)], ids=str)
def test_the_same_bits_every_time(kernels, sizes, factors):
    args = factors(sizes, torch.float32, NAMES)
    for first, second in zip(everything(kernels, *args), everything(kernels, *args), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("large", ["x", "z", "g"])
def test_products_beyond_the_range_of_float16(kernels, large, factors, oracle):
    """x·z and z·g exceed the range; y and the gradients, with a small third factor, do not."""
    x, z, weight, g = factors((20, 1, 6, 7, 20), torch.float16)
    x, z, weight, g = (t * scale for t, scale in ((x, 300), (z, 300), (weight, 1e-3), (g, 1e-3)))
    if large == "g":
        x, g = x * 1e-5, g * 3e5
    if large == "z":
        x, z = x / 20, z * 20
    y = kernels.apply(x, z, weight, schedule="fold")
    oracle.check_op("apply", y, x, z, weight)
    got = kernels.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    ts = (x, z, weight, g)
    for result, exact, scale in zip(got[:3], oracle.grads(*ts), oracle.grads(*map(torch.abs, ts)), strict=True):
        if scale.max() < torch.finfo(torch.float16).max:
            oracle.check(result, exact, scale, torch.float16)


@pytest.mark.parametrize("large", ["x", "z", "both", "none"])
@pytest.mark.parametrize("small", [1, 1e-2, 1e-4])
def test_float16_is_precise_over_its_range(kernels, large, small, factors, oracle):
    """Neither an instance with large values nor a small gradient makes other results less precise."""
    x, z, weight, g = factors((16, 1, 6, 7, 10), torch.float16)  # few outputs: dx by a fold
    x, z, g = x * 0.05, z * 0.05, g * small
    g[0] = 0  # like an instance that is masked out, which adds nothing to dH
    if large in ("x", "both"):
        x[0] = 60000
    if large in ("z", "both"):
        z[0] = 3000
    ts = (x[1:], z[1:], weight, g[1:])
    oracle.check_op("apply", kernels.apply(x, z, weight, schedule="fold")[1:].contiguous(), *ts[:3])
    dx, dz, dh, *_ = kernels.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    for got, exact in zip((dx[1:], dz[1:], dh), oracle.grads(*ts), strict=True):
        if got is dh and large == "both":
            continue  # the products x·z of one column span more than 2^29, the range of float16
        # Relative to the largest result, because one result may be too small for float16.
        floor = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
        error = (got.double() - exact).abs() - floor
        assert error.max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("which", ["x", "weight"])
def test_offsets_beyond_32_bits(kernels, which, factors, oracle):
    """Offsets need more than 31 bits; the memory between the elements is never touched."""
    x, z, weight, g = factors((3, 1, 5, 4, 3), torch.float16)
    t = {"x": x, "weight": weight}[which]
    apart = (1 << 30) + 64
    far = torch.empty(2 * apart + 4096, dtype=t.dtype, device=t.device)
    far = far.as_strided(t.shape, (apart, *t.stride()[1:]))
    far.copy_(t)
    x, weight = (far, weight) if which == "x" else (x, far)
    oracle.check_op("apply", kernels.apply(x, z, weight, schedule="fold"), x, z, weight)
    got = kernels.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    oracle.check_all(got[:3], oracle.grads, x, z, weight, g)


def test_float64_and_empty_problems_run_on_aten(kernels, factors, oracle):
    for sizes, dtype in (((4, 2, 5, 3, 6), torch.float64), ((4, 0, 5, 3, 6), torch.float32)):
        args = factors(sizes, dtype, NAMES)
        oracle.check_linear(args, everything(kernels, *args))


@pytest.mark.parametrize("module", [triton, cuda], ids=["triton", "cuda"])
def test_tensors_on_another_device_raise(module, monkeypatch):
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(module, "devices", lambda: ("cuda",))
    with pytest.raises(ValueError, match=f"backend '{name}' must have tensors on a GPU, got x on cpu"):
        fasthyper.backends.backend(name, torch.device("cpu"))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_planner_folds_single_points_and_generates_for_many(dtype, backend):
    per_sample = Problem("apply", 39168, 1, 128, 64, 64, dtype, "cuda", backend=backend)
    assert planner.plan(per_sample).schedule == "fold"
    assert planner.plan(per_sample._replace(op="grads")).schedule == "fold"
    many = Problem("apply", 100, 1024, 256, 256, 256, dtype, "cuda", backend=backend)
    assert planner.plan(many).schedule == "generate"
    assert planner.plan(many._replace(op="grads")).schedule == "generate"
