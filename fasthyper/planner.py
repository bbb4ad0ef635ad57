"""Problem -> Plan: predict the cost of every schedule and take the cheapest that fits the workspace.

The planner is a pure function of sizes and rates and uses no tensor and no device, so every decision can be tested
and printed (``fasthyper plan``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from .costs import Costs, project_pairs
from .problem import (
    AUTO,
    CONV_SCHEDULES,
    SCHEDULES,
    TERM_SCHEDULES,
    ConvProblem,
    Machine,
    Pairs,
    Plan,
    Problem,
    TermProblem,
)

# Shares of the workspace. A tile, its operands in the work dtype, an accumulator and the packed operand of a product
# take at most one share each.
_SHARES = 8
_MIN_LIMIT = 1 << 20
_limit = 32 << 20
_costs = {"": Costs()}  # by the backend that a problem names
on_forget: list[Callable[[], object]] = []
"""Functions to call when plans are forgotten. A backend with its own cache of plans adds one."""


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


def register(name: str, costs: Costs) -> None:
    """Use these costs for the problems that name a backend, from now on."""
    _costs[name] = costs
    forget()


def costs_of(problem: Problem | TermProblem | ConvProblem) -> Costs:
    """Return the costs of a problem's backend; those of torch's own operations if it names none."""
    return _costs.get(problem.backend, _costs[""])


@functools.cache
def machine(device: str, dtype: torch.dtype, threads: int = 1, backend: str = "") -> Machine:
    """Return the rates that a backend assumes on a type of device; see `Costs.machine`."""
    return _costs.get(backend, _costs[""]).machine(device, dtype, threads)


def tile_elements(problem: Problem, mach: Machine, limit: int) -> int:
    """Return how many elements a tile may hold: a share of the workspace, and at most as many as stay in cache.

    With one point per instance a tile is read once, and a small tile stays in the nearer cache. With many points the
    products with a tile dominate, and a larger tile gives larger products. Operands that are converted are tiles
    themselves and need their own share. A tile of 16 bits is counted as float32, because its sums are float32.
    """
    if problem.points == 1 or problem.dtype != mach.work_dtype:
        size = min(limit // _SHARES, mach.tile_bytes)
    else:
        size = min(limit // _SHARES * 2, mach.tile_bytes * 4)
    return size // max(mach.work_dtype.itemsize, torch.float32.itemsize)


def cost(problem: Problem, schedule: str, mach: Machine, limit: int) -> Plan:
    """Return the plan of one schedule, with its predicted cost."""
    p, costs = problem, costs_of(problem)
    c = (costs.apply if p.op == "apply" else costs.grads)(p, schedule, mach)
    tile = tile_elements(p, mach, limit)
    B, N, R, I, O = p.sizes
    size = {
        "fold": B * N * I * R,
        "generate": B * O * I,
        "project": (N if p.shared_x else B * N) * O * R,
    }[schedule]
    on_chip = costs.on_chip(schedule)
    tile_count = max(1.0, size / tile) if costs.in_tiles(schedule) else 1.0
    operands = (B * (N * (I + O) + R) + O * I * R * min(tile_count, 4.0)) * p.dtype.itemsize
    if on_chip:  # partial sums, if blocks are too few to fill the device
        workspace = min(limit // 2, 4 * (B * N * O if p.op == "apply" else O * I * R))
    else:
        workspace = (2 * min(size, tile) + min(O * I * R, tile)) * mach.work_dtype.itemsize
    seconds = c.seconds + operands / mach.memory_bandwidth + c.calls * tile_count * mach.launch
    if mach.work_dtype == torch.float16 and schedule != "generate" and not on_chip:
        seconds = math.inf  # x ⊗ z and x · H may leave the range of float16 where W and y do not
    return Plan(schedule, tile, mach.work_dtype, c.flops, c.bytes + operands, int(workspace), seconds)


def cost_of_terms(problem: TermProblem, schedule: str, mach: Machine, limit: int) -> Plan:
    """Return the plan of one schedule over terms, with its predicted cost."""
    p = problem
    R, I, O = p.sizes
    c = costs_of(p).terms(p, schedule, mach)
    tile = min(limit // _SHARES, mach.tile_bytes * 4) // max(mach.work_dtype.itemsize, torch.float32.itemsize)
    numbers = (p.sources * I + p.targets * O) * p.points + p.conds * R + O * I * R
    seconds = c.seconds + numbers * p.dtype.itemsize / mach.memory_bandwidth
    work = torch.float32 if mach.work_dtype == torch.float16 else mach.work_dtype  # A and M may leave float16's range
    size = p.rows(schedule) * max(I * R, O * R, O * I)
    workspace = 4 * min(size, tile) * max(work.itemsize, 4)
    return Plan(schedule, tile, work, c.flops, c.bytes + numbers * p.dtype.itemsize, workspace, seconds)


def cost_of_convolution(problem: ConvProblem, schedule: str, mach: Machine, limit: int) -> Plan:
    """Return the plan of one schedule of a generated convolution, with its predicted cost."""
    p = problem
    c = costs_of(p).convolution(p, schedule, mach)
    share = limit // _SHARES * (2 if p.backend else 1)  # torch's convolutions copy their operands
    tile = min(share, mach.tile_bytes * 4) // max(mach.work_dtype.itemsize, torch.float32.itemsize)
    outputs, channels = p.groups * p.out_features, p.groups * p.in_features // max(1, p.taps)
    numbers = p.batch * (channels * p.image + outputs * p.pixels) + outputs * p.in_features * p.cond_features
    operands = numbers * p.dtype.itemsize
    size = p.batch * p.in_features * (p.groups * p.pixels if schedule == "fold" else outputs)
    count = max(1.0, size / tile)
    seconds = c.seconds + operands / mach.memory_bandwidth + c.calls * count * mach.launch
    # x ⊗ z may leave the range of float16 where W and y do not
    work = torch.float32 if mach.work_dtype == torch.float16 else mach.work_dtype
    return Plan(schedule, tile, work, c.flops, c.bytes + operands, 4 * min(size, tile) * max(work.itemsize, 4), seconds)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem | TermProblem | ConvProblem, schedule: str, limit: int, threads: int) -> Plan:
    mach = machine(problem.device, problem.dtype, threads, problem.backend)
    known = schedules_of(problem)
    if schedule == "aggregate" and isinstance(problem, Problem):
        schedule = "fold"  # each target has one term
    if schedule not in (AUTO, *known):
        raise ValueError(f"schedule must be one of {', '.join(known)}, got {schedule!r}")
    names = known if schedule == AUTO else (schedule,)
    if isinstance(problem, TermProblem):
        plans = [cost_of_terms(problem, name, mach, limit) for name in names]
    elif isinstance(problem, ConvProblem):
        plans = [cost_of_convolution(problem, name, mach, limit) for name in names]
    else:
        plans = [cost(problem, name, mach, limit) for name in names]
    return min(plans, key=lambda plan: plan.seconds)


def schedules_of(problem: Problem | TermProblem | ConvProblem) -> tuple[str, ...]:
    """Return the schedules of a problem."""
    if isinstance(problem, ConvProblem):
        return CONV_SCHEDULES
    return TERM_SCHEDULES if isinstance(problem, TermProblem) else SCHEDULES


PAIR_SCHEDULES = ("generate", "project")
_PAIR_SHARES = 10  # tiles that a backward of `pairs` holds at the same time


def pair_tile_elements(work: torch.dtype, limit: int) -> int:
    """Return how many elements a tile of `pairs` may hold."""
    return limit // _PAIR_SHARES // max(work.itemsize, torch.float32.itemsize)


@functools.lru_cache(maxsize=4096)
def _plan_pairs(problem: Pairs, schedule: str, limit: int, threads: int) -> Plan:
    mach = machine(problem.device, problem.dtype, threads)
    # x · H may leave the range of float16 where y does not
    work = torch.float32 if mach.work_dtype == torch.float16 else mach.work_dtype
    tile = pair_tile_elements(work, limit)

    def cost(name: str) -> Plan:
        c = project_pairs(problem if name == "project" else problem.swapped(), mach)
        seconds = c.seconds + c.calls * mach.launch
        return Plan(name, tile, work, c.flops, c.bytes, limit // _PAIR_SHARES * _PAIR_SHARES, seconds)

    names = PAIR_SCHEDULES if schedule == AUTO else (schedule,)
    return min((cost(name) for name in names), key=lambda plan: plan.seconds)


def plan_pairs(problem: Pairs, schedule: str = AUTO) -> Plan:
    """Return the cheaper plan of a call of `pairs`, or the plan of a given schedule.

    Args:
        problem: the call to plan.
        schedule: ``"generate"``, ``"project"``, or ``"auto"`` for the cheaper.

    Raises:
        ValueError: if `pairs` has no such schedule.

    Example:
        >>> from fasthyper.problem import Pairs
        >>> plan_pairs(Pairs("pairs", 8, rows=4, columns=64, in_features=32, cond_features=32, out_features=8)).schedule
        'project'
    """
    if schedule not in (AUTO, *PAIR_SCHEDULES):
        raise ValueError(f"schedule must be one of {', '.join((AUTO, *PAIR_SCHEDULES))} for pairs, got {schedule!r}")
    return _plan_pairs(problem, schedule, _limit, torch.get_num_threads())


def forget() -> None:
    """Forget every plan, after something that plans depend on has changed."""
    machine.cache_clear()
    _plan.cache_clear()
    _plan_pairs.cache_clear()
    for call in on_forget:
        call()


def plan(problem: Problem | TermProblem | ConvProblem, schedule: str = AUTO) -> Plan:
    """Return the cheapest plan, or the plan of a given schedule.

    Args:
        problem: the call to plan.
        schedule: ``"fold"``, ``"generate"``, ``"project"``, for terms ``"aggregate"``, or ``"auto"`` for the cheapest.

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


def plans(problem: Problem | TermProblem | ConvProblem) -> list[Plan]:
    """Return the plan of every schedule, cheapest first."""
    return sorted((plan(problem, name) for name in schedules_of(problem)), key=lambda p: p.seconds)
