"""The compiled CPU kernels: what the suite of the family, which runs on every backend, does not ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fasthyper
from fasthyper import backends, compiled, planner
from fasthyper.backends import cpu
from fasthyper.problem import SCHEDULES

ready = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"compiled CPU kernels: {cpu.unavailable()}")
LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW)
ALL = (True,) * 6
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
# Beyond a block of instances, a piece of H, a panel of dH; skinny ways; one output, with few and with many numbers
# of H; one of each.
SIZES = [
    (1, 1, 1, 1, 1),
    (33, 1, 25, 64, 130),
    (70, 1, 100, 300, 10),
    (260, 1, 100, 10, 1),
    (130, 1, 130, 40, 1),
    (20, 1, 600, 500, 1),
    (600, 1, 64, 27, 32),
    (40, 1, 300, 5, 140),
    (20, 1, 7, 2, 600),
    (7, 40, 13, 17, 19),
    (3, 100, 64, 20, 20),
    (300, 2, 3, 2, 2),
    (2, 600, 5, 40, 70),
    (32, 1, 2, 256, 256),
]


def everything(x, z, weight, bias, base_weight, g, schedule="auto"):
    """y, dx, dz, dH and the gradients of bias, W0, b0."""
    y = cpu.apply(x, z, weight, bias, base_weight, schedule=schedule)
    return y, *cpu.grads(x, z, weight, bias, base_weight, g, ALL, schedule=schedule)


@ready
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_every_block(sizes, dtype, schedule, factors, oracle):
    args = factors(sizes, dtype, NAMES)
    oracle.check_linear(args, everything(*args, schedule))


@ready
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (70, 3, 40, 40, 70))),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(("contiguous", "transposed", "swapped", "sliced", "expanded")),
    schedule=st.sampled_from(("auto", *SCHEDULES)),
)
def test_any_sizes_and_strides(sizes, dtype, strides, schedule, factors, oracle):
    args = factors(sizes, dtype, NAMES, strides)
    oracle.check_linear(args, everything(*args, schedule))


@ready
@pytest.mark.parametrize("strides", ["transposed", "swapped", "sliced", "expanded"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_output_of_any_strides(schedule, strides, factors, oracle):
    # Expanded, all terms of a sum are one number and round the same way: by n/4 eps at worst, which 16 eps must hold.
    args = factors((66, 1, 24, 40, 1), torch.float32, NAMES, strides)
    oracle.check_linear(args, everything(*args, schedule))


@ready
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
@pytest.mark.parametrize(
    "sizes", [(2000, 1, 25, 16, 130), (64, 1, 50, 784, 10), (2000, 1, 36, 40, 1), (100, 30, 16, 20, 24)], ids=str
)
def test_the_number_of_threads_changes_no_bit(sizes, schedule, factors):
    args = factors(sizes, torch.float32, NAMES)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            own = schedule == "generate" and sizes[1] > 1  # elsewhere those of bias and base are aten's sums
            results.append(everything(*args, schedule)[: 7 if own else 4])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@ready
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("limit", [1 << 20, 32 << 20], ids=["1 MiB", "32 MiB"])
@pytest.mark.parametrize("sizes", [(700, 17, 8, 300, 1), (300, 100, 1, 1, 300), (100, 60, 33, 1, 33)], ids=str)
def test_sums_over_points_are_cut_by_sizes_alone(sizes, limit, schedule, factors):
    """Whatever threads share the workspace."""
    fasthyper.set_workspace_limit(limit)
    x, z, weight, g = factors(sizes, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 6, 16):
            torch.set_num_threads(threads)
            results.append(cpu.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule=schedule)[:3])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@ready
@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(50, 1, 6, 7, 8), (6, 9, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_not_asked_for_is_not_there(schedule, sizes, mask, factors):
    x, z, weight, g = factors(sizes, torch.float32)
    all_of_them = cpu.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule=schedule)
    some = cpu.grads(x, z, weight, None, None, g, tuple(map(bool, mask)) + (False,) * 3, schedule=schedule)
    for wanted, one, part in zip(mask, all_of_them, some, strict=False):
        assert (part is not None) == bool(wanted)
        if wanted:
            torch.testing.assert_close(part, one)


@ready
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", [(20000, 1, 8, 6, 5), (40, 500, 8, 6, 5)], ids=str)
def test_gradients_of_a_large_batch_are_as_exact_as_by_hand(sizes, dtype, factors, oracle):
    x, z, weight, g = factors(sizes, dtype)
    exact = oracle.grads(x, z, weight, g)
    with fasthyper.use_backend("materialised"):
        usual = fasthyper.ops.grads(x, z, weight, g)
    for got, by_hand, truth in zip(fasthyper.ops.grads(x, z, weight, g), usual, exact, strict=True):
        rounding = torch.finfo(dtype).eps * truth.abs()
        error = ((got.double() - truth).abs() - rounding).max()
        assert error <= 2 * (by_hand.double() - truth).abs().max()


@ready
@pytest.mark.parametrize("wanted", [(3,), (4,), (5,), (2, 5), (1, 3, 4), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("sizes", [(150, 3, 40, 70, 90), (700, 2, 33, 20, 17), (5, 300, 20, 600, 40)], ids=str)
def test_gradients_of_bases_come_with_those_of_what_is_generated(sizes, wanted, factors, oracle):
    x, z, weight, bias, base_weight, g = factors(sizes, torch.float32, NAMES)
    mask = tuple(k in wanted for k in range(6))
    fasthyper.set_workspace_limit(1 << 20)  # many groups of instances, many pieces of dW
    got = cpu.grads(x, z, weight, bias, base_weight, g, mask, schedule="generate")
    args = [t.double() for t in (x, z, weight, bias, base_weight, g)]
    exact = fasthyper.backends.aten.grads(*args, mask, schedule="fold")
    usual = fasthyper.backends.materialised.grads(x, z, weight, bias, base_weight, g, mask, schedule="auto")
    for k, (one, truth, by_hand) in enumerate(zip(got, exact, usual, strict=True)):
        assert (one is not None) == (k in wanted)
        if one is not None:
            error, allowed = ((t.double() - truth).abs().max() for t in (one, by_hand))
            assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth.abs().max()


native = pytest.mark.skipif(
    cpu.unavailable() is not None or not torch.ops.fasthyper_cpu.multiplies_bfloat16(),
    reason="no products of bfloat16 on this machine (`make forced` puts plain ones in their place)",
)


@ready
@native
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operands_of_16_bits(sizes, schedule, factors, oracle):
    """Where the machine multiplies bfloat16, tiles are rounded to it: at most twice as bad as rounding W."""
    x, z, weight, g = factors(sizes, torch.bfloat16)
    how = (planner.get_workspace_limit(), True)
    ops = torch.ops.fasthyper_cpu
    got = (
        ops.apply(x, z, weight, None, None, None, schedule, *how),
        *ops.grads(x, z, weight, None, None, g, [True] * 3 + [False] * 3, schedule, schedule, *how)[:3],
    )
    with fasthyper.use_backend("materialised"):
        usual = (fasthyper.ops.apply(x, z, weight), *fasthyper.ops.grads(x, z, weight, g))
    exact = (oracle.op("apply", x, z, weight), *oracle.grads(x, z, weight, g))
    for ours, by_hand, truth in zip(got, usual, exact, strict=True):
        rounding = torch.finfo(x.dtype).eps * truth.abs()
        error = ((ours.double() - truth).abs() - rounding).max()
        assert error <= 2 * (by_hand.double() - truth).abs().max() + 1e-30


SCRIPT = """
import torch, fasthyper
from fasthyper.backends import cpu
assert cpu.unavailable() is None, cpu.unavailable()
assert torch.backends.cpu.get_cpu_capability() == {capability!r}
torch.manual_seed(0)
for B, N, R, I, O in ((70, 1, 25, 33, 41), (5, 20, 16, 12, 9)):
    x, z, h, g = torch.randn(B, N, I), torch.randn(B, R), torch.randn(O, I, R), torch.randn(B, N, O)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = [t.to(dtype) for t in (x, z, h, g)]
        for schedule in ("fold", "generate", "project"):
            with fasthyper.use_backend("cpu", schedule):
                got = (fasthyper.ops.apply(*args[:3]), *fasthyper.ops.grads(*args))
            a, b, w, d = (t.double() for t in args)
            exact = (
                torch.einsum("bni,br,oir->bno", a, b, w), torch.einsum("bno,br,oir->bni", d, b, w),
                torch.einsum("bni,bno,oir->br", a, d, w), torch.einsum("bni,br,bno->oir", a, b, d),
            )
            for one, truth in zip(got, exact):
                ulps = 16 if dtype == torch.float32 else 2
                assert (one.double() - truth).abs().max() <= ulps * torch.finfo(dtype).eps * truth.abs().max()
"""


@ready
@pytest.mark.parametrize(("held", "onednn"), [("default", "SSE41"), ("avx2", "AVX2"), ("avx512", "AVX512_CORE")])
def test_instruction_sets(held, onednn):
    """Each library that the machine can run, with torch and oneDNN held to its instruction set."""
    order = ("DEFAULT", "AVX2", "AVX512")
    if order.index(held.upper()) > order.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"this processor has no {held}")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": held, "ONEDNN_MAX_CPU_ISA": onednn, "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(capability=held.upper())
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A folder for compiled libraries with this record of the build."""
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)

    def record(**content):
        (tmp_path / "build.json").write_text(json.dumps(content))

    compiled.load.cache_clear()
    yield record
    compiled.load.cache_clear()


def test_why_not_without_a_build(build):
    assert "could not see torch" in compiled.load("cpu_avx2")


def test_why_not_after_a_failure(build):
    build(error="no compiler")
    assert compiled.load("cpu_avx2") == "not built: no compiler"


def test_why_not_with_another_torch(build):
    build(torch="1.0")
    assert "built for torch 1.0" in compiled.load("cpu_avx2")


def test_why_not_where_one_library_is_missing(build):
    build(torch=torch.__version__, missing={"cuda": "there is no nvcc"})
    assert compiled.load("cuda") == "not built: there is no nvcc"


def test_why_not_for_another_processor(build):
    build(torch=torch.__version__)
    assert "there is no cpu_vsx" in compiled.load("cpu_vsx")


def test_why_not_with_a_broken_library(build, tmp_path):
    build(torch=torch.__version__)
    (tmp_path / "cpu_avx2.so").write_bytes(b"not a library")
    assert "cannot be loaded" in compiled.load("cpu_avx2")


def test_without_kernels_aten_serves(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built: no compiler")
    assert backends.backend("auto", torch.device("cpu")) is backends.BACKENDS["aten"]
    with pytest.raises(ValueError, match="no compiler"):
        fasthyper.set_backend("cpu")


def test_another_device():
    with pytest.raises(ValueError, match="on meta"):
        backends.backend("cpu", torch.device("meta"))


short = pytest.mark.skipif(
    cpu.unavailable() is not None or compiled.load("eager") is not None, reason="the short way was not built"
)


@short
def test_a_plan_is_made_once_and_forgotten_with_the_limit(factors, monkeypatch, oracle):
    """Eager calls of a problem that was planned do not enter Python again."""
    x, z, weight, g = factors((9, 2, 5, 3, 6), torch.float32)
    inputs = [t.requires_grad_() for t in (x, z, weight)]

    def step():
        y = fasthyper.hyper_linear(*inputs)
        return y, *torch.autograd.grad(y, inputs, g)

    first = step()
    with monkeypatch.context() as patch:
        patch.setattr(planner, "plan", None)
        for one, same in zip(first, step(), strict=True):
            assert torch.equal(one, same)
        fasthyper.set_workspace_limit(16 << 20)
        with pytest.raises(TypeError):
            step()
    oracle.check_op("apply", step()[0], x, z, weight)


@short
def test_the_short_way_records_as_the_long_one(factors):
    """Base terms, partial requires_grad, hooks on what is saved, a second derivative."""
    x, z, weight, bias, base_weight, base_bias = factors(dtype=torch.float32, names=factors.AFFINE)
    for wanted in ([x], [z, bias], [weight, base_weight, base_bias], [x, z, weight, bias, base_weight, base_bias]):
        for t in (x, z, weight, bias, base_weight, base_bias):
            t.requires_grad_(any(t is w for w in wanted))
        results = []
        for name in ("auto", "aten"):
            with fasthyper.use_backend(name):
                y = fasthyper.hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
                gradients = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
                total = sum(t.square().sum() for t in gradients)
                results.append([y, *gradients, *torch.autograd.grad(total, wanted)])
        for ours, other in zip(*results, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-3)
