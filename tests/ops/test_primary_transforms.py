"""A primary network of two generated layers as one op: torch.func, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from two_layers import (
    ALL,
    SMALL,
    TINY,
    TRANSFORMS,
    arguments,
    primary_function,
    primary_op,
    squared,
    truth_of,
    with_gradients,
)

from fasthyper.fused import hyper_primary


class TestTransforms:
    @pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
    @pytest.mark.parametrize("f", [primary_op, primary_function])
    def test_transforms_match_einsum(self, f, transform, activation, oracle):
        args = arguments(TINY)
        torch.testing.assert_close(transform(f(activation))(*args), transform(truth_of(oracle, activation))(*args))

    @pytest.mark.parametrize("batched", [(k,) for k in range(10)] + [(0, 1), (2, 6), (0, 6), (1, 2, 3)])
    def test_vmap_over_some_arguments(self, batched, oracle):
        one, many = arguments(SMALL), arguments(SMALL, lead=(3,))
        dims = tuple(0 if k in batched else None for k in range(10))
        args = [many[k] if k in batched else one[k] for k in range(10)]
        f, truth = primary_op("tanh"), truth_of(oracle, "tanh")
        torch.testing.assert_close(vmap(f, dims)(*args), vmap(truth, dims)(*args))
        gradients = lambda f: vmap(grad(squared(f), ALL), dims)(*args)
        torch.testing.assert_close(gradients(f), gradients(truth))

    @pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap of grad"])
    def test_backward_through_a_transform(self, transform, oracle):
        def through(f):
            leaves = [t.clone().requires_grad_() for t in args]
            out = torch.utils._pytree.tree_leaves(TRANSFORMS[transform](f)(*leaves))
            return torch.autograd.grad(sum((t**2).sum() for t in out), leaves, materialize_grads=True)

        args = arguments(TINY)
        torch.testing.assert_close(through(primary_op("gelu")), through(truth_of(oracle, "gelu")))


class TestCompiled:
    @pytest.mark.parametrize("f", [primary_op, primary_function])
    def test_forward_and_backward(self, f, activation, compiled, oracle):
        g = compiled(f(activation))
        for batch in (4, 5, 8):
            args, cotangent = arguments({"b": batch}), torch.randn(batch, 2, 6)
            torch.testing.assert_close(
                with_gradients(g, args, cotangent), with_gradients(truth_of(oracle, activation), args, cotangent)
            )

    def test_inductor(self, compiled, oracle):
        args, g = arguments(), torch.randn(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(compiled(primary_op("silu"), "inductor"), args, g),
            with_gradients(truth_of(oracle, "silu"), args, g),
        )

    @pytest.mark.parametrize("transform", ["grad", "jvp of grad", "vmap of grad"])
    def test_a_transform_in_a_compiled_region(self, transform, compiled, oracle):
        args, over = arguments(TINY), TRANSFORMS[transform]
        torch.testing.assert_close(compiled(over(primary_op("tanh")))(*args), over(truth_of(oracle, "tanh"))(*args))

    def test_compiled_autograd(self):
        args = arguments(requires_grad=True)
        loss = (primary_op("tanh")(*args) ** 2).sum()
        expected = torch.autograd.grad(loss, args, retain_graph=True)
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
        torch.testing.assert_close([t.grad for t in args], list(expected))

    def test_export(self, oracle):
        class Net(nn.Module):
            def forward(self, *args):
                return hyper_primary(args[0], args[1], args[2:6], args[6:], "relu")

        args = tuple(arguments())
        torch.testing.assert_close(torch.export.export(Net(), args).module()(*args), truth_of(oracle, "relu")(*args))
