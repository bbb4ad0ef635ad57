"""Pass z and an incidence to the layers inside a primary network, without arguments: `deliver`.

`Hypernetwork.forward` runs its primary inside ``with deliver(z, incidence):``. A generated layer that is called there
without a z, in the same thread, takes ``current_z(layer)``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.incidence import Incidence
from fasthyper.nn.recomputed_z import Given, note, recomputed_z
from fasthyper.nn.reused import Reused
from fasthyper.nn.tracing import is_proxy
from fasthyper.ops import checkpoints


class _Entry:
    """Where eager code entered `deliver`: within which backward pass and which checkpoints."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.backward_id = checkpoints.backward_id()
        self.running: list[Any]
        self.recomputed: Any
        self.running, self.recomputed = checkpoints.active() if checkpoints.may_be_active() else ([], None)
        self.given: Given | None = None
        self.reused = Reused()


class _Current(threading.local):
    """What is delivered in this thread.

    Dynamo does not trace contextvars, and threads would share an attribute or a buffer of the modules.
    """

    z: Tensor | Mapping[nn.Module, Any] | None
    incidence: Incidence | None
    repeat: bool
    entry: _Entry | None

    # In __init__, which runs once per thread: torch 2.11's Dynamo reads a class default instead of a thread's value.
    def __init__(self) -> None:
        self.z = None
        self.incidence = None
        self.repeat = False
        self.entry = None


_current = _Current()


def _set(z: Any, incidence: Incidence | None, repeat: bool, entry: _Entry | None) -> None:
    _current.z, _current.incidence, _current.repeat, _current.entry = z, incidence, repeat, entry


@contextmanager
def deliver(
    z: Tensor | Mapping[nn.Module, Any], incidence: Incidence | None = None, repeat_z: bool = False
) -> Iterator[None]:
    """Deliver z to all generated layers that are called with no z inside the ``with`` block.

    :class:`~fasthyper.nn.Hypernetwork` does this for its primary's forward. This is for other methods of a primary,
    such as ``generate()`` or ``forward_features()``, and for many calls with one z. Where the trunk returns a dict,
    :meth:`Hypernetwork.deliver <fasthyper.nn.Hypernetwork.deliver>` finds the layer of each z.

    z is delivered in this thread alone. It does not reach other threads, and it does not follow a coroutine: a block
    must not contain an ``await`` or a ``yield`` during which the same thread may call other layers. At the end of the
    block, also after an exception, the z of an outer block is current again. Activation checkpoints inside the block
    recompute their layers with its z, whenever and wherever their backward runs.

    Args:
        z: ``(B, R)`` for all layers; or for each layer, by the module, a z or a pair of them, for the weight and for
            the bias.
        incidence: which rows of x, z and the result belong to each term of a sum, for every layer that takes this z.
            None means that row b of x meets row b of z, even if an outer block has an incidence.
        repeat_z: if True, a layer may have k·B rows for B rows of z: k consecutive rows of an instance meet its z.

    Raises:
        TypeError: z is neither a tensor nor a mapping from modules to tensors, or ``incidence`` or ``repeat_z`` is of
            another type.
        ValueError: there is an incidence, and ``repeat_z`` is True.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fasthyper
        >>> net = fasthyper.hyperize(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), cond_features=16)
        >>> z = torch.randn(5, 16)
        >>> with fasthyper.deliver(z):
        ...     hidden = net[0](torch.randn(5, 100, 2))
        >>> hidden.shape
        torch.Size([5, 100, 8])
    """
    check_delivery(incidence, repeat_z)
    _check_z(z)
    outer = _current.z, _current.incidence, _current.repeat, _current.entry
    if torch.compiler.is_compiling():
        checkpoints.in_compiled_code(_set, z, incidence, repeat_z, None)
    else:
        _set(z, incidence, repeat_z, _Entry())
    try:
        yield
    finally:
        if torch.compiler.is_compiling():
            checkpoints.in_compiled_code(_set, *outer)
        else:
            _set(*outer)


def check_delivery(incidence: Incidence | None, repeat_z: bool) -> None:
    """Check what is delivered beside z."""
    if is_proxy(incidence):
        return
    if incidence is not None and not isinstance(incidence, Incidence):
        raise TypeError(f"incidence must be a fasthyper.Incidence, got {type(incidence).__name__}")
    if not isinstance(repeat_z, bool):
        raise TypeError(f"repeat_z must be a bool, got {type(repeat_z).__name__}")
    if incidence is not None and repeat_z:
        raise ValueError("incidence must be None with repeat_z=True: both say which rows of x meet which z")


def is_running() -> bool:
    """Return whether a primary runs in this thread, with a z."""
    return _current.z is not None


def _check_z(z: Any) -> None:
    if isinstance(z, Tensor) or is_proxy(z):
        return
    if not isinstance(z, Mapping):
        raise TypeError(f"z must be a tensor, or a dict with the z of each layer, got a {type(z).__name__}")
    for layer, value in z.items():
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"the keys of z must be the layers themselves, got {layer!r}; Hypernetwork.deliver takes the dict of a "
                "trunk, whose keys are names"
            )
        pair = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(isinstance(t, Tensor) for t in pair):
            raise TypeError(
                f"z must have a tensor, or a pair of tensors, for each layer, got a {type(value).__name__} for a "
                f"{type(layer).__name__}"
            )


def current_z(layer: nn.Module) -> tuple[Any, Incidence | None, bool]:
    """Return the current z for `layer`, the incidence that belongs to it, and whether z is repeated.

    The z is a tensor, or a pair of them: for the weight and for the bias.

    Raises:
        ValueError: there is none; the message lists the possible causes.
    """
    if torch.compiler.is_compiling():
        z, incidence, repeat = _current.z, _current.incidence, _current.repeat
        found = (_of_layer(z, layer), incidence, repeat)
    else:
        found = _in_eager(layer)
    if found[0] is None:
        raise ValueError(
            f"{type(layer).__name__} was called with no z. Pass it, layer(x, z); or call the layer inside the primary "
            "of a Hypernetwork, whose forward provides z, or in `with fasthyper.deliver(z):`. There is no z outside "
            "of these; when the primary runs the layer in another thread (as DataParallel does); when a function other "
            "than torch.utils.checkpoint recomputes the layer in the backward pass, or when the layer is compiled "
            "inside of a checkpoint that is not (checkpoint the whole Hypernetwork instead); or when z is given by "
            "layer, as by a trunk that returns a dict, and the layer is no submodule of the primary."
        )
    return found


def _of_layer(z: Any, layer: nn.Module) -> Any:
    return z.get(layer) if isinstance(z, Mapping) else z


def _in_eager(layer: nn.Module) -> tuple[Any, Incidence | None, bool]:
    """Return what is delivered to a layer here: by the block around it, or by the one around a recomputed checkpoint.

    A recomputation may run within a block of another network, whose z it must not take: so the block counts only if it
    was entered in the same backward pass and the same recomputation.
    """
    entry, now = _current.entry, checkpoints.backward_id()
    running: list[Any] = []
    recomputed: Any = None
    # A checkpoint with use_reentrant=True runs without gradients, and leaves no other trace than the stack.
    if checkpoints.may_be_active() or (entry is not None and entry.grad and not torch.is_grad_enabled()):
        running, recomputed = checkpoints.active()
    # With no entry, compiled code set z. If a backward pass runs now, it may be another one: an error is better than a
    # wrong z.
    same = now < 0 and recomputed is None
    if entry is not None:
        same = entry.backward_id == now and entry.recomputed is recomputed
    if _current.z is not None and same:
        if entry is not None and (inside := [c for c in running if all(c is not other for other in entry.running)]):
            entry.given = entry.given or Given(_current.z, _current.incidence, _current.repeat)
            note(inside, entry.given)
        return _of_layer(_current.z, layer), _current.incidence, _current.repeat
    found = recomputed_z(recomputed, running, lambda z: _of_layer(z, layer))
    if found is None:
        return None, None, False
    z, given = found
    return z, given.incidence, given.repeat


def product_of_reused(layer: nn.Module, x: Any, z: Any) -> Tensor | None:
    """Return y of a HyperLinear whose z the current block delivers again and again; None if W is not written out."""
    if torch.compiler.is_compiling() or _current.entry is None:
        return None
    return _current.entry.reused.product(layer, x, z)


def tied(y: Any) -> Any:
    """Return the result of a primary, such that the backward pass reaches the current z if checkpoints alone use it."""
    if torch.compiler.is_compiling() or _current.entry is None or _current.entry.given is None:
        return y
    return _current.entry.given.tied(y)
