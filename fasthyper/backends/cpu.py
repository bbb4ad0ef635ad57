"""The compiled CPU kernels of csrc/cpu: float32, bfloat16 and float16, every schedule.

`aten` computes the rest: float64, empty problems, and what two or three plain matrix products compute faster: `project`
if all instances share x, and many points in bfloat16 where the processor multiplies it.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, cast

import torch
from torch import Tensor

from .. import compiled, planner, processor
from ..costs import Cost, Costs, gemm, moved
from ..geometry import Geometry
from ..problem import AUTO, KERNEL_DTYPES, Machine, Plan, Problem
from . import aten, cpu_conv, cpu_terms
from .aten import conv_products, models
from .aten.convolution import Way
from .contract import Backend

DTYPES = KERNEL_DTYPES
PREFERRED_ON = ("cpu",)
REMARK = ""
_ops = torch.ops.fasthyper_cpu
apply_terms, grads_terms = cpu_terms.apply_terms, cpu_terms.grads_terms


class CpuCosts(Costs):
    """The costs of the compiled kernels: a schedule is one call, H is often read in place, and one output is cheap."""

    small_products = 0.6
    _ROWS = 1024  # rows (b, n) that share a packed block of H
    _PACKING_G, _PACKING_P = 5.0, 20.0  # the measured cost of packing H, in passes over H: for g·H, and for x·H

    def machine(self, device: str, dtype: torch.dtype, threads: int) -> Machine:
        work, rate = (dtype, 400e9) if processor.kernels_multiply(dtype) else (torch.float32, 100e9)
        return Machine(rate * threads, 150e9 * threads, 10e9, 1e-6, 2 << 20, work, 2.0)

    def in_tiles(self, schedule: str) -> bool:
        return False

    def backward(self, p: Problem) -> tuple[tuple[bool, bool, bool], ...]:
        """Return the groups of gradients that are planned together.

        With one point per instance, dH shares no product with dx and dz, and has its own schedule.
        """
        dx, dz, dh = p.needs
        if p.points == 1 and dh and (dx or dz):
            return (dx, dz, False), (False, False, True)
        return (p.needs,)

    def apply(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        if schedule == "project" and self._is_one_output(p):  # x·H, and a product of rows
            B, R = p.batch, p.cond_features
            return gemm(B, R, p.in_features, machine) + moved(B * R, 1, machine)
        packing = self._packing(p, self._PACKING_P if schedule == "project" else 0.0, machine)
        return super().apply(p, schedule, machine) + packing

    def grads(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        dx, dz, dh = p.needs
        if schedule == "project" and dh:  # there is no dH by `project`
            rest = self.grads(p._replace(needs=(dx, dz, False)), schedule, machine)
            return rest + self.grads(p._replace(needs=(False, False, True)), "generate", machine)
        if schedule == "project" and self._is_one_output(p):  # x·H and z·Hᵀ, scaled by g as they are written
            return gemm(p.batch, p.cond_features, p.in_features, machine, dx + dz)
        if schedule == "fold":
            passes = self._PACKING_G if dx or dz else 0.0
        else:
            passes = self._PACKING_P if dz else 0.0
        return super().grads(p, schedule, machine) + self._packing(p, passes, machine)

    def _packing(self, p: Problem, passes: float, machine: Machine) -> Cost:
        """Return the cost of packing H, once for each group of rows; sums along its last axis do not need it."""
        if not passes or self._is_one_output(p):
            return Cost()
        groups = max(1.0, p.batch * p.points / self._ROWS)
        return moved(p.cond_features * p.in_features * p.out_features * groups, passes, machine)

    @staticmethod
    def _is_one_output(p: Problem) -> bool:
        """Return whether there is one output and one point: y, dx and dz are then plain products, the cheapest way."""
        small = p.in_features * p.cond_features <= 1 << 18
        return p.dtype == torch.float32 and p.out_features == 1 and p.points == 1 and small


COSTS = CpuCosts()


def devices() -> tuple[str, ...]:
    """Return the types of device that it runs on."""
    return ("cpu",)


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None; loads those for the processor."""
    return compiled.load(f"cpu_{processor.kernels()}")


def takes(problem: Problem) -> bool:
    """Return whether there is a kernel for a problem."""
    return problem.dtype in DTYPES and 0 not in problem.sizes


def _remember(*decision: object) -> None:
    """Let the next call of the same problem run without Python, through csrc/eager.cpp."""
    if compiled.load("eager") is None:
        torch.ops.fasthyper_eager.remember(*decision)


def _forget() -> None:
    if compiled.load("eager") is None:
        torch.ops.fasthyper_eager.forget()


planner.on_forget.append(_forget)


_MANY_POINTS = 256


def _is_for_torch(problem: Problem, plan: Plan, schedule: str) -> bool:
    """Return whether torch's own products are faster than these kernels.

    They are for shared products of x and H, and where the processor multiplies bfloat16 and instances have points:
    these kernels compute W and the products with it in float32. In backward, the points must be many enough to pay for
    sums of tiles in float32.
    """
    if problem.shared_x and plan.schedule == "project":
        return True
    if problem.points == 1 or plan.work_dtype != torch.bfloat16 or plan.schedule != "generate" or schedule != AUTO:
        return False
    return problem.op == "apply" or (problem.points >= _MANY_POINTS and problem.in_features >= 8)


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
    tensors = (x, z, weight, bias, base_weight, base_bias)
    problem = Problem.of("apply", x, R, O, backend="cpu")
    if not takes(problem):
        return aten.apply(*tensors, schedule=schedule)
    plan = planner.plan(problem, schedule)
    if _is_for_torch(problem, plan, schedule):
        return aten.apply(*tensors, schedule=plan.schedule)
    options = (planner.get_workspace_limit(), plan.work_dtype != torch.float32)
    if schedule == AUTO:
        _remember(x, R, O, 0, plan.schedule, plan.schedule, *options)
    return _ops.apply(*tensors, plan.schedule, *options)


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
    """Return the gradients of x, z, H, bias, W0, b0 where the mask is set.

    z may be None if only dz is needed, and H if only dH is.
    """
    O = g.shape[2]
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    tensors = (x, z, weight, bias, base_weight, g)
    dx, dz, dh, *_ = mask
    problem = Problem.of("grads", x, R, O, (dx, dz, dh), "cpu")
    if not takes(problem):
        return aten.grads(*tensors, mask, schedule=schedule)
    out: list[Tensor | None] = [None] * 6
    if dx or dz or dh:
        plan = planner.plan(problem, schedule)
        if _is_for_torch(problem, plan, schedule):
            return aten.grads(*tensors, mask, schedule=plan.schedule)
        plan, plan_of_weight = _plans_of_grads(problem, schedule)
        options = (planner.get_workspace_limit(), plan.work_dtype != torch.float32)
        if schedule == AUTO:
            needs = dx | dz << 1 | dh << 2
            _remember(x, R, O, needs, plan.schedule, plan_of_weight.schedule, *options)
        out = list(_ops.grads(*tensors, mask, plan.schedule, plan_of_weight.schedule, *options))
    if any(k and t is None for t, k in zip(out[3:], mask[3:], strict=True)):
        tiling = aten.tiling_of(planner.plan(problem._replace(backend="")))
        out[3:] = aten.base_grads(x, z, g, R, mask, tiling)
    return tuple(t if k else None for t, k in zip(out, mask, strict=True))


def apply_models(x: Tensor, z: Tensor, weight: Tensor, *, schedule: str) -> Tensor:
    """Return y (M, B, N, O) of x (M, B, N, I), z (M, B, R), H (M, O, I, R); see `contract.OfModels`."""
    problem = _problem_of_models("apply", x, weight.shape[3], weight.shape[1])
    if not _loops_over_models(problem, len(x), schedule) or models.is_shared(weight):
        return _together(problem).apply_models(x, z, weight, schedule=schedule)
    plan = planner.plan(problem, schedule)
    options = planner.get_workspace_limit(), plan.work_dtype != torch.float32
    return _ops.apply_models(x, z, weight, plan.schedule, *options)


def grads_models(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z and H where the mask is set; see `contract.OfModels`."""
    dx, dz, dh = mask
    R = cast(Tensor, z if weight is None else weight).shape[-1]
    problem = _problem_of_models("grads", x, R, g.shape[3], (dx, dz, dh))
    if not _loops_over_models(problem, len(x), schedule) or not any(mask):
        return _together(problem).grads_models(x, z, weight, g, mask, schedule=schedule)
    plan, plan_of_weight = _plans_of_grads(problem, schedule)
    options = planner.get_workspace_limit(), plan.work_dtype != torch.float32
    out = _ops.grads_models(x, z, weight, g, mask, plan.schedule, plan_of_weight.schedule, *options)
    return tuple(t if k else None for t, k in zip(out, mask, strict=True))


def _problem_of_models(
    op: str, x: Tensor, R: int, O: int, needs: tuple[bool, bool, bool] = (True, True, True)
) -> Problem:
    """Return the problem of one of the models of x (M, B, N, I)."""
    _, B, N, I = x.shape
    return Problem(op, B, N, R, I, O, x.dtype, x.device.type, needs=needs, backend="cpu")


def _together(problem: Problem) -> models.Models:
    return models.Models(cast(Backend, sys.modules[__name__]) if takes(problem) else aten)


_INSTANCES_OF_MODEL, _ROWS_OF_MODEL, _LARGE_MODEL = 4, 8, 1 << 18


def _loops_over_models(problem: Problem, count: int, schedule: str) -> bool:
    """Return whether the kernels run the models, rather than torch's batched products.

    The kernels fill vectors with rows of different instances, which a model of few instances leaves empty. Batched
    products of large models would have no room for two.
    """
    if count == 0 or not takes(problem):
        return False
    few = problem.batch < _INSTANCES_OF_MODEL or problem.batch * problem.points < _ROWS_OF_MODEL
    large = problem.batch * problem.in_features * problem.out_features > _LARGE_MODEL
    return schedule != AUTO or large or not few


def _plans_of_grads(problem: Problem, schedule: str) -> tuple[Plan, Plan]:
    """Return the plan of dx and dz, and that of dH."""
    plan = planner.plan(problem, schedule)
    groups = COSTS.backward(problem)
    if schedule != AUTO or len(groups) < 2:
        return plan, plan
    first, second = (planner.plan(problem._replace(needs=needs)) for needs in groups)
    return first, second


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
) -> None:
    """Write y; see `contract.Convolving`."""
    of: Any = {"geometry": geometry, "transposed": transposed, "schedule": schedule, "way": _way(x, geometry)}
    aten.apply_conv(x, z, weight, bias, base_weight, base_bias, y, **of)


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
) -> tuple[Tensor | None, ...]:
    """Write dx and dh if given; return the other gradients; see `contract.Convolving`."""
    of: Any = {"geometry": geometry, "transposed": transposed, "schedule": schedule, "way": _way(x, geometry)}
    return aten.grads_conv(x, z, weight, bias, base_weight, g, dx, dh, mask, **of)


def _way(x: Tensor, geo: Geometry) -> Way | None:
    """Return how convolutions run here; in float64 as in aten. In groups, the kernels beat products in bfloat16."""
    if x.dtype not in DTYPES:
        return None
    linear = cast(Backend, sys.modules[__name__])
    if (geo.pointwise or geo.groups == 1) and processor.kernels_multiply(x.dtype):
        return Way("cpu", conv_products, linear)
    return Way("cpu", cpu_conv, linear, torch.float32, pointwise=True)
