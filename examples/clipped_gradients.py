"""Clip the gradient of each instance, as private training does, without forming these gradients.

An instance's gradient of a generated layer has the size of the head. Its norm follows from x, z and the gradient of
the output alone. So a first backward finds the norms, and a second one, of a weighted loss, the sum of the clipped
gradients. Some instances have wrong targets: clipping bounds what they can do.

    python examples/clipped_gradients.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from fasthyper.nn import HyperLinear, per_sample_norm_sq


def clipped_step(layer: HyperLinear, x: Tensor, z: Tensor, y: Tensor, most: float) -> Tensor:
    """Set the gradients of a layer to the mean of the instances' gradients, each clipped; return the losses."""
    predicted = layer(x, z)
    losses = (predicted - y).square().flatten(1).mean(1)
    (g,) = torch.autograd.grad(losses.sum(), predicted, retain_graph=True)
    extended = torch.cat([z, z.new_ones(len(z), 1)], 1)  # base and head have the same x and g: norms of [z, 1]
    norms = per_sample_norm_sq(x, extended, g).sqrt()
    weights = (most / norms.clamp(min=1e-12)).clamp(max=1.0)
    (losses * weights).mean().backward()
    return losses.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--instances", type=int, default=64, help="in a batch")
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=16, help="features of z")
    parser.add_argument("--most", type=float, default=0.5, help="the largest norm")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = args.width, args.width, args.hidden
    truth, layer = (HyperLinear(*sizes, bias=False) for _ in range(2))
    x = torch.randn(args.batches, args.instances, args.points, args.width)
    z = torch.randn(args.batches, args.instances, args.hidden)
    with torch.no_grad():
        y = torch.stack([truth(*batch) for batch in zip(x, z, strict=True)])
        y[:, ::16] *= -20  # wrong targets
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        for batch in zip(x, z, y, strict=True):
            optimizer.zero_grad()
            losses = clipped_step(layer, *batch, args.most)
            optimizer.step()
            total += losses.median().item()
        print(f"epoch {epoch + 1}: loss {total / len(x):.4f}, {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
