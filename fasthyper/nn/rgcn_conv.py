"""`RGCNConv`: a drop-in replacement for the relational graph convolution of PyTorch Geometric."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthyper.functional import hyper_linear
from fasthyper.incidence import Incidence
from fasthyper.nn import edges
from fasthyper.nn.tracing import OneNode, is_proxy, recorded


class RGCNConv(OneNode):
    """Relational graph convolution: each relation's weights are a sum of bases, and are never written out.

    It computes, for every target node t, ::

        W[r] = Σ_b comp[r,b] weight[b]
        y[t] = x[t] @ root + bias + Σ_r (reduce over the edges of relation r from s to t of  x[s]) @ W[r]

    with the constructor, the parameters, the state dict, the initialisation and the results of
    ``torch_geometric.nn.RGCNConv``, but without PyTorch Geometric. A checkpoint of one loads into the other. The mean
    is that of each relation; the relations are added.

    With ``"mean"`` and ``"max"``, the features of a node's neighbours are reduced first, for each pair of a target and
    a relation that occurs; a compiled function, which cannot know these pairs, takes all of them. Edges are sorted
    once for each ``edge_index`` and ``edge_type``, as for :class:`~fasthyper.nn.NNConv`.

    Without ``num_bases``, each relation has weights of its own, as if it were a basis. That costs
    ``num_relations² · I · O`` products more, which is little if there are more than ``num_relations²`` edges.

    Args:
        in_channels: the number of features of a node, I; or a pair, of a source node and of a target node.
        out_channels: the number of features of the result, O.
        num_relations: the number of relations.
        num_bases: the number of bases.
        num_blocks: not supported.
        aggr: ``"mean"``, ``"add"`` (or ``"sum"``) or ``"max"`` over the edges of one relation that arrive at a node.
        root_weight: if True, add a linear function of the target node's own features.
        is_sorted: has no effect; edges may come in any order.
        bias: if True, learn a bias.
        flow: only ``"source_to_target"``.

    Shape:
        - x: ``(S, I)``, or a pair of the source nodes' ``(S, I)`` and the target nodes' ``(T, I')`` features. Indices
          of nodes in place of features are not supported.
        - edge_index: ``(2, E)``, the source and the target node of each edge.
        - edge_type: ``(E,)``, the relation of each edge.
        - Output: ``(T, O)``.

    Attributes:
        weight: the bases, ``(num_bases, I, O)``; without bases, the weights ``(num_relations, I, O)``.
        comp: the coefficients, ``(num_relations, num_bases)``, or None.
        root: ``(I', O)``, or None.
        bias: ``(O,)``, or None.

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``aggr``, ``flow`` or ``num_blocks`` is not supported, or a number is not positive.

    References:
        Schlichtkrull et al., "Modeling Relational Data with Graph Convolutional Networks", ESWC 2018,
        `arXiv 1703.06103 <https://arxiv.org/abs/1703.06103>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import RGCNConv
        >>> conv = RGCNConv(8, 4, num_relations=5, num_bases=2)
        >>> edge_index = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]])  # from, to
        >>> conv(torch.randn(3, 8), edge_index, edge_type=torch.tensor([0, 4, 4, 1])).shape
        torch.Size([3, 4])
    """

    weight: nn.Parameter
    comp: nn.Parameter | None
    root: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        num_relations: int,
        num_bases: int | None = None,
        num_blocks: int | None = None,
        aggr: str = "mean",
        root_weight: bool = True,
        is_sorted: bool = False,
        bias: bool = True,
        *,
        flow: str = "source_to_target",
    ) -> None:
        super().__init__()
        edges.check_options(aggr, flow)
        if num_blocks is not None:
            raise ValueError(f"num_blocks must be None, because blocks are not supported, got {num_blocks!r}")
        for name, number in (("num_relations", num_relations), ("num_bases", num_bases)):
            if number is None and name == "num_bases":
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be an integer, got {number!r}")
            if number < 1:
                raise ValueError(f"{name} must be positive, got {number}")
        self._features = edges.channels(in_channels, out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_relations = num_relations
        self.num_bases = num_bases
        self.num_blocks = num_blocks
        self.aggr = aggr
        self.is_sorted = is_sorted
        self.flow = flow

        def register(name: str, present: bool, *shape: int) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if present else None)

        bases = num_relations if num_bases is None else num_bases
        register("weight", True, bases, self._features[0], out_channels)
        register("comp", num_bases is not None, num_relations, bases)
        register("root", root_weight, self._features[1], out_channels)
        register("bias", bias, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for p in (self.weight, self.comp, self.root):
            if p is not None:
                bound = math.sqrt(6 / (p.shape[-2] + p.shape[-1]))  # Glorot, Bengio, 2010
                nn.init.uniform_(p, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor, edge_type: Tensor | None = None) -> Tensor:
        """Return the new features of the target nodes.

        Args:
            x: ``(S, I)``, or a pair ``(S, I)`` and ``(T, I')``.
            edge_index: ``(2, E)``, int64 or int32, in any order; an ``EdgeIndex`` of PyTorch Geometric, too.
            edge_type: ``(E,)``, int64 or int32.

        Returns:
            ``(T, O)``.

        Raises:
            TypeError: an index is of another type, or x is not floating point.
            ValueError: sizes or devices do not fit, or an index is out of range.
        """
        if is_proxy(edge_index):
            return recorded(self, x, edge_index, edge_type)
        x_source, x_target = edges.nodes(x, self._features, self.root is not None)
        if x_target is None:
            raise ValueError("x[1] must be the features of the target nodes, got None")
        edge_index = edges.check_edges(edge_index, x_source)
        sizes = x_source.shape[0], x_target.shape[0]
        y = self._sum(x_source, edge_index, self._check_types(edge_type, edge_index), *sizes)
        if self.root is not None:
            y = y + x_target @ self.root
        return y if self.bias is None else y + self.bias

    def _check_types(self, edge_type: Any, edge_index: Tensor) -> Tensor:
        if not isinstance(edge_type, Tensor) or edge_type.dtype not in (torch.int64, torch.int32):
            got = edge_type.dtype if isinstance(edge_type, Tensor) else type(edge_type).__name__
            raise TypeError(f"edge_type must be a tensor of int64 or int32, got {got}")
        if edge_type.shape != edge_index.shape[1:]:
            raise ValueError(
                f"edge_type must have shape ({edge_index.shape[1]},), one for each edge, got {tuple(edge_type.shape)}"
            )
        if edge_type.device != edge_index.device:
            raise ValueError(f"edge_type must be on the device of x, {edge_index.device}, got {edge_type.device}")
        return edge_type

    def _sum(self, x: Tensor, edge_index: Tensor, edge_type: Tensor, sources: int, targets: int) -> Tensor:
        """Return (T, O), the sum over all relations."""
        reduce, numbers = edges.REDUCE[self.aggr], (sources, targets, self.num_relations)
        make = _edges if reduce == "sum" else _pairs
        made = edges.once(lambda: make(edge_index, edge_type, *numbers), (make, numbers), edge_index, edge_type)
        if isinstance(made, _Pairs):
            x = edges.reduce_neighbours(x, made.source, made.of_edge, made.number, reduce)
            made = made.incidence
        z = torch.eye(self.num_relations, dtype=x.dtype, device=x.device) if self.comp is None else self.comp
        return hyper_linear(x, z, self.weight.permute(2, 1, 0), incidence=made)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, num_relations={self.num_relations})"


def _edges(edge_index: Tensor, edge_type: Tensor, sources: int, targets: int, relations: int) -> Incidence:
    return edges.incidence(edge_index, sources, targets, edge_type, relations)


class _Pairs(NamedTuple):
    """The pairs of a target and a relation.

    Args:
        source: the source node of each edge.
        of_edge: the pair of each edge.
        number: the number of pairs.
        incidence: the pairs as terms.
    """

    source: Tensor
    of_edge: Tensor
    number: int
    incidence: Incidence


def _pairs(edge_index: Tensor, edge_type: Tensor, sources: int, targets: int, relations: int) -> _Pairs:
    _edges(edge_index, edge_type, sources, targets, relations)  # checks the indices
    source, target = edge_index.to(torch.int64, copy=True)
    of_edge = target * relations + edge_type
    if torch.compiler.is_compiling():
        pairs = torch.arange(targets * relations, device=source.device)
    else:
        pairs, of_edge = of_edge.unique(return_inverse=True)
    terms = Incidence(None, pairs % relations, pairs // relations, num_conds=relations, num_targets=targets)
    return _Pairs(source, of_edge, pairs.shape[0], terms)
