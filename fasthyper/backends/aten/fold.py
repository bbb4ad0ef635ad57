"""Contract x and z first: U[bn,(i,r)] = x[b,n,i] z[b,r] becomes the operand of one product with K = I·R.

    y  = U H.view(O, I·R)ᵀ                 dH = gᵀ U
    G  = g H.view(O, I·R), and from it     dx[b,n,i] = Σ_r G z,  dz[b,r] = Σ_{n,i} G x

2·B·N·R·I·O flops each, with dx and dz from one product: this wins at few points per instance when R is under O.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .tiles import Affine, Tile, accumulate, blocks, put

# Fewer rows than this in a product with H and reading H decides, not multiplying.
_ROWS = 256


class _Blocks:
    """How U (or G) is cut: instances, points and inputs of a tile, and outputs of a block of H beside it."""

    def __init__(self, B: int, N: int, I: int, O: int, R: int, copies: bool, tile: Tile):
        room = tile.elements // max(1, R)
        self.inputs = max(1, min(I, room // max(1, min(B * N, _ROWS))))
        rows = max(1, min(room // self.inputs, tile.elements // max(1, O, I)))  # of U, of y and of x
        self.points = min(N, rows)
        self.instances = max(1, rows // max(1, self.points))
        self.outputs = max(1, room // self.inputs) if copies else max(1, O)
        self.sizes = B, N, I, O

    def rows(self) -> Iterator[tuple[slice, slice]]:
        B, N, _, _ = self.sizes
        for b in blocks(B, self.instances):
            for n in blocks(N, self.points):
                yield b, n

    def heads(self, weight: Tensor, i: slice, tile: Tile) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of H[:, i] as (o, (i, r)) matrices."""
        for o in blocks(self.sizes[3], self.outputs):
            yield o, tile.work(weight[o, i]).flatten(1)


def _copies(weight: Tensor, tile: Tile) -> bool:
    _, I, R = weight.shape
    if weight.dtype != tile.dtype or tile.dtype != tile.sum_dtype:  # the latter where a sum converts its operands
        return True
    return weight.stride(2) != 1 or (I > 1 and weight.stride(1) != R)


def _folded(x: Tensor, z: Tensor, tile: Tile) -> Tensor:
    """U for a block: x (B, N, I), z (B, R) -> (B·N, I·R)."""
    u = torch.empty(*x.shape, z.shape[1], dtype=tile.dtype, device=x.device)
    torch.mul(tile.work(x).unsqueeze(3), tile.work(z)[:, None, None, :], out=u)
    return u.view(x.shape[0] * x.shape[1], x.shape[2] * z.shape[1])


def apply(x: Tensor, z: Tensor, weight: Tensor, y: Tensor, affine: Affine, tile: Tile) -> None:
    """y = T(x, z, H) + affine."""
    B, N, I = x.shape
    O, _, R = weight.shape
    cut = _Blocks(B, N, I, O, R, _copies(weight, tile), tile)
    every = slice(0, O)
    for b, n in cut.rows():
        xb = x[b, n]
        total = torch.zeros(xb.shape[0] * xb.shape[1], O, dtype=tile.sum_dtype, device=x.device)
        for i in blocks(I, cut.inputs):
            u = _folded(xb[:, :, i], z[b], tile)
            for o, h in cut.heads(weight, i, tile):
                accumulate(total[:, o], u, h.T)
            del u  # or the next tile is made beside it
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
    tile: Tile,
) -> None:
    """dx, dz and dH as asked for."""
    if dx is not None or dz is not None:
        _dx_dz(x, z, weight, g, dx, dz, affine_x, affine_z, tile)
    if dh is not None:
        _weight_grad(x, z, g, dh, tile)


def _dx_dz(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    g: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
    affine_x: Affine,
    affine_z: Affine,
    tile: Tile,
) -> None:
    B, N, I = x.shape
    O, _, R = weight.shape
    cut = _Blocks(B, N, I, O, R, _copies(weight, tile), tile)
    for b in blocks(B, cut.instances):
        dz_b = None if dz is None else affine_z.start(g[b], R)
        for n in blocks(N, cut.points):
            xb = x[b, n]
            count, points, _ = xb.shape
            gb = tile.work(g[b, n]).flatten(0, 1)
            dx_b = None if dx is None else torch.empty(xb.shape, dtype=tile.dtype, device=x.device)
            for i in blocks(I, cut.inputs):
                size = i.stop - i.start
                G = torch.zeros(len(gb), size * R, dtype=tile.sum_dtype, device=x.device)
                for o, h in cut.heads(weight, i, tile):
                    accumulate(G, gb[:, o], h)
                G = tile.work(G).view(count, points * size, R)
                if dx_b is not None:
                    dx_b[:, :, i] = torch.bmm(G, tile.work(z[b]).unsqueeze(2)).view(count, points, size)
                if dz_b is not None:
                    dz_b += torch.bmm(tile.work(xb[:, :, i]).reshape(count, 1, points * size), G).squeeze(1)
                del G  # or the next tile is made beside it
            if dx is not None and dx_b is not None:
                affine_x.add(dx_b, b, n, slice(0, I))
                put(dx[b, n], dx_b)
        if dz is not None and dz_b is not None:
            dz[b] = dz_b


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor, tile: Tile) -> None:
    B, N, I = x.shape
    O, _, R = dh.shape
    direct = dh.dtype == tile.sum_dtype
    cut = _Blocks(B, N, I, O, R, not direct, tile)
    for i in blocks(I, cut.inputs):
        for o in blocks(O, cut.outputs):
            out = dh[o, i].flatten(1)
            total = out if direct else torch.empty(out.shape, dtype=tile.sum_dtype, device=dh.device)
            total.zero_()
            for b, n in cut.rows():
                gb = tile.work(g[b, n, o])
                accumulate(total, gb.flatten(0, 1).T, _folded(x[b, n, i], z[b], tile))
            put(out, total)
