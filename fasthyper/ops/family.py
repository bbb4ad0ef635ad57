"""Registration of the family: schemas, fake kernels, derivatives, vmap, and the kernels of the backends.

    apply        y[b,n,o]  = Σ_{i,r}   H[o,i,r] x[b,n,i] z[b,r]
    cond_grad    dz[b,r]   = Σ_{n,i,o} H[o,i,r] x[b,n,i] g[b,n,o]
    weight_grad  dH[o,i,r] = Σ_{b,n}   x[b,n,i] z[b,r] g[b,n,o]
    grads        dx, dz, dH of `apply`, as asked for

Every op ends in two strings, the backend and the schedule: resolved in forward, so that a backward in another
thread does as its forward did. Empty means not resolved yet.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import torch
from torch import Tensor

from .. import backends
from ..problem import AUTO
from . import autocast, reference, rules
from .checks import check_factors
from .dispatch import LIBRARY, MISSING, below, recording, register, rule, transformed

HOW = 'str backend="", str schedule=""'
TAGS = (torch.Tag.pt2_compliant_tag,)
ops = torch.ops.fasthyper


def resolved(how: tuple[str, ...]) -> backends.Choice:
    """Return the choice that travels with the call, or the one in force."""
    return backends.checked(*(name or AUTO for name in how)) if any(how) else backends.current()


def check_mask(mask: Any, length: int) -> None:
    """Check that a mask has one entry for each gradient: torch leaves that to us."""
    if len(mask) != length:
        raise ValueError(f"mask must have {length} entries, one for each gradient, got {list(mask)}")


def run_apply(how: tuple[str, ...], *args: Tensor | None) -> Tensor:
    """Run a backend's `apply`, with or without bias and base."""
    choice = resolved(how)
    x = cast(Tensor, args[0])
    with autocast.off(x):
        return backends.backend(choice.backend, x.device).apply(*args, schedule=choice.schedule)


def run_grads(how: tuple[str, ...], *args: Any) -> tuple[Tensor | None, ...]:
    """Run a backend's `grads`: x, z, H, bias, W0, g, and a mask of six."""
    choice = resolved(how)
    with autocast.off(args[0]):
        return backends.backend(choice.backend, args[0].device).grads(*args, schedule=choice.schedule)


def _kernel_apply(x: Tensor, z: Tensor, weight: Tensor, *how: str) -> Tensor:
    return run_apply(how, x, z, weight)


def _kernel_cond_grad(x: Tensor, g: Tensor, weight: Tensor, *how: str) -> Tensor:
    mask = (False, True, False, False, False, False)
    return cast(Tensor, run_grads(how, x, None, weight, None, None, g, mask)[1])


def _kernel_weight_grad(x: Tensor, z: Tensor, g: Tensor, *how: str) -> Tensor:
    mask = (False, False, True, False, False, False)
    return cast(Tensor, run_grads(how, x, z, None, None, None, g, mask)[2])


_KERNELS = {"apply": _kernel_apply, "cond_grad": _kernel_cond_grad, "weight_grad": _kernel_weight_grad}


def _define(name: str) -> None:
    factors, result = rules.INPUTS[name], rules.RESULT[name]
    arguments = ", ".join(f"Tensor {'weight' if f == 'w' else f}" for f in factors)
    LIBRARY.define(f"{name}({arguments}, {HOW}) -> Tensor", tags=TAGS)
    op = getattr(ops, name).default

    def written_out(a: Tensor, b: Tensor, c: Tensor, *how: str) -> Tensor:
        check_factors(**dict(zip(factors, (a, b, c), strict=True)))
        return getattr(reference, name)(a, b, c)

    if MISSING:
        LIBRARY.impl(name, written_out, "CompositeImplicitAutograd")
        return

    def kernel(a: Tensor, b: Tensor, c: Tensor, *how: str) -> Tensor:
        check_factors(**dict(zip(factors, (a, b, c), strict=True)))
        return _KERNELS[name](a, b, c, *how)

    def fake(a: Tensor, b: Tensor, c: Tensor, *how: str) -> Tensor:
        check_factors(**dict(zip(factors, (a, b, c), strict=True)))
        return a.new_empty(rules.result_shape(name, (a.shape, b.shape, c.shape)))

    def named(args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(factors, args, strict=False))

    def backward(args, need, g):
        t, how = {**named(args), result: g}, args[3:]
        if name == "apply":
            out = ops.grads(t["x"], t["z"], t["w"], t["g"], need[:3], *how)
        else:
            out = [rules.partial(f, t, how) if k else None for f, k in zip(factors, need, strict=False)]
        return *(v if k else None for v, k in zip(out, need, strict=False)), *[None] * len(how)

    def jvp(args, tangents):
        terms = [
            op(*{**named(args), f: dot}.values(), *args[3:])
            for f, dot in zip(factors, tangents, strict=False)
            if dot is not None
        ]
        return functools.reduce(torch.add, terms)

    recorded = rule(op, backward, jvp)

    def autograd(keys, a, b, c, *how):
        return recorded(keys, a, b, c, *resolved(how))

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fasthyper::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(
        f"fasthyper::{name}",
        lambda info, dims, *args: rules.vmap(name, info.batch_size, dims, args),
        lib=LIBRARY,
    )


def _members(x: Tensor, z: Tensor, weight: Tensor, g: Tensor, mask: list[bool], *how: str) -> tuple[Tensor, ...]:
    """`grads` written in the family: what every transform sees of it."""
    check_mask(mask, 3)
    t = {"x": x, "z": z, "w": weight, "g": g}
    return tuple(rules.partial(f, t, how) if k else x.new_empty(0) for f, k in zip("xzw", mask, strict=True))


def _define_grads() -> None:
    LIBRARY.define(
        "grads(Tensor x, Tensor z, Tensor weight, Tensor g, bool[3] mask, " + HOW + ") -> (Tensor, Tensor, Tensor)",
        tags=TAGS,
    )
    if MISSING:
        LIBRARY.impl("grads", _members, "CompositeImplicitAutograd")
        return

    def kernel(x, z, weight, g, mask, *how):
        check_factors(x=x, z=z, w=weight, g=g)
        check_mask(mask, 3)
        out = run_grads(how, x, z, weight, None, None, g, (*mask, False, False, False))
        return tuple(x.new_empty(0) if t is None else t for t in out[:3])

    def fake(x, z, weight, g, mask, *how):
        check_factors(x=x, z=z, w=weight, g=g)
        check_mask(mask, 3)
        return tuple(x.new_empty(t.shape if k else 0) for t, k in zip((x, z, weight), mask, strict=True))

    def autograd(keys, x, z, weight, g, mask, *how):
        how = tuple(resolved(how))
        if transformed() or recording(x, z, weight, g):
            return _members(x, z, weight, g, mask, *how)
        return below(ops.grads.default, keys, (x, z, weight, g, mask, *how))

    register("grads", kernel, fake, autograd, _members)


for _name in rules.INPUTS:
    _define(_name)
_define_grads()
if MISSING:
    warnings.warn(
        f"fasthyper runs by its reference, which writes out the generated weights: torch {torch.__version__} has "
        f"no {MISSING}. Results are right; memory and time are those of the usual way.",
        RuntimeWarning,
        stacklevel=2,
    )


def apply(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Apply generated weights: y[b,n,o] = Σ_{i,r} H[o,i,r] x[b,n,i] z[b,r].

    Args:
        x: inputs, ``(B, N, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head H, ``(O, I, R)``.

    Returns:
        ``(B, N, O)``, contiguous.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: if ranks or sizes do not match, or the devices differ.

    Example:
        >>> import torch, fasthyper
        >>> y = fasthyper.ops.apply(torch.ones(4, 2, 3), torch.ones(4, 5), torch.ones(6, 3, 5))
        >>> y.shape, y[0, 0, 0].item()
        (torch.Size([4, 2, 6]), 15.0)
    """
    return ops.apply(x, z, weight, *backends.current())


def cond_grad(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Contract everything but z: dz[b,r] = Σ_{n,i,o} H[o,i,r] x[b,n,i] g[b,n,o].

    Args:
        x: inputs, ``(B, N, I)``.
        g: gradient of the output, ``(B, N, O)``.
        weight: the head H, ``(O, I, R)``.

    Returns:
        ``(B, R)``, contiguous.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: if ranks or sizes do not match, or the devices differ.

    Example:
        >>> import torch, fasthyper
        >>> fasthyper.ops.cond_grad(torch.ones(4, 2, 3), torch.ones(4, 2, 6), torch.ones(6, 3, 5))[0, 0].item()
        36.0
    """
    return ops.cond_grad(x, g, weight, *backends.current())


def weight_grad(x: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Contract everything but H: dH[o,i,r] = Σ_{b,n} x[b,n,i] z[b,r] g[b,n,o].

    Args:
        x: inputs, ``(B, N, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        g: gradient of the output, ``(B, N, O)``.

    Returns:
        ``(O, I, R)``, contiguous.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: if ranks or sizes do not match, or the devices differ.

    Example:
        >>> import torch, fasthyper
        >>> fasthyper.ops.weight_grad(torch.ones(4, 2, 3), torch.ones(4, 5), torch.ones(4, 2, 6))[0, 0, 0].item()
        8.0
    """
    return ops.weight_grad(x, z, g, *backends.current())


def grads(
    x: Tensor, z: Tensor, weight: Tensor, g: Tensor, mask: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `apply` in one call, sharing what they have in common.

    Args:
        x: inputs, ``(B, N, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head H, ``(O, I, R)``.
        g: gradient of the output, ``(B, N, O)``.
        mask: which of the three are asked for.

    Returns:
        dx ``(B, N, I)``, dz ``(B, R)``, dH ``(O, I, R)``; an empty tensor ``(0,)`` for each not asked for.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: if ranks or sizes do not match, or the devices differ.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.ones(4, 2, 3), torch.ones(4, 5), torch.ones(6, 3, 5)
        >>> dx, dz, dh = fasthyper.ops.grads(x, z, weight, torch.ones(4, 2, 6), (True, False, True))
        >>> dx.shape, dz.shape, dh.shape
        (torch.Size([4, 2, 3]), torch.Size([0]), torch.Size([6, 3, 5]))
    """
    return ops.grads(x, z, weight, g, list(mask), *backends.current())
