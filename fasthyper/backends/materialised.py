"""The usual way: write out W[b] for every instance, read it back, and do it again for the gradients.

Kept to compare with, forced by ``use_backend("materialised")``; no plan ever chooses it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def unavailable() -> str | None:
    """Return why this backend cannot run here: it always can."""
    return None


def _generate(z: Tensor, weight: Tensor) -> Tensor:
    O, I, R = weight.shape
    return (z @ weight.reshape(O * I, R).T).view(len(z), O, I)


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
    """y = (H·z + W0) x + bias·z + b0, through W."""
    w = _generate(z, weight)
    y = torch.bmm(x, (w if base_weight is None else w + base_weight).mT)
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
    """Gradients of x, z, H, bias, W0, b0, through W and dW."""
    dx, dz, dh, dbias, dbase, db0 = mask
    z, weight = (
        cast(Tensor, z),
        cast(Tensor, weight),
    )  # absent only where nothing that is asked for reads them
    out: list[Tensor | None] = [None] * 6
    if dx:
        w = _generate(z, weight)
        out[0] = torch.bmm(g, w if base_weight is None else w + base_weight)
    if dz or dh or dbase:
        dw = torch.bmm(g.mT, x)
        flat = dw.reshape(len(x), g.shape[2] * x.shape[2])
    if dz:
        sums = flat @ weight.reshape(flat.shape[1], weight.shape[2])
        out[1] = sums if bias is None else sums + g.sum(1) @ bias
    if dh:
        out[2] = (flat.T @ z).view(g.shape[2], x.shape[2], z.shape[1])
    if dbias:
        out[3] = g.sum(1).T @ z
    if dbase:
        out[4] = dw.sum(0)
    if db0:
        out[5] = g.sum((0, 1))
    return tuple(out)
