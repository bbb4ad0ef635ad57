"""Measure fasthyper and its peers on this machine, and make tables and figures of the results.

    python -m benchmarks measure [--device cpu] [--only LIST] [--studies workloads,scaling,training] ...
    python -m benchmarks overhead
    python -m benchmarks report

Each device has one file of results. A new measurement replaces the old one. All others stay, except those of workloads
that no longer exist or have other sizes, which both commands delete.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch._inductor.config

from . import overhead, records, studies, timing
from .context import current_context
from .devices import CPU, GPU
from .precompile import precompile
from .records import MODES
from .workloads import AXES, Workload

DTYPES = ("float32", "bfloat16", "float16")
FOLDER = "folder of the results (default: benchmarks/results)"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser(
        "measure",
        help="measure time and memory on this machine",
        description="Measure time and memory on this machine. In a LIST, separate names by commas.",
    )
    option = measure.add_argument
    option("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default: cpu)")
    option("--only", metavar="LIST", help="measure only workloads with one of these in their name, and no other study")
    axes = [axis.name for axis in AXES]
    _add_list(measure, "--studies", studies.STUDIES, studies.STUDIES, "what to measure")
    _add_list(measure, "--dtypes", DTYPES, DTYPES[:2], "dtypes of the workloads")
    _add_list(measure, "--modes", MODES, MODES, "what one step computes")
    _add_list(measure, "--axes", axes, axes, "the sizes that grow in the study of scaling")
    threads = min(2, os.cpu_count() or 1)
    text = f"threads of the CPU, such as 1,2: each number has a file of results (default: {threads})"
    option("--threads", metavar="LIST", type=_counts, default=(threads,), help=text)
    option("--large", action="store_true", help="on a CPU, also measure workloads that need many GiB")
    option("--every", action="store_true", help="on a CPU, measure all workloads in every mode and dtype")
    option("--eager", action="store_true", help="skip torch.compile, which takes minutes in all")
    option(
        "--budget",
        metavar="SECONDS",
        type=float,
        default=float("inf"),
        help="start no new measurement after this time, and compile nothing after half of it",
    )
    option("--out", metavar="FOLDER", type=Path, default=records.RESULTS, help=FOLDER)
    option("--no-report", action="store_true", help="do not make tables and figures")
    of_overhead = commands.add_parser("overhead", help="measure Python's share of a call on a GPU, without a GPU")
    of_overhead.add_argument("--out", metavar="FOLDER", type=Path, default=records.RESULTS, help=FOLDER)
    report = commands.add_parser("report", help="make tables and figures of the results")
    report.add_argument("--out", metavar="FOLDER", type=Path, default=records.RESULTS, help=FOLDER)
    return parser.parse_args(given)


def _add_list(
    parser: argparse.ArgumentParser, name: str, known: Sequence[str], default: Sequence[str], text: str
) -> None:
    shown = "all" if len(default) == len(known) else ", ".join(default)
    text = f"{text}: {', '.join(known)} (default: {shown})"
    parser.add_argument(name, metavar="LIST", type=_names(known), default=tuple(default), help=text)


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return chosen

    return names


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(count) for count in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("needs at least one thread")
    return counts


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = arguments(given)
    if args.command == "overhead":
        print(overhead.write(args.out).read_text())
    if args.command == "measure":
        _measure(args)
    if args.command == "report" or (args.command == "measure" and not args.no_report):
        from . import report  # needs matplotlib, which a machine with a GPU may not have

        for source in sorted(args.out.glob("*.csv")):
            for workload in dict.fromkeys(record.workload for record in studies.drop_outdated(source)):
                print(f"deleted from {source.name}: {workload}, which is no longer measured like this")
        for path in report.write_all(args.out):
            print(f"written: {path.name}")


def _measure(args: argparse.Namespace) -> None:
    """Measure with each number of threads, all within one budget."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here")
    workloads = studies.select(args.only, args.large, args.device)
    if not workloads:
        raise SystemExit(f"no workload has {args.only!r} in its name; on a CPU, large workloads need --large")
    start = time.monotonic()
    for threads in args.threads:
        torch.set_num_threads(threads)
        _measure_here(args, workloads, start)


def _measure_here(args: argparse.Namespace, workloads: Sequence[Workload], start: float) -> None:
    """Measure and print. Each group of records is written at once, so that an interruption loses little."""
    # A new folder each time: with an old cache, the first call would not compile.
    folder = tempfile.TemporaryDirectory(prefix="fasthyper-", ignore_cleanup_errors=True)  # deleted when it is freed
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    torch._inductor.config.compile_threads = 1  # no background processes during measurements
    device = CPU() if args.device == "cpu" else GPU()
    context = current_context(args.device)
    path = args.out / f"{context.slug}.csv"
    until = start + args.budget
    chosen = ("workloads",) if args.only else args.studies
    records.read(path)  # fails now rather than after the first measurement
    print(f"{context.device}; torch {context.torch}; commit {context.commit}", flush=True)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    if args.device == "cuda":
        scaled = [w for axis in AXES if axis.name in args.axes for w in axis.workloads("cuda")]
        precompile(
            [(w, dtype) for w in workloads for dtype in dtypes if "workloads" in chosen]
            + [(w, torch.bfloat16) for w in scaled if "scaling" in chosen]
        )
    groups = []
    if "workloads" in chosen:
        compile_until = start + args.budget / 2
        options = (args.every or bool(args.only), not args.eager, until, compile_until)
        groups.append(studies.measure_workloads(workloads, dtypes, args.modes, device, context, *options))
    if "scaling" in chosen:
        groups.append(studies.measure_scaling(args.axes, device, context, until))
    if "training" in chosen:
        groups.append(studies.measure_training(device, context, until))
    for group in chain.from_iterable(groups):
        known = [r for r in records.read(path) if studies.is_current(r)]
        records.write(path, records.merge(known, group))
        print(f"{time.monotonic() - start:6.0f} s  {timing.describe(group)}", flush=True)


if __name__ == "__main__":
    main()
