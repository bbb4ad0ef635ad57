"""Forward + backward of all three inputs on a CPU, against the ways in which W is written out: time and memory.

    python benchmarks/cpu.py [--dtype float32] [--only NAME]

Prints a row for each workload as it is measured, then writes benchmarks/results/cpu_DTYPE.md and the README's table.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch._inductor.config
from report import COLUMNS, RESULTS, ROOT, cells, full, into_readme, line, machine, short, table
from resident import resident_bytes
from timing import measure
from workloads import WORKLOADS

import fasthyper
from fasthyper.backends import BACKENDS, backend


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7, help="rounds; short runs get more, those of minutes fewer")
    parser.add_argument("--only", metavar="NAME", help="workloads whose name has this in it; nothing is written")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--large", action="store_true", help="workloads of many GiB, too")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = arguments(given)
    torch.set_num_threads(args.threads)
    torch._inductor.config.compile_threads = 1  # no processes in the background of what is measured
    wanted = [
        w
        for w in WORKLOADS
        if (args.large or not w.large) and (args.only is None or args.only.lower() in w.label.lower())
    ]
    if not wanted:
        raise SystemExit(f"no workload has {args.only!r} in its name; mothernet wants --large")
    load = os.getloadavg()[0]
    resident = resident_bytes(wanted, args.dtype, args.backend, args.threads)
    print(table(COLUMNS, []), flush=True)
    rows = []
    for w, size in zip(wanted, resident, strict=True):
        with fasthyper.use_backend(args.backend):
            row = measure(w, getattr(torch, args.dtype), args.repeats)
        row.resident = size
        rows.append(row)
        print(line(cells(row)), flush=True)
    taken = backend(args.backend, torch.device("cpu")).__name__.split(".")[-1]
    where = machine(args.dtype, taken, load)
    report = full(rows, args.dtype, where)
    print("\n" + report)
    if args.only is not None:
        return
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"cpu_{args.dtype}.md"
    out.write_text(report)
    into_readme(out.stem, short(rows, where, out.name))
    print(f"written to {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
