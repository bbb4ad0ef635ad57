"""Small hypernetworks and their parts, shared by the tests of this folder."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasthyper.nn import HyperLinear

R, B = 7, 9


def primary():
    """Return two generated layers with nonzero parameters."""
    return nn.Sequential(HyperLinear(4, 5, R), nn.Tanh(), HyperLinear(5, 3, R)).apply(fill)


def fill(module):
    if isinstance(module, HyperLinear):
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)


class TrunkByName(nn.Module):
    """A trunk that returns one z per layer name."""

    def __init__(self, *names):
        super().__init__()
        self.trunks = nn.ModuleDict({name.replace(".", "_"): nn.Linear(6, R) for name in names})
        self.names = names

    def forward(self, cond):
        return {name: self.trunks[name.replace(".", "_")](cond) for name in self.names}


class Returns(nn.Module):
    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, cond):
        return self.z


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=False)


def data(b=B):
    return torch.randn(b, 4), torch.randn(b, 6)


def by_hand(model, x, cond):
    """Run the sequential primary with z passed to each layer."""
    z = model.trunk(cond)
    for name, layer in model.primary.named_children():
        x = layer(x, z[name] if isinstance(z, dict) else z) if isinstance(layer, HyperLinear) else layer(x)
    return x
