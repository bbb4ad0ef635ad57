"""The tensors of a workload. All ways of a comparison get the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .terms import pair_sizes
from .workloads import Workload

Function = Callable[..., Tensor]
"""A function of (x, z, *head) that returns y; see `Inputs`."""


@dataclass(frozen=True)
class Inputs:
    """One set of tensors.

    Attributes:
        x: `(B, N, I)`; over terms `(S, I)`, of pairs `(sentences, L, I)`, of a convolution `(B, I, side, side)`.
        z: `(B, R)`; over terms `(C, R)`, of pairs `(sentences, M, R)`.
        head: H `(O, I, R)`; of a convolution `(O, I / groups, kernel, kernel, R)`; of two layers, H, bias `(O, R)`,
            base weight `(O, I)` and base bias `(O,)` of each; of low rank, the heads of A and B.
        g: the gradient of y, or the target of a training step: `(B, N, O)`; over terms `(T, O)`, of pairs
            `(sentences, L, M, O)`, of a convolution `(B, O, √N, √N)`.
        trunk: `(R, R)`, the weights of the layer that computes z in a training step.
    """

    x: Tensor
    z: Tensor
    head: tuple[Tensor, ...]
    g: Tensor
    trunk: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """x, z and the head: the tensors whose gradients are computed."""
        return (self.x, self.z, *self.head)

    def of_instances(self, count: int) -> Inputs:
        """Return the first `count` instances of a layer."""
        return replace(self, x=self.x[:count], z=self.z[:count], g=self.g[:count])

    def double(self) -> Inputs:
        """Return the same numbers in float64."""
        x, z, g, trunk = (t.double() for t in (self.x, self.z, self.g, self.trunk))
        return Inputs(x, z, tuple(t.double() for t in self.head), g, trunk)


def inputs(w: Workload, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Draw normal numbers; heads of two layers are scaled to keep y near 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def generated(O: int, I: int) -> tuple[Tensor, ...]:
        R = w.R
        H, bias = normal(O, I, R, scale=(I * R) ** -0.5), normal(O, R, scale=R**-0.5)
        return H, bias, normal(O, I, scale=I**-0.5), normal(O)

    x, z, y = shapes(w)
    head = (*generated(w.hidden, w.I), *generated(w.O, w.hidden)) if w.hidden else tuple(normal(*H) for H in heads(w))
    return Inputs(normal(*x), normal(*z), head, normal(*y), normal(w.R, w.R, scale=w.R**-0.5))


def heads(w: Workload) -> list[tuple[int, ...]]:
    """Return the shapes of the head, or of the heads of A and B."""
    if w.rank:
        return [(w.rank, w.I, w.R), (w.O, w.rank, w.R)]
    return [(w.O, w.I // w.groups, w.kernel, w.kernel, w.R) if w.kernel else (w.O, w.I, w.R)]


def shapes(w: Workload) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of x, z and y."""
    if w.form == "pairs":
        sets, left, right = pair_sizes(w)
        return (sets, left, w.I), (sets, right, w.R), (sets, left, right, w.O)
    if w.kernel:
        output = math.isqrt(w.N)
        return (w.B, w.I, w.side, w.side), (w.B, w.R), (w.B, w.O, output, output)
    if w.draw:
        return (w.S or w.B, w.I), (w.C or w.B, w.R), (w.T or w.B, w.O)
    return (w.B, w.N, w.I), (w.B, w.R), (w.B, w.N, w.O)


class Sets(tuple[Inputs, ...]):
    """Sets of tensors that all ways of a comparison share. Every call of any way takes the next set."""

    _at = 0

    def rewind(self) -> None:
        """Make the next call take the first set."""
        self._at = 0

    def next(self) -> int:
        """Return the index of the set to take, and advance."""
        now, self._at = self._at, (self._at + 1) % len(self)
        return now


def rotated(w: Workload, dtype: torch.dtype, cache: int) -> Sets:
    """Return enough sets to fill a CPU's last-level cache of `cache` bytes twice, at least one set.

    A call that takes the next set each time then finds none of its tensors in the cache.
    """
    first = inputs(w, dtype)
    size = sum(t.nbytes for t in (*first.leaves, first.g))
    return Sets([first, *(inputs(w, dtype, seed=k) for k in range(1, math.ceil(2 * cache / size)))])
