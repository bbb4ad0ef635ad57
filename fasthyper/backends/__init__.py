"""Ways to run the op family, and which one a call takes.

A backend is a module with ``apply`` and ``grads`` (signatures in `fasthyper.backends.aten`) and
``unavailable() -> str | None``, which says why it cannot run here.
"""

from __future__ import annotations

import threading
from types import ModuleType
from typing import NamedTuple

import torch

from ..problem import AUTO, SCHEDULES
from . import aten, cpu, cuda, materialised, triton

BACKENDS: dict[str, ModuleType] = {
    "aten": aten,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
    "materialised": materialised,
}
_BEST = {"cpu": "cpu", "cuda": "triton"}
"""The best backend for a type of device, where it can run. `cuda` is none yet: what it gains was never measured."""
_ON_GPU = {"triton": triton.interpreting, "cuda": cuda.emulating}
"""The backends for GPUs, and whether a CPU plays one."""


class Choice(NamedTuple):
    """Backend and schedule of one call, each by name or ``"auto"``."""

    backend: str = AUTO
    schedule: str = AUTO


_process = Choice()


class _Thread(threading.local):
    """Choice of one thread, None where it made none."""

    choice: Choice | None

    def __init__(
        self,
    ) -> None:  # in every thread; torch 2.11's Dynamo would prefer a default of the class to what is set
        self.choice = None


_thread = _Thread()


def checked(name: str, schedule: str | None = None) -> Choice:
    """Return the choice of these names.

    Raises:
        ValueError: if one is unknown, or the backend cannot run here.
    """
    if name != AUTO and name not in BACKENDS:
        known = ", ".join([AUTO, *BACKENDS])
        raise ValueError(f"backend must be one of {known}, got {name!r}")
    if schedule is not None and schedule not in (AUTO, *SCHEDULES):
        raise ValueError(f"schedule must be one of {', '.join((AUTO, *SCHEDULES))}, got {schedule!r}")
    if name != AUTO and (why := BACKENDS[name].unavailable()):
        raise ValueError(f"backend {name!r} cannot run here: {why}")
    return Choice(name, schedule or AUTO)


def current() -> Choice:
    """Return what is in force: this thread's choice, else the process's."""
    return _thread.choice or _process


def set_backend(name: str, schedule: str | None = None) -> None:
    """Force a backend for the whole process.

    Args:
        name: ``"aten"``, ``"cpu"``, ``"triton"``, ``"cuda"``, ``"materialised"`` or ``"auto"``, the best for the
            device.
        schedule: ``"fold"``, ``"generate"``, ``"project"``, or None to let the planner choose.

    Raises:
        ValueError: if the name or the schedule is unknown, or the backend cannot run here.
    """
    global _process
    _process = checked(name, schedule)


class use_backend:
    """Force a backend for the current thread, as a context manager.

    It is resolved in forward and holds for that call's backward, on whatever thread that runs.

    Args:
        name: ``"aten"``, ``"cpu"`` (compiled kernels), ``"triton"`` or ``"cuda"`` (GPU kernels),
            ``"materialised"`` (the usual way, W written out, to compare with) or ``"auto"``.
        schedule: ``"fold"``, ``"generate"``, ``"project"``, or None to let the planner choose.

    Raises:
        ValueError: if the name or the schedule is unknown, or the backend cannot run here.

    Example:
        >>> import torch, fasthyper
        >>> x, z, weight = torch.ones(4, 3), torch.ones(4, 2), torch.ones(5, 3, 2)
        >>> with fasthyper.use_backend("aten", schedule="fold"):
        ...     y = fasthyper.hyper_linear(x, z, weight)
        >>> y.shape, y[0, 0].item()
        (torch.Size([4, 5]), 6.0)
    """

    def __init__(self, name: str, schedule: str | None = None):
        self._choice = checked(name, schedule)
        self._before: list[Choice | None] = []

    def __enter__(self) -> None:
        self._before.append(_thread.choice)
        _thread.choice = self._choice

    def __exit__(self, *exc: object) -> None:
        _thread.choice = self._before.pop()


def backend(name: str, device: torch.device) -> ModuleType:
    """Return the module that runs a call: the one named, or the best for the device.

    Raises:
        ValueError: if the one named does not run on the device.
    """
    if name == AUTO:
        best = _BEST.get(device.type)
        name = best if best and BACKENDS[best].unavailable() is None else "aten"
    elif name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' must have tensors on the cpu, got x on {device}")
    elif name in _ON_GPU and device.type != "cuda" and not _ON_GPU[name]():
        raise ValueError(f"backend {name!r} must have tensors on a GPU, got x on {device}")
    return BACKENDS[name]
