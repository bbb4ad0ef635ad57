"""Print, as JSON, what Triton's own launcher gives to CUDA's driver. test_launcher.py runs it as a process.

Kernels are compiled for an H200, but do not run: driver.c takes the place of the driver.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(tempfile.mkdtemp())
os.environ |= {"TRITON_LIBCUDA_PATH": str(FOLDER), "FASTHYPER_AUTOTUNE": "0"}
import pretended_gpu  # noqa: E402, F401  # before torch
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402

from fasthyper.backends import triton as backend  # noqa: E402
from fasthyper.backends.triton import calls, repeat  # noqa: E402

SIZES = [
    (64, 1, 64, 10, 32),
    (64, 1, 50, 784, 10),  # z and H are padded
    (3, 40, 48, 20, 24),  # several points
    (20000, 1, 16, 8, 8),  # sums are split
]
BYTES = {"i1": 1, "i32": 4, "i64": 8, "u64": 8, "fp32": 4}
STREAM = 0x70
TENSORS: list[torch.Tensor] = []
"""All tensors, which are kept, so that no two of them have one address."""


class Launches:
    """What the driver is given to launch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.kinds: list[str] = []  # of the parameters of the kernel that is launched next
        self.found: list[list[Any]] = []
        kind = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
        )
        self.listener = kind(self.listen)  # kept as long as the library has it
        library.listen(self.listener)

    def listen(self, function: int, sizes: Any, stream: int, parameters: Any) -> None:
        values: list[Any] = []
        for number, kind in enumerate(self.kinds):
            is_address = kind in ("pointer", "descriptor")
            size = 128 if kind == "descriptor" else 8 if is_address else BYTES[kind]
            value = ctypes.string_at(parameters[number], size)
            values.append([int.from_bytes(value[:8], "little"), value[8:].hex()] if is_address else value.hex())
        self.found.append([function, sizes[:8], stream, values])

    def take(self) -> list[list[Any]]:
        found, self.found = self.found, []
        return found


def parameters_of(kernel: CompiledKernel) -> list[str]:
    """Return the kinds of the parameters of a compiled kernel."""
    kinds: list[str] = []
    for kind in kernel.src.signature.values():
        if kind.startswith("tensordesc"):
            axes = kind.partition("[")[2].count(",") + 1
            kinds += ["descriptor", *["i32"] * axes, *["i64"] * axes]
        elif kind != "constexpr":
            kinds.append("pointer" if kind.startswith("*") else kind)
    return kinds


def start() -> Launches:
    """Let Triton launch on driver.c, by its own driver and launcher."""
    library = FOLDER / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    source = Path(__file__).with_name("driver.c")
    options = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{include}"]
    subprocess.run(["cc", *options, str(source), "-o", str(library)], check=True)
    launches = Launches(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    active = nvidia.CudaDriver()
    active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: STREAM
    triton.runtime.driver.set_active(active)
    launcher = CompiledKernel.run.fget

    def run(kernel: CompiledKernel) -> Any:
        launch = launcher(kernel)  # Triton loads the kernel here
        launches.kinds = parameters_of(kernel)
        return launch

    CompiledKernel.run = property(run)
    empty = torch.empty
    torch.empty = lambda *args, **options: TENSORS.append(empty(*args, **options)) or TENSORS[-1]
    return launches


def described(launches: list[list[Any]], own: list[torch.Tensor]) -> list[list[Any]]:
    """Return launches with each address as a tensor's number and an offset, or as the order of its first use."""
    others: dict[int, int] = {}

    def place(value: Any) -> Any:
        if isinstance(value, str):
            return value
        for number, t in enumerate(own):
            if 0 <= value[0] - t.data_ptr() < t.untyped_storage().nbytes():
                return [f"tensor {number}", value[0] - t.data_ptr(), value[1]]
        return [f"temporary {others.setdefault(value[0], len(others))}", 0, value[1]]

    return [[function, sizes, stream, [place(v) for v in values]] for function, sizes, stream, values in launches]


def step(launches: Launches, args: list[torch.Tensor]) -> list[list[Any]]:
    """Return what a forward and a backward launch."""
    x, z, weight, bias, base_weight, g = args
    y = backend.apply(x, z, weight, bias, base_weight, schedule="fold")
    gradients = backend.grads(x, z, weight, bias, base_weight, g, (True,) * 6, schedule="fold")
    TENSORS.extend([y, *gradients])
    return described(launches.take(), [*args, y, *gradients])


def main() -> None:
    launches, found = start(), []
    in_python: list[calls.Call] = []
    made = calls.Call.launch
    calls.Call.launch = lambda call: in_python.append(call) or made(call)
    for dtype in (torch.bfloat16, torch.float32):
        for B, N, R, I, O in SIZES:
            shapes = (B, N, I), (B, R), (O, I, R), (O, R), (O, I), (B, N, O)
            args, others = ([torch.randn(shape).to(dtype).cuda() for shape in shapes] for _ in range(2))
            for given in (args, args, others):
                step(launches, given)
            in_python.clear()
            repeated, before = step(launches, args), repeat._is_watched
            count, repeat._is_watched = len(in_python), lambda: True
            own = step(launches, args)
            repeat._is_watched = before
            found.append({"repeated": repeated, "by Triton": own, "in Python": count})
    print(json.dumps({"stream": STREAM, "calls": found}))
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the pretended GPU must not outlive it


if __name__ == "__main__":
    main()
