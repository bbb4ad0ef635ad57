"""`NNConv`: a drop-in replacement for the edge-conditioned convolution of PyTorch Geometric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, init

from fasthyper.functional import hyper_linear
from fasthyper.nn import edges
from fasthyper.nn.plain_linear import split_head
from fasthyper.nn.tracing import OneNode, is_proxy, recorded
from fasthyper.ops import shapes


class NNConv(OneNode):
    """Edge-conditioned convolution: ``nn`` generates the weights of each edge, and they are never written out.

    It computes, for every target node t, ::

        y[t] = lin(x[t]) + bias + reduce over the edges e from s(e) to t of  x[s(e)] @ nn(edge_attr[e]).view(I, O)

    with the constructor, the parameters, the state dict, the initialisation and the results of
    ``torch_geometric.nn.NNConv``, but without PyTorch Geometric. A checkpoint of one loads into the other.

    The last Linear of ``nn`` is the head H, the modules before it are the trunk, which computes z for each edge. They
    are found in a :class:`torch.nn.Sequential`, nested or not, and in a bare :class:`torch.nn.Linear`. For any other
    ``nn`` the layer writes out a message and W for each edge, as PyTorch Geometric does; :attr:`why_by_messages` says
    why.

    The edges are sorted when an ``edge_index`` is first seen. For the same tensor, if it was not changed in the
    meantime, the order is reused, by all layers and steps. A change through ``edge_index.data`` or through an array of
    NumPy that shares its memory is not noticed.

    Args:
        in_channels: the number of features of a node, I; or a pair, of a source node and of a target node.
        out_channels: the number of features of the result, O.
        nn: maps ``edge_attr``, ``(E, D)``, to ``(E, I * O)``.
        aggr: ``"add"`` (or ``"sum"``), ``"mean"`` or ``"max"`` of the messages that arrive at a node; zero if there
            are none. ``"max"`` writes out the messages, ``(E, O)``.
        root_weight: if True, add a linear function of the target node's own features.
        bias: if True, learn a bias.
        flow: only ``"source_to_target"``.

    Shape:
        - x: ``(S, I)``, or a pair of the source nodes' ``(S, I)`` and the target nodes' ``(T, I')`` features. The
          second may be None.
        - edge_index: ``(2, E)``, the source and the target node of each edge.
        - edge_attr: ``(E, D)``.
        - Output: ``(T, O)``.

    Attributes:
        nn: the network as it was passed; it is initialised again by the constructor, as in PyTorch Geometric.
        lin: the :class:`torch.nn.Linear` of the root weight, if there is one.
        bias: ``(O,)``, or None.

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``aggr`` or ``flow`` is not supported, or a number is not positive.

    References:
        Simonovsky, Komodakis, "Dynamic Edge-Conditioned Filters in Convolutional Neural Networks on Graphs", CVPR
        2017, `arXiv 1704.02901 <https://arxiv.org/abs/1704.02901>`_; Gilmer et al., "Neural Message Passing for
        Quantum Chemistry", ICML 2017, `arXiv 1704.01212 <https://arxiv.org/abs/1704.01212>`_.

    Example:
        >>> import torch
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> from fasthyper.nn import NNConv
        >>> conv = NNConv(8, 4, nn=Sequential(Linear(3, 16), ReLU(), Linear(16, 8 * 4)), aggr="mean")
        >>> edge_index = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]])  # from, to
        >>> conv(torch.randn(3, 8), edge_index, torch.randn(4, 3)).shape
        torch.Size([3, 4])
    """

    bias: Parameter | None

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        nn: Callable[..., Tensor],
        aggr: str = "add",
        root_weight: bool = True,
        bias: bool = True,
        *,
        flow: str = "source_to_target",
    ) -> None:
        super().__init__()
        edges.check_options(aggr, flow)
        self._features = edges.channels(in_channels, out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.nn = nn
        self.aggr = aggr
        self.flow = flow
        self.root_weight = root_weight
        if root_weight:
            self.lin = Linear(self._features[1], out_channels, bias=False)
        self.register_parameter("bias", Parameter(torch.empty(out_channels)) if bias else None)
        self._head()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, those of ``nn`` too."""
        _reset(self.nn)
        if self.root_weight:
            bound = 1 / math.sqrt(self.lin.in_features)
            init.uniform_(self.lin.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    @property
    def why_by_messages(self) -> str | None:
        """Why the layer writes out W for each edge: ``nn`` does not end in a plain Linear. None if it does."""
        head = self._head()
        return head if isinstance(head, str) else None

    def _head(self) -> tuple[list[Module], Linear] | str:
        # Not cached, because modules may change.
        found = split_head(self.nn)
        if not isinstance(found, str) and found[1].out_features != self._features[0] * self.out_channels:
            raise ValueError(
                f"nn must return {self._features[0]} * {self.out_channels} features, in_channels * out_channels, "
                f"got a last Linear with {found[1].out_features}"
            )
        return found

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        size: tuple[int | None, int | None] | None = None,
    ) -> Tensor:
        """Return the new features of the target nodes.

        Args:
            x: ``(S, I)``, or a pair ``(S, I)`` and ``(T, I')`` or None.
            edge_index: ``(2, E)``, int64 or int32, in any order; an ``EdgeIndex`` of PyTorch Geometric, too.
                Or a sparse tensor ``(T, S)``, the transposed adjacency matrix, whose values are the ``edge_attr``; it
                is sorted at every call.
            edge_attr: ``(E, D)``.
            size: the numbers of source nodes and of target nodes. By default they are the rows of x; without features
                of target nodes, there are as many as source nodes.

        Returns:
            ``(T, O)``.

        Raises:
            TypeError: ``edge_index`` is of another type, or x is not floating point.
            ValueError: sizes or devices do not fit, or an index is out of range.
        """
        if is_proxy(edge_index):
            return recorded(self, x, edge_index, edge_attr, size)
        edge_index, edge_attr, size = _unpack(edge_index, edge_attr, size)
        x_source, x_target = edges.nodes(x, self._features, self.root_weight)
        edge_index = edges.check_edges(edge_index, x_source)
        sources, targets = edges.sizes(x_source, x_target, size)
        y = self._sum(x_source, edge_index, edge_attr, sources, targets)
        if x_target is not None and self.root_weight:
            y = y + self.lin(x_target)
        return y if self.bias is None else y + self.bias

    def _sum(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None, sources: int, targets: int) -> Tensor:
        """Return (T, O), the messages that arrive at each target, reduced."""
        reduce = edges.REDUCE[self.aggr]
        incidence = edges.once(
            lambda: edges.incidence(edge_index, sources, targets), ("edges", sources, targets), edge_index
        )
        head = self._head()
        if isinstance(head, str):
            return self._by_messages(x, edge_index.long(), edge_attr, targets, reduce)
        if edge_attr is None:
            raise ValueError("edge_attr must be a tensor (E, D), got None")
        shapes.check_input("edge_attr", edge_attr)
        before, last = head
        z = edge_attr
        for module in before:
            z = module(z)
        z = self._row_for_each_edge(z.flatten(0, -2) if z.dim() > 1 else z.unsqueeze(0), edge_index, edge_attr)
        weights = self._features[0], self.out_channels
        return hyper_linear(
            x,
            z,
            last.weight.unflatten(0, weights).transpose(0, 1),
            base_weight=None if last.bias is None else last.bias.unflatten(0, weights).T,
            incidence=incidence,
            reduce=reduce,
        )

    def _by_messages(self, x: Tensor, edge_index: Tensor, edge_attr: Any, targets: int, reduce: str) -> Tensor:
        weights = self.nn(edge_attr).view(-1, self._features[0], self.out_channels)
        weights = self._row_for_each_edge(weights, edge_index, edge_attr)
        messages = torch.bmm(x.index_select(0, edge_index[0]).unsqueeze(1), weights).squeeze(1)
        return edges.reduce_rows(messages, edge_index[1], targets, reduce)

    def _row_for_each_edge(self, rows: Tensor, edge_index: Tensor, edge_attr: Any) -> Tensor:
        """Return rows of all edges: one row is for all of them."""
        count = edge_index.shape[1]
        if rows.shape[0] not in (1, count):
            got = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else type(edge_attr).__name__
            raise ValueError(
                f"edge_attr must have a row for each of the {count} edges, got {got} and {rows.shape[0]} rows from nn"
            )
        return rows.expand(count, *rows.shape[1:])

    def __repr__(self) -> str:
        why = self.why_by_messages
        parts = [str(self.in_channels), str(self.out_channels), f"aggr={self.aggr}", f"nn={self.nn}"]
        parts += [f"by messages, because {why}"] if why else []
        return f"{type(self).__name__}({', '.join(parts)})"


def _reset(network: Any) -> None:
    """Initialise a module, or else its children."""
    if hasattr(network, "reset_parameters"):
        network.reset_parameters()
    elif isinstance(network, Module):
        for child in network.children():
            _reset(child)


def _unpack(edge_index: Any, edge_attr: Any, size: Any) -> tuple[Any, Any, Any]:
    """Return edge_index, edge_attr and size of a graph that has some of them inside."""
    if isinstance(edge_index, Tensor) and edge_index.layout != torch.strided:
        adjacency = edge_index.to_sparse_coo().coalesce()
        values = adjacency.values() if edge_attr is None else edge_attr
        return adjacency.indices().flip(0), values, (adjacency.shape[1], adjacency.shape[0])
    if hasattr(edge_index, "sparse_size"):  # an EdgeIndex of PyTorch Geometric
        return edge_index, edge_attr, edge_index.sparse_size() if size is None else size
    return edge_index, edge_attr, size
