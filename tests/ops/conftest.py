"""Make the helpers of this folder importable by name; fixtures of the tests of `primary`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fasthyper.ops.primary import ACTIVATIONS

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return request.param


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f, backend="aot_eager": torch.compile(f, fullgraph=True, backend=backend)
    torch._dynamo.reset()
