"""What is here and what is ready: what ``fasthyper info`` prints."""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from . import planner, processor
from ._version import __version__
from .backends import BACKENDS, automatic, current
from .ops import register
from .problem import AUTO

_EXTRAS = ("sklearn", "matplotlib", "rich", "typer", "pandas")


def describe() -> str:
    """Return versions, devices, which backends are ready, and for the others why not.

    Example:
        >>> print(describe())
        fasthyper 0...
    """
    devices = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads, {_capability()})"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    lines = [
        ("fasthyper", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("system", platform.platform()),
        *(("device", device) for device in devices),
        ("torch contract", _contract()),
        *(("backend", f"{name}: {_readiness(name)}") for name in BACKENDS),
        ("in force", _in_force()),
        ("workspace", f"{planner.get_workspace_limit() / 2**20:.1f} MiB"),
        *(("low precision", _precision(dtype)) for dtype in (torch.bfloat16, torch.float16)),
        ("comparison", _extras()),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in lines)


def _capability() -> str:
    own = torch.backends.cpu.get_cpu_capability()
    return own if processor.kernels() == own.lower() else f"{own}, with the kernels for {processor.kernels()}"


def _contract() -> str:
    if register.MISSING is None:
        return "all derivatives and transforms, without writing weights out"
    return f"by the reference, which writes the weights out: this torch has no {register.MISSING}"


def _readiness(name: str) -> str:
    why = BACKENDS[name].unavailable()
    remark = BACKENDS[name].REMARK
    return ("ready" if why is None else f"not ready: {why}") + (f" ({remark})" if remark else "")


def _in_force() -> str:
    choice = current()
    if choice.backend == AUTO:
        return f"auto, which takes {automatic('cpu')} on the cpu; schedule {choice.schedule}"
    return f"{choice.backend}; schedule {choice.schedule}"


def _precision(dtype: torch.dtype) -> str:
    work = planner.machine("cpu", dtype, backend=automatic("cpu")).work_dtype
    return f"{str(dtype).removeprefix('torch.')} on the cpu is multiplied in {str(work).removeprefix('torch.')}"


def _extras() -> str:
    missing = [name for name in _EXTRAS if find_spec(name) is None]
    return f"not ready: {', '.join(missing)} missing; pip install fasthyper[compare]" if missing else "ready"
