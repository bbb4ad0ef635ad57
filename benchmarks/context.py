"""The machine, the versions and the commit of a measurement."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

import fasthyper

ROOT = Path(__file__).parent.parent
SOURCES = ("fasthyper", "csrc", "setup.py", "benchmarks", ":(exclude)benchmarks/results")
"""Git paths that a measurement depends on. Commits that change none of them are ignored."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where and with which versions something was measured.

    Attributes:
        device: the name of the processor, with its vector set, cache and threads in use, or of the GPU.
        kind: `"cpu"` or `"cuda"`.
        backend: the one that fasthyper chooses there.
        torch: version of torch.
        triton: version of Triton, empty if not installed.
        driver: version of the GPU's driver.
        python: version of Python.
        commit: the measured commit; `+` after it means uncommitted changes.
        date: the day, in ISO 8601.
    """

    device: str
    kind: str
    backend: str
    torch: str
    triton: str
    driver: str
    python: str
    commit: str
    date: str

    @property
    def slug(self) -> str:
        """The device's name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @property
    def machine(self) -> str:
        """The device's name without the threads in use."""
        return re.sub(r", \d+ threads$", "", self.device)

    @property
    def threads(self) -> int:
        """The threads in use, 0 for a GPU."""
        found = re.search(r", (\d+) threads$", self.device)
        return int(found[1]) if found else 0


def current_context(kind: str) -> Context:
    """Return the context of this process, for `"cpu"` or `"cuda"`."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    backend = fasthyper.backends.automatic(kind)
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if kind == "cuda" else ""
    return Context(
        device=torch.cuda.get_device_name(0) if kind == "cuda" else _processor(),
        kind=kind,
        backend=backend,
        torch=torch.__version__,
        triton=version,
        driver=driver,
        python=platform.python_version(),
        commit=_commit(),
        date=date.today().isoformat(),
    )


def last_level_cache() -> int:
    """Return the bytes of the processor's last-level cache, 0 if unknown."""
    return max(_caches().values(), default=0)


def _first_line(*command: str) -> str:
    """Return the first line that a command prints, `"unknown"` if it prints none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def _commit() -> str:
    """Return the last commit that changed the sources, with `+` if they have uncommitted changes.

    The environment variable `FASTHYPER_COMMIT` replaces it, for a copy without git history.
    """
    if given := os.environ.get("FASTHYPER_COMMIT"):
        return given
    last = _first_line("git", "log", "-1", "--format=%h", "--", *SOURCES)
    return last + ("" if _first_line("git", "status", "--porcelain", "--", *SOURCES) == "unknown" else "+")


def _processor() -> str:
    """Return the processor's name, its vector set, its last-level cache and the threads in use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = fields.get("model name") or platform.processor() or platform.machine()
    amx = " + AMX" if "amx_tile" in fields.get("flags", "") else ""
    caches = _caches()
    cache = f", {last_level_cache() >> 20} MiB L{max(caches)}" if caches else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}{amx}{cache}, {torch.get_num_threads()} threads"


def _caches() -> dict[int, int]:
    """Return the bytes of the first processor's data caches by level, as Linux reports them."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, content, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if content != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            sizes[int(level)] = int(size.rstrip("KM")) * unit
    return sizes
