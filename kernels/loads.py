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
def into_range(most_u, most_v):
    """A power of two: u times it, and its products with v, use the range of float16 and do not leave it.

    Of the largest absolute values: u comes to 2^14 at most, a product to 2^15.
    """
    top_u, top_v = tl.ceil(tl.log2(most_u)), tl.ceil(tl.log2(most_v))
    factor = tl.exp2(tl.minimum(15.0 - top_v, 14.0) - top_u)
    return tl.where(most_u > 0.0, factor, 1.0)  # without v it is finite, without u it is not


@triton.jit
def larger(most, t):
    """The larger of most and |t|, of what is finite: the rest spoils its own results and nobody else's."""
    size = tl.abs(t.to(tl.float32))
    return tl.maximum(most, tl.where(size < float("inf"), size, 0.0))
