"""A comparison as data: the experiment (what is compared), the sweep (how much), the run (one point)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fasthyper.experiments.data import Splits
from fasthyper.nn import EmbeddingNetwork, Hypernetwork

Model: TypeAlias = Hypernetwork | EmbeddingNetwork

HYPERNETWORK = "hypernetwork"
EMBEDDING = "embedding"
METHODS = (HYPERNETWORK, EMBEDDING)


class Batch(NamedTuple):
    """What a model is trained on: `model(x, cond)` against `target`, one row per instance."""

    x: Tensor
    cond: Tensor
    target: Tensor


@dataclass(frozen=True)
class Defaults:
    """How an experiment is run on one data set unless asked otherwise."""

    depths: tuple[int, ...]
    seeds: int
    epochs: int
    lr: float
    width: int
    batch_size: int
    setting: Any
    """A frozen dataclass of JSON values: the experiment's own choices for this data set."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's own number. Small models are faster on one."""


@dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of one run, and nothing else: what a finished run is known by."""

    experiment: str
    protocol: int
    data: str
    method: str
    depth: int
    seed: int
    epochs: int
    lr: float
    width: int
    batch_size: int
    device: str
    setting: Any

    def config(self) -> dict[str, Any]:
        """The run as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Claims:
    """What the paper says was found; each is tested on the numbers of a comparison."""

    wins: str
    hypernetwork_improves: str
    embedding_flat: str


@dataclass(frozen=True)
class Experiment:
    """What is compared, declared; the training loop, the store and the report are the same for all."""

    name: str
    protocol: int
    """Raised when a change of the code changes the numbers: older runs are then not mixed with newer ones."""
    title: str
    source: str
    question: str
    claims: Claims
    choices: tuple[str, ...]
    """What was chosen here, the paper and its code being silent or at odds."""
    defaults: Mapping[str, Defaults]
    load: Callable[[str, Any], Splits]
    draw: Callable[[Tensor, Run, torch.Generator], Batch]
    """Raw examples to a batch; called anew at every access, with a generator on the CPU."""
    build: Mapping[str, Callable[[Run], Model]]
    loss: Callable[[Tensor, Tensor], Tensor]
    wrong: Callable[[Tensor, Tensor], Tensor]
    """The error of each example, between 0 and 1."""
    chance: float


@dataclass(frozen=True)
class Comparison:
    """A sweep: both methods at every depth with every seed. Made by `Comparison.of`, which fills in defaults.

    Raises:
        ValueError: an unknown data set or device, depths below 2, or a number that is not positive.
    """

    experiment: Experiment
    data: str
    depths: tuple[int, ...]
    seeds: int
    epochs: int
    lr: float
    width: int
    batch_size: int
    device: str

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        data: str,
        *,
        depths: str | tuple[int, ...] | None = None,
        seeds: int | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        device: str = "auto",
    ) -> Comparison:
        """Fill in what is None by the experiment's defaults for this data set; depths may be text: `2-9`."""
        defaults = _defaults(experiment, data)
        if isinstance(depths, str):
            depths = parse_depths(depths)
        return cls(
            experiment=experiment,
            data=data,
            depths=defaults.depths if depths is None else tuple(depths),
            seeds=defaults.seeds if seeds is None else seeds,
            epochs=defaults.epochs if epochs is None else epochs,
            lr=defaults.lr if lr is None else lr,
            width=defaults.width if width is None else width,
            batch_size=defaults.batch_size if batch_size is None else batch_size,
            device=resolve_device(device),
        )

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        _defaults(self.experiment, self.data)
        for name in ("seeds", "epochs", "width", "batch_size"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not isinstance(self.lr, (int, float)) or not math.isfinite(self.lr) or self.lr <= 0:
            raise ValueError(f"lr: expected a positive finite number, got {self.lr!r}")
        if not self.depths or not all(_is_integer(depth) and depth >= 2 for depth in self.depths):
            raise ValueError(f"depths: expected integers of at least 2, got {self.depths!r}")
        if len(set(self.depths)) < len(self.depths):
            raise ValueError(f"depths: each may be named once, got {self.depths!r}")

    @property
    def defaults(self) -> Defaults:
        """The experiment's defaults for this data set."""
        return self.experiment.defaults[self.data]

    def runs(self) -> list[Run]:
        """All runs, one seed after the other, so that a sweep cut short still covers every depth."""
        return [
            Run(
                experiment=self.experiment.name,
                protocol=self.experiment.protocol,
                data=self.data,
                method=method,
                depth=depth,
                seed=seed,
                epochs=self.epochs,
                lr=float(self.lr),
                width=self.width,
                batch_size=self.batch_size,
                device=self.device,
                setting=self.defaults.setting,
            )
            for seed in range(self.seeds)
            for depth in sorted(self.depths)
            for method in METHODS
        ]


def parse_depths(text: str) -> tuple[int, ...]:
    """Read depths: numbers and ranges, with commas between.

    Raises:
        ValueError: anything else, a range that runs backwards, a depth below 2.

    Example:
        >>> parse_depths("2-4,8")
        (2, 3, 4, 8)
    """
    depths: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        if match is None:
            raise ValueError(f"depths: expected numbers or ranges such as 2-9 or 2,4,8, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"depths: the range {part.strip()!r} runs backwards")
        if first < 2:
            raise ValueError(f"depths: expected depths of at least 2, got {text!r}")
        depths.extend(range(first, last + 1))
    return tuple(depths)


def resolve_device(device: str) -> str:
    """`"cpu"` or `"cuda"`; `"auto"` takes the GPU where torch sees one.

    Raises:
        ValueError: another name, or `"cuda"` where torch sees no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA device here")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _defaults(experiment: Experiment, data: str) -> Defaults:
    if data not in experiment.defaults:
        known = ", ".join(experiment.defaults)
        raise ValueError(f"data: {data!r} is not a data set of {experiment.name}; known are {known}")
    return experiment.defaults[data]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
