"""The Triton kernels of `fasthyper.kernels`: x ⊗ z and G = g·H are formed and reduced on chip, on NVIDIA and AMD GPUs.

They compute the schedule `fold` in float32, bfloat16 and float16. `aten` computes the rest: float64, empty problems,
and the schedules `generate` and `project`, which are cuBLAS products on chunks in the workspace, and faster if an
instance has many points. With TRITON_INTERPRET=1 the kernels run on the CPU, slowly: the tests
use that.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from typing import Any, cast

from torch import Tensor

from ... import planner, seen
from ...problem import Plan, Problem, TermProblem
from ...terms import Terms
from .. import aten, gpu
from .tiles import dx_dz_tiles

DTYPES, takes = gpu.DTYPES, gpu.takes
REMARK = seen.describe("triton")
"""A remark for `fasthyper info`."""
PREFERRED_ON = ("cuda",)
_OLDEST_TRITON = (3, 6)


class TritonCosts(gpu.GpuCosts):
    """`dx_dz` takes dx and dz together where all of R and O fit its tile."""

    def one_pass(self, p: Problem | TermProblem) -> bool:
        return bool(dx_dz_tiles("sm_90", p.dtype.itemsize * 8, p.cond_features, p.out_features))


COSTS = TritonCosts()


def devices() -> tuple[str, ...]:
    """Return the types of device that it runs on."""
    return ("cuda", "cpu") if interpreting() else ("cuda",)


@functools.cache
def interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    version = importlib.import_module("triton").__version__
    if tuple(int(n) for n in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton {version} is older than {_OLDEST_TRITON[0]}.{_OLDEST_TRITON[1]}"
    return None if interpreting() else gpu.unsuitable()


@functools.cache
def _launch() -> Any:
    """Return the module that launches the kernels. It imports triton, which `import fasthyper` must not do."""
    return importlib.import_module(f"{__name__}.launch")


def _schedule(
    op: str, x: Tensor, R: int, O: int, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3
) -> tuple[str, bool]:
    """Return the schedule of a call, and whether these kernels compute it; `aten` computes the others."""
    problem = Problem.of(op, x, R, O, needs, "triton")._replace(device="cuda")  # under the interpreter, too
    if not takes(problem) or not any(needs):
        return schedule, False
    schedule = planner.plan(problem, schedule).schedule
    return schedule, schedule == "fold"


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
    """Return y (B, N, O) from x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    O, _, R = weight.shape
    schedule, is_fold = _schedule("apply", x, R, O, schedule)
    if not is_fold:
        return aten.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)
    y = x.new_empty(x.shape[0], x.shape[1], O)
    _launch().apply(x, z, weight, bias, base_weight, base_bias, y)
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
    """Return the gradients of x, z, H, bias, W0, b0 where the mask is set, else None.

    z may be None if only dz is needed, and H if only dH is.
    """
    (B, N, I), O = x.shape, g.shape[2]
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    schedule, is_fold = _schedule("grads", x, R, O, schedule, (mask[0], mask[1], mask[2]))
    if not is_fold:
        return aten.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    out = [x.new_empty(shape) if k else None for shape, k in zip(((B, N, I), (B, R), (O, I, R)), mask, strict=False)]
    _launch().grads(x, z, weight, bias, base_weight, g, *out)
    shared: tuple[Tensor | None, ...] = (None, None, None)
    if any(mask[3:]):
        shared = aten.base_grads(x, z, g, R, mask, aten.tiling_of(planner.plan(Problem.of("grads", x, R, O))))
    return *out, *shared


def trace_apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    *,
    schedule: str,
    emit: Any,
) -> Tensor | None:
    """Return y, whose launches `emit` gets; None if the op stays in the graph. See `contract.Traced`."""
    if interpreting():
        return None
    return cast(Tensor | None, _traced().apply(x, z, weight, bias, base_weight, base_bias, schedule, emit))


def trace_grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    schedule: str,
    emit: Any,
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients, whose launches `emit` gets; None if the op stays in the graph. See `contract.Traced`."""
    if interpreting():
        return None
    out = _traced().grads(x, z, weight, bias, base_weight, g, mask, schedule, emit)
    return cast(tuple[Tensor | None, ...] | None, out)


@functools.cache
def _traced() -> Any:
    """Return the module that puts launches into graphs, which imports triton."""
    return importlib.import_module(f"{__name__}.traced")


def _term_plan(
    op: str, x: Tensor, R: int, O: int, terms: Terms, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3
) -> Plan | None:
    """Return the plan of a call over terms; None if `aten` computes it."""
    problem = TermProblem.of(op, x, R, O, terms, needs, "triton")._replace(device="cuda")
    return planner.plan(problem, schedule) if gpu.takes_terms(problem) else None


@functools.cache
def _terms() -> Any:
    """Return the module of the family over terms, which imports triton."""
    return importlib.import_module(f"{__name__}.terms")


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
    """Return y (T, N, O); see `contract.OverTerms`."""
    O, _, R = weight.shape
    plan = _term_plan("apply", x, R, O, terms, schedule)
    factors = x, z, weight, bias, base_weight, base_bias
    if plan is None:
        return aten.apply_terms(*factors, terms=terms, schedule=schedule)
    return cast(Tensor, _terms().apply(*factors, terms, plan))


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
    plan = _term_plan("grads", x, R, g.shape[2], terms, schedule, (mask[0], mask[1], mask[2]))
    factors = x, z, weight, bias, base_weight, g, mask
    if plan is None:
        return aten.grads_terms(*factors, terms=terms, schedule=schedule)
    return cast(tuple[Tensor | None, ...], _terms().grads(*factors, terms, plan))
