"""The compiled CPU kernels: the sum at the speed of the machine's own matrix product, in csrc/cpu.

float32, bfloat16 and float16, every schedule. What they leave to `aten`: float64, empty problems, and x · H where
all instances share x, which is two plain matrix products.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from .. import planner
from ..problem import AUTO, Plan, Problem
from . import aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FOLDER = Path(__file__).parent
_ops = torch.ops.fasthyper_cpu


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None; loads them."""
    try:
        record = json.loads((_FOLDER / "_cpu_build.json").read_text())
    except FileNotFoundError:
        return "not built: the build could not see torch, or was told not to; pip install --no-build-isolation builds them"
    if "error" in record:
        return f"not built: {record['error']}"
    if record["torch"] != torch.__version__:
        return f"built for torch {record['torch']}, and this is {torch.__version__}: install fasthyper again"
    name = torch.backends.cpu.get_cpu_capability().lower()
    library = _FOLDER / f"_cpu_{name}.so"
    if not library.exists():
        return f"not built for {name}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"built, but cannot be loaded: {error}"
    return None


def _problem(op: str, x: Tensor, R: int, O: int, needs: tuple[bool, bool, bool] = (True, True, True)) -> Problem:
    B, N, I = x.shape
    return Problem(op, B, N, R, I, O, x.dtype, "cpu", B > 1 and x.stride(0) == 0, needs, "cpu")


def _left_to_aten(x: Tensor, R: int, O: int) -> bool:
    return x.dtype not in DTYPES or 0 in (*x.shape, R, O)


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
    problem = _problem("apply", x, R, O)
    plan = planner.plan(problem, schedule)
    if _shares_products(problem, plan):
        return aten.apply(*tensors, schedule=plan.schedule)
    return _ops.apply(*tensors, plan.schedule, planner.get_workspace_limit(), plan.work_dtype != torch.float32)


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
    out: list[Tensor | None] = [None] * 3
    problem = _problem("grads", x, R, O, (dx, dz, dh))
    if dx or dz or dh:
        plan = planner.plan(problem, schedule)
        if _shares_products(problem, plan):
            return aten.grads(*tensors, mask, schedule=plan.schedule)
        of_weight = plan
        if x.shape[1] == 1 and schedule == AUTO and dh and (dx or dz):  # nothing is shared: each at its best
            plan = planner.plan(problem._replace(needs=(dx, dz, False)))
            of_weight = planner.plan(problem._replace(needs=(False, False, True)))
        native = plan.work_dtype != torch.float32
        how = (plan.schedule, of_weight.schedule, planner.get_workspace_limit(), native)
        out = list(_ops.grads(*tensors, [dx, dz, dh], *how))
    rest: tuple[Tensor | None, ...] = (None, None, None)
    if any(mask[3:]):
        rest = aten.base_grads(x, z, g, R, mask, aten.tile_of(planner.plan(problem._replace(backend="aten"))))
    return *(t if k else None for t, k in zip(out, mask, strict=False)), *rest
