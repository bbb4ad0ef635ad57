"""Run a script with the pretended GPU of tests/pretend, for the dry run of `make gpu`.

    python tests/gpu/pretended_run.py SCRIPT [ARGUMENT ...]

Events read the host's clock, streams are one, graphs cannot be captured, and Triton is not there.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "pretend"))
sys.modules["triton"] = None  # type: ignore[assignment]  # it looks like a package that is not installed
import pretended_gpu  # noqa: E402, F401
import torch  # noqa: E402


class Event:
    """A point of the host's time."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Do nothing."""

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Stream:
    """The one stream."""

    def wait_stream(self, other: object) -> None:
        """Do nothing."""


def no_graph(*_: object) -> None:
    raise RuntimeError("a pretended GPU captures no graphs")


torch.cuda.get_device_properties(0).L2_cache_size = 1 << 12  # type: ignore[misc]
EVERYTHING = {
    "Event": Event,
    "Stream": Stream,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": no_graph,
    "graph": no_graph,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (1 << 33, 1 << 33),
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_allocated": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
}
for name, value in EVERYTHING.items():
    setattr(torch.cuda, name, value)
torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(HERE)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    sys.stdout.flush()
    os._exit(status)  # autograd's thread for the pretended GPU must not outlive it
