"""Random calls of the compiled CPU kernels: those built for this machine, and every vector width under sanitizers.

Each library runs fuzz.py, fuzz_terms.py and fuzz_conv.py in processes of their own, so that a crash is a test failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasthyper import compiled

ROOT = Path(__file__).parents[2]
SANITIZED = ROOT / "build" / "sanitized" / "fasthyper" / "_compiled"
CASES = int(os.environ.get("FASTHYPER_FUZZ_CASES", "2000"))  # of each library: about half a minute
SLOWER = {"fuzz.py": 1, "fuzz_terms.py": 5, "fuzz_conv.py": 2}  # the scripts; the time of a case, in cases of the first


def fuzz(name: str, library: Path, cases: int = CASES, seed: int = 0, preload: str = "") -> None:
    if not library.exists():
        pytest.skip(f"{library.name} was not built; make test builds it")
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    script = str(Path(__file__).with_name(name))
    cases //= SLOWER[name]
    command = [sys.executable, script, str(library), "--cases", str(cases), "--seed", str(seed)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    output = result.stdout.splitlines()[-2:] + result.stderr.splitlines()[:40]
    assert result.returncode == 0, "\n".join(output)
    assert f"{cases} cases are right" in result.stdout


@pytest.fixture(scope="module")
def preload() -> str:
    """Return the libraries that the dynamic linker must load first for AddressSanitizer."""
    compiler = os.environ.get("CXX", "c++")
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so")]
    try:
        found = [subprocess.run([compiler, name], capture_output=True, text=True, check=True) for name in names]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no AddressSanitizer: {error}")
    return " ".join(result.stdout.strip() for result in found)


SCRIPTS = pytest.mark.parametrize("script", SLOWER)


@SCRIPTS
@pytest.mark.parametrize("width", [4, 8, 16])
def test_any_width_under_sanitizers(width, script, preload):
    fuzz(script, SANITIZED / f"cpu_width{width}.so", seed=width, preload=preload)


INSTRUCTION_SETS = ("default", "avx2", "avx512")


@SCRIPTS
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_each_instruction_set_with_products_of_onednn(name, script):
    """The libraries for this processor and for older ones."""
    if INSTRUCTION_SETS.index(name) > INSTRUCTION_SETS.index(torch.backends.cpu.get_cpu_capability().lower()):
        pytest.skip(f"this processor has no {name}")
    if (why := compiled.load("eager")) is not None:
        pytest.skip(f"compiled CPU kernels: {why}")
    fuzz(script, ROOT / "fasthyper" / "_compiled" / f"cpu_{name}.so", CASES // 2)
