"""The planner: a pure function of sizes, which takes the cheapest schedule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasthyper
from fasthyper import planner, processor
from fasthyper.costs import Costs
from fasthyper.problem import SCHEDULES, Problem

SIZE = st.sampled_from([0, 1, 2, 7, 32, 100, 1000, 4096])
PROBLEMS = st.builds(
    Problem,
    op=st.sampled_from(["apply", "grads"]),
    batch=SIZE,
    points=SIZE,
    cond_features=SIZE,
    in_features=SIZE,
    out_features=SIZE,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    device=st.sampled_from(["cpu", "cuda"]),
    shared_x=st.booleans(),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)


@given(problem=PROBLEMS, limit=st.sampled_from([1 << 20, 32 << 20, 1 << 30]))
@settings(max_examples=200)
def test_every_plan_fits_the_workspace(problem, limit):
    fasthyper.set_workspace_limit(limit)
    for plan in planner.plans(problem):
        assert 0 <= plan.workspace <= limit
        assert plan.tile >= 1
        assert plan.tile * plan.work_dtype.itemsize <= limit
        assert plan.flops >= 0
        assert plan.bytes >= 0
        assert plan.seconds >= 0


@given(problem=PROBLEMS)
@settings(max_examples=100)
def test_the_plan_is_the_cheapest_of_all_schedules(problem):
    ranked = planner.plans(problem)
    assert sorted(plan.schedule for plan in ranked) == sorted(SCHEDULES)
    assert [plan.seconds for plan in ranked] == sorted(plan.seconds for plan in ranked)
    assert planner.plan(problem).seconds == ranked[0].seconds
    for schedule in SCHEDULES:
        assert planner.plan(problem, schedule).schedule == schedule


@given(
    problem=PROBLEMS,
    axis=st.sampled_from(["batch", "points", "cond_features", "in_features", "out_features"]),
    schedule=st.sampled_from(SCHEDULES),
)
@settings(max_examples=200)
def test_more_work_never_costs_less(problem, axis, schedule):
    size = getattr(problem, axis)
    more = problem._replace(**{axis: 2 * size + 1})
    small, large = planner.plan(problem, schedule), planner.plan(more, schedule)
    assert large.flops >= small.flops
    assert large.bytes >= small.bytes
    assert large.workspace >= small.workspace
    assert large.seconds >= small.seconds * (1 - 1e-9)


@given(problem=PROBLEMS.filter(lambda p: p.op == "grads"), axis=st.integers(0, 2), schedule=st.sampled_from(SCHEDULES))
@settings(max_examples=60)
def test_one_more_gradient_never_costs_less(problem, axis, schedule):
    fewer = problem._replace(needs=tuple(k != axis and n for k, n in enumerate(problem.needs)))
    more = problem._replace(needs=tuple(k == axis or n for k, n in enumerate(problem.needs)))
    assert planner.plan(more, schedule).flops >= planner.plan(fewer, schedule).flops


def test_flops_are_those_of_the_formulas():
    B, N, R, I, O = 100, 10, 8, 16, 32
    problem = Problem("apply", B, N, R, I, O)
    assert planner.plan(problem, "fold").flops == 2 * B * N * R * I * O
    assert planner.plan(problem, "generate").flops == 2 * B * R * I * O + 2 * B * N * I * O
    shared = problem._replace(shared_x=True)
    assert planner.plan(shared, "project").flops == 2 * N * R * I * O + 2 * B * N * R * O
    alone = planner.plan(problem, "project").flops
    assert 2 * B * N * R * I * O <= alone <= 2 * B * N * R * I * O + 3 * B * N * R * O
    dh = Problem("grads", B, N, R, I, O, needs=(False, False, True))
    assert planner.plan(dh, "fold").flops == 2 * B * N * R * I * O
    assert planner.plan(dh._replace(needs=(False,) * 3), "fold").flops == 0


@pytest.mark.parametrize("op", ["apply", "grads"])
@pytest.mark.parametrize(
    ("sizes", "schedule"),
    [
        ((100, 1024, 64, 64, 64), "generate"),  # many points share the weights
        ((64, 256, 64, 512, 512), "generate"),
        ((8, 58, 2048, 512, 512), "generate"),
        ((8192, 1, 8, 64, 128), "fold"),  # few features, wide outputs
        ((4096, 1, 4, 256, 256), "fold"),
    ],
)
def test_known_schedules(op, sizes, schedule):
    assert planner.plan(Problem(op, *sizes)).schedule == schedule


def test_a_shared_input_is_projected():
    assert planner.plan(Problem("apply", 8192, 4, 64, 64, 64, shared_x=True)).schedule == "project"


def test_machines_compute_16_bits_natively_or_not(native_low_precision):
    for dtype in (torch.bfloat16, torch.float16):
        with native_low_precision(False):
            assert planner.machine("cpu", dtype).work_dtype == torch.float32
        with native_low_precision(True):
            assert planner.machine("cpu", dtype).work_dtype == dtype
        assert planner.machine("cuda", dtype).work_dtype == dtype
    for dtype in (torch.float32, torch.float64):
        assert planner.machine("cpu", dtype).work_dtype == dtype


def test_a_machine_without_the_probe_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    monkeypatch.setattr(planner.torch.ops, "mkldnn", object())
    processor.has_fast.cache_clear()
    try:
        assert processor.has_fast(torch.bfloat16) is False
    finally:
        processor.has_fast.cache_clear()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rate", ["flops", "cache_bandwidth", "memory_bandwidth"])
def test_a_slower_machine_takes_longer(schedule, rate):
    problem, machine = Problem("apply", 1000, 2, 64, 64, 64), planner.machine("cpu", torch.float32)
    slower = dataclasses.replace(machine, **{rate: getattr(machine, rate) / 2})
    quick, slow = (planner.cost(problem, schedule, m, 32 << 20) for m in (machine, slower))
    assert slow.seconds > quick.seconds
    assert (slow.flops, slow.bytes, slow.workspace) == (quick.flops, quick.bytes, quick.workspace)


def test_a_smaller_limit_gives_a_smaller_tile():
    problem = Problem("apply", 20000, 1, 128, 64, 64)
    wide = planner.plan(problem)
    fasthyper.set_workspace_limit(1 << 20)
    narrow = planner.plan(problem)
    assert narrow.tile < wide.tile
    assert narrow.workspace < wide.workspace


def test_no_tensor_is_touched(monkeypatch):
    """Planning a problem of 2⁶⁰ elements allocates nothing, because no op of torch runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} ran while planning")

    planner._plan.cache_clear()
    planner.machine.cache_clear()
    with Refuse():
        plans = planner.plans(Problem("grads", 1 << 20, 1 << 10, 1 << 10, 1 << 10, 1 << 10, device="cuda"))
    assert len(plans) == 3
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("schedule", ["folded", "", None])
def test_an_unknown_schedule_raises(schedule):
    problem = Problem("apply", 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="schedule must be one of fold, generate, project, got") as error:
        planner.plan(problem, schedule)
    assert repr(schedule) in str(error.value)


def test_packing_is_counted_once():
    """dz by `project` packs H once: its cost beyond torch's own is that of one packing."""
    problem = Problem("grads", 64, 1, 64, 64, 64, needs=(False, True, False), backend="cpu")
    machine = planner.machine("cpu", torch.float32, backend="cpu")
    costs = planner.costs_of(problem)
    packing = costs.grads(problem, "project", machine).bytes - Costs().grads(problem, "project", machine).bytes
    one = costs.apply(problem, "project", machine).bytes - Costs().apply(problem, "project", machine).bytes
    assert packing == one > 0
