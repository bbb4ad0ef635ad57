"""The op that `fasthyper.hyper_linear` calls: `apply` of the family, with a base and a generated bias added in place.

    y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0

It is T with x and z each extended by a one, [x, 1] and [z, 1], and H by a row and a column, so it needs no new
derivatives. The composites below use the op family and torch's own operations, and run in second order, in forward mode
and under every transform. The kernels avoid the temporaries of the composites: one of the size of the output for each
term, in forward and in backward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import compiled
from ..backends.contract import Wanted
from . import autocast, kept, launches
from .family import run_apply, run_grads
from .register import MISSING, Gradients, Op, choice, define
from .rules import READS
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


def _kernel(args: HyperLinear, run: Op = run_apply) -> Any:
    return run(args, args.x, args.z, args.weight, args.bias, args.base_weight, args.base_bias)


def _composite(args: HyperLinear) -> Tensor:
    if kept.fits(args):
        return kept.apply(args)
    y = ops.apply(args.x, args.z, args.weight, *choice(args))
    with autocast.off(args.x):
        if args.base_weight is not None:
            y = y + args.x @ args.base_weight.T
        if args.bias is not None:
            y = y + (args.z @ args.bias.T).unsqueeze(1)
        return y if args.base_bias is None else y + args.base_bias


def _backward(args: HyperLinear, wanted: dict[str, bool], g: Tensor) -> Gradients:
    mask = [wanted[name] for name in Wanted._fields]
    out = ops.hyper_linear_grads(args.x, args.z, args.weight, args.bias, args.base_weight, g, mask, *choice(args))
    return dict(zip(Wanted._fields, out, strict=True))


define(
    "hyper_linear",
    HyperLinear,
    {"y": "BNO"},
    axes=AXES,
    kernel=_kernel,
    composite=_composite,
    backward=_backward,
    reads=READS,
)


def _grads_kernel(args: HyperLinearGrads, run: Op = run_grads) -> Any:
    return run(args, args.x, args.z, args.weight, args.bias, args.base_weight, args.g, Wanted(*args.mask))


def _grads_by_ops(args: HyperLinearGrads, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Return the requested gradients of x, z, H and W0 without W, and without the part of z from the bias."""
    dx, dz, dh = ops.grads(args.x, args.z, args.weight, args.g, [wanted.x, wanted.z, wanted.weight], *choice(args))
    with autocast.off(args.x):
        if wanted.x and args.base_weight is not None:
            dx = dx + args.g @ args.base_weight
        dbase_weight = args.g.flatten(0, 1).T @ args.x.flatten(0, 1) if wanted.base_weight else None
    return dx, dz, dh, dbase_weight


def _grads_composite(args: HyperLinearGrads) -> tuple[Tensor | None, ...]:
    wanted = Wanted(*args.mask)
    dx, dz, dh, dbase_weight = (kept.grads if kept.fits(args) else _grads_by_ops)(args, wanted)
    dbias = dbase_bias = None
    with autocast.off(args.x):
        if wanted.base_bias or wanted.bias or (wanted.z and args.bias is not None):
            per_instance = args.g.sum(1)
            if wanted.z and args.bias is not None:
                dz = cast(Tensor, dz) + per_instance @ args.bias
            dbias = per_instance.T @ args.z if wanted.bias else None
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
launches.show("hyper_linear", functools.partial(_kernel, run=launches.trace_apply))
launches.show("hyper_linear_grads", functools.partial(_grads_kernel, run=launches.trace_grads))
if not MISSING and compiled.load("eager") is None:  # runs on the CPU instead of these kernels
    torch.ops.fasthyper_eager.declare_axes([*AXES], [*AXES.values()])
    torch.ops.fasthyper_eager.declare_reads([sum(1 << [*READS].index(other) for other in of) for of in READS.values()])
