from __future__ import annotations

import re

import numpy as np
import pytest
from made_up import (
    DEPTHS,
    DISTANCE,
    DOWN,
    HIGH,
    JITTER,
    LEVEL,
    LOG,
    LOW,
    PERCENT,
    A,
    B,
    evidence,
    finding_of,
    pair,
    results_of,
)
from scipy import stats

from fasthyper.experiments.claims import Exponent, FallsAtEachStep, Flat, Improves, Steeper, WellBelow, Wins
from fasthyper.experiments.experiment import MEASURED, THEOREM, UNDECIDED, Axis


def test_the_evidence_says_less_or_more():
    one, other = results_of(pair(JITTER * [1, 1] + 0.2, JITTER * [1, 1] + 0.5)), np.array([[0.2, 0.2], [0.2, 0.2]])
    assert finding_of(Wins(text="t"), one).evidence.startswith(
        "on average: less by 30.0 [30.0, 30.0] points; depth 2: less"
    )
    worse = results_of(pair(4 * other, other), measure=LOG)
    assert finding_of(Wins(text="t"), worse).evidence.startswith("on average: more by a factor of 4 [4, 4]; depth 2")


def test_the_evidence_says_where_values_contradict_each_other():
    found = pair(LOW * [1, 2], LOW * [2, 1])
    assert evidence(Wins(text="t"), found).endswith("; single values contradict each other")
    assert "contradict" not in evidence(Wins(text="t"), pair(LOW, 2 * LOW))


def test_the_evidence_of_a_fall_names_the_steps_that_do_not():
    claim = FallsAtEachStep(text="t", line="hypernetwork")
    errors = JITTER * [1, 2, 1] + [0.3, 0.1, 0.2]
    evidence = finding_of(claim, results_of(pair(errors, errors), (2, 3, 4))).evidence
    assert evidence == "it falls at 1 of 2 steps, at 1 surely if tested alone; not from 3 to 4"


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
