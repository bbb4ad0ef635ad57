"""Tests of significance: t-tests over seeds, Holm's correction for several of them, and their power."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FAMILY = 0.05
"""The chance of any false verdict among the claims of one page."""
POWER = 0.8
"""The chance of finding the effects that are called detectable."""

_QUANTILES = 2000
_MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Outcome:
    """The outcome of a two-sided test.

    Attributes:
        p: the p-value; None if there are fewer than two seeds.
        yes: whether the estimate lies on the side of a yes.
    """

    p: float | None
    yes: bool


def t_test(values: Sequence[float]) -> Outcome:
    """Test whether independent values have mean 0, with Student's t. A positive mean is a yes.

    Example:
        >>> t_test([1.0, 2.0, 3.0])
        Outcome(p=0.074..., yes=True)
    """
    from scipy import special

    if len(values) < 2:
        return Outcome(None, False)
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if mean == 0 or spread == 0:
        return Outcome(1.0 if mean == 0 else 0.0, mean > 0)
    t = mean / (spread / math.sqrt(len(values)))
    return Outcome(float(2 * special.stdtr(len(values) - 1, -abs(t))), mean > 0)


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome for "all of these are a yes".

    The largest p-value of a yes is that of all. The smallest p-value of a no, times the number of outcomes, is that of
    at least one no. An outcome on the other side has the p-value 2 - p, as twice a one-sided one.
    """
    if any(outcome.p is None for outcome in outcomes):
        return Outcome(None, False)
    sides = [(o.p or 0.0, 2 - (o.p or 0.0)) if o.yes else (2 - (o.p or 0.0), o.p or 0.0) for o in outcomes]
    yes, no = max(side[0] for side in sides), len(sides) * min(side[1] for side in sides)
    return Outcome(min(1.0, yes, no), yes < no)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: those of at most 0.05 are significant together, with 5 % chance of any error.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979. It needs no
    independence.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def detectable(values: Sequence[float], level: float) -> float:
    """Return the smallest true mean that a two-sided t-test at this level finds with a chance of 80 %.

    Args:
        values: independent values; their spread is taken for the true one.
        level: of the test.
    """
    return _noncentrality(len(values), level) * statistics.stdev(values) / math.sqrt(len(values))


def seeds_needed(values: Sequence[float], level: float) -> int | None:
    """Return how many values such a test needs to find their mean with a chance of 80 %, if mean and spread are true.

    None stands for more than 100,000, which includes a mean of 0.
    """
    spread = statistics.stdev(values)
    effect = abs(statistics.fmean(values)) / spread if spread > 0 else math.inf

    def enough(seeds: int) -> bool:
        return _noncentrality(seeds, level) <= effect * math.sqrt(seeds)

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if low > _MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@functools.cache
def _noncentrality(seeds: int, level: float) -> float:
    """Return the mean of t, in standard errors, at which the test has its power."""
    from scipy import optimize, special, stats

    critical = float(stats.t.isf(level / 2, seeds - 1))
    scales = critical * _chi(seeds - 1)

    def excess(mean: float) -> float:
        return float(special.ndtr(mean - scales).mean()) - POWER

    return float(optimize.brentq(excess, 0.0, 4 * critical + 10))


@functools.cache
def _chi(degrees: int) -> Any:
    """Return equally likely values of an estimated standard deviation in units of the true one."""
    import numpy as np
    from scipy import stats

    return np.sqrt(stats.chi2.ppf((np.arange(_QUANTILES) + 0.5) / _QUANTILES, degrees) / degrees)
