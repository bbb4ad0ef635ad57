"""Low precision: errors at most twice those of writing W out in the same dtype, plus the rounding of the result."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper.backends import aten
from fasthyper.problem import SCHEDULES

LOW = (torch.bfloat16, torch.float16)
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")


def materialised(x, z, weight, bias, base_weight, g):
    """Return y, dx, dz, dH, dbias, dW0 and db0, by W written out in the dtype of the arguments."""
    O, I, R = weight.shape
    head = weight.reshape(O * I, R)
    w = (z @ head.T).view(-1, O, I) + base_weight
    y = torch.bmm(x, w.mT) + (z @ bias.T)[:, None]
    dw = torch.bmm(g.mT, x)
    flat_dw = dw.flatten(1)
    per_instance = g.sum(1)
    dz = flat_dw @ head + per_instance @ bias
    dh = (flat_dw.T @ z).view(O, I, R)
    return y, torch.bmm(g, w), dz, dh, per_instance.T @ z, dw.sum(0), per_instance.sum(0)


def ours(x, z, weight, bias, base_weight, g, schedule):
    y = aten.apply(x, z, weight, bias, base_weight, schedule=schedule)
    return y, *aten.grads(x, z, weight, bias, base_weight, g, (True,) * 6, schedule=schedule)


def truth(oracle, x, z, weight, bias, base_weight, g):
    y = oracle.linear(*(t.double() for t in (x, z, weight, bias, base_weight)))
    return y, *oracle.linear_grads(x, z, weight, bias, base_weight, g)


def scaled(factors, sizes, dtype):
    """Return factors as in a layer: y is of order one, so that float16 does not overflow."""
    x, z, weight, bias, base_weight, g = factors(sizes, torch.float32, NAMES)
    R, I = sizes[2], sizes[3]
    weight, bias, base_weight = weight / (R * I) ** 0.5, bias / R**0.5, base_weight / I**0.5
    return [t.to(dtype) for t in (x, z, weight, bias, base_weight, g)]


def check(oracle, args, schedule):
    dtype = args[0].dtype
    names = ("y", "dx", "dz", "dH", "dbias", "dW0", "db0")
    for name, got, plain, exact in zip(
        names, ours(*args, schedule), materialised(*args), truth(oracle, *args), strict=True
    ):
        assert got.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.abs()
        error = ((got.double() - exact).abs() - rounding).max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, materialised {allowed / 2:.3g}"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("sizes", [(200, 1, 40, 33, 17), (31, 9, 21, 40, 24), (5, 200, 16, 24, 40)])
def test_as_precise_as_writing_W_out(sizes, dtype, schedule, native, factors, oracle, native_low_precision):
    with native_low_precision(native):
        check(oracle, scaled(factors, sizes, dtype), schedule)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", LOW)
def test_large_batches_in_a_small_workspace(dtype, schedule, native, factors, oracle, native_low_precision):
    """Over many chunks, partial sums in 16 bits would make dH, dbias, dW0 and db0 less precise."""
    fasthyper.set_workspace_limit(1 << 20)
    with native_low_precision(native):
        check(oracle, scaled(factors, (8192, 1, 16, 24, 16), dtype), schedule)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_points_in_a_small_workspace(schedule, native, factors, oracle, native_low_precision, tiles):
    """dz, dH and dW0 are sums over chunks of points, too."""
    with native_low_precision(native), tiles(4096):
        check(oracle, scaled(factors, (4, 2048, 12, 20, 16), torch.bfloat16), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("native", [False, True])
def test_many_features_in_a_small_workspace(schedule, native, factors, oracle, native_low_precision, tiles):
    """y, dx and dz are sums over chunks of features."""
    with native_low_precision(native), tiles(2048):
        check(oracle, scaled(factors, (16, 2, 96, 160, 96), torch.bfloat16), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_is_as_precise_as_writing_W_out(schedule, factors, oracle, tiles):
    with tiles(4096):
        check(oracle, scaled(factors, (2048, 2, 16, 24, 16), torch.float32), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float16_overflows_only_where_the_result_does(schedule, factors, native_low_precision):
    """Terms beyond 65504 cancel: their sum is float32 even where tiles are float16."""
    x = torch.full((2, 1, 4), 200.0, dtype=torch.float16)
    z = torch.ones(2, 2, dtype=torch.float16)
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None].expand(3, 4, 2).half() * 200
    with native_low_precision(False):
        y = aten.apply(x, z, weight, schedule=schedule)
    assert torch.equal(y, torch.zeros_like(y))


def test_float16_does_not_overflow_where_W_does_not(native_low_precision):
    # x ⊗ z exceeds the range of float16; W and y do not.
    x, z = torch.full((200, 1, 64), 300.0).half(), torch.full((200, 8), 300.0).half()
    with native_low_precision(True):
        y = fasthyper.ops.apply(x, z, torch.full((64, 64, 8), 1e-5).half())
    torch.testing.assert_close(y, torch.full_like(y, 461.5))
