"""x ⊗ z, folded into the K dimension of one matrix product. The generated left operand stays in registers.

    out[m, p] = Σ_c Σ_k u[m, c] v[m, k] H(c, k, p)  +  Σ_c u[m, c] A(p, c)  +  Σ_k v[m, k] C(p, k)  +  d[p]

            m       u   v   c   k   p     A     C     d
    y    (b, n)     x   z   i   r   o    W0    bias   b0
    dx   (b, n)     g   z   o   r   i    W0ᵀ
    dz   (b, n)     g   x   o   i   r    biasᵀ

The launcher sums dz over n where there are several points.
"""

import triton
import triton.language as tl

from .loads import columns, into_range, larger, multiple, row_offsets, scaled, widened


@triton.jit
def head_tile(h_ptr, h, c, k0, p0, C, K, P, sh_c, sh_k, sh_p,
              BK: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, READ: tl.constexpr,
              CLAMP_K: tl.constexpr, CLAMP_P: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Load H(c, k0 + 0..BK, p0 + 0..BP) for CB columns c, one below the other: (CB·BK, BP).

    READ: H is read by a descriptor of (p, (c, k)), of ((c, p), k) or of ((c, k), p), or by pointers. sh_c is the
    distance from c to c + 1: in columns or rows of the descriptor, or in numbers. Beyond K a descriptor reads numbers
    of the next c, which are multiplied by zeros of v. Beyond P it reads numbers whose outputs are not stored.
    """
    if READ == "p_ck":
        tile = h.load([p0, c * sh_c + k0]).T
    elif READ == "cp_k":
        tile = h.load([c * sh_c + p0, k0]).T
    elif READ == "ck_p":
        tile = h.load([c * sh_c + k0, p0])
    else:
        # Beyond K and P the last number is read again: it is multiplied by zero, or its output is not stored.
        index = tl.int64 if LONG else tl.int32
        j = tl.arange(0, CB * BK)
        k = k0 + j % BK
        p = p0 + tl.arange(0, BP)
        if CLAMP_K:
            k = tl.minimum(k, K - 1)
        if CLAMP_P:
            p = tl.minimum(p, P - 1)
        offsets = (k.to(index) * sh_k)[:, None] + (p.to(index) * sh_p)[None, :]
        if CB > 1:
            offsets += (tl.minimum(j // BK, C - 1 - c).to(index) * sh_c)[:, None]
        tile = tl.load(h_ptr + tl.cast(c, tl.int64) * sh_c + offsets)
    return widened(tile, WIDE)


@triton.jit
def add_products(acc, u_row, v_row, h_ptr, h, in_rows, first, last, k0, p0, C, K, P, su_c, sv_k, sh_c, sh_k, sh_p,
                 BK: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, READ: tl.constexpr,
                 AHEAD: tl.constexpr, EVEN_C: tl.constexpr, EVEN_K: tl.constexpr, CLAMP_K: tl.constexpr,
                 CLAMP_P: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr, factor,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Add Σ_c (u[:, c] v[:, k0 + 0..BK]) H(c, k0 + 0..BK, p0 + 0..BP) for c in [first, last) to acc."""
    v = widened(columns(v_row, in_rows, k0 + tl.arange(0, BK), K, sv_k, EVEN_K), WIDE)
    if AHEAD:
        ahead = tl.load(u_row + tl.cast(first, tl.int64) * su_c, mask=in_rows, other=0.0)
    for c in tl.range(first, last, CB):
        if CB == 1:
            if AHEAD:
                u = widened(ahead, WIDE)
                ahead = tl.load(u_row + tl.cast(c + 1, tl.int64) * su_c, mask=in_rows & (c + 1 < last), other=0.0)
            else:
                u = widened(tl.load(u_row + tl.cast(c, tl.int64) * su_c, mask=in_rows, other=0.0), WIDE)
            if SCALED:
                u = scaled(u, factor)
            a = u[:, None] * v
        else:
            u = widened(columns(u_row, in_rows, c + tl.arange(0, CB), C, su_c, EVEN_C), WIDE)
            if SCALED:
                u = scaled(u, factor[:, None])
            a = tl.reshape(u[:, :, None] * v[:, None, :], (u.shape[0], CB * BK))
        tile = head_tile(h_ptr, h, c, k0, p0, C, K, P, sh_c, sh_k, sh_p, BK, BP, CB, READ, CLAMP_K, CLAMP_P, LONG,
                         WIDE)  # fmt: skip
        acc = tl.dot(a, tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_plain_product(acc, row, a_ptr, in_rows, p0, J, P, s_j, sa_p, sa_j,
                      BJ: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add Σ_j row[:, j] A(p, j) to acc: A is the same for all instances."""
    p = p0 + tl.arange(0, BP)
    tl.assume(J > 0)
    for j0 in tl.range(0, J, BJ):
        j = j0 + tl.arange(0, BJ)
        t = widened(columns(row, in_rows, j, J, s_j, False), WIDE)
        at = a_ptr + (j.to(tl.int64) * sa_j)[:, None] + (p.to(tl.int64) * sa_p)[None, :]
        a = widened(tl.load(at, mask=(j < J)[:, None] & (p < P)[None, :], other=0.0), WIDE)
        acc = tl.dot(t, a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def largest(row, in_rows, first, last, s_j, BM: tl.constexpr):
    """Return the largest absolute value of each row in the columns [first, last).

    It reads one column at a time, as the loop over c does. A reduction over tiles would fix the layout of v, which then
    would not stay in registers.
    """
    most = tl.zeros((BM,), tl.float32)
    for j in tl.range(first, last):
        most = larger(most, tl.load(row + tl.cast(j, tl.int64) * s_j, mask=in_rows, other=0.0))
    return most


@triton.jit
def fold(u_ptr, v_ptr, h_ptr, h, h_tail, a_ptr, c_ptr, d_ptr, out_ptr, M, N, C, K, P, K_shared, per_split,
         su_b, su_n, su_c, sv_b, sv_n, sv_k, sh_c, sh_k, sh_p, sa_p, sa_c, sc_p, sc_k, sd_p,
         POINTS: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr,
         CB: tl.constexpr, READ: tl.constexpr, AHEAD: tl.constexpr, EVEN_C: tl.constexpr, EVEN_K: tl.constexpr,
         CLAMP_K: tl.constexpr, CLAMP_P: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
         UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute one tile (BM, BP) of out, or the partial sums of one split where per_split < C.

    K is divided into steps of BK, and one of TAIL. K_shared: the number of columns of C, which is not padded. AHEAD: a
    column of u is loaded a step before its use. SCALED: rows of u are multiplied by powers of two that keep u·v in the
    range of float16. UNIT: K and the strides of rows of v are multiples of it.
    """
    K, sv_b, sv_n = multiple(K, UNIT), multiple(sv_b, UNIT), multiple(sv_n, UNIT)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    p0 = tl.program_id(1) * BP
    split = tl.program_id(2)
    in_rows = m < M
    u_row = u_ptr + row_offsets(m, N, su_b, su_n, POINTS)
    v_row = v_ptr + row_offsets(m, N, sv_b, sv_n, POINTS)
    first = split * per_split
    last = tl.minimum(C, first + per_split)
    tl.assume(last > first)  # no split is empty; ptxas serialises wgmma in a loop that may not run
    whole = K // BK * BK if TAIL > 0 else K
    tl.assume(whole > 0)

    factor = tl.full((BM,), 1.0, tl.float32)
    if SCALED:
        most_u = largest(u_row, in_rows, first, last, su_c, BM)
        most_v = largest(v_row, in_rows, 0, K, sv_k, BM)
        factor = into_range(most_u, most_v)

    acc = tl.zeros((BM, BP), tl.float32)
    for k0 in tl.range(0, whole, BK):
        acc = add_products(acc, u_row, v_row, h_ptr, h, in_rows, first, last, k0, p0, C, K, P, su_c, sv_k, sh_c, sh_k,
                           sh_p, BK, BP, CB, READ, AHEAD, EVEN_C, EVEN_K or TAIL > 0, CLAMP_K and TAIL == 0, CLAMP_P,
                           LONG, WIDE, SCALED, factor, PRECISION)  # fmt: skip
    if TAIL > 0:
        acc = add_products(acc, u_row, v_row, h_ptr, h_tail, in_rows, first, last, whole, p0, C, K, P, su_c, sv_k, sh_c,
                           sh_k, sh_p, TAIL, BP, CB, READ, AHEAD, EVEN_C, EVEN_K, CLAMP_K, CLAMP_P, LONG, WIDE, SCALED,
                           factor, PRECISION)  # fmt: skip
    if SCALED:
        acc /= factor[:, None]

    p = p0 + tl.arange(0, BP)
    BJ: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth  # 16 or 32: larger steps spill
    if split == 0:
        if a_ptr is not None:
            acc = add_plain_product(acc, u_row, a_ptr, in_rows, p0, C, P, su_c, sa_p, sa_c, BJ, BP, WIDE, PRECISION)
        if c_ptr is not None:
            acc = add_plain_product(
                acc, v_row, c_ptr, in_rows, p0, K_shared, P, sv_k, sc_p, sc_k, BJ, BP, WIDE, PRECISION
            )
        if d_ptr is not None:
            acc += tl.load(d_ptr + p.to(tl.int64) * sd_p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    to = out_ptr + (tl.cast(split, tl.int64) * M + m)[:, None] * P + p[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (p < P)[None, :])
