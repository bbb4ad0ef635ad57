"""Tests of the scaling experiment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.catalogue.scaling import SCALING, series, target
from fasthyper.experiments.claims import Exponent, Steeper
from fasthyper.experiments.experiment import ASKED
from fasthyper.experiments.methods import EMBEDDING, EQUAL_TOTAL


def of(preset="standard"):
    return Comparison.of(SCALING, preset=preset, device="cpu")


def tasks():
    comparison = of()
    return [SCALING.task(comparison.run(s, s.values[0], "embedding", 0), None) for s in comparison.studies]


@pytest.mark.parametrize("dimensions", [1, 3])
def test_a_series_is_as_smooth_as_it_says(dimensions):
    """A rougher one has a larger derivative for its size."""
    at = 2 * torch.rand(20_000, dimensions) - 1
    slopes = {}
    for r in (1, 3):
        found = [series(dimensions, r, 8, torch.Generator().manual_seed(seed)) for seed in range(5)]
        step = torch.zeros(dimensions)
        step[0] = 1e-3
        slopes[r] = sum(((f(at + step) - f(at)) / 1e-3).std().item() / f(at).std().item() for f in found)
    assert slopes[1] > 1.2 * slopes[3]


def test_a_separable_target_is_linear_in_a_small_code():
    setting = of("paper").studies[-1].setting
    y = target(setting, torch.Generator().manual_seed(0))
    x = torch.linspace(-1, 1, 50)[None, :, None].expand(40, -1, -1)
    cond = 2 * torch.rand(40, 2) - 1
    assert torch.linalg.matrix_rank(y(x, cond)[:, :, 0], rtol=1e-4) == 3
    rough = target(replace(setting, kind="rough"), torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(rough(x, cond)[:, :, 0], rtol=1e-4) > 3


def test_targets_have_variance_1():
    for task in tasks():
        y = task.train.draw(torch.arange(3000), torch.Generator().manual_seed(9)).target
        assert abs(y.mean()) < 0.15
        assert y.std() == pytest.approx(1, abs=0.1)
        constant = task.measure(torch.zeros_like(y), y)["rmse"].mean().item()
        assert task.levels["constant"] == pytest.approx(constant, rel=0.1)


def test_no_instances_are_shared_by_training_validation_and_test():
    for task in tasks():
        parts = (task.train, task.validation, task.test)
        drawn = [e.draw(torch.arange(500), torch.Generator().manual_seed(1)).cond for e in parts]
        assert len(torch.cat(drawn).unique(dim=0)) == 1500
        generator = torch.Generator().manual_seed(1)
        first, second = (task.train.draw(torch.arange(500), generator).cond for _ in range(2))
        assert len(torch.cat([first, second]).unique(dim=0)) == 1000


@pytest.mark.parametrize(
    ("preset", "steps", "runs"),
    [
        ("standard", (1000, 4000), (8 * 3 + 5 + 2 * 2 * 4 + 3 * 3) * 10),
        ("paper", (8000, 80_000), (8 * 3 + 8) * 10 + (2 * 2 * 7 + 3 * 5) * 20),
    ],
)
def test_the_presets(preset, steps, runs):
    comparison = of(preset)
    frontier, _, short, longer, total = comparison.studies
    assert frontier.structure
    assert frontier.tuning
    assert set(frontier.methods) == {EMBEDDING, *EQUAL_TOTAL}
    assert all(claim.whose == ASKED and claim.premises for claim in frontier.claims)
    found = [s.setting.epochs * s.setting.instances // s.setting.batch_size for s in (short, longer)]
    assert found == list(steps)
    assert replace(longer.setting, instances=short.setting.instances) == short.setting
    assert f"{ {4: 'four', 10: 'ten'}[steps[1] // steps[0]] } times the steps" in longer.title
    for study in (short, longer, total):
        assert all(isinstance(claim, (Exponent, Steeper)) for claim in study.claims)
    assert len(comparison.runs()) == runs


def test_there_are_no_quick_studies():
    assert EXPERIMENTS["scaling"].studies("quick", "series") == ()
