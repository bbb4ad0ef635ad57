"""Build the call of each kernel: its grid, arguments and constants. Tensors may be meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import dx_dz, fold, pad, reduce, weight_grad
from ..gpu import INTERPRETER, cdiv, padded
from . import tiles
from .layouts import INT32, descriptor, reading, reading_one, unit, wide_loads
from .recording import Call
from .tiles import Tile, power_of_two


def precision_of(dtype: torch.dtype, arch: str, allow_tf32: bool) -> str:
    """Return Triton's name for the precision of matrix products.

    float32 is multiplied in TF32 where torch allows that. Else NVIDIA's matrix units, which have no float32, make
    three products in TF32 (``"tf32x3"``), and AMD's multiply in float32 (``"ieee"``).
    """
    if dtype != torch.float32 or arch.startswith("gfx") or arch == INTERPRETER:
        return "ieee" if dtype == torch.float32 else "tf32"
    return "tf32" if allow_tf32 else "tf32x3"


def _long(*extents: tuple[int, int]) -> bool:
    """Return whether offsets within a tile, whose axes have these sizes and strides, need 64 bits."""
    return sum((size - 1) * abs(stride) for size, stride in extents) >= INT32


def _strides(t: Tensor | None, *axes: int) -> tuple[int, ...]:
    return tuple(0 if t is None else t.stride(axis) for axis in axes)


def named(names: str, *values: Any) -> dict[str, Any]:
    """Return arguments by name, for which the values stand in the order of the names."""
    return dict(zip(names.split(), values, strict=True))


def products(t: Tensor, arch: str, precision: str) -> dict[str, Any]:
    """Return the constants of matrix products of operands such as t."""
    return {"WIDE": arch == INTERPRETER and t.dtype == torch.bfloat16, "PRECISION": precision}


def _ahead(t: Tensor, numbers: int, tile: Tile, arch: str) -> bool:
    """Return whether a kernel loads the numbers that a step takes of x, or of u, one step before their use.

    The compiler does so itself, by asynchronous copies, where a thread copies at least four bytes. Where a step takes
    fewer numbers than the block has threads, several threads load the same number, and the loads would cost more
    instructions than the products have time for.
    """
    if arch == INTERPRETER or arch.startswith("gfx") or t.element_size() != 2:
        return arch == INTERPRETER and t.element_size() == 2
    threads = 32 * tile.warps
    aligned = t.stride(-1) == 1 and all(stride % 16 == 0 for stride in t.stride()[:-1])
    return numbers >= threads and not (aligned and numbers > threads)


def depths(K: int, most: int, C: int) -> tuple[int, int, int]:
    """Return how `fold` divides K: the depth of a step, that of a smaller last step or 0, and columns c per step.

    Depths are powers of two, and the steps add up to K rounded up to 16.
    """
    total, depth = padded(K), most
    while depth > 16 and (depth > total or (total % depth and total % depth != power_of_two(total % depth))):
        depth //= 2
    return depth, total % depth, min(most // depth, power_of_two(C, 1)) if depth == K else 1


def fold_tiles(v: Tensor, h: Tensor, P: int, arch: str) -> tuple[Tile, ...]:
    """Return the tiles that a fold with P outputs may take."""
    columns = P if P % 16 == 0 else min(P, 64)  # numbers are stored one at a time
    allowed = tiles.fold_tiles(arch, v.element_size() * 8, columns)
    return allowed if wide_loads(v, h, arch) else allowed[-1:]


def fold_columns(P: int, tile: Tile) -> int:
    """Return how many columns one tile of `fold` has; they are no more than a narrow output needs."""
    return min(tile.columns, power_of_two(P))


def dx_dz_tiles(z: Tensor, h: Tensor, R: int, O: int, arch: str) -> tuple[Tile, ...]:
    """Return the tiles that dx and dz in one pass may take; empty if two folds are faster."""
    return tiles.dx_dz_tiles(arch, z.element_size() * 8, R, O) if wide_loads(z, h, arch) else ()


def fold_call(
    u: Tensor,
    v: Tensor,
    h: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    out: Tensor,
    per_split: int,
    tile: Tile,
    arch: str,
    precision: str,
) -> Call:
    """Return the call for u (B, N, C), v (B, N, K), H (C, K, P), A (P, C), C (P, K), d (P,) and out (B·N, P).

    For a split sum, out is (splits, B·N, P). Where H is padded, its P is larger than that of out.
    """
    B, N, C = u.shape
    K, P = v.shape[2], out.shape[-1]
    M = B * N
    depth, tail, cb = depths(K, tile.depth, C)
    columns = fold_columns(P, tile)
    box = {"c": cb, "k": depth, "p": columns}
    layouts = ("p_ck", "cp_k", "ck_p") if cb == 1 else ("p_ck", "ck_p")
    head = reading(h, "ckp", "c", layouts, box, arch)
    h_tail = None if head.descriptor is None or not tail else descriptor(h, "ckp", head.name, box | {"k": tail}, arch)
    sc, sk, sp = h.stride()
    sizes = named("M N C K P K_shared per_split", M, N, C, K, P, K if c is None else c.shape[1], per_split)
    strides = named(
        "su_b su_n su_c sv_b sv_n sv_k sh_c sh_k sh_p sa_p sa_c sc_p sc_k sd_p",
        *u.stride(), *v.stride(), head.stride, sk, sp, *_strides(a, 0, 1), *_strides(c, 0, 1), *_strides(d, 0),
    )  # fmt: skip
    tensors = {"u_ptr": u, "v_ptr": v, "a_ptr": a, "c_ptr": c, "d_ptr": d, "out_ptr": out}
    tensors["h_ptr"] = h if head.descriptor is None else None
    descriptors = {"h": head.descriptor, "h_tail": h_tail}
    constants = {
        "POINTS": N > 1,
        "BM": tile.rows,
        "BP": columns,
        "BK": depth,
        "TAIL": tail,
        "CB": cb,
        "READ": head.name,
        "AHEAD": cb == 1 and _ahead(u, tile.rows, tile, arch),
        "EVEN_C": C % cb == 0,
        "EVEN_K": K % (tail or depth) == 0,
        "CLAMP_K": h.shape[1] < padded(K),
        "CLAMP_P": h.shape[2] % columns != 0,
        "LONG": _long((max(depth, K), sk), (P, sp), (cb, sc)),
        "SCALED": u.dtype == torch.float16,
        "UNIT": unit(v, K),
        **products(u, arch, precision),
    }
    grid = (cdiv(M, tile.rows), cdiv(P, columns), cdiv(C, per_split))
    return Call(fold.fold, grid, tensors | descriptors | sizes | strides, constants, tile.warps, tile.stages)


DX_COLUMNS = 8
"""Columns of dx that are stored together: splits of I are multiples of it. With 16, tiles of 128 rows spill."""


def dx_dz_call(
    x: Tensor,
    z: Tensor,
    h: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    g: Tensor,
    dx: Tensor,
    dz: Tensor,
    per_split: int,
    tile: Tile,
    arch: str,
    precision: str,
) -> Call:
    """Return the call for x (B, N, I), z (B, R), H (O, I, R), W0 (O, I), bias (O, R), g (B, N, O), dx (B·N, I).

    dz is (B·N, R), or (splits, B·N, R) for a split sum. Where z and H are padded, their R is larger than that of dz.
    """
    B, N, I = x.shape
    O, R = g.shape[2], dz.shape[-1]
    so, _, sr = h.stride()
    bo, br = power_of_two(O), power_of_two(R)
    ib = 1
    if h.shape[2] == br and h.element_size() == 2 and (br <= 32 or tile.rows >= 128):
        # As many columns i as make a product of 128 columns. Else half the warps would add up half of R each.
        ib = max(1, min(128 // br, (1 << 14) // (bo * br), power_of_two(I, 1)))
    head = reading(h, "oir", "i", ("o_ir",), {"o": bo, "i": ib, "r": br}, arch)
    if head.descriptor is not None and h.shape[2] < br:
        head = reading_one(h, bo, br)
    if head.descriptor is None:
        ib, head = 1, reading(h, "oir", "i", ("io_r",), {"o": bo, "i": 1, "r": br}, arch)
    sizes = named("M N I O R W per_split", B * N, N, I, O, R, z.shape[1], per_split)
    strides = named(
        "sg_b sg_n sg_o sz_b sz_r sx_b sx_n sx_i sh_o sh_i sh_r sw_o sw_i sb_o sb_r",
        *g.stride(), *z.stride(), *x.stride(), so, head.stride, sr, *_strides(base, 0, 1), *_strides(bias, 0, 1),
    )  # fmt: skip
    tensors = {"g_ptr": g, "z_ptr": z, "x_ptr": x, "h_ptr": h if head.descriptor is None else None}
    tensors |= {"base_ptr": base, "bias_ptr": bias, "dx_ptr": dx, "dz_ptr": dz}
    constants = {
        "POINTS": N > 1,
        "BM": tile.rows,
        "BO": bo,
        "BR": br,
        "BI": DX_COLUMNS,
        "IB": ib,
        "READ": head.name,
        "EVEN_I": I % ib == 0,
        "EVEN_O": bo == O,
        "EVEN_R": br == z.shape[1],
        "LONG": _long((O, so), (R, sr)),
        "UNIT": unit(z, R),
        **products(x, arch, precision),
    }
    grid = (cdiv(B * N, tile.rows), cdiv(I, per_split), 1)
    return Call(
        dx_dz.dx_dz, grid, {**tensors, "h": head.descriptor} | sizes | strides, constants, tile.warps, tile.stages
    )


def weight_grad_block(I: int, R: int, O: int, tile: Tile) -> tuple[int, int, int]:
    """Return how many i, r and o one tile of `weight_grad` has."""
    br = min(64, power_of_two(R), tile.rows)
    bi = min(tile.rows // br, power_of_two(I, 1))
    least = min(64, tile.rows) // br  # a product takes 64 rows at a time
    return max(least, bi), br, min(tile.columns, power_of_two(O))


def weight_grad_tiles(z: Tensor, g: Tensor, arch: str) -> tuple[Tile, ...]:
    """Return the tiles that the gradient of H may take."""
    allowed = tiles.weight_grad_tiles(arch, z.element_size() * 8, g.shape[-1])
    return allowed if z.stride(-1) == 1 and g.stride(-1) == 1 else allowed[-1:]


def weight_grad_call(
    x: Tensor, z: Tensor, g: Tensor, out: Tensor, per_split: int, tile: Tile, arch: str, precision: str
) -> Call:
    """Return the call for x (B, N, I), z (B, R), g (B, N, O) and out ([splits,] O, I, R); z may be padded."""
    B, N, I = x.shape
    O, R = g.shape[2], out.shape[-1]
    bi, br, bo = weight_grad_block(I, R, O, tile)
    rows = {"b": tile.depth, "n": 1} if N == 1 else {"b": 1, "n": tile.depth}
    z_rows = descriptor(z, "br", "b_r", rows | {"r": br}, arch) if N == 1 else None
    g_rows = descriptor(g, "bno", "b_o" if N == 1 else "bn_o", rows | {"o": bo}, arch)
    sizes = named("M N I O R W per_split", B * N, N, I, O, R, z.shape[1], per_split)
    strides = named("sx_b sx_n sx_i sz_b sz_r sg_b sg_n sg_o", *x.stride(), *z.stride(), *g.stride())
    tensors = {"x_ptr": x, "z_ptr": z, "g_ptr": g, "z_rows": z_rows, "g_rows": g_rows, "out_ptr": out}
    constants = {
        "POINTS": N > 1,
        "BI": bi,
        "BR": br,
        "BO": bo,
        "BM": tile.depth,
        "EVEN_I": I % bi == 0,
        "EVEN_R": z.shape[1] % br == 0,
        "EVEN_O": O % bo == 0,
        "AHEAD": _ahead(x, bi * tile.depth, tile, arch),
        "SCALED": x.dtype == torch.float16,
        "UNIT": unit(z, R),
        **products(x, arch, precision),
    }
    grid = (cdiv(I, bi) * cdiv(R, br), cdiv(O, bo), cdiv(B * N, per_split))
    return Call(weight_grad.weight_grad, grid, tensors | sizes | strides, constants, tile.warps, tile.stages)


def reduce_call(partial: Tensor, out: Tensor) -> Call:
    """Return the call that adds partial sums (S, ...) in float32 into out (...), contiguous."""
    sizes = {"J": out.numel(), "S": partial.shape[0]}
    args = {"partial_ptr": partial, "out_ptr": out, **sizes}
    return Call(reduce.reduce, (cdiv(out.numel(), 1024), 1, 1), args, {"BJ": 1024}, 4, 1)


SUMMED_COLUMNS, SUMMED_POINTS = 128, 8
"""Numbers that a block of `reduce_points` computes, and points that it takes at a time."""


def reduce_points_call(rows: Tensor, out: Tensor) -> Call:
    """Return the call that sums rows (B, N, R) in float32 over N, in P parts of equal length, to out (B, P, R)."""
    (B, N, R), P = rows.shape, out.shape[1]
    sizes = named("J N R per_part so_b so_p", B * R, N, R, cdiv(N, P), *_strides(out, 0, 1))
    constants = {"BJ": SUMMED_COLUMNS, "BN": SUMMED_POINTS}
    grid = (cdiv(B * R, SUMMED_COLUMNS), P, 1)
    return Call(reduce.reduce_points, grid, {"rows_ptr": rows, "out_ptr": out, **sizes}, constants, 4, 1)


def pad_call(z: Tensor | None, h: Tensor | None, z_out: Tensor | None, h_out: Tensor | None) -> Call:
    """Return the call that copies z (B, R), H (O, I, R) or both to (B, W) and (O, I, W), padded with zeros."""
    given, out = (z, z_out) if h is None else (h, h_out)
    R, W = given.shape[-1], out.shape[-1]  # type: ignore[union-attr]
    B, (O, I) = 0 if z is None else len(z), (0, 1) if h is None else h.shape[:2]
    tensors = {"z_ptr": z, "h_ptr": h, "z_out_ptr": z_out, "h_out_ptr": h_out}
    sizes = named("B OI I R W", B, O * I, I, R, W)
    strides = named("sz_b sz_r sh_o sh_i sh_r", *_strides(z, 0, 1), *_strides(h, 0, 1, 2))
    return Call(pad.pad, (cdiv((B + O * I) * W, 1024), 1, 1), tensors | sizes | strides, {"BJ": 1024}, 4, 1)
