"""The CUDA kernels of csrc/cuda: few launches for small problems, and hand-written pipelines for Hopper.

They compute the schedule `fold` in float32, bfloat16 and float16, and whole primary networks of two layers. Other
backends compute the rest: float64, empty problems, the schedules `generate` and `project`, and problems that exceed
the shared memory of a block or the workspace. With FASTHYPER_EMULATED=1 the emulator of csrc/cuda/emulated.h runs the
kernels on the CPU, slowly: the tests use that.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from ... import compiled, planner, seen
from ...problem import AUTO, Problem
from ...terms import Terms
from .. import aten, gpu, triton
from . import library, primaries

DTYPES = gpu.DTYPES
REMARK = f"for small problems; {seen.describe('cuda')}"
"""A remark for `fasthyper info`."""
PREFERRED_ON = ()  # `gpu_auto` chooses it
COSTS = triton.COSTS  # until a GPU has measured its own
emulating = library.emulating


def devices() -> tuple[str, ...]:
    """Return the types of device that it runs on."""
    return ("cuda", "cpu") if emulating() else ("cuda",)


_MOST_ROWS = (1 << 31) - (1 << 10)  # as csrc/cuda/limits.h has them
_MOST_OUTPUTS = 65535 * 64  # the blocks of a grid, and their columns


def takes(problem: Problem) -> bool:
    """Return whether the kernels are for the dtype and the sizes of a problem."""
    rows = problem.batch * problem.points
    return gpu.takes(problem) and rows <= _MOST_ROWS and problem.out_features <= _MOST_OUTPUTS


@functools.cache
def unavailable() -> str | None:
    """Return why these kernels cannot run here, or None."""
    if emulating():
        return compiled.load("cuda_emulated")
    if (why := gpu.unsuitable()) is not None:
        return why
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    if (why := compiled.load("cuda")) is not None:
        return why
    try:
        library.ops().generation()
    except RuntimeError as error:
        return f"built, but not for {torch.cuda.get_device_name()}: {error}"
    return None


def _fallback() -> ModuleType:
    """Return the backend that computes what these kernels do not."""
    return aten if emulating() or triton.unavailable() else triton


_SMALL = 1 << 31  # flops; larger problems spend little of their time on launches


def is_best(x: Tensor, R: int, O: int) -> bool:
    """Return whether ``"auto"`` takes these kernels: for small problems, on GPUs that have shown them to be right."""
    if not (x.is_cuda and seen.is_right("cuda", gpu.device(x, gpu.INTERPRETED).arch) and unavailable() is None):
        return False
    B, N, I = x.shape
    return bool(2 * B * N * R * I * O <= _SMALL)  # a guard where torch traces symbols


def _remember(x: Tensor, R: int, O: int, needs: int) -> None:
    """Let the next call of the same problem run without Python, through csrc/eager.cpp."""
    if x.is_cuda and compiled.load("eager") is None:
        options = planner.get_workspace_limit(), emulating()
        for forced in (True, False) if is_best(x, R, O) else (True,):
            torch.ops.fasthyper_eager.remember_on_gpu(x, R, O, needs, forced, *options)


def _is_fold(op: str, x: Tensor, R: int, O: int, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3) -> bool:
    """Return whether the schedule of a call is `fold`, which these kernels compute."""
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
    """Return y (B, N, O) from x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    O, _, R = weight.shape
    tensors = (x, z, weight, bias, base_weight, base_bias)
    if not _is_fold("apply", x, R, O, schedule):
        return _fallback().apply(*tensors, schedule=schedule)
    if schedule == AUTO:
        _remember(x, R, O, 0)
    y = x.new_empty(x.shape[0], x.shape[1], O)
    library.ops().apply(*tensors, y, planner.get_workspace_limit(), gpu.allows_tf32())
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
    tensors, limit = (x, z, weight, bias, base_weight, g), planner.get_workspace_limit()
    is_fold = any(mask) and _is_fold("grads", x, R, O, schedule, (mask[0], mask[1], mask[2]))
    if not is_fold or not library.fits(library.index(x), (B, N, R, I, O), x.dtype, tuple(mask), limit):
        return _fallback().grads(*tensors, mask, schedule=schedule)
    if schedule == AUTO:
        _remember(x, R, O, library.bits(mask))
    shapes = ((B, N, I), (B, R), (O, I, R), (O, R), (O, I), (O,))
    out = [x.new_empty(shape) if k else None for shape, k in zip(shapes, mask, strict=True)]
    library.ops().grads(*tensors, *out, limit, gpu.allows_tf32())
    return tuple(out)


def apply_terms(*factors: Tensor | None, terms: Terms, schedule: str) -> Tensor:
    """Return y (T, N, O); see `contract.OverTerms`. These kernels have no indices: the fallback computes it."""
    return cast(Tensor, _fallback().apply_terms(*factors, terms=terms, schedule=schedule))


def grads_terms(*factors: Tensor | tuple[bool, ...] | None, terms: Terms, schedule: str) -> tuple[Tensor | None, ...]:
    """Return the gradients of `apply_terms`, by the fallback."""
    out = _fallback().grads_terms(*factors, terms=terms, schedule=schedule)
    return cast("tuple[Tensor | None, ...]", out)


fuses, primary, primary_grads = primaries.fuses, primaries.primary, primaries.primary_grads
