"""Write the tuning runs that the package has: `python -m fasthyper.experiments.catalogue.record PRESET FOLDER...`.

Each folder is the output of `fasthyper compare NAME --preset PRESET`. With `--tune`, it has all runs; without, it lacks
those that the package has already.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from fasthyper.experiments.catalogue import EXPERIMENTS
from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.files import write_atomically
from fasthyper.experiments.store import RunStore, config_key
from fasthyper.experiments.tuning import SHIPPED, shipped, shipped_key, tuning_measures

DIGITS = 6
"""Significant digits of a measure."""


def record(folder: Path, preset: str, into: Path = SHIPPED) -> Path:
    """Write the tuning runs of a preset from a folder's `runs.jsonl`; return the file.

    Args:
        folder: the output of a comparison.
        preset: its preset.
        into: the folder of the shipped files.

    Raises:
        ValueError: the folder has runs of no or several experiments, or a run is neither there nor in the shipped file
            of another preset, or the runs were made with different versions or on different machines.
    """
    loaded = RunStore(folder / "runs.jsonl", {"split": "validation"}).load().records
    records = {config_key(found["config"]): found for found in loaded}
    made = {(found["config"]["experiment"], found["config"]["device"]) for found in loaded}
    if len(made) != 1:
        raise ValueError(f"{folder}: expected tuning runs of one experiment on one device, got {sorted(made)}")
    ((name, device),) = made
    comparison = Comparison.of(EXPERIMENTS[name], preset=preset, device="cpu")
    path = into / preset / f"{name}.jsonl"
    elsewhere = shipped(comparison, into, without=path)
    lines, versions, dates = [], [], []
    for run, names in tuning_measures(comparison).items():
        found = records.get(config_key(replace(run, device=device).config()))
        if found is None and config_key(run.config()) in elsewhere:
            continue
        if found is None:
            raise ValueError(f"{folder}: lacks {run.method}, seed {run.seed}, {run.setting}")
        measures = {measure: _rounded(found["metrics"]["measures"][measure]) for measure in sorted(names)}
        lines.append({"key": shipped_key(run), "method": run.method, "lr": run.setting.lr, "measures": measures})
        dates.append(found["date"])
        if found["versions"] not in versions:
            versions.append(found["versions"])
    if len(versions) > 1:
        raise ValueError(f"{folder}: expected runs of one version on one machine, got {versions}")
    header = {"experiment": name, "versions": versions[0], "date": max(dates)[:10]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in (header, *lines)).encode())
    return path


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.{DIGITS}g}")


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        try:
            print(record(Path(argument), sys.argv[1]))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
