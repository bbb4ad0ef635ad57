"""The products of csrc/cpu/conv.h, of images with the kernels of their instances, in float32; see `aten.conv_products`.

They have two spatial axes. torch's own operations compute convolutions over three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import planner
from ..geometry import Geometry
from .aten import conv_products

_ops = torch.ops.fasthyper_cpu


def convolve(x: Tensor, w: Tensor, shift: Tensor | None, y: Tensor, geo: Geometry) -> None:
    """Write y (b, O, *pixels) of x (b, X, *pixels) and w (b, O, I, *taps)."""
    if not _runs(x, geo):
        return conv_products.convolve(x, w, shift, y, geo)
    _ops.conv_instances(_flat(x), _flat(w), shift, _flat(y), *_settings(geo))


def spread(g: Tensor, w: Tensor, shift: Tensor | None, x: Tensor, geo: Geometry) -> None:
    """Write x (b, X, *pixels) of g (b, O, *pixels) and w (b, O, I, *taps)."""
    if not _runs(g, geo):
        return conv_products.spread(g, w, shift, x, geo)
    _ops.conv_instances_input(_flat(g), _flat(w), shift, _flat(x), *_settings(geo))


def kernels(x: Tensor, g: Tensor, w: Tensor, geo: Geometry) -> None:
    """Write w (b, O, I, *taps) of x (b, X, *pixels) and g (b, O, *pixels)."""
    if not _runs(x, geo):
        return conv_products.kernels(x, g, w, geo)
    _ops.conv_instances_weight(_flat(x), _flat(g), _flat(w), *_settings(geo))


def _runs(t: Tensor, geo: Geometry) -> bool:
    return geo.dims == 2 and t.dtype == torch.float32


def _flat(t: Tensor) -> Tensor:
    """Return a tensor without the first of its three spatial axes, which has size 1."""
    return t.squeeze(-3)


def _settings(geo: Geometry) -> tuple[list[int], list[int], list[int], int, int]:
    stride, padding, dilation = ([*t][1:] for t in (geo.stride, geo.padding, geo.dilation))
    return stride, padding, dilation, geo.groups, planner.get_workspace_limit()
