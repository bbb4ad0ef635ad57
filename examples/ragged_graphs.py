"""Weights for each graph, on graphs of different sizes: a Hypernetwork with an Incidence.

A graph is a cloud of atoms that was measured by an instrument of its own, turned, scaled and with a distortion. A
short description of the instrument is known. The hypernetwork generates from it a small network for each graph, which
maps the measured position of every atom to the true one. All atoms of all graphs are in one list, without padding.

    python examples/ragged_graphs.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import fasthyper
from fasthyper import Incidence


def random_graphs(graphs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return measured positions, instruments, true positions, and where each graph begins in the list of atoms."""
    sizes = torch.randint(5, 31, (graphs,))
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    graph = torch.repeat_interleave(sizes)
    angle, scale, bend = 6.28 * torch.rand(graphs), 0.5 + torch.rand(graphs), torch.randn(graphs)
    instrument = torch.stack([angle.cos(), angle.sin(), scale, bend], 1)
    measured = torch.randn(len(graph), 2)
    x, y = measured.T
    y = y + 0.3 * bend[graph] * x.sin()
    cos, sin = angle.cos()[graph], angle.sin()[graph]
    true = torch.stack([cos * x - sin * y, sin * x + cos * y], 1) * scale[graph, None]
    return measured, instrument, true, ptr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--graphs", type=int, default=64, help="in a batch")
    parser.add_argument("--width", type=int, default=32, help="of the generated network")
    parser.add_argument("--hidden", type=int, default=64, help="features of z")
    args = parser.parse_args()

    torch.manual_seed(0)
    batches = []
    for _ in range(args.batches):
        measured, instrument, true, ptr = random_graphs(args.graphs)
        batches.append((measured, instrument, true, Incidence.from_ptr(ptr)))  # made once: it keeps the order of atoms
        # With the graph of each atom instead, in any order: Incidence.from_batch(graph, num_conds=args.graphs)

    network = nn.Sequential(nn.Linear(2, args.width), nn.Tanh(), nn.Linear(args.width, 2))
    trunk = nn.Sequential(nn.Linear(4, args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.hidden), nn.ReLU())
    model = fasthyper.Hypernetwork(trunk, fasthyper.hyperize(network, cond_features=args.hidden))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        for measured, instrument, true, incidence in batches:
            loss = nn.functional.mse_loss(model(measured, instrument, incidence=incidence), true)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(batches):.4f}, {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
