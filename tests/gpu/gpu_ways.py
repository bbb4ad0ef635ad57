"""The ways to compute one part of a layer that the stages `kernels` and `ncu` of `make gpu` run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_common import available
from torch import Tensor

from fasthyper.backends import BACKENDS

PARTS = {"forward": None, "dx_dz": (True, True, False), "dH": (False, False, True)}
"""The parts of a layer, with the gradients that a backward of it computes."""
RANKS = 3
"""Tiles of Triton that are run: those of the lowest predicted times."""

Call = Callable[[], Any]


def part_call(backend: str, part: str, tensors: Sequence[Tensor], schedule: str = "fold") -> Call:
    """Return the call of a part by a backend."""
    x, z, weight, g = tensors
    module, mask = BACKENDS[backend], PARTS[part]
    if mask is None:
        return partial(module.apply, x, z, weight, schedule=schedule)
    return partial(module.grads, x, z, weight, None, None, g, (*mask, False, False, False), schedule=schedule)


@contextlib.contextmanager
def tile_of(rank: int) -> Iterator[list[Any]]:
    """Let Triton's calls take the tile of this rank, the best one first; yield the list of those taken."""
    from fasthyper.backends.triton import tuning

    taken: list[Any] = []

    def choose(key: Any, candidates: Sequence[Any], device: Any, run: Any) -> Any:
        ranked = sorted(candidates, key=lambda c: c.seconds)
        chosen = ranked[min(rank, len(ranked) - 1)]
        taken.append((str(key[0]), tuple(chosen.tile), chosen.splits, len(ranked)))
        return chosen

    before, tuning.choose = tuning.choose, choose
    tuning.forget()
    try:
        yield taken
    finally:
        tuning.choose = before
        tuning.forget()


def product(sizes: tuple[int, ...], part: str, dtype: torch.dtype) -> Call:
    """Return one matrix product with the flops of a part, whose generated operand is in memory."""
    B, N, R, I, O = sizes
    M, K = B * N, I * R
    rows, depth, columns = {"forward": (M, K, O), "dx_dz": (M, O, K), "dH": (O, M, K)}[part]
    a, b = (torch.randn(shape, device="cuda").to(dtype) for shape in ((rows, depth), (depth, columns)))
    return partial(torch.mm, a, b)


def ways(sizes: tuple[int, ...], part: str, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Call, int | None]]:
    """Yield a name, a call, and the rank of the tile that it takes, if it is Triton's."""
    yield "product of equal flops", product(sizes, part, tensors[0].dtype), None
    if available("triton"):
        for rank in range(RANKS):
            yield f"triton {rank + 1}", part_call("triton", part, tensors), rank
    if available("cuda"):
        yield "cuda", part_call("cuda", part, tensors), None
    yield "materialised", part_call("materialised", part, tensors, "auto"), None
