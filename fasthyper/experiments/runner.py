"""Run a comparison: what is finished is kept, the rest is trained, the whole is reported."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fasthyper._version import __version__
from fasthyper.experiments.experiment import Comparison, Run
from fasthyper.experiments.files import check_writable
from fasthyper.experiments.report import REPORT_FILES, write_report
from fasthyper.experiments.store import Record, RunStore, key
from fasthyper.experiments.summary import Summary, summarise
from fasthyper.experiments.training import Metrics, train

RUNS = "runs.jsonl"
FILES = (RUNS, *REPORT_FILES)
# A loss may overflow and be stored as null; a run without any of these is not finished.
_NEEDED = [field.name for field in fields(Metrics) if not field.name.endswith("_loss")]


def run_comparison(
    comparison: Comparison,
    out: str | os.PathLike[str],
    *,
    data_home: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, run: None,
    notify: Callable[[str], None] = warnings.warn,
) -> Summary:
    """Run what is missing of a comparison; write `runs.jsonl`, `summary.csv`, `errors.png`, `report.md`.

    A run found in `runs.jsonl` with the same configuration is not repeated; runs of other configurations stay
    there and are left out of the report. A process killed at any moment loses the run it was in, no more.

    Args:
        comparison: the sweep, made by `Comparison.of`.
        out: the folder to write to, made if it does not exist.
        data_home: the folder of scikit-learn's downloads.
        progress: called with the epochs done, those to do in all, and the run they belong to.
        notify: called with each sentence about lines of `runs.jsonl` that could not be used.

    Raises:
        ValueError: `out` cannot be written to.
        DatasetUnavailable: the data are neither here nor to be had; nothing has been written then.
    """
    out = Path(out)
    check_writable(out, *FILES)
    store = RunStore(out / RUNS, metrics=_NEEDED)
    loaded = store.load()
    for problem in loaded.problems:
        notify(problem)
    finished = {key(record["config"]): record for record in loaded.records}
    runs = comparison.runs()
    missing = [run for run in runs if key(run.config()) not in finished]
    if missing:
        splits = comparison.experiment.load(comparison.data, data_home)
        out.mkdir(parents=True, exist_ok=True)
        total = len(missing) * comparison.epochs
        with _threads(comparison.defaults.threads):
            for number, run in enumerate(missing):
                done = iter(range(number * comparison.epochs, total + 1))
                name = f"{run.method}, depth {run.depth}, seed {run.seed}"
                progress(next(done), total, name)

                def epoch(done: Iterator[int] = done, name: str = name) -> None:
                    progress(next(done), total, name)

                metrics = train(comparison.experiment, run, splits, epoch)
                finished[key(run.config())] = _append(store, run, metrics)
    summary = summarise(comparison, [finished[key(run.config())] for run in runs])
    write_report(summary, out)
    return summary


def versions(device: str) -> dict[str, str]:
    """What the numbers of a run were made with."""
    return {
        "fasthyper": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }


def _append(store: RunStore, run: Run, metrics: Metrics) -> Record:
    record: dict[str, Any] = {
        "config": run.config(),
        "metrics": asdict(metrics),
        "versions": versions(run.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    store.append(record)
    return record


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
