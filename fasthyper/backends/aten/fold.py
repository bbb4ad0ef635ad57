"""Contract x and z first: U[bn,(i,r)] = x[b,n,i] z[b,r] becomes the operand of one product with K = I·R.

    y  = U H.view(O, I·R)ᵀ                 dH = gᵀ U
    G  = g H.view(O, I·R), and from it     dx[b,n,i] = Σ_r G z,  dz[b,r] = Σ_{n,i} G x

2·B·N·R·I·O flops each, with dx and dz from one product: the fastest for few points per instance and R below O.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .tiling import Affine, Tiling, accumulate, blocks, put

# With fewer rows than this, a product with H is bound by reading H.
_ROWS = 256


class _Blocks:
    """The sizes of a tile of U (or of G): instances, points and inputs; and the outputs of a block of H."""

    def __init__(self, B: int, N: int, I: int, O: int, R: int, copies: bool, tiling: Tiling):
        room = tiling.elements // max(1, R)
        self.inputs = max(1, min(I, room // max(1, min(B * N, _ROWS))))
        rows = max(1, min(room // self.inputs, tiling.elements // max(1, O, I)))  # of U, of y and of x
        self.points = min(N, rows)
        self.instances = max(1, rows // max(1, self.points))
        self.outputs = max(1, room // self.inputs) if copies else max(1, O)
        self.sizes = B, N, I, O

    def row_blocks(self) -> Iterator[tuple[slice, slice]]:
        B, N, _, _ = self.sizes
        for b in blocks(B, self.instances):
            for n in blocks(N, self.points):
                yield b, n

    def heads(self, weight: Tensor, i: slice, tiling: Tiling) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of H[:, i] as (o, (i, r)) matrices."""
        for o in blocks(self.sizes[3], self.outputs):
            yield o, tiling.work(weight[o, i]).flatten(1)


def _copies(weight: Tensor, tiling: Tiling) -> bool:
    _, I, R = weight.shape
    if weight.dtype != tiling.dtype or tiling.dtype != tiling.sum_dtype:  # sums convert their operands
        return True
    return weight.stride(2) != 1 or (I > 1 and weight.stride(1) != R)


def _folded(x: Tensor, z: Tensor, tiling: Tiling) -> Tensor:
    """Return U (B·N, I·R) for a block of x (B, N, I) and z (B, R)."""
    u = torch.empty(*x.shape, z.shape[1], dtype=tiling.dtype, device=x.device)
    torch.mul(tiling.work(x).unsqueeze(3), tiling.work(z)[:, None, None, :], out=u)
    return u.view(x.shape[0] * x.shape[1], x.shape[2] * z.shape[1])


def apply(x: Tensor, z: Tensor, weight: Tensor, y: Tensor, affine: Affine, tiling: Tiling) -> None:
    """Compute y = T(x, z, H) + affine."""
    B, N, I = x.shape
    O, _, R = weight.shape
    cut = _Blocks(B, N, I, O, R, _copies(weight, tiling), tiling)
    every = slice(0, O)
    for b, n in cut.row_blocks():
        xb = x[b, n]
        total = torch.zeros(xb.shape[0] * xb.shape[1], O, dtype=tiling.sum_dtype, device=x.device)
        for i in blocks(I, cut.inputs):
            u = _folded(xb[:, :, i], z[b], tiling)
            for o, h in cut.heads(weight, i, tiling):
                accumulate(total[:, o], u, h.T)
            del u  # before the next tile is allocated
        out = total.view(*xb.shape[:2], O)
        affine.add(out, b, n, every)
        put(y[b, n], out)


def grads(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    g: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
    dh: Tensor | None,
    affine_x: Affine,
    affine_z: Affine,
    tiling: Tiling,
) -> None:
    """Compute those of dx, dz and dH that are given."""
    if dx is not None or dz is not None:
        _dx_dz(x, z, weight, g, dx, dz, affine_x, affine_z, tiling)
    if dh is not None:
        _weight_grad(x, z, g, dh, tiling)


def _dx_dz(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    g: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
    affine_x: Affine,
    affine_z: Affine,
    tiling: Tiling,
) -> None:
    B, N, I = x.shape
    O, _, R = weight.shape
    cut = _Blocks(B, N, I, O, R, _copies(weight, tiling), tiling)
    for b in blocks(B, cut.instances):
        dz_b = None if dz is None else affine_z.start(g[b], R)
        for n in blocks(N, cut.points):
            xb = x[b, n]
            count, points, _ = xb.shape
            gb = tiling.work(g[b, n]).flatten(0, 1)
            dx_b = None if dx is None else torch.empty(xb.shape, dtype=tiling.dtype, device=x.device)
            for i in blocks(I, cut.inputs):
                size = i.stop - i.start
                G = torch.zeros(len(gb), size * R, dtype=tiling.sum_dtype, device=x.device)
                for o, h in cut.heads(weight, i, tiling):
                    accumulate(G, gb[:, o], h)
                G = tiling.work(G).view(count, points * size, R)
                if dx_b is not None:
                    dx_b[:, :, i] = torch.bmm(G, tiling.work(z[b]).unsqueeze(2)).view(count, points, size)
                if dz_b is not None:
                    dz_b += torch.bmm(tiling.work(xb[:, :, i]).reshape(count, 1, points * size), G).squeeze(1)
                del G  # before the next tile is allocated
            if dx is not None and dx_b is not None:
                affine_x.add(dx_b, b, n, slice(0, I))
                put(dx[b, n], dx_b)
        if dz is not None and dz_b is not None:
            dz[b] = dz_b


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor, tiling: Tiling) -> None:
    B, N, I = x.shape
    O, _, R = dh.shape
    direct = dh.dtype == tiling.sum_dtype
    cut = _Blocks(B, N, I, O, R, not direct, tiling)
    for i in blocks(I, cut.inputs):
        for o in blocks(O, cut.outputs):
            out = dh[o, i].flatten(1)
            total = out if direct else torch.empty(out.shape, dtype=tiling.sum_dtype, device=dh.device)
            total.zero_()
            for b, n in cut.row_blocks():
                gb = tiling.work(g[b, n, o])
                accumulate(total, gb.flatten(0, 1).T, _folded(x[b, n, i], z[b], tiling))
            put(out, total)
