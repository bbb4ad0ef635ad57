"""Calls of the CUDA kernels that need no Python: csrc/eager on a pretended GPU, with the emulated kernels."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper import planner, seen
from fasthyper.backends import cuda, triton

NAMES = ("x", "z", "weight", "bias", "base_weight", "g")


@pytest.fixture(autouse=True)
def nothing_planned():
    planner.forget()


@pytest.fixture
def python(monkeypatch):
    """Return the calls that went through Python."""
    calls = []
    for module in (cuda, triton):
        for name in ("apply", "grads"):
            of = getattr(module, name)

            def spy(*args, module=module, name=name, of=of, **options):
                calls.append((module.__name__.rpartition(".")[2], name))
                return (of if module is cuda else getattr(fasthyper.backends.aten, name))(*args, **options)

            monkeypatch.setattr(module, name, spy)
    return calls


def step(args):
    """Return y and the gradients of x, z, H, bias and W0."""
    *leaves, g = (t.detach().requires_grad_() for t in args)
    x, z, weight, bias, base_weight = leaves
    y = fasthyper.hyper_linear(x, z, weight, bias, base_weight=base_weight)
    return y, *torch.autograd.grad(y, leaves, g)


def check(args, oracle):
    y, *gradients = step(args)
    oracle.check_linear(args, (y.detach(), *gradients, args[-1].double().sum((0, 1)).to(y.dtype)))


ONCE = [("cuda", "apply"), ("cuda", "grads")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(40, 1, 16, 5, 6), (12, 3, 16, 5, 6), (1, 7, 4, 3, 1)], ids=str)
def test_later_calls_need_no_python(sizes, dtype, factors, oracle, python):
    with fasthyper.use_backend("cuda"):
        check(factors(sizes, dtype, NAMES), oracle)
        assert python == ONCE
        for strides in ("contiguous", "transposed", "sliced"):
            check(factors(sizes, dtype, NAMES, strides), oracle)
        assert python == ONCE


def test_other_problems_are_planned_first(factors, python):
    changes = [
        lambda: None,
        lambda: fasthyper.set_workspace_limit(8 << 20),
        lambda: planner.forget(),
    ]
    with fasthyper.use_backend("cuda"):
        for change in changes:
            change()
            for _ in range(2):
                step(factors((4, 1, 3, 5, 6), torch.float32, NAMES))
            assert python == ONCE
            python.clear()
        step(factors((5, 1, 3, 5, 6), torch.float32, NAMES))
        step(factors((4, 1, 3, 5, 6), torch.bfloat16, NAMES))
    assert python == ONCE * 2


def test_tensors_on_two_devices_are_refused(factors):
    x, z, weight, *_ = factors((4, 1, 3, 5, 6), torch.float32)
    with fasthyper.use_backend("cuda"):
        for _ in range(3):
            fasthyper.hyper_linear(x, z, weight)
            with pytest.raises(ValueError, match="z"):
                fasthyper.hyper_linear(x, z.cpu(), weight)


def test_gradients_of_gradients(factors):
    x, z, weight, *_ = factors((4, 2, 3, 5, 6), torch.float32, requires_grad=True)
    with fasthyper.use_backend("cuda"):
        for _ in range(3):
            y = fasthyper.hyper_linear(x, z, weight)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found = torch.autograd.grad(dx.square().sum(), (x, z, weight))
    y = torch.einsum("bni,br,oir->bno", x.double(), z.double(), weight.double())
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for a, b in zip(found, torch.autograd.grad(dx.square().sum(), (x, z, weight)), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_forward_mode(factors):
    """Tangents of factors that have none are tensors without memory."""
    x, z, weight, _, base_weight, _ = factors((4, 2, 3, 5, 6), torch.float32, NAMES)
    tangent = torch.randn_like(x)
    with fasthyper.use_backend("cuda"):
        for _ in range(3):
            fasthyper.hyper_linear(x, z, weight, base_weight=base_weight)
            call = lambda x: fasthyper.hyper_linear(x, z, weight, base_weight=base_weight)
            y, found = torch.func.jvp(call, (x,), (tangent,))
    generated = torch.einsum("br,oir->boi", z.double(), weight.double()) + base_weight.double()
    for a, b in ((y, x), (found, tangent)):
        torch.testing.assert_close(
            a.double(), torch.einsum("bni,boi->bno", b.double(), generated), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_wanted_gradients_are_computed(wanted, factors):
    args = factors((4, 2, 3, 5, 6), torch.float32)
    for turn in range(3):
        leaves = [t.detach().requires_grad_(bool(wanted >> k & 1)) for k, t in enumerate(args[:3])]
        with fasthyper.use_backend("cuda"):
            y = fasthyper.hyper_linear(*leaves)
        y.backward(args[-1])
        exact = [t.detach().double().requires_grad_() for t in args[:3]]
        torch.einsum("bni,br,oir->bno", *exact).backward(args[-1].double())
        for k, (mine, true) in enumerate(zip(leaves, exact, strict=True)):
            if wanted >> k & 1:
                torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-5)
            else:
                assert mine.grad is None, turn


class TestAuto:
    """Small problems go to the CUDA kernels where a GPU has shown them to be right; others to Triton's."""

    @pytest.fixture
    def shown(self, monkeypatch):
        monkeypatch.setattr(triton, "unavailable", lambda: None)

        def show(*right):
            run = seen.Run("a pretended GPU", "sm_90", "2026-01-01", "2.13", "3.7", "abc", right)
            monkeypatch.setattr(seen, "runs", lambda: (run,))

        return show

    def test_small_problems(self, shown, factors, python):
        shown("cuda")
        for _ in range(3):
            step(factors((4, 1, 3, 5, 6), torch.float32, NAMES))
        assert python == ONCE

    def test_large_problems(self, shown, factors, python, monkeypatch):
        shown("cuda")
        monkeypatch.setattr(cuda, "_SMALL", 100)
        step(factors((4, 1, 3, 5, 6), torch.float32, NAMES))
        assert python == [("triton", "apply"), ("triton", "grads")]

    @pytest.mark.parametrize("right", [(), ("triton",)])
    def test_not_shown(self, right, shown, factors, python):
        shown(*right)
        step(factors((4, 1, 3, 5, 6), torch.float32, NAMES))
        assert python == [("triton", "apply"), ("triton", "grads")]

    def test_a_forced_backend_leaves_auto_as_it_is(self, shown, factors, python):
        shown()
        args = factors((4, 1, 3, 5, 6), torch.float32, NAMES)
        with fasthyper.use_backend("cuda"):
            step(args), step(args)
        python.clear()
        step(args)
        assert python == [("triton", "apply"), ("triton", "grads")]
