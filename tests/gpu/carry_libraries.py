"""The first half of `make gpu-carry`: libraries for the GPU's machine, into build/carried/compiled.

    TORCH_CUDA_ARCH_LIST=9.0a python tests/gpu/carry_libraries.py

The Python is one with the version of torch that the machine has: a library is loaded only where that version and the
sources are those of the build. The version of Python does not matter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from stages import CARRIED, ROOT

sys.path.insert(0, str(ROOT))
from fasthyper import building

NAMES = ("cuda", "eager")


def main() -> int:
    """Compile, write the record of the build, and say how large the libraries are."""
    for name in NAMES:
        if why := building.why_not(name):
            print(f"{name} cannot be built: {why}")
            return 1
    folder, objects = CARRIED / "compiled", ROOT / "build" / "carrying" / "objects"
    failed = building.build(
        NAMES, folder, objects, report=lambda done, steps, name: print(f"{done}/{steps}", flush=True)
    )
    building.write_record(folder, building.record(torch.__version__, failed))
    last = ("git", "log", "-1", "--format=%h", "--", "fasthyper", "csrc", "kernels", "setup.py")
    commit = subprocess.run(last, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    (CARRIED / "commit.txt").write_text(f"{os.environ.get('FASTHYPER_COMMIT') or commit or building.digest()}\n")
    size = sum(path.stat().st_size for path in folder.glob("*.so"))
    print(f"{', '.join(NAMES)} for torch {torch.__version__}: {size / 2**20:.1f} MiB; {failed or 'none failed'}")
    return 1 if failed else 0


def _progress(done: int, steps: int, name: str) -> None:
    print(f"{done}/{steps} {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
