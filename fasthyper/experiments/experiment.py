"""The types that declare an experiment.

An `Experiment` has studies and a task. A `Study` is one figure: it trains several methods at each value of one `Axis`,
with several seeds, compares a `Measure` of their test errors, and judges each `Claim` from it. A `Run` is one training
run, of one method with one `Setting` and one seed. Its `Task` has the examples, the loss and the measures.

To write an experiment of your own:

    1. Subclass `Setting` (or `ContextSetting`) with the fields that the experiment adds, and annotate them.
    2. Write `architecture(run)`, the sizes of the networks, and `task(run, dataset)`, a `Task`.
    3. Write `studies(preset, data)`, the figures, for the presets "quick", "standard" and "paper".
    4. Write `load(data, data_home)`, if there is a data set to load.
    5. Make an `Experiment` of these, and pass it to `Comparison.of`, and the comparison to `run_comparison`.

`fasthyper.experiments.catalogue` has six examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fasthyper.experiments.methods import METHODS, Architecture
from fasthyper.experiments.setting import Setting
from fasthyper.experiments.significance import Outcome

PAPER = "the paper"
ASKED = "asked here"
THEOREM = "a theorem"

UNDECIDED = "undecided"
UNMET = "premise unmet"
MEASURED = "measured"
_OF_A_PAPER = ("reproduced", "not reproduced")
_ASKED_HERE = ("holds", "does not hold")

_PURPOSES = ("weights", "order", "test", "task")


class DatasetUnavailable(RuntimeError):
    """A data set is not on this machine and cannot be downloaded: raised by `Experiment.load`."""


def stream(seed: int, purpose: str) -> int:
    """Return the seed of one random stream of a run.

    The streams differ: with one stream for weights and targets, a model could start as a copy of its target.

    Args:
        seed: the seed of the run.
        purpose: `"weights"`, `"order"` (of the training examples, and random values for them), `"test"` or `"task"`.
    """
    return len(_PURPOSES) * seed + _PURPOSES.index(purpose)


class Batch(NamedTuple):
    """A batch of B instances: the model computes `model(x, cond)`, the loss compares it with `target`.

    Attributes:
        x: the input of the primary, `(B, *, I)`, any number of points per instance.
        cond: the condition of each instance, `(B, C)`.
        target: B entries, of the shape that the loss of the task expects.
    """

    x: Tensor
    cond: Tensor
    target: Tensor


@dataclass(frozen=True)
class Examples:
    """Examples that are numbered from 0.

    Attributes:
        count: the number of examples.
        draw: called with the numbers of some examples, `(B,)`, and a generator on the CPU; returns their `Batch`.
            Random values may differ from call to call.
    """

    count: int
    draw: Callable[[Tensor, torch.Generator], Batch]

    @classmethod
    def of(cls, x: Tensor, cond: Tensor, target: Tensor) -> Examples:
        """Return fixed examples: number n has entry n of each tensor."""

        def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
            chosen = chosen.to(x.device)
            return Batch(x[chosen], cond[chosen], target[chosen])

        return cls(len(x), draw)


@dataclass(frozen=True)
class Task:
    """The task of one run.

    Attributes:
        train: the training examples.
        test: the test examples.
        loss: the training loss, one number, of outputs and targets.
        measure: the measures on the test examples, by name, of outputs and targets: one number for each example. A run
            reports their means.
        levels: numbers to compare a measure with, by name, such as the error of the best constant.
        validation: the examples on which learning rates are chosen, if a study is tuned. They share nothing with the
            other two.
    """

    train: Examples
    test: Examples
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor], Mapping[str, Tensor]]
    levels: Mapping[str, float] = field(default_factory=dict)
    validation: Examples | None = None


@dataclass(frozen=True)
class Axis:
    """The field of the setting that a study varies.

    Attributes:
        field: its name.
        label: of the axis in the figure.
        log: whether the values grow by ratios. The axis is logarithmic then, and trends are per doubling.
        count: `"primary_parameters"`, `"trainable_parameters"` or `"training_flops"`: figures and exponents use this
            number of each run in place of the value.
    """

    field: str
    label: str
    log: bool = False
    count: str | None = None


def value_text(value: Any) -> str:
    """Return a value of an axis or of a setting as text."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Measure:
    """The number that a study compares. Less is better.

    Attributes:
        name: a name in the results of `Task.measure`, or in `Task.levels`.
        label: its name in figures and tables.
        log: compare by ratios, with geometric means; otherwise by differences.
        percent: display as a percentage.
    """

    name: str
    label: str
    log: bool = False
    percent: bool = False

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return self.label + (" (%)" if self.percent else "")

    def displayed(self, value: float) -> float:
        """Return a value, or a difference of two values, in the displayed unit."""
        return 100 * value if self.percent else value


@dataclass(frozen=True)
class Line:
    """One line of a figure: one measure of the runs of one method. Levels are dashed."""

    method: str
    measure: str
    label: str
    dashed: bool = False

    @property
    def key(self) -> str:
        """The name of this line in claims."""
        return f"{self.method}:{self.measure}"


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim.

    Attributes:
        claim: its text.
        whose: the source of the claim, see `Claim`.
        verdict: for a claim of a paper `"reproduced"` or `"not reproduced"`, for another one `"holds"` or `"does not
            hold"`; for all of them `"undecided"`, `"premise unmet"`, or `"measured"` where nothing is tested.
        evidence: the numbers behind the verdict.
        rule: the condition under which the verdict is yes.
        p: the two-sided p-value of the test of the claim; None if there is no test, or one seed only.
        adjusted: the same after Holm's correction for all claims of the page.
        detects: the smallest effect that the test would find with a chance of 80 %, in words.
        short: the claim in a few words.
    """

    claim: str
    whose: str
    verdict: str
    evidence: str
    rule: str
    p: float | None = None
    adjusted: float | None = None
    detects: str = ""
    short: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about the results of a study. `fasthyper.experiments.claims` has the usual ones.

    A subclass defines `rule`, the condition of a yes in words, and `concerns`, `test`, `evidence` and `detects`. Their
    argument `results` is the `fasthyper.experiments.results.Results` of the study. `fasthyper.experiments.verdicts`
    judges all claims of a page together.

    Attributes:
        text: the statement.
        whose: its source: `PAPER`, `ASKED` (this library), `THEOREM`, or the name of another paper.
        premises: claims without which this one says nothing. Where one of them is not a yes, the verdict is `"premise
            unmet"`.
        short: the statement in a few words, for the terminal; empty: the text.
    """

    text: str
    whose: str = PAPER
    premises: tuple[Claim, ...] = ()
    short: str = ""
    rule: ClassVar[str]

    def lines_read(self) -> tuple[str, ...]:
        """Return the names of the lines that the claim is about: `method`, or `method:measure`."""
        raise NotImplementedError

    def concerns(self, results: Any) -> bool:
        """Return whether the study has all methods and values that the claim is about."""
        return bool(results.has(*self.lines_read()))

    def test(self, results: Any) -> Outcome | None:
        """Return the outcome of the one test of the claim; None if the claim is not tested, only measured."""
        raise NotImplementedError

    def evidence(self, results: Any, level: float) -> str:
        """Return the numbers behind the verdict, in words; `level` is that of a single test, for its power."""
        raise NotImplementedError

    def detects(self, results: Any, level: float) -> str:
        """Return the smallest effect that the test would find at this level with a chance of 80 %, in words."""
        return ""

    def verdict(self, yes: bool) -> str:
        """Return yes or no in the words for the source of the claim."""
        return (_ASKED_HERE if self.whose == ASKED else _OF_A_PAPER)[0 if yes else 1]


@dataclass(frozen=True)
class Tuning:
    """The grid of learning rates. Each method keeps the rate with the least error on the validation split.

    A method is tuned at each value of the axis; a study over the learning rate itself is not tuned.

    Attributes:
        rates: the rates of each optimizer, by its name.
        seeds: runs with each rate. They are numbered from `FIRST_TUNING_SEED` on: no run of a result has such a seed.
    """

    FIRST_TUNING_SEED: ClassVar[int] = 1_000_000

    rates: Mapping[str, tuple[float, ...]]
    seeds: int = 1


@dataclass(frozen=True)
class Study:
    """One figure with its table and claims: every method at every value of the axis, with every seed.

    Attributes:
        name: its name within the experiment.
        title: its heading.
        axis: the field that varies.
        values: the values of that field.
        methods: names in `METHODS`.
        setting: the setting of all runs, except for the field that varies.
        seeds: runs of each method at each value.
        measure: the number that is compared.
        claims: the claims to judge.
        levels: (name in `Task.levels`, label) of each level to draw as a dashed line.
        also: (name, heading) of each further measure or level, for the table only.
        lines: the lines to draw; by default one for each method.
        published: published values of the measure, by method and value.
        note: a sentence below the figure.
        tuning: the learning rates to choose from; None: that of the setting.
        structure: of the task, in a few words, if the study is a frontier: one row of the page that answers. Its axis
            is `size`.
        baseline: (name in `Task.levels`, label) of the error to go below: a frontier in which no method does is not
            counted.
    """

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
    also: tuple[tuple[str, str], ...] = ()
    lines: tuple[Line, ...] = ()
    published: Mapping[tuple[str, Any], float] = field(default_factory=dict)
    note: str = ""
    tuning: Tuning | None = None
    structure: str = ""
    baseline: tuple[str, str] | None = None

    def all_lines(self) -> tuple[Line, ...]:
        """Return the lines of the figure and of the table: those of the methods, then the levels."""
        lines = self.lines or tuple(Line(m, self.measure.name, METHODS[m].label) for m in self.methods)
        return lines + tuple(Line(self.methods[0], name, label, dashed=True) for name, label in self.levels)

    def measures(self) -> set[str]:
        """Return the names of all measures and levels that the runs of the study have to report."""
        claims = [each for claim in self.claims for each in (claim, *claim.premises)]
        read = (name.partition(":")[2] for claim in claims for name in claim.lines_read())
        baseline = () if self.baseline is None else self.baseline[:1]
        lines = (line.measure for line in self.all_lines())
        return {self.measure.name, *lines, *dict(self.also), *baseline, *filter(None, read)}

    def only(self, methods: Sequence[str]) -> Study:
        """Return the study restricted to these methods."""
        lines = tuple(line for line in self.lines if line.method in methods)
        return replace(self, methods=tuple(m for m in self.methods if m in methods), lines=lines)

    def setting_at(self, value: Any) -> Setting:
        """Return the setting at one value of the axis."""
        return replace(self.setting, **{self.axis.field: value})


@dataclass(frozen=True)
class Run:
    """One training run: all values that decide its results, which also identify it among the finished runs.

    `split` is `"test"` for a run of a result, and `"validation"` for one that chooses a learning rate.
    """

    experiment: str
    protocol: int
    data: str
    method: str
    seed: int
    device: str
    setting: Setting
    split: str = "test"

    def config(self) -> dict[str, Any]:
        """Return the run as JSON values."""
        return asdict(self)


def _load_nothing(data: str, data_home: Any) -> None:
    """Load nothing: the default, for data that are drawn from the seed."""


@dataclass(frozen=True)
class Experiment:
    """An experiment, declared. Training, statistics and reports are the same for all experiments.

    Attributes:
        name: its name on the command line and in stored runs.
        protocol: a version number. Raise it with every change of the code that changes results: stored runs of another
            protocol are not used.
        title: its heading.
        source: the publication that it follows.
        question: the question that it asks, in a few sentences.
        choices: the choices made here where the source says nothing or contradicts itself, a sentence each.
        data: the names of its data sets, the default first.
        studies: called with a preset, `"quick"`, `"standard"` or `"paper"`, and the name of a data set; returns the
            studies, none if the experiment is not part of the preset.
        architecture: called with a run; returns the sizes of the networks.
        task: called with a run and the result of `load`; returns the task, on the device of the run.
        load: called with the name of a data set and the folder for downloads (None: scikit-learn's own); returns the
            data set. It may raise `DatasetUnavailable`.
    """

    name: str
    protocol: int
    title: str
    source: str
    question: str
    choices: tuple[str, ...]
    data: tuple[str, ...]
    studies: Callable[[str, str], tuple[Study, ...]]
    architecture: Callable[[Run], Architecture]
    task: Callable[[Run, Any], Task]
    load: Callable[[str, Any], Any] = _load_nothing
