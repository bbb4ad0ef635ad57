"""Panels: lines with intervals, each named at its end, as SVG that a page sets in its own font and colours."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fasthyper.experiments.results import Interval, exp

SIZE = (5.4, 4.3)
"""Width and height of a panel in inches: on a screen of 390 pixels its letters are still ten pixels high."""

_NAME = 21
"""Letters of a line of a name beside a line."""

_LINE = 0.062
"""Height of this line, as a share of the panel."""

INK, GRID = "#010101", "#020202"
_STYLE: Any = {
    "font.size": 10.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "fasthyper",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass
class Series:
    """What a panel draws for one line: points `(x, interval, diverged runs)`, in displayed units."""

    label: str
    colour: str
    marker: str
    points: list[tuple[float, Interval, int]] = field(default_factory=list)
    dash: str = ""
    joined: bool = True
    strong: bool = False

    def shown(self, log: bool) -> list[tuple[float, Interval]]:
        """Return the points that have a place on the axis: on a logarithmic one, not an error of zero."""
        least, most = (1e-200, 1e200) if log else (-math.inf, math.inf)
        return [(x, i) for x, i, _ in self.points if least < i.mean < most]


@dataclass(frozen=True)
class Panel:
    """A panel: its words and scales. The first line of the subtitle says what the y axis is."""

    title: str
    subtitle: tuple[str, str]
    x_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    x_ends: tuple[float, float] | None = None
    ticks: tuple[tuple[float, str], ...] = ()
    from_zero: bool = False


@dataclass(frozen=True)
class Ratio:
    """A row of `forest`: a label before it, a note behind it."""

    label: str
    interval: Interval
    note: str = ""


def svg(panel: Panel, name: str) -> str:
    """Draw a panel. `name` keeps its ids apart from those of other panels on the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=SIZE)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.11, 0.15, 0.53, 0.655))
        for series in panel.series:
            if not series.dash:
                _draw(axes, series, panel.y_log)
        _scale(axes, panel)
        for series in panel.series:
            if series.dash:
                _draw_level(axes, series, panel.y_log)
        _name_lines(axes, panel)
        figure.text(0.01, 0.96, panel.title, fontsize=12.5, fontweight="bold", va="center")
        for place, line in zip((0.907, 0.858), panel.subtitle, strict=True):
            figure.text(0.01, place, line, fontsize=10, va="center")
        image = io.StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return _in_page(image.getvalue(), name, f"{panel.title}: {panel.subtitle[0]}; over {panel.x_label}")


def _draw(axes: Any, series: Series, log: bool) -> None:
    points = series.shown(log)
    xs, means = [x for x, _ in points], [i.mean for _, i in points]
    low = [i.mean - max(i.low, i.mean * 1e-3) if log else i.mean - i.low for _, i in points]
    high = [i.high - i.mean for _, i in points]
    bars = [[v if math.isfinite(v) else 0.0 for v in ends] for ends in (low, high)]
    line = "-" if series.joined else "none"
    style = {"linewidth": 1.5, "elinewidth": 1.1, "markersize": 6, "capsize": 3}
    if series.strong:
        style |= {"linewidth": 3.0, "elinewidth": 2.0, "markersize": 9, "zorder": 3.0}
    if series.marker == "_":
        style = {"markersize": 20, "markeredgewidth": 1.5}
    drawn = axes.errorbar(xs, means, yerr=bars, color=series.colour, marker=series.marker, linestyle=line, **style)
    for part in (*drawn[1], *drawn[2]):
        part.set_alpha(0.6)
    for x, _, diverged in series.points:
        if diverged:
            axes.plot([x], [0.985], "x", transform=axes.get_xaxis_transform(), color=series.colour, clip_on=False)


def _draw_level(axes: Any, series: Series, log: bool) -> None:
    """Draw a dashed line from one side of the panel to the other."""
    points = series.shown(log)
    ends = axes.get_xlim()
    if points:
        inner = [x for x, _ in points[1:-1]]
        means = [i.mean for _, i in points]
        means = means * 2 if len(means) == 1 else means
        axes.plot(
            [ends[0], *inner, ends[1]], means, color=series.colour, linestyle=series.dash, linewidth=1.2, zorder=1.5
        )
        axes.set_xlim(ends)


def _scale(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    if panel.y_log:
        axes.set_yscale("log")
    if limits := y_limits(panel):
        axes.set_ylim(*limits)
        if panel.y_log:
            _log_ticks(axes.yaxis, limits)
    if panel.x_log:
        axes.set_xscale("log")
    if panel.ticks:
        places, labels = zip(*panel.ticks, strict=True)
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places, labels)
        if panel.x_ends is None and (
            len(places) == 1 or not all(label.replace(",", "").replace(".", "").isdigit() for label in labels)
        ):
            axes.margins(x=0.15)
    if panel.x_ends:
        axes.set_xlim(*panel.x_ends)
    if panel.x_log and not panel.ticks:
        _log_ticks(axes.xaxis, axes.get_xlim())
    axes.set_xlabel(panel.x_label)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def y_limits(panel: Panel) -> tuple[float, float] | None:
    """Return the ends of the axis: all means, and bars as far as they do not make the means look all the same."""
    shown = [interval for series in panel.series if not far(series, panel) for _, interval in series.shown(panel.y_log)]
    if not shown:
        return None
    to, back = (math.log, exp) if panel.y_log else (float, float)
    means = [to(interval.mean) for interval in shown]
    low, high = min(means), max(means)
    room = max(high - low, 1.0 if panel.y_log else 0.3 * max(map(abs, means)))
    bars = [bar for i in shown for bar in (i.low, i.high) if bar > (0 if panel.y_log else -math.inf)]
    ends = [to(bar) for bar in bars if bar < math.inf] + means
    low, high = max(min(ends), low - room), min(max(ends), high + room)
    edge = 0.05 * (high - low) or 0.1
    return 0.0 if panel.from_zero and not panel.y_log else back(low - edge), back(high + edge)


def far(series: Series, panel: Panel) -> bool:
    """Return whether a level lies so far from all other lines of a logarithmic panel that it would make them flat."""
    if not (panel.y_log and series.dash):
        return False
    lines = [math.log(i.mean) for s in panel.series if not s.dash for _, i in s.shown(True)]
    own = [math.log(i.mean) for _, i in series.shown(True)]
    if not lines or not own:
        return False
    reach = max(0.5 * (max(lines) - min(lines)), math.log(1.5))
    return max(own) > max(lines) + reach or min(own) < min(lines) - reach


def _log_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Set few ticks, at 1, 2 and 5 times powers of ten where they fit, and write them as plain text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = limits
    decades = math.log10(high) - math.log10(low) if low > 0 and math.isfinite(high) else 1.0
    finest = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    choices: tuple[tuple[float, tuple[float, ...]], ...] = ((3, (1.0,)), (1.6, (1.0, 3.0)), (0.5, (1.0, 2.0, 5.0)))
    parts = next((parts for least, parts in choices if decades > least), finest)
    axis.set_major_locator(LogLocator(10, subs=parts))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))


def number_text(value: float) -> str:
    """Return a tick's number as text.

    Example:
        >>> number_text(0.02), number_text(5e3), number_text(2e11), number_text(1e-6)
        ('0.02', '5,000', '2·10¹¹', '10⁻⁶')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"
    factor, _, power = f"{value:.1e}".partition("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = factor.removesuffix(".0")
    return f"10{raised}" if factor == "1" else f"{factor}·10{raised}"


def rounded(value: float) -> str:
    """Return a number with two digits, enough for a sentence.

    Example:
        >>> rounded(1.436), rounded(1.0482), rounded(44487), rounded(0.04514)
        ('1.4', '1.05', '44,000', '0.045')
    """
    if not math.isfinite(value):
        return "unknown"
    return number_text(round(value, 2) if 0.9 < value < 1.1 else float(f"{value:.2g}"))


def _name_lines(axes: Any, panel: Panel) -> None:
    """Write the name of each line beside its end. Names that would overlap move apart.

    A thin line leads from the name to an end that is near. The name of a level outside the panel has its number.
    """
    to_place = axes.transData + axes.transAxes.inverted()
    named = []
    for series in panel.series:
        shown = [(x, i.mean) for x, i in series.shown(panel.y_log) if math.isfinite(i.mean)]
        x, y = to_place.transform(max(shown)) if shown else (1.0, 0.0)
        label = series.label if shown else f"{series.label}: diverged"
        if far(series, panel):
            label = f"{'↑' if y > 1 else '↓'} {rounded(max(shown)[1])}: {label}"
        words = "\n".join(textwrap.wrap(label, _NAME))
        named.append((series, 1.0 if series.dash else float(x), min(max(float(y), 0.0), 1.0), words, bool(shown)))
    named.sort(key=lambda item: item[2])
    heights = [_LINE * (1 + words.count("\n")) for *_, words, _ in named]
    places = spread([y for _, _, y, *_ in named], heights)
    for (series, x, y, words, any_shown), place in zip(named, places, strict=True):
        if any_shown and series.marker != "_" and x > 0.85 and not far(series, panel):
            axes.plot(
                [x, 1.03], [y, place], transform=axes.transAxes, color=GRID, linewidth=0.8, clip_on=False, zorder=0.5
            )
        key = {"color": series.colour, "transform": axes.transAxes, "clip_on": False}
        if series.dash:
            axes.plot([1.03, 1.075], [place, place], linestyle=series.dash, linewidth=1.2, **key)
        else:
            size = 9 if series.strong else 7
            axes.plot([1.05], [place], marker=series.marker, markersize=size, linestyle="none", **key)
        weight = "bold" if series.strong else "normal"
        axes.text(
            1.09, place, words, transform=axes.transAxes, va="center", fontsize=9.5, fontweight=weight, linespacing=1.15
        )


def spread(places: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move sorted places of words apart, each as little as possible, into the panel, from 0 to 1, if they fit.

    Args:
        places: where the middle of each word should be.
        heights: of the words.

    Example:
        >>> [round(place, 2) for place in spread([0.5, 0.5, 0.9], [0.1, 0.1, 0.1])]
        [0.45, 0.55, 0.9]
    """
    gaps = [0.0, *itertools.accumulate((a + b) / 2 for a, b in itertools.pairwise(heights))]
    groups: list[list[float]] = []  # of sorted places without the gaps before them
    for place, gap in zip(places, gaps, strict=True):
        groups.append([place - gap])
        while len(groups) > 1 and sum(groups[-2]) / len(groups[-2]) > sum(groups[-1]) / len(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    level = [sum(group) / len(group) for group in groups for _ in group]
    highest = 1 + 0.5 * (_LINE - heights[-1]) - gaps[-1]
    return [max(min(value, highest), min(highest, 0.0)) + gap for value, gap in zip(level, gaps, strict=True)]


def _in_page(image: str, name: str, words: str) -> str:
    """Return an SVG for a page: without a header, with ids of its own, and colours that the page may replace."""
    image = image[image.index("<svg") :]
    image = image.replace("xlink:href", "href")
    image = re.sub(r"<metadata>.*?</metadata>", "", image, flags=re.DOTALL)
    image = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", image, count=1)
    image = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", image)
    image = re.sub(r"(fill|stroke): #([0-9a-f]{6})", r"\1: var(--c\2, #\2)", image)
    image = re.sub(r"font: (?:(\w+) )?([0-9.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", image)
    image = image.replace("font-weight: ; ", "")
    image = re.sub(r"font-family: [^;\"]*;? ?", "", image)
    words = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return image.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)


def forest(title: str, subtitle: str, x_label: str, groups: Sequence[tuple[str, Sequence[Ratio]]], name: str) -> str:
    """Draw ratios with their intervals, one below the other in groups with a heading; 1 is marked. Returns SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    count = sum(1 + len(ratios) for _, ratios in groups)
    width, height = SIZE[0], 1.15 + 0.245 * count
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.13, 0.55 / height, 0.56, 1 - 1.1 / height))
        place, ticks = 0, []
        series = Series("", "#0072b2", "o")
        for heading, ratios in groups:
            axes.text(0.0, place, heading, transform=axes.get_yaxis_transform(), va="center", fontweight="bold")
            for ratio in ratios:
                place += 1
                ticks.append((place, ratio.label))
                axes.text(1.03, place, ratio.note, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5)
                for _, shown in Series("", "", "", [(0.0, ratio.interval, 0)]).shown(True):
                    colour = "#0072B2" if shown.high < 1 else "#D55E00" if shown.low > 1 else "#7F7F7F"
                    ends = [min(max(end, 1e-200), 1e200) for end in (shown.low, shown.high)]
                    axes.plot(ends, [place, place], color=colour, linewidth=1.6)
                    axes.plot([shown.mean], [place], marker="o", color=colour, markersize=7)
                    series.points.append((0.0, shown, 0))
            axes.plot([1, 1], [place - len(ratios) + 0.5, place + 0.5], color=INK, linewidth=1.2, zorder=1.5)
            place += 1
        axes.set_xscale("log")
        series.points.append((0.0, Interval(1, 1, 1), 0))
        limits = y_limits(Panel("", ("", ""), "", [series], y_log=True))
        assert limits is not None
        axes.set_xlim(*limits)
        _log_ticks(axes.xaxis, limits)
        axes.set_ylim(place - 0.4, -0.7)
        axes.set_yticks([n for n, _ in ticks], [label for _, label in ticks])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)
        figure.text(0.01, 1 - 0.16 / height, title, fontsize=12, fontweight="bold", va="center")
        figure.text(0.01, 1 - 0.38 / height, subtitle, fontsize=10, va="center")
        image = io.StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return _in_page(image.getvalue(), name, title)
