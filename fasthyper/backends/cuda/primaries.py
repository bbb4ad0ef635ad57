"""Launch whole primary networks of two layers: csrc/cuda/primary.cu, by the contract in fasthyper/ops/primary.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import planner
from .. import gpu
from ..gpu import DTYPES, Device, cdiv
from . import library
from .launch import GradsLaunch, fold_launch, grads_launch, parameter_partial_sums
from .library import tile_sizes

ACTIVATIONS = ("relu", "tanh", "sigmoid", "silu", "gelu")

_Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def fuses(x: Tensor, z: Tensor, first: _Layer, second: _Layer, activation: str) -> bool:
    """Return whether `primary` and `primary_grads` take a primary network: narrow layers, and a small hidden layer."""
    B, N, I = x.shape
    (J, _, R), O = first[0].shape, second[0].shape[0]
    if activation not in ACTIVATIONS or x.dtype not in DTYPES or 0 in (B, N, I, J, R, O):
        return False
    if max(J, O) > tile_sizes().kept_outputs:  # a block computes both layers for its rows
        return False
    limit = planner.get_workspace_limit()
    return _launches(B, N, R, I, J, O, x.dtype, (True,) * 10, library.device(x), limit) is not None


@functools.lru_cache(maxsize=4096)
def _launches(
    B: int,
    N: int,
    R: int,
    I: int,
    J: int,
    O: int,
    dtype: torch.dtype,
    mask: tuple[bool, ...],
    device: Device,
    limit: int,
) -> tuple[GradsLaunch, GradsLaunch] | None:
    """Return the launch configurations of both layers' gradients; None where memory is too small."""
    if B * N * J * dtype.itemsize > limit // 8 or B * N >= 1 << 31:  # the gradient of the hidden layer
        return None
    config1 = grads_launch(B, N, R, I, J, dtype, mask[:6], device)
    config2 = grads_launch(B, N, R, J, O, dtype, (True, mask[1], *mask[6:]), device)
    if config1 is None or config2 is None:
        return None
    grads_shared = library.ops().grads_shared
    if grads_shared(O, J, dtype.itemsize, True, False) > device.shared_memory:
        return None
    if grads_shared(J, config1.inputs_per_split, dtype.itemsize, mask[0], False) > device.shared_memory:
        return None
    if mask[1] and 4 * B * N * R * (1 + cdiv(I, config1.inputs_per_split)) > limit // 4:
        return None
    return config1, config2


def primary(x: Tensor, z: Tensor, first: _Layer, second: _Layer, activation: str) -> tuple[Tensor, Tensor]:
    """Return y (B, N, O), and the hidden layer before the activation, a (B, N, J)."""
    (B, N, I), (J, _, R), O = x.shape, first[0].shape, second[0].shape[0]
    per_split, _ = fold_launch(B * N, I, R, J, library.device(x).processors, gpu.partial_sums_limit())
    partial = gpu.partial_sums(cdiv(I, per_split), B * N, J, like=x)
    a, y = x.new_empty(B, N, J), x.new_empty(B, N, O)
    number = library.activation(activation)
    library.ops().primary(x, z, *first, *second, a, y, partial, per_split, gpu.allows_tf32(), number)
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
    limit = planner.get_workspace_limit()
    configs = _launches(B, N, R, I, J, O, x.dtype, tuple(mask), library.device(x), limit)
    assert configs is not None  # `fuses` has requested all gradients
    config1, config2 = configs
    of_layer = lambda J, I: ((J, I, R), (J, R), (J, I), (J,))
    shapes = ((B, N, I), (B, R), *of_layer(J, I), *of_layer(O, J))
    dx, dz, *out = (x.new_empty(shape) if k else None for shape, k in zip(shapes, mask, strict=True))
    dz_partial = None
    if dz is not None:  # of the second layer, then of the first
        shape = (1 + cdiv(I, config1.inputs_per_split), B * N, R)
        dz_partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    partial1, partial2 = (parameter_partial_sums(config, B * N, x) for config in configs)
    library.ops().primary_grads(
        x, z, *first[:3], *second[:3], a, g, dx, dz, dz_partial, *out, x.new_empty(B, N, J), partial1, partial2,
        config1.inputs_per_split, config1.rows_per_split, config2.rows_per_split, gpu.allows_tf32(),
        library.activation(activation),
    )  # fmt: skip
    return dx, dz, *out
