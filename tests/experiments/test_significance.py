from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fasthyper.experiments.significance import Outcome, all_of, detectable, holm, seeds_needed, t_test

RANDOM = np.random.default_rng(0)
VALUES = [0.3 + RANDOM.standard_normal(n) for n in (2, 3, 10, 100)]


@pytest.mark.parametrize("values", [*VALUES, -VALUES[2]])
def test_the_p_value_is_students(values):
    expected, found = stats.ttest_1samp(values, 0), t_test(list(values))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.yes == (expected.statistic > 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Outcome(None, False)),
        ([1.0], Outcome(None, False)),
        ([0.0, 0.0], Outcome(1.0, False)),
        ([0.5] * 3, Outcome(0.0, True)),
        ([-0.5] * 3, Outcome(0.0, False)),
    ],
)
def test_one_value_has_no_p_and_equal_values_leave_no_doubt(values, expected):
    assert t_test(values) == expected


def rejected(p_values, level):
    """Holm's procedure as he wrote it: compare p-values, smallest first, with level / m, level / (m - 1), …"""
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    found = itertools.takewhile(lambda r: p_values[order[r]] <= level / (len(order) - r), range(len(order)))
    return {order[r] for r in found}


@pytest.mark.parametrize("seed", range(50))
def test_adjusted_p_values_reject_what_holm_rejects(seed):
    random = np.random.default_rng(seed)
    p_values = list(random.choice([0.001, 0.01, 0.5], size=7) * random.random(7))
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        assert {n for n, p in enumerate(adjusted) if p <= level} == rejected(p_values, level)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))


def test_adjusting_nothing_one_and_ties():
    assert (holm([]), holm([0.04]), holm([0.02, 0.02])) == ([], [0.04], [0.04, 0.04])


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 100])
@pytest.mark.parametrize("level", [0.05, 0.05 / 40])
def test_the_detectable_effect_has_a_power_of_80_percent(seeds, level):
    values = RANDOM.standard_normal(seeds)
    noncentrality = detectable(list(values), level) / values.std(ddof=1) * math.sqrt(seeds)
    found = stats.nct.sf(stats.t.isf(level / 2, seeds - 1), seeds - 1, noncentrality)
    assert found == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("effect", [2.0, 1.0, 0.3])
@pytest.mark.parametrize("level", [0.05, 0.05 / 40])
def test_so_many_seeds_are_needed_and_no_fewer(effect, level):
    values = [effect - math.sqrt(0.5), effect + math.sqrt(0.5)]  # mean: the effect, standard deviation: 1
    needed = seeds_needed(values, level)
    powers = [stats.nct.sf(stats.t.isf(level / 2, n - 1), n - 1, effect * math.sqrt(n)) for n in (needed - 1, needed)]
    assert powers[0] < 0.801
    assert powers[1] > 0.799


def test_no_number_of_seeds_shows_no_effect():
    assert seeds_needed([-1.0, 1.0], 0.05) is None
    assert seeds_needed([1.0, 1.0], 0.05) == 2


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([Outcome(0.01, True), Outcome(0.03, True)], Outcome(0.03, True)),
        ([Outcome(0.01, True), Outcome(0.03, False)], Outcome(0.06, False)),
        ([Outcome(0.01, False), Outcome(0.03, False), Outcome(0.9, True)], Outcome(0.03, False)),
        ([Outcome(0.6, False), Outcome(0.01, True)], Outcome(1.0, False)),
        ([Outcome(None, False), Outcome(0.01, True)], Outcome(None, False)),
    ],
)
def test_all_of_several_claims(outcomes, expected):
    found = all_of(outcomes)
    assert found.p == (None if expected.p is None else pytest.approx(expected.p))
    assert found.yes == expected.yes
