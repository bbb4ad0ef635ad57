"""The ops of `fasthyper.hyper_conv2d` and its like: the family of `conv.py` with a bias and a base added in place.

    y[b] = conv(x[b], H·z[b] + W0) + bias·z[b] + b0        hyper_conv, hyper_conv_transpose

The composites use the family and torch's own operations; they run in second order, in forward mode and under every
transform.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Wanted
from . import autocast
from .conv import arguments, geometry_of, like_x, new_like_image, run_apply, run_grads, sizes, validate
from .register import Gradients, choice, define
from .rules import READS
from .shapes import CONV, CONV_TRANSPOSE, shape_of

ops = torch.ops.fasthyper
_PIXELS = (2, 3, 4)

_TENSORS = {
    "x": Tensor,
    "z": Tensor,
    "weight": Tensor,
    "bias": Tensor | None,
    "base_weight": Tensor | None,
    "base_bias": Tensor | None,
}
_OF_GRADS = {**{name: t for name, t in _TENSORS.items() if name != "base_bias"}, "g": Tensor}


def _define(name: str, prefix: str, axes: dict[str, str]) -> None:
    """Define a convolution and its gradients."""
    transposed = name == "conv_transpose"
    family = getattr(ops, f"{name}_apply")
    grads_of_x = ops.conv_apply if transposed else ops.conv_transpose_apply

    def kernel(args: Any) -> Tensor:
        return run_apply(args, args.bias, args.base_weight, args.base_bias)

    def composite(args: Any) -> Tensor:
        rest = *geometry_of(args), *choice(args)
        y = family(args.x, args.z, args.weight, *rest)
        with autocast.off(args.x):
            if args.base_weight is not None:
                y = y + family(args.x, *_as_generated(args.base_weight, args.x), *rest)
            if args.bias is not None:
                y = y + _over_pixels(args.z @ args.bias.T)
            return y if args.base_bias is None else y + _over_pixels(args.base_bias)

    def backward(args: Any, wanted: dict[str, bool], g: Tensor) -> Gradients:
        mask = [wanted[field] for field in Wanted._fields]
        op = getattr(ops, f"hyper_{name}_grads")
        out = op(args.x, args.z, args.weight, args.bias, args.base_weight, g, *geometry_of(args), mask, *choice(args))
        return dict(zip(Wanted._fields, out, strict=True))

    def empty(args: Any) -> Tensor:
        return new_like_image(args.x, shape_of(axes["g"], sizes(args)))

    define(
        f"hyper_{name}",
        arguments(prefix, _TENSORS, transposed),
        {"y": axes["g"]},
        axes=axes,
        kernel=kernel,
        composite=composite,
        backward=backward,
        reads=READS,
        validate=validate,
        empty=empty,
    )

    def grads_kernel(args: Any) -> tuple[Tensor | None, ...]:
        return run_grads(args, args.z, args.weight, args.bias, args.base_weight, Wanted(*args.mask))

    def grads_composite(args: Any) -> tuple[Tensor | None, ...]:
        wanted, rest = Wanted(*args.mask), (*geometry_of(args), *choice(args))
        dx, dz, dh, dbias, dbase_weight, dbase_bias = (None,) * 6
        image, output = (args.g, args.x) if transposed else (args.x, args.g)
        if wanted.x:
            dx = grads_of_x(args.g, args.z, args.weight, *rest)
            if args.base_weight is not None:
                dx = dx + grads_of_x(args.g, *_as_generated(args.base_weight, args.x), *rest)
        with autocast.off(args.x):
            over_pixels = args.g.sum(_PIXELS)
            if wanted.z:
                dz = ops.conv_cond_grad(image, output, args.weight, *rest)
                dz = dz if args.bias is None else dz + over_pixels @ args.bias
            if wanted.weight:
                dh = ops.conv_weight_grad(image, args.z, output, *rest)
            dbias = over_pixels.T @ args.z if wanted.bias else None
            if wanted.base_weight:
                ones = args.x.new_ones(args.x.shape[0], 1)
                dbase_weight = ops.conv_weight_grad(image, ones, output, *rest).squeeze(-1)
            dbase_bias = over_pixels.sum(0) if wanted.base_bias else None
        return dx, dz, dh, dbias, dbase_weight, dbase_bias

    def grads_empty(args: Any) -> tuple[Tensor | None, ...]:
        known = sizes(args)
        shapes = [shape_of(axes[field], known) for field in Wanted._fields]
        found: list[Tensor | None] = [args.x.new_empty(shape) for shape in shapes]
        found[0] = new_like_image(like_x(args), shapes[0])
        return tuple(t if k else None for t, k in zip(found, args.mask, strict=True))

    define(
        f"hyper_{name}_grads",
        arguments(f"{prefix}Grads", _OF_GRADS, transposed, mask=list[bool]),
        {f"d{field}": axes[field] for field in Wanted._fields},
        axes=axes,
        kernel=grads_kernel,
        composite=grads_composite,
        validate=validate,
        empty=grads_empty,
    )


def _as_generated(base_weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a z of ones and a head that generate the base."""
    return x.new_ones(x.shape[0], 1), base_weight.unsqueeze(-1)


def _over_pixels(t: Tensor) -> Tensor:
    return t[..., None, None, None]


_define("conv", "Conv", dict(CONV))
_define("conv_transpose", "ConvTranspose", dict(CONV_TRANSPOSE))
