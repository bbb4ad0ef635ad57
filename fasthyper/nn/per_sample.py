"""Norms of the gradient that each instance gives to a head, without these gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyper.ops import autocast, chunks, shapes

_AXES = {"x": "B*I", "z": "BR", "g": "B*O"}


def per_sample_norm_sq(x: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Return the squared norm of the gradient that each instance gives to the head of a generated linear layer.

    The gradient of instance b is ``Σ_n g[b,n] ⊗ x[b,n] ⊗ z[b]``, of the size of the head. Its norm needs no tensor of
    that size::

        ‖Σ_n g_n ⊗ x_n ⊗ z‖² = ‖z‖² Σ_{n,m} (x_n · x_m) (g_n · g_m) = ‖z‖² ‖Σ_n g_n ⊗ x_n‖²

    The cheaper of the two sums is computed, for some instances at a time. The result is differentiable. The gradient
    of a shared base weight is that of a head with ``z = 1``.

    Args:
        x: inputs of the layer, ``(B, I)`` or ``(B, *, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        g: gradient of the output, ``(B, O)`` or ``(B, *, O)``, with the points of x.

    Returns:
        ``(B,)``: in float64 if the arguments are, else in float32, also under autocast.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: if the shapes do not match.

    Example:
        >>> import torch
        >>> from fasthyper.nn import per_sample_norm_sq
        >>> x, z, g = torch.randn(8, 5, 4), torch.randn(8, 3), torch.randn(8, 5, 2)
        >>> gradients = torch.einsum("bno,bni,br->boir", g, x, z)
        >>> torch.allclose(per_sample_norm_sq(x, z, g), gradients.square().sum((1, 2, 3)), rtol=1e-4)
        True
    """
    shapes.check(_AXES, {"x": x, "z": z, "g": g})
    if x.shape[:-1] != g.shape[:-1]:
        raise ValueError(f"g must have the points of x, {tuple(x.shape[1:-1])}, got {tuple(g.shape[1:-1])}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, g = shapes.flatten_points(x), shapes.flatten_points(g)
    N, I, O = x.shape[1], x.shape[2], g.shape[2]
    gram = N * (I + O) <= I * O

    def of_some(x: Tensor, z: Tensor, g: Tensor) -> chunks.Results:
        x, z, g = x.to(dtype), z.to(dtype), g.to(dtype)
        if N == 1:
            sums = x.square().sum((1, 2)) * g.square().sum((1, 2))
        elif gram:
            sums = ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
        else:
            sums = (g.mT @ x).square().sum((1, 2))
        return (sums * z.square().sum(1),), ()

    numbers = max(N * max(I, O), z.shape[1], N * N if gram else I * O)
    with autocast.off(x):
        (found,), _ = chunks.run(of_some, (x, z, g), (), numbers)
    assert found is not None
    return found
