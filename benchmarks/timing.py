"""Forward + backward of a workload by ours and by its peers, interleaved in one process: times and temporary memory."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from statistics import median, quantiles

import torch
from peers import PEERS, Peer, Step, Truth, factors, fused, step
from workloads import Workload

from fasthyper.experiments.measure import peak_temporary_bytes

OURS, AGAIN = "fasthyper", "fasthyper again"
PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 512))  # whose best rate is the machine's
RATES = 12  # measurements of that rate at most
MAX_BYTES = 4 << 30  # what a peer may keep
SLOWER = 5  # times the fastest peer's time: from there on a peer is not worth measuring again
LONG = 0.5  # seconds; less may be a library that is set up
SHORT = 0.1  # seconds; what takes less is measured anyway, since other processes may have slowed down the first tries
BUDGET, MOST = 2.0, 200  # short runs get more rounds than asked for: seconds to fill, rounds at most
PATIENCE, LEAST = 60.0, 3  # long ones get fewer: seconds from which on, rounds at least


@dataclass
class Row:
    """What was measured of a workload.

    Attributes:
        workload: which one.
        seconds: typical time by name: `OURS`, `AGAIN` (the same thing, to see the noise) and peers.
        temporary: peak temporary bytes by name, from the profiler.
        dropped: peers that were not measured, by name, and in a few words why.
        rate: flop/s of the machine's matrix product meanwhile, at N = 1.
        resident: peak resident bytes beyond inputs and results, of ours.
    """

    workload: Workload
    seconds: dict[str, float]
    temporary: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    rate: float | None = None
    resident: int | None = None

    @property
    def peers(self) -> dict[str, float]:
        """Seconds of the peers alone."""
        return {name: s for name, s in self.seconds.items() if name not in (OURS, AGAIN)}

    @property
    def best_peer(self) -> str:
        """Name of the fastest one."""
        return min(self.peers, key=self.peers.__getitem__)

    @property
    def speed_up(self) -> float:
        """The fastest peer's time over ours."""
        return self.peers[self.best_peer] / self.seconds[OURS]

    @property
    def noise(self) -> float:
        """Our time over our time."""
        return self.seconds[AGAIN] / self.seconds[OURS]

    @property
    def share(self) -> float | None:
        """Our rate over the machine's, counting the flops of the identity at N = 1."""
        if self.rate is None or self.workload.N > 1:
            return None
        return self.workload.flops / self.seconds[OURS] / self.rate


def ms(seconds: float) -> str:
    """Milliseconds, to three or four digits."""
    value = seconds * 1e3
    decimals = next((k for k, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{decimals}f}"


def clock(run: Callable[[], object]) -> float:
    """Seconds of one call; what it returns is freed after the clock has stopped."""
    start = time.perf_counter()
    results = run()
    seconds = time.perf_counter() - start
    del results
    return seconds


def probe(run: Callable[[], object]) -> float:
    """The best of a few calls, one if it is long."""
    seconds = [clock(run)]
    while len(seconds) < 20 and sum(seconds) < LONG:
        seconds.append(clock(run))
    return min(seconds)


def rounds(once: float, repeats: int) -> int:
    """How many rounds of `once` seconds each to run, where `repeats` are asked for."""
    short, long = min(MOST, int(BUDGET / once)), max(LEAST, int(PATIENCE / once))
    return max(short, min(repeats, long))


def interleaved(steps: dict[str, Step], turns: int, products: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of every run, in rounds of random order; `products` are in a few of the rounds only."""
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, *products)}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            now = list(({**steps, **products} if turn % ceil(turns / RATES) == 0 else steps).items())
            order.shuffle(now)
            for name, run in now:
                seconds[name].append(clock(run))
    finally:
        gc.enable()
    return seconds


def typical(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians, or lower quartiles for all if the fastest takes less than a millisecond: interruptions only add."""
    medians = {name: median(s) for name, s in seconds.items()}
    if min(medians.values()) >= 1e-3:
        return medians
    return {name: quantiles(s, n=4)[0] if len(s) > 1 else s[0] for name, s in seconds.items()}


def products(dtype: torch.dtype) -> dict[str, Step]:
    """The machine's own matrix products; only the smallest where it is slow at this dtype."""
    steps: dict[str, Step] = {}
    for m, n, k in PRODUCTS:
        a, b, out = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
        steps[f"{m} × {n} × {k}"] = run = partial(torch.mm, a, b, out=out)
        if probe(run) > 0.1:
            break
    return steps


def unfit(peer: Peer, w: Workload, itemsize: int, most: int = MAX_BYTES) -> str | None:
    """Why a peer is not measured, or None."""
    if peer.per_sample and w.N > 1:
        return "N = 1 only"
    if (size := peer.numbers(w) * itemsize) > most:
        return f"{size / 2**30:.0f} GiB"
    return None


def _fit(
    peers: Iterable[Peer], w: Workload, factors: tuple, truth: Truth, dropped: dict[str, str]
) -> dict[str, tuple[Step, float]]:
    """The peers worth measuring, by name, each checked, with the time of a first try. Notes why others are not."""
    tried: dict[str, tuple[Step, float]] = {}
    for peer in peers:
        if why := unfit(peer, w, factors[1].element_size()):
            dropped[peer.name] = why
            continue
        way = peer.function()
        fastest = min((s for _, s in tried.values()), default=float("inf"))
        if not peer.compiled and w.B >= 16:  # a compiled one would be compiled for this batch alone
            part = clock(step(way, *factors, instances=w.B // 16))
            if part > max(fastest, LONG):
                dropped[peer.name] = f"> {ms(part)}"
                continue
        run = step(way, *factors)
        truth.check(peer.name, run())
        tried[peer.name] = run, probe(run)
    fastest = min(s for _, s in tried.values())
    dropped.update((name, f"({ms(s)})") for name, (_, s) in tried.items() if s > max(SLOWER * fastest, SHORT))
    return {name: entry for name, entry in tried.items() if name not in dropped}


def measure(w: Workload, dtype: torch.dtype, repeats: int, peers: Iterable[Peer] = PEERS) -> Row:
    """Measure a workload, resident memory apart.

    Args:
        w: the workload.
        dtype: of all tensors.
        repeats: rounds, see `rounds`.
        peers: what to compare with.

    Raises:
        AssertionError: if ours or a peer computes something else.
    """
    torch._dynamo.reset()
    inputs = factors(w, dtype)
    truth = Truth(*inputs)
    ours = step(fused, *inputs)
    truth.check(OURS, ours())
    dropped: dict[str, str] = {}
    fit = _fit(peers, w, inputs, truth, dropped)
    mm = products(dtype) if w.N == 1 else {}
    steps = {OURS: ours, AGAIN: ours, **{name: run for name, (run, _) in fit.items()}}
    once = 2 * probe(ours) + sum(s for _, s in fit.values())
    seconds = interleaved(steps, rounds(once, repeats), mm)
    rates = [2 * m * n * k / median(seconds.pop(name)) for name, (m, n, k) in zip(mm, PRODUCTS, strict=False)]
    temporary = {name: peak_temporary_bytes(run) for name, run in steps.items() if name != AGAIN}
    return Row(w, typical(seconds), temporary, dropped, max(rates, default=None))
