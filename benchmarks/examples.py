"""What is trained: networks whose weights are generated, with their data and sizes.

**"qm9 network"**: the edge-conditioned message passing network of Gilmer et al., "Neural Message Passing for Quantum
Chemistry" (ICML 2017, arXiv 1704.01212), in the sizes of PyTorch Geometric's `examples/qm9_nn_conv.py`. An edge's five
features generate the 64 × 64 weights that its message is made with; graphs are complete; three rounds share one set of
weights, and each generates them anew, as it does there, unless they are `kept`: written out once. Nothing is
downloaded: the molecules are drawn, 18 atoms of five kinds, evenly in a ball whose size is drawn too, with bonds where
atoms are close. To be learned is their standardised energy, the sum of q q' / √(1 + d²) over all pairs: half of its
variance is in the kinds of atoms, half in the distances. No molecule is seen twice, and the loss is that of molecules
which are never trained on.

**"siren picture"**: Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions" (NeurIPS
2020, arXiv 2006.09661), whose section 4.4 has a hypernetwork generate the network with sines that maps a place in an
image to its colour. Here the images are the tiles of one photograph, scikit-learn's `china.jpg`, and each has a learned
code. The loss is the squared error of all pixels, whose values are in [-1, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthyper

Batch = tuple[Tensor, ...]
"""What a network takes, and last what it should return."""


@dataclass(frozen=True)
class Example:
    """Something to train.

    Attributes:
        name: what the records call it.
        sizes: B, N, R, I and O of the generated layer that takes most of the time.
        network: at its start; never trained itself.
        rate: Adam's learning rate.
        steps: how many are taken.
        every: steps from one look at the loss to the next.
        batch: what is trained on in a step, by its number.
        held_out: what the loss is of.
    """

    name: str
    sizes: tuple[int, int, int, int, int]
    network: nn.Module
    rate: float
    steps: int
    every: int
    batch: Callable[[int], Batch]
    held_out: Batch


# ---- molecules

KINDS = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Charge of each kind of atom."""


class Molecules(NamedTuple):
    """Drawn molecules: an atom's place in the batch tells its molecule, and an edge's the atom that it leads to.

    Attributes:
        atoms: kinds as one-hots, `(atoms, 5)`.
        edges: the kind of bond as a one-hot of four, none where atoms are not close, and the distance, `(edges, 5)`.
        sources: the atom that an edge comes from, `(edges,)`; the edges to an atom stand together, in its order.
        energy: `(molecules,)`.
    """

    atoms: Tensor
    edges: Tensor
    sources: Tensor
    energy: Tensor


def complete(graphs: int, atoms: int) -> Tensor:
    """The sources of the edges of complete graphs, `(graphs · atoms · (atoms - 1),)`, in the order of their targets."""
    node = torch.arange(atoms)
    others = node.expand(atoms, atoms)[node[:, None] != node]
    return (others + atoms * torch.arange(graphs)[:, None]).flatten()


def molecules(graphs: int, atoms: int, seed: int) -> Molecules:
    """Draw molecules, in float64."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(KINDS), (graphs, atoms), generator=draw)
    places = F.normalize(torch.randn(graphs, atoms, 3, generator=draw, dtype=torch.float64), dim=-1)
    places *= torch.rand(graphs, atoms, 1, generator=draw, dtype=torch.float64) ** (1 / 3)  # evenly in a ball
    places *= 1 + 1.5 * torch.rand(graphs, 1, 1, generator=draw, dtype=torch.float64)
    distance = torch.cdist(places, places)
    apart = ~torch.eye(atoms, dtype=torch.bool)
    charge = torch.tensor(KINDS, dtype=torch.float64)[kinds]
    pair = charge[:, :, None] * charge[:, None, :] / (1 + distance.square()).sqrt()
    bond = (distance / 0.25).long()[..., None] == torch.arange(4)
    edges = torch.cat([bond.to(distance), distance[..., None]], -1)[:, apart]
    kinds = F.one_hot(kinds, len(KINDS)).to(places)
    return Molecules(kinds.flatten(0, 1), edges.flatten(0, 1), complete(graphs, atoms), pair[:, apart].sum(1) / 2)


class Set2Set(nn.Module):
    """Attention from an LSTM to a graph's nodes (Vinyals, Bengio, Kudlur, "Order Matters", ICLR 2016), three times."""

    def __init__(self, features: int, passes: int = 3) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(2 * features, features)
        self.passes = passes

    def forward(self, nodes: Tensor) -> Tensor:
        """`(graphs, nodes, features)` -> `(graphs, 2 · features)`."""
        read = nodes.new_zeros(len(nodes), 2 * nodes.shape[2])
        state = None
        for _ in range(self.passes):
            state = self.lstm(read, state)
            query, _ = state
            attention = (nodes * query[:, None]).sum(2, keepdim=True).softmax(1)
            read = torch.cat([query, (attention * nodes).sum(1)], 1)
        return read


class MessagePassing(nn.Module):
    """The network of the molecules.

    Args:
        features: of an atom.
        hidden: of what generates an edge's weights.
        rounds: how often messages are sent.
    """

    def __init__(self, features: int = 64, hidden: int = 128, rounds: int = 3) -> None:
        super().__init__()
        self.rounds, self.kept = rounds, False
        self.start = nn.Sequential(nn.Linear(len(KINDS), features), nn.ReLU())
        self.edge = nn.Sequential(nn.Linear(5, hidden), nn.ReLU())
        self.message = fasthyper.HyperLinear(features, features, cond_features=hidden, bias=False)
        self.message.reset_parameters(z_second_moment=0.5)
        self.root = nn.Linear(features, features)
        self.gru = nn.GRUCell(features, features)
        self.pool = Set2Set(features)
        self.end = nn.Sequential(nn.Linear(2 * features, features), nn.ReLU(), nn.Linear(features, 1))

    def weights(self, z: Tensor) -> Tensor:
        """The weights of every edge, written out, `(edges, out, in)`."""
        return self.message.materialize(z)[0]

    def messages(self, nodes: Tensor, z: Tensor, sources: Tensor, W: Tensor | None = None) -> Tensor:
        """The mean over the edges that lead to a node of the node that it comes from, times the edge's weights."""
        x = nodes.index_select(0, sources)
        sent = self.message(x, z) if W is None else torch.bmm(W, x.unsqueeze(2)).squeeze(2)
        return sent.unflatten(0, (len(nodes), -1)).mean(1)

    def forward(self, atoms: Tensor, edges: Tensor, sources: Tensor) -> Tensor:
        """The energy of each molecule."""
        nodes, z = self.start(atoms), self.edge(edges)
        W = self.weights(z) if self.kept else None
        for _ in range(self.rounds):
            nodes = self.gru(F.relu(self.root(nodes) + self.messages(nodes, z, sources, W)), nodes)
        size = len(sources) // len(atoms) + 1
        return self.end(self.pool(nodes.unflatten(0, (-1, size)))).squeeze(1)


def qm9(graphs: int, steps: int, every: int = 8, atoms: int = 18, features: int = 64, hidden: int = 128) -> Example:
    """The network of the molecules, `graphs` of them in a batch."""
    torch.manual_seed(0)
    energy = molecules(1000, atoms, seed=0).energy

    def batch(number: int, size: int = graphs) -> Batch:
        drawn = molecules(size, atoms, seed=2 + number)
        return *drawn[:-1], (drawn.energy - energy.mean()) / energy.std()

    sizes = (graphs * atoms * (atoms - 1), 1, hidden, features, features)
    held_out = batch(-1, max(graphs, 32))
    return Example("qm9 network", sizes, MessagePassing(features, hidden), 1e-3, steps, every, batch, held_out)


# ---- a picture


class Sine(nn.Module):
    """sin(30 h)."""

    def forward(self, h: Tensor) -> Tensor:
        """Of every element."""
        return torch.sin(30 * h)


def siren_network(features: int) -> nn.Sequential:
    """A SIREN of two hidden layers from places to colours, initialised as its authors do."""
    first, middle, last = nn.Linear(2, features), nn.Linear(features, features), nn.Linear(features, 3)
    nn.init.uniform_(first.weight, -1 / 2, 1 / 2)
    for layer in (middle, last):
        bound = math.sqrt(6 / features) / 30
        nn.init.uniform_(layer.weight, -bound, bound)
    return nn.Sequential(first, Sine(), middle, Sine(), last)


def tiles(picture: Tensor, side: int) -> Tensor:
    """Cut the middle of a picture `(height, width, 3)` into squares, `(tiles, side², 3)`, row by row."""
    height, width = (n // side * side for n in picture.shape[:2])
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    middle = picture[top : top + height, left : left + width]
    return middle.unfold(0, side, side).unfold(1, side, side).permute(0, 1, 3, 4, 2).reshape(-1, side * side, 3)


def photograph(shrink: int) -> Tensor:
    """scikit-learn's `china.jpg`, `(height, width, 3)` in [-1, 1], each pixel the mean of `shrink`² of them."""
    from sklearn.datasets import load_sample_image

    picture = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64)
    return F.avg_pool2d(picture.movedim(2, 0), shrink).movedim(0, 2) / 127.5 - 1


def siren(shrink: int, features: int, steps: int, every: int = 5, side: int = 32, hidden: int = 256) -> Example:
    """The hypernetwork of the picture: a SIREN of `features` units for each of its tiles."""
    torch.manual_seed(0)
    colours = tiles(photograph(shrink), side)
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    places = torch.cartesian_prod(axis, axis).expand(len(colours), -1, -1)
    trunk = nn.Sequential(nn.Embedding(len(colours), 64), nn.Linear(64, hidden), nn.ReLU())
    network = fasthyper.Hypernetwork(trunk, fasthyper.hyperize(siren_network(features), cond_features=hidden))
    batch = (places, torch.arange(len(colours)), colours)
    sizes = (len(colours), side * side, hidden, features, features)
    return Example("siren picture", sizes, network, 1e-4, steps, every, lambda number: batch, batch)


# ---- what is trained where

EXAMPLES: dict[str, tuple[Callable[[], Example], ...]] = {
    "cpu": (functools.partial(siren, shrink=2, features=64, steps=50), functools.partial(qm9, graphs=8, steps=56)),
    "cuda": (
        functools.partial(siren, shrink=1, features=256, steps=500),
        functools.partial(qm9, graphs=128, steps=400),
    ),
}
"""What is trained on a type of device, the longest last; on GPUs in the published sizes. The numbers of steps are
fixed, so that the clock decides nothing of what comes out."""
