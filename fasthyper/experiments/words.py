"""Differences, slopes and divergences of a study in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasthyper.experiments.experiment import Measure
from fasthyper.experiments.results import Interval, Results, exp

_ALONE = " (one seed, no interval)"


def diverged_text(results: Results, names: Sequence[str], values: Sequence[Any]) -> list[str]:
    """Return for each line with diverged runs how many there are, and how they count."""
    texts = []
    for name in dict.fromkeys(names):
        diverged = sum(results.diverged(results.line(name), value) for value in values)
        if diverged:
            counts = "are left out" if results.missing(name, values) else "count as the worst level or run"
            texts.append(f"{diverged} of {len(values) * results.study.seeds} runs of {name} diverged and {counts}")
    return texts


def value_label(results: Results, value: Any) -> str:
    """Return a value of the axis with the name of its field."""
    return f"{results.study.axis.field.replace('_', ' ')} {value}"


def advantage_text(measure: Measure, advantage: Interval, alone: str = _ALONE) -> str:
    """Return how much less, or more, in words."""
    word, advantage = ("more", -advantage) if advantage.mean < 0 else ("less", advantage)
    if measure.log:
        return f"{word} by a factor of {interval_text(advantage.map(exp), '.3g', alone)}"
    if measure.percent:
        return f"{word} by {interval_text(advantage.map(measure.displayed), '.1f', alone)} points"
    return f"{word} by {interval_text(advantage, '.3g', alone)}"


def trend_text(results: Results, trend: Interval, alone: str = _ALONE) -> str:
    """Return a slope with its unit."""
    study = results.study
    per = "doubling" if study.axis.log else "unit"
    if study.measure.log:
        text = interval_text(trend.map(lambda v: 100 * (exp(v) - 1)), "+.1f", alone) + " %"
    elif study.measure.percent:
        text = interval_text(trend.map(study.measure.displayed), "+.1f", alone) + " points"
    else:
        text = interval_text(trend, "+.3g", alone)
    return f"{text} per {per} of {study.axis.field}"


def interval_text(interval: Interval, form: str, alone: str = _ALONE) -> str:
    """Return a mean with its bounds, or with what is missing; `alone` follows a mean without bounds."""
    return interval.text(form, "unknown (no pair of runs is left, or there is one value only)", alone)
