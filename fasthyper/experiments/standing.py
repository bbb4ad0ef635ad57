"""How the methods of a frontier compare at one size: the errors, their ratios, and which methods could be the best.

Several methods are compared at once. So the intervals of their ratios are wide enough for all comparisons with one of
them, and what is called clear is what these intervals say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasthyper.experiments.experiment import Study
from fasthyper.experiments.methods import HYPERNETWORK, METHODS
from fasthyper.experiments.results import Interval, Results, Row
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

    @property
    def best(self) -> tuple[str, ...]:
        """The method with the least error, and all that no other is clearly better than."""
        first, *others = self.rows
        return (first, *(m for m in others if all(self.apart(m, over) <= 0 for over in self.rows if over != m)))

    @property
    def other(self) -> str | None:
        """The best method besides the hypernetwork."""
        return next((method for method in self.rows if method != HYPERNETWORK), None)

    def sign(self, method: str) -> int:
        """Return 1 if a method clearly has more error than the hypernetwork, -1 if less, 0 if neither."""
        return self.apart(method, HYPERNETWORK)

    def apart(self, method: str, over: str) -> int:
        """Return 1 if a method clearly has more error than another, -1 if less, else 0.

        The interval of `ratio` decides; where there is none, because an error is zero, that of the difference. Runs
        that are missing are no evidence in favour of their method. The errors that stand for diverged runs make
        intervals wider: a method that is clearly worse without these runs is so with them.
        """
        sign = self._apart(method, over, finished=False)
        if not sign:
            alone = self._apart(method, over, finished=True)
            sign = alone if alone and self.rows[method if alone > 0 else over].diverged else 0
        return 0 if sign and self.results.missing(over if sign > 0 else method, (self.value,)) else sign

    def _apart(self, method: str, over: str, finished: bool) -> int:
        apart, even = self.results.ratio(method, over, self.value, self._family, finished), 1.0
        if math.isnan(apart.mean):
            apart, even = self.results.advantage(over, method, self.value, self._family), 0.0
        return 1 if apart.low > even else -1 if apart.high < even else 0

    @property
    def unlearned(self) -> str:
        """The baseline of the study, in words, if no method clearly has less error; else empty."""
        if self.results.study.baseline is None:
            return ""
        level, label = self.results.study.baseline
        least = next(iter(self.rows))
        advantage = self.results.advantage(least, f"{least}:{level}", self.value, self._family)
        return "" if advantage.low > 0 else label

    def ratio(self, method: str, over: str) -> Interval:
        """Return the error of a method over that of another, as `Results.ratio` does.

        The intervals are wide enough for the number of methods: with a chance of 95 %, those of one method to all
        others hold the true ratios together (Bonferroni). So a method that truly has the least error is clearly worse
        than any other with a chance of 5 % at most, whichever of them are looked at.
        """
        return self.results.ratio(method, over, self.value, self._family)

    @property
    def _family(self) -> int:
        return max(1, len(self.rows) - 1)


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


def with_sgd(summary: Summary) -> Iterator[Standing]:
    """Yield how the methods compare with SGD, for each study of optimizers in which the hypernetwork has an error."""
    for results in summary.results:
        if results.study.axis.field == "optimizer" and "sgd" in results.study.values:
            standing = Standing(results, "sgd")
            if HYPERNETWORK in standing.rows and standing.other:
                yield standing


def at_equal_totals(results: Results) -> Standing:
    """Return how the methods of a frontier compare at the reference total, size 1, or near it."""
    standings = {value: Standing(results, value) for value in results.study.values}
    return standings[nearest_to_one(value for value, standing in standings.items() if standing.rows)]


def nearest_to_one(sizes: Iterable[float]) -> float:
    """Return the size that is nearest to 1, the reference total."""
    return min(sizes, key=lambda size: abs(math.log(size)))
