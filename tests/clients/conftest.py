"""A small hypernetwork and its data, for the libraries that train it. A test is skipped if its library is missing."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fasthyper

sys.path.insert(0, str(Path(__file__).parent.parent / "nn"))
R = 8


@pytest.fixture(autouse=True, scope="session")
def ops_of_torchvision():
    """Define the ops that torchvision registers fakes for: a torchvision without its binaries then imports."""
    from other_libraries import define_ops_of_torchvision

    define_ops_of_torchvision()


@pytest.fixture
def model():
    """Return a Hypernetwork for fields of two coordinates, with every parameter in use."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    return fasthyper.Hypernetwork(nn.Sequential(nn.Linear(3, R), nn.Tanh()), fasthyper.hyperize(net, cond_features=R))


@pytest.fixture
def data():
    """Return x, cond and y of 32 instances with 10 points each."""
    torch.manual_seed(1)
    x, cond = torch.rand(32, 10, 2), torch.randn(32, 3)
    return x, cond, (x * cond[:, None, :2]).sum(-1, keepdim=True)
