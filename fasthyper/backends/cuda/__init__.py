"""The CUDA kernels of csrc/cuda: few launches where a problem is small, hand-placed pipelines on Hopper.

float32, bfloat16 and float16; the schedule `fold` is theirs, and whole primaries of two layers. What they leave to
others: float64, empty problems, `generate` and `project`, and what has no room in a block's shared memory or in the
workspace. With FASTHYPER_EMULATED=1 they run on the CPU, slowly, by the emulator of csrc/cuda/emulated.h: that is how
they are tested.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from ... import compiled, planner
from ...problem import Problem
from .. import aten, triton
from ..gpu_costs import GpuCosts
from . import launch, primaries
from .device import Device

REMARK = "only use_backend takes it: its kernels have never run on a GPU, they are proven by an emulator"
"""What `fasthyper info` says of it."""


DTYPES = triton.DTYPES
DEFAULT_ON = ()
COSTS = GpuCosts()
takes = triton.takes


def devices() -> tuple[str, ...]:
    """Return the types of device that it runs on."""
    return ("cuda", "cpu") if emulating() else ("cuda",)


def emulating() -> bool:
    """Whether the emulator runs the kernels, on CPU tensors."""
    return os.environ.get("FASTHYPER_EMULATED", "0") == "1"


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None."""
    if emulating():
        return compiled.load("cuda_emulated")
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    if (why := compiled.load("cuda")) is not None:
        return why
    try:
        torch.ops.fasthyper_cuda.generation()
    except RuntimeError as error:
        return f"built, but not for {torch.cuda.get_device_name()}: {error}"
    return None


def _others() -> ModuleType:
    """Who runs what these kernels leave."""
    return aten if emulating() or triton.unavailable() else triton


def _ours(op: str, x: Tensor, R: int, O: int, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3) -> bool:
    """Whether a call is folded, which these kernels do."""
    problem = Problem.of(op, x, R, O, needs, "cuda")._replace(device="cuda")  # under the emulator, too
    return takes(problem) and planner.plan(problem, schedule).schedule == "fold"


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
    if not _ours("apply", x, R, O, schedule):
        return _others().apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)
    y = x.new_empty(x.shape[0], x.shape[1], O)
    launch.fold(x, z, weight.permute(1, 2, 0), base_weight, bias, base_bias, y, Device.of(x))
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
    dev = Device.of(x)
    ours = any(mask) and _ours("grads", x, R, O, schedule, (mask[0], mask[1], mask[2]))
    how = launch.grads_launch(B, N, R, I, O, x.dtype, tuple(mask), dev) if ours else None
    if how is None:
        return _others().grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    shapes = ((B, N, I), (B, R), (O, I, R), (O, R), (O, I), (O,))
    out = [x.new_empty(shape) if k else None for shape, k in zip(shapes, mask, strict=True)]
    launch.grads(x, z, weight, bias, base_weight, g, out, how, dev)
    return tuple(out)


fuses, primary, primary_grads = primaries.fuses, primaries.primary, primaries.primary_grads
