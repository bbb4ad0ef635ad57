"""A plugin of pytest: the process has a pretended GPU, whose memory is the host's (gpu.cpp).

`PYTHONPATH=tests/pretend python -m pytest -p pretended_gpu` loads it before torch, which looks for a GPU only once.
What needs CUDA itself, such as graphs and events, is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
ARCH = (9, 0)


def build() -> Path:
    """Return the library of gpu.cpp, compiled for the installed torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    source = HERE / "gpu.cpp"
    version = (torch / "version.py").read_text()
    digest = hashlib.sha256(source.read_bytes() + version.encode()).hexdigest()[:12]
    library = HERE.parents[1] / "build" / "pretended" / f"gpu-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        includes = [f"-isystem{torch}/include", f"-isystem{torch}/include/torch/csrc/api/include"]
        links = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
        command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", *includes, str(source), "-o", str(part), *links]
        subprocess.run(command, check=True)
        part.replace(library)
    return library


def start() -> None:
    """Load the pretended GPU, import torch, and let `torch.cuda` find one GPU."""
    assert "torch" not in sys.modules, "torch has been imported already"
    ctypes.CDLL(str(build()))
    import torch

    if torch.version.cuda:
        torch.ops.fasthyper_pretended.replace_cuda()
    properties = types.SimpleNamespace(
        name="a pretended GPU",
        major=ARCH[0],
        minor=ARCH[1],
        multi_processor_count=4,
        warp_size=32,
        gcnArchName="",
    )
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: ARCH,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)

    class Generator(torch.Generator):
        """A generator of the host's numbers, for any device."""

        def __new__(cls, device: object = "cpu") -> Generator:
            return super().__new__(cls)

    torch.Generator = Generator  # type: ignore[misc]


start()
