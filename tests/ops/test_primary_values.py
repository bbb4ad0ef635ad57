"""A primary network of two generated layers as one op: values and derivatives of every order."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from two_layers import (
    ALL,
    OPTIONAL,
    RAW,
    SIZES,
    SMALL,
    SOME_ABSENT,
    TINY,
    a_and_g,
    fused,
    given,
    layers,
    make,
    reads,
    truth_of,
    with_gradients,
)

import fasthyper
from fasthyper.ops.primary import ACTIVATIONS


class TestValues:
    def test_values_and_gradients(self, activation, how, dtype, factors, oracle):
        """At most twice as far off as einsum in the same dtype, but for the rounding of the results."""
        args, g = [t.to(factors.DEVICE) for t in make({"b": 16}, dtype)], torch.randn(16, 2, 6)
        with fasthyper.use_backend(*how):
            got = with_gradients(fused(activation), args, g)
        f = truth_of(oracle, activation)
        usual, truth = with_gradients(f, args, g), with_gradients(f, [t.double() for t in args], g.to(dtype))
        for mine, theirs, right in zip(got, usual, truth, strict=True):
            assert (mine.shape, mine.dtype) == (right.shape, dtype)
            assert mine.is_contiguous()
            # A fold in float32 is one sum over both I and R, and adds up more rounding than two sums do.
            units = {torch.float64: 64, torch.float32: 16}.get(dtype, 4)
            rounding = units * torch.finfo(dtype).eps * right.abs().max()
            assert (mine.double() - right).abs().max() <= 2 * (theirs.double() - right).abs().max() + rounding

    @pytest.mark.parametrize("absent", range(64))
    def test_any_of_bias_and_base(self, absent, oracle):
        absent = [name for k, name in enumerate(OPTIONAL) if absent >> k & 1]
        args, g = make(absent=absent), torch.randn(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(fused("tanh"), args, g), with_gradients(truth_of(oracle, "tanh"), args, g)
        )

    @pytest.mark.parametrize("axis", SIZES)
    @pytest.mark.parametrize("size", [0, 1])
    def test_a_size_of_nothing_or_one(self, axis, size, how, factors, oracle):
        args = [t.to(factors.DEVICE) for t in make({axis: size})]
        g = torch.randn(*({**SIZES, axis: size}[a] for a in "bno"))
        with fasthyper.use_backend(*how):
            got = with_gradients(fused("silu"), args, g)
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "silu"), args, g))

    def test_any_strides(self, activation, oracle):
        args = [t.mT.contiguous().mT if t.dim() > 1 else t for t in make()]
        args[0] = args[0][:1].expand(4, 2, 3)
        g = torch.ones(1, 1, 1).expand(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(fused(activation), args, g), with_gradients(truth_of(oracle, activation), args, g)
        )

    def test_the_pre_activation(self, activation, oracle):
        args = make()
        _, a = RAW.primary(*args, activation)
        torch.testing.assert_close(a, oracle.linear(*args[:6]))
        assert a.is_contiguous()

    @pytest.mark.parametrize("some", [(), *((k,) for k in range(10)), (0, 6), (1, 7), (2, 3, 4), (5, 9), range(10)])
    def test_gradients_by_mask(self, some, activation, oracle):
        args, g = make(), torch.randn(4, 2, 6, dtype=torch.float64)
        mask = [k in some for k in range(10)]
        a = RAW.primary(*args, activation)[1]
        out = RAW.primary_grads(*reads(args), a, g, mask, activation)
        _, *truth = with_gradients(truth_of(oracle, activation), args, g)
        for got, right, wanted in zip(out, truth, mask, strict=True):
            if wanted:
                torch.testing.assert_close(got, right)
            else:
                assert got.shape == (0,)


class TestDerivatives:
    """Of every order, reverse and forward; y and a, which the second order comes in through."""

    @pytest.mark.parametrize(("activation", "absent"), [*((name, ()) for name in ACTIVATIONS), *SOME_ABSENT])
    def test_gradcheck(self, activation, absent):
        args = make(TINY, absent=absent, requires_grad=True)

        def f(*some):
            tensors = iter(some)
            return RAW.primary(*(t if t is None else next(tensors) for t in args), activation)

        checks = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
        assert gradcheck(f, given(args), **checks)
        assert gradgradcheck(f, given(args), check_fwd_over_rev=True, check_batched_grad=True)

    def test_of_the_gradients_themselves(self, activation):
        """`primary_grads` is a function of ten tensors as well, a and g among them."""
        args = [t.requires_grad_() for t in (*reads(make(TINY)), *a_and_g(TINY))]
        f = lambda *args: RAW.primary_grads(*args, [True] * 10, activation)
        assert gradcheck(f, args, check_forward_ad=True)

    @pytest.mark.parametrize("f", [fused, layers])
    def test_third_order(self, f, activation, oracle):
        def derivatives(f, args):
            leaves = [t.detach().requires_grad_() for t in args]
            total, found = (f(*leaves) ** 3).sum(), []
            for _ in range(3):
                grads = torch.autograd.grad(total, leaves, create_graph=True)
                found += [t.detach() for t in grads]
                total = sum((t**2).sum() for t in grads)
            return found

        args = make(SMALL)
        torch.testing.assert_close(derivatives(f(activation), args), derivatives(truth_of(oracle, activation), args))

    @pytest.mark.parametrize("some", [*((k,) for k in range(10)), (0, 1), (2, 6), (5, 9), (1, 3, 7)])
    def test_two_orders_of_some(self, some, oracle):
        args = make(SMALL)

        def grads(f):
            leaves = [t.detach().requires_grad_(k in some) for k, t in enumerate(args)]
            wanted = [leaves[k] for k in some]
            first = torch.autograd.grad((f(*leaves) ** 2).sum(), wanted, create_graph=True)
            return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), wanted)

        torch.testing.assert_close(grads(fused("gelu")), grads(truth_of(oracle, "gelu")))

    def test_what_else_reads_the_pre_activation(self, oracle):
        """Only y, only a, or both: where a meets no gradient, it costs none."""
        args = make(requires_grad=True)
        y, a = RAW.primary(*args, "silu")
        h = oracle.linear(*args[:6])
        right = truth_of(oracle, "silu")(*args)
        for mine, theirs in (
            ((a**2).sum(), (h**2).sum()),
            ((a * 3).sum() + (y**2).sum(), (h * 3).sum() + (right**2).sum()),
        ):
            torch.testing.assert_close(
                torch.autograd.grad(mine, args[:6], retain_graph=True),
                torch.autograd.grad(theirs, args[:6], retain_graph=True),
            )

    def test_a_pre_activation_of_constants(self):
        args = make()
        args[6].requires_grad_()
        _, a = RAW.primary(*args, "silu")
        (d,) = torch.autograd.grad(a.sum(), args[6], allow_unused=True)
        assert d is None or not d.any()

    def test_forward_mode_with_some_tangents(self, activation, oracle):
        args, dots = make(SMALL), make(SMALL)
        for some in ((0,), (1,), (2, 7), (6,), ALL):

            def tangent(f, some=some):
                with forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(t, d) if k in some else t
                        for k, (t, d) in enumerate(zip(args, dots, strict=True))
                    ]
                    return forward_ad.unpack_dual(f(*duals))

            expected = tangent(truth_of(oracle, activation))
            torch.testing.assert_close(tangent(fused(activation)), expected)
            torch.testing.assert_close(tangent(layers(activation)), expected)

    @pytest.mark.parametrize(("activation", "absent"), [*((name, ()) for name in ACTIVATIONS), *SOME_ABSENT])
    def test_opcheck(self, activation, absent):
        args = make(TINY, absent=absent, requires_grad=True)
        forced = ("aten", "fold") if absent else ()
        out = torch.library.opcheck(RAW.primary.default, (*args, activation, *forced))
        assert set(out.values()) == {"SUCCESS"}
        tensors = [t if t is None else t.requires_grad_() for t in (*reads(args), *a_and_g(TINY))]
        mask = [True, False] * 5 if absent else [True] * 10
        out = torch.library.opcheck(RAW.primary_grads.default, (*tensors, mask, activation, *forced))
        assert set(out.values()) == {"SUCCESS"}
