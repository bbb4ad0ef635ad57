"""A primary network of two generated layers in one op, for backends that keep what is between the layers on chip.

    a[b,n] = (H1·z[b] + W1) x[b,n] + bias1·z[b] + b1
    y[b,n] = (H2·z[b] + W2) σ(a[b,n]) + bias2·z[b] + b2

It is `hyper_linear` twice, with torch's own σ between: the composites below say it so. Second order, forward mode and
every transform see them, and they run where no backend fuses the two layers. `a` is a result because backward reads it.
It has derivatives like any other result: in second order, gradients come in through it.

A backend that fuses brings the three functions of `backends.contract.Fusing`.
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
    """σ: its module, the function, and g·σ'(a) as a function of (g, a, σ(a)) that torch can derive again."""

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
"""The tensors of a call, which are also those that have gradients."""


def fits(a: Primary) -> bool:
    """Return whether the arguments of a call are right: the quick answer."""
    given = dict(zip(TENSORS, a, strict=False))
    return all(given[name] is not None for name in ("z", "weight1", "weight2")) and agree(PRIMARY, given)


def fusing(x: Tensor, backend: str, schedule: str) -> Fusing | None:
    """Return the backend that runs a call, if it can fuse. It may not under a forced schedule, which is one layer's."""
    try:
        found = backends.backend(backend, x.device)
    except ValueError:  # not on this device, which the layers say
        return None
    return cast(Fusing, found) if schedule == AUTO and hasattr(found, "fuses") else None


def fused_by(a: Primary | PrimaryGrads) -> Fusing | None:
    """Return the backend that fuses a call, whose arguments are checked."""
    found = fusing(a.x, *choice(a))
    return found if found is not None and found.fuses(a.x, a.z, a.first, a.second, a.activation) else None


def _validate(a: Primary | PrimaryGrads) -> None:
    sigma(a.activation)


def _kernel(a: Primary) -> tuple[Tensor, Tensor]:
    backend = fused_by(a)
    if backend is None:
        return _composite(a)
    with autocast.off(a.x):
        return backend.primary(a.x, a.z, a.first, a.second, a.activation)


def _composite(a: Primary) -> tuple[Tensor, Tensor]:
    hidden = ops.hyper_linear(a.x, a.z, *a.first, *choice(a))
    return ops.hyper_linear(sigma(a.activation).forward(hidden), a.z, *a.second, *choice(a)), hidden


def _backward(p: Primary, wanted: dict[str, bool], a: Tensor, gy: Tensor | None, ga: Tensor | None) -> Gradients:
    mask = [wanted[name] for name in TENSORS]
    grads: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    if gy is not None:
        layers = (*p.first[:3], *p.second[:3])
        out = ops.primary_grads(p.x, p.z, *layers, a, gy, mask, p.activation, *choice(p))
        grads.update(zip(TENSORS, out, strict=True))
    if ga is not None:  # a is read elsewhere, too: by second order
        out = ops.hyper_linear_grads(p.x, p.z, *p.first[:3], ga, mask[:6], *choice(p))
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
    unread=("base_bias1", "base_bias2"),
    reread=("a",),
)


def _grads_kernel(a: PrimaryGrads) -> tuple[Tensor | None, ...]:
    backend = fused_by(a)
    if backend is None:
        return _grads_composite(a)
    with autocast.off(a.x):
        return backend.primary_grads(a.x, a.z, a.first, a.second, a.activation, a.a, a.g, tuple(a.mask))


def _grads_composite(a: PrimaryGrads) -> tuple[Tensor | None, ...]:
    wanted = dict(zip(TENSORS, a.mask, strict=True))
    first = Wanted(*a.mask[:6])
    second = Wanted(any(first), wanted["z"], *a.mask[6:])
    h = sigma(a.activation).forward(a.a)
    dh, dz, *grads2 = ops.hyper_linear_grads(h, a.z, *a.second[:3], a.g, list(second), *choice(a))
    if not any(first):
        return *[None] * 6, *grads2
    da = sigma(a.activation).backward(dh, a.a, h)
    dx, dz1, *grads1 = ops.hyper_linear_grads(a.x, a.z, *a.first[:3], da, list(first), *choice(a))
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
