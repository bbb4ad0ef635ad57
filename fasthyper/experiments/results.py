"""Statistics of one study: means over seeds, confidence intervals, paired differences, trends and exponents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.experiment import Line, Study

_TINY = 1e-300


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t), unbounded with a single seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of the mean of independent values; unbounded, too, where one is not finite.

        Example:
            >>> Interval.of([1.0, 2.0, 3.0])
            Interval(mean=2.0, low=-0.484..., high=4.484...)
        """
        from scipy import stats

        if not all(map(math.isfinite, values)):
            return cls(math.nan, -math.inf, math.inf)
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf)
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * error
        return cls(mean, mean - half, mean + half)

    def text(self, form: str, unknown: str, alone: str = "") -> str:
        """Mean and bounds in this form; what to say where there is no mean, and after a mean without bounds."""
        if math.isnan(self.mean):
            return unknown
        if math.isinf(self.high):
            return f"{self.mean:{form}}{alone}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def map(self, fn: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the mean."""
        return Interval(fn(self.mean), fn(self.low), fn(self.high))

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low)


@dataclass(frozen=True)
class Row:
    """One line of a figure at one value, over its seeds: a row of the table."""

    line: Line
    value: Any
    seeds: int
    measured: Interval
    context_parameters: int
    primary_parameters: int
    trainable_parameters: int
    steps: float
    step_seconds: float
    """Median over seeds of each run's median, as the next ones."""
    peak_temporary_bytes: float
    fused_seconds: float | None
    materialised_seconds: float | None
    materialised_bytes: float | None
    published: float | None


class Results:
    """What one study found: by line and value, one number for each seed, in the order of the seeds."""

    def __init__(self, study: Study, metrics: Mapping[tuple[str, Any], Sequence[Mapping[str, Any]]]) -> None:
        self.study = study
        self.metrics = metrics
        """By method and value, for each seed."""

    def line(self, name: str) -> Line:
        """The line that a claim means: `method:measure`, or a method alone for the study's own measure."""
        method, _, measure = name.partition(":")
        return Line(method, measure or self.study.measure.name, name)

    def has(self, *names: str) -> bool:
        """Whether the runs of these lines are part of the study, so that something can be said of them."""
        return all(self.line(name).method in self.study.methods for name in names)

    def values(self, line: Line, value: Any) -> list[float]:
        """For each seed; infinite where a run diverged. Logarithms, where the study compares by ratios."""
        found = (metrics["measures"][line.measure] for metrics in self.metrics[line.method, value])
        numbers = [math.inf if number is None else number for number in found]
        return [math.log(max(number, _TINY)) if self.study.measure.log else number for number in numbers]

    def measured(self, line: Line, value: Any) -> Interval:
        """The mean over seeds, a geometric one where the study compares by ratios."""
        interval = Interval.of(self.values(line, value))
        return interval.map(exp) if self.study.measure.log else interval

    def also(self, row: Row, measure: str) -> float:
        """Another measure of a row's runs: its mean, a geometric one where the study compares by ratios."""
        return self.measured(Line(row.line.method, measure, measure), row.value).mean

    def advantage(self, name: str, over: str, value: Any) -> Interval:
        """By how much `name` is less than `over`, paired by seed: differences, or logarithms of ratios."""
        pairs = zip(self.values(self.line(over), value), self.values(self.line(name), value), strict=True)
        return Interval.of([b - a if math.isfinite(a) and math.isfinite(b) else math.nan for b, a in pairs])

    def trend(self, name: str) -> Interval:
        """Least-squares change along the axis, seed by seed: per unit, or per doubling where the axis has ratios."""
        axis = self.study.axis
        at = [math.log2(value) if axis.log else float(value) for value in self.study.values]
        return Interval.of(self._slopes(self.line(name), [at] * self.study.seeds))

    def exponent(self, name: str) -> Interval:
        """Of the power law between the measure and the number of parameters `axis.count`, seed by seed."""
        return Interval.of(self._exponents(name))

    def exponents_apart(self, name: str, other: str) -> Interval:
        """The exponent of `name` minus that of `other`, paired by seed."""
        pairs = zip(self._exponents(name), self._exponents(other), strict=True)
        return Interval.of([a - b for a, b in pairs])

    def _exponents(self, name: str) -> list[float]:
        line, count = self.line(name), str(self.study.axis.count)
        found = [self.metrics[line.method, value] for value in self.study.values]
        at = [[math.log(metrics[seed][count]) for metrics in found] for seed in range(self.study.seeds)]
        return self._slopes(line, at)

    def _slopes(self, line: Line, at: Sequence[Sequence[float]]) -> list[float]:
        by_value = [self.values(line, value) for value in self.study.values]
        return [_slope(at[seed], [found[seed] for found in by_value]) for seed in range(self.study.seeds)]

    def rows(self) -> list[Row]:
        """The table, line by line."""
        return [self._row(line, value) for line in self.study.all_lines() for value in self.study.values]

    def _row(self, line: Line, value: Any) -> Row:
        found = self.metrics[line.method, value]

        def median(name: str) -> Any:
            return None if found[0][name] is None else statistics.median(metrics[name] for metrics in found)

        return Row(
            line=line,
            value=value,
            seeds=len(found),
            measured=self.measured(line, value),
            context_parameters=found[0]["context_parameters"],
            primary_parameters=found[0]["primary_parameters"],
            trainable_parameters=found[0]["trainable_parameters"],
            steps=median("steps"),
            step_seconds=median("step_seconds"),
            peak_temporary_bytes=median("peak_temporary_bytes"),
            fused_seconds=median("fused_seconds"),
            materialised_seconds=median("materialised_seconds"),
            materialised_bytes=median("materialised_bytes"),
            published=None if line.dashed else self.study.published.get((line.method, value)),
        )


def _slope(at: Sequence[float], values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)) or len(set(at)) < 2:
        return math.nan
    return statistics.linear_regression(at, values).slope


def exp(value: float) -> float:
    """e to the power of what may be too large for it."""
    return math.inf if value > 700 else math.exp(value)
