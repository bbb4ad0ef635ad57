"""Generated convolutions as linear layers: the patches of the image are the points.

    patch[b,p] = the pixels of x[b] under the kernel at output pixel p, (I·taps,)
    y[b,p]     = (H·z[b] + W0) patch[b,p]                     one layer for each group of channels

It is the schedule `fold`, the cheapest where an image has few output pixels. Pointwise kernels need no copy of the
image, whose pixels are the patches; a backend may run them here in any schedule. A transposed convolution is the layer
(H·z[b] + W0)ᵀ at each pixel of its input, and adds up the patches that it gives.
"""

from __future__ import annotations

import math
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import Geometry
from ..contract import Backend, Wanted
from .conv_generate import BiasSums, shift_of
from .tiling import Tiling, blocks


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    y: Tensor,
    geo: Geometry,
    transposed: bool,
    tiling: Tiling,
    linear: Backend,
    schedule: str,
) -> None:
    """Write y."""
    O, I = weight.shape[:2]
    groups = _Group.all(weight, base_weight, geo, O, I, transposed)
    for b in _instances(x.shape[0], O, I, geo, tiling):
        for group in groups:
            head = cast(Tensor, group.head)
            group.put_results(y[b], linear.apply(group.points(x[b]), z[b], head, None, group.base, schedule=schedule))
        shift = shift_of(z[b], bias, base_bias, tiling)
        if shift is not None:
            y[b] += shift[..., None, None, None].to(y.dtype)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dh: Tensor | None,
    mask: tuple[bool, ...],
    geo: Geometry,
    transposed: bool,
    tiling: Tiling,
    linear: Backend,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Write dx and dh if given; return dz, dbias, dW0 and db0 where the mask is set."""
    O, R = (x if transposed else g).shape[1], cast(Tensor, z if weight is None else weight).shape[-1]
    I = (g if transposed else x).shape[1] // geo.groups
    groups = _Group.all(weight, base_weight, geo, O, I, transposed)
    chunks = _instances(x.shape[0], O, I, geo, tiling)
    sums = BiasSums(g, z, bias, R, mask, tiling)
    # what linear layers return is a temporary here, so that large gradients are computed some outputs at a time
    few = max(1, R if dh is not None else 1) * O * I * geo.taps <= tiling.elements
    dw0 = x.new_zeros(O, I, *geo.kernel, dtype=tiling.sum_dtype if few else x.dtype) if mask[4] else None
    total = torch.zeros_like(dh, dtype=tiling.sum_dtype) if dh is not None and few and len(chunks) > 1 else None
    wanted = Wanted(x=dx is not None, z=mask[1], weight=few and dh is not None, base_weight=few and mask[4])
    for b in chunks:
        dz = sums.add(b)
        for group in groups if any(wanted) else []:
            of = group.points(x[b]), None if z is None else z[b], group.head, None, group.base, group.results(g[b])
            dpoints, dz_of, dh_of, _, dw0_of, _ = linear.grads(*of, wanted, schedule=schedule)
            if dx is not None:
                group.put_points(dx[b], cast(Tensor, dpoints))
            if dz is not None:
                dz += cast(Tensor, dz_of)
            if dh_of is not None and total is None:
                group.of_kernel(cast(Tensor, dh)).copy_(group.swap(dh_of))
            elif dh_of is not None:
                group.of_kernel(cast(Tensor, total)).add_(group.swap(dh_of))
            if dw0 is not None and dw0_of is not None:
                group.of_kernel(dw0).add_(group.swap(dw0_of))
        sums.put(b, dz)
    if dh is not None and total is not None:
        dh.copy_(total)
    if not few:
        for group in groups:
            of_group = x, cast(Tensor, z), g, group, chunks, tiling, linear, schedule
            if dh is not None:
                _by_outputs(group.of_kernel(dh), Wanted(weight=True), *of_group)
            if dw0 is not None:
                _by_outputs(group.of_kernel(dw0), Wanted(base_weight=True), *of_group)
    dbias, db0 = sums.of_bias()
    return sums.dz, dbias, None if dw0 is None else dw0.to(x.dtype), db0


def _by_outputs(
    out: Tensor,
    wanted: Wanted,
    x: Tensor,
    z: Tensor,
    g: Tensor,
    group: _Group,
    chunks: list[slice],
    tiling: Tiling,
    linear: Backend,
    schedule: str,
) -> None:
    """Write the gradient of a head (O, K, R), or of a base (O, K), of a group, some outputs at a time."""
    for o in blocks(out.shape[0], tiling.elements // max(1, out[0].numel())):
        total: Tensor | None = None
        for b in chunks:
            points, of_g = group.points(x[b]), group.results(g[b])
            points, of_g = (points[..., o], of_g) if group.transposed else (points, of_g[..., o])
            found = linear.grads(points, z[b], None, None, None, of_g, wanted, schedule=schedule)
            part = group.swap(cast(Tensor, found[2 if wanted.weight else 4]))
            total = part if total is None else total.to(tiling.sum_dtype) + part
        out[o] = cast(Tensor, total)


def _instances(B: int, O: int, I: int, geo: Geometry, tiling: Tiling) -> list[slice]:
    """Cut the instances so that the patches and the points of a group are at most a tile."""
    per_instance = geo.pixels[1] * max(1, I * geo.taps, O // geo.groups)
    return list(blocks(B, tiling.elements // max(1, per_instance)))


class _Group:
    """One group of channels, as a linear layer: K = I·taps numbers of a patch to its outputs, or transposed."""

    def __init__(
        self, index: int, weight: Tensor | None, base: Tensor | None, geo: Geometry, O: int, I: int, transposed: bool
    ) -> None:
        each = O // geo.groups
        self.geo, self.transposed = geo, transposed
        self._outputs, self._channels = slice(index * each, (index + 1) * each), slice(index * I, (index + 1) * I)
        self.head = None if weight is None else self.swap(self.of_kernel(weight))
        self.base = None if base is None else self.swap(self.of_kernel(base))

    @classmethod
    def all(
        cls, weight: Tensor | None, base: Tensor | None, geo: Geometry, O: int, I: int, transposed: bool
    ) -> list[_Group]:
        return [cls(k, weight, base, geo, O, I, transposed) for k in range(geo.groups)]

    def of_kernel(self, t: Tensor) -> Tensor:
        """Return this group of (O, I, *taps, …) as (O/G, K, …)."""
        return t[self._outputs].flatten(1, 4)

    def swap(self, t: Tensor) -> Tensor:
        """Swap the first two axes of (O, K, …) in a transposed convolution."""
        return t.transpose(0, 1) if self.transposed else t

    def points(self, x: Tensor) -> Tensor:
        """Return what the layer reads, (b, pixels, features)."""
        return self._pixels(x) if self.transposed else self._patches(x)

    def results(self, y: Tensor) -> Tensor:
        """Return what the layer gives, (b, pixels, features), from an image or an output."""
        return self._patches(y) if self.transposed else self._pixels(y)

    def put_points(self, x: Tensor, points: Tensor) -> None:
        """Write the channels of x that `points` reads, from the sum of the points."""
        if self.transposed:
            x[:, self._outputs] = points.mT.unflatten(2, [*self.geo.output])
        else:
            x[:, self._channels] = self._sum_patches(points)

    def put_results(self, y: Tensor, results: Tensor) -> None:
        """Write the channels of y that `results` reads."""
        if self.transposed:
            y[:, self._channels] = self._sum_patches(results)
        else:
            y[:, self._outputs] = results.mT.unflatten(2, [*self.geo.output])

    def _pixels(self, t: Tensor) -> Tensor:
        return t[:, self._outputs].flatten(2).mT

    def _patches(self, t: Tensor) -> Tensor:
        if self.geo.pointwise:
            return t[:, self._channels].flatten(2).mT
        padded = F.pad(t[:, self._channels], [pad for side in reversed(self._sides()) for pad in side])
        b, I = padded.shape[:2]
        view = self._windows(padded).permute(0, 5, 6, 7, 1, 2, 3, 4)  # b, output, channel, taps
        return view.reshape(b, math.prod(self.geo.output), I * self.geo.taps)

    def _sum_patches(self, patches: Tensor) -> Tensor:
        """Return (b, I, *image): each pixel is the sum of its values in all patches."""
        geo, b = self.geo, patches.shape[0]
        if geo.pointwise:
            return patches.mT.unflatten(2, [*geo.image])
        I = patches.shape[2] // geo.taps
        sides = self._sides()
        size = [n + before + after for n, (before, after) in zip(geo.image, sides, strict=True)]
        total = patches.new_zeros(b, I, *size, dtype=torch.promote_types(patches.dtype, torch.float32))
        each = patches.view(b, *geo.output, I, *geo.kernel).permute(5, 6, 7, 0, 4, 1, 2, 3)
        windows = self._windows(total).permute(2, 3, 4, 0, 1, 5, 6, 7)
        for i, j, k in product(*map(range, geo.kernel)):  # the pixels of one tap are all different
            windows[i, j, k] += each[i, j, k]
        for axis, (n, (before, _)) in enumerate(zip(geo.image, sides, strict=True), 2):
            total = total.narrow(axis, before, n)
        return total

    def _sides(self) -> list[tuple[int, int]]:
        """Return how many pixels each axis of the image lacks before and after, to hold all windows."""
        return [(p, max(0, p - n)) for p, n in zip(self.geo.padding, self.geo.unreached(), strict=True)]

    def _windows(self, padded: Tensor) -> Tensor:
        """View a padded image as (b, I, *taps, *output)."""
        geo = self.geo
        pixel = padded.stride()[2:]
        taps = [s * d for s, d in zip(pixel, geo.dilation, strict=True)]
        steps = [s * d for s, d in zip(pixel, geo.stride, strict=True)]
        return padded.as_strided((*padded.shape[:2], *geo.kernel, *geo.output), (*padded.stride()[:2], *taps, *steps))
