"""Run a differentiable function of instances, some of them at a time: `run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import planner
from .register import MISSING, transformed

_TILES = 16
"""How many tensors with a row for each instance a function and its derivative may hold at the same time."""

Results = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""Results that have a row for each instance, and results that are sums over instances."""


def run(
    f: Callable[..., Results],
    batched: Sequence[Tensor],
    shared: Sequence[Tensor | None],
    numbers: int,
    whole: bool = False,
) -> Results:
    """Return ``f(*batched, *shared)``, computed for some instances at a time, and differentiable to any order.

    Autograd would keep what f computes for all instances, so each part is a checkpoint: its backward computes it again.
    torch.func supports no checkpoints, and compiled code no loop whose length depends on B: there f runs once.

    Args:
        f: a function that returns `Results`.
        batched: tensors with a row for each instance.
        shared: other tensors.
        numbers: the size of the largest tensor that f computes for one instance.
        whole: run f once.
    """
    if whole or MISSING or torch.compiler.is_compiling() or transformed():
        return f(*batched, *shared)
    step = max(1, planner.get_workspace_limit() // _TILES // max(1, numbers * batched[0].element_size()))
    if batched[0].shape[0] <= step:
        return f(*batched, *shared)
    recorded = torch.is_grad_enabled()
    rows: list[Sequence[Tensor | None]] = []
    sums: Sequence[Tensor | None] = ()
    for part in zip(*(t.split(step) for t in batched), strict=True):
        if recorded:
            of_part = checkpoint(f, *part, *shared, use_reentrant=False, preserve_rng_state=False)
        else:
            of_part = f(*part, *shared)
        rows.append(of_part[0])
        sums = tuple(map(_add, sums, of_part[1])) if sums else of_part[1]
    return tuple(map(_cat, zip(*rows, strict=True))), sums


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return None if total is None or term is None else total + term


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [t for t in parts if t is not None]
    return torch.cat(given) if given else None
