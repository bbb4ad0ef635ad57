"""What generated convolutions have in common: settings, parameters, initialisation, written-out kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper import convolution
from fasthyper.convolution import Numbers, numbers
from fasthyper.nn.generated import GeneratedLayer
from fasthyper.nn.init import INITS
from fasthyper.nn.linear import check_sizes
from fasthyper.nn.low_rank import check_rank
from fasthyper.nn.low_rank_conv import LowRankConv
from fasthyper.nn.merge import with_parameters
from fasthyper.nn.rows import spread
from fasthyper.nn.tracing import is_proxy, recorded
from fasthyper.ops import autocast

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class HyperConvolution(GeneratedLayer):
    """A generated convolution. Use one of the subclasses in `conv.py`."""

    dims: int
    transposed = False
    _function: Callable[..., Tensor]
    weight: nn.Parameter | None
    weight_a: nn.Parameter | None
    weight_b: nn.Parameter | None
    bias: nn.Parameter | None
    base_weight: nn.Parameter | None
    base_bias: nn.Parameter | None

    def _set_up(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        cond_features: int,
        stride: Numbers,
        padding: Numbers | str,
        dilation: Numbers,
        groups: int,
        bias: bool,
        base: bool,
        padding_mode: str,
        init: str,
        device: Any,
        dtype: Any,
        output_padding: Numbers = 0,
        rank: int | None = None,
        alpha: float | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, cond_features=cond_features)
        (self.groups,) = numbers("groups", groups, 1, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be a multiple of groups, got {channels} and groups={groups}")
        self.rank, self.alpha = rank, check_rank(rank, alpha)
        if rank is not None and rank % groups:
            raise ValueError(f"rank must be a multiple of groups, got {rank} and groups={groups}")
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        if self.transposed and padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros' in a transposed convolution, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.cond_features = in_channels, out_channels, cond_features
        self.kernel_size = tuple(numbers("kernel_size", kernel_size, self.dims, 1))
        self.stride = tuple(numbers("stride", stride, self.dims, 1))
        self.dilation = tuple(numbers("dilation", dilation, self.dims, 1))
        self.output_padding = tuple(numbers("output_padding", output_padding, self.dims, 0))
        self.padding = padding if isinstance(padding, str) else tuple(numbers("padding", padding, self.dims, 0))
        if isinstance(padding, str) and (self.transposed or padding not in ("same", "valid")):
            known = "numbers" if self.transposed else "numbers, 'same' or 'valid'"
            raise ValueError(f"padding must be {known}, got {padding!r}")
        if padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"stride must be 1 with padding='same', got {stride}")
        self.padding_mode, self.init = padding_mode, init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        kernel = first, second // groups, *self.kernel_size
        self.register_parameter("weight", parameter(*kernel, cond_features) if rank is None else None)
        a, b = (rank or 0, *kernel[1:]), (out_channels, (rank or 0) // groups, *(1,) * self.dims)
        self.register_parameter("weight_a", None if rank is None else parameter(*a, cond_features))
        self.register_parameter("weight_b", None if rank is None else parameter(*b, cond_features))
        self.register_parameter("bias", parameter(out_channels, cond_features) if bias else None)
        self.register_parameter("base_weight", parameter(*kernel) if base else None)
        self.register_parameter("base_bias", parameter(out_channels) if base and bias else None)
        self.reset_parameters()

    def reset_parameters(
        self, init: str | None = None, z_second_moment: float = 1.0, nonlinearity: str = "linear"
    ) -> None:
        """Initialise all parameters again, as in :meth:`HyperLinear.reset_parameters`.

        An output pixel sums over I = in_channels / groups · taps inputs, and an input pixel over O = out_channels /
        groups · taps outputs, as in torch's own convolutions.

        Args:
            init: ``"hyperfan_in"``, ``"hyperfan_out"`` or ``"bias_hyper"``; None means that of the constructor.
            z_second_moment: E[z²] of one feature of z.
            nonlinearity: the function that follows the layer, by its name in :func:`torch.nn.init.calculate_gain`.

        Raises:
            ValueError: ``init`` or ``nonlinearity`` is unknown, ``z_second_moment`` is not positive and finite, or
                ``init`` is ``"bias_hyper"`` without a base.
        """
        name = self.init if init is None else init
        if name not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {name!r}")
        if low_rank := self._low_rank():
            return low_rank.reset(name, z_second_moment, nonlinearity)
        taps = math.prod(self.kernel_size)
        INITS[name](
            *self._tensors(),
            z_second_moment=z_second_moment,
            nonlinearity=nonlinearity,
            fans=(self.in_channels // self.groups * taps, self.out_channels // self.groups * taps),
        )

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Convolve each instance of x with its own kernel.

        Args:
            x: ``(B, in_channels, *pixels)``.
            z: ``(B, R)``. If None, the layer takes the z of the running :class:`~fasthyper.nn.Hypernetwork`, of whose
                primary it is a part.

        Returns:
            ``(B, out_channels, *pixels)``.

        Raises:
            TypeError: the dtypes differ or are not floating point.
            ValueError: the sizes do not fit, z is None outside of a Hypernetwork, or its call has an incidence.
        """
        z, incidence, repeat = self._condition(z, None)
        if is_proxy(x):
            return recorded(self, x, *self._to_record(z, incidence, repeat)[:1])
        if incidence is not None:
            raise ValueError(f"{type(self).__name__} takes no incidence: its x must have one image for each z")
        if repeat is not None and isinstance(x, Tensor) and isinstance(z, Tensor):
            z = spread(z, x, None, repeat)
        weight, bias, *base = self._tensors()
        bases: Any = dict(zip(("base_weight", "base_bias"), base, strict=True))
        if self.transposed:
            of = self.stride, self.padding, self.output_padding, self.groups, self.dilation
            return self._function(x, z, weight, bias, *of, **bases)
        padding: Numbers | str = self.padding
        low_rank = self._low_rank()
        if self.padding_mode != "zeros" and padding != "valid":
            first = weight if low_rank is None else low_rank.weight_a
            convolution.checked(self.dims, False, self.groups, x, z, first, None, None, None)  # x as it was passed
            x, padding = F.pad(x, self._sides(), mode=self.padding_mode), 0
        if low_rank:
            return low_rank.forward(self._function, x, z, self.stride, padding, self.dilation)
        return self._function(x, z, weight, bias, self.stride, padding, self.dilation, self.groups, **bases)

    def _low_rank(self) -> LowRankConv | None:
        if self.weight_a is None or self.weight_b is None or self.alpha is None:
            return None
        return LowRankConv(self.weight_a, self.weight_b, *self._tensors()[1:], self.alpha, self.groups)

    def _sides(self) -> list[int]:
        """Return the pixels that padding adds before and after each axis, the last axis first, as F.pad takes them."""
        if not isinstance(self.padding, str):
            return [p for n in reversed(self.padding) for p in (n, n)]
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [p for n in reversed(total) for p in (n // 2, n - n // 2)]

    def materialize(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the kernels and biases of each instance, base included, for inspection.

        Args:
            z: ``(B, R)``.

        Returns:
            The kernels ``(B, *kernel)``, where ``kernel`` is the shape of :attr:`weight` without R, and the biases
            ``(B, out_channels)``, or None for a layer without biases.

        Raises:
            TypeError: z has another dtype than the parameters, outside autocast.
            ValueError: z does not have shape ``(B, R)``.
        """
        self._check(z)
        weight, bias, base_weight, base_bias = self._tensors()
        if low_rank := self._low_rank():
            kernel = low_rank.kernels(z)
        else:
            base = None if base_weight is None else base_weight.flatten()
            kernel = F.linear(z, weight.flatten(0, -2), base).view(z.shape[0], *weight.shape[:-1])
        if bias is not None:
            return kernel, F.linear(z, bias, base_bias)
        return kernel, None if base_bias is None else base_bias.expand(z.shape[0], -1)

    def merged(self, z: Tensor) -> nn.Module:
        """Return an ordinary convolution with the kernel of one instance, base included.

        Args:
            z: ``(R,)`` or ``(1, R)``.

        Returns:
            A layer of :mod:`torch.nn`, such as a Conv2d, with parameters of its own.

        Raises:
            TypeError: z has another dtype than the parameters.
            ValueError: z is not that of one instance.
        """
        z = self._one(z)
        with torch.no_grad(), autocast.off(z):
            kernel, bias = self.materialize(z)
        return with_parameters(self._plain(), self.training, weight=kernel[0], bias=None if bias is None else bias[0])

    def _plain(self) -> nn.Module:
        made = getattr(nn, f"Conv{'Transpose' if self.transposed else ''}{self.dims}d")
        more = {"output_padding": self.output_padding} if self.transposed else {"padding_mode": self.padding_mode}
        names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"
        return made(**{name: getattr(self, name) for name in names}, **more, device="meta")

    def extra_repr(self) -> str:
        of = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, cond_features="
        of += f"{self.cond_features}, stride={self.stride}"
        for name, default in (
            ("padding", (0,) * self.dims),
            ("dilation", (1,) * self.dims),
            ("output_padding", (0,) * self.dims),
            ("groups", 1),
            ("padding_mode", "zeros"),
        ):
            if getattr(self, name) != default:
                of += f", {name}={getattr(self, name)!r}"
        if self.rank is not None:
            of += f", rank={self.rank}, alpha={self.alpha}"
        return f"{of}, bias={self._own('bias') is not None}, base={self.base_weight is not None}"

    @property
    def _dtype(self) -> torch.dtype:
        weight = self._own("weight")
        return (self._own("weight_a") if weight is None else weight).dtype
