from __future__ import annotations

import numpy as np
import pytest
from made_up import (
    DISTANCE,
    DOWN,
    HIGH,
    JITTER,
    LEVEL,
    LOG,
    LOW,
    PERCENT,
    UP,
    diverging,
    finding_of,
    pair,
    results_of,
    summary_of,
)

from fasthyper.experiments.claims import Exponent, FallsAtEachStep, Flat, Improves, Learns, Steeper, WellBelow, Wins
from fasthyper.experiments.experiment import ASKED, PAPER, UNDECIDED, Axis

YES, NO = "reproduced", "not reproduced"
WIDE = 0.2 * np.array([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
"""Noise for three seeds and two values, so large that no mean and no slope is certain."""


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


def test_one_seed_does_not_show_a_fall_at_each_step():
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    errors = np.array([[0.3, 0.2, 0.1]])
    assert verdict(claim, errors, errors, values=(2, 3, 4)) == UNDECIDED


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


@pytest.mark.parametrize("seed", range(40))
def test_improves_and_flat_are_never_both_and_never_neither_if_sure(seed):
    random = np.random.default_rng(seed)
    errors = 0.3 + random.choice([0.0, -0.01, -0.02, -0.1]) * np.arange(2) + 0.01 * random.standard_normal((5, 2))
    claims = Improves(text="t", line="embedding"), Flat(text="t")
    page = summary_of(pair(errors, errors), claims=claims)
    verdicts = [finding.verdict for _, finding in page.findings]
    assert sorted(verdicts) in ([NO, YES], [UNDECIDED, UNDECIDED])


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
