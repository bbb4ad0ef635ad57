"""One figure for a study: its lines with 95 % intervals, in colours and markers that nobody mixes up."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

from fasthyper.experiments.experiment import Line, value_text
from fasthyper.experiments.methods import METHODS
from fasthyper.experiments.results import Results, Row

_OTHER = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"))
_COUNTS = {"primary_parameters": "N_g or N_q, parameters of the primary", "trainable_parameters": "parameters trained"}


def figure_png(results: Results, dpi: int = 110) -> bytes:
    """The measure over the axis, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    study = results.study
    figure = Figure(figsize=(8.0, 5.0), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_line: dict[Line, list[Row]] = {}
    for row in results.rows():
        by_line.setdefault(row.line, []).append(row)
    own = [line for line in by_line if not line.dashed]
    dashes = itertools.cycle(("--", ":", "-."))
    categories = not all(isinstance(value, (int, float)) for value in study.values)
    for number, (line, rows) in enumerate(by_line.items()):
        rows = [row for row in rows if math.isfinite(row.measured.mean)]
        at = [_beside(results, row, number - (len(own) - 1) / 2, categories) for row in rows]
        values = [results.study.measure.shown(row.measured.mean) for row in rows]
        if line.dashed:
            axes.plot(at, values, label=line.label, color="#666666", linestyle=next(dashes), linewidth=1.2)
            continue
        colour, marker = _style(results, line, own)
        axes.errorbar(
            at,
            values,
            yerr=_bars(results, rows),
            label=line.label,
            color=colour,
            marker=marker,
            linestyle="none" if categories else "-",
            linewidth=1.4,
            markersize=6,
            capsize=4,
        )
        told = [
            (x, results.study.measure.shown(p))
            for x, row in zip(at, rows, strict=True)
            if (p := row.published) is not None
        ]
        if told:
            label = f"{line.label}: published"
            axes.plot(*zip(*told, strict=True), marker="_", markersize=22, color=colour, linestyle="none", label=label)
    _decorate(axes, results, categories)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # inside it would hide points
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _decorate(axes: Any, results: Results, categories: bool) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    study = results.study
    if study.measure.log:
        axes.set_yscale("log")
    elif study.measure.percent:
        axes.set_ylim(0, 100)
    if categories:
        axes.set_xticks(range(len(study.values)), [value_text(value) for value in study.values])
        axes.set_xlim(-0.5, len(study.values) - 0.5)
    elif study.axis.count is not None:
        axes.set_xscale("log")
    else:
        if study.axis.log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        shown = study.values if len(study.values) <= 10 else study.values[:: math.ceil(len(study.values) / 10)]
        axes.xaxis.set_major_locator(FixedLocator([float(value) for value in shown]))
        axes.set_xticks([float(value) for value in shown], [value_text(value) for value in shown])
    axes.set_xlabel(study.axis.label if study.axis.count is None else _COUNTS[study.axis.count])
    axes.set_ylabel(study.measure.heading)
    seeds = "1 seed" if study.seeds == 1 else f"means of {study.seeds} seeds, bars: 95 % intervals"
    axes.set_title(f"{study.title}: {seeds}", fontsize=11)
    axes.grid(alpha=0.25, which="both" if study.measure.log else "major")


def _beside(results: Results, row: Row, places: float, categories: bool) -> float:
    """Where a row is drawn: lines keep a little apart, so that the bars of one do not hide another's."""
    study = results.study
    if row.line.dashed:
        places = 0.0
    if categories:
        return study.values.index(row.value) + 0.07 * places
    if study.axis.count is not None:
        return float(getattr(row, study.axis.count))
    if study.axis.log:
        return float(row.value) * 1.015**places
    return float(row.value) + 0.008 * (study.values[-1] - study.values[0]) * places


def _bars(results: Results, rows: list[Row]) -> Any:
    if not rows or not all(math.isfinite(row.measured.high) for row in rows):
        return None
    low = [results.study.measure.shown(row.measured.mean - row.measured.low) for row in rows]
    high = [results.study.measure.shown(row.measured.high - row.measured.mean) for row in rows]
    return [low, high]


def _style(results: Results, line: Line, own: list[Line]) -> tuple[str, str]:
    """The method's own colour; a further line of the same method takes another."""
    method = METHODS[line.method]
    number = [other for other in own if other.method == line.method].index(line)
    return (method.colour, method.marker) if number == 0 else _OTHER[number - 1]
