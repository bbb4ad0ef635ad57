"""Contract z and H first: W[b] = Σ_r H[:,:,r] z[b,r], a tile at a time; dW[b] = g[b]ᵀ x[b] in the backward.

    y[b]  = x[b] W[b]ᵀ          dx[b] = g[b] W[b]
    dz[b] = Σ_{o,i} dW[b] H     dH    = Σ_b dW[b] ⊗ z[b]

2·B·R·I·O + 2·B·N·I·O flops each: the points of an instance share its W, so this is the fastest if N is large, or if
O or I is so small that the product of `fold` would be narrow. On a GPU, a large tile of W is made while the last one is
applied.
"""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from . import ahead
from .tiling import Affine, Head, Sum, Tiling, blocks, head_matrix, outer, put

# With fewer instances than this, a product with H is bound by reading H. With many points the products with W cost more
# than those with H, and are faster with all outputs at once.
_INSTANCES = 128
_INSTANCES_WITH_POINTS = 4


def tile_shape(B: int, N: int, O: int, I: int, R: int, copied: bool | None, tiling: Tiling) -> tuple[int, int]:
    """Return the instances and outputs of a tile of W; `copied`: whether H is copied, None if only a part of it is."""
    few = _INSTANCES if N == 1 else _INSTANCES_WITH_POINTS
    room = (
        tiling.elements if N == 1 or copied else 2 * tiling.elements
    )  # with points, x and y are tiles of half its size
    outputs = max(1, min(O, room // max(1, I * min(B, few))))
    if copied or (copied is None and outputs < O):  # the block of H is a tile, too
        outputs = max(1, min(outputs, tiling.elements // max(1, I * R)))
        room = tiling.elements
    return max(1, min(B, room // max(1, outputs * I, R))), outputs


def is_copied(weight: Tensor, tiling: Tiling) -> bool | None:
    if weight.dtype == tiling.dtype:
        if head_matrix(weight) is not None:
            return False
        if head_matrix(weight.transpose(0, 1)) is not None:
            return None
    return True


def apply(x: Tensor, z: Tensor, weight: Tensor, y: Tensor, affine: Affine, tiling: Tiling) -> None:
    """Compute y = T(x, z, H) + affine."""
    B, N, I = x.shape
    O, _, R = weight.shape
    instances, outputs = tile_shape(B, N, O, I, R, is_copied(weight, tiling), tiling)
    flops = 2 * instances * outputs * I * min(R, N)
    makes_ahead = (instances < B or outputs < O) and ahead.is_worth_it(x, flops)
    if makes_ahead and tiling.dtype.itemsize > 2:  # a tile of 16 bits is counted as float32, so that two have room
        half = tiling._replace(elements=tiling.elements // 2)
        instances, outputs = tile_shape(B, N, O, I, R, is_copied(weight, half), half)
    points = tiling.elements // max(1, instances * max(I, outputs))
    tiles = [(o, b) for o in blocks(O, outputs) for b in blocks(B, instances)]
    heads: dict[int, Head] = {}  # that of the last tile

    def make(tile: tuple[slice, slice], room: Tensor | None = None) -> Tensor:
        o, b = tile
        if o.start not in heads:
            heads.clear()
            heads[o.start] = Head(weight[o], tiling)
        return heads[o.start].weights(tiling.work(z[b]), room)

    if makes_ahead:
        rooms = [x.new_empty(instances * outputs * I, dtype=tiling.dtype) for _ in range(2)]
        made = ahead.make_ahead(tiles, make, rooms)
    else:
        made = ((tile, make(tile)) for tile in tiles)
    with closing(made):
        for (o, b), w in made:
            for n in blocks(N, points):
                out = tiling.target(y[b, n, o])
                torch.bmm(tiling.work(x[b, n]), w.mT, out=out)
                affine.add(out, b, n, o)
                put(y[b, n, o], out)
            del w  # before the next tile is allocated


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
    """Compute those of dz and dH that are given, both from the same tiles of dW if one loop can do so."""
    shared = False
    if dz is not None:
        (B, N, I), O, R = x.shape, g.shape[2], weight.shape[2]
        copied = is_copied(weight, tiling)
        instances, outputs = tile_shape(B, N, O, I, R, copied, tiling)
        # If all of dW is a tile, dz and dH are one product of bfloat16 each. Other sums of products in 16 bits are in
        # float32, and so may be their operands, which in float16 they always may.
        whole = instances >= B and outputs >= O and tiling.dtype == x.dtype != torch.float16
        if tiling.dtype != tiling.sum_dtype and not whole:
            instances, outputs = tile_shape(B, N, O, I, R, True, tiling)
        # dz sums over blocks of outputs, dH over blocks of instances: one loop computes both if one is a single block
        shared = dh is not None and B > 0 and (outputs >= O or instances >= B)
        if dh is not None and dh.dtype != tiling.sum_dtype and not whole:
            shared = shared and min(O, outputs) * I * R <= tiling.elements
        for b in blocks(B, instances):
            dz_b = affine.start(g[b], R)
            for o in blocks(O, outputs):
                dw = outer(g[b, :, o], x[b], tiling)
                Head(weight[o], tiling).contract(dz_b, dw, outputs >= O)
                if shared and dh is not None:
                    if b.start == 0:
                        total = Sum(dh[o], tiling, instances >= B)
                    total.add(dw.flatten(1).T, tiling.work(z[b]))
                    if b.stop == B:
                        total.store()
                del dw  # before the next tile is allocated
            dz[b] = dz_b
    if dh is not None and not shared:
        _weight_grad(x, z, g, dh, tiling)


def _weight_grad(x: Tensor, z: Tensor, g: Tensor, dh: Tensor, tiling: Tiling) -> None:
    O, I, R = dh.shape
    # If dH itself cannot hold the sums, the block of dH is a tile, too.
    inputs = I if dh.dtype == tiling.sum_dtype else max(1, min(I, tiling.elements // max(1, R)))
    _, outputs = tile_shape(len(x), x.shape[1], O, inputs, R, dh.dtype != tiling.sum_dtype, tiling)
    for o in blocks(O, outputs):
        for i in blocks(I, inputs):
            instances = max(1, tiling.elements // max(1, outputs * inputs, R))
            total = Sum(dh[o, i], tiling, instances >= len(x))
            for b in blocks(len(x), instances):
                total.add(outer(g[b, :, o], x[b, :, i], tiling).flatten(1).T, tiling.work(z[b]))
            total.store()
