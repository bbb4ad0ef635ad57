"""`HyperConv1d`, `HyperConv2d`, `HyperConv3d` and `HyperConvTranspose…`: convolutions with generated kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper import functional_conv
from fasthyper.convolution import Numbers, numbers
from fasthyper.nn.generated import GeneratedLayer
from fasthyper.nn.init import INITS
from fasthyper.nn.linear import check_sizes
from fasthyper.nn.merge import with_parameters
from fasthyper.nn.rows import spread
from fasthyper.ops import autocast

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class HyperConvolution(GeneratedLayer):
    """What the generated convolutions share. Use one of the subclasses."""

    dims: int
    transposed = False
    _function: Callable[..., Tensor]
    weight: nn.Parameter
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
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, cond_features=cond_features)
        (self.groups,) = numbers("groups", groups, 1, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be a multiple of groups, got {channels} and groups={groups}")
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
        self.weight = parameter(*kernel, cond_features)
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
        taps = math.prod(self.kernel_size)
        INITS[name](
            self.weight,
            self.bias,
            self.base_weight,
            self.base_bias,
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
        if incidence is not None:
            raise ValueError(f"{type(self).__name__} takes no incidence: its x must have one image for each z")
        if repeat is not None and isinstance(x, Tensor) and isinstance(z, Tensor):
            z = spread(z, x, None, repeat)
        bases = {"base_weight": self.base_weight, "base_bias": self.base_bias}
        if self.transposed:
            of = self.stride, self.padding, self.output_padding, self.groups, self.dilation
            return self._function(x, z, self.weight, self.bias, *of, **bases)
        padding: Numbers | str = self.padding
        if self.padding_mode != "zeros" and padding != "valid":
            x, padding = F.pad(x, self._sides(), mode=self.padding_mode), 0
        return self._function(x, z, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, **bases)

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
            ValueError: z does not have shape ``(B, R)``.
        """
        if z.ndim != 2 or z.shape[1] != self.cond_features:
            raise ValueError(f"z must be (B, R) with R = {self.cond_features}, got {tuple(z.shape)}")
        base = None if self.base_weight is None else self.base_weight.flatten()
        kernel = F.linear(z, self.weight.flatten(0, -2), base).view(z.shape[0], *self.weight.shape[:-1])
        if self.bias is not None:
            return kernel, F.linear(z, self.bias, self.base_bias)
        return kernel, None if self.base_bias is None else self.base_bias.expand(z.shape[0], -1)

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
        return f"{of}, bias={self.bias is not None}, base={self.base_weight is not None}"


class _Convolution(HyperConvolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        cond_features: int,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        base: bool = True,
        padding_mode: str = "zeros",
        init: str = "hyperfan_in",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        of = in_channels, out_channels, kernel_size, cond_features, stride, padding, dilation, groups
        self._set_up(*of, bias, base, padding_mode, init, device, dtype)


class _Transposed(HyperConvolution):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        cond_features: int,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Numbers = 1,
        base: bool = True,
        padding_mode: str = "zeros",
        init: str = "hyperfan_in",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        of = in_channels, out_channels, kernel_size, cond_features, stride, padding, dilation, groups
        self._set_up(*of, bias, base, padding_mode, init, device, dtype, output_padding)


class HyperConv1d(_Convolution):
    """Convolution over one axis with a kernel generated from z for each instance; see :class:`HyperConv2d`.

    Shape:
        - x: ``(B, in_channels, w)``.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, w')``.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperConv1d
        >>> layer = HyperConv1d(3, 6, kernel_size=5, cond_features=16, padding="same")
        >>> layer(torch.randn(4, 3, 20), torch.randn(4, 16)).shape
        torch.Size([4, 6, 20])
    """

    dims = 1
    _function = staticmethod(functional_conv.hyper_conv1d)


class HyperConv2d(_Convolution):
    """Convolution of images with a kernel generated from z for each instance, as in dynamic convolutions.

    It computes ``y[b] = conv2d(x[b], weight·z[b] + base_weight, bias·z[b] + base_bias)``. The kernels of all
    instances are never written out, see :func:`fasthyper.hyper_conv2d`. A depthwise convolution has
    ``groups=in_channels``. With ``kernel_size=1`` it is a :class:`HyperLinear` over the channels. With R experts and
    routing weights z it is CondConv (Yang et al. 2019, `arXiv 1904.04971 <https://arxiv.org/abs/1904.04971>`_), see
    :class:`CondConv2d`.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        kernel_size: one size, or one for each axis.
        cond_features: the number of features of z, R.
        stride: as in :class:`torch.nn.Conv2d`.
        padding: as there: numbers, ``"same"`` or ``"valid"``.
        dilation: as there.
        groups: as there.
        bias: if True, generate a bias too.
        base: if True, learn a kernel (and with ``bias`` a bias) that all instances share; the generated ones are
            added to it.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        init: ``"hyperfan_in"``, ``"hyperfan_out"`` or ``"bias_hyper"``, see :meth:`reset_parameters`.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shape:
        - x: ``(B, in_channels, h, w)``, in any memory format; the output has the same.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, h', w')``.

    Attributes:
        weight: the head, ``(out_channels, in_channels / groups, *kernel_size, R)``.
        bias: the head of the bias, ``(out_channels, R)``, or None.
        base_weight: the shared kernel, as that of :class:`torch.nn.Conv2d`, or None.
        base_bias: the shared bias, ``(out_channels,)``, or None.

    Raises:
        TypeError: a size or a setting is not made of integers.
        ValueError: a size or a setting is out of range, ``groups`` does not divide the channels, a name is unknown, or
            ``init`` is ``"bias_hyper"`` without a base.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperConv2d
        >>> layer = HyperConv2d(3, 8, kernel_size=3, cond_features=16, padding=1)
        >>> x, z = torch.randn(4, 3, 12, 12), torch.randn(4, 16)  # 4 images, each with its own kernel
        >>> layer(x, z).shape
        torch.Size([4, 8, 12, 12])
    """

    dims = 2
    _function = staticmethod(functional_conv.hyper_conv2d)


class HyperConv3d(_Convolution):
    """Convolution over three axes with a kernel generated from z for each instance; see :class:`HyperConv2d`.

    Shape:
        - x: ``(B, in_channels, d, h, w)``.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, d', h', w')``.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperConv3d
        >>> layer = HyperConv3d(2, 4, kernel_size=(1, 3, 3), cond_features=16)
        >>> layer(torch.randn(4, 2, 3, 8, 8), torch.randn(4, 16)).shape
        torch.Size([4, 4, 3, 6, 6])
    """

    dims = 3
    _function = staticmethod(functional_conv.hyper_conv3d)


class HyperConvTranspose1d(_Transposed):
    """Transposed convolution over one axis with a generated kernel; see :class:`HyperConvTranspose2d`.

    Shape:
        - x: ``(B, in_channels, w)``.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, w')``.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperConvTranspose1d
        >>> layer = HyperConvTranspose1d(6, 3, kernel_size=4, cond_features=16, stride=2, padding=1)
        >>> layer(torch.randn(4, 6, 10), torch.randn(4, 16)).shape
        torch.Size([4, 3, 20])
    """

    dims = 1
    _function = staticmethod(functional_conv.hyper_conv_transpose1d)


class HyperConvTranspose2d(_Transposed):
    """Transposed convolution of images with a kernel generated from z for each instance.

    It computes ``y[b] = conv_transpose2d(x[b], weight·z[b] + base_weight, bias·z[b] + base_bias)``, see
    :func:`fasthyper.hyper_conv_transpose2d`.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        kernel_size: one size, or one for each axis.
        cond_features: the number of features of z, R.
        stride: as in :class:`torch.nn.ConvTranspose2d`.
        padding: as there.
        output_padding: as there.
        groups: as there.
        bias: if True, generate a bias too.
        dilation: as there.
        base: if True, learn a kernel (and with ``bias`` a bias) that all instances share.
        padding_mode: only ``"zeros"``, as there.
        init: ``"hyperfan_in"``, ``"hyperfan_out"`` or ``"bias_hyper"``, see :meth:`reset_parameters`.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shape:
        - x: ``(B, in_channels, h, w)``, in any memory format; the output has the same.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, h', w')``.

    Attributes:
        weight: the head, ``(in_channels, out_channels / groups, *kernel_size, R)``.
        bias: the head of the bias, ``(out_channels, R)``, or None.
        base_weight: the shared kernel, as that of :class:`torch.nn.ConvTranspose2d`, or None.
        base_bias: the shared bias, ``(out_channels,)``, or None.

    Raises:
        TypeError: a size or a setting is not made of integers.
        ValueError: a size or a setting is out of range, ``groups`` does not divide the channels, a name is unknown, or
            ``init`` is ``"bias_hyper"`` without a base.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperConvTranspose2d
        >>> layer = HyperConvTranspose2d(8, 3, kernel_size=2, cond_features=16, stride=2)
        >>> layer(torch.randn(4, 8, 6, 6), torch.randn(4, 16)).shape
        torch.Size([4, 3, 12, 12])
    """

    dims = 2
    _function = staticmethod(functional_conv.hyper_conv_transpose2d)


class HyperConvTranspose3d(_Transposed):
    """Transposed convolution over three axes with a generated kernel; see :class:`HyperConvTranspose2d`.

    Shape:
        - x: ``(B, in_channels, d, h, w)``.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, d', h', w')``.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperConvTranspose3d
        >>> layer = HyperConvTranspose3d(4, 2, kernel_size=2, cond_features=16, stride=2)
        >>> layer(torch.randn(4, 4, 2, 3, 3), torch.randn(4, 16)).shape
        torch.Size([4, 2, 4, 6, 6])
    """

    dims = 3
    _function = staticmethod(functional_conv.hyper_conv_transpose3d)
