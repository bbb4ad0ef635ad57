"""Contract z and H first: W[b] = Σ_r H[:,:,r] z[b,r], a tile at a time; dW[b] = g[b]ᵀ x[b] in the backward.

    y[b]  = x[b] W[b]ᵀ          dx[b] = g[b] W[b]
    dz[b] = Σ_{o,i} dW[b] H     dH    = Σ_b dW[b] ⊗ z[b]

2·B·R·I·O + 2·B·N·I·O flops each: the points share what was generated, so this wins when N is large, or when
O or I is so small that a folded product would be skinny.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import Affine, Head, Sum, Tile, blocks, outer, put, rows

# Fewer instances than this in a product with H and reading H decides, not multiplying. With many points the
# products with W weigh more than those with H, and want all of its outputs.
_INSTANCES = 128
_INSTANCES_WITH_POINTS = 4


def _shape(B: int, N: int, O: int, I: int, R: int, copied: bool | None, tile: Tile) -> tuple[int, int]:
    """Instances and outputs of one tile of W; `copied`: whether its block of H is copied, None if only when cut."""
    few = _INSTANCES if N == 1 else _INSTANCES_WITH_POINTS
    room = tile.elements if N == 1 or copied else 2 * tile.elements  # with points, x and y are tiles of half its size
    outputs = max(1, min(O, room // max(1, I * min(B, few))))
    if copied or (copied is None and outputs < O):  # the block of H is a tile, too
        outputs = max(1, min(outputs, tile.elements // max(1, I * R)))
        room = tile.elements
    return max(1, min(B, room // max(1, outputs * I, R))), outputs


def _copied(weight: Tensor, tile: Tile) -> bool | None:
    if weight.dtype == tile.dtype:
        if rows(weight) is not None:
            return False
        if rows(weight.transpose(0, 1)) is not None:
            return None
    return True


def apply(x: Tensor, z: Tensor, weight: Tensor, y: Tensor, affine: Affine, tile: Tile) -> None:
    """y = T(x, z, H) + affine."""
    B, N, I = x.shape
    O, _, R = weight.shape
    instances, outputs = _shape(B, N, O, I, R, _copied(weight, tile), tile)
    points = tile.elements // max(1, instances * max(I, outputs))
    for o in blocks(O, outputs):
        head = Head(weight[o], tile)
        for b in blocks(B, instances):
            w = head.weights(tile.work(z[b])).mT
            for n in blocks(N, points):
                out = tile.target(y[b, n, o])
                torch.bmm(tile.work(x[b, n]), w, out=out)
                affine.add(out, b, n, o)
                put(y[b, n, o], out)
            del w  # or the next tile is made beside it


def grads(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    g: Tensor,
    dz: Tensor | None,
    dh: Tensor | None,
    affine: Affine,
    tile: Tile,
) -> None:
    """dz and dH as asked for, dW formed once for both where one loop over its tiles can serve both."""
    shared = False
    if dz is not None:
        (B, N, I), O, R = x.shape, g.shape[2], weight.shape[2]
        copied = tile.dtype != tile.sum_dtype or _copied(weight, tile)  # the former where a sum converts its operands
        instances, outputs = _shape(B, N, O, I, R, copied, tile)
        # dz is summed over the blocks of outputs, dH over those of instances: one of the two is a single block.
        shared = dh is not None and B > 0 and (outputs >= O or instances >= B)
        if dh is not None and dh.dtype != tile.sum_dtype:
            shared = shared and min(O, outputs) * I * R <= tile.elements
        for b in blocks(B, instances):
            dz_b = affine.start(g[b], R)
            for o in blocks(O, outputs):
                dw = outer(g[b, :, o], x[b], tile)
                Head(weight[o], tile).contract(dz_b, dw)
                if shared and dh is not None:
                    if b.start == 0:
                        total = Sum(dh[o], tile)
                    total.add(dw.flatten(1).T, tile.work(z[b]))
                    if b.stop == B:
                        total.store()
                del dw  # or the next tile is made beside it
            dz[b] = dz_b
    if dh is not None and not shared:
        _weight_grad(x, z, g, dh, tile)


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor, tile: Tile) -> None:
    O, I, R = dh.shape
    # Where sums cannot be kept in dH itself, the block of dH is a tile, too.
    inputs = I if dh.dtype == tile.sum_dtype else max(1, min(I, tile.elements // max(1, R)))
    _, outputs = _shape(len(x), x.shape[1], O, inputs, R, dh.dtype != tile.sum_dtype, tile)
    for o in blocks(O, outputs):
        for i in blocks(I, inputs):
            total = Sum(dh[o, i], tile)
            for b in blocks(len(x), tile.elements // max(1, outputs * inputs, R)):
                total.add(outer(g[b, :, o], x[b, :, i], tile).flatten(1).T, tile.work(z[b]))
            total.store()
