"""The settings of runs: the numbers and names that decide a run, except the method and the seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from fasthyper.experiments.networks import ACTIVATIONS, INITIALISATIONS

OPTIMIZERS = ("sgd", "adam", "adadelta")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All values that decide a run, except the method and the seed. Each experiment has a subclass with further fields.

    Annotate numbers as `int` or `float`: `int` fields are at least 1 (`depth`: 2), `float` fields finite and not
    negative. Name in `DEFINING` the fields that the titles and claims of a study refer to: `Comparison.of` refuses to
    change them.

    Attributes:
        epochs: passes over the training examples.
        lr: the learning rate.
        batch_size: instances in a training batch.
        optimizer: `"sgd"`, `"adam"` or `"adadelta"`.
        momentum: of SGD only.
        schedule: of the learning rate: `"constant"`, or `"cosine"`, which falls to 0.
        size: as in `Architecture`.
        initialisation: as in `Architecture`.

    Raises:
        ValueError: a number out of range, or an unknown optimizer, schedule or activation.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ()

    epochs: int
    lr: float
    batch_size: int
    optimizer: str = "sgd"
    momentum: float = 0.0
    schedule: str = "constant"
    size: float = 1.0
    initialisation: str = "torch"

    def __post_init__(self) -> None:
        """Check the values."""
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            minimum = 2 if name == "depth" else 1
            if entry.type in (int, "int") and not (is_integer(value) and value >= minimum):
                raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value!r}")
            if entry.type in (float, "float") and not (
                isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            ):
                raise ValueError(f"{name}: expected a finite number that is not negative, got {value!r}")
        for name in ("lr", "size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive finite number, got {getattr(self, name)!r}")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("activation", tuple(ACTIVATIONS)),
            ("initialisation", INITIALISATIONS),
        ):
            if getattr(self, name, known[0]) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class ContextSetting(Setting):
    """A setting with the sizes of f and e.

    Attributes:
        depth: linear layers of f and e, including the last one.
        width: units of each of their hidden layers.
        embedding: E, the numbers that e returns.
    """

    depth: int
    width: int
    embedding: int

    @property
    def context(self) -> tuple[int, ...]:
        """The widths of the hidden layers of f and e, as `Architecture.context`."""
        return (self.width,) * (self.depth - 1)


def is_integer(value: object) -> bool:
    """Return whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
