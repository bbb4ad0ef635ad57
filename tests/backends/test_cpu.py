"""The compiled CPU kernels, beyond the tests of the op family that run on every backend."""

from __future__ import annotations

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
# Sizes beyond a block of instances, a tile of H and a panel of dH; narrow axes; one output, with a small and a large
# H; all sizes 1.
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
    """Return y, dx, dz, dH and the gradients of bias, W0, b0."""
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
    # In an expanded tensor, all terms of a sum are equal and round the same way: n/4 eps at worst; 16 eps are allowed.
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
            all_here = schedule == "generate" and sizes[1] > 1  # otherwise aten computes the gradients of bias and base
            results.append(everything(*args, schedule)[: 7 if all_here else 4])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@ready
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("limit", [1 << 20, 32 << 20], ids=["1 MiB", "32 MiB"])
@pytest.mark.parametrize("sizes", [(700, 17, 8, 300, 1), (300, 100, 1, 1, 300), (100, 60, 33, 1, 33)], ids=str)
def test_sums_over_points_are_split_by_sizes_alone(sizes, limit, schedule, factors):
    """The number of threads that share the workspace does not change the splits."""
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
def test_only_requested_gradients_are_computed(schedule, sizes, mask, factors):
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
def test_gradients_of_bases_come_from_dW(sizes, wanted, factors, oracle):
    x, z, weight, bias, base_weight, g = factors(sizes, torch.float32, NAMES)
    mask = tuple(k in wanted for k in range(6))
    fasthyper.set_workspace_limit(1 << 20)  # many groups of instances, many chunks of dW
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
    reason="this machine has no products of bfloat16 (`make forced` replaces them by plain loops)",
)


@ready
@native
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operands_of_16_bits(sizes, schedule, factors, oracle):
    """If products take bfloat16, tiles are rounded to it: at most twice the error of rounding W."""
    x, z, weight, g = factors(sizes, torch.bfloat16)
    options = (planner.get_workspace_limit(), True)
    ops = torch.ops.fasthyper_cpu
    got = (
        ops.apply(x, z, weight, None, None, None, schedule, *options),
        *ops.grads(x, z, weight, None, None, g, [True] * 3 + [False] * 3, schedule, schedule, *options)[:3],
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
    """Each library that the machine can run, with torch and oneDNN limited to its instruction set."""
    order = ("DEFAULT", "AVX2", "AVX512")
    if order.index(held.upper()) > order.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"this processor has no {held}")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": held, "ONEDNN_MAX_CPU_ISA": onednn, "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(capability=held.upper())
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_aten_is_used_without_kernels(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built: no compiler")
    assert backends.backend("auto", torch.device("cpu")) is backends.BACKENDS["aten"]
    with pytest.raises(ValueError, match="no compiler"):
        fasthyper.set_backend("cpu")


@ready
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("points", [1, 300])
def test_torch_multiplies_points_in_bfloat16_where_the_processor_does(points, native, factors, oracle, monkeypatch):
    called = []
    for name in ("apply", "grads"):
        of_aten = getattr(cpu.aten, name)
        monkeypatch.setattr(cpu.aten, name, lambda *a, f=of_aten, **k: called.append(f.__name__) or f(*a, **k))
    monkeypatch.setattr("fasthyper.processor.kernels_multiply", lambda dtype: native and dtype == torch.bfloat16)
    planner.forget()
    args = factors((3, points, 64, 20, 20), torch.bfloat16, NAMES)
    oracle.check_linear(args, everything(*args))
    assert called == (["apply", "grads"] if native and points > 1 else [])
    called.clear()
    everything(*args, schedule="generate")
    assert not called
    planner.forget()


def test_another_device():
    with pytest.raises(ValueError, match="on meta"):
        backends.backend("cpu", torch.device("meta"))


needs_eager = pytest.mark.skipif(
    cpu.unavailable() is not None or compiled.load("eager") is not None, reason="csrc/eager.cpp was not built"
)


@needs_eager
def test_a_plan_is_made_once_and_forgotten_with_the_limit(factors, monkeypatch, oracle):
    """The second eager call of a problem does not enter Python."""
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


@needs_eager
def test_eager_calls_record_the_same_derivatives(factors):
    """Base terms, some inputs with requires_grad, a second derivative."""
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
