"""The op that `fasthyper.nn.PairwiseBilinear` calls: every member of one set with every member of another.

    y[b,m,n,o] = Σ_{i,r} H[o,i,r] x[b,m,i] z[b,n,r] + bias[o]

With `ones_x`, x has an appended one, [x, 1], and H a row more; with `ones_z`, z has one, and H a column more. The
appended ones are never written next to x and z. The composites below use torch's own operations: x · H first for all
outputs, which takes B·M·O·R numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.aten import pairs as aten
from . import autocast
from .register import Arguments, Gradients, choice, define
from .rules import others
from .shapes import PAIRS as AXES

ops = torch.ops.fasthyper
_GRADS = ("x", "z", "weight", "bias")


class Pairs(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    ones_x: bool
    ones_z: bool
    backend: str = ""
    schedule: str = ""


class PairsGrads(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    g: Tensor
    ones_x: bool
    ones_z: bool
    mask: list[bool]
    backend: str = ""
    schedule: str = ""


def _validate(args: Pairs | PairsGrads) -> None:
    """Check the features of the weight, which may be one more than those of x and z."""
    for name, t, axis, ones in (("x", args.x, 1, args.ones_x), ("z", args.z, 2, args.ones_z)):
        size = t.shape[2] + int(ones)  # torch 2.11 cannot add a bool to a symbolic size
        if args.weight.shape[axis] != size:
            appended = " and an appended one" if ones else ""
            raise ValueError(
                f"weight must have shape (O, P, Q) with {'OPQ'[axis]} = {size}, got "
                f"{tuple(args.weight.shape)}: {name} has shape {tuple(t.shape)}, so {t.shape[2]} features{appended}"
            )


def _materialised(args: Arguments, device: torch.device) -> bool:
    """Return whether a call is to write out x · H for all outputs; raise if its backend does not run on the device."""
    name = choice(args).backend
    backends.backend(name, device)
    return name == "materialised"


def _append(t: Tensor, one: bool) -> Tensor:
    return torch.cat([t, t.new_ones(()).expand(*t.shape[:-1], 1)], -1) if one else t


def _kernel(args: Pairs) -> Tensor:
    if _materialised(args, args.x.device):
        return _composite(args)
    with autocast.off(args.x):
        return aten.apply(args.x, args.z, args.weight, args.bias, schedule=choice(args).schedule)


def _composite(args: Pairs) -> Tensor:
    with autocast.off(args.x):
        p = torch.einsum("bmp,opq->bmoq", _append(args.x, args.ones_x), args.weight)
        y = torch.einsum("bmoq,bnq->bmno", p, _append(args.z, args.ones_z))
        return y.contiguous() if args.bias is None else (y + args.bias).contiguous()


def _backward(args: Pairs, wanted: dict[str, bool], g: Tensor) -> Gradients:
    mask = [wanted[name] for name in _GRADS]
    out = ops.pairs_grads(args.x, args.z, args.weight, g, args.ones_x, args.ones_z, mask, *choice(args))
    return dict(zip(_GRADS, out, strict=True))


define(
    "pairs",
    Pairs,
    {"y": "BMNO"},
    axes=AXES,
    kernel=_kernel,
    composite=_composite,
    backward=_backward,
    reads={**others(("x", "z", "weight")), "bias": ()},
    validate=_validate,
)


def _grads_kernel(args: PairsGrads) -> tuple[Tensor | None, ...]:
    if _materialised(args, args.x.device):
        return _grads_composite(args)
    with autocast.off(args.x):
        return aten.grads(args.x, args.z, args.weight, args.g, args.mask, schedule=choice(args).schedule)


def _grads_composite(args: PairsGrads) -> tuple[Tensor | None, ...]:
    dx, dz, dh = None, None, None
    with autocast.off(args.x):
        x, z = _append(args.x, args.ones_x), _append(args.z, args.ones_z)
        if args.mask[0] or args.mask[2]:
            v = torch.einsum("bmno,bnq->bmoq", args.g, z)
            dx = torch.einsum("bmoq,opq->bmp", v, args.weight) if args.mask[0] else None
            dh = torch.einsum("bmp,bmoq->opq", x, v).contiguous() if args.mask[2] else None
        if args.mask[1]:
            dz = torch.einsum("bmno,bmoq->bnq", args.g, torch.einsum("bmp,opq->bmoq", x, args.weight))
        dx = None if dx is None else dx[..., : args.x.shape[2]].contiguous()
        dz = None if dz is None else dz[..., : args.z.shape[2]].contiguous()
        return dx, dz, dh, args.g.sum((0, 1, 2)) if args.mask[3] else None


define(
    "pairs_grads",
    PairsGrads,
    {f"d{name}": AXES[name] for name in _GRADS},
    axes=AXES,
    kernel=_grads_kernel,
    composite=_grads_composite,
    validate=_validate,
)
