"""The compiled CPU kernels: the sum at the speed of the machine's own matrix product, in csrc/cpu.

float32, bfloat16 and float16, every schedule. What they leave to `aten`: float64, empty problems, and x · H where
all instances share x, which is two plain matrix products.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import compiled, planner, processor
from ..problem import AUTO, Plan, Problem
from . import aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.fasthyper_cpu


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None; loads those for the processor."""
    return compiled.load(f"cpu_{processor.kernels()}")


def _left_to_aten(x: Tensor, R: int, O: int) -> bool:
    return x.dtype not in DTYPES or 0 in (*x.shape, R, O)


def _remember(*decision: object) -> None:
    """Let the next call of the same problem go without Python, through csrc/eager.cpp."""
    if compiled.load("eager") is None:
        torch.ops.fasthyper_eager.remember(*decision)


def _forget() -> None:
    if compiled.load("eager") is None:
        torch.ops.fasthyper_eager.forget()


planner.on_forget.append(_forget)


def _shares_products(problem: Problem, plan: Plan) -> bool:
    return problem.shared_x and plan.schedule == "project"


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
    tensors = (x, z, weight, bias, base_weight, base_bias)
    if _left_to_aten(x, R, O):
        return aten.apply(*tensors, schedule=schedule)
    problem = Problem.of("apply", x, R, O, backend="cpu")
    plan = planner.plan(problem, schedule)
    if _shares_products(problem, plan):
        return aten.apply(*tensors, schedule=plan.schedule)
    how = (planner.get_workspace_limit(), plan.work_dtype != torch.float32)
    if schedule == AUTO:
        _remember(x, R, O, 0, plan.schedule, plan.schedule, *how)
    return _ops.apply(*tensors, plan.schedule, *how)


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
    O = g.shape[2]
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    tensors = (x, z, weight, bias, base_weight, g)
    if _left_to_aten(x, R, O):
        return aten.grads(*tensors, mask, schedule=schedule)
    dx, dz, dh = mask[:3]
    out: list[Tensor | None] = [None] * 6
    problem = Problem.of("grads", x, R, O, (dx, dz, dh), "cpu")
    if dx or dz or dh:
        plan = planner.plan(problem, schedule)
        if _shares_products(problem, plan):
            return aten.grads(*tensors, mask, schedule=plan.schedule)
        of_weight = plan
        if x.shape[1] == 1 and schedule == AUTO and dh and (dx or dz):  # nothing is shared: each at its best
            plan = planner.plan(problem._replace(needs=(dx, dz, False)))
            of_weight = planner.plan(problem._replace(needs=(False, False, True)))
        schedules = (plan.schedule, of_weight.schedule)
        how = (*schedules, planner.get_workspace_limit(), plan.work_dtype != torch.float32)
        if schedule == AUTO:
            _remember(x, R, O, dx | dz << 1 | dh << 2, *how)
        out = list(_ops.grads(*tensors, mask, *how))
    if any(k and t is None for t, k in zip(out[3:], mask[3:], strict=True)):
        out[3:] = aten.base_grads(x, z, g, R, mask, aten.tile_of(planner.plan(problem._replace(backend="aten"))))
    return tuple(t if k else None for t, k in zip(out, mask, strict=True))
