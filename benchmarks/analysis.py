"""Derive from the records of a file: best peers, speed-ups, noise, shares of the machine's ceilings, and labels."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from statistics import median

from . import roofline
from .context import Context
from .records import COPY, PRODUCT, TRAINING_STEP, Record, by_subject, layers

TOLERANCE = 1.10
"""The planner's choice may take this much longer than the best schedule."""


class Subject:
    """The records of one subject by role; see `Record.subject`."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.record = records[0]  # has the sizes, dtype and mode that all share
        self.ours = next((r for r in records if r.role == "ours"), None)
        self.again = next((r for r in records if r.role == "again"), None)
        self.variants = [r for r in records if r.role == "variant"]
        self.peers = [r for r in records if r.role == "peer"]
        self.ceilings = {r.way: r.rate for r in records if r.role == "ceiling" and r.rate}

    def way(self, name: str) -> Record | None:
        """Return the record of a way."""
        return next((r for r in self.records if r.way == name), None)

    @property
    def seconds(self) -> float | None:
        """The median of fasthyper."""
        return self.ours.median if self.ours else None

    @property
    def best_peer(self) -> Record | None:
        """The fastest peer that was timed more than once; if there is none, the fastest that was tried once."""
        timed = [r for r in self.peers if r.median is not None]
        return _fastest([r for r in timed if r.rounds != 1] or timed)

    @property
    def speed_up(self) -> float | None:
        """The best peer's median over fasthyper's."""
        return quotient(self.best_peer.median if self.best_peer else None, self.seconds)

    @property
    def noise(self) -> float | None:
        """The ratio of two medians of fasthyper, measured in the same rounds."""
        return quotient(self.again.median if self.again else None, self.seconds)

    @property
    def best_schedule(self) -> Record | None:
        """The fastest variant."""
        return _fastest([r for r in self.variants if r.median is not None])

    @property
    def planner_ratio(self) -> float | None:
        """The time of the planner's choice over the time of the best schedule.

        If the planner chooses one schedule for all calls, its time is that of the variant with this schedule, since
        forcing a schedule costs a few microseconds.
        """
        plan = set(self.ours.plan.split(" / ")) if self.ours else set()
        forced = self.way(f"fasthyper, {plan.pop()}") if len(plan) == 1 else None
        seconds = forced.median if forced and forced.median else self.seconds
        return quotient(seconds, self.best_schedule.median if self.best_schedule else None)

    @property
    def least_memory(self) -> int | None:
        """The temporary bytes of the peer that takes the fewest."""
        return min((r.temporary for r in self.peers if r.temporary is not None), default=None)


def _fastest(records: list[Record]) -> Record | None:
    return min(records, key=lambda r: r.median or 0.0, default=None)


def quotient(a: float | None, b: float | None) -> float | None:
    """Return a / b, None if one of them is missing."""
    return None if a is None or not b else a / b


def position(record: Record) -> int:
    """Return the size of a scaling record along its axis."""
    return record.I if record.axis == "width" else getattr(record, record.axis)


class Results:
    """The records of a file.

    `context` is the file's main context: of the device with the most records, the last measured commit. Results from
    another context get a mark, which `footnotes` explains.
    """

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)
        self.subjects = [Subject(group) for group in by_subject(self.records).values()]
        self.dtypes = list(dict.fromkeys(r.dtype for r in self.records))
        device = Counter(r.context.device for r in self.records).most_common(1)[0][0]
        count = Counter(_undated(r.context) for r in self.records)
        same_device = [context for context in count if context.device == device]
        self.context = max(same_device, key=lambda context: (max(self._days(context)), count[context]))
        self.others = [context for context in count if context != self.context]

    def _days(self, context: Context) -> set[str]:
        return {r.context.date for r in self.records if _undated(r.context) == context}

    def commit(self, context: Context) -> str:
        """Return a context's commit and the days of its measurements."""
        days = sorted(self._days(context))
        return f"commit {context.commit}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"

    @property
    def headline(self) -> str:
        """Device, commit and date."""
        return f"{self.context.device}; {self.commit(self.context)}"

    @property
    def footnotes(self) -> list[str]:
        """For each mark, the commit and date, and any other field that differs from the main context."""
        return [f"{_superscript(i)} {self._difference(other)}" for i, other in enumerate(self.others)]

    def _difference(self, other: Context) -> str:
        names = [field.name for field in dataclasses.fields(Context) if field.name not in ("commit", "date")]
        differing = [name for name in names if getattr(other, name) != getattr(self.context, name)]
        return "; ".join([self.commit(other), *(f"{name} {getattr(other, name) or 'none'}" for name in differing)])

    def mark(self, *subjects: Subject) -> str:
        """Return the marks of all contexts, other than the main one, that the subjects were measured in."""
        found = {_undated(r.context) for subject in subjects for r in subject.records}
        return "".join(_superscript(i) for i, other in enumerate(self.others) if other in found)

    def label(self, subject: Subject, marked: bool = True) -> str:
        """Return the workload's name and layers, the sizes that distinguish it from similar ones, and its mark."""
        record = subject.record
        similar = [
            s.record
            for s in self.select(record.study)
            if (s.record.axis, s.record.workload, layers(s.record)) == (record.axis, record.workload, layers(record))
        ]
        varied = [name for name in "BNR" if len({getattr(other, name) for other in similar}) > 1]
        sizes = [f"{name} = {getattr(record, name):,}" for name in varied]
        return ", ".join([record.workload, layers(record), *sizes]) + (self.mark(subject) if marked else "")

    def select(self, study: str, dtype: str = "", mode: str = "") -> list[Subject]:
        """Return the subjects of a study, of one dtype and mode if given."""
        return [
            s
            for s in self.subjects
            if s.record.study == study and dtype in ("", s.record.dtype) and mode in ("", s.record.mode)
        ]

    @cached_property
    def modes(self) -> list[tuple[str, str]]:
        """Each dtype and mode in which workloads were measured."""
        return list(dict.fromkeys((s.record.dtype, s.record.mode) for s in self.select("workloads")))

    @cached_property
    def curves(self) -> dict[tuple[str, str], list[Subject]]:
        """The scaling subjects by dtype and axis, ordered by size."""
        curves: dict[tuple[str, str], list[Subject]] = {}
        for s in self.select("scaling"):
            curves.setdefault((s.record.dtype, s.record.axis), []).append(s)
        return {key: sorted(curve, key=lambda s: position(s.record)) for key, curve in curves.items()}

    def rates(self, ceiling: str, dtype: str, device: str = "") -> list[float]:
        """Return all measurements of a ceiling in a dtype, on the given device or the main one."""
        device = device or self.context.device
        found = [r for r in self.records if r.role == "ceiling" and r.way == ceiling and r.rate]
        return [r.rate for r in found if r.rate and r.dtype == dtype and r.context.device == device]

    def ceiling(self, subject: Subject, name: str) -> float | None:
        """Return a ceiling as measured with this subject, or else the median over the other subjects."""
        rates = self.rates(name, subject.record.dtype, subject.record.context.device)
        return subject.ceilings.get(name) or (median(rates) if rates else None)

    def bound(self, subject: Subject) -> float | None:
        """Return the flop/s that the roofline allows."""
        product, copy = self.ceiling(subject, PRODUCT), self.ceiling(subject, COPY)
        return roofline.bound(subject.record, product, copy) if product and copy else None

    def share(self, subject: Subject) -> float | None:
        """Return fasthyper's flop/s over the bound; None for a training step, because its other work is not counted."""
        if subject.record.mode == TRAINING_STEP:
            return None
        return quotient(quotient(roofline.flops(subject.record), subject.seconds), self.bound(subject))

    def product_bound(self, subject: Subject) -> float | None:
        """Return the seconds that the flops take at the matrix product's rate; None for a training step."""
        if subject.record.mode == TRAINING_STEP:
            return None
        return quotient(roofline.flops(subject.record), self.ceiling(subject, PRODUCT))

    def product_share(self, subject: Subject) -> float | None:
        """Return fasthyper's flop/s over those of the matrix product."""
        return quotient(self.product_bound(subject), subject.seconds)


def _undated(context: Context) -> Context:
    return dataclasses.replace(context, date="")


def _superscript(number: int) -> str:
    """Return a raised letter. A raised digit after a size would look like a power."""
    letters = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"
    more, last = divmod(number, len(letters))
    return (_superscript(more - 1) if more else "") + letters[last]


class LossCurve:
    """The least loss so far over the seconds of training, for one way."""

    def __init__(self, records: list[Record]):
        self.way = records[0].way
        self.temporary = max((r.temporary for r in records if r.temporary is not None), default=None)
        self.points: list[tuple[float, float]] = []
        for r in sorted(records, key=lambda r: r.step or 0):
            if r.median is not None and r.loss is not None and math.isfinite(r.loss):
                self.points.append((r.median, min(r.loss, self.points[-1][1] if self.points else math.inf)))

    def seconds_to(self, loss: float) -> float:
        """Return the seconds until the loss is first reached."""
        return next((seconds for seconds, least in self.points if least <= loss), math.inf)


def loss_curves(subject: Subject) -> list[LossCurve]:
    """Return a curve for each way through a training example that has a finite loss, fasthyper first."""
    ways: dict[str, list[Record]] = {}
    for r in sorted(subject.records, key=lambda r: r.role != "ours"):
        ways.setdefault(r.way, []).append(r)
    return [curve for curve in map(LossCurve, ways.values()) if curve.points]


def common_loss(curves: list[LossCurve]) -> float:
    """Return the least loss that all curves reach."""
    return max(curve.points[-1][1] for curve in curves)
