"""Problem -> Plan: predict the cost of every schedule and take the cheapest that fits the workspace.

A pure function of sizes and rates: no tensor and no device is touched, so every decision can be tested
and printed (``fasthyper plan``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import processor
from .problem import AUTO, SCHEDULES, Machine, Plan, Problem

_LOW_PRECISION = (torch.bfloat16, torch.float16)
# A tile, its operands in the work dtype, an accumulator, and what a matrix product packs: each at most one share.
_SHARES = 8
_MIN_LIMIT = 1 << 20
_limit = 32 << 20
on_forget: list[Callable[[], object]] = []
"""What else to call when plans are forgotten: for who keeps plans outside of this module."""


def set_workspace_limit(limit: int) -> None:
    """Bound the temporary memory of one call, for the whole process.

    Args:
        limit: bytes, at least 1 MiB. The default is 32 MiB. Outputs and returned gradients do not count.

    Raises:
        TypeError: if ``limit`` is not an integer.
        ValueError: if it is under 1 MiB.

    Example:
        >>> import fasthyper
        >>> fasthyper.set_workspace_limit(16 << 20)
        >>> fasthyper.get_workspace_limit()
        16777216
        >>> fasthyper.set_workspace_limit(32 << 20)
    """
    global _limit
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit must be an integer number of bytes, got {limit!r}")
    if limit < _MIN_LIMIT:
        raise ValueError(f"limit must be at least {_MIN_LIMIT} bytes (1 MiB), got {limit}")
    _limit = limit
    forget()


def get_workspace_limit() -> int:
    """Return the bound on the temporary memory of one call, in bytes."""
    return _limit


@functools.cache
def machine(device: str, dtype: torch.dtype, threads: int = 1, backend: str = "aten") -> Machine:
    """Typical rates of a device type: only their ratios decide, so they need not be this machine's own."""
    if backend == "cpu":
        work, rate = (dtype, 400e9) if processor.kernels_multiply(dtype) else (torch.float32, 100e9)
        return Machine(rate * threads, 150e9 * threads, 10e9, 1e-6, 2 << 20, work, 2.0)
    if device == "cpu":
        native = dtype not in _LOW_PRECISION or processor.has_fast(dtype)
        work = dtype if native else torch.float32
        rate = 40e9 if work == torch.float64 else 80e9
        return Machine(rate * threads, 16e9 * threads, 10e9, 3e-6, 2 << 20, work)
    rate = {torch.float64: 30e12, torch.float32: 50e12}.get(dtype, 600e12)
    return Machine(rate, 5e12, 3e12, 4e-6, 16 << 20, dtype)


class _Cost(NamedTuple):
    """Flops, bytes of tiles moved, seconds of both, and torch calls."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    calls: int = 0

    def __add__(self, other: _Cost) -> _Cost:  # type: ignore[override]
        return _Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.calls + other.calls,
        )


def _gemm(m: float, n: float, k: float, mach: Machine, times: float = 1.0) -> _Cost:
    """2·m·n·k flops, slower where a side is too short to fill the registers of a matrix unit."""
    flops = 2.0 * times * m * n * k
    short = math.prod(side / (side + mach.short_side) for side in (m, n, k)) if flops else 1.0
    return _Cost(flops, 0.0, flops / (mach.flops * short), 1)


def _tile(elements: float, passes: float, mach: Machine) -> _Cost:
    """Elements of a tile written or read `passes` times, in cache."""
    moved = elements * passes * mach.work_dtype.itemsize
    return _Cost(0.0, moved, moved / mach.cache_bandwidth, 1)


def _apply_cost(p: Problem, schedule: str, mach: Machine) -> _Cost:
    B, N, R, I, O = p.batch, p.points, p.cond_features, p.in_features, p.out_features
    if _is_kernel(p, schedule):
        return _gemm(B * N, O, I * R, mach)
    if schedule == "fold":  # x ⊗ z, then one product with K = I·R
        return _tile(B * N * I * R, 2, mach) + _gemm(B * N, O, I * R, mach)
    if schedule == "generate":  # W = z·H, then x·Wᵀ instance by instance
        return _gemm(B, O * I, R, mach) + _tile(B * O * I, 2, mach) + _instances(B, N, I, O, mach)
    if _is_one_output(p):  # x·H, and a product of rows
        return _gemm(B, R, I, mach) + _tile(B * R, 1, mach)
    products = _gemm(p.distinct, O * R, I, mach)
    if p.shared_x:  # x·H once, then one product with z
        return products + _gemm(B, N * O, R, mach) + _tile(B * N * O, 2, mach)
    return products + _tile(B * N * O * R, 3, mach)


def _instances(B: int, N: int, m: int, n: int, mach: Machine) -> _Cost:
    """B small products of N rows; at N = 1 reading the tile bounds them, which is counted with the tile."""
    return _gemm(N, m, n, mach, B) if N > 1 else _Cost(2.0 * B * m * n, 0.0, 0.0, 1)


def _grads_cost(p: Problem, schedule: str, mach: Machine) -> _Cost:
    B, N, R, I, O = p.batch, p.points, p.cond_features, p.in_features, p.out_features
    dx, dz, dh = p.needs
    if _is_kernel(p, schedule):
        from .backends.triton.tiles import dx_dz_tiles  # not at the top: backends import this module

        together = dx and dz and dx_dz_tiles("sm_90", p.dtype.itemsize * 8, R, O)
        cost = _gemm(B * N, I * R, O, mach)
        passes = (dx or dz) * (1 if together else dx + dz) + dh
        return _Cost(cost.flops * passes, 0.0, cost.seconds * passes, passes)
    if p.backend == "cpu" and schedule == "project" and dh:  # the compiled kernels have no other dH
        rest = _grads_cost(p._replace(needs=(dx, dz, False)), schedule, mach)
        return rest + _grads_cost(p._replace(needs=(False, False, True)), "generate", mach)
    cost = _Cost()
    if _is_one_output(p) and schedule == "project":  # x·H and z·Hᵀ, scaled by g as they are written
        return _gemm(B, R, I, mach, dx + dz)
    if schedule == "fold":
        if dx or dz:  # G = g·H, reduced with z and with x
            cost += _gemm(B * N, I * R, O, mach) + _tile(B * N * I * R, 2 + dx + dz, mach)
        if dh:
            cost += _tile(B * N * I * R, 2, mach) + _gemm(O, I * R, B * N, mach)
        return cost
    if dx:  # a forward with H transposed
        cost += _apply_cost(p._replace(in_features=O, out_features=I, shared_x=False), "generate", mach)
    if schedule == "generate":
        if dz or dh:  # dW = gᵀx
            cost += _instances(B, N, O, I, mach) + _tile(B * O * I, 1 + dz + dh, mach)
        if dz:
            cost += _gemm(B, R, O * I, mach)
        if dh:
            cost += _gemm(O * I, R, B, mach)
        return cost
    if dz:
        cost += _apply_cost(p, "project", mach)
    if dh:  # z ⊗ g, then xᵀ
        cost += _gemm(O * R, I, p.distinct, mach)
        cost += _gemm(N * O, R, B, mach) if p.shared_x else _tile(B * N * O * R, 2, mach)
    return cost


def _is_kernel(p: Problem, schedule: str) -> bool:
    """Whether GPU kernels run it: x ⊗ z and g·H are made where they are multiplied, and never moved."""
    return p.backend in ("triton", "cuda") and schedule == "fold"


_ROWS_TOGETHER = 1024  # of (b, n) that meet a packed piece of H in the compiled CPU kernels
_PACKING_G, _PACKING_P = 5.0, 20.0  # passes that this is worth, as measured: for g·H, and for x·H


def _packing_cost(p: Problem, schedule: str, mach: Machine) -> _Cost:
    """The compiled kernels read H where it lies, but for sums along another axis than its last: those pack it."""
    dx, dz, _ = p.needs
    if p.op == "apply":
        passes = _PACKING_P if schedule == "project" else 0.0
    elif schedule == "fold":
        passes = _PACKING_G if dx or dz else 0.0
    else:
        passes = _PACKING_P if dz else 0.0
    if p.backend != "cpu" or not passes or _is_one_output(p):
        return _Cost()
    groups = max(1.0, p.batch * p.points / _ROWS_TOGETHER)
    return _tile(p.cond_features * p.in_features * p.out_features * groups, passes, mach)


def _is_one_output(p: Problem) -> bool:
    """Whether the compiled kernels have y, dx and dz from plain products of x, z and H, which is then the cheapest."""
    small = p.in_features * p.cond_features <= 1 << 18
    return p.backend == "cpu" and p.dtype == torch.float32 and p.out_features == 1 and p.points == 1 and small


def tile_elements(problem: Problem, mach: Machine, limit: int) -> int:
    """Elements that one tile may hold: a share of the workspace, and no more than stays in cache.

    At one point per instance a tile is read once, and the smaller stays closer. With more points the products with
    it are what costs, and a larger tile makes them larger; where operands are converted, they are tiles, too. A tile of
    16 bits is as many elements as one of float32: that is what it becomes where it is added up.
    """
    if problem.points == 1 or problem.dtype != mach.work_dtype:
        size = min(limit // _SHARES, mach.tile_bytes)
    else:
        size = min(limit // _SHARES * 2, mach.tile_bytes * 4)
    return size // max(mach.work_dtype.itemsize, torch.float32.itemsize)


def cost(problem: Problem, schedule: str, mach: Machine, limit: int) -> Plan:
    """Predict one schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    p = problem
    c = (_apply_cost if p.op == "apply" else _grads_cost)(p, schedule, mach) + _packing_cost(p, schedule, mach)
    tile = tile_elements(p, mach, limit)
    B, N, R, I, O = p.batch, p.points, p.cond_features, p.in_features, p.out_features
    size = {
        "fold": B * N * I * R,
        "generate": B * O * I,
        "project": (N if p.shared_x else B * N) * O * R,
    }[schedule]
    in_chunks = p.backend != "cpu" and not _is_kernel(p, schedule)  # torch calls are what a chunk costs
    chunks = max(1.0, size / tile) if in_chunks else 1.0
    operands = (B * (N * (I + O) + R) + O * I * R * min(chunks, 4.0)) * p.dtype.itemsize
    workspace = (2 * min(size, tile) + min(O * I * R, tile)) * mach.work_dtype.itemsize
    if _is_kernel(p, schedule):  # parts of sums, where blocks are too few to fill the device
        workspace = min(limit // 2, 4 * (B * N * O if p.op == "apply" else O * I * R))
    seconds = c.seconds + operands / mach.memory_bandwidth + c.calls * chunks * mach.launch
    if mach.work_dtype == torch.float16 and schedule != "generate" and not _is_kernel(p, schedule):
        seconds = math.inf  # x ⊗ z and x · H may leave the range of float16 where W and y do not
    return Plan(schedule, tile, mach.work_dtype, c.flops, c.bytes + operands, int(workspace), seconds)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, schedule: str, limit: int, threads: int) -> Plan:
    mach = machine(problem.device, problem.dtype, threads, problem.backend)
    names = SCHEDULES if schedule == AUTO else (schedule,)
    return min((cost(problem, name, mach, limit) for name in names), key=lambda plan: plan.seconds)


def forget() -> None:
    """Forget every plan, here and where plans are kept: what they were made from has changed."""
    machine.cache_clear()
    _plan.cache_clear()
    for call in on_forget:
        call()


def plan(problem: Problem, schedule: str = AUTO) -> Plan:
    """Return the cheapest plan, or the plan of a given schedule.

    Args:
        problem: what is asked for.
        schedule: one of ``"fold"``, ``"generate"``, ``"project"``, or ``"auto"`` for the cheapest.

    Raises:
        ValueError: if the schedule is unknown.

    Example:
        >>> from fasthyper.problem import Problem
        >>> plan(Problem("apply", 100, 1024, 64, 64, 64)).schedule  # many points share the weights
        'generate'
        >>> plan(Problem("apply", 8192, 1, 8, 64, 128)).schedule  # few features
        'fold'
        >>> plan(Problem("apply", 8192, 4, 64, 64, 64, shared_x=True)).schedule
        'project'
    """
    return _plan(problem, schedule, _limit, torch.get_num_threads())


def plans(problem: Problem) -> list[Plan]:
    """Return the plan of every schedule, cheapest first."""
    return sorted((plan(problem, name) for name in SCHEDULES), key=lambda p: p.seconds)
