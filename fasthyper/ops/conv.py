"""The family of generated convolutions: T without one of its four factors, as in `rules.py`.

T(x, z, H, g) = Σ_b ⟨convolution of x[b] with the kernel H·z[b], g[b]⟩, with x the image and g at the output's place:

    conv_apply            y[b]  = conv(x[b], H·z[b])                   in place of g
    conv_transpose_apply  y[b]  = the transpose of it, applied to x[b]  in place of x
    conv_cond_grad        dz[b] = Σ_k dW[b,k] H[k]                     in place of z
    conv_weight_grad      dH[k] = Σ_b dW[b,k] z[b]                     in place of H

Here dW[b] is the gradient of instance b's kernel. The derivative of T in a factor is T without this factor, so all
derivatives of these ops are among them. Every op has the same geometry (`geometry.Geometry`), with three spatial axes.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Wanted
from ..geometry import Geometry
from . import autocast, reference, rules
from .register import Arguments, Gradients, Op, choice, define
from .shapes import CONV as AXES
from .shapes import CONV_TRANSPOSE, shape_of, sizes_of

ops = torch.ops.fasthyper

_GEOMETRY: dict[str, Any] = {name: int if name == "groups" else list[int] for name in Geometry._fields}
_CHOICE: dict[str, Any] = {"backend": str, "schedule": str}
_AXES_OF = {"image": "dhw", "kernel": "ijk", "output": "abc"}


def _named(name: str, fields: dict[str, Any]) -> Any:
    return namedtuple(name, fields, defaults=("", ""))


def arguments(name: str, tensors: dict[str, Any], transposed: bool = False, **more: Any) -> Any:
    """Return a named tuple class: tensors, the geometry, other arguments, and the choice of a backend.

    Its attribute `transposed` is whether x is at the place of a convolution's output.
    """
    fields = {**tensors, **_GEOMETRY, **more, **_CHOICE}
    made: Any = _named(name, fields)
    made.__annotations__, made.transposed = fields, transposed
    return made


def geometry_of(args: Any) -> Geometry:
    """Return the geometry of a call."""
    return Geometry(*(getattr(args, field) for field in Geometry._fields))


def _axes(args: Any) -> dict[str, str]:
    return dict(CONV_TRANSPOSE if args.transposed else AXES)


def validate(args: Any) -> None:
    """Check that the sizes of the tensors are those of the geometry.

    Raises:
        ValueError: a size differs, or the kernel does not reach the image from an output pixel.
    """
    geo = geometry_of(args)
    for field in _GEOMETRY:
        if field != "groups" and len(getattr(geo, field)) != 3:
            raise ValueError(f"{field} must have three numbers, got {list(getattr(geo, field))}")
    if geo.groups < 1 or min(*geo.stride, *geo.dilation) < 1 or min(geo.padding) < 0:
        raise ValueError(f"groups, stride and dilation must be positive and padding not negative, got {geo}")
    given = {name: t for name in ("x", "weight", "g") if (t := getattr(args, name, None)) is not None}
    sizes = sizes_of(_axes(args), {name: t.shape for name, t in given.items()})
    for field, letters in _AXES_OF.items():
        for letter, size in zip(letters, getattr(geo, field), strict=True):
            if sizes.get(letter, size) != size:
                raise ValueError(
                    f"{field} must be {list(shape_of(letters, sizes))}, as the tensors have, "
                    f"got {list(getattr(geo, field))}"
                )
    groups = geo.groups
    if "X" in sizes and "I" in sizes and sizes["X"] != groups * sizes["I"]:
        raise ValueError(f"the image must have groups · I = {groups} · {sizes['I']} channels, got {sizes['X']}")
    for letter in "OX":
        if letter in sizes and sizes[letter] % groups:
            raise ValueError(f"the channels must be a multiple of groups = {groups}, got {sizes[letter]}")
    full = geo.full()
    if any(m > n for m, n in zip(geo.output, full, strict=True)):
        raise ValueError(f"output must be at most {full} for this geometry, got {list(geo.output)}")


def sizes(args: Any) -> dict[str, int]:
    """Return the size of every letter of a call."""
    given = {name: t.shape for name in ("x", "z", "weight", "g") if (t := getattr(args, name, None)) is not None}
    known = sizes_of(_axes(args), given)
    for field, letters in _AXES_OF.items():
        known.update(zip(letters, getattr(args, field), strict=True))
    if "I" in known:
        known["X"] = known["I"] * args.groups
    else:
        known["I"] = known["X"] // args.groups
    return known


def new_like_image(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an image without values: in channels_last order if t is, else contiguous."""
    last = not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last_3d)
    order = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=order)


def like_x(args: Any) -> Tensor:
    """Return the image whose order dx takes: x, or g in a backward that does not read x and has not saved it."""
    return args.x if any(args.x.stride()) else args.g


def run_apply(args: Arguments, *bases: Tensor | None) -> Tensor:
    """Run a convolution, or a transposed one, on the backend of a call, with a bias and a base if given."""
    a: Any = args
    backend, schedule = choice(args)
    with autocast.off(a.x):
        module = backends.of_convolutions(backend, a.x.device, a.x.dtype)
        y = new_like_image(a.x, shape_of(_axes(a)["g"], sizes(a)))
        of: Any = {"geometry": geometry_of(a), "transposed": a.transposed, "schedule": schedule}
        bias, base_weight, base_bias = bases or (None,) * 3
        module.apply_conv(a.x, a.z, a.weight, bias, base_weight, base_bias, y, **of)
        return y


def run_grads(
    args: Arguments,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """Run the gradients of `run_apply` on the backend of a call."""
    a: Any = args
    backend, schedule = choice(args)
    known = sizes(a)
    with autocast.off(a.x):
        module = backends.of_convolutions(backend, a.x.device, a.x.dtype)
        dx = new_like_image(like_x(a), tuple(a.x.shape)) if wanted.x else None
        dh = a.x.new_empty(shape_of(AXES["weight"], known)) if wanted.weight else None
        of: Any = {"geometry": geometry_of(a), "transposed": a.transposed, "schedule": schedule}
        dz, *bases = module.grads_conv(a.x, z, weight, bias, base_weight, a.g, dx, dh, wanted, **of)
        return dx, dz, dh, *bases


ConvApply = arguments("ConvApply", {"x": Tensor, "z": Tensor, "weight": Tensor})
ConvTransposeApply = arguments("ConvTransposeApply", {"x": Tensor, "z": Tensor, "weight": Tensor}, transposed=True)
ConvCondGrad = arguments("ConvCondGrad", {"x": Tensor, "g": Tensor, "weight": Tensor})
ConvWeightGrad = arguments("ConvWeightGrad", {"x": Tensor, "z": Tensor, "g": Tensor})

# The factor of T that each argument is, and the one that the result replaces.
_FACTORS = {
    "conv_apply": ({"x": "x", "z": "z", "weight": "weight"}, "g"),
    "conv_transpose_apply": ({"x": "g", "z": "z", "weight": "weight"}, "x"),
    "conv_cond_grad": ({"x": "x", "g": "g", "weight": "weight"}, "z"),
    "conv_weight_grad": ({"x": "x", "z": "z", "g": "g"}, "weight"),
}
# As `rules.MERGE`: only instances can take a batched dimension.
_MERGE: dict[str, dict[tuple[str, ...], str]] = {
    "conv_apply": {("x",): "B", ("z",): "B", ("x", "z"): "B"},
    "conv_transpose_apply": {("x",): "B", ("z",): "B", ("x", "z"): "B"},
    "conv_cond_grad": {("x",): "B", ("g",): "B", ("x", "g"): "B"},
    "conv_weight_grad": {},
}


def derivative(factor: str, t: dict[str, Tensor], args: Any) -> Tensor:
    """Return dT/d(factor), given the other three factors, with the geometry and the choice of a call."""
    rest = *geometry_of(args), *choice(args)
    if factor == "x":
        return ops.conv_transpose_apply(t["g"], t["z"], t["weight"], *rest)
    if factor == "z":
        return ops.conv_cond_grad(t["x"], t["g"], t["weight"], *rest)
    if factor == "weight":
        return ops.conv_weight_grad(t["x"], t["z"], t["g"], *rest)
    return ops.conv_apply(t["x"], t["z"], t["weight"], *rest)


def _define(name: str, of: type, kernel: Op) -> None:
    """Define an op of the family, with its derivatives from T."""
    factors, result = _FACTORS[name]
    axes = CONV_TRANSPOSE if name == "conv_transpose_apply" else AXES
    letters = AXES[result]

    def factors_of(args: Any, **more: Any) -> dict[str, Tensor]:
        return {**{factor: getattr(args, field) for field, factor in factors.items()}, **more}

    def backward(args: Any, wanted: dict[str, bool], g: Tensor) -> Gradients:
        t = factors_of(args, **{result: g})
        if result in "gx":
            op = ops.hyper_conv_grads if result == "g" else ops.hyper_conv_transpose_grads
            mask = [*(wanted[f] for f in ("x", "z", "weight")), False, False, False]
            found = op(args.x, args.z, args.weight, None, None, g, *geometry_of(args), mask, *choice(args))
            return dict(zip(("x", "z", "weight"), found, strict=False))
        return {field: derivative(factor, t, args) for field, factor in factors.items() if wanted[field]}

    def jvp(args: Any, tangents: Gradients) -> Tensor:
        each = (derivative(result, factors_of(args, **{factors[f]: t}), args) for f, t in tangents.items())
        return functools.reduce(torch.add, each)

    def vmap(info: Any, dims: tuple[int | None, ...], *values: Any) -> Any:
        one = of(*(t if d is None else t.select(d, 0) for t, d in zip(values, dims, strict=True)))
        op, fields = getattr(ops, name), [*factors]
        return rules.merge_or_loop(op, axes, fields, letters, _MERGE[name], info.batch_size, dims, values, sizes(one))

    define(
        name,
        of,
        {result: letters},
        axes=axes,
        kernel=kernel,
        definition=lambda args: getattr(reference, name)(
            *(getattr(args, field) for field in factors), geometry_of(args)
        ),
        backward=backward,
        reads=rules.others([*factors]),
        jvp=jvp,
        vmap=vmap,
        validate=validate,
        empty=lambda args: _empty(args, letters),
    )


def _empty(args: Any, letters: str) -> Tensor:
    shape = shape_of(letters, sizes(args))
    return new_like_image(args.x, shape) if letters in (AXES["x"], AXES["g"]) else args.x.new_empty(shape)


def _cond_grad(args: Any) -> Tensor | None:
    return run_grads(args, None, args.weight, None, None, Wanted(z=True))[1]


def _weight_grad(args: Any) -> Tensor | None:
    return run_grads(args, args.z, None, None, None, Wanted(weight=True))[2]


_define("conv_apply", ConvApply, run_apply)
_define("conv_transpose_apply", ConvTransposeApply, run_apply)
_define("conv_cond_grad", ConvCondGrad, _cond_grad)
_define("conv_weight_grad", ConvWeightGrad, _weight_grad)
