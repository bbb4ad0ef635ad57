"""Every op, on every backend and schedule, in every dtype, against the einsum of the identity."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper.ops import reference

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
def test_grads_by_mask(mask, how, factors, oracle):
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
def test_a_size_of_nothing_or_one(axis, size, how, dtype, factors, oracle):
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


def test_nothing_leaks_from_a_value_that_is_not_finite(how, dtype, factors):
    """An instance with NaN or infinity spoils itself alone."""
    x, z, weight, g = factors((9, 2, 5, 3, 6), dtype)
    x[3], z[5], g[7] = float("nan"), float("inf"), float("nan")
    with fasthyper.use_backend(*how):
        y = fasthyper.ops.apply(x, z, weight)
        dx, dz, _ = fasthyper.ops.grads(x, z, weight, g)
    finite = [b for b in range(9) if b not in (3, 5)]
    assert y[finite].isfinite().all()
    assert not y[3].isfinite().any()
    assert not y[5].isfinite().any()
    assert dx[[0, 1, 2, 3, 4, 6, 8]].isfinite().all()
    assert dz[[0, 1, 2, 4, 5, 6, 8]].isfinite().all()
