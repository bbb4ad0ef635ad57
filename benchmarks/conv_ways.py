"""The peers of generated convolutions and of low rank, in plain torch; `ways.py` has the list.

Each function of a convolution takes a workload and a device, and returns the function of (x, z, weight) that is timed.
x is `(B, I, side, side)` in torch's default order, and weight `(R, O, I / groups, kernel, kernel)`: if R is small, the
products with z are faster in this order than with R as the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Function
from .workloads import Workload


def generated(z: Tensor, weight: Tensor) -> Tensor:
    """Return the kernels of all instances, `(B, O, I / groups, kernel, kernel)`."""
    return (z @ weight.flatten(1)).unflatten(1, weight.shape[1:])


def _convolve(x: Tensor, W: Tensor, w: Workload) -> Tensor:
    """Apply the kernels W of all instances by one convolution, with the instances as groups."""
    B, padding = x.shape[0], w.kernel // 2
    y = F.conv2d(x.flatten(0, 1).unsqueeze(0), W.flatten(0, 1), None, w.stride, padding, 1, B * w.groups)
    return y.view(B, w.O, *y.shape[2:])


def instances_as_groups(w: Workload, device: str) -> Function:
    """Write out all kernels, then call one convolution with B · groups groups."""
    return lambda x, z, weight: _convolve(x, generated(z, weight), w)


def mixed(w: Workload, device: str) -> Function:
    """Convolve every image with the R kernels of the head, in one call, and mix the R results by z."""

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        H = weight.unflatten(1, (w.groups, -1)).movedim(0, 1)  # R times the outputs of each group
        y = F.conv2d(x, H.flatten(0, 2), None, w.stride, w.kernel // 2, 1, w.groups)
        y = y.view(-1, w.groups, w.R, w.O // w.groups, *y.shape[2:])
        return torch.einsum("bgrohw,br->bgohw", y, z).flatten(1, 2)

    return layer


def outer(w: Workload, device: str) -> Function:
    """Write out x ⊗ z, R copies of each image times z, then call one convolution, which sums over them."""

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        H = weight.movedim(0, 2).flatten(1, 2)
        images = x.unflatten(1, (w.groups, -1)).unsqueeze(3) * z[:, None, None, :, None, None]
        return F.conv2d(images.flatten(1, 3), H, None, w.stride, w.kernel // 2, 1, w.groups)

    return layer


def unfolded(w: Workload, device: str) -> Function:
    """Write out all kernels and the patches of the images, then call one batched product. Pixels are their patches."""

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        pointwise = w.kernel == w.stride == 1
        patches = x.flatten(2) if pointwise else F.unfold(x, w.kernel, padding=w.kernel // 2, stride=w.stride)
        W = generated(z, weight).view(x.shape[0] * w.groups, w.O // w.groups, -1)
        output = math.isqrt(w.N)
        return torch.bmm(W, patches.view(W.shape[0], W.shape[2], w.N)).view(-1, w.O, output, output)

    return layer


def one_by_one(w: Workload, device: str) -> Function:
    """Write out all kernels, then call a convolution for each instance."""

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        each = zip(x.split(1), generated(z, weight), strict=True)
        return torch.cat([F.conv2d(image, W, None, w.stride, w.kernel // 2, 1, w.groups) for image, W in each])

    return layer


class _InChunks(torch.autograd.Function):
    """Write out the kernels of some instances at a time, and again in backward: all kernels in the least memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, w: Workload, instances: int) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.w, ctx.instances = w, instances
        chunks = zip(x.split(instances), z.split(instances), strict=True)
        return torch.cat([_convolve(images, generated(cond, weight), w) for images, cond in chunks])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, weight = ctx.saved_tensors
        w, H = ctx.w, weight.flatten(1)
        dx, dz = torch.empty_like(x), torch.empty_like(z)
        dH = torch.zeros_like(H, dtype=torch.promote_types(H.dtype, torch.float32))
        for images, cond, dy, dimages, dcond in _chunks(ctx.instances, x, z, g, dx, dz):
            stride, padding, groups = [w.stride] * 2, [w.kernel // 2] * 2, len(images) * w.groups
            one, dy = images.flatten(0, 1).unsqueeze(0), dy.flatten(0, 1).unsqueeze(0)
            W = generated(cond, weight).flatten(0, 1)
            settings = [stride, padding, [1, 1], False, [0, 0], groups, [True, True, False]]
            d, dW, _ = torch.ops.aten.convolution_backward(dy, one, W, None, *settings)
            dimages.copy_(d.view_as(images))
            dW = dW.reshape(len(images), -1)
            torch.mm(dW, H.T, out=dcond)
            if dH.dtype == H.dtype:
                dH.addmm_(cond.T, dW)
            else:  # a sum in 16 bits would lose digits
                dH += cond.T @ dW
        return dx, dz, dH.to(H.dtype).view_as(weight), None, None


def _chunks(instances: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(instances) for t in tensors), strict=True)


def in_chunks(w: Workload, device: str, size: int) -> Function:
    """Write out at most `size` bytes of kernels at a time, at least those of one instance."""

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        per_instance = weight[0].numel() * weight.element_size()
        return _InChunks.apply(x, z, weight, w, max(1, size // per_instance))

    return layer


def low_rank(x: Tensor, z: Tensor, weight_a: Tensor, weight_b: Tensor) -> Tensor:
    """Write out A and B, then multiply by each in one batched product."""
    A, B = ((z @ head.flatten(0, 1).T).unflatten(1, head.shape[:2]) for head in (weight_a, weight_b))
    return torch.bmm(torch.bmm(x, A.mT), B.mT)
