"""The one table of rules: how the ops of the family derive, and how they vectorise.

T(x, z, H, g) = Σ x[b,n,i] z[b,r] H[o,i,r] g[b,n,o] has four factors, and each op is T with one taken out:

| op            | inputs  | result      |
|---------------|---------|-------------|
| `apply`       | x, z, H | the place of g |
| `cond_grad`   | x, g, H | the place of z |
| `weight_grad` | x, z, g | the place of H |

dT/dx needs no fourth op: it is `apply(g, z, Hᵀ)`, Hᵀ swapping o and i. An op being T without one factor, its
derivative in an argument is T without that argument and with the cotangent in the place of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

INPUTS = {"apply": "xzw", "cond_grad": "xgw", "weight_grad": "xzg"}
RESULT = {"apply": "g", "cond_grad": "z", "weight_grad": "w"}
AXES = {"x": "bni", "z": "br", "w": "oir", "g": "bno"}

ops = torch.ops.fasthyper


def partial(factor: str, t: dict[str, Any], how: tuple[str, ...]) -> Tensor:
    """Return dT/d(factor), the other three factors given."""
    if factor == "x":
        return ops.apply(t["g"], t["z"], t["w"].transpose(0, 1), *how)
    if factor == "z":
        return ops.cond_grad(t["x"], t["g"], t["w"], *how)
    if factor == "w":
        return ops.weight_grad(t["x"], t["z"], t["g"], *how)
    return ops.apply(t["x"], t["z"], t["w"], *how)


def result_shape(name: str, shapes: Iterable[Sequence[int]]) -> list[int]:
    """Return the shape of an op's result, from those of its inputs."""
    size: dict[str, int] = {}
    for factor, shape in zip(INPUTS[name], shapes, strict=True):
        size.update(zip(AXES[factor], shape, strict=True))
    return [size[axis] for axis in AXES[RESULT[name]]]


# vmap. A batched dimension v is merged into an axis of the op, `axis`, that every batched argument has and
# that is in the result: the op then does not know. Arguments without v that have the axis are repeated along it.
# Listed by which factors are batched; what is not listed has a v of its own in each factor, and is looped over.
MERGE = {
    "apply": {"x": "n", "z": "b", "xz": "b", "w": "o"},
    "cond_grad": {"x": "b", "g": "b", "xg": "b", "w": "r"},
    "weight_grad": {"x": "i", "z": "r", "g": "o"},
}


def vmap(name: str, batch: int, dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Run an op with some arguments batched; returns the result and its batched dimension."""
    op = getattr(ops, name)
    factors, how = INPUTS[name], args[3:]
    tensors = [a if d is None else a.movedim(d, 0) for a, d in zip(args[:3], dims, strict=False)]
    batched = [d is not None for d in dims[:3]]
    axis = MERGE[name].get("".join(f for f, v in zip(factors, batched, strict=True) if v))
    if axis is None and batch == 0:
        shapes = (t.shape[k:] for t, k in zip(tensors, batched, strict=True))
        return tensors[0].new_zeros([0, *result_shape(name, shapes)]), 0
    if axis is None:
        each = ([t[v] if k else t for t, k in zip(tensors, batched, strict=True)] for v in range(batch))
        return torch.stack([op(*ts, *how) for ts in each]), 0
    merged = []
    for f, t, k in zip(factors, tensors, batched, strict=True):
        if axis in AXES[f]:
            at = AXES[f].index(axis)
            t = t if k else t.expand(batch, *t.shape)
            t = t.movedim(0, at).flatten(at, at + 1)
        merged.append(t)
    y = op(*merged, *how)
    at = AXES[RESULT[name]].index(axis)
    one = result_shape(name, (t.shape[k:] for t, k in zip(tensors, batched, strict=True)))
    return y.view(*y.shape[:at], batch, *one[at:]), at
