"""The common part of the GPU backends, `triton` and `cuda`: devices, costs, the calls they take, workspace limits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import planner
from ..costs import Cost, Costs, gemm, moved
from ..problem import KERNEL_DTYPES, Machine, Problem, TermProblem

_LAUNCHES = 5  # for each result and tile: A or M, the product with H, and sums
DTYPES = KERNEL_DTYPES
AMD = ("gfx942",)
"""The architectures of AMD that the kernels are compiled for."""
INTERPRETER = "interpreter"
"""The arch of the device that Triton's interpreter stands in for."""


class Device(NamedTuple):
    """A GPU, or the stand-in for one.

    Args:
        name: the product's name.
        arch: the architecture, such as ``"sm_90"`` or ``"gfx942"``.
        processors: number of multiprocessors.
    """

    name: str
    arch: str
    processors: int


# Few multiprocessors, so that sums of small problems are split, too.
INTERPRETED = Device("Triton's interpreter", INTERPRETER, 4)


def device(t: Tensor, stand_in: Device) -> Device:
    """Return the GPU of a tensor, or the stand-in for a tensor that is not on a GPU."""
    return _device(t.device.index) if t.device.type == "cuda" else stand_in


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, _arch(properties), properties.multi_processor_count)


def _arch(properties: Any) -> str:
    amd = torch.version.hip is not None
    return str(properties.gcnArchName).partition(":")[0] if amd else f"sm_{properties.major}{properties.minor}"


@contextlib.contextmanager
def current(t: Tensor) -> Iterator[None]:
    """Make the tensor's device the current one: Triton launches there, on its current stream."""
    if not t.is_cuda:
        yield
        return
    with torch.cuda.device(t.device):
        torch.cuda.set_device(t.device)  # also where it is current already: a new thread has no context yet
        yield


def unsuitable() -> str | None:
    """Return why no GPU kernel can run here, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    name = torch.cuda.get_device_name()
    if torch.version.hip is None:
        return None if torch.cuda.get_device_capability() >= (8, 0) else f"{name} is older than sm_80"
    arch = _arch(torch.cuda.get_device_properties(torch.cuda.current_device()))
    return None if arch in AMD else f"{name} is {arch}, and of AMD's GPUs the kernels are compiled for {', '.join(AMD)}"


def takes(problem: Problem) -> bool:
    """Return whether the kernels are for the dtype and the sizes of a problem."""
    return problem.dtype in DTYPES and 0 not in problem.sizes and problem.batch * problem.points < 1 << 31


def takes_terms(problem: TermProblem) -> bool:
    """Return whether the kernels are for the dtype and the sizes of a problem over terms."""
    p = problem
    return p.dtype in DTYPES and not p.is_empty and p.terms * p.points < 1 << 31


class GpuCosts(Costs):
    """The costs of the GPU backends: kernels that form x ⊗ z and g·H on chip for `fold`, torch calls otherwise."""

    def in_tiles(self, schedule: str) -> bool:
        return schedule != "fold"

    def on_chip(self, schedule: str) -> bool:
        return schedule == "fold"

    small_products = 0.1

    def one_pass(self, p: Problem | TermProblem) -> bool:
        """Return whether dx and dz come from one product G = g·H."""
        return True

    def apply(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        if schedule == "fold":
            return gemm(p.batch * p.points, p.out_features, p.in_features * p.cond_features, machine)
        return super().apply(p, schedule, machine)

    def grads(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        if schedule != "fold":
            return super().grads(p, schedule, machine)
        dx, dz, dh = p.needs
        cost = gemm(p.batch * p.points, p.in_features * p.cond_features, p.out_features, machine)
        return cost * ((1 if dx and dz and self.one_pass(p) else dx + dz) + dh)

    def terms(self, p: TermProblem, schedule: str, machine: Machine) -> Cost:
        """Predict a forward or a backward over terms; a schedule on tiles also takes launches for each tile."""
        (R, I, O), pairs = p.sizes, p.terms * p.points
        dx, dz, dh = (True, False, False) if p.op == "apply" else p.needs
        if schedule == "fold":  # a product for each term, and copies of the rows that it reads and of what it adds
            times = (1 if dx and dz and self.one_pass(p) else dx + dz) + dh
            return gemm(pairs, O, I * R, machine) * times + moved(pairs * (I + O) + p.terms * R, 4, machine)
        if p.dtype == torch.float16:  # A and M may leave its range
            machine = self.machine("cuda", torch.float32, 1)
        cost = super().terms(p, schedule, machine)
        own = {"project": I, "generate": R, "aggregate": O}[schedule]
        tile_bytes = p.rows(schedule) * (R * I * O // own) * machine.work_dtype.itemsize
        launches = _LAUNCHES * (dx + dz + dh) * max(1.0, tile_bytes / (planner.get_workspace_limit() // 4))
        return cost._replace(seconds=cost.seconds + launches * machine.launch)


def allows_tf32() -> bool:
    """Return whether torch may round operands of float32 products to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def partial_sums_limit() -> int:
    """Return how many bytes of the workspace the partial sums of split sums may take."""
    return planner.get_workspace_limit() // 2


def partial_sums(splits: int, *shape: int, like: Tensor) -> Tensor | None:
    """Return memory for the partial sums of a sum of this shape, on the device of `like`; None if it is not split."""
    return None if splits == 1 else torch.empty(splits, *shape, dtype=torch.float32, device=like.device)


def is_capturing() -> bool:
    """Return whether a CUDA graph captures the work of the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def has_hint(n: int | torch.SymInt) -> bool:
    """Return whether a size is a number, or a symbol that has a value in the example; sizes that are data have none."""
    return isinstance(n, int) or bool(n.node.has_hint())


def hint(n: int | torch.SymInt) -> int:
    """Return a number, or the value that it has in the example from which a graph is traced."""
    return n if isinstance(n, int) else int(n.node.hint)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def padded(K: int) -> int:
    """Return K rounded up to a multiple of 16, the depth of one step of the matrix units."""
    return cdiv(K, 16) * 16
