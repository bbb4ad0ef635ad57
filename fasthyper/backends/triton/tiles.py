"""Which tiles each part may take: those that ahead-of-time compilation shows to be clean (tests/kernels/test_aot.py).

A tile is chosen among these by time on the machine (`fasthyper.backends.triton.tuning`), the likeliest first.
"""

from __future__ import annotations

from typing import NamedTuple

PARTS = ("sm_80", "sm_90", "sm_100", "gfx942")
INTERPRETER = "interpreter"
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block may have; of sm_80, what sm_86, sm_89 and sm_120 have, which take its tiles."""


class Tile(NamedTuple):
    """A block of one kernel's output, and how it is worked on.

    Args:
        rows: of the left operand: instances in `fold` and `dx_dz`, pairs (i, r) in `weight_grad`.
        columns: of the right operand; the whole of R in `dx_dz`.
        depth: of a step along K; the whole of O in `dx_dz`.
        warps: of a block.
        stages: of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two from n and `least` on: sides of a tile are such, and a product takes 16."""
    return max(least, 1 << max(0, n - 1).bit_length())


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
_FOLD["sm_100"] = (_FOLD["sm_90"][0], Tile(256, 64, 64, 8, 3), *_FOLD["sm_90"][2:])  # with four stages it spills
_WEIGHT_GRAD["sm_100"] = _WEIGHT_GRAD["sm_90"]
# float32, in TF32 once or three times; where a part has no list, that of sm_90 is clean.
_FOLD_32 = {
    "sm_80": (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
    "sm_90": (Tile(128, 128, 32, 8, 2), Tile(128, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
}
_WEIGHT_GRAD_32 = {
    "sm_90": (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    "sm_100": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 2)),
}


def _not_wider(tiles: tuple[Tile, ...], columns: int) -> tuple[Tile, ...]:
    """The tiles that so many columns fill, or else the narrowest."""
    narrowest = min(tile.columns for tile in tiles)
    return tuple(tile for tile in tiles if tile.columns <= max(narrowest, power_of_two(columns)))


def fold_tiles(part: str, bits: int, P: int) -> tuple[Tile, ...]:
    """Tiles of `fold` for operands of so many bits and P outputs, the widest first."""
    if part == INTERPRETER:
        return _INTERPRETED
    return _not_wider(_FOLD_32.get(part, _FOLD_32["sm_90"]) if bits == 32 else _FOLD[part], P)


def weight_grad_tiles(part: str, bits: int, O: int) -> tuple[Tile, ...]:
    """Tiles of `weight_grad` for operands of so many bits and O outputs, the widest first."""
    if part == INTERPRETER:
        return _INTERPRETED
    return _not_wider(_WEIGHT_GRAD_32.get(part, _WEIGHT_GRAD_32["sm_90"]) if bits == 32 else _WEIGHT_GRAD[part], O)


def dx_dz_tiles(part: str, bits: int, R: int, O: int) -> tuple[Tile, ...]:
    """Tiles of `dx_dz`; none where all of R and O do not fit one, or a product with K = O is too short to pay."""
    r, o = power_of_two(R), power_of_two(O)
    tile = lambda rows, stages: Tile(rows, r, o, 8, stages)
    if part == INTERPRETER:
        return (Tile(16, r, o, 1, 1),) if r <= 32 and o <= 32 else ()
    if O <= 16 or r > 128 or o > 256:
        return ()
    if bits == 32:
        return (tile(64, 2),) if r * o <= (1024 if part == "sm_80" else 2048) else ()
    if part == "gfx942":
        return (tile(64, 3),) if r * o <= 8192 else ()
    if part == "sm_80":
        return ((tile(128, 3), tile(64, 3)) if r <= 64 and o <= 128 else (tile(64, 3),)) if r * o <= 16384 else ()
    return (tile(128, 3), tile(64, 3)) if r * o <= 16384 else (tile(64, 3),)
