"""Tests of the two assumptions: A1 over independent pairs, A1 as in the code of the authors, and A2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fasthyper.experiments import EXPERIMENTS, METHODS, Comparison
from fasthyper.experiments.catalogue.assumptions import convolutional_target
from fasthyper.experiments.catalogue.data import Splits
from fasthyper.experiments.experiment import stream
from fasthyper.experiments.training import Trainer, build, train

ASSUMPTIONS = EXPERIMENTS["assumptions"]
COMPARISON = Comparison.of(ASSUMPTIONS, preset="standard", device="cpu")


def study_of(name):
    return next(study for study in COMPARISON.studies if study.name == name)


def run_of(name, method="pair", value=None, seed=0):
    study = study_of(name)
    return COMPARISON.run(study, study.values[0] if value is None else value, method, seed)


def few_digits():
    source = ASSUMPTIONS.load("digits", None)
    return source._replace(
        images=Splits(*(s[:64] for s in source.images)), labels=Splits(*(s[:64] for s in source.labels))
    )


def test_the_presets():
    assert ASSUMPTIONS.studies("quick", "digits") == ()
    standard, paper = (ASSUMPTIONS.studies(preset, "digits") for preset in ("standard", "paper"))
    names = ["A1", "A1 authors digits", "A1 authors noise", "A2"]
    assert [s.name for s in standard] == [s.name for s in paper] == names
    assert [s.seeds for s in standard] == [10, 10, 10, 80]
    assert [s.seeds for s in paper] == [20, 20, 20, 100]
    assert len(standard[-1].values) == 10
    assert paper[-1].values == tuple(range(1, 30))
    for study in paper[1:3]:
        assert (study.axis.field, study.values[0], study.values[-1]) == ("epochs", 50, 5000)
    for study in (*standard[:3], *paper[:3]):
        setting = study.setting
        assert (setting.optimizer, setting.lr, setting.momentum, setting.batch_size) == ("sgd", 0.01, 0.5, 64)
        (claim,) = study.claims
        assert claim.premises


def test_both_ways_are_declared():
    choices = " ".join(ASSUMPTIONS.choices)
    for words in ("Independent pairs", "anew at every access", "norm 1", "trained on", "squared distances", "100 in"):
        assert words in choices


def test_the_random_network_of_the_first_assumption():
    network = convolutional_target(1, 28, torch.Generator().manual_seed(0))
    kernels = [m.kernel_size for m in network if isinstance(m, nn.Conv2d)]
    assert kernels == [(10, 10), (10, 10)]
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert convolutional_target(3, 32, torch.Generator().manual_seed(0))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    wide = convolutional_target(3, 32, torch.Generator().manual_seed(0), maps=20)
    assert [m.out_channels for m in wide if isinstance(m, nn.Conv2d)] == [20, 40]
    assert wide[-1].in_features == 160


def test_two_networks_learn_apart_from_each_other():
    """Their losses are summed: each gets the gradients that it would get alone."""
    run = run_of("A1")
    task = ASSUMPTIONS.task(run, few_digits())
    batch = task.train.draw(torch.arange(32), torch.Generator())
    model = METHODS["pair"].build(ASSUMPTIONS.architecture(run))
    task.loss(model(batch.x, batch.cond), batch.target).backward()
    for network in model.primary:
        alone = nn.functional.mse_loss(network(batch.x), batch.target)
        gradients = torch.autograd.grad(alone, list(network.parameters()))
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-7)


def test_rows_have_norm_1_only_as_in_the_code_of_the_authors():
    for name, expected in (("A1", False), ("A1 authors digits", True)):
        pair = build(ASSUMPTIONS, run_of(name))
        norms = torch.cat([p.norm(dim=1) for p in pair.parameters() if p.ndim == 2])
        assert bool((norms - 1).abs().max() < 1e-5) == expected
        first, second = pair.primary
        assert not torch.allclose(first[0].weight, second[0].weight)


def test_steps_are_those_of_the_code_of_the_authors():
    """Two steps, written again: a loss and an optimizer for each network."""
    run = run_of("A1 authors noise")
    task = ASSUMPTIONS.task(run, few_digits())
    pair, copy = (build(ASSUMPTIONS, run) for _ in range(2))
    trainer = Trainer(pair, task, run.setting, torch.device("cpu"))
    velocities = [torch.zeros_like(p) for p in copy.parameters()]
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        batch = task.train.draw(torch.arange(64), generator)
        trainer.step(batch)
        losses = [((network(batch.x) - batch.target) ** 2).mean() for network in copy.primary]
        gradients = [
            g for n, l in zip(copy.primary, losses, strict=True) for g in torch.autograd.grad(l, n.parameters())
        ]
        with torch.no_grad():
            for parameter, velocity, gradient in zip(copy.parameters(), velocities, gradients, strict=True):
                velocity.mul_(0.5).add_(gradient)
                parameter.sub_(0.01 * velocity)
    for ours, theirs in zip(pair.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["A1", "A1 authors noise"])
def test_noise_is_drawn_anew_only_as_in_the_code_of_the_authors(name):
    run = run_of(name, value=None if "noise" in name else "noise")
    task = ASSUMPTIONS.task(run, few_digits())
    generator, chosen = torch.Generator().manual_seed(0), torch.arange(50)
    for examples in (task.train, task.test):
        first, again = (examples.draw(chosen, generator) for _ in range(2))
        assert torch.equal(first.x, again.x) == (name == "A1")
        assert first.x.shape == (50, 784)
        assert first.x.abs().max() <= 1
        assert first.x.var().item() == pytest.approx(1 / 3, rel=0.05)
        if name != "A1":
            assert examples.count == 10_000
            same = examples.draw(chosen, torch.Generator().manual_seed(0))
            network = convolutional_target(1, 28, _after_the_inputs(run), maps=20)
            with torch.no_grad():
                torch.testing.assert_close(same.target, network(same.x.view(-1, 1, 28, 28)))


def _after_the_inputs(run):
    """Return the generator of the task after the inputs are drawn, 64 for training and 64 for testing."""
    generator = torch.Generator().manual_seed(stream(run.seed, "task"))
    torch.rand(64, 784, generator=generator), torch.rand(64, 784, generator=generator)
    return generator


def test_hidden_neurons_learn_labels():
    comparison = Comparison.of(ASSUMPTIONS, preset="standard", device="cpu", studies=["A2"], epochs=3)
    run = comparison.run(comparison.studies[0], 29, "plain", 0)
    metrics = train(ASSUMPTIONS, run, ASSUMPTIONS.load("digits", None))
    assert metrics.measures["mse"] < 0.08  # a constant output of 0.1 for each class has 0.09


def test_no_model_starts_at_what_it_is_to_learn():
    run = run_of("A1")
    first = next(p for p in build(ASSUMPTIONS, run).parameters() if p.ndim == 2).detach().flatten()
    task = ASSUMPTIONS.task(run, ASSUMPTIONS.load("digits", None))
    other = task.train.draw(torch.arange(100), torch.Generator()).x.flatten()
    size = min(len(first), len(other))
    assert abs(np.corrcoef(first[:size], other[:size])[0, 1]) < 0.1
