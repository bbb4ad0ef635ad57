"""`weight_grad` and `dx_dz` for sm_90a: partial tiles, splits, strides, and memory that they must not use.

The tests run on a GPU if FASTHYPER_TEST_DEVICE names one, otherwise with the emulator of csrc/cuda.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hopper_operands import DEVICE, DTYPES, LIBRARY, OPS, aligned_rows, close, normal, on_hopper

pytestmark = on_hopper


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


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
    x, z, g = (
        normal(1, B, 1, inner, dtype=dtype),
        aligned_rows(2, B, R, dtype=dtype),
        aligned_rows(3, B, 1, O, dtype=dtype),
    )
    close(_weight_grad(x, z, g, per_split), _expected_weight_grad(x, z, g), B, dtype)


def test_weight_grad_of_slices():
    """z and g are slices of wider tensors, x has strides in all axes, and the elements around them are NaN."""
    dtype, B = torch.bfloat16, 70
    wide_z, wide_g = (torch.full((B, 40), math.nan, dtype=dtype) for _ in range(2))
    z, g = wide_z[:, :21], wide_g[:, :27]
    z.copy_(normal(1, B, 21, dtype=dtype)), g.copy_(normal(2, B, 27, dtype=dtype))
    x = normal(3, 7, B + 1, dtype=dtype)[1::2, 1:].t()[:, None]
    close(_weight_grad(x, z, g[:, None]), _expected_weight_grad(x, z, g[:, None]), B, dtype)


def test_weight_grad_in_float16_keeps_its_range():
    dtype, B, inner = torch.float16, 100, 8
    sizes = 2.0 ** torch.linspace(-14, 8, inner)
    x = (normal(1, B, 1, inner, dtype=torch.float32) * sizes).to(dtype)
    z = normal(2, B, 24, dtype=dtype, scale=2.0**8)
    g = normal(3, B, 1, 16, dtype=dtype, scale=2.0**-9)
    expected = _expected_weight_grad(x, z, g)
    error = (_weight_grad(x, z, g).double() - expected).abs().amax((0, 2)) / expected.abs().amax((0, 2))
    assert error.max() < 4e-3


def test_weight_grad_of_unsupported_calls():
    """Splits are not a multiple of 64, rows not a multiple of 16 bytes, or there are several points."""
    dtype = torch.bfloat16
    x, z, g = normal(1, 200, 1, 3, dtype=dtype), normal(2, 200, 16, dtype=dtype), normal(3, 200, 1, 16, dtype=dtype)
    for args, per_split in (
        ((x, z, g), 100),
        ((x, z[:, :15].contiguous(), g), None),
        ((x.view(100, 2, 3), z[:100], g.view(100, 2, 16)), None),
    ):
        close(_weight_grad(*args, per_split, supported=False), _expected_weight_grad(*args), 200, dtype)


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
    x, z, g = normal(1, B, N, inner, dtype=dtype), normal(2, B, R, dtype=dtype), aligned_rows(3, B, N, O, dtype=dtype)
    h = aligned_rows(4, O, inner, R, dtype=dtype)
    bias = aligned_rows(5, O, R, dtype=dtype, scale=4) if terms else None
    base = aligned_rows(6, O, inner, dtype=dtype, scale=4) if terms else None
    dx, dz = _dx_dz(x, z, h, g, bias, base, per_split)
    expected_dx, expected_dz = _expected_dx_dz(x, z, h, g, bias, base)
    close(dx, expected_dx, O * R, dtype)
    close(dz, expected_dz, N * inner * O, dtype)


def test_dx_dz_does_not_touch_neighbours():
    """Padding of R and O, uninitialised shared memory, and one row of g are not finite."""
    dtype = torch.bfloat16
    B, inner, O, R = 20, 5, 21, 19
    h_all, g_all = (torch.full(s, math.inf, dtype=dtype) for s in ((O, inner, 32), (B, 1, 32)))
    h, g = h_all[:, :, :R], g_all[:, :, :O]
    h.copy_(normal(1, O, inner, R, dtype=dtype)), g.copy_(normal(2, B, 1, O, dtype=dtype))
    x, z = normal(3, B, 1, inner, dtype=dtype), normal(4, B, R, dtype=dtype)
    dx, dz = _dx_dz(x, z, h, g)
    expected_dx, expected_dz = _expected_dx_dz(x, z, h, g)
    close(dx, expected_dx, O * R, dtype), close(dz, expected_dz, inner * O, dtype)
    g[3] = math.nan
    dx, dz = _dx_dz(x, z, h, g)
    others = torch.arange(B) != 3
    assert torch.isfinite(dx[others]).all()
    assert torch.isfinite(dz[others]).all()
    assert dx[3].isnan().all()


def test_dx_dz_of_unsupported_calls():
    """R is larger than 128, or rows of g have no common stride."""
    dtype = torch.bfloat16
    x, z, g = normal(1, 6, 2, 3, dtype=dtype), normal(2, 6, 136, dtype=dtype), normal(3, 6, 2, 16, dtype=dtype)
    h = normal(4, 16, 3, 136, dtype=dtype)
    swapped = g.transpose(0, 1).contiguous().transpose(0, 1)
    for args in ((x, z, h, g), (x, z[:, :128], h[:, :, :128], swapped)):
        for got, expected in zip(_dx_dz(*args, supported=False), _expected_dx_dz(*args), strict=True):
            close(got, expected, 16 * 136, dtype)


def test_all_gradients_in_one_call():
    """Two kernels for sm_90a compute dx and dz, and dH; a third the other gradients; all as partial sums."""
    dtype, (B, inner, O, R) = torch.bfloat16, (150, 21, 40, 24)
    x, z, g = normal(1, B, 1, inner, dtype=dtype), normal(2, B, R, dtype=dtype), normal(3, B, 1, O, dtype=dtype)
    h, bias = normal(4, O, inner, R, dtype=dtype), normal(5, O, R, dtype=dtype)
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
        close(got, expected, B, dtype)


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
