"""Every op, on every backend and schedule, in every dtype, against the einsum of the identity."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper import backends
from fasthyper.ops import reference
from fasthyper.problem import SCHEDULES

OPS = ("apply", "cond_grad", "weight_grad")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "swapped", "sliced", "expanded"])
def test_op(op, strides, how, dtype, factors, oracle):
    ts = factors(dtype=dtype, strides=strides)
    args = [ts[i] for i in oracle.INPUTS[op]]
    with fasthyper.use_backend(*how):
        oracle.check_op(op, getattr(fasthyper.ops, op)(*args), *args)


@pytest.mark.parametrize("strides", ["contiguous", "swapped", "sliced", "expanded"])
def test_grads(strides, how, dtype, factors, oracle):
    ts = factors(dtype=dtype, strides=strides)
    with fasthyper.use_backend(*how):
        oracle.check_all(fasthyper.ops.grads(*ts), oracle.grads, *ts)


@pytest.mark.parametrize("mask", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_the_mask_selects_gradients(mask, how, factors, oracle):
    ts = factors()
    with fasthyper.use_backend(*how):
        out = fasthyper.ops.grads(*ts, mask)
    for got, truth, wanted in zip(out, oracle.grads(*ts), mask, strict=True):
        if wanted:
            torch.testing.assert_close(got, truth)
        else:
            assert got.shape == (0,)


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("size", [0, 1])
def test_sizes_zero_and_one(axis, size, how, dtype, factors, oracle):
    sizes = [4, 2, 5, 3, 6]
    sizes[axis] = size
    ts = factors(tuple(sizes), dtype)
    with fasthyper.use_backend(*how):
        for op in OPS:
            args = [ts[i] for i in oracle.INPUTS[op]]
            oracle.check_op(op, getattr(fasthyper.ops, op)(*args), *args)
        oracle.check_all(fasthyper.ops.grads(*ts), oracle.grads, *ts)


def test_the_definition_is_one_sum_of_four_factors(factors):
    """Each op of reference.py is T = Σ x z H g with one factor taken out."""
    x, z, weight, g = factors(requires_grad=True)
    total = torch.einsum("bni,br,oir,bno->", x, z, weight, g)
    dx, dz, dh, dg = torch.autograd.grad(total, (x, z, weight, g))
    torch.testing.assert_close(reference.apply(x, z, weight), dg)
    torch.testing.assert_close(reference.cond_grad(x, g, weight), dz)
    torch.testing.assert_close(reference.weight_grad(x, z, g), dh)
    torch.testing.assert_close(reference.apply(g, z, weight.transpose(0, 1)), dx)


def test_the_definition_with_base_and_bias(factors):
    """reference.hyper_linear is T of [x, 1] and [z, 1] with H extended by a row and a column."""
    x, z, weight, bias, base_weight, base_bias = factors(names=factors.AFFINE)
    O, I, R = weight.shape
    extended = torch.zeros(O, I + 1, R + 1, dtype=torch.float64)
    extended[:, :I, :R], extended[:, I, :R] = weight, bias
    extended[:, :I, R], extended[:, I, R] = base_weight, base_bias
    one = torch.ones_like(x[..., :1])
    y = torch.einsum("bni,br,oir->bno", torch.cat([x, one], 2), torch.cat([z, one[:, 0]], 1), extended)
    torch.testing.assert_close(reference.hyper_linear(x, z, weight, bias, base_weight, base_bias), y)
    torch.testing.assert_close(reference.hyper_linear(x, z, weight), reference.apply(x, z, weight))


def test_the_gradient_of_the_input_is_apply_with_the_head_transposed(how, factors, oracle):
    x, z, weight, g = factors()
    with fasthyper.use_backend(*how):
        dx = fasthyper.ops.apply(g, z, weight.transpose(0, 1))
    torch.testing.assert_close(dx, oracle.grads(x, z, weight, g)[0])


# Small sizes; more instances than a block, with odd features; more outputs than a panel; one output.
@pytest.mark.parametrize("sizes", [(9, 2, 5, 3, 6), (40, 1, 37, 9, 7), (37, 3, 7, 9, 35), (70, 1, 8, 6, 1)], ids=str)
def test_a_value_that_is_not_finite_spoils_only_its_instance(sizes, how, dtype, factors):
    """NaN or infinity in one instance reaches no result of another."""
    x, z, weight, g = factors(sizes, dtype)
    x[3], z[5], g[7] = float("nan"), float("inf"), float("nan")
    with fasthyper.use_backend(*how):
        y = fasthyper.ops.apply(x, z, weight)
        dx, dz, _ = fasthyper.ops.grads(x, z, weight, g)
    without = lambda *spoilt: [b for b in range(len(x)) if b not in spoilt]
    assert y[without(3, 5)].isfinite().all()
    assert not y[3].isfinite().any()
    assert not y[5].isfinite().any()
    assert dx[without(5, 7)].isfinite().all()
    assert dz[without(3, 7)].isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_infinity_beside_zero(backend, schedule, dtype, factors):
    """As hyper_linear documents, the result is NaN, except where the schedule forms W: there it is infinite."""
    why = backends.BACKENDS[backend].unavailable() if factors.DEVICE == "cpu" else "factors are on another device"
    if why is not None:
        pytest.skip(f"{backend}: {why}")
    x, z, weight = (torch.rand(size).add(0.5).to(dtype) for size in ((4, 2, 5), (4, 3), (6, 5, 3)))
    x[1, 0, 2], z[1, 0] = float("inf"), 0.0
    with fasthyper.use_backend(backend, schedule):
        y = fasthyper.ops.apply(x, z, weight)
    spoilt = y[1, 0].clone()
    assert (spoilt.isinf() if schedule == "generate" else spoilt.isnan()).all()
    y[1, 0] = 0
    assert y.isfinite().all()
