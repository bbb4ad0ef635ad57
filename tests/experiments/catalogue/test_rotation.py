from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fasthyper.experiments import ROTATION, Comparison
from fasthyper.experiments.catalogue.data import IMAGES, Splits, load_images, validation_split
from fasthyper.experiments.catalogue.rotation import examples, nearest_angle, rotate
from fasthyper.experiments.claims import Flat, Improves
from fasthyper.experiments.experiment import stream
from fasthyper.experiments.methods import (
    ATTENTION,
    BIASES,
    DEEP_Q,
    EMBEDDING,
    EQUAL_TOTAL,
    FILM,
    FILM_WIDE,
    HYPERNETWORK,
    METHODS,
    PLAIN_WIDE,
    WIDE_E,
    WIDE_Q,
    counts,
)
from fasthyper.experiments.training import build, evaluate, train


def study_of(name, preset, data="digits"):
    return next(study for study in ROTATION.studies(preset, data) if study.name == name)


def run_of(data="digits", method="hypernetwork", depth=2, seed=0, **options):
    comparison = Comparison.of(ROTATION, data, depths=(depth,), device="cpu", **options)
    return comparison.run(comparison.studies[0], depth, method, seed)


def draw(pixels, generator, pixel_max=16):
    """Return a batch of all of these images."""
    return examples(pixels, pixel_max).draw(torch.arange(len(pixels)), generator)


@pytest.mark.parametrize("quarter", [0, 1, 2, 3, 4])
def test_quarter_turns_are_exact_and_counter_clockwise(quarter):
    images = torch.rand(3, 2, 7, 7)
    turned = rotate(images, torch.full((3,), 90.0 * quarter))
    torch.testing.assert_close(turned, torch.rot90(images, quarter, (2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("angle", [17.0, 45.0, 133.3, 301.0])
def test_other_turns_agree_with_scipy(size, angle):
    image = torch.rand(size, size, dtype=torch.float64)
    turned = rotate(image[None, None], torch.tensor([angle]))[0, 0]
    # torch fades to zero over one pixel at the border; scipy needs zeros there to do the same.
    padded = scipy.ndimage.rotate(np.pad(image.numpy(), size), angle, reshape=False, order=1)
    np.testing.assert_allclose(turned, padded[size:-size, size:-size], atol=1e-5)


def test_each_image_has_its_own_angle():
    images = torch.rand(2, 1, 5, 5)
    turned = rotate(images, torch.tensor([0.0, 180.0]))
    torch.testing.assert_close(turned[0], images[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[1], images[1].flip(1, 2), atol=1e-5, rtol=0)


def test_images_that_cannot_be_turned_are_refused():
    with pytest.raises(ValueError, match=r"images: expected \(B, C, S, S\), got \(1, 1, 4, 5\)"):
        rotate(torch.zeros(1, 1, 4, 5), torch.zeros(1))
    with pytest.raises(ValueError, match=r"degrees: .* 2 images, got \(3,\)"):
        rotate(torch.zeros(2, 1, 4, 4), torch.zeros(3))


@given(st.floats(0, 360, exclude_max=True, width=32))
def test_the_target_is_the_nearest_on_the_circle(angle):
    found = nearest_angle(torch.tensor([angle])).item()
    distances = [min(abs(angle - 30 * k), 360 - abs(angle - 30 * k)) for k in range(12)]
    assert 0 <= found < 12
    assert distances[found] <= min(distances) + 1e-4


def test_a_batch_is_the_image_the_turned_image_and_the_angle():
    pixels = load_images("digits").train[:20]
    generator = torch.Generator().manual_seed(7)
    batch = draw(pixels, generator)
    degrees = 360 * torch.rand(20, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(batch.cond, ((pixels / 16 - 0.1307) / 0.3081).flatten(1))
    x = (batch.x * 0.3081 + 0.1307).view(20, 1, 8, 8)
    torch.testing.assert_close(x, rotate(pixels / 16, degrees))
    assert torch.equal(batch.target, nearest_angle(degrees))
    assert not torch.equal(draw(pixels, generator).target, batch.target)  # anew at every access


def test_examples_are_chosen_by_number():
    found = examples(load_images("digits").train, 16)
    assert found.count == 1500
    chosen = torch.tensor([7, 3])
    batch = found.draw(chosen, torch.Generator().manual_seed(0))
    assert batch.x.shape == batch.cond.shape == (2, 64)
    torch.testing.assert_close(batch.cond, draw(load_images("digits").train[chosen], torch.Generator()).cond)


def test_a_small_angle_is_recovered_from_the_batch():
    """Turning x back by the target's angle leaves at most 15 degrees: nearer to I than x turned away."""
    batch = draw(load_images("digits").train[:200], torch.Generator().manual_seed(0))
    back = rotate(batch.x.view(-1, 1, 8, 8), -30.0 * batch.target).flatten(1)
    away = rotate(batch.x.view(-1, 1, 8, 8), 90 - 30.0 * batch.target).flatten(1)
    near = (back - batch.cond).norm(dim=1) < (away - batch.cond).norm(dim=1)
    assert near.float().mean() > 0.97


@pytest.mark.parametrize(("data", "white"), [("digits", 16), ("mnist", 255), ("cifar10", 255)])
def test_white_is_one_before_it_is_normalised(data, white):
    image = IMAGES[data]
    pixels = torch.full((1, image.channels, image.size, image.size), white, dtype=torch.uint8)
    splits = Splits(pixels, pixels)
    batch = ROTATION.task(run_of(data), splits).train.draw(torch.tensor([0]), torch.Generator())
    torch.testing.assert_close(batch.cond, torch.full((1, image.pixels), (1 - 0.1307) / 0.3081))


def test_the_task_trains_on_one_part_and_tests_on_the_other():
    splits = load_images("digits")
    task = ROTATION.task(run_of(), splits)
    assert (task.train.count, task.test.count, task.validation) == (1500, 8 * 297, None)
    assert task.levels == {"guessing": pytest.approx(11 / 12)}
    y = torch.randn(5, 12)
    target = torch.tensor([0, 1, 2, 3, 11])
    assert task.loss(y, target).item() == pytest.approx(-y.log_softmax(1)[range(5), target].mean().item(), rel=1e-5)


def test_the_error_is_the_share_of_wrong_answers():
    run = run_of(seed=1)
    task = ROTATION.task(run, load_images("digits"))

    class Always(nn.Module):
        def forward(self, x, cond):
            return nn.functional.one_hot(torch.full((len(x),), 3), 12).float()

    generator = torch.Generator().manual_seed(stream(run.seed, "test"))
    target = torch.cat([task.test.draw(c, generator).target for c in torch.arange(8 * 297).split(1000)])
    assert evaluate(run, task, Always()) == {"error": pytest.approx((target != 3).float().mean().item())}


def layers_of(*sizes):
    return sum(i * o + o for i, o in pairwise(sizes))


@pytest.mark.parametrize(("data", "d", "width"), [("digits", 64, 50), ("mnist", 784, 50), ("cifar10", 3072, 100)])
@pytest.mark.parametrize("depth", [2, 5])
def test_parameter_counts_are_the_papers(data, d, width, depth):
    hidden = layers_of(d, *[width] * (depth - 1))

    def count(method):
        with torch.device("meta"):
            return counts(METHODS[method].build(ROTATION.architecture(run_of(data, method, depth))))

    generated, e = 10 * d + 120, 10 * d + 10
    n_f = hidden + layers_of(width, generated)
    assert count(HYPERNETWORK) == (n_f, generated, n_f)
    n_e, n_q = hidden + layers_of(width, e), (d + e) * 10 + 10 + 10 * 12 + 12
    assert count(EMBEDDING) == (n_e, n_q, n_e + n_q)
    assert count(FILM).primary == layers_of(d, 10, 12)
    assert count(BIASES).context == hidden + layers_of(width, 22)


def test_the_hypernetwork_is_the_authors_one():
    """One f whose output is cut into the weights of both layers of g, applied by bmm."""
    run = run_of(depth=3)
    model = build(ROTATION, run)
    linears = [module for module in model.trunk if isinstance(module, nn.Linear)]
    assert len(linears) == run.setting.depth - 1
    first, _, last = model.primary
    assert first.bias is last.bias is None
    batch = draw(load_images("digits").train[:6], torch.Generator().manual_seed(0))
    z = model.trunk(batch.cond)
    w1 = (z @ first.weight.reshape(640, 50).T).view(6, 10, 64) + first.base_weight
    w2 = (z @ last.weight.reshape(120, 50).T).view(6, 12, 10) + last.base_weight
    y = torch.bmm(w2, torch.relu(torch.bmm(w1, batch.x[:, :, None])))[:, :, 0]
    torch.testing.assert_close(model(batch.x, batch.cond), y, atol=1e-5, rtol=1e-5)


def test_heads_start_as_linear_layers_do():
    first = build(ROTATION, run_of("mnist")).primary[0]
    bound = 50**-0.5
    for parameter in (first.weight, first.base_weight):
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_the_embedding_method_is_the_authors_one():
    run = run_of(method="embedding", depth=3)
    model = build(ROTATION, run)
    batch = draw(load_images("digits").train[:6], torch.Generator().manual_seed(0))
    joined = torch.cat([batch.x, model.embed(batch.cond)], dim=1)
    torch.testing.assert_close(model(batch.x, batch.cond), model.primary(joined), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [HYPERNETWORK, EMBEDDING])
def test_cifar_uses_elu(method):
    assert isinstance(build(ROTATION, run_of("cifar10", method)).primary[1], nn.ELU)
    assert isinstance(build(ROTATION, run_of("mnist", method)).primary[1], nn.ReLU)


def test_both_methods_start_from_the_same_hidden_layers():
    hyper = build(ROTATION, run_of(depth=3, seed=1)).trunk
    embed = build(ROTATION, run_of(method="embedding", depth=3, seed=1)).embed
    other = build(ROTATION, run_of(depth=3, seed=0)).trunk
    for index in (0, 2):
        assert torch.equal(hyper[index].weight, embed[index].weight)
        assert not torch.equal(hyper[index].weight, other[index].weight)


@pytest.mark.parametrize(("data", "width", "unit"), [("mnist", 50, 10_000), ("cifar10", 100, 10_000)])
def test_the_full_protocol_is_the_papers(data, width, unit):
    _, depth, _, embedding, rate = ROTATION.studies("paper", data)
    for study in (depth, embedding, rate):
        setting = study.setting
        assert (setting.width, setting.epochs, setting.lr, setting.batch_size) == (width, 10, 0.01, 64)
        assert (setting.optimizer, setting.momentum, setting.schedule) == ("sgd", 0.0, "constant")
        assert (setting.embedding, setting.size) == (10 * IMAGES[data].pixels + 10, 1)
        assert (study.seeds, study.tuning) == (100, None)
    assert depth.values == tuple(range(2, 10))
    assert {HYPERNETWORK, EMBEDDING} < set(depth.methods)
    assert embedding.values == tuple(unit * i for i in range(1, 9))
    np.testing.assert_allclose(rate.values, [1e-4 * 10 ** (j / 4) for j in range(2, 10)])


@pytest.mark.parametrize("data", ROTATION.data)
@pytest.mark.parametrize("preset", ["quick", "standard", "paper"])
def test_the_frontier_comes_first_and_is_tuned(preset, data):
    frontier, *others = ROTATION.studies(preset, data)
    rates = frontier.tuning.rates[frontier.setting.optimizer]
    assert (frontier.name, frontier.axis.field, frontier.axis.count) == ("frontier", "size", "trainable_parameters")
    assert frontier.structure
    assert len(rates) == 6
    assert min(rates) < frontier.setting.lr < max(rates)
    assert set(frontier.methods) == {EMBEDDING, *EQUAL_TOTAL}
    assert {c.over for c in frontier.claims} == {
        EMBEDDING,
        WIDE_E,
        WIDE_Q,
        DEEP_Q,
        FILM_WIDE,
        PLAIN_WIDE,
        ATTENTION,
    }
    assert frontier.seeds == (5 if preset == "quick" else 10)
    fixed = [study for study in others if study.tuning is None]
    assert [study.name for study in fixed] == ["depth", "embedding", "rate"][: 1 if preset == "quick" else 3]
    assert {(s.setting.lr, s.setting.optimizer) for s in fixed} == {(0.01, "sgd")}


def test_every_claim_says_which_sizes_it_is_about():
    for preset in ("quick", "standard", "paper"):
        for study in ROTATION.studies(preset, "digits"):
            for claim in study.claims:
                over = getattr(claim, "over", None)
                if over is not None:
                    assert claim.premises
                    about_totals = any(words in claim.text for words in ("equally many", "as many trained parameters"))
                    assert about_totals == METHODS[over].equal


def test_the_quick_preset_has_few_runs():
    comparison = Comparison.of(ROTATION, device="cpu")
    assert Counter(run.setting.epochs for run in comparison.runs()) == {50: 8 * 2 * 5, 60: 2 * 2 * 5}
    depth = comparison.studies[1]
    assert not any(isinstance(claim, (Improves, Flat)) for claim in depth.claims)
    assert "60 epochs" in depth.note


def test_digits_are_trained_on_for_long_enough_over_depth():
    assert [study_of("depth", preset).setting.epochs for preset in ("quick", "standard", "paper")] == [60, 400, 400]


def test_departures_from_the_paper_and_its_code_are_declared():
    choices = " ".join(ROTATION.choices)
    for words in ("bilinear", "circle", "E = 50,000", "one layer less", "validation images", "digits", "cosine"):
        assert words in choices


def test_the_splits_are_disjoint():
    """Each image has a colour of its own, which shows where it is drawn from."""
    ramp = torch.arange(120).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).to(torch.uint8)
    splits = Splits(ramp[:100], ramp[100:])

    def drawn(examples):
        cond = examples.draw(torch.arange(examples.count), torch.Generator()).cond
        return set(((cond[:, 0] * 0.3081 + 0.1307) * 255).round().int().tolist())

    run = run_of("mnist")
    task = ROTATION.task(replace(run, split="validation"), splits)
    used, validation, test = map(drawn, (task.train, task.validation, task.test))
    assert (used, validation, test) == (set(range(84)), set(range(84, 100)), set(range(100, 120)))
    assert drawn(ROTATION.task(run, splits).train) == set(range(100))
    assert [len(part) for part in validation_split(torch.zeros(12), "test")] == [12, 0]


def test_each_digit_is_turned_several_times():
    task = ROTATION.task(run_of(), load_images("digits"))
    batch = task.test.draw(torch.tensor([5, 5 + 297]), torch.Generator().manual_seed(0))
    assert torch.equal(*batch.cond)
    assert not torch.allclose(*batch.x)


def test_the_angle_is_learnt():
    """A few epochs on digits are enough to do better than guessing, for both of the paper's methods."""
    splits = load_images("digits")
    for method in (HYPERNETWORK, EMBEDDING):
        metrics = train(ROTATION, run_of(method=method, epochs=3, lr=0.05), splits)
        assert metrics.measures["error"] < 0.8 < metrics.measures["guessing"]
