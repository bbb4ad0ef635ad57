"""Message passing on molecules, as for QM9: an edge network generates the weights of every bond.

The molecules are random. What is learnt is the electrostatic energy of their atoms, Σ_{i<j} q_i q_j / r_ij with
partial charges that depend on the element: it needs the distances, which only the edges know. The network is that of
Gilmer et al., "Neural Message Passing for Quantum Chemistry" (ICML 2017): NNConv and a GRU, a few times over, then a
sum over the atoms.

    python examples/qm9_message_passing.py
    python examples/qm9_message_passing.py --layer pyg      # PyTorch Geometric's NNConv, to compare the time
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHARGES = torch.tensor([0.4, -0.1, -0.5, -0.6, -0.3])  # partial charges of H, C, N, O, F, in units of e
DISTANCES = torch.linspace(0.5, 6.0, 16)  # Å, the centres of the edge features


class Batch(NamedTuple):
    """Molecules in one list of atoms: elements, directed edges, their features, and the molecule of each atom."""

    elements: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    molecule: Tensor
    energy: Tensor


def random_batch(molecules: int) -> Batch:
    """Return molecules of 6 to 18 atoms, each pair of which is joined by two edges, as in the paper."""
    sizes = torch.randint(6, 19, (molecules,))
    molecule = torch.repeat_interleave(sizes)
    elements = torch.randint(0, len(CHARGES), (len(molecule),))
    positions = 2 * torch.randn(len(molecule), 3)
    joined = (molecule[:, None] == molecule) & ~torch.eye(len(molecule), dtype=torch.bool)
    edge_index = joined.nonzero().T.contiguous()
    source, target = edge_index
    distance = (positions[source] - positions[target]).norm(dim=1).clamp(min=0.8)
    edge_attr = torch.exp(-2 * (distance[:, None] - DISTANCES) ** 2)
    pair = CHARGES[elements[source]] * CHARGES[elements[target]] / distance
    energy = torch.zeros(molecules).index_add(0, molecule[source], pair / 2)
    return Batch(elements, edge_index, edge_attr, molecule, energy)


class MessagePassing(nn.Module):
    """Embed the elements, pass messages, update the atoms by a GRU, and add up what the atoms give."""

    def __init__(self, conv: type[nn.Module], width: int, hidden: int, steps: int) -> None:
        super().__init__()
        edge_network = nn.Sequential(nn.Linear(len(DISTANCES), hidden), nn.ReLU(), nn.Linear(hidden, width * width))
        self.embedding = nn.Embedding(len(CHARGES), width)
        self.conv = conv(width, width, edge_network, aggr="mean", root_weight=False)
        self.gru = nn.GRUCell(width, width)
        self.readout = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.steps = steps

    def forward(self, batch: Batch) -> Tensor:
        start = h = self.embedding(batch.elements)
        for _ in range(self.steps):
            h = self.gru(torch.relu(self.conv(h, batch.edge_index, batch.edge_attr)), h)
        atoms = self.readout(torch.cat([start, h], 1)).squeeze(1)
        return atoms.new_zeros(len(batch.energy)).index_add(0, batch.molecule, atoms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", choices=["fasthyper", "pyg"], default="fasthyper")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--molecules", type=int, default=16, help="in a batch")
    parser.add_argument("--width", type=int, default=32, help="features of an atom")
    parser.add_argument("--hidden", type=int, default=64, help="hidden features of the edge network")
    args = parser.parse_args()

    if args.layer == "pyg":
        try:
            from torch_geometric.nn import NNConv
        except ImportError:
            parser.error("--layer pyg needs PyTorch Geometric: pip install torch-geometric")
    else:
        from fasthyper.nn import NNConv

    torch.manual_seed(0)
    batches = [random_batch(args.molecules) for _ in range(args.batches)]
    energies = torch.cat([batch.energy for batch in batches])
    model = MessagePassing(NNConv, args.width, args.hidden, steps=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        for batch in batches:
            loss = nn.functional.mse_loss(model(batch), (batch.energy - energies.mean()) / energies.std())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(batches):.4f}, {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
