from __future__ import annotations

import re

import numpy as np
import pytest
from made_up import DISTANCE, JITTER, LOG, PERCENT, finding_of, pair, results_of, summary_of
from scipy import stats

from fasthyper.experiments.claims import (
    Exponent,
    FallsAtEachStep,
    Flat,
    Improves,
    Learns,
    Steeper,
    WellBelow,
    Wins,
)
from fasthyper.experiments.experiment import ASKED, MEASURED, PAPER, THEOREM, UNDECIDED, Axis

YES, NO = "reproduced", "not reproduced"
WIDE = 0.2 * np.array([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
"""Noise for three seeds and two values, so large that no mean and no slope is certain."""
LOW, HIGH = JITTER * [1, 1] + 0.2, JITTER * [1, -1] + 0.5


def verdict(claim, *errors, values=(2, 3), **options):
    named = errors[0] if isinstance(errors[0], dict) else pair(*errors)
    return finding_of(claim, results_of(named, values, **options)).verdict


@pytest.mark.parametrize(
    ("hypernetwork", "embedding", "expected"),
    [
        (LOW, HIGH, YES),
        (HIGH, LOW, NO),
        (0.3 + WIDE, 0.3 - WIDE, UNDECIDED),
        # The mean over the values decides: better at one by more than it is worse at the other is a win.
        (JITTER * [1, 1] + [0.2, 0.5], JITTER * [1, -1] + 0.4, YES),
        (JITTER * [1, 1] + [0.2, 0.9], JITTER * [1, -1] + 0.4, NO),
        # Noise at one value makes the mean uncertain.
        (0.3 + WIDE * [0, 1], 0.31 + JITTER * [1, 0], UNDECIDED),
        (LOW[:1], HIGH[:1], UNDECIDED),
        (LOW * [1, np.nan], HIGH, UNDECIDED),
    ],
)
@pytest.mark.parametrize("measure", [DISTANCE, LOG])
def test_a_win(hypernetwork, embedding, expected, measure):
    assert verdict(Wins(text="t"), hypernetwork, embedding, measure=measure) == expected


def test_a_win_from_some_value_on():
    errors = JITTER * [1, 1] + [0.7, 0.2], JITTER * [1, -1] + 0.4
    assert verdict(Wins(text="t"), *errors) == NO
    assert verdict(Wins(text="t", least=3), *errors) == YES
    assert verdict(Wins(text="t", at=2), *errors) == NO
    assert finding_of(Wins(text="t", least=4), results_of(pair(*errors))) is None


def test_a_win_of_other_lines():
    errors = {"embedding": LOW, "film": HIGH, "film:apart": LOW / 2}
    assert verdict(Wins(text="t", line="film", over="embedding"), errors) == NO
    assert verdict(Wins(text="t", line="film:apart", over="embedding"), errors) == YES


DOWN, LEVEL, UP = JITTER * [1, 2] + [0.3, 0.2], JITTER * [1, 1] + [0.3, 0.3], JITTER * [1, 2] + [0.2, 0.3]
BARELY = JITTER * [1, 1] + [0.3, 0.296]


@pytest.mark.parametrize(
    ("errors", "improves", "flat"),
    [
        (DOWN, YES, NO),
        (UP, NO, YES),
        (LEVEL, NO, YES),
        (0.3 + WIDE, UNDECIDED, UNDECIDED),
        # Less than a point per step: it falls, but so little that it counts as flat.
        (BARELY, NO, YES),
        (DOWN[:1], UNDECIDED, UNDECIDED),
        (DOWN * [1, np.nan], UNDECIDED, UNDECIDED),
    ],
)
def test_a_trend(errors, improves, flat):
    other = LEVEL[: len(errors)]
    assert verdict(Improves(text="t"), errors, other) == improves
    assert verdict(Flat(text="t"), other, errors) == flat
    assert verdict(Flat(text="t", line="hypernetwork"), errors, other) == flat


@pytest.mark.parametrize(("fall", "flat"), [(0.015, YES), (0.03, NO)])
def test_a_log_measure_is_flat_within_two_percent_per_step(fall, flat):
    noise = np.array([[0.0, 1e-6], [0.0, 0.0], [0.0, -1e-6]])
    errors = np.exp(noise + np.array([0.0, -fall]))
    assert verdict(Flat(text="t"), errors, errors, measure=LOG) == flat


def test_a_trend_over_ratios_is_judged_per_doubling():
    axis = Axis("width", "units", log=True)
    errors = JITTER * [1, 1] + [0.3, 0.264]  # 3.6 points over three doublings
    assert verdict(Flat(text="t"), errors, errors, values=(2, 16), axis=axis) == NO
    errors = JITTER * [1, 1] + [0.3, 0.276]
    assert verdict(Flat(text="t"), errors, errors, values=(2, 16), axis=axis) == YES


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (JITTER * [1, 2, 1] + [0.3, 0.2, 0.1], YES),
        (JITTER * [1, 2, 1] + [0.3, 0.1, 0.2], NO),
        # The mean rises, but not certainly.
        (np.array([[0.3, 0.2, 0.1], [0.3, 0.2, 0.4], [0.3, 0.2, 0.2]]), UNDECIDED),
        (JITTER * [1, 2, 1] + [0.3, np.nan, 0.1], UNDECIDED),
    ],
)
def test_a_fall_at_each_step(errors, expected):
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    assert verdict(claim, errors, errors, values=(2, 3, 4)) == expected


@pytest.mark.parametrize(
    ("margin", "measure", "expected"),
    [
        (0.2, PERCENT, YES),
        (0.4, PERCENT, NO),
        (0.3, PERCENT, UNDECIDED),
        (1.5, LOG, YES),
        (2.5, LOG, NO),
    ],
)
def test_a_win_by_a_margin(margin, measure, expected):
    errors = (
        (JITTER * [1, 2] + 0.3, JITTER * [-1, 1] + 0.6)
        if measure is PERCENT
        else (np.exp(JITTER) * [0.3, 0.3], np.exp(2 * JITTER) * [0.6, 0.59])
    )
    assert verdict(Wins(text="t", margin=margin), *errors, measure=measure) == expected


def test_the_evidence_says_less_or_more():
    one, other = results_of(pair(JITTER * [1, 1] + 0.2, JITTER * [1, 1] + 0.5)), np.array([[0.2, 0.2], [0.2, 0.2]])
    assert finding_of(Wins(text="t"), one).evidence.startswith(
        "on average: less by 30.0 [30.0, 30.0] points; depth 2: less"
    )
    worse = results_of(pair(4 * other, other), measure=LOG)
    assert finding_of(Wins(text="t"), worse).evidence.startswith("on average: more by a factor of 4 [4, 4]; depth 2")


def test_one_seed_does_not_show_a_fall_at_each_step():
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    errors = np.array([[0.3, 0.2, 0.1]])
    assert verdict(claim, errors, errors, values=(2, 3, 4)) == UNDECIDED


def test_the_evidence_says_where_values_contradict_each_other():
    found = pair(LOW * [1, 2], LOW * [2, 1])
    assert evidence(Wins(text="t"), found).endswith("; single values contradict each other")
    assert "contradict" not in evidence(Wins(text="t"), pair(LOW, 2 * LOW))


def test_the_evidence_of_a_fall_names_the_steps_that_do_not():
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    errors = JITTER * [1, 2, 1] + [0.3, 0.1, 0.2]
    evidence = finding_of(claim, results_of(pair(errors, errors), (2, 3, 4))).evidence
    assert evidence == "it falls at 1 of 2 steps, at 1 surely if tested alone; not from 3 to 4"


@pytest.mark.parametrize(
    ("share", "expected"), [([0.3, 0.6], YES), ([0.3, 0.9], NO), ([0.25, 1.0], UNDECIDED), ([0.3, np.nan], UNDECIDED)]
)
def test_well_below(share, expected):
    than = np.exp(10 * JITTER) * [1.0, 2.0]
    claim = WellBelow(text="t", line="hypernetwork", than="embedding")
    line = than * share * np.exp([[0.0, 0.01], [0.0, -0.02], [0.0, 0.01]])
    assert verdict(claim, line, than, measure=LOG) == expected
    assert verdict(WellBelow(text="t", line="hypernetwork", than="embedding", share=2), than, than, measure=LOG) == YES


def test_well_below_an_error_of_zero():
    """In one seed, the other line is exactly zero: the interval is wider than floating point can represent."""
    line, than = np.full((2, 1), 0.1), np.array([[0.2], [0.0]])
    claim = WellBelow(text="t", line="hypernetwork", than="embedding")
    finding = finding_of(claim, results_of(pair(line, than), (2,), measure=LOG))
    assert finding.verdict == UNDECIDED


WIDTHS = (2, 4, 8)
AXIS = Axis("width", "width", count="primary_parameters")


def law(exponent, noise=0.01):
    random = np.random.default_rng(1)
    return np.array(WIDTHS) ** float(exponent) * np.exp(noise * random.standard_normal((3, 3)))


def scaling(*exponents, noise=0.01):
    return results_of(
        pair(*(law(e, noise) for e in exponents)), WIDTHS, axis=AXIS, measure=LOG, counts=lambda run: run.setting.width
    )


@pytest.mark.parametrize(("steep", "side"), [(True, "steeper"), (False, "flatter")])
def test_a_theorems_exponent_is_measured_and_not_judged(steep, side):
    claim = Exponent(text="t", line="hypernetwork", bound=-1.0, at_least_as_steep=steep, whose=THEOREM)
    results = scaling(-2, -1)
    fitted = results.exponent("hypernetwork")
    assert fitted.mean == pytest.approx(-2, abs=0.02)
    finding = finding_of(claim, results)
    assert (finding.verdict, finding.p, finding.adjusted, finding.detects) == (MEASURED, None, None, "")
    numbers = f"{fitted.mean:+.2f} [{fitted.low:+.2f}, {fitted.high:+.2f}]"
    assert finding.evidence == f"fitted exponent {numbers}, the theorem's -1.00 or {side}"


def test_exponents_of_two_lines_are_measured():
    results = scaling(-2, -1)
    finding = finding_of(Steeper(text="t", whose=THEOREM), results)
    assert (finding.verdict, finding.p) == (MEASURED, None)
    apart = results.exponent_difference("hypernetwork", "embedding")
    assert finding.evidence.endswith(f", apart by {apart.mean:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}]")


@pytest.mark.parametrize(
    ("whose", "verdicts"),
    [
        (PAPER, ["reproduced", "not reproduced", "undecided"]),
        (ASKED, ["holds", "does not hold", "undecided"]),
        ("Chang et al.", ["reproduced", "not reproduced", "undecided"]),
    ],
)
def test_verdicts_are_worded_by_whose_claim_it_is(whose, verdicts):
    cases = ((LOW, HIGH), (HIGH, LOW), (0.3 + WIDE, 0.3 - WIDE))
    claim = Wins(text="it wins", whose=whose)
    findings = [finding_of(claim, results_of(pair(*case))) for case in cases]
    assert [finding.verdict for finding in findings] == verdicts
    assert {(finding.claim, finding.whose, finding.rule) for finding in findings} == {("it wins", whose, Wins.rule)}


@pytest.mark.parametrize(
    "claim",
    [
        Wins(text="t", over="film"),
        Wins(text="t", line="film"),
        Improves(text="t", line="film"),
        Flat(text="t", line="film"),
        FallsAtEachStep(text="t", line="film"),
        WellBelow(text="t", line="film", than="embedding"),
        WellBelow(text="t", line="embedding", than="film"),
        Exponent(text="t", line="film", bound=-1.0, at_least_as_steep=True),
        Steeper(text="t", than="film"),
        Learns(text="t", lines=("embedding", "film"), level="floor"),
    ],
)
def test_of_methods_that_are_absent_nothing_is_said(claim):
    assert finding_of(claim, results_of(pair(LOW, HIGH))) is None
    assert summary_of(pair(LOW, HIGH), claims=(claim, Wins(text="kept"))).findings[0][1].claim == "kept"


def evidence(claim, errors, values=(2, 3), **options):
    return finding_of(claim, results_of(errors, values, **options)).evidence


def test_evidence_in_points_distances_and_factors():
    claim = Wins(text="t")
    percent, plain = (evidence(claim, pair(LOW, HIGH), **m) for m in ({}, {"measure": DISTANCE}))
    assert percent == (
        "on average: less by 30.0 [29.5, 30.5] points; depth 2: less by 30.0 [30.0, 30.0] points;"
        " depth 3: less by 30.0 [29.0, 31.0] points"
    )
    assert "; depth 2: less by 0.3 [0.3, 0.3]; depth 3: less by 0.3 [0.29" in plain
    tenth = evidence(claim, pair(LOW / 10, LOW), measure=LOG)
    assert tenth.endswith("; depth 2: less by a factor of 10 [10, 10]; depth 3: less by a factor of 10 [10, 10]")
    alone = evidence(claim, pair(LOW[:1], HIGH[:1]))
    assert "depth 2: less by 30.0 (one seed, no interval) points; " in alone
    assert evidence(Wins(text="t", at=2), pair(LOW, HIGH)) == "depth 2: less by 30.0 [30.0, 30.0] points"
    broken = evidence(claim, pair(LOW * [1, np.nan], HIGH))
    assert "depth 3: less by unknown (no pair of runs is left" in broken
    assert broken.endswith("; 3 of 6 runs of hypernetwork diverged and are left out")


def test_the_evidence_of_a_trend():
    claim = Improves(text="t")
    assert evidence(claim, pair(DOWN, LEVEL)).endswith(" points per unit of depth")
    assert evidence(claim, pair(DOWN, LEVEL)).startswith("-10.0 [")
    halves = np.exp(JITTER) * [0.4, 0.2]
    found = evidence(claim, pair(halves, halves), (4, 8), axis=Axis("width", "w", log=True), measure=LOG)
    assert found == "-50.0 [-50.0, -50.0] % per doubling of width"


RANDOM = np.random.default_rng(2)
A, B = (0.3 + 0.05 * RANDOM.standard_normal((6, 3)) for _ in "ab")
DEPTHS = (2, 3, 5)


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


@pytest.mark.parametrize("seed", range(40))
def test_improves_and_flat_are_never_both_and_never_neither_if_sure(seed):
    random = np.random.default_rng(seed)
    errors = 0.3 + random.choice([0.0, -0.01, -0.02, -0.1]) * np.arange(2) + 0.01 * random.standard_normal((5, 2))
    claims = Improves(text="t", line="embedding"), Flat(text="t")
    page = summary_of(pair(errors, errors), claims=claims)
    verdicts = [finding.verdict for _, finding in page.findings]
    assert sorted(verdicts) in ([NO, YES], [UNDECIDED, UNDECIDED])


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


def test_the_evidence_of_a_fall_says_how_many_seeds_its_weakest_step_needs():
    """The number is checked by its power: that many seeds have 80 %, one less has not."""
    noise = 0.05 * np.array([1.0, -1.0, 0.5, -0.5, 0.25, -0.25])[:, None]
    errors = 0.5 + noise * [0, 0, 1] - [0.0, 0.1, 0.11]
    errors[:, :2] += 0.001 * noise * [1, -1]
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    text = finding_of(claim, results_of(pair(errors, errors), DEPTHS)).evidence
    before, _, after = text.partition("the weakest step, from 3 to 5, needs ")
    assert before == "it falls at 2 of 2 steps, at 1 surely if tested alone; "
    seeds, differences = int(after.split()[0]), errors[:, 1] - errors[:, 2]
    effect = differences.mean() / differences.std(ddof=1)
    powers = [stats.nct.sf(stats.t.isf(0.025, n - 1), n - 1, effect * n**0.5) for n in (seeds - 1, seeds)]
    assert powers[0] < 0.8 <= powers[1] + 1e-4


FLOOR = {"extra": {"floor": 0.9}, "levels": (("floor", "the floor"),)}


def diverging(errors, *places):
    broken = errors.copy()
    for place in places:
        broken[place] = np.nan
    return broken


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


@pytest.mark.parametrize(
    ("claim", "hypernetwork", "embedding", "expected"),
    [
        (Wins(text="t"), diverging(LOW, (0, 1)), HIGH, UNDECIDED),
        (Wins(text="t"), diverging(HIGH, (0, 1)), LOW, NO),
        (Wins(text="t"), LOW, diverging(HIGH, (0, 1)), YES),
        (Wins(text="t"), HIGH, diverging(LOW, (0, 1)), UNDECIDED),
        (Improves(text="t"), diverging(DOWN, (0, 1)), HIGH, UNDECIDED),
        (Flat(text="t"), HIGH, diverging(LEVEL, (0, 1)), UNDECIDED),
        (FallsAtEachStep(text="t", line="hypernetwork"), diverging(DOWN, (0, 1)), HIGH, UNDECIDED),
    ],
)
def test_without_a_level_no_verdict_favours_a_line_with_diverged_runs(claim, hypernetwork, embedding, expected):
    assert verdict(claim, hypernetwork, embedding) == expected
    complete = (np.nan_to_num(e, nan=np.nanmean(e[:, 1])) for e in (hypernetwork, embedding))
    assert verdict(claim, *complete) in (YES, NO)  # it is the diverged run that forbids it


@pytest.mark.parametrize(
    ("hypernetwork", "embedding", "expected"),
    [(LOW, HIGH + 0.5, YES), (HIGH + 0.5, LOW, YES), (LOW + 0.8, HIGH + 0.8, NO), (0.8 + WIDE, 0.8 - WIDE, UNDECIDED)],
)
def test_one_of_two_lines_learns(hypernetwork, embedding, expected):
    claim = Learns(text="t", level="floor", whose=PAPER)
    extra = {"extra": {"floor": 0.8}, "levels": (("floor", "the floor"),)}
    assert verdict(claim, hypernetwork, embedding, **extra) == expected


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


def test_what_would_be_found_is_said_in_the_units_of_the_measure():
    """A true effect of the size named is found with 80 %, by the noncentral t of scipy."""
    finding = finding_of(Wins(text="t", margin=0.1), results_of(pair(A, B), DEPTHS))
    amount = float(finding.detects.removeprefix("less by ").removesuffix(" points or more, on average"))
    spread = (B - A).mean(axis=1).std(ddof=1)
    power = stats.nct.sf(stats.t.isf(0.025, 5), 5, (amount / 100 - 0.1) / spread * 6**0.5)
    assert power == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("claim", "measure", "pattern"),
    [
        (Wins(text="t"), LOG, r"less by a factor of 1\.\d+ or more, on average"),
        (WellBelow(text="t", line="hypernetwork", than="embedding"), LOG, r"0\.\d+ of it or less, on average"),
        (Improves(text="t"), PERCENT, r"a slope of -\d+\.\d points per unit of depth or steeper"),
        (Flat(text="t"), LOG, r"a slope of \+\d+\.\d % per unit of depth or higher"),
        (FallsAtEachStep(text="t", line="embedding"), PERCENT, r"less by \d+\.\d points or more, at the step that .*"),
    ],
)
def test_each_test_says_what_it_would_find(claim, measure, pattern):
    assert re.fullmatch(pattern, finding_of(claim, results_of(pair(A, B), DEPTHS, measure=measure)).detects)
    one_seed = finding_of(claim, results_of(pair(A[:1], B[:1]), DEPTHS, measure=measure))
    assert (one_seed.verdict, one_seed.p, one_seed.adjusted, one_seed.detects) == (UNDECIDED, None, None, "")
