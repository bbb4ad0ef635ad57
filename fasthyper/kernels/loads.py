"""How the kernels read their factors: rows of instances and points, and tiles of the head where they lie."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(m, N, s_instance, s_point, POINTS: tl.constexpr):
    """Offsets of rows m = (b, n) of x or g; of z with a point stride of zero. 64 bits: B·N·I may exceed 31.

    POINTS: whether N > 1.
    """
    if POINTS:
        return (m // N).to(tl.int64) * s_instance + (m % N).to(tl.int64) * s_point
    return m.to(tl.int64) * s_instance


@triton.jit
def columns(pointers, in_rows, j, J, s_j, EVEN: tl.constexpr):
    """A tile (rows, j) of rows that `pointers` begin; zeros outside."""
    p = pointers[:, None] + j[None, :].to(tl.int64) * s_j
    if EVEN:
        return tl.load(p, mask=in_rows[:, None], other=0.0)
    return tl.load(p, mask=in_rows[:, None] & (j < J)[None, :], other=0.0)


@triton.jit
def widened(tile, WIDE: tl.constexpr):
    """The tile in float32 where the interpreter runs: it has no arithmetic of bfloat16."""
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def power_of_two_above(t):
    """1 where t ≤ 1, else a power of two from t on: what to divide by without rounding."""
    return tl.where(t > 1.0, tl.exp2(tl.ceil(tl.log2(t))), 1.0)
