"""Autocast: the public functions cast their arguments once; everything below runs with autocast off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from .register import MISSING, transformed


def enabled(device: str) -> bool:
    """Return whether autocast is on for a type of device. torch raises for the meta device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def off(t: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off: an op computes in the dtype of its arguments.

    Otherwise autocast would cast the matrix products inside a kernel, and those inside a backward.
    """
    device = t.device.type
    return torch.autocast(device, enabled=False) if enabled(device) else nullcontext()


def follow(t: Any) -> Any:
    """Cast a tensor to the region's dtype, as `nn.Linear` does: floating point tensors, but not float64.

    The region's own cache keeps one copy of each parameter, however often it is used. Without gradients the copy would
    have no graph, and a later call with gradients would take it from the cache.
    """
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    cached = t.is_leaf and t.requires_grad and torch.is_grad_enabled() and not MISSING
    if cached and not torch.compiler.is_compiling() and not transformed() and compiled.load("eager") is None:
        return torch.ops.fasthyper_eager.cached_cast(t)
    return t.to(torch.get_autocast_dtype(t.device.type))
