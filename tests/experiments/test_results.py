from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up import JITTER, LOG, PERCENT, comparison_of, pair, records_of, results_of, study_of
from scipy import stats

from fasthyper.experiments.experiment import Axis
from fasthyper.experiments.results import Interval
from fasthyper.experiments.summary import summarise

RANDOM = np.random.default_rng(0)
HYPER = 0.2 - 0.02 * np.arange(3) + 0.01 * RANDOM.standard_normal((4, 3))
EMBED = 0.5 + 0.05 * RANDOM.standard_normal((4, 3))
DEPTHS = (2, 3, 5)


def interval(values):
    """Return mean and 95 % interval, by scipy."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return np.mean(values), low, high


def same(found, values):
    np.testing.assert_allclose((found.mean, found.low, found.high), interval(values), rtol=1e-9)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.1, 0.4], list(RANDOM.standard_normal(100))])
def test_an_interval_is_students(values):
    same(Interval.of(values), values)


def test_equal_values_leave_no_doubt():
    assert Interval.of([0.5] * 3) == Interval(0.5, 0.5, 0.5)


def test_one_value_has_no_interval():
    assert Interval.of([0.3]) == Interval(0.3, -math.inf, math.inf)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_nothing_known(value):
    found = Interval.of([0.1, value, 0.3])
    assert math.isnan(found.mean)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_intervals_are_mapped_and_turned():
    assert Interval(1.0, 0.0, 3.0).map(lambda v: 2 * v) == Interval(2.0, 0.0, 6.0)
    assert -Interval(1.0, 0.0, 3.0) == Interval(-1.0, -3.0, 0.0)


def test_costs_are_medians_over_the_seeds_that_measure_them():
    results = results_of(pair(HYPER, EMBED), DEPTHS)
    for found in results.metrics.values():
        for metrics in found[1:]:
            metrics["peak_temporary_bytes"] = metrics["fused_seconds"] = None
    row = results.rows()[0]
    assert (row.peak_temporary_bytes, row.fused_seconds) == (2048, pytest.approx(0.001))


def test_rows_are_means_over_seeds_and_medians_of_cost():
    rows = results_of(pair(HYPER, EMBED), DEPTHS).rows()
    assert [(row.line.method, row.value) for row in rows] == [
        (m, d) for m in ("hypernetwork", "embedding") for d in DEPTHS
    ]
    for row, values in zip(rows, [*HYPER.T, *EMBED.T], strict=True):
        same(row.measured, values)
    row = rows[1]
    assert (row.seeds, row.context_parameters, row.primary_parameters, row.trainable_parameters) == (4, 2000, 100, 2000)
    assert (row.step_seconds, row.peak_temporary_bytes, row.steps) == (pytest.approx(0.0025), 2049.5, 13.5)
    assert (row.fused_seconds, row.materialised_bytes) == (pytest.approx(0.0025), 8192)
    assert (rows[4].fused_seconds, rows[4].materialised_seconds, rows[4].materialised_bytes) == (None, None, None)


def test_a_log_measure_has_geometric_means():
    rows = results_of(pair(HYPER, EMBED), DEPTHS, measure=LOG).rows()
    for row, values in zip(rows, [*HYPER.T, *EMBED.T], strict=True):
        assert row.measured.mean == pytest.approx(stats.gmean(values))
        np.testing.assert_allclose((row.measured.low, row.measured.high), np.exp(interval(np.log(values))[1:]))


def test_differences_are_paired():
    results = results_of(pair(HYPER, EMBED), DEPTHS)
    for column, depth in enumerate(DEPTHS):
        found = results.advantage("hypernetwork", "embedding", depth)
        test = stats.ttest_rel(EMBED[:, column], HYPER[:, column])
        np.testing.assert_allclose((found.low, found.high), test.confidence_interval(0.95))
        assert found.mean == pytest.approx((EMBED - HYPER)[:, column].mean())
        back = results.advantage("embedding", "hypernetwork", depth)
        np.testing.assert_allclose((back.mean, back.low, back.high), (-found.mean, -found.high, -found.low))


def test_the_interval_of_a_ratio_has_what_a_t_test_does_not_refute():
    """The definition of Fieller's interval, tried at many numbers; where the set has a gap, the interval has it too."""
    random = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        seeds, family = int(random.integers(2, 8)), int(random.integers(1, 8))
        a, b = (random.random(seeds) * 10 ** random.uniform(-2, 1) + random.integers(2) for _ in range(2))
        results = results_of(pair(a[:, None], b[:, None]), (2,))
        found = results.ratio("hypernetwork", "embedding", 2, family)
        assert found.mean == pytest.approx(a.mean() / b.mean())
        kinds.add((found.low > 0, math.isfinite(found.high)))
        tried = 10 ** random.uniform(-3, 3, 50)
        kept = stats.ttest_1samp(a[:, None] - np.outer(b, tried), 0).pvalue > 0.05 / family
        inside = (found.low <= tried) & (tried <= found.high)
        assert (inside | ~kept).all()
        if found.low > 0 or math.isfinite(found.high):
            assert (inside == kept).all()
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    alone = results_of(pair(a[:1, None], b[:1, None]), (2,)).ratio("hypernetwork", "embedding", 2)
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def test_the_advantage_of_a_log_measure_is_a_ratio():
    results = results_of(pair(HYPER, EMBED), DEPTHS, measure=LOG)
    same(results.advantage("hypernetwork", "embedding", 5), np.log(EMBED[:, 2] / HYPER[:, 2]))


def test_a_line_may_be_another_measure():
    errors = {**pair(HYPER, EMBED), "hypernetwork:apart": HYPER / 10}
    results = results_of(errors, DEPTHS)
    same(results.advantage("hypernetwork:apart", "embedding", 2), EMBED[:, 0] - HYPER[:, 0] / 10)
    same(results.trend("hypernetwork:apart"), [stats.linregress(DEPTHS, row).slope / 10 for row in HYPER])
    assert results.has("hypernetwork:apart", "embedding")
    assert not results.has("hypernetwork", "film")


def test_a_trend_is_least_squares_per_unit_by_seed():
    found = results_of(pair(HYPER, EMBED), DEPTHS).trend("hypernetwork")
    same(found, [stats.linregress(DEPTHS, row).slope for row in HYPER])


def test_a_trend_over_ratios_is_per_doubling():
    values = (2, 4, 16)
    found = results_of(pair(HYPER, EMBED), values, axis=Axis("embedding", "E", log=True)).trend("embedding")
    same(found, [stats.linregress([1, 2, 4], row).slope for row in EMBED])


def test_a_trend_of_a_log_measure_is_one_of_logarithms():
    found = results_of(pair(HYPER, EMBED), DEPTHS, measure=LOG).trend("embedding")
    same(found, [stats.linregress(DEPTHS, np.log(row)).slope for row in EMBED])


WIDTHS = Axis("width", "width", count="primary_parameters")


def count(run):
    """Return a number of parameters that differs from seed to seed, as with fitted sizes."""
    return run.setting.width**2 * (3 if run.method == "embedding" else 5) + run.seed


def power_law(exponent, widths=(2, 4, 8), seeds=4, noise=0.1):
    random = np.random.default_rng(int(10 * abs(exponent)))
    sizes = np.array([[5 * w**2 + seed for w in widths] for seed in range(seeds)])
    return 3 * sizes**exponent * np.exp(noise * random.standard_normal(sizes.shape))


def test_exponents_are_fitted_by_seed_over_the_parameters_of_each_run():
    errors = pair(power_law(-1.5), power_law(-0.5))
    results = results_of(errors, (2, 4, 8), axis=WIDTHS, measure=LOG, counts=count)
    slopes = []
    for factor, found in ((5, errors["hypernetwork"]), (3, errors["embedding"])):
        sizes = [[factor * w**2 + seed for w in (2, 4, 8)] for seed in range(4)]
        slopes.append([np.polyfit(np.log(x), np.log(y), 1)[0] for x, y in zip(sizes, found, strict=True)])
    same(results.exponent("hypernetwork"), slopes[0])
    same(results.exponent("embedding"), slopes[1])
    same(results.exponent_difference("hypernetwork", "embedding"), np.subtract(*slopes))


def test_the_exponent_of_an_exact_power_law():
    results = results_of(pair(*[power_law(-2.0, noise=0)] * 2), (2, 4, 8), axis=WIDTHS, measure=LOG, counts=count)
    found = results.exponent("hypernetwork")
    np.testing.assert_allclose((found.mean, found.low, found.high), -2.0, atol=1e-6)


def broken(*places):
    """Return the errors of the hypernetwork with diverged runs."""
    errors = HYPER.copy()
    for place in places:
        errors[place] = np.nan
    return errors


FLOOR = {"levels": (("floor", "the floor"), ("lower", "a lower one")), "extra": {"floor": 0.9, "lower": 0.4}}


@pytest.mark.parametrize("measure", [PERCENT, LOG])
def test_a_diverged_run_without_a_level_is_left_out(measure):
    options = {"axis": replace(WIDTHS, field="depth"), "counts": lambda run: run.setting.depth}
    results = results_of(pair(broken((1, 1)), EMBED), DEPTHS, measure=measure, **options)
    kept, shape = [0, 2, 3], np.log if measure.log else np.asarray
    row = results.rows()[1]
    assert row.measured.mean == pytest.approx((stats.gmean if measure.log else np.mean)(HYPER[kept, 1]))
    assert (row.seeds, row.diverged) == (4, 1)
    same(results.advantage("hypernetwork", "embedding", 3), (shape(EMBED) - shape(HYPER))[kept, 1])
    same(results.trend("hypernetwork"), [stats.linregress(DEPTHS, r).slope for r in shape(HYPER)[kept]])
    exponents = [[stats.linregress(np.log(DEPTHS), r).slope for r in shape(e)[kept]] for e in (HYPER, EMBED)]
    same(results.exponent("hypernetwork"), exponents[0])
    same(results.exponent_difference("hypernetwork", "embedding"), np.subtract(*exponents))
    assert results.missing("hypernetwork", DEPTHS)
    assert not results.missing("hypernetwork", (2, 5))
    assert not results.missing("embedding", DEPTHS)


@pytest.mark.parametrize(("worst", "expected"), [(0.5, 0.9), (1.5, 1.5)])
def test_a_diverged_run_counts_as_the_worst_level_or_run_at_its_value(worst, expected):
    other = EMBED.copy()
    other[3, 1], other[0, 0] = worst, 7.0  # the second is at another value
    results = results_of(pair(broken((1, 1)), other), DEPTHS, **FLOOR)
    counted = HYPER[:, 1].copy()
    counted[1] = expected
    row = results.rows()[1]
    same(row.measured, counted)
    assert (row.diverged, results.rows()[0].diverged) == (1, 0)
    same(results.advantage("hypernetwork", "embedding", 3), other[:, 1] - counted)
    assert not results.missing("hypernetwork", DEPTHS)


def test_levels_do_not_stand_for_measures_in_other_units():
    errors = {**pair(broken((1, 1)), EMBED), "hypernetwork:apart": broken((1, 1))}
    results = results_of(errors, DEPTHS, **FLOOR)
    assert results.missing("hypernetwork:apart", DEPTHS)
    assert results.mean_of(results.rows()[1], "apart") == pytest.approx(HYPER[[0, 2, 3], 1].mean())


@pytest.mark.parametrize("loss", [None, math.inf])
def test_a_run_whose_training_loss_is_not_finite_diverged_whatever_its_error(loss):
    """A classifier whose outputs are not numbers has an error of 92 % in all seeds."""
    comparison = comparison_of(study_of(pair(HYPER, EMBED), DEPTHS, levels=FLOOR["levels"]))
    records = records_of(comparison, pair(HYPER, EMBED), **FLOOR["extra"])
    assert records[0]["config"]["setting"]["depth"] == 2
    records[0]["metrics"]["train_loss"] = loss
    results = summarise(comparison, records).results[0]
    row, level = results.rows()[0], results.rows()[6]
    assert row.diverged == 1
    same(row.measured, [0.9, *HYPER[1:, 0]])
    assert (level.line.measure, level.diverged, level.measured.mean) == ("floor", 0, pytest.approx(0.9))


def test_where_all_runs_diverged_there_is_no_mean():
    row = results_of(pair(broken(np.s_[:, 1]), EMBED), DEPTHS, **FLOOR).rows()[1]
    assert (row.diverged, row.measured.low, row.measured.high) == (4, -math.inf, math.inf)
    assert math.isnan(row.measured.mean)


@pytest.mark.parametrize("measure", [PERCENT, LOG])
def test_rows_have_the_ratio_to_the_hypernetwork_paired_by_seed(measure):
    rows = results_of(pair(HYPER, EMBED), DEPTHS, measure=measure, **FLOOR).rows()
    assert [row.paired for row in rows[:3]] == [None] * 3
    for row, hyper, other in zip(rows[3:9], [*HYPER.T, *HYPER.T], [*EMBED.T, *np.full((3, 4), 0.9)], strict=True):
        mean, low, high = interval(np.log(other / hyper) if measure.log else other - hyper)
        expected = np.exp((mean, low, high)) if measure.log else (mean, low, high)
        np.testing.assert_allclose((row.paired.mean, row.paired.low, row.paired.high), expected)


def test_without_a_hypernetwork_nothing_is_paired():
    rows = results_of({"embedding": EMBED, "film": HYPER}, DEPTHS).rows()
    assert {row.paired for row in rows} == {None}


def test_both_diverged_is_no_tie():
    nothing = np.full((3, 2), np.nan)
    found = results_of(pair(nothing, nothing)).advantage("hypernetwork", "embedding", 2)
    assert math.isnan(found.mean)


def test_an_error_of_zero_has_a_logarithm():
    results = results_of(pair(np.zeros((3, 2)), np.ones((3, 2))), measure=LOG)
    assert results.rows()[0].measured.high < 1e-290
    assert results.advantage("hypernetwork", "embedding", 2).low > 600


def test_one_seed_gives_means_without_intervals():
    results = results_of(pair([[0.1, 0.2]], [[0.5, 0.5]]))
    assert results.rows()[1].measured == Interval(0.2, -math.inf, math.inf)
    assert results.advantage("hypernetwork", "embedding", 2).mean == pytest.approx(0.4)
    trend = results.trend("hypernetwork")
    assert trend.mean == pytest.approx(0.1)
    assert (trend.low, trend.high) == (-math.inf, math.inf)


def test_one_value_shows_no_trend():
    results = results_of(pair(0.2 + JITTER, 0.5 - JITTER), (4,))
    assert math.isnan(results.trend("hypernetwork").mean)


def test_what_others_published_stands_beside():
    rows = results_of(pair(HYPER, EMBED), DEPTHS, published={("embedding", 3): 0.45}).rows()
    assert [row.published for row in rows] == [None, None, None, None, 0.45, None]


def test_levels_are_lines_of_the_first_method():
    results = results_of(pair(HYPER, EMBED), DEPTHS, levels=(("zero", "answering zero"),), extra={"zero": 0.7})
    level = results.rows()[-1]
    assert (level.line.label, level.line.dashed, level.published) == ("answering zero", True, None)
    assert level.measured.mean == pytest.approx(0.7)
