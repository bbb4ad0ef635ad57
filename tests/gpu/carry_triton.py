"""The second half of `make gpu-carry`: Triton's kernels for the GPU's machine, into build/carried/triton.tar.xz.

    python tests/gpu/carry_triton.py FOLDER WHEEL

FOLDER has the Triton for this Python, WHEEL is that of the GPU's machine, of the same version. The key of a kernel in
Triton's cache hashes the kernel's source, its arguments' types and alignments, ptxas' version, and all files of the
wheel's compiler. The wheels for two versions of Python differ in their libraries alone, of which the key has
libtriton.so: so the keys here are made with the hash of the other wheel's. The calls are those of the stages of `make
gpu`, on the pretended GPU of tests/pretend, with a driver that loads and launches nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stages
from stages import CARRIED, ROOT

CACHE = ROOT / "build" / "carrying" / "triton"
MOST = 40 << 20
"""Bytes that may be carried."""
PROCESSORS, NAME, SHARED_MEMORY = 132, "NVIDIA H200", 232_448
LIBRARY = "triton/_C/libtriton.so"


class Driver:
    """A driver of Triton that launches nothing."""

    utils = types.SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": PROCESSORS},
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def is_active(self) -> bool:
        return True


def key_of(wheel: Path, here: Path, key: str) -> str:
    """Return the key of Triton's compiler in a wheel, from that of the one in a folder.

    Raises:
        ValueError: if more than the libraries differ.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("triton/") and name.endswith(".py") and archive.read(name) != (here / name).read_bytes():
                raise ValueError(f"wheel: {name} differs from that in {here}; the versions must be the same")
        theirs = hashlib.sha256(archive.read(LIBRARY)).hexdigest()
    ours = hashlib.sha256((here / LIBRARY).read_bytes()).hexdigest()
    if key.count(ours) != 1:
        raise ValueError(f"here: the key of the Triton in {here} does not have the hash of its libtriton.so")
    return key.replace(ours, theirs)


def start(here: Path, wheel: Path) -> None:
    """Load Triton, the pretended GPU and torch; make keys for the wheel."""
    os.environ.update(FASTHYPER_AUTOTUNE="0", TRITON_CACHE_DIR=str(CACHE))
    sys.path[:0] = [str(here), str(stages.HERE.parent / "pretend"), str(ROOT)]
    import pretended_gpu  # noqa: F401
    import torch
    import triton
    from triton.runtime import cache

    if Path(triton.__file__).parent.parent.resolve() != here.resolve():
        raise ValueError(f"here: {here} is not where triton comes from, {triton.__file__}")
    properties = torch.cuda.get_device_properties(0)
    properties.multi_processor_count, properties.name = PROCESSORS, NAME  # type: ignore[misc]
    key = key_of(wheel, here, cache.triton_key())
    cache.triton_key = lambda: key
    triton.runtime.driver.set_active(Driver())


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield all calls of the stages that launch Triton's kernels, with names."""
    from functools import partial

    import gpu_common
    import gpu_ways
    import smoke
    import time_eager
    import torch

    import fasthyper
    from benchmarks import studies

    def in_backend(call: Callable[[], Any]) -> Any:
        with fasthyper.use_backend("triton", "fold"):
            return call()

    for dtype, sizes, _ in smoke.cases("triton"):
        yield f"smoke {dtype} {sizes}", partial(smoke.faults, "triton", dtype, sizes)
    for problem, sizes in gpu_common.TIMED.items():
        tensors = gpu_common.made(sizes, torch.bfloat16, affine=False)
        for part in gpu_ways.PARTS:
            for rank in range(gpu_ways.RANKS):
                yield f"{problem} {part} {rank}", partial(_ranked, gpu_ways.part_call("triton", part, tensors), rank)
    for problem, sizes in gpu_common.LAUNCH_BOUND.items():
        *tensors, g = gpu_common.made(sizes, torch.bfloat16, affine=False)
        factors = [t.requires_grad_() for t in tensors]
        yield problem, partial(in_backend, partial(time_eager.both, factors, g))
    for w in studies.select(gpu_common.BENCHED, False, "cuda"):
        yield f"bench {w.label}", partial(_benched, w)


def _ranked(call: Callable[[], Any], rank: int) -> None:
    from gpu_ways import tile_of

    with tile_of(rank):
        call()


def _benched(w: Any) -> None:
    import torch

    from benchmarks.inputs import Sets, inputs
    from benchmarks.records import FORWARD_BACKWARD
    from benchmarks.steps import step
    from benchmarks.ways import ours

    way = ours(w, "cuda")[0]
    step(way.function(w, "cuda"), FORWARD_BACKWARD, Sets([inputs(w, torch.bfloat16, "cuda")]), way.layout)()


def pack(cache: Path, to: Path) -> int:
    """Write the folders of kernels into an archive; return their number."""
    folders = sorted(path.parent for path in cache.glob("*/*.cubin"))
    to.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to, "w:xz") as archive:
        for folder in folders:
            archive.add(folder, folder.name)
    return len(folders)


def main(here: Path, wheel: Path) -> int:
    """Compile all kernels, and say how much there is to carry."""
    start(here, wheel)
    shutil.rmtree(CACHE, ignore_errors=True)
    failed = 0
    for name, call in calls():
        try:
            call()
        except Exception as failure:
            failed += 1
            print(f"{name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
        print(f"{sum(1 for _ in CACHE.glob('*/*.cubin')):4d} kernels after {name}", flush=True)
    count = pack(CACHE, CARRIED / "triton.tar.xz")
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file())
    print(f"{count} kernels; {size / 2**20:.1f} MiB in {CARRIED}; {failed} calls failed")
    return 1 if failed or size > MOST else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
