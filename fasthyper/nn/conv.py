"""`HyperConv1d`, `HyperConv2d`, `HyperConv3d` and `HyperConvTranspose…`: convolutions with generated kernels."""

from __future__ import annotations

import torch

from fasthyper import functional_conv
from fasthyper.convolution import Numbers
from fasthyper.nn.hyper_convolution import HyperConvolution


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
        *,
        rank: int | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        of = in_channels, out_channels, kernel_size, cond_features, stride, padding, dilation, groups
        self._set_up(*of, bias, base, padding_mode, init, device, dtype, rank=rank, alpha=alpha)


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
        rank: if given, the generated kernels have this rank r, as in LoRA: A[b], a generated kernel from in_channels to
            r channels, and then B[b], a generated pointwise kernel to out_channels. Their product is never formed.
        alpha: the factor of generated kernels of low rank, times r; None means r, so that the factor is 1.

    Shape:
        - x: ``(B, in_channels, h, w)``, in any memory format; the output has the same.
        - z: ``(B, R)``.
        - Output: ``(B, out_channels, h', w')``.

    Attributes:
        weight: the head, ``(out_channels, in_channels / groups, *kernel_size, R)``; None with a rank.
        weight_a: with a rank, the head of A, ``(r, in_channels / groups, *kernel_size, R)``.
        weight_b: with a rank, the head of B, ``(out_channels, r / groups, 1, 1, R)``.
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
