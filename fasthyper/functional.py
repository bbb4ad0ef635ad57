"""`hyper_linear`: what every layer calls. Checks, autocast, flattening; the op below does the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from .ops import affine as _affine  # noqa: F401  (registers the op)
from .ops import autocast
from .ops.checks import DTYPES, check_tensors

_op = torch.ops.fasthyper.hyper_linear.default


def _fits(x, z, weight, bias, base_weight, base_bias) -> bool:
    """Whether every argument is as `_check` wants it, in the fewest steps: small calls spend their time here."""
    if not (isinstance(x, Tensor) and isinstance(z, Tensor) and isinstance(weight, Tensor)):
        return False
    dtype, device = x.dtype, x.device
    if not (z.dtype == dtype == weight.dtype and z.device == device == weight.device and dtype in DTYPES):
        return False
    size = x.shape
    if len(size) < 2 or weight.dim() != 3:
        return False
    O, I, R = weight.shape
    if size[-1] != I or z.shape != (size[0], R):
        return False
    for t, shape in ((bias, (O, R)), (base_weight, (O, I)), (base_bias, (O,))):
        if t is not None and not (
            isinstance(t, Tensor) and t.dtype == dtype and t.device == device and t.shape == shape
        ):
            return False
    return True


def _check(x, z, weight, bias, base_weight, base_bias) -> None:
    """Check every argument of `hyper_linear`; the messages name it, its shape and what was expected."""
    for name, t in (("x", x), ("z", z), ("weight", weight)):
        if t is None:
            raise TypeError(f"{name} must be a tensor, got None")
    check_tensors(x=x, z=z, weight=weight, bias=bias, base_weight=base_weight, base_bias=base_bias)
    if weight.dim() != 3:
        raise ValueError(f"weight must have shape (O, I, R), got {tuple(weight.shape)}")
    O, I, R = weight.shape
    if x.dim() < 2:
        raise ValueError(f"x must have shape (B, I) or (B, *, I), got {tuple(x.shape)}")
    if x.shape[-1] != I:
        raise ValueError(
            f"x must have I = {I} features last, as weight (O, I, R) has: x has shape {tuple(x.shape)}, "
            f"weight has shape {tuple(weight.shape)}"
        )
    if z.dim() != 2 or z.shape[0] != x.shape[0]:
        hint = ""
        if z.dim() == 1 or (z.dim() == 2 and z.shape[0] == 1):
            one = "z[None]" if z.dim() == 1 else "z"
            hint = f"; for one z shared by the whole batch, pass x[None] and {one}: the batch becomes points"
        raise ValueError(
            f"z must have shape (B, R) with the batch of x: z has shape {tuple(z.shape)}, "
            f"x has shape {tuple(x.shape)}{hint}"
        )
    if z.shape[1] != R:
        raise ValueError(
            f"z must have R = {R} features, as weight (O, I, R) has: z has shape {tuple(z.shape)}, "
            f"weight has shape {tuple(weight.shape)}"
        )
    blocks = (("bias", bias, "(O, R)", (O, R)), ("base_weight", base_weight, "(O, I)", (O, I)))
    for name, t, letters, shape in (*blocks, ("base_bias", base_bias, "(O,)", (O,))):
        if t is not None and t.shape != shape:
            raise ValueError(
                f"{name} must have shape {letters} = {tuple(shape)}, got {tuple(t.shape)} "
                f"beside weight (O, I, R) of shape {tuple(weight.shape)}"
            )


def hyper_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer whose weights are generated per instance, without writing them out.

    ``y[b] = x[b] (weight·z[b] + base_weight)ᵀ + bias·z[b] + base_bias``

    Under autocast, the arguments are cast to the region's dtype, float64 ones excepted. Differentiable to any
    order, in reverse and forward mode, under `torch.func`, `torch.compile` and `torch.export`.

    Args:
        x: inputs, ``(B, I)`` or ``(B, *, I)``: instances, points that share an instance's weights, features.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(O, I, R)``: the weight of an ``nn.Linear(R, O * I)``, viewed.
        bias: head of the generated bias, ``(O, R)``.
        base_weight: weights that all instances share, ``(O, I)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O)`` or ``(B, *, O)``, contiguous.

    Raises:
        TypeError: if an argument is no floating point tensor, or the dtypes differ.
        ValueError: if a rank or a size does not match, or the devices differ.

    Example:
        >>> import torch, fasthyper
        >>> x, z = torch.randn(32, 10), torch.randn(32, 8)
        >>> weight, bias = torch.randn(5, 10, 8), torch.randn(5, 8)
        >>> y = fasthyper.hyper_linear(x, z, weight, bias)
        >>> W = torch.einsum("oir,br->boi", weight, z)  # what is never formed
        >>> torch.allclose(y, torch.einsum("boi,bi->bo", W, x) + z @ bias.T, atol=1e-4)
        True
    """
    if isinstance(x, Tensor) and autocast.enabled(x.device.type):
        x, z, weight, bias, base_weight, base_bias = map(autocast.follow, (x, z, weight, bias, base_weight, base_bias))
    if not _fits(x, z, weight, bias, base_weight, base_bias):
        _check(x, z, weight, bias, base_weight, base_bias)
    if x.dim() == 3:  # nothing to flatten
        return _op(x, z, weight, bias, base_weight, base_bias, *backends.current())
    if x.dim() == 2:
        return _op(x.unsqueeze(1), z, weight, bias, base_weight, base_bias, *backends.current()).squeeze(1)
    points = x.shape[1:-1]
    rows = x.reshape(x.shape[0], math.prod(points), x.shape[-1])
    y = _op(rows, z, weight, bias, base_weight, base_bias, *backends.current())
    return y.reshape(x.shape[0], *points, weight.shape[0])
