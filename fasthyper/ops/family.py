"""The family: three contractions of T(x, z, H, g), and the gradients of one of them in one call.

    apply        y[b,n,o]  = Σ_{i,r}   H[o,i,r] x[b,n,i] z[b,r]
    cond_grad    dz[b,r]   = Σ_{n,i,o} H[o,i,r] x[b,n,i] g[b,n,o]
    weight_grad  dH[o,i,r] = Σ_{b,n}   x[b,n,i] z[b,r] g[b,n,o]
    grads        the requested gradients of `apply`: dx, dz, dH

Every op ends in two strings, the backend and the schedule (see `register.choice`).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Wanted
from . import autocast, launches, reference, rules, sharding
from .register import MISSING, Arguments, Gradients, Op, choice, define
from .shapes import LINEAR, Axes, check, explain

ops = torch.ops.fasthyper


class Apply(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    backend: str = ""
    schedule: str = ""


class CondGrad(NamedTuple):
    x: Tensor
    g: Tensor
    weight: Tensor
    backend: str = ""
    schedule: str = ""


class WeightGrad(NamedTuple):
    x: Tensor
    z: Tensor
    g: Tensor
    backend: str = ""
    schedule: str = ""


class Grads(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    g: Tensor
    mask: list[bool]
    backend: str = ""
    schedule: str = ""


def run_apply(
    args: Arguments,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Run `apply` on the backend of a call."""
    backend, schedule = choice(args)
    with autocast.off(x):
        module = backends.backend(backend, x.device, x.dtype)
        return module.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)


def run_grads(
    args: Arguments,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """Run `grads` on the backend of a call."""
    backend, schedule = choice(args)
    with autocast.off(x):
        module = backends.backend(backend, x.device, x.dtype)
        return module.grads(x, z, weight, bias, base_weight, g, wanted, schedule=schedule)


def _apply(args: Apply, run: Op = run_apply) -> Any:
    return run(args, args.x, args.z, args.weight)


def _cond_grad(args: CondGrad, run: Op = run_grads) -> Any:
    return run(args, args.x, None, args.weight, None, None, args.g, Wanted(z=True))[1]


def _weight_grad(args: WeightGrad, run: Op = run_grads) -> Any:
    return run(args, args.x, args.z, None, None, None, args.g, Wanted(weight=True))[2]


def define_op(name: str, arguments: type, kernel: Op, axes: Axes, vmap: Op, suffix: str = "") -> None:
    """Define an op of the family, with its derivatives from the table of rules.

    Args:
        name: the op in the table of rules.
        arguments: as for `register.define`.
        kernel: as for `register.define`.
        axes: the table of axes.
        vmap: the rule of `rules`, which takes the name.
        suffix: what the names of the registered ops have after those of the table.
    """
    factors, result = rules.INPUTS[name], rules.RESULT[name]

    def factors_of(args: Any, **more: Any) -> dict[str, Tensor]:
        return {**{f: getattr(args, f) for f in factors}, **more}

    def backward(args: Any, wanted: dict[str, bool], g: Tensor) -> Gradients:
        t = factors_of(args, **{result: g})
        if name == "apply":
            mask = [wanted[f] for f in factors]  # one call for all gradients, because they share products
            found = getattr(ops, f"grads{suffix}")(t["x"], t["z"], t["weight"], g, mask, *choice(args))
            return dict(zip(factors, found, strict=True))
        return {f: rules.derivative(f, t, *choice(args), suffix=suffix) for f in factors if wanted[f]}

    def jvp(args: Any, tangents: Gradients) -> Tensor:
        each = (
            rules.derivative(result, factors_of(args, **{f: t}), *choice(args), suffix=suffix)
            for f, t in tangents.items()
        )
        return functools.reduce(torch.add, each)

    define(
        f"{name}{suffix}",
        arguments,
        {result: axes[result]},
        axes=axes,
        kernel=kernel,
        definition=lambda args: getattr(reference, name)(**factors_of(args)),
        backward=backward,
        reads=rules.others([*factors]),
        jvp=jvp,
        vmap=lambda info, dims, *values: vmap(name, info.batch_size, dims, values),
    )


def define_grads(arguments: type, kernel: Op, axes: Axes, suffix: str = "") -> None:
    """Define the op that returns the requested gradients of `apply`."""
    factors = ("x", "z", "weight")

    def composite(args: Any) -> tuple[Tensor | None, ...]:
        t = {f: getattr(args, f) for f in (*factors, "g")}
        return tuple(
            rules.derivative(f, t, *choice(args), suffix=suffix) if k else None
            for f, k in zip(factors, args.mask, strict=True)
        )

    results = {"dx": axes["x"], "dz": axes["z"], "dh": axes["weight"]}
    define(f"grads{suffix}", arguments, results, axes=axes, kernel=kernel, composite=composite)


define_op("apply", Apply, _apply, LINEAR, rules.vmap)
define_op("cond_grad", CondGrad, _cond_grad, LINEAR, rules.vmap)
define_op("weight_grad", WeightGrad, _weight_grad, LINEAR, rules.vmap)


def _grads(args: Grads, run: Op = run_grads) -> Any:
    return run(args, args.x, args.z, args.weight, None, None, args.g, Wanted(*args.mask))[:3]


define_grads(Grads, _grads, LINEAR)
launches.show("apply", functools.partial(_apply, run=launches.trace_apply))
for _name, _run in (("cond_grad", _cond_grad), ("weight_grad", _weight_grad), ("grads", _grads)):
    launches.show(_name, functools.partial(_run, run=launches.trace_grads))
if MISSING:
    warnings.warn(
        f"fasthyper runs in plain torch operations, since torch {torch.__version__} has no {MISSING}. Results are "
        "right, but each call writes out the generated weights, which takes memory and time.",
        RuntimeWarning,
        stacklevel=2,
    )


def _called(op: Any, *args: Any, **tensors: Tensor) -> Any:
    """Call an op; if it raises, check its arguments, so that the error names one."""
    sharding.prepare()
    try:
        return op(*tensors.values(), *args, *backends.current())
    except Exception as raised:
        if not torch.compiler.is_compiling():
            check(LINEAR, tensors)
            explain(raised, tensors)
        raise


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
    return _called(ops.apply, x=x, z=z, weight=weight)


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
    return _called(ops.cond_grad, x=x, g=g, weight=weight)


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
    return _called(ops.weight_grad, x=x, z=z, g=g)


def grads(
    x: Tensor, z: Tensor, weight: Tensor, g: Tensor, mask: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `apply` in one call, which computes shared products once.

    Args:
        x: inputs, ``(B, N, I)``.
        z: features of the hypernetwork, ``(B, R)``.
        weight: the head H, ``(O, I, R)``.
        g: gradient of the output, ``(B, N, O)``.
        mask: which of the three are requested.

    Returns:
        dx ``(B, N, I)``, dz ``(B, R)``, dH ``(O, I, R)``; an empty tensor ``(0,)`` for each that is not requested.

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
    return _called(ops.grads, list(mask), x=x, z=z, weight=weight, g=g)
