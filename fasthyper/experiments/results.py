"""Statistics of one study: means over seeds with confidence intervals, paired differences, trends and exponents.

A run diverged if its measure or its training loss is not finite. Its error counts as that of the worst level of the
study, such as the best constant, or as that of the worst finished run at the same value, whichever is larger: to
diverge never makes a mean smaller, though it makes intervals wider. If the study has no level, the run is missing: its
seed is left out where it is needed, and there is no verdict in favour of its line.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.experiment import Line, Study
from fasthyper.experiments.methods import HYPERNETWORK
from fasthyper.experiments.significance import FAMILY

_TINY = 1e-300


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t). With a single seed it is unbounded."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], family: int = 1) -> Interval:
        """Return the interval of the mean of independent values.

        It is unbounded around NaN if there is no value, or one that is not finite. With a `family` of several
        intervals, all of them hold the true means together with a chance of 95 % (Bonferroni).

        Example:
            >>> Interval.of([1.0, 2.0, 3.0])
            Interval(mean=2.0, low=-0.484..., high=4.484...)
        """
        if not values or not all(map(math.isfinite, values)):
            return cls(math.nan, -math.inf, math.inf)
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf)
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = _quantile(len(values), family) * error
        return cls(mean, mean - half, mean + half)

    def text(self, form: str, unknown: str, alone: str = "") -> str:
        """Return mean and bounds as text.

        Args:
            form: the format of each number.
            unknown: the text if there is no mean.
            alone: a text after a mean without bounds.
        """
        if math.isnan(self.mean):
            return unknown
        if math.isinf(self.high):
            return f"{self.mean:{form}}{alone}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def map(self, fn: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the mean."""
        return Interval(fn(self.mean), fn(self.low), fn(self.high))

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low)


@dataclass(frozen=True)
class Row:
    """A row of the table: one line of the figure at one value of the axis, over all seeds.

    Attributes:
        line: the line.
        value: the value of the axis.
        seeds: how many runs.
        diverged: how many of them diverged.
        measured: the mean of the measure. Diverged runs count as the module says; if all diverged, it is NaN.
        paired: the measure divided by the hypernetwork's, paired by seed, if the study compares by ratios; otherwise
            minus it. None for the hypernetwork itself, and in studies without it.
        context_parameters: N_f or N_e.
        primary_parameters: N_g or N_q.
        trainable_parameters: all that is trained.
        steps: training steps.
        training_flops: of all steps. This and all further costs are medians over the seeds that measure them.
        step_seconds: of a training step.
        peak_temporary_bytes: of a forward and backward pass.
        fused_seconds: of a hypernetwork's step.
        materialised_seconds: of the same step with all weights written out.
        materialised_bytes: temporary memory of that step.
        published: the published value, if there is one.
    """

    line: Line
    value: Any
    seeds: int
    diverged: int
    measured: Interval
    paired: Interval | None
    context_parameters: int
    primary_parameters: int
    trainable_parameters: int
    steps: float
    training_flops: float
    step_seconds: float
    peak_temporary_bytes: float
    fused_seconds: float | None
    materialised_seconds: float | None
    materialised_bytes: float | None
    published: float | None


class Results:
    """The results of one study.

    Claims name a line as `method:measure`, or as `method` for the measure of the study.

    Args:
        study: the study.
        metrics: the metrics of each run, by method and value, in the order of the seeds.
    """

    def __init__(self, study: Study, metrics: Mapping[tuple[str, Any], Sequence[Mapping[str, Any]]]) -> None:
        self.study = study
        self.metrics = metrics
        self._levels = tuple(name for name, _ in study.levels)
        self._per_seed: dict[tuple[str, Any], list[float]] = {}

    def line(self, name: str) -> Line:
        """Return the line that has this name in claims."""
        method, _, measure = name.partition(":")
        return Line(method, measure or self.study.measure.name, name)

    def has(self, *names: str) -> bool:
        """Return whether the study has the methods of all these lines."""
        return all(self.line(name).method in self.study.methods for name in names)

    def diverged(self, line: Line, value: Any) -> int:
        """Return how many runs of a line diverged."""
        return sum(self._has_diverged(line, value, seed) for seed in range(len(self.metrics[line.method, value])))

    def per_seed(self, line: Line, value: Any) -> list[float]:
        """Return the measure of each seed; logarithms if the study compares by ratios.

        It is NaN if the run is missing: it diverged, and nothing stands for its error.
        """
        key = line.key, value
        if key not in self._per_seed:
            found = [(m, self._error(m, line.measure)) for m in self.metrics[line.method, value]]
            numbers = [self._stand_in(m, line.measure, value) if math.isnan(e) else e for m, e in found]
            self._per_seed[key] = [math.log(max(e, _TINY)) for e in numbers] if self.study.measure.log else numbers
        return self._per_seed[key]

    def missing(self, name: str, values: Sequence[Any]) -> bool:
        """Return whether a run of a line is missing."""
        return any(math.isnan(number) for value in values for number in self.per_seed(self.line(name), value))

    def measured(self, line: Line, value: Any) -> Interval:
        """Return the mean over seeds: the geometric mean if the study compares by ratios. NaN if all diverged."""
        if self.diverged(line, value) == len(self.metrics[line.method, value]):
            return Interval.of([])
        interval = Interval.of(finite(self.per_seed(line, value)))
        return interval.map(exp) if self.study.measure.log else interval

    def mean_of(self, row: Row, measure: str) -> float:
        """Return the mean of another measure of the runs of a row, as `measured` does."""
        return self.measured(Line(row.line.method, measure, measure), row.value).mean

    def differences(self, name: str, over: str, value: Any) -> list[float]:
        """Return of each seed how much less `name` is than `over`: a difference, or the logarithm of a ratio."""
        pairs = zip(self.per_seed(self.line(over), value), self.per_seed(self.line(name), value), strict=True)
        return [b - a for b, a in pairs]

    def advantage(self, name: str, over: str, value: Any, family: int = 1) -> Interval:
        """Return the mean of `differences`."""
        return Interval.of(finite(self.differences(name, over, value)), family)

    def rise(self, name: str, least: Any, value: Any, family: int = 1) -> Interval:
        """Return the mean over seeds of how much more a line is at one value of the axis than at another.

        It is a difference, or the logarithm of a ratio.
        """
        pairs = zip(self.per_seed(self.line(name), value), self.per_seed(self.line(name), least), strict=True)
        return Interval.of(finite([a - b for a, b in pairs]), family)

    def ratio(self, name: str, over: str, value: Any, family: int = 1, finished: bool = False) -> Interval:
        """Return the mean of `name` over that of `over`, paired by seed: of geometric means if the study has these.

        Otherwise the interval is Fieller's: it excludes a number r if a t-test tells name - r · over from 0. It is NaN
        if a mean is not positive.

        Fieller, Some problems in interval estimation, Journal of the Royal Statistical Society B 1954.

        Args:
            name: the line.
            over: the line to divide by.
            value: the value of the axis.
            family: of how many intervals it is one, as in `Interval.of`.
            finished: leave out the seeds at which one of the lines diverged.
        """
        lines = self.line(name), self.line(over)
        seeds = list(range(len(self.per_seed(lines[0], value))))
        if finished:
            seeds = [n for n in seeds if not any(self._has_diverged(line, value, n) for line in lines)]
        pairs = [tuple(self.per_seed(line, value)[n] for line in lines) for n in seeds]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if self.study.measure.log:
            return Interval.of([a - b for a, b in pairs], family).map(exp)
        return _fieller(pairs, family)

    def slopes(self, name: str) -> list[float]:
        """Return the least-squares slope of each seed: per unit of the axis, or per doubling if the axis is `log`."""
        axis = self.study.axis
        positions = [math.log2(value) if axis.log else float(value) for value in self.study.values]
        return self._slopes(self.line(name), [positions] * self.study.seeds)

    def trend(self, name: str) -> Interval:
        """Return the mean of `slopes`."""
        return Interval.of(finite(self.slopes(name)))

    @property
    def negligible_fall(self) -> float:
        """The largest fall, per unit or doubling of the axis, that counts as none: 2 % in logarithms, or 0.01."""
        return math.log(1.02) if self.study.measure.log else 0.01

    def exponent(self, name: str) -> Interval:
        """Return the exponent of a power law in the number of parameters `axis.count`, fitted for each seed."""
        return Interval.of(finite(self._exponents(name)))

    def exponent_difference(self, name: str, other: str) -> Interval:
        """Return the exponent of `name` minus that of `other`, paired by seed."""
        pairs = zip(self._exponents(name), self._exponents(other), strict=True)
        return Interval.of(finite([a - b for a, b in pairs]))

    def _exponents(self, name: str) -> list[float]:
        line, count = self.line(name), str(self.study.axis.count)
        found = [self.metrics[line.method, value] for value in self.study.values]
        sizes = [[math.log(metrics[seed][count]) for metrics in found] for seed in range(self.study.seeds)]
        return self._slopes(line, sizes)

    def _slopes(self, line: Line, positions: Sequence[Sequence[float]]) -> list[float]:
        by_value = [self.per_seed(line, value) for value in self.study.values]
        return [_slope(positions[seed], [found[seed] for found in by_value]) for seed in range(self.study.seeds)]

    def rows(self) -> list[Row]:
        """Return the rows of the table, line by line."""
        return [self._row(line, value) for line in self.study.all_lines() for value in self.study.values]

    def _row(self, line: Line, value: Any) -> Row:
        found = self.metrics[line.method, value]

        def median(name: str) -> Any:
            numbers = [metrics[name] for metrics in found if metrics[name] is not None]
            return statistics.median(numbers) if numbers else None

        return Row(
            line=line,
            value=value,
            seeds=len(found),
            diverged=self.diverged(line, value),
            measured=self.measured(line, value),
            paired=self._paired(line, value),
            context_parameters=found[0]["context_parameters"],
            primary_parameters=found[0]["primary_parameters"],
            trainable_parameters=found[0]["trainable_parameters"],
            steps=median("steps"),
            training_flops=median("training_flops"),
            step_seconds=median("step_seconds"),
            peak_temporary_bytes=median("peak_temporary_bytes"),
            fused_seconds=median("fused_seconds"),
            materialised_seconds=median("materialised_seconds"),
            materialised_bytes=median("materialised_bytes"),
            published=None if line.dashed else self.study.published.get((line.method, value)),
        )

    def _paired(self, line: Line, value: Any) -> Interval | None:
        if HYPERNETWORK not in self.study.methods or (line.method == HYPERNETWORK and not line.dashed):
            return None
        advantage = self.advantage(HYPERNETWORK, line.key, value)
        return advantage.map(exp) if self.study.measure.log else advantage

    def _has_diverged(self, line: Line, value: Any, seed: int) -> bool:
        return math.isnan(self._error(self.metrics[line.method, value][seed], line.measure))

    def _error(self, metrics: Mapping[str, Any], measure: str) -> float:
        """Return the measure of a run; NaN if the run diverged. Levels are known in any case."""
        if measure not in metrics["measures"]:
            raise ValueError(
                f"runs: some lack the measure {measure!r}, which the study {self.study.name!r} needs: raise the"
                " protocol of the experiment, or use another folder"
            )
        numbers = (metrics["measures"][measure], 0.0 if measure in self._levels else metrics["train_loss"])
        return numbers[0] if all(n is not None and math.isfinite(n) for n in numbers) else math.nan

    def _stand_in(self, metrics: Mapping[str, Any], measure: str, value: Any) -> float:
        """Return the number that stands for a measure of a run that diverged; NaN if there is none."""
        compared = {self.study.measure.name, *(line.measure for line in self.study.lines)}
        levels = finite([self._error(metrics, name) for name in self._levels])
        if measure not in compared or not levels:
            return math.nan
        runs = (run for method in self.study.methods for run in self.metrics[method, value])
        others = [self._error(run, measure) for run in runs if measure in run["measures"]]
        return max(levels + finite(others))


def _fieller(pairs: Sequence[tuple[float, ...]], family: int) -> Interval:
    """Return the ratio of the means of pairs of numbers, with the set of r such that (a - r b)² <= t² var(a - r b) / n.

    a, b are the means here. The set is where u r² - 2 v r + w <= 0. Where b may be 0, it has no upper end, and where a
    may be 0, too, no lower one.
    """
    means = [statistics.fmean(numbers) for numbers in zip(*pairs, strict=True)]
    if not means or min(means) <= 0:
        return Interval.of([])
    (a, b), middle = means, means[0] / means[1]
    if len(pairs) < 2:
        return Interval(middle, -math.inf, math.inf)
    share = _quantile(len(pairs), family) ** 2 / (len(pairs) * (len(pairs) - 1))
    u, v, w = (
        x * y - share * math.fsum((pair[i] - x) * (pair[j] - y) for pair in pairs)
        for i, x, j, y in ((1, b, 1, b), (0, a, 1, b), (0, a, 0, a))
    )
    root = math.sqrt(max(0.0, v * v - u * w))
    if u > 0:
        return Interval(middle, max(0.0, min(middle, (v - root) / u)), max(middle, (v + root) / u))
    return Interval(middle, min(middle, (v - root) / u) if u < 0 < w else 0.0, math.inf)


def finite(numbers: Sequence[float]) -> list[float]:
    """Return those of the numbers that are finite."""
    return [number for number in numbers if math.isfinite(number)]


def _quantile(seeds: int, family: int) -> float:
    """Return by how many standard errors an interval of a mean reaches to each side."""
    from scipy import special

    return float(special.stdtrit(seeds - 1, 1 - FAMILY / (2 * family)))


def _slope(positions: Sequence[float], values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)) or len(set(positions)) < 2:
        return math.nan
    return statistics.linear_regression(positions, values).slope


def exp(value: float) -> float:
    """Return e to the power of a value; infinity instead of an overflow."""
    return math.inf if value > 700 else math.exp(value)
