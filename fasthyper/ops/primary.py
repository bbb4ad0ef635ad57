"""A whole primary network of two generated layers in one op, for backends that write nothing between the two.

    a[b,n] = (H1·z[b] + W1) x[b,n] + bias1·z[b] + b1
    y[b,n] = (H2·z[b] + W2) σ(a[b,n]) + bias2·z[b] + b2

It is `hyper_linear` twice, with torch's own σ between: `_composite` and `_composite_grads` say it so. They are what
second order, forward mode and every transform see, and what runs where no backend fuses the two layers. `a` is an
output because backward reads it, and has derivatives like any other: in second order gradients come in through it.

A backend that fuses has three functions beside those of every backend. In them first and second are the tuples
(weight, bias, base_weight, base_bias) of a layer, with None for what is absent.

    fuses(x, z, first, second, activation) -> bool, by sizes, dtypes and strides: there may be no values
    primary(x, z, first, second, activation) -> (y, a)
    primary_grads(x, z, first, second, activation, a, g, mask) -> ten gradients, None for each not asked for

The ten are those of x, z, the four of first, the four of second. No gradient reads a base_bias: `primary_grads`, and
`fuses` before it, meet None for both. All have been checked to agree, with any strides; results are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..problem import AUTO
from . import affine, autocast
from .checks import check_shapes, check_tensors
from .dispatch import LIBRARY, MISSING, below, recording, register, rule, transformed
from .family import HOW, TAGS, check_mask, ops, resolved

Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""weight, bias, base_weight and base_bias of a `hyper_linear`."""

_aten = torch.ops.aten


class Activation(NamedTuple):
    """σ: its module, itself, and g·σ'(a) of (g, a, σ(a)) by what torch can derive again."""

    module: type[nn.Module]
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_backward(g: Tensor, a: Tensor, h: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return g * (s * (1 + a * (1 - s)))  # torch's own has no derivative


ACTIVATIONS = {
    "relu": Activation(nn.ReLU, torch.relu, lambda g, a, h: _aten.threshold_backward(g, a, 0)),
    "tanh": Activation(nn.Tanh, torch.tanh, lambda g, a, h: _aten.tanh_backward(g, h)),
    "sigmoid": Activation(nn.Sigmoid, torch.sigmoid, lambda g, a, h: _aten.sigmoid_backward(g, h)),
    "silu": Activation(nn.SiLU, F.silu, _silu_backward),
    "gelu": Activation(nn.GELU, F.gelu, lambda g, a, h: _aten.gelu_backward(g, a)),
}
_OF_MODULE = {activation.module: name for name, activation in ACTIVATIONS.items()}


def activation_of(module: Any) -> str | None:
    """Return the name of the activation that a module is, or None."""
    name = _OF_MODULE.get(type(module))
    return None if name == "gelu" and module.approximate != "none" else name


def sigma(name: str) -> Activation:
    """Return the activation of this name.

    Raises:
        ValueError: if it is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def fusing(x: Tensor, how: tuple[str, ...] = ()) -> ModuleType | None:
    """Return the backend that runs a call, if it can fuse: not where a schedule is forced, which is one of a layer."""
    choice = resolved(how)
    try:
        backend = backends.backend(choice.backend, x.device)
    except ValueError:  # not on this device, as the layers say
        return None
    return backend if choice.schedule == AUTO and hasattr(backend, "fuses") else None


def fused_by(x, z, first: Layer, second: Layer, activation: str, how: tuple[str, ...] = ()) -> ModuleType | None:
    """Return the backend that fuses a call, its arguments checked before."""
    backend = fusing(x, how)
    return backend if backend is not None and backend.fuses(x, z, first, second, activation) else None


def check(x, z, first: Layer, second: Layer, activation: str, a=None, g=None) -> None:
    """Check the arguments of `primary`, and with a and g of `primary_grads`.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: names the argument of the wrong shape, or on another device; or an activation is unknown.
    """
    sigma(activation)
    check_tensors(x=x)
    weight1, weight2 = first[0], second[0]
    if (x.dim(), z.dim(), weight1.dim(), weight2.dim()) != (3, 2, 3, 3):
        axes = (("x", x, "B, N, I"), ("z", z, "B, R"), ("weight1", weight1, "J, I, R"), ("weight2", weight2, "O, J, R"))
        name, t, letters = next(wrong for wrong in axes if wrong[1].dim() != len(wrong[2].split()))
        raise ValueError(f"{name} must have shape ({letters}), got {tuple(t.shape)}")
    B, N, I = x.shape
    R, J, O = z.shape[1], weight1.shape[0], weight2.shape[0]
    factors = ("z", z, (B, R)), ("weight1", weight1, (J, I, R)), ("weight2", weight2, (O, J, R))
    check_shapes(x, (*factors, ("a", a, (B, N, J)), ("g", g, (B, N, O))))
    check_shapes(x, affine.blocks(*first), "1")
    check_shapes(x, affine.blocks(*second), "2")


def _composite(x, z, *rest) -> tuple[Tensor, Tensor]:
    first, second, activation, how = rest[:4], rest[4:8], rest[8], rest[9:]
    check(x, z, first, second, activation)
    a = ops.hyper_linear(x, z, *first, *how)
    return ops.hyper_linear(sigma(activation).forward(a), z, *second, *how), a


def _composite_grads(x, z, *rest) -> tuple[Tensor, ...]:
    first, second, (a, g, mask, activation, *how) = rest[:3], rest[3:6], rest[6:]
    check(x, z, first, second, activation, a, g)
    check_mask(mask, 10)
    of_first, of_second = list(mask[:6]), [any(mask[:6]), mask[1], *mask[6:]]
    h = sigma(activation).forward(a)
    dh, dz, *grads2 = ops.hyper_linear_grads(h, z, *second, g, of_second, *how)
    if not any(of_first):
        return *(x.new_empty(0) for _ in of_first), *grads2
    da = sigma(activation).backward(dh, a, h)
    dx, dz1, *grads1 = ops.hyper_linear_grads(x, z, *first, da, of_first, *how)
    return dx, dz1 + dz, *grads1, *grads2


def _backward(args: tuple[Any, ...], need: tuple[bool, ...], gy: Tensor | None, ga: Tensor | None) -> tuple:
    x, z, *layers, activation, backend, schedule, a = args
    first, second, how, mask = layers[:3], layers[4:7], (backend, schedule), need[:10]
    grads: list[Tensor | None] = [None] * 10

    def add(terms: tuple[Tensor, ...]) -> None:
        for k, t in enumerate(terms):
            if mask[k]:
                sum_ = grads[k]
                grads[k] = t if sum_ is None else sum_ + t

    if gy is not None:
        add(ops.primary_grads(x, z, *first, *second, a, gy, list(mask), activation, *how))
    if ga is not None:  # something else reads a: a second order does
        add(ops.hyper_linear_grads(x, z, *first, ga, list(mask[:6]), *how))
    return *grads, None, None, None


def _define() -> None:
    first, second = (f"Tensor weight{k}, Tensor? bias{k}, Tensor? base_weight{k}" for k in (1, 2))
    LIBRARY.define(
        f"primary(Tensor x, Tensor z, {first}, Tensor? base_bias1, {second}, Tensor? base_bias2, str activation, {HOW})"
        " -> (Tensor y, Tensor a)",
        tags=TAGS,
    )
    LIBRARY.define(
        f"primary_grads(Tensor x, Tensor z, {first}, {second}, Tensor a, Tensor g, bool[10] mask, str activation, "
        f"{HOW}) -> ({', '.join(['Tensor'] * 10)})",
        tags=TAGS,
    )
    if MISSING:
        LIBRARY.impl("primary", _composite, "CompositeImplicitAutograd")
        LIBRARY.impl("primary_grads", _composite_grads, "CompositeImplicitAutograd")
        return

    def kernel(x, z, *rest):
        first, second, activation, how = rest[:4], rest[4:8], rest[8], rest[9:]
        check(x, z, first, second, activation)
        backend = fused_by(x, z, first, second, activation, how)
        if backend is None:
            return _composite(x, z, *rest)
        with autocast.off(x):
            return backend.primary(x, z, first, second, activation)

    def fake(x, z, *rest):
        check(x, z, rest[:4], rest[4:8], rest[8])
        return tuple(x.new_empty(x.shape[0], x.shape[1], weight.shape[0]) for weight in (rest[4], rest[0]))

    recorded = rule(ops.primary.default, _backward, unread=(5, 9), reread=(1,))

    def autograd(keys, *args):
        args = *args[:11], *resolved(args[11:])
        return _composite(*args) if transformed() else recorded(keys, *args)

    def kernel_grads(x, z, *rest):
        first, second, (a, g, mask, activation, *how) = (*rest[:3], None), (*rest[3:6], None), rest[6:]
        check(x, z, first, second, activation, a, g)
        check_mask(mask, 10)
        backend = fused_by(x, z, first, second, activation, tuple(how))
        if backend is None:
            return _composite_grads(x, z, *rest)
        with autocast.off(x):
            out = backend.primary_grads(x, z, first, second, activation, a, g, tuple(mask))
        return tuple(x.new_empty(0) if t is None else t for t in out)

    def fake_grads(x, z, *rest):
        weight1, weight2, (a, g, mask, activation) = rest[0], rest[3], rest[6:10]
        check(x, z, rest[:3], rest[3:6], activation, a, g)
        check_mask(mask, 10)
        shapes = [x.shape, z.shape]
        for O, I, R in (weight1.shape, weight2.shape):
            shapes += [(O, I, R), (O, R), (O, I), (O,)]
        return tuple(x.new_empty(s if k else 0) for s, k in zip(shapes, mask, strict=True))

    def autograd_grads(keys, *args):
        args = *args[:12], *resolved(args[12:])
        if transformed() or recording(*args[:10]):
            return _composite_grads(*args)
        return below(ops.primary_grads.default, keys, args)

    register("primary", kernel, fake, autograd, _composite)
    register("primary_grads", kernel_grads, fake_grads, autograd_grads, _composite_grads)


_define()
