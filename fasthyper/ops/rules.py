"""The table of rules: the derivatives and the vmap of the op family.

T(x, z, H, g) = Σ x[b,n,i] z[b,r] H[o,i,r] g[b,n,o] has four factors, and each op is T with one taken out:

| op            | inputs  | result         |
|---------------|---------|----------------|
| `apply`       | x, z, H | in place of g  |
| `cond_grad`   | x, g, H | in place of z  |
| `weight_grad` | x, z, g | in place of H  |

The derivative of an op in an argument is T without that argument, with the cotangent in place of the result. dT/dx
needs no fourth op: it is `apply(g, z, Hᵀ)`, where Hᵀ swaps o and i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .shapes import LINEAR as AXES
from .shapes import Axes, shape_of, sizes_of

INPUTS = {"apply": ("x", "z", "weight"), "cond_grad": ("x", "g", "weight"), "weight_grad": ("x", "z", "g")}
RESULT = {"apply": "g", "cond_grad": "z", "weight_grad": "weight"}

ops = torch.ops.fasthyper


def others(factors: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return which arguments the gradient of each factor reads: the other factors of a product."""
    return {f: tuple(other for other in factors if other != f) for f in factors}


READS: dict[str, tuple[str, ...]] = {
    "x": ("z", "weight", "base_weight"),
    "z": ("x", "weight", "bias"),
    "weight": ("x", "z"),
    "bias": ("z",),
    "base_weight": ("x",),
    "base_bias": (),
}
"""Which arguments the gradient of each argument reads, with a base and a generated bias."""


def derivative(factor: str, t: Mapping[str, Tensor], *choice: str) -> Tensor:
    """Return dT/d(factor), given the other three factors and the choice of a backend."""
    if factor == "x":
        return ops.apply(t["g"], t["z"], t["weight"].transpose(0, 1), *choice)
    if factor == "z":
        return ops.cond_grad(t["x"], t["g"], t["weight"], *choice)
    if factor == "weight":
        return ops.weight_grad(t["x"], t["z"], t["g"], *choice)
    return ops.apply(t["x"], t["z"], t["weight"], *choice)


# The axis that a batched dimension v is merged into, by the batched factors: every batched argument and the result have
# this axis, so that the op runs once. Arguments without v that have the axis are repeated along it. For other
# combinations of factors there is no such axis, and the op runs once for each v.
MERGE: dict[str, dict[tuple[str, ...], str]] = {
    "apply": {("x",): "N", ("z",): "B", ("x", "z"): "B", ("weight",): "O"},
    "cond_grad": {("x",): "B", ("g",): "B", ("x", "g"): "B", ("weight",): "R"},
    "weight_grad": {("x",): "I", ("z",): "R", ("g",): "O"},
}


def vmap(name: str, batch: int, dims: Sequence[int | None], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Return the result of an op with some arguments batched, and its batched dimension."""
    return merge_or_loop(getattr(ops, name), AXES, INPUTS[name], AXES[RESULT[name]], MERGE[name], batch, dims, args)


def merge_or_loop(
    op: Callable[..., Tensor],
    axes: Axes,
    factors: Sequence[str],
    result_axes: str,
    merge: Mapping[tuple[str, ...], str],
    batch: int,
    dims: Sequence[int | None],
    args: tuple[Any, ...],
    sizes: Mapping[str, int] | None = None,
) -> tuple[Tensor, int]:
    """Run an op once, on arguments with the batched dimension merged into an axis, or else once for each of the batch.

    Args:
        op: the op. Its first arguments are factors.
        axes: the axes of each factor.
        factors: the names of these arguments.
        result_axes: the axes of the result.
        merge: the axis to merge into, by the batched factors.
        batch: the size of the batched dimension.
        dims: the batched dimension of each argument, or None.
        args: the arguments.
        sizes: the sizes of letters that no factor has.
    """
    count = len(factors)
    tensors = {f: t if d is None else t.movedim(d, 0) for f, t, d in zip(factors, args, dims, strict=False)}
    batched = tuple(f for f, d in zip(factors, dims, strict=False) if d is not None)
    sizes = {**sizes_of(axes, {f: t.shape[f in batched :] for f, t in tensors.items()}), **(sizes or {})}
    others = any(d is not None for d in dims[count:])
    axis = None if others else merge.get(batched)
    if axis is None and batch == 0:
        return tensors[factors[0]].new_zeros(0, *shape_of(result_axes, sizes)), 0
    if axis is None:
        each = ([t if d is None else t.select(d, v) for t, d in zip(args, dims, strict=True)] for v in range(batch))
        return torch.stack([op(*values) for values in each]), 0
    merged = []
    for f, t in tensors.items():
        if axis in axes[f]:
            position = axes[f].index(axis)
            t = t if f in batched else t.expand(batch, *t.shape)
            t = t.movedim(0, position).flatten(position, position + 1)
        merged.append(t)
    y = op(*merged, *args[count:])
    position = result_axes.index(axis)
    return y.view(*y.shape[:position], batch, *shape_of(result_axes, sizes)[position:]), position
