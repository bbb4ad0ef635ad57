"""Forward + backward of all three inputs on a GPU, against the ways in which W is written out: time and memory.

    python benchmarks/gpu.py [--dtype bfloat16] [--only NAME] [--budget SECONDS] [--out FOLDER]

Every way runs as a CUDA graph, so that kernels are compared and not the speed of Python; replays are interleaved, and
the last-level cache is emptied before each. Prints a row for each workload as it is measured, and writes
benchmarks/results/gpu_DTYPE.md and the README's table.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from statistics import median

import torch
from peers import PEERS, Step, Truth, factors, fused, step
from report import (
    COLUMNS,
    MIB,
    RESULTS,
    ROOT,
    Figure,
    cells,
    extreme,
    full,
    into_readme,
    line,
    mean,
    per_sample,
    short,
    table,
)
from timing import AGAIN, OURS, SLOWER, Row, unfit
from workloads import WORKLOADS, Workload

import fasthyper

DEVICE = "cuda"
MAX_BYTES = 40 << 30
ROUNDS = 25
RATE = 8192  # side of the square product whose rate is the machine's
SLACK = 12.0  # seconds that must be left to compile another peer


def _large(row: Row) -> bool:
    w = row.workload
    return row.share is not None and w.B * w.head >= 1 << 34 and w.R % 64 == 0


_least, _least_share = extreme(lambda row: row.speed_up), extreme(lambda row: row.share)
FIGURES = (
    Figure("speed-up at N = 1, geometric mean", lambda r: per_sample(r) and not r.workload.extra, mean, {"": "≥ 1.7"}),
    Figure("speed-up at N = 1, least", per_sample, _least, {"": "≥ 0.95"}),
    Figure("speed-up, modelnet, least", lambda r: "modelnet" in r.workload.name, _least, {"": "≥ 4"}),
    Figure("speed-up, qm9, least", lambda r: "qm9" in r.workload.name, _least, {"": "≥ 2"}),
    Figure("speed-up at N > 1, least", lambda r: not per_sample(r), _least, {"": ""}),
    Figure(
        "share of cuBLAS, B·R·I·O ≥ 2³⁴, O ≥ 128, least",
        lambda r: _large(r) and r.workload.O >= 128,
        _least_share,
        {"": "≥ 0.75"},
    ),
    Figure(
        "share of cuBLAS, B·R·I·O ≥ 2³⁴, O = 64, least",
        lambda r: _large(r) and r.workload.O == 64,
        _least_share,
        {"": "≥ 0.6"},
    ),
    Figure(
        "temporary memory, MiB, most",
        lambda r: OURS in r.temporary,
        extreme(lambda r: r.temporary[OURS] / MIB, max),
        {"": "≤ 64"},
    ),
    Figure("noise: our time over our time, least", lambda r: True, extreme(lambda r: r.noise), {}),
    Figure("noise: our time over our time, most", lambda r: True, extreme(lambda r: r.noise, max), {}),
)


NOTES = (
    "Gradients of x, z and the head; every way a CUDA graph; replays interleaved, with an empty last-level cache; "
    f"medians of {ROUNDS}.",
    "again: our time over our time, the noise.",
    f"share of cuBLAS: 3·2·B·R·I·O flops over our time and over the rate of one product of {RATE}³.",
    "MiB: peak temporary memory as torch's allocator sees it, results apart.",
)


def temporary_bytes(run: Step) -> int:
    """Peak bytes of a call beyond what is there before and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}.values())
    return max(0, torch.cuda.max_memory_allocated() - before - kept)


def captured(run: Step) -> torch.cuda.CUDAGraph:
    """The call as a graph, after what it sets up at first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Clock:
    """Seconds of one replay, with an empty last-level cache."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flushed = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def __call__(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def products_rate(dtype: torch.dtype, clock: Clock) -> float:
    """flop/s of one large square product of cuBLAS, on random numbers."""
    a, b = (torch.randn(RATE, RATE, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    graph = captured(lambda: (torch.mm(a, b, out=out),))
    return 2 * RATE**3 / median(clock(graph) for _ in range(20))


def measure(w: Workload, dtype: torch.dtype, rate: float, clock: Callable[..., float], until: float) -> Row:
    """Measure a workload; compiled peers only while there is time to compile them."""
    torch._dynamo.reset()
    inputs, g = factors(w, dtype, DEVICE)
    truth = Truth(inputs, g)
    ways: dict[str, Step] = {OURS: step(fused, inputs, g)}
    dropped: dict[str, str] = {}
    for peer in PEERS:
        if why := unfit(peer, w, dtype.itemsize, MAX_BYTES):
            dropped[peer.name] = why
        elif peer.compiled and time.monotonic() + SLACK > until:
            dropped[peer.name] = "no time"
        else:
            ways[peer.name] = step(peer.function(), inputs, g)
    temporary: dict[str, int] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    first: dict[str, float] = {}
    for name, run in ways.items():
        try:
            truth.check(name, run())
            temporary[name] = temporary_bytes(run)
            graphs[name] = captured(run)
        except (RuntimeError, AssertionError) as error:
            if name == OURS:
                raise
            dropped[name] = type(error).__name__
            continue
        if name != OURS:
            first[name] = min(clock(graphs[name]) for _ in range(3))
    for name, seconds_of in first.items():
        if seconds_of > SLOWER * min(first.values()):
            dropped[name] = f"({seconds_of * 1e3:.3f})"
            del graphs[name]
    order = [*graphs.items(), (AGAIN, graphs[OURS])]
    seconds: dict[str, list[float]] = {name: [] for name, _ in order}
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for name, graph in order:
            seconds[name].append(clock(graph))
    return Row(w, {name: median(s) for name, s in seconds.items()}, temporary, dropped, rate if w.N == 1 else None)


def _output(*command: str) -> str:
    """The first line that a command prints; nothing where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def machine(dtype: str) -> str:
    """What it is measured on, in a sentence."""
    import triton

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    backend = fasthyper.backends.backend("auto", torch.device("cuda")).__name__.rpartition(".")[2]
    return (
        f"Measured on {torch.cuda.get_device_name(0)}, driver {driver}; torch {torch.__version__}, triton "
        f"{triton.__version__}; commit {_output('git', 'rev-parse', '--short', 'HEAD')}, {date.today().isoformat()}; "
        f"{dtype}, backend {backend}; CUDA graphs."
    )


def prepare(w: Workload, dtype: torch.dtype) -> None:
    """Compile the tiles that ours would time, which triton keeps on disk; the times are of no use here."""
    from fasthyper.backends.triton import tuning

    tuning._time = lambda run, c: run(c) or c.seconds  # type: ignore[assignment]
    tuning._write = lambda device: None
    step(fused, *factors(w, dtype, DEVICE))()
    torch.cuda.synchronize()


def prepare_all(wanted: list[Workload], dtype: torch.dtype) -> None:
    """Do so for all workloads, in as many processes as help: one after the other it takes minutes."""
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for w, done in [(w, pool.submit(prepare, w, dtype)) for w in wanted]:
            if error := done.exception():
                print(f"{w.label} was not prepared: {error!r}", flush=True)


def as_published(w: Workload) -> Workload:
    """The workload at its published size, for which a GPU is large enough."""
    return dataclasses.replace(w, B=w.published or w.B, published=None)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", metavar="NAME", help="workloads whose name has this in it; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; workloads beyond are left out, and said")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = arguments(given)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    until = time.monotonic() + args.budget
    dtype, where = getattr(torch, args.dtype), machine(args.dtype)
    wanted = [w for w in WORKLOADS if args.only is None or args.only.lower() in w.label.lower()]
    wanted = [as_published(w) for w in wanted]  # those that the floors are about first
    wanted.sort(key=lambda w: (w.N > 1, -w.flops))
    prepare_all(wanted, dtype)
    clock = Clock()
    rate = products_rate(dtype, clock)
    print(f"one product of {RATE}³: {rate / 1e12:.0f} Tflop/s\n{table(COLUMNS, [])}", flush=True)
    rows: list[Row] = []
    without: list[str] = []
    report = ""
    for k, w in enumerate(wanted):
        now = time.monotonic()
        share = 2 * (until - now) / (len(wanted) - k)  # of what time is left, for compiled peers
        try:
            if now > until:
                raise TimeoutError("no time")
            row = measure(w, dtype, rate, clock, now + share)
            line_of_row = line(cells(row))
        except Exception as error:  # the others are worth having
            without.append(f"{w.label} ({type(error).__name__}: {error})")
            print(f"{w.label}: {error!r}", flush=True)
            continue
        rows.append(row)
        print(line_of_row, flush=True)
        missing = f" Without {'; '.join(without)}." if without else ""
        title = f"# Forward + backward on a GPU, {args.dtype}"
        report = full(rows, "", where + missing, title, FIGURES, NOTES).replace("share of sgemm", "share of cuBLAS")
        if args.only is None:  # after each, so that nothing is lost
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"gpu_{args.dtype}.md").write_text(report)
    print("\n" + report)
    if args.only is None and rows:
        name = f"gpu_{args.dtype}"
        into_readme(name, short(rows, where, f"{name}.md"))
        print(f"written to {args.out / name}.md")


if __name__ == "__main__":
    main()
