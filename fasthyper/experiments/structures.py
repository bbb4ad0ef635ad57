"""The structures of tasks, a row of the page that answers each: how methods compare at the sizes of a frontier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fasthyper.experiments.experiment import Line
from fasthyper.experiments.methods import HYPERNETWORK
from fasthyper.experiments.outcome import error_text, listed, name, times
from fasthyper.experiments.report import PAGE_FILE as REPORT_PAGE
from fasthyper.experiments.report import anchor
from fasthyper.experiments.results import Results
from fasthyper.experiments.standing import Standing, frontiers, nearest_to_one
from fasthyper.experiments.summary import Summary


@dataclass(frozen=True)
class Structure:
    """A row of the table: one frontier."""

    summary: Summary
    results: Results

    @property
    def label(self) -> str:
        """The structure in words."""
        return self.results.study.structure

    @property
    def short(self) -> str:
        """A name for sentences: that of the experiment, or the first words of the structure if it has several."""
        own = list(frontiers(self.summary))
        first = re.split("[,:]", self.label)[0]
        return first if len(own) > 1 else self.summary.comparison.experiment.name

    @property
    def heading(self) -> str:
        """The short name with what the structure says first."""
        first = self.label.split(":")[0]
        return first if first.startswith(self.short) else f"{self.short}: {first}"

    @property
    def link(self) -> str:
        """The address of the evidence, seen from the folder of all results."""
        return f"{self.summary.comparison.experiment.name}/{REPORT_PAGE}#{anchor(self.results.study)}"

    @cached_property
    def standings(self) -> dict[float, Standing]:
        """How the methods compare at each size at which the hypernetwork and another method have an error."""
        found = {value: Standing(self.results, value) for value in self.results.study.values}
        return {value: s for value, s in found.items() if HYPERNETWORK in s.rows and s.other}

    @property
    def lost(self) -> dict[float, str]:
        """The methods whose runs all diverged, in words, at each size that has no standing for that reason."""
        sizes = (value for value in self.results.study.values if value not in self.standings)
        return {value: _lost(Standing(self.results, value)) for value in sizes}

    @property
    def is_lost(self) -> bool:
        """Whether all runs of the hypernetwork diverged, at all sizes."""
        return not any(HYPERNETWORK in Standing(self.results, value).rows for value in self.results.study.values)

    @cached_property
    def at_equal_totals(self) -> Standing:
        """How they compare at the reference total, or near it."""
        return self.standings[nearest_to_one(self.standings)]

    @property
    def is_matched(self) -> bool:
        """Whether another method of any size has at most the hypernetwork's error and its flops of training."""
        own = self.at_equal_totals.rows[HYPERNETWORK]
        rows = (row for row in self.results.rows() if row.line.measure == own.line.measure and not row.line.dashed)
        others = (row for row in rows if row.line.method != HYPERNETWORK)
        return any(o.training_flops <= own.training_flops and o.measured.mean <= own.measured.mean for o in others)

    @property
    def baseline(self) -> str:
        """The error to go below at the reference total, or near it, such as that of the best constant; may be empty."""
        study = self.results.study
        if study.baseline is None:
            return ""
        level, label = study.baseline
        error = self.results.measured(Line(study.methods[0], level, level), nearest_to_one(study.values)).mean
        return f"{label}: {error_text(self.results, error)}"


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        best: the method of least error, with this error.
        details: the methods that are not clearly worse, and the factor between the hypernetwork and the best other.
        with_hypernetwork: whether the hypernetwork is the best, or not clearly worse.
    """

    best: str
    details: tuple[str, ...]
    with_hypernetwork: bool


def structures(summaries: Sequence[Summary]) -> list[Structure]:
    """Return the frontiers of comparisons that have the hypernetwork, and an error of any method."""
    found = [Structure(summary, results) for summary in summaries for results in frontiers(summary)]
    return [structure for structure in found if HYPERNETWORK in structure.results.study.methods]


def cell(standing: Standing) -> Cell:
    """Return the cell of a standing."""
    first, *tied = standing.best
    assert standing.other is not None
    method, over = (standing.other, first) if first == HYPERNETWORK else (HYPERNETWORK, first)
    error = error_text(standing.results, standing.rows[first].measured.mean)
    details = [f"{name(method).removeprefix('the ')}: {times(standing.ratio(method, over), 'this error')}"]
    if tied:
        details.insert(0, f"not clearly worse: {listed([name(m).removeprefix('the ') for m in tied])}")
    return Cell(f"{name(first).removeprefix('the ')}, {error}", tuple(details), HYPERNETWORK in standing.best)


def _lost(standing: Standing) -> str:
    if HYPERNETWORK not in standing.rows:
        return "the hypernetwork" if standing.rows else "all methods"
    return "all methods but the hypernetwork"
