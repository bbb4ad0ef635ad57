"""dx and dz in one pass: a tile of G is formed in registers and summed twice, over r and over i.

    G[m, r]  = Σ_o g[m, o] H[o, i, r]                     for one i after the other
    dx[m, i] = Σ_r G[m, r] z[m, r]  +  Σ_o g[m, o] W0[o, i]
    dz[m, r] = Σ_i G[m, r] x[m, i]  +  Σ_o g[m, o] bias[o, r]

Rows m are (b, n). The launcher sums dz over n where there are several points. One tile has all of O and all of R.
"""

import triton
import triton.language as tl

from .loads import columns, multiple, row_offsets, widened


@triton.jit
def several(g, z, x_row, h, base_ptr, dx_row, in_rows, first, last, sx_i, sh_i,
            BM: tl.constexpr, BR: tl.constexpr, IB: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Compute dx in the columns [first, last), IB columns a step, and return dz."""
    column = tl.arange(0, IB)
    dz = tl.zeros((BM, BR), tl.float32)
    x = columns(x_row + tl.cast(first, tl.int64) * sx_i, in_rows, column, last - first, sx_i, EVEN_I)
    for i in tl.range(first, last, IB):
        ahead = i + IB  # x is loaded a step before its use
        rows = in_rows & (ahead < last)
        x_ahead = columns(x_row + tl.cast(ahead, tl.int64) * sx_i, rows, column, last - ahead, sx_i, EVEN_I)
        G = tl.dot(g, widened(h.load([0, i * sh_i]), WIDE), input_precision=PRECISION)
        G = tl.reshape(G, (BM, IB, BR))  # beyond I the descriptor reads zeros
        dz += tl.sum(G * x.to(tl.float32)[:, :, None], 1)
        dx = tl.sum(G * z[:, None, :], 2)
        to, inside = dx_row + (i + column)[None, :], in_rows[:, None] & (i + column < last)[None, :]
        if base_ptr is not None:
            dx += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, dx.to(dx_row.dtype.element_ty), mask=inside)
        x = x_ahead
    return dz


@triton.jit
def one_by_one(g, z, x_row, h_ptr, h, base_ptr, dx_row, in_rows, first, last, O, R, sx_i, sh_o, sh_i, sh_r,
               BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, READ: tl.constexpr,
               EVEN_O: tl.constexpr, EVEN_R: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Compute dx in the columns [first, last), one column a step, and return dz."""
    o, r, column = tl.arange(0, BO), tl.arange(0, BR), tl.arange(0, BI)
    index = tl.int64 if LONG else tl.int32
    dx = tl.zeros((BM, BI), tl.float32)
    dz = tl.zeros((BM, BR), tl.float32)
    for i in tl.range(first, last):
        x = tl.load(x_row + tl.cast(i, tl.int64) * sx_i, mask=in_rows, other=0.0).to(tl.float32)
        if READ == "o_ir":
            tile = h.load([0, i * sh_i])
        elif READ == "io_r":
            tile = h.load([i * sh_i, 0])
        elif READ == "i_o_r":
            tile = tl.reshape(h.load([i, 0, 0]), (BO, BR))
        else:
            at = h_ptr + tl.cast(i, tl.int64) * sh_i + (o.to(index) * sh_o)[:, None] + (r.to(index) * sh_r)[None, :]
            if EVEN_O and EVEN_R:
                tile = tl.load(at)
            else:
                tile = tl.load(at, mask=(o < O)[:, None] & (r < R)[None, :], other=0.0)
        G = tl.dot(g, widened(tile, WIDE), input_precision=PRECISION)
        dz += G * x[:, None]
        # BI columns of dx are collected and stored together.
        k = (i - first) % BI
        dx = tl.where((column == k)[None, :], tl.sum(G * z, 1)[:, None], dx)
        if (k == BI - 1) | (i == last - 1):
            to = dx_row + (i - k + column)[None, :]
            inside = in_rows[:, None] & (column <= k)[None, :]
            if base_ptr is not None:
                dx += tl.load(to, mask=inside, other=0.0).to(tl.float32)
            tl.store(to, dx.to(dx_row.dtype.element_ty), mask=inside)
    return dz


@triton.jit
def dx_dz(g_ptr, z_ptr, x_ptr, h_ptr, h, base_ptr, bias_ptr, dx_ptr, dz_ptr, M, N, I, O, R, W, per_split,
          sg_b, sg_n, sg_o, sz_b, sz_r, sx_b, sx_n, sx_i, sh_o, sh_i, sh_r, sw_o, sw_i, sb_o, sb_r,
          POINTS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
          IB: tl.constexpr, READ: tl.constexpr, EVEN_I: tl.constexpr, EVEN_O: tl.constexpr, EVEN_R: tl.constexpr,
          LONG: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute BM rows of dx, in the columns i of one split, and the partial sums of dz over these i.

    READ: H is read by a descriptor of (o, (i, r)), of ((i, o), r) or of (i, o, r), or by pointers. sh_i is the distance
    from i to i + 1: in columns or rows of the descriptor, or in numbers. IB: columns i of a step, several where R is
    small: a step has instructions that do not depend on R. W: the number of columns of z, zeros from R on. UNIT: R, W
    and the stride of rows of z are multiples of it.
    """
    R, W, sz_b = multiple(R, UNIT), multiple(W, UNIT), multiple(sz_b, UNIT)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    first = split * per_split
    last = tl.minimum(I, first + per_split)
    tl.assume(last > first)
    in_rows = m < M
    o, r, column = tl.arange(0, BO), tl.arange(0, BR), tl.arange(0, BI)
    g = widened(columns(g_ptr + row_offsets(m, N, sg_b, sg_n, POINTS), in_rows, o, O, sg_o, EVEN_O), WIDE)
    z = columns(z_ptr + row_offsets(m, N, sz_b, 0, POINTS), in_rows, r, W, sz_r, EVEN_R).to(tl.float32)
    x_row = x_ptr + row_offsets(m, N, sx_b, sx_n, POINTS)
    dx_row = dx_ptr + m.to(tl.int64)[:, None] * I

    if base_ptr is not None:  # the loop below adds to this
        for i0 in tl.range(first, last, BI):
            i = i0 + column
            at = base_ptr + (o.to(tl.int64) * sw_o)[:, None] + (tl.cast(i, tl.int64) * sw_i)[None, :]
            base = widened(tl.load(at, mask=(o < O)[:, None] & (i < last)[None, :], other=0.0), WIDE)
            product = tl.dot(g, base, input_precision=PRECISION)
            inside = in_rows[:, None] & (i < last)[None, :]
            tl.store(dx_row + i[None, :], product.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()

    if IB > 1:
        dz = several(g, z, x_row, h, base_ptr, dx_row, in_rows, first, last, sx_i, sh_i, BM, BR, IB, EVEN_I, WIDE,
                     PRECISION)  # fmt: skip
    else:
        dz = one_by_one(g, z, x_row, h_ptr, h, base_ptr, dx_row, in_rows, first, last, O, R, sx_i, sh_o, sh_i, sh_r,
                        BM, BO, BR, BI, READ, EVEN_O, EVEN_R, LONG, WIDE, PRECISION)  # fmt: skip

    if bias_ptr is not None:
        if split == 0:
            at = bias_ptr + (o.to(tl.int64) * sb_o)[:, None] + (r.to(tl.int64) * sb_r)[None, :]
            bias = widened(tl.load(at, mask=(o < O)[:, None] & (r < R)[None, :], other=0.0), WIDE)
            dz = tl.dot(g, bias, dz, input_precision=PRECISION)
    out = dz_ptr + (tl.cast(split, tl.int64) * M + m)[:, None] * R + r[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=in_rows[:, None] & (r < R)[None, :])
