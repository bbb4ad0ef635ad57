"""The figure of a study: one or two panels, as SVG for a page.

A frontier shows the error over trained parameters and over flops of training. Any other study shows the error over its
axis and, where the hypernetwork takes part, each other method paired with it.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from typing import Any

from fasthyper.experiments.drawing import INK, Panel, Series, rounded, svg
from fasthyper.experiments.experiment import Line, value_text
from fasthyper.experiments.methods import HYPERNETWORK, METHODS
from fasthyper.experiments.results import Interval, Results, Row

_FURTHER_STYLES = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"))
_LEAST_RANGE = 3.0
"""The least ratio of the ends of the axis of a frontier."""

_TITLE = 40
"""Letters of a title."""

_TICK = 12
"""Letters of a line of a name below the axis."""

_COUNT_LABELS = {
    "primary_parameters": "N_g or N_q, parameters of the primary",
    "trainable_parameters": "trained parameters in total",
    "training_flops": "flops of training, forward and backward",
}


def panels(results: Results) -> tuple[str, ...]:
    """Draw a study; returns the panels as SVG, to be put into a page."""
    return tuple(svg(panel, f"{results.study.name}-{n}") for n, panel in enumerate(panels_of(results)))


def panels_of(results: Results) -> list[Panel]:
    """Return the panels of a study."""
    study = results.study
    if study.structure:
        found = [_over_count(results, count) for count in ("trainable_parameters", "training_flops")]
    else:
        found = [_over_axis(results)]
    others = [m for m in study.methods if m != HYPERNETWORK]
    return [*found, _paired(results, found[0])] if HYPERNETWORK in study.methods and others else found


def short_name(label: str) -> str:
    """Return the label of a method without its formula.

    Example:
        >>> short_name("FiLM q(x; γ(I), β(I))"), short_name("one network p(x, I), wide")
        ('FiLM', 'one network, wide')
    """
    return re.sub(r" (?:[a-z]\(|⟨).*[)⟩]", "", label)


def _seeds(results: Results) -> str:
    seeds = results.study.seeds
    return "1 seed, no intervals" if seeds == 1 else f"mean of {seeds} seeds, bars: 95 % intervals"


def _over_count(results: Results, count: str) -> Panel:
    """Return the panel of a frontier over a number of each run.

    Over parameters, the ticks are at the sizes, and lines are offset a little, since their totals are equal.
    """
    study = results.study
    solid = sum(not line.dashed for line in study.all_lines())
    equal = count == "trainable_parameters"
    xs = [float(getattr(row, count)) for row in results.rows() if not row.line.dashed]
    low, high = _at_least(math.sqrt(_LEAST_RANGE), min(xs), max(xs))
    step = 0.016 * math.log(high / low) if equal else 0.0

    def position(row: Row, number: int) -> float:
        offset = 0 if row.line.dashed else number - (solid - 1) / 2
        return float(getattr(row, count)) * math.exp(step * offset)

    return Panel(
        title="Error over trained parameters" if equal else "Error over the cost of training",
        subtitle=(f"{study.measure.heading}; lower is better", f"{_seeds(results)}; further left is cheaper"),
        x_label=_COUNT_LABELS[count] + (" (× reference)" if equal else ""),
        series=_series(results, position),
        x_log=True,
        y_log=True,
        x_ends=(low, high),
        ticks=_sizes(results) if equal else (),
    )


def _at_least(factor: float, low: float, high: float) -> tuple[float, float]:
    """Return the ends of a logarithmic axis: the numbers, but each at least a factor from their middle."""
    middle = math.sqrt(low * high)
    edge = (high / low) ** 0.1
    return min(low / edge, middle / factor), max(high * edge, middle * factor)


def _sizes(results: Results) -> tuple[tuple[float, str], ...]:
    """Return a tick for each size of a frontier: the total of the hypernetwork, or of the first method."""
    study = results.study
    of = HYPERNETWORK if HYPERNETWORK in study.methods else study.methods[0]
    totals = {
        row.value: row.trainable_parameters for row in results.rows() if row.line.method == of and not row.line.dashed
    }
    return tuple((float(total), f"{rounded(total)}\n{value:g} ×") for value, total in totals.items())


def _over_axis(results: Results) -> Panel:
    study = results.study
    axis, label = study.axis, study.measure.label
    solid = sum(not line.dashed for line in study.all_lines())
    position = lambda row, number: _position(results, row, number - (solid - 1) / 2)
    return Panel(
        title=label[:1].upper() + label[1:] if len(label) <= _TITLE else "Error",
        subtitle=(f"{study.measure.heading}; lower is better", _seeds(results)),
        x_label=axis.label if axis.count is None else _COUNT_LABELS[axis.count],
        series=_series(results, position),
        x_log=axis.log or axis.count is not None,
        y_log=study.measure.log,
        ticks=_ticks(results),
        from_zero=study.measure.percent,
    )


def _paired(results: Results, first: Panel) -> Panel:
    """Return the panel of every other method relative to the hypernetwork, which is a line at 1, or at 0."""
    study = results.study
    measure = study.measure
    places = {(s.label, n): point[0] for s in first.series for n, point in enumerate(s.points)}
    lines = [line for line in study.all_lines() if line.method != HYPERNETWORK and line.measure == measure.name]
    by_line = _by_line(results)
    found = []
    for line in lines:
        colour, marker = _style(results, line, lines)
        series = Series(short_name(line.label), colour, marker, joined=not _categories(results))
        for number, row in enumerate(by_line[line]):
            assert row.paired is not None
            place = places[series.label, number]
            series.points.append(
                (place, row.paired.map(measure.displayed) if not measure.log else row.paired, row.diverged)
            )
        found.append(series)
    level = 1.0 if measure.log else 0.0
    xs = [place for s in first.series for place, _, _ in s.points]
    even = [(x, Interval(level, level, level), 0) for x in (min(xs), max(xs))]
    unit = " (points)" if measure.percent else ""
    return Panel(
        title="The same, paired with the hypernetwork",
        subtitle=(
            "error / error of the hypernetwork" if measure.log else f"error − error of the hypernetwork{unit}",
            f"above the line at {level:g}, the hypernetwork has less error",
        ),
        x_label=first.x_label,
        series=[*found, Series("hypernetwork", INK, "", even, dash="-")],
        x_log=first.x_log,
        y_log=measure.log,
        x_ends=first.x_ends,
        ticks=first.ticks,
    )


def _series(results: Results, position: Any) -> list[Series]:
    """Return the lines of a study; `position` is called with a row and the number of its line."""
    study, measure = results.study, results.study.measure
    lines = study.all_lines()
    solid = [line for line in lines if not line.dashed]
    dashes = itertools.cycle(("--", ":", "-."))
    found = []
    for number, (line, rows) in enumerate(_by_line(results).items()):
        colour, marker = ("#666666", "") if line.dashed else _style(results, line, solid)
        series = Series(short_name(line.label), colour, marker, joined=line.dashed or not _categories(results))
        series.dash = next(dashes) if line.dashed else ""
        series.strong = line.method == HYPERNETWORK and not line.dashed and len(study.methods) > 1
        for row in rows:
            series.points.append((position(row, number), row.measured.map(measure.displayed), row.diverged))
        found.append(series)
        published = [
            (x, Interval(p, p, p), 0)
            for (x, _, _), row in zip(series.points, rows, strict=True)
            if (p := None if row.published is None else measure.displayed(row.published)) is not None
        ]
        if published:
            found.append(Series(f"{series.label}: published", colour, "_", published, joined=False))
    return found


def _by_line(results: Results) -> dict[Line, list[Row]]:
    found: dict[Line, list[Row]] = {}
    for row in results.rows():
        found.setdefault(row.line, []).append(row)
    return found


def _categories(results: Results) -> bool:
    return not all(isinstance(value, (int, float)) for value in results.study.values)


def _ticks(results: Results) -> tuple[tuple[float, str], ...]:
    study = results.study
    if _categories(results):
        return tuple((float(n), _in_lines(value_text(value))) for n, value in enumerate(study.values))
    if study.axis.count is not None:
        return ()
    shown = study.values if len(study.values) <= 10 else study.values[:: math.ceil(len(study.values) / 10)]
    return tuple((float(value), value_text(value)) for value in shown)


def _in_lines(name: str) -> str:
    """Return a name in short lines, so that it does not touch those beside it.

    Example:
        >>> _in_lines("magnitude_invariant").splitlines()
        ['magnitude', 'invariant']
    """
    return "\n".join(textwrap.wrap(name.replace("_", " "), _TICK, break_long_words=False))


def _position(results: Results, row: Row, offset: float) -> float:
    """Return the x coordinate of a row. Lines are offset a little, so that their error bars do not overlap."""
    study = results.study
    if row.line.dashed:
        offset = 0.0
    if _categories(results):
        return study.values.index(row.value) + 0.07 * offset
    if study.axis.count is not None:
        return float(getattr(row, study.axis.count))
    to, back = (math.log, math.exp) if study.axis.log else (float, float)
    places = sorted(to(value) for value in study.values)
    if len(places) == 1:
        return float(row.value)
    gap = min(b - a for a, b in itertools.pairwise(places))
    step = min(0.02 * (places[-1] - places[0]), 0.6 * gap / len(study.all_lines()))
    return back(to(row.value) + step * offset)


def _style(results: Results, line: Line, solid: list[Line]) -> tuple[str, str]:
    """Return colour and marker of a line: those of its method, or others for further lines of the same method."""
    method = METHODS[line.method]
    number = [other for other in solid if other.method == line.method].index(line)
    return (method.colour, method.marker) if number == 0 else _FURTHER_STYLES[number - 1]
