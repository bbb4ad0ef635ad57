"""The summary of a comparison: the results of its studies and the findings on their claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.experiment import Finding, Study
from fasthyper.experiments.rates import Rate
from fasthyper.experiments.results import Results
from fasthyper.experiments.store import Record, config_key
from fasthyper.experiments.tuning import tuned
from fasthyper.experiments.verdicts import judged


@dataclass(frozen=True)
class Summary:
    """The content of the tables, the figures and the report.

    Attributes:
        comparison: the comparison.
        results: the results of each study.
        findings: each finding with its study.
        versions: the different sets of versions that the runs were made with.
        rates: the learning rates that were chosen.
        date: of the last run, such as 2026-11-30; empty if the records have none.
    """

    comparison: Comparison
    results: tuple[Results, ...]
    findings: tuple[tuple[Study, Finding], ...]
    versions: tuple[Mapping[str, str], ...]
    rates: tuple[Rate, ...] = ()
    date: str = ""


def summarise(comparison: Comparison, records: Sequence[Record]) -> Summary:
    """Summarise the records of a comparison, exactly one for each run, those that choose learning rates included.

    Raises:
        ValueError: a run is missing, or there is an extra one.
    """
    by_run = {config_key(record["config"]): record for record in records}
    tuning = {config_key(run.config()) for run in comparison.tuning_runs()}
    if not tuning <= set(by_run):
        raise ValueError(f"records: expected all {len(tuning)} runs that choose learning rates")
    with_rates = tuned(comparison, by_run)
    wanted = tuning | {config_key(run.config()) for run in with_rates.runs()}
    if set(by_run) != wanted or len(records) != len(wanted):
        raise ValueError(f"records: expected the {len(wanted)} runs of the comparison, got {len(records)}")

    def metrics(study: Study, method: str, value: Any) -> list[Mapping[str, Any]]:
        runs = (with_rates.run(study, value, method, seed) for seed in range(study.seeds))
        return [by_run[config_key(run.config())]["metrics"] for run in runs]

    results = tuple(
        Results(study, {(m, v): metrics(study, m, v) for m in study.methods for v in study.values})
        for study in comparison.studies
    )
    versions: list[Mapping[str, str]] = []
    for record in records:
        if record["versions"] not in versions:
            versions.append(record["versions"])
    date = max((record.get("date", "")[:10] for record in records), default="")
    return Summary(comparison, results, judged(results), tuple(versions), with_rates.rates, date)
