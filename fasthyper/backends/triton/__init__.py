"""The Triton kernels of `fasthyper.kernels`: x ⊗ z and G = g·H are made and reduced on chip, on NVIDIA and AMD GPUs.

float32, bfloat16 and float16; the schedule `fold` is theirs. What they leave to `aten`: float64, empty problems, and
`generate` and `project`, which are products of cuBLAS on chunks of the workspace, and win where many points share
what an instance generates. With TRITON_INTERPRET=1 they run on the CPU, slowly: that is how they are tested.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ... import planner
from ...problem import Problem
from .. import aten
from ..gpu_costs import GpuCosts
from .tiles import dx_dz_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_ON = ("cuda",)
_LEAST = (3, 6)
REMARK = "its kernels have never run on a GPU: proven by Triton's interpreter and by compiling ahead of time"
"""What `fasthyper info` says of it."""


class TritonCosts(GpuCosts):
    """`dx_dz` takes dx and dz together where all of R and O fit its tile."""

    def one_pass(self, p: Problem) -> bool:
        return bool(dx_dz_tiles("sm_90", p.dtype.itemsize * 8, p.cond_features, p.out_features))


COSTS = TritonCosts()


def devices() -> tuple[str, ...]:
    """Return the types of device that it runs on."""
    return ("cuda", "cpu") if interpreting() else ("cuda",)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    version = importlib.import_module("triton").__version__
    if tuple(int(n) for n in version.split(".")[:2]) < _LEAST:
        return f"triton {version} is older than {_LEAST[0]}.{_LEAST[1]}"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    return None


def _kernels() -> Any:
    """The module that launches them: importing it imports triton, which `import fasthyper` does not."""
    return importlib.import_module(f"{__name__}.run")


def takes(problem: Problem) -> bool:
    """Return whether kernels for GPUs, these and those of `cuda`, are for such a dtype and such sizes."""
    return problem.dtype in DTYPES and 0 not in problem[1:6] and problem.batch * problem.points < 1 << 31


def _schedule(
    op: str, x: Tensor, R: int, O: int, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3
) -> tuple[str, bool]:
    """The schedule of a call, and whether these kernels run it; else `aten` does."""
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
    """y (B, N, O) from x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    O, _, R = weight.shape
    schedule, ours = _schedule("apply", x, R, O, schedule)
    if not ours:
        return aten.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)
    y = x.new_empty(x.shape[0], x.shape[1], O)
    _kernels().apply(x, z, weight, bias, base_weight, base_bias, y)
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
    (B, N, I), O = x.shape, g.shape[2]
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    schedule, ours = _schedule("grads", x, R, O, schedule, (mask[0], mask[1], mask[2]))
    if not ours:
        return aten.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    out = [x.new_empty(shape) if k else None for shape, k in zip(((B, N, I), (B, R), (O, I, R)), mask, strict=False)]
    _kernels().grads(x, z, weight, bias, base_weight, g, *out)
    rest: tuple[Tensor | None, ...] = (None, None, None)
    if any(mask[3:]):
        rest = aten.base_grads(x, z, g, R, mask, aten.tiling_of(planner.plan(Problem.of("grads", x, R, O))))
    return *out, *rest
