"""Which row of z each row of x meets: the same one, one of k consecutive rows, or the one that an incidence says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasthyper.incidence import Incidence
from fasthyper.ops import shapes


def rows_per_instance(x: Tensor, instances: int) -> int:
    """Return k, if x has k rows for each of B instances."""
    rows = x.shape[0]
    if instances == 0 or rows % instances:
        if rows == instances:
            return 1
        raise ValueError(
            f"x must have k·B rows with repeat_z=True, where B = {instances} is the number of rows of z, "
            f"got {tuple(x.shape)}"
        )
    return rows // instances


def in_instances(apply: Callable[[Tensor, Any], Tensor], x: Tensor, z: Any, repeat: bool) -> Tensor:
    """Return apply(x, z) for the z of a Hypernetwork.

    Args:
        apply: a layer that takes x as `(B, *, I)`.
        x: `(B, *, I)`, or with `repeat` `(k·B, *, I)`: the rows of an instance are consecutive, and become points.
        z: `(B, R)`, or a pair of them.
        repeat: whether the Hypernetwork repeats z.
    """
    first = z[0] if isinstance(z, tuple) else z
    if repeat:
        shapes.check_input("x", x)
        shapes.check_input("z", first)
        k = rows_per_instance(x, first.shape[0])
        return apply(x.unflatten(0, (first.shape[0], k)), z).flatten(0, 1)
    try:
        return apply(x, z)
    except ValueError as wrong:
        hint = hint_for(x, first.shape[0]) if isinstance(first, Tensor) and first.dim() == 2 else ""
        if not hint:
            raise
        raise ValueError(f"{wrong}{hint}") from None


def hint_for(x: Any, instances: int) -> str:
    """Return a hint if x looks as if it had several rows for each instance."""
    if not isinstance(x, Tensor) or x.dim() < 2 or not 0 < instances < x.shape[0] or x.shape[0] % instances:
        return ""
    return (
        f"; if the network folds windows, heads or beams into the batch, so that {x.shape[0] // instances} consecutive "
        "rows of x belong to each row of z, pass repeat_z=True to the Hypernetwork"
    )


def spread(t: Tensor, x: Tensor, incidence: Incidence | None, repeat: bool | None) -> Tensor:
    """Return a row of t `(B, …)` for each row of x."""
    if incidence is not None:
        if incidence.source is not None or incidence.target is not None:
            raise ValueError(
                "this layer takes an incidence of ragged points (from_batch, from_ptr), not one with sources or "
                "targets: the rows of its result are those of x"
            )
        t = t if incidence.cond is None else t.index_select(0, incidence.cond)
    elif repeat:
        k = rows_per_instance(x, t.shape[0])
        return t.unsqueeze(1).expand(-1, k, *t.shape[1:]).flatten(0, 1)
    if t.shape[0] != x.shape[0]:
        hint = "" if incidence is not None or repeat is None else hint_for(x, t.shape[0])
        raise ValueError(
            f"z must have a row for each of the {x.shape[0]} rows of x {tuple(x.shape)}, got {t.shape[0]} rows{hint}"
        )
    return t


def row_numbers(x: Tensor, instances: int, incidence: Incidence | None, repeat: bool | None) -> Tensor:
    """Return the row of z that each row of x meets, int64."""
    return spread(torch.arange(instances, device=x.device), x, incidence, repeat)
