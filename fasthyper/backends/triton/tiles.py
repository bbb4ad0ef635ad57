"""The tiles that each arch may take: all of them compile without spills or warnings (tests/kernels/test_aot.py).

`fasthyper.backends.triton.tuning` times some of them on the device and takes the fastest.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..gpu import AMD, INTERPRETER

ARCHS = ("sm_80", "sm_90", "sm_100", *AMD)


class Tile(NamedTuple):
    """The tile of the output that one block computes, and the launch options that go with it.

    Args:
        rows: rows of the left operand: instances in `fold` and `dx_dz`, pairs (i, r) in `weight_grad`.
        columns: columns of the right operand; all of R in `dx_dz`.
        depth: length of a step along K; all of O in `dx_dz`.
        warps: number of warps of a block.
        stages: number of stages of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def power_of_two(n: int, least: int = 16) -> int:
    """Return the smallest power of two that is at least n and `least`; a matrix product has at least 16."""
    return max(least, 1 << max(0, n - 1).bit_length())


@functools.cache
def nearest(arch: str) -> str:
    """Return the arch whose tiles a GPU takes: the newest in `ARCHS` up to its own, or its own for AMD's.

    sm_120 takes the tiles of sm_80: it has neither wgmma nor tcgen05.
    """
    if not arch.startswith("sm_"):
        return arch
    generation = int(arch[3:])
    known = [int(known[3:]) for known in ARCHS if known.startswith("sm_")]
    return f"sm_{80 if generation >= 120 else max(n for n in known if n <= generation)}"


_INTERPRETED = (Tile(16, 16, 32, 1, 1),)

# 16-bit operands.
_FOLD: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(256, 64, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    "sm_90": (Tile(256, 128, 64, 8, 4), Tile(256, 64, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    "gfx942": (Tile(256, 64, 64, 8, 2), Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
}
_WEIGHT_GRAD: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(256, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
    "sm_90": (Tile(256, 128, 64, 8, 3), Tile(256, 64, 64, 8, 3), Tile(128, 64, 64, 4, 3)),
    "gfx942": (Tile(128, 64, 64, 4, 3), Tile(128, 64, 32, 4, 2)),
}
_FOLD["sm_100"] = (_FOLD["sm_90"][0], Tile(256, 64, 64, 8, 3), *_FOLD["sm_90"][2:])  # spills with four stages
_WEIGHT_GRAD["sm_100"] = _WEIGHT_GRAD["sm_90"]
# float32, multiplied in TF32 once or three times. An arch without a list takes that of sm_90.
_FOLD_32 = {
    "sm_80": (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
    "sm_90": (Tile(128, 128, 32, 8, 2), Tile(128, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
}
_WEIGHT_GRAD_32 = {
    "sm_90": (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    "sm_100": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 2)),
}


def _not_wider(tiles: tuple[Tile, ...], columns: int) -> tuple[Tile, ...]:
    """Return the tiles that are not wider than the output, or else the narrowest."""
    narrowest = min(tile.columns for tile in tiles)
    return tuple(tile for tile in tiles if tile.columns <= max(narrowest, power_of_two(columns)))


def fold_tiles(arch: str, bits: int, P: int) -> tuple[Tile, ...]:
    """Return the tiles of `fold` for operands of this many bits and P outputs, the widest first."""
    if arch == INTERPRETER:
        return _INTERPRETED
    return _not_wider(_FOLD_32.get(arch, _FOLD_32["sm_90"]) if bits == 32 else _FOLD[arch], P)


def weight_grad_tiles(arch: str, bits: int, O: int) -> tuple[Tile, ...]:
    """Return the tiles of `weight_grad` for operands of this many bits and O outputs, the widest first."""
    if arch == INTERPRETER:
        return _INTERPRETED
    return _not_wider(_WEIGHT_GRAD_32.get(arch, _WEIGHT_GRAD_32["sm_90"]) if bits == 32 else _WEIGHT_GRAD[arch], O)


def dx_dz_tiles(arch: str, bits: int, R: int, O: int) -> tuple[Tile, ...]:
    """Return the tiles of `dx_dz`: none if R and O exceed a tile, or if O is so small that `fold` is faster."""
    r, o = power_of_two(R), power_of_two(O)
    tile = lambda rows, stages: Tile(rows, r, o, 8, stages)
    if arch == INTERPRETER:
        return (Tile(16, r, o, 1, 1),) if r <= 32 and o <= 32 else ()
    if O <= 16 or r > 128 or o > 256:
        return ()
    if bits == 32:
        return (tile(64, 2),) if r * o <= (1024 if arch == "sm_80" else 2048) else ()
    if arch == "gfx942":
        return (tile(64, 3),) if r * o <= 8192 else ()
    if arch == "sm_80":
        return ((tile(128, 3), tile(64, 3)) if r <= 64 and o <= 128 else (tile(64, 3),)) if r * o <= 16384 else ()
    return (tile(128, 3), tile(64, 3)) if r * o <= 16384 else (tile(64, 3),)
