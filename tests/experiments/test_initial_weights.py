from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy import stats
from small_models import BIASED, SMALL, B, N, linears
from torch import nn

from fasthyper.experiments.methods import DEEPONET, HYPERNETWORK, METHODS, Architecture, counts, trained
from fasthyper.nn import HyperLinear

WIDE = Architecture(cond=80, x=200, out=60, context=(150, 100), hidden=(300,), generated_bias=True)


def generated_by(a, scale=1.0):
    """Return the generated layers of a hypernetwork, and z for conditions of this scale."""
    torch.manual_seed(0)
    model = METHODS[HYPERNETWORK].build(a)
    with torch.no_grad():
        return [m for m in model.modules() if isinstance(m, HyperLinear)], model.trunk(scale * torch.randn(400, a.cond))


def test_torchs_initialisation_draws_what_linear_layers_draw():
    torch.manual_seed(3)
    expected = [p for i, o in pairwise((SMALL.cond, *SMALL.context)) for p in nn.Linear(i, o).parameters()]
    for i, o in ((3, 4), (4, 2)):
        layer = HyperLinear(i, o, 6, bias=False)
        expected += [p.data.uniform_(-1 / math.sqrt(6), 1 / math.sqrt(6)) for p in layer.parameters()]
    torch.manual_seed(3)
    found = list(METHODS[HYPERNETWORK].build(SMALL).parameters())
    for tensor, reference in zip(found, expected, strict=True):
        assert torch.equal(tensor, reference)


@pytest.mark.parametrize("name", [HYPERNETWORK, DEEPONET])
def test_our_initialisation_is_that_of_the_layer(name):
    a = replace(WIDE, initialisation="ours")
    heads = [m for m in METHODS[name].build(a).modules() if isinstance(m, HyperLinear)]
    for head in heads:
        halves = 1 if head.bias is None else 2
        assert head.weight.var().item() * halves * head.in_features * 100 == pytest.approx(1, rel=0.03)
        assert not head.base_weight.any()


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2), ("elu", 1)])
@pytest.mark.parametrize("generated_bias", [True, False])
def test_hyperfan_preserves_variances(activation, gain, generated_bias):
    a = replace(WIDE, out=600, initialisation="hyperfan", activation=activation, generated_bias=generated_bias)
    (first, last), z = generated_by(a)
    for layer, squared in ((first, gain), (last, 1)):
        weights, shifts = layer.materialize(z)
        halves = 2 if generated_bias else 1
        assert weights.var().item() == pytest.approx(squared / (halves * layer.in_features), rel=0.1)
        y = layer(torch.randn(400, layer.in_features), z)
        assert y.var().item() == pytest.approx(squared, rel=0.15)
        assert (shifts is not None) == generated_bias
        assert not layer.base_weight.any()


@pytest.mark.parametrize("name", [HYPERNETWORK, DEEPONET])
def test_magnitude_invariance(name):
    a = replace(WIDE, initialisation="magnitude_invariant", context_activation="relu")
    torch.manual_seed(0)
    model = METHODS[name].build(a)
    heads = [m for m in model.modules() if isinstance(m, HyperLinear)]
    generated = sum(p.numel() for head in heads for p in (head.base_weight, head.base_bias) if p is not None)
    assert heads[0].weight.var().item() == pytest.approx(1 / generated, rel=0.03)
    for number, head in enumerate(heads):
        gain = 2 if number + 1 < len(heads) else 1
        assert head.base_weight.var().item() * head.in_features == pytest.approx(gain, rel=0.05)
        assert head.base_bias is None or not head.base_bias.any()
    trunk = linears(model.trunk)
    assert [layer.in_features for layer in trunk] == [160, 150]
    for layer in trunk:
        assert layer.weight.var().item() * layer.out_features == pytest.approx(2, rel=0.05)
        assert not layer.bias.any()
    cond = torch.randn(7, a.cond)
    encoded = model.trunk[0](cond)
    torch.testing.assert_close(encoded, torch.cat([(cond * math.pi / 2).cos(), (cond * math.pi / 2).sin()], 1))
    torch.testing.assert_close(model.trunk[0](1000 * cond).norm(dim=1), torch.full((7,), math.sqrt(a.cond)))


def test_the_scale_of_weights_over_that_of_the_condition():
    def change(initialisation):
        scales = []
        for scale in (0.1, 10.0):
            heads, z = generated_by(replace(WIDE, initialisation=initialisation), scale)
            scales.append((heads[0].materialize(z)[0] - heads[0].base_weight).std().item())
        return scales[1] / scales[0]

    assert 0.5 < change("magnitude_invariant") < 2
    assert change("torch") > 10


@pytest.mark.parametrize("initialisation", ["ours", "hyperfan", "magnitude_invariant"])
@pytest.mark.parametrize("name", [HYPERNETWORK, DEEPONET])
@pytest.mark.parametrize("a", [SMALL, BIASED, replace(SMALL, context=())])
def test_every_initialisation_trains(initialisation, name, a):
    model = METHODS[name].model(replace(a, initialisation=initialisation))
    x, cond = torch.randn(B, N, a.x), torch.randn(B, a.cond)
    model(x, cond).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert trained(METHODS[name].build, replace(a, initialisation=initialisation)) == counts(model).trainable


@pytest.mark.parametrize("name", [HYPERNETWORK, DEEPONET])
def test_generated_heads_start_as_linear_layers_do(name):
    a = replace(BIASED, x=40, out=30, context=(20, 50), hidden=(40,))
    model = METHODS[name].build(a)
    bound = 1 / math.sqrt(50)
    reference = nn.Linear(50, 5000)
    assert max(p.abs().max().item() for p in reference.parameters()) == pytest.approx(bound, rel=1e-3)
    heads = [m for m in model.modules() if isinstance(m, HyperLinear)]
    for parameter in (p for head in heads for p in head.parameters()):
        values = parameter.detach().flatten()
        assert values.abs().max() <= bound
        assert stats.kstest(values.numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
        if len(values) > 1000:
            assert values.std().item() == pytest.approx(reference.weight.std().item(), rel=0.05)
