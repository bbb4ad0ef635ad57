"""The text that ``fasthyper info`` prints: versions, devices and backends."""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from . import planner, processor
from ._version import __version__
from .backends import BACKENDS, automatic, current
from .ops import register
from .problem import AUTO

_COMPARE_PACKAGES = ("sklearn", "scipy", "numpy", "matplotlib", "rich", "pandas", "jinja2")


def describe() -> str:
    """Return versions, devices, settings, and for each backend whether it is ready or why not.

    Example:
        >>> from fasthyper import info
        >>> print(info.describe())
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
        ("derivatives", _derivatives()),
        *(("backend", f"{name}: {_readiness(name)}") for name in BACKENDS),
        ("selected", _selected()),
        ("workspace", f"at most {planner.get_workspace_limit() / 2**20:.1f} MiB"),
        *(("arithmetic", _arithmetic(dtype)) for dtype in (torch.bfloat16, torch.float16)),
        ("compare", _compare()),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in lines)


def _capability() -> str:
    torch_capability, kernels = torch.backends.cpu.get_cpu_capability(), processor.kernels()
    same = kernels == torch_capability.lower()
    return torch_capability if same else f"{torch_capability}, with the kernels for {kernels}"


def _derivatives() -> str:
    if register.MISSING is None:
        return "all orders, forward mode and torch.func, without writing out the generated weights"
    return f"by the reference, which writes out the generated weights: this torch lacks a name ({register.MISSING})"


def _readiness(name: str) -> str:
    why = BACKENDS[name].unavailable()
    remark = BACKENDS[name].REMARK
    return ("ready" if why is None else f"not ready: {why}") + (f" ({remark})" if remark else "")


def _selected() -> str:
    choice = current()
    if choice.backend == AUTO:
        return f"backend auto ({automatic('cpu')} on the CPU), schedule {choice.schedule}"
    return f"backend {choice.backend}, schedule {choice.schedule}"


def _arithmetic(dtype: torch.dtype) -> str:
    work = planner.machine("cpu", dtype, backend=automatic("cpu")).work_dtype
    return f"{str(dtype).removeprefix('torch.')} products on the CPU use {str(work).removeprefix('torch.')}"


def _compare() -> str:
    missing = [name for name in _COMPARE_PACKAGES if find_spec(name) is None]
    return f"not ready: {', '.join(missing)} missing; pip install 'fasthyper[compare]'" if missing else "ready"
