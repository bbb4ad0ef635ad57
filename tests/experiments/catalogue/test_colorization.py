"""Tests of the studies and of the splits of colorization."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.catalogue.colorization import TEST_POINTS
from fasthyper.experiments.catalogue.data import Splits
from fasthyper.experiments.catalogue.frontiers import TUNING
from fasthyper.experiments.methods import EMBEDDING, EQUAL_TOTAL, HYPERNETWORK

COLORIZATION = EXPERIMENTS["colorization"]


def images(first, count):
    """Return images of one colour each, which is their number."""
    numbers = torch.arange(first, first + count).to(torch.uint8)
    return numbers.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()


def drawn(examples):
    """Return the numbers of the images that examples are drawn from."""
    target = examples.draw(torch.arange(examples.count), torch.Generator().manual_seed(0)).target
    return set(((target[:, 0, 0] + 1) * 127.5).round().int().tolist())


def test_the_splits_are_disjoint():
    comparison = Comparison.of(COLORIZATION, device="cpu")
    run = comparison.run(comparison.studies[0], 1.0, HYPERNETWORK, 0)
    splits = Splits(images(0, 60), images(60, 20))
    task = COLORIZATION.task(replace(run, split="validation"), splits)
    assert [drawn(e) for e in (task.train, task.validation, task.test)] == [
        set(range(50)),
        set(range(50, 60)),
        set(range(60, 80)),
    ]
    whole = COLORIZATION.task(run, splits)
    assert whole.validation is None
    assert drawn(whole.train) == set(range(60))
    batch = whole.test.draw(torch.arange(3), torch.Generator())
    assert batch.target.shape == (3, TEST_POINTS, 3)
    assert whole.train.draw(torch.arange(3), torch.Generator()).x.shape[1] == run.setting.points == 16


@pytest.mark.parametrize("preset", ["quick", "standard", "paper"])
def test_every_study_is_tuned_and_the_frontier_comes_first(preset):
    studies = COLORIZATION.studies(preset, "patches")
    assert [study.name for study in studies] == ["frontier", "depth", "optimizer"][: 1 if preset == "quick" else 3]
    assert studies[0].structure
    assert set(studies[0].methods) == {EMBEDDING, *EQUAL_TOTAL}
    for study in studies:
        assert study.tuning == TUNING
        assert study.seeds == {"quick": 5, "standard": 10, "paper": 30 if study.name == "depth" else 10}[preset]
        assert all(claim.premises for claim in study.claims)
        assert all(getattr(claim, "margin", None) is None for claim in study.claims)  # the paper has no number


def test_the_quick_preset_has_few_runs():
    assert len(Comparison.of(COLORIZATION, device="cpu").runs()) == 8 * 2 * 5


def test_departures_from_the_paper_are_declared():
    choices = " ".join(COLORIZATION.choices)
    for words in ("patches", "validation images", "cosine", "Adam", "biases", "not scaled"):
        assert words in choices
