"""Make the helpers of this folder importable by name, and share fixtures."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["one z", "a z per layer"])
def model(request):
    """Return a hypernetwork of two generated layers, with one z for both or one for each."""
    from small_networks import R, TrunkByName, primary
    from torch import nn

    from fasthyper.nn import Hypernetwork

    trunk = nn.Linear(6, R) if request.param == "one z" else TrunkByName("0", "2")
    return Hypernetwork(trunk, primary())
