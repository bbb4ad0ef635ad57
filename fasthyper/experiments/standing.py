"""How the methods of a frontier compare at one size: the errors, their ratios, and which methods could be the best.

Several methods are compared at once, so what is called clear is corrected for their number. The intervals of ratios are
those of one pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasthyper.experiments.experiment import Study
from fasthyper.experiments.methods import HYPERNETWORK, METHODS
from fasthyper.experiments.results import Interval, Results, Row
from fasthyper.experiments.significance import FAMILY, Outcome, holm, t_test
from fasthyper.experiments.summary import Summary


@dataclass(frozen=True)
class Standing:
    """How the methods of one study compare at one value of its axis. Methods without a finite error are left out."""

    results: Results
    value: Any

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The row of each method that trains as much as the hypernetwork, the least error first."""
        measure = self.results.study.measure.name
        found = [
            row
            for row in self.results.rows()
            if row.value == self.value
            and row.line.measure == measure
            and competes(row.line.method)
            and not row.line.dashed
            and math.isfinite(row.measured.mean)
        ]
        return {row.line.method: row for row in sorted(found, key=lambda row: row.measured.mean)}

    @property
    def diverged(self) -> tuple[str, ...]:
        """The methods of equal totals of which all runs diverged."""
        return tuple(m for m in self.results.study.methods if competes(m) and m not in self.rows)

    @cached_property
    def best(self) -> tuple[str, ...]:
        """The method with the least error, and all that could have the least.

        A method is left out if another has less error in a one-sided t-test at 5 % over the number of others. So the
        method whose true error is least is left out with a chance of at most 5 %.

        Hsu, Constrained simultaneous confidence intervals for multiple comparisons with the best, Annals of Statistics
        1984.
        """
        first, *others = self.rows
        limit = FAMILY / max(1, len(others))
        return (first, *(m for m in others if not any(self._has_less(over, m, limit) for over in self.rows)))

    @property
    def other(self) -> str | None:
        """The best method besides the hypernetwork."""
        return next((method for method in self.rows if method != HYPERNETWORK), None)

    @property
    def sign(self) -> int:
        """1 if the hypernetwork alone could be the best, -1 if it could not be, 0 if it is among several."""
        return 1 if self.best == (HYPERNETWORK,) else 0 if HYPERNETWORK in self.best else -1

    @cached_property
    def signs(self) -> dict[str, int]:
        """For each other method 1 if it clearly has more error than the hypernetwork, -1 if less, 0 if neither.

        These are two-sided t-tests, at 5 % for all of them together (Holm).
        """
        outcomes = {m: self._compared(HYPERNETWORK, m) for m in self.rows if m != HYPERNETWORK}
        adjusted = holm([_p(outcome) for outcome in outcomes.values()])
        pairs = zip(outcomes.items(), adjusted, strict=True)
        return {m: 0 if p > FAMILY else 1 if outcome.yes else -1 for (m, outcome), p in pairs}

    def ratio(self, method: str, over: str) -> Interval:
        """Return the error of a method over that of another, as `Results.ratio` does."""
        return self.results.ratio(method, over, self.value)

    def _compared(self, method: str, over: str) -> Outcome:
        """Return the outcome of the test whether a method has less error than another: a yes is less.

        The test is of their ratio; where there is none, because an error is zero, of the difference. Runs that are
        missing are no evidence in favour of their method.
        """
        differences = self.results.differences(method, over, self.value)
        ratios = [-number for number in self.results.log_ratios(method, over, self.value)]
        found = [pair for pair in zip(ratios, differences, strict=True) if math.isfinite(pair[1])]
        ratio_exists = all(math.isfinite(ratio) for ratio, _ in found)
        outcome = t_test([ratio if ratio_exists else difference for ratio, difference in found])
        barred = self.results.missing(method if outcome.yes else over, (self.value,))
        return Outcome(None, outcome.yes) if barred else outcome

    def _has_less(self, method: str, than: str, level: float) -> bool:
        """Return whether a method has less error than another, in a one-sided test."""
        if method == than:
            return False
        outcome = self._compared(method, than)
        return outcome.yes and _p(outcome) / 2 <= level


def competes(method: str) -> bool:
    """Return whether a method trains as many parameters as the hypernetwork, or is it."""
    return method == HYPERNETWORK or METHODS[method].equal


def is_frontier(study: Study) -> bool:
    """Return whether a study compares several methods of equal totals over their size."""
    return bool(study.structure) and sum(map(competes, study.methods)) > 1


def frontiers(summary: Summary) -> Iterator[Results]:
    """Yield the results of each frontier in which any method has a finite error."""
    for results in summary.results:
        if is_frontier(results.study) and any(Standing(results, value).rows for value in results.study.values):
            yield results


def at_equal_totals(results: Results) -> Standing:
    """Return how the methods of a frontier compare at the reference total, size 1, or near it."""
    standings = (Standing(results, value) for value in results.study.values)
    return min((s for s in standings if s.rows), key=lambda standing: abs(math.log(standing.value)))


def _p(outcome: Outcome) -> float:
    """Return the p-value; 1 where one seed allows no test."""
    return 1.0 if outcome.p is None else outcome.p
