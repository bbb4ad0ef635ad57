"""Helpers of the tests of checkpoints inside a primary: networks with them, and the same networks without."""

import pytest
import torch
from small_networks import R, fill
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasthyper.nn import HyperLinear

KINDS = pytest.mark.parametrize("reentrant", [False, True])


def layers(n=3):
    return nn.Sequential(*[nn.Sequential(HyperLinear(4, 4, R), nn.Tanh()) for _ in range(n)]).apply(fill)


class Blocks(nn.Module):
    """Three blocks, of which some are checkpointed; x passes through a parameter of its own, as an embedding does."""

    def __init__(self, reentrant, which=(0, 1, 2), nested=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.blocks, self.reentrant, self.which, self.nested = layers(), reentrant, which, nested

    def forward(self, x):
        x = x * self.scale
        for i, block in enumerate(self.blocks):
            x = self.run(block, x) if i in self.which else block(x)
        return x

    def run(self, block, x):
        if self.nested:
            inner = block
            block = lambda x: torch.sin(checkpoint(inner, inner[0](x), use_reentrant=self.reentrant))
        return checkpoint(block, x, use_reentrant=self.reentrant)

    def plain(self, x):
        x = x * self.scale
        for i, block in enumerate(self.blocks):
            x = torch.sin(block(block[0](x))) if self.nested and i in self.which else block(x)
        return x


class DeepTrunk(nn.Module):
    """A trunk whose graph keeps tensors, so that it can run backward once; with names, one z for each."""

    def __init__(self, *names):
        super().__init__()
        self.body, self.names = nn.Sequential(nn.Linear(6, R), nn.Tanh(), nn.Linear(R, R), nn.Sigmoid()), names

    def forward(self, cond):
        z = self.body(cond)
        return {name: z * (i + 1) for i, name in enumerate(self.names)} if self.names else z


def grads(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_without(model, x, cond, run=None, plain=None):
    with_checkpoints = grads(model, (run or model)(x, cond))
    expected = grads(model, (plain or without(model))(x, cond))
    assert expected
    torch.testing.assert_close(with_checkpoints, expected)


def without(model):
    def run(x, cond):
        with model.deliver(cond) as primary:
            return primary.plain(x)

    return run


NAMES = ("blocks.0.0", "blocks.1.0", "blocks.2.0")
TRUNKS = {"one z": (), "by name": NAMES}
