"""Tests of operator learning, against NumPy's Chebyshev series and singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasthyper.experiments import METHODS, Comparison
from fasthyper.experiments.catalogue.frontiers import TUNING
from fasthyper.experiments.catalogue.operators import (
    OPERATOR_LEARNING,
    chebyshev,
    derivative,
    linear_floor,
)
from fasthyper.experiments.methods import DEEPONET, EMBEDDING, EQUAL_TOTAL, HYPERNETWORK, counts
from fasthyper.experiments.training import batches


def of(preset="standard"):
    return Comparison.of(OPERATOR_LEARNING, preset=preset, device="cpu")


def run_of(operator, method="film_wide", seed=0):
    comparison = of()
    study = next(s for s in comparison.studies if s.setting.operator == operator)
    return comparison.run(study, study.values[0], method, seed)


def task_of(operator, **options):
    return OPERATOR_LEARNING.task(run_of(operator, **options), None)


def test_chebyshev_series():
    c = torch.randn(3, 21, dtype=torch.float64)
    at = 2 * torch.rand(3, 9, dtype=torch.float64) - 1
    values, slopes = chebyshev(c, at), chebyshev(derivative(c), at)
    for b in range(3):
        one = np.polynomial.chebyshev.Chebyshev(c[b].numpy())
        assert np.allclose(values[b], one(at[b].numpy()))
        assert np.allclose(slopes[b], one.deriv()(at[b].numpy()))


def test_outputs_are_those_of_the_function_at_the_sensors():
    """100 values decide 21 coefficients: NumPy finds them, and computes both outputs from them."""
    sensors, grid = np.linspace(-1, 1, 100), np.linspace(-1, 1, 50)
    for operator, scale in (("identity", 0.5), ("differentiation", 12.0)):
        task = task_of(operator)
        for examples in (task.train, task.validation, task.test):
            batch = examples.draw(torch.arange(20), torch.Generator().manual_seed(5))
            assert batch.x.shape == batch.target.shape == (20, 50, 1)
            for x, seen, target in zip(batch.x, batch.cond, batch.target, strict=True):
                function = np.polynomial.Chebyshev.fit(sensors, seen.double().numpy(), 20, domain=[-1, 1])
                assert np.abs(function.coef).max() < 0.26
                expected = function(grid) if operator == "identity" else function.deriv()(grid)
                assert np.allclose(x[:, 0], grid, atol=1e-6)
                assert np.allclose(target[:, 0] * scale, expected, atol=1e-3 * np.abs(expected).max())


def test_relative_errors():
    task = task_of("identity")
    batch = task.test.draw(torch.arange(20), torch.Generator())
    for share in (0.0, 0.75):
        found = task.measure(share * batch.target, batch.target)["relative_l2"]
        assert torch.allclose(found, torch.full((20,), 1 - share))
    assert task.levels["zero"] == 1


@pytest.mark.parametrize("operator", ["identity", "differentiation"])
def test_the_floor_is_that_of_numpy(operator):
    task = task_of(operator)
    drawn = task.train.draw(torch.arange(20_000), torch.Generator().manual_seed(3))
    outputs, tested = (
        t[..., 0].double().numpy() for t in (drawn.target, task.test.draw(torch.arange(200), None).target)
    )
    _, _, directions = np.linalg.svd(outputs, full_matrices=False)
    left = tested - tested @ directions[:10].T @ directions[:10]
    expected = (np.linalg.norm(left, axis=1) / np.linalg.norm(tested, axis=1)).mean()
    assert task.levels["linear"] == pytest.approx(expected, rel=0.02)


def test_the_floor_of_as_many_functions_as_terms_is_0():
    terms, c = torch.randn(5, 30), torch.randn(7, 5)
    assert linear_floor(terms, c @ terms, 5) < 1e-5 < 0.01 < linear_floor(terms, c @ terms, 4)


def test_the_published_deeponet_is_at_the_floor_of_the_identity_and_above_that_of_differentiation():
    assert task_of("identity").levels["linear"] == pytest.approx(0.578, abs=0.03)
    assert task_of("differentiation").levels["linear"] < 0.35 < 0.559


def test_functions_are_new_in_every_epoch_and_the_same_for_all_methods():
    def epochs(method, seed):
        run = run_of("identity", method=method, seed=seed)
        task = OPERATOR_LEARNING.task(run, None)
        generator = torch.Generator().manual_seed(seed)
        return [torch.cat([b.cond for b in batches(run, task.train, generator)]) for _ in range(2)]

    first, second = epochs("film_wide", 0)
    assert len(torch.cat([first, second]).unique(dim=0)) == 2000
    assert torch.equal(second, epochs("deeponet", 0)[1])
    assert not torch.equal(first, epochs("film_wide", 1)[0])


def test_no_functions_are_shared_by_training_validation_and_test():
    task = task_of("identity")
    parts = (task.train, task.validation, task.test)
    drawn = [e.draw(torch.arange(200), torch.Generator().manual_seed(1)).cond for e in parts]
    assert len(torch.cat(drawn).unique(dim=0)) == 600


def test_the_presets():
    (quick,) = of("quick").studies
    assert (quick.structure, quick.values, quick.seeds) == ("I is a function, x a point of it", (0.25,), 5)
    assert len(of("quick").runs()) == 9 * 5
    frontier, _, identity, differentiation = of("standard").studies
    assert frontier.tuning == TUNING
    assert set(frontier.methods) == {EMBEDDING, DEEPONET, *EQUAL_TOTAL}
    assert (frontier.values, frontier.seeds) == ((0.25, 1.0), 10)
    steps = identity.setting.epochs * identity.setting.functions / identity.setting.batch_size
    assert (steps, identity.setting.lr, identity.setting.points, identity.seeds) == (40_000, 1e-3, 50, 10)
    assert identity.published[HYPERNETWORK, "identity"] == 0.036
    assert not differentiation.claims
    assert "protocol unknown" in differentiation.title
    assert len(of("standard").runs()) == 9 * 2 * 10 + 5 * 10 + 3 * 10 + 3 * 10
    assert of("paper").studies[0].values == (0.25, 1.0, 4.0)


def test_the_hypernetwork_generates_the_whole_target_network():
    with torch.device("meta"):
        model = METHODS["hypernetwork"].build(OPERATOR_LEARNING.architecture(run_of("identity")))
    assert counts(model).primary == 40 + 420 + 210 + 11
