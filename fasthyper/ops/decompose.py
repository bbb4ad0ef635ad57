"""Every op in ATen operations alone: what exported programs contain where fasthyper is not installed.

`decompositions` has a function for each op. They are right for symbolic sizes: no branch reads a size that may change.
They run W·x for all instances at once, so that their temporary memory grows with B. With one point for each instance
they take the order of contraction with the smallest temporary tensor. Most functions are the composites and definitions
of the ops; those below need less memory, or operations that more runtimes have.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from . import conv, mapped, reference, register
from .terms import terms_of


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return a decomposition to ATen operations for each op of fasthyper, by overload.

    ``torch.export``'s default table has them, so that ``run_decompositions()`` and ``torch.onnx.export`` need no
    argument. Merge the result into a table that you build from nothing.

    Returns:
        A new dict, whose keys are the overloads in ``torch.ops.fasthyper``.

    Example:
        >>> import torch, fasthyper
        >>> layer, x, z = fasthyper.HyperLinear(3, 6, 5), torch.randn(4, 3), torch.randn(4, 5)
        >>> program = torch.export.export(layer, (x, z))
        >>> program = program.run_decompositions(fasthyper.ops.decompositions())
        >>> any("fasthyper" in str(node.target) for node in program.graph.nodes)
        False
    """
    found = {}
    for name, (signature, composite) in register.DEFINED.items():
        own = _OWN.get(name)
        run = composite if own is None else functools.partial(_call, signature.arguments, own)
        found[getattr(torch.ops.fasthyper, name).default] = run
    return found


def _call(arguments: Any, run: Callable[[Any], Any], *values: Any, **more: Any) -> Any:
    args = arguments(*values, **more)
    out = run(args)
    return out if isinstance(out, Tensor) else tuple(args.x.new_empty(0) if t is None else t for t in out)


def _apply(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Return y (B, N, O) by products of matrices."""
    (_, N, I), (O, _, R) = x.shape, weight.shape
    if isinstance(N, int) and N == 1 and all(isinstance(size, int) for size in (I, O, R)):
        one = x.squeeze(1)
        if R <= O and O >= I:  # x ⊗ z, with I·R numbers, is the smallest
            outer = (one.unsqueeze(2) * z.unsqueeze(1)).flatten(1)
            return (outer @ weight.flatten(1).T).unsqueeze(1)
        if R < I:  # x · H, with O·R numbers
            p = torch.bmm(one.expand(O, *one.shape), weight).transpose(0, 1)
            return torch.bmm(p, z.unsqueeze(2)).transpose(1, 2)
    return torch.bmm(x, _generate(z, weight).mT)


def _generate(z: Tensor, weight: Tensor) -> Tensor:
    """Return W (B, O, …) = H·z."""
    return (z @ weight.flatten(0, -2).T).unflatten(1, weight.shape[:-1])


def _cond_grad(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(g.mT, x).flatten(1) @ weight.flatten(0, 1)


def _weight_grad(x: Tensor, z: Tensor, g: Tensor) -> Tensor:
    return (torch.bmm(g.mT, x).flatten(1).T @ z).unflatten(0, (g.shape[2], x.shape[2]))


def _generate_models(z: Tensor, weight: Tensor) -> Tensor:
    """Return W (M, B, O, I) = H·z."""
    return (z @ weight.flatten(1, 2).mT).unflatten(2, weight.shape[1:3])


def _weight_grad_models(args: Any) -> Tensor:
    dw = args.g.mT @ args.x
    return (dw.flatten(2).mT @ args.z).unflatten(1, dw.shape[2:])


def _apply_terms(args: Any) -> Tensor:
    source, cond, target, *_, targets = terms_of(args)
    y = _apply(_rows(args.x, source), _rows(args.z, cond), args.weight)
    return reference.sum_rows(y, target, targets)


def _rows(t: Tensor, index: Tensor | None) -> Tensor:
    return t if index is None else t.index_select(0, index)


def _taps(geo: Geometry) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, geo.kernel))


def _pixels(x: Tensor, geo: Geometry) -> Iterator[Tensor]:
    """Yield (B, G, I, a·b·c) for each tap: the pixel that it meets at each output pixel, zero outside of the image."""
    sizes = zip(geo.image, geo.output, geo.kernel, geo.stride, geo.padding, geo.dilation, strict=True)
    sides = [(p, torch.sym_max(0, (m - 1) * s + d * (k - 1) + 1 - n - p)) for n, m, k, s, p, d in sizes]
    x = _pad(x, [pad for side in reversed(sides) for pad in side])
    for tap in _taps(geo):
        of_tap = x
        for axis, (t, m, s, d) in enumerate(zip(tap, geo.output, geo.stride, geo.dilation, strict=True), 2):
            of_tap = of_tap.narrow(axis, t * d, (m - 1) * s + 1)
            of_tap = of_tap if s == 1 else of_tap[(slice(None),) * axis + (slice(None, None, s),)]
        yield of_tap.unflatten(1, (geo.groups, x.shape[1] // geo.groups)).flatten(3)


def _pad(x: Tensor, pads: list[int]) -> Tensor:
    return x if all(isinstance(pad, int) and pad == 0 for pad in pads) else F.pad(x, pads)


def _kernels(z: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Return (B, G, O/G, I, taps): the kernels of each instance."""
    w = _generate(z, weight).flatten(3)
    return w.unflatten(1, (geo.groups, weight.shape[0] // geo.groups))


def _conv_apply(args: Any) -> Tensor:
    geo = conv.geometry_of(args)
    w = _kernels(args.z, args.weight, geo).unbind(-1)
    y: Any = sum(w[k] @ of_tap for k, of_tap in enumerate(_pixels(args.x, geo)))
    return _in_order(y.unflatten(-1, tuple(geo.output)).flatten(1, 2), args.x)


def _conv_transpose_apply(args: Any) -> Tensor:
    """Convolve the output, with zeros between its pixels, with the reversed kernel."""
    geo = conv.geometry_of(args)
    x = args.x
    for axis, s in enumerate(geo.stride, 2):
        if s != 1:  # s - 1 zeros after each pixel
            x = F.pad(x.unsqueeze(axis + 1), (0, 0) * (4 - axis) + (0, s - 1)).flatten(axis, axis + 1)
    reach = [d * (k - 1) for d, k in zip(geo.dilation, geo.kernel, strict=True)]
    for axis, (p, r) in enumerate(zip(geo.padding, reach, strict=True), 2):
        if p > r:  # the first pixels meet no pixel of the image
            x = x.narrow(axis, p - r, x.shape[axis] - p + r)
    reversed_ = Geometry(
        stride=(1, 1, 1),
        padding=[max(0, r - p) for p, r in zip(geo.padding, reach, strict=True)],
        dilation=geo.dilation,
        groups=geo.groups,
        image=x.shape[2:],
        kernel=geo.kernel,
        output=geo.image,
    )
    w = _kernels(args.z, args.weight, geo).flip(-1).unbind(-1)
    y: Any = sum(w[k].mT @ of_tap for k, of_tap in enumerate(_pixels(x, reversed_)))
    return _in_order(y.unflatten(-1, tuple(geo.image)).flatten(1, 2), args.x)


def _kernel_grads(args: Any) -> Tensor:
    """Return dW (B, O, I, i, j, k)."""
    geo = conv.geometry_of(args)
    g = args.g.unflatten(1, (geo.groups, args.g.shape[1] // geo.groups)).flatten(3)
    dw = torch.stack([g @ of_tap.mT for of_tap in _pixels(args.x, geo)], -1)
    return dw.flatten(1, 2).unflatten(-1, tuple(geo.kernel))


def _conv_weight_grad(args: Any) -> Tensor:
    dw = _kernel_grads(args)
    return (dw.flatten(1).T @ args.z).unflatten(0, dw.shape[1:])


def _in_order(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the memory order that the op's result has."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _mapped_linear(args: mapped.MappedLinear) -> Tensor:
    return mapped.compose(*args[:7], whole=True)


_OWN: dict[str, Callable[[Any], Any]] = {
    "apply": lambda args: _apply(*args[:3]).contiguous(),
    "cond_grad": lambda args: _cond_grad(*args[:3]),
    "weight_grad": lambda args: _weight_grad(*args[:3]),
    "apply_models": lambda args: (args.x @ _generate_models(args.z, args.weight).mT).contiguous(),
    "cond_grad_models": lambda args: (args.g.mT @ args.x).flatten(2) @ args.weight.flatten(1, 2),
    "weight_grad_models": _weight_grad_models,
    "apply_terms": _apply_terms,
    "conv_apply": _conv_apply,
    "conv_transpose_apply": _conv_transpose_apply,
    "conv_cond_grad": lambda args: _kernel_grads(args).flatten(1) @ args.weight.flatten(0, -2),
    "conv_weight_grad": _conv_weight_grad,
    "mapped_linear": _mapped_linear,
    "mapped_linear_grads": lambda args: mapped.compose_grads(args, True),
}
"""The ops whose decomposition is not their composite or definition."""
