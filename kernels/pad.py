"""Copy z and H in one launch, and pad their rows with zeros from R to W: each row then starts at an aligned address."""

import triton
import triton.language as tl


@triton.jit
def pad(z_ptr, h_ptr, z_out_ptr, h_out_ptr, B, OI, I, R, W, sz_b, sz_r, sh_o, sh_i, sh_r, BJ: tl.constexpr):
    """Write BJ numbers of the copies: first rows b of z, then rows (o, i) of H. Either may be None."""
    j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    row, r = j // W, j % W
    if z_ptr is not None:
        inside = row < B
        z = tl.load(z_ptr + row * sz_b + r * sz_r, mask=inside & (r < R), other=0.0)
        tl.store(z_out_ptr + j, z, mask=inside)
    if h_ptr is not None:
        inside = (row >= B) & (row < B + OI)
        at = h_ptr + ((row - B) // I) * sh_o + ((row - B) % I) * sh_i + r * sh_r
        tl.store(h_out_ptr + (row - B) * W + r, tl.load(at, mask=inside & (r < R), other=0.0), mask=inside)
