"""The networks that `training.py` trains, with their data: their weights are generated per edge or per image.

**"qm9 network"**: the edge-conditioned message passing network of Gilmer et al., "Neural Message Passing for Quantum
Chemistry" (ICML 2017, arXiv 1704.01212), in the sizes of PyTorch Geometric's `examples/qm9_nn_conv.py`. The five
features of an edge generate 64 × 64 weights, which transform its message. Graphs are complete. Three rounds use the
same weights. Each round generates them again, as in PyTorch Geometric; if the network has `kept` set, they are written
out once. Nothing is downloaded. Molecules are drawn at random: 18 atoms of five elements, uniform in a ball
of random size, with bonds between close atoms. The target is their standardised energy, the sum of q q' / √(1 + d²)
over all pairs; half of its variance comes from the elements, half from the distances. No molecule is used twice, and
the loss is over molecules that are not trained on.

**"siren picture"**: Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions" (NeurIPS
2020, arXiv 2006.09661), section 4.4: a hypernetwork generates a network with sine activations, which maps a position in
an image to its colour. Here the images are the tiles of one photograph, scikit-learn's `china.jpg`, and each tile has a
learned code. The loss is the mean squared error over all pixels, with values in [-1, 1].
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
"""The arguments of a network, then the target of its result."""


@dataclass(frozen=True)
class Example:
    """A network and how to train it.

    Attributes:
        name: in the records.
        sizes: B, N, R, I and O of the generated layer that takes most of the time.
        network: with its initial weights; it is copied before training.
        rate: Adam's learning rate.
        steps: the number of steps.
        every: steps between two measurements of the loss.
        batch: returns the batch of a step, by its number.
        held_out: the batch that the loss is measured on.
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

CHARGES = (0.5, 0.75, 1.0, 1.25, 1.5)
"""The charge of each element."""


class Molecules(NamedTuple):
    """Molecules of a batch. Atoms are ordered by molecule, edges by the atom at their end.

    Attributes:
        atoms: elements as one-hot vectors, `(atoms, 5)`.
        edges: the bond as a one-hot vector of 4, zero between distant atoms, then the distance, `(edges, 5)`.
        sources: the atom at the start of each edge, `(edges,)`.
        energy: `(molecules,)`.
    """

    atoms: Tensor
    edges: Tensor
    sources: Tensor
    energy: Tensor


def complete(graphs: int, atoms: int) -> Tensor:
    """Return the sources of all edges of complete graphs, `(graphs · atoms · (atoms - 1),)`, ordered by target."""
    node = torch.arange(atoms)
    others = node.expand(atoms, atoms)[node[:, None] != node]
    return (others + atoms * torch.arange(graphs)[:, None]).flatten()


def molecules(graphs: int, atoms: int, seed: int) -> Molecules:
    """Draw random molecules in float64."""
    draw = torch.Generator().manual_seed(seed)
    elements = torch.randint(len(CHARGES), (graphs, atoms), generator=draw)
    positions = F.normalize(torch.randn(graphs, atoms, 3, generator=draw, dtype=torch.float64), dim=-1)
    positions *= torch.rand(graphs, atoms, 1, generator=draw, dtype=torch.float64) ** (1 / 3)  # uniform in a ball
    positions *= 1 + 1.5 * torch.rand(graphs, 1, 1, generator=draw, dtype=torch.float64)
    distance = torch.cdist(positions, positions)
    apart = ~torch.eye(atoms, dtype=torch.bool)
    charge = torch.tensor(CHARGES, dtype=torch.float64)[elements]
    pair = charge[:, :, None] * charge[:, None, :] / (1 + distance.square()).sqrt()
    bond = (distance / 0.25).long()[..., None] == torch.arange(4)
    edges = torch.cat([bond.to(distance), distance[..., None]], -1)[:, apart]
    one_hot = F.one_hot(elements, len(CHARGES)).to(positions)
    return Molecules(one_hot.flatten(0, 1), edges.flatten(0, 1), complete(graphs, atoms), pair[:, apart].sum(1) / 2)


class Set2Set(nn.Module):
    """A graph's features by repeated attention of an LSTM (Vinyals, Bengio, Kudlur, "Order Matters", ICLR 2016)."""

    def __init__(self, features: int, passes: int = 3) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(2 * features, features)
        self.passes = passes

    def forward(self, nodes: Tensor) -> Tensor:
        """Return `(graphs, 2 · features)` for nodes `(graphs, nodes, features)`."""
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
        hidden: units of the network that generates an edge's weights.
        rounds: of message passing.
    """

    def __init__(self, features: int = 64, hidden: int = 128, rounds: int = 3) -> None:
        super().__init__()
        self.rounds, self.kept = rounds, False
        self.start = nn.Sequential(nn.Linear(len(CHARGES), features), nn.ReLU())
        self.edge = nn.Sequential(nn.Linear(5, hidden), nn.ReLU())
        self.message = fasthyper.HyperLinear(features, features, cond_features=hidden, bias=False)
        self.message.reset_parameters(z_second_moment=0.5)
        self.root = nn.Linear(features, features)
        self.gru = nn.GRUCell(features, features)
        self.pool = Set2Set(features)
        self.end = nn.Sequential(nn.Linear(2 * features, features), nn.ReLU(), nn.Linear(features, 1))

    def weights(self, z: Tensor) -> Tensor:
        """Return the weights of every edge, `(edges, out, in)`."""
        return self.message.materialize(z)[0]

    def messages(self, nodes: Tensor, z: Tensor, sources: Tensor, W: Tensor | None = None) -> Tensor:
        """Return the mean over incoming edges of the source node's features times the edge's weights."""
        x = nodes.index_select(0, sources)
        sent = self.message(x, z) if W is None else torch.bmm(W, x.unsqueeze(2)).squeeze(2)
        return sent.unflatten(0, (len(nodes), -1)).mean(1)

    def forward(self, atoms: Tensor, edges: Tensor, sources: Tensor) -> Tensor:
        """Return the energy of each molecule."""
        nodes, z = self.start(atoms), self.edge(edges)
        W = self.weights(z) if self.kept else None
        for _ in range(self.rounds):
            nodes = self.gru(F.relu(self.root(nodes) + self.messages(nodes, z, sources, W)), nodes)
        size = len(sources) // len(atoms) + 1
        return self.end(self.pool(nodes.unflatten(0, (-1, size)))).squeeze(1)


def qm9(graphs: int, steps: int, every: int = 8, atoms: int = 18, features: int = 64, hidden: int = 128) -> Example:
    """Return the example of the molecules, with `graphs` of them in a batch."""
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
        """Apply it to every element."""
        return torch.sin(30 * h)


def siren_network(features: int) -> nn.Sequential:
    """Return a SIREN with two hidden layers from positions to colours, initialised as in the paper."""
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
    """Return scikit-learn's `china.jpg`, `(height, width, 3)` in [-1, 1]; each pixel is a mean of `shrink`² pixels."""
    from sklearn.datasets import load_sample_image

    picture = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64)
    return F.avg_pool2d(picture.movedim(2, 0), shrink).movedim(0, 2) / 127.5 - 1


def siren(shrink: int, features: int, steps: int, every: int = 5, side: int = 32, hidden: int = 256) -> Example:
    """Return the example of the picture: a hypernetwork generates a SIREN of `features` units for each tile."""
    torch.manual_seed(0)
    colours = tiles(photograph(shrink), side)
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    positions = torch.cartesian_prod(axis, axis).expand(len(colours), -1, -1)
    trunk = nn.Sequential(nn.Embedding(len(colours), 64), nn.Linear(64, hidden), nn.ReLU())
    network = fasthyper.Hypernetwork(trunk, fasthyper.hyperize(siren_network(features), cond_features=hidden))
    batch = (positions, torch.arange(len(colours)), colours)
    sizes = (len(colours), side * side, hidden, features, features)
    return Example("siren picture", sizes, network, 1e-4, steps, every, lambda number: batch, batch)


# ---- all examples

EXAMPLES: dict[str, tuple[Callable[[], Example], ...]] = {
    "cpu": (functools.partial(siren, shrink=2, features=64, steps=50), functools.partial(qm9, graphs=8, steps=56)),
    "cuda": (
        functools.partial(siren, shrink=1, features=256, steps=500),
        functools.partial(qm9, graphs=128, steps=400),
    ),
}
"""The examples by kind of device, the longest last; on GPUs in the published sizes. The number of steps is fixed, so
that results do not depend on speed."""
