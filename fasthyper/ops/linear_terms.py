"""The op of `fasthyper.hyper_linear` with an incidence: `apply_terms` with a base and a generated bias added in place.

    y[t] = Σ_{e: t(e)=t} (H·z[c(e)] + W0) x[s(e)] + bias·z[c(e)] + b0

As in `linear.py`, the composites use the op family and torch's own operations, and run in second order, in forward mode
and under every transform.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Wanted
from ..terms import Terms
from . import autocast
from .reference import sum_rows
from .register import Gradients, choice, define
from .rules import READS
from .shapes import TERMS as AXES
from .terms import run_apply, run_grads, terms_of, validate

ops = torch.ops.fasthyper


class HyperLinearTerms(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None
    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    targets: int
    backend: str = ""
    schedule: str = ""


class HyperLinearTermsGrads(NamedTuple):
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    g: Tensor
    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    mask: list[bool]
    backend: str = ""
    schedule: str = ""


def _kernel(args: HyperLinearTerms) -> Tensor:
    bases = args.bias, args.base_weight, args.base_bias
    return run_apply(args, args.x, args.z, args.weight, terms_of(args), *bases)


def _move(rows: Tensor, index: Tensor | None, to: Tensor | None, size: int) -> Tensor:
    """Return (size, …): for each value of `to`, the sum of the rows that its terms have in `index`."""
    return sum_rows(rows if index is None else rows.index_select(0, index), to, size)


def _degrees(t: Tensor, terms: Terms) -> Tensor:
    """Return the number of terms of each target, (T,)."""
    return sum_rows(t.new_ones(terms.num_terms), terms.target, terms.targets)


def _composite(args: HyperLinearTerms) -> Tensor:
    terms = terms_of(args)
    y = ops.apply_terms(args.x, args.z, args.weight, *terms[:3], terms.targets, *choice(args))
    with autocast.off(args.x):
        if args.base_weight is not None:
            y = y + _move(args.x @ args.base_weight.T, terms.source, terms.target, terms.targets)
        if args.bias is not None:
            y = y + _move(args.z @ args.bias.T, terms.cond, terms.target, terms.targets).unsqueeze(1)
        if args.base_bias is not None:
            y = y + (_degrees(y, terms).unsqueeze(1) * args.base_bias).unsqueeze(1)
        return y


def _backward(args: HyperLinearTerms, wanted: dict[str, bool], g: Tensor) -> Gradients:
    fields = Wanted._fields
    mask = [wanted[name] for name in fields]
    factors = args.x, args.z, args.weight, args.bias, args.base_weight, g
    out = ops.hyper_linear_terms_grads(*factors, args.source, args.cond, args.target, mask, *choice(args))
    return dict(zip(fields, out, strict=True))


define(
    "hyper_linear_terms",
    HyperLinearTerms,
    {"y": AXES["g"]},
    axes=AXES,
    kernel=_kernel,
    composite=_composite,
    backward=_backward,
    reads=READS,
    validate=validate,
)


def _grads_kernel(args: HyperLinearTermsGrads) -> tuple[Tensor | None, ...]:
    wanted = Wanted(*args.mask)
    return run_grads(args, args.x, args.z, args.weight, args.bias, args.base_weight, args.g, terms_of(args), wanted)


def _grads_composite(args: HyperLinearTermsGrads) -> tuple[Tensor | None, ...]:
    terms, wanted = terms_of(args), Wanted(*args.mask)
    source, cond, target = terms[:3]
    mask = [wanted.x, wanted.z, wanted.weight]
    dx, dz, dh = ops.grads_terms(args.x, args.z, args.weight, args.g, source, cond, target, mask, *choice(args))
    with autocast.off(args.x):
        per_target = args.g.sum(1) if wanted.z or wanted.bias or wanted.base_bias else args.g
        dbias = dbase_weight = dbase_bias = None
        if wanted.x and args.base_weight is not None:
            dx = dx + _move(args.g @ args.base_weight, target, source, terms.sources)
        if wanted.z and args.bias is not None:
            dz = dz + _move(per_target @ args.bias, target, cond, terms.conds)
        if wanted.bias:
            dbias = per_target.T @ _move(args.z, cond, target, terms.targets)
        if wanted.base_weight:
            dbase_weight = args.g.flatten(0, 1).T @ _move(args.x, source, target, terms.targets).flatten(0, 1)
        if wanted.base_bias:
            dbase_bias = _degrees(args.g, terms) @ per_target
    return dx, dz, dh, dbias, dbase_weight, dbase_bias


define(
    "hyper_linear_terms_grads",
    HyperLinearTermsGrads,
    {f"d{name}": AXES[name] for name in Wanted._fields},
    axes=AXES,
    kernel=_grads_kernel,
    composite=_grads_composite,
    validate=validate,
)
