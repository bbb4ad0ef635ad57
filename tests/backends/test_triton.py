"""The Triton kernels: what the suite of the family, which runs on every backend, does not ask.

On a GPU where there is one; else by Triton's interpreter, in a run of its own (`make test`), since it is chosen when
triton is imported.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasthyper
from fasthyper import planner
from fasthyper.backends import triton
from fasthyper.problem import Problem

ready = pytest.mark.skipif(triton.unavailable() is not None, reason=f"Triton kernels: {triton.unavailable()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = (True,) * 6
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
# Around the interpreter's tiles of 16 and 32: one of each; several rows, columns and pieces of K, with and without a
# tail; few features, several columns a step; a split sum; dx and dz apart; one output; several points.
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


def everything(x, z, weight, bias, base_weight, g, schedule="fold"):
    """y, dx, dz, dH and the gradients of bias, W0, b0."""
    y = triton.apply(x, z, weight, bias, base_weight, schedule=schedule)
    return y, *triton.grads(x, z, weight, bias, base_weight, g, ALL, schedule=schedule)


@ready
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_every_tile(sizes, dtype, factors, oracle):
    args = factors(sizes, dtype, NAMES)
    oracle.check_linear(args, everything(*args))


@ready
@settings(max_examples=30 if triton.interpreting() else 8)  # on a GPU each compiles kernels
@given(
    # Expanded, up to 60 terms of a sum are one number, and round the same way.
    sizes=st.tuples(*(st.integers(1, most) for most in (20, 3, 36, 20, 36))),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(("contiguous", "transposed", "swapped", "sliced", "expanded")),
)
def test_any_sizes_and_strides(sizes, dtype, strides, factors, oracle):
    args = factors(sizes, dtype, NAMES, strides)
    oracle.check_linear(args, everything(*args))


@ready
@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(20, 1, 6, 7, 20), (4, 5, 6, 7, 8)], ids=str)
def test_what_is_not_asked_for_is_not_there(sizes, mask, factors):
    x, z, weight, g = factors(sizes, torch.float32)
    every = triton.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    some = triton.grads(x, z, weight, None, None, g, tuple(map(bool, mask)) + (False,) * 3, schedule="fold")
    for wanted, one, part in zip(mask, every, some, strict=False):
        assert (part is not None) == bool(wanted)
        if wanted:
            torch.testing.assert_close(part, one)


@ready
@pytest.mark.parametrize("sizes", [(40, 1, 8, 40, 20), (200, 1, 6, 7, 5), (5, 9, 20, 7, 8)], ids=str)
def test_the_same_bits_every_time(sizes, factors):
    args = factors(sizes, torch.float32, NAMES)
    for one, same in zip(everything(*args), everything(*args), strict=True):
        assert torch.equal(one, same)


@ready
@pytest.mark.parametrize(
    ("room", "sizes"),
    [
        (1000, (20, 1, 33, 9, 7)),  # for nothing
        (1000, (5, 9, 20, 7, 8)),  # dz of several points is summed an instance at a time
        (600, (2, 40, 20, 3, 8)),  # and some points at a time
        (8000, (20, 1, 33, 9, 7)),  # for a copy of z with an even R, and not of H
        (4000, (100, 1, 5, 3, 4)),  # of H, and of some instances of z
    ],
    ids=str,
)
def test_little_workspace(room, sizes, factors, oracle, monkeypatch):
    """No room for parts of sums, or to make odd sizes even; what would be read beyond H is not a number."""
    from fasthyper.backends.triton import run

    monkeypatch.setattr(run, "_room", lambda: room)
    args = factors(sizes, torch.float32, NAMES)
    behind = torch.full((args[2].numel() + 1000,), float("nan"), device=args[2].device)
    behind[: args[2].numel()] = args[2].flatten()
    args[2] = behind[: args[2].numel()].view_as(args[2])
    oracle.check_linear(args, everything(*args))


@ready
@pytest.mark.parametrize("large", ["x", "z", "g"])
def test_products_beyond_the_range_of_float16(large, factors, oracle):
    """x·z and z·g leave the range where y and the gradients, with a small third factor, do not."""
    x, z, weight, g = factors((20, 1, 6, 7, 20), torch.float16)
    x, z, weight, g = (t * scale for t, scale in ((x, 300), (z, 300), (weight, 1e-3), (g, 1e-3)))
    if large == "g":
        x, g = x * 1e-5, g * 3e5
    if large == "z":
        x, z = x / 20, z * 20
    y = triton.apply(x, z, weight, schedule="fold")
    oracle.check_op("apply", y, x, z, weight)
    got = triton.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    ts = (x, z, weight, g)
    for mine, exact, scale in zip(got[:3], oracle.grads(*ts), oracle.grads(*map(torch.abs, ts)), strict=True):
        if scale.max() < torch.finfo(torch.float16).max:
            oracle.check(mine, exact, scale, torch.float16)


@ready
@pytest.mark.parametrize("large", ["x", "z", "both", "none"])
@pytest.mark.parametrize("small", [1, 1e-2, 1e-4])
def test_float16_uses_its_range(large, small, factors, oracle):
    """Neither an instance of large numbers nor a gradient of small ones costs the others digits."""
    x, z, weight, g = factors((16, 1, 6, 7, 10), torch.float16)  # few outputs: dx by a fold
    x, z, g = x * 0.05, z * 0.05, g * small
    g[0] = 0  # as of an instance that is masked out: it adds nothing to dH
    if large in ("x", "both"):
        x[0] = 60000
    if large in ("z", "both"):
        z[0] = 3000
    ts = (x[1:], z[1:], weight, g[1:])
    oracle.check_op("apply", triton.apply(x, z, weight, schedule="fold")[1:].contiguous(), *ts[:3])
    dx, dz, dh, *_ = triton.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    for got, exact in zip((dx[1:], dz[1:], dh), oracle.grads(*ts), strict=True):
        if got is dh and large == "both":
            continue  # products x·z of one column span more than 2^29, which float16 has
        # Relative to the whole, since results themselves may be too small for float16.
        floor = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
        error = (got.double() - exact).abs() - floor
        assert error.max() <= 2e-3 * exact.abs().max()


@ready
@pytest.mark.parametrize("which", ["x", "weight"])
def test_offsets_beyond_32_bits(which, factors, oracle):
    """Strides so large that offsets leave 31 bits: the pages in between are never touched."""
    x, z, weight, g = factors((3, 1, 5, 4, 3), torch.float16)
    t = {"x": x, "weight": weight}[which]
    apart = (1 << 30) + 64
    far = torch.empty(2 * apart + 4096, dtype=t.dtype, device=t.device)
    far = far.as_strided(t.shape, (apart, *t.stride()[1:]))
    far.copy_(t)
    x, weight = (far, weight) if which == "x" else (x, far)
    oracle.check_op("apply", triton.apply(x, z, weight, schedule="fold"), x, z, weight)
    got = triton.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="fold")
    oracle.check_all(got[:3], oracle.grads, x, z, weight, g)


@ready
def test_float64_and_nothing_are_left_to_aten(factors, oracle):
    for sizes, dtype in (((4, 2, 5, 3, 6), torch.float64), ((4, 0, 5, 3, 6), torch.float32)):
        args = factors(sizes, dtype, NAMES)
        oracle.check_linear(args, everything(*args))


def test_auto_takes_it_for_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    assert fasthyper.backends.backend("auto", gpu) is triton
    assert fasthyper.backends.backend("triton", gpu) is triton
    monkeypatch.setattr(triton, "unavailable", lambda: "no")
    assert fasthyper.backends.backend("auto", gpu) is fasthyper.backends.aten


def test_tensors_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="backend 'triton' must have tensors on a GPU, got x on cpu"):
        fasthyper.backends.backend("triton", torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_planner_folds_single_points_and_generates_for_many(dtype):
    per_sample = Problem("apply", 39168, 1, 128, 64, 64, dtype, "cuda", backend="triton")
    assert planner.plan(per_sample).schedule == "fold"
    assert planner.plan(per_sample._replace(op="grads")).schedule == "fold"
    many = Problem("apply", 100, 1024, 256, 256, 256, dtype, "cuda", backend="triton")
    assert planner.plan(many).schedule == "generate"
    assert planner.plan(many._replace(op="grads")).schedule == "generate"


class TestTuning:
    """Which tile is taken, with clocks that tell what the test wants."""

    @pytest.fixture
    def tuning(self, monkeypatch, tmp_path):
        pytest.importorskip("triton")
        from fasthyper.backends.triton import tuning

        monkeypatch.setenv("FASTHYPER_CACHE", str(tmp_path))
        monkeypatch.delenv("FASTHYPER_AUTOTUNE", raising=False)
        tuning.forget()
        yield tuning
        tuning.forget()

    @pytest.fixture
    def device(self):
        from fasthyper.backends.triton.device import Device

        return Device("NVIDIA Test 9000", "sm_90", 132)

    @staticmethod
    def candidates(tuning, count=5):
        from fasthyper.kernels.tiles import Tile

        return [tuning.Candidate(Tile(16 << i, 64, 64, 8, 3), 1, 1.0 - i / 10) for i in range(count)]

    def test_the_fastest_of_the_likeliest_is_kept(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        timed = []
        monkeypatch.setattr(tuning, "_time", lambda run, c: (timed.append(c), c.seconds)[1] * -1)
        kind = ("fold", torch.bfloat16, (64, 1), True)
        assert tuning.choose(kind, ours, device, lambda c: None) is ours[2]
        assert timed == [ours[4], ours[3], ours[2]]
        kept = json.loads(tuning.path(device).read_text())
        assert kept == {"fold torch.bfloat16 (64, 1) True": list(ours[2].tile)}
        tuning.forget()  # as in another process
        monkeypatch.setattr(tuning, "_time", lambda run, c: pytest.fail("timed again"))
        assert tuning.choose(kind, ours, device, lambda c: None) is ours[2]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"fold 1": 3}', '{"fold 1": [1, 2, 3, 4, 5]}'])
    def test_a_file_of_something_else_is_timed_anew(self, text, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        monkeypatch.setattr(tuning, "_time", lambda run, c: c.seconds)
        tuning.path(device).write_text(text)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]
        assert json.loads(tuning.path(device).read_text())["fold 1"] == list(ours[4].tile)

    def test_nothing_can_be_kept(self, tuning, device, monkeypatch):
        monkeypatch.setenv("FASTHYPER_CACHE", "/proc/nowhere")
        monkeypatch.setattr(tuning, "_time", lambda run, c: c.seconds)
        ours = self.candidates(tuning)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]

    def test_a_graph_takes_what_was_timed_before_and_times_nothing(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        capturing = lambda state: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(tuning, "_time", lambda run, c: -c.seconds)
        capturing(True)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]  # the likeliest, and not kept
        capturing(False)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[2]
        capturing(True)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[2]
        tuning.forget()
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[2]  # from disk

    def test_what_was_taken_stays(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        monkeypatch.setattr(tuning, "_time", lambda run, c: c.seconds)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]
        tuning.path(device).write_text(json.dumps({"fold 1": ours[3].tile}))  # another process finds another
        tuning.choose(("fold", 2), ours, device, lambda c: None)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]

    def test_where_no_clock_may_decide_the_likeliest_is_taken(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        monkeypatch.setenv("FASTHYPER_AUTOTUNE", "0")
        assert tuning.choose(("fold", 1), ours, device, lambda c: pytest.fail("ran")) is ours[4]
        monkeypatch.delenv("FASTHYPER_AUTOTUNE")
        torch.use_deterministic_algorithms(True)
        try:
            assert tuning.choose(("fold", 1), ours, device, lambda c: pytest.fail("ran")) is ours[4]
        finally:
            torch.use_deterministic_algorithms(False)

    def test_a_sum_is_split_where_blocks_are_few(self, tuning):
        from fasthyper.kernels.tiles import Tile

        tile = Tile(256, 64, 64, 8, 4)
        block = tuning.Block(2, 256, 64, 128 * 64, 64)
        few = tuning.candidate(tile, block, 1 << 16, 16 << 20, 132, 16)
        many = tuning.candidate(tile, block._replace(blocks=13200), 1 << 16, 16 << 20, 132, 16)
        assert few.splits > 8
        assert many.splits == 1
        assert tuning.candidate(tile, block, 1 << 16, 1 << 17, 132, 16).splits <= 2  # no room for more


class TestPrecision:
    """float32 is multiplied as torch's own products are allowed to."""

    @pytest.fixture
    def calls(self):
        pytest.importorskip("triton")
        from fasthyper.backends.triton import calls

        return calls

    def test_by_part(self, calls):
        assert calls.precision_of(torch.float32, "sm_90", False) == "tf32x3"
        assert calls.precision_of(torch.float32, "sm_90", True) == "tf32"
        assert calls.precision_of(torch.float32, "gfx942", False) == "ieee"
        assert calls.precision_of(torch.float32, "interpreter", False) == "ieee"

    def test_torch_says_what_is_allowed(self, calls):
        from fasthyper.backends.triton import device

        before = torch.get_float32_matmul_precision()
        try:
            for setting, allowed in (("highest", False), ("high", True)):
                torch.set_float32_matmul_precision(setting)
                assert device.allows_tf32() is allowed
        finally:
            torch.set_float32_matmul_precision(before)
