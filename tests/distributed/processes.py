"""Run the checks of a module in several processes at once, as the members of one group of torch.distributed.

A module of checks has functions ``check_…(here)``, which every process calls in the same order. A check that fails ends
its process; the others then fail or are ended. Nothing is left running.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 600
"""After which the processes are ended, and the test fails."""

BACKENDS = [
    "gloo",
    pytest.param("nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
]


class Here(NamedTuple):
    """What a check knows: its process, the number of processes, the type of device, and a folder that all share."""

    rank: int
    size: int
    device: str
    folder: Path


def run(module: str, size: int, backend: str, folder: Path) -> None:
    """Run all checks of a module in so many processes; fail with the output of the first process that failed."""
    if backend == "nccl":
        size = min(size, torch.cuda.device_count())
    path = os.pathsep.join(filter(None, (str(ROOT), str(HERE), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    started, outputs = [], [folder / f"{module}-{rank}.txt" for rank in range(size)]
    try:
        for rank, output in enumerate(outputs):
            command = [sys.executable, str(HERE / "processes.py"), module, str(rank), str(size), backend, str(folder)]
            with output.open("w") as file:
                started.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
        end, failed = time.monotonic() + SECONDS, None
        while failed is None and any(process.poll() is None for process in started):
            failed = next((rank for rank, process in enumerate(started) if process.poll()), None)
            assert time.monotonic() < end, _report("too slow", outputs)
            time.sleep(0.05)
        codes = [process.wait() if failed is None else process.poll() for process in started]
        bad = [rank for rank, code in enumerate(codes) if code]
        assert not bad, _report(f"failed first: {bad}", outputs)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _report(what: str, outputs: list[Path]) -> str:
    return "\n".join([what, *(f"--- {output.stem}\n{output.read_text()[-6000:]}" for output in outputs)])


def main(module: str, rank: str, size: str, backend: str, folder: str) -> None:
    import fasthyper  # noqa: F401

    assert "torch.distributed.tensor" not in sys.modules  # it takes longer than the rest
    import torch.distributed as dist

    here = Here(int(rank), int(size), "cuda" if backend == "nccl" else "cpu", Path(folder))
    if here.device == "cuda":
        torch.cuda.set_device(here.rank)
    store = dist.FileStore(str(here.folder / f"{module}-{size}.store"), here.size)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=timedelta(seconds=60))
    checks = importlib.import_module(module)
    for name in [name for name in vars(checks) if name.startswith("check_")]:
        start = time.monotonic()
        torch.manual_seed(0)
        getattr(checks, name)(here)
        print(name, f"{time.monotonic() - start:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # torch's caches of distributed tensors keep the group and its threads, which abort an interpreter that ends while
    # they free the last tensors.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
