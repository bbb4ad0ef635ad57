"""The portable backend: the three schedules in torch's own operations, tile by tile, on any device and dtype.

    y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0

`apply` and `grads` allocate the outputs and pass them, with the planner's schedule and tile, to the module of that
schedule. The ops of the family are the calls without bias and base.
"""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import Tensor

from ... import planner
from ...costs import Costs
from ...geometry import Geometry
from ...problem import AUTO, Plan, Problem, TermProblem
from ...problem import DTYPES as DTYPES
from ...terms import Terms
from .. import materialised
from ..contract import Backend
from . import conv_products, convolution, fold, generate, project
from . import terms as over_terms
from .tiling import Affine, Tiling, accumulate, blocks, boxes, head_matrix, tiling_of

PREFERRED_ON = ()
COSTS = Costs()
REMARK = ""
_SMALL = 32
_SCHEDULES = {"fold": fold, "generate": generate, "project": project, "aggregate": fold}


def devices() -> None:
    """Return the types of device that it runs on: None, for any."""
    return


def unavailable() -> str | None:
    """Return why this backend cannot run here: it always can."""
    return None


def takes(problem: Problem) -> bool:
    """Return whether it computes a problem: it computes all."""
    return True


def _is_one_tile(x: Tensor, weight: Tensor | None, g: Tensor | None, O: int, plan: Plan) -> bool:
    """Return whether all of W is one tile and no tensor is converted: loops over tiles would then only cost time.

    A W that is far smaller than a tile is written out in every schedule.
    """
    size = x.shape[0] * O * x.shape[2]
    room = plan.tile if plan.schedule == "generate" else plan.tile // _SMALL
    if x.dtype != plan.work_dtype or size > room or (weight is not None and head_matrix(weight) is None):
        return False
    # A product over many points reads contiguous points in place, and copies others.
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
    """Return y (B, N, O) of x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    O, _, R = weight.shape
    plan = planner.plan(Problem.of("apply", x, R, O), schedule)
    if schedule == AUTO and _is_one_tile(x, weight, None, O, plan):
        return materialised.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)
    tiling = tiling_of(plan)
    y = x.new_empty(x.shape[0], x.shape[1], O)
    affine = Affine(x, z, bias, base_weight, base_bias, tiling)
    _SCHEDULES[plan.schedule].apply(x, z, weight, y, affine, tiling)
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
    out: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0, b0 where the mask is set.

    z may be None if only dz is needed, and H if only dH is. The first three are written to `out` if it is given.
    """
    B, N, I = x.shape
    O = g.shape[2]
    z, weight = (
        cast(Tensor, z),
        cast(Tensor, weight),
    )  # None only if no requested gradient reads it
    R = (z if weight is None else weight).shape[-1]
    plan = planner.plan(Problem.of("grads", x, R, O, (mask[0], mask[1], mask[2])), schedule)
    if out is None and schedule == AUTO and _is_one_tile(x, weight, g, O, plan):
        return materialised.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    tiling = tiling_of(plan)

    def new(wanted: bool, *size: int) -> Tensor | None:
        return x.new_empty(size) if wanted else None

    dx, dz, dh = out or (new(mask[0], B, N, I), new(mask[1], B, R), new(mask[2], O, I, R))
    none = Affine(g, z, None, None, None, tiling)
    into_x = none._replace(base_weight=None if base_weight is None else base_weight.T)
    into_z = none._replace(bias=bias)
    if plan.schedule == "fold":
        fold.grads(x, z, weight, g, dx, dz, dh, into_x, into_z, tiling)
    else:
        if dx is not None:  # a forward with the transposed head; without x, it shares no product with dz and dH
            transposed = weight.transpose(0, 1)
            generate.apply(g, z, transposed, dx, into_x, tiling)
        _SCHEDULES[plan.schedule].grads(x, z, weight, g, dz, dh, into_z, tiling)
    return dx, dz, dh, *base_grads(x, z, g, R, mask, tiling)


def base_grads(
    x: Tensor, z: Tensor | None, g: Tensor, R: int, mask: tuple[bool, ...], tiling: Tiling
) -> tuple[Tensor | None, ...]:
    """Return dbias = Σ g ⊗ z, dW0 = Σ g ⊗ x, db0 = Σ g, over instances and points, where the mask is set."""
    if not any(mask[3:]):
        return None, None, None
    B, N, I = x.shape
    O = g.shape[2]
    shapes = ((O, R), (O, I), (O,))
    outs = tuple(x.new_empty(shape) if k else None for shape, k in zip(shapes, mask[3:], strict=True))
    z = cast(Tensor, z)  # None only if dbias is not requested
    wide = max([out.shape[1] for out in outs[:2] if out is not None], default=1)
    for o in blocks(g.shape[2], tiling.elements // max(1, wide)):
        sums = [None if t is None else torch.zeros_like(t[o], dtype=tiling.sum_dtype) for t in outs]
        for b, n in boxes(B, N, o.stop - o.start + I + (R if mask[3] else 0), tiling):
            gb = tiling.work(g[b, n, o])
            if (of_base := sums[1]) is not None:
                accumulate(of_base, gb.flatten(0, 1).T, tiling.work(x[b, n]).flatten(0, 1))
            if (of_bias := sums[0]) is not None:
                accumulate(of_bias, gb.sum(1, dtype=tiling.sum_dtype).T, tiling.work(z[b]))
            if (of_base_bias := sums[2]) is not None:
                of_base_bias += gb.sum((0, 1), dtype=tiling.sum_dtype)
        for out, total in zip(outs, sums, strict=True):
            if out is not None and total is not None:
                out[o] = total
    return outs


def apply_terms(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    *,
    terms: Terms,
    schedule: str,
) -> Tensor:
    """Return y (T, N, O) of x (S, N, I), z (C, R), H (O, I, R), summed over terms; see `contract.OverTerms`."""
    O, _, R = weight.shape
    plan = planner.plan(TermProblem.of("apply", x, R, O, terms), schedule)
    return over_terms.apply(x, z, weight, bias, base_weight, base_bias, terms, plan.schedule, tiling_of(plan))


def grads_terms(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    terms: Terms,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0 and b0 where the mask is set; see `contract.OverTerms`."""
    R = cast(Tensor, z if weight is None else weight).shape[-1]
    plan = planner.plan(TermProblem.of("grads", x, R, g.shape[2], terms, (mask[0], mask[1], mask[2])), schedule)
    return over_terms.grads(x, z, weight, bias, base_weight, g, mask, terms, plan.schedule, tiling_of(plan))


def apply_conv(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    y: Tensor,
    *,
    geometry: Geometry,
    transposed: bool,
    schedule: str,
    way: convolution.Way | None = None,
) -> None:
    """Write y; see `contract.Convolving`. `way` has a backend's own products and linear layers."""
    convolution.apply(x, z, weight, bias, base_weight, base_bias, y, geometry, transposed, schedule, way or _way())


def grads_conv(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dh: Tensor | None,
    mask: tuple[bool, ...],
    *,
    geometry: Geometry,
    transposed: bool,
    schedule: str,
    way: convolution.Way | None = None,
) -> tuple[Tensor | None, ...]:
    """Write dx and dh if given; return the other gradients; see `contract.Convolving`."""
    of = geometry, transposed, schedule, way or _way()
    return convolution.grads(x, z, weight, bias, base_weight, g, dx, dh, mask, *of)


def _way() -> convolution.Way:
    return convolution.Way("", conv_products, cast(Backend, sys.modules[__name__]))
