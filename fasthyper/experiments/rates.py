"""Learning rates: one for each method of a tuned study at each value of its axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fasthyper.experiments.experiment import Study


@dataclass(frozen=True)
class Rate:
    """The learning rate that was chosen for a method at one value of the axis of a study.

    Attributes:
        study: the name of the study.
        method: the name of the method.
        value: the value of the axis.
        optimizer: whose grid was tried.
        lr: the rate with the least error; of equal ones the smallest.
        errors: the mean of the study's measure over the tuning seeds, on the validation split, for each rate of the
            grid; infinite if a run diverged.
    """

    study: str
    method: str
    value: Any
    optimizer: str
    lr: float
    errors: Mapping[float, float]

    @classmethod
    def of(cls, study: str, method: str, value: Any, optimizer: str, errors: Mapping[float, float]) -> Rate:
        """Choose among rates by their errors. If the runs diverge at all rates, the smallest is taken.

        Example:
            >>> Rate.of("depth", "film", 2, "sgd", {0.1: 0.5, 0.01: 0.25, 1.0: float("inf")}).lr
            0.01
        """
        lr = min(errors, key=lambda rate: (errors[rate], rate))
        return cls(study, method, value, optimizer, lr, errors)

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the smallest or the largest of several: a better one may lie outside of the grid."""
        return len(self.errors) > 1 and self.lr in (min(self.errors), max(self.errors))


def is_tuned(study: Study) -> bool:
    """Return whether the learning rates of a study are chosen: it has a grid, and does not vary the rate itself."""
    return study.tuning is not None and study.axis.field != "lr"
