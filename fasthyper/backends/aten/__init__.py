"""The portable backend: the three schedules in torch's own operations, tile by tile, on any device and dtype.

    y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0

`apply` and `grads` allocate the outputs and hand them, with the planner's schedule and tile, to the module of
that schedule. The family's pure ops are the calls without bias and base.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ... import planner
from ...problem import AUTO, Plan, Problem
from .. import materialised
from . import fold, generate, project
from .tiles import Affine, Tile, accumulate, blocks, boxes, rows

_SMALL = 32
_SCHEDULES = {"fold": fold, "generate": generate, "project": project}


def unavailable() -> str | None:
    """Return why this backend cannot run here: it always can."""
    return None


def tile_of(plan: Plan) -> Tile:
    """Return what a plan says of tiles."""
    low = plan.work_dtype in (torch.bfloat16, torch.float16)
    return Tile(plan.tile, plan.work_dtype, torch.float32 if low else plan.work_dtype)


def _is_one_tile(x: Tensor, weight: Tensor | None, g: Tensor | None, O: int, plan: Plan) -> bool:
    """Whether all of W is a tile and nothing has to be converted: then the loops of `generate` only cost time.

    And where W is far smaller than a tile, so do those of any order.
    """
    size = x.shape[0] * O * x.shape[2]
    room = plan.tile if plan.schedule == "generate" else plan.tile // _SMALL
    if x.dtype != plan.work_dtype or size > room or (weight is not None and rows(weight) is None):
        return False
    # A product of many points reads them where they are if they are contiguous, and else copies them.
    return all(t is None or t.is_contiguous() or t.numel() <= room for t in (x, g))


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    schedule: str,
) -> Tensor:
    """y (B, N, O) from x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    O, _, R = weight.shape
    plan = planner.plan(Problem.of("apply", x, R, O), schedule)
    if schedule == AUTO and _is_one_tile(x, weight, None, O, plan):
        return materialised.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)
    tile = tile_of(plan)
    y = x.new_empty(x.shape[0], x.shape[1], O)
    affine = Affine(x, z, bias, base_weight, base_bias, tile)
    _SCHEDULES[plan.schedule].apply(x, z, weight, y, affine, tile)
    return y


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, z, H, bias, W0, b0 as asked for by the mask; z is not read for dz alone, nor H for dH alone."""
    B, N, I = x.shape
    O = g.shape[2]
    z, weight = (
        cast(Tensor, z),
        cast(Tensor, weight),
    )  # absent only where nothing that is asked for reads them
    R = (z if weight is None else weight).shape[-1]
    plan = planner.plan(Problem.of("grads", x, R, O, (mask[0], mask[1], mask[2])), schedule)
    if schedule == AUTO and _is_one_tile(x, weight, g, O, plan):
        return materialised.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    tile = tile_of(plan)

    def new(wanted: bool, *size: int) -> Tensor | None:
        return x.new_empty(size) if wanted else None

    dx, dz, dh = new(mask[0], B, N, I), new(mask[1], B, R), new(mask[2], O, I, R)
    none = Affine(g, z, None, None, None, tile)
    into_x = none._replace(base_weight=None if base_weight is None else base_weight.T)
    into_z = none._replace(bias=bias)
    if plan.schedule == "fold":
        fold.grads(x, z, weight, g, dx, dz, dh, into_x, into_z, tile)
    else:
        if dx is not None:  # a forward with the head transposed; x is not in it, so nothing is shared
            transposed = weight.transpose(0, 1)
            generate.apply(g, z, transposed, dx, into_x, tile)
        _SCHEDULES[plan.schedule].grads(x, z, weight, g, dz, dh, into_z, tile)
    return dx, dz, dh, *base_grads(x, z, g, R, mask, tile)


def base_grads(
    x: Tensor, z: Tensor | None, g: Tensor, R: int, mask: tuple[bool, ...], tile: Tile
) -> tuple[Tensor | None, ...]:
    """dbias = Σ g ⊗ z, dW0 = Σ g ⊗ x, db0 = Σ g, over instances and points, as asked for by the mask's last three."""
    if not any(mask[3:]):
        return None, None, None
    B, N, I = x.shape
    O = g.shape[2]
    shapes = ((O, R), (O, I), (O,))
    outs = tuple(x.new_empty(shape) if k else None for shape, k in zip(shapes, mask[3:], strict=True))
    z = cast(Tensor, z)  # absent only where dbias is not asked for
    wide = max([out.shape[1] for out in outs[:2] if out is not None], default=1)
    for o in blocks(g.shape[2], tile.elements // max(1, wide)):
        sums = [None if t is None else torch.zeros_like(t[o], dtype=tile.sum_dtype) for t in outs]
        for b, n in boxes(B, N, o.stop - o.start + I + (R if mask[3] else 0), tile):
            gb = tile.work(g[b, n, o])
            if (of_base := sums[1]) is not None:
                accumulate(of_base, gb.flatten(0, 1).T, tile.work(x[b, n]).flatten(0, 1))
            if (of_bias := sums[0]) is not None:
                accumulate(of_bias, gb.sum(1, dtype=tile.sum_dtype).T, tile.work(z[b]))
            if (of_base_bias := sums[2]) is not None:
                of_base_bias += gb.sum((0, 1), dtype=tile.sum_dtype)
        for out, total in zip(outs, sums, strict=True):
            if out is not None and total is not None:
                out[o] = total
    return outs
