"""Learning rates: one for each method of a study at each value of its axis, chosen on the validation split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fasthyper.experiments.store import Record, config_key

if TYPE_CHECKING:
    from fasthyper.experiments.comparison import Comparison
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
            >>> Rate.of("depth", "film", 2, "sgd", {0.1: 0.5, 0.01: 0.25, 1.0: math.inf}).lr
            0.01
        """
        lr = min(errors, key=lambda rate: (errors[rate], rate))
        return cls(study, method, value, optimizer, lr, errors)

    @property
    def diverged(self) -> bool:
        """Whether the runs diverged at all rates."""
        return all(map(math.isinf, self.errors.values()))

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the smallest or the largest of several: a better one may lie outside of the grid."""
        return len(self.errors) > 1 and self.lr in (min(self.errors), max(self.errors))


def is_tuned(study: Study) -> bool:
    """Return whether the learning rates of a study are chosen: it has a grid, and does not vary the rate itself."""
    return study.tuning is not None and study.axis.field != "lr"


def tuned(comparison: Comparison, finished: Mapping[str, Record]) -> Comparison:
    """Return the comparison with the learning rates that its tuning runs have found best.

    Args:
        comparison: the comparison.
        finished: records by the `config_key` of their run; all of `comparison.tuning_runs()` must be there.
    """
    return replace(
        comparison,
        rates=tuple(
            _rate(comparison, finished, study, method, value)
            for study in comparison.studies
            if is_tuned(study)
            for value in study.values
            for method in study.methods
        ),
    )


def _rate(comparison: Comparison, finished: Mapping[str, Record], study: Study, method: str, value: Any) -> Rate:
    numbers: dict[float, list[float]] = {}
    for run in comparison.tuning_runs_of(study, value, method):
        number = finished[config_key(run.config())]["metrics"]["measures"][study.measure.name]
        finite = number is not None and math.isfinite(number)
        numbers.setdefault(run.setting.lr, []).append(number if finite else math.inf)
    errors = {lr: math.fsum(found) / len(found) for lr, found in numbers.items()}
    return Rate.of(study.name, method, value, study.setting_at(value).optimizer, errors)
