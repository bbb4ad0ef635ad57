"""How the kernels read a tensor: by a descriptor of a matrix, by wide loads, or number by number.

A descriptor (TMA on sm_90 and later) copies boxes of a matrix whose last axis is contiguous and whose rows begin at
multiples of 16 bytes. Each box must begin at such an address, too, or the GPU raises an error. A layout names the axes
of the tensor that make the rows and the columns of the matrix: in ``"p_ck"`` of H (C, K, P), p numbers the rows, and
(c, k), one axis with k the faster, the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gpu import INTERPRETER
from .recording import is_traced

INT32 = 1 << 31
_DESCRIPTORS = ("sm_90", "sm_100", INTERPRETER)


class Described(NamedTuple):
    """A matrix and the boxes of its tensor descriptor, in the place of a descriptor that needs an address."""

    matrix: Tensor
    box: list[int]


def descriptor(
    t: Tensor, axes: str, layout: str, box: Mapping[str, int], arch: str
) -> TensorDescriptor | Described | None:
    """Return a descriptor of a tensor as a matrix, read by boxes; None where it cannot have one.

    Args:
        t: the tensor.
        axes: a letter for each of its axes.
        layout: the letters of the rows, and those of the columns. One that is in neither has the size one.
        box: the length of a box along each axis; along the first of two axes it is one, or the second is whole.
        arch: the arch.
    """
    size, stride = (dict(zip(axes, of, strict=True)) for of in (t.shape, t.stride()))
    rows, columns = layout.split("_")
    merged = all(stride[part[0]] == size[part[1]] * stride[part[1]] for part in (rows, columns) if len(part) == 2)
    if stride[columns[-1]] != 1 or not merged:
        return None
    apart = stride[rows[-1]]  # from one row to the next
    itemsize, shape = t.element_size(), [_product(size, rows), _product(size, columns)]
    begin = [apart] if len(columns) == 1 else [apart, stride[columns[0]]]  # boxes begin at multiples of these
    aligned = all(n * itemsize % 16 == 0 for n in begin) and _is_aligned(t) and apart >= shape[1]
    if arch not in _DESCRIPTORS or not aligned or any(n >= INT32 for n in shape):
        return None
    boxes = [_product(box, rows), _product(box, columns)]
    if not is_traced():
        return TensorDescriptor(t, shape, [apart, 1], boxes)
    order = [axes.index(axis) for axis in rows + columns]
    matrix = (t if order == sorted(order) else t.permute(*order)).reshape(shape)
    return Described(matrix, boxes) if matrix.stride() == (apart, 1) else None


def _product(lengths: Mapping[str, int], axes: str) -> int:
    return lengths[axes] if len(axes) == 1 else lengths[axes[0]] * lengths[axes[1]]


class Reading(NamedTuple):
    """How a kernel reads H, step by step along one of its axes.

    Args:
        name: the constant READ of the kernel: a layout, or ``"pointers"``.
        descriptor: of H, or None.
        stride: the distance of two steps: in rows or columns of the descriptor, or in numbers.
    """

    name: str
    descriptor: TensorDescriptor | Described | None
    stride: int


def reading(h: Tensor, axes: str, step: str, layouts: Sequence[str], box: Mapping[str, int], arch: str) -> Reading:
    """Return the first of some layouts that H has, or that it is read by pointers.

    Args:
        h: H, with three axes.
        axes: a letter for each axis.
        step: the axis of the steps, the first of two in every layout.
        layouts: see `descriptor`.
        box: see `descriptor`.
        arch: the arch.
    """
    for layout in layouts:
        if (found := descriptor(h, axes, layout, box, arch)) is not None:
            within = axes.index(layout[layout.index(step) + 1])
            return Reading(layout, found, h.shape[within])
    return Reading("pointers", None, h.stride(axes.index(step)))


def reading_one(h: Tensor, bo: int, br: int) -> Reading:
    """Return that H (O, I, R), which has the layout ``"o_ir"``, is read by boxes (1, bo, br) of (I, O, R).

    A box of ``"o_ir"`` that is longer than R would end in the next i, where NaN times a zero of z is NaN.
    """
    matrix, box = h.transpose(0, 1), [1, bo, br]
    found = Described(matrix, box) if is_traced() else TensorDescriptor(h, [*matrix.shape], [*matrix.stride()], box)
    return Reading("i_o_r", found, 1)


def _is_aligned(t: Tensor) -> bool:
    """Return whether a tensor begins at a multiple of 16 bytes. In a trace, storages begin there."""
    address = t.storage_offset() * t.element_size() if is_traced() else t.data_ptr()
    return address % 16 == 0


def unit(t: Tensor, length: int) -> int:
    """Return how many numbers of a row of this length are loaded together: 16 bytes, or 1 if a row is not aligned."""
    most = 16 // t.element_size()
    aligned = t.stride(-1) == 1 and _is_aligned(t)
    return most if aligned and all(n % most == 0 for n in (length, t.shape[-1], *t.stride()[:-1])) else 1


def in_place(h: Tensor, arch: str) -> bool:
    """Return whether descriptors can read H whose rows are no multiple of 16."""
    least, *others = sorted(h.stride())
    aligned = least == 1 and all(s * h.element_size() % 16 == 0 for s in others)
    return arch in _DESCRIPTORS and aligned and _is_aligned(h)


def wide_loads(v: Tensor, h: Tensor, arch: str) -> bool:
    """Return whether v and H are loaded several numbers at a time; else only small tiles have enough registers."""
    return unit(v, v.shape[-1]) > 1 and (1 in h.stride() if v.shape[-1] % 16 == 0 else in_place(h, arch))
