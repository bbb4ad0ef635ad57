"""The report of a summary: `summary.csv`, and `report.html`, a page that needs no other file."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasthyper.experiments.experiment import Study, value_text
from fasthyper.experiments.figures import figure_png
from fasthyper.experiments.files import write_atomically
from fasthyper.experiments.methods import HYPERNETWORK
from fasthyper.experiments.results import Results, Row
from fasthyper.experiments.summary import Summary

REPORT_FILES = ("summary.csv", "report.html")
PACKAGE, TEMPLATE = "fasthyper.experiments", "report_template.html"


def write_report(summary: Summary, folder: Path) -> None:
    """Write both files, each completely or not at all."""
    write_atomically(folder / "summary.csv", summary_csv(summary).encode())
    write_atomically(folder / "report.html", report_html([summary]).encode())


def write_combined(summaries: Sequence[Summary], folder: Path) -> None:
    """Write one report of several comparisons."""
    write_atomically(folder / "report.html", report_html(summaries).encode())


def summary_csv(summary: Summary) -> str:
    """Return the rows of all studies in full precision: errors as fractions of 1, seconds, bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, (results, row) in enumerate((r, row) for r in summary.results for row in r.rows()):
        values = {"study": results.study.name, "axis": results.study.axis.field, **_csv_values(row)}
        if number == 0:
            writer.writerow(values)
        writer.writerow("" if isinstance(v, float) and not math.isfinite(v) else v for v in values.values())
    return text.getvalue()


def columns(study: Study) -> list[str]:
    """Return the headings of the table of a study."""
    published = ["published"] if study.published else []
    paired = ["less with the hypernetwork by"] if HYPERNETWORK in study.methods else []
    also = [heading for _, heading in study.also]
    sizes = ["N_f or N_e", "N_g or N_q", "trained in total", "steps"]
    return [
        "method",
        study.axis.field,
        study.measure.heading,
        *paired,
        *published,
        *also,
        *sizes,
        "ms per step",
        "peak KiB",
    ]


def table(results: Results) -> list[list[str]]:
    """Return the rows of the table as text, one cell for each heading of `columns`."""
    study = results.study
    cells = []
    for row in results.rows():
        published = ["" if row.published is None else f"{row.published:.3g}"] if study.published else []
        cost = (
            [""] * (6 + len(study.also))
            if row.line.dashed
            else [
                *(f"{results.mean_of(row, name):.3g}" for name, _ in study.also),
                f"{row.context_parameters:,}",
                f"{row.primary_parameters:,}",
                f"{row.trainable_parameters:,}",
                f"{row.steps:,.0f}",
                f"{row.step_seconds * 1e3:.2f}",
                f"{row.peak_temporary_bytes / 2**10:,.0f}",
            ]
        )
        paired = [_paired(results, row)] if HYPERNETWORK in study.methods else []
        cells.append([row.line.label, value_text(row.value), measured_text(results, row), *paired, *published, *cost])
    return cells


def fused_table(results: Results) -> list[list[str]]:
    """Return time and memory of the hypernetwork's steps, fused and materialised; empty if there is none.

    Columns: the value, milliseconds of both, their ratio, KiB of both.
    """
    return [
        [
            value_text(row.value),
            f"{row.fused_seconds * 1e3:.2f}",
            f"{row.materialised_seconds * 1e3:.2f}",
            f"{row.materialised_seconds / row.fused_seconds:.2f}",
            f"{row.peak_temporary_bytes / 2**10:,.0f}",
            f"{row.materialised_bytes / 2**10:,.0f}",
        ]
        for row in results.rows()
        if row.line.method == HYPERNETWORK
        and not row.line.dashed
        and row.fused_seconds is not None
        and row.materialised_seconds is not None
        and row.materialised_bytes is not None
    ]


def report_html(summaries: Sequence[Summary]) -> str:
    """Return one page about one or several comparisons, for a reader without knowledge of them."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        summaries=summaries,
        png=lambda results: base64.b64encode(figure_png(results)).decode(),
        columns=columns,
        table=table,
        fused_table=fused_table,
        settings=_settings,
        rules=_rules,
    )


def measured_text(results: Results, row: Row) -> str:
    """Return the mean and its interval as the table shows them, and how many runs diverged."""
    measure = results.study.measure
    text = row.measured.map(measure.displayed).text(".1f" if measure.percent else ".3g", "diverged")
    return f"{text}, {row.diverged} of {row.seeds} diverged" if 0 < row.diverged < row.seeds else text


def _paired(results: Results, row: Row) -> str:
    """Return how much less the hypernetwork's error is, paired by seed: a factor, or a difference."""
    if row.paired is None:
        return ""
    measure = results.study.measure
    return (
        "× " + row.paired.text(".3g", "diverged")
        if measure.log
        else row.paired.map(measure.displayed).text(".1f", "diverged")
    )


def _csv_values(row: Row) -> dict[str, Any]:
    values = asdict(row)
    line, measured, paired = (values.pop(name) for name in ("line", "measured", "paired"))
    beside = {f"paired_{name}": "" if paired is None else paired[name] for name in ("mean", "low", "high")}
    return {"method": line["method"], "measure": line["measure"], **values, **measured, **beside}


def _settings(study: Study) -> str:
    values = asdict(study.setting)
    values.pop(study.axis.field)
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())


def _rules(summary: Summary) -> list[str]:
    return list(dict.fromkeys(finding.rule for _, finding in summary.findings))
