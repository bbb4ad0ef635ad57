"""The figure of a study: its lines with 95 % intervals; every method has its own colour and marker."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

from fasthyper.experiments.experiment import Line, value_text
from fasthyper.experiments.methods import METHODS
from fasthyper.experiments.results import Results, Row

_FURTHER_STYLES = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"))
_COUNT_LABELS = {
    "primary_parameters": "N_g or N_q, parameters of the primary",
    "trainable_parameters": "parameters trained",
    "training_flops": "flops of training",
}


def figure_png(results: Results, dpi: int = 110) -> bytes:
    """Draw the measure over the axis; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    study = results.study
    figure = Figure(figsize=(8.0, 5.0), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_line: dict[Line, list[Row]] = {}
    for row in results.rows():
        by_line.setdefault(row.line, []).append(row)
    solid = [line for line in by_line if not line.dashed]
    dashes = itertools.cycle(("--", ":", "-."))
    categories = not all(isinstance(value, (int, float)) for value in study.values)
    for number, (line, rows) in enumerate(by_line.items()):
        rows = [row for row in rows if math.isfinite(row.measured.mean)]
        positions = [_position(results, row, number - (len(solid) - 1) / 2, categories) for row in rows]
        values = [results.study.measure.displayed(row.measured.mean) for row in rows]
        if line.dashed:
            axes.plot(positions, values, label=line.label, color="#666666", linestyle=next(dashes), linewidth=1.2)
            continue
        colour, marker = _style(results, line, solid)
        axes.errorbar(
            positions,
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
        published = [
            (x, results.study.measure.displayed(p))
            for x, row in zip(positions, rows, strict=True)
            if (p := row.published) is not None
        ]
        if published:
            label = f"{line.label}: published"
            axes.plot(
                *zip(*published, strict=True), marker="_", markersize=22, color=colour, linestyle="none", label=label
            )
    _decorate(axes, results, categories)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # inside the axes it would hide points
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
    axes.set_xlabel(study.axis.label if study.axis.count is None else _COUNT_LABELS[study.axis.count])
    axes.set_ylabel(study.measure.heading)
    seeds = "1 seed" if study.seeds == 1 else f"means of {study.seeds} seeds, bars: 95 % intervals"
    axes.set_title(f"{study.title}: {seeds}", fontsize=11)
    axes.grid(alpha=0.25, which="both" if study.measure.log else "major")


def _position(results: Results, row: Row, offset: float, categories: bool) -> float:
    """Return the x coordinate of a row. Lines are offset a little, so that their error bars do not overlap."""
    study = results.study
    if row.line.dashed:
        offset = 0.0
    if categories:
        return study.values.index(row.value) + 0.07 * offset
    if study.axis.count is not None:
        return float(getattr(row, study.axis.count))
    if study.axis.log:
        return float(row.value) * 1.015**offset
    return float(row.value) + 0.008 * (study.values[-1] - study.values[0]) * offset


def _bars(results: Results, rows: list[Row]) -> Any:
    if not rows or not all(math.isfinite(row.measured.high) for row in rows):
        return None
    low = [results.study.measure.displayed(row.measured.mean - row.measured.low) for row in rows]
    high = [results.study.measure.displayed(row.measured.high - row.measured.mean) for row in rows]
    return [low, high]


def _style(results: Results, line: Line, solid: list[Line]) -> tuple[str, str]:
    """Return colour and marker of a line: those of its method, or others for further lines of the same method."""
    method = METHODS[line.method]
    number = [other for other in solid if other.method == line.method].index(line)
    return (method.colour, method.marker) if number == 0 else _FURTHER_STYLES[number - 1]
