"""Sums of products of bfloat16: float32, wherever the products are computed."""

from __future__ import annotations

import pytest
import torch

from fasthyper.backends.aten import tiling
from fasthyper.measure import peak_temporary_bytes


@pytest.fixture(params=[1, 1 << 30], ids=["bfloat16", "float32"])
def sizes(request, monkeypatch):
    """Compute products in bfloat16, a few rows at a time, or in float32."""
    monkeypatch.setattr(tiling, "_SMALL", request.param)
    monkeypatch.setattr(tiling, "ROUNDED", 6)
    return request.param


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def test_many_products_are_summed_in_float32(sizes, native_low_precision):
    """A sum in bfloat16 stays at 1024."""
    total = torch.full((5, 3), float("nan"))
    with native_low_precision(True):
        for nth in range(300):
            tiling.accumulate(total, ones(5, 4), ones(4, 3), beta=min(nth, 1))
    assert total.eq(1200).all()


def test_many_batches_are_summed_in_float32(sizes, native_low_precision):
    total = torch.zeros(5, 5, 3)
    with native_low_precision(True):
        for _ in range(300):
            tiling.accumulate_batches(total, ones(5, 5, 4), ones(5, 4, 3))
    assert total.eq(1200).all()


def test_rows_and_batches_stay_in_their_places(sizes, native_low_precision):
    a, b = torch.randn(5, 7, 4).bfloat16(), torch.randn(5, 4, 3).bfloat16()
    total, totals = torch.zeros(7, 3), torch.zeros(5, 7, 3)
    with native_low_precision(True):
        tiling.accumulate(total, a[0], b[0])
        tiling.accumulate_batches(totals, a, b)
    expected = a.double() @ b.double()
    torch.testing.assert_close(totals.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(total.double(), expected[0], rtol=2**-8, atol=1e-6)


def test_many_products_with_features_first_are_summed_in_float32(sizes, native_low_precision):
    """A head with few features has them as its slowest axis, and so have its sums, which are blocks of rows."""
    out = torch.empty(3, 2, 5).bfloat16().movedim(0, -1)
    total = tiling.Sum(out, tiling.Tiling(100, torch.bfloat16, torch.float32))
    rows = torch.arange(10).bfloat16().unsqueeze(1)
    with native_low_precision(True):
        for _ in range(300):
            total.add(ones(10, 4), ones(4, 3))
        total.add(rows, ones(1, 3))
        total.store()
    assert out.flatten(0, 1).equal((1200 + rows).expand(10, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_are_converted_in_pieces(dtype, monkeypatch):
    a, b = torch.randn(2, 100_000).to(dtype), torch.randn(100_000, 4).to(dtype)
    total = torch.full((2, 4), float("nan"))
    monkeypatch.setattr(tiling, "_SMALL", 1 << 30)
    assert peak_temporary_bytes(lambda: tiling.accumulate(total, a, b, beta=0)) < b.numel() * 3
    tiling.accumulate(total, a, b)
    torch.testing.assert_close(total, 2 * (a.float() @ b.float()), rtol=1e-4, atol=1e-2)
    tiling.accumulate(total, a[:, :0], b[:0], beta=0)
    assert total.eq(0).all()


@pytest.mark.parametrize("room", [None, 60])
def test_many_points_are_summed_in_float32(room, sizes, native_low_precision, monkeypatch):
    """dW of points that are no contiguous tensor is a sum over blocks of points, for some outputs at a time."""
    monkeypatch.setattr(tiling, "_POINTS", 4)
    tile = tiling.Tiling(40, torch.bfloat16, torch.float32)
    x = torch.ones(900, 3, 3).bfloat16().transpose(0, 1)
    g = (torch.arange(15).view(1, 3, 5) / 16).expand(900, 3, 5).bfloat16().transpose(0, 1)
    with native_low_precision(True):
        dw = tiling.outer(g, x, tile, None if room is None else torch.empty(room, dtype=torch.bfloat16))
    assert dw.equal((torch.arange(15).view(3, 5, 1) * 900 / 16).expand(3, 5, 3).bfloat16())


def test_contiguous_points_are_one_product(native_low_precision, monkeypatch):
    """A product reads them in place, so that there are no blocks to add up."""
    called, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **out: called.append(a.shape) or real(a, b, **out))
    tile = tiling.Tiling(40, torch.bfloat16, torch.float32)
    with native_low_precision(True):
        dw = tiling.outer(ones(3, 900, 5), ones(3, 900, 3), tile)
    assert called == [(3, 5, 900)]
    assert dw.eq(900).all()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_large_products_of_bfloat16_are_rounded(dtype, native, native_low_precision):
    large, small = torch.ones(128, 128, dtype=dtype), torch.ones(8, 8, dtype=dtype)
    with native_low_precision(native):
        assert tiling.multiplies(large, large) == (native and dtype == torch.bfloat16)
        assert not tiling.multiplies(small, small)
        assert not tiling.multiplies(large, large.float())
