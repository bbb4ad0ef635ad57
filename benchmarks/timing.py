"""Compare ways on one workload: check each way, then time all of them in turns. Each way gives one record."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from statistics import median
from typing import Any

import torch

from fasthyper.measure import peak_temporary_bytes

from .context import Context
from .devices import CPU, GPU, Call
from .inputs import Sets, inputs
from .records import SIZES, Record, quartiles
from .steps import Truth, step
from .ways import Way
from .workloads import Workload

SLOWER = {
    "peer": 1.5,
    "variant": 3.0,
}  # slower than the fastest of its role by this factor: tried, but not timed further
SHORT = 0.01  # seconds; shorter calls are always timed further, since other processes may have slowed down the tries
LONG, VERY_LONG = 0.2, 2.0  # seconds; a first call up to LONG may be slow from setting up a library
TRIES = 3
CEILINGS = 5  # measurements of each ceiling
FRACTION = 16  # divides the batch for a first try of a way that may take too long


@dataclass(frozen=True)
class RoundLimits:
    """How many rounds to time; one round calls every way once.

    Attributes:
        target_seconds: of all rounds together.
        min_rounds: even if they take longer than the target.
        max_seconds: if `min_rounds` would take longer than this, fewer rounds: three, or two if they take minutes.
        max_rounds: even if they take less than the target.
    """

    target_seconds: float = 1.5
    min_rounds: int = 5
    max_seconds: float = 4.0
    max_rounds: int = 60

    def rounds(self, seconds: float) -> int:
        """Return the number of rounds that take `seconds` each."""
        fewest = 3 if seconds < 2 * self.max_seconds else 2
        least = min(self.min_rounds, max(fewest, int(self.max_seconds / seconds)))
        return max(least, min(self.max_rounds, int(self.target_seconds / seconds)))


@dataclass
class _Tried:
    """A way that passed the check, and its times so far."""

    way: Way
    call: Call
    first: float
    compile: float | None
    temporary: int | None
    note: str
    seconds: list[float] = field(default_factory=list)


def compare(
    w: Workload,
    mode: str,
    dtype: torch.dtype,
    device: CPU | GPU,
    ways: Sequence[Way],
    context: Context,
    limits: RoundLimits = RoundLimits(),
    max_bytes: float | None = None,
    skip: Mapping[str, str] | None = None,
    **fields: Any,
) -> list[Record]:
    """Time ways on the same tensors, in rounds of random order, with the machine's ceilings in some of the rounds.

    Args:
        w: the workload.
        mode: one of `records.MODES`.
        dtype: of all tensors.
        device: where to run.
        ways: fasthyper, with `role` "ours", first, then the others. One that fails, or is far slower than the fastest,
            is not timed further; its record has the reason.
        context: for the records.
        limits: how many rounds.
        max_bytes: the memory that a way may keep; by default `device.max_bytes`.
        skip: reasons not to run a way, by its name.
        fields: further fields of all records.

    Raises:
        AssertionError: if a result of fasthyper is wrong. A peer with a wrong result is left out.
        RuntimeError: if fasthyper fails.
    """
    torch._dynamo.reset()
    record = partial(
        Record,
        workload=w.name,
        **{name: getattr(w, name) for name in SIZES},
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        context=context,
        **fields,
    )
    sets = device.sets(w, dtype)
    truth = Truth(w, mode, sets[0])
    tried: list[_Tried] = []
    left_out: dict[str, dict[str, Any]] = {}
    for way in ways:
        fastest = min((t.first for t in tried), default=float("inf"))
        reason = (skip or {}).get(way.name)
        reason = reason or way.reason_to_skip(w, dtype, device.max_bytes if max_bytes is None else max_bytes)
        reason = reason or _too_slow(way, w, mode, dtype, device, fastest)
        if reason:
            left_out[way.name] = {"note": reason}
            continue
        try:
            with device.memory_limit():
                tried.append(_try(way, w, mode, device, sets, truth))
        except Exception as error:
            if way.role == "ours":
                raise
            left_out[way.name] = {"note": _describe_error(error)}
            device.release_memory()
    for t in _slow(tried):
        left_out[t.way.name] = {"note": t.note or "tried once", "median": t.first, "rounds": 1}
        left_out[t.way.name] |= {"compile": t.compile, "temporary": t.temporary}
        tried.remove(t)
    rates = _time_in_turns(tried, device, dtype, limits.rounds(sum(t.first for t in tried)))
    times = {t.way.name: _times(t) for t in tried}
    records = [record(way=way.name, role=way.role, **(times.get(way.name) or left_out[way.name])) for way in ways]
    for name, (rate, rounds) in rates.items():
        records.append(record(way=name, role="ceiling", rate=rate, rounds=rounds))
    return records


def _too_slow(way: Way, w: Workload, mode: str, dtype: torch.dtype, device: CPU | GPU, fastest: float) -> str | None:
    """Return a note if a fraction of the batch takes longer than all of it by the fastest way, else None."""
    size = 0 if w.draw else w.B // FRACTION  # a part of the terms may have another structure
    if 0 < device.available_bytes() < way.keeps(w) * dtype.itemsize:
        return None  # the whole batch runs out of memory soon
    if way.compiled or device.kind != "cpu" or not size or fastest < LONG / FRACTION:
        return None  # compiling for a fraction takes as long as for the whole batch
    small = replace(w, B=size)
    try:
        with device.memory_limit():
            run = step(way.function(small, device.kind), mode, Sets([inputs(small, dtype)]), way.layout)
            seconds = device.seconds(run)
    except Exception as error:
        return _describe_error(error)
    return f"{size:,} instances took {seconds:.3g} s" if seconds > max(fastest, LONG) else None


def _try(way: Way, w: Workload, mode: str, device: CPU | GPU, sets: Sets, truth: Truth) -> _Tried:
    """Run a way once to check its results, once for its memory, then a few times for its speed."""
    run = step(way.function(w, device.kind), mode, sets, way.layout)
    sets.rewind()
    start = time.perf_counter()
    results = run()
    first = time.perf_counter() - start
    truth.check(way.name, results, way.layout)
    del results
    # The memory profiler is slow if a step makes many calls.
    long = first > VERY_LONG and not way.compiled
    temporary = None if long and way.role == "peer" else peak_temporary_bytes(run, device.kind)
    call, note = device.prepare(run)
    seconds = [first if long and device.kind == "cpu" else device.seconds(call)]
    while len(seconds) < TRIES and sum(seconds) < LONG:
        seconds.append(device.seconds(call))
    return _Tried(way, call, min(seconds), first - min(seconds) if way.compiled else None, temporary, note)


def _slow(tried: Sequence[_Tried]) -> list[_Tried]:
    """Return the ways that are too slow to be the fastest of their role."""
    slow = []
    for role, factor in SLOWER.items():
        rivals = [t for t in tried if t.way.role == role]
        fastest = min((t.first for t in rivals), default=0.0)
        slow += [t for t in rivals if t.first > max(factor * fastest, SHORT)]
    return slow


def _describe_error(error: Exception) -> str:
    """Return a short note about an error."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        return "out of memory"
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text[:80]}"


def _time_in_turns(
    tried: Iterable[_Tried], device: CPU | GPU, dtype: torch.dtype, rounds: int
) -> dict[str, tuple[float, int]]:
    """Append to the times of each way, and return the rate of each ceiling with its number of calls."""
    ceilings = device.ceilings(dtype)
    ways: list[tuple[Call, list[float]]] = [(t.call, t.seconds) for t in tried]
    best: list[tuple[Call, list[float]]] = [(c.call, []) for c in ceilings.values()]
    shuffle = random.Random(0).shuffle
    for call, _ in best:  # warm up
        device.seconds(call)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            order = [*ways, *best] if i % ceil(rounds / CEILINGS) == 0 else [*ways]
            shuffle(order)
            for call, seconds in order:
                seconds.append(device.seconds(call))
    finally:
        gc.enable()
    return {
        name: (ceiling.amount / median(seconds), len(seconds))
        for (name, ceiling), (_, seconds) in zip(ceilings.items(), best, strict=True)
    }


def describe(group: Sequence[Record]) -> str:
    """Return one line about a comparison: fasthyper and the fastest peer; of training, after the last step."""
    last = max((r.step or 0 for r in group), default=0)
    group = [r for r in group if (r.step or 0) == last]
    ours = next((r for r in group if r.role == "ours" and r.median), None)
    if ours is None or ours.median is None:
        return "no times"
    peers = [r for r in group if r.role == "peer" and r.median]
    best = min(peers, key=lambda r: r.median or 0.0, default=None)
    peer = "no peer"
    if best and best.median:
        peer = f"{best.way} {best.median * 1e3:.3f} ms, speed-up {best.median / ours.median:.2f}"
    size = f"B {ours.B:,} N {ours.N:,} R {ours.R:,} {ours.I} → {ours.O}"
    return f"{ours.workload}, {size}, {ours.mode}, {ours.dtype}: fasthyper {ours.median * 1e3:.3f} ms; {peer}"


def _times(t: _Tried) -> dict[str, Any]:
    q1, middle, q3 = quartiles(t.seconds)
    return {
        "q1": q1,
        "median": middle,
        "q3": q3,
        "rounds": len(t.seconds),
        "compile": t.compile,
        "temporary": t.temporary,
        "note": t.note,
    }
