"""Ways on one workload, checked first, then timed in turns: one record each."""

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

from fasthyper.experiments.measure import peak_temporary_bytes

from .devices import CPU, GPU, Call
from .inputs import Sets, inputs
from .peers import Peer
from .records import Context, Record, quartiles
from .steps import Truth, step
from .workloads import Workload

SLOWER = {"peer": 1.5, "variant": 3.0}  # times the fastest of its role: from there on not worth more than a try
SHORT = 0.01  # seconds; what takes less is measured anyway, since other processes may have slowed down the first tries
LONG, VERY_LONG = 0.2, 2.0  # seconds; less than the first may be a library that is set up
TRIES = 3
CEILINGS = 5  # measurements of what the machine can do
PART = 16  # of a batch that may take too long


@dataclass(frozen=True)
class Patience:
    """How often to run.

    Attributes:
        seconds: of all ways together, to be filled with rounds.
        least: rounds at least, unless they take longer than `most` seconds; then three, or two if those are minutes.
        most: see there.
        rounds: at most.
    """

    seconds: float = 1.5
    least: int = 5
    most: float = 4.0
    rounds: int = 60

    def turns(self, once: float) -> int:
        """Rounds of `once` seconds each."""
        patient = min(self.least, max(3 if once < 2 * self.most else 2, int(self.most / once)))
        return max(patient, min(self.rounds, int(self.seconds / once)))


@dataclass
class _Tried:
    """A way that is worth timing."""

    peer: Peer
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
    ways: Sequence[Peer],
    context: Context,
    patience: Patience = Patience(),
    most_bytes: float | None = None,
    without: Mapping[str, str] | None = None,
    **more: Any,
) -> list[Record]:
    """Time ways on the same tensors, in rounds of random order, with the machine's ceilings in some of them.

    Args:
        w: the workload.
        mode: one of `steps.MODES`.
        dtype: of all tensors.
        device: where.
        ways: ours, `role` "ours", and others. One that fails, or is far slower than the fastest, is left out and
            its record says so.
        context: for the records.
        patience: how often.
        most_bytes: what a way may keep; by default what the device finds reasonable.
        without: names of ways that are not to be run, and why not.
        more: further fields of all records.

    Raises:
        AssertionError: if ours computes something else than the definition; a peer that does is left out.
        RuntimeError: if ours fails.
    """
    torch._dynamo.reset()
    record = partial(
        Record,
        workload=w.name,
        **{name: getattr(w, name) for name in ("B", "N", "R", "I", "O", "neighbours", "hidden")},
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        context=context,
        **more,
    )
    sets = device.sets(w, dtype)
    truth = Truth(w, mode, sets[0])
    tried: list[_Tried] = []
    left_out: dict[str, dict[str, Any]] = {}
    for peer in ways:
        fastest = min((t.first for t in tried), default=float("inf"))
        why = (without or {}).get(peer.name)
        why = why or peer.unfit(w, dtype, device.most_bytes if most_bytes is None else most_bytes)
        why = why or _too_slow(peer, w, mode, dtype, device, fastest)
        if why:
            left_out[peer.name] = {"note": why}
            continue
        try:
            with device.bounded():
                tried.append(_try(peer, w, mode, device, sets, truth))
        except Exception as error:
            if peer.role == "ours":
                raise
            left_out[peer.name] = {"note": _reason(error)}
            device.tidy()
    for t in _slow(tried):
        left_out[t.peer.name] = {"note": t.note or "tried once", "median": t.first, "rounds": 1}
        left_out[t.peer.name] |= {"compile": t.compile, "temporary": t.temporary}
        tried.remove(t)
    rates = _in_turns(tried, device, dtype, patience.turns(sum(t.first for t in tried)))
    times = {t.peer.name: _times(t) for t in tried}
    records = [record(way=p.name, role=p.role, **(times.get(p.name) or left_out[p.name])) for p in ways]
    for name, (rate, rounds) in rates.items():
        records.append(record(way=name, role="ceiling", rate=rate, rounds=rounds))
    return records


def _too_slow(peer: Peer, w: Workload, mode: str, dtype: torch.dtype, device: CPU | GPU, fastest: float) -> str | None:
    """Whether a part of the batch takes longer than all of it by the fastest; compiling for a part would be a waste."""
    size = w.B // PART // w.neighbours * w.neighbours
    if 0 < device.free() < peer.keeps(w) * dtype.itemsize:
        return None  # it will be refused before long
    if peer.compiled or device.kind != "cpu" or not size or fastest < LONG / PART:
        return None
    small = replace(w, B=size)
    try:
        with device.bounded():
            run = step(peer.function(small, device.kind), mode, Sets([inputs(small, dtype)]), peer.layout)
            part = device.seconds(run)
    except Exception as error:
        return _reason(error)
    return f"{size:,} instances took {part:.3g} s" if part > max(fastest, LONG) else None


def _try(peer: Peer, w: Workload, mode: str, device: CPU | GPU, sets: Sets, truth: Truth) -> _Tried:
    """Run it once and check that, again for its memory, then a few times."""
    run = step(peer.function(w, device.kind), mode, sets, peer.layout)
    sets.rewind()
    start = time.perf_counter()
    results = run()
    first = time.perf_counter() - start
    truth.check(peer.name, results, peer.layout)
    del results
    # The profiler takes its time with what makes many calls.
    long = first > VERY_LONG and not peer.compiled
    temporary = None if long and peer.role == "peer" else peak_temporary_bytes(run, device.kind)
    call, note = device.ready(run)
    seconds = [first if long and device.kind == "cpu" else device.seconds(call)]
    while len(seconds) < TRIES and sum(seconds) < LONG:
        seconds.append(device.seconds(call))
    return _Tried(peer, call, min(seconds), first - min(seconds) if peer.compiled else None, temporary, note)


def _slow(tried: Sequence[_Tried]) -> list[_Tried]:
    """Who is so much slower than the fastest of the same role that it will not be the fastest."""
    slow = []
    for role, times in SLOWER.items():
        those = [t for t in tried if t.peer.role == role]
        fastest = min((t.first for t in those), default=0.0)
        slow += [t for t in those if t.first > max(times * fastest, SHORT)]
    return slow


def _reason(error: Exception) -> str:
    """Why there are no times, in a few words."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        return "out of memory"
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text[:80]}"


def _in_turns(
    tried: Iterable[_Tried], device: CPU | GPU, dtype: torch.dtype, turns: int
) -> dict[str, tuple[float, int]]:
    """Time all, and return the ceilings' rates and of how many calls they are."""
    ceilings = device.ceilings(dtype)
    order: list[tuple[Call, list[float]]] = [(t.call, t.seconds) for t in tried]
    others = [(c.call, []) for c in ceilings.values()]
    shuffle = random.Random(0).shuffle
    for call, _ in others:  # warm up
        device.seconds(call)
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            now = [*order, *others] if turn % ceil(turns / CEILINGS) == 0 else [*order]
            shuffle(now)
            for call, seconds in now:
                seconds.append(device.seconds(call))
    finally:
        gc.enable()
    rates = (c.amount / median(seconds) for c, (_, seconds) in zip(ceilings.values(), others, strict=True))
    return {name: (rate, len(s)) for name, rate, (_, s) in zip(ceilings, rates, others, strict=True)}


def told(group: Sequence[Record]) -> str:
    """What was measured, in a line: ours, and the fastest peer; of training, after the last step."""
    last = max((r.step or 0 for r in group), default=0)
    group = [r for r in group if (r.step or 0) == last]
    ours = next((r for r in group if r.role == "ours" and r.median), None)
    if ours is None or ours.median is None:
        return "nothing"
    peers = [r for r in group if r.role == "peer" and r.median]
    best = min(peers, key=lambda r: r.median or 0.0, default=None)
    beside = "alone"
    if best and best.median:
        beside = f"{best.median * 1e3:.3f} ms {best.way}, {best.median / ours.median:.2f}"
    size = f"B {ours.B:,} N {ours.N:,} R {ours.R:,} {ours.I} → {ours.O}"
    return f"{ours.workload}, {size}, {ours.mode}, {ours.dtype}: {ours.median * 1e3:.3f} ms; {beside}"


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
