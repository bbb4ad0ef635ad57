"""The verdicts on all claims of a page."""

from __future__ import annotations

from collections.abc import Sequence

from fasthyper.experiments.experiment import MEASURED, UNDECIDED, UNMET, Claim, Finding, Study
from fasthyper.experiments.results import Results
from fasthyper.experiments.significance import FAMILY, Outcome, holm


def judged(page: Sequence[Results]) -> tuple[tuple[Study, Finding], ...]:
    """Judge the claims of all studies of a page together; claims about absent methods are left out.

    Each claim has one test, stated before the results are seen. A verdict is yes or no if the p-value is at most 0.05
    after Holm's correction over the tests of all claims of the page; the sign of the effect decides which. The chance
    of any false verdict on a page is at most 5 %. A premise is tested alone, at 5 %, without the correction: it can
    only take a verdict away.

    Args:
        page: the results of the studies.
    """
    return Page(page).findings()


class Page:
    """The tests of all claims of a page."""

    def __init__(self, page: Sequence[Results]) -> None:
        self.page = page
        self.outcomes: dict[tuple[int, Claim], Outcome | None] = {}
        for number, results in enumerate(page):
            for claim in results.study.claims:
                if claim.concerns(results):
                    self.outcomes[number, claim] = claim.test(results)
        tested = {key: o.p for key, o in self.outcomes.items() if o is not None and o.p is not None}
        self.adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
        self.level = FAMILY / max(1, len(tested))
        """Of a single test, for its power: Bonferroni's, so that it depends on no other result."""

    def findings(self) -> tuple[tuple[Study, Finding], ...]:
        """Return the finding on each claim that a study lists, with the study."""
        return tuple(
            (results.study, self._finding(number, claim))
            for number, results in enumerate(self.page)
            for claim in results.study.claims
            if (number, claim) in self.outcomes
        )

    def answer(self, number: int, claim: Claim) -> bool | None:
        """Return yes or no, or None if the results allow both or a premise is not a yes."""
        outcome, adjusted = self.outcomes.get((number, claim)), self.adjusted.get((number, claim))
        if outcome is None or adjusted is None or adjusted > FAMILY or self._unmet(number, claim):
            return None
        return outcome.yes

    def _unmet(self, number: int, claim: Claim) -> list[Claim]:
        return [premise for premise in claim.premises if not self._is_met(number, premise)]

    def _reason(self, number: int, premise: Claim) -> str:
        there = premise.concerns(self.page[number])
        what = "the premise is not met" if there else "the premise is about methods that are not compared here"
        return f"{what}: {premise.text}"

    def _is_met(self, number: int, premise: Claim) -> bool:
        results = self.page[number]
        outcome = premise.test(results) if premise.concerns(results) else None
        if outcome is None or outcome.p is None or outcome.p > FAMILY:
            return False
        return outcome.yes and not self._unmet(number, premise)

    def _finding(self, number: int, claim: Claim) -> Finding:
        results, outcome = self.page[number], self.outcomes[number, claim]
        evidence = claim.evidence(results, self.level)
        # With one seed nothing can be tested, so no premise is known to fail.
        unmet = [] if outcome is not None and outcome.p is None else self._unmet(number, claim)
        answer = self.answer(number, claim)
        if unmet:
            verdict = UNMET
            evidence = "; ".join([*(self._reason(number, premise) for premise in unmet), evidence])
        elif outcome is None:
            verdict = MEASURED
        else:
            verdict = UNDECIDED if answer is None else claim.verdict(answer)
        p = None if outcome is None else outcome.p
        detects = "" if p is None else claim.detects(results, self.level)
        adjusted = self.adjusted.get((number, claim))
        short = claim.short or claim.text
        return Finding(claim.text, claim.whose, verdict, evidence, claim.rule, p, adjusted, detects, short)
