"""The norm of generated weights, without the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Elements of a head that are converted to float32 at a time: 16 MiB.
_CONVERTED = 2**22


def norm_sq(z: Tensor, h: Tensor, w: Tensor | None) -> Tensor:
    """‖h z[b] + w‖² for z `(B, R)`, h `(K, R)` and w `(K,)`, in z's dtype, to which h and w are converted.

    zᵀ(hᵀh)z + 2 zᵀ(hᵀw) + ‖w‖² needs an R × R matrix once for all instances. Never negative.
    """

    def moments(h: Tensor, w: Tensor | None = None) -> list[Tensor]:
        h = h.to(z.dtype)
        if w is None:
            return [h.T @ h]
        w = w.to(z.dtype)
        return [h.T @ h, w @ h, w @ w]

    operands = [h] if w is None else [h, w]
    rows = max(1, _CONVERTED // max(1, h.shape[1]))
    if h.dtype == z.dtype or h.shape[0] <= rows:
        sums = moments(*operands)
    else:
        # Checkpointed, because autograd would keep the converted pieces, together larger than the head.
        sums = [z.new_zeros(())] * (2 * len(operands) - 1)
        for pieces in zip(*(operand.split(rows) for operand in operands), strict=True):
            more = checkpoint(moments, *pieces, use_reentrant=False, preserve_rng_state=False)
            sums = [total + term for total, term in zip(sums, more, strict=True)]
    gram, *rest = sums
    norm = torch.einsum("br,br->b", z @ gram, z)
    if rest:
        norm = norm + 2 * (z @ rest[0]) + rest[1]
    return norm.clamp_min(0)
