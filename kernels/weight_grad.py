"""dH: the generated left operand has rows (i, r), and the batch is the K dimension.

    dH[o, i, r] = Σ_m (x[m, i] z[m, r]) g[m, o]             m = (b, n)

Each split of the batch writes partial sums in float32, and `reduce` adds them in order. There are no atomics, so the
result has the same bits every time.
"""

import triton
import triton.language as tl

from .loads import into_range, larger, multiple, row_offsets, scaled, widened


@triton.jit
def transposed(pointer, m, M, N, s_b, s_n, j, J, s_j, POINTS: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile (j, m) of rows m."""
    at = pointer + row_offsets(m, N, s_b, s_n, POINTS)[None, :] + (j.to(tl.int64) * s_j)[:, None]
    if EVEN:
        return tl.load(at, mask=(m < M)[None, :], other=0.0)
    return tl.load(at, mask=(m < M)[None, :] & (j < J)[:, None], other=0.0)


@triton.jit
def weight_grad(x_ptr, z_ptr, g_ptr, z_rows, g_rows, out_ptr, M, N, I, O, R, W, per_split,
                sx_b, sx_n, sx_i, sz_b, sz_r, sg_b, sg_n, sg_o,
                POINTS: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr,
                EVEN_I: tl.constexpr, EVEN_R: tl.constexpr, EVEN_O: tl.constexpr, AHEAD: tl.constexpr,
                WIDE: tl.constexpr, SCALED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute one tile of dH, BI·BR rows and BO columns, from the rows of the batch of one split.

    z_rows, g_rows: descriptors, or None to read by pointers. AHEAD: x is loaded a step before its use. SCALED: columns
    of x are multiplied by powers of two that keep x·z in the range of float16, if the products of one column span at
    most 2^29. W: the number of columns of z, zeros from R on. UNIT: R, W and the stride of rows of z are multiples of
    it.
    """
    R, W, sz_b = multiple(R, UNIT), multiple(W, UNIT), multiple(sz_b, UNIT)
    r_tiles = tl.cdiv(R, BR)
    i0 = tl.program_id(0) // r_tiles * BI
    r0 = tl.program_id(0) % r_tiles * BR
    o0 = tl.program_id(1) * BO
    split = tl.program_id(2)
    first = split * per_split
    last = tl.minimum(M, first + per_split)
    tl.assume(last > first)
    i, r, o, k = i0 + tl.arange(0, BI), r0 + tl.arange(0, BR), o0 + tl.arange(0, BO), tl.arange(0, BM)

    if SCALED:
        most_x, most_z = tl.zeros((BI, BM), tl.float32), tl.zeros((BR, BM), tl.float32)
        for m0 in tl.range(first, last, BM):
            most_x = larger(most_x, transposed(x_ptr, m0 + k, M, N, sx_b, sx_n, i, I, sx_i, POINTS, EVEN_I))
            most_z = larger(most_z, transposed(z_ptr, m0 + k, M, N, sz_b, 0, r, W, sz_r, POINTS, EVEN_R))
        factor = into_range(tl.max(most_x, 1), tl.max(most_z))

    acc = tl.zeros((BI * BR, BO), tl.float32)
    if AHEAD:
        ahead = transposed(x_ptr, first + k, M, N, sx_b, sx_n, i, I, sx_i, POINTS, EVEN_I)
    for m0 in tl.range(first, last, BM):
        m = m0 + k
        if z_rows is not None:
            z = z_rows.load([m0, r0]).T
        else:
            z = transposed(z_ptr, m, M, N, sz_b, 0, r, W, sz_r, POINTS, EVEN_R)
        if g_rows is not None:
            g = g_rows.load([m0, o0])
        else:
            at = g_ptr + row_offsets(m, N, sg_b, sg_n, POINTS)[:, None] + (o.to(tl.int64) * sg_o)[None, :]
            if EVEN_O:
                g = tl.load(at, mask=(m < M)[:, None], other=0.0)
            else:
                g = tl.load(at, mask=(m < M)[:, None] & (o < O)[None, :], other=0.0)
        if AHEAD:
            x = widened(ahead, WIDE)
            ahead = transposed(x_ptr, m + BM, M, N, sx_b, sx_n, i, I, sx_i, POINTS, EVEN_I)
        else:
            x = widened(transposed(x_ptr, m, M, N, sx_b, sx_n, i, I, sx_i, POINTS, EVEN_I), WIDE)
        if SCALED:
            x = scaled(x, factor[:, None])
        a = tl.reshape(x[:, None, :] * widened(z, WIDE)[None, :, :], (BI * BR, BM))
        acc = tl.dot(a, widened(g, WIDE), acc, input_precision=PRECISION)

    j = tl.arange(0, BI * BR)
    if SCALED:
        acc /= tl.reshape(tl.broadcast_to(factor[:, None], (BI, BR)), (BI * BR,))[:, None]
    row_i, row_r = i0 + j // BR, r0 + j % BR
    inside = ((row_i < I) & (row_r < R))[:, None] & (o < O)[None, :]
    to = out_ptr + (split * O + o).to(tl.int64)[None, :] * I * R + (row_i.to(tl.int64) * R + row_r)[:, None]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=inside)
