"""A primary network of two generated layers as one op: what torch expects of an op, and wrong arguments."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from two_layers import (
    NAMES,
    RAW,
    UNREAD,
    WRONG_SHAPES,
    a_and_g,
    arguments,
    primary_function,
    primary_op,
    read_by_backward,
    truth_of,
)

from fasthyper.ops.primary import ACTIVATIONS, activation_of


class TestContract:
    @pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("f", [primary_op, primary_function])
    def test_autocast(self, f, region, activation):
        """The function casts its arguments to the dtype of the region; the op keeps their dtype."""
        args = arguments(dtype=torch.float32, requires_grad=True)
        with torch.autocast("cpu", region):
            y = f(activation)(*args)
            got = torch.autograd.grad(y.float().sum(), args)
        cast = [t.to(region) for t in args] if f is primary_function else args
        expected = f(activation)(*cast)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
        torch.testing.assert_close(got, torch.autograd.grad(expected.float().sum(), args))

    def test_autocast_leaves_float64_alone(self, activation, oracle):
        args = arguments(requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = primary_function(activation)(*args)
        torch.testing.assert_close(y, truth_of(oracle, activation)(*args))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode, oracle):
        args = arguments(requires_grad=True)
        with mode():
            y, a = RAW.primary(*args, "tanh")
        assert not y.requires_grad
        assert not a.requires_grad
        torch.testing.assert_close(y, truth_of(oracle, "tanh")(*args).detach())

    def test_meta_tensors(self, dtype):
        args = [t.to("meta").requires_grad_() for t in arguments(dtype=dtype)]
        y, a = RAW.primary(*args, "relu")
        assert (y.shape, a.shape, y.dtype, a.dtype) == ((4, 2, 6), (4, 2, 7), dtype, dtype)
        assert [d.shape for d in torch.autograd.grad(y.sum(), args)] == [t.shape for t in args]

    def test_forward_saves_what_backward_reads(self):
        """Forward saves a and the inputs that a gradient reads, but neither σ(a) nor generated weights."""
        saved = []
        args = arguments(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, a = RAW.primary(*args, "tanh")
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*read_by_backward(args), a)}
        y.sum().backward()

    def test_saved_tensors_may_be_packed(self, oracle):
        args = arguments(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t + 0):
            y = primary_op("silu")(*args)
        torch.testing.assert_close(
            torch.autograd.grad((y**2).sum(), args),
            torch.autograd.grad((truth_of(oracle, "silu")(*args) ** 2).sum(), args),
        )

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, reentrant, oracle):
        args = arguments(requires_grad=True)
        (checkpoint(primary_op("tanh"), *args, use_reentrant=reentrant) ** 2).sum().backward()
        expected = torch.autograd.grad((truth_of(oracle, "tanh")(*args) ** 2).sum(), args)
        torch.testing.assert_close([t.grad for t in args], list(expected))

    @pytest.mark.parametrize("name", [*NAMES, "a"])
    def test_changes_in_place_are_detected(self, name):
        args = [t.clone() for t in arguments(requires_grad=True)]
        y, a = RAW.primary(*args, "tanh")
        with torch.no_grad():
            dict(zip(NAMES, args, strict=True), a=a)[name].mul_(2)
        if name in UNREAD:
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    def test_backward_twice(self):
        args = arguments(requires_grad=True)
        y = primary_op("tanh")(*args)
        first = torch.autograd.grad(y.sum(), args, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), args), first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), args)

    def test_layers_with_shared_parameters(self, oracle):
        """The gradients of both layers add up."""
        x, z = (torch.randn(4, 3).double().requires_grad_() for _ in range(2))
        layer = [torch.randn(s).double().requires_grad_() for s in ((3, 3, 3), (3, 3), (3, 3), (3,))]

        def grads(f):
            return torch.autograd.grad((f(x[:, None], z, *layer, *layer) ** 2).sum(), (x, z, *layer))

        torch.testing.assert_close(grads(primary_op("tanh")), grads(truth_of(oracle, "tanh")))


class TestErrors:
    @pytest.fixture(params=["eager", "fake", "transform"])
    def surface(self, request):
        if request.param == "fake":
            with FakeTensorMode():
                yield lambda f, *args: f(*args)
        elif request.param == "transform":
            yield lambda f, *args: vmap(lambda one: f(args[0] * one, *args[1:]))(torch.ones(2))
        else:
            yield lambda f, *args: f(*args)

    @pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES)
    def test_wrong_shapes(self, name, shape, surface, fusing):
        args = arguments(dtype=torch.float32, **{name: shape})
        with pytest.raises(ValueError, match=rf"{name} must have shape \(.*, got {re.escape(str(shape))}"):
            surface(lambda *args: RAW.primary(*args, "relu")[0], *args)
        if name not in UNREAD:
            others = (*a_and_g(dtype=torch.float32), [True] * 10, "relu")
            with pytest.raises(ValueError, match=rf"{name} must have shape \(.*, got {re.escape(str(shape))}"):
                surface(lambda *args: RAW.primary_grads(*args, *others)[0], *read_by_backward(args))
        assert fusing.calls == []

    @pytest.mark.parametrize("shape", [(4, 2, 3), (4, 1, 7), (4, 2, 1), (1, 2, 6), (4, 2)])
    @pytest.mark.parametrize("name", ["a", "g"])
    def test_wrong_shapes_of_a_and_g(self, name, shape, surface):
        a, g = torch.randn(shape if name == "a" else (4, 2, 7)), torch.randn(shape if name == "g" else (4, 2, 6))
        args = read_by_backward(arguments(dtype=torch.float32))
        with pytest.raises(ValueError, match=rf"{name} must have shape \(4, 2, .\), got {re.escape(str(shape))}"):
            surface(lambda *args: RAW.primary_grads(*args, a, g, [True] * 10, "relu")[0], *args)

    @pytest.mark.parametrize("name", NAMES)
    def test_wrong_dtypes_and_devices(self, name):
        args = dict(zip(NAMES, arguments(dtype=torch.float32), strict=True))
        with pytest.raises(TypeError, match="must be floating point"):
            RAW.primary(*{**args, name: args[name].long()}.values(), "relu")
        if name == "x":
            return
        with pytest.raises(TypeError, match=f"{name} must have the dtype of x"):
            RAW.primary(*{**args, name: args[name].half()}.values(), "relu")
        with pytest.raises(ValueError, match=f"{name} must be on the device of x"):
            RAW.primary(*{**args, name: args[name].to("meta")}.values(), "relu")

    @pytest.mark.parametrize("f", [primary_op, primary_function])
    def test_an_unknown_activation(self, f, surface):
        with pytest.raises(ValueError, match=r"activation must be one of relu, tanh, .*, got 'mish'"):
            surface(f("mish"), *arguments())

    @pytest.mark.parametrize("length", [0, 6, 9, 11])
    def test_a_mask_of_the_wrong_length(self, length, surface, fusing):
        with pytest.raises(ValueError, match="mask must have 10 entries"):
            surface(
                lambda *args: RAW.primary_grads(*args, [True] * length, "relu")[0],
                *read_by_backward(arguments()),
                *a_and_g(),
            )
        assert fusing.calls == []

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="backend must be one of"):
            RAW.primary(*arguments(), "relu", "none such", "auto")


def test_the_activation_of_a_module():
    known = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "silu": nn.SiLU(), "gelu": nn.GELU()}
    assert {activation_of(module): module for module in known.values()} == known
    assert set(known) == set(ACTIVATIONS)
    assert activation_of(nn.ReLU(inplace=True)) == "relu"
    x = torch.randn(100)
    for name, module in known.items():
        torch.testing.assert_close(ACTIVATIONS[name].forward(x), module(x), rtol=0, atol=0)
    subclass = type("Mine", (nn.ReLU,), {})()
    for module in (
        nn.GELU("tanh"),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.Identity(),
        nn.Dropout(),
        subclass,
        torch.relu,
        None,
    ):
        assert activation_of(module) is None
