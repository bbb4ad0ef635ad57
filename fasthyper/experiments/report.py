"""A summary made visible: the table, `summary.csv`, `errors.png` and `report.md`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from fasthyper.experiments.experiment import EMBEDDING, HYPERNETWORK, METHODS
from fasthyper.experiments.files import write_atomically
from fasthyper.experiments.summary import FLAT, Interval, Row, Summary

LABELS: Mapping[str, str] = {
    HYPERNETWORK: "hypernetwork g(x; f(I))",
    EMBEDDING: "embedding q(x, e(I))",
}
# Okabe and Ito's palette, and markers, so that neither colour blindness nor grey print merges the two.
STYLES: Mapping[str, tuple[str, str]] = {HYPERNETWORK: ("#0072B2", "o"), EMBEDDING: ("#D55E00", "s")}

REPORT_FILES = ("summary.csv", "errors.png", "report.md")

COLUMNS = (
    "method",
    "depth",
    "N_f or N_e",
    "N_g or N_q",
    "total trainable",
    "test error",
    "time per step",
    "peak temporary memory",
)


def write_report(summary: Summary, folder: Path) -> None:
    """Write the three files, each as a whole or not at all."""
    contents = (summary_csv(summary).encode(), errors_png(summary), report_markdown(summary).encode())
    for name, content in zip(REPORT_FILES, contents, strict=True):
        write_atomically(folder / name, content)


def table(summary: Summary) -> list[tuple[str, ...]]:
    """The rows of the table as text, one cell for each of `COLUMNS`."""
    return [
        (
            LABELS[row.method],
            str(row.depth),
            f"{row.context_parameters:,}",
            f"{row.primary_parameters:,}",
            f"{row.trainable_parameters:,}",
            _error(row),
            f"{row.step_seconds * 1e3:.2f} ms",
            f"{row.peak_temporary_bytes / 2**10:,.0f} KiB",
        )
        for row in summary.rows
    ]


def summary_csv(summary: Summary) -> str:
    """The rows in full precision: errors as shares of 1, seconds, bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in summary.rows:
        writer.writerow({name: "" if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(row).items()})
    return text.getvalue()


def errors_png(summary: Summary) -> bytes:
    """The test error against depth, both methods, one standard deviation over seeds as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    comparison = summary.comparison
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    depths = sorted(comparison.depths)
    for method in METHODS:
        rows = [row for row in summary.rows if row.method == method]
        colour, marker = STYLES[method]
        axes.errorbar(
            [row.depth for row in rows],
            [100 * row.error_mean for row in rows],
            yerr=None if comparison.seeds == 1 else [100 * row.error_std for row in rows],
            label=LABELS[method],
            color=colour,
            marker=marker,
            capsize=4,
        )
    chance = 100 * comparison.experiment.chance
    axes.axhline(chance, color="#666666", linestyle="--", linewidth=1, label=f"guessing ({chance:.1f} %)")
    axes.set_xticks(depths)
    axes.set_xlim(depths[0] - 0.3, depths[-1] + 0.3)
    axes.set_ylim(0, 100)
    axes.set_xlabel("depth of f and e (linear layers)")
    axes.set_ylabel("test error (%)")
    bars = "" if comparison.seeds == 1 else ", bars: one standard deviation"
    axes.set_title(f"{comparison.experiment.title}, {comparison.data}: {_seeds(comparison.seeds)}{bars}")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3)  # inside it would hide points at one depth or another
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def report_markdown(summary: Summary) -> str:
    """The whole story for someone who knows nothing of it, every number computed from the runs."""
    comparison, experiment = summary.comparison, summary.comparison.experiment
    lines = [
        f"# {experiment.title} on {comparison.data}: hypernetwork against embedding method",
        "",
        _headline(summary),
        "",
        "![Test error against depth for both methods](errors.png)",
        "",
        "## The question",
        "",
        f"{experiment.question} After {experiment.source}.",
        "",
        "## What was found",
        "",
        *(f"- {sentence}" for sentence in _at_each_depth(summary)),
        *(f"- {sentence}" for sentence in _with_depth(summary)),
        "",
        "A point is one percentage point of test error. Differences are paired: with one seed both methods"
        " see the same data in the same order. Intervals are Student's t over seeds, each on its own.",
        "",
        "| the paper's claim | here, at this budget |",
        "|---|---|",
        *(f"| {finding.claim} | **{finding.verdict}** |" for finding in summary.findings),
        "",
        "The win is reproduced when the interval of the difference lies above zero at every depth;"
        " improvement with depth when the interval of the change per added layer lies below zero;"
        f" no improvement when it leaves room for less than {100 * FLAT:g} point per layer. A claim is"
        " undecided when an interval is too wide to say either this or the contrary.",
        "",
        "## The numbers",
        "",
        _markdown_row(COLUMNS),
        _markdown_row(["---"] + ["---:"] * (len(COLUMNS) - 1)),
        *(_markdown_row(cells) for cells in table(summary)),
        "",
        "- N_f, N_e, N_q: trained parameters of f, e and q. N_g: weights that f generates.",
        "- Test error: mean ± standard deviation over seeds, after the last epoch.",
        "- Time per step: median of forward, loss, backward and update, without drawing the batch.",
        "- Peak temporary memory: of one forward and backward, without outputs and gradients.",
        "",
        "## How it was run",
        "",
        *(f"- {sentence}" for sentence in _configuration(summary)),
        *(f"- {choice}" for choice in experiment.choices),
        "",
    ]
    return "\n".join(lines)


def _headline(summary: Summary) -> str:
    rows = summary.rows
    best = {m: min((r for r in rows if r.method == m), key=lambda r: r.error_mean) for m in METHODS}
    better = sum(advantage.mean > 0 for advantage in summary.advantages.values())
    chance = 100 * summary.comparison.experiment.chance
    verdicts = " ".join(f"{finding.claim}: {finding.verdict}." for finding in summary.findings)
    return (
        f"The hypernetwork has the lower mean test error at {better} of {len(summary.advantages)} depths."
        f" At its best depth it errs on {100 * best[HYPERNETWORK].error_mean:.1f} % of the test images"
        f" (depth {best[HYPERNETWORK].depth}), the embedding method at its best on"
        f" {100 * best[EMBEDDING].error_mean:.1f} % (depth {best[EMBEDDING].depth}), guessing"
        f" on {chance:.1f} %.\n\n**The paper's claims at this budget:** {verdicts}"
    )


def _at_each_depth(summary: Summary) -> list[str]:
    errors = {(row.method, row.depth): _error(row) for row in summary.rows}
    sentences = []
    for depth, advantage in summary.advantages.items():
        wins = advantage.mean >= 0
        margin = advantage if wins else Interval(-advantage.mean, -advantage.high, -advantage.low)
        sure = "" if margin.low > 0 else ": not sure"
        sentences.append(
            f"Depth {depth}: hypernetwork {errors[HYPERNETWORK, depth]}, embedding method"
            f" {errors[EMBEDDING, depth]}. The {'hypernetwork' if wins else 'embedding method'} is better by"
            f" {_interval(margin)}{sure}."
        )
    return sentences


def _with_depth(summary: Summary) -> list[str]:
    if not summary.slopes:
        return ["One depth says nothing of how the error changes with depth."]
    sentences = []
    for method, name in ((HYPERNETWORK, "hypernetwork"), (EMBEDDING, "embedding method")):
        slope = summary.slopes[method]
        if slope.high < 0:
            trend = "falls with depth"
        elif slope.low > 0:
            trend = "rises with depth"
        else:
            trend = "shows no sure trend with depth"
        sentences.append(f"The error of the {name} {trend}: {_interval(slope, '+')} per added layer.")
    return sentences


def _configuration(summary: Summary) -> list[str]:
    comparison = summary.comparison
    setting = ", ".join(f"{name} {value}" for name, value in asdict(comparison.defaults.setting).items())
    sentences = [
        f"Data: {comparison.data}; depths {', '.join(map(str, sorted(comparison.depths)))};"
        f" {_seeds(comparison.seeds)}, numbered from 0.",
        f"SGD, learning rate {comparison.lr:g}, {comparison.epochs} epochs, batches of"
        f" {comparison.batch_size}, f and e {comparison.width} wide; {setting}.",
    ]
    for versions in summary.versions:
        sentences.append("Made with " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".")
    return sentences


def _error(row: Row) -> str:
    std = "" if math.isnan(row.error_std) else f" ± {100 * row.error_std:.1f}"
    return f"{100 * row.error_mean:.1f}{std} %"


def _interval(interval: Interval, sign: str = "") -> str:
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (interval.mean, interval.low, interval.high))
    spread = "one seed, so no interval" if math.isinf(interval.low) else f"95 % interval {low} to {high}"
    return f"{mean} points ({spread})"


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
