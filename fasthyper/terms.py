"""The terms of a sum with an index for each factor, and the order that groups them by the value of an index.

    y[t(e)] += Σ_{i,r} H[o,i,r] x[s(e),i] z[c(e),r]      for every term e

s is the source of a term, c its condition and t its target. An index that is None is the identity: term e has value e.
What is computed from an index that an `Incidence` owns, such as the order by its values, is kept as long as the tensor
lives and is unchanged. From any other index it is computed again in every call: generated code may write other values
into the same tensor without a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
NAMES = ("source", "cond", "target")
"""The indices of a term, in the order of the factors x, z and g."""


class Sorted(NamedTuple):
    """The terms grouped by the value of an index.

    Args:
        order: the terms ``(E,)``, ascending in the value and, for equal values, in the term.
        ptr: ``(values + 1,)``: the terms of value v are ``order[ptr[v]:ptr[v + 1]]``.
    """

    order: Tensor
    ptr: Tensor


class _Known:
    """What is known of an index tensor at one version of its content: its extremes, and what `kept` computed."""

    def __init__(self, index: Tensor) -> None:
        self.version = _version(index)
        self.bounds = (int(index.min()), int(index.max())) if index.numel() else (0, -1)
        self.kept: dict[Hashable, tuple[object, Any]] = {}
        self.owned = False


_known = WeakTensorKeyDictionary()


def _version(index: Tensor) -> int | None:
    """Return a number that changes with the content; None for an inference tensor, which has none."""
    return None if index.is_inference() else index._version


def _look_up(index: Tensor) -> _Known:
    known = _known.get(index)
    if known is None or known.version is None or known.version != _version(index):
        known = _known[index] = _Known(index)
    return known


def own(index: Tensor) -> Tensor:
    """Keep what is computed from this index, which nothing writes to; return it."""
    _look_up(index).owned = True
    return index


def _forget_unowned(index: Tensor) -> None:
    known = _known.get(index)
    if known is not None and not known.owned:
        _known.pop(index, None)


def check_range(name: str, index: Tensor, size: int) -> None:
    """Check that all values of an index are in 0 … size - 1, once for each content of the tensor.

    Raises:
        ValueError: one is not.
    """
    low, high = _look_up(index).bounds
    if low < 0 or high >= size:
        wrong = (index < 0) | (index >= size)
        at = int(wrong.nonzero()[0])
        bound = f"values from 0 to {size - 1}" if size else "no values"
        raise ValueError(
            f"{name} must have {bound}, since there are {size} {name}s, got {int(index[at])} at term {at} of "
            f"{tuple(index.shape)}"
        )


def kept(index: Tensor, key: Hashable, of: object, make: Callable[[], T]) -> T:
    """Return what `make` computes from an index and another object; once for each key, while both are the same.

    Args:
        index: an index tensor; what was computed from it is dropped when its content changes, or with the tensor.
        key: names what is computed, and holds the numbers that it depends on.
        of: the other object, such as the order by another index, or None.
        make: computes it.
    """
    known = _look_up(index).kept
    if key not in known or known[key][0] is not of:
        known[key] = of, make()
    return known[key][1]


def sort(index: Tensor, size: int) -> Sorted:
    """Return the terms grouped by the value of an index, which is below `size`."""

    def make() -> Sorted:
        counts = torch.bincount(index, minlength=size)
        ptr = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
        torch.cumsum(counts, 0, out=ptr[1:])
        return Sorted(torch.argsort(index, stable=True), ptr)

    return kept(index, ("sorted", size), None, make)


class Terms(NamedTuple):
    """The indices of all terms, int64 ``(E,)`` or None for the identity, and the number of values of each."""

    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    sources: int
    conds: int
    targets: int

    @property
    def num_terms(self) -> int:
        """E, the number of terms."""
        for index in self[:3]:
            if index is not None:
                return index.shape[0]  # not len(), which makes a traced size constant
        return self.sources

    def check_ranges(self) -> None:
        """Check that every index is in its range; see `check_range`. A call begins with it."""
        for name, index, size in zip(NAMES, self[:3], self[3:], strict=True):
            if index is not None:
                _forget_unowned(index)
                check_range(name, index, size)

    def sort(self, name: str) -> Sorted | None:
        """Return the terms grouped by one of the indices; None for the identity."""
        index = getattr(self, name)
        return None if index is None else sort(index, getattr(self, f"{name}s"))
