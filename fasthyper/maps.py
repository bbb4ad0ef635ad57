"""The functions of generated weights: W = φ(P), P (B, O, K). K are the weights of one output.

| name      | φ(P)            | dP from dW             | name      | φ(P)           | dP from dW              |
|-----------|-----------------|------------------------|-----------|----------------|-------------------------|
| abs       | abs(P)          | sign(P) dW             | tanh      | tanh(P)        | (1 − W²) dW             |
| softplus  | log(1 + exp(P)) | σ(P) dW                | exp       | exp(P)         | W dW                    |
| relu      | max(P, 0)       | dW where P > 0         | normalize | P / max(n, ε)  | (dW − W (W·dW)) / n     |
| sigmoid   | σ(P)            | W (1 − W) dW           | softmax   | exp(P) / Σ exp | W (dW − W·dW)           |

The last two act on rows: n is the norm of P[b,o], Σ and · are over K. The others act on each number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("abs", "softplus", "relu", "sigmoid", "tanh", "exp", "normalize", "softmax")

Map = str | Callable[[Tensor], Tensor]
"""One of `NAMES`, or an elementwise function."""

_EPS = 1e-12  # of `normalize`, as in torch.nn.functional.normalize
_THRESHOLD = 20.0  # of `softplus`, as in torch.nn.functional.softplus: above, it is P itself
_aten = torch.ops.aten


def check(weight_map: Any) -> None:
    """Check a `weight_map` that a caller passes.

    Raises:
        TypeError: it is neither a string, nor callable, nor None.
        ValueError: it is a string that names no map.
    """
    if isinstance(weight_map, str):
        if weight_map not in NAMES:
            known = ", ".join(map(repr, NAMES))
            raise ValueError(f"weight_map must be one of {known}, or a function, got {weight_map!r}")
    elif weight_map is not None and not callable(weight_map):
        raise TypeError(f"weight_map must be a string, a function or None, got a {type(weight_map).__name__}")


def name_of(weight_map: Map) -> str:
    """Return the name of a map, or of its function."""
    return weight_map if isinstance(weight_map, str) else getattr(weight_map, "__name__", type(weight_map).__name__)


def value(weight_map: Map, p: Tensor) -> Tensor:
    """Return φ(P), differentiable to any order.

    Raises:
        TypeError: a function returns no tensor, or one of another dtype.
        ValueError: a function returns another shape or device.
    """
    if not isinstance(weight_map, str):
        return _checked(weight_map(p), p)
    if weight_map == "normalize":
        return p / _norm_of(p)[0]
    return _FUNCTIONS[weight_map](p)


def vjp(name: str, p: Tensor, dw: Tensor) -> Tensor:
    """Return dP, differentiable to any order."""
    if name == "abs":
        return dw * p.sgn()
    if name == "relu":
        return _aten.threshold_backward(dw, p, 0.0)
    if name == "softplus":
        return dw * torch.where(p > _THRESHOLD, 1.0, p.sigmoid())
    w = value(name, p)
    if name == "normalize":
        norm, small = _norm_of(p)
        along = (w * dw).sum(-1, keepdim=True)
        return (dw - torch.where(small, 0.0, w * along)) / norm
    if name == "softmax":
        return w * (dw - (w * dw).sum(-1, keepdim=True))
    return dw * {"exp": w, "sigmoid": w * (1 - w), "tanh": 1 - w * w}[name]


def value_(name: str, p: Tensor) -> Tensor:
    """Overwrite P with φ(P)."""
    if name == "normalize":
        return p.div_(_norm(p))
    if name == "softmax":
        return p.copy_(F.softmax(p, -1))
    if name == "softplus":
        return p.copy_(F.softplus(p))
    getattr(p, f"{name}_")()
    return p


def vjp_(name: str, p: Tensor, dw: Tensor) -> Tensor:
    """Overwrite dW with dP, and P with anything."""
    if name == "abs":
        return dw.mul_(p.sgn_())
    if name == "relu":
        return _aten.threshold_backward.grad_input(dw, p, 0.0, grad_input=dw)
    if name == "softplus":
        return _aten.softplus_backward.grad_input(dw, p, 1.0, _THRESHOLD, grad_input=dw)
    if name == "exp":
        return dw.mul_(p.exp_())
    if name == "sigmoid":
        return _aten.sigmoid_backward.grad_input(dw, p.sigmoid_(), grad_input=dw)
    if name == "tanh":
        return _aten.tanh_backward.grad_input(dw, p.tanh_(), grad_input=dw)
    norm = _norm(p) if name == "normalize" else None
    w = value_(name, p) if norm is None else p.div_(norm)
    along = (w * dw).sum(-1, keepdim=True)
    if norm is None:
        return dw.sub_(along).mul_(w)
    return dw.addcmul_(w, along.masked_fill_(norm <= _EPS, 0.0), value=-1).div_(norm)


def _norm_of(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return n, differentiable, and where it is ε, a constant. The derivative of a norm of zero would be nan."""
    small = torch.linalg.vector_norm(p.detach(), dim=-1, keepdim=True) <= _EPS
    norm = torch.linalg.vector_norm(torch.where(small, 1.0, p), dim=-1, keepdim=True)
    return torch.where(small, _EPS, norm), small


def _norm(p: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp_min_(_EPS)


def _checked(w: Any, p: Tensor) -> Tensor:
    if not isinstance(w, Tensor) or w.dtype != p.dtype:
        got = f"a tensor of {w.dtype}" if isinstance(w, Tensor) else f"a {type(w).__name__}"
        raise TypeError(f"weight_map must return a tensor of the weights' dtype, {p.dtype}, got {got}")
    if w.shape != p.shape or w.device != p.device:
        raise ValueError(
            f"weight_map must be elementwise: for weights of shape {tuple(p.shape)} on {p.device} it returned shape "
            f"{tuple(w.shape)} on {w.device}"
        )
    return w


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "softplus": F.softplus,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "softmax": lambda p: torch.softmax(p, -1),
}
