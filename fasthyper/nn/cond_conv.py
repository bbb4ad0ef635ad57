"""`CondConv2d`: a drop-in for timm's layer, a convolution whose kernel mixes those of some experts for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.convolution import Numbers, numbers
from fasthyper.functional_conv import hyper_conv2d
from fasthyper.nn.tracing import OneNode, is_proxy, recorded
from fasthyper.ops import shapes


class CondConv2d(OneNode):
    """Conditionally parameterized convolution: image b has the kernel ``Σ_r routing_weights[b,r] · weight[r]``.

    It takes the place of ``timm.layers.CondConv2d``: the same arguments, parameters and results. timm writes out the
    kernels of all images; here :func:`fasthyper.hyper_conv2d` computes some at a time. The layer is that of Yang et
    al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019,
    `arXiv 1904.04971 <https://arxiv.org/abs/1904.04971>`_.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        kernel_size: one size, or one for each axis.
        stride: as in :class:`torch.nn.Conv2d`.
        padding: numbers; ``""`` for half of what the kernel spans, the same on both sides; ``"same"`` for outputs of
            size ceil(size / stride), as in TensorFlow; or ``"valid"`` for none.
        dilation: as in :class:`torch.nn.Conv2d`.
        groups: as in :class:`torch.nn.Conv2d`.
        bias: if True, each expert has a bias, too.
        num_experts: the number of experts, R.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shape:
        - x: ``(B, in_channels, h, w)``.
        - routing_weights: ``(B, R)``.
        - Output: ``(B, out_channels, h', w')``.

    Attributes:
        weight: ``(R, out_channels * in_channels / groups * kh * kw)``.
        bias: ``(R, out_channels)``, or None.

    Raises:
        TypeError: a size or a setting is not made of integers.
        ValueError: a setting is out of range, or ``groups`` does not divide the channels.

    Example:
        >>> import torch
        >>> from fasthyper.nn import CondConv2d
        >>> layer = CondConv2d(8, 16, kernel_size=3, num_experts=4)
        >>> routing = torch.sigmoid(torch.randn(2, 4))
        >>> layer(torch.randn(2, 8, 10, 10), routing).shape
        torch.Size([2, 16, 10, 10])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers = 3,
        stride: Numbers = 1,
        padding: Numbers | str = "",
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (self.in_channels,) = numbers("in_channels", in_channels, 1, 1)
        (self.out_channels,) = numbers("out_channels", out_channels, 1, 1)
        (self.groups,) = numbers("groups", groups, 1, 1)
        (self.num_experts,) = numbers("num_experts", num_experts, 1, 1)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide {in_channels} and {out_channels} channels, got {groups}")
        self.kernel_size = tuple(numbers("kernel_size", kernel_size, 2, 1))
        self.stride = tuple(numbers("stride", stride, 2, 1))
        self.dilation = tuple(numbers("dilation", dilation, 2, 1))
        self.padding, self.dynamic_padding = self._padding(padding)
        self.weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        count = math.prod(self.weight_shape)
        self.weight = nn.Parameter(torch.empty(num_experts, count, device=device, dtype=dtype))
        of_bias = torch.empty(num_experts, out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if of_bias is None else nn.Parameter(of_bias))
        self.reset_parameters()

    def _padding(self, padding: Numbers | str) -> tuple[tuple[int, ...], bool]:
        """Return the padding of each axis, and whether it depends on the size of the image."""
        if not isinstance(padding, str):
            return tuple(numbers("padding", padding, 2, 0)), False
        name = padding.lower()
        axes = [*zip(self.kernel_size, self.stride, self.dilation, strict=True)]
        if name == "valid":
            return (0, 0), False
        if name == "same":
            if any(s != 1 or d * (k - 1) % 2 for k, s, d in axes):
                return (0, 0), True
        elif name != "":
            raise ValueError(f"padding must be numbers, '', 'same' or 'valid', got {padding!r}")
        return tuple((s - 1 + d * (k - 1)) // 2 for k, s, d in axes), False

    def reset_parameters(self) -> None:
        """Initialise each expert as :class:`torch.nn.Conv2d` does."""
        for expert in range(self.num_experts):
            nn.init.kaiming_uniform_(self.weight[expert].view(self.weight_shape), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        """Convolve each image with the mixture of its experts.

        Args:
            x: ``(B, in_channels, h, w)``.
            routing_weights: ``(B, R)``.

        Returns:
            ``(B, out_channels, h', w')``.

        Raises:
            TypeError: the dtypes differ or are not floating point.
            ValueError: the sizes do not fit.
        """
        if is_proxy(x):
            return recorded(self, x, routing_weights)
        for name, t in (("x", x), ("routing_weights", routing_weights)):
            shapes.check_input(name, t)
        padding: Sequence[int] = self.padding
        if self.dynamic_padding:
            x = F.pad(x, self._sides(x.shape[-2:]))
        if routing_weights.dim() != 2 or routing_weights.shape != (x.shape[0], self.num_experts):
            raise ValueError(
                f"routing_weights must have shape (B, R) = ({x.shape[0]}, {self.num_experts}), "
                f"got {tuple(routing_weights.shape)}"
            )
        weight = self.weight.T.view(*self.weight_shape, self.num_experts)
        bias = None if self.bias is None else self.bias.T
        return hyper_conv2d(x, routing_weights, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _sides(self, size: Sequence[int]) -> list[int]:
        sides = []
        for n, k, s, d in reversed([*zip(size, self.kernel_size, self.stride, self.dilation, strict=True)]):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            sides += [total // 2, total - total // 2]
        return sides

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, num_experts={self.num_experts}, "
            f"bias={self.bias is not None}"
        )
