"""The stages `env` and `build` of `make gpu`: what the machine is, and libraries that it can load.

python tests/gpu/machine.py look | build
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_common import SMALL, report, say
from stages import ROOT, WORK

from benchmarks.context import current_context
from fasthyper import building, compiled, info

_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"


def look() -> int:
    """Print versions and clocks; measure a product, a copy and a read of the L2 cache."""
    print(info.describe(), flush=True)
    smi = _line("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv")
    print(smi, flush=True)
    if not torch.cuda.is_available():
        print("torch finds no GPU", flush=True)
        return 3
    major, minor = torch.cuda.get_device_capability()
    context = current_context("cuda")
    found: dict[str, Any] = {name: getattr(context, name) for name in ("device", "torch", "triton", "commit", "date")}
    found |= {"arch": f"sm_{major}{minor}", "driver": context.driver, "python": context.python}
    report(**found)  # a measurement may fail
    found |= rates()
    print(_line("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"), flush=True)
    report(**found)
    return 0


def rates() -> dict[str, float]:
    """Return TFLOP/s of a product in bfloat16, and TB/s of a copy and of reads of 16 MiB."""
    side, size, repeats = (64, 1 << 12, 2) if SMALL else (8192, 1 << 31, 64)
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    source, to = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    rows = torch.randn(size >> 7 if SMALL else 1 << 22, device="cuda").expand(repeats, -1)
    return {
        "product_tflops": round(2e-12 * side**3 / _seconds(lambda: a @ b), 1),
        "copy_tbs": round(2e-12 * size / _seconds(lambda: to.copy_(source)), 2),
        "l2_tbs": round(1e-12 * rows.numel() * 4 / _seconds(lambda: rows.sum(1)), 2),
    }


def _seconds(call: Callable[[], Any], times: int = 10) -> float:
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return max(1e-9, start.elapsed_time(end) / 1e3 / times)


def build() -> int:
    """Compile the libraries that do not load, for this GPU."""
    from fasthyper.backends import cuda

    left = [name for name in ("cuda", "eager") if (why := compiled.load(name)) is not None and _said(name, why)]
    if not left or cuda.emulating():
        print("nothing to build", flush=True)
        report(built="nothing")
        return 0
    archs = "{}.{}".format(*torch.cuda.get_device_capability())
    failed = building.build(left, WORK / "compiled", WORK / "objects", archs=archs, report=_progress)
    for name in {"cuda", "eager"} - set(left):  # one folder has all that is loaded
        found = next(path for folder in compiled.folders() if isinstance(path := compiled.look(folder, name), Path))
        (WORK / "compiled" / found.name).write_bytes(found.read_bytes())
    building.write_record(WORK / "compiled", building.record(torch.__version__, failed))
    for name, why in failed.items():
        say(f"{name} cannot be built: {why}")
    report(built=", ".join(left))
    return 1 if "cuda" in failed else 0


def _said(name: str, why: str) -> bool:
    print(f"{name}: {why}", flush=True)
    return True


def _progress(done: int, steps: int, name: str) -> None:
    print(f"{done}/{steps} {name}", flush=True)


def _line(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else f"{command[0]}: exit {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {type(error).__name__}"


if __name__ == "__main__":
    sys.exit(look() if sys.argv[1] == "look" else build())
