"""A primary network of two generated layers in one op, for backends that keep the hidden layer on chip.

    a[b,n] = (H1·z[b] + W1) x[b,n] + bias1·z[b] + b1
    y[b,n] = (H2·z[b] + W2) σ(a[b,n]) + bias2·z[b] + b2

It is `hyper_linear` twice, with torch's own σ between: the composites below compute exactly that. They run in second
order, in forward mode, under every transform, and where no backend fuses the two layers. `a` is a result because
backward reads it. It has derivatives like any other result: second-order gradients pass through it.

A backend that fuses two layers has the three functions of `backends.contract.Fusing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..backends.contract import Fusing, Layer, Wanted
from ..problem import AUTO
from . import autocast
from .register import Gradients, choice, define
from .shapes import PRIMARY, agree

ops = torch.ops.fasthyper
_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation σ: module, function, and g·σ'(a) as a function of (g, a, σ(a)) that torch can differentiate."""

    module: type[nn.Module]
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_backward(g: Tensor, a: Tensor, h: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return g * (s * (1 + a * (1 - s)))  # torch.ops.aten.silu_backward has no derivative


ACTIVATIONS = {
    "relu": Activation(nn.ReLU, torch.relu, lambda g, a, h: _aten.threshold_backward(g, a, 0)),
    "tanh": Activation(nn.Tanh, torch.tanh, lambda g, a, h: _aten.tanh_backward(g, h)),
    "sigmoid": Activation(nn.Sigmoid, torch.sigmoid, lambda g, a, h: _aten.sigmoid_backward(g, h)),
    "silu": Activation(nn.SiLU, F.silu, _silu_backward),
    "gelu": Activation(nn.GELU, F.gelu, lambda g, a, h: _aten.gelu_backward(g, a)),
}
_OF_MODULE = {activation.module: name for name, activation in ACTIVATIONS.items()}


def activation_of(module: Any) -> str | None:
    """Return the name of the activation that a module computes, or None."""
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


class Primary(NamedTuple):
    x: Tensor
    z: Tensor
    weight1: Tensor
    bias1: Tensor | None
    base_weight1: Tensor | None
    base_bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    base_weight2: Tensor | None
    base_bias2: Tensor | None
    activation: str
    backend: str = ""
    schedule: str = ""

    @property
    def first(self) -> Layer:
        return Layer(self.weight1, self.bias1, self.base_weight1, self.base_bias1)

    @property
    def second(self) -> Layer:
        return Layer(self.weight2, self.bias2, self.base_weight2, self.base_bias2)


class PrimaryGrads(NamedTuple):
    x: Tensor
    z: Tensor
    weight1: Tensor
    bias1: Tensor | None
    base_weight1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    base_weight2: Tensor | None
    a: Tensor
    g: Tensor
    mask: list[bool]
    activation: str
    backend: str = ""
    schedule: str = ""

    @property
    def first(self) -> Layer:
        return Layer(self.weight1, self.bias1, self.base_weight1, None)

    @property
    def second(self) -> Layer:
        return Layer(self.weight2, self.bias2, self.base_weight2, None)


TENSORS = Primary._fields[:10]
"""The tensors of a call; the same ones have gradients."""
OPTIONAL = [name for name in TENSORS if name not in ("x", "z", "weight1", "weight2")]


def are_valid(args: Primary) -> bool:
    """Return whether the arguments of a call are valid; raise nothing."""
    given = dict(zip(TENSORS, args, strict=False))
    return agree(PRIMARY, given, OPTIONAL)


def backend_that_may_fuse(x: Tensor, backend: str, schedule: str) -> Fusing | None:
    """Return the backend of a call if it can fuse, else None: also if a schedule, which is for one layer, is forced."""
    if schedule != AUTO or not backends.runs_on(backend, x.device):
        return None
    module = backends.backend(backend, x.device)
    return cast(Fusing, module) if hasattr(module, "fuses") else None


def backend_that_fuses(args: Primary | PrimaryGrads) -> Fusing | None:
    """Return the backend that fuses a call, or None. The arguments must be valid."""
    backend = backend_that_may_fuse(args.x, *choice(args))
    if backend is None or not backend.fuses(args.x, args.z, args.first, args.second, args.activation):
        return None
    return backend


_SECOND = ("z", "weight2", "base_weight2")  # what the gradient of a reads
_READS: dict[str, tuple[str, ...]] = {
    "x": ("weight1", "base_weight1", *_SECOND),
    "z": ("x", "weight1", "bias1", "bias2", *_SECOND),
    "weight1": ("x", *_SECOND),
    "bias1": _SECOND,
    "base_weight1": ("x", *_SECOND),
    "base_bias1": _SECOND,
    "weight2": ("z",),
    "bias2": ("z",),
    "base_weight2": (),
    "base_bias2": (),
}


def _validate(args: Primary | PrimaryGrads) -> None:
    sigma(args.activation)


def _kernel(args: Primary) -> tuple[Tensor, Tensor]:
    backend = backend_that_fuses(args)
    if backend is None:
        return _composite(args)
    with autocast.off(args.x):
        return backend.primary(args.x, args.z, args.first, args.second, args.activation)


def _composite(args: Primary) -> tuple[Tensor, Tensor]:
    hidden = ops.hyper_linear(args.x, args.z, *args.first, *choice(args))
    return ops.hyper_linear(sigma(args.activation).forward(hidden), args.z, *args.second, *choice(args)), hidden


def _backward(args: Primary, wanted: dict[str, bool], a: Tensor, gy: Tensor | None, ga: Tensor | None) -> Gradients:
    mask = [wanted[name] for name in TENSORS]
    grads: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    if gy is not None:
        layers = (*args.first[:3], *args.second[:3])
        out = ops.primary_grads(args.x, args.z, *layers, a, gy, mask, args.activation, *choice(args))
        grads.update(zip(TENSORS, out, strict=True))
    if ga is not None:  # a has a gradient of its own, in second order
        out = ops.hyper_linear_grads(args.x, args.z, *args.first[:3], ga, mask[:6], *choice(args))
        for name, t in zip(TENSORS, out, strict=False):
            if wanted[name]:
                grads[name] = t if grads[name] is None else grads[name] + t
    return grads


define(
    "primary",
    Primary,
    {"y": PRIMARY["g"], "a": PRIMARY["a"]},
    axes=PRIMARY,
    validate=_validate,
    kernel=_kernel,
    composite=_composite,
    backward=_backward,
    reads=_READS,
    saved_results=("a",),
)


def _grads_kernel(args: PrimaryGrads) -> tuple[Tensor | None, ...]:
    backend = backend_that_fuses(args)
    if backend is None:
        return _grads_composite(args)
    with autocast.off(args.x):
        return backend.primary_grads(
            args.x, args.z, args.first, args.second, args.activation, args.a, args.g, tuple(args.mask)
        )


def _grads_composite(args: PrimaryGrads) -> tuple[Tensor | None, ...]:
    wanted = dict(zip(TENSORS, args.mask, strict=True))
    first = Wanted(*args.mask[:6])
    second = Wanted(any(first), wanted["z"], *args.mask[6:])
    h = sigma(args.activation).forward(args.a)
    dh, dz, *grads2 = ops.hyper_linear_grads(h, args.z, *args.second[:3], args.g, list(second), *choice(args))
    if not any(first):
        return *[None] * 6, *grads2
    da = sigma(args.activation).backward(dh, args.a, h)
    dx, dz1, *grads1 = ops.hyper_linear_grads(args.x, args.z, *args.first[:3], da, list(first), *choice(args))
    return dx, dz1 + dz, *grads1, *grads2


define(
    "primary_grads",
    PrimaryGrads,
    {f"d{name}": PRIMARY[name] for name in TENSORS},
    axes=PRIMARY,
    validate=_validate,
    kernel=_grads_kernel,
    composite=_grads_composite,
)
