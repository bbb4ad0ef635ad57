"""Graphs and definitions for the tests of graph layers."""

from __future__ import annotations

import torch
from torch import Tensor

EDGES = {
    "random": lambda: torch.randint(0, 6, (2, 30)),
    "isolated": lambda: torch.tensor([[0, 4, 4], [3, 3, 1]]),
    "duplicate": lambda: torch.tensor([[2, 2, 2, 5, 2], [1, 1, 1, 1, 0]]),
    "one target": lambda: torch.stack([torch.randint(0, 6, (40,)), torch.full((40,), 2)]),
    "none": lambda: torch.zeros(2, 0, dtype=torch.int64),
}
"""Edges between six nodes, in no order."""


def reduced(messages: Tensor, target: Tensor, targets: int, aggr: str) -> Tensor:
    """Return the sum, mean or max of the messages of each target, zero without messages, by a loop."""
    rows = []
    for t in range(targets):
        mine = messages[target == t]
        if not len(mine):
            rows.append(messages.new_zeros(messages.shape[1]))
        else:
            rows.append(mine.mean(0) if aggr == "mean" else mine.amax(0) if aggr == "max" else mine.sum(0))
    return torch.stack(rows)


def gradients(module, call, inputs, g=None):
    """Return the result of a call and its gradients with respect to inputs and parameters."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = call(module, *inputs)
    wanted = [*inputs, *module.parameters()]
    return y, *torch.autograd.grad(y, wanted, torch.ones_like(y) if g is None else g, materialize_grads=True)
