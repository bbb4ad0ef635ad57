"""The table of rules: the derivatives and the vmap of the op family.

T(x, z, H, g) = Σ x[b,n,i] z[b,r] H[o,i,r] g[b,n,o] has four factors, and each op is T with one taken out:

| op            | inputs  | result         |
|---------------|---------|----------------|
| `apply`       | x, z, H | in place of g  |
| `cond_grad`   | x, g, H | in place of z  |
| `weight_grad` | x, z, g | in place of H  |

The derivative of an op in an argument is T without that argument, with the cotangent in place of the result. dT/dx
needs no fourth op: it is `apply(g, z, Hᵀ)`, where Hᵀ swaps o and i. The same holds with a leading axis of models, for
the ops whose names end in `_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .shapes import LINEAR, MODELS, Axes, shape_of, sizes_of

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


def derivative(factor: str, t: Mapping[str, Tensor], *choice: str, suffix: str = "") -> Tensor:
    """Return dT/d(factor), given the other three factors, the choice of a backend, and the suffix of the ops' names."""
    if factor == "x":
        return getattr(ops, f"apply{suffix}")(t["g"], t["z"], t["weight"].transpose(-3, -2), *choice)
    if factor == "z":
        return getattr(ops, f"cond_grad{suffix}")(t["x"], t["g"], t["weight"], *choice)
    if factor == "weight":
        return getattr(ops, f"weight_grad{suffix}")(t["x"], t["z"], t["g"], *choice)
    return getattr(ops, f"apply{suffix}")(t["x"], t["z"], t["weight"], *choice)


# The axis that a batched dimension v is merged into, by the batched factors: every batched argument and the result have
# this axis, so that the op runs once. Arguments without v that have the axis are repeated along it. Other combinations
# of factors have no such axis: there v becomes the axis of models, M, and the factors without it are views.
MERGE: dict[str, dict[tuple[str, ...], str]] = {
    "apply": {("x",): "N", ("z",): "B", ("x", "z"): "B", ("weight",): "O"},
    "cond_grad": {("x",): "B", ("g",): "B", ("x", "g"): "B", ("weight",): "R"},
    "weight_grad": {("x",): "I", ("z",): "R", ("g",): "O"},
}


def vmap(name: str, batch: int, dims: Sequence[int | None], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Return the result of an op with some arguments batched, and its batched dimension. One op runs."""
    factors = INPUTS[name]
    axis = MERGE[name].get(_batched(factors, dims))
    if axis is not None:
        return _merge(getattr(ops, name), LINEAR, factors, LINEAR[RESULT[name]], axis, batch, dims, args)
    count = len(factors)
    each = (
        t.expand(batch, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(args[:count], dims[:count], strict=True)
    )
    return getattr(ops, f"{name}_models")(*each, *args[count:]), 0


def vmap_models(name: str, batch: int, dims: Sequence[int | None], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Return the same for an op with an axis of models, which takes what no other axis takes."""
    factors = INPUTS[name]
    axis = MERGE[name].get(_batched(factors, dims), "M")
    return _merge(getattr(ops, f"{name}_models"), MODELS, factors, MODELS[RESULT[name]], axis, batch, dims, args)


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
    others = any(d is not None for d in dims[len(factors) :])
    axis = None if others else merge.get(_batched(factors, dims))
    if axis is not None:
        return _merge(op, axes, factors, result_axes, axis, batch, dims, args, sizes)
    if batch == 0:
        known = _sizes(axes, factors, dims, args, sizes)
        return args[0].new_zeros(0, *shape_of(result_axes, known)), 0
    each = ([t if d is None else t.select(d, v) for t, d in zip(args, dims, strict=True)] for v in range(batch))
    return torch.stack([op(*values) for values in each]), 0


def _batched(factors: Sequence[str], dims: Sequence[int | None]) -> tuple[str, ...]:
    return tuple(f for f, d in zip(factors, dims, strict=False) if d is not None)


def _sizes(
    axes: Axes,
    factors: Sequence[str],
    dims: Sequence[int | None],
    args: tuple[Any, ...],
    more: Mapping[str, int] | None,
) -> dict[str, int]:
    """Return the size of every letter, without the batched dimension."""
    shapes = {}
    for f, t, d in zip(factors, args, dims, strict=False):
        shapes[f] = [n for k, n in enumerate(t.shape) if d is None or k != d % t.dim()]
    return {**sizes_of(axes, shapes), **(more or {})}


def _merge(
    op: Callable[..., Tensor],
    axes: Axes,
    factors: Sequence[str],
    result_axes: str,
    axis: str,
    batch: int,
    dims: Sequence[int | None],
    args: tuple[Any, ...],
    more: Mapping[str, int] | None = None,
) -> tuple[Tensor, int]:
    """Run an op once, on arguments with the batched dimension merged into an axis; see `merge_or_loop`."""
    merged = []
    for f, t, d in zip(factors, args, dims, strict=False):
        if axis in axes[f]:
            position = axes[f].index(axis)
            t = t.expand(batch, *t.shape) if d is None else t.movedim(d, 0)
            t = t.movedim(0, position).flatten(position, position + 1)
        merged.append(t)
    y = op(*merged, *args[len(factors) :])
    position = result_axes.index(axis)
    known = _sizes(axes, factors, dims, args, more)
    return y.view(*y.shape[:position], batch, *shape_of(result_axes, known)[position:]), position
