"""The family with an index for each factor: ops over terms that share sources, conditions and targets.

T(x, z, H, g) = Σ_e Σ_{n,i,r,o} x[s(e),n,i] z[c(e),r] H[o,i,r] g[t(e),n,o] has four factors, as the family without
indices has, and the same table of rules: each op is T with one factor taken out, its result is in place of this factor.

    apply_terms        y[t,n,o]  = Σ_{e: t(e)=t} Σ_{i,r}   H[o,i,r] x[s(e),n,i] z[c(e),r]
    cond_grad_terms    dz[c,r]   = Σ_{e: c(e)=c} Σ_{n,i,o} H[o,i,r] x[s(e),n,i] g[t(e),n,o]
    weight_grad_terms  dH[o,i,r] = Σ_e           Σ_n       x[s(e),n,i] z[c(e),r] g[t(e),n,o]
    grads_terms        the requested gradients of `apply_terms`: dx, dz, dH

dT/dx is `apply_terms(g, z, Hᵀ)` with sources and targets swapped. An index that is None is the identity.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Wanted
from ..terms import Terms
from . import autocast, reference, rules
from .register import Arguments, Gradients, Op, choice, define
from .shapes import COUNTS, INDICES
from .shapes import TERMS as AXES

ops = torch.ops.fasthyper


class ApplyTerms(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    targets: int
    backend: str = ""
    schedule: str = ""


class CondGradTerms(NamedTuple):
    x: Tensor
    g: Tensor
    weight: Tensor
    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    conds: int
    backend: str = ""
    schedule: str = ""


class WeightGradTerms(NamedTuple):
    x: Tensor
    z: Tensor
    g: Tensor
    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    backend: str = ""
    schedule: str = ""


class GradsTerms(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    g: Tensor
    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    mask: list[bool]
    backend: str = ""
    schedule: str = ""


_ROWS = {"source": ("x", "sources"), "cond": ("z", "conds"), "target": ("g", "targets")}


def terms_of(args: Any) -> Terms:
    """Return the terms of a call; a size comes from the factor of the index, or else from the argument of its name."""
    sizes = []
    for factor, count in _ROWS.values():
        t = getattr(args, factor, None)
        sizes.append(getattr(args, count) if t is None else t.shape[0])
    return Terms(args.source, args.cond, args.target, *sizes)


def validate(args: Any) -> None:
    """Check the indices of a call, but not their values, which only the kernels read.

    Raises:
        TypeError: an index is not int64.
        ValueError: an index has a wrong shape or device, or an identity has not as many rows as there are terms.
    """
    terms = terms_of(args)
    first = next(((name, index) for name, index in zip(INDICES, terms[:3], strict=True) if index is not None), None)
    for name, index in zip(INDICES, terms[:3], strict=True):
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got shape {tuple(index.shape)} of {index.dtype}")
        if index.device != args.x.device:
            raise ValueError(f"{name} must be on the device of x, {args.x.device}, got {index.device}")
        if index.dim() != 1 or index.shape[0] != first[1].shape[0]:  # type: ignore[index]
            expected = "(E,)" if index is first[1] else f"(E,) with E = {first[1].shape[0]} as {first[0]}"  # type: ignore[index]
            raise ValueError(f"{name} must have shape {expected}, got {tuple(index.shape)}")
    for name, index, size in zip(INDICES, terms[:3], terms[3:], strict=True):
        if size < 0:
            raise ValueError(f"{name}s must not be negative, got {size}")
        if index is None and size != terms.num_terms:
            factor = _ROWS[name][0]
            what = f"{factor} has {size} rows" if getattr(args, factor, None) is not None else f"there are {size}"
            raise ValueError(
                f"without a {name} index, term e has {name} e: {what}, but there are {terms.num_terms} terms"
            )


def run_apply(args: Arguments, x: Tensor, z: Tensor, weight: Tensor, terms: Terms, *bases: Tensor | None) -> Tensor:
    """Run `apply_terms` on the backend of a call, with a bias and a base if given."""
    backend, schedule = choice(args)
    terms.check_ranges()
    with autocast.off(x):
        module = backends.of_terms(backend, x.device, x.dtype)
        return module.apply_terms(x, z, weight, *(bases or (None,) * 3), terms=terms, schedule=schedule)


def run_grads(
    args: Arguments,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    terms: Terms,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Run `grads_terms` on the backend of a call."""
    backend, schedule = choice(args)
    terms.check_ranges()
    with autocast.off(x):
        module = backends.of_terms(backend, x.device, x.dtype)
        return module.grads_terms(x, z, weight, bias, base_weight, g, wanted, terms=terms, schedule=schedule)


def _apply(args: ApplyTerms) -> Tensor:
    return run_apply(args, args.x, args.z, args.weight, terms_of(args))


def _cond_grad(args: CondGradTerms) -> Tensor | None:
    wanted = Wanted(z=True)
    return run_grads(args, args.x, None, args.weight, None, None, args.g, terms_of(args), wanted)[1]


def _weight_grad(args: WeightGradTerms) -> Tensor | None:
    wanted = Wanted(weight=True)
    return run_grads(args, args.x, args.z, None, None, None, args.g, terms_of(args), wanted)[2]


def derivative(factor: str, t: dict[str, Tensor], terms: Terms, *choice: str) -> Tensor:
    """Return dT/d(factor), given the other three factors."""
    source, cond, target = terms[:3]
    if factor == "x":
        return ops.apply_terms(
            t["g"], t["z"], t["weight"].transpose(0, 1), target, cond, source, terms.sources, *choice
        )
    if factor == "z":
        return ops.cond_grad_terms(t["x"], t["g"], t["weight"], source, cond, target, terms.conds, *choice)
    if factor == "weight":
        return ops.weight_grad_terms(t["x"], t["z"], t["g"], source, cond, target, *choice)
    return ops.apply_terms(t["x"], t["z"], t["weight"], source, cond, target, terms.targets, *choice)


# As `rules.MERGE`. Indices are of rows of x, z and g, so that a batched dimension can only be merged into other axes.
MERGE: dict[str, dict[tuple[str, ...], str]] = {
    "apply": {("x",): "N", ("weight",): "O"},
    "cond_grad": {("weight",): "R"},
    "weight_grad": {("x",): "I", ("z",): "R", ("g",): "O"},
}


def _define(name: str, arguments: type, kernel: Op) -> None:
    """Define an op over terms, with its derivatives from the table of rules."""
    factors, result = rules.INPUTS[name], rules.RESULT[name]

    def factors_of(args: Any, **more: Any) -> dict[str, Tensor]:
        return {**{f: getattr(args, f) for f in factors}, **more}

    def backward(args: Any, wanted: dict[str, bool], g: Tensor) -> Gradients:
        t, terms = factors_of(args, **{result: g}), terms_of(args)
        if name == "apply":
            mask = [wanted[f] for f in factors]
            return dict(
                zip(factors, ops.grads_terms(*(t[f] for f in factors), g, *terms[:3], mask, *choice(args)), strict=True)
            )
        return {f: derivative(f, t, terms, *choice(args)) for f in factors if wanted[f]}

    def jvp(args: Any, tangents: Gradients) -> Tensor:
        terms = terms_of(args)
        each = (derivative(result, factors_of(args, **{f: t}), terms, *choice(args)) for f, t in tangents.items())
        return functools.reduce(torch.add, each)

    def vmap(info: Any, dims: tuple[int | None, ...], *values: Any) -> Any:
        args = arguments(*values)
        sizes = {letter: getattr(args, count) for count, letter in COUNTS.items() if hasattr(args, count)}
        op = getattr(ops, f"{name}_terms")
        return rules.merge_or_loop(op, AXES, factors, AXES[result], MERGE[name], info.batch_size, dims, values, sizes)

    define(
        f"{name}_terms",
        arguments,
        {result: AXES[result]},
        axes=AXES,
        kernel=kernel,
        definition=lambda args: getattr(reference, f"{name}_terms")(**factors_of(args), terms=terms_of(args)),
        backward=backward,
        reads=rules.others([*factors]),
        jvp=jvp,
        vmap=vmap,
        validate=validate,
    )


_define("apply", ApplyTerms, _apply)
_define("cond_grad", CondGradTerms, _cond_grad)
_define("weight_grad", WeightGradTerms, _weight_grad)


def _grads(args: GradsTerms) -> tuple[Tensor | None, ...]:
    wanted = Wanted(*args.mask)
    return run_grads(args, args.x, args.z, args.weight, None, None, args.g, terms_of(args), wanted)[:3]


def _grads_composite(args: GradsTerms) -> tuple[Tensor | None, ...]:
    t = {"x": args.x, "z": args.z, "weight": args.weight, "g": args.g}
    terms = terms_of(args)
    return tuple(
        derivative(f, t, terms, *choice(args)) if k else None
        for f, k in zip(("x", "z", "weight"), args.mask, strict=True)
    )


define(
    "grads_terms",
    GradsTerms,
    {"dx": AXES["x"], "dz": AXES["z"], "dh": AXES["weight"]},
    axes=AXES,
    kernel=_grads,
    composite=_grads_composite,
    validate=validate,
)
