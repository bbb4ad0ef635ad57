"""The squared norm of generated weights, without storing all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasthyper import maps
from fasthyper.ops import chunks
from fasthyper.ops.mapped import generate
from fasthyper.ops.register import transformed

_CHUNK_ELEMENTS = 2**22
"""Elements of a head that are processed at a time: 16 MiB in float32."""


def generated_norm_sq(z: Tensor, head: Tensor, base: Tensor | None) -> Tensor:
    """Return ‖head z[b] + base‖² of each instance, never negative.

    The head is processed in chunks of rows. With fewer instances than features, each chunk of the weights is formed
    and squared. Otherwise, with h the head and w the base, zᵀ(hᵀh)z + 2 zᵀ(hᵀw) + ‖w‖² needs one R × R matrix for all
    instances.

    Args:
        z: `(B, R)`; its dtype is that of all computation.
        head: `(K, R)`.
        base: `(K,)` or None.

    Returns:
        `(B,)`.
    """
    few_instances = z.shape[0] < z.shape[1]

    def terms_of_chunk(z: Tensor, h: Tensor, w: Tensor | None = None) -> list[Tensor]:
        h = h.to(z.dtype)
        w = None if w is None else w.to(z.dtype)
        if few_instances:
            weights = z @ h.T if w is None else torch.addmm(w, z, h.T)
            return [weights.square().sum(1)]
        return [h.T @ h] if w is None else [h.T @ h, w @ h, w @ w]

    operands = [head] if base is None else [head, base]
    chunk_size = max(1, _CHUNK_ELEMENTS // max(1, head.shape[1], z.shape[0]))
    sums: list[Tensor] = []
    for chunk in zip(*(operand.split(chunk_size) for operand in operands), strict=True):
        # Autograd would keep the intermediates of every chunk, together larger than the head: checkpoint each one.
        # torch.func does not support checkpoints.
        direct = head.shape[0] <= chunk_size or transformed()
        terms = terms_of_chunk(z, *chunk) if direct else _checkpointed(terms_of_chunk, z, *chunk)
        sums = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms
    if few_instances:
        return sums[0]
    gram, *base_terms = sums
    norm = torch.einsum("br,br->b", z @ gram, z)
    if base_terms:
        norm = norm + 2 * (z @ base_terms[0]) + base_terms[1]
    return norm.clamp_min(0)


def mapped_norm_sq(z: Tensor, weight: Tensor, base_weight: Tensor | None, weight_map: maps.Map) -> Tensor:
    """Return ‖φ(H·z[b] + W0)‖² of each instance; W is formed for some instances at a time.

    Args:
        z: `(B, R)`; its dtype is that of all computation.
        weight: H, `(O, I, R)`.
        base_weight: W0, `(O, I)`, or None.
        weight_map: φ.

    Returns:
        `(B,)`.
    """

    def some(z: Tensor, weight: Tensor, base_weight: Tensor | None) -> chunks.Results:
        base_weight = None if base_weight is None else base_weight.to(z.dtype)
        w = generate(z, weight.to(z.dtype), base_weight, weight_map)
        return (w.square().sum((1, 2)),), ()

    (norm,), _ = chunks.run(some, (z,), (weight, base_weight), weight.shape[0] * weight.shape[1])
    assert norm is not None
    return norm


def _checkpointed(function, *args):
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
