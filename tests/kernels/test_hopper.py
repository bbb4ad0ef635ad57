"""The kernels for sm_90a: partial tiles, splits, strides, and memory that they must not use.

The tests run on a GPU if FASTHYPER_TEST_DEVICE names one, otherwise with the emulator of csrc/cuda.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from fasthyper import compiled

DEVICE = os.environ.get("FASTHYPER_TEST_DEVICE", "cpu")
LIBRARY = "cuda_emulated" if DEVICE == "cpu" else "cuda"
OPS = getattr(torch.ops, f"fasthyper_{LIBRARY}")
DTYPES = [torch.bfloat16, torch.float16]


def _why_not() -> str | None:
    if why := compiled.load(LIBRARY):
        return why
    other = DEVICE != "cpu" and torch.cuda.get_device_capability() != (9, 0)
    return "this GPU is not of compute capability 9.0" if other else None


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=f"{LIBRARY}: {_why_not()}")


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def _normal(seed, *sizes, dtype, scale=1.0):
    numbers = torch.randn(*sizes, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return (numbers * scale).to(DEVICE, dtype)


def _rows(seed, *sizes, dtype, scale=1.0):
    """Return random numbers in rows that begin at multiples of 16 bytes."""
    return _normal(seed, *sizes[:-1], -(-sizes[-1] // 8) * 8, dtype=dtype, scale=scale)[..., : sizes[-1]]


def _close(result, expected, products, dtype):
    """Assert that errors are those of rounding each product and the result once."""
    eps = torch.finfo(dtype).eps
    scale = expected.abs().max().item() + 1e-30
    assert torch.isfinite(result).all()
    assert (result.double() - expected).abs().max().item() <= 4 * eps * scale, products


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
    return _normal(seed, P, C, pad, dtype=dtype)[:, :, :K].permute(1, 2, 0)


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
    u, v = _normal(1, B, N, C, dtype=dtype), _normal(2, B, K, dtype=dtype)
    h = _head(3, C, K, P, dtype)
    _close(_fold(u, v, h, per_split=per_split), _expected_fold(u, v, h), C * K, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "sizes", [(20, 3, 10, 72, 70, 8), (37, 1, 24, 16, 33, None), (9, 1, 70, 130, 40, None)], ids=str
)
def test_fold_with_all_terms(sizes, dtype):
    B, N, C, K, P, per_split = sizes
    u, v = _normal(1, B, N, C, dtype=dtype), _normal(2, B, K, dtype=dtype)
    h = _head(3, C, K, P, dtype)
    a = _normal(4, P, -(-C // 8) * 8, dtype=dtype, scale=8)[:, :C]
    c = _normal(5, P, -(-K // 8) * 8, dtype=dtype, scale=8)[:, :K]
    d = _normal(6, P, dtype=dtype, scale=30)
    _close(_fold(u, v, h, a, c, d, per_split), _expected_fold(u, v, h, a, c, d), C * K, dtype)


def test_fold_of_the_gradient_of_x_and_of_slices():
    """H is permuted as for dx, (o, r, i) of (O, I, R); u and v are not aligned to words."""
    dtype = torch.bfloat16
    B, O, inner, R = 30, 13, 19, 32
    weight = _normal(1, O, inner, R, dtype=dtype)
    u = _normal(2, B, 1, 2 * O + 1, dtype=dtype)[:, :, 1::2]
    v = _normal(3, B, R + 1, dtype=dtype)[:, 1:]
    h = weight.permute(0, 2, 1)
    _close(_fold(u, v, h), _expected_fold(u, v, h), O * R, dtype)


def test_fold_in_float16_keeps_its_range():
    """Products are above 65504 or below 6e-8, and their sums in the range of float16."""
    dtype = torch.float16
    B, C, K, P = 64, 10, 40, 24
    sizes = 2.0 ** torch.linspace(-14, 14, B)
    u = (_normal(1, B, 1, C, dtype=torch.float32) * sizes[:, None, None]).to(dtype)
    v = (_normal(2, B, K, dtype=torch.float32) * sizes[:, None]).to(dtype)
    h = _normal(3, P, C, K, dtype=dtype, scale=2.0**-14).permute(1, 2, 0)
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
    h_all[:, :, :K] = _normal(1, P, C, K, dtype=dtype)
    u_all, v_all = torch.full((B, 1, C + 3), bad, dtype=dtype), torch.full((B, K + 8), bad, dtype=dtype)
    u_all[:, :, :C], v_all[:, :K] = _normal(2, B, 1, C, dtype=dtype), _normal(3, B, K, dtype=dtype)
    h, u, v = h_all[:, :, :K].permute(1, 2, 0), u_all[:, :, :C], v_all[:, :K]
    _close(_fold(u, v, h), _expected_fold(u, v, h), C * K, dtype)
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
    u, v = _normal(1, 4, 1, 5, dtype=dtype), _normal(2, 4, K, dtype=dtype)
    h = _normal(3, 6, 5, K, dtype=dtype).permute(1, 2, 0) if K == 20 else _normal(3, 5, K, 8, dtype=dtype)
    _close(_fold(u, v, h, supported=False), _expected_fold(u, v, h), 5 * K, torch.bfloat16)


def _weight_grad(x, z, g, per_split=None, supported=True):
    (B, N, inner), R, O = x.shape, z.shape[1], g.shape[2]
    per_split = per_split or B * N
    dh = torch.full((O, inner, R), math.nan, dtype=x.dtype)
    splits = -(-B * N // per_split)
    partials = torch.full((splits, O, inner, R), math.nan) if splits > 1 else None
    nothing = (None,) * 3
    args = (x, z, *nothing, g, *nothing, dh, *nothing, partials, inner, per_split, True, True, False)
    launches = OPS.divided_grads(*args)
    assert launches == supported
    return dh


def _expected_weight_grad(x, z, g):
    return torch.einsum("bni,br,bno->oir", x.double(), z.double(), g.double())


WEIGHT_GRADS = {  # B, I, O, R, rows_per_split
    "one": (1, 1, 8, 8, None),
    "even": (64, 4, 64, 64, None),
    "odd": (77, 5, 72, 104, None),
    "many_k_tiles": (700, 3, 40, 24, None),
    "wide": (130, 6, 200, 72, None),
    "splits": (333, 3, 64, 16, 128),
    "splits_and_wide": (200, 9, 136, 64, 64),
    "boxes_beyond_the_tensors": (20, 3, 10, 8, None),
    "forty_eight": (70, 3, 48, 48, None),
    "ninety_six": (70, 3, 192, 96, None),
    "pairs_of_ctas": (1100, 7, 24, 16, None),
    "the_last_pair_has_one_tile": (130, 26, 16, 8, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", WEIGHT_GRADS)
def test_weight_grad(name, dtype):
    B, inner, O, R, per_split = WEIGHT_GRADS[name]
    x, z, g = _normal(1, B, 1, inner, dtype=dtype), _rows(2, B, R, dtype=dtype), _rows(3, B, 1, O, dtype=dtype)
    _close(_weight_grad(x, z, g, per_split), _expected_weight_grad(x, z, g), B, dtype)


def test_weight_grad_of_slices():
    """z and g are slices of wider tensors, x has strides in all axes, and the elements around them are NaN."""
    dtype, B = torch.bfloat16, 70
    wide_z, wide_g = (torch.full((B, 40), math.nan, dtype=dtype) for _ in range(2))
    z, g = wide_z[:, :21], wide_g[:, :27]
    z.copy_(_normal(1, B, 21, dtype=dtype)), g.copy_(_normal(2, B, 27, dtype=dtype))
    x = _normal(3, 7, B + 1, dtype=dtype)[1::2, 1:].t()[:, None]
    _close(_weight_grad(x, z, g[:, None]), _expected_weight_grad(x, z, g[:, None]), B, dtype)


def test_weight_grad_in_float16_keeps_its_range():
    dtype, B, inner = torch.float16, 100, 8
    sizes = 2.0 ** torch.linspace(-14, 8, inner)
    x = (_normal(1, B, 1, inner, dtype=torch.float32) * sizes).to(dtype)
    z = _normal(2, B, 24, dtype=dtype, scale=2.0**8)
    g = _normal(3, B, 1, 16, dtype=dtype, scale=2.0**-9)
    expected = _expected_weight_grad(x, z, g)
    error = (_weight_grad(x, z, g).double() - expected).abs().amax((0, 2)) / expected.abs().amax((0, 2))
    assert error.max() < 4e-3


def test_weight_grad_of_unsupported_calls():
    """Splits are not a multiple of 64, rows not a multiple of 16 bytes, or there are several points."""
    dtype = torch.bfloat16
    x, z, g = _normal(1, 200, 1, 3, dtype=dtype), _normal(2, 200, 16, dtype=dtype), _normal(3, 200, 1, 16, dtype=dtype)
    for args, per_split in (
        ((x, z, g), 100),
        ((x, z[:, :15].contiguous(), g), None),
        ((x.view(100, 2, 3), z[:100], g.view(100, 2, 16)), None),
    ):
        _close(_weight_grad(*args, per_split, supported=False), _expected_weight_grad(*args), 200, dtype)


def _dx_dz(x, z, h, g, bias=None, base=None, per_split=None, supported=True):
    (B, N, inner), R = x.shape, z.shape[1]
    per_split = per_split or inner
    dx, dz = torch.full((B, N, inner), math.nan, dtype=x.dtype), torch.full((B, R), math.nan, dtype=x.dtype)
    splits = -(-inner // per_split)
    partials = torch.full((splits, B * N, R), math.nan) if splits > 1 or N > 1 else None
    nothing = (None,) * 5
    args = (x, z, h, bias, base, g, dx, dz, partials, *nothing, per_split, B * N, True, True, False)
    launches = OPS.divided_grads(*args)
    assert launches == supported
    return dx, dz


def _expected_dx_dz(x, z, h, g, bias=None, base=None):
    x, z, h, g, bias, base = (None if t is None else t.double() for t in (x, z, h, g, bias, base))
    dx, dz = torch.einsum("bno,oir,br->bni", g, h, z), torch.einsum("bno,oir,bni->br", g, h, x)
    if base is not None:
        dx = dx + torch.einsum("bno,oi->bni", g, base)
    if bias is not None:
        dz = dz + torch.einsum("bno,or->br", g, bias)
    return dx, dz


DX_DZS = {  # B, N, I, O, R, inputs_per_split, with bias and base
    "one": (1, 1, 1, 8, 8, None, False),
    "odd": (70, 1, 7, 24, 40, None, True),
    "two_tiles_of_rows": (200, 1, 3, 64, 64, None, True),
    "wide": (140, 1, 4, 128, 128, None, True),
    "deep": (30, 1, 3, 200, 48, None, True),
    "wide_and_deep": (40, 1, 3, 256, 104, None, True),
    "many_inputs": (20, 1, 131, 16, 24, None, True),
    "points": (9, 5, 6, 40, 72, None, True),
    "splits": (30, 1, 21, 32, 64, 6, True),
    "splits_and_points": (8, 3, 90, 16, 16, 70, False),
    "boxes_beyond_the_tensors": (20, 1, 3, 10, 8, None, True),
    "forty_eight": (200, 1, 53, 48, 48, None, True),
    "ninety_six": (140, 1, 5, 96, 96, None, True),
    "pairs_of_ctas": (200, 1, 21, 72, 72, 12, True),
    "the_last_pair_has_one_tile": (1160, 1, 2, 8, 8, None, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", DX_DZS)
def test_dx_dz(name, dtype):
    B, N, inner, O, R, per_split, terms = DX_DZS[name]
    x, z, g = _normal(1, B, N, inner, dtype=dtype), _normal(2, B, R, dtype=dtype), _rows(3, B, N, O, dtype=dtype)
    h = _rows(4, O, inner, R, dtype=dtype)
    bias = _rows(5, O, R, dtype=dtype, scale=4) if terms else None
    base = _rows(6, O, inner, dtype=dtype, scale=4) if terms else None
    dx, dz = _dx_dz(x, z, h, g, bias, base, per_split)
    expected_dx, expected_dz = _expected_dx_dz(x, z, h, g, bias, base)
    _close(dx, expected_dx, O * R, dtype)
    _close(dz, expected_dz, N * inner * O, dtype)


def test_dx_dz_does_not_touch_neighbours():
    """Padding of R and O, uninitialised shared memory, and one row of g are not finite."""
    dtype = torch.bfloat16
    B, inner, O, R = 20, 5, 21, 19
    h_all, g_all = (torch.full(s, math.inf, dtype=dtype) for s in ((O, inner, 32), (B, 1, 32)))
    h, g = h_all[:, :, :R], g_all[:, :, :O]
    h.copy_(_normal(1, O, inner, R, dtype=dtype)), g.copy_(_normal(2, B, 1, O, dtype=dtype))
    x, z = _normal(3, B, 1, inner, dtype=dtype), _normal(4, B, R, dtype=dtype)
    dx, dz = _dx_dz(x, z, h, g)
    expected_dx, expected_dz = _expected_dx_dz(x, z, h, g)
    _close(dx, expected_dx, O * R, dtype), _close(dz, expected_dz, inner * O, dtype)
    g[3] = math.nan
    dx, dz = _dx_dz(x, z, h, g)
    others = torch.arange(B) != 3
    assert torch.isfinite(dx[others]).all()
    assert torch.isfinite(dz[others]).all()
    assert dx[3].isnan().all()


def test_dx_dz_of_unsupported_calls():
    """R is larger than 128, or rows of g have no common stride."""
    dtype = torch.bfloat16
    x, z, g = _normal(1, 6, 2, 3, dtype=dtype), _normal(2, 6, 136, dtype=dtype), _normal(3, 6, 2, 16, dtype=dtype)
    h = _normal(4, 16, 3, 136, dtype=dtype)
    swapped = g.transpose(0, 1).contiguous().transpose(0, 1)
    for args in ((x, z, h, g), (x, z[:, :128], h[:, :, :128], swapped)):
        for got, expected in zip(_dx_dz(*args, supported=False), _expected_dx_dz(*args), strict=True):
            _close(got, expected, 16 * 136, dtype)


def test_all_gradients_in_one_call():
    """Two kernels for sm_90a compute dx and dz, and dH; a third the other gradients; all as partial sums."""
    dtype, (B, inner, O, R) = torch.bfloat16, (150, 21, 40, 24)
    x, z, g = _normal(1, B, 1, inner, dtype=dtype), _normal(2, B, R, dtype=dtype), _normal(3, B, 1, O, dtype=dtype)
    h, bias = _normal(4, O, inner, R, dtype=dtype), _normal(5, O, R, dtype=dtype)
    out = [torch.full(s, math.nan, dtype=dtype) for s in (x.shape, z.shape, h.shape, bias.shape, (O, inner), (O,))]
    dz_partials = torch.full((3, B, R), math.nan)
    partials = torch.full((3, sum(t.numel() for t in out[2:])), math.nan)
    args = (x, z, h, bias, None, g, *out[:2], dz_partials, *out[2:], partials, 8, 64, True, True, False)
    assert OPS.divided_grads(*args) == 2
    rows = g[:, 0].double()
    exact = (
        *_expected_dx_dz(x, z, h, g, bias),
        _expected_weight_grad(x, z, g),
        rows.T @ z.double(),
        rows.T @ x[:, 0].double(),
        rows.sum(0),
    )
    for got, expected in zip(out, exact, strict=True):
        _close(got, expected, B, dtype)


BACKWARD_FIRST = """
import sys, threading, torch
from fasthyper import compiled

device, library = sys.argv[1:]
assert compiled.load(library) is None
ops = getattr(torch.ops, f"fasthyper_{library}")
B, I, O, R = 200, 9, 40, 24
threads = []

class Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, h):
        ctx.save_for_backward(x, z, h)
        return torch.empty(B, 1, O, dtype=x.dtype, device=device)

    @staticmethod
    def backward(ctx, g):
        threads.append(threading.get_ident())
        x, z, h = ctx.saved_tensors
        dx, dz, dh = (torch.empty_like(t) for t in (x, z, h))
        nothing = [None] * 4
        launches = ops.divided_grads(
            x, z, h, None, None, g, dx, dz, None, dh, *nothing, I, B, True, True, False
        )
        assert launches == 2, launches
        return dx, dz, dh

generator = torch.Generator().manual_seed(1)
cpu = [torch.randn(s, generator=generator).bfloat16() for s in ((B, 1, I), (B, R), (O, I, R), (B, 1, O))]
x, z, h, g = (t.to(device) for t in cpu)
layer = [t.requires_grad_() for t in (x, z, h)]
Layer.apply(*layer).backward(g)
assert device == "cpu" or threads != [threading.get_ident()], "backward ran on the thread of forward"
x, z, h, g = (t.double() for t in cpu)
x, g = x[:, 0], g[:, 0]
exact = (
    torch.einsum("bo,oir,br->bi", g, h, z)[:, None],
    torch.einsum("bo,oir,bi->br", g, h, x),
    torch.einsum("bi,br,bo->oir", x, z, g),
)
for t, e in zip(layer, exact, strict=True):
    assert (t.grad.cpu().double() - e).norm() <= 0.01 * e.norm()
print("right")
"""


def test_backward_is_the_first_kernel_of_a_process():
    """On a GPU it runs on autograd's thread, which has no CUDA context; only allocations and copies precede."""
    command = [sys.executable, "-c", BACKWARD_FIRST, DEVICE, LIBRARY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["right"], done.stderr
