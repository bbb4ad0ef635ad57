"""Records by what they are measurements of: the best peer, the speed-up; labels; marks on what is from elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from statistics import median

from . import roofline
from .records import COPY, PRODUCT, TRAINING, Context, Record, layers

TOLERANCE = 1.10
"""The planner's choice may take so much longer than the best schedule."""


class Subject:
    """The records of one subject, by role."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.of = records[0]  # for the sizes, which all have in common
        self.ours = next((r for r in records if r.role == "ours"), None)
        self.again = next((r for r in records if r.role == "again"), None)
        self.variants = [r for r in records if r.role == "variant"]
        self.peers = [r for r in records if r.role == "peer"]
        self.ceilings = {r.way: r.rate for r in records if r.role == "ceiling" and r.rate}

    def way(self, name: str) -> Record | None:
        """The record of a way."""
        return next((r for r in self.records if r.way == name), None)

    @property
    def seconds(self) -> float | None:
        """Our median."""
        return self.ours.median if self.ours else None

    @property
    def best_peer(self) -> Record | None:
        """The fastest, of those that were tried more than once if there are any."""
        timed = [r for r in self.peers if r.median is not None]
        return _fastest([r for r in timed if r.rounds != 1] or timed)

    @property
    def speed_up(self) -> float | None:
        """Over the best peer."""
        return over(self.best_peer.median if self.best_peer else None, self.seconds)

    @property
    def noise(self) -> float | None:
        """Our time over our time."""
        return over(self.again.median if self.again else None, self.seconds)

    @property
    def best_schedule(self) -> Record | None:
        """The fastest of ours with something forced."""
        return _fastest([r for r in self.variants if r.median is not None])

    @property
    def planner(self) -> float | None:
        """The time of what the planner chose over that of the best schedule.

        Where it is one schedule for all, its time is that of this schedule forced: forcing costs a few microseconds.
        """
        plan = set(self.ours.plan.split(" / ")) if self.ours else set()
        forced = self.way(f"fasthyper, {plan.pop()}") if len(plan) == 1 else None
        seconds = forced.median if forced and forced.median else self.seconds
        return over(seconds, self.best_schedule.median if self.best_schedule else None)

    @property
    def least_memory(self) -> int | None:
        """Temporary bytes of the leanest peer."""
        return min((r.temporary for r in self.peers if r.temporary is not None), default=None)


def _fastest(records: list[Record]) -> Record | None:
    return min(records, key=lambda r: r.median or 0.0, default=None)


def over(a: float | None, b: float | None) -> float | None:
    """A quotient, None where one of the two is missing."""
    return None if a is None or not b else a / b


def along(record: Record) -> int:
    """A scaling record's place on its axis."""
    return record.I if record.axis == "width" else getattr(record, record.axis)


class Results:
    """The records of a file.

    What most of it was measured with is its `context`: of the device with the most records, the commit of the last day.
    What was measured with another commit, device or version is marked wherever it is named.
    """

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)
        groups: dict[tuple, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.subject, []).append(record)
        self.subjects = [Subject(group) for group in groups.values()]
        self.dtypes = list(dict.fromkeys(r.dtype for r in self.records))
        device = Counter(r.context.device for r in self.records).most_common(1)[0][0]
        count = Counter(_undated(r.context) for r in self.records)
        here = [context for context in count if context.device == device]
        self.context = max(here, key=lambda context: (max(self._days(context)), count[context]))
        self.others = [context for context in count if context != self.context]

    def _days(self, context: Context) -> set[str]:
        return {r.context.date for r in self.records if _undated(r.context) == context}

    def commit(self, context: Context) -> str:
        """A commit and the day or days on which it was measured."""
        days = sorted(self._days(context))
        return f"commit {context.commit}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"

    @property
    def headline(self) -> str:
        """Device, commit and date."""
        return f"{self.context.device}; {self.commit(self.context)}"

    @property
    def footnotes(self) -> list[str]:
        """What each mark stands for: commit and date, and what else differs."""
        notes = []
        for i, other in enumerate(self.others):
            differing = [
                f"{field.name} {getattr(other, field.name) or 'none'}"
                for field in dataclasses.fields(Context)
                if field.name not in ("commit", "date")
                and getattr(other, field.name) != getattr(self.context, field.name)
            ]
            notes.append(f"{_superscript(i)} {'; '.join([self.commit(other), *differing])}")
        return notes

    def mark(self, *subjects: Subject) -> str:
        """Superscripts, if any of it was measured with another commit, device or version than the rest of the file."""
        found = {_undated(r.context) for subject in subjects for r in subject.records}
        return "".join(_superscript(i) for i, other in enumerate(self.others) if other in found)

    def label(self, subject: Subject, marked: bool = True) -> str:
        """The workload's name and layer, the sizes that tell it from others with the same, and the mark."""
        one = subject.of
        alike = [
            s.of
            for s in self.among(one.study)
            if (s.of.axis, s.of.workload, layers(s.of)) == (one.axis, one.workload, layers(one))
        ]
        sizes = [f"{n} = {getattr(one, n):,}" for n in "BNR" if len({getattr(other, n) for other in alike}) > 1]
        return ", ".join([one.workload, layers(one), *sizes]) + (self.mark(subject) if marked else "")

    def among(self, study: str, dtype: str = "", mode: str = "") -> list[Subject]:
        """The subjects of a study, with this dtype and mode if they are given."""
        return [
            s for s in self.subjects if s.of.study == study and dtype in ("", s.of.dtype) and mode in ("", s.of.mode)
        ]

    @cached_property
    def modes(self) -> list[tuple[str, str]]:
        """Each dtype with each mode in which workloads were measured."""
        return list(dict.fromkeys((s.of.dtype, s.of.mode) for s in self.among("workloads")))

    @cached_property
    def curves(self) -> dict[tuple[str, str], list[Subject]]:
        """The scaling subjects by dtype and axis, in the order of their size."""
        curves: dict[tuple[str, str], list[Subject]] = {}
        for s in self.among("scaling"):
            curves.setdefault((s.of.dtype, s.of.axis), []).append(s)
        return {key: sorted(curve, key=lambda s: along(s.of)) for key, curve in curves.items()}

    def rates(self, way: str, dtype: str, device: str = "") -> list[float]:
        """A ceiling as it was with each subject of this dtype on this device, or on the file's own."""
        device = device or self.context.device
        found = [r for r in self.records if r.role == "ceiling" and r.way == way and r.rate]
        return [r.rate for r in found if r.rate and r.dtype == dtype and r.context.device == device]

    def ceiling(self, subject: Subject, way: str) -> float | None:
        """A ceiling measured in turns with this subject; where there is none, the median over the others."""
        rates = self.rates(way, subject.of.dtype, subject.of.context.device)
        return subject.ceilings.get(way) or (median(rates) if rates else None)

    def bound(self, subject: Subject) -> float | None:
        """The flop/s that this machine could do."""
        product, copy = self.ceiling(subject, PRODUCT), self.ceiling(subject, COPY)
        return roofline.bound(subject.of, product, copy) if product and copy else None

    def share(self, subject: Subject) -> float | None:
        """What we did of it; a training step does more than the sum that is counted."""
        if subject.of.mode == TRAINING:
            return None
        return over(over(roofline.flops(subject.of), subject.seconds), self.bound(subject))

    def product_share(self, subject: Subject) -> float | None:
        """Our flop/s over those of a matrix product."""
        return over(over(roofline.flops(subject.of), subject.seconds), self.ceiling(subject, PRODUCT))


def _undated(context: Context) -> Context:
    return dataclasses.replace(context, date="")


def _superscript(number: int) -> str:
    """A letter, since a raised digit after a size would be a power."""
    letters = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"
    rest, last = divmod(number, len(letters))
    return (_superscript(rest - 1) if rest else "") + letters[last]


class Run:
    """One way through a training example: `curve` is seconds and the least loss until then."""

    def __init__(self, records: list[Record]):
        self.way = records[0].way
        self.temporary = max((r.temporary for r in records if r.temporary is not None), default=None)
        self.curve: list[tuple[float, float]] = []
        for r in sorted(records, key=lambda r: r.step or 0):
            if r.median is not None and r.loss is not None and math.isfinite(r.loss):
                self.curve.append((r.median, min(r.loss, self.curve[-1][1] if self.curve else math.inf)))

    def seconds_to(self, loss: float) -> float:
        """When it first reached a loss."""
        return next((seconds for seconds, least in self.curve if least <= loss), math.inf)


def runs(subject: Subject) -> list[Run]:
    """The ways through a training example that came to a loss, ours first."""
    ways: dict[str, list[Record]] = {}
    for r in sorted(subject.records, key=lambda r: r.role != "ours"):
        ways.setdefault(r.way, []).append(r)
    return [run for run in map(Run, ways.values()) if run.curve]


def common_loss(of: list[Run]) -> float:
    """The least loss that all of them reach."""
    return max(run.curve[-1][1] for run in of)
