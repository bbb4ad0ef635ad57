"""The report of a summary: `summary.csv`, and `report.html`, a page that needs no other file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasthyper.experiments.experiment import MEASURED, UNMET, Finding, Study, value_text
from fasthyper.experiments.figures import panels, short_name
from fasthyper.experiments.files import write_atomically
from fasthyper.experiments.methods import HYPERNETWORK, METHODS
from fasthyper.experiments.outcome import certainty, outcome
from fasthyper.experiments.rates import Rate, is_tuned
from fasthyper.experiments.results import Results, Row
from fasthyper.experiments.summary import Summary

CSV_FILE, PAGE_FILE = REPORT_FILES = ("summary.csv", "report.html")
PACKAGE, TEMPLATE = "fasthyper.experiments", "report_template.html"
_SIGNS = {"yes": "✓", "no": "✗", "open": "?"}


def write_report(summary: Summary, folder: Path) -> None:
    """Write both files, each completely or not at all."""
    write_atomically(folder / CSV_FILE, summary_csv(summary).encode())
    write_atomically(folder / PAGE_FILE, report_html(summary).encode())


def summary_csv(summary: Summary) -> str:
    """Return the rows of all studies in full precision: errors as fractions of 1, seconds, bytes.

    `ratio` is the error over the hypernetwork's, the geometric mean over seeds, also where `paired` is a difference.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, (results, row) in enumerate((r, row) for r in summary.results for row in r.rows()):
        values = {"study": results.study.name, "axis": results.study.axis.field, **_csv_values(results, row)}
        if number == 0:
            writer.writerow(values)
        writer.writerow("" if isinstance(v, float) and not math.isfinite(v) else v for v in values.values())
    return text.getvalue()


def columns(study: Study) -> list[str]:
    """Return the headings of the table of a study."""
    published = ["published"] if study.published else []
    beside = "error / hypernetwork's" if study.measure.log else "error - hypernetwork's"
    paired = [beside] if HYPERNETWORK in study.methods else []
    also = [heading for _, heading in study.also]
    sizes = ["N_f or N_e", "N_g or N_q", "trained in total", "steps", "flops"]
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
        "diverged",
    ]


def table(results: Results) -> list[list[str]]:
    """Return the rows of the table as text, one cell for each heading of `columns`."""
    study = results.study
    cells = []
    for row in results.rows():
        published = ["" if row.published is None else f"{row.published:.3g}"] if study.published else []
        cost = (
            [""] * (8 + len(study.also))
            if row.line.dashed
            else [
                *(f"{results.mean_of(row, name):.3g}" for name, _ in study.also),
                f"{row.context_parameters:,}",
                f"{row.primary_parameters:,}",
                f"{row.trainable_parameters:,}",
                f"{row.steps:,.0f}",
                f"{row.training_flops:.2e}",
                f"{row.step_seconds * 1e3:.2f}",
                f"{row.peak_temporary_bytes / 2**10:,.0f}",
                str(row.diverged or ""),
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


@dataclass(frozen=True)
class Claims:
    """The findings of a page, by kind: tested, not tested for want of a premise, measured without a verdict."""

    judged: tuple[tuple[Study, Finding], ...]
    unmet: tuple[tuple[Study, Finding], ...]
    measured: tuple[tuple[Study, Finding], ...]

    @classmethod
    def of(cls, found: Sequence[tuple[Study, Finding]]) -> Claims:
        """Divide findings by kind."""
        return cls(
            tuple(pair for pair in found if pair[1].verdict not in (UNMET, MEASURED)),
            tuple(pair for pair in found if pair[1].verdict == UNMET),
            tuple(pair for pair in found if pair[1].verdict == MEASURED),
        )

    @property
    def counts(self) -> str:
        """How many claims have each verdict."""
        found = Counter(finding.verdict for _, finding in self.judged)
        return ", ".join(f"{verdict} ({count})" for verdict, count in found.most_common())


def report_html(summary: Summary) -> str:
    """Return the page of one comparison, for a reader without knowledge of it."""
    return render(
        TEMPLATE,
        summary=summary,
        sentences=outcome(summary),
        certainty=certainty(summary),
        claims=Claims.of(summary.findings),
        figure=panels,
        anchor=anchor,
        columns=columns,
        table=table,
        fused_table=fused_table,
        diverged=diverged,
        settings=_settings,
        is_tuned=is_tuned,
        rules=_rules,
        p_text=p_text,
        sign=sign,
        rates=rates_table,
        edges=sum(rate.at_edge for rate in summary.rates),
        compared=any({HYPERNETWORK} < set(results.study.methods) for results in summary.results),
    )


def render(template: str, **names: Any) -> str:
    """Return a page: a template of this package, filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**names)


def anchor(study: Study) -> str:
    """Return the id of a study's section in the page of its experiment."""
    return re.sub(r"\W+", "-", f"study {study.name}")


def sign(verdict: str) -> dict[str, str]:
    """Return the sign before a verdict, and its kind: yes, no or open.

    Example:
        >>> sign("not reproduced"), sign("undecided")["sign"]
        ({'kind': 'no', 'sign': '✗'}, '?')
    """
    kind = {"reproduced": "yes", "holds": "yes"}.get(verdict, "no" if "not" in verdict else "open")
    return {"kind": kind, "sign": "–" if verdict == UNMET else "=" if verdict == MEASURED else _SIGNS[kind]}


def p_text(finding: Finding) -> str:
    """Return the adjusted p of a finding as text; empty if it has none, or if its premise is not met."""
    p = None if finding.verdict == UNMET else finding.adjusted
    return "" if p is None or math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def diverged(results: Results) -> list[str]:
    """Return, in words, where runs diverged and how many."""
    axis = results.study.axis.field.replace("_", " ")
    return [
        f"{short_name(row.line.label)} at {axis} {value_text(row.value)}: {row.diverged} of {row.seeds}"
        for row in results.rows()
        if row.diverged
    ]


def rates_table(summary: Summary) -> list[list[str]]:
    """Return the chosen learning rates as text: study, method, value, optimizer, the rate, the errors of the grid."""
    by_name = {results.study.name: results.study for results in summary.results}

    def errors(rate: Rate) -> str:
        measure = by_name[rate.study].measure if rate.study in by_name else None
        shown = {
            lr: "diverged" if not math.isfinite(e) else f"{measure.displayed(e) if measure else e:.3g}"
            for lr, e in sorted(rate.errors.items())
        }
        return "; ".join(f"{lr:.3g}: {text}" for lr, text in shown.items())

    return [
        [
            rate.study,
            short_name(METHODS[rate.method].label),
            value_text(rate.value),
            rate.optimizer,
            f"{rate.lr:.3g}" + (" ⚠ edge" if rate.at_edge else ""),
            errors(rate),
        ]
        for rate in summary.rates
    ]


def measured_text(results: Results, row: Row) -> str:
    """Return the mean and its interval as the table shows them, and how many runs diverged."""
    measure = results.study.measure
    text = row.measured.map(measure.displayed).text(".1f" if measure.percent else ".3g", "diverged")
    return f"{text}, {row.diverged} of {row.seeds} diverged" if 0 < row.diverged < row.seeds else text


def _paired(results: Results, row: Row) -> str:
    """Return how much less the hypernetwork's error is, paired by seed: a factor, or a difference."""
    measure = results.study.measure
    if row.paired is None:
        return ""
    if measure.log:
        return "× " + row.paired.text(".3g", "diverged")
    return row.paired.map(measure.displayed).text(".1f", "diverged")


def _csv_values(results: Results, row: Row) -> dict[str, Any]:
    values = asdict(row)
    line, measured, paired = (values.pop(name) for name in ("line", "measured", "paired"))
    ratio = None if paired is None else asdict(results.ratio(row.line.key, HYPERNETWORK, row.value))
    compared = {
        f"{of}_{name}": (found or {}).get(name, "")
        for of, found in (("paired", paired), ("ratio", ratio))
        for name in measured
    }
    return {"method": line["method"], "measure": line["measure"], **values, **measured, **compared}


def _settings(study: Study) -> str:
    values = asdict(study.setting)
    values.pop(study.axis.field)
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())


def _rules(summary: Summary) -> list[str]:
    return list(dict.fromkeys(finding.rule for _, finding in summary.findings))
