"""The CUDA kernels on a GPU, against Triton's, the usual ways and cuBLAS: layers, forward alone, whole primaries.

    python benchmarks/gpu_cuda.py [--dtype bfloat16] [--budget SECONDS] [--out FOLDER]

As in gpu.py, every way is a CUDA graph, replays are interleaved, and the last-level cache is emptied before each.
Prints a row as it is measured, and writes benchmarks/results/gpu_cuda_DTYPE.md.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import gpu
import torch
from peers import PEERS, Step, Truth, factors, fused, materialised, step
from report import table
from timing import ms, unfit
from torch import Tensor
from workloads import WORKLOADS, Workload

import fasthyper
from fasthyper.functional import hyper_linear, hyper_primary

ROUNDS = 25
CUDA, TRITON = "cuda", "triton"
OVER = ["over triton", "over best peer", "share of cuBLAS"]
COLUMNS = ["case", "ms, cuda", "ms, triton", "ms, best peer", *OVER, "floors"]
SQUARE = Workload("square", 16_384, 1, 128, 128, 128, "a case of our own: no published one is as large with O ≥ 128")
SMALL, LARGE = ("qmix", "tiny", "policy", "synthetic", "mnist", "cifar"), 1 << 34


class Case(NamedTuple):
    """What is measured by several ways.

    Args:
        name: of the row.
        ways: by name, `CUDA` and `TRITON` among them; the others are peers.
        flops: of the identity, or None where a share of cuBLAS means nothing.
        floors: what is wanted, in words.
    """

    name: str
    ways: dict[str, Step]
    flops: float | None
    floors: str


def by(backend: str, call: Callable[..., object]) -> Callable[..., object]:
    """The call with a backend forced."""

    def run(*args: object) -> object:
        with fasthyper.use_backend(backend):
            return call(*args)

    return run


def layer(w: Workload, dtype: torch.dtype) -> Case:
    """Forward + backward of a layer."""
    inputs, g = factors(w, dtype, gpu.DEVICE)
    ways = {name: step(by(name, fused), inputs, g) for name in (CUDA, TRITON)}
    ways |= {p.name: step(p.function(), inputs, g) for p in PEERS if not unfit(p, w, dtype.itemsize, gpu.MAX_BYTES)}
    truth = Truth(inputs, g)
    for name in (CUDA, TRITON):
        truth.check(name, ways[name]())
    large = w.B * w.head >= LARGE
    floors = f"share ≥ {0.75 if w.O == 64 else 0.85}" if large else ""
    if "qmix mmm2, 10" in w.label:
        floors = "2 over best peer, 1.5 over triton, 3 over eager"
    return Case(f"{w.label}, B = {w.B:,}", ways, w.flops, floors)


def forward(w: Workload, dtype: torch.dtype) -> Case:
    """Forward of a layer alone."""
    (x, z, weight), _ = factors(w, dtype, gpu.DEVICE)
    x, z, weight = (t.detach() for t in (x, z, weight))
    ways: dict[str, Step] = {name: lambda name=name: (by(name, fused)(x, z, weight),) for name in (CUDA, TRITON)}
    ways["materialise + bmm"] = lambda: (materialised(x, z, weight),)
    return Case(f"{w.label}, forward", ways, w.flops / 3, "share ≥ 0.88, 1.1 over triton")


def primary(B: int, R: int, I: int, J: int, O: int, dtype: torch.dtype) -> Case:
    """Forward + backward of two generated layers with biases and bases, and a ReLU between."""
    torch.manual_seed(0)

    def parameters(o: int, i: int) -> tuple[Tensor, ...]:
        shapes = ((o, i, R), (o, R), (o, i), (o,))
        scales = ((i * R) ** -0.5, R**-0.5, i**-0.5, 1.0)
        made = (torch.randn(s, device=gpu.DEVICE) * scale for s, scale in zip(shapes, scales, strict=True))
        return tuple(t.to(dtype).requires_grad_() for t in made)

    x, z = (torch.randn(B, n, device=gpu.DEVICE).to(dtype).requires_grad_() for n in (I, R))
    first, second, g = parameters(J, I), parameters(O, J), torch.randn(B, O, device=gpu.DEVICE).to(dtype)
    inputs = (z, *first, *second)

    def usual(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
        for k, (weight, bias, base_weight, base_bias) in enumerate((layers[:4], layers[4:])):
            o, i, _ = weight.shape
            W = torch.addmm(base_weight.flatten(), z, weight.view(o * i, R).T).view(-1, o, i)
            x = torch.baddbmm((torch.addmm(base_bias, z, bias.T)).unsqueeze(2), W, x.unsqueeze(2)).squeeze(2)
            x = torch.relu(x) if k == 0 else x
        return x

    def layers(x: Tensor, z: Tensor, *both: Tensor) -> Tensor:
        at = lambda x, p: hyper_linear(x, z, p[0], p[1], base_weight=p[2], base_bias=p[3])
        return at(torch.relu(at(x, both[:4])), both[4:])

    whole = lambda x, z, *both: hyper_primary(x, z, both[:4], both[4:], "relu")
    functions = {CUDA: by(CUDA, whole), TRITON: by(TRITON, layers), "materialised": usual}
    functions["compiled"] = torch.compile(usual, dynamic=False)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = function(x, *inputs)
        return y, *torch.autograd.grad(y, inputs, g)

    exact = run(usual)
    ways: dict[str, Step] = {name: partial(run, function) for name, function in functions.items()}
    for got, expected in zip(ways[CUDA](), exact, strict=True):
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error <= torch.finfo(dtype).eps ** 0.5, f"{CUDA} is off by {error:.2g}"
    return Case(f"primary {I} → {J} → {O}, B = {B:,}, R = {R}", ways, None, "3 over best peer")


def cases(dtype: torch.dtype) -> Iterator[Callable[[], Case]]:
    """What is measured, the most telling first."""
    single = [w for w in WORKLOADS if w.N == 1]
    small = [w for w in single if any(name in w.label for name in SMALL)]
    large = [w for w in map(gpu.as_published, single) if w.B * w.head >= LARGE]
    small.sort(key=lambda w: "mmm2" not in w.label)
    yield partial(layer, small[0], dtype)
    for sizes in ((64, 50, 784, 10, 12), (5760, 64, 10, 32, 1), (64, 100, 3072, 10, 12)):
        yield partial(primary, *sizes, dtype)
    for w in (*large, SQUARE):
        yield partial(forward, w, dtype)
        yield partial(layer, w, dtype)
    for w in small[1:]:
        yield partial(layer, w, dtype)


def measured(case: Case, clock: Callable[..., float]) -> dict[str, float]:
    """Medians of all ways; a peer that fails is left out."""
    graphs = {}
    for name, run in case.ways.items():
        try:
            graphs[name] = gpu.captured(run)
        except (RuntimeError, AssertionError):
            if name in (CUDA, TRITON):
                raise
    order, seconds = list(graphs.items()), {name: [] for name in graphs}
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for name, graph in order:
            seconds[name].append(clock(graph))
    return {name: median(s) for name, s in seconds.items()}


def cells(case: Case, seconds: dict[str, float], rate: float) -> list[str]:
    """A row of the table."""
    peers = {name: s for name, s in seconds.items() if name not in (CUDA, TRITON)}
    best = min(peers, key=peers.__getitem__)
    ours = seconds[CUDA]
    eager = seconds.get("materialise + bmm", seconds.get("materialised"))
    return [
        case.name,
        ms(ours),
        ms(seconds[TRITON]),
        f"{ms(peers[best])} ({best})",
        f"{seconds[TRITON] / ours:.2f}",
        f"{peers[best] / ours:.2f}" + (f" (eager {eager / ours:.2f})" if eager else ""),
        f"{case.flops / ours / rate:.2f}" if case.flops else "",
        case.floors,
    ]


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = gpu.arguments(given)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    until = time.monotonic() + args.budget
    dtype, clock = getattr(torch, args.dtype), gpu.Clock()
    rate = gpu.products_rate(dtype, clock)
    rows: list[list[str]] = []
    for make in cases(dtype):
        if time.monotonic() > until:
            print("no time for the rest", flush=True)
            break
        torch._dynamo.reset()
        try:
            case = make()
            rows.append(cells(case, measured(case, clock), rate))
        except Exception as error:  # the others are worth having
            rows.append([f"{make.func.__name__}{make.args}", f"{type(error).__name__}: {error}", *[""] * 6])
        print(" | ".join(rows[-1]), flush=True)
        note = f"share of cuBLAS: of the rate of one product of {gpu.RATE}³, {rate / 1e12:.0f} Tflop/s."
        text = "\n\n".join((f"# CUDA kernels, {args.dtype}", gpu.machine(args.dtype), note, table(COLUMNS, rows), ""))
        write(args.out, f"gpu_cuda_{args.dtype}.md", text)


def write(folder: Path, name: str, text: str) -> None:
    """After each row, so that nothing is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


if __name__ == "__main__":
    main()
