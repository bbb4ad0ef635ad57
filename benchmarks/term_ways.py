"""The peers over terms, in plain torch; see `terms.py` for the sum. `ways.py` has the list.

Each function here takes a workload and a device, sorts and pads the indices, and returns the function of (x, z, weight)
that is timed. x, z and y are `(S, I)`, `(C, R)` and `(T, O)`; for pairs they are `(B, L, I)`, `(B, M, R)` and
`(B, L, M, O)`. `index_select` and `index_add` are taken since their gradients are faster than those of `x[index]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .inputs import Function
from .terms import buckets, indices, pair_sizes
from .workloads import Workload

SIMILAR = 1.5  # rows of one bucket differ in their numbers of terms by at most this factor


def _take(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _add(messages: Tensor, index: Tensor | None, rows: int) -> Tensor:
    return messages if index is None else messages.new_zeros(rows, messages.shape[1]).index_add(0, index, messages)


def each_term(function: Function, w: Workload, device: str) -> Function:
    """Apply a layer's function to every term, with x and z repeated, and sum by target."""
    source, cond, target = indices(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = function(_take(x, source).unsqueeze(1), _take(z, cond), weight).squeeze(1)
        return _add(y, target, w.T)

    return layer


class _Fold(torch.autograd.Function):
    """Write out x ⊗ z for a chunk of terms, and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, terms: int) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.terms = terms
        H = weight.flatten(1)
        folded = ((a.unsqueeze(2) * b.unsqueeze(1)).flatten(1) for a, b in _chunks(terms, x, z))
        return torch.cat([u @ H.T for u in folded])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, weight = ctx.saved_tensors
        H = weight.flatten(1)
        dx, dz = torch.empty_like(x), torch.empty_like(z)
        dH = torch.zeros_like(H, dtype=torch.promote_types(H.dtype, torch.float32))
        for a, b, c, da, db in _chunks(ctx.terms, x, z, g, dx, dz):
            M = (c @ H).unflatten(1, weight.shape[1:])
            torch.bmm(M, b.unsqueeze(2), out=da.unsqueeze(2))
            torch.bmm(a.unsqueeze(1), M, out=db.unsqueeze(1))
            folded = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
            dH = dH.addmm_(c.T, folded) if dH.dtype == H.dtype else dH + c.T @ folded
        return dx, dz, dH.to(H.dtype).view_as(weight), None


def _chunks(size: int, *tensors: Tensor) -> Any:
    return zip(*(t.split(size) for t in tensors), strict=True)


def fold_in_chunks(w: Workload, device: str, size: int) -> Function:
    """Write out at most `size` bytes of x ⊗ z at a time."""
    source, cond, target = indices(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        terms = max(1, size // (w.I * w.R * x.element_size()))
        return _add(_Fold.apply(_take(x, source), _take(z, cond), weight, terms), target, w.T)

    return layer


def aggregate(w: Workload, device: str, ratio: float = math.inf) -> Function:
    """Sum x ⊗ z of each target by a batched product of padded terms, then multiply by the head."""
    source, cond, target = indices(w, device)
    assert target is not None
    found = buckets(target, w.T, ratio)
    groups = [(b.term.shape, b.of(source), b.of(cond), b.absent) for b in found]
    rows = torch.cat([b.row for b in found])

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        head, sums = weight.flatten(1).T, []
        for shape, s, c, absent in groups:
            own = z.index_select(0, c).unflatten(0, shape)
            own = own if absent is None else own.masked_fill(absent, 0)
            sums.append(torch.bmm(x.index_select(0, s).unflatten(0, shape).mT, own).flatten(1) @ head)
        return x.new_zeros(w.T, w.O).index_copy(0, rows, torch.cat(sums))

    return layer


def aggregate_added(w: Workload, device: str) -> Function:
    """Sum x ⊗ z of each target by `index_add`, then multiply by the head."""
    source, cond, target = indices(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        products = _take(x, source).unsqueeze(2) * _take(z, cond).unsqueeze(1)
        return _add(products.flatten(1), target, w.T) @ weight.flatten(1).T

    return layer


def project_gathered(w: Workload, device: str) -> Function:
    """Multiply x by the head once per source, and gather the result for each term. The head is `(I, O, R)`."""
    source, cond, target = indices(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        projected = _take((x @ weight.flatten(1)).view(-1, w.O, w.R), source)
        return _add(torch.bmm(projected, _take(z, cond).unsqueeze(2)).squeeze(2), target, w.T)

    return layer


def project(w: Workload, device: str, ratio: float = math.inf) -> Function:
    """Multiply x by the head once per source, then by its terms' z, padded, in a batched product. The head as above."""
    source, cond, _ = indices(w, device)
    assert source is not None
    expand = _expand(w, device, source, w.S, cond, w.R, ratio)
    return lambda x, z, weight: expand(x, z, weight.flatten(1))


def generate(w: Workload, device: str, ratio: float = math.inf) -> Function:
    """Generate W once per condition, then multiply it by its terms' x, padded, in a batched product."""
    source, cond, _ = indices(w, device)
    assert cond is not None
    expand = _expand(w, device, cond, w.C, source, w.I, ratio)
    return lambda x, z, weight: expand(z, x, weight.flatten(0, 1).T)


def _expand(
    w: Workload, device: str, index: Tensor, rows: int, other: Tensor | None, features: int, ratio: float
) -> Function:
    """Return a function of the factor of the rows, that of their terms, and the head `(own features, O · features)`."""
    target, found = indices(w, device).target, buckets(index, rows, ratio)
    groups = [(b.row, b.term.shape, b.of(other), b.kept) for b in found]
    term = torch.cat([b.of(None) if b.kept is None else b.of(None)[b.kept] for b in found])
    in_order = target is None and bool((term == torch.arange(w.B, device=term.device)).all())
    to = None if in_order else term if target is None else target[term]

    def layer(own: Tensor, others: Tensor, head: Tensor) -> Tensor:
        messages = []
        for row, shape, at, kept in groups:
            M = (own.index_select(0, row) @ head).view(-1, w.O, features)
            padded = torch.bmm(others.index_select(0, at).unflatten(0, shape), M.mT).flatten(0, 1)
            messages.append(_take(padded, kept))
        return _add(torch.cat(messages), to, w.T or w.B)

    return layer


def _by_cond(w: Workload, device: str) -> tuple[list[int], Tensor, Tensor | None, Tensor | None]:
    """Return the number of terms of each condition and, with terms ordered by it, their sources and targets."""
    source, cond, target = indices(w, device)
    assert cond is not None
    counts = torch.bincount(cond, minlength=w.C)
    if bool((cond.diff() >= 0).all()):
        return counts.tolist(), counts, source, target
    order = torch.argsort(cond, stable=True)
    source, target = (order if index is None else index[order] for index in (source, target))
    return counts.tolist(), counts, source, target


def _generated(w: Workload, z: Tensor, weight: Tensor) -> Tensor:
    return (z @ weight.flatten(0, 1).T).view(-1, w.O, w.I)


def gathered(w: Workload, device: str) -> Function:
    """Generate W once per condition, and gather it for each term."""
    source, cond, target = indices(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        W = _take(_generated(w, z, weight), cond)
        return _add(torch.bmm(W, _take(x, source).unsqueeze(2)).squeeze(2), target, w.T)

    return layer


def split(w: Workload, device: str) -> Function:
    """Generate W once per condition, and multiply its terms in a loop over conditions."""
    counts, _, source, target = _by_cond(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        parts = zip(_take(x, source).split(counts), _generated(w, z, weight).unbind(), strict=True)
        return _add(torch.cat([part @ W.T for part, W in parts]), target, w.T or w.B)

    return layer


def nested(w: Workload, device: str) -> Function:
    """The same with a nested tensor."""
    _, counts, source, target = _by_cond(w, device)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        parts = torch.nested.nested_tensor_from_jagged(_take(x, source), offsets)
        return _add((parts @ _generated(w, z, weight).mT).values(), target, w.T or w.B)

    return layer


def grouped(w: Workload, device: str) -> Function:
    """The same with `torch.nn.functional.grouped_mm`."""
    _, counts, source, target = _by_cond(w, device)
    ends = counts.cumsum(0).to(torch.int32)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = torch.nn.functional.grouped_mm(_take(x, source), _generated(w, z, weight).mT, offs=ends)
        return _add(y, target, w.T or w.B)

    return layer


def pairs_einsum(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Call one einsum with three operands."""
    return torch.einsum("bmi,oir,bnr->bmno", x, weight, z)


def pairs_two_einsums(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Multiply x by the head, then by z."""
    return torch.einsum("bmor,bnr->bmno", torch.einsum("bmi,oir->bmor", x, weight), z)


def pairs_x_first(w: Workload, device: str) -> Function:
    """The same in one product and one batched product. The head is `(I, O, R)`."""
    sets, left, right = pair_sizes(w)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        projected = (x.flatten(0, 1) @ weight.flatten(1)).view(sets, left * w.O, w.R)
        return torch.bmm(projected, z.mT).view(sets, left, w.O, right).transpose(2, 3)

    return layer


def pairs_z_first(w: Workload, device: str) -> Function:
    """Multiply z by the head, then by x. The head is `(R, O, I)`."""
    sets, left, right = pair_sizes(w)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        projected = (z.flatten(0, 1) @ weight.flatten(1)).view(sets, right * w.O, w.I)
        return torch.bmm(x, projected.mT).view(sets, left, right, w.O)

    return layer


def pairs_each_output(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Compute one output after the other."""
    return torch.stack([torch.bmm(x @ H, z.mT) for H in weight], -1)
