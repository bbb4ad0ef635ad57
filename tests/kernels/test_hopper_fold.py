"""`fold` for sm_90a: partial tiles, splits, strides, and memory that it must not use.

The tests run on a GPU if FASTHYPER_TEST_DEVICE names one, otherwise with the emulator of csrc/cuda.
"""

from __future__ import annotations

import math

import pytest
import torch
from hopper_operands import DEVICE, DTYPES, OPS, close, normal, on_hopper

pytestmark = on_hopper


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def _fold(u, v, h, a=None, c=None, d=None, per_split=None, supported=True):
    """Return fold (M, P) for H (C, K, P); another kernel computes it if that for sm_90a does not support the call."""
    B, N, C = u.shape
    P = h.shape[2]
    per_split = per_split or C
    out = torch.full((B * N, P), math.nan, dtype=u.dtype)
    splits = -(-C // per_split)
    partial = torch.full((splits, B * N, P), math.nan) if splits > 1 else None
    assert OPS.fold(u, v, h, a, c, d, out, partial, per_split, True, True, False) == supported
    return out


def _expected_fold(u, v, h, a=None, c=None, d=None):
    u, v, h, a, c, d = (None if t is None else t.double() for t in (u, v, h, a, c, d))
    out = torch.einsum("bnc,bk,ckp->bnp", u, v, h)
    if a is not None:
        out = out + torch.einsum("bnc,pc->bnp", u, a)
    if c is not None:
        out = out + torch.einsum("bk,pk->bp", v, c)[:, None]
    if d is not None:
        out = out + d
    return out.flatten(0, 1)


def _head(seed, C, K, P, dtype, pad=None):
    """Return H (C, K, P) with k contiguous, where rows of k are padded to a multiple of eight."""
    pad = pad or -(-K // 8) * 8
    return normal(seed, P, C, pad, dtype=dtype)[:, :, :K].permute(1, 2, 0)


FOLDS = {  # B, N, C, K, P, per_split
    "one": (1, 1, 1, 8, 1, None),
    "two_tiles_of_rows": (300, 1, 5, 64, 64, None),
    "wide_and_odd": (70, 1, 3, 72, 131, None),
    "tails": (33, 1, 9, 200, 40, None),
    "one_step": (40, 1, 11, 10, 24, None),
    "points": (11, 7, 10, 100, 66, None),
    "splits": (65, 1, 21, 64, 64, 8),
    "splits_and_points": (9, 5, 19, 128, 130, 8),
    "small_16": (50, 1, 19, 16, 60, None),
    "small_32": (50, 1, 13, 32, 72, None),
    "small_splits": (50, 2, 21, 16, 72, 8),
    "three_tiles_per_cta": (520, 1, 2, 24, 72, None),
    "boxes_beyond_the_tensors": (20, 1, 3, 8, 10, None),
    "forty_eight": (70, 1, 6, 48, 48, None),
    "ninety_six": (40, 1, 5, 96, 192, None),
    "one_step_of_an_even_number": (40, 1, 6, 80, 120, None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", FOLDS)
def test_fold(name, dtype):
    B, N, C, K, P, per_split = FOLDS[name]
    u, v = normal(1, B, N, C, dtype=dtype), normal(2, B, K, dtype=dtype)
    h = _head(3, C, K, P, dtype)
    close(_fold(u, v, h, per_split=per_split), _expected_fold(u, v, h), C * K, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "sizes", [(20, 3, 10, 72, 70, 8), (37, 1, 24, 16, 33, None), (9, 1, 70, 130, 40, None)], ids=str
)
def test_fold_with_all_terms(sizes, dtype):
    B, N, C, K, P, per_split = sizes
    u, v = normal(1, B, N, C, dtype=dtype), normal(2, B, K, dtype=dtype)
    h = _head(3, C, K, P, dtype)
    a = normal(4, P, -(-C // 8) * 8, dtype=dtype, scale=8)[:, :C]
    c = normal(5, P, -(-K // 8) * 8, dtype=dtype, scale=8)[:, :K]
    d = normal(6, P, dtype=dtype, scale=30)
    close(_fold(u, v, h, a, c, d, per_split), _expected_fold(u, v, h, a, c, d), C * K, dtype)


def test_fold_of_the_gradient_of_x_and_of_slices():
    """H is permuted as for dx, (o, r, i) of (O, I, R); u and v are not aligned to words."""
    dtype = torch.bfloat16
    B, O, inner, R = 30, 13, 19, 32
    weight = normal(1, O, inner, R, dtype=dtype)
    u = normal(2, B, 1, 2 * O + 1, dtype=dtype)[:, :, 1::2]
    v = normal(3, B, R + 1, dtype=dtype)[:, 1:]
    h = weight.permute(0, 2, 1)
    close(_fold(u, v, h), _expected_fold(u, v, h), O * R, dtype)


def test_fold_in_float16_keeps_its_range():
    """Products are above 65504 or below 6e-8, and their sums in the range of float16."""
    dtype = torch.float16
    B, C, K, P = 64, 10, 40, 24
    sizes = 2.0 ** torch.linspace(-14, 14, B)
    u = (normal(1, B, 1, C, dtype=torch.float32) * sizes[:, None, None]).to(dtype)
    v = (normal(2, B, K, dtype=torch.float32) * sizes[:, None]).to(dtype)
    h = normal(3, P, C, K, dtype=dtype, scale=2.0**-14).permute(1, 2, 0)
    expected = _expected_fold(u, v, h)
    result = _fold(u, v, h)
    top = torch.finfo(dtype).max
    rows = expected.abs().amax(1)
    middle = (rows < top) & (rows > 2.0**-6)
    assert middle.sum() > 20
    error = (result.double() - expected).abs().amax(1) / rows
    assert error[middle].max() < 4e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("K", [16, 24, 72])
def test_fold_does_not_touch_neighbours(bad, K):
    """Padding of H, u and v, and other rows, hold NaN or infinity."""
    dtype = torch.bfloat16
    B, C, P = 20, 3, 17
    h_all = torch.full((P, C, K + 8), bad, dtype=dtype)
    h_all[:, :, :K] = normal(1, P, C, K, dtype=dtype)
    u_all, v_all = torch.full((B, 1, C + 3), bad, dtype=dtype), torch.full((B, K + 8), bad, dtype=dtype)
    u_all[:, :, :C], v_all[:, :K] = normal(2, B, 1, C, dtype=dtype), normal(3, B, K, dtype=dtype)
    h, u, v = h_all[:, :, :K].permute(1, 2, 0), u_all[:, :, :C], v_all[:, :K]
    close(_fold(u, v, h), _expected_fold(u, v, h), C * K, dtype)
    h_all[5], u_all[7] = bad, bad
    result = _fold(u, v, h)
    assert not torch.isfinite(result[7]).any()
    assert not torch.isfinite(result[:, 5]).any()
    others = torch.ones(B, P, dtype=torch.bool)
    others[7], others[:, 5] = False, False
    assert torch.isfinite(result[others]).all()


def test_fold_of_infinite_numbers_is_not_nan():
    """Beyond the last c, zeros in a tile of H are not multiplied by the last u."""
    dtype = torch.bfloat16
    u, v = torch.ones(5, 1, 3, dtype=dtype), torch.ones(5, 16, dtype=dtype)
    u[2, 0, 2] = math.inf
    result = _fold(u, v, torch.ones(8, 3, 16, dtype=dtype).permute(1, 2, 0))
    assert (result[2] == math.inf).all()
    assert (result[[0, 1, 3, 4]] == 48).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [20, 24])
def test_fold_of_unsupported_calls(K, dtype):
    """Rows of H are not a multiple of 16 bytes, or not contiguous; or the dtype is float32."""
    u, v = normal(1, 4, 1, 5, dtype=dtype), normal(2, 4, K, dtype=dtype)
    h = normal(3, 6, 5, K, dtype=dtype).permute(1, 2, 0) if K == 20 else normal(3, 5, K, 8, dtype=dtype)
    close(_fold(u, v, h, supported=False), _expected_fold(u, v, h), 5 * K, torch.bfloat16)
