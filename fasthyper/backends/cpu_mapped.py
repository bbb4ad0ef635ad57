"""The kernels of csrc/cpu/mapped.h, of a function of the generated weights; see `aten.mapped`.

They compute one point of each instance in float32, where the rows of H and of z are contiguous. Arguments in 16 bits
are converted for some instances at a time. `aten.mapped` computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import planner
from ..problem import KERNEL_DTYPES, Problem
from . import aten
from .aten import mapped
from .aten.tiling import blocks

NAMES = ("abs", "relu", "exp", "sigmoid", "tanh")
_FEWEST = 16  # instances; the kernels compute lanes of 32
_FEATURES = 4096  # of x, z and y together, at most: those of some instances are in memory together
_ops = torch.ops.fasthyper_cpu


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    name: str,
) -> Tensor:
    """Return y (B, N, O) of x (B, N, I), z (B, R), H (O, I, R); bias (O, R), W0 (O, I), b0 (O,) or None."""
    if not takes(x, z, weight, name):
        return mapped.apply(x, z, weight, bias, base_weight, base_bias, name)
    limit = planner.get_workspace_limit()
    if x.dtype == torch.float32:
        y: Tensor = _ops.mapped_apply(x[:, 0], z, weight, base_weight, name, limit)
    else:
        y = x.new_empty(len(x), len(weight))
        shared = weight.float(), None if base_weight is None else base_weight.float()
        for b in _parts(x, weight, limit):
            y[b] = _ops.mapped_apply(x[b, 0].float(), z[b].float(), *shared, name, limit // 2)
    if bias is not None:
        y.addmm_(z, bias.T)
    if base_bias is not None:
        y += base_bias
    return y.unsqueeze(1)


def grads(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    name: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0 and b0, None for each that is not requested."""
    limit = planner.get_workspace_limit()
    # H is transposed for dz, and dH is summed in parts.
    if not takes(x, z, weight, name) or weight.numel() * 4 > limit // 8:
        return mapped.grads(x, z, weight, bias, base_weight, g, mask, name)
    needs = (*mask[:3], mask[4])
    out: list[Tensor | None] = [None] * 4
    if any(needs) and x.dtype == torch.float32:
        out = list(_ops.mapped_grads(x[:, 0], z, weight, base_weight, g[:, 0], needs, name, limit))
    elif any(needs):
        out = _grads_of_16_bits(x, z, weight, base_weight, g, needs, name)
    dx, dz, dh, dw0 = (t if k else None for t, k in zip(out, needs, strict=True))
    if dz is not None and bias is not None:
        dz.addmm_(g[:, 0], bias)
    dbias = db0 = None
    if mask[3] or mask[5]:
        O, _, R = weight.shape
        tiling = aten.tiling_of(planner.plan(Problem.of("grads", x, R, O), "generate"))
        dbias, _, db0 = aten.base_grads(x, z, g, R, (False, False, False, mask[3], False, mask[5]), tiling)
    return None if dx is None else dx.unsqueeze(1), dz, dh, dbias, dw0, db0


def _parts(x: Tensor, weight: Tensor, limit: int) -> Iterator[slice]:
    """Cut the instances so that float32 copies of their x, z and g, and results, take a quarter of the workspace."""
    return blocks(len(x), max(_FEWEST, limit // 32 // sum(weight.shape)))


def _grads_of_16_bits(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    base_weight: Tensor | None,
    g: Tensor,
    needs: tuple[bool, ...],
    name: str,
) -> list[Tensor | None]:
    """Return dx (B, I), dz, dH and dW0; the sums over instances are rounded once."""
    limit = planner.get_workspace_limit()
    shared = weight.float(), None if base_weight is None else base_weight.float()
    of_x, of_z = x.new_empty(x.shape[0], x.shape[2]), z.new_empty(z.shape)
    sums: list[Tensor | None] = [None, None]
    for b in _parts(x, weight, limit):
        some = x[b, 0].float(), z[b].float(), *shared, g[b, 0].float()
        dx, dz, *of_weights = _ops.mapped_grads(*some, needs, name, limit // 2)
        if needs[0]:
            of_x[b] = dx
        if needs[1]:
            of_z[b] = dz
        sums = [t if total is None else total.add_(t) for total, t in zip(sums, of_weights, strict=True)]
    return [of_x, of_z, *(t if t is None else t.to(x.dtype) for t in sums)]


def takes(x: Tensor, z: Tensor, weight: Tensor, name: str) -> bool:
    """Return whether there is a kernel for a call."""
    (B, N, I), (O, _, R) = x.shape, weight.shape
    rows = weight.stride(2) == 1 and min(weight.stride()[:2]) >= R and z.stride(1) == 1 and z.stride(0) >= R
    sizes = N == 1 and B >= _FEWEST and 0 not in (I, O, R) and I + O + R <= _FEATURES
    copied = x.dtype != torch.float32 and weight.numel() * 4 > planner.get_workspace_limit() // 8
    return name in NAMES and x.dtype in KERNEL_DTYPES and not copied and sizes and rows
