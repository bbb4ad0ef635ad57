"""Helpers of the tests of a primary network of two layers: its arguments, and the ways to compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fasthyper.functional import hyper_linear
from fasthyper.fused import hyper_primary

RAW = torch.ops.fasthyper
SIGMA = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu}
SIZES = {"b": 4, "n": 2, "r": 5, "i": 3, "j": 7, "o": 6}
SMALL = {"b": 3, "n": 2, "r": 2, "i": 2, "j": 4, "o": 3}
TINY = {"b": 2, "n": 2, "r": 2, "i": 1, "j": 3, "o": 1}
AXES = {
    "x": "bni", "z": "br", "weight1": "jir", "bias1": "jr", "base_weight1": "ji", "base_bias1": "j",
    "weight2": "ojr", "bias2": "or", "base_weight2": "oj", "base_bias2": "o",
}  # fmt: skip
NAMES = tuple(AXES)
OPTIONAL = [name for name in NAMES if "b" in name]
UNREAD = ("base_bias1", "base_bias2")  # no gradient reads these
ALL = tuple(range(10))
SOME_ABSENT = [("gelu", ("bias1", "base_weight2", "base_bias2")), ("silu", tuple(OPTIONAL))]


def arguments(sizes=SIZES, dtype=torch.float64, absent=(), requires_grad=False, lead=(), **changed):
    """Return the ten arguments, None for each in `absent`; `changed` maps names to other shapes."""
    sizes = {**SIZES, **sizes}
    shapes = {name: (*lead, *(sizes[axis] for axis in axes)) for name, axes in AXES.items()}
    return [
        None if name in absent else torch.randn(changed.get(name, shape)).to(dtype).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    ]


def read_by_backward(args):
    """Return those of the ten arguments that `primary_grads` takes."""
    return [t for name, t in zip(NAMES, args, strict=True) if name not in UNREAD]


def a_and_g(sizes=SIZES, dtype=torch.float64):
    return [torch.randn(*(sizes[axis] for axis in axes), dtype=dtype) for axes in ("bnj", "bno")]


def present(args):
    return [t for t in args if t is not None]


def primary_op(activation):
    """Return the op as a function of ten tensors, as transforms take it."""
    return lambda *args: RAW.primary(*args, activation)[0]


def primary_function(activation):
    """Return `hyper_primary`, which the nn modules call, as a function of ten tensors."""
    return lambda x, z, *parameters: hyper_primary(x, z, parameters[:4], parameters[4:], activation)


def truth_of(oracle, activation):
    """Return the network in einsum, in the dtype of its arguments."""

    def truth(x, z, *parameters):
        hidden = oracle.linear(x, z, *parameters[:4])
        return oracle.linear(SIGMA[activation](hidden), z, *parameters[4:])

    return truth


def layer_by_layer(args):
    """Compute the network by two calls of `hyper_linear`."""
    x, z, *parameters = args
    linear = lambda x, weight, bias, w0, b0: hyper_linear(x, z, weight, bias, base_weight=w0, base_bias=b0)
    return linear(torch.tanh(linear(x, *parameters[:4])), *parameters[4:])


def squared(f):
    return lambda *args: (f(*args) ** 2).sum()


def with_gradients(f, args, g):
    leaves = [t if t is None else t.detach().requires_grad_() for t in args]
    y = f(*leaves)
    return y, *torch.autograd.grad(y, present(leaves), g.to(y))


TRANSFORMS = {
    "grad": lambda f: grad(squared(f), ALL),
    "jacrev": lambda f: jacrev(f, ALL),
    "jacfwd": lambda f: jacfwd(f, ALL),
    "hessian": lambda f: hessian(squared(f), (0, 1, 2, 6)),
    "reverse over reverse": lambda f: jacrev(jacrev(f, (0, 1, 2, 6)), (0, 1, 2, 6)),
    "reverse over forward": lambda f: jacrev(jacfwd(f, (0, 1, 2, 6)), (0, 1, 2, 6)),
    "jvp": lambda f: lambda *args: jvp(f, args, tuple(torch.cos(t) for t in args)),
    "jvp of grad": lambda f: lambda *args: jvp(grad(squared(f), ALL), args, tuple(torch.cos(t) for t in args)),
    "vmap of all": lambda f: lambda *args: vmap(f)(*(torch.stack([t, 2 * t, t.sin()]) for t in args)),
    "vmap of grad": lambda f: vmap(
        grad(squared(lambda x, z, *parameters: f(x[None], z[None], *parameters)), ALL), (0, 0, *[None] * 8)
    ),
    "grad of vmap": lambda f: grad(
        lambda x, z, *parameters: (vmap(f, (0, 0, *[None] * 8))(x[:, None], z[:, None], *parameters) ** 2).sum(), ALL
    ),
}  # fmt: skip


WRONG_SHAPES = [
    ("x", (4, 3)), ("x", (4, 2, 3, 1)), ("z", (5,)), ("z", (4, 1, 5)), ("weight1", (21, 5)), ("weight2", (42, 5)),
    ("z", (3, 5)), ("z", (1, 5)), ("z", (0, 5)), ("weight1", (7, 2, 5)), ("weight1", (7, 1, 5)), ("weight1", (7, 3, 1)),
    ("weight2", (6, 1, 5)), ("weight2", (6, 7, 1)), ("weight2", (6, 3, 5)), ("bias1", (7, 1)), ("bias1", (7,)),
    ("bias1", (6, 5)), ("base_weight1", (3, 7)), ("base_weight1", (1, 3)), ("base_bias1", (1,)), ("base_bias1", ()),
    ("bias2", (1, 5)), ("bias2", (7, 5)), ("base_weight2", (7, 6)), ("base_weight2", (6, 1)), ("base_bias2", (1,)),
    ("base_bias2", (7,)), ("base_bias2", (6, 1)),
]  # fmt: skip
