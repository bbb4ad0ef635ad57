from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DEEP, SMALL, linears

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.comparison import PRESETS
from fasthyper.experiments.methods import (
    ATTENTION,
    DEEP_Q,
    EQUAL_TOTAL,
    FILM,
    FILM_WIDE,
    HYPERNETWORK,
    METHODS,
    PLAIN,
    PLAIN_WIDE,
    WIDE_E,
    WIDE_Q,
    Architecture,
    counts,
    trained,
)


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
