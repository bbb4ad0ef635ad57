"""Run a comparison: keep finished runs, train the missing ones in several processes, and write the report."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fasthyper._version import __version__
from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.distributed import Group, WorkerFailed, in_one_line, launch, torchrun
from fasthyper.experiments.experiment import Run
from fasthyper.experiments.files import check_writable
from fasthyper.experiments.report import REPORT_FILES, write_report
from fasthyper.experiments.setting import is_integer
from fasthyper.experiments.side_by_side import groups, name, train_side_by_side
from fasthyper.experiments.store import Record, RunStore, config_key
from fasthyper.experiments.summary import Summary, summarise
from fasthyper.experiments.training import Metrics, train
from fasthyper.experiments.tuning import shipped, tuned

RUNS_FILE = "runs.jsonl"
OUTPUT_FILES = (RUNS_FILE, *REPORT_FILES)
_METRICS = [field.name for field in fields(Metrics)]
Progress = Callable[[float, int, str], None]


def run_comparison(
    comparison: Comparison,
    out: str | os.PathLike[str],
    *,
    data_home: str | os.PathLike[str] | None = None,
    workers: int | None = 1,
    tune: bool = False,
    side_by_side: bool | None = None,
    progress: Progress = lambda done, total, run: None,
    notify: Callable[[str], None] = warnings.warn,
) -> Summary:
    """Train the missing runs of a comparison, and write `runs.jsonl`, `summary.csv` and `report.html`.

    The runs that choose learning rates come first, then those of results, with the rates that were best. The package
    comes with the former for the quick preset.

    A run with the same configuration that is in `out` already is not repeated. Runs of other configurations stay in
    `out`, but are not part of the report. A process that is killed loses only its current run, or those that it trains
    side by side.

    Several processes share the missing runs, and each takes the next one when it is free: `workers` processes of this
    machine, or those of torchrun, on one or more machines. A process of rank n > 0 keeps its finished runs in
    `runs.n.jsonl` of its own `out`. At the end, process 0 merges all of them into its `runs.jsonl`.

    Args:
        comparison: made by `Comparison.of`.
        out: the folder to write to. It is made if it does not exist.
        data_home: the folder of scikit-learn's downloads.
        workers: processes to start; None: one for each core, or for each GPU. Ignored under torchrun.
        tune: choose learning rates anew, without the tuning runs that the package comes with.
        side_by_side: train runs that differ in their seed only at the same time; None: on a GPU.
        progress: called with the number of runs done, a float, the number of missing runs, and the name of the current
            run. Before all learning rates are chosen, the number of missing runs is the largest possible.
        notify: called with a sentence for each line of a file of runs that cannot be used.

    Returns:
        The summary of all runs of the comparison.

    Raises:
        ValueError: `out` cannot be written to, or another process is writing there, or `workers` is below 1, or
            learning rates are to be chosen for a task without validation examples.
        DatasetUnavailable: the data are not on this machine and cannot be downloaded. Nothing has been written.
        WorkerFailed: one of several processes raised an error or was killed; under torchrun, this process raises it. A
            single process raises its own errors.
    """
    out = Path(out)
    if workers is not None and (not is_integer(workers) or workers < 1):
        raise ValueError(f"workers: expected at least 1, got {workers!r}")
    check_writable(out, *OUTPUT_FILES)
    configs = [run.config() for run in (*comparison.tuning_runs(), *comparison.runs())]
    given = {} if tune else shipped(comparison)
    fingerprint = hashlib.sha256(config_key([__version__, torch.__version__, given, *configs]).encode())
    with torchrun(comparison.device, fingerprint.hexdigest()) as group:
        finished = given | _load_finished(group, comparison, out, notify)
        if missing := len(_missing_runs(comparison, finished)):
            dataset = comparison.experiment.load(comparison.data, data_home)
            out.mkdir(parents=True, exist_ok=True)
            together = comparison.device == "cuda" if side_by_side is None else side_by_side
            processes = min(_workers(comparison.device) if workers is None else workers, missing)
            if not group.alone or processes == 1:
                threads = _threads(1 if group.alone else int(os.environ["LOCAL_WORLD_SIZE"]))
                display = progress if group.rank == 0 else lambda done, total, run: None
                finished = _train_missing(group, display, comparison, out, dataset, finished, together, threads)
            else:
                with _store(comparison, out / RUNS_FILE).locked():
                    pass  # fail here, before workers start, if another process is writing
                arguments = (comparison, out, dataset, finished, together, _threads(processes))
                launch(_train_missing, processes, comparison.device, _monotone(progress), *arguments)
                finished = given | _load_finished(group, comparison, out, lambda problem: None)
        if group.rank == 0:
            _collect(comparison, out, {key: r for key, r in finished.items() if r is not given.get(key)})
        group.gather(None)  # wait until process 0 has all runs on its disk
        for path in _rank_files(out):
            _store(comparison, path).remove()
        runs = (*comparison.tuning_runs(), *tuned(comparison, finished).runs())
        summary = summarise(comparison, [finished[config_key(run.config())] for run in runs])
        if group.rank == 0:
            write_report(summary, out)
    return summary


def versions(device: str) -> dict[str, str]:
    """Return the versions and the machine that a run was made with."""
    return {
        "fasthyper": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }


def _monotone(progress: Progress) -> Progress:
    """Return a callback whose count never decreases, although messages of several processes may arrive out of order."""
    furthest = 0.0

    def monotone(done: float, total: int, run: str) -> None:
        nonlocal furthest
        furthest = max(furthest, done)
        progress(furthest, total, run)

    return monotone


def _load_finished(group: Group, comparison: Comparison, out: Path, notify: Callable[[str], None]) -> dict[str, Record]:
    """Return the runs that are on the disks of the group, by configuration."""
    records: dict[str, Record] = {}
    problems: list[str] = []
    for path in [out / RUNS_FILE, *_rank_files(out)]:
        loaded = _store(comparison, path).load()
        records = {config_key(record["config"]): record for record in loaded.records} | records  # the first is kept
        problems += loaded.problems
    merged: dict[str, Record] = {}
    everywhere = group.gather((records, problems))
    for theirs, _ in everywhere:
        merged = theirs | merged
    if group.rank == 0:
        for problem in dict.fromkeys(problem for _, found in everywhere for problem in found):
            notify(problem)
    return merged


def _missing_runs(comparison: Comparison, finished: Mapping[str, Record]) -> list[Run]:
    """Return the runs to do: those that choose learning rates, and those of results, as far as their rates are known.

    While rates are missing, all runs of results count as missing, with the rates of the settings in their place.
    """
    tuning = [run for run in comparison.tuning_runs() if config_key(run.config()) not in finished]
    if tuning:
        return tuning + comparison.runs()
    return [run for run in tuned(comparison, finished).runs() if config_key(run.config()) not in finished]


def _train_missing(
    group: Group,
    progress: Progress,
    comparison: Comparison,
    out: Path,
    dataset: Any,
    finished: Mapping[str, Record],
    together: bool,
    threads: int,
) -> dict[str, Record]:
    """Train the missing runs that no other process of the group takes; returns the records of all processes.

    The runs that choose learning rates come first. Every process waits for all of them, and chooses the same rates.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = _store(comparison, out / (RUNS_FILE if group.rank == 0 else f"runs.{group.rank}.jsonl"))
    found = dict(finished)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with store.locked():
            earlier = 0
            for split in ("validation", "test"):
                missing = _missing_runs(comparison, found)
                mine = [run for run in missing if run.split == split]
                parts = groups(mine) if together else [[run] for run in mine]
                total = earlier + len(missing)

                def counted(done: float, run: str, earlier: int = earlier, total: int = total) -> None:
                    progress(earlier + done, total, run)

                records = _train_all(group, split, counted, comparison, store, dataset, parts)
                for theirs in group.gather(records):
                    found |= theirs
                earlier += len(mine)
    finally:
        torch.set_num_threads(before)
    return found


def _train_all(
    group: Group,
    split: str,
    progress: Callable[[float, str], None],
    comparison: Comparison,
    store: RunStore,
    dataset: Any,
    parts: list[list[Run]],
) -> dict[str, Record]:
    """Train the parts of one split that no other process of the group takes; returns the records of this process."""
    taken, done = group.counter(f"{split} taken"), group.counter(f"{split} done")
    found: dict[str, Record] = {}
    while (number := taken(1) - 1) < len(parts):
        runs = parts[number]
        label = name(runs)
        counted = 0

        def on_epoch(share: float, label: str = label, count: int = len(runs)) -> None:
            nonlocal counted
            thousandths = round(1000 * share * count)
            progress(done(thousandths - counted) / 1000, label)
            counted = thousandths

        on_epoch(0.0)  # a failure is now one of this run
        try:
            if len(runs) == 1:
                metrics = [train(comparison.experiment, runs[0], dataset, on_epoch)]
            else:
                metrics = train_side_by_side(comparison.experiment, runs, dataset, on_epoch)
            lacking = comparison.measures_of(runs[0]) - metrics[0].measures.keys()
            if lacking:
                known = ", ".join(sorted(metrics[0].measures))
                raise ValueError(f"task: expected measures or levels {', '.join(sorted(lacking))}, got {known}")
        except Exception as error:
            if group.alone:
                raise
            raise WorkerFailed(group.rank, group.size, label, in_one_line(error)) from error
        for run, its in zip(runs, metrics, strict=True):
            record: Record = {
                "config": run.config(),
                "metrics": asdict(its),
                "versions": versions(run.device),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            store.append(record)
            found[config_key(run.config())] = record
    return found


def _collect(comparison: Comparison, out: Path, finished: Mapping[str, Record]) -> None:
    """Add to `runs.jsonl` the runs that only the files of other processes have."""
    out.mkdir(parents=True, exist_ok=True)
    store = _store(comparison, out / RUNS_FILE)
    here = {config_key(record["config"]) for record in store.load().records}
    if elsewhere := [record for key, record in finished.items() if key not in here]:
        with store.locked():
            for record in elsewhere:
                store.append(record)


def _store(comparison: Comparison, path: Path) -> RunStore:
    experiment = comparison.experiment
    return RunStore(path, {"experiment": experiment.name, "protocol": experiment.protocol}, _METRICS)


def _rank_files(out: Path) -> list[Path]:
    """Return the files of the processes of rank 1 and above."""
    try:
        names = os.listdir(out)
    except FileNotFoundError:  # it does not exist yet
        return []
    return sorted(out / name for name in names if re.fullmatch(r"runs\.[0-9]+\.jsonl", name))


def _threads(processes: int) -> int:
    """Return the number of torch threads for each of several processes on this machine."""
    return max(1, min(torch.get_num_threads(), _cores() // processes))


def _workers(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
