"""Generated convolutions: the choice of a schedule, and calls without any numbers."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ... import planner
from ...geometry import Geometry
from ...problem import ConvProblem, Plan
from ..contract import Backend
from . import conv_fold, conv_generate, conv_products
from .conv_generate import BiasSums, Products, shift_of
from .tiling import Tiling, tiling_of

_MANY_PIXELS = 128


class Way(NamedTuple):
    """How a backend runs convolutions.

    Attributes:
        backend: its name in the planner.
        products: those of an image with the kernel of its instance.
        linear: runs the patches of images as points.
        dtype: the dtype of the products; None for the one that the planner chooses.
        pointwise: whether the linear layers also run pointwise kernels, in every schedule.
    """

    backend: str
    products: Products
    linear: Backend
    dtype: torch.dtype | None = None
    pointwise: bool = False

    def is_linear(self, geo: Geometry, schedule: str) -> bool:
        """Return whether a convolution runs as a linear layer."""
        return schedule == "fold" or (self.pointwise and geo.pointwise and geo.groups == 1)

    def swaps(self, x: Tensor, O: int, geo: Geometry) -> bool:
        """Return whether a linear layer would swap the axes of more outputs than it has inputs, which costs more."""
        return geo.pixels[0] >= _MANY_PIXELS and x.shape[1] < O and x.is_contiguous()

    def tiling(self, plan: Plan) -> Tiling:
        """Return the tiles of a plan."""
        tiling = tiling_of(plan)
        return tiling if self.dtype is None else Tiling(tiling.elements, self.dtype, self.dtype)

    def tiling_of_kernels(self, tiling: Tiling, geo: Geometry, alone: bool) -> Tiling:
        """Return the tiles of a gradient: smaller if torch computes dW, with padded copies, in tiles of a backend.

        `alone`: there is no gradient of H, whose own tiles would be smaller.
        """
        copied = alone and self.backend and self.products is conv_products and not geo.pointwise
        return tiling._replace(elements=max(1, tiling.elements // 2)) if copied else tiling


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    y: Tensor,
    geo: Geometry,
    transposed: bool,
    schedule: str,
    way: Way,
) -> None:
    """Write y."""
    O, I, R = weight.shape[0], weight.shape[1], weight.shape[-1]
    problem = ConvProblem.of("apply", x, I, O, R, geo, backend=way.backend)
    plan = planner.plan(problem, schedule)
    call = x, z, weight, bias, base_weight, base_bias, y, geo, transposed, way.tiling(plan)
    if problem.is_empty and (problem._replace(cond_features=1).is_empty or base_weight is None):
        shift = shift_of(z, bias, base_bias, call[-1])
        y.copy_(y.new_zeros(()) if shift is None else shift[..., None, None, None])
    elif way.is_linear(geo, plan.schedule) and (plan.schedule == "fold" or not way.swaps(x, y.shape[1], geo)):
        conv_fold.apply(*call, way.linear, plan.schedule)
    else:
        conv_generate.apply(*call, way.products)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dh: Tensor | None,
    mask: tuple[bool, ...],
    geo: Geometry,
    transposed: bool,
    schedule: str,
    way: Way,
) -> tuple[Tensor | None, ...]:
    """Write dx and dh if given; return dz, dbias, dW0 and db0 where the mask is set."""
    image, output = (g, x) if transposed else (x, g)
    O, I = output.shape[1], image.shape[1] // geo.groups
    R = cast(Tensor, weight if z is None else z).shape[-1]
    needs = mask[0], mask[1], mask[2] or mask[4]
    problem = ConvProblem.of("grads", x, I, O, R, geo, needs, way.backend)
    plan = planner.plan(problem, schedule)
    tiling = way.tiling(plan)
    if problem._replace(cond_features=1).is_empty:
        for t in (dx, dh):
            if t is not None:
                t.zero_()
        sums = BiasSums(g, z, bias, R, mask, tiling)
        every = slice(0, x.shape[0])
        sums.put(every, sums.add(every))
        dbias, db0 = sums.of_bias()
        return sums.dz, dbias, x.new_zeros(O, I, *geo.kernel) if mask[4] else None, db0
    call = x, z, weight, bias, base_weight, g, dx, dh, mask, geo, transposed
    if way.is_linear(geo, plan.schedule):
        return conv_fold.grads(*call, tiling, way.linear, plan.schedule)
    return conv_generate.grads(*call, way.tiling_of_kernels(tiling, geo, dh is None), way.products)
