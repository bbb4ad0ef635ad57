"""`hyper_linear`, which every layer calls: it casts under autocast, flattens the points, and calls the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .ops import autocast, linear, shapes

_op = torch.ops.fasthyper.hyper_linear.default
_AXES = {**linear.AXES, "x": "B*I"}  # as the caller passes them, before the points are flattened


def _check(x: Any, z: Any, weight: Any, bias: Any, base_weight: Any, base_bias: Any) -> None:
    given = {"x": x, "z": z, "weight": weight, "bias": bias, "base_weight": base_weight, "base_bias": base_bias}
    shapes.check(_AXES, given, optional=("bias", "base_weight", "base_bias"))


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

    Under autocast, the arguments are cast to the region's dtype, except for float64. The function is differentiable to
    any order, in reverse and forward mode, under `torch.func`, `torch.compile` and `torch.export`.

    An infinite or NaN x or z affects only its own instance. Whether a result is infinite or NaN depends on the
    schedule. For an infinite x and a z of zero, ``fold`` (which multiplies x with z first) and ``project`` (x with the
    head) give NaN; ``generate``, like W written out, gives infinity. The same holds for an infinite gradient.

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
        TypeError: if an argument is not a floating point tensor, or the dtypes differ.
        ValueError: if a rank or a size does not match, or the devices differ.

    Example:
        >>> import torch, fasthyper
        >>> x, z = torch.randn(32, 10), torch.randn(32, 8)
        >>> weight, bias = torch.randn(5, 10, 8), torch.randn(5, 8)
        >>> y = fasthyper.hyper_linear(x, z, weight, bias)
        >>> W = torch.einsum("oir,br->boi", weight, z)  # never formed by hyper_linear
        >>> torch.allclose(y, torch.einsum("boi,bi->bo", W, x) + z @ bias.T, atol=1e-4)
        True
    """
    if isinstance(x, Tensor) and autocast.enabled(x.device.type):
        x, z, weight, bias, base_weight, base_bias = map(autocast.follow, (x, z, weight, bias, base_weight, base_bias))
    if torch.compiler.is_compiling():  # what an op raises while it is traced, compiled code cannot catch
        _check(x, z, weight, bias, base_weight, base_bias)
    try:
        y = _op(shapes.flatten_points(x), z, weight, bias, base_weight, base_bias, *backends.current())
    except Exception:
        try:
            _check(x, z, weight, bias, base_weight, base_bias)
        except (TypeError, ValueError) as wrong:  # the op has seen flattened points; these are the caller's shapes
            raise wrong from None
        raise
    return shapes.restore_points(y, x)
