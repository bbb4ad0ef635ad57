"""The figures that a file of results comes down to, beside the floors that the project has set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import NamedTuple

from .records import BOTH, Record
from .subjects import TOLERANCE, Results, Subject
from .tables import MIB
from .workloads import WORKLOADS

NARROW, HEAVY = 32, 1 << 18  # features of a narrow layer are fewer; a head is heavy from so many numbers on

Value = Callable[[Results, Subject], "float | None"]
Seen = list[tuple[float, Subject]]


class Line(NamedTuple):
    """A figure, None where nothing is among it, where it was seen or of how many, and its floor."""

    text: str
    dtype: str
    value: float | None
    floor: str
    where: str

    @property
    def held(self) -> bool | None:
        """Whether the floor holds; None where there is none."""
        if self.value is None or not self.floor:
            return None
        sign, limit = self.floor.split()[:2]
        return self.value >= float(limit) if sign == "≥" else self.value <= float(limit)


@dataclass(frozen=True)
class Figure:
    """One line of the summary: what of which subjects is averaged, or its extreme.

    Attributes:
        text: what it is called.
        value: of a subject.
        pick: `"mean"` is geometric; `"least"`, `"most"`.
        among: whether a subject with these sizes counts.
        floors: by dtype, or of all under `""`.
        study: whose subjects.
        mode: of the subjects; all where it is empty.
    """

    text: str
    value: Value
    pick: str
    among: Callable[[Record], bool] = lambda of: True
    floors: dict[str, str] = field(default_factory=dict)
    study: str = "workloads"
    mode: str = BOTH

    def line(self, results: Results, dtype: str) -> Line:
        """What it is in these results."""
        seen: Seen = []
        for subject in results.among(self.study, dtype, self.mode):
            value = self.value(results, subject)
            if value is not None and self.among(subject.of):
                seen.append((value, subject))
        floor = self.floors.get(dtype, self.floors.get("", ""))
        if "AMX" in floor and "AMX" not in results.context.device:
            floor = ""
        if not seen:
            return Line(self.text, dtype, None, floor, "")
        if self.pick == "mean":
            where = f"{len(seen)} workload{'s' * (len(seen) != 1)}"
            return Line(self.text, dtype, geometric_mean([value for value, _ in seen]), floor, where)
        value, subject = (min if self.pick == "least" else max)(seen, key=lambda one: one[0])
        return Line(self.text, dtype, value, floor, results.label(subject))


_EXTRA = {w.name for w in WORKLOADS if w.extra}


def published(of: Record) -> bool:
    """A layer of a published network, each of whose instances has points of its own: what is in the means."""
    return of.neighbours == 1 and not of.hidden and of.workload not in _EXTRA


def _single(of: Record) -> bool:
    return of.N == 1


def _several(of: Record) -> bool:
    return of.N > 1


def _single_published(of: Record) -> bool:
    return _single(of) and published(of)


def _named(name: str, of: Record) -> bool:
    return published(of) and name in of.workload


def _heavy(of: Record, narrow: bool) -> bool:
    return _single_published(of) and of.R * of.I * of.O >= HEAVY and (min(of.I, of.O) < NARROW) == narrow


def _large(of: Record) -> bool:
    return _single_published(of) and of.B * of.R * of.I * of.O >= 1 << 34 and of.R % 64 == 0


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


def _planner(results: Results, subject: Subject) -> float | None:
    return subject.planner


_MODES = (
    Figure("forward: speed-up at N = 1, geometric mean", _speed_up, "mean", _single_published, mode="forward"),
    Figure(
        "training step: speed-up at N = 1, geometric mean", _speed_up, "mean", _single_published, mode="training step"
    ),
)
_NOISE = (
    Figure(
        "planner over the best schedule, most", _planner, "most", floors={"": f"≤ {TOLERANCE:.2f}"}, study="scaling"
    ),
    Figure("noise: our time over our time, least", _noise, "least"),
    Figure("noise: our time over our time, most", _noise, "most"),
)

FIGURES = {
    "cpu": (
        Figure(
            "speed-up at N = 1 and O ≥ 16, geometric mean",
            _speed_up,
            "mean",
            lambda of: _single_published(of) and of.O >= 16,
            {"float32": "≥ 2.0", "bfloat16": "≥ 3.5 (AMX)"},
        ),
        Figure(
            "speed-up at N = 1, geometric mean",
            _speed_up,
            "mean",
            _single_published,
            {"float32": "≥ 1.6", "bfloat16": "≥ 2.2 (AMX)"},
        ),
        Figure("speed-up at N = 1, least", _speed_up, "least", _single, {"float32": "≥ 0.95"}),
        Figure("speed-up at N > 1, least", _speed_up, "least", _several, {"float32": "≥ 0.9"}),
        *_MODES,
        Figure(
            "share of the matrix product's rate, R·I·O ≥ 2¹⁸ and min(I, O) ≥ 32, least",
            Results.product_share,
            "least",
            lambda of: _heavy(of, narrow=False),
            {"float32": "≥ 0.8"},
        ),
        Figure(
            "share of the matrix product's rate, R·I·O ≥ 2¹⁸ and min(I, O) < 32, least",
            Results.product_share,
            "least",
            lambda of: _heavy(of, narrow=True),
            {"float32": "≥ 0.65"},
        ),
        Figure("temporary memory, MiB, most", _temporary, "most", floors={"": "≤ 40"}),
        Figure("temporary memory, resident, MiB, most", _resident, "most", floors={"": "≤ 40"}),
        *_NOISE,
    ),
    "cuda": (
        Figure("speed-up at N = 1, geometric mean", _speed_up, "mean", _single_published, {"": "≥ 1.7"}),
        Figure("speed-up at N = 1, least", _speed_up, "least", _single, {"": "≥ 0.95"}),
        Figure("speed-up, modelnet, least", _speed_up, "least", lambda of: _named("modelnet", of), {"": "≥ 4"}),
        Figure("speed-up, qm9, least", _speed_up, "least", lambda of: _named("qm9", of), {"": "≥ 2"}),
        Figure("speed-up at N > 1, least", _speed_up, "least", _several),
        *_MODES,
        Figure(
            "share of the matrix product's rate, B·R·I·O ≥ 2³⁴ and O ≥ 128, least",
            Results.product_share,
            "least",
            lambda of: _large(of) and of.O >= 128,
            {"": "≥ 0.75"},
        ),
        Figure(
            "share of the matrix product's rate, B·R·I·O ≥ 2³⁴ and O = 64, least",
            Results.product_share,
            "least",
            lambda of: _large(of) and of.O == 64,
            {"": "≥ 0.6"},
        ),
        Figure("temporary memory, MiB, most", _temporary, "most", floors={"": "≤ 64"}),
        *_NOISE,
    ),
}


def figures(records: Iterable[Record]) -> list[Line]:
    """The summary: of each dtype, the figures for the kind of device that most of the records are of."""
    results = Results(records)
    return [figure.line(results, dtype) for dtype in results.dtypes for figure in FIGURES[results.context.kind]]
