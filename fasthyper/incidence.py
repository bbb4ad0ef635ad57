"""`Incidence`: which rows of x, z and y belong to each term of a sum."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import terms
from .terms import NAMES, Terms


class Incidence:
    """The terms of a sum that share rows of x, rows of z or rows of y: edges of a graph, nodes of many graphs, tokens.

    With it, :func:`fasthyper.hyper_linear` computes, for every term e, ::

        y[target[e]] += (weight·z[cond[e]] + base_weight) x[source[e]] + bias·z[cond[e]] + base_bias

    Terms may come in any order and more than once. A row that no term names is left out of the sum; a row of y without
    terms is zero. An index that is None is the identity: term e has row e.

    An Incidence copies its indices and does not change. It sorts the terms when a schedule first needs their order, and
    keeps the order: make one Incidence and pass it to all layers and steps.

    Args:
        source: row of x of each term, ``(E,)``, int64 or int32.
        cond: row of z of each term, ``(E,)``.
        target: row of y of each term, ``(E,)``.
        num_sources: the number of rows of x, S, for an early check; x has the final word.
        num_conds: the number of rows of z, C, likewise.
        num_targets: the number of rows of y, T. By default the largest target plus one; E if ``target`` is None.

    Raises:
        NotImplementedError: ``torch.jit.trace`` runs.
        TypeError: an index is not a tensor of int64 or int32, or a number is not an integer.
        ValueError: an index is not one-dimensional, lengths or devices differ, a value is negative or not below its
            number, or a number contradicts an identity.

    Example:
        >>> import torch, fasthyper
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # from, to
        >>> incidence = fasthyper.Incidence(source=edges[0], target=edges[1], num_targets=3)
        >>> x, z = torch.ones(3, 8), torch.ones(4, 5)  # a row for each node, a row for each edge
        >>> y = fasthyper.hyper_linear(x, z, torch.ones(6, 8, 5), incidence=incidence)
        >>> y.shape, y[:, 0].tolist()
        (torch.Size([3, 6]), [40.0, 80.0, 40.0])
    """

    source: Tensor | None
    cond: Tensor | None
    target: Tensor | None
    num_sources: int | None
    num_conds: int | None
    num_targets: int | None

    def __init__(
        self,
        source: Tensor | None = None,
        cond: Tensor | None = None,
        target: Tensor | None = None,
        *,
        num_sources: int | None = None,
        num_conds: int | None = None,
        num_targets: int | None = None,
    ) -> None:
        if torch.jit.is_tracing():  # it would make constants of the numbers of rows, and be wrong for others
            raise NotImplementedError(
                "torch.jit.trace cannot record an Incidence that is made inside of the model: make it outside, or use "
                "torch.export.export(model, inputs)"
            )
        given = {"source": source, "cond": cond, "target": target}
        _check_indices(given)
        numbers = {"source": num_sources, "cond": num_conds, "target": num_targets}
        for name, number in numbers.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, (Integral, torch.SymInt))):
                raise TypeError(f"num_{name}s must be an integer, got {number!r}")
            if number is not None and number < 0:
                raise ValueError(f"num_{name}s must not be negative, got {number}")
        self.source, self.cond, self.target = (None if t is None else _copy(t) for t in given.values())
        if all(_has_values(t) for t in given.values()):
            if target is not None and num_targets is None:
                numbers["target"] = int(target.max()) + 1 if len(target) else 0
            for name, number in numbers.items():
                index = getattr(self, name)
                if number is not None and index is not None:
                    terms.check_range(name, index, number)
        self.num_sources, self.num_conds, self.num_targets = numbers.values()
        count = self.num_terms
        for name, number in numbers.items():
            if given[name] is None and number is not None and count is not None and number != count:
                raise ValueError(
                    f"num_{name}s must be {count}, the number of terms, since {name} is None (the identity), "
                    f"got {number}"
                )

    @classmethod
    def from_edge_index(
        cls, edge_index: Tensor, num_sources: int | None = None, num_targets: int | None = None
    ) -> Incidence:
        """Return the incidence of a graph's edges: each edge has its own row of z.

        Args:
            edge_index: ``(2, E)``: the source node and the target node of each edge, as in PyTorch Geometric.
            num_sources: the number of source nodes.
            num_targets: the number of target nodes.

        Example:
            >>> import torch
            >>> from fasthyper import Incidence
            >>> Incidence.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 2, 2)
            Incidence(terms=2, source, target, num_sources=2, num_targets=2)
        """
        if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or edge_index.shape[0] != 2:
            got = tuple(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index).__name__
            raise ValueError(f"edge_index must be a tensor of shape (2, E), got {got}")
        return cls(edge_index[0], None, edge_index[1], num_sources=num_sources, num_targets=num_targets)

    @classmethod
    def from_batch(cls, ids: Tensor, num_conds: int | None = None) -> Incidence:
        """Return the incidence of ragged points: row e of x and of y meets row ``ids[e]`` of z.

        Args:
            ids: ``(E,)``, in any order: for example the graph of each node.
            num_conds: the number of rows of z.

        Example:
            >>> import torch, fasthyper
            >>> incidence = fasthyper.Incidence.from_batch(torch.tensor([0, 0, 1, 1, 1]))
            >>> x, z = torch.ones(5, 8), torch.ones(2, 4)  # two graphs of two and three nodes
            >>> fasthyper.hyper_linear(x, z, torch.ones(6, 8, 4), incidence=incidence).shape
            torch.Size([5, 6])
        """
        if ids is None:
            raise TypeError("ids must be a tensor of int64 or int32, got None")
        return cls(cond=ids, num_conds=num_conds)

    @classmethod
    def from_ptr(cls, ptr: Tensor) -> Incidence:
        """Return the incidence of ragged points in one list: rows ``ptr[c]`` to ``ptr[c + 1]`` of x meet row c of z.

        Args:
            ptr: ``(C + 1,)``, from 0 to E, never falling.

        Example:
            >>> import torch
            >>> from fasthyper import Incidence
            >>> Incidence.from_ptr(torch.tensor([0, 2, 5])).cond.tolist()
            [0, 0, 1, 1, 1]
        """
        _check_indices({"ptr": ptr})
        if not len(ptr):
            raise ValueError("ptr must have shape (C + 1,), got (0,)")
        counts = ptr.diff()
        if not torch.compiler.is_compiling() and (int(ptr[0]) or (len(counts) and int(counts.min()) < 0)):
            raise ValueError(f"ptr must start at 0 and never fall, got shape {tuple(ptr.shape)} of {ptr[:8].tolist()}…")
        rows = torch.arange(counts.shape[0], device=ptr.device)
        return cls(cond=rows.repeat_interleave(counts), num_conds=counts.shape[0])

    @property
    def num_terms(self) -> int | None:
        """E; None if all indices are the identity."""
        return next((t.shape[0] for t in self._indices() if t is not None), None)

    def to(self, device: torch.device | str | int) -> Incidence:
        """Return the incidence with its indices on a device; itself if they are there."""
        moved = [None if t is None else t.to(device) for t in self._indices()]
        if all(t is own for t, own in zip(moved, self._indices(), strict=True)):
            return self
        copies = [None if t is None else _copy(t) for t in moved]
        return _unflatten(copies, (self.num_sources, self.num_conds, self.num_targets))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take copied or unpickled indices."""
        self.__dict__.update(state)
        for name in NAMES:
            index = getattr(self, name)
            if index is not None:
                setattr(self, name, _copy(index))

    def _indices(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.source, self.cond, self.target

    def _terms(self, sources: int, conds: int) -> Terms:
        """Return the terms of a call with so many rows of x and z."""
        for name, number, rows, factor in (
            ("num_sources", self.num_sources, sources, "x"),
            ("num_conds", self.num_conds, conds, "z"),
        ):
            if number is not None and number != rows:
                raise ValueError(f"{factor} must have {number} rows, the incidence's {name}, got {rows}")
        if self.num_targets is not None:
            targets = self.num_targets
        elif self.target is not None:
            raise ValueError("num_targets must be passed to an Incidence that is made inside a compiled function")
        else:
            targets = sources if self.num_terms is None else self.num_terms
        return Terms(*self._indices(), sources, conds, targets)

    def __repr__(self) -> str:
        parts = [] if self.num_terms is None else [f"terms={self.num_terms}"]
        parts += [name for name in NAMES if getattr(self, name) is not None]
        numbers = {name: getattr(self, name) for name in ("num_sources", "num_conds", "num_targets")}
        parts += [f"{name}={number}" for name, number in numbers.items() if number is not None]
        return f"Incidence({', '.join(parts)})"


def _check_indices(given: dict[str, Any]) -> None:
    first: tuple[str, Tensor] | None = None
    for name, t in given.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor of int64 or int32, got {type(t).__name__}")
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, got shape {tuple(t.shape)} of {t.dtype}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got shape {tuple(t.shape)} of {t.layout}")
        if t.dim() != 1:
            raise ValueError(f"{name} must have shape (E,), got {tuple(t.shape)}")
        if first is None:
            first = name, t
        elif t.shape[0] != first[1].shape[0]:
            raise ValueError(
                f"{name} must have shape ({first[1].shape[0]},), one value a term as {first[0]} has, got "
                f"{tuple(t.shape)}"
            )
        elif t.device != first[1].device:
            raise ValueError(f"{name} must be on the device of {first[0]}, {first[1].device}, got {t.device}")


def _copy(index: Tensor) -> Tensor:
    """Return an int64 copy that nobody else changes; not an inference tensor, whose changes could not be noticed."""
    if torch.compiler.is_compiling():
        return index.to(torch.int64, copy=True)
    with torch.inference_mode(False):
        copy = index.detach().to(torch.int64, copy=True).contiguous()
    return terms.own(copy) if _has_values(copy) else copy


def _has_values(index: Tensor | None) -> bool:
    """Return whether values can be read: not in traced code, nor from fake tensors and those of the meta device."""
    if index is None:
        return True
    return not torch.compiler.is_compiling() and type(index) is Tensor and index.device.type != "meta"


def _flatten(incidence: Incidence) -> tuple[list[Any], Any]:
    return list(incidence._indices()), (incidence.num_sources, incidence.num_conds, incidence.num_targets)


def _unflatten(indices: Any, numbers: Any) -> Incidence:
    incidence = Incidence.__new__(Incidence)  # of indices that were checked, or of whatever a transform put there
    incidence.source, incidence.cond, incidence.target = indices
    incidence.num_sources, incidence.num_conds, incidence.num_targets = numbers
    return incidence


def _flatten_with_keys(incidence: Incidence) -> tuple[list[tuple[Any, Any]], Any]:
    indices, numbers = _flatten(incidence)
    return [(pytree.GetAttrKey(name), t) for name, t in zip(NAMES, indices, strict=True)], numbers


pytree.register_pytree_node(
    Incidence,
    _flatten,
    _unflatten,
    serialized_type_name="fasthyper.Incidence",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([Incidence])  # so that torch.load reads one without weights_only=False
