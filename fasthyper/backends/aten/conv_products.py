"""The three products of a convolution with a kernel for each instance, in torch's own operations.

    convolve  y[b]  = conv(x[b], w[b]) + shift[b]
    spread    x[b]  = the transpose of it, applied to g[b], + shift[b]
    kernels   w[b]  = the gradient of the kernel of b, from x[b] and g[b]

A group of channels is made of every instance's groups, so that one convolution computes all instances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...geometry import Geometry

_aten = torch.ops.aten


def convolve(x: Tensor, w: Tensor, shift: Tensor | None, y: Tensor, geo: Geometry) -> None:
    """Write y (b, O, *pixels) of x (b, X, *pixels) and w (b, O, I, *taps)."""
    if geo.pointwise:
        return _multiply(_as_matrices(w, geo), _pixels(x, geo), shift, y)
    found = _convolution(_joined(x, geo), _kernels(w, geo), geo, x.shape[0], transposed=False)
    found = found.reshape(y.shape[0], y.shape[1], *found.shape[2:])
    for axis, size in enumerate(geo.output[3 - geo.dims :], 2):
        found = found.narrow(axis, 0, size)
    _store(found, shift, y)


def spread(g: Tensor, w: Tensor, shift: Tensor | None, x: Tensor, geo: Geometry) -> None:
    """Write x (b, X, *pixels) of g (b, O, *pixels) and w (b, O, I, *taps)."""
    if geo.pointwise:
        return _multiply(_as_matrices(w, geo).mT, _pixels(g, geo), shift, x)
    _store(_convolution(_joined(g, geo), _kernels(w, geo), geo, g.shape[0], transposed=True), shift, x)


def kernels(x: Tensor, g: Tensor, w: Tensor, geo: Geometry) -> None:
    """Write w (b, O, I, *taps) of x (b, X, *pixels) and g (b, O, *pixels)."""
    if geo.pointwise:
        torch.bmm(_pixels(g, geo), _pixels(x, geo).mT, out=_as_matrices(w, geo))
        return
    missing = [n - m for n, m in zip(geo.full(), geo.output, strict=True)]
    if any(missing):
        g = torch.nn.functional.pad(g, [pad for n in reversed(missing) for pad in (0, n)])
    like = _kernels(w, geo)
    _, found, _ = _aten.convolution_backward(
        _joined(g, geo), _joined(x, geo), like, None, *_arguments(geo), False, [0] * geo.dims,
        geo.groups * x.shape[0], [False, True, False],
    )  # fmt: skip
    like.copy_(found)


def _arguments(geo: Geometry) -> list[list[int]]:
    return [[*t][-geo.dims :] for t in (geo.stride, geo.padding, geo.dilation)]


def _convolution(x: Tensor, w: Tensor, geo: Geometry, instances: int, transposed: bool) -> Tensor:
    groups = geo.groups * instances
    if not transposed:
        return _aten.convolution(x, w, None, *_arguments(geo), False, [0] * geo.dims, groups)
    like = x.new_empty(1).expand(1, groups * w.shape[1], *geo.image[-geo.dims :])
    # torch's transposed convolution allows no output padding above the stride; as a gradient it does
    full = [0 if n == m else n - m for n, m in zip(geo.full(), geo.output, strict=True)][-geo.dims :]
    x = torch.nn.functional.pad(x, [pad for n in reversed(full) for pad in (0, n)]) if any(full) else x
    out: Any = _aten.convolution_backward(
        x, like, w, None, *_arguments(geo), False, [0] * geo.dims, groups, [True, False, False]
    )
    return out[0]


def _joined(t: Tensor, geo: Geometry) -> Tensor:
    """View (b, C, *pixels) as (1, b·C, *pixels), without the first axis if the geometry does not use it."""
    return t.reshape(1, -1, *t.shape[-geo.dims :])


def _kernels(w: Tensor, geo: Geometry) -> Tensor:
    """View (b, O, I, *taps) as (b·O, I, *taps), without the first axis of taps if the geometry does not use it."""
    return w.view(-1, w.shape[2], *w.shape[-geo.dims :])


def _as_matrices(w: Tensor, geo: Geometry) -> Tensor:
    """View pointwise kernels as (b·G, O/G, I)."""
    return w.view(w.shape[0] * geo.groups, -1, w.shape[2])


def _pixels(t: Tensor, geo: Geometry) -> Tensor:
    """View (b, C, *pixels) as (b·G, C/G, pixels)."""
    return t.reshape(t.shape[0] * geo.groups, t.shape[1] // geo.groups, -1)


def _multiply(w: Tensor, pixels: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """Write the product of pointwise kernels, in the output's own memory if it is contiguous."""
    if not out.is_contiguous():
        return _store(torch.bmm(w, pixels), shift, out)
    torch.bmm(w, pixels, out=out.view(*w.shape[:2], pixels.shape[2]))
    if shift is not None:
        out += shift[..., None, None, None]


def _store(found: Tensor, shift: Tensor | None, out: Tensor) -> None:
    found = found.view(out.shape) if found.is_contiguous() else found.reshape(out.shape)
    if shift is None:
        out.copy_(found)
    else:
        torch.add(found, shift[..., None, None, None], out=out)
