"""Generated kernels of low rank, ``W[b] = base + (alpha / r)·B[b] A[b]``: two convolutions, the second pointwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.nn.low_rank import LowRank


class LowRankConv(NamedTuple):
    """The parameters of a convolution whose kernels have low rank, and what it computes from them.

    Args:
        weight_a: the head of A, ``(r, in / groups, *kernel, R)``.
        weight_b: the head of B, ``(out, r / groups, 1, …, R)``.
        bias: ``(out, R)`` or None.
        base_weight: ``(out, in / groups, *kernel)`` or None.
        base_bias: ``(out,)`` or None.
        alpha: the factor of B A, times r.
        groups: groups of channels, of A and of B.
    """

    weight_a: Tensor
    weight_b: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None
    alpha: float
    groups: int

    def forward(
        self,
        convolve: Callable[..., Tensor],
        x: Tensor,
        z: Tensor,
        stride: Any,
        padding: Any,
        dilation: Any,
    ) -> Tensor:
        """Apply A, then B, and add the base; `convolve` is `hyper_conv2d` or that of another dimension."""
        h = convolve(x, z, self.weight_a, None, stride, padding, dilation, self.groups)
        scale = self.alpha / self.weight_a.shape[0]
        h = h if scale == 1 else h * scale
        y = convolve(h, z, self.weight_b, self.bias, groups=self.groups, base_bias=self.base_bias)
        if self.base_weight is None:
            return y
        shared = getattr(F, f"conv{x.dim() - 2}d")
        return y + shared(x, self.base_weight, None, stride, padding, dilation, self.groups)

    def kernels(self, z: Tensor) -> Tensor:
        """Return the kernels (B, out, in / groups, *kernel), written out."""
        B, G = z.shape[0], self.groups
        a = F.linear(z, self.weight_a.flatten(0, -2)).view(B * G, self.weight_a.shape[0] // G, -1)
        b = F.linear(z, self.weight_b.flatten(0, -2)).view(B * G, self.weight_b.shape[0] // G, -1)
        w = torch.bmm(b, a * (self.alpha / self.weight_a.shape[0]))
        w = w.view(B, self.weight_b.shape[0], *self.weight_a.shape[1:-1])
        return w if self.base_weight is None else w + self.base_weight

    def reset(self, init: str, z_second_moment: float, nonlinearity: str) -> None:
        """Initialise as the linear layers that the convolutions are at each pixel."""
        G = self.groups
        inputs, rank, outputs = self.weight_a[0, ..., 0].numel(), self.weight_b.shape[1], self.weight_b.shape[0] // G
        taps = self.weight_a[0, 0, ..., 0].numel()
        fans = (inputs, rank * taps), (rank, outputs), (inputs, outputs * taps)
        base = None if self.base_weight is None else self.base_weight.flatten(1)
        of = self.weight_a.flatten(1, -2), self.weight_b.flatten(1, -2), self.bias, base, self.base_bias
        LowRank(*of, self.alpha).reset(init, z_second_moment, nonlinearity, fans)
