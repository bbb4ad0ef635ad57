from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_models import BIASED, DEEP, SMALL, B, N, act, build, context_of, inputs, linears, through
from torch import nn

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
    counts,
)
from fasthyper.nn import HyperLinear


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


def test_all_of_the_papers_and_reviewers_methods_are_told_apart():
    assert set(ALL) <= set(METHODS)
    assert len({METHODS[name].colour for name in EQUAL_TOTAL}) == len(EQUAL_TOTAL)
    for attribute in ("label", "marker"):
        assert len({getattr(METHODS[name], attribute) for name in (*ALL, DEEPONET)}) == len(ALL) + 1
    assert {name for name in METHODS if METHODS[name].embeds} == {EMBEDDING, WIDE_E, EQUAL_FLOPS, TENFOLD}
    assert {name for name in METHODS if METHODS[name].equal} == {*EQUAL_TOTAL[1:], DEEPONET_WIDE}
    assert {name: METHODS[name].flops_of for name in METHODS if METHODS[name].flops_of} == {EQUAL_FLOPS: HYPERNETWORK}
