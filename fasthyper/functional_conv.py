"""`hyper_conv1d`, `2d`, `3d` and the transposed ones: convolutions with a kernel for each instance."""

from __future__ import annotations

from torch import Tensor

from .convolution import Numbers, convolve, convolve_transposed


def hyper_conv1d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a convolution over one axis with a kernel generated per instance, see :func:`~fasthyper.hyper_conv2d`.

    Args:
        x: inputs, ``(B, X, w)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(O, X / groups, k, R)``.
        bias: head of the generated bias, ``(O, R)``.
        stride: as in :func:`torch.nn.functional.conv1d`.
        padding: as there.
        dilation: as there.
        groups: as there.
        base_weight: kernel that all instances share, ``(O, X / groups, k)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O, w')``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or a setting is not made of integers.
        ValueError: a rank or a size does not match, or a setting is out of range.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.randn(4, 3, 10), torch.randn(4, 5), torch.randn(6, 3, 3, 5)
        >>> fasthyper.hyper_conv1d(x, z, weight, padding=1).shape
        torch.Size([4, 6, 10])
    """
    return convolve(1, x, z, weight, bias, base_weight, base_bias, stride, padding, dilation, groups)


def hyper_conv2d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a convolution whose kernel is generated per instance, without writing out the kernels of all instances.

    ``y[b] = conv2d(x[b], weight·z[b] + base_weight, bias·z[b] + base_bias)``

    Dynamic convolutions (CondConv: Yang et al., `arXiv 1904.04971 <https://arxiv.org/abs/1904.04971>`_) have this form,
    with R experts and z their routing weights. The kernels of some instances at a time are computed and applied within
    the workspace. An image in channels_last order gives an output in this order. The function is differentiable to any
    order, in reverse and forward mode, under `torch.func`, `torch.compile` and `torch.export`; under autocast the
    arguments are cast to the region's dtype, except for float64.

    Args:
        x: inputs, ``(B, X, h, w)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(O, X / groups, kh, kw, R)``.
        bias: head of the generated bias, ``(O, R)``.
        stride: as in :func:`torch.nn.functional.conv2d`.
        padding: as there: numbers, ``"same"`` or ``"valid"``.
        dilation: as there.
        groups: as there.
        base_weight: kernel that all instances share, ``(O, X / groups, kh, kw)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O, h', w')``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or a setting is not made of integers.
        ValueError: a rank or a size does not match, or a setting is out of range.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.randn(4, 3, 8, 8), torch.randn(4, 5), torch.randn(6, 3, 3, 3, 5)
        >>> y = fasthyper.hyper_conv2d(x, z, weight, padding=1)
        >>> W = torch.einsum("oiuvr,br->boiuv", weight, z)  # never formed as a whole by hyper_conv2d
        >>> torch.allclose(y[0], torch.nn.functional.conv2d(x[0], W[0], padding=1), atol=1e-4)
        True
    """
    return convolve(2, x, z, weight, bias, base_weight, base_bias, stride, padding, dilation, groups)


def hyper_conv3d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a convolution over three axes with a kernel generated per instance, see :func:`~fasthyper.hyper_conv2d`.

    Args:
        x: inputs, ``(B, X, d, h, w)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(O, X / groups, kd, kh, kw, R)``.
        bias: head of the generated bias, ``(O, R)``.
        stride: as in :func:`torch.nn.functional.conv3d`.
        padding: as there.
        dilation: as there.
        groups: as there.
        base_weight: kernel that all instances share, ``(O, X / groups, kd, kh, kw)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O, d', h', w')``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or a setting is not made of integers.
        ValueError: a rank or a size does not match, or a setting is out of range.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 5), torch.randn(6, 3, 1, 3, 3, 5)
        >>> fasthyper.hyper_conv3d(x, z, weight).shape
        torch.Size([2, 6, 4, 6, 6])
    """
    return convolve(3, x, z, weight, bias, base_weight, base_bias, stride, padding, dilation, groups)


def hyper_conv_transpose1d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a transposed convolution over one axis, see :func:`~fasthyper.hyper_conv_transpose2d`.

    Args:
        x: inputs, ``(B, I, w)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(I, O / groups, k, R)``.
        bias: head of the generated bias, ``(O, R)``.
        stride: as in :func:`torch.nn.functional.conv_transpose1d`.
        padding: as there.
        output_padding: as there.
        groups: as there.
        dilation: as there.
        base_weight: kernel that all instances share, ``(I, O / groups, k)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O, w')``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or a setting is not made of integers.
        ValueError: a rank or a size does not match, or a setting is out of range.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.randn(4, 6, 5), torch.randn(4, 5), torch.randn(6, 3, 2, 5)
        >>> fasthyper.hyper_conv_transpose1d(x, z, weight, stride=2).shape
        torch.Size([4, 3, 10])
    """
    of = stride, padding, output_padding, groups, dilation
    return convolve_transposed(1, x, z, weight, bias, base_weight, base_bias, *of)


def hyper_conv_transpose2d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a transposed convolution whose kernel is generated per instance, without writing out all kernels.

    ``y[b] = conv_transpose2d(x[b], weight·z[b] + base_weight, bias·z[b] + base_bias)``

    Everything else is as in :func:`~fasthyper.hyper_conv2d`.

    Args:
        x: inputs, ``(B, I, h, w)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(I, O / groups, kh, kw, R)``.
        bias: head of the generated bias, ``(O, R)``.
        stride: as in :func:`torch.nn.functional.conv_transpose2d`.
        padding: as there.
        output_padding: as there.
        groups: as there.
        dilation: as there.
        base_weight: kernel that all instances share, ``(I, O / groups, kh, kw)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O, h', w')``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or a setting is not made of integers.
        ValueError: a rank or a size does not match, or a setting is out of range.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.randn(4, 6, 5, 5), torch.randn(4, 5), torch.randn(6, 3, 2, 2, 5)
        >>> fasthyper.hyper_conv_transpose2d(x, z, weight, stride=2).shape
        torch.Size([4, 3, 10, 10])
    """
    of = stride, padding, output_padding, groups, dilation
    return convolve_transposed(2, x, z, weight, bias, base_weight, base_bias, *of)


def hyper_conv_transpose3d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Apply a transposed convolution over three axes, see :func:`~fasthyper.hyper_conv_transpose2d`.

    Args:
        x: inputs, ``(B, I, d, h, w)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head, ``(I, O / groups, kd, kh, kw, R)``.
        bias: head of the generated bias, ``(O, R)``.
        stride: as in :func:`torch.nn.functional.conv_transpose3d`.
        padding: as there.
        output_padding: as there.
        groups: as there.
        dilation: as there.
        base_weight: kernel that all instances share, ``(I, O / groups, kd, kh, kw)``.
        base_bias: bias that all instances share, ``(O,)``.

    Returns:
        ``(B, O, d', h', w')``.

    Raises:
        TypeError: an argument is not a floating point tensor, the dtypes differ, or a setting is not made of integers.
        ValueError: a rank or a size does not match, or a setting is out of range.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.randn(2, 6, 2, 5, 5), torch.randn(2, 5), torch.randn(6, 3, 1, 2, 2, 5)
        >>> fasthyper.hyper_conv_transpose3d(x, z, weight, stride=(1, 2, 2)).shape
        torch.Size([2, 3, 2, 10, 10])
    """
    of = stride, padding, output_padding, groups, dilation
    return convolve_transposed(3, x, z, weight, bias, base_weight, base_bias, *of)
