"""Compile and run small programs of kernels in the emulator of csrc/cuda."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
NEEDS = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not CSRC.exists(), reason="there are no sources"),
]


def run_toy(folder: Path, source: str) -> dict[str, set[str]]:
    """Return the texts that a program printed as lines `name: text`, by name."""
    (folder / "toy.cpp").write_text(source)
    flags = ["-std=c++20", "-O1", "-DFASTHYPER_EMULATED", "-idirafter", str(CSRC)]
    flags += [flag for path in include_paths() for flag in ("-I", path)]
    command = ["c++", *flags, "toy.cpp", "-o", "toy"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    printed = subprocess.run([str(folder / "toy")], check=True, capture_output=True, text=True).stdout
    out: dict[str, set[str]] = {}
    for name, text in re.findall(r"(\w+): (.*)", printed):
        out.setdefault(name, set()).add(text)
    return out
