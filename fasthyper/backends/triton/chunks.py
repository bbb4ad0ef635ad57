"""How rows of terms are cut into chunks, and where the messages of each chunk go.

Everything here is computed once for an index: it waits for the device. A position is a term in the order of the rows,
or one of the points of a term.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...terms import Sorted, kept
from ..aten.tiling import blocks

_MOST_TERMS = 512
"""Terms of a piece: enough to make the product with H a small part, and few enough to fill the device."""


class Chunk(NamedTuple):
    """Pieces that are computed together, with their positions, their rows, and their largest number of positions."""

    pieces: range
    positions: range
    rows: range
    width: int

    @property
    def mean(self) -> float:
        """The mean number of positions of a piece."""
        return len(self.positions) / max(1, len(self.pieces))


class Cut(NamedTuple):
    """Rows cut into pieces.

    Args:
        ptr: (pieces + 1,), the positions of each piece; None if each has one.
        row: (pieces,), the row of each piece; None if it is the piece.
        pieces_of: (rows + 1,), the pieces of each row; None as for `row`.
        chunks: all pieces.
        splits: whether any row has several pieces.
    """

    ptr: Tensor | None
    row: Tensor | None
    pieces_of: Tensor | None
    chunks: list[Chunk]
    splits: bool = False


class Route(NamedTuple):
    """Where the messages of positions go, as segments of one row each.

    Args:
        ptr: (segments + 1,), into `order`; None if each position is a segment.
        order: the positions, by chunk, then by row; None if as they are.
        row: (segments,), the row of each segment; None if it is the segment.
        first: the first segment of each chunk, and their number.
    """

    ptr: Tensor | None
    order: Tensor | None
    row: Tensor | None
    first: list[int]


def whole(count: int, step: int) -> Cut:
    """Cut rows that have one position each."""
    ranges = (range(each.start, each.stop) for each in blocks(count, step))
    return Cut(None, None, None, [Chunk(each, each, each, 1) for each in ranges])


def cut(counts: Tensor, device: torch.device, pieces: int, positions: int) -> Cut:
    """Cut rows into pieces, and these into chunks of at most so many pieces and positions.

    Args:
        counts: the number of positions of each row, on the CPU.
        device: where the result is.
        pieces: most pieces of a chunk.
        positions: most positions of a chunk.
    """
    most = min(_MOST_TERMS, positions)
    pieces_of, begin = (torch.zeros(len(counts) + 1, dtype=torch.int64) for _ in range(2))
    torch.cumsum((counts + most - 1) // most, 0, out=pieces_of[1:])
    torch.cumsum(counts, 0, out=begin[1:])
    row = torch.repeat_interleave(pieces_of.diff())
    nth = torch.arange(len(row)) - pieces_of[row]
    ptr = torch.cat((begin[row] + nth * most, begin[-1:]))
    chunks, first = [], 0
    while first < len(row):
        start = int(ptr[first])
        last = min(first + pieces, int(torch.searchsorted(ptr, start + positions, right=True)) - 1, len(row))
        rows = range(int(row[first]), int(row[last - 1]) + 1)
        width = int(ptr[first : last + 1].diff().max())
        chunks.append(Chunk(range(first, last), range(start, int(ptr[last])), rows, width))
        first = last
    splits = len(row) > 0 and int(pieces_of.diff().max()) > 1
    return Cut(ptr.to(device), row.to(device), pieces_of.to(device), chunks, splits)


@functools.lru_cache(maxsize=8)
def cut_evenly(count: int, each: int, device: torch.device, pieces: int, positions: int) -> Cut:
    """Cut rows that all have the same number of positions."""
    return cut(torch.full((count,), each), device, pieces, positions)


def route(rows: Tensor, size: int, chunks: list[Chunk]) -> Route:
    """Return the route of messages from all positions to their rows, which are below `size`."""
    lengths = torch.tensor([len(chunk.positions) for chunk in chunks], device=rows.device)
    chunk = torch.repeat_interleave(lengths, output_size=len(rows))
    key, order = torch.sort(chunk * size + rows, stable=True)
    key, counts = torch.unique_consecutive(key, return_counts=True)
    ptr = torch.zeros(len(key) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(counts, 0, out=ptr[1:])
    ends = torch.arange(len(chunks) + 1, device=rows.device) * size
    return Route(ptr, order, key % size, torch.searchsorted(key, ends).tolist())


def in_order(index: Tensor, by: Sorted) -> Tensor:
    """Return an index in the order of another."""
    return kept(index, ("in order", len(by.ptr)), by, lambda: index[by.order])
