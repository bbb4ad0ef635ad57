"""Python's share of a call on a GPU, in microseconds of process time, measured without one.

A pretended GPU (tests/pretend) takes the place of the real one, and kernels do nothing: what is left is the time in
which a call is checked, planned and launched. A kernel of less time than that waits for Python. The time includes what
the pretended GPU itself takes, such as that of each new tensor.

For a GPU, torch runs backward on a thread of its own. The second column has it on the caller's thread, as a CPU's, and
the third adds what torch takes to change threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES = {"small": (64, 1, 64, 10, 32), "QM9": (5760, 1, 64, 27, 32), "MNIST": (64, 1, 50, 784, 10)}
"""B, N, R, I and O."""
BACKENDS = ("cuda", "triton")


def write(folder: Path) -> Path:
    """Measure, and write the page `python-share.md`."""
    from .context import current_context  # imports torch, which a pretended GPU must precede

    here = current_context("cpu")
    about = (__doc__ or "").partition("\n\n")[2].strip()
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "python-share.md"
    text = f"# Python's share of a call on a GPU\n\n{about}\n\n{table(measure())}\n\n"
    versions = f"torch {here.torch}, Triton {here.triton}, Python {here.python}"
    page.write_text(text + f"{here.machine}, bfloat16, one thread; {versions}; commit {here.commit}, {here.date}.\n")
    return page


def table(rows: list[dict[str, object]]) -> str:
    """Return a Markdown table."""
    lines = ["| backend | shape | B, N, R, I → O | forward, µs | forward + backward, µs | on two threads, µs |"]
    lines.append("|---|---|---|--:|--:|--:|")
    for row in rows:
        B, N, R, I, O = SHAPES[str(row["shape"])]
        shape = f"{B}, {N}, {R}, {I} → {O}"
        times = " | ".join(f"{row[name]:.1f}" for name in ("forward", "both", "threads"))
        lines.append(f"| {row['backend']} | {row['shape']} | {shape} | {times} |")
    return "\n".join(lines)


def measure(repeats: int = 7, calls: int = 300) -> list[dict[str, object]]:
    """Measure both backends, each in a process of its own: the least of some repeats, each of some calls."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "pretend")])
    environment = {**os.environ, "FASTHYPER_EMULATED": "1", "FASTHYPER_AUTOTUNE": "0", "PYTHONPATH": paths}
    rows: list[dict[str, object]] = []
    for backend in BACKENDS:
        command = [sys.executable, "-m", "benchmarks.overhead", backend, str(repeats), str(calls)]
        made = subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE, text=True)
        if made.returncode:
            raise SystemExit(f"the backend {backend} could not be measured: exit status {made.returncode}")
        rows += json.loads(made.stdout.splitlines()[-1])
    return rows


def microseconds(call: Callable[[], object], repeats: int, calls: int) -> float:
    """Return the process time of a call: the least of some repeats, since other processes only add to it."""
    for _ in range(30):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(calls):
            call()
        seconds.append((time.process_time() - start) / calls)
    return min(seconds) * 1e6


def measure_here(backend: str, repeats: int, calls: int) -> list[dict[str, object]]:
    """Measure a backend in this process, which has no torch yet."""
    import pretended_gpu  # noqa: F401  # before torch
    import torch

    import fasthyper

    torch.set_num_threads(1)
    if backend == "cuda" and (why := fasthyper.backends.cuda.unavailable()) is not None:
        raise SystemExit(f"the emulator is needed ({why.partition(';')[0]}): run `make .venv/built`")
    if backend == "triton":
        import stubbed_triton

        stubbed_triton.start()
    torch.ops.fasthyper_pretended.skip_kernels(True)
    fasthyper.set_backend(backend)

    def measure_shape(name: str, B: int, N: int, R: int, I: int, O: int) -> dict[str, object]:
        new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        x, z, weight = (t.requires_grad_() for t in (new(B, N, I), new(B, R), new(O, I, R)))
        g = new(B, N, O)
        with torch.no_grad():
            forward = microseconds(lambda: fasthyper.hyper_linear(x, z, weight), repeats, calls)
        step = lambda: torch.autograd.grad(fasthyper.hyper_linear(x, z, weight), (x, z, weight), g)
        with torch.autograd.set_multithreading_enabled(False):
            both = microseconds(step, repeats, calls)
        threads = microseconds(step, repeats, calls)
        return {"backend": backend, "shape": name, "forward": forward, "both": both, "threads": threads}

    return [measure_shape(name, *sizes) for name, sizes in SHAPES.items()]


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], *map(int, sys.argv[2:]))), flush=True)
    os._exit(0)  # autograd's thread may still free the last graph, which aborts a process that ends just then
