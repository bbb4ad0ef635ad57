"""The choice of learning rates, from the runs that were measured on the validation split.

The package comes with the measures of tuning runs, so that they need not be trained again: one file of JSON lines for
each experiment and preset. Its first line is a header with the versions and the date of the runs; each
other line has the key of a run, with its method and rate for readers. `fasthyper.experiments.catalogue.record` writes
them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.experiment import Run, Study
from fasthyper.experiments.rates import Rate, is_tuned
from fasthyper.experiments.store import Record, config_key

SHIPPED = Path(__file__).parent / "catalogue" / "tuning"
"""The folder of the shipped files, `PRESET/NAME.jsonl`. A run that two presets have is in the file of one of them."""


def tuned(comparison: Comparison, finished: Mapping[str, Record]) -> Comparison:
    """Return the comparison with the learning rates that its tuning runs have found best.

    Args:
        comparison: the comparison.
        finished: records by the `config_key` of their run; all of `comparison.tuning_runs()` must be there.
    """
    return replace(
        comparison,
        rates=tuple(
            _rate(comparison, finished, study, method, value)
            for study in comparison.studies
            if is_tuned(study)
            for value in study.values
            for method in study.methods
        ),
    )


def _rate(comparison: Comparison, finished: Mapping[str, Record], study: Study, method: str, value: Any) -> Rate:
    numbers: dict[float, list[float]] = {}
    for run in comparison.tuning_runs_of(study, value, method):
        number = finished[config_key(run.config())]["metrics"]["measures"][study.measure.name]
        finite = number is not None and math.isfinite(number)
        numbers.setdefault(run.setting.lr, []).append(number if finite else math.inf)
    errors = {lr: math.fsum(found) / len(found) for lr, found in numbers.items()}
    return Rate.of(study.name, method, value, study.setting_at(value).optimizer, errors)


def shipped(comparison: Comparison, folder: Path = SHIPPED, without: Path | None = None) -> dict[str, Record]:
    """Return records of those tuning runs that the package comes with, by `config_key`: of their metrics the measures.

    The device of a run does not matter here: the rate that was best on CPUs is used on GPUs, too.

    Args:
        comparison: the comparison.
        folder: the folder of the shipped files.
        without: a file that is not read.
    """
    known: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for path in sorted(folder.glob(f"*/{comparison.experiment.name}.jsonl")):
        if path == without:
            continue
        header, *lines = map(json.loads, path.read_text().splitlines())
        versions = {"learning rates": f"shipped, of {header['date']}", **header["versions"]}
        known |= {line["key"]: (line["measures"], versions) for line in lines}
    found = {}
    for run, names in tuning_measures(comparison).items():
        measures, made_with = known.get(shipped_key(run), ({}, {}))
        if names <= measures.keys():
            config = run.config()
            found[config_key(config)] = {"config": config, "metrics": {"measures": measures}, "versions": made_with}
    return found


def shipped_key(run: Run) -> str:
    """Return the key of a run in the shipped files: a digest of its configuration without the device."""
    config = {name: value for name, value in run.config().items() if name != "device"}
    return hashlib.sha256(config_key(config).encode()).hexdigest()[:16]


def tuning_measures(comparison: Comparison) -> dict[Run, set[str]]:
    """Return the tuning runs of a comparison, and the names of the measures that rates are chosen by."""
    names: dict[Run, set[str]] = {run: set() for run in comparison.tuning_runs()}
    for study in filter(is_tuned, comparison.studies):
        for value in study.values:
            for method in study.methods:
                for run in comparison.tuning_runs_of(study, value, method):
                    names[run].add(study.measure.name)
    return names
