"""The usual claims about a study. Each has one test, which is stated before the results are seen.

A test is a t-test over seeds, of one number for each seed. Whatever a claim says about several values of the axis or
several methods is averaged within a seed first, except where the claim is about each of them.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from fasthyper.experiments.experiment import Claim, Measure
from fasthyper.experiments.methods import EMBEDDING, HYPERNETWORK
from fasthyper.experiments.results import Interval, Results, exp, finite
from fasthyper.experiments.significance import Outcome, all_of, detectable, seeds_needed, t_test
from fasthyper.experiments.words import advantage_text, diverged_text, interval_text, trend_text, value_label


class Pooled(Claim):
    """A claim that is tested by the mean over seeds of one number.

    A subclass defines `statistic`, `against`, and `effect`.
    """

    def statistic(self, results: Results) -> list[float]:
        """Return a number for each seed, NaN if a run is missing. The claim is that its mean is positive."""
        raise NotImplementedError

    def against(self, results: Results) -> tuple[bool, bool]:
        """Return whether missing runs forbid a yes, and whether they forbid a no."""
        raise NotImplementedError

    def effect(self, results: Results, size: float) -> str:
        """Return a true mean of `statistic` in words."""
        raise NotImplementedError

    def test(self, results: Results) -> Outcome:
        """Return the outcome of the t-test; in favour of a line with missing runs, it is no evidence (p = 1)."""
        numbers = finite(self.statistic(results))
        outcome = t_test(numbers)
        barred = self.against(results)[0 if outcome.yes else 1] or len(numbers) < 2
        return Outcome(1.0, outcome.yes) if barred and results.study.seeds > 1 else outcome

    def detects(self, results: Results, level: float) -> str:
        """Return the smallest true effect that the test would find."""
        numbers = finite(self.statistic(results))
        return self.effect(results, detectable(numbers, level)) if len(numbers) > 1 else ""


class _Paired(Pooled):
    """A claim that one line lies below another by a margin, paired by seed and averaged over values of the axis."""

    def compared(self) -> tuple[str, str]:
        """Return the lower line and the upper one."""
        raise NotImplementedError

    def lines_read(self) -> tuple[str, ...]:
        """Return both lines."""
        return self.compared()

    def values(self, results: Results) -> tuple[Any, ...]:
        """Return the values at which they are compared."""
        return results.study.values

    def least_advantage(self, measure: Measure) -> float:
        """Return the margin: a difference, or the logarithm of a ratio."""
        raise NotImplementedError

    def concerns(self, results: Results) -> bool:
        """Return whether the study has both lines and a value to compare them at."""
        return super().concerns(results) and bool(self.values(results))

    def mean_advantages(self, results: Results) -> list[float]:
        """Return of each seed how much less the lower line is, averaged over the values."""
        by_value = [results.differences(*self.compared(), value) for value in self.values(results)]
        return [statistics.fmean(numbers) for numbers in zip(*by_value, strict=True)]

    def statistic(self, results: Results) -> list[float]:
        """Return the mean advantage of each seed, minus the margin."""
        margin = self.least_advantage(results.study.measure)
        return [mean - margin for mean in self.mean_advantages(results)]

    def against(self, results: Results) -> tuple[bool, bool]:
        """Return whether runs of the lower and of the upper line are missing."""
        line, over = self.compared()
        return results.missing(line, self.values(results)), results.missing(over, self.values(results))

    def evidence(self, results: Results, level: float) -> str:
        """Return the advantage on average and at each value."""
        values = self.values(results)
        found = {value_label(results, value): results.advantage(*self.compared(), value) for value in values}
        if len(values) > 1:
            found = {"on average": Interval.of(finite(self.mean_advantages(results))), **found}
        texts = [f"{name}: {self.in_words(results, advantage)}" for name, advantage in found.items()]
        if any(advantage.low > 0 for advantage in found.values()) and any(a.high < 0 for a in found.values()):
            texts.append("single values contradict each other")
        return "; ".join([*texts, *diverged_text(results, self.compared(), values)])

    def in_words(self, results: Results, advantage: Interval) -> str:
        """Return an advantage in words."""
        return advantage_text(results.study.measure, advantage)

    def effect(self, results: Results, size: float) -> str:
        """Return an advantage beyond the margin in words."""
        total = self.least_advantage(results.study.measure) + size
        return f"{advantage_text(results.study.measure, Interval(total, -math.inf, math.inf), '')} or more, on average"


@dataclass(frozen=True, kw_only=True)
class Wins(_Paired):
    """One line lies below another, on average over the values of the axis.

    Attributes:
        line: the lower line.
        over: the upper line.
        least: compare only at the values from this one on.
        at: compare only at this value.
        margin: the smallest difference (or ratio, if the study compares by ratios) that is a win; None: any difference.
    """

    rule = (
        "the difference (or the logarithm of the ratio), paired by seed and averaged over the values compared, lies"
        " beyond the margin claimed"
    )
    line: str = HYPERNETWORK
    over: str = EMBEDDING
    least: float | None = None
    at: str | None = None
    margin: float | None = None

    def compared(self) -> tuple[str, str]:
        """Return the lower line and the upper one."""
        return self.line, self.over

    def values(self, results: Results) -> tuple[Any, ...]:
        """Return the values at which they are compared."""
        values = results.study.values
        return tuple(v for v in values if self.at in (None, v) and (self.least is None or v >= self.least))

    def least_advantage(self, measure: Measure) -> float:
        """Return the margin: a difference, or the logarithm of a ratio."""
        return 0.0 if self.margin is None else math.log(self.margin) if measure.log else self.margin


@dataclass(frozen=True, kw_only=True)
class WellBelow(_Paired):
    """One line is at most `share` of another, on average over the values. The study has to compare by ratios.

    Attributes:
        line: the lower line.
        than: the upper line.
        share: the largest ratio that is well below.
    """

    rule = "the ratio, paired by seed, its logarithm averaged over the values, lies below the share claimed"
    line: str
    than: str
    share: float = 0.5

    def compared(self) -> tuple[str, str]:
        """Return the lower line and the upper one."""
        return self.line, self.than

    def least_advantage(self, measure: Measure) -> float:
        """Return the logarithm of the ratio.

        Raises:
            ValueError: the study compares by differences.
        """
        if not measure.log:
            raise ValueError(f"measure: WellBelow compares by ratios, so expected one with log, got {measure.name!r}")
        return -math.log(self.share)

    def in_words(self, results: Results, advantage: Interval) -> str:
        """Return the ratio in words."""
        return f"{interval_text((-advantage).map(exp), '.2g')} of it"

    def effect(self, results: Results, size: float) -> str:
        """Return a ratio below the share in words."""
        return f"{exp(math.log(self.share) - size):.2g} of it or less, on average"


class _Trend(Pooled):
    """A claim about the slope of a line along the axis: it is beyond the negligible fall, or not.

    Both claims have the same test with opposite signs: at most one of them is a yes.
    """

    line: str
    sign: ClassVar[float]
    further: ClassVar[str]

    def lines_read(self) -> tuple[str, ...]:
        """Return the line."""
        return (self.line,)

    def concerns(self, results: Results) -> bool:
        """Return whether the study has the line and more than one value."""
        return super().concerns(results) and len(results.study.values) > 1

    def statistic(self, results: Results) -> list[float]:
        """Return the slope of each seed above the negligible fall, with the sign of the claim."""
        return [self.sign * (slope + results.negligible_fall) for slope in results.slopes(self.line)]

    def against(self, results: Results) -> tuple[bool, bool]:
        """Return whether runs are missing: without them, there is no trend."""
        missing = results.missing(self.line, results.study.values)
        return missing, missing

    def effect(self, results: Results, size: float) -> str:
        """Return a slope in words."""
        slope = self.sign * size - results.negligible_fall
        return f"a slope of {trend_text(results, Interval(slope, -math.inf, math.inf), '')} or {self.further}"

    def evidence(self, results: Results, level: float) -> str:
        """Return the slope."""
        diverged = diverged_text(results, (self.line,), results.study.values)
        return "; ".join([trend_text(results, results.trend(self.line)), *diverged])


@dataclass(frozen=True, kw_only=True)
class Improves(_Trend):
    """A line falls along the axis, by more than a negligible amount. The opposite of `Flat`."""

    rule = "the slope is a fall of more than 1 point (2 %, if errors are compared by ratios) per unit, or per doubling"
    sign, further = -1.0, "steeper"
    line: str = HYPERNETWORK


@dataclass(frozen=True, kw_only=True)
class Flat(_Trend):
    """A line does not fall along the axis: it is level, or it rises. The opposite of `Improves`."""

    rule = "the slope is no fall of more than 1 point (2 %, if errors are compared by ratios) per unit, or per doubling"
    sign, further = 1.0, "higher"
    line: str = EMBEDDING


@dataclass(frozen=True, kw_only=True)
class FallsAtEachStep(Claim):
    """A line falls from each value of the axis to the next.

    The claim is about every step: a yes needs a p-value at every step, and has the largest of them (an
    intersection-union test, which needs no correction for the number of steps). One step that rises is a no; the
    smallest p-value of a rise is multiplied by the number of steps.
    """

    rule = "the paired difference lies below zero at every step"
    line: str

    def lines_read(self) -> tuple[str, ...]:
        """Return the line."""
        return (self.line,)

    def concerns(self, results: Results) -> bool:
        """Return whether the study has the line and more than one value."""
        return super().concerns(results) and len(results.study.values) > 1

    def test(self, results: Results) -> Outcome:
        """Return the outcome of the tests of all steps."""
        if results.study.seeds < 2:
            return Outcome(None, False)
        if results.missing(self.line, results.study.values):
            return Outcome(1.0, False)
        return all_of([t_test(falls) for _, falls in self._falls(results)])

    def evidence(self, results: Results, level: float) -> str:
        """Return how many steps fall, and how many seeds the weakest needs."""
        steps = self._falls(results)
        outcomes = [t_test(finite(falls)) for _, falls in steps]
        means = [Interval.of(finite(falls)) for _, falls in steps]
        rising = [name for (name, _), mean in zip(steps, means, strict=True) if not mean.mean > 0]
        sure = sum(mean.low > 0 for mean in means)
        texts = [f"it falls at {len(steps) - len(rising)} of {len(steps)} steps, at {sure} surely if tested alone"]
        if rising:
            texts.append(f"not from {', '.join(rising)}")
        elif all(outcome.p is not None for outcome in outcomes):
            number = max(range(len(steps)), key=lambda n: outcomes[n].p or 0.0)
            name, falls = steps[number]
            seeds = seeds_needed(finite(falls), level)
            needs = "more than 100,000" if seeds is None else f"{seeds:,}"
            texts.append(f"the weakest step, from {name}, needs {needs} seeds to be found with a chance of 80 %")
        return "; ".join([*texts, *diverged_text(results, (self.line,), results.study.values)])

    def detects(self, results: Results, level: float) -> str:
        """Return the smallest fall that is found at the step whose differences vary most."""
        found = [detectable(kept, level) for _, falls in self._falls(results) if len(kept := finite(falls)) > 1]
        if not found:
            return ""
        text = advantage_text(results.study.measure, Interval(max(found), -math.inf, math.inf), "")
        return f"{text} or more, at the step that varies most"

    def _falls(self, results: Results) -> list[tuple[str, list[float]]]:
        """Return of each step its name and by how much each seed falls."""
        line, values = results.line(self.line), results.study.values
        found = [results.per_seed(line, value) for value in values]
        return [
            (f"{values[n]} to {values[n + 1]}", [a - b for a, b in zip(found[n], found[n + 1], strict=True)])
            for n in range(len(values) - 1)
        ]


@dataclass(frozen=True, kw_only=True)
class Learns(Claim):
    """At least one of several lines lies below a level, on average over the values: a premise of comparing them.

    A yes needs one line below the level; the smallest p-value is multiplied by the number of lines. A no needs all of
    them above it.

    Attributes:
        lines: the lines.
        level: a name in `Task.levels`.
    """

    rule = "at least one of the lines, paired by seed and averaged over the values, lies below the level"
    lines: tuple[str, ...] = (HYPERNETWORK, EMBEDDING)
    level: str

    def lines_read(self) -> tuple[str, ...]:
        """Return the lines, and the level beside each."""
        return tuple(name for claim in self._each() for name in claim.compared())

    def test(self, results: Results) -> Outcome:
        """Return the outcome of the tests of all lines."""
        above = all_of([_negated(claim.test(results)) for claim in self._each()])
        return _negated(above)

    def evidence(self, results: Results, level: float) -> str:
        """Return how far each line lies below the level."""
        return "; ".join(f"{claim.line}: {claim.evidence(results, level)}" for claim in self._each())

    def detects(self, results: Results, level: float) -> str:
        """Return the smallest advantage of each line that is found."""
        each = level / len(self.lines)
        found = ((claim.line, claim.detects(results, each)) for claim in self._each())
        return "; ".join(f"{line}: {text}" for line, text in found if text)

    def _each(self) -> tuple[Wins, ...]:
        return tuple(Wins(text="", line=line, over=f"{line.split(':')[0]}:{self.level}") for line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Exponent(Claim):
    """The exponent of a line over the number of parameters, with an interval, beside a theorem's bound: no verdict.

    A theorem is about the worst target and the best network, and trained networks are neither.

    Attributes:
        line: the line.
        bound: the exponent of the theorem.
        at_least_as_steep: whether the theorem promises this rate. Otherwise it excludes a steeper one for the whole
            class of targets.
    """

    rule = "the exponent is measured, with a 95 % interval, and not tested"
    line: str
    bound: float
    at_least_as_steep: bool

    def lines_read(self) -> tuple[str, ...]:
        """Return the line."""
        return (self.line,)

    def concerns(self, results: Results) -> bool:
        """Return whether the study has the line and more than one value."""
        return super().concerns(results) and len(results.study.values) > 1

    def test(self, results: Results) -> None:
        """Return None: there is no test."""

    def evidence(self, results: Results, level: float) -> str:
        """Return the fitted exponent and the bound."""
        says = f"{self.bound:+.2f} or {'steeper' if self.at_least_as_steep else 'flatter'}"
        text = f"fitted exponent {interval_text(results.exponent(self.line), '+.2f')}, the theorem's {says}"
        return "; ".join([text, *diverged_text(results, (self.line,), results.study.values)])


@dataclass(frozen=True, kw_only=True)
class Steeper(Claim):
    """The exponents of two lines over the number of parameters, and their difference, with intervals and no verdict."""

    rule = Exponent.rule
    line: str = HYPERNETWORK
    than: str = EMBEDDING

    def lines_read(self) -> tuple[str, ...]:
        """Return both lines."""
        return self.line, self.than

    def concerns(self, results: Results) -> bool:
        """Return whether the study has both lines and more than one value."""
        return super().concerns(results) and len(results.study.values) > 1

    def test(self, results: Results) -> None:
        """Return None: there is no test."""

    def evidence(self, results: Results, level: float) -> str:
        """Return both exponents and their difference, paired by seed."""
        own, other = results.exponent(self.line), results.exponent(self.than)
        difference = results.exponent_difference(self.line, self.than)
        exponents = f"{interval_text(own, '+.2f')} against {interval_text(other, '+.2f')}"
        text = f"{exponents}, apart by {interval_text(difference, '+.2f')}"
        return "; ".join([text, *diverged_text(results, (self.line, self.than), results.study.values)])


def _negated(outcome: Outcome) -> Outcome:
    return Outcome(outcome.p, not outcome.yes)
