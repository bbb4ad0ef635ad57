"""The figures of a file of results. Their titles have device, commit and date."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from itertools import product
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from .analysis import TOLERANCE, Results, Subject, common_loss, loss_curves, position
from .formatting import MIB, digits, mib
from .records import COPY, FORWARD_BACKWARD, PRODUCT, Record, layers, quartiles
from .roofline import flops, intensity

DPI = 110
OURS, LOSS, ROOF = "#1f5fa8", "#c8501e", "#555555"
COLOURS = ("#e08214", "#1a9850", "#b2478f", "#8c6d31", "#17a3b8", "#d73027", "#7f7f7f")
VARIANTS = ("#74add1", "#5e4fa2", "#66c2a5", "#abd9e9")
MARKERS = {"forward": "^", FORWARD_BACKWARD: "o", "training step": "s"}
DTYPES = {"float32": OURS, "bfloat16": "#7b3fa0", "float16": "#2a8f6d"}
OUT_OF_MEMORY = "out of memory"


def _figure(results: Results, title: str, width: float, height: float) -> Figure:
    """Return an empty figure with its title, its context and the footnotes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    letters = int(width * 14)
    lines = [line for text in (results.headline, *results.footnotes) for line in textwrap.wrap(text, letters)]
    figure.suptitle("\n".join([title, *lines]), x=0.01, ha="left", fontsize=10)
    return figure


def _plain(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, as many as its range has room for."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 0.9 else (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    axis.set_major_locator(FixedLocator([step * 10.0**power for power in powers for step in steps]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:.4g}")


def _style(dtype: str, mode: str) -> dict[str, Any]:
    """Return the marker of a dtype and a mode."""
    face = "white" if dtype == "float32" else None
    colour = DTYPES.get(dtype, ROOF)
    return {"linestyle": "", "marker": MARKERS.get(mode, "d"), "color": colour, "markerfacecolor": face}


def speedups(records: Iterable[Record]) -> Figure:
    """Draw speed-ups over the best peer: bars for forward + backward in float32, markers for other modes and dtypes."""
    results = Results(records)
    rows: dict[str, dict[tuple[str, str], Subject]] = {}
    for subject in results.select("workloads"):
        if subject.speed_up:
            row = rows.setdefault(results.label(subject, marked=False), {})
            row[subject.record.dtype, subject.record.mode] = subject
    figure = _figure(results, "Speed-up over the best peer", 10, 1.6 + 0.24 * len(rows))
    axes = figure.add_subplot()
    main = ("float32", FORWARD_BACKWARD)
    seen: set[tuple[str, str]] = set()
    for y, row in enumerate(rows.values()):
        for key, subject in row.items():
            value = subject.speed_up or 1.0
            if key == main:
                colour = OURS if value >= 1 else LOSS
                axes.barh(y, value - 1, left=1, height=0.66, color=colour, alpha=0.75, zorder=2)
                text = f"{value:.2f}  {subject.best_peer.way if subject.best_peer else ''}"
                axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            else:
                seen.add(key)
                axes.plot(value, y, markersize=4.5, zorder=3, **_style(*key))
    axes.axvline(1, color="black", linewidth=1, zorder=4)
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    marks = [results.mark(*row.values()) for row in rows.values()]
    axes.set_yticks(range(len(rows)), [f"{name}{mark}" for name, mark in zip(rows, marks, strict=True)], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("best peer's time / fasthyper's;  right: forward + backward in float32, and its best peer")
    handles = [Line2D([], [], color=OURS, linewidth=6, alpha=0.75, label="float32, forward + backward")]
    for dtype, mode in (key for key in results.modes if key in seen):
        handles.append(Line2D([], [], label=f"{dtype}, {mode}", **_style(dtype, mode)))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def axis_title(record: Record) -> str:
    """Return the size that grows and the fixed sizes."""
    sizes = [f"{name} = {getattr(record, name):,}" for name in "BNR" if name != record.axis]
    return f"Along {record.axis}: {', '.join(sizes + [layers(record)] * (record.axis != 'width'))}"


def scaling(records: Iterable[Record]) -> Figure:
    """Draw time and memory along each axis: fasthyper with the planner's choices, each schedule, and the peers."""
    results = Results(records)
    columns = max(1, max(sum(key[0] == dtype for key in results.curves) for dtype in results.dtypes))
    dtypes = [dtype for dtype in results.dtypes if any(key[0] == dtype for key in results.curves)]
    height = 6.6 * len(dtypes)
    figure = _figure(results, "Time and memory as the sizes grow", max(7.0, 3.4 * columns), height)
    grid = figure.subplots(2 * len(dtypes), columns, squeeze=False)
    names = list(dict.fromkeys(r.way for s in results.select("scaling") for r in s.peers))
    forced = list(dict.fromkeys(r.way for s in results.select("scaling") for r in s.variants))
    styles = {name: (COLOURS[i % len(COLOURS)], "-") for i, name in enumerate(names)}
    styles |= {name: (VARIANTS[i % len(VARIANTS)], "--") for i, name in enumerate(forced)}
    for block, dtype in enumerate(dtypes):
        curves = [(key, curve) for key, curve in results.curves.items() if key[0] == dtype]
        for column in range(columns):
            above, below = grid[2 * block][column], grid[2 * block + 1][column]
            if column >= len(curves):
                above.set_visible(False)
                below.set_visible(False)
                continue
            (_, axis), curve = curves[column]
            _curves(above, curve, styles, time=True)
            _curves(below, curve, styles, time=False)
            above.set_title(axis_title(curve[0].record).replace(": ", "\n"), fontsize=9)
            below.set_xlabel("width, I = O" if axis == "width" else axis, fontsize=9)
            for axes in (above, below):
                points = {position(s.record): f"{position(s.record):,}{results.mark(s)}" for s in curve}
                axes.set_xticks(list(points), _thinned(list(points.values())), fontsize=7)
                axes.set_xticks([], minor=True)
        grid[2 * block][0].set_ylabel(f"{curves[0][1][0].record.mode}, {dtype}\nms", fontsize=9)
        grid[2 * block + 1][0].set_ylabel("temporary memory, MiB", fontsize=9)
    handles = [
        Line2D([], [], color=OURS, linewidth=2.6, marker="o", markersize=4, label="fasthyper, the planner's choice")
    ]
    handles += [Line2D([], [], color=c, linestyle=line, linewidth=1.2, label=n) for n, (c, line) in styles.items()]
    handles.append(Line2D([], [], color=ROOF, linestyle=":", marker="x", label=OUT_OF_MEMORY))
    handles.append(
        Line2D([], [], color=LOSS, linestyle="", marker="o", markersize=9, markerfacecolor="none",
               label=f"slower than {TOLERANCE:.2f} × the best schedule")
    )  # fmt: skip
    handles.append(Line2D([], [], linestyle="", label="f, g, p: fold, generate, project; forward/backward"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _thinned(labels: list[str]) -> list[str]:
    """Return the labels, some of them emptied if they are too many; the last one stays."""
    step = math.ceil(sum(map(len, labels)) / 34)
    return [text if (len(labels) - 1 - i) % step == 0 else "" for i, text in enumerate(labels)]


def _curves(axes: Axes, curve: list[Subject], styles: dict[str, tuple[str, str]], time: bool) -> None:
    """Draw all ways along an axis: times in ms, or memory in MiB."""

    def value(record: Record | None) -> float | None:
        if record is None:
            return None
        measured = record.median if time else record.temporary
        return None if not measured else measured * 1e3 if time else measured / MIB

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    failures = 0
    for name, (colour, line) in styles.items():
        ways = [(position(s.record), s.way(name)) for s in curve]
        points = [(x, y) for x, record in ways if (y := value(record)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=1.2, marker=".", markersize=3)
        end = next((x for x, r in ways if r is not None and r.note.startswith(OUT_OF_MEMORY)), None)
        if end is not None:
            failures += 1
            height = 0.97 - 0.055 * failures
            coordinates: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "data"}
            if points:
                arrow = {"arrowstyle": "-", "linestyle": ":", "color": colour}
                axes.annotate("", (end, height), xytext=points[-1], arrowprops=arrow, **coordinates)
            axes.plot(end, height, "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False, zorder=5)
            if failures == 1:
                axes.annotate(
                    OUT_OF_MEMORY, (end, height), xycoords=coordinates["xycoords"], xytext=(-6, 0),
                    textcoords="offset points", ha="right", va="center", fontsize=7, color=colour,
                )  # fmt: skip
    ours = [(position(s.record), y, s) for s in curve if (y := value(s.ours)) is not None]
    if ours:
        axes.plot(
            [x for x, *_ in ours], [y for _, y, _ in ours], "o-", color=OURS, linewidth=2.6, markersize=4, zorder=4
        )
    for x, y, s in ours if time else []:
        if s.planner_ratio is not None and s.planner_ratio > TOLERANCE:
            axes.plot(x, y, "o", color=LOSS, markersize=9, markerfacecolor="none", zorder=5)
        letters = _letters(s.ours.plan if s.ours else "")
        axes.annotate(letters, (x, y), xytext=(0, -12), textcoords="offset points", ha="center", fontsize=7, color=OURS)
    axes.grid(color="#e4e4e4", linewidth=0.5)
    axes.tick_params(labelsize=7)
    axes.margins(y=0.16)
    if failures:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.12 + 0.06 * failures))
    _plain(axes.yaxis)


def _letters(plan: str) -> str:
    """Return the first letters of the schedules forward and backward, one letter if they are the same."""
    return "/".join(dict.fromkeys(schedule.strip()[:1] for schedule in plan.split("/")))


class Dot(NamedTuple):
    """A workload in the roofline."""

    number: int
    x: float
    y: float


def roofline(records: Iterable[Record]) -> Figure:
    """Draw achieved flop/s over intensity, under the machine's ceilings; one panel per dtype."""
    results = Results(records)
    subjects = [s for s in results.select("workloads") if s.seconds]
    numbers: dict[str, int] = {}
    for s in subjects:
        numbers.setdefault(results.label(s, marked=False), len(numbers) + 1)
    by_number: dict[int, list[Subject]] = {}
    for s in subjects:
        by_number.setdefault(numbers[results.label(s, marked=False)], []).append(s)
    marks = {number: results.mark(*group) for number, group in by_number.items()}
    dtypes = list(dict.fromkeys(s.record.dtype for s in subjects)) or ["float32"]
    figure = _figure(results, "Achieved flop/s under the machine's ceilings", 10.5, 1.0 + 5.4 * len(dtypes))
    panels = figure.subplots(len(dtypes), 2, squeeze=False, width_ratios=(3.2, 1))
    dots: list[tuple[Axes, list[Dot]]] = []
    for row, dtype in enumerate(dtypes):
        axes, beside = panels[row]
        dots.append((axes, _panel(axes, results, [s for s in subjects if s.record.dtype == dtype], numbers, dtype)))
        beside.set_axis_off()
        if row == 0:
            names = [f"{number}  {name}{marks[number]}" for name, number in numbers.items()]
            beside.text(0, 1, "\n".join(names), va="top", fontsize=7.5, linespacing=1.25, transform=beside.transAxes)
    grey: dict[str, Any] = {"color": "#999999", "linestyle": ""}
    blank: dict[str, Any] = {"color": OURS, "linestyle": "", "markerfacecolor": "white", "markersize": 4}
    handles = [
        Line2D([], [], color=OURS, linestyle="", marker="o", label="fasthyper, forward + backward"),
        Line2D([], [], marker="^", label="forward", **blank),
        Line2D([], [], marker="s", label="training step", **blank),
        Line2D([], [], marker="x", markersize=4, label="best peer, forward + backward", **grey),
        Line2D([], [], color=ROOF, label="measured ceilings (median; band: quartiles)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.draw_without_rendering()  # fixes the positions that `_numbered` reads
    figure.set_layout_engine("none")
    for axes, points in dots:
        _numbered(axes, points)
    return figure


def _panel(axes: Axes, results: Results, subjects: list[Subject], numbers: dict[str, int], dtype: str) -> list[Dot]:
    """Draw the ceilings and the points of a dtype."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    dots = []
    for s in subjects:
        x, work = intensity(s.record), flops(s.record) / 1e9
        y = work / (s.seconds or math.inf)
        if s.record.mode != FORWARD_BACKWARD:
            marker = MARKERS.get(s.record.mode, "d")
            axes.plot(x, y, marker, color=OURS, alpha=0.55, markerfacecolor="white", markersize=3.5, zorder=2)
            continue
        axes.plot(x, y, "o", color=OURS, markersize=5, zorder=4)
        dots.append(Dot(numbers[results.label(s, marked=False)], x, y))
        if s.best_peer and s.best_peer.median:
            axes.plot(x, work / s.best_peer.median, "x", color="#999999", markersize=4, zorder=3)
    low, high = axes.get_xlim()
    measured = ""
    products, copies = ([rate / 1e9 for rate in results.rates(way, dtype)] for way in (PRODUCT, COPY))
    if products and copies:
        xs = [10 ** (math.log10(low) + i / 200 * math.log10(high / low)) for i in range(201)]
        ends = [quartiles(r) for r in (products, copies)]
        roofs = [[min(ends[0][q], x * ends[1][q]) for x in xs] for q in range(3)]
        axes.plot(xs, roofs[1], color=ROOF, linewidth=1.4, zorder=1)
        axes.fill_between(xs, roofs[0], roofs[2], color=ROOF, alpha=0.15, linewidth=0, zorder=0)
        measured = f": {PRODUCT} {median(products):,.0f} Gflop/s, {COPY} {median(copies):,.0f} GB/s"
    axes.set_title(f"{dtype}{measured}", loc="left", fontsize=10)
    axes.set_xlim(low, high)
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.set_xlabel("flop / compulsory byte", fontsize=9)
    axes.set_ylabel("Gflop/s", fontsize=9)
    axes.grid(color="#eeeeee", linewidth=0.5, zorder=0)
    axes.tick_params(labelsize=8)
    return dots


def _numbered(axes: Axes, dots: list[Dot]) -> None:
    """Write each point's number where it covers no other number and few points, with a line to the point."""
    pixels = axes.figure.dpi / 72
    places = [axes.transData.transform((dot.x, dot.y)) for dot in dots]
    box = axes.get_window_extent()
    taken: list[tuple[float, float]] = []
    for dot, (px, py) in sorted(zip(dots, places, strict=True), key=lambda one: -one[1][1]):
        best, offset = math.inf, (0.0, 0.0)
        for radius, turn in product((10, 16, 23, 31, 40), range(16)):
            dx, dy = radius * math.cos(turn * math.pi / 8), radius * math.sin(turn * math.pi / 8)
            x, y = px + dx * pixels, py + dy * pixels
            hits = sum(abs(x - a) < 13 * pixels and abs(y - b) < 9 * pixels for a, b in taken)
            covers = sum(abs(x - a) < 8 * pixels and abs(y - b) < 7 * pixels for a, b in places)
            outside = not (box.x0 + 8 < x < box.x1 - 8 and box.y0 + 8 < y < box.y1 - 8)
            cost = 100 * hits + 10 * covers + 1000 * outside + radius / 4
            if cost < best:
                best, offset = cost, (dx, dy)
        taken.append((px + offset[0] * pixels, py + offset[1] * pixels))
        axes.annotate(
            str(dot.number), (dot.x, dot.y), xytext=offset, textcoords="offset points", ha="center", va="center",
            fontsize=7.5, zorder=6, arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#888888", "shrinkA": 3},
        )  # fmt: skip


def training(records: Iterable[Record]) -> Figure:
    """Draw the least loss so far over seconds of training, one line per way, and the loss that all reach."""
    results = Results(records)
    subjects = [(s, curves) for s in results.select("training") if (curves := loss_curves(s))]
    columns = max(1, min(3, len(subjects)))
    rows = max(1, math.ceil(len(subjects) / columns))
    figure = _figure(
        results, "Training, with weights written out and without", max(7.0, 4.4 * columns), 0.9 + 3.4 * rows
    )
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (subject, curves), axes in zip(subjects, panels, strict=False):
        target = common_loss(curves)
        for curve, colour in zip(curves, (OURS, *COLOURS * len(curves)), strict=False):
            seconds, losses = zip(*curve.points, strict=True)
            reached = curve.seconds_to(target)
            memory = "" if curve.temporary is None else f", {mib(curve.temporary)} MiB at most"
            text = f"{curve.way}: {digits(reached)} s{memory}"
            axes.plot(seconds, losses, color=colour, linewidth=2.2 if colour == OURS else 1.4, label=text)
            axes.plot(reached, target, "o", color=colour, markersize=5)
        axes.axhline(target, color=ROOF, linewidth=0.8, linestyle=":")
        name = f"{subject.record.workload}{results.mark(subject)}, {subject.record.dtype}"
        axes.set_title(f"{name}; dots: {target:.3g}, which all reach", fontsize=9, loc="left")
        losses = [loss for curve in curves for _, loss in curve.points]
        if min(losses) > 0 and max(losses) > 8 * min(losses):
            axes.set_yscale("log")
            _plain(axes.yaxis)
        axes.set_xlabel("seconds", fontsize=9)
        axes.set_ylabel("least loss so far", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    for axes in list(panels):
        axes.set_visible(False)
    return figure
