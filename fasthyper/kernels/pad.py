"""out[o, i, r] = H[o, i, r], and zeros up to a multiple of 16 bytes: rows that wide loads can begin at."""

import triton
import triton.language as tl


@triton.jit
def pad(h_ptr, out_ptr, rows, I, R, W, sh_o, sh_i, sh_r, BJ: tl.constexpr):
    """BJ numbers of out, (rows, W) with rows (o, i)."""
    j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    row, r = j // W, j % W
    at = h_ptr + (row // I) * sh_o + (row % I) * sh_i + r * sh_r
    tl.store(out_ptr + j, tl.load(at, mask=(row < rows) & (r < R), other=0.0), mask=row < rows)
