"""Pass z and an incidence to the layers inside a primary network, without arguments.

`Hypernetwork.forward` runs its primary inside ``with use_z(z, incidence):``. A `HyperLinear` that is called there
without a z, in the same thread, takes ``current_z(layer)``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.incidence import Incidence


class _Current(threading.local):
    """The z and the incidence of this thread.

    Dynamo does not trace contextvars, and threads would share an attribute or a buffer of the modules.
    """

    z: Tensor | dict[nn.Module, Any] | None
    incidence: Incidence | None
    repeat: bool
    backward_id: int | None

    # In __init__, which runs once per thread: torch 2.11's Dynamo reads a class default instead of a thread's value.
    def __init__(self) -> None:
        self.z = None
        self.incidence = None
        self.repeat = False
        self.backward_id = None


_current = _Current()


def _backward_id() -> int | None:
    """Return the id of the running backward pass: -1 outside of any, None in compiled code, where it is unknown.

    A checkpoint inside a primary is recomputed in a backward pass. This pass may run during the forward of another
    Hypernetwork, and must not use the z of the other one.
    """
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _may_be_same_backward(backward_id: int | None) -> bool:
    # Either id may come from compiled code: Dynamo may compile `_backward_id` alone, not its caller. If compiled code
    # set z, a backward pass that runs now may be another one: an error is better than a wrong z.
    now = _backward_id()
    if now is None:
        return True
    return now < 0 if backward_id is None else backward_id == now


@contextmanager
def use_z(z: Tensor | dict[nn.Module, Any], incidence: Incidence | None = None, repeat: bool = False) -> Iterator[None]:
    """Make z, or the z of each layer, and the incidence current in this thread; restore the previous ones at the end.

    Without an incidence, none is current inside: that of an outer network belongs to the outer z. With `repeat`, each
    row of z is for as many consecutive rows of a layer's input as these are more.
    """
    outer = _current.z, _current.incidence, _current.repeat, _current.backward_id
    _current.z, _current.incidence, _current.repeat, _current.backward_id = z, incidence, repeat, _backward_id()
    try:
        yield
    finally:
        _current.z, _current.incidence, _current.repeat, _current.backward_id = outer


def repeats_z() -> bool:
    """Return whether the current z is for several consecutive rows of a layer's input."""
    return _current.repeat


def current_z(layer: nn.Module) -> tuple[Any, Incidence | None]:
    """Return the current z for `layer`, and the incidence that belongs to it.

    The z is a tensor, or a pair of them: for the weight and for the bias.

    Raises:
        ValueError: there is none; the message lists the possible causes.
    """
    z = _current.z if _may_be_same_backward(_current.backward_id) else None
    if isinstance(z, dict):
        z = z.get(layer)
    if z is None:
        raise ValueError(
            f"{type(layer).__name__} was called with no z. Pass it, layer(x, z), or call the layer inside the "
            "primary of a Hypernetwork, whose forward provides z. There is no z outside of that forward; when "
            "activation checkpointing inside the primary recomputes the layer in the backward pass (checkpoint "
            "the whole Hypernetwork instead); when the primary runs the layer in another thread (as DataParallel "
            "does); or when the trunk returns a dict and the layer is no submodule of the primary."
        )
    return z, _current.incidence
