from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.catalogue.equations import (
    EQUATIONS,
    GRID,
    MODES,
    SHIFT,
    VISCOSITY,
    burgers,
    initial_conditions,
    load,
    series,
)
from fasthyper.experiments.methods import METHODS, counts

EQUATION_LEARNING = EXPERIMENTS["equations"]


@pytest.fixture(scope="module")
def pool():
    return load("periodic", None)


def grid(points):
    return torch.arange(points, dtype=torch.float64) / points


def functions(count):
    return initial_conditions(count, torch.Generator().manual_seed(5))


def task_of(pool, equation="burgers", seed=0):
    comparison = Comparison.of(EQUATION_LEARNING, preset="standard", studies=["equations"], seeds=1, device="cpu")
    return EQUATION_LEARNING.task(comparison.run(comparison.studies[0], equation, "hypernetwork", seed), pool)


def all_of(examples):
    return examples.draw(torch.arange(examples.count), torch.Generator().manual_seed(3))


def relative(found, expected):
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def cole_hopf(coefficients, x, time, viscosity):
    """Solve Burgers' equation by the transform of Cole and Hopf: a quotient of two integrals against a Gaussian.

    u(x, t) = ∫ (x - y)/t w(y) dy / ∫ w(y) dy, w(y) = exp(-(∫_0^y u_0 + (x - y)² / 2t) / 2ν), over the whole line.
    """
    y = torch.linspace(-4, 5, 20_001, dtype=torch.float64)
    k = 2 * math.pi * torch.arange(1, MODES + 1, dtype=torch.float64)[:, None]
    a, b = coefficients
    integral = a @ ((k * y).sin() / k) + b @ ((1 - (k * y).cos()) / k)
    exponent = -(integral + (x[:, None] - y).square() / (2 * time)) / (2 * viscosity)
    w = (exponent - exponent.amax(dim=1, keepdim=True)).exp()
    return ((x[:, None] - y) / time * w).sum(dim=1) / w.sum(dim=1)


def test_burgers_equation_agrees_with_the_transform_of_cole_and_hopf():
    coefficients = functions(4)
    solved = burgers(series(coefficients, grid(GRID)))
    expected = torch.stack([cole_hopf(c, grid(GRID), 1.0, VISCOSITY) for c in coefficients])
    assert relative(solved, expected) < 1e-5


def test_a_finer_grid_and_smaller_steps_change_nothing():
    coefficients = functions(12)
    coarse = burgers(series(coefficients, grid(GRID)))
    fine = burgers(series(coefficients, grid(4 * GRID)), steps=1500)[:, ::4]
    assert relative(coarse, fine) < 1e-6


def test_the_solver_is_of_order_four():
    u = series(functions(3), grid(GRID))
    exact = burgers(u, steps=800)
    errors = [relative(burgers(u, steps=steps), exact) for steps in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)


def test_with_a_large_viscosity_the_equation_is_that_of_heat():
    coefficients = 1e-3 * functions(3)
    decay = (-0.05 * (2 * math.pi * torch.arange(1, MODES + 1)).square()).exp()
    solved = burgers(series(coefficients, grid(GRID)), time=0.1, viscosity=0.5)
    assert relative(solved, series(coefficients * decay, grid(GRID))) < 1e-3


def test_advection_is_a_shift(pool):
    torch.testing.assert_close(pool.solved["advection"], pool.initial.roll(GRID // 2, dims=1))
    coefficients = functions(3)
    # d/dt of u(x - t) is -d/dx: central differences of both
    step = 1e-4
    in_time = (series(coefficients, grid(GRID) - SHIFT - step) - series(coefficients, grid(GRID) - SHIFT + step)) / 2
    in_space = (series(coefficients, grid(GRID) + step - SHIFT) - series(coefficients, grid(GRID) - step - SHIFT)) / 2
    torch.testing.assert_close(in_time, -in_space)


def test_initial_conditions_have_the_declared_spectrum():
    found = functions(4000).std(dim=0)
    k = 2 * math.pi * torch.arange(1, MODES + 1, dtype=torch.float64)
    torch.testing.assert_close(found, (math.sqrt(2) * 25 / (k.square() + 25)).expand(2, -1), rtol=0.06, atol=0)


def test_the_pool_is_the_same_at_every_time(pool):
    again = load("periodic", None)
    assert torch.equal(pool.initial, again.initial)
    assert all(torch.equal(pool.solved[e], again.solved[e]) for e in EQUATIONS)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_no_function_is_in_two_splits_and_targets_are_solutions(pool, equation):
    task = task_of(pool, equation)
    rows = {name: all_of(getattr(task, name)) for name in ("train", "test", "validation")}
    seen = torch.cat([batch.cond for batch in rows.values()])
    assert len(torch.unique(seen, dim=0)) == len(seen) == 1400
    solved = pool.solved[equation]
    for batch in rows.values():
        for b in (0, 3, 17):
            (number,) = (pool.initial.float() == batch.cond[b]).all(dim=1).nonzero()
            at = ((batch.x[b, :, 0] + 1) * GRID / 2).round().long()
            expected = solved[number[0], at] / solved.square().mean().sqrt()
            torch.testing.assert_close(batch.target[b, :, 0], expected.float())
    assert rows["test"].x.shape == (200, GRID, 1)
    assert not torch.equal(all_of(task_of(pool, equation, seed=1).test).cond, rows["test"].cond)


def test_runs_that_choose_a_rate_see_no_function_that_any_seed_tests_on(pool):
    comparison = Comparison.of(EQUATION_LEARNING, preset="standard", studies=["equations"], seeds=2, device="cpu")
    (study,) = comparison.studies
    tested = [all_of(task_of(pool, seed=seed).test).cond for seed in range(2)]
    tuning = comparison.tuning_runs_of(study, "burgers", "hypernetwork")[0]
    task = EQUATION_LEARNING.task(tuning, pool)
    seen = [all_of(examples).cond for examples in (task.train, task.validation)]
    apart = torch.cat([*seen, torch.cat(tested).unique(dim=0)])
    assert len(apart.unique(dim=0)) == len(apart)


def test_the_error_is_relative(pool):
    task = task_of(pool)
    batch = all_of(task.test)
    found = task.measure(0.9 * batch.target, batch.target)["relative_l2"]
    np.testing.assert_allclose(found, 0.1, rtol=1e-4)
    zero = task.measure(torch.zeros_like(batch.target), batch.target)["relative_l2"].mean().item()
    assert task.levels == {"zero": pytest.approx(zero)}


def test_all_methods_are_as_large_as_the_published_ones():
    comparison = Comparison.of(EQUATION_LEARNING, preset="standard", studies=["equations"], device="cpu")
    (study,) = comparison.studies
    for method in set(study.methods) - {"embedding"}:
        run = comparison.run(study, "burgers", method, 0)
        trainable = counts(METHODS[method].model(EQUATION_LEARNING.architecture(run))).trainable
        assert trainable == pytest.approx(114_500, rel=0.02), method


def test_what_does_not_exist_is_refused(pool):
    comparison = Comparison.of(
        EQUATION_LEARNING, preset="standard", studies=["equations"], seeds=1, device="cpu", functions=1001
    )
    run = comparison.run(comparison.studies[0], "burgers", "hypernetwork", 0)
    with pytest.raises(ValueError, match="functions: expected at most 1000, got 1001"):
        EQUATION_LEARNING.task(run, pool)
    run = comparison.run(comparison.studies[0], "heat", "hypernetwork", 0)
    with pytest.raises(ValueError, match="equation: 'heat' is not known; known are burgers, advection"):
        EQUATION_LEARNING.task(run, pool)
