"""The steps of the family over terms that are not products with H: sums over the terms of a row, and back to the terms.

    outer_sum      A[k, q, c] = Σ_t u[t, q] v[t, c]            t: the terms of piece k
    row_products   to[t, a]   = Σ_b M[k, a, b] f[t, b]
    sum_terms      out[row(d), f] += Σ_j messages[from(j), f]  j: the positions of segment d

The terms are in the order of their rows, and piece k has the positions ptr[k] to ptr[k + 1]: a row, or a part of one.
Position t is term t, or, with PAIRS, point t % N of term t // N. The row of a factor at a term is rows[term], or the
term itself. Rows are read where they are, without a copy in this order. Every sum has a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .loads import widened


@triton.jit
def span(ptr_ptr, k):
    """Return the first position of piece k, and the number of its positions. Without pointers, it is position k."""
    begin, length = k, 1
    if ptr_ptr is not None:
        begin = tl.load(ptr_ptr + k)
        length = (tl.load(ptr_ptr + k + 1) - begin).to(tl.int32)
    return begin, length


@triton.jit
def offsets_of(rows_ptr, at, inside, N, s_row, s_point, PAIRS: tl.constexpr):
    """Return the offsets of a factor's rows at positions; they have 64 bits."""
    term = at
    if PAIRS:
        term = at // N
    row = term
    if rows_ptr is not None:
        row = tl.load(rows_ptr + term, mask=inside, other=0)
    if PAIRS:
        return row * s_row + (at % N) * s_point
    return row * s_row


@triton.jit
def tile_of(pointer, offsets, inside, j, J, s_j):
    """Load a tile (positions, j), with zeros outside."""
    at = pointer + offsets[:, None] + (j.to(tl.int64) * s_j)[None, :]
    return tl.load(at, mask=inside[:, None] & (j < J)[None, :], other=0.0)


@triton.jit(do_not_specialize=["first"])
def outer_sum(u_ptr, v_ptr, a_ptr, ptr_ptr, u_rows, v_rows, first, N, Q, C, su_row, su_point, su_q, sv_row, sv_point,
              sv_c, PAIRS: tl.constexpr, DOT: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
              WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute a tile (BQ, BC) of A for one of the pieces from `first` on.

    DOT: as a matrix product, BT positions at a time; else one position at a time.
    """
    k = tl.program_id(0).to(tl.int64)
    q, c = tl.program_id(1) * BQ + tl.arange(0, BQ), tl.program_id(2) * BC + tl.arange(0, BC)
    begin, length = span(ptr_ptr, first + k)
    tl.assume(length > 0)  # no piece is empty
    acc = tl.zeros((BQ, BC), tl.float32)
    if DOT:
        for t0 in tl.range(0, length, BT):
            t = t0 + tl.arange(0, BT)
            inside, at = t < length, begin + t
            u = tile_of(u_ptr, offsets_of(u_rows, at, inside, N, su_row, su_point, PAIRS), inside, q, Q, su_q)
            v = tile_of(v_ptr, offsets_of(v_rows, at, inside, N, sv_row, sv_point, PAIRS), inside, c, C, sv_c)
            acc = tl.dot(tl.trans(widened(u, WIDE)), widened(v, WIDE), acc, input_precision=PRECISION)
    else:
        for t in tl.range(0, length):
            at = begin + t
            u_at = u_ptr + offsets_of(u_rows, at, t < length, N, su_row, su_point, PAIRS) + q.to(tl.int64) * su_q
            v_at = v_ptr + offsets_of(v_rows, at, t < length, N, sv_row, sv_point, PAIRS) + c.to(tl.int64) * sv_c
            u = tl.load(u_at, mask=q < Q, other=0.0).to(tl.float32)
            v = tl.load(v_at, mask=c < C, other=0.0).to(tl.float32)
            acc += u[:, None] * v[None, :]
    to = a_ptr + (k * Q + q[:, None]) * C + c[None, :]
    tl.store(to, acc.to(a_ptr.dtype.element_ty), mask=(q < Q)[:, None] & (c < C)[None, :])


@triton.jit
def store_added(to, tile, inside, ADD: tl.constexpr):
    """Store a tile in the dtype of its memory, or add it to what is there."""
    if ADD:
        tile += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, tile.to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "first_to"])
def row_products(m_ptr, f_ptr, to_ptr, ptr_ptr, f_rows, to_rows, first, first_to, N, A, B, sm_k, sm_a, sm_b, sf_row,
                 sf_point, sf_b, st_row, st_point, st_a, PAIRS: tl.constexpr, TO_PAIRS: tl.constexpr, ADD: tl.constexpr,
                 DOT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr, WIDE: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Compute BA columns of `to` for BT positions of one of the pieces from `first` on.

    `to` has a row for each position from `first_to` on; with `to_rows`, or with TO_PAIRS, it is addressed as a factor.
    DOT: as a matrix product; else one position at a time, and all positions of the piece.
    """
    k = tl.program_id(0).to(tl.int64)
    t0 = tl.program_id(1) * BT
    a = tl.program_id(2) * BA + tl.arange(0, BA)
    begin, length = span(ptr_ptr, first + k)
    m_row = m_ptr + k * sm_k + (a.to(tl.int64) * sm_a)[:, None]
    tl.assume(B > 0)
    if DOT:
        if t0 < length:
            t = t0 + tl.arange(0, BT)
            inside, at = t < length, begin + t
            f_row = offsets_of(f_rows, at, inside, N, sf_row, sf_point, PAIRS)
            acc = tl.zeros((BA, BT), tl.float32)  # a is the longer side: the matrix unit takes 64 rows at a time
            for b0 in tl.range(0, B, BB):
                b = b0 + tl.arange(0, BB)
                m = tl.load(
                    m_row + (b.to(tl.int64) * sm_b)[None, :], mask=(a < A)[:, None] & (b < B)[None, :], other=0.0
                )
                f = tile_of(f_ptr, f_row, inside, b, B, sf_b).to(m.dtype)
                acc = tl.dot(widened(m, WIDE), tl.trans(widened(f, WIDE)), acc, input_precision=PRECISION)
            to = to_ptr + offsets_of(to_rows, at - first_to, inside, N, st_row, st_point, TO_PAIRS)
            to = to[:, None] + (a.to(tl.int64) * st_a)[None, :]
            store_added(to, tl.trans(acc), inside[:, None] & (a < A)[None, :], ADD)
    else:
        for t in tl.range(0, length):
            at = begin + t
            f_row = f_ptr + offsets_of(f_rows, at, t < length, N, sf_row, sf_point, PAIRS)
            products = tl.zeros((BA, BB), tl.float32)
            for b0 in tl.range(0, B, BB):
                b = b0 + tl.arange(0, BB)
                m = tl.load(
                    m_row + (b.to(tl.int64) * sm_b)[None, :], mask=(a < A)[:, None] & (b < B)[None, :], other=0.0
                )
                f = tl.load(f_row + b.to(tl.int64) * sf_b, mask=b < B, other=0.0)
                products += m.to(tl.float32) * f.to(tl.float32)[None, :]
            to = to_ptr + offsets_of(to_rows, at - first_to, t < length, N, st_row, st_point, TO_PAIRS)
            store_added(to + a.to(tl.int64) * st_a, tl.sum(products, 1), a < A, ADD)


@triton.jit(do_not_specialize=["first", "first_row", "low", "high", "base"])
def sum_terms(out_ptr, messages_ptr, ptr_ptr, from_ptr, row_ptr, first, first_row, low, high, base, F, so_row, so_f,
              sm_row, sm_f, BT: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Add up BF numbers of the messages of one of the segments from `first` on.

    Segment d has the positions ptr[d] to ptr[d + 1], those from `low` to `high`; or position d. The message of position
    j is from[j] - base, or j - base. The row of segment d is row[d] - first_row, or d - first_row.
    """
    d = first + tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    begin, end = d, d + 1
    if ptr_ptr is not None:
        begin, end = tl.maximum(tl.load(ptr_ptr + d), low), tl.minimum(tl.load(ptr_ptr + d + 1), high)
    if begin < end:
        acc = tl.zeros((BF,), tl.float32)
        for j0 in tl.range(begin, end, BT):
            j = j0 + tl.arange(0, BT)
            inside = j < end
            message = j
            if from_ptr is not None:
                message = tl.load(from_ptr + j, mask=inside, other=0)
            acc += tl.sum(tile_of(messages_ptr, (message - base) * sm_row, inside, f, F, sm_f).to(tl.float32), 0)
        row = d
        if row_ptr is not None:
            row = tl.load(row_ptr + d)
        store_added(out_ptr + (row - first_row) * so_row + f.to(tl.int64) * so_f, acc, f < F, True)
