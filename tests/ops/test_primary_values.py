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
    arguments,
    present,
    primary_function,
    primary_op,
    read_by_backward,
    truth_of,
    with_gradients,
)

import fasthyper
from fasthyper.ops.primary import ACTIVATIONS


class TestValues:
    def test_values_and_gradients(self, activation, how, dtype, factors, oracle):
        """Errors are at most twice those of einsum in the same dtype, plus the rounding of the result."""
        args, g = [t.to(factors.DEVICE) for t in arguments({"b": 16}, dtype)], torch.randn(16, 2, 6)
        with fasthyper.use_backend(*how):
            got = with_gradients(primary_op(activation), args, g)
        f = truth_of(oracle, activation)
        usual, truth = with_gradients(f, args, g), with_gradients(f, [t.double() for t in args], g.to(dtype))
        for ours, plain, exact in zip(got, usual, truth, strict=True):
            assert (ours.shape, ours.dtype) == (exact.shape, dtype)
            assert ours.is_contiguous()
            # A fold in float32 is one sum over I and R together, and rounds more often than two sums.
            units = {torch.float64: 64, torch.float32: 16}.get(dtype, 4)
            rounding = units * torch.finfo(dtype).eps * exact.abs().max()
            assert (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + rounding

    @pytest.mark.parametrize("absent", range(64))
    def test_any_bias_and_base_may_be_absent(self, absent, oracle):
        absent = [name for k, name in enumerate(OPTIONAL) if absent >> k & 1]
        args, g = arguments(absent=absent), torch.randn(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(primary_op("tanh"), args, g), with_gradients(truth_of(oracle, "tanh"), args, g)
        )

    @pytest.mark.parametrize("axis", SIZES)
    @pytest.mark.parametrize("size", [0, 1])
    def test_sizes_zero_and_one(self, axis, size, how, factors, oracle):
        args = [t.to(factors.DEVICE) for t in arguments({axis: size})]
        g = torch.randn(*({**SIZES, axis: size}[a] for a in "bno"))
        with fasthyper.use_backend(*how):
            got = with_gradients(primary_op("silu"), args, g)
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "silu"), args, g))

    def test_any_strides(self, activation, oracle):
        args = [t.mT.contiguous().mT if t.dim() > 1 else t for t in arguments()]
        args[0] = args[0][:1].expand(4, 2, 3)
        g = torch.ones(1, 1, 1).expand(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(primary_op(activation), args, g), with_gradients(truth_of(oracle, activation), args, g)
        )

    def test_the_pre_activation_is_returned(self, activation, oracle):
        args = arguments()
        _, a = RAW.primary(*args, activation)
        torch.testing.assert_close(a, oracle.linear(*args[:6]))
        assert a.is_contiguous()

    @pytest.mark.parametrize("some", [(), *((k,) for k in range(10)), (0, 6), (1, 7), (2, 3, 4), (5, 9), range(10)])
    def test_the_mask_selects_gradients(self, some, activation, oracle):
        args, g = arguments(), torch.randn(4, 2, 6, dtype=torch.float64)
        mask = [k in some for k in range(10)]
        a = RAW.primary(*args, activation)[1]
        out = RAW.primary_grads(*read_by_backward(args), a, g, mask, activation)
        _, *truth = with_gradients(truth_of(oracle, activation), args, g)
        for got, expected, wanted in zip(out, truth, mask, strict=True):
            if wanted:
                torch.testing.assert_close(got, expected)
            else:
                assert got.shape == (0,)


class TestDerivatives:
    """Derivatives of every order, in reverse and forward mode, of both results: second order passes through `a`."""

    @pytest.mark.parametrize(("activation", "absent"), [*((name, ()) for name in ACTIVATIONS), *SOME_ABSENT])
    def test_gradcheck(self, activation, absent):
        args = arguments(TINY, absent=absent, requires_grad=True)

        def f(*some):
            tensors = iter(some)
            return RAW.primary(*(t if t is None else next(tensors) for t in args), activation)

        checks = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
        assert gradcheck(f, present(args), **checks)
        assert gradgradcheck(f, present(args), check_fwd_over_rev=True, check_batched_grad=True)

    def test_gradcheck_of_primary_grads(self, activation):
        """`primary_grads` is differentiable in ten tensors, too: eight arguments of `primary`, a and g."""
        args = [t.requires_grad_() for t in (*read_by_backward(arguments(TINY)), *a_and_g(TINY))]
        f = lambda *args: RAW.primary_grads(*args, [True] * 10, activation)
        assert gradcheck(f, args, check_forward_ad=True)

    @pytest.mark.parametrize("f", [primary_op, primary_function])
    def test_three_orders(self, f, activation, oracle):
        def derivatives(f, args):
            leaves = [t.detach().requires_grad_() for t in args]
            total, found = (f(*leaves) ** 3).sum(), []
            for _ in range(3):
                grads = torch.autograd.grad(total, leaves, create_graph=True)
                found += [t.detach() for t in grads]
                total = sum((t**2).sum() for t in grads)
            return found

        args = arguments(SMALL)
        torch.testing.assert_close(derivatives(f(activation), args), derivatives(truth_of(oracle, activation), args))

    @pytest.mark.parametrize("some", [*((k,) for k in range(10)), (0, 1), (2, 6), (5, 9), (1, 3, 7)])
    def test_two_orders_of_some_arguments(self, some, oracle):
        args = arguments(SMALL)

        def grads(f):
            leaves = [t.detach().requires_grad_(k in some) for k, t in enumerate(args)]
            wanted = [leaves[k] for k in some]
            first = torch.autograd.grad((f(*leaves) ** 2).sum(), wanted, create_graph=True)
            return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), wanted)

        torch.testing.assert_close(grads(primary_op("gelu")), grads(truth_of(oracle, "gelu")))

    def test_gradients_through_the_pre_activation(self, oracle):
        """The loss reads a alone, or a and y."""
        args = arguments(requires_grad=True)
        y, a = RAW.primary(*args, "silu")
        h = oracle.linear(*args[:6])
        truth = truth_of(oracle, "silu")(*args)
        for loss, expected in (
            ((a**2).sum(), (h**2).sum()),
            ((a * 3).sum() + (y**2).sum(), (h * 3).sum() + (truth**2).sum()),
        ):
            torch.testing.assert_close(
                torch.autograd.grad(loss, args[:6], retain_graph=True),
                torch.autograd.grad(expected, args[:6], retain_graph=True),
            )

    def test_the_pre_activation_has_no_gradient_in_the_second_layer(self):
        args = arguments()
        args[6].requires_grad_()
        _, a = RAW.primary(*args, "silu")
        (d,) = torch.autograd.grad(a.sum(), args[6], allow_unused=True)
        assert d is None or not d.any()

    def test_forward_mode_with_some_tangents(self, activation, oracle):
        args, tangents = arguments(SMALL), arguments(SMALL)
        for some in ((0,), (1,), (2, 7), (6,), ALL):

            def tangent(f, some=some):
                with forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(t, d) if k in some else t
                        for k, (t, d) in enumerate(zip(args, tangents, strict=True))
                    ]
                    return forward_ad.unpack_dual(f(*duals))

            expected = tangent(truth_of(oracle, activation))
            torch.testing.assert_close(tangent(primary_op(activation)), expected)
            torch.testing.assert_close(tangent(primary_function(activation)), expected)

    @pytest.mark.parametrize(("activation", "absent"), [*((name, ()) for name in ACTIVATIONS), *SOME_ABSENT])
    def test_opcheck(self, activation, absent):
        args = arguments(TINY, absent=absent, requires_grad=True)
        forced = ("aten", "fold") if absent else ()
        out = torch.library.opcheck(RAW.primary.default, (*args, activation, *forced))
        assert set(out.values()) == {"SUCCESS"}
        tensors = [t if t is None else t.requires_grad_() for t in (*read_by_backward(args), *a_and_g(TINY))]
        mask = [True, False] * 5 if absent else [True] * 10
        out = torch.library.opcheck(RAW.primary_grads.default, (*tensors, mask, activation, *forced))
        assert set(out.values()) == {"SUCCESS"}
