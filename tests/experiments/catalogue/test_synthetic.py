"""Tests of the synthetic targets, against an implementation in NumPy and float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fasthyper.experiments import METHODS, Comparison
from fasthyper.experiments.catalogue.frontiers import TUNING
from fasthyper.experiments.catalogue.synthetic import STRUCTURES, SYNTHETIC, TYPES, target
from fasthyper.experiments.experiment import stream
from fasthyper.experiments.methods import EMBEDDING, EQUAL_TOTAL, counts
from fasthyper.experiments.training import batches

D = 20


def of(**options):
    return Comparison.of(SYNTHETIC, device="cpu", **options)


def run_of(kind, method="hypernetwork", seed=0):
    comparison = of()
    study = next(s for s in comparison.studies if s.setting.kind == kind)
    return comparison.run(study, 1.0, method, seed)


def task_of(kind, **options):
    return SYNTHETIC.task(run_of(kind, **options), None)


def in_float64(kind, seed):
    """Return the target of a seed as a function of two arrays."""
    generator = torch.Generator().manual_seed(stream(seed, "task"))
    sizes = {
        "type I": (D, 300, 300, D),
        "type II": (2 * D, 100, 50, 50, 1),
        "type III": (D, 100, 100, 50, 1),
    }[kind]
    weights = []
    for inputs, outputs in pairwise(sizes):
        bound = np.sqrt(6 / inputs)
        weights.append(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator).double().numpy())

    def network(u):
        for number, weight in enumerate(weights):
            u = u @ weight.T
            if number + 1 < len(weights):
                u = 1 / (1 + np.exp(-u)) if kind == "type I" else np.where(u > 0, u, np.expm1(np.minimum(u, 0)))
        return u

    if kind == "type I":

        def y(x, cond):
            h = np.exp(network(cond))
            return (x * h).sum(axis=1) / h.sum(axis=1)

        return y
    return lambda x, cond: network(np.concatenate([x, cond], axis=1) if kind == "type II" else x * cond)[:, 0]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", [0, 3])
def test_targets_and_levels_are_those_of_an_own_implementation(kind, seed):
    y, task = in_float64(kind, seed), task_of(kind, seed=seed)
    random = np.random.default_rng(seed)
    x = random.standard_normal((20_000, D))
    many = np.stack([y(x, random.standard_normal(x.shape)) for _ in range(5)])  # (I, x)
    assert task.levels["variance"] == pytest.approx(many.var(), rel=0.06)
    assert task.levels["ignores"] == pytest.approx(many.var(axis=0, ddof=1).mean() / many.var(), rel=0.06)
    for examples in (task.train, task.validation, task.test):
        batch = examples.draw(torch.arange(2000), torch.Generator().manual_seed(9))
        expected = (y(batch.x.double().numpy(), batch.cond.double().numpy()) - many.mean()) / many.std()
        slope, shift = np.polyfit(expected, batch.target[:, 0].double().numpy(), 1)
        assert slope == pytest.approx(1, abs=0.03)
        assert shift == pytest.approx(0, abs=0.03)
        assert np.allclose(slope * expected + shift, batch.target[:, 0], atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_targets_have_mean_0_and_variance_1(kind):
    for seed in range(3):
        target = task_of(kind, seed=seed).test.draw(torch.arange(10_000), torch.Generator()).target
        assert abs(target.mean()) < 0.05
        assert target.var() == pytest.approx(1, abs=0.1)


def test_predictions_of_the_mean_have_the_error_of_the_level():
    task = task_of("type II")
    batch = task.test.draw(torch.arange(10_000), torch.Generator())
    error = task.measure(torch.zeros_like(batch.target), batch.target)["mse"]
    assert error.shape == (10_000,)
    assert error.mean() == pytest.approx(task.levels["constant"], rel=0.1)


def test_examples_are_new_in_every_epoch_and_the_same_for_all_methods():
    def epochs(method, seed):
        run = run_of("type I", method=method, seed=seed)
        task = SYNTHETIC.task(run, None)
        generator = torch.Generator().manual_seed(stream(seed, "order"))
        return [torch.cat([b.x for b in batches(run, task.train, generator)]) for _ in range(2)]

    first, second = epochs("hypernetwork", 0)
    assert first.shape == (2000, D)
    assert len(torch.cat([first, second]).unique(dim=0)) == 4000
    for ours, theirs in zip((first, second), epochs("embedding_wide_q", 0), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(first, epochs("hypernetwork", 1)[0])


def test_no_examples_are_shared_by_training_validation_and_test():
    task = task_of("type III")
    generator = torch.Generator().manual_seed(1)
    drawn = [
        examples.draw(torch.arange(2500), generator.manual_seed(1))
        for examples in (task.train, task.validation, task.test)
    ]
    for part in ("x", "cond"):
        assert len(torch.cat([getattr(batch, part) for batch in drawn]).unique(dim=0)) == 7500
    again = task.test.draw(torch.arange(2500), generator)
    assert torch.equal(drawn[2].target, again.target)  # drawn once


def test_targets_differ_between_types_and_seeds():
    first = [p for kind in TYPES for p in (in_float64(kind, 0), in_float64(kind, 1))]
    x, cond = np.random.default_rng(0).standard_normal((2, 50, D))
    found = [y(x, cond) for y in first]
    assert all(not np.allclose(a, b, atol=1e-2) for n, a in enumerate(found) for b in found[:n])


def test_targets_have_the_structure_of_their_type():
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(5, 30), torch.randn(5, 30)
    linear = target("type I", 30, generator)
    assert torch.allclose(linear(2 * x, cond), 2 * linear(x, cond), atol=1e-5)
    assert torch.allclose(linear(torch.ones(5, 30), cond), torch.ones(5, 1))  # a softmax sums to 1
    product = target("type III", 30, generator)
    assert torch.allclose(product(x, cond), product(cond, x), atol=1e-6)
    both = target("type II", 30, generator)
    assert not torch.allclose(both(x, cond), both(cond, x), atol=1e-3)
    with pytest.raises(ValueError, match="kind: 'type IV'"):
        target("type IV", 30, generator)


@pytest.mark.parametrize(
    ("preset", "sizes", "seeds", "runs"),
    [("quick", (1.0,), 5, 3 * 8 * 5), ("standard", (0.25, 1.0, 4.0), 10, 3 * (8 * 3 + 5 + 2 * 3) * 10)],
)
def test_frontiers_come_first(preset, sizes, seeds, runs):
    comparison = of(preset=preset)
    frontiers = comparison.studies[:3]
    assert [study.structure for study in frontiers] == list(STRUCTURES.values())
    for study in frontiers:
        assert (study.axis.field, study.values, study.seeds) == ("size", sizes, seeds)
        assert study.tuning == TUNING
        assert set(study.methods) == {EMBEDDING, *EQUAL_TOTAL}
    assert not any(study.structure for study in comparison.studies[3:])
    assert len(comparison.runs()) == runs


def test_claims_about_primaries_and_totals_are_told_apart():
    study = of().studies[0]
    run = of().run(study, 1.0, "hypernetwork", 0)
    size = {method: counts(METHODS[method].model(SYNTHETIC.architecture(run))) for method in study.methods}
    own = size["hypernetwork"]
    for claim in study.claims:
        other = size[claim.over]
        if claim.text.startswith("Primaries"):
            assert own.primary < other.primary
        else:
            assert claim.text.startswith("Totals")
            assert other.trainable == pytest.approx(own.trainable, rel=0.02)
        assert claim.premises


def test_the_sizes_of_the_paper():
    """Over depth g, q: 1000 -> 10 -> 1 and E = 10,000; over i f: 100 -> 100 -> 100 i -> 1010, E = 100 i or 1000 i."""
    studies = {study.name: study for study in of(preset="paper").studies}
    for name, study in studies.items():
        if name.startswith(("depth", "dimension")):
            assert (study.setting.optimizer, study.setting.lr, study.tuning) == ("sgd", 0.01, None)
            assert (study.setting.epochs, study.setting.samples, study.seeds) == (100, 30_000, 100)
        else:
            assert study.seeds == 10
    comparison = of(preset="paper")

    def built(name, value, method):
        with torch.device("meta"):
            return METHODS[method].build(SYNTHETIC.architecture(comparison.run(studies[name], value, method, 0)))

    assert counts(built("depth type I", 3, "hypernetwork")).primary == 10_010
    assert counts(built("depth type I", 3, "embedding")).primary == (1000 + 10_000) * 10 + 10 + 10 + 1
    assert studies["dimension type I"].values == tuple(range(1, 9))
    model = built("dimension type I", 3, "hypernetwork")
    assert [tuple(p.shape) for p in model.trunk.parameters()][::2] == [(100, 100), (300, 100)]
    assert counts(model).primary == 1010
    for method, e in (("embedding", 300), ("embedding_tenfold", 3000)):
        embed = built("dimension type I", 3, method).embed
        assert [tuple(p.shape) for p in embed.parameters()][::2] == [(100, 100), (100, 100), (e, 100)]


def test_an_unknown_type_is_refused():
    run = run_of("type I")
    with pytest.raises(ValueError, match="kind: 'type 1' is not a type of target"):
        SYNTHETIC.task(replace(run, setting=replace(run.setting, kind="type 1")), None)
