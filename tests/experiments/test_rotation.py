from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fasthyper.experiments import ROTATION, Comparison
from fasthyper.experiments.data import load_images
from fasthyper.experiments.rotation import draw, nearest_angle, rotate
from fasthyper.experiments.training import build
from fasthyper.nn import parameter_report


def run_of(data="digits", method="hypernetwork", depth=2, seed=0, **options):
    comparison = Comparison.of(ROTATION, data, depths=(depth,), seeds=seed + 1, device="cpu", **options)
    return next(run for run in comparison.runs() if (run.method, run.seed) == (method, seed))


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
    run = run_of()
    pixels = load_images("digits").train[:20]
    generator = torch.Generator().manual_seed(7)
    batch = draw(pixels, run, generator)
    degrees = 360 * torch.rand(20, generator=torch.Generator().manual_seed(7))
    cond = ((pixels / 16 - 0.1307) / 0.3081).flatten(1)
    torch.testing.assert_close(batch.cond, cond)
    x = (batch.x * 0.3081 + 0.1307).view(20, 1, 8, 8)
    torch.testing.assert_close(x, rotate(pixels / 16, degrees))
    assert torch.equal(batch.target, nearest_angle(degrees))
    assert not torch.equal(draw(pixels, run, generator).target, batch.target)  # anew at every access


def test_a_small_angle_is_recovered_from_the_batch():
    """Turning x back by the target's angle leaves at most 15 degrees: nearer to I than x turned away."""
    run = run_of()
    batch = draw(load_images("digits").train[:200], run, torch.Generator().manual_seed(0))
    back = rotate(batch.x.view(-1, 1, 8, 8), -30.0 * batch.target).flatten(1)
    away = rotate(batch.x.view(-1, 1, 8, 8), 90 - 30.0 * batch.target).flatten(1)
    near = (back - batch.cond).norm(dim=1) < (away - batch.cond).norm(dim=1)
    assert near.float().mean() > 0.97


@pytest.mark.parametrize(("data", "d", "width"), [("digits", 64, 50), ("mnist", 784, 50), ("cifar10", 3072, 100)])
@pytest.mark.parametrize("depth", [2, 5])
def test_parameter_counts_are_the_papers(data, d, width, depth):
    hidden = d * width + width + (depth - 2) * (width * width + width)
    weights = 10 * d + 120
    report = parameter_report(build(ROTATION, run_of(data, "hypernetwork", depth)))
    assert report.n_g == weights
    assert report.n_f == report.trainable == hidden + width * weights + weights
    e = 10 * d + 10
    report = parameter_report(build(ROTATION, run_of(data, "embedding", depth)))
    assert report.n_e == hidden + width * e + e
    assert report.n_q == (d + e) * 10 + 10 + 10 * 12 + 12
    assert report.trainable == report.n_e + report.n_q


def test_the_hypernetwork_is_the_authors_one():
    """One f whose output is cut into the weights of both layers of g, applied by bmm."""
    run = run_of(depth=3)
    model = build(ROTATION, run)
    linears = [module for module in model.trunk if isinstance(module, nn.Linear)]
    assert len(linears) == run.depth - 1
    first, _, last = model.primary
    batch = draw(load_images("digits").train[:6], run, torch.Generator().manual_seed(0))
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
    batch = draw(load_images("digits").train[:6], run, torch.Generator().manual_seed(0))
    joined = torch.cat([batch.x, model.embed(batch.cond)], dim=1)
    torch.testing.assert_close(model(batch.x, batch.cond), model.primary(joined), atol=1e-5, rtol=1e-5)


def test_cifar_uses_elu():
    assert isinstance(build(ROTATION, run_of("cifar10")).primary[1], nn.ELU)
    assert isinstance(build(ROTATION, run_of("mnist")).primary[1], nn.ReLU)


def test_both_methods_start_from_the_same_hidden_layers():
    hyper = build(ROTATION, run_of(depth=3, seed=1)).trunk
    embed = build(ROTATION, run_of(method="embedding", depth=3, seed=1)).embed
    other = build(ROTATION, run_of(depth=3, seed=0)).trunk
    for index in (0, 2):
        assert torch.equal(hyper[index].weight, embed[index].weight)
        assert not torch.equal(hyper[index].weight, other[index].weight)


def test_building_leaves_torchs_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(ROTATION, run_of())
    assert torch.equal(torch.rand(3), expected)


def test_the_defaults_are_the_papers():
    defaults = ROTATION.defaults
    assert (defaults["mnist"].width, defaults["cifar10"].width) == (50, 100)
    for name in ("mnist", "cifar10"):
        assert (defaults[name].epochs, defaults[name].lr, defaults[name].batch_size) == (10, 0.01, 64)
        assert defaults[name].depths == tuple(range(2, 10))
    assert (defaults["digits"].depths, defaults["digits"].seeds) == ((2, 3, 4), 5)
    assert dataclasses.is_dataclass(ROTATION)
    assert ROTATION.chance == pytest.approx(11 / 12)
