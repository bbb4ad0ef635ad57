"""The peers of layers with a function φ of the generated weights, in plain torch; `ways.py` has the list.

y[b,n,o] = Σ_i x[b,n,i] φ(P[b,o,i]) with P[b,o,i] = Σ_r H[o,i,r] z[b,r]. Each function takes a workload and a device,
and returns the function of (x, z, weight) that is timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .inputs import Function
from .workloads import Workload

MAPS = {"abs": torch.abs}
DERIVATIVES = {"abs": torch.sign}
"""φ and its derivative, by the name in a workload."""


def generated(z: Tensor, weight: Tensor) -> Tensor:
    """Return P, in the order that the weight has."""
    return (z @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])


def materialised(w: Workload, device: str) -> Function:
    """Write out P and φ(P), then multiply by φ(P) in one batched product."""
    phi = MAPS[w.weight_map]
    return lambda x, z, weight: torch.bmm(x, phi(generated(z, weight)).mT)


def materialised_x_first(w: Workload, device: str) -> Function:
    """Do the same with a head `(I, O, R)`, as PyMARL's mixer does: the batched product transposes nothing."""
    phi = MAPS[w.weight_map]
    return lambda x, z, weight: torch.bmm(x, phi(generated(z, weight)))


def einsum(w: Workload, device: str) -> Function:
    """Write out P and φ(P), then call one einsum."""
    phi = MAPS[w.weight_map]
    return lambda x, z, weight: torch.einsum("bni,boi->bno", x, phi(generated(z, weight)))


def summed(w: Workload, device: str) -> Function:
    """Write out P, then x · φ(P) elementwise, and sum over i. Compiled, φ, the products and the sum are one loop."""
    phi = MAPS[w.weight_map]
    return lambda x, z, weight: (x.unsqueeze(2) * phi(generated(z, weight)).unsqueeze(1)).sum(3)


class _InChunks(torch.autograd.Function):
    """Write out P and φ(P) for some instances at a time, and again in backward: all of W in the least memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, name: str, instances: int) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.name, ctx.instances = name, instances
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        for x_chunk, z_chunk, y_chunk in zip(*(t.split(instances) for t in (x, z, y)), strict=True):
            torch.bmm(x_chunk, MAPS[name](generated(z_chunk, weight)).mT, out=y_chunk)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, weight = ctx.saved_tensors
        H = weight.flatten(0, 1)
        dx, dz = torch.empty_like(x), torch.empty_like(z)
        dH = torch.zeros_like(H, dtype=torch.promote_types(H.dtype, torch.float32))
        for b in range(0, len(x), ctx.instances):
            chunk = slice(b, b + ctx.instances)
            P = generated(z[chunk], weight)
            torch.bmm(g[chunk], MAPS[ctx.name](P), out=dx[chunk])
            product = torch.mul if x.shape[1] == 1 else torch.bmm  # an outer product if N = 1
            dP = (product(g[chunk].mT, x[chunk]) * DERIVATIVES[ctx.name](P)).flatten(1)
            torch.mm(dP, H, out=dz[chunk])
            if dH.dtype == H.dtype:
                dH.addmm_(dP.T, z[chunk])
            else:  # a sum in 16 bits would lose digits
                dH += dP.T @ z[chunk]
        return dx, dz, dH.to(H.dtype).view_as(weight), None, None


def in_chunks(w: Workload, device: str, size: int) -> Function:
    """Write out at most `size` bytes of P at a time, at least those of one instance."""

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        per_instance = weight.shape[0] * weight.shape[1] * weight.element_size()
        return _InChunks.apply(x, z, weight, w.weight_map, max(1, size // per_instance))

    return layer
