"""The vocabulary in which an experiment is declared: its settings, its studies, its task, one run of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fasthyper.experiments.methods import ACTIVATIONS, METHODS, Architecture

OPTIMIZERS = ("sgd", "adam", "adadelta")
SCHEDULES = ("constant", "cosine")

PAPER = "the paper"
ASKED = "asked here"
THEOREM = "a theorem"

# Of whom the claim is; another paper's are reproduced, too.
YES = {ASKED: "holds", THEOREM: "in line"}
NO = {ASKED: "does not hold", THEOREM: "not in line"}
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
UNDECIDED = "undecided"

_PURPOSES = ("weights", "order", "test", "task")


class DatasetUnavailable(RuntimeError):
    """A data set is not on this machine and cannot be downloaded. Raised by `Experiment.load`."""


def stream(seed: int, purpose: str) -> int:
    """The seed of one of the streams of a run: were two the same, weights might equal what they are to learn."""
    return len(_PURPOSES) * seed + _PURPOSES.index(purpose)


class Batch(NamedTuple):
    """What a model is trained on: `model(x, cond)` against `target`, one row per instance."""

    x: Tensor
    cond: Tensor
    target: Tensor


@dataclass(frozen=True)
class Examples:
    """Examples numbered from 0: `draw` makes a batch of some, anew at every access, with a generator on the CPU."""

    count: int
    draw: Callable[[Tensor, torch.Generator], Batch]

    @classmethod
    def of(cls, x: Tensor, cond: Tensor, target: Tensor) -> Examples:
        """Examples that are always the same: the rows of these tensors."""

        def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
            chosen = chosen.to(x.device)
            return Batch(x[chosen], cond[chosen], target[chosen])

        return cls(len(x), draw)


@dataclass(frozen=True)
class Task:
    """What one run learns: its examples, its loss, and what is measured on each test example."""

    train: Examples
    test: Examples
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of outputs and targets, one number."""
    measure: Callable[[Tensor, Tensor], Mapping[str, Tensor]]
    """Of outputs and targets, by name; one number for each example, averaged over the test examples."""
    levels: Mapping[str, float] = field(default_factory=dict)
    """What to measure against, by name: of a predictor that sees less, say."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides a run beside the method and the seed. An experiment's own adds to it.

    Fields are annotated as int or float where they are numbers, and those of `DEFINING` are not to be changed from
    outside: the titles and claims of a study speak of them.

    Raises:
        ValueError: a count below 1, a depth below 2, a rate that is not finite and positive, an unknown name.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ()

    epochs: int
    lr: float
    batch_size: int
    optimizer: str = "sgd"
    momentum: float = 0.0
    """Of SGD alone."""
    schedule: str = "constant"
    """Of the learning rate: it stays, or falls to 0 along a cosine."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            least = 2 if name == "depth" else 1
            if entry.type in (int, "int") and not (is_integer(value) and value >= least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
            if entry.type in (float, "float") and not (
                isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            ):
                raise ValueError(f"{name}: expected a finite number that is not negative, got {value!r}")
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive finite number, got {self.lr!r}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name, known[0]) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class ContextSetting(Setting):
    """With the sizes of f and e."""

    depth: int
    """Linear layers of f and e, the last one included."""
    width: int
    """Units of their hidden layers."""
    embedding: int
    """E."""

    @property
    def context(self) -> tuple[int, ...]:
        """The hidden layers of f and e."""
        return (self.width,) * (self.depth - 1)


@dataclass(frozen=True)
class Axis:
    """What a study varies: a field of its setting."""

    field: str
    label: str
    log: bool = False
    """Values are spaced by ratios: a trend is per doubling."""
    count: str | None = None
    """Drawn and fitted over this count of parameters of each run ("primary_parameters", "trainable_parameters")."""


def value_text(value: Any) -> str:
    """A value of an axis or of a setting."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Measure:
    """What is compared: a name that `Task.measure` or `Task.levels` gives, less being better."""

    name: str
    label: str
    log: bool = False
    """Compared by ratios, with geometric means; else by differences."""
    percent: bool = False

    @property
    def heading(self) -> str:
        """Its label and its unit."""
        return self.label + (" (%)" if self.percent else "")

    def shown(self, value: float) -> float:
        """A value, or a difference of two, in that unit."""
        return 100 * value if self.percent else value


@dataclass(frozen=True)
class Line:
    """One line of a figure: what one method's runs measured."""

    method: str
    measure: str
    label: str
    dashed: bool = False

    @property
    def key(self) -> str:
        """What claims call it."""
        return f"{self.method}:{self.measure}"


@dataclass(frozen=True)
class Finding:
    """A claim, the verdict of these runs, and the numbers that it rests on."""

    claim: str
    whose: str
    verdict: str
    evidence: str
    rule: str
    """When the verdict is yes."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What somebody says of a study. A verdict is yes, no, or undecided where intervals allow both."""

    text: str
    whose: str = PAPER
    rule: ClassVar[str]

    def judge(self, results: Any) -> Finding | None:
        """The verdict; None where the methods that it speaks of are not part of the study."""
        raise NotImplementedError

    def found(self, holds: bool | None, evidence: str) -> Finding:
        """The finding; None leaves it undecided."""
        words, otherwise = (YES, REPRODUCED) if holds else (NO, NOT_REPRODUCED)
        verdict = UNDECIDED if holds is None else words.get(self.whose, otherwise)
        return Finding(self.text, self.whose, verdict, evidence, self.rule)


@dataclass(frozen=True)
class Study:
    """One figure: methods over the values of one axis, every seed, and what is claimed of them."""

    name: str
    title: str
    axis: Axis
    values: tuple[Any, ...]
    methods: tuple[str, ...]
    setting: Setting
    seeds: int
    measure: Measure
    claims: tuple[Claim, ...] = ()
    levels: tuple[tuple[str, str], ...] = ()
    """(name, label) of levels drawn as dashed lines."""
    also: tuple[tuple[str, str], ...] = ()
    """(name, heading) of further measures and levels, for the table alone."""
    lines: tuple[Line, ...] = ()
    """Other lines than one for each method."""
    published: Mapping[tuple[str, Any], float] = field(default_factory=dict)
    """By method and value: what others measured."""
    note: str = ""

    def all_lines(self) -> tuple[Line, ...]:
        """What its figure and table show."""
        lines = self.lines or tuple(Line(m, self.measure.name, METHODS[m].label) for m in self.methods)
        return lines + tuple(Line(self.methods[0], name, label, dashed=True) for name, label in self.levels)

    def only(self, methods: Sequence[str]) -> Study:
        """The study of those of its methods alone."""
        lines = tuple(line for line in self.lines if line.method in methods)
        return replace(self, methods=tuple(m for m in self.methods if m in methods), lines=lines)

    def at(self, value: Any) -> Setting:
        """The setting at one value of the axis."""
        return replace(self.setting, **{self.axis.field: value})


@dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of one run, and nothing else: what a finished run is known by."""

    experiment: str
    protocol: int
    data: str
    method: str
    seed: int
    device: str
    setting: Setting

    def config(self) -> dict[str, Any]:
        """The run as JSON values."""
        return asdict(self)


def _nothing(data: str, data_home: Any) -> None:
    """For experiments whose data are drawn from the seed."""


@dataclass(frozen=True)
class Experiment:
    """What is compared, declared; training, runs, statistics and reports are the same for all.

    A new experiment is a `Setting`, `architecture` and `task`, and the studies of its presets.
    """

    name: str
    protocol: int
    """Raised when a change of the code changes the numbers or what is measured: older runs are not mixed with newer."""
    title: str
    source: str
    question: str
    choices: tuple[str, ...]
    """What was chosen here, the source being silent or at odds with itself."""
    data: tuple[str, ...]
    """The data sets, the default one first."""
    studies: Callable[[str, str], tuple[Study, ...]]
    """Of a preset and a data set."""
    architecture: Callable[[Run], Architecture]
    task: Callable[[Run, Any], Task]
    """Of a run and what `load` gave, on the run's device."""
    load: Callable[[str, Any], Any] = _nothing
    """Of a data set and the folder of downloads."""


def is_integer(value: object) -> bool:
    """Whether it counts something: True and False do not."""
    return isinstance(value, int) and not isinstance(value, bool)
