"""Contract x and H first: A[o,bn,r] = Σ_i x[b,n,i] H[o,i,r], then z; in dH, z and g first.

    y[b,n,o] = Σ_r A[o,bn,r] z[b,r]        dz[b,r] = Σ_{n,o} A[o,bn,r] g[b,n,o]
    Q[o,n,r] = Σ_b g[b,n,o] z[b,r]         dH[o,i,r] = Σ_n x[n,i] Q[o,n,r]

2·X·R·I·O flops for X distinct rows of x, and 2·B·N·R·O more: the fastest if instances share x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .tiling import Affine, Tiling, accumulate, blocks, put


def _cut(x: Tensor, O: int, R: int, tiling: Tiling) -> tuple[bool, int, int, int]:
    """Return whether x is shared, and the instances, points and outputs of a tile of A."""
    B, N, I = x.shape
    shared = B > 1 and x.stride(0) == 0
    room = tiling.elements // max(1, R)
    points = max(1, min(N, tiling.elements // max(1, I), room))
    if shared:
        outputs = max(1, min(O, room // points))
        return True, max(1, tiling.elements // max(1, points * max(outputs, I), R)), points, outputs
    instances = max(1, min(B, min(room, tiling.elements // max(1, I)) // points))
    return False, instances, points, max(1, min(O, room // (points * instances)))


def _products(x: Tensor, weight: Tensor, tiling: Tiling) -> Tensor:
    """Return A (O, K, R) of rows x (K, I) and a block of H, which is converted a tile at a time."""
    O, I, R = weight.shape
    if weight.dtype == tiling.dtype and weight.stride(2) == 1:
        return torch.bmm(x.expand(O, *x.shape), weight)
    a = torch.empty(O, len(x), R, dtype=tiling.dtype, device=x.device)
    for o in range(O):
        for k, i in enumerate(blocks(I, tiling.elements // max(1, R))):
            h, xi = tiling.work(weight[o, i]), x[:, i]
            torch.mm(xi, h, out=a[o]) if k == 0 else a[o].addmm_(xi, h)
    return a if I else a.zero_()


def _tiles_of_products(x: Tensor, weight: Tensor, tiling: Tiling) -> Iterator[tuple[slice, slice, slice, bool, Tensor]]:
    """Yield blocks (b, n, o), whether their instances share A, and A as (o, b, n, r), or as (o·n, r) if they do."""
    B, N, _ = x.shape
    O, _, R = weight.shape
    shared, instances, points, outputs = _cut(x, O, R, tiling)
    if shared:
        for n in blocks(N, points):
            rows = tiling.work(x[0, n])
            for o in blocks(O, outputs):
                a = _products(rows, weight[o], tiling).flatten(0, 1)
                for b in blocks(B, instances):
                    yield b, n, o, True, a
        return
    for b in blocks(B, instances):
        for n in blocks(N, points):
            rows = tiling.work(x[b, n]).flatten(0, 1)
            for o in blocks(O, outputs):
                a = _products(rows, weight[o], tiling)
                yield b, n, o, False, a.view(len(a), b.stop - b.start, n.stop - n.start, R)
                del a  # before the next tile is allocated


def apply(x: Tensor, z: Tensor, weight: Tensor, y: Tensor, affine: Affine, tiling: Tiling) -> None:
    """Compute y = T(x, z, H) + affine."""
    for b, n, o, shared, a in _tiles_of_products(x, weight, tiling):
        zb = tiling.work(z[b])
        if shared:
            out = torch.mm(zb, a.T).view(len(zb), o.stop - o.start, n.stop - n.start).mT
        else:
            out = (a * zb[:, None, :]).sum(3).permute(1, 2, 0)
        affine.add(out, b, n, o)
        put(y[b, n, o], out)
        del a, out  # before the next tile is allocated


def grads(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    g: Tensor,
    dz: Tensor | None,
    dh: Tensor | None,
    affine: Affine,
    tiling: Tiling,
) -> None:
    """Compute those of dz and dH that are given."""
    if dz is not None:
        _cond_grad(x, weight, g, dz, affine, tiling)
    if dh is not None:
        _weight_grad(x, z, g, dh, tiling)


def _cond_grad(x: Tensor, weight: Tensor, g: Tensor, dz: Tensor, affine: Affine, tiling: Tiling) -> None:
    R = weight.shape[2]
    for outer in blocks(len(x), tiling.elements // max(1, R)):  # so that a block of dz is a tile
        gb = g[outer]
        total = affine.start(gb, R)
        for b, n, o, shared, a in _tiles_of_products(x[outer], weight, tiling):
            go = tiling.work(gb[b, n, o])
            if shared:
                accumulate(total[b], go.mT.flatten(1), a)
            else:
                total[b] += (a * go.permute(2, 0, 1).unsqueeze(3)).sum((0, 2))
            del a
        dz[outer] = total


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor, tiling: Tiling) -> None:
    B, N, I = x.shape
    O, _, R = dh.shape
    direct = dh.dtype == tiling.sum_dtype
    shared, instances, points, outputs = _cut(x, O, R, tiling)
    inputs = I if direct else max(1, min(I, tiling.elements // max(1, R)))
    outputs = outputs if direct else max(1, min(outputs, tiling.elements // max(1, inputs * R)))
    for i in blocks(I, inputs):
        for o in blocks(O, outputs):
            out = dh[o, i]
            total = out if direct else torch.empty(out.shape, dtype=tiling.sum_dtype, device=dh.device)
            total.zero_()
            for n in blocks(N, points):
                for b in [slice(0, 1)] if shared else blocks(B, instances):
                    rows = x[b, n, i].flatten(0, 1).to(total.dtype)
                    q = _sum_over_instances(z, g[:, n, o], instances, tiling) if shared else None
                    if q is None:
                        gz = tiling.work(g[b, n, o]).permute(2, 0, 1).unsqueeze(3) * tiling.work(z[b]).unsqueeze(1)
                        q = gz.flatten(1, 2).to(total.dtype)
                    total.baddbmm_(rows.T.expand(len(out), *rows.T.shape), q)
            put(out, total)


def _sum_over_instances(z: Tensor, g: Tensor, instances: int, tiling: Tiling) -> Tensor:
    """Return Q[o,n,r] = Σ_b g[b,n,o] z[b,r]."""
    B, points, outputs = g.shape
    q = torch.zeros(outputs * points, z.shape[1], dtype=tiling.sum_dtype, device=z.device)
    for b in blocks(B, instances):
        accumulate(q, tiling.work(g[b]).mT.flatten(1).T, tiling.work(z[b]))
    return q.view(outputs, points, z.shape[1])
