from __future__ import annotations

import numpy as np
import pytest
from made_up import DISTANCE, JITTER, LOG, PERCENT, pair, results_of, summary_of

from fasthyper.experiments.claims import (
    Exponent,
    FallsAtEachStep,
    Flat,
    Improves,
    Steeper,
    WellBelow,
    Wins,
)
from fasthyper.experiments.experiment import ASKED, PAPER, UNDECIDED, Axis

YES, NO = "reproduced", "not reproduced"
WIDE = 0.2 * np.array([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
"""Noise for three seeds and two values, so large that no mean and no slope is certain."""
LOW, HIGH = JITTER * [1, 1] + 0.2, JITTER * [1, -1] + 0.5


def verdict(claim, *errors, values=(2, 3), **options):
    named = errors[0] if isinstance(errors[0], dict) else pair(*errors)
    return claim.judge(results_of(named, values, **options)).verdict


@pytest.mark.parametrize(
    ("hypernetwork", "embedding", "expected"),
    [
        (LOW, HIGH, YES),
        (HIGH, LOW, NO),
        (0.3 + WIDE, 0.3 - WIDE, UNDECIDED),
        # Better at one depth and worse at the other is no win.
        (JITTER * [1, 1] + [0.2, 0.6], JITTER * [1, -1] + 0.4, NO),
        # Better at one depth and uncertain at the other is undecided.
        (0.3 + WIDE * [0, 1], 0.31 + JITTER * [1, 0], UNDECIDED),
        (LOW[:1], HIGH[:1], UNDECIDED),
        (LOW * [1, np.nan], HIGH, UNDECIDED),
    ],
)
@pytest.mark.parametrize("measure", [DISTANCE, LOG])
def test_a_win(hypernetwork, embedding, expected, measure):
    assert verdict(Wins(text="t"), hypernetwork, embedding, measure=measure) == expected


def test_a_win_from_some_value_on():
    errors = JITTER * [1, 1] + [0.6, 0.2], JITTER * [1, -1] + 0.4
    assert verdict(Wins(text="t"), *errors) == NO
    assert verdict(Wins(text="t", least=3), *errors) == YES
    assert Wins(text="t", least=4).judge(results_of(pair(*errors))) is None


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
        # Less than a point per step: it falls, but so little that it also counts as flat.
        (BARELY, YES, YES),
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
    assert Wins(text="t").judge(one).evidence.startswith("depth 2: less by 30.0 [")
    worse = results_of(pair(4 * other, other), measure=LOG)
    assert Wins(text="t").judge(worse).evidence.startswith("depth 2: more by a factor of 4 [4, 4]; ")


def test_one_seed_does_not_show_a_fall_at_each_step():
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    errors = np.array([[0.3, 0.2, 0.1]])
    assert verdict(claim, errors, errors, values=(2, 3, 4)) == UNDECIDED


def test_the_evidence_of_a_fall_names_the_steps_that_do_not():
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    errors = JITTER * [1, 2, 1] + [0.3, 0.1, 0.2]
    evidence = claim.judge(results_of(pair(errors, errors), (2, 3, 4))).evidence
    assert evidence == "it falls at 1 of 2 steps, for sure at 1; not from 3 to 4"


@pytest.mark.parametrize(
    ("share", "expected"), [([0.3, 0.4], YES), ([0.3, 0.7], NO), ([0.3, 0.5], UNDECIDED), ([0.3, np.nan], UNDECIDED)]
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
    finding = WellBelow(text="t", line="hypernetwork", than="embedding").judge(
        results_of(pair(line, than), (2,), measure=LOG)
    )
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


@pytest.mark.parametrize(
    ("exponent", "steep", "expected"),
    [
        (-2, True, YES),
        (-0.5, True, NO),
        (-2, False, NO),
        (-0.5, False, YES),
        (-1, True, UNDECIDED),
        (-1, False, UNDECIDED),
    ],
)
def test_a_theorems_exponent(exponent, steep, expected):
    claim = Exponent(text="t", line="hypernetwork", bound=-1.0, at_least_as_steep=steep)
    results = scaling(exponent, -1)
    fitted = results.exponent("hypernetwork")
    assert fitted.mean == pytest.approx(exponent, abs=0.02)
    finding = claim.judge(results)
    assert finding.verdict == expected
    numbers = f"{fitted.mean:+.2f} [{fitted.low:+.2f}, {fitted.high:+.2f}]"
    assert finding.evidence == f"fitted exponent {numbers}, the theorem's -1.00"


def test_an_exponent_is_undecided_where_a_run_diverged_or_there_is_one_seed():
    errors = law(-2)
    broken = errors.copy()
    broken[0, 0] = np.nan
    for found in (broken, errors[:1]):
        claim = Exponent(text="t", line="hypernetwork", bound=-1.0, at_least_as_steep=True)
        assert verdict(claim, found, found, values=WIDTHS, axis=AXIS, measure=LOG) == UNDECIDED


@pytest.mark.parametrize(("one", "other", "expected"), [(-2, -1, YES), (-1, -2, NO)])
def test_one_exponent_is_steeper(one, other, expected):
    assert Steeper(text="t").judge(scaling(one, other)).verdict == expected


def test_exponents_too_close_to_tell_apart():
    noisy = law(-1, 0.3)
    results = results_of(pair(noisy, noisy[::-1]), WIDTHS, axis=AXIS, measure=LOG, counts=lambda run: run.setting.width)
    assert Steeper(text="t").judge(results).verdict == UNDECIDED


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
    findings = [claim.judge(results_of(pair(*case))) for case in cases]
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
    ],
)
def test_of_methods_that_are_absent_nothing_is_said(claim):
    assert claim.judge(results_of(pair(LOW, HIGH))) is None
    assert summary_of(pair(LOW, HIGH), claims=(claim, Wins(text="kept"))).findings[0][1].claim == "kept"


def test_evidence_in_points_distances_and_factors():
    claim = Wins(text="t")
    percent, plain = (claim.judge(results_of(pair(LOW, HIGH), **m)).evidence for m in ({}, {"measure": DISTANCE}))
    assert percent == "depth 2: less by 30.0 [30.0, 30.0] points; depth 3: less by 30.0 [29.0, 31.0] points"
    assert plain.startswith("depth 2: less by 0.3 [0.3, 0.3]; depth 3: less by 0.3 [0.29")
    tenth = claim.judge(results_of(pair(LOW / 10, LOW), measure=LOG))
    assert tenth.evidence == "depth 2: less by a factor of 10 [10, 10]; depth 3: less by a factor of 10 [10, 10]"
    alone = claim.judge(results_of(pair(LOW[:1], HIGH[:1])))
    assert alone.evidence.startswith("depth 2: less by 30.0 (one seed, no interval) points; ")
    broken = claim.judge(results_of(pair(LOW * [1, np.nan], HIGH)))
    assert "depth 3: less by unknown (a run diverged" in broken.evidence


def test_the_evidence_of_a_trend():
    claim = Improves(text="t")
    assert claim.judge(results_of(pair(DOWN, LEVEL))).evidence.endswith(" points per unit of depth")
    assert claim.judge(results_of(pair(DOWN, LEVEL))).evidence.startswith("-10.0 [")
    halves = np.exp(JITTER) * [0.4, 0.2]
    found = claim.judge(results_of(pair(halves, halves), (4, 8), axis=Axis("width", "w", log=True), measure=LOG))
    assert found.evidence == "-50.0 [-50.0, -50.0] % per doubling of width"
