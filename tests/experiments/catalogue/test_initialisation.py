from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.experiment import Run
from fasthyper.experiments.networks import INITIALISATIONS
from fasthyper.experiments.training import train

INITIALISATION = EXPERIMENTS["initialisation"]
TASKS = {"rotation": "rotation", "identity": "operators"}


def comparison_of(**options):
    return Comparison.of(INITIALISATION, preset="standard", device="cpu", **options)


def run_of(name, initialisation="torch", **options):
    comparison = comparison_of(studies=[name], seeds=1, **options)
    return comparison.run(comparison.studies[0], initialisation, "hypernetwork", 0)


def test_every_initialisation_is_tuned_with_both_optimizers_on_both_tasks():
    studies = comparison_of().studies
    assert {s.name for s in studies} == {f"{task} {optimizer}" for task in TASKS for optimizer in ("sgd", "adam")}
    for study in studies:
        assert study.values == INITIALISATIONS
        assert study.setting.optimizer == study.name.split()[1]
        assert study.setting.size == 1


@pytest.mark.parametrize(("name", "other"), TASKS.items())
def test_the_task_is_that_of_the_other_experiment(name, other):
    run = run_of(f"{name} adam")
    experiment = EXPERIMENTS[other]
    dataset = INITIALISATION.load("digits", None)
    ours = INITIALISATION.task(run, dataset)
    theirs = experiment.task(Run(other, 1, experiment.data[0], "hypernetwork", 0, "cpu", run.setting), dataset)
    chosen = torch.arange(30)
    for mine, other_examples in ((ours.train, theirs.train), (ours.test, theirs.test)):
        a, b = (e.draw(chosen, torch.Generator().manual_seed(0)) for e in (mine, other_examples))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert INITIALISATION.architecture(run) == experiment.architecture(replace(run, data=experiment.data[0]))


@pytest.mark.parametrize("name", [f"{task} {optimizer}" for task in TASKS for optimizer in ("sgd", "adam")])
def test_the_default_rate_learns(name):
    run = run_of(name, epochs=8)
    metrics = train(INITIALISATION, run, INITIALISATION.load("digits", None))
    untrained = {"rotation": 11 / 12, "identity": 1.0}[name.split()[0]]
    (measure,) = {"error", "relative_l2"} & set(metrics.measures)
    assert metrics.measures[measure] < 0.97 * untrained
