"""What the runs of a comparison say: means over seeds, paired differences, trends, exponents, the fate of claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.experiment import Finding, Study
from fasthyper.experiments.results import Results
from fasthyper.experiments.store import Record, key


@dataclass(frozen=True)
class Summary:
    """All that the tables, the figures and the report show."""

    comparison: Comparison
    results: tuple[Results, ...]
    findings: tuple[tuple[Study, Finding], ...]
    versions: tuple[Mapping[str, str], ...]
    """The different sets of versions that the runs were made with."""


def summarise(comparison: Comparison, records: Sequence[Record]) -> Summary:
    """Summarise exactly one record per run of the comparison.

    Raises:
        ValueError: a run that is missing.
    """
    by_run = {key(record["config"]): record for record in records}
    wanted = {key(run.config()) for run in comparison.runs()}
    if set(by_run) != wanted or len(records) != len(wanted):
        raise ValueError(f"records: expected the {len(wanted)} runs of the comparison, got {len(records)}")

    def metrics(study: Study, method: str, value: Any) -> list[Mapping[str, Any]]:
        runs = (comparison.run(study, value, method, seed) for seed in range(study.seeds))
        return [by_run[key(run.config())]["metrics"] for run in runs]

    results = tuple(
        Results(study, {(m, v): metrics(study, m, v) for m in study.methods for v in study.values})
        for study in comparison.studies
    )
    findings = tuple((r.study, f) for r in results for claim in r.study.claims if (f := claim.judge(r)) is not None)
    versions: list[Mapping[str, str]] = []
    for record in records:
        if record["versions"] not in versions:
            versions.append(record["versions"])
    return Summary(comparison, results, findings, tuple(versions))
