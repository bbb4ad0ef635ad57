"""Meta-learning: the head of a generated layer adapts to each task by gradient steps of its own, as in MAML.

A task is a family of sine waves with an amplitude and a phase of its own; each instance is one frequency, and z
describes it. From the points of some instances, the inner loop changes the head; the outer loop learns a start from
which a few inner steps suffice. All tasks run in one call: `vmap` over heads that differ.

    python examples/maml.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fasthyper.nn import HyperLinear


class Waves(nn.Module):
    """Maps points of an instance to values, by a network whose last layer is generated from the instance's z."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.trunk = nn.Sequential(nn.Linear(1, width), nn.Tanh())
        self.layer = HyperLinear(width, 1, cond_features=width)

    def forward(self, x: Tensor, frequency: Tensor) -> Tensor:
        return self.layer(self.features(x), self.trunk(frequency))


def random_tasks(tasks: int, instances: int = 4, points: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Return points (tasks, instances, points, 1), frequencies (tasks, instances, 1), and values at the points."""
    amplitude, phase = 1 + torch.rand(tasks, 1, 1, 1), 3 * torch.rand(tasks, 1, 1, 1)
    frequency = 0.5 + torch.rand(tasks, instances, 1)
    x = 4 * torch.rand(tasks, instances, points, 1) - 2
    return x, frequency, amplitude * (frequency[:, :, None] * x + phase).sin()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--tasks", type=int, default=32, help="in a batch")
    parser.add_argument("--steps", type=int, default=3, help="of the inner loop")
    parser.add_argument("--rate", type=float, default=0.1, help="of the inner loop")
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Waves(args.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_of(params: dict[str, Tensor], x: Tensor, frequency: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(functional_call(model, params, (x, frequency)), y)

    def loss_after_adapting(params: dict[str, Tensor], seen: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        for _ in range(args.steps):
            gradients = grad(loss_of)(params, *seen)
            adapted = {name: params[name] - args.rate * gradients[name] for name in params if "layer" in name}
            params = {**params, **adapted}
        return loss_of(params, *new)

    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        for _ in range(args.batches):
            x, frequency, y = random_tasks(args.tasks)
            seen, new = (x[:, :2], frequency[:, :2], y[:, :2]), (x[:, 2:], frequency[:, 2:], y[:, 2:])
            losses = vmap(loss_after_adapting, (None, 0, 0))(dict(model.named_parameters()), seen, new)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            total += losses.mean().item()
        print(f"epoch {epoch + 1}: loss {total / args.batches:.4f}, {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
