"""Whole primaries of two layers in few launches: csrc/cuda/primary.cu, by the contract in fasthyper/ops/primary.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import planner
from ..triton import DTYPES
from ..triton.device import allows_tf32
from .device import Device
from .launch import GradsLaunch, cdiv, fold_launch, grads_launch, parts_of, room

ACTIVATIONS = {"relu": 1, "tanh": 2, "sigmoid": 3, "silu": 4, "gelu": 5}
"""Their numbers in csrc/cuda/activation.h."""

_MOST_HIDDEN = 64
"""J and O up to which a block takes its rows through both layers at once."""

_Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def fuses(x: Tensor, z: Tensor, first: _Layer, second: _Layer, activation: str) -> bool:
    """Whether `primary` and `primary_grads` take this: both layers narrow, and what is between them small."""
    B, N, I = x.shape
    (J, _, R), O = first[0].shape, second[0].shape[0]
    if activation not in ACTIVATIONS or x.dtype not in DTYPES or 0 in (B, N, I, J, R, O) or max(J, O) > _MOST_HIDDEN:
        return False
    return _launches(B, N, R, I, J, O, x.dtype, (True,) * 10, Device.of(x), planner.get_workspace_limit()) is not None


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
    dev: Device,
    limit: int,
) -> tuple[GradsLaunch, GradsLaunch] | None:
    """How the gradients of both layers are cut; None where there is no room."""
    if B * N * J * dtype.itemsize > limit // 8 or B * N >= 1 << 31:  # the gradient of what is between
        return None
    one = grads_launch(B, N, R, I, J, dtype, mask[:6], dev)
    two = grads_launch(B, N, R, J, O, dtype, (True, mask[1], *mask[6:]), dev)
    if one is None or two is None or dev.ops.grads_shared(O, J, dtype.itemsize, True, False) > dev.shared:
        return None
    if dev.ops.grads_shared(J, one.inputs, dtype.itemsize, mask[0], False) > dev.shared:
        return None
    if mask[1] and 4 * B * N * R * (1 + cdiv(I, one.inputs)) > limit // 4:
        return None
    return one, two


def primary(x: Tensor, z: Tensor, first: _Layer, second: _Layer, activation: str) -> tuple[Tensor, Tensor]:
    """y (B, N, O) and a (B, N, J)."""
    (B, N, I), (J, _, R), O = x.shape, first[0].shape, second[0].shape[0]
    dev = Device.of(x)
    per_split, _ = fold_launch(B * N, I, R, J, dev.processors, room())
    splits = cdiv(I, per_split)
    partial = torch.empty(splits, B * N, J, dtype=torch.float32, device=x.device) if splits > 1 else None
    a, y = x.new_empty(B, N, J), x.new_empty(B, N, O)
    dev.ops.primary(x, z, *first, *second, a, y, partial, per_split, allows_tf32(), ACTIVATIONS[activation])
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
    """Gradients of x, z, the first layer's four and the second's, as asked for by the mask."""
    (B, N, I), (J, _, R), O = x.shape, first[0].shape, second[0].shape[0]
    dev = Device.of(x)
    launches = _launches(B, N, R, I, J, O, x.dtype, tuple(mask), dev, planner.get_workspace_limit())
    assert launches is not None  # with more gradients it was not, in `fuses`
    one, two = launches
    of_layer = lambda J, I: ((J, I, R), (J, R), (J, I), (J,))
    shapes = ((B, N, I), (B, R), *of_layer(J, I), *of_layer(O, J))
    dx, dz, *out = (x.new_empty(shape) if k else None for shape, k in zip(shapes, mask, strict=True))
    z_parts = None
    if dz is not None:
        z_parts = torch.empty(1 + cdiv(I, one.inputs), B * N, R, dtype=torch.float32, device=x.device)
    dev.ops.primary_grads(
        x, z, *first[:3], *second[:3], a, g, dx, dz, z_parts, *out, x.new_empty(B, N, J), parts_of(one, B * N, x),
        parts_of(two, B * N, x), one.inputs, one.rows, two.rows, allows_tf32(), ACTIVATIONS[activation],
    )  # fmt: skip
    return dx, dz, *out
