"""Geometries, tensors and definitions of generated convolutions, for the tests of their ops."""

from __future__ import annotations

import torch

from fasthyper.backends import BACKENDS
from fasthyper.geometry import Geometry, output_size
from fasthyper.ops import reference

ops = torch.ops.fasthyper
RUNNABLE = [name for name in ("aten", "cpu") if BACKENDS[name].unavailable() is None]
ALL = (True,) * 6


def geometry(image, kernel, stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1):
    of = zip(image, kernel, stride, padding, dilation, strict=True)
    return Geometry(*map(list, (stride, padding, dilation)), groups, [*image], [*kernel], [output_size(*o) for o in of])


GEOMETRIES = {
    "odd": geometry((1, 7, 6), (1, 3, 2), (1, 2, 1), (0, 1, 1), (1, 1, 2)),
    "groups": geometry((1, 7, 6), (1, 3, 3), padding=(0, 1, 1), groups=2),
    "depthwise": geometry((1, 9, 8), (1, 5, 5), (1, 2, 2), (0, 2, 2), groups=6),
    "three axes": geometry((4, 5, 6), (2, 3, 1), (2, 1, 1), (1, 2, 0), (1, 2, 1)),
    "pointwise": geometry((1, 5, 4), (1, 1, 1)),
    "pointwise in groups": geometry((1, 5, 4), (1, 1, 1), groups=3),
    "pointwise, stride 2": geometry((1, 5, 4), (1, 1, 1), (1, 2, 2)),
    "one pixel": geometry((1, 5, 4), (1, 5, 4)),
    "much padding": geometry((1, 2, 3), (1, 3, 3), padding=(0, 4, 4)),
    "pointwise with unreached pixels": geometry((1, 5, 4), (1, 1, 1), dilation=(1, 2, 2))._replace(output=[1, 4, 3]),
    "one axis": geometry((1, 1, 11), (1, 1, 4), (1, 1, 3)),
}


def tensors(geo, transposed, dtype=torch.float64, B=5, I=2, O=6, R=4):
    """Return x, z, H, bias, W0, b0, and a gradient of y."""
    X = I * geo.groups
    x, y = (torch.randn(B, X, *geo.image), torch.randn(B, O, *geo.output))
    x, y = (y, x) if transposed else (x, y)
    outputs = y.shape[1]
    kernel = O, I, *geo.kernel
    of = x, torch.randn(B, R), torch.randn(*kernel, R), torch.randn(outputs, R), torch.randn(kernel)
    return [t.to(dtype) for t in (*of, torch.randn(outputs), y)]


def truth(transposed, x, z, weight, bias, base_weight, base_bias, geo):
    apply = reference.conv_transpose_apply if transposed else reference.conv_apply
    y = apply(x, z, weight, geo) + apply(x, torch.ones_like(z[:, :1]), base_weight.unsqueeze(-1), geo)
    return y + (z @ bias.T + base_bias)[..., None, None, None]


def op(transposed):
    return ops.hyper_conv_transpose if transposed else ops.hyper_conv


def with_gradients(f, args, g):
    args = [t.detach().requires_grad_() for t in args]
    y = f(*args)
    return [y, *torch.autograd.grad(y, args, g)]


def error(found, exact):
    return [(a.double() - b).norm().item() for a, b in zip(found, exact, strict=True)]
