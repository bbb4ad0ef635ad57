"""Variances after initialisation, at realistic widths: second moments over many weights and instances."""

import math

import pytest
import torch

from fasthyper.nn import HyperLinear, bias_hyper_, hyperfan_in_, hyperfan_out_

WIDTHS = [(64, 256, 128), (784, 100, 128), (128, 128, 64)]  # I, O, R
B = 512


def features(kind, R):
    """Return z and its second moment."""
    z = torch.randn(B, R)
    if kind == "normal":
        return z, 1.0
    if kind == "wide":
        return 3 * z, 9.0
    return z.relu(), 0.5  # its mean is not zero, and its variance is not 0.5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def outputs(layer, z, second_moment=1.0):
    with torch.no_grad():
        return layer(math.sqrt(second_moment) * torch.randn(B, layer.in_features), z)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "wide", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(("nonlinearity", "gain_sq"), [("linear", 1), ("relu", 2)])
def test_hyperfan_in_keeps_the_activations(widths, kind, bias, base, nonlinearity, gain_sq):
    I, O, R = widths
    z, moment = features(kind, R)
    layer = HyperLinear(I, O, R, bias=bias, base=base)
    layer.reset_parameters("hyperfan_in", z_second_moment=moment, nonlinearity=nonlinearity)
    y = outputs(layer, z)
    assert y.square().mean().item() == pytest.approx(gain_sq, rel=0.08)
    if nonlinearity == "relu":
        assert y.relu().square().mean().item() == pytest.approx(1, rel=0.1)


def test_hyperfan_in_leaves_half_to_the_bias():
    z, _ = features("normal", 128)
    layer = HyperLinear(64, 256, 128)
    at_zero = layer(torch.zeros(B, 64), z)
    assert at_zero.square().mean().item() == pytest.approx(0.5, rel=0.08)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "wide", "relu"])
@pytest.mark.parametrize(("nonlinearity", "gain_sq"), [("linear", 1), ("relu", 2)])
def test_hyperfan_out_keeps_the_gradients(widths, kind, nonlinearity, gain_sq):
    I, O, R = widths
    z, moment = features(kind, R)
    layer = HyperLinear(I, O, R)
    layer.reset_parameters("hyperfan_out", z_second_moment=moment, nonlinearity=nonlinearity)
    x = torch.randn(B, I, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x, z), x, torch.randn(B, O))
    assert dx.square().mean().item() == pytest.approx(gain_sq, rel=0.08)
    # With O > I the bias preserves the variance of activations, too; otherwise it is zero.
    expected = gain_sq * max(1, I / O)
    assert outputs(layer, z).square().mean().item() == pytest.approx(expected, rel=0.08)
    assert bool(layer.bias.any()) == (O > I)


@pytest.mark.parametrize(("nonlinearity", "gain_sq"), [("linear", 1), ("relu", 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_hyper_starts_every_instance_alike(nonlinearity, gain_sq, bias):
    I, O, R = 784, 100, 128
    layer = HyperLinear(I, O, R, bias=bias, init="bias_hyper")
    layer.reset_parameters(nonlinearity=nonlinearity)
    W, b = layer.materialize(torch.randn(B, R))
    assert torch.equal(W, layer.base_weight.expand(B, -1, -1))
    assert b is None or not b.any()
    y = outputs(layer, torch.randn(B, R))
    assert y.square().mean().item() == pytest.approx(gain_sq, rel=0.08)


def test_bias_hyper_needs_a_base():
    with pytest.raises(ValueError, match=r"base=True"):
        HyperLinear(3, 4, 5, base=False, init="bias_hyper")


def test_the_formulas():
    I, O, R = 20, 60, 50
    weight, bias, base_weight, base_bias = (torch.full(shape, math.nan) for shape in [(O, I, R), (O, R), (O, I), (O,)])

    def variances():
        return weight.var().item(), bias.var().item()

    hyperfan_in_(weight, bias, base_weight, base_bias, z_second_moment=0.5, nonlinearity="tanh")
    assert variances() == pytest.approx((25 / 9 / (2 * I * R * 0.5), 25 / 9 / (2 * R * 0.5)), rel=0.05)
    assert not base_weight.any()
    assert not base_bias.any()
    assert weight.abs().max() <= math.sqrt(3 * 25 / 9 / (2 * I * R * 0.5))  # uniform
    hyperfan_in_(weight, z_second_moment=0.5)
    assert weight.var().item() == pytest.approx(1 / (I * R * 0.5), rel=0.05)
    hyperfan_out_(weight, bias, z_second_moment=2.0, nonlinearity="relu")
    assert variances() == pytest.approx((2 / (O * R * 2), 2 * (1 - I / O) / (R * 2)), rel=0.05)
    bias_hyper_(weight, bias, base_weight, base_bias, nonlinearity="relu")
    assert not any(t.any() for t in (weight, bias, base_bias))
    assert base_weight.var().item() == pytest.approx(2 / I, rel=0.1)


@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out", "bias_hyper"])
@pytest.mark.parametrize("moment", [0.0, -1.0, math.inf, math.nan])
def test_second_moment_is_checked(init, moment):
    with pytest.raises(ValueError, match="z_second_moment must be positive and finite"):
        HyperLinear(3, 4, 5).reset_parameters(init, z_second_moment=moment)


@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out", "bias_hyper"])
def test_unknown_nonlinearity(init):
    with pytest.raises(ValueError, match="swoosh"):
        HyperLinear(3, 4, 5).reset_parameters(init, nonlinearity="swoosh")


@pytest.mark.parametrize("weight_map", ["abs", "relu", "tanh", "normalize"])
@pytest.mark.parametrize("bias", [False, True])
def test_maps_keep_the_second_moment_of_one_layer(weight_map, bias):
    z, moment = features("normal", 128)
    layer = HyperLinear(64, 256, 128, bias=bias, weight_map=weight_map)
    layer.reset_parameters("hyperfan_in", z_second_moment=moment)
    assert outputs(layer, z).square().mean().item() == pytest.approx(1, rel=0.12)


@pytest.mark.parametrize("weight_map", [None, "tanh", "normalize"])
def test_ten_layers_are_within_a_factor_of_two_of_an_ordinary_network(weight_map):
    width, R = 64, 64
    layers = [HyperLinear(width, width, R, bias=False, weight_map=weight_map) for _ in range(10)]
    ordinary = [torch.randn(width, width) / math.sqrt(width) for _ in range(10)]
    x, g = torch.randn(B, width, requires_grad=True), torch.randn(B, width)
    # All layers share z: were its norm not that of E[z²] = 1 in each instance, its tenth power would be in the mean.
    z = math.sqrt(R) * torch.nn.functional.normalize(torch.randn(B, R))

    def moments(apply, layers):
        y = x
        for layer in layers:
            y = apply(layer, y)
        (dx,) = torch.autograd.grad(y, x, g)
        return y.square().mean().item(), dx.square().mean().item()

    usual = moments(lambda weight, y: y @ weight, ordinary)
    for got, expected in zip(moments(lambda layer, y: layer(y, z), layers), usual, strict=True):
        assert 0.5 < got / expected < 2
