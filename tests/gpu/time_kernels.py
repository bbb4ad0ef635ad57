"""The stage `kernels` of `make gpu`: each part of a layer by each kernel, as CSV on stdout.

Times are those of a replayed graph with a cold L2 cache, the medians of two rounds that are apart. `share` is the share
of a product of equal flops. `tile` says what Triton took.
"""

from __future__ import annotations

import contextlib
import csv
import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_common import TIMED, attempt, made, report, say, sized
from gpu_ways import PARTS, tile_of, ways

from benchmarks.devices import GPU

COLUMNS = ("problem", "part", "way", "first_us", "second_us", "share", "tile", "note")
TIMES = 7


def timed(device: GPU, call: Any, rank: int | None) -> tuple[Any, str, str]:
    """Return a replay of a call with its first time, the tile, and a note; None with the reason if it fails."""
    with tile_of(rank) if rank is not None else contextlib.nullcontext([]) as taken:
        if rank is not None:
            call()
            if all(rank >= count for *_, count in taken):
                return None, "", "there are fewer tiles"
            tile = "; ".join(f"{key} {tile} in {splits}" for key, tile, splits, _ in dict.fromkeys(taken))
        else:
            tile = ""
        replay, note = device.prepare(call)
        return (replay, seconds(device, replay)), tile, note


def seconds(device: GPU, replay: Any) -> float:
    return median(device.seconds(replay) for _ in range(TIMES))


def measure(device: GPU, problem: str, part: str, table: Any) -> tuple[dict[str, float], int]:
    """Write a row for each way; return the best seconds by the first word of the ways' names, and how many failed."""
    sizes = sized(TIMED[problem])
    tensors = made(sizes, torch.bfloat16, affine=False)
    found = [
        (way, *attempt(partial(timed, device, call, rank))) for way, call, rank in ways(sizes, part, tensors)
    ]  # all of the first round, then all of the second
    best: dict[str, float] = {}
    rate = float("nan")
    for way, got, why in found:
        once, tile, note = got or (None, "", why)
        if once is None:
            table.writerow((problem, part, way, "", "", "", tile, note))
            continue
        once_and_again = (once[1], seconds(device, once[0]))
        least, kind = min(once_and_again), way.split()[0]
        rate = least if kind == "product" else rate
        best[kind] = min(best.get(kind, float("inf")), least)
        times = (f"{one * 1e6:.1f}" for one in once_and_again)
        table.writerow((problem, part, way, *times, f"{rate / least:.3f}", tile, note))
    return best, sum(bool(why) for _, _, why in found)


def main() -> int:
    """Print a row for each way as soon as it is timed; return 1 if one failed."""
    device = GPU()
    table = csv.writer(sys.stdout)
    table.writerow(COLUMNS)
    failed = 0
    for problem in TIMED:
        best = {}
        for part in PARTS:
            best[part], bad = measure(device, problem, part, table)
            failed += bad
            sys.stdout.flush()
            report(failed=failed)
        kinds = [kind for kind in best["forward"] if all(kind in one for one in best.values())]
        say(f"{problem} {' / '.join(PARTS)} µs: " + "; ".join(f"{kind} {_parts(best, kind)}" for kind in kinds))
        if {"triton", "cuda"} <= set(kinds):
            triton, cuda = (sum(one[kind] for one in best.values()) for kind in ("triton", "cuda"))
            say(f"{problem} forward + backward: Triton takes {triton / cuda:.2f} times as long as CUDA")
        torch.cuda.empty_cache()
    return 1 if failed else 0


def _parts(best: dict[str, dict[str, float]], kind: str) -> str:
    return " / ".join(f"{one[kind] * 1e6:.0f}" for one in best.values())


if __name__ == "__main__":
    sys.exit(main())
