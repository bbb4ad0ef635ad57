"""The outcome of a comparison in words: which method has the least error at equal totals, and by how much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasthyper.experiments.claims import Wins
from fasthyper.experiments.drawing import number_text
from fasthyper.experiments.experiment import MEASURED, PAPER, Finding, Study, value_text
from fasthyper.experiments.figures import short_name
from fasthyper.experiments.methods import EMBEDDING, HYPERNETWORK, METHODS
from fasthyper.experiments.results import Interval, Results, Row, exp
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
        """The method with the least error, and all whose paired interval to it includes no difference."""
        first, *others = self.rows
        tied = [m for m in others if not self.results.advantage(first, m, self.value).low > 0]
        return (first, *tied)

    @property
    def other(self) -> str | None:
        """The best method besides the hypernetwork."""
        return next((method for method in self.rows if method != HYPERNETWORK), None)

    def sign(self, method: str) -> int:
        """Return 1 if a method has more error than the hypernetwork, -1 if less, 0 if they are not told apart."""
        apart = self.results.advantage(HYPERNETWORK, method, self.value)
        return 1 if apart.low > 0 else -1 if apart.high < 0 else 0

    def ratio(self, method: str, over: str) -> Interval:
        """Return the error of a method over that of another, paired by seed: the geometric mean of the ratios."""
        results = self.results
        if results.study.measure.log:
            return results.advantage(over, method, self.value).map(exp)
        pairs = zip(*(results.per_seed(results.line(m), self.value) for m in (method, over)), strict=True)
        ratios = [math.log(a / b) for a, b in pairs if 0 < a < math.inf and 0 < b < math.inf]
        return Interval.of(ratios or [math.nan]).map(exp)


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
    """Return how the methods of a frontier compare at the total of the paper's hypernetwork, size 1, or near it."""
    standings = (Standing(results, value) for value in results.study.values)
    return min((s for s in standings if s.rows), key=lambda standing: abs(math.log(standing.value)))


def outcome(summary: Summary) -> list[str]:
    """Return the outcome in sentences: at equal totals in each frontier, then on the claims of the paper."""
    sentences = [_at_equal_totals(results) for results in frontiers(summary)] or _least_of_all(summary)
    return [*sentences, *_on_the_paper(summary)]


def factor(ratio: Interval) -> str:
    """Return a ratio with its interval as text.

    Example:
        >>> factor(Interval(1.894, 1.73, 2.08)), factor(Interval(math.nan, 0.0, math.inf))
        ('1.89 [1.73, 2.08]', 'an unknown number of')
    """
    return ratio.text(".3g", "an unknown number of")


def name(method: str) -> str:
    """Return the name of a method within a sentence.

    Example:
        >>> name("hypernetwork"), name("film_wide")
        ('the hypernetwork', 'FiLM (wide q)')
    """
    words, _, part = short_name(METHODS[method].label).partition(", ")
    return ("the " if method == HYPERNETWORK else "") + words + (f" ({part})" if part else "")


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
        ('a', 'a and b', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def error_text(results: Results, interval: Interval) -> str:
    """Return an error with its interval in the displayed unit."""
    measure = results.study.measure
    shown = interval.map(measure.displayed)
    if measure.percent:
        return f"{shown.mean:.1f} %" + ("" if math.isinf(shown.high) else f" [{shown.low:.1f}, {shown.high:.1f}]")
    return shown.text(".3g", "unknown")


def verdict_on_primaries(summary: Summary) -> list[Finding]:
    """Return the findings on Galanti and Wolf's claim that the hypernetwork wins over an embedding with a larger q."""
    return [
        finding
        for results in summary.results
        for claim in results.study.claims
        if isinstance(claim, Wins) and (claim.line, claim.over) == (HYPERNETWORK, EMBEDDING)
        if claim.whose == PAPER
        for study, finding in summary.findings
        if study is results.study and finding.claim == claim.text
    ]


def counted_verdicts(findings: Sequence[Finding]) -> str:
    """Return how many findings have each verdict, such as "reproduced in 2 of 3 studies"."""
    found = Counter(finding.verdict for finding in findings)
    if len(found) == 1:
        return next(iter(found)) + (f" (in all of {len(findings)} tests)" if len(findings) > 1 else "")
    return listed([f"{verdict} in {count}" for verdict, count in found.items()]) + f" of {len(findings)} tests"


def _at_equal_totals(results: Results) -> str:
    standing = at_equal_totals(results)
    study, best = results.study, standing.best
    rows = standing.rows
    first, total = best[0], rows[best[0]].trainable_parameters
    size = "" if standing.value == 1 else f", {standing.value:g} times the paper's"
    text = (
        f"At equal totals ({number_text(total)} trained parameters{size}; {study.structure}), {name(first)} has the"
        f" least {study.measure.label}, {error_text(results, rows[first].measured)}"
    )
    tied = [name(m) for m in best[1:]]
    text += f"; {listed(tied)} {'is' if len(tied) == 1 else 'are'} not told apart from it." if tied else "."
    rest = [m for m in rows if m not in best]
    parts = []
    if rest and rest[0] != HYPERNETWORK:
        parts.append(f"the next, {name(rest[0])}, has {factor(standing.ratio(rest[0], first))} times this error")
    if HYPERNETWORK in rows and first != HYPERNETWORK:
        parts.append(f"the hypernetwork has {factor(standing.ratio(HYPERNETWORK, first))} times this error")
    sentence = "; ".join(parts)
    text += f" {sentence[0].upper()}{sentence[1:]}." if parts else ""
    return text + (
        f" All runs of {listed([name(m) for m in standing.diverged])} diverged." if standing.diverged else ""
    )


def _least_of_all(summary: Summary) -> list[str]:
    """Return which method has the least error in the first study that compares several, at which value."""
    for results in summary.results:
        study = results.study
        rows = [r for r in results.rows() if not r.line.dashed and r.line.measure == study.measure.name]
        rows = [row for row in rows if math.isfinite(row.measured.mean)]
        if len({row.line.method for row in rows}) > 1:
            row = min(rows, key=lambda row: row.measured.mean)
            where = f"{study.axis.field.replace('_', ' ')} {value_text(row.value)}"
            error = error_text(results, row.measured)
            return [f"{study.title}: {name(row.line.method)} has the least {study.measure.label}, {error}, at {where}."]
    return []


def _on_the_paper(summary: Summary) -> list[str]:
    sentences = []
    found = verdict_on_primaries(summary)
    if found:
        sentences.append(
            "The paper's claim is about primaries: with a small g, the hypernetwork wins over the embedding method with"
            f" a larger q{_primaries(summary)}. Verdict: {counted_verdicts(found)}."
        )
    standings = [at_equal_totals(results) for results in frontiers(summary)]
    signs = [s.sign(m) for s in standings if HYPERNETWORK in s.rows for m in s.rows if m != HYPERNETWORK]
    if signs:
        where = "" if len(standings) == 1 else f", over {len(standings)} structures"
        sentences.append(
            f"Totals are another question. Of {len(signs)} other ways to spend as many trained parameters{where}, less"
            f" error than the hypernetwork: {signs.count(-1)}; more: {signs.count(1)}; not told apart:"
            f" {signs.count(0)}."
        )
    if not sentences:
        judged = [f for _, f in summary.findings if f.verdict != MEASURED]
        if judged:
            counts = Counter(finding.verdict for finding in judged)
            verdicts = listed([f"{count} {verdict}" for verdict, count in counts.items()])
            one = f"Verdict on the claim: {judged[0].verdict}."
            sentences.append(one if len(judged) == 1 else f"Of {len(judged)} claims: {verdicts}.")
    return sentences


def _primaries(summary: Summary) -> str:
    """Return the sizes of g and q in the first study that has both, if they are the same at all values."""
    for results in summary.results:
        if {HYPERNETWORK, EMBEDDING} <= set(results.study.methods):
            sizes = [
                {row.primary_parameters for row in results.rows() if row.line.method == m and not row.line.dashed}
                for m in (HYPERNETWORK, EMBEDDING)
            ]
            if all(len(size) == 1 for size in sizes):
                return f" (N_g = {min(sizes[0]):,} against N_q = {min(sizes[1]):,})"
    return ""
