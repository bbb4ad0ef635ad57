"""What the graph layers share: they check the edges of a graph, keep their incidence, and reduce rows by an index."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fasthyper import planner
from fasthyper.functional import degrees, largest
from fasthyper.incidence import Incidence
from fasthyper.ops import shapes

REDUCE = {"add": "sum", "sum": "sum", "mean": "mean", "max": "max"}
"""The reductions of a graph layer, by their names in PyTorch Geometric's ``aggr``."""


def check_options(aggr: Any, flow: Any) -> None:
    """Check two options of the layers of PyTorch Geometric.

    Raises:
        ValueError: one is not supported.
    """
    if not isinstance(aggr, str) or aggr not in REDUCE:
        raise ValueError(f"aggr must be one of {', '.join(map(repr, REDUCE))}, got {aggr!r}")
    if flow != "source_to_target":
        raise ValueError(f"flow must be 'source_to_target', got {flow!r}: flip the rows of edge_index instead")


def channels(in_channels: Any, out_channels: Any) -> tuple[int, int]:
    """Return the features of the source nodes and of the target nodes.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is not positive.
    """
    pair = tuple(in_channels) if isinstance(in_channels, (tuple, list)) else (in_channels, in_channels)
    for name, number in (*(("in_channels", n) for n in pair), ("out_channels", out_channels)):
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"{name} must be an integer{' or a pair' * (name[0] == 'i')}, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}: there is no lazy initialisation")
    if len(pair) != 2:
        raise ValueError(f"in_channels must be an integer or a pair, got {in_channels!r}")
    return pair


def nodes(x: Any, features: tuple[int, int], root: bool) -> tuple[Tensor, Tensor | None]:
    """Return the features of the source nodes and of the target nodes, None where there are none.

    Args:
        x: a tensor for both, or a pair.
        features: the number of features of each.
        root: whether the features of target nodes are used, and not only their number.

    Raises:
        TypeError: one is not a tensor of floating point numbers.
        ValueError: one has a wrong shape.
    """
    both = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(both) != 2:
        raise ValueError(f"x must be a tensor or a pair (x_source, x_target), got {len(both)} of them")
    for name, t, width in zip(("x", "x[1]"), both, features, strict=True):
        if name == "x[1]" and (t is None or not root):
            continue
        if isinstance(t, Tensor):
            shapes.check_dense(name, t)
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a tensor of floating point numbers, not indices of nodes, got {got}")
        shapes.check_input(name, t)
        if t.dim() != 2 or t.shape[1] != width:
            raise ValueError(f"{name} must have shape (nodes, {width}), got {tuple(t.shape)}")
    return both


def check_edges(edge_index: Any, x: Tensor) -> Tensor:
    """Return the edges as a plain tensor ``(2, E)``.

    Raises:
        TypeError: they are not a tensor of int64 or int32.
        ValueError: they have a wrong shape, or are not on the device of x.
    """
    if hasattr(edge_index, "as_tensor"):  # an EdgeIndex of PyTorch Geometric
        edge_index = edge_index.as_tensor()
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        got = type(edge_index).__name__ if not isinstance(edge_index, Tensor) else edge_index.layout
        raise TypeError(f"edge_index must be a tensor of shape (2, E), not an adjacency matrix: got {got}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index must be int64 or int32, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, E), got {tuple(edge_index.shape)}")
    if edge_index.device != x.device:
        raise ValueError(f"edge_index must be on the device of x, {x.device}, got {edge_index.device}")
    return edge_index


def sizes(x_source: Tensor, x_target: Tensor | None, size: Any) -> tuple[int, int]:
    """Return the numbers of source nodes and of target nodes.

    Args:
        x_source: features of the source nodes.
        x_target: features of the target nodes, or None.
        size: a pair of numbers, each of which may be None, or None.

    Raises:
        ValueError: a number contradicts the features.
    """
    given = (None, None) if size is None else tuple(size)
    if len(given) != 2:
        raise ValueError(f"size must be a pair (source nodes, target nodes), got {size!r}")
    for at, t in enumerate((x_source, x_target)):
        if t is not None and given[at] is not None and given[at] != t.shape[0]:
            name = "x[1]" if at else "x"
            raise ValueError(f"size[{at}] must be {t.shape[0]}, the rows of {name}, got {given[at]}")
    sources = x_source.shape[0]
    if x_target is not None:
        return sources, x_target.shape[0]
    return sources, sources if given[1] is None else given[1]


def incidence(
    edge_index: Tensor, sources: int, targets: int, cond: Tensor | None = None, conds: int | None = None
) -> Incidence:
    """Return the incidence of a graph's edges.

    Args:
        edge_index: ``(2, E)``.
        sources: the number of source nodes.
        targets: the number of target nodes.
        cond: row of z of each edge; by default each edge has its own.
        conds: the number of rows of z.

    Raises:
        ValueError: an index is out of range.
    """
    try:
        return Incidence(edge_index[0], cond, edge_index[1], num_sources=sources, num_conds=conds, num_targets=targets)
    except ValueError as wrong:
        raise ValueError(f"edge_index{' or edge_type' * (cond is not None)} is wrong: {wrong}") from None


def reduce_rows(rows: Tensor, index: Tensor, size: int, reduce: str) -> Tensor:
    """Return (size, features): the sum, mean or max of the rows with the same value of an index; zero without rows."""
    if reduce == "max":
        return largest(rows, index, size)
    where, zeros = index.unsqueeze(1).expand_as(rows), rows.new_zeros(size, rows.shape[1])
    total = zeros.scatter_add(0, where, rows)  # several times faster than index_add and than scatter_reduce
    if reduce == "sum":
        return total
    return (total / degrees(index, size, rows.dtype).unsqueeze(1)).to(rows.dtype)


def reduce_neighbours(x: Tensor, source: Tensor, index: Tensor, size: int, reduce: str) -> Tensor:
    """Return `reduce_rows(x[source], …)`, a few features at a time, so that x[source] stays within the workspace."""
    rows = max(1, source.shape[0]) * x.element_size()
    width = max(1, planner.get_workspace_limit() // rows)
    if torch.compiler.is_compiling() or width >= x.shape[1]:  # a compiler has its own way to avoid x[source]
        return reduce_rows(x.index_select(0, source), index, size, reduce)
    parts = [reduce_rows(part.index_select(0, source), index, size, reduce) for part in x.split(width, 1)]
    return torch.cat(parts, 1)


class _Made(NamedTuple):
    state: Sequence[Any]
    others: Sequence[TensorWeakRef]
    value: Any


_made = WeakTensorKeyDictionary()


def once(make: Callable[[], Any], key: Hashable, *tensors: Tensor) -> Any:
    """Return `make()`, or what it returned for the same key and the same, unchanged tensors.

    The value is kept while the first tensor lives, and must not refer to it. A tensor is unchanged if its version,
    storage and shape are. Nothing is kept in compiled code, nor for inference tensors, which have no versions.
    """
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return make()
    first, *others = tensors
    state = [(t._version, t.data_ptr(), t.shape) for t in tensors]
    known: dict[Hashable, _Made] = _made.setdefault(first, {})
    made = known.get(key)
    if made is not None and made.state == state:
        if all(ref() is t for ref, t in zip(made.others, others, strict=True)):
            return made.value
    elif made is not None and made.state[0] != state[0]:
        known.clear()  # nothing that was made of the old content is of use
    with torch.inference_mode(False):  # what is made in inference may be needed in training
        value = make()
    known[key] = _Made(state, [TensorWeakRef(t) for t in others], value)
    return value
