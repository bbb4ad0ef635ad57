"""Choose the tile of a call: the fastest on this device, timed once for each key and stored on disk.

A key is the kernel, the sizes that matter, the dtype and the precision. Only the `_MOST_TIMED` tiles of the lowest
predicted time are timed, so that the first call of a key takes their compilation, one to two seconds each, and some
milliseconds. The tile of the lowest predicted time is taken without timing where `FASTHYPER_AUTOTUNE=0`, under
`torch.use_deterministic_algorithms(True)`, as results must not depend on timing, and where a CUDA graph captures the
first call of a key or ``torch.compile`` traces it. `FASTHYPER_CACHE` is the folder of the stored choices.
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

from ... import compiled
from ..._version import __version__
from .. import gpu
from ..gpu import INTERPRETER, Device, cdiv
from . import recording, repeat
from .tiles import Tile

_MOST_TIMED = 3
_LAUNCH = 3e-6  # seconds
_BANDWIDTH = gpu.GpuCosts().machine("cuda", torch.float32, 1).memory_bandwidth
_RUNS, _SLEEP = 5, 4_000_000  # timed runs; clock cycles, about two milliseconds, in which Python queues these runs
_chosen: dict[tuple[str, str], Tile] = {}  # by the device's name and the key as text


class Candidate(NamedTuple):
    """A tile, and how a call is computed with it.

    Args:
        tile: the tile.
        splits: number of parts into which the sum is split.
        seconds: the predicted time.
        whole: number of rows of blocks that are computed first, without a split: they fill all processors, which the
            last blocks would not.
    """

    tile: Tile
    splits: int
    seconds: float
    whole: int = 0


class Tiling(NamedTuple):
    """The blocks into which a tile divides a call; a block may be smaller than the tile.

    Args:
        blocks: number of blocks of the output.
        rows: rows of one block.
        columns: columns of one block.
        depth: length of the sum, padded.
        steps: number of steps along the axis that a split divides.
        across: number of blocks in a row of blocks, if some of the rows may be computed apart; else 0.
    """

    blocks: int
    rows: int
    columns: int
    depth: int
    steps: int
    across: int = 0


@functools.lru_cache(maxsize=4096)
def candidate(tile: Tile, tiling: Tiling, partial: int, limit: int, processors: int, bits: int) -> Candidate:
    """Predict the time of a tile with the best division of the work.

    The sum is split where the blocks are too few for the device, or that of the last blocks, which fill no whole wave.

    Args:
        tile: the tile.
        tiling: its blocks.
        partial: bytes of the partial sums of one split.
        limit: bytes that all partial sums may take.
        processors: number of blocks that run at the same time.
        bits: size of a number of the operands.
    """
    # Flops per second of one multiprocessor, predicted for sm_90. Small tiles read their operands more often.
    rate = 4e12 if bits == 16 else 6e11
    rate *= min(1.0, tiling.rows / 256 + 0.3) * min(1.0, tiling.columns / 128 + 0.3)
    block = 2.0 * tiling.rows * tiling.columns * tiling.depth / rate  # seconds
    blocks, steps, across = tiling.blocks, tiling.steps, tiling.across

    def best(blocks: int, partial: int) -> tuple[float, int]:
        """Return the lowest time of some blocks, and the number of splits that has it."""
        times = [cdiv(blocks, processors) * block]
        for splits in range(2, min(steps, limit // max(1, partial), 2 * processors // blocks) + 1):
            seconds = cdiv(blocks * splits, processors) * block * cdiv(steps, splits) / steps
            # Another launch; partial sums are written and read.
            times.append(seconds + _LAUNCH + 2 * splits * partial / _BANDWIDTH)
        seconds = min(times)
        return seconds, times.index(seconds) + 1

    seconds, splits = best(blocks, partial)
    whole = blocks // processors * processors // across if across else 0
    rest = blocks - whole * across
    if whole and rest:
        apart, rest_splits = best(rest, partial * rest // blocks)
        apart += cdiv(whole * across, processors) * block + _LAUNCH
        if apart < seconds:
            return Candidate(tile, rest_splits, apart, whole)
    return Candidate(tile, splits, seconds)


def choose(
    key: tuple[object, ...], candidates: Sequence[Candidate], device: Device, run: Callable[[Candidate], None]
) -> Candidate:
    """Return the fastest candidate for a key; time the candidates if no choice is stored."""
    ranked = sorted(candidates, key=lambda c: c.seconds)
    if len(ranked) == 1 or not _may_time(device):
        return ranked[0]
    by_tile = {c.tile: c for c in ranked}
    stored_as = (device.name, " ".join(map(str, key)))
    if stored_as not in _chosen:  # choices of this process stay, even if another process has stored others
        _chosen.update({k: tile for k, tile in _read(device).items() if k not in _chosen})
    if _chosen.get(stored_as) not in by_tile:
        if gpu.is_capturing() or recording.is_traced():
            return ranked[0]
        _chosen[stored_as] = min(ranked[:_MOST_TIMED], key=lambda c: _time(run, c)).tile
        _write(device)
    return by_tile[_chosen[stored_as]]


def forget() -> None:
    """Forget the choices of this process; those on disk stay."""
    _chosen.clear()
    repeat.forget()


def _may_time(device: Device) -> bool:
    """Return whether candidates may be timed."""
    enabled = device.arch != INTERPRETER and os.environ.get("FASTHYPER_AUTOTUNE") != "0"
    return enabled and not torch.are_deterministic_algorithms_enabled()


def _time(run: Callable[[Candidate], None], c: Candidate) -> float:
    """Return the seconds of one run. The device sleeps first, so that all runs are queued before the first starts."""
    recording.spoil()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        run(c)
        torch.cuda._sleep(_SLEEP)
        start.record()
        for _ in range(_RUNS):
            run(c)
        end.record()
        end.synchronize()
    except Exception:  # the tile does not fit this device
        return float("inf")
    return start.elapsed_time(end) / 1e3 / _RUNS


def path(device: Device) -> Path:
    """Return the file that stores the choices for a device."""
    name = "".join(c if c.isalnum() else "-" for c in f"{device.name} triton {triton.__version__} {__version__}")
    return compiled.cache() / f"tiles-{name}.json".lower()


def _read(device: Device) -> dict[tuple[str, str], Tile]:
    try:
        stored = json.loads(path(device).read_text())
        return {(device.name, key): Tile(*numbers) for key, numbers in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # no file, or one with other content
        return {}


def _write(device: Device) -> None:
    """Store the choices, with those of other processes, in one step; do nothing if the file cannot be written."""
    choices = _read(device) | {key: tile for key, tile in _chosen.items() if key[0] == device.name}
    text = json.dumps({key: tile for (_, key), tile in choices.items()}, indent=0)
    try:
        file = path(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
            scratch.write(text)
        os.replace(scratch.name, file)
    except OSError:
        return
