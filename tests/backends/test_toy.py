"""A backend is a module with the names of `fasthyper.backends.contract`, and one line registers it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fasthyper
from fasthyper import backends, info, planner
from fasthyper.explain import explain
from fasthyper.problem import Problem


@pytest.fixture
def toy(monkeypatch):
    spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(backends.BACKENDS, "toy", None)  # both are undone after the test
    monkeypatch.setitem(planner._costs, "toy", None)
    backends.register("toy", module)
    yield module
    planner.forget()


@pytest.mark.parametrize("name", ["toy", "auto"])
def test_a_registered_backend_runs_forward_and_backward(toy, name, factors, oracle, monkeypatch):
    calls = []
    for method in ("apply", "grads"):
        original = getattr(toy, method)
        monkeypatch.setattr(toy, method, lambda *a, _f=original, _m=method, **k: calls.append(_m) or _f(*a, **k))
    args = factors(names=factors.AFFINE, requires_grad=True)
    x, z, weight, bias, base_weight, base_bias = args
    with fasthyper.use_backend(name):
        y = fasthyper.hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
    torch.testing.assert_close(y, oracle.linear(*args))
    got, expected = (torch.autograd.grad((t**2).sum(), args) for t in (y, oracle.linear(*args)))
    torch.testing.assert_close(got, expected)
    assert calls == ["apply", "grads"]


def test_a_registered_backend_has_derivatives_and_transforms(toy, factors):
    args = factors(names=("x", "z", "weight"), requires_grad=True)
    with fasthyper.use_backend("toy"):
        assert torch.autograd.gradcheck(fasthyper.ops.apply, args, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(fasthyper.ops.apply, args)


def test_tensors_on_another_device_raise(toy):
    with pytest.raises(ValueError, match="backend 'toy' must have tensors on the cpu, got x on meta"):
        backends.backend("toy", torch.device("meta"))


def test_the_error_says_why_it_cannot_run(toy, monkeypatch):
    monkeypatch.setattr(toy, "unavailable", lambda: "the toy is broken")
    with pytest.raises(ValueError, match="'toy' cannot run here: the toy is broken"):
        fasthyper.use_backend("toy")
    assert backends.automatic("cpu") == "aten"


def test_the_planner_uses_its_costs(toy):
    class ProjectIsFree(type(toy.COSTS)):
        def apply(self, p, schedule, machine):
            cost = super().apply(p, schedule, machine)
            return cost._replace(seconds=0.0 if schedule == "project" else 1.0)

    planner.register("toy", ProjectIsFree())
    problem = Problem("apply", 8192, 1, 8, 64, 128, backend="toy")
    assert planner.plan(problem).schedule == "project"
    assert planner.plan(problem._replace(backend="")).schedule == "fold"


def test_info_and_explain_name_it(toy):
    assert "toy: ready (for a test)" in info.describe()
    assert "backend toy" in explain(batch=4, points=1, cond=5, in_features=3, out_features=6)
    half = explain(batch=4, points=1, cond=5, in_features=3, out_features=6, dtype="bfloat16")
    assert "backend aten" in half


def test_calls_that_it_does_not_take_go_to_aten(toy, factors, oracle):
    for sizes, dtype in (((4, 2, 5, 3, 6), torch.bfloat16), ((4, 0, 5, 3, 6), torch.float64)):
        args = factors(sizes, dtype, ("x", "z", "weight"))
        with fasthyper.use_backend("toy"):
            oracle.check_op("apply", fasthyper.ops.apply(*args), *args)


def test_new_costs_count_at_once(toy):
    problem = Problem("apply", 8192, 1, 8, 64, 128, backend="toy")
    assert planner.plan(problem).schedule == "fold"

    class Changed(type(toy.COSTS)):
        def apply(self, p, schedule, machine):
            return super().apply(p, schedule, machine) * (1 if schedule == "project" else 1000)

    toy.COSTS = Changed()
    backends.register("toy", toy)
    assert planner.plan(problem).schedule == "project"


@pytest.mark.parametrize("name", ["", "auto"])
def test_a_name_that_is_none(toy, name):
    with pytest.raises(ValueError, match=f"name must be the name of a backend, got {name!r}"):
        backends.register(name, toy)


def test_a_backend_without_the_names_of_the_contract():
    with pytest.raises(TypeError, match=r"'half' lacks .*COSTS.*apply.*contract"):
        backends.register("half", object())
    assert "half" not in backends.BACKENDS


def test_a_plan_can_be_asked_for(toy):
    sizes = {"batch": 4, "points": 1, "cond": 5, "in_features": 3, "out_features": 6}
    assert "backend toy" in explain(**sizes, backend="toy")
    assert "backend triton" in explain(**sizes, backend="triton")
    with fasthyper.use_backend("materialised"):
        assert "backend materialised" in explain(**sizes)
    with pytest.raises(ValueError, match=r"backend must be one of auto, aten.*toy, got 'nope'"):
        explain(**sizes, backend="nope")
