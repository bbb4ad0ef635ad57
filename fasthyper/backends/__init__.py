"""The backends, which compute the op family, and the choice of one for each call.

`contract.Backend` describes a backend. To add one, write a module with its names and register it here in one line.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, cast

import torch

from .. import compiled, planner
from ..problem import AUTO, TERM_SCHEDULES
from . import aten, cpu, cuda, gpu_auto, materialised, triton
from .aten.models import Models
from .contract import Backend, Convolving, OfModels, OverTerms, Traced

FALLBACK = "aten"
"""The backend that runs any call on any device."""
BACKENDS: dict[str, Backend] = {}
"""The backends by name, in the order of `fasthyper info`."""
_NAMES = [name for name in vars(Backend) if not name.startswith("_")]
_PLACES = {"cpu": "the cpu", "cuda": "a GPU"}


def register(name: str, backend: Backend) -> None:
    """Add a backend under a name, or replace the one of that name.

    Raises:
        TypeError: if it lacks names of `contract.Backend`.
        ValueError: if the name is no string, empty or ``"auto"``.
    """
    if not isinstance(name, str) or name in ("", AUTO):
        raise ValueError(f"name must be the name of a backend, got {name!r}")
    missing = [attribute for attribute in _NAMES if not hasattr(backend, attribute)]
    if missing:
        raise TypeError(f"backend {name!r} lacks {', '.join(missing)}: see fasthyper.backends.contract.Backend")
    BACKENDS[name] = backend
    planner.register(name, backend.COSTS)


register("aten", aten)
register("cpu", cpu)
register("triton", triton)
register("cuda", cuda)
register("materialised", materialised)


class Choice(NamedTuple):
    """Backend and schedule of one call, each by name or ``"auto"``."""

    backend: str = AUTO
    schedule: str = AUTO


_process = Choice()


class _Thread(threading.local):
    """The choice of one thread; None if it has made none."""

    choice: Choice | None

    def __init__(self) -> None:  # in every thread; Dynamo of torch 2.11 would read a class default instead of it
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
    if schedule is not None and schedule not in (AUTO, *TERM_SCHEDULES):
        raise ValueError(f"schedule must be one of {', '.join((AUTO, *TERM_SCHEDULES))}, got {schedule!r}")
    if name != AUTO and (why := BACKENDS[name].unavailable()):
        raise ValueError(f"backend {name!r} cannot run here: {why}")
    return Choice(name, schedule or AUTO)


def current() -> Choice:
    """Return the current choice: that of this thread, or else that of the process."""
    return _thread.choice or _process


def set_backend(name: str, schedule: str | None = None) -> None:
    """Force a backend for the whole process.

    Args:
        name: ``"aten"``, ``"cpu"``, ``"triton"``, ``"cuda"``, ``"materialised"`` or ``"auto"``, the best for the
            device.
        schedule: ``"fold"``, ``"generate"``, ``"project"``, ``"aggregate"``, or None to let the planner choose. Without
            an incidence, each target has one term, and ``"aggregate"`` is ``"fold"``.

    Raises:
        ValueError: if the name or the schedule is unknown, or the backend cannot run here.
    """
    global _process
    _process = checked(name, schedule)


class use_backend:
    """Force a backend for the current thread, as a context manager.

    The choice of a forward also applies to its backward, in any thread.

    Args:
        name: ``"aten"``, ``"cpu"`` (compiled kernels), ``"triton"`` or ``"cuda"`` (GPU kernels),
            ``"materialised"`` (W written out, for comparison) or ``"auto"``.
        schedule: ``"fold"``, ``"generate"``, ``"project"``, ``"aggregate"``, or None to let the planner choose. Without
            an incidence, each target has one term, and ``"aggregate"`` is ``"fold"``.

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


def preferred(device: str) -> str:
    """Return the name of the backend that is preferred on a type of device, whether it can run here or not."""
    named = [name for name, backend in BACKENDS.items() if device in backend.PREFERRED_ON]
    return named[-1] if named else FALLBACK


def automatic(device: str) -> str:
    """Return the name of the backend that ``"auto"`` takes on a type of device: the preferred one if it can run."""
    name = preferred(device)
    return name if BACKENDS[name].unavailable() is None else FALLBACK


def runs_on(name: str, device: torch.device) -> bool:
    """Return whether the backend of this name, or the one that ``"auto"`` takes, runs on a device."""
    devices = None if name == AUTO else BACKENDS[name].devices()
    return devices is None or device.type in devices


def backend(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """Return the backend that runs a call: the one named, or the one that ``"auto"`` takes.

    Where that is not the compiled CPU kernels, though they compute in the dtype, the first such call says so.

    Raises:
        ValueError: if the one named does not run on the device.
    """
    if not runs_on(name, device):
        where = " or ".join(_PLACES.get(place, place) for place in BACKENDS[name].devices() or ())
        raise ValueError(f"backend {name!r} must have tensors on {where}, got x on {device}")
    if name != AUTO:
        return BACKENDS[name]
    best = automatic(device.type)
    if best == FALLBACK and device.type == "cpu" and dtype in cpu.DTYPES and preferred("cpu") == "cpu":
        compiled.warn_once(str(cpu.unavailable()))
    return cast(Backend, gpu_auto) if BACKENDS[best] is triton else BACKENDS[best]


def traced(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Traced | None:
    """Return the backend that runs a call if ``torch.compile`` may see its launches, else None."""
    module = backend(name, device, dtype)
    return cast(Traced, module) if hasattr(module, "trace_apply") else None


def of_terms(name: str, device: torch.device, dtype: torch.dtype | None = None) -> OverTerms:
    """Return the backend that runs a call over terms: that of `backend`, or aten if it lacks these functions."""
    module = backend(name, device, dtype)
    return cast(OverTerms, module) if hasattr(module, "apply_terms") else aten


def of_models(name: str, device: torch.device, dtype: torch.dtype | None = None) -> OfModels:
    """Return the backend that runs a call of M models: that of `backend`, in aten's way if it lacks these functions."""
    module = backend(name, device, dtype)
    return cast(OfModels, module) if hasattr(module, "apply_models") else Models(module)


def of_convolutions(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Convolving:
    """Return the backend that runs a generated convolution: that of `backend`, or aten if it lacks these functions."""
    module = backend(name, device, dtype)
    return cast(Convolving, module) if hasattr(module, "apply_conv") else aten
