"""torch.func over the ops and hyper_linear in eager mode: transforms, and transforms of transforms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd.functional import hvp, jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

import fasthyper
from fasthyper import hyper_linear

SMALL = (3, 2, 3, 4, 2)
FUNCTIONS = {"apply": fasthyper.ops.apply, "hyper_linear": hyper_linear}
IN_DIMS = [dims for dims in itertools.product((0, None), repeat=3) if any(d == 0 for d in dims)]


@pytest.fixture(params=FUNCTIONS)
def f(request):
    return FUNCTIONS[request.param]


@pytest.fixture
def xzw(factors):
    return factors(SMALL)[:3]


def squared(f):
    return lambda *args: (f(*args) ** 2).sum()


def affine(x, z, weight, bias, base_weight, base_bias):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


# Each op is linear in each argument, so in higher orders only mixed derivatives are not zero.
ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f, wrt: grad(squared(f), wrt),
    "jacrev": lambda f, wrt: jacrev(f, wrt),
    "jacfwd": lambda f, wrt: jacfwd(f, wrt),
    "jacrev in chunks": lambda f, wrt: jacrev(f, wrt, chunk_size=2),
    "hessian": lambda f, wrt: hessian(squared(f), wrt),
    "reverse over reverse": lambda f, wrt: jacrev(jacrev(f, wrt), wrt),
    "forward over forward": lambda f, wrt: jacfwd(jacfwd(f, wrt), wrt),
    "reverse over forward": lambda f, wrt: jacrev(jacfwd(f, wrt), wrt),
    "forward over reverse": lambda f, wrt: jacfwd(jacrev(f, wrt), wrt),
    "third, forward": lambda f, wrt: jacfwd(jacfwd(jacfwd(f, wrt), wrt), wrt),
    "third, forward over reverse": lambda f, wrt: jacfwd(jacrev(grad(squared(f), wrt), wrt), wrt),
    "third, reverse over forward": lambda f, wrt: jacrev(jacfwd(grad(squared(f), wrt), wrt), wrt),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("wrt", [0, 1, 2, ALL], ids=str)
def test_over_one_argument_and_over_all(transform, wrt, f, factors, oracle):
    args = factors((2, 2, 3, 2, 1))[:3]
    torch.testing.assert_close(transform(f, wrt)(*args), transform(oracle.linear, wrt)(*args))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_over_every_argument_with_base_and_bias(transform, factors, oracle):
    args, wrt = factors((2, 1, 2, 2, 1), names=factors.AFFINE), tuple(range(6))
    torch.testing.assert_close(transform(affine, wrt)(*args), transform(oracle.linear, wrt)(*args))


@pytest.mark.parametrize("op", ["cond_grad", "weight_grad"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_cond_grad_and_weight_grad(op, transform, factors, oracle):
    ts = factors((2, 2, 3, 2, 1))
    args = [ts[i] for i in oracle.INPUTS[op]]
    truth = lambda *args: torch.einsum(oracle.OPS[op], *args)
    torch.testing.assert_close(transform(getattr(fasthyper.ops, op), ALL)(*args), transform(truth, ALL)(*args))


@pytest.mark.parametrize("dims", IN_DIMS)
@pytest.mark.parametrize("op", ["cond_grad", "weight_grad"])
def test_vmap_of_cond_grad_and_weight_grad(op, dims, factors, oracle):
    ts, many = factors(SMALL), factors(SMALL, lead=5)
    args = [(ts if d is None else many)[i] for i, d in zip(oracle.INPUTS[op], dims, strict=True)]
    truth = lambda *args: torch.einsum(oracle.OPS[op], *args)
    f = getattr(fasthyper.ops, op)
    torch.testing.assert_close(vmap(f, dims)(*args), vmap(truth, dims)(*args))
    torch.testing.assert_close(
        vmap(grad(squared(f), (0, 1, 2)), dims)(*args), vmap(grad(squared(truth), (0, 1, 2)), dims)(*args)
    )


def test_jvp_and_vjp_and_linearize(f, xzw, factors, oracle):
    args, tangents = tuple(xzw), tuple(factors(SMALL)[:3])
    torch.testing.assert_close(jvp(f, args, tangents), jvp(oracle.linear, args, tangents))
    (y, pull), (expected, pull_expected) = vjp(f, *args), vjp(oracle.linear, *args)
    torch.testing.assert_close(pull(y), pull_expected(expected))
    torch.testing.assert_close(linearize(f, *args)[1](*tangents), jvp(oracle.linear, args, tangents)[1])


def test_jvp_of_jvp_and_of_vmap(f, xzw, factors, oracle):
    args, tangents, others = (tuple(factors(SMALL)[:3]) for _ in range(3))
    twice = lambda f: jvp(lambda *a: jvp(f, a, tangents)[1], args, others)
    torch.testing.assert_close(twice(f), twice(oracle.linear))
    many = tuple(factors(SMALL, lead=5)[:3])
    more = tuple(factors(SMALL, lead=5)[:3])
    torch.testing.assert_close(jvp(vmap(f), many, more), jvp(vmap(oracle.linear), many, more))
    each = lambda f: vmap(lambda *t: jvp(f, args, t)[1])(*more)
    torch.testing.assert_close(each(f), each(oracle.linear))


@pytest.mark.parametrize("dims", IN_DIMS)
def test_vmap_and_vmap_of_grad(dims, f, factors, oracle):
    ts, many = factors(SMALL)[:3], factors(SMALL, lead=5)[:3]
    args = [m if d == 0 else t for t, m, d in zip(ts, many, dims, strict=True)]
    torch.testing.assert_close(vmap(f, dims)(*args), vmap(oracle.linear, dims)(*args))
    gradients = lambda f: grad(squared(f), (0, 1, 2))
    torch.testing.assert_close(vmap(gradients(f), dims)(*args), vmap(gradients(oracle.linear), dims)(*args))
    total = lambda f: grad(lambda *a: (vmap(f, dims)(*a) ** 2).sum(), (0, 1, 2))
    torch.testing.assert_close(total(f)(*args), total(oracle.linear)(*args))


@pytest.mark.parametrize("batched", range(1, 64))
def test_vmap_of_any_of_six_arguments(batched, factors, oracle):
    dims = tuple(0 if batched >> k & 1 else None for k in range(6))
    one, many = factors(SMALL, names=factors.AFFINE), factors(SMALL, names=factors.AFFINE, lead=3)
    args = [m if d == 0 else t for t, m, d in zip(one, many, dims, strict=True)]
    wrt = tuple(range(6))
    torch.testing.assert_close(vmap(affine, dims)(*args), vmap(oracle.linear, dims)(*args))
    torch.testing.assert_close(
        vmap(grad(squared(affine), wrt), dims)(*args), vmap(grad(squared(oracle.linear), wrt), dims)(*args)
    )


def test_vmap_over_any_axis(f, factors, oracle):
    x, z, weight = factors(SMALL, lead=5)[:3]
    moved = (x.movedim(0, 2), z.movedim(0, 1), weight.movedim(0, 3))
    for out in range(4):
        torch.testing.assert_close(
            vmap(f, (2, 1, -1), out_dims=out)(*moved), vmap(oracle.linear, out_dims=out)(x, z, weight)
        )


@pytest.mark.parametrize("inner", IN_DIMS)
@pytest.mark.parametrize("outer", IN_DIMS)
def test_vmap_of_vmap(outer, inner, f, factors, oracle):
    args = []
    for k, t in enumerate(factors(SMALL)[:3]):
        lead = [n for n, dims in ((5, outer), (2, inner)) if dims[k] == 0]
        args.append(torch.randn(*lead, *t.shape, dtype=t.dtype))
    twice = lambda f: vmap(vmap(f, inner), outer)(*args)
    torch.testing.assert_close(twice(f), twice(oracle.linear))


@pytest.mark.parametrize("dims", IN_DIMS)
def test_vmap_over_an_empty_dimension(dims, f, factors):
    """A batched dimension of size 0 gives an empty result, as with einsum."""
    args = [t.new_empty(0, *t.shape) if d == 0 else t for t, d in zip(factors(SMALL)[:3], dims, strict=True)]
    assert vmap(f, dims)(*args).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("dims", IN_DIMS)
@pytest.mark.parametrize("axis", range(5))
def test_vmap_with_a_size_of_zero(dims, axis, f, factors, oracle):
    sizes = list(SMALL)
    sizes[axis] = 0
    ts, many = factors(tuple(sizes))[:3], factors(tuple(sizes), lead=2)[:3]
    args = [m if d == 0 else t for t, m, d in zip(ts, many, dims, strict=True)]
    torch.testing.assert_close(vmap(f, dims)(*args), vmap(oracle.linear, dims)(*args))


def test_per_sample_gradients(f, factors, oracle):
    """vmap over the op with B = 1, as in libraries for per-sample gradients."""
    x, z, weight, g = factors(SMALL)
    each = vmap(grad(lambda w, x, z, g: (f(x[None], z[None], w)[0] * g).sum()), (None, 0, 0, 0))(weight, x, z, g)
    torch.testing.assert_close(each, torch.einsum("bni,br,bno->boir", x, z, g))


def test_an_ensemble_by_stacked_modules(factors, oracle):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, bias = factors(SMALL, names=("weight", "bias"))
            self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

        def forward(self, x, z):
            return hyper_linear(x, z, self.weight, self.bias)

    layers = [Layer() for _ in range(3)]
    params, buffers = stack_module_state(layers)
    x, z, *_ = factors(SMALL)
    loss = lambda p, b: (functional_call(layers[0], (p, b), (x, z)) ** 2).sum()
    got = vmap(grad(loss))(params, buffers)
    for k, layer in enumerate(layers):
        loss = (oracle.linear(x, z, layer.weight, layer.bias) ** 2).sum()
        dh, dbias = torch.autograd.grad(loss, (layer.weight, layer.bias))
        torch.testing.assert_close((got["weight"][k], got["bias"][k]), (dh, dbias))


def test_backward_through_a_transform(f, xzw, factors, oracle):
    """func.grad inside, backward outside: a plain custom op fails here."""

    def through(f, transform):
        leaves = [t.clone().requires_grad_() for t in xzw]
        out = transform(f)(*leaves)
        return torch.autograd.grad((out**2).sum(), leaves, materialize_grads=True)

    tangents = factors(SMALL)[:3]
    for transform in (
        lambda f: grad(squared(f), 1),
        lambda f: jacrev(f, 2),
        lambda f: jacfwd(f, 1),
        lambda f: vmap(grad(squared(lambda x, z, w: f(x[None], z[None], w)), 1), (0, 0, None)),
        lambda f: lambda *a: jvp(f, a, tuple(tangents))[1],
        lambda f: hessian(squared(f), 1),
    ):
        torch.testing.assert_close(through(f, transform), through(oracle.linear, transform))


def test_a_gradient_penalty(f, xzw, oracle):
    """A loss that calls torch.autograd.grad with create_graph."""
    x, z, weight = xzw

    def penalty(f):
        def one(x):
            (d,) = torch.autograd.grad((f(x, leaf, weight) ** 2).sum(), leaf, create_graph=True)
            return (d**2).sum()

        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(one(x), leaf)[0]

    torch.testing.assert_close(penalty(f), penalty(oracle.linear))


def test_batched_gradients(f, xzw, oracle):
    """is_grads_batched is a vmap over the backward of an eager graph; second order goes through it."""
    cotangents = torch.randn(5, 3, 2, 2, dtype=torch.float64)

    def batched(f):
        leaves = [t.clone().requires_grad_() for t in xzw]
        first = torch.autograd.grad(f(*leaves), leaves, cotangents, is_grads_batched=True, create_graph=True)
        return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), leaves)

    torch.testing.assert_close(batched(f), batched(oracle.linear))


def test_autograd_functional(f, xzw, oracle):
    x, z, weight = xzw
    for strategy in ("reverse-mode", "forward-mode"):
        j = [jacobian(lambda z, g=g: g(x, z, weight), z, vectorize=True, strategy=strategy) for g in (f, oracle.linear)]
        torch.testing.assert_close(*j)
    h = [hvp(lambda z, g=g: (g(x, z, weight) ** 2).sum(), z, torch.ones_like(z)) for g in (f, oracle.linear)]
    torch.testing.assert_close(*h)


@pytest.mark.parametrize("forced", [("aten", "fold"), ("aten", "project"), ("materialised", None)])
def test_a_forced_backend_runs_every_call_of_a_transform(forced, f, xzw, oracle, monkeypatch):
    """The choice of forward holds in the backward of a transform, and no other backend runs."""
    ran = []
    for name, module in fasthyper.backends.BACKENDS.items():
        for method in ("apply", "grads"):
            original = getattr(module, method)

            def spy(*args, _original=original, _name=name, schedule, **out):
                ran.append((_name, schedule))
                return _original(*args, schedule=schedule, **out)

            monkeypatch.setattr(module, method, spy)
    with fasthyper.use_backend(*forced):
        got = jacfwd(jacrev(squared(f), ALL), ALL)(*xzw)
    torch.testing.assert_close(got, hessian(squared(oracle.linear), ALL)(*xzw))
    assert set(ran) == {(forced[0], forced[1] or "auto")}
