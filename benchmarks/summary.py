"""The summary of a file of results: means and extremes over all workloads, compared with the project's floors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import NamedTuple

from .analysis import TOLERANCE, Results, Subject
from .formatting import MIB
from .records import FORWARD, FORWARD_BACKWARD, TRAINING_STEP, Record
from .workloads import WORKLOADS

NARROW = 32  # a layer with fewer features in or out is narrow
HEAVY = 1 << 18  # a head with at least so many numbers is heavy

Value = Callable[[Results, Subject], "float | None"]


class Line(NamedTuple):
    """A line of the summary.

    Attributes:
        metric: the quantity that was averaged or compared.
        dtype: of the subjects.
        value: None if no subject counts.
        floor: such as `"≥ 2.0"`, empty if there is none.
        where: the subject of an extreme, or the number of subjects of a mean.
    """

    metric: str
    dtype: str
    value: float | None
    floor: str
    where: str

    @property
    def held(self) -> bool | None:
        """Whether the floor holds; None if there is none."""
        if self.value is None or not self.floor:
            return None
        sign, limit = self.floor.split()[:2]
        return self.value >= float(limit) if sign == "≥" else self.value <= float(limit)


@dataclass(frozen=True)
class Metric:
    """A mean or an extreme over subjects.

    Attributes:
        name: in the table.
        value: of a subject.
        pick: `"mean"`, which is geometric, `"least"` or `"most"`.
        counts: whether a subject counts, by one of its records.
        floors: by dtype, or under `""` for all dtypes.
        study: of the subjects.
        mode: of the subjects.
    """

    name: str
    value: Value
    pick: str
    counts: Callable[[Record], bool] = lambda record: True
    floors: dict[str, str] = field(default_factory=dict)
    study: str = "workloads"
    mode: str = FORWARD_BACKWARD

    def line(self, results: Results, dtype: str) -> Line:
        """Return its line for these results."""
        seen: list[tuple[float, Subject]] = []
        for subject in results.select(self.study, dtype, self.mode):
            value = self.value(results, subject)
            if value is not None and self.counts(subject.record):
                seen.append((value, subject))
        floor = self.floors.get(dtype, self.floors.get("", ""))
        if "AMX" in floor and "AMX" not in results.context.device:
            floor = ""
        if not seen:
            return Line(self.name, dtype, None, floor, "")
        if self.pick == "mean":
            where = f"{len(seen)} workload{'s' * (len(seen) != 1)}"
            return Line(self.name, dtype, geometric_mean([value for value, _ in seen]), floor, where)
        value, subject = (min if self.pick == "least" else max)(seen, key=lambda one: one[0])
        return Line(self.name, dtype, value, floor, results.label(subject))


_EXTRA = {w.name for w in WORKLOADS if w.extra}


def published(record: Record) -> bool:
    """Return whether it is a single linear layer of a published network. Means are over these records."""
    other = record.over_terms or record.hidden or record.rank or record.kernel or record.weight_map
    return not other and record.workload not in _EXTRA


def _over_terms(record: Record) -> bool:
    return record.over_terms


def _single(record: Record) -> bool:
    return record.N == 1 and not record.over_terms


def _several(record: Record) -> bool:
    return record.N > 1 and not record.kernel


def _mapped(record: Record) -> bool:
    return bool(record.weight_map)


def _convolutions(record: Record) -> bool:
    return record.kernel > 0


def _single_published(record: Record) -> bool:
    return _single(record) and published(record)


def _named(name: str, record: Record) -> bool:
    return published(record) and name in record.workload


def _heavy(record: Record, narrow: bool) -> bool:
    return (
        _single_published(record)
        and record.R * record.I * record.O >= HEAVY
        and (min(record.I, record.O) < NARROW) == narrow
    )


def _large(record: Record) -> bool:
    return _single_published(record) and record.B * record.R * record.I * record.O >= 1 << 34 and record.R % 64 == 0


def _speed_up(results: Results, subject: Subject) -> float | None:
    return subject.speed_up


def _noise(results: Results, subject: Subject) -> float | None:
    return subject.noise


def _temporary(results: Results, subject: Subject) -> float | None:
    bytes_ = subject.ours.temporary if subject.ours else None
    return None if bytes_ is None else bytes_ / MIB


def _resident(results: Results, subject: Subject) -> float | None:
    bytes_ = subject.ours.resident if subject.ours else None
    return None if bytes_ is None else bytes_ / MIB


def _planner_ratio(results: Results, subject: Subject) -> float | None:
    return subject.planner_ratio


_OTHER_MODES = (
    Metric("forward: speed-up at N = 1, geometric mean", _speed_up, "mean", _single_published, mode=FORWARD),
    Metric(
        "training step: speed-up at N = 1, geometric mean", _speed_up, "mean", _single_published, mode=TRAINING_STEP
    ),
)
_TERMS = (
    Metric("graphs, ragged points, pairs: speed-up, geometric mean", _speed_up, "mean", _over_terms),
    Metric("graphs, ragged points, pairs: speed-up, least", _speed_up, "least", _over_terms),
    Metric(
        "graphs, ragged points, pairs: share of the matrix product's rate, least",
        Results.product_share,
        "least",
        _over_terms,
    ),
)
CONVOLUTIONS = (
    Metric("convolutions: speed-up, geometric mean", _speed_up, "mean", _convolutions, {"float32": "≥ 1.3"}),
    Metric("convolutions: speed-up, least", _speed_up, "least", _convolutions, {"float32": "≥ 0.95"}),
)
"""Of files that have convolutions."""
MAPPED = (
    Metric("functions of the weights: speed-up, geometric mean", _speed_up, "mean", _mapped),
    Metric("functions of the weights: speed-up, least", _speed_up, "least", _mapped),
)
"""Of files that have functions of the weights."""
_CHECKS = (
    Metric(
        "planner's choice over the best schedule, most",
        _planner_ratio,
        "most",
        floors={"": f"≤ {TOLERANCE:.2f}"},
        study="scaling",
    ),
    Metric("noise: fasthyper measured twice, ratio, least", _noise, "least"),
    Metric("noise: fasthyper measured twice, ratio, most", _noise, "most"),
)

METRICS = {
    "cpu": (
        Metric(
            "speed-up at N = 1 and O ≥ 16, geometric mean",
            _speed_up,
            "mean",
            lambda record: _single_published(record) and record.O >= 16,
            {"float32": "≥ 2.0", "bfloat16": "≥ 3.5 (AMX)"},
        ),
        Metric(
            "speed-up at N = 1, geometric mean",
            _speed_up,
            "mean",
            _single_published,
            {"float32": "≥ 1.6", "bfloat16": "≥ 2.2 (AMX)"},
        ),
        Metric("speed-up at N = 1, least", _speed_up, "least", _single, {"float32": "≥ 0.95"}),
        Metric("speed-up at N > 1, least", _speed_up, "least", _several, {"float32": "≥ 0.9"}),
        *_OTHER_MODES,
        Metric(
            "share of the matrix product's rate, R·I·O ≥ 2¹⁸ and min(I, O) ≥ 32, least",
            Results.product_share,
            "least",
            lambda record: _heavy(record, narrow=False),
            {"float32": "≥ 0.8"},
        ),
        Metric(
            "share of the matrix product's rate, R·I·O ≥ 2¹⁸ and min(I, O) < 32, least",
            Results.product_share,
            "least",
            lambda record: _heavy(record, narrow=True),
            {"float32": "≥ 0.65"},
        ),
        Metric("temporary memory, MiB, most", _temporary, "most", floors={"": "≤ 40"}),
        Metric("temporary memory, resident, MiB, most", _resident, "most", floors={"": "≤ 40"}),
        *_TERMS,
        *_CHECKS,
    ),
    "cuda": (
        Metric("speed-up at N = 1, geometric mean", _speed_up, "mean", _single_published, {"": "≥ 1.7"}),
        Metric("speed-up at N = 1, least", _speed_up, "least", _single, {"": "≥ 0.95"}),
        Metric("speed-up, modelnet, least", _speed_up, "least", lambda record: _named("modelnet", record), {"": "≥ 4"}),
        Metric("speed-up, qm9, least", _speed_up, "least", lambda record: _named("qm9", record), {"": "≥ 2"}),
        Metric("speed-up at N > 1, least", _speed_up, "least", _several),
        *_OTHER_MODES,
        Metric(
            "share of the matrix product's rate, B·R·I·O ≥ 2³⁴ and O ≥ 128, least",
            Results.product_share,
            "least",
            lambda record: _large(record) and record.O >= 128,
            {"": "≥ 0.75"},
        ),
        Metric(
            "share of the matrix product's rate, B·R·I·O ≥ 2³⁴ and O = 64, least",
            Results.product_share,
            "least",
            lambda record: _large(record) and record.O == 64,
            {"": "≥ 0.6"},
        ),
        Metric("temporary memory, MiB, most", _temporary, "most", floors={"": "≤ 64"}),
        *_TERMS,
        *_CHECKS,
    ),
}


def summarise(records: Iterable[Record]) -> list[Line]:
    """Return the metrics of each dtype, for the kind of device that most records are of."""
    results = Results(records)
    metrics = METRICS[results.context.kind]
    if any(record.kernel for record in results.records):
        metrics += CONVOLUTIONS
    if any(record.weight_map for record in results.records):
        metrics += MAPPED
    return [metric.line(results, dtype) for dtype in results.dtypes for metric in metrics]
