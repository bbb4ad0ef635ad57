"""What `hyper_conv2d` and its like share: the check of their arguments, the geometry, and the call of the op."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import backends
from .geometry import AXES, image_size, output_size
from .ops import autocast, hyper_conv, shapes, sharding

Numbers = int | Sequence[int]
_OP, _TRANSPOSED = hyper_conv.ops.hyper_conv.default, hyper_conv.ops.hyper_conv_transpose.default
_NAMES = ("x", "z", "weight", "bias", "base_weight", "base_bias")


def convolve(
    dims: int,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
) -> Tensor:
    """Return `hyper_conv1d`, `2d` or `3d`; see there."""
    given = x, z, weight, bias, base_weight, base_bias
    if has_torch_function_variadic(*given):
        named = dict(zip(_NAMES, given, strict=True))
        return shapes.overridden(convolve, named, dims, *given, stride, padding, dilation, groups)
    tensors, groups = checked(dims, False, groups, *given)
    x, kernel = tensors[0], weight.shape[2:-1]
    strides, dilations = numbers("stride", stride, dims, 1), numbers("dilation", dilation, dims, 1)
    if padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"stride must be 1 with padding='same', got {stride}")
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        paddings = [n // 2 for n in total]
        if any(n % 2 for n in total):  # one more after the image than before it
            x = F.pad(x, [side for n in reversed(total) for side in (0, n % 2)])
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        paddings = [0] * dims
    else:
        paddings = numbers("padding", padding, dims, 0)
    image = x.shape[2:]
    output = [output_size(*of) for of in zip(image, kernel, strides, paddings, dilations, strict=True)]
    for n, k, m in zip(image, kernel, output, strict=True):
        if m < 1:
            raise ValueError(
                f"x must have images that the kernel fits into: x has shape {tuple(x.shape)}, weight "
                f"{tuple(weight.shape)}, padding {padding}, dilation {dilation}; {n} pixels are too few for {k} taps"
            )
    return _run(_OP, dims, (x, *tensors[1:]), strides, paddings, dilations, groups, image, kernel, output)


def convolve_transposed(
    dims: int,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Tensor:
    """Return `hyper_conv_transpose1d`, `2d` or `3d`; see there."""
    given = x, z, weight, bias, base_weight, base_bias
    if has_torch_function_variadic(*given):
        named = dict(zip(_NAMES, given, strict=True))
        geometry = stride, padding, output_padding, groups, dilation
        return shapes.overridden(convolve_transposed, named, dims, *given, *geometry)
    tensors, groups = checked(dims, True, groups, *given)
    x = tensors[0]
    output, kernel = x.shape[2:], weight.shape[2:-1]
    strides, dilations = numbers("stride", stride, dims, 1), numbers("dilation", dilation, dims, 1)
    paddings, more = numbers("padding", padding, dims, 0), numbers("output_padding", output_padding, dims, 0)
    for p, s, d in zip(more, strides, dilations, strict=True):
        if p >= max(s, d):
            raise ValueError(f"output_padding must be smaller than stride or dilation, got {output_padding}")
    image = [image_size(*of) + p for *of, p in zip(output, kernel, strides, paddings, dilations, more, strict=True)]
    if any(n < 1 for n in image):
        raise ValueError(f"x must give an image with pixels: x has shape {tuple(x.shape)}, the result {image}")
    return _run(_TRANSPOSED, dims, tensors, strides, paddings, dilations, groups, image, kernel, output)


def numbers(name: str, value: Any, dims: int, least: int) -> list[int]:
    """Return a setting for each axis, from one number or from one for each axis.

    Raises:
        TypeError: it is not made of integers.
        ValueError: it has another length, or a number is too small.
    """
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * dims
    for n in given:
        if not isinstance(n, (Integral, torch.SymInt)) or isinstance(n, bool):
            raise TypeError(f"{name} must be an integer or {dims} of them, got {value!r}")
    given = [n if isinstance(n, torch.SymInt) else int(n) for n in given]  # such as those of numpy
    if len(given) == 1:
        given *= dims
    if len(given) != dims:
        raise ValueError(f"{name} must be an integer or {dims} of them, got {value!r}")
    if any(n < least for n in given):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return given


def checked(dims: int, transposed: bool, groups: Any, *tensors: Any) -> tuple[tuple[Any, ...], int]:
    """Check the tensors of a call and its groups; return both, the tensors cast under autocast."""
    if isinstance(tensors[0], Tensor) and autocast.enabled(tensors[0].device.type):
        tensors = tuple(map(autocast.follow, tensors))
    first = AXES - dims
    table = shapes.CONV_TRANSPOSE if transposed else shapes.CONV
    unused = "dhw"[:first] + "ijk"[:first] + "abc"[:first]
    axes = {name: "".join(c for c in table[name] if c not in unused) for name in ("weight", *_NAMES[:2], *_NAMES[3:])}
    given = dict(zip(_NAMES, tensors, strict=True))
    shapes.check(axes, given, optional=_NAMES[3:])
    (groups,) = numbers("groups", groups, 1, 1)
    x, weight = given["x"], given["weight"]
    channels, per_group = x.shape[1], weight.shape[1]
    if transposed:
        if channels % groups:
            raise ValueError(f"groups must divide the channels of x, got groups={groups} and x {tuple(x.shape)}")
    elif channels != per_group * groups or weight.shape[0] % groups:
        raise ValueError(
            f"x must have groups · I = {groups * per_group} channels, and weight a multiple of {groups} outputs: "
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    outputs = per_group * groups if transposed else weight.shape[0]
    for name, t in (("bias", given["bias"]), ("base_bias", given["base_bias"])):
        if t is not None and t.shape[0] != outputs:
            raise ValueError(f"{name} must have O = {outputs} outputs, got {tuple(t.shape)}")
    if any(k < 1 for k in weight.shape[2:-1]):
        raise ValueError(f"weight must have a kernel of at least one tap along each axis, got {tuple(weight.shape)}")
    return tensors, groups


def _run(op: Any, dims: int, tensors: Sequence[Any], *geometry: Any) -> Tensor:
    """Run an op, which has three spatial axes."""
    sharding.prepare()
    missing = AXES - dims
    x, z, weight, bias, base_weight, base_bias = tensors
    defaults = (1, 0, 1, None, 1, 1, 1)
    of = [value if d is None else [d] * missing + [*value] for value, d in zip(geometry, defaults, strict=True)]
    if torch.jit.is_tracing():  # torch's tracer takes no lists of recorded sizes: the pixels become constants
        of = [[int(n) for n in values] if isinstance(values, list) else values for values in of]
    if missing:
        x, weight, base_weight = (_with_axes(t, missing) for t in (x, weight, base_weight))
    given = {"x": x, "z": z, "weight": weight, "bias": bias, "base_weight": base_weight, "base_bias": base_bias}
    try:
        y = op(*given.values(), *of, *backends.current())
    except TypeError as raised:
        shapes.explain(raised, given)
        raise
    return y.flatten(2, 2 + missing) if missing else y


def _with_axes(t: Any, count: int) -> Any:
    """Return a tensor with `count` more axes, of size 1, after its first two."""
    for _ in range(count if t is not None else 0):
        t = t.unsqueeze(2)
    return t
