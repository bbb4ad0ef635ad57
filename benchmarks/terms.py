"""The indices of workloads over terms, and terms grouped by an index as the peers need them.

    y[t(e)] += Σ_{i,r} H[o,i,r] x[s(e),i] z[c(e),r]      for every term e

Drawing, sorting and padding are done once per workload, outside of what is timed, for every way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .workloads import Workload


class Indices(NamedTuple):
    """Source, condition and target of each term, `(E,)`; None for the identity: term e has row e."""

    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None


def _uniform(w: Workload, generator: torch.Generator) -> Indices:
    source, cond, target = (
        torch.randint(rows, (w.B,), generator=generator) if rows else None for rows in (w.S, w.C, w.T)
    )
    return Indices(source, cond, target)


def _power_law(w: Workload, generator: torch.Generator) -> Indices:
    weights = torch.arange(1.0, w.T + 1) ** -0.7
    target = torch.multinomial(weights, w.B, replacement=True, generator=generator)
    return _uniform(w, generator)._replace(target=target)


def _complete(w: Workload, generator: torch.Generator) -> Indices:
    """Return all edges of complete graphs, ordered by source."""
    atoms = w.B // w.T + 1
    source, target = (~torch.eye(atoms, dtype=torch.bool)).nonzero().T
    first = torch.arange(0, w.T, atoms).unsqueeze(1)
    return Indices((first + source).flatten(), None, (first + target).flatten())


def _packed(w: Workload, generator: torch.Generator, least: int, most: int) -> Indices:
    """Return C groups of `least` to `most` terms, one after the other."""
    counts = torch.randint(least, most + 1, (w.C,), generator=generator)
    while missing := w.B - int(counts.sum()):
        one = torch.randint(w.C, (abs(missing),), generator=generator)
        moved = torch.bincount(one, minlength=w.C) * (1 if missing > 0 else -1)
        counts = (counts + moved).clamp(least, most)
    return Indices(None, torch.arange(w.C).repeat_interleave(counts), None)


def _pairs(w: Workload, generator: torch.Generator) -> Indices:
    """Return all pairs of each sentence's two sets of tokens."""
    sets, left, right = pair_sizes(w)
    source = torch.arange(w.S).repeat_interleave(right)
    cond = torch.arange(w.C).view(sets, 1, right).expand(sets, left, right).flatten()
    return Indices(source, cond, None)


def pair_sizes(w: Workload) -> tuple[int, int, int]:
    """Return the number of sentences, and the tokens of x and of z in each."""
    sets = w.S * w.C // w.B
    return sets, w.S // sets, w.C // sets


DRAWS: dict[str, Callable[[Workload, torch.Generator], Indices]] = {
    "uniform": _uniform,
    "power law": _power_law,
    "complete graphs": _complete,
    "5 to 30 each": partial(_packed, least=5, most=30),
    "100 to 300 each": partial(_packed, least=100, most=300),
    "128 to 2048 each": partial(_packed, least=128, most=2048),
    "all pairs": _pairs,
}
"""How the terms of a workload are drawn, by `Workload.draw`."""


@cache
def indices(w: Workload, device: str | torch.device = "cpu") -> Indices:
    """Return the indices of a workload, the same at every call."""
    drawn = DRAWS[w.draw](w, torch.Generator().manual_seed(0))
    return Indices(*(None if t is None else t.to(device) for t in drawn))


class Bucket(NamedTuple):
    """Rows with similar numbers of terms, each padded to the most.

    Attributes:
        row: `(K,)`, values of the index that have terms.
        term: `(K, D)`; a padded slot has the first term of its row.
        absent: `(K, D, 1)`, whether a slot is padded; None if none is.
    """

    row: Tensor
    term: Tensor
    absent: Tensor | None

    def of(self, index: Tensor | None) -> Tensor:
        """Return the value of an index for each slot, `(K · D,)`."""
        return self.term.flatten() if index is None else index[self.term.flatten()]

    @property
    def kept(self) -> Tensor | None:
        """The slots, of `K · D`, that have a term; None if all do."""
        return None if self.absent is None else (~self.absent).flatten().nonzero().squeeze(1)


def buckets(index: Tensor, rows: int, ratio: float = math.inf) -> list[Bucket]:
    """Group terms by the value of an index, below `rows`. In a bucket, no row has more than `ratio` times the least."""
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=rows)
    start = counts.cumsum(0) - counts
    found = counts.nonzero().squeeze(1)
    if ratio < math.inf:
        found = found[torch.argsort(counts[found], stable=True)]
    sizes = counts[found].tolist()
    groups, first = [], 0
    for last in range(1, len(sizes) + 1):
        if last == len(sizes) or sizes[last] > ratio * sizes[first]:
            groups.append(_padded(found[first:last], order, start, counts))
            first = last
    return groups


def _padded(row: Tensor, order: Tensor, start: Tensor, counts: Tensor) -> Bucket:
    slot = torch.arange(int(counts[row].max()), device=row.device)
    absent = slot >= counts[row].unsqueeze(1)
    at = start[row].unsqueeze(1) + slot.masked_fill(absent, 0)
    return Bucket(row, order[at], absent.unsqueeze(2) if absent.any() else None)
