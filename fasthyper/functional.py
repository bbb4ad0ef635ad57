"""`hyper_linear`: what every layer calls. Checks, autocast, flattening; the op below does the rest.

`hyper_primary` is two of them and the activation between, for a backend that does them in one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .ops import affine as _affine  # noqa: F401  (registers the op)
from .ops import autocast, primary
from .ops.checks import DTYPES, check_tensors
from .ops.dispatch import MISSING, transformed
from .ops.primary import Layer

_op = torch.ops.fasthyper.hyper_linear.default
_primary_op = torch.ops.fasthyper.primary.default
_PLAIN = (Tensor, nn.Parameter, type(None))  # a subclass may have a meaning of its own for what is fused


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


def _rows(x: Tensor) -> Tensor:
    """View x as (B, N, I)."""
    if x.dim() == 3:
        return x
    return x.unsqueeze(1) if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _as_given(y: Tensor, x: Tensor) -> Tensor:
    """View y (B, N, O) with the points of x."""
    if x.dim() == 3:
        return y
    return y.squeeze(1) if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


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

    An instance whose x or z is infinite or NaN spoils its own results, and no other's. Whether these are infinite or
    NaN depends on the order: ``fold`` multiplies x with z first, and ``project`` x with the head, so that an infinite
    x beside a z of zero is NaN where ``generate``, as W written out, gives infinity; so does an infinite gradient in
    backward.

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
    return _as_given(_op(_rows(x), z, weight, bias, base_weight, base_bias, *backends.current()), x)


def may_fuse(x: Any) -> bool:
    """Whether `hyper_primary` may run as one op here: the quick answer, before its arguments are looked at.

    Not where something else looks on: a compiler or a transform sees the two layers.
    """
    if MISSING or torch.compiler.is_compiling():
        return False
    return isinstance(x, Tensor) and not transformed() and primary.fusing(x) is not None


def _fused(x, z, first: Layer, second: Layer, activation: str) -> Tensor | None:
    """Run the op, or return None where it is none for the backend, or not right: then the layers say why."""
    if not may_fuse(x) or x.dim() < 2 or any(type(t) not in _PLAIN for t in (x, z, *first, *second)):
        return None
    rows = _rows(x)
    try:
        primary.check(rows, z, first, second, activation)
    except (AttributeError, TypeError, ValueError):
        return None
    if primary.fused_by(rows, z, first, second, activation) is None:
        return None
    y, _ = _primary_op(rows, z, *first, *second, activation, *backends.current())
    return _as_given(y, x)


def hyper_primary(x: Tensor, z: Tensor, first: Layer, second: Layer, activation: str) -> Tensor:
    """Apply a primary network of two generated layers with an activation between them, both generated from one z.

    It is ``hyper_linear(σ(hyper_linear(x, z, *first)), z, *second)``, in one op where a backend has kernels that
    do all of it, and as that where none has. Autocast and derivatives are as for `hyper_linear`.

    Args:
        x: inputs, ``(B, I)`` or ``(B, *, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        first: weight ``(J, I, R)``, bias ``(J, R)``, base_weight ``(J, I)`` and base_bias ``(J,)`` of the first
            layer, None for each of the last three that it has not.
        second: those of the second layer, ``(O, J, R)``, ``(O, R)``, ``(O, J)`` and ``(O,)``.
        activation: σ, ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"silu"`` or ``"gelu"``.

    Returns:
        ``(B, O)`` or ``(B, *, O)``, contiguous.

    Raises:
        TypeError: if an argument is no floating point tensor, or the dtypes differ.
        ValueError: if a rank or a size does not match, the devices differ, or the activation is unknown.

    Example:
        >>> import torch
        >>> from fasthyper.functional import hyper_linear, hyper_primary
        >>> x, z = torch.randn(32, 10), torch.randn(32, 8)
        >>> first = (torch.randn(16, 10, 8), torch.randn(16, 8), None, None)
        >>> second = (torch.randn(5, 16, 8), torch.randn(5, 8), None, None)
        >>> y = hyper_primary(x, z, first, second, "tanh")
        >>> hidden = torch.tanh(hyper_linear(x, z, *first[:2]))
        >>> torch.allclose(y, hyper_linear(hidden, z, *second[:2]), atol=1e-4)
        True
    """
    sigma = primary.sigma(activation)
    if isinstance(x, Tensor) and autocast.enabled(x.device.type):
        x, z = autocast.follow(x), autocast.follow(z)
        first, second = tuple(map(autocast.follow, first)), tuple(map(autocast.follow, second))
    y = _fused(x, z, first, second, activation)
    if y is not None:
        return y
    weight, bias, base_weight, base_bias = first
    h = sigma.forward(hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias))
    weight, bias, base_weight, base_bias = second
    return hyper_linear(h, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
