"""The op under `fasthyper.hyper_linear`: the family, with a base and a generated bias added in place.

    y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0

It is T with x and z each extended by a one, [x, 1] and [z, 1], and H by a row and a column, so there is no new
derivative: the composites below write it in the family and in torch's own ops, and second order, forward mode and every
transform see these. The kernels save what the composites would cost: a temporary of the size of the output for each
term, in forward and again in backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import compiled
from ..backends.contract import Wanted
from . import autocast
from .family import run_apply, run_grads
from .register import MISSING, Gradients, choice, define
from .shapes import LINEAR as AXES

ops = torch.ops.fasthyper


class HyperLinear(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None
    backend: str = ""
    schedule: str = ""


class HyperLinearGrads(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    g: Tensor
    mask: list[bool]
    backend: str = ""
    schedule: str = ""


def _kernel(a: HyperLinear) -> Tensor:
    return run_apply(a, a.x, a.z, a.weight, a.bias, a.base_weight, a.base_bias)


def _composite(a: HyperLinear) -> Tensor:
    y = ops.apply(a.x, a.z, a.weight, *choice(a))
    with autocast.off(a.x):
        if a.base_weight is not None:
            y = y + a.x @ a.base_weight.T
        if a.bias is not None:
            y = y + (a.z @ a.bias.T).unsqueeze(1)
        return y if a.base_bias is None else y + a.base_bias


def _backward(a: HyperLinear, wanted: dict[str, bool], g: Tensor) -> Gradients:
    mask = [wanted[name] for name in Wanted._fields]
    out = ops.hyper_linear_grads(a.x, a.z, a.weight, a.bias, a.base_weight, g, mask, *choice(a))
    return dict(zip(Wanted._fields, out, strict=True))


define(
    "hyper_linear",
    HyperLinear,
    {"y": "BNO"},
    axes=AXES,
    kernel=_kernel,
    composite=_composite,
    backward=_backward,
    unread=("base_bias",),
)


def _grads_kernel(a: HyperLinearGrads) -> tuple[Tensor | None, ...]:
    return run_grads(a, a.x, a.z, a.weight, a.bias, a.base_weight, a.g, Wanted(*a.mask))


def _grads_composite(a: HyperLinearGrads) -> tuple[Tensor | None, ...]:
    wanted = Wanted(*a.mask)
    dx, dz, dh = ops.grads(a.x, a.z, a.weight, a.g, [wanted.x, wanted.z, wanted.weight], *choice(a))
    with autocast.off(a.x):
        per_instance = a.g.sum(1) if wanted.z or wanted.bias or wanted.base_bias else a.g
        if wanted.x and a.base_weight is not None:
            dx = dx + a.g @ a.base_weight
        if wanted.z and a.bias is not None:
            dz = dz + per_instance @ a.bias
        dbias = per_instance.T @ a.z if wanted.bias else None
        dbase_weight = a.g.flatten(0, 1).T @ a.x.flatten(0, 1) if wanted.base_weight else None
        dbase_bias = per_instance.sum(0) if wanted.base_bias else None
    return dx, dz, dh, dbias, dbase_weight, dbase_bias


define(
    "hyper_linear_grads",
    HyperLinearGrads,
    {f"d{name}": AXES[name] for name in Wanted._fields},
    axes=AXES,
    kernel=_grads_kernel,
    composite=_grads_composite,
)
if not MISSING and compiled.load("eager") is None:  # shadows these kernels on the CPU, where no transform is active
    torch.ops.fasthyper_eager.declare_axes([*AXES], [*AXES.values()])
