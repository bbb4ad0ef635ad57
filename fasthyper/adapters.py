"""`low_rank_linear`: a linear layer with an adapter of low rank for each instance, or for each row by its id."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .incidence import Incidence
from .ops import autocast, groups, shapes

LAYOUTS = ("rI,Or", "rI,rO", "Ir,Or", "Ir,rO")
"""The axes of a and b after the first."""


def low_rank_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    alpha: float | None = None,
    incidence: Incidence | None = None,
    layout: str | None = None,
) -> Tensor:
    """Apply a linear layer with an adapter of low rank for each instance, as LoRA has, without forming its product.

    ``y[c] = x[c] (base_weight + (alpha / r)·B[c] A[c])ᵀ + base_bias``

    A[c] is (r, I) and B[c] is (O, r). They are tensors: the outputs of a network, or parameters. An adapter whose A
    and B have a linear head is a :class:`~fasthyper.nn.HyperLinear` with a rank.

    With an incidence, each row of x has the adapter of its id, ``y[e] = x[e] (base_weight + …B[id[e]] A[id[e]])ᵀ + …``:
    tokens of many adapters in one list, in any order. No row has a copy of A or B.

    Under autocast, the arguments are cast to the region's dtype, except for float64. The function is differentiable to
    any order, in reverse and forward mode, under `torch.func`, `torch.compile` and `torch.export`.

    Args:
        x: ``(C, I)`` or ``(C, *, I)``; with an incidence ``(E, I)``.
        a: ``(C, r, I)`` or ``(C, I, r)``.
        b: ``(C, O, r)`` or ``(C, r, O)``.
        base_weight: ``(O, I)``, the weight of an ``nn.Linear``.
        base_bias: ``(O,)``.
        alpha: the factor of the adapters, times r. None means r, so that the factor is 1.
        incidence: ``Incidence.from_batch(ids)``: the adapter of each row.
        layout: the axes of a and b: ``"rI,Or"`` (as PEFT's), ``"rI,rO"``, ``"Ir,Or"`` or ``"Ir,rO"``. None finds them
            from the shapes; it is required where several fit.

    Returns:
        ``(C, O)`` or ``(C, *, O)``; with an incidence ``(E, O)``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or alpha is not a number.
        ValueError: a rank or a size does not match, no layout fits or several do, alpha is not positive and finite,
            an id is out of range, or the incidence has sources or targets.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
        `arXiv 2106.09685 <https://arxiv.org/abs/2106.09685>`_. Charakorn et al., "Text-to-LoRA: Instant Transformer
        Adaption", ICML 2025, `arXiv 2506.06105 <https://arxiv.org/abs/2506.06105>`_, generate A and B.

    Example:
        >>> import torch, fasthyper
        >>> base = torch.nn.Linear(16, 12)
        >>> a, b = torch.randn(3, 4, 16), torch.randn(3, 12, 4)  # three adapters of rank 4
        >>> fasthyper.low_rank_linear(torch.randn(3, 50, 16), a, b, base.weight, base.bias, alpha=8).shape
        torch.Size([3, 50, 12])
        >>> ids = torch.tensor([2, 0, 2, 1, 0])
        >>> incidence = fasthyper.Incidence.from_batch(ids)
        >>> x = torch.randn(5, 16)
        >>> y = fasthyper.low_rank_linear(x, a, b, base.weight, base.bias, alpha=8, incidence=incidence)
        >>> W = base.weight + 2 * b[ids] @ a[ids]
        >>> torch.allclose(y, torch.einsum("eoi,ei->eo", W, x) + base.bias, atol=1e-4)
        True
    """
    if has_torch_function_variadic(x, a, b, base_weight, base_bias):
        given = {"x": x, "a": a, "b": b, "base_weight": base_weight, "base_bias": base_bias}
        more: dict[str, Any] = {"alpha": alpha, "incidence": incidence, "layout": layout}
        return shapes.overridden(low_rank_linear, given, *given.values(), **more)
    if isinstance(x, Tensor) and autocast.enabled(x.device.type):
        x, a, b, base_weight, base_bias = map(autocast.follow, (x, a, b, base_weight, base_bias))
    a, b = _in_order(x, a, b, base_weight, base_bias, layout, incidence is not None)
    r = a.shape[2]
    scale = 1.0 if alpha is None else check_alpha(alpha) / max(1, r)
    if incidence is not None:
        ids = _ids(incidence, a)
        h = groups.apply_groups(x, a, ids)
        y = groups.apply_groups(h if scale == 1 else h * scale, b, ids)
        return add_base(y, x, base_weight, base_bias)
    points = shapes.flatten_points(x)
    if base_weight is None:
        h = torch.bmm(points, a)
        y = torch.bmm(h if scale == 1 else h * scale, b)
        y = y if base_bias is None else y + base_bias
    else:
        y = F.linear(points, base_weight, base_bias)  # first, so that its gradient of x is added to the other in place
        y = torch.baddbmm(y, torch.bmm(points, a), b, alpha=scale)
    return shapes.restore_points(y, x)


def add_base(y: Tensor, x: Tensor, base_weight: Tensor | None, base_bias: Tensor | None = None) -> Tensor:
    """Return y + x base_weightᵀ + base_bias; x and y have the same points."""
    if base_bias is not None:
        y = y + base_bias
    if base_weight is None:
        return y
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), base_weight.t()).view(y.shape)


def check_alpha(alpha: float) -> float:
    """Check that alpha is positive and finite; return it.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive and finite.
    """
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    return alpha


def _ids(incidence: Any, a: Tensor) -> Tensor:
    """Return the adapter of each row."""
    if not isinstance(incidence, Incidence):
        raise TypeError(f"incidence must be a fasthyper.Incidence, got {type(incidence).__name__}")
    if incidence.cond is None or incidence.source is not None or incidence.target is not None:
        raise ValueError(
            "incidence must have cond, the adapter of each row, and nothing else, as Incidence.from_batch(ids), got "
            f"{incidence}"
        )
    if incidence.num_conds is not None and incidence.num_conds != a.shape[0]:
        raise ValueError(f"a must have {incidence.num_conds} adapters, the incidence's num_conds, got {a.shape[0]}")
    return incidence.cond


def _in_order(
    x: Any, a: Any, b: Any, base_weight: Any, base_bias: Any, layout: str | None, by_id: bool
) -> tuple[Tensor, Tensor]:
    """Check all arguments; return a as (C, I, r) and b as (C, r, O)."""
    given = {"x": x, "a": a, "b": b, "base_weight": base_weight, "base_bias": base_bias}
    for name, t in given.items():
        if t is not None or not name.startswith("base_"):
            shapes.check_input(name, t)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    fitting = [layout] if layout else _fitting(given)
    if len(fitting) > 1:
        raise ValueError(
            f"layout must be given, one of {', '.join(map(repr, fitting))}: all fit a {tuple(a.shape)} and b "
            f"{tuple(b.shape)} for x {tuple(x.shape)}"
        )
    of_a, of_b = (fitting[0] if fitting else LAYOUTS[0]).split(",")
    rows = "EI" if by_id else "C*I"
    axes = {"x": rows, "a": f"C{of_a}", "b": f"C{of_b}", "base_weight": "OI", "base_bias": "O"}
    try:
        shapes.check(axes, given, optional=("base_weight", "base_bias"))
    except ValueError as wrong:
        if layout or fitting or not all(isinstance(t, Tensor) and t.dim() == 3 for t in (a, b)):
            raise
        raise ValueError(f"{wrong}; no other layout of a and b fits, either: {', '.join(LAYOUTS)}") from None
    return a if of_a == "Ir" else a.mT, b if of_b == "rO" else b.mT


def _fitting(given: dict[str, Any]) -> list[str]:
    """Return the layouts in which the sizes of all arguments agree."""
    x, a, b, base_weight, base_bias = given.values()
    if not (isinstance(x, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor)):
        return []
    if x.dim() < 1 or a.dim() != 3 or b.dim() != 3:
        return []
    outputs = {t.shape[0] for t in (base_weight, base_bias) if isinstance(t, Tensor) and t.dim()}
    found = []
    for layout in LAYOUTS:
        of_a, of_b = layout.split(",")
        sizes_a, sizes_b = dict(zip(of_a, a.shape[1:], strict=True)), dict(zip(of_b, b.shape[1:], strict=True))
        if sizes_a["I"] == x.shape[-1] and sizes_a["r"] == sizes_b["r"] and outputs <= {sizes_b["O"]}:
            found.append(layout)
    return found
