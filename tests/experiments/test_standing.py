from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up import LOG, NOISE, PERCENT, SIZE, SIZES, errors, frontier, results_of
from scipy import stats

from fasthyper.experiments.methods import DEEP_Q, EMBEDDING, EQUAL_TOTAL, FILM_WIDE, HYPERNETWORK, WIDE_E, WIDE_Q
from fasthyper.experiments.standing import Standing, at_equal_totals, frontiers

TRIALS = 400
MOST = stats.binom.ppf(0.999, TRIALS, 0.05)
"""The number of wrong trials that is exceeded with a chance of 0.1 % where 5 % are wrong."""


def standing_of(errors, measure=LOG, **options):
    """Return the standing at one size: errors of each method, one for each seed."""
    columns = {method: np.asarray(numbers, dtype=float)[:, None] for method, numbers in errors.items()}
    return Standing(results_of(columns, (1.0,), axis=SIZE, structure="a product", measure=measure, **options), 1.0)


def signs_of(standing):
    return {method: standing.sign(method) for method in standing.rows if method != HYPERNETWORK}


def drawn(random, means, seeds=5, spread=0.2):
    """Return errors around means, log-normal, half of whose variance is of the seed."""
    shared = random.standard_normal(seeds)
    return {m: mean * np.exp(spread * (shared + random.standard_normal(seeds))) for m, mean in means.items()}


def test_the_standing_at_equal_totals():
    (results,) = frontiers(frontier(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1, WIDE_E: 0.101, FILM_WIDE: 0.4}))
    standing = at_equal_totals(results)
    assert standing.value == 1
    assert list(standing.rows) == [WIDE_Q, WIDE_E, HYPERNETWORK, FILM_WIDE]
    assert standing.best == (WIDE_Q, WIDE_E)
    assert standing.other == WIDE_Q
    assert signs_of(standing) == {WIDE_Q: -1, WIDE_E: -1, FILM_WIDE: 1}
    ratio = standing.ratio(HYPERNETWORK, WIDE_Q)
    assert ratio.mean == pytest.approx(2, rel=0.01)
    assert 1.7 < ratio.low < ratio.mean < ratio.high < 2.4


def test_ratios_are_those_of_the_means_that_are_shown():
    """Geometric means if the study compares by ratios; the intervals agree where the spread is small."""
    means = {HYPERNETWORK: 0.2, WIDE_Q: 0.1}
    a, b = (
        at_equal_totals(next(frontiers(summary))).ratio(HYPERNETWORK, WIDE_Q)
        for summary in (frontier(**means), frontier(replace(LOG, log=False), **means))
    )
    assert (a.mean, a.low, a.high) == pytest.approx((b.mean, b.low, b.high), rel=1e-4)
    errors = {HYPERNETWORK: [0.1, 0.1, 0.4], WIDE_Q: [0.1, 0.2, 0.1]}
    for measure, mean in ((LOG, stats.gmean), (PERCENT, np.mean)):
        standing = standing_of(errors, measure)
        expected = mean(errors[HYPERNETWORK]) / mean(errors[WIDE_Q])
        assert standing.ratio(HYPERNETWORK, WIDE_Q).mean == pytest.approx(expected)
        assert (next(iter(standing.rows)) == WIDE_Q) == (expected > 1)


@pytest.mark.parametrize("measure", [LOG, PERCENT], ids=["ratios", "percent"])
def test_to_diverge_is_no_way_out_of_being_clearly_worse(measure):
    hypernetwork, wide_q = 0.13 + 0.002 * np.arange(5), 0.1 + 0.002 * np.arange(5)[::-1]
    broken = np.where(np.arange(5) == 2, np.nan, hypernetwork)
    levels = {"levels": (("zero", "nothing"),), "extra": {"zero": 0.9}}
    for numbers in (hypernetwork, broken):
        standing = standing_of({HYPERNETWORK: numbers, WIDE_Q: wide_q}, measure, **levels)
        assert (standing.best, signs_of(standing)) == ((WIDE_Q,), {WIDE_Q: -1})
    assert standing.ratio(HYPERNETWORK, WIDE_Q).low < 1  # the error that stands for the diverged run widens it
    other_way = standing_of(
        {HYPERNETWORK: wide_q, WIDE_Q: np.where(np.isnan(broken), np.nan, wide_q)}, measure, **levels
    )
    assert signs_of(other_way) == {WIDE_Q: 0}


def test_methods_of_other_totals_and_diverged_ones_do_not_compete():
    found = errors(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1, EMBEDDING: 0.01})
    found[WIDE_Q] *= np.nan
    results = results_of(found, SIZES, axis=SIZE, structure="a product", measure=LOG)
    assert at_equal_totals(results).best == (HYPERNETWORK,)


@pytest.mark.parametrize(("measure", "clear"), [(LOG, True), (PERCENT, False)], ids=["ratios", "percent"])
def test_what_is_best_and_its_ratio_agree(measure, clear):
    """One seed with a large error makes differences uncertain, and the ratio of means, but not that of logarithms."""
    numbers = np.array([[0.1], [0.11], [0.12], [0.11], [0.9]])
    results = results_of(
        {HYPERNETWORK: numbers * [[2.0], [2.1], [1.9], [2.0], [2.1]], WIDE_Q: numbers},
        (1.0,),
        axis=SIZE,
        structure="a product",
        measure=measure,
    )
    standing = at_equal_totals(results)
    assert standing.ratio(HYPERNETWORK, WIDE_Q).mean == pytest.approx(2.05, rel=0.03)
    assert (standing.ratio(HYPERNETWORK, WIDE_Q).low > 1) == clear
    assert (results.advantage(WIDE_Q, HYPERNETWORK, 1.0).low > 0) == clear
    assert (standing.best, signs_of(standing)) == (
        ((WIDE_Q,), {WIDE_Q: -1}) if clear else ((WIDE_Q, HYPERNETWORK), {WIDE_Q: 0})
    )


def test_an_error_of_zero_has_no_ratio_but_is_less():
    found = {HYPERNETWORK: 0.2 + 0.1 * NOISE, WIDE_Q: 0 * NOISE}
    standing = at_equal_totals(results_of(found, (1.0,), axis=SIZE, structure="a product"))
    assert math.isnan(standing.ratio(HYPERNETWORK, WIDE_Q).mean)
    assert (standing.best, signs_of(standing)) == ((WIDE_Q,), {WIDE_Q: -1})


@pytest.mark.parametrize("measure", [LOG, PERCENT], ids=["ratios", "percent"])
def test_the_method_of_least_error_is_seldom_left_out(measure):
    """All methods are equally good, so that each of them is the best one: the hardest case."""
    random = np.random.default_rng(0)
    standings = [standing_of(drawn(random, dict.fromkeys(EQUAL_TOTAL, 0.1)), measure) for _ in range(TRIALS)]
    assert sum(HYPERNETWORK not in standing.best for standing in standings) <= MOST
    assert sum(any(signs_of(standing).values()) for standing in standings) <= MOST


def test_without_the_correction_it_would_be_wrong_too_often():
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(TRIALS):
        standing = standing_of(drawn(random, dict.fromkeys(EQUAL_TOTAL, 0.1)))
        others = [other for other in EQUAL_TOTAL if other != HYPERNETWORK]
        ratios = [standing.results.ratio(HYPERNETWORK, other, 1.0) for other in others]
        wrong += any(ratio.low > 1 or ratio.high < 1 for ratio in ratios)
    assert wrong > 2 * MOST


def test_large_differences_are_found():
    random = np.random.default_rng(0)
    means = {HYPERNETWORK: 0.1, WIDE_E: 0.3, WIDE_Q: 0.3, DEEP_Q: 0.3, FILM_WIDE: 0.3}
    standings = [standing_of(drawn(random, means, spread=0.1)) for _ in range(40)]
    assert sum(standing.best == (HYPERNETWORK,) for standing in standings) > 35
    assert sum(set(signs_of(standing).values()) == {1} for standing in standings) > 35


def test_what_is_clear_takes_the_number_of_methods_into_account():
    """The same two methods, alone and among six others that have the error of the worse one."""
    better = np.array([0.10, 0.11, 0.09, 0.10, 0.105])
    worse = better * [1.02, 1.30, 1.20, 1.10, 1.25]
    few = standing_of({HYPERNETWORK: better, WIDE_Q: worse})
    others = [method for method in EQUAL_TOTAL if method not in (HYPERNETWORK, WIDE_Q)]
    many = standing_of({HYPERNETWORK: better, WIDE_Q: worse, **dict.fromkeys(others, worse)})
    a, b = (standing.ratio(WIDE_Q, HYPERNETWORK) for standing in (few, many))
    assert a.mean == b.mean
    assert b.low < 1 < a.low
    logs = np.log(worse / better)
    half = stats.t.ppf(1 - 0.025 / (len(EQUAL_TOTAL) - 1), 4) * stats.sem(logs)
    assert (b.low, b.high) == pytest.approx(tuple(np.exp([logs.mean() - half, logs.mean() + half])))
    assert (few.best, signs_of(few)) == ((HYPERNETWORK,), {WIDE_Q: 1})
    assert WIDE_Q in many.best
    assert set(signs_of(many).values()) == {0}


def test_one_seed_makes_nothing_clear():
    standing = standing_of({HYPERNETWORK: [0.1], WIDE_Q: [0.9]})
    assert (standing.best, signs_of(standing)) == ((HYPERNETWORK, WIDE_Q), {WIDE_Q: 0})


def test_a_method_with_missing_runs_is_not_clearly_better():
    numbers = np.array([0.1, 0.11, 0.12, 0.11])
    missing = np.where([False, True, False, False], np.nan, numbers / 5)
    standing = standing_of({HYPERNETWORK: numbers, WIDE_Q: missing})
    assert (standing.best, signs_of(standing)) == ((WIDE_Q, HYPERNETWORK), {WIDE_Q: 0})
    against = standing_of({HYPERNETWORK: numbers, WIDE_Q: missing * 25})
    assert (against.best, signs_of(against)) == ((HYPERNETWORK,), {WIDE_Q: 1})
