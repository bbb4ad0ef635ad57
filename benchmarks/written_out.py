"""Forward + backward of all three inputs, against the ways in which W is written out: time and peak memory.

    python benchmarks/written_out.py [--repeats 7] [--dtype float32]

Runs are interleaved in one process and the ratio of their medians is the figure. Prints a Markdown table and
writes it, with what it was measured on, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import fasthyper
from fasthyper.experiments.measure import peak_temporary_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# name, B (scaled to two cores where the published one takes longer than a second), N, R, I, O
WORKLOADS = (
    ("QM9 edges (NNConv)", 19_584, 1, 128, 64, 64),
    ("ModelNet edges", 8_192, 1, 25, 64, 128),
    ("DiffDock-like edges", 10_000, 1, 144, 48, 48),
    ("QMIX mixer, 27m", 5_760, 1, 64, 27, 32),
    ("biaffine labels", 4_096, 1, 101, 101, 50),
    ("wide", 1_024, 1, 64, 256, 256),
    ("hyper policy", 256, 1, 256, 17, 256),
    ("rotation, CIFAR10", 64, 1, 100, 3_072, 10),
    ("operator learning", 100, 100, 64, 20, 20),
    ("SIREN images", 16, 1_024, 256, 256, 256),
)


def fused(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return fasthyper.hyper_linear(x, z, weight)


def materialised(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    O, I, R = weight.shape
    return torch.bmm(x, (z @ weight.view(O * I, R).T).view(-1, O, I).mT)


def einsum(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bni,boi->bno", x, torch.einsum("br,oir->boi", z, weight))


def bilinear(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.bilinear(x[:, 0], z, weight).unsqueeze(1)


PEERS: dict[str, Callable[..., Tensor]] = {"materialise + bmm": materialised, "einsum": einsum}


def step(function: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> Callable[[], object]:
    def run() -> object:
        y = function(*inputs)
        return y, torch.autograd.grad(y, inputs, g)

    return run


def check(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """A peer that computes something else would be no peer."""
    few = [t.detach()[:4] if k < 2 else t.detach() for k, t in enumerate(inputs)]
    expected = fasthyper.ops.reference.apply(*(t.double() for t in few))
    error = (function(*few).double() - expected).abs().max() / expected.abs().max()
    if error > 0.05:
        raise AssertionError(f"{function.__name__} is off by {error:.3f}")


def measure(sizes: tuple[int, ...], dtype: torch.dtype, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds and peak temporary MiB of each way."""
    B, N, R, I, O = sizes
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((B, N, I), (B, R), (O, I, R))]
    g = torch.randn(B, N, O).to(dtype)
    ways = {"fasthyper": fused, **PEERS, **({"F.bilinear": bilinear} if N == 1 and B * R * I * O < 2**31 else {})}
    for function in ways.values():
        check(function, inputs)
    steps = {name: step(function, inputs, g) for name, function in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: (median(seconds[name]), peak_temporary_bytes(run) / 2**20) for name, run in steps.items()}


def row(name: str, sizes: tuple[int, ...], results: dict[str, tuple[float, float]]) -> str:
    ours, memory = results.pop("fasthyper")
    peer, (theirs, _) = min(results.items(), key=lambda item: item[1][0])
    least = min(m for _, m in results.values())
    B, N, R, I, O = sizes
    return (
        f"| {name} | {B:,} | {N:,} | {R} | {I} → {O} | {memory:.1f} | {least:.1f} "
        f"| {ours * 1e3:.1f} | {theirs * 1e3:.1f} ({peer}) | {theirs / ours:.2f} |"
    )


def machine(dtype: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "fasthyper"], check=False).returncode
    processor = "unknown processor"
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return (
        f"{processor} ({platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"Python {platform.python_version()}; commit {commit.stdout.strip()}{' and changes' if changed else ''}, "
        f"{date.today().isoformat()}: {dtype}, forward + backward of x, z and the head, medians of interleaved runs."
    )


def into_readme(name: str, text: str) -> None:
    """Put the table between its markers, where the README has them."""
    readme = ROOT / "README.md"
    start, end = f"<!-- {name}: generated by `make bench` -->\n", "<!-- end -->"
    before, found, rest = readme.read_text().partition(start)
    if found:
        readme.write_text(before + start + "\n" + text + "\n" + rest[rest.index(end) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    args = parser.parse_args()
    lines = [
        "| workload | B | N | R | I → O | memory, fasthyper | memory, least peer "
        "| ms, fasthyper | ms, best peer | speed-up |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    print(*lines, sep="\n", flush=True)
    for name, *sizes in WORKLOADS:
        lines.append(row(name, tuple(sizes), measure(tuple(sizes), getattr(torch, args.dtype), args.repeats)))
        print(lines[-1], flush=True)
    text = "\n".join([*lines, "", f"Measured on {machine(args.dtype)}", ""])
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"written_out_cpu_{args.dtype}.md"
    out.write_text(text)
    print(f"\nwritten to {out.relative_to(ROOT)}")
    into_readme(out.stem, text)


if __name__ == "__main__":
    main()
