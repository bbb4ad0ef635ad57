"""Functions that the kernels share: addresses of rows, masked loads, and scaling for float16."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(m, N, s_instance, s_point, POINTS: tl.constexpr):
    """Return the offsets of rows m = (b, n) of x or g, or of z with a point stride of 0.

    They have 64 bits, because B·N·I may exceed 2^31. POINTS: whether N > 1.
    """
    if POINTS:
        return (m // N).to(tl.int64) * s_instance + (m % N).to(tl.int64) * s_point
    return m.to(tl.int64) * s_instance


@triton.jit
def columns(pointers, in_rows, j, J, s_j, EVEN: tl.constexpr):
    """Load a tile (rows, j) of the rows that start at `pointers`, with zeros outside."""
    p = pointers[:, None] + j[None, :].to(tl.int64) * s_j
    if EVEN:
        return tl.load(p, mask=in_rows[:, None], other=0.0)
    return tl.load(p, mask=in_rows[:, None] & (j < J)[None, :], other=0.0)


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """Return n, a multiple of UNIT, so that the compiler knows it. Of an argument it knows only multiples of 16."""
    return n // UNIT * UNIT


@triton.jit
def widened(tile, WIDE: tl.constexpr):
    """Return the tile in float32 if WIDE: the interpreter has no bfloat16 arithmetic."""
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def into_range(most_u, most_v):
    """Return the power of two by which u is multiplied, so that u and u·v neither overflow nor underflow in float16.

    most_u and most_v are the largest absolute values. The scaled u is at most 2^14, and a product at most 2^15.
    """
    top_u, top_v = tl.ceil(tl.log2(most_u)), tl.ceil(tl.log2(most_v))
    factor = tl.exp2(tl.minimum(15.0 - top_v, 14.0) - top_u)
    return tl.where(most_u > 0.0, factor, 1.0)  # if all of u is zero, the factor is not finite


@triton.jit
def larger(most, t):
    """Return the larger of most and |t|, or most if t is not finite: it would change the factor of the whole row."""
    size = tl.abs(t.to(tl.float32))
    return tl.maximum(most, tl.where(size < float("inf"), size, 0.0))


@triton.jit
def scaled(u, factor):
    """Return u times powers of two, by which the sums of u·v are divided."""
    return (u.to(tl.float32) * factor).to(u.dtype)
