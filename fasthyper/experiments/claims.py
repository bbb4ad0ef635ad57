"""The claims that studies make, and how each is judged from the results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.experiment import ASKED, Claim, Finding, Measure
from fasthyper.experiments.methods import BIASES, EMBEDDING, EQUAL_PARAMETERS, EQUAL_TIME, FILM, HYPERNETWORK
from fasthyper.experiments.results import Interval, Results, exp


@dataclass(frozen=True, kw_only=True)
class Wins(Claim):
    """One line lies below another at every value of the axis, or at those from `least` on, or at one."""

    rule = (
        "at every value compared, the 95 % interval of the paired difference (or ratio) lies beyond the margin claimed"
    )
    line: str = HYPERNETWORK
    over: str = EMBEDDING
    least: float | None = None
    at: str | None = None
    margin: float | None = None
    """The least difference, or ratio where the study compares by ratios, that is a win; any, if None."""

    def judge(self, results: Results) -> Finding | None:
        """Refuted where a whole interval lies short of the margin."""
        study = results.study
        values = [v for v in study.values if self.at in (None, v) and (self.least is None or v >= self.least)]
        if not results.has(self.line, self.over) or not values:
            return None
        advantages = {value: results.advantage(self.line, self.over, value) for value in values}
        margin = 0.0 if self.margin is None else math.log(self.margin) if study.measure.log else self.margin
        holds = _all_above(
            [a.low - margin for a in advantages.values()], [a.high - margin for a in advantages.values()]
        )
        parts = (f"{_at(results, value)}: {_better(study.measure, a)}" for value, a in advantages.items())
        return self.found(holds, "; ".join(parts))


AGAINST_OTHERS = (
    Wins(text="It wins where both train as many parameters", over=EQUAL_PARAMETERS, whose=ASKED),
    Wins(text="It wins where both train for as long", over=EQUAL_TIME, whose=ASKED),
    Wins(text="It wins over FiLM", over=FILM, whose=ASKED),
    Wins(text="It wins over generating biases only", over=BIASES, whose=ASKED),
)
"""What is asked of the hypernetwork wherever `methods.ALL` are compared."""


@dataclass(frozen=True, kw_only=True)
class Improves(Claim):
    """A line falls along the axis."""

    rule = "the 95 % interval of its slope along the axis lies below zero"
    line: str = HYPERNETWORK

    def judge(self, results: Results) -> Finding | None:
        """Refuted where the interval leaves no room for a fall worth the name."""
        if not results.has(self.line):
            return None
        trend = results.trend(self.line)
        holds = True if trend.high < 0 else False if trend.low > -_flat(results) else None
        return self.found(holds, _change(results, trend))


@dataclass(frozen=True, kw_only=True)
class Flat(Claim):
    """A line does not fall along the axis; to rise is not to fall."""

    rule = "the 95 % interval of its slope excludes a fall of 1 point (2 %) or more per unit, or per doubling"
    line: str = EMBEDDING

    def judge(self, results: Results) -> Finding | None:
        """Refuted where the interval lies below zero."""
        if not results.has(self.line):
            return None
        trend = results.trend(self.line)
        holds = True if trend.low > -_flat(results) else False if trend.high < 0 else None
        return self.found(holds, _change(results, trend))


@dataclass(frozen=True, kw_only=True)
class FallsAtEachStep(Claim):
    """A line falls from each value of the axis to the next."""

    rule = "at each step, the 95 % interval of the paired difference lies below zero"
    line: str

    def judge(self, results: Results) -> Finding | None:
        """Refuted where a step rises by its whole interval."""
        if not results.has(self.line) or len(results.study.values) < 2:
            return None
        line, values = results.line(self.line), results.study.values
        found = [results.values(line, value) for value in values]
        pairs = zip(found[1:], found, strict=False)
        steps = [Interval.of([a - b for a, b in zip(*pair, strict=True)]) for pair in pairs]
        rising = [f"{a} to {b}" for a, b, s in zip(values, values[1:], steps, strict=False) if not s.mean < 0]
        sure = sum(step.high < 0 for step in steps)
        holds = False if any(step.low > 0 for step in steps) else True if sure == len(steps) else None
        evidence = f"it falls at {len(steps) - len(rising)} of {len(steps)} steps, for sure at {sure}"
        return self.found(holds, evidence + (f"; not from {', '.join(rising)}" if rising else ""))


@dataclass(frozen=True, kw_only=True)
class WellBelow(Claim):
    """One line is at most `share` of another, at every value: for measures compared by ratios."""

    rule = "at every value, the 95 % interval of the ratio lies below the share claimed"
    line: str
    than: str
    share: float = 0.5

    def judge(self, results: Results) -> Finding | None:
        """Refuted where a whole interval lies above."""
        if not results.has(self.line, self.than):
            return None
        apart = {value: results.advantage(self.line, self.than, value) for value in results.study.values}
        enough = -math.log(self.share)
        holds = _all_above([a.low - enough for a in apart.values()], [a.high - enough for a in apart.values()])
        ratios = {value: (-a).map(exp) for value, a in apart.items()}
        return self.found(holds, "; ".join(f"{_at(results, v)}: {_number(r, '.2g')} of it" for v, r in ratios.items()))


@dataclass(frozen=True, kw_only=True)
class Exponent(Claim):
    """The power law between a line and the number of parameters, against the exponent that a theorem bounds."""

    rule = "the 95 % interval of the fitted exponent lies on the side of the theorem's that it promises or allows"
    line: str
    bound: float
    at_least_as_steep: bool
    """The theorem promises this rate; otherwise it says that none steeper is possible for the whole class."""

    def judge(self, results: Results) -> Finding | None:
        """Refuted where the interval lies wholly on the other side of the bound."""
        if not results.has(self.line) or len(results.study.values) < 2:
            return None
        fitted = results.exponent(self.line)
        if self.at_least_as_steep:
            holds = True if fitted.high <= self.bound else False if fitted.low > self.bound else None
        else:
            holds = True if fitted.low >= self.bound else False if fitted.high < self.bound else None
        return self.found(holds, f"fitted exponent {_number(fitted, '+.2f')}, the theorem's {self.bound:+.2f}")


@dataclass(frozen=True, kw_only=True)
class Steeper(Claim):
    """The power law of one line has a more negative exponent than another's."""

    rule = "the 95 % interval of the paired difference of exponents lies below zero"
    line: str = HYPERNETWORK
    than: str = EMBEDDING

    def judge(self, results: Results) -> Finding | None:
        """Refuted where the interval lies above zero."""
        if not results.has(self.line, self.than) or len(results.study.values) < 2:
            return None
        apart = results.exponents_apart(self.line, self.than)
        holds = True if apart.high < 0 else False if apart.low > 0 else None
        own, other = results.exponent(self.line), results.exponent(self.than)
        evidence = f"{_number(own, '+.2f')} against {_number(other, '+.2f')}, apart by {_number(apart, '+.2f')}"
        return self.found(holds, evidence)


def _all_above(lows: list[float], highs: list[float]) -> bool | None:
    return True if all(low > 0 for low in lows) else False if any(high < 0 for high in highs) else None


def _flat(results: Results) -> float:
    """The fall per step of the axis below which there is none to speak of."""
    return math.log(1.02) if results.study.measure.log else 0.01


def _at(results: Results, value: Any) -> str:
    return f"{results.study.axis.field.replace('_', ' ')} {value}"


def _better(measure: Measure, advantage: Interval) -> str:
    """By how much it is less, or more."""
    word, advantage = ("more", -advantage) if advantage.mean < 0 else ("less", advantage)
    if measure.log:
        return f"{word} by a factor of {_number(advantage.map(exp), '.3g')}"
    if measure.percent:
        return f"{word} by {_number(advantage.map(measure.shown), '.1f')} points"
    return f"{word} by {_number(advantage, '.3g')}"


def _change(results: Results, trend: Interval) -> str:
    study = results.study
    per = "doubling" if study.axis.log else "unit"
    if study.measure.log:
        return f"{_number(trend.map(lambda v: 100 * (exp(v) - 1)), '+.1f')} % per {per} of {study.axis.field}"
    if study.measure.percent:
        return f"{_number(trend.map(study.measure.shown), '+.1f')} points per {per} of {study.axis.field}"
    return f"{_number(trend, '+.3g')} per {per} of {study.axis.field}"


def _number(interval: Interval, form: str) -> str:
    return interval.text(form, "unknown (a run diverged, or there is one value only)", " (one seed, no interval)")
