"""Sums of what other kernels wrote. Their order is fixed, so that results are reproducible.

    reduce         out[j] = Σ_s partial[s, j]
    reduce_points  out[b, p, r] = Σ_n rows[b, n, r]

`reduce` is the second stage of a split sum. In `reduce_points`, n are the points of part p.
"""

import triton
import triton.language as tl


@triton.jit
def reduce(partial_ptr, out_ptr, J, S, BJ: tl.constexpr):
    """Compute BJ numbers of out from partial sums in float32."""
    j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    inside = j < J
    total = tl.zeros((BJ,), tl.float32)
    for s in range(S):
        total += tl.load(partial_ptr + tl.cast(s, tl.int64) * J + j, mask=inside, other=0.0)
    tl.store(out_ptr + j, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce_points(rows_ptr, out_ptr, J, N, R, per_part, so_b, so_p, BJ: tl.constexpr, BN: tl.constexpr):
    """Compute BJ numbers of one part of out from rows in float32, BN points at a time."""
    p = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    inside, b, r = j < J, j // R, j % R
    first = p * per_part
    length = tl.minimum(N - first, per_part).to(tl.int32)  # below 1 where earlier parts have all points
    at = rows_ptr + (b * N + first) * R + r
    total = tl.zeros((BN, BJ), tl.float32)
    for n0 in tl.range(0, length, BN):
        n = n0 + tl.arange(0, BN)
        mask = (n < length)[:, None] & inside[None, :]
        total += tl.load(at[None, :] + (n.to(tl.int64) * R)[:, None], mask=mask, other=0.0)
    to = out_ptr + b * so_b + p * so_p + r
    tl.store(to, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=inside)
