"""Launch whole primary networks of two layers: csrc/cuda/primary.cu, by the contract in fasthyper/ops/primary.py."""

from __future__ import annotations

from torch import Tensor

from ... import planner
from .. import gpu
from ..gpu import DTYPES
from . import library

ACTIVATIONS = ("relu", "tanh", "sigmoid", "silu", "gelu")

_Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def fuses(x: Tensor, z: Tensor, first: _Layer, second: _Layer, activation: str) -> bool:
    """Return whether `primary` and `primary_grads` take a primary network: narrow layers, and a small hidden layer."""
    (J, _, R), O = first[0].shape, second[0].shape[0]
    sizes = (*x.shape[:2], R, x.shape[2], J, O)
    if activation not in ACTIVATIONS or x.dtype not in DTYPES or 0 in sizes:
        return False
    return library.fits_primary(library.index(x), sizes, x.dtype, planner.get_workspace_limit())


def primary(x: Tensor, z: Tensor, first: _Layer, second: _Layer, activation: str) -> tuple[Tensor, Tensor]:
    """Return y (B, N, O), and the hidden layer before the activation, a (B, N, J)."""
    a, y = (x.new_empty(*x.shape[:2], len(layer[0])) for layer in (first, second))
    options = (planner.get_workspace_limit(), gpu.allows_tf32(), library.activation(activation))
    library.ops().primary(x, z, *first, *second, a, y, *options)
    return y, a


def primary_grads(
    x: Tensor,
    z: Tensor,
    first: _Layer,
    second: _Layer,
    activation: str,
    a: Tensor,
    g: Tensor,
    mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, the first layer's four and the second's, where the mask is set, else None."""
    (B, N, I), (J, _, R), O = x.shape, first[0].shape, second[0].shape[0]
    of_layer = lambda J, I: ((J, I, R), (J, R), (J, I), (J,))
    shapes = ((B, N, I), (B, R), *of_layer(J, I), *of_layer(O, J))
    out = tuple(x.new_empty(shape) if k else None for shape, k in zip(shapes, mask, strict=True))
    options = (planner.get_workspace_limit(), gpu.allows_tf32(), library.activation(activation))
    library.ops().primary_grads(x, z, *first[:3], *second[:3], a, g, *out, *options)
    return out
