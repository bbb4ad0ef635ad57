"""The verdicts on a page, from made-up results."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from made_up import JITTER, pair, results_of

from fasthyper.experiments.experiment import ASKED, MEASURED, UNDECIDED, UNMET, Claim
from fasthyper.experiments.significance import Outcome
from fasthyper.experiments.verdicts import Page, judged

RESULTS = results_of(pair(JITTER * [1, 1] + 0.2, JITTER * [1, -1] + 0.5))


@dataclass(frozen=True, kw_only=True)
class Told(Claim):
    """A claim with a given outcome."""

    rule = "it is told"
    p: float | None = None
    yes: bool = True
    tested: bool = True
    there: bool = True

    def concerns(self, results):
        return self.there

    def test(self, results):
        return Outcome(self.p, self.yes) if self.tested else None

    def evidence(self, results, level):
        return f"the level is {level:.4f}"

    def detects(self, results, level):
        return f"something at {level:.4f}"


def told(name, p, *, whose=ASKED, **more):
    return Told(text=name, p=p, whose=whose, **more)


def page(*studies):
    """Return the findings by text: one study for each sequence of claims."""
    results = [results_of(pair(JITTER * [1, 1] + 0.2, JITTER * [1, -1] + 0.5), claims=claims) for claims in studies]
    return {finding.claim: finding for _, finding in judged(results)}


def test_verdicts_are_corrected_over_all_studies_of_the_page():
    found = page((told("a", 0.012), told("b", 0.03, yes=False)), (told("c", 0.02), told("d", 0.001, yes=False)))
    assert [found[name].adjusted for name in "abcd"] == pytest.approx([0.036, 0.04, 0.04, 0.004])
    assert [found[name].p for name in "abcd"] == [0.012, 0.03, 0.02, 0.001]
    assert [found[name].verdict for name in "abcd"] == ["holds", "does not hold", "holds", "does not hold"]
    more = page((told("a", 0.012), told("b", 0.03)), (told("c", 0.02), told("d", 0.001)), (told("e", 0.9),))
    assert [more[name].verdict for name in "abcd"] == ["holds", UNDECIDED, UNDECIDED, "holds"]


def test_power_is_that_of_bonferronis_level():
    found = page((told("a", 0.5), told("b", 0.5)), (told("c", 0.5), told("d", None)))
    assert {finding.evidence for finding in found.values()} == {"the level is 0.0167"}
    assert found["a"].detects == "something at 0.0167"
    assert found["d"].detects == ""


def test_what_is_not_tested_does_not_count():
    found = page((told("a", 0.04), told("one seed", None), told("slope", None, tested=False)))
    assert found["a"].verdict == "holds"
    assert (found["one seed"].verdict, found["one seed"].adjusted) == (UNDECIDED, None)
    assert (found["slope"].verdict, found["slope"].p, found["slope"].detects) == (MEASURED, None, "")


@pytest.mark.parametrize("premise", [told("it learns", 0.2), told("it learns", 0.001, yes=False)])
def test_a_claim_without_its_premise_has_no_verdict(premise):
    found = page((told("wins", 0.001, premises=(told("fine", 0.001), premise)), told("other", 0.001)))
    assert found["wins"].verdict == UNMET
    assert found["wins"].evidence.startswith("the premise is not met: it learns; ")
    assert "fine" not in found["wins"].evidence
    assert found["other"].verdict == "holds"


def test_a_premise_about_absent_methods_is_not_said_to_fail():
    found = page((told("wins", 0.001, premises=(told("it learns", 0.001, there=False),)),))
    assert found["wins"].verdict == UNMET
    assert found["wins"].evidence.startswith("the premise is about methods that are not compared here: it learns; ")


def test_with_one_seed_no_premise_is_said_to_fail():
    found = page((told("wins", None, premises=(told("it learns", None),)),))
    assert found["wins"].verdict == UNDECIDED
    assert found["wins"].evidence == "the level is 0.0500"


def test_a_premise_is_tested_alone_and_changes_no_other_verdict():
    """It may only take a verdict away, so it is not corrected, and the claims are corrected for themselves."""
    premise = told("it learns", 0.03)
    claims = told("a", 0.02, premises=(premise,)), told("b", 0.02, premises=(premise,))
    listed, unlisted = page((*claims, premise)), page(claims)
    for name in "ab":
        assert unlisted[name].adjusted == pytest.approx(0.04)
        assert unlisted[name].verdict == "holds"
    assert "it learns" not in unlisted
    # Where it is listed, it is also a claim of its own.
    assert listed["it learns"].adjusted == pytest.approx(0.06)
    assert listed["it learns"].verdict == UNDECIDED
    found = page((told("a", 0.001, premises=(premise,)), premise, told("b", 0.9)))
    assert (found["it learns"].verdict, found["a"].verdict) == (UNDECIDED, "holds")


def test_premises_of_premises():
    first = told("first", 0.9)
    second = told("second", 0.001, premises=(first,))
    found = page((told("a", 0.001, premises=(second,)), second))
    assert (found["a"].verdict, found["second"].verdict) == (UNMET, UNMET)
    assert found["a"].evidence.startswith("the premise is not met: second; ")


def test_a_measured_exponent_also_needs_its_premise():
    found = page((told("a", None, tested=False, premises=(told("first", 0.9),)),))
    assert found["a"].verdict == UNMET


def test_a_page_without_claims():
    assert judged([RESULTS]) == ()
    assert Page([]).findings() == ()
