"""How z reaches the layers nested in a primary network: one value per thread, set by `Hypernetwork`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Delivery(threading.local):
    """One z per thread. Dynamo refuses contextvars, and attributes or buffers of the modules would mix up threads."""

    z: Tensor | dict[nn.Module, Tensor] | None
    backward: int | None

    # In every thread anew: torch 2.11's Dynamo would prefer a default of the class to what a thread has set.
    def __init__(self) -> None:
        self.z = None
        self.backward = None


_delivery = _Delivery()


def _backward() -> int | None:
    """Return which backward pass this runs in, -1 outside of any, None where it is not known (compiled code).

    A checkpoint in a primary is recomputed in a backward pass, and that may run within the forward of another
    Hypernetwork, whose z it must not meet.
    """
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _is_for_here(backward: int | None) -> bool:
    return torch.compiler.is_compiling() or backward is None or backward == _backward()


@contextmanager
def deliver(z: Tensor | dict[nn.Module, Tensor]) -> Iterator[None]:
    """Layers called inside, in this thread, find z; what was delivered before comes back at the end."""
    outer = _delivery.z, _delivery.backward
    _delivery.z, _delivery.backward = z, _backward()
    try:
        yield
    finally:
        _delivery.z, _delivery.backward = outer


def delivered(layer: nn.Module) -> Tensor:
    """The `z` for `layer`.

    Raises:
        ValueError: nothing is delivered to it; the message says how that happens.
    """
    z = _delivery.z if _is_for_here(_delivery.backward) else None
    if isinstance(z, dict):
        z = z.get(layer)
    if z is None:
        raise ValueError(
            f"{type(layer).__name__} was called with no z. Pass it, layer(x, z), or call the layer in the "
            "primary of a Hypernetwork, whose forward delivers z. A layer of a primary meets no z when it is "
            "called outside of that forward; when activation checkpointing inside the primary recomputes it "
            "in the backward pass (checkpoint the whole Hypernetwork instead); when the primary runs it in "
            "another thread (as DataParallel does); or when the trunk returns a dict and the layer is no "
            "submodule of the primary."
        )
    return z
