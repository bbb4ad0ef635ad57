"""Calls over terms by the compiled CPU kernels, or, for few conditions, by torch's batched products on sorted terms."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import planner
from ..problem import KERNEL_DTYPES, TermProblem
from ..terms import Terms
from . import aten
from .aten import bucketed, grouped, term_bases
from .aten.terms import FACTORS, INDEX

_ops = torch.ops.fasthyper_cpu


def _takes_terms(problem: TermProblem) -> bool:
    return problem.dtype in KERNEL_DTYPES and not problem.is_empty


def _sorted(terms: Terms, schedule: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the order and the pointer of the rows of a schedule."""
    by = None if schedule == "fold" else terms.sort(INDEX[FACTORS[schedule][0]])
    return (None, None) if by is None else tuple(by)  # type: ignore[return-value]


def _sum_terms(out: Tensor, rows: Tensor, source: Tensor | None, target: Tensor | None) -> None:
    if rows.stride(1) == 1:
        _ops.sum_terms(out, rows, source, target, planner.get_workspace_limit())
    else:
        term_bases.sum_terms(out, rows, source, target)


def apply_terms(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    *,
    terms: Terms,
    schedule: str,
) -> Tensor:
    """Return y (T, N, O) of x (S, N, I), z (C, R), H (O, I, R), summed over terms; see `contract.OverTerms`."""
    O, _, R = weight.shape
    bases = bias, base_weight, base_bias
    problem = TermProblem.of("apply", x, R, O, terms, backend="cpu")
    if not _takes_terms(problem):
        return aten.apply_terms(x, z, weight, *bases, terms=terms, schedule=schedule)
    plan = planner.plan(problem, schedule)
    options = plan.schedule, planner.get_workspace_limit(), plan.work_dtype != torch.float32
    tiling = aten.tiling_of(plan)
    if grouped.takes(plan, x, O, R, terms):
        y = grouped.apply(x, z, weight, terms, tiling)
    elif bucketed.takes(plan, x, O, R, terms):
        y = bucketed.apply(x, z, weight, terms, tiling, _sum_terms)
    else:
        y = _ops.apply_terms(x, z, weight, *terms[:3], terms.targets, *_sorted(terms, plan.schedule), *options)
    term_bases.Bases(terms, tiling, _sum_terms).add(y, x, z, *bases)
    return y


def grads_terms(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    terms: Terms,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, z, H, bias, W0 and b0 where the mask is set; see `contract.OverTerms`."""
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    needs = mask[0], mask[1], mask[2]
    problem = TermProblem.of("grads", x, R, g.shape[2], terms, needs, "cpu")
    if not _takes_terms(problem):
        tensors = x, z, weight, bias, base_weight, g
        return aten.grads_terms(*tensors, mask, terms=terms, schedule=schedule)
    plan = planner.plan(problem, schedule)
    dx = dz = dh = None
    tiling = aten.tiling_of(plan)
    if z is not None and any(needs) and grouped.takes(plan, x, g.shape[2], R, terms):
        dx, dz, dh = grouped.grads(x, z, weight, g, needs, terms, tiling)
    elif z is not None and any(needs) and bucketed.takes(plan, x, g.shape[2], R, terms):
        dx, dz, dh = bucketed.grads(x, z, weight, g, needs, terms, tiling, _sum_terms)
    elif any(needs):
        options = plan.schedule, planner.get_workspace_limit(), plan.work_dtype != torch.float32
        order = _sorted(terms, plan.schedule)
        found = _ops.grads_terms(x, z, weight, g, *terms[:3], terms.conds, *order, needs, *options)
        dx, dz, dh = (t if k else None for t, k in zip(found, needs, strict=True))
    bases = term_bases.Bases(terms, tiling, _sum_terms)
    bases.add_to_grads(dx, dz, g, bias, base_weight)
    return dx, dz, dh, *bases.grads(x, z, g, R, mask)
