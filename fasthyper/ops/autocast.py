"""Autocast: followed once, at the public function, and off in everything below."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def enabled(device: str) -> bool:
    """Whether the region is under autocast for this device type; asking for the meta device raises."""
    return device != "meta" and torch.is_autocast_enabled(device)


def off(t: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off: an op computes in the dtype of its arguments, whatever region it is called in.

    Without it, autocast would reach the matrix products inside of a kernel, and inside of a backward.
    """
    device = t.device.type
    return torch.autocast(device, enabled=False) if enabled(device) else nullcontext()


def follow(t: Any) -> Any:
    """Cast to the region's dtype as `nn.Linear` does: floating point tensors, but not float64."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))
