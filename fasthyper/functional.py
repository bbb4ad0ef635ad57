"""`hyper_linear`, which every layer calls: it casts under autocast, flattens the points, and calls the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import backends, maps
from .incidence import Incidence
from .ops import autocast, linear, linear_terms, mapped, shapes, sharding

_op = torch.ops.fasthyper.hyper_linear.default
_op_of_map = torch.ops.fasthyper.mapped_linear.default
_op_of_terms = torch.ops.fasthyper.hyper_linear_terms.default
_AXES = {**linear.AXES, "x": "B*I"}  # as the caller passes them, before the points are flattened
_AXES_OF_TERMS = {**linear_terms.AXES, "x": "S*I"}
_REDUCE = ("sum", "mean", "max")


def _check(axes: shapes.Axes, x: Any, z: Any, weight: Any, bias: Any, base_weight: Any, base_bias: Any) -> None:
    given = {"x": x, "z": z, "weight": weight, "bias": bias, "base_weight": base_weight, "base_bias": base_bias}
    shapes.check(axes, given, optional=("bias", "base_weight", "base_bias"))


def hyper_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    incidence: Incidence | None = None,
    reduce: str = "sum",
    weight_map: maps.Map | None = None,
) -> Tensor:
    """Apply a linear layer whose weights are generated per instance, without writing them out.

    ``y[b] = x[b] (weight·z[b] + base_weight)ᵀ + bias·z[b] + base_bias``

    With an incidence, x is ``(S, I)`` or ``(S, *, I)``, z is ``(C, R)``, and y, ``(T, O)`` or ``(T, *, O)``, has the
    sum, the mean or the largest of its terms:

    ``y[target[e]] += (weight·z[cond[e]] + base_weight) x[source[e]] + bias·z[cond[e]] + base_bias``

    With a weight_map φ, which is applied to the generated weights, base included:

    ``y[b] = x[b] φ(weight·z[b] + base_weight)ᵀ + bias·z[b] + base_bias``

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
        incidence: which rows of x, z and y belong to each term of a sum.
        reduce: ``"sum"``, ``"mean"`` or ``"max"`` of the terms of each target; zero without terms. ``"max"`` writes
            out the terms, ``(E, O)``.
        weight_map: φ, a function of the weights: ``"abs"``, ``"softplus"``, ``"relu"``, ``"sigmoid"``, ``"tanh"`` or
            ``"exp"`` of each; ``"normalize"`` (norm 1) or ``"softmax"`` of each row, the weights of one output; or an
            elementwise function of a tensor, which may have parameters. None applies none. Not with an incidence.

    Returns:
        ``(B, O)`` or ``(B, *, O)``, contiguous; with an incidence ``(T, O)`` or ``(T, *, O)``.

    Raises:
        TypeError: if an argument is not a floating point tensor, the dtypes differ, ``weight_map`` is neither a string
            nor a function, or the function returns another dtype.
        ValueError: if a rank or a size does not match, the devices differ, an index is out of range, ``reduce`` is
            unknown or used without an incidence, ``weight_map`` is unknown or used with one, or the function that it
            is returns another shape.

    Example:
        >>> import torch, fasthyper
        >>> x, z = torch.randn(32, 10), torch.randn(32, 8)
        >>> weight, bias = torch.randn(5, 10, 8), torch.randn(5, 8)
        >>> y = fasthyper.hyper_linear(x, z, weight, bias)
        >>> W = torch.einsum("oir,br->boi", weight, z)  # never formed by hyper_linear
        >>> torch.allclose(y, torch.einsum("boi,bi->bo", W, x) + z @ bias.T, atol=1e-4)
        True
    """
    if has_torch_function_variadic(x, z, weight, bias, base_weight, base_bias):
        bases = {"base_weight": base_weight, "base_bias": base_bias}
        given = {"x": x, "z": z, "weight": weight, "bias": bias, **bases}
        more: dict[str, Any] = {"incidence": incidence, "reduce": reduce, "weight_map": weight_map}
        return shapes.overridden(hyper_linear, given, x, z, weight, bias, **bases, **more)
    if isinstance(x, Tensor) and autocast.enabled(x.device.type):
        x, z, weight, bias, base_weight, base_bias = map(autocast.follow, (x, z, weight, bias, base_weight, base_bias))
    sharding.prepare()
    tensors = x, z, weight, bias, base_weight, base_bias
    maps.check(weight_map)
    if incidence is not None and weight_map is not None:
        raise ValueError(f"weight_map must be None with an incidence, got {weight_map!r}: W is not written out there")
    if incidence is not None:
        return _over_terms(tensors, incidence, reduce)
    if reduce != "sum":
        raise ValueError(f"reduce must be 'sum' without an incidence, got {reduce!r}")
    if torch.compiler.is_compiling():  # what an op raises while it is traced, compiled code cannot catch
        _check(_AXES, *tensors)
    try:
        y = _over_points(shapes.flatten_points(x), *tensors[1:], weight_map=weight_map)
    except Exception as raised:
        try:
            _check(_AXES, *tensors)
            shapes.explain(raised, dict(zip(linear.HyperLinear._fields, tensors, strict=False)))
        except (TypeError, ValueError) as wrong:  # the op has seen flattened points; these are the caller's shapes
            raise wrong from None
        raise
    return shapes.restore_points(y, x)


def _over_points(*tensors: Any, weight_map: maps.Map | None) -> Tensor:
    if weight_map is None:
        return _op(*tensors, *backends.current())
    if isinstance(weight_map, str):
        return _op_of_map(*tensors, weight_map, *backends.current())
    _check(linear.AXES, *tensors)
    x, z, weight, bias, base_weight, base_bias = tensors
    whole = backends.current().backend == "materialised"
    return mapped.compose(x, z, weight, bias, base_weight, base_bias, weight_map, whole)


def _over_terms(tensors: tuple[Any, ...], incidence: Incidence, reduce: str) -> Tensor:
    if not isinstance(incidence, Incidence):
        raise TypeError(f"incidence must be a fasthyper.Incidence, got {type(incidence).__name__}")
    if reduce not in _REDUCE:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, _REDUCE))}, got {reduce!r}")
    if torch.compiler.is_compiling():
        _check(_AXES_OF_TERMS, *tensors)
    try:
        return _sum_over_terms(tensors, incidence, reduce)
    except Exception:
        _check(_AXES_OF_TERMS, *tensors)  # the op has seen flattened points; these are the caller's shapes
        raise


def _sum_over_terms(tensors: tuple[Any, ...], incidence: Incidence, reduce: str) -> Tensor:
    """Return y of a call over terms; the op checks the shapes, with points flattened."""
    x, z, *_ = tensors
    terms = incidence._terms(x.shape[0], z.shape[0])
    if reduce == "mean" and x.dtype == torch.float16:  # the sum may leave float16's range where the mean does not
        wide = [None if t is None else t.float() for t in tensors]
        return _sum_over_terms(tuple(wide), incidence, reduce).to(x.dtype)
    flat = shapes.flatten_points(x), *tensors[1:]
    if reduce != "max":
        y = _op_of_terms(*flat, *terms[:3], terms.targets, *backends.current())
        if reduce == "mean" and terms.target is not None:
            y = (y / degrees(terms.target, terms.targets, y.dtype)[:, None, None]).to(y.dtype)
    else:
        each = _op_of_terms(*flat, terms.source, terms.cond, None, terms.num_terms, *backends.current())
        y = each if terms.target is None else largest(each, terms.target, terms.targets)
    return y.squeeze(1) if x.dim() == 2 else y.reshape(y.shape[0], *x.shape[1:-1], y.shape[-1])


def degrees(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return how often each value of an index occurs, at least 1, in a dtype, or in float32 if it has 16 bits."""
    counts = index.new_zeros(size).scatter_add(0, index, torch.ones_like(index))
    return counts.clamp(min=1).to(torch.promote_types(dtype, torch.float32))


def largest(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Return (size, …), the largest of the rows that have the same value of an index; zero without rows."""
    where = index.view(-1, *(1,) * (rows.dim() - 1)).expand_as(rows)
    return rows.new_zeros(size, *rows.shape[1:]).scatter_reduce(0, where, rows, "amax", include_self=False)
