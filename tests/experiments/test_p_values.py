from __future__ import annotations

import numpy as np
import pytest
from made_up import DEPTHS, LOG, PERCENT, A, B, diverging, evidence, finding_of, pair, results_of
from scipy import stats

from fasthyper.experiments.claims import FallsAtEachStep, Flat, Improves, Learns, WellBelow, Wins


def p_of(claim, errors=None, **options):
    return finding_of(claim, results_of(errors or pair(A, B), DEPTHS, **options)).p


@pytest.mark.parametrize("margin", [None, 0.02])
def test_the_test_of_a_win_is_students_of_the_mean_over_values(margin):
    test = stats.ttest_1samp((B - A).mean(axis=1), margin or 0.0)
    assert p_of(Wins(text="t", margin=margin)) == pytest.approx(test.pvalue, rel=1e-9)


def test_the_test_of_a_ratio_is_one_of_logarithms():
    test = stats.ttest_1samp(np.log(B / A).mean(axis=1), np.log(1.2))
    assert p_of(Wins(text="t", margin=1.2), measure=LOG) == pytest.approx(test.pvalue, rel=1e-9)
    test = stats.ttest_1samp(np.log(B / A).mean(axis=1), np.log(1.25))
    below = WellBelow(text="t", line="hypernetwork", than="embedding", share=0.8)
    assert p_of(below, measure=LOG) == pytest.approx(test.pvalue, rel=1e-9)


def test_well_below_refuses_a_study_of_differences():
    with pytest.raises(ValueError, match="measure: WellBelow compares by ratios"):
        p_of(WellBelow(text="t", line="hypernetwork", than="embedding"))


@pytest.mark.parametrize(("measure", "least"), [(PERCENT, 0.01), (LOG, np.log(1.02))])
def test_improves_and_flat_are_one_test_against_one_negligible_fall(measure, least):
    errors = np.log(A) if measure.log else A
    slopes = [stats.linregress(DEPTHS, row).slope for row in errors]
    expected = stats.ttest_1samp(slopes, -least).pvalue
    assert p_of(Improves(text="t"), measure=measure) == pytest.approx(expected, rel=1e-9)
    assert p_of(Flat(text="t", line="hypernetwork"), measure=measure) == pytest.approx(expected, rel=1e-9)


def test_a_fall_at_each_step_has_the_largest_p_of_the_steps():
    falling = A - [0.0, 0.1, 0.25]
    steps = [stats.ttest_rel(falling[:, n + 1], falling[:, n]).pvalue for n in range(2)]
    found = p_of(FallsAtEachStep(text="t", line="hypernetwork"), pair(falling, B))
    assert found == pytest.approx(max(steps), rel=1e-9)


def test_a_rise_at_one_step_is_corrected_for_the_number_of_steps():
    rising = A - [0.0, 0.2, 0.0]
    test = stats.ttest_rel(rising[:, 2], rising[:, 1])
    assert test.statistic > 0
    found = p_of(FallsAtEachStep(text="t", line="hypernetwork"), pair(rising, B))
    assert found == pytest.approx(2 * test.pvalue, rel=1e-9)


FLOOR = {"extra": {"floor": 0.9}, "levels": (("floor", "the floor"),)}


def test_a_diverged_run_counts_as_the_worst_level():
    broken = diverging(A, (2, 1))
    as_floor = np.where(np.isnan(broken), 0.9, broken)
    for claim in (Wins(text="t"), Improves(text="t"), FallsAtEachStep(text="t", line="hypernetwork")):
        assert p_of(claim, pair(broken, B), **FLOOR) == pytest.approx(p_of(claim, pair(as_floor, B)), rel=1e-9)
        text = evidence(claim, pair(broken, B), DEPTHS, **FLOOR)
        assert text.endswith("; 1 of 18 runs of hypernetwork diverged and count as the worst level or run")


def test_to_diverge_is_no_advantage_over_a_bad_error():
    """Nothing is worse than the floor but the other line: the diverged run is as bad as that, and ties."""
    other, as_bad = B.copy(), A.copy()
    other[2, 1] = as_bad[2, 1] = 3.0
    found = p_of(Wins(text="t"), pair(diverging(A, (2, 1)), other), **FLOOR)
    assert found == pytest.approx(p_of(Wins(text="t"), pair(as_bad, other)), rel=1e-9)


def test_the_better_of_two_lines_has_its_p_value_corrected_for_two():
    claim, level = Learns(text="t", level="floor"), 0.35
    options = {"extra": {"floor": level}, "levels": (("floor", "the floor"),)}
    each = [stats.ttest_1samp(level - errors.mean(axis=1), 0) for errors in (A, B)]
    finding = finding_of(claim, results_of(pair(A, B), DEPTHS, **options))
    assert all(test.statistic > 0 for test in each)
    assert finding.p == pytest.approx(2 * min(test.pvalue for test in each), rel=1e-9)
    wins = Wins(text="t", over="hypernetwork:floor")
    alone = wins.detects(results_of(pair(A, B), DEPTHS, **options), 0.025)
    assert finding.detects.startswith(f"hypernetwork: {alone}; embedding: less by ")
