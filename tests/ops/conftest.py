"""Make the helpers of this folder importable by name, and share fixtures."""

from __future__ import annotations

import contextlib
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


@pytest.fixture
def unless_torch_fails():
    """Return a context that skips the test if torch cannot compile the same for a function of its own operations."""

    @contextlib.contextmanager
    def context(of_torch):
        try:
            yield
        except torch._dynamo.exc.UserError as ours:
            try:
                of_torch()
            except torch._dynamo.exc.UserError as theirs:
                pytest.skip(f"torch {torch.__version__} cannot compile it: {str(theirs).strip().splitlines()[0]}")
            raise ours

    return context
