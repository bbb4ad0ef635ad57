"""Run a comparison: what is finished is kept, the rest is trained, side by side, and the whole is reported."""

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
from fasthyper.experiments.experiment import Run, is_integer
from fasthyper.experiments.files import check_writable
from fasthyper.experiments.report import REPORT_FILES, write_report
from fasthyper.experiments.store import Record, RunStore, key
from fasthyper.experiments.summary import Summary, summarise
from fasthyper.experiments.training import Metrics, train

RUNS = "runs.jsonl"
FILES = (RUNS, *REPORT_FILES)
_METRICS = [field.name for field in fields(Metrics)]
Progress = Callable[[float, int, str], None]


def run_comparison(
    comparison: Comparison,
    out: str | os.PathLike[str],
    *,
    data_home: str | os.PathLike[str] | None = None,
    workers: int | None = 1,
    progress: Progress = lambda done, total, run: None,
    notify: Callable[[str], None] = warnings.warn,
) -> Summary:
    """Run what is missing of a comparison; write `runs.jsonl`, `summary.csv`, `report.html`.

    A run found in `out` with the same configuration is not repeated; runs of other configurations stay there and
    are left out of the report. A process killed at any moment loses the run it was in, no more.

    Processes share the runs that are missing, whichever is free taking the next: `workers` of this machine, or
    those of a torchrun, on as many machines as it has. There each process keeps what it finishes in its own `out`
    (`runs.1.jsonl` and so on) until all are done, when process 0 has everything.

    Args:
        comparison: the sweep, made by `Comparison.of`.
        out: the folder to write to, made if it does not exist.
        data_home: the folder of scikit-learn's downloads.
        workers: processes to start; None: one for each core, or for each GPU. Of no meaning under torchrun.
        progress: called with the runs done, those to do in all, and the one they belong to.
        notify: called with each sentence about lines of a file of runs that could not be used.

    Raises:
        ValueError: `out` cannot be written to, or another process is writing there, or `workers` is below 1.
        DatasetUnavailable: the data are neither here nor to be had; nothing has been written then.
        WorkerFailed: one of several processes raised an error, or was ended; under torchrun, in that process. With one
            process, errors come as they are.
    """
    out = Path(out)
    if workers is not None and (not is_integer(workers) or workers < 1):
        raise ValueError(f"workers: expected at least 1, got {workers!r}")
    check_writable(out, *FILES)
    runs = comparison.runs()
    wanted = [key(run.config()) for run in runs]
    sweep = hashlib.sha256(key([__version__, torch.__version__, *wanted]).encode())
    with torchrun(comparison.device, sweep.hexdigest()) as group:
        finished = _finished(group, comparison, out, notify)
        missing = [run for run, name in zip(runs, wanted, strict=True) if name not in finished]
        if missing:
            source = comparison.experiment.load(comparison.data, data_home)
            out.mkdir(parents=True, exist_ok=True)
            number = min(_workers(comparison.device) if workers is None else workers, len(missing))
            if group.store is not None or number == 1:
                threads = _threads(1 if group.store is None else int(os.environ["LOCAL_WORLD_SIZE"]))
                shown = progress if group.rank == 0 else lambda done, total, run: None
                finished |= _train(group, shown, comparison, out, source, missing, threads)
            else:
                with _store(comparison, out / RUNS).locked():
                    pass  # another comparison at work there is told of here, not by a process within
                given = (comparison, out, source, missing, _threads(number))
                launch(_train, number, comparison.device, _forward(progress), *given)
                finished = _finished(group, comparison, out, lambda problem: None)
        if group.rank == 0:
            _collect(comparison, out, finished)
        group.gather(None)  # process 0 has it all on its disk: parts may go
        for part in _parts(out):
            _store(comparison, part).remove()
        summary = summarise(comparison, [finished[name] for name in wanted])
        if group.rank == 0:
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


def _forward(progress: Progress) -> Progress:
    """The same, told of nothing that was overtaken on the way from one of several processes."""
    furthest = 0.0

    def forward(done: float, total: int, run: str) -> None:
        nonlocal furthest
        furthest = max(furthest, done)
        progress(furthest, total, run)

    return forward


def _finished(group: Group, comparison: Comparison, out: Path, notify: Callable[[str], None]) -> dict[str, Record]:
    """The runs that are on the disks of the group, by configuration."""
    records: dict[str, Record] = {}
    problems: list[str] = []
    for path in [out / RUNS, *_parts(out)]:
        loaded = _store(comparison, path).load()
        records = {key(record["config"]): record for record in loaded.records} | records  # the first is kept
        problems += loaded.problems
    merged: dict[str, Record] = {}
    everywhere = group.gather((records, problems))
    for theirs, _ in everywhere:
        merged = theirs | merged
    if group.rank == 0:
        for problem in dict.fromkeys(problem for _, found in everywhere for problem in found):
            notify(problem)
    return merged


def _train(
    group: Group,
    progress: Progress,
    comparison: Comparison,
    out: Path,
    source: Any,
    missing: list[Run],
    threads: int,
) -> dict[str, Record]:
    """Train runs that no other process of the group has taken; returns what all have found."""
    out.mkdir(parents=True, exist_ok=True)
    store = _store(comparison, out / (RUNS if group.rank == 0 else f"runs.{group.rank}.jsonl"))
    taken, done = group.counter("taken"), group.counter("done")
    found: dict[str, Record] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with store.locked():
            while (number := taken(1) - 1) < len(missing):
                run = missing[number]
                name = f"{run.method}, seed {run.seed}"
                shown = 0

                def epoch(share: float, name: str = name) -> None:
                    nonlocal shown
                    promille = round(1000 * share)
                    progress(done(promille - shown) / 1000, len(missing), name)
                    shown = promille

                epoch(0.0)  # whatever happens from here on happens in this run
                try:
                    metrics = train(comparison.experiment, run, source, epoch)
                except Exception as error:
                    if group.store is None:
                        raise
                    raise WorkerFailed(group.rank, group.size, name, in_one_line(error)) from error
                record: Record = {
                    "config": run.config(),
                    "metrics": asdict(metrics),
                    "versions": versions(run.device),
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                store.append(record)
                found[key(run.config())] = record
    finally:
        torch.set_num_threads(before)
    merged: dict[str, Record] = {}
    for theirs in group.gather(found):
        merged |= theirs
    return merged


def _collect(comparison: Comparison, out: Path, finished: Mapping[str, Record]) -> None:
    """Put into `runs.jsonl` what only other processes' files have."""
    out.mkdir(parents=True, exist_ok=True)
    store = _store(comparison, out / RUNS)
    here = {key(record["config"]) for record in store.load().records}
    if elsewhere := [record for name, record in finished.items() if name not in here]:
        with store.locked():
            for record in elsewhere:
                store.append(record)


def _store(comparison: Comparison, path: Path) -> RunStore:
    experiment = comparison.experiment
    return RunStore(path, {"experiment": experiment.name, "protocol": experiment.protocol}, _METRICS)


def _parts(out: Path) -> list[Path]:
    """The files of the processes but the first."""
    try:
        names = os.listdir(out)
    except FileNotFoundError:  # not there yet, or another process has just tried whether it can be made
        return []
    return sorted(out / name for name in names if re.fullmatch(r"runs\.[0-9]+\.jsonl", name))


def _threads(processes: int) -> int:
    """Of torch, for each of so many processes on this machine."""
    return max(1, min(torch.get_num_threads(), _cores() // processes))


def _workers(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
