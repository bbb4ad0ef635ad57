"""Derivatives of every order, reverse and forward, of the ops and of hyper_linear."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fasthyper
from fasthyper import hyper_linear

SMALL = (3, 2, 3, 2, 4)


def affine(x, z, weight, bias, base_weight, base_bias):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


FUNCTIONS = {
    "apply": (fasthyper.ops.apply, ("x", "z", "weight")),
    "cond_grad": (fasthyper.ops.cond_grad, ("x", "g", "weight")),
    "weight_grad": (fasthyper.ops.weight_grad, ("x", "z", "g")),
    "grads": (fasthyper.ops.grads, ("x", "z", "weight", "g")),
    "grads of x and H": (lambda *a: fasthyper.ops.grads(*a, (True, False, True))[::2], ("x", "z", "weight", "g")),
    "hyper_linear": (hyper_linear, ("x", "z", "weight")),
    "affine": (affine, ("x", "z", "weight", "bias", "base_weight", "base_bias")),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_gradcheck(function, strides, factors):
    f, names = function
    args = factors(SMALL, names=names, strides=strides, requires_grad=True)
    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


def test_gradgradcheck(function, factors):
    f, names = function
    args = factors(SMALL, names=names, requires_grad=True)
    assert gradgradcheck(f, args, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_gradgradcheck_on_every_backend_and_schedule(how, factors):
    args = factors(SMALL, names=factors.AFFINE, requires_grad=True)
    with fasthyper.use_backend(*how):
        assert gradcheck(affine, args, check_forward_ad=True)
        assert gradgradcheck(affine, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_gradgradcheck_with_any_number_of_point_axes(shape, factors):
    _, z, weight, bias, base_weight, base_bias = factors(SMALL, names=factors.AFFINE, requires_grad=True)
    x = torch.randn(SMALL[0], *shape, SMALL[3], dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(affine, (x, z, weight, bias, base_weight, base_bias), check_fwd_over_rev=True)


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("size", [0, 1])
def test_gradgradcheck_with_sizes_zero_and_one(axis, size, factors):
    sizes = list(SMALL)
    sizes[axis] = size
    args = factors(tuple(sizes), names=factors.AFFINE, requires_grad=True)
    assert gradgradcheck(affine, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("some", range(1, 64))
def test_gradients_of_some_arguments(some, factors, oracle):
    """First and second order for each subset of the six arguments; the others are constants."""
    args = factors(SMALL, names=factors.AFFINE)
    wanted = [t.requires_grad_() for k, t in enumerate(args) if some >> k & 1]
    got, expected = ([*grads_of_two_orders(f, args, wanted)] for f in (affine, oracle.linear))
    torch.testing.assert_close(got, expected)


def grads_of_two_orders(f, args, wanted):
    first = torch.autograd.grad((f(*args) ** 2).sum(), wanted, create_graph=True)
    return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), wanted)


@pytest.mark.parametrize("f", [fasthyper.ops.apply, hyper_linear])
def test_fourth_order(f, factors, oracle):
    def derivatives(f):
        x, z, weight, _ = factors(SMALL)
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in (x, z, weight)]
        total, found = (f(*leaves) ** 3).sum(), []
        for _ in range(4):
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            found += [t.detach() for t in grads]
            total = sum((t**2).sum() for t in grads)
        return found

    torch.manual_seed(0)
    got = derivatives(f)
    torch.manual_seed(0)
    torch.testing.assert_close(got, derivatives(oracle.linear))


@pytest.mark.parametrize("some", range(1, 8))
def test_forward_mode_with_some_tangents(some, factors, oracle):
    args, tangents = factors(SMALL)[:3], factors(SMALL)[:3]

    def tangent(f):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, d) if some >> k & 1 else t
                for k, (t, d) in enumerate(zip(args, tangents, strict=True))
            ]
            return forward_ad.unpack_dual(f(*duals))

    for f in (fasthyper.ops.apply, hyper_linear):
        torch.testing.assert_close(tangent(f), tangent(oracle.linear))


def test_forward_mode_is_differentiable_in_reverse(factors, oracle):
    x, z, weight, _ = factors(SMALL, requires_grad=True)
    tangent = torch.randn_like(z)

    def through(f):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(z, tangent)
            dy = forward_ad.unpack_dual(f(x, dual, weight)).tangent
            return torch.autograd.grad((dy**2).sum(), (x, weight))

    for f in (fasthyper.ops.apply, hyper_linear):
        torch.testing.assert_close(through(f), through(oracle.linear))


def test_the_gradient_of_a_transposed_head(factors, oracle, how):
    """The head as a view Hᵀ of a leaf of shape (I, O, R)."""
    x, z, weight, g = factors()
    leaf = weight.transpose(0, 1).contiguous().requires_grad_()
    with fasthyper.use_backend(*how):
        y = hyper_linear(x, z, leaf.transpose(0, 1))
    (dh,) = torch.autograd.grad(y, leaf, g)
    torch.testing.assert_close(dh, oracle.grads(x, z, weight, g)[2].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expanded_gradient(dtype, how, factors, oracle):
    """sum().backward() passes a gradient with strides (0, 0, 0)."""
    x, z, weight, bias, base_weight, base_bias = factors(dtype=dtype, names=factors.AFFINE, requires_grad=True)
    with fasthyper.use_backend(*how):
        y = affine(x, z, weight, bias, base_weight, base_bias)
    got = torch.autograd.grad(y.sum(), (x, z, weight, bias, base_weight, base_bias))
    oracle.check_all(got, oracle.linear_grads, x, z, weight, bias, base_weight, torch.ones_like(y))


@pytest.mark.parametrize("which", ["x", "z"])
def test_an_expanded_leaf(which, how, factors, oracle):
    """One x or one z for all instances, expanded: the gradient of the leaf is the sum over instances."""
    x, z, weight, g = factors()
    leaves = {"x": x[:1].clone().requires_grad_(), "z": z[:1].clone().requires_grad_()}
    args = {"x": x, "z": z, which: leaves[which].expand(len(x), *leaves[which].shape[1:])}
    with fasthyper.use_backend(*how):
        y = hyper_linear(args["x"], args["z"], weight)
    (got,) = torch.autograd.grad(y, leaves[which], g)
    truth = oracle.grads(args["x"], args["z"], weight, g)["xz".index(which)]
    torch.testing.assert_close(got, truth.sum(0, keepdim=True))


OPCHECKS = {
    "apply": ("x", "z", "weight"),
    "cond_grad": ("x", "g", "weight"),
    "weight_grad": ("x", "z", "g"),
    "grads": ("x", "z", "weight", "g", [True, False, True]),
    "hyper_linear": ("x", "z", "weight", "bias", "base_weight", "base_bias"),
    "hyper_linear without bias and base": ("x", "z", "weight", None, None, None),
    "hyper_linear_grads": ("x", "z", "weight", "bias", "base_weight", "g", [True, True, True, False, True, True]),
    "hyper_linear_grads without bias and base": (
        "x",
        "z",
        "weight",
        None,
        None,
        "g",
        [False, True, True, False, False, False],
    ),
}


@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("forced", [(), ("aten", "fold"), ("materialised", "auto")])
def test_opcheck(case, forced, factors):
    names = [a for a in OPCHECKS[case] if isinstance(a, str)]
    tensors = dict(zip(names, factors(names=tuple(names), requires_grad=True), strict=True))
    args = [tensors[a] if isinstance(a, str) else a for a in OPCHECKS[case]]
    op = getattr(torch.ops.fasthyper, case.split()[0]).default
    results = torch.library.opcheck(op, (*args, *forced))
    assert set(results.values()) == {"SUCCESS"}


def test_every_registered_op_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "fasthyper::" in name}
    elsewhere = {"primary", "primary_grads", "pairs", "pairs_grads"}  # test_primary_values.py, test_pairs.py
    elsewhere |= {"mapped_linear", "mapped_linear_grads"}  # test_mapped_transforms.py
    elsewhere |= {name for name in registered if "_terms" in name}  # test_terms.py
    elsewhere |= {name for name in registered if "conv" in name}  # test_conv_transforms.py
    elsewhere |= {"apply_groups", "weight_grad_groups"}  # test_adapters.py
    elsewhere |= {name for name in registered if name.endswith("_models")}  # test_models.py
    assert registered == {case.split()[0] for case in OPCHECKS} | elsewhere


def test_compiled_autograd():
    x, z, weight = (torch.randn(s, requires_grad=True) for s in ((3, 2, 4), (3, 5), (6, 4, 5)))
    y = fasthyper.hyper_linear(x, z, weight).square().sum()
    expected = torch.autograd.grad(y, [x, z, weight], retain_graph=True)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="eager")(y)
    torch.testing.assert_close((x.grad, z.grad, weight.grad), expected)
