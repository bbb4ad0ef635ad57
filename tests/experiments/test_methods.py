from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.comparison import PRESETS
from fasthyper.experiments.methods import (
    ALL,
    ATTENTION,
    BIASES,
    DEEP_Q,
    DEEPONET,
    DEEPONET_WIDE,
    EMBEDDING,
    EQUAL_FLOPS,
    EQUAL_TOTAL,
    FILM,
    FILM_WIDE,
    HYPERNETWORK,
    METHODS,
    PAIR,
    PLAIN,
    PLAIN_WIDE,
    TENFOLD,
    WIDE_E,
    WIDE_Q,
    Architecture,
    counts,
    trained,
)
from fasthyper.nn import HyperLinear

SMALL = Architecture(cond=5, x=3, out=2, context=(7, 6), hidden=(4,), embedding=8)
DEEP = replace(SMALL, hidden=(4, 9), activation="tanh", context_activation="elu")
BIASED = replace(DEEP, generated_bias=True)
B, N = 6, 11


def build(name, architecture):
    return METHODS[name].model(architecture).double()


def inputs(a, *points):
    return torch.randn(B, *points, a.x, dtype=torch.float64), torch.randn(B, a.cond, dtype=torch.float64)


def linears(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def act(name):
    return {"relu": torch.relu, "elu": F.elu, "tanh": torch.tanh}[name]


def context_of(a, model, cond):
    """Compute f or e without the model: the hidden layers in these modules, each with its activation."""
    for layer in linears(model):
        cond = act(a.context_activation)(F.linear(cond, layer.weight, layer.bias))
    return cond


def through(a, layers, x):
    """Apply layers, with an activation between any two."""
    for number, layer in enumerate(layers):
        x = act(a.activation)(layer(x)) if number + 1 < len(layers) else layer(x)
    return x


@pytest.mark.parametrize("a", [SMALL, DEEP])
@pytest.mark.parametrize("name", [name for name in METHODS if name != PAIR])
def test_shapes(name, a):
    model = build(name, a)
    for points in ((), (1,), (N,), (2, 5)):
        x, cond = inputs(a, *points)
        y = model(x, cond)
        assert y.shape == (B, *points, a.out)
        y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name != PAIR])
def test_points_and_instances_do_not_mix(name):
    model = build(name, DEEP)
    x, cond = inputs(DEEP, N)
    y = model(x, cond)
    torch.testing.assert_close(model(x[2:3, 4:5], cond[2:3]), y[2:3, 4:5])
    torch.testing.assert_close(model(x[:, 0], cond), y[:, 0])
    other = cond.clone()
    other[0] += 1
    moved = (model(x, other) - y).abs().amax((1, 2))
    assert moved[0] > 0
    assert moved[1:].max() < 1e-12


@pytest.mark.parametrize("a", [SMALL, DEEP, BIASED])
def test_a_hypernetwork_applies_the_weights_that_f_gives(a):
    model = build(HYPERNETWORK, a)
    heads = [m for m in model.primary.modules() if isinstance(m, HyperLinear)]
    x, cond = inputs(a, N)
    z = context_of(a, model.trunk, cond)

    def layer(head):
        def apply(x):
            weight = torch.einsum("br,oir->boi", z, head.weight) + head.base_weight
            y = torch.einsum("bni,boi->bno", x, weight)
            if head.bias is None:
                assert head.base_bias is None
                return y
            return y + (torch.einsum("br,or->bo", z, head.bias) + head.base_bias)[:, None]

        return apply

    assert all((head.bias is not None) == a.generated_bias for head in heads)
    torch.testing.assert_close(model(x, cond), through(a, [layer(head) for head in heads], x))


@pytest.mark.parametrize("a", [SMALL, DEEP, replace(DEEP, embed_context=(3,)), replace(DEEP, embed_context=())])
@pytest.mark.parametrize("name", [EMBEDDING, EQUAL_FLOPS])
def test_the_embedding_method_concatenates(name, a):
    model = build(name, a)
    x, cond = inputs(a, N)
    *hidden, last = linears(model.embed)
    assert [layer.out_features for layer in hidden] == list(a.context if a.embed_context is None else a.embed_context)
    e = last(context_of(a, nn.ModuleList(hidden), cond))
    assert e.shape == (B, a.embedding)
    joined = torch.cat([x, e[:, None].expand(-1, N, -1)], dim=2)
    torch.testing.assert_close(model(x, cond), through(a, linears(model.primary), joined))


@pytest.mark.parametrize("a", [SMALL, DEEP])
@pytest.mark.parametrize("name", [FILM, FILM_WIDE])
def test_film_scales_and_shifts_hidden_units(name, a):
    model = build(name, a)
    x, cond = inputs(a, N)
    *hidden, last = linears(model.context)
    numbers = last(context_of(a, nn.ModuleList(hidden), cond))
    units = sum(layer.out_features for layer in list(model.primary)[:-1])
    assert (units == sum(a.hidden)) == (name == FILM)
    assert numbers.shape == (B, 2 * units)
    layers, at, h = list(model.primary), 0, x
    for layer in layers[:-1]:
        size = layer.out_features
        gamma = 1 + numbers[:, None, at : at + size]
        beta = numbers[:, None, units + at : units + at + size]
        h = act(a.activation)(gamma * layer(h) + beta)
        at += size
    torch.testing.assert_close(model(x, cond), layers[-1](h))


@pytest.mark.parametrize("a", [SMALL, DEEP])
def test_biases_alone_are_generated(a):
    model = build(BIASES, a)
    x, cond = inputs(a, N)
    *hidden, last = linears(model.context)
    numbers = last(context_of(a, nn.ModuleList(hidden), cond))
    shifts = numbers.split([*a.hidden, a.out], dim=1)
    assert all(layer.bias is None for layer in model.primary)
    layers = [
        lambda h, layer=layer, shift=shift: h @ layer.weight.T + shift[:, None]
        for layer, shift in zip(model.primary, shifts, strict=True)
    ]
    torch.testing.assert_close(model(x, cond), through(a, layers, x))


@pytest.mark.parametrize("a", [SMALL, DEEP])
def test_a_deeponet_is_an_inner_product(a):
    model = build(DEEPONET, a)
    x, cond = inputs(a, N)
    shared = [m for m in linears(model.primary) if not isinstance(m, HyperLinear)]
    (head,) = [m for m in model.primary.modules() if isinstance(m, HyperLinear)]
    t = act(a.activation)(through(a, shared, x))
    b = torch.einsum("br,opr->bop", context_of(a, model.trunk, cond), head.weight) + head.base_weight
    assert t.shape[-1] == a.hidden[-1]
    torch.testing.assert_close(model(x, cond), torch.einsum("bnp,bop->bno", t, b))


@pytest.mark.parametrize(("units", "width"), [(13, 12), (3, 3)])
def test_attention_asks_sixteen_vectors(units, width):
    a = replace(DEEP, context=(9, units))
    model = METHODS[ATTENTION].build(a).double()
    x, cond = inputs(a, N)
    heads = 4 if width > 3 else 1
    vectors = through(replace(a, activation=a.context_activation), linears(model.context), cond).view(B, 16, width)
    asking = x @ model.ask.weight.T + model.ask.bias
    found = []
    for part in torch.arange(width).chunk(heads):
        scores = torch.einsum("bnd,bpd->bnp", asking[..., part], vectors[..., part]) / math.sqrt(width / heads)
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        found.append(torch.einsum("bnp,bpd->bnd", shares, vectors[..., part]))
    answer = torch.cat(found, -1) @ model.answer.weight.T + model.answer.bias
    expected = through(a, linears(model.primary), torch.cat([x, answer], 2))
    torch.testing.assert_close(model(x, cond), expected)


@pytest.mark.parametrize("name", [WIDE_Q, DEEP_Q])
def test_a_wide_q_reads_a_short_embedding(name):
    a = replace(DEEP, context=(9, 13))
    model = build(name, a)
    x, cond = inputs(a, N)
    hidden, last = linears(model.embed)[:-1], linears(model.embed)[-1]
    e = last(context_of(a, nn.ModuleList(hidden), cond))
    assert e.shape == (B, hidden[-1].out_features)
    joined = torch.cat([x, e[:, None].expand(-1, N, -1)], dim=2)
    assert len(linears(model.primary)) == len(a.hidden) + 1 + 2 * (name == DEEP_Q)
    torch.testing.assert_close(model(x, cond), through(a, linears(model.primary), joined))


@pytest.mark.parametrize("name", [PLAIN, PLAIN_WIDE])
def test_one_network_sees_both(name):
    model = build(name, DEEP)
    assert len(linears(model)) == len(DEEP.hidden) + 1 + len(DEEP.context) * (name == PLAIN_WIDE)
    x, cond = inputs(DEEP, N)
    joined = torch.cat([x, cond[:, None].expand(-1, N, -1)], dim=2)
    torch.testing.assert_close(model(x, cond), through(DEEP, linears(model), joined))


def test_one_network_may_have_no_condition():
    alone = replace(SMALL, cond=0)
    model = METHODS[PLAIN].build(alone)
    assert model(torch.randn(B, N, 3), torch.zeros(B, 0)).shape == (B, N, 2)


def test_a_pair_is_two_networks_of_x_alone():
    model = build(PAIR, SMALL)
    x, cond = inputs(SMALL)
    y = model(x, cond)
    assert y.shape == (B, 2, SMALL.out)
    for number, network in enumerate(model.primary):
        torch.testing.assert_close(y[:, number], through(SMALL, linears(network), x))
    assert not torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(model(x, cond + 1), y)


def layers_of(*sizes, bias=True):
    return sum(i * o + o * bias for i, o in pairwise(sizes))


@pytest.mark.parametrize("a", [SMALL, BIASED])
def test_counts(a):
    sizes, context = (a.x, *a.hidden, a.out), layers_of(a.cond, *a.context)
    r = a.context[-1]
    generated = layers_of(*sizes, bias=a.generated_bias)
    units = sum(sizes[1:])
    expected = {
        HYPERNETWORK: (context + (r + 1) * generated, generated, context + (r + 1) * generated),
        EMBEDDING: (context + layers_of(r, a.embedding), layers_of(a.x + a.embedding, *sizes[1:])),
        FILM: (context + layers_of(r, 2 * sum(a.hidden)), layers_of(*sizes)),
        BIASES: (context + layers_of(r, units), layers_of(*sizes, bias=False)),
        PLAIN: (0, layers_of(a.x + a.cond, *sizes[1:])),
        PAIR: (0, 2 * layers_of(*sizes)),
    }
    for name, numbers in expected.items():
        context_, primary, trained = (*numbers, sum(numbers))[:3]
        assert counts(METHODS[name].build(a)) == (context_, primary, trained), name
    deeponet = counts(METHODS[DEEPONET].build(a))
    last = a.hidden[-1] * a.out
    assert deeponet.primary == last + layers_of(a.x, *a.hidden)
    assert deeponet.trainable == context + (r + 1) * last + layers_of(a.x, *a.hidden)


def test_what_is_frozen_is_not_trained():
    model = METHODS[EMBEDDING].build(SMALL)
    whole = counts(model)
    model.embed.requires_grad_(False)
    assert counts(model) == (0, whole.primary, whole.primary)


@cache
def architectures():
    """Return the sizes of all experiments that have a condition and several methods."""
    found = {}
    for experiment in EXPERIMENTS.values():
        for data in experiment.data:
            for preset in PRESETS:
                if not experiment.studies(preset, data):
                    continue
                comparison = Comparison.of(experiment, data, preset=preset, seeds=1, device="cpu")
                runs = comparison.runs()
                found |= {experiment.architecture(run): None for run in runs if run.method in EQUAL_TOTAL[1:]}
    return [a for a in found if a.cond]


@pytest.mark.parametrize("name", EQUAL_TOTAL[1:])
@settings(max_examples=8, deadline=None)
@given(data=st.data(), size=st.floats(0.1, 8))
def test_equal_totals_are_equal(name, data, size):
    a = replace(data.draw(st.sampled_from(architectures())), size=size)
    method = METHODS[name]
    target = trained(METHODS[HYPERNETWORK].build, METHODS[HYPERNETWORK].sizes(a))
    assert trained(method.build, method.sizes(a)) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("size", [0.6, 1.0, 2.7])
@pytest.mark.parametrize("name", [HYPERNETWORK, WIDE_E, WIDE_Q, FILM_WIDE, PLAIN_WIDE])
def test_no_other_width_is_nearer(name, size):
    a = Architecture(cond=12, x=10, out=2, context=(9, 9), hidden=(6,), embedding=7, size=size)
    method, whole = METHODS[name], replace(a, size=1.0)
    target = size * trained(METHODS[HYPERNETWORK].build, whole)
    if method.equal:
        target = trained(METHODS[HYPERNETWORK].build, METHODS[HYPERNETWORK].sizes(a))
    off = abs(trained(method.build, method.sizes(a)) - target)
    others = [abs(trained(method.build, method.fitted.set(whole, step)) - target) for step in range(1, 80)]
    assert off <= max(min(others), 0.01 * target)


def test_the_hypernetwork_reaches_its_size():
    a = Architecture(cond=64, x=64, out=12, context=(50, 50, 50), hidden=(10,), size=1.0)
    whole = trained(METHODS[HYPERNETWORK].build, a)
    for size in (0.25, 0.5, 2.0, 4.0):
        sizes = METHODS[HYPERNETWORK].sizes(replace(a, size=size))
        assert trained(METHODS[HYPERNETWORK].build, sizes) == pytest.approx(size * whole, rel=0.05)
        assert (sizes.hidden, len(sizes.context)) == (a.hidden, 3)
    assert METHODS[HYPERNETWORK].sizes(a) == a


def test_widths_keep_their_proportion():
    a = replace(DEEP, context=(20, 40), hidden=(10, 5))
    for name, field, other in ((HYPERNETWORK, "context", "hidden"), (DEEP_Q, "hidden", "context")):
        sizes = METHODS[name].sizes(replace(a, size=8.0))
        first, *_, last = getattr(sizes, field)
        assert last / first == pytest.approx(getattr(a, field)[-1] / getattr(a, field)[0], rel=0.1)
        assert first > getattr(a, field)[0]
        assert getattr(sizes, other) == getattr(a, other)
    for method in (METHODS[HYPERNETWORK], METHODS[DEEP_Q]):
        for widths in (method.fitted, method.reduced):
            if widths is not None:
                assert getattr(widths.set(a, widths.steps(a)), widths.field) == widths.of(a)


def test_where_the_parameters_go():
    a = Architecture(cond=64, x=64, out=12, context=(50, 50), hidden=(10,), embedding=650)
    q, deep, film, plain = (METHODS[name].sizes(a) for name in (WIDE_Q, DEEP_Q, FILM_WIDE, PLAIN_WIDE))
    assert q.embed_hidden == deep.embed_hidden == film.context == a.context
    assert len(q.hidden) == len(film.hidden) == 1
    assert len(deep.hidden) == len(plain.hidden) == 3
    assert min(map(min, (q.hidden, deep.hidden, film.hidden, plain.hidden))) > 40
    e = METHODS[WIDE_E].sizes(a)
    assert (e.hidden, e.embedding) == (a.hidden, a.embedding)
    assert linears(METHODS[WIDE_Q].model(a).embed)[-1].out_features == 50


@pytest.mark.parametrize("name", [WIDE_Q, DEEP_Q, FILM_WIDE, ATTENTION])
def test_a_narrower_context_network_where_it_would_take_more_than_half(name):
    a = Architecture(cond=64, x=64, out=12, context=(50, 50, 50, 50), hidden=(10,), embedding=650, size=0.2)
    model = METHODS[name].model(a)
    context, _, total = counts(model)
    sizes = METHODS[name].sizes(a)
    assert max(sizes.context if name in (FILM_WIDE, ATTENTION) else sizes.embed_hidden) < 50
    assert 0.2 < context / total < 0.75  # FiLM's scales and shifts grow with q


def test_a_smaller_e_where_q_would_take_more_than_half():
    a = Architecture(cond=64, x=64, out=12, context=(50,), hidden=(10,), embedding=650, size=0.2)
    sizes = METHODS[WIDE_E].sizes(a)
    assert 100 < sizes.embedding < 650
    assert counts(METHODS[WIDE_E].model(a)).primary < 0.5 * trained(METHODS[WIDE_E].build, sizes)


@pytest.mark.parametrize("name", [HYPERNETWORK, WIDE_E, FILM])
def test_without_a_hidden_layer_there_is_no_width_to_fit(name):
    with pytest.raises(ValueError, match=r"context: .* needs a hidden layer"):
        METHODS[name].model(replace(SMALL, context=(), size=2.0))


@pytest.mark.parametrize("name", [HYPERNETWORK, FILM, PLAIN])
def test_a_total_below_the_smallest(name):
    with pytest.raises(ValueError, match=r"size: .* trains at least \d+ parameters, more than \d"):
        METHODS[name].model(replace(SMALL, size=0.05))


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


def test_all_of_the_papers_and_reviewers_methods_are_told_apart():
    assert set(ALL) <= set(METHODS)
    assert len({METHODS[name].colour for name in EQUAL_TOTAL}) == len(EQUAL_TOTAL)
    for attribute in ("label", "marker"):
        assert len({getattr(METHODS[name], attribute) for name in (*ALL, DEEPONET)}) == len(ALL) + 1
    assert {name for name in METHODS if METHODS[name].embeds} == {EMBEDDING, WIDE_E, EQUAL_FLOPS, TENFOLD}
    assert {name for name in METHODS if METHODS[name].equal} == {*EQUAL_TOTAL[1:], DEEPONET_WIDE}
    assert {name: METHODS[name].flops_of for name in METHODS if METHODS[name].flops_of} == {EQUAL_FLOPS: HYPERNETWORK}
