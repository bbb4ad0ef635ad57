"""The results: one CSV file per device, one row per way and workload, each row with its machine, commit and date.

A new measurement replaces the rows of the same comparison. Other rows keep their own commit and date.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from .context import ROOT, Context

RESULTS = ROOT / "benchmarks" / "results"
FORWARD, FORWARD_BACKWARD, TRAINING_STEP = MODES = ("forward", "forward + backward", "training step")
PRODUCT, COPY = "matrix product", "copy"
SIZES = ("B", "N", "R", "I", "O", "S", "C", "T", "hidden", "rank", "kernel", "stride", "groups", "weight_map")
"""The sizes of a workload, and its function of W: what tells it from others of the same name."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One way on one workload.

    Attributes:
        study: `"workloads"`, `"scaling"` or `"training"`.
        workload: the name in `workloads.py`, or of a training example.
        B, N, R, I, O: sizes; see `workloads.Workload`.
        S, C, T: rows of x, z and y that the B terms share; 0 if each term has its own.
        hidden: units between the two layers of a generated network; 0 for a single layer.
        rank: units between the two factors of a weight of low rank; 0 for one of full rank.
        kernel: taps of a convolution along each side of its image; 0 for a linear layer.
        stride, groups: of a convolution.
        weight_map: the function of the generated weights; empty if there is none.
        axis: of `scaling`, the size that grows: `"B"`, `"N"`, `"R"` or `"width"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        mode: `"forward"`, `"forward + backward"` or `"training step"`.
        way: name of the way, or of the ceiling.
        role: `"ours"`: fasthyper; `"again"`: fasthyper once more, to measure the noise; `"variant"`: fasthyper with a
            backend or schedule forced; `"peer"`; or `"ceiling"`: the machine's best rate, measured in the same rounds.
        q1, median, q3: seconds of one call; only the median if there was one call.
        rounds: how many calls were timed; 1 for a peer that was tried once and was too slow.
        rate: of a ceiling, flop/s or byte/s.
        compile: seconds of the first call, if this call compiles.
        temporary: peak temporary bytes by torch's allocator, without outputs and gradients.
        resident: the same by the operating system.
        note: the reason why there are no times, or only one.
        plan: of fasthyper, the schedules that the planner chooses for forward and backward.
        step: of a training example, the steps taken so far; `median` is their total time.
        loss: of a training example, the loss after these steps.
        context: where it was measured.
    """

    study: str
    workload: str
    B: int = 0
    N: int = 0
    R: int = 0
    I: int = 0
    O: int = 0
    S: int = 0
    C: int = 0
    T: int = 0
    hidden: int = 0
    rank: int = 0
    kernel: int = 0
    stride: int = 1
    groups: int = 1
    weight_map: str = ""
    axis: str = ""
    dtype: str = "float32"
    mode: str = ""
    way: str = ""
    role: str = "peer"
    q1: float | None = None
    median: float | None = None
    q3: float | None = None
    rounds: int | None = None
    rate: float | None = None
    compile: float | None = None
    temporary: int | None = None
    resident: int | None = None
    note: str = ""
    plan: str = ""
    step: int | None = None
    loss: float | None = None
    context: Context

    def replace(self, **changes: Any) -> Record:
        """Return the record with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def subject(self) -> tuple:
        """The study, sizes, dtype and mode: records with the same subject are compared, and replaced together."""
        return (self.study, self.axis, self.workload, *sizes(self), self.dtype, self.mode)

    @property
    def over_terms(self) -> bool:
        """Whether it is of a graph, ragged points or pairs."""
        return bool(self.S or self.C or self.T)


_RECORD_FIELDS = [f for f in dataclasses.fields(Record) if f.name != "context"]
_CONTEXT_FIELDS = [f.name for f in dataclasses.fields(Context)]
COLUMNS = [*(f.name for f in _RECORD_FIELDS), *_CONTEXT_FIELDS]
_NEWER = (
    "rank",
    "kernel",
    "stride",
    "groups",
    "weight_map",
)  # older files lack them, and have no workload that needs them


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(annotation: str, cell: str) -> object:
    """Return a cell as the type of a field's annotation."""
    if annotation.startswith("str"):
        return cell
    if cell == "":
        return None
    return int(cell) if annotation.startswith("int") else float(cell)


def read(path: Path) -> list[Record]:
    """Return the records of a file, none if it does not exist. Only sizes added later may be missing.

    Raises:
        ValueError: if the file has other columns than `COLUMNS`.
    """
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        found = rows.fieldnames or []
        if found != [name for name in COLUMNS if name in found or name not in _NEWER]:
            raise ValueError(f"{path.name} has other columns than {', '.join(COLUMNS)}: delete it and measure again")
        return [
            Record(
                context=Context(**{name: row[name] for name in _CONTEXT_FIELDS}),
                **{f.name: _value(str(f.type), row[f.name]) for f in _RECORD_FIELDS if f.name in found},  # type: ignore[arg-type]
            )
            for row in rows
        ]


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records, each with its context, in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as lines:
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(COLUMNS)
        for r in records:
            cells = [_cell(getattr(r, f.name)) for f in _RECORD_FIELDS]
            rows.writerow([*cells, *(getattr(r.context, name) for name in _CONTEXT_FIELDS)])
    unfinished.replace(path)


def merge(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Return the old records, with those of each newly measured subject replaced in place by the new ones."""
    return [record for group in (by_subject(old) | by_subject(new)).values() for record in group]


def by_subject(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """Group records by subject, in order."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(record.subject, []).append(record)
    return groups


def quartiles(values: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile; a single value three times."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def layers(of: Any) -> str:
    """Return the features of the one or two generated layers, such as `64 → 128`, from a record or a workload.

    The name of a function of W follows: `64 → 128, abs`.
    """
    features = " → ".join(str(features) for features in (of.I, of.hidden, of.rank, of.O) if features)
    return f"{features}, {of.weight_map}" if of.weight_map else features


def sizes(of: Any) -> tuple[int | str, ...]:
    """Return the sizes named in `SIZES`, from a record or a workload."""
    return tuple(getattr(of, name) for name in SIZES)
