"""Which tile a call takes: timed once for a kind of call, on the device, and kept on disk.

At most `_MOST` tiles are timed, the likeliest, so that the first call of a kind costs their compilation, one to two
seconds each, and some milliseconds. `FASTHYPER_AUTOTUNE=0` takes the likeliest without timing; so do calls under
`torch.use_deterministic_algorithms(True)`, whose bits must not depend on a clock, and calls that a CUDA graph
captures before they were ever made. `FASTHYPER_CACHE` is the folder of what is kept.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ..._version import __version__
from .device import Device
from .tiles import INTERPRETER, Tile

_MOST = 3
_RUNS, _SLEEP = 5, 4_000_000  # cycles: about two milliseconds, in which Python launches the runs
_chosen: dict[tuple[str, str], Tile] = {}  # by device and kind of call


class Candidate(NamedTuple):
    """A tile, parts of a split sum, seconds predicted."""

    tile: Tile
    splits: int
    seconds: float


class Block(NamedTuple):
    """What a tile comes to in a call: some sides are shorter than the tile's.

    Args:
        blocks: of the output.
        rows: of one block.
        columns: of one block.
        depth: of the sum, padded.
        steps: along what a split cuts, of which it takes some.
    """

    blocks: int
    rows: int
    columns: int
    depth: int
    steps: int


@functools.lru_cache(maxsize=4096)
def candidate(tile: Tile, block: Block, partial: int, room: int, processors: int, bits: int) -> Candidate:
    """Predict a tile, with the split that suits it.

    Args:
        tile: the tile.
        block: what it comes to.
        partial: bytes of one split's output.
        room: bytes that all splits may take.
        processors: blocks that run at a time.
        bits: of an operand.
    """
    # Narrow tiles read their operands more often for each product: rates of the matrix units as predicted for sm_90.
    rate = 4e12 if bits == 16 else 6e11
    rate *= min(1.0, block.rows / 256 + 0.3) * min(1.0, block.columns / 128 + 0.3)
    work, steps, blocks = 2.0 * block.rows * block.columns * block.depth, block.steps, block.blocks
    best = Candidate(tile, 1, float("inf"))
    for splits in range(1, max(1, min(steps, room // max(1, partial), 2 * processors // blocks)) + 1):
        waves = -(-blocks * splits // processors)
        seconds = waves * work / rate * -(-steps // splits) / steps
        if splits > 1:
            seconds += 3e-6 + 2 * splits * partial / 3e12  # a second launch, the parts written and read
        if seconds < best.seconds:
            best = Candidate(tile, splits, seconds)
    return best


def choose(
    kind: tuple[object, ...], candidates: Sequence[Candidate], device: Device, run: Callable[[Candidate], None]
) -> Candidate:
    """Return the fastest candidate for this kind of call, timing them if nobody has."""
    ranked = sorted(candidates, key=lambda c: c.seconds)
    if len(ranked) == 1 or not _may_differ(device):
        return ranked[0]
    by_tile = {c.tile: c for c in ranked}
    key = (device.name, " ".join(map(str, kind)))
    if key not in _chosen:  # what this process has taken stays, whatever another has found since
        _chosen.update({k: tile for k, tile in _read(device).items() if k not in _chosen})
    if _chosen.get(key) not in by_tile:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return ranked[0]
        _chosen[key] = min(ranked[:_MOST], key=lambda c: _time(run, c)).tile
        _write(device)
    return by_tile[_chosen[key]]


def forget() -> None:
    """Forget what was timed in this process; what is on disk stays."""
    _chosen.clear()


def _may_differ(device: Device) -> bool:
    """Whether a clock may decide."""
    asked = device.part != INTERPRETER and os.environ.get("FASTHYPER_AUTOTUNE") != "0"
    return asked and not torch.are_deterministic_algorithms_enabled()


def _time(run: Callable[[Candidate], None], c: Candidate) -> float:
    """Seconds of one run; the device sleeps first, so that all runs are in its queue before it begins."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        run(c)
        torch.cuda._sleep(_SLEEP)
        start.record()
        for _ in range(_RUNS):
            run(c)
        end.record()
        end.synchronize()
    except Exception:  # a tile that does not fit this device after all
        return float("inf")
    return start.elapsed_time(end) / 1e3 / _RUNS


def path(device: Device) -> Path:
    """Return the file that keeps what was timed on a device."""
    folder = os.environ.get("FASTHYPER_CACHE") or os.path.expanduser("~/.cache/fasthyper")
    name = "".join(c if c.isalnum() else "-" for c in f"{device.name} triton {triton.__version__} {__version__}")
    return Path(folder) / f"tiles-{name}.json".lower()


def _read(device: Device) -> dict[tuple[str, str], Tile]:
    try:
        kept = json.loads(path(device).read_text())
        return {(device.name, kind): Tile(*numbers) for kind, numbers in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or none that can be read: timed anew
        return {}


def _write(device: Device) -> None:
    """Keep what is known, others' findings included; whole or not at all, and without it where nothing can be kept."""
    known = _read(device) | {key: tile for key, tile in _chosen.items() if key[0] == device.name}
    text = json.dumps({kind: tile for (_, kind), tile in known.items()}, indent=0)
    try:
        file = path(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
            scratch.write(text)
        os.replace(scratch.name, file)
    except OSError:
        return
