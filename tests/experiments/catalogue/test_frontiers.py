"""Tests of the studies of SGD beside the optimizer of each frontier."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.catalogue.frontiers import GRID, MAIN, optimizers
from fasthyper.experiments.comparison import PRESETS

WITH_FRONTIERS = [
    (name, preset)
    for name, experiment in EXPERIMENTS.items()
    for preset in ("standard", "paper")
    if any(study.structure for study in experiment.studies(preset, experiment.data[0]))
]


@pytest.mark.parametrize(("name", "preset"), WITH_FRONTIERS)
def test_each_frontier_has_its_methods_tuned_with_both_optimizers(name, preset):
    comparison = Comparison.of(EXPERIMENTS[name], preset=preset, device="cpu")
    frontiers = [study for study in comparison.studies if study.structure]
    studies = optimizers(frontiers, preset)
    assert all(study in comparison.studies for study in studies)
    for of, study in zip(frontiers, studies, strict=True):
        assert study.methods == tuple(m for m in of.methods if preset == "paper" or m in MAIN)
        assert set(study.values) == set(study.tuning.rates) == {"sgd", "adam"}
        assert (study.seeds, study.tuning.seeds) == (of.seeds, of.tuning.seeds)
        assert {claim.at for claim in study.claims} == {"sgd"}
        assert not study.structure, "it is no row of the answer"
        assert not study.published

        def runs(study, value):
            return {run for method in studies[0].methods for run in comparison.tuning_runs_of(study, value, method)}

        assert runs(study, "adam") == runs(of, 1.0), "they are trained once"
        assert runs(study, "sgd").isdisjoint(runs(of, 1.0))


def test_there_are_no_such_studies_in_the_quick_preset():
    for experiment in EXPERIMENTS.values():
        assert not any("optimizer" in s.name for s in experiment.studies("quick", experiment.data[0]))


def test_most_experiments_have_a_frontier():
    without = set(EXPERIMENTS) - {name for name, _ in WITH_FRONTIERS}
    assert without == {"assumptions", "initialisation", "infinite_width"}, "they compare one method with itself"


@pytest.mark.parametrize("preset", PRESETS)
def test_all_tuned_studies_have_one_grid(preset):
    tuned = [s for e in EXPERIMENTS.values() for s in e.studies(preset, e.data[0]) if s.tuning is not None]
    assert len(tuned) > 5
    for study in tuned:
        assert study.tuning.rates == GRID
        assert min(GRID[study.setting.optimizer]) < study.setting.lr < max(GRID[study.setting.optimizer])


@pytest.mark.parametrize("changes", [{"values": (0.25,)}, {"tuning": None}, {"baseline": None}, {"optimizer": "sgd"}])
def test_a_frontier_without_what_the_optimizers_need_is_refused(changes):
    study = EXPERIMENTS["rotation"].studies("standard", "digits")[0]
    setting = replace(study.setting, optimizer=changes.pop("optimizer", "adam"))
    with pytest.raises(ValueError, match="frontiers: expected size 1, tuned rates and another optimizer than SGD"):
        optimizers([replace(study, setting=setting, **changes)], "standard")


def test_one_rate_for_all_leaves_the_optimizers_out():
    names = [s.name for s in Comparison.of(EXPERIMENTS["rotation"], preset="standard", lr=0.01, device="cpu").studies]
    assert "frontier" in names
    assert "optimizer" not in names
    with pytest.raises(ValueError, match=r"^lr: no study here has such a setting"):
        Comparison.of(EXPERIMENTS["rotation"], preset="standard", studies=["optimizer"], lr=0.01, device="cpu")
