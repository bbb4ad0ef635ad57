"""Measure on this machine, then make tables and figures of what was measured, here or elsewhere.

    python -m benchmarks measure [--device cpu] [--only NAME] [--studies workloads,scaling,training] ...
    python -m benchmarks report

A file of results is kept for each device; what is measured again replaces what was there, and the rest stays.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
import torch._inductor.config

from . import measure, records, timing
from .devices import CPU, GPU
from .prepare import prepare
from .records import MODES
from .workloads import AXES


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("measure", help="time and memory on this machine")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--studies", type=_names(measure.STUDIES), default=measure.STUDIES)
    options.add_argument("--only", metavar="NAME", help="workloads whose name has this in it, and no other study")
    options.add_argument("--dtypes", type=_names(("float32", "bfloat16", "float16")), default=("float32", "bfloat16"))
    options.add_argument("--modes", type=_names(MODES), default=MODES, help=f"of {', '.join(MODES)}")
    options.add_argument("--axes", type=_names([a.name for a in AXES]), default=tuple(a.name for a in AXES))
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of a CPU")
    options.add_argument("--large", action="store_true", help="on a CPU, workloads of many GiB, too")
    options.add_argument("--every", action="store_true", help="on a CPU, all workloads in every mode and dtype")
    options.add_argument(
        "--eager", action="store_true", help="without torch.compile, which compiles for minutes in all"
    )
    options.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which no more is begun; compiling ends at half",
    )
    options.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results")
    options.add_argument("--no-report", action="store_true", help="leave tables and figures for later")
    made = commands.add_parser("report", help="tables and figures from the results")
    made.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results")
    return parser.parse_args(given)


def _names(known: Sequence[str]):
    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(known)}")
        return chosen

    return names


def main(given: Sequence[str] | None = None) -> None:
    """Do what is asked for."""
    args = arguments(given)
    if args.command == "measure":
        _measure(args)
    if args.command == "report" or not args.no_report:
        from . import report  # matplotlib may not be where there is a GPU

        for path in report.write_all(args.out):
            print(f"written: {path.name}")


def _measure(args: argparse.Namespace) -> None:
    """Measure, print and write, group by group, so that nothing is lost."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    chosen = measure.chosen(args.only, args.large, args.device)
    if not chosen:
        raise SystemExit(f"no workload has {args.only!r} in its name; mothernet wants --large")
    torch.set_num_threads(args.threads)
    # compiled anew each time, or the seconds that it takes would be those of a cache
    folder = tempfile.TemporaryDirectory(prefix="fasthyper-", ignore_cleanup_errors=True)  # gone after it
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    torch._inductor.config.compile_threads = 1  # no processes in the background of what is measured
    device = CPU() if args.device == "cpu" else GPU()
    context = records.context(args.device)
    path = args.out / f"{context.slug}.csv"
    start = time.monotonic()
    until = start + args.budget
    studies = ("workloads",) if args.only else args.studies
    records.read(path)  # or say at once that it is not to be read
    print(f"{context.device}; torch {context.torch}; commit {context.commit}", flush=True)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    if args.device == "cuda":
        grown = [w for axis in AXES if axis.name in args.axes for w in axis.workloads("cuda")]
        prepare(
            [(w, dtype) for w in chosen for dtype in dtypes if "workloads" in studies]
            + [(w, torch.bfloat16) for w in grown if "scaling" in studies]
        )
    groups = []
    if "workloads" in studies:
        compile_until = start + args.budget / 2
        options = (args.every or bool(args.only), not args.eager, until, compile_until)
        groups.append(measure.workloads(chosen, dtypes, args.modes, device, context, *options))
    if "scaling" in studies:
        groups.append(measure.scaling(args.axes, device, context, until))
    if "training" in studies:
        groups.append(measure.trained(device, context, until))
    for group in chain.from_iterable(groups):
        known = [r for r in records.read(path) if measure.listed(r)]
        records.write(path, records.replaced(known, group))
        print(f"{time.monotonic() - start:6.0f} s  {timing.told(group)}", flush=True)


if __name__ == "__main__":
    main()
