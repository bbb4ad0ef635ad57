"""`hyper_primary`: two generated layers and the activation between them, in one op where a backend fuses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .backends.contract import Layer
from .functional import hyper_linear
from .ops import autocast, primary, shapes
from .ops.register import MISSING, transformed

_op = torch.ops.fasthyper.primary.default
_EXACT_TYPES = (Tensor, nn.Parameter, type(None))  # a subclass of Tensor may define hyper_linear for itself


def may_fuse(x: Any) -> bool:
    """Return whether `hyper_primary` may run as one op, from x alone; never under a compiler or a transform."""
    if MISSING or torch.compiler.is_compiling():
        return False
    return (
        isinstance(x, Tensor)
        and not transformed()
        and primary.backend_that_may_fuse(x, *backends.current()) is not None
    )


def _fused(x: Any, z: Any, first: Layer, second: Layer, activation: str) -> Tensor | None:
    """Run the op. Return None if no backend fuses the call, or if its arguments are wrong: the layers then raise."""
    if not may_fuse(x) or x.dim() < 2 or any(type(t) not in _EXACT_TYPES for t in (x, z, *first, *second)):
        return None
    args = primary.Primary(shapes.flatten_points(x), z, *first, *second, activation, *backends.current())
    if not primary.are_valid(args) or primary.backend_that_fuses(args) is None:
        return None
    y, _ = _op(*args)
    return shapes.restore_points(y, x)


def hyper_primary(x: Tensor, z: Tensor, first: Layer, second: Layer, activation: str) -> Tensor:
    """Apply a primary network of two generated layers, which share one z, and the activation between them.

    It equals ``hyper_linear(σ(hyper_linear(x, z, *first)), z, *second)``. It runs as one op if the backend fuses both
    layers, and as two layers otherwise. Autocast and derivatives are as for `hyper_linear`.

    Args:
        x: inputs, ``(B, I)`` or ``(B, *, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        first: weight ``(J, I, R)``, bias ``(J, R)``, base_weight ``(J, I)`` and base_bias ``(J,)`` of the first
            layer; each of the last three may be None.
        second: the parameters of the second layer, ``(O, J, R)``, ``(O, R)``, ``(O, J)`` and ``(O,)``.
        activation: σ, ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"silu"`` or ``"gelu"``.

    Returns:
        ``(B, O)`` or ``(B, *, O)``, contiguous.

    Raises:
        TypeError: if an argument is not a floating point tensor, or the dtypes differ.
        ValueError: if a rank or a size does not match, the devices differ, or the activation is unknown.

    Example:
        >>> import torch
        >>> from fasthyper import hyper_linear
        >>> from fasthyper.fused import hyper_primary
        >>> x, z = torch.randn(32, 10), torch.randn(32, 8)
        >>> first = (torch.randn(16, 10, 8), torch.randn(16, 8), None, None)
        >>> second = (torch.randn(5, 16, 8), torch.randn(5, 8), None, None)
        >>> y = hyper_primary(x, z, first, second, "tanh")
        >>> hidden = torch.tanh(hyper_linear(x, z, *first[:2]))
        >>> torch.allclose(y, hyper_linear(hidden, z, *second[:2]), atol=1e-4)
        True
    """
    sigma = primary.sigma(activation)
    first, second = Layer(*first), Layer(*second)
    if isinstance(x, Tensor) and autocast.enabled(x.device.type):
        x, z = autocast.follow(x), autocast.follow(z)
        first, second = Layer(*map(autocast.follow, first)), Layer(*map(autocast.follow, second))
    y = _fused(x, z, first, second, activation)
    if y is not None:
        return y
    weight, bias, base_weight, base_bias = first
    h = sigma.forward(hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias))
    weight, bias, base_weight, base_bias = second
    return hyper_linear(h, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
