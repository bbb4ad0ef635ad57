"""Ragged points by a product for each condition, for sizes and layouts that the planner would leave to other ways."""

from __future__ import annotations

import itertools

import pytest
import torch

from fasthyper.backends.aten import grouped, tiling
from fasthyper.backends.aten.tiling import Tiling
from fasthyper.ops import reference
from fasthyper.terms import Terms

C, R, I, O = 5, 6, 7, 4
COUNTS = (3, 0, 11, 1, 8)
DOUBLE = Tiling(40, torch.float64, torch.float64)  # some points and a part of H at a time
LOW = Tiling(40, torch.bfloat16, torch.float32)


def problem(in_order: bool, transposed: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    cond = torch.repeat_interleave(torch.arange(C), torch.tensor(COUNTS))
    E = len(cond)
    cond = cond if in_order else cond[torch.randperm(E)]
    x, z, g = torch.randn(E, 1, I, dtype=dtype), torch.randn(C, R, dtype=dtype), torch.randn(E, 1, O, dtype=dtype)
    weight = torch.randn(I, O, R, dtype=dtype).transpose(0, 1) if transposed else torch.randn(O, I, R, dtype=dtype)
    return x, z, weight, g, Terms(None, cond, None, E, C, E)


def expected(x, z, weight, g, terms):
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, z, weight)]
    y = reference.apply_terms(*leaves, terms=terms)
    return y, *torch.autograd.grad(y, leaves, g.double())


@pytest.mark.parametrize("longest", [1, 1024])
@pytest.mark.parametrize(("in_order", "transposed"), [*itertools.product([True, False], repeat=2)])
def test_products_of_conditions(in_order, transposed, longest, monkeypatch):
    """Points that lie together or not, a head that is a matrix or not, and both ways to read it, a block at a time."""
    monkeypatch.setattr(grouped, "_BLOCK", 5 * R)
    monkeypatch.setattr(grouped, "_LONGEST", longest)
    x, z, weight, g, terms = problem(in_order, transposed, torch.float64)
    y, *grads = expected(x, z, weight, g, terms)
    torch.testing.assert_close(grouped.apply(x, z, weight, terms, DOUBLE), y)
    for mask in itertools.product([True, False], repeat=3):
        found = grouped.grads(x, z, weight, g, mask, terms, DOUBLE)
        for result, right, wanted in zip(found, grads, mask, strict=True):
            assert (result is not None) == wanted
            if wanted:
                torch.testing.assert_close(result, right)


def test_points_that_lie_together_are_not_copied(monkeypatch):
    """A product writes the rows of a result, however many points a condition has."""
    x, z, weight, _, terms = problem(True, False, torch.float64)
    written = []
    real = torch.mm

    def mm(*args, **kwargs):
        if kwargs.get("out") is not None:
            written.append(len(kwargs["out"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    grouped.apply(x, z, weight, terms, DOUBLE)
    assert [n for n in written if n] == [n for n in COUNTS if n]


def test_sixteen_bits_round_once():
    """dz and dH of bfloat16 are as near as those of one product."""
    x, z, weight, g, terms = problem(True, False, torch.bfloat16)
    found = grouped.apply(x, z, weight, terms, LOW), *grouped.grads(x, z, weight, g, (True,) * 3, terms, LOW)
    for result, right in zip(found, expected(x, z, weight, g, terms), strict=True):
        assert result.dtype == torch.bfloat16
        assert (result.double() - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("native", [False, True])
def test_many_blocks_of_points_in_sixteen_bits(native, native_low_precision, monkeypatch):
    """dW of points that do not lie together is a sum over blocks: in bfloat16 it would stay at 512."""
    monkeypatch.setattr(tiling, "_SMALL", 1)
    E = 1800
    cond = torch.arange(E) % 2
    x, g = torch.ones(E, 1, I).bfloat16(), torch.ones(E, 1, O).bfloat16()
    z, weight = torch.eye(2, 3).bfloat16(), torch.ones(O, I, 3).bfloat16()
    with native_low_precision(native):
        _, dz, dh = grouped.grads(x, z, weight, g, (True,) * 3, Terms(None, cond, None, E, 2, E), LOW)
    assert dh.equal(torch.tensor([900.0, 900.0, 0.0]).expand(O, I, 3).bfloat16())
    assert dz.equal(torch.full((2, 3), 900.0 * O * I).bfloat16())


@pytest.mark.parametrize("native", [False, True])
def test_a_head_without_a_matrix_in_sixteen_bits(native, native_low_precision, monkeypatch):
    """dz is a sum over pieces of H: in bfloat16 it would stay at 1024."""
    monkeypatch.setattr(tiling, "_SMALL", 1)
    x, g = torch.ones(3, 1, 3).bfloat16(), torch.ones(3, 1, 400).bfloat16()
    z, weight = torch.ones(3, 5).bfloat16(), torch.ones(400, 5, 3).bfloat16().transpose(1, 2)
    terms = Terms(None, torch.arange(3), None, 3, 3, 3)
    with native_low_precision(native):
        _, dz, _ = grouped.grads(x, z, weight, g, (False, True, False), terms, LOW)
    assert dz.dtype == torch.bfloat16
    assert dz.eq(1200).all()
