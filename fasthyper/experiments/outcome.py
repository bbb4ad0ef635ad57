"""The outcome of a comparison in words: which method has the least error at equal totals, and by how much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasthyper.experiments.claims import Wins
from fasthyper.experiments.drawing import rounded
from fasthyper.experiments.experiment import MEASURED, PAPER, Finding, Study, value_text
from fasthyper.experiments.figures import short_name
from fasthyper.experiments.methods import EMBEDDING, HYPERNETWORK, METHODS
from fasthyper.experiments.results import Interval, Results, Row, exp
from fasthyper.experiments.summary import Summary

_SHORT = 20
"""Letters of the name of a measure that a sentence can take."""


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
        """The method with the least error, and all that do not surely have more."""
        first, *others = self.rows
        return (first, *(m for m in others if self.apart(m, first) <= 0))

    @property
    def other(self) -> str | None:
        """The best method besides the hypernetwork."""
        return next((method for method in self.rows if method != HYPERNETWORK), None)

    def sign(self, method: str) -> int:
        """Return 1 if a method has more error than the hypernetwork, -1 if less, 0 if they are not told apart."""
        return self.apart(method, HYPERNETWORK)

    def apart(self, method: str, over: str) -> int:
        """Return 1 if a method surely has more error than another, -1 if less, else 0.

        The interval of `ratio` decides; where there is none, because an error is zero, that of the difference.
        """
        apart, even = self.ratio(method, over), 1.0
        if math.isnan(apart.mean):
            apart, even = self.results.advantage(over, method, self.value), 0.0
        return 1 if apart.low > even else -1 if apart.high < even else 0

    def ratio(self, method: str, over: str) -> Interval:
        """Return the error of a method over that of another, paired by seed: the geometric mean of the ratios.

        It is NaN if an error is zero. Runs that are missing are left out.
        """
        results = self.results
        if results.study.measure.log:
            return results.advantage(over, method, self.value).map(exp)
        found = zip(*(results.per_seed(results.line(m), self.value) for m in (method, over)), strict=True)
        pairs = [pair for pair in found if all(map(math.isfinite, pair))]
        ratios = [math.log(a / b) if a > 0 and b > 0 else math.nan for a, b in pairs]
        return Interval.of(ratios).map(exp)


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


def outcome(summary: Summary) -> list[str]:
    """Return the outcome in sentences: at equal totals in each frontier, then on the claims of the paper."""
    found = list(frontiers(summary))
    sentences = [_at_equal_totals(results, named=len(found) > 1) for results in found] or _least_of_all(summary)
    return [*sentences, *_on_the_paper(summary)]


def certainty(summary: Summary) -> str:
    """Return how sure the outcome is, and how it was made."""
    parts = []
    if found := list(frontiers(summary)):
        parts.append("In brackets: 95 % intervals, paired by seed. “Clearly”: the interval of this one pair excludes 1")
    if any(results.study.tuning is not None for results in found):
        edges = sum(rate.at_edge for rate in summary.rates)
        at_edge = f"; {edges} of {len(summary.rates)} are at the edge of their grid" if edges else ""
        parts.append(f"Learning rates are tuned for each method{at_edge}")
    return ". ".join([*parts, f"Made with {made_with([summary])}."])


def made_with(summaries: Sequence[Summary]) -> str:
    """Return preset, seeds, device, version and date of comparisons."""
    presets = _unique(summary.comparison.preset for summary in summaries)
    seeds = sorted({results.study.seeds for summary in summaries for results in summary.results})
    versions = [version for summary in summaries for version in summary.versions]
    devices = _unique(version.get("device", "") for version in versions) or _unique(
        summary.comparison.device for summary in summaries
    )
    count = " or ".join(map(str, seeds))
    return ", ".join(
        [
            f"preset {listed(presets)}",
            f"{count} seed{'' if seeds == [1] else 's'}",
            listed(devices),
            *(f"fasthyper {version}" for version in _unique(version.get("fasthyper", "") for version in versions)),
            *_unique([max(summary.date for summary in summaries)]),
        ]
    )


def _unique(words: Iterable[str]) -> list[str]:
    """Return those that are not empty, each once."""
    return [word for word in dict.fromkeys(words) if word]


def times(ratio: Interval, of: str) -> str:
    """Return a ratio with its interval in words.

    Example:
        >>> times(Interval(1.894, 1.73, 2.08), "it"), times(Interval(math.nan, 0.0, math.inf), "it")
        ('1.9 times it (1.7 to 2.1)', 'an unknown number of times it')
    """
    if math.isnan(ratio.mean):
        return f"an unknown number of times {of}"
    interval = "" if math.isinf(ratio.high) else f" ({rounded(ratio.low)} to {rounded(ratio.high)})"
    return f"{rounded(ratio.mean)} times {of}{interval}"


def name(method: str) -> str:
    """Return the name of a method within a sentence.

    Example:
        >>> name("hypernetwork"), name("film_wide"), name("plain_wide")
        ('the hypernetwork', 'FiLM (wide q)', 'one wide network')
    """
    words, _, part = short_name(METHODS[method].label).partition(", ")
    if part == "wide":
        return words.replace("one ", "one wide ")
    return ("the " if method == HYPERNETWORK else "") + words + (f" ({part})" if part else "")


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
        ('a', 'a and b', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def error_text(results: Results, error: float) -> str:
    """Return an error in the displayed unit."""
    measure = results.study.measure
    return f"{measure.displayed(error):.1f} %" if measure.percent else rounded(error)


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


def _at_equal_totals(results: Results, named: bool) -> str:
    standing = at_equal_totals(results)
    study, rows = results.study, standing.rows
    first, *tied = standing.best
    total = rows.get(HYPERNETWORK, rows[first]).trainable_parameters
    size = "" if standing.value == 1 else f" ({standing.value:g} times the reference total)"
    label = study.measure.label if len(study.measure.label) <= _SHORT else "error"
    lead = f"{study.title}. " if named else ""
    parts = [
        f"{lead}With about {rounded(total)} trained parameters each{size}, {name(first)} has"
        f" the least {label}, {error_text(results, rows[first].measured.mean)}"
    ]
    if tied:
        parts.append(f"Not clearly worse: {listed([name(m) for m in tied])}")
    rest = [m for m in rows if m not in standing.best]
    if HYPERNETWORK in rows and first != HYPERNETWORK:
        parts.append(f"The hypernetwork has {times(standing.ratio(HYPERNETWORK, first), 'its error')}")
    elif rest:
        parts.append(f"Next: {name(rest[0])}, with {times(standing.ratio(rest[0], first), 'its error')}")
    if standing.diverged:
        parts.append(f"All runs of {listed([name(m) for m in standing.diverged])} diverged")
    return ". ".join(parts) + "."


def _least_of_all(summary: Summary) -> list[str]:
    """Return which method has the least error in the first study that compares several, at which value."""
    for results in summary.results:
        study = results.study
        rows = [r for r in results.rows() if not r.line.dashed and r.line.measure == study.measure.name]
        rows = [row for row in rows if math.isfinite(row.measured.mean)]
        if len({row.line.method for row in rows}) > 1:
            row = min(rows, key=lambda row: row.measured.mean)
            where = f"{study.axis.field.replace('_', ' ')} {value_text(row.value)}"
            error = error_text(results, row.measured.mean)
            return [f"{study.title}: {name(row.line.method)} has the least {study.measure.label}, {error}, at {where}."]
    return []


def _on_the_paper(summary: Summary) -> list[str]:
    sentences = []
    standings = [at_equal_totals(results) for results in frontiers(summary)]
    signs = [s.sign(m) for s in standings if HYPERNETWORK in s.rows for m in s.rows if m != HYPERNETWORK]
    if signs:
        one = len(standings) == 1
        words = ("clearly better than", "clearly worse than", "not told apart from")
        if not one:
            words = ("clearly better in", "clearly worse in", "not told apart in")
        numbers = zip(words, map(signs.count, (1, -1, 0)), strict=True)
        others = "other methods with as many parameters" if one else f"comparisons, over {len(standings)} tasks"
        found = listed([f"{word} {count}" for word, count in numbers if count])
        sentences.append(f"The hypernetwork is {found} of {len(signs)} {others}.")
    primaries = verdict_on_primaries(summary)
    if primaries:
        sentences.append(
            "The paper's claim: the hypernetwork errs less than the embedding method, though its network of x is"
            f" smaller{_primaries(summary)}. Verdict: {counted_verdicts(primaries)}."
        )
    if not sentences:
        judged = [f for _, f in summary.findings if f.verdict != MEASURED]
        if judged:
            counts = Counter(finding.verdict for finding in judged)
            verdicts = listed([f"{count} {verdict}" for verdict, count in counts.items()])
            alone = f"Verdict on the claim: {judged[0].verdict}."
            sentences.append(alone if len(judged) == 1 else f"Of {len(judged)} claims: {verdicts}.")
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
                return f" ({min(sizes[0]):,} weights against {min(sizes[1]):,})"
    return ""
