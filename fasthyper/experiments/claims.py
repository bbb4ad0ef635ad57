"""The usual claims about a study, each with its rule of judgement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.experiment import ASKED, Claim, Finding, Measure
from fasthyper.experiments.methods import BIASES, EMBEDDING, EQUAL_FLOPS, FILM, HYPERNETWORK, WIDE_E
from fasthyper.experiments.results import Interval, Results, exp


@dataclass(frozen=True, kw_only=True)
class Wins(Claim):
    """One line lies below another at every value of the axis.

    Attributes:
        line: the lower line.
        over: the upper line.
        least: judge only the values from this one on.
        at: judge only this value.
        margin: the smallest difference (or ratio, if the study compares by ratios) that is a win; None: any difference.
    """

    rule = (
        "at every value compared, the 95 % interval of the paired difference (or ratio) lies beyond the margin claimed"
    )
    line: str = HYPERNETWORK
    over: str = EMBEDDING
    least: float | None = None
    at: str | None = None
    margin: float | None = None

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if a whole interval lies below the margin."""
        study = results.study
        values = [v for v in study.values if self.at in (None, v) and (self.least is None or v >= self.least)]
        if not results.has(self.line, self.over) or not values:
            return None
        advantages = {value: results.advantage(self.line, self.over, value) for value in values}
        margin = 0.0 if self.margin is None else math.log(self.margin) if study.measure.log else self.margin
        holds = _all_above(
            [a.low - margin for a in advantages.values()], [a.high - margin for a in advantages.values()]
        )
        evidence = (
            f"{_value_label(results, value)}: {_advantage_text(study.measure, a)}" for value, a in advantages.items()
        )
        return self.finding(holds, "; ".join(evidence))


AGAINST_OTHERS = (
    Wins(text="The hypernetwork wins where both train equally many parameters", over=WIDE_E, whose=ASKED),
    Wins(text="The hypernetwork wins where both train equally long", over=EQUAL_FLOPS, whose=ASKED),
    Wins(text="The hypernetwork wins over FiLM", over=FILM, whose=ASKED),
    Wins(text="The hypernetwork wins over generating only biases", over=BIASES, whose=ASKED),
)
"""The claims about the hypernetwork in all studies that compare `methods.ALL`."""


@dataclass(frozen=True, kw_only=True)
class Improves(Claim):
    """A line falls along the axis."""

    rule = "the 95 % interval of its slope along the axis lies below zero"
    line: str = HYPERNETWORK

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if the interval excludes a fall that is not negligible."""
        if not results.has(self.line):
            return None
        trend = results.trend(self.line)
        holds = True if trend.high < 0 else False if trend.low > -_negligible_fall(results) else None
        return self.finding(holds, _trend_text(results, trend))


@dataclass(frozen=True, kw_only=True)
class Flat(Claim):
    """A line does not fall along the axis: it is level, or it rises."""

    rule = "the 95 % interval of its slope excludes a fall of 1 point (2 %) or more per unit, or per doubling"
    line: str = EMBEDDING

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if the interval lies below zero."""
        if not results.has(self.line):
            return None
        trend = results.trend(self.line)
        holds = True if trend.low > -_negligible_fall(results) else False if trend.high < 0 else None
        return self.finding(holds, _trend_text(results, trend))


@dataclass(frozen=True, kw_only=True)
class FallsAtEachStep(Claim):
    """A line falls from each value of the axis to the next."""

    rule = "at each step, the 95 % interval of the paired difference lies below zero"
    line: str

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if the whole interval of one step lies above zero."""
        if not results.has(self.line) or len(results.study.values) < 2:
            return None
        line, values = results.line(self.line), results.study.values
        found = [results.per_seed(line, value) for value in values]
        pairs = zip(found[1:], found, strict=False)
        steps = [Interval.of([a - b for a, b in zip(*pair, strict=True)]) for pair in pairs]
        rising = [f"{a} to {b}" for a, b, s in zip(values, values[1:], steps, strict=False) if not s.mean < 0]
        sure = sum(step.high < 0 for step in steps)
        holds = False if any(step.low > 0 for step in steps) else True if sure == len(steps) else None
        evidence = f"it falls at {len(steps) - len(rising)} of {len(steps)} steps, for sure at {sure}"
        return self.finding(holds, evidence + (f"; not from {', '.join(rising)}" if rising else ""))


@dataclass(frozen=True, kw_only=True)
class WellBelow(Claim):
    """One line is at most `share` of another at every value. The study has to compare by ratios."""

    rule = "at every value, the 95 % interval of the ratio lies below the share claimed"
    line: str
    than: str
    share: float = 0.5

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if a whole interval lies above the share."""
        if not results.has(self.line, self.than):
            return None
        advantages = {value: results.advantage(self.line, self.than, value) for value in results.study.values}
        enough = -math.log(self.share)
        holds = _all_above(
            [a.low - enough for a in advantages.values()], [a.high - enough for a in advantages.values()]
        )
        ratios = {value: (-a).map(exp) for value, a in advantages.items()}
        return self.finding(
            holds, "; ".join(f"{_value_label(results, v)}: {_interval_text(r, '.2g')} of it" for v, r in ratios.items())
        )


@dataclass(frozen=True, kw_only=True)
class Exponent(Claim):
    """The exponent of a line over the number of parameters lies on the side of a theorem's bound that it allows.

    Attributes:
        line: the line.
        bound: the exponent of the theorem.
        at_least_as_steep: whether the theorem promises this rate. Otherwise it excludes a steeper one for the whole
            class of targets.
    """

    rule = "the 95 % interval of the fitted exponent lies on the side of the bound that the theorem promises or allows"
    line: str
    bound: float
    at_least_as_steep: bool

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if the whole interval lies on the other side of the bound."""
        if not results.has(self.line) or len(results.study.values) < 2:
            return None
        fitted = results.exponent(self.line)
        if self.at_least_as_steep:
            holds = True if fitted.high <= self.bound else False if fitted.low > self.bound else None
        else:
            holds = True if fitted.low >= self.bound else False if fitted.high < self.bound else None
        return self.finding(holds, f"fitted exponent {_interval_text(fitted, '+.2f')}, the theorem's {self.bound:+.2f}")


@dataclass(frozen=True, kw_only=True)
class Steeper(Claim):
    """One line has a more negative exponent than another, over the number of parameters."""

    rule = "the 95 % interval of the paired difference of exponents lies below zero"
    line: str = HYPERNETWORK
    than: str = EMBEDDING

    def judge(self, results: Results) -> Finding | None:
        """Judge the claim: the verdict is no if the interval lies above zero."""
        if not results.has(self.line, self.than) or len(results.study.values) < 2:
            return None
        difference = results.exponent_difference(self.line, self.than)
        holds = True if difference.high < 0 else False if difference.low > 0 else None
        own, other = results.exponent(self.line), results.exponent(self.than)
        exponents = f"{_interval_text(own, '+.2f')} against {_interval_text(other, '+.2f')}"
        return self.finding(holds, f"{exponents}, apart by {_interval_text(difference, '+.2f')}")


def _all_above(lows: list[float], highs: list[float]) -> bool | None:
    return True if all(low > 0 for low in lows) else False if any(high < 0 for high in highs) else None


def _negligible_fall(results: Results) -> float:
    """Return the largest fall, per unit or doubling of the axis, that counts as none."""
    return math.log(1.02) if results.study.measure.log else 0.01


def _value_label(results: Results, value: Any) -> str:
    return f"{results.study.axis.field.replace('_', ' ')} {value}"


def _advantage_text(measure: Measure, advantage: Interval) -> str:
    """Return how much less, or more, in words."""
    word, advantage = ("more", -advantage) if advantage.mean < 0 else ("less", advantage)
    if measure.log:
        return f"{word} by a factor of {_interval_text(advantage.map(exp), '.3g')}"
    if measure.percent:
        return f"{word} by {_interval_text(advantage.map(measure.displayed), '.1f')} points"
    return f"{word} by {_interval_text(advantage, '.3g')}"


def _trend_text(results: Results, trend: Interval) -> str:
    study = results.study
    per = "doubling" if study.axis.log else "unit"
    if study.measure.log:
        return f"{_interval_text(trend.map(lambda v: 100 * (exp(v) - 1)), '+.1f')} % per {per} of {study.axis.field}"
    if study.measure.percent:
        return f"{_interval_text(trend.map(study.measure.displayed), '+.1f')} points per {per} of {study.axis.field}"
    return f"{_interval_text(trend, '+.3g')} per {per} of {study.axis.field}"


def _interval_text(interval: Interval, form: str) -> str:
    return interval.text(form, "unknown (a run diverged, or there is one value only)", " (one seed, no interval)")
