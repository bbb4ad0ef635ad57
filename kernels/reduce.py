"""out[j] = Σ_s partial[s, j]: the second stage of a split sum. The order is fixed, so that results are reproducible."""

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
