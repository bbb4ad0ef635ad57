"""The tensors of a workload: every way gets the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from .workloads import Workload


@dataclass(frozen=True)
class Inputs:
    """What a way is a function of.

    Attributes:
        x: `(B, N, I)`; of a graph `(B / neighbours, N, I)`, a row for each node.
        z: `(B, R)`; of a graph, edges that leave one node lie side by side.
        head: H `(O, I, R)`; of two layers, H, bias `(O, R)`, base weight `(O, I)` and base bias `(O,)` of each.
        g: the gradient of y, or what y should be.
        trunk: `(R, R)`, weights of what z comes from in a training step.
    """

    x: Tensor
    z: Tensor
    head: tuple[Tensor, ...]
    g: Tensor
    trunk: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """x, z and the head: what gradients are asked for."""
        return (self.x, self.z, *self.head)

    def of_instances(self, count: int) -> Inputs:
        """The first instances of a layer."""
        return replace(self, x=self.x[:count], z=self.z[:count], g=self.g[:count])

    def double(self) -> Inputs:
        """The same numbers in float64."""
        x, z, g, trunk = (t.double() for t in (self.x, self.z, self.g, self.trunk))
        return Inputs(x, z, tuple(t.double() for t in self.head), g, trunk)


def inputs(w: Workload, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Normal numbers, of a size that keeps y near 1 where there are two layers."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def generated(O: int, I: int) -> tuple[Tensor, ...]:
        R = w.R
        H, bias = normal(O, I, R, scale=(I * R) ** -0.5), normal(O, R, scale=R**-0.5)
        return H, bias, normal(O, I, scale=I**-0.5), normal(O)

    x, z = normal(w.nodes, w.N, w.I), normal(w.B, w.R)
    head = (*generated(w.hidden, w.I), *generated(w.O, w.hidden)) if w.hidden else (normal(w.O, w.I, w.R),)
    return Inputs(x, z, head, normal(w.nodes, w.N, w.O), normal(w.R, w.R, scale=w.R**-0.5))


class Sets(tuple[Inputs, ...]):
    """Tensors that all ways of a comparison take in turns: whoever runs takes the next, whatever ran before."""

    _at = 0

    def rewind(self) -> None:
        """Let the next call take the first."""
        self._at = 0

    def next(self) -> int:
        """The number of the set to take."""
        now, self._at = self._at, (self._at + 1) % len(self)
        return now


def rotated(w: Workload, dtype: torch.dtype, cache: int) -> Sets:
    """So many sets of tensors in a CPU's memory that all are twice its last-level cache, one at least.

    Whoever takes the next one each time finds none of it in the cache.
    """
    first = inputs(w, dtype)
    size = sum(t.nbytes for t in (*first.leaves, first.g))
    return Sets([first, *(inputs(w, dtype, seed=k) for k in range(1, math.ceil(2 * cache / size)))])


@cache
def edges(w: Workload, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Source and target of every edge, sources in order: each node has as many that come as that leave."""
    source = torch.arange(w.nodes, device=device).repeat_interleave(w.neighbours)
    step = torch.arange(1, w.neighbours + 1, device=device).repeat(w.nodes)
    return source, (source + step) % w.nodes
