"""The op of `hyper_linear` with a `weight_map`: a function φ of the generated weights, before they meet x.

    y[b,n] = φ(H·z[b] + W0) x[b,n] + bias·z[b] + b0

It is not linear in z and H, so it is no member of the family. The kernels compute tiles of W, in forward and again in
backward. The composite is the definition in torch's own operations; it runs in second order, in forward mode and under
every transform, and `chunks.run` limits what it writes out at a time.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import backends, maps
from ..backends import cpu, cpu_mapped
from ..backends.aten import mapped as aten
from ..backends.contract import Wanted
from . import autocast, chunks
from .register import Gradients, choice, define
from .rules import READS
from .shapes import LINEAR as AXES

ops = torch.ops.fasthyper


class MappedLinear(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None
    map: str
    backend: str = ""
    schedule: str = ""


class MappedLinearGrads(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    g: Tensor
    map: str
    mask: list[bool]
    backend: str = ""
    schedule: str = ""


_OF_W = ("z", "weight", "base_weight")  # what W is computed from
_READS = {**READS, "x": _OF_W, "z": ("x", "bias", *_OF_W), "weight": ("x", *_OF_W), "base_weight": ("x", *_OF_W)}


def _validate(args: MappedLinear | MappedLinearGrads) -> None:
    maps.check(args.map)


def _kernels(args: MappedLinear | MappedLinearGrads) -> ModuleType | None:
    """Return the module that computes a call, or None if it is to write out W.

    Raises:
        ValueError: its backend does not run on the device.
    """
    name = choice(args).backend
    backend = backends.backend(name, args.x.device, args.x.dtype)
    if name == "materialised":
        return None
    return cpu_mapped if backend is cpu else aten


def generate(z: Tensor, weight: Tensor, base_weight: Tensor | None, weight_map: maps.Map) -> Tensor:
    """Return W (B, O, I) = φ(H·z + W0), differentiable."""
    p = torch.einsum("br,oir->boi", z, weight)
    return maps.value(weight_map, p if base_weight is None else p + base_weight)


def compose(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    weight_map: maps.Map,
    whole: bool = False,
) -> Tensor:
    """Return y by torch's own operations. W is written out for some instances at a time, or for all of them."""

    def some(x: Tensor, z: Tensor, weight: Tensor, *rest: Tensor | None) -> chunks.Results:
        bias, base_weight, base_bias = rest
        y = torch.einsum("bni,boi->bno", x, generate(z, weight, base_weight, weight_map))
        if bias is not None:
            y = y + (z @ bias.T).unsqueeze(1)
        return (y if base_bias is None else y + base_bias,), ()

    with autocast.off(x):
        shared = (weight, bias, base_weight, base_bias)
        (y,), _ = chunks.run(some, (x, z), shared, weight.shape[0] * weight.shape[1], whole)
        assert y is not None
        return y.contiguous()


def _kernel(args: MappedLinear) -> Tensor:
    kernels = _kernels(args)
    if kernels is None:
        return compose(*args[:7], whole=True)
    with autocast.off(args.x):
        return cast(Tensor, kernels.apply(*args[:7]))


def _composite(args: MappedLinear) -> Tensor:
    return compose(*args[:7], whole=choice(args).backend == "materialised")


def _backward(args: MappedLinear, wanted: dict[str, bool], g: Tensor) -> Gradients:
    mask = [wanted[name] for name in Wanted._fields]
    out = ops.mapped_linear_grads(*args[:5], g, args.map, mask, *choice(args))
    return dict(zip(Wanted._fields, out, strict=True))


define(
    "mapped_linear",
    MappedLinear,
    {"y": "BNO"},
    axes=AXES,
    kernel=_kernel,
    composite=_composite,
    backward=_backward,
    reads=_READS,
    validate=_validate,
)


def _grads_kernel(args: MappedLinearGrads) -> tuple[Tensor | None, ...]:
    kernels = _kernels(args)
    if kernels is None:
        return _grads_composite(args)
    with autocast.off(args.x):
        return cast(tuple[Tensor | None, ...], kernels.grads(*args[:6], tuple(args.mask), args.map))


def _grads_composite(args: MappedLinearGrads) -> tuple[Tensor | None, ...]:
    return compose_grads(args, whole=choice(args).backend == "materialised")


def compose_grads(args: MappedLinearGrads, whole: bool = False) -> tuple[Tensor | None, ...]:
    """Return the gradients of `compose` by torch's own operations."""
    wanted = Wanted(*args.mask)

    def some(x: Tensor, z: Tensor, g: Tensor, weight: Tensor, *rest: Tensor | None) -> chunks.Results:
        bias, base_weight = rest
        dx = dz = dh = dw0 = None
        if wanted.x or wanted.z or wanted.weight or wanted.base_weight:
            p = torch.einsum("br,oir->boi", z, weight)
            p = p if base_weight is None else p + base_weight
        if wanted.x:
            dx = torch.einsum("bno,boi->bni", g, maps.value(args.map, p)).contiguous()
        if wanted.z or wanted.weight or wanted.base_weight:
            dp = maps.vjp(args.map, p, torch.einsum("bno,bni->boi", g, x))
            dz = torch.einsum("boi,oir->br", dp, weight) if wanted.z else None
            dh = torch.einsum("boi,br->oir", dp, z).contiguous() if wanted.weight else None
            dw0 = dp.sum(0) if wanted.base_weight else None
        if dz is not None and bias is not None:
            dz = dz + g.sum(1) @ bias
        return (dx, dz), (dh, dw0)

    with autocast.off(args.x):
        O, I, _ = args.weight.shape
        shared = (args.weight, args.bias, args.base_weight)
        (dx, dz), (dh, dw0) = chunks.run(some, (args.x, args.z, args.g), shared, O * I, whole)
        per_instance = args.g.sum(1) if wanted.bias or wanted.base_bias else args.g
        dbias = per_instance.T @ args.z if wanted.bias else None
        return dx, dz, dh, dbias, dw0, per_instance.sum(0) if wanted.base_bias else None


define(
    "mapped_linear_grads",
    MappedLinearGrads,
    {f"d{name}": AXES[name] for name in Wanted._fields},
    axes=AXES,
    kernel=_grads_kernel,
    composite=_grads_composite,
    validate=_validate,
)
