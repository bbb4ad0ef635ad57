"""Build the calls of the kernels over terms, as `calls` does for the family without indices."""

from __future__ import annotations

from torch import Tensor

from ...kernels import terms as kernels
from ..gpu import cdiv
from .calls import named, precision_of, products
from .recording import Call
from .tiles import power_of_two

_FEW_OUTER, _FEW_PRODUCTS = 8, 2
"""Up to so many terms of a piece, a kernel takes one at a time, and no matrix product."""


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of rows, points and features; t is (rows, features) or (rows, N, features)."""
    return t.stride(0), t.stride(1) if t.dim() == 3 else 0, t.stride(-1)


def _block(size: int, most: int = 64) -> int:
    return min(most, power_of_two(size))


def outer_sum_call(
    u: Tensor,
    v: Tensor,
    out: Tensor,
    ptr: Tensor | None,
    u_rows: Tensor | None,
    v_rows: Tensor | None,
    first: int,
    points: int,
    mean: float,
    arch: str,
    allow_tf32: bool,
) -> Call:
    """Return the call for out (K, Q, C), contiguous, of the pieces from `first` on.

    Args:
        u: (rows, Q), or (rows, N, Q) where each point of a term is a position.
        v: (rows, C), or (rows, N, C).
        out: A.
        ptr: positions of the pieces, int64, or None if each has one.
        u_rows: row of u of each term, int64, or None.
        v_rows: row of v of each term.
        first: the first piece.
        points: N, or 1.
        mean: mean number of positions of a piece.
        arch: the arch, for the precision.
        allow_tf32: whether float32 may be rounded to TF32.
    """
    K, Q, C = out.shape
    bq, bc = _block(Q), _block(C)
    tensors = {"u_ptr": u, "v_ptr": v, "a_ptr": out, "ptr_ptr": ptr, "u_rows": u_rows, "v_rows": v_rows}
    sizes = named("first N Q C", first, points, Q, C)
    strides = named("su_row su_point su_q sv_row sv_point sv_c", *_strides(u), *_strides(v))
    constants = {"PAIRS": points > 1, "DOT": mean > _FEW_OUTER, "BQ": bq, "BC": bc, "BT": 32}
    constants |= products(u, arch, precision_of(u.dtype, arch, allow_tf32))
    grid = (K, cdiv(Q, bq), cdiv(C, bc))
    return Call(kernels.outer_sum, grid, tensors | sizes | strides, constants, 4, 3 if u.dtype.itemsize == 2 else 2)


def row_products_call(
    m: Tensor,
    f: Tensor,
    to: Tensor,
    ptr: Tensor | None,
    f_rows: Tensor | None,
    to_rows: Tensor | None,
    first: int,
    first_to: int,
    points: int,
    width: int,
    mean: float,
    add: bool,
    arch: str,
    allow_tf32: bool,
) -> Call:
    """Return the call for to[t, a] = Σ_b m[k, a, b] f[t, b] of the pieces from `first` on, or to[t, a] += ….

    Args:
        m: (K, A, B), any strides.
        f: (rows, B), or (rows, N, B).
        to: (positions, A) from `first_to` on; (rows, A) with `to_rows`; (rows, N, A).
        ptr: positions of the pieces, or None.
        f_rows: row of f of each term, or None.
        to_rows: row of `to` of each term, or None.
        first: the first piece.
        first_to: the position of the first row of `to`.
        points: N, or 1.
        width: the largest number of positions of a piece.
        mean: their mean number.
        add: whether to add to what `to` holds.
        arch: the arch, for the precision.
        allow_tf32: whether float32 may be rounded to TF32.
    """
    K, A, B = m.shape
    # Larger blocks of float32, or of numbers that are loaded one at a time, spill.
    odd = A % 16 > 0 or B % 16 > 0 or 1 not in m.stride()
    ba, bb, bt = _block(A), _block(B, 32 if odd else 64), _block(width, 64 if m.dtype.itemsize == 2 else 32)
    dot = mean > _FEW_PRODUCTS
    tensors = {"m_ptr": m, "f_ptr": f, "to_ptr": to, "ptr_ptr": ptr, "f_rows": f_rows, "to_rows": to_rows}
    sizes = named("first first_to N A B", first, first_to, points, A, B)
    names = "sm_k sm_a sm_b sf_row sf_point sf_b st_row st_point st_a"
    strides = named(names, *m.stride(), *_strides(f), *_strides(to))
    constants = {"PAIRS": points > 1, "TO_PAIRS": to.dim() == 3, "ADD": add, "DOT": dot, "BA": ba, "BB": bb, "BT": bt}
    constants |= products(m, arch, precision_of(m.dtype, arch, allow_tf32))
    grid = (K, cdiv(width, bt) if dot else 1, cdiv(A, ba))
    return Call(kernels.row_products, grid, tensors | sizes | strides, constants, 4, 3 if m.dtype.itemsize == 2 else 2)


def sum_terms_call(
    out: Tensor,
    messages: Tensor,
    ptr: Tensor | None,
    sources: Tensor | None,
    rows: Tensor | None,
    segments: range,
    positions: range,
    base: int,
    first_row: int = 0,
) -> Call:
    """Return the call that adds messages (·, F) to rows of out (·, F), segment by segment.

    Args:
        out: the sums, float32 or the dtype of the result; any strides.
        messages: any strides.
        ptr: positions of the segments, int64, or None if each has one.
        sources: the message of each position, int64, or None.
        rows: the row of each segment, int64, or None.
        segments: the segments to add up.
        positions: only these positions are added.
        base: the number of the first message.
        first_row: the number of the first row of out.
    """
    F = out.shape[1]
    mean = len(positions) / max(1, len(segments))
    bt, bf = 1 if ptr is None else 4 if mean <= 8 else 16, min(128, power_of_two(F))
    tensors = {"out_ptr": out, "messages_ptr": messages, "ptr_ptr": ptr, "from_ptr": sources, "row_ptr": rows}
    limits = segments.start, first_row, positions.start, positions.stop
    sizes = named("first first_row low high base F", *limits, base, F)
    strides = named("so_row so_f sm_row sm_f", *out.stride(), *messages.stride())
    grid = (len(segments), cdiv(F, bf), 1)
    return Call(kernels.sum_terms, grid, tensors | sizes | strides, {"BT": bt, "BF": bf}, 4 if bf > 32 else 1, 1)
