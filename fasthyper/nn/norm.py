"""The norm of generated weights, without keeping the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasthyper.ops.register import transformed

# Elements of a head that are worked on at a time: 16 MiB in float32.
_PIECE = 2**22


def norm_sq(z: Tensor, h: Tensor, w: Tensor | None) -> Tensor:
    """‖h z[b] + w‖² for z `(B, R)`, h `(K, R)` and w `(K,)`, in z's dtype, to which h and w are converted.

    By pieces of h. Where there are fewer instances than features, a piece of the weights is formed and squared;
    else zᵀ(hᵀh)z + 2 zᵀ(hᵀw) + ‖w‖² needs an R × R matrix once for all instances. Never negative.
    """
    few = z.shape[0] < z.shape[1]

    def of_piece(z: Tensor, h: Tensor, w: Tensor | None = None) -> list[Tensor]:
        h = h.to(z.dtype)
        w = None if w is None else w.to(z.dtype)
        if few:
            weights = z @ h.T if w is None else torch.addmm(w, z, h.T)
            return [weights.square().sum(1)]
        return [h.T @ h] if w is None else [h.T @ h, w @ h, w @ w]

    operands = [h] if w is None else [h, w]
    rows = max(1, _PIECE // max(1, h.shape[1], z.shape[0]))
    sums: list[Tensor] = []
    for piece in zip(*(operand.split(rows) for operand in operands), strict=True):
        # Checkpointed, because autograd would keep what each piece made, together larger than the head. torch.func
        # does not know checkpoints.
        one_piece = h.shape[0] <= rows or transformed()
        terms = of_piece(z, *piece) if one_piece else _checkpointed(of_piece, z, *piece)
        sums = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms
    if few:
        return sums[0]
    gram, *rest = sums
    norm = torch.einsum("br,br->b", z @ gram, z)
    if rest:
        norm = norm + 2 * (z @ rest[0]) + rest[1]
    return norm.clamp_min(0)


def _checkpointed(function, *args):
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
