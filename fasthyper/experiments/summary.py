"""What the runs of a comparison say: means, paired differences, trends, the fate of the paper's claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fasthyper.experiments.experiment import EMBEDDING, HYPERNETWORK, METHODS, Comparison
from fasthyper.experiments.store import Record

FLAT = 0.01
"""Error per layer below which a change is called none: one percentage point."""

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t), unbounded with a single seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of the mean of independent values.

        Example:
            >>> Interval.of([1.0, 2.0, 3.0])
            Interval(mean=2.0, low=-0.484..., high=4.484...)
        """
        from scipy import stats

        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf)
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * error
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Row:
    """One method at one depth, over its seeds: the columns of the table."""

    method: str
    depth: int
    seeds: int
    context_parameters: int
    primary_parameters: int
    trainable_parameters: int
    error_mean: float
    error_std: float
    """Sample standard deviation (n - 1); NaN with one seed."""
    step_seconds: float
    """Median over seeds of each run's median."""
    peak_temporary_bytes: int


@dataclass(frozen=True)
class Finding:
    """One claim of the paper and what these runs say to it."""

    claim: str
    verdict: str


@dataclass(frozen=True)
class Summary:
    """All that the table, the picture and the report show."""

    comparison: Comparison
    rows: list[Row]
    advantages: Mapping[int, Interval]
    """By depth: the embedding method's error minus the hypernetwork's, paired by seed."""
    slopes: Mapping[str, Interval]
    """By method: least-squares change of the error per added layer, seed by seed; empty with one depth."""
    findings: list[Finding]
    versions: list[Mapping[str, str]]
    """The different sets of versions that the runs were made with."""


def summarise(comparison: Comparison, records: Sequence[Record]) -> Summary:
    """Summarise exactly one record per run of the comparison.

    Raises:
        ValueError: a run that is missing.
    """
    errors = _errors(records)
    wanted = {(run.method, run.depth, run.seed) for run in comparison.runs()}
    if set(errors) != wanted or len(records) != len(wanted):
        raise ValueError(f"records: expected the {len(wanted)} runs of the comparison, got {len(records)}")
    depths, seeds = sorted(comparison.depths), range(comparison.seeds)
    advantages = {
        depth: Interval.of([errors[EMBEDDING, depth, s] - errors[HYPERNETWORK, depth, s] for s in seeds])
        for depth in depths
    }
    slopes = {
        method: Interval.of([_slope(depths, [errors[method, d, s] for d in depths]) for s in seeds])
        for method in METHODS
        if len(depths) > 1
    }
    versions: list[Mapping[str, str]] = []
    for record in records:
        if record["versions"] not in versions:
            versions.append(record["versions"])
    return Summary(
        comparison=comparison,
        rows=[_row(records, method, depth) for method in METHODS for depth in depths],
        advantages=advantages,
        slopes=slopes,
        findings=_judge(comparison, advantages, slopes),
        versions=versions,
    )


def _errors(records: Sequence[Record]) -> dict[tuple[str, int, int], float]:
    return {
        (record["config"]["method"], record["config"]["depth"], record["config"]["seed"]): record["metrics"][
            "test_error"
        ]
        for record in records
    }


def _slope(depths: Sequence[int], errors: Sequence[float]) -> float:
    return statistics.linear_regression(depths, errors).slope


def _row(records: Sequence[Record], method: str, depth: int) -> Row:
    found = [
        record["metrics"]
        for record in records
        if record["config"]["method"] == method and record["config"]["depth"] == depth
    ]
    errors = [metrics["test_error"] for metrics in found]
    return Row(
        method=method,
        depth=depth,
        seeds=len(found),
        context_parameters=found[0]["context_parameters"],
        primary_parameters=found[0]["primary_parameters"],
        trainable_parameters=found[0]["trainable_parameters"],
        error_mean=statistics.fmean(errors),
        error_std=statistics.stdev(errors) if len(errors) > 1 else math.nan,
        step_seconds=statistics.median(metrics["step_seconds"] for metrics in found),
        peak_temporary_bytes=max(metrics["peak_temporary_bytes"] for metrics in found),
    )


def _judge(comparison: Comparison, advantages: Mapping[int, Interval], slopes: Mapping[str, Interval]) -> list[Finding]:
    claims = comparison.experiment.claims
    unknown = Interval(math.nan, -math.inf, math.inf)  # one depth shows no trend
    return [
        Finding(claims.wins, _wins(list(advantages.values()))),
        Finding(claims.hypernetwork_improves, _improves(slopes.get(HYPERNETWORK, unknown))),
        Finding(claims.embedding_flat, _does_not_improve(slopes.get(EMBEDDING, unknown))),
    ]


def _wins(advantages: Sequence[Interval]) -> str:
    """Better at every depth by its whole interval; refuted where a whole interval is worse."""
    if all(interval.low > 0 for interval in advantages):
        return REPRODUCED
    return NOT_REPRODUCED if any(interval.high < 0 for interval in advantages) else UNDECIDED


def _improves(slope: Interval) -> str:
    if slope.high < 0:
        return REPRODUCED
    return NOT_REPRODUCED if slope.low > -FLAT else UNDECIDED


def _does_not_improve(slope: Interval) -> str:
    if slope.low > -FLAT:
        return REPRODUCED
    return NOT_REPRODUCED if slope.high < 0 else UNDECIDED
