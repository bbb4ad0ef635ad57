"""Make the helpers of this folder importable by name, and share fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fasthyper.ops.primary import ACTIVATIONS

sys.path.insert(0, str(Path(__file__).parent))

from mapped_layers import PHI, snake


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return request.param


@pytest.fixture(params=[*PHI, snake], ids=lambda m: m if isinstance(m, str) else m.__name__)
def weight_map(request):
    return request.param


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f, backend="aot_eager": torch.compile(f, fullgraph=True, backend=backend)
    torch._dynamo.reset()
