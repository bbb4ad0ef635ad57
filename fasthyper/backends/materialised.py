"""The usual way: write out W[b] for every instance, read it back, and do the same for the gradients.

``use_backend("materialised")`` selects it, for comparison. The aten backend uses it if all of W is smaller than one
tile.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..costs import Costs
from ..problem import DTYPES as DTYPES
from ..problem import Problem

PREFERRED_ON = ()
COSTS = Costs()
REMARK = ""


def devices() -> None:
    """Return the types of device that it runs on: None, for any."""
    return


def unavailable() -> str | None:
    """Return why this backend cannot run here: it always can."""
    return None


def takes(problem: Problem) -> bool:
    """Return whether it computes a problem: it computes all."""
    return True


def _generate(z: Tensor, weight: Tensor, base_weight: Tensor | None) -> Tensor:
    O, I, R = weight.shape
    w = (z @ weight.reshape(O * I, R).T).view(z.shape[0], O, I)
    return w if base_weight is None else w.add_(base_weight)


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    schedule: str,
) -> Tensor:
    """Return y = (H·z + W0) x + bias·z + b0, through W."""
    y = torch.bmm(x, _generate(z, weight, base_weight).mT)
    if bias is not None:
        y += (z @ bias.T).unsqueeze(1)
    return y if base_bias is None else y.add_(base_bias)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0, b0 where the mask is set, through W and dW."""
    dx, dz, dh, dbias, dbase, db0 = mask
    z, weight = cast(Tensor, z), cast(Tensor, weight)  # None only if no requested gradient reads it
    out: list[Tensor | None] = [None] * 6
    if dx:
        out[0] = torch.bmm(g, _generate(z, weight, base_weight))
    if dz or dh or dbase:
        dw = torch.bmm(g.mT, x) if x.shape[1] != 1 else torch.mul(g.mT, x)  # K = 1: an outer product, much faster
        flat = dw.reshape(len(x), g.shape[2] * x.shape[2])
    if dz:
        sums = flat @ weight.reshape(flat.shape[1], weight.shape[2])
        out[1] = sums if bias is None else sums.addmm_(g.sum(1), bias)
    if dh:
        out[2] = (flat.T @ z).view(g.shape[2], x.shape[2], z.shape[1])
    if dbias:
        out[3] = g.sum(1).T @ z
    if dbase:
        out[4] = dw.sum(0)
    if db0:
        out[5] = g.sum((0, 1))
    return tuple(out)
