"""The studies: workloads against everyone, cost along a size, and training. Each row is written as it is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from fasthyper import planner
from fasthyper.problem import Problem

from . import training
from .devices import CPU, GPU
from .peers import AGAIN, OURS, PEERS, kind, ours, peers, schedules
from .records import Context, Record
from .resident import resident_bytes
from .steps import BOTH, MODES
from .timing import Patience, compare
from .workloads import AXES, WORKLOADS, Workload

ALONG_SIZES = ("materialise + bmm", "x ⊗ z first", "materialise in chunks")
TRAINING_SECONDS = 100.0

Groups = Iterator[list[Record]]


def planned(w: Workload, dtype: torch.dtype, context: Context) -> str:
    """The order that the planner takes for forward and for backward: of x and z, then the head, where they differ."""
    problem = partial(
        Problem,
        batch=w.B,
        points=w.N,
        cond_features=w.R,
        in_features=w.I,
        out_features=w.O,
        dtype=dtype,
        device=context.kind,
        backend=context.backend,
    )
    apart = context.backend == "cpu" and w.N == 1
    needs = [(True, True, False), (False, False, True)] if apart else [(True, True, True)]
    calls = [problem("apply"), *(problem("grads", needs=those) for those in needs)]
    return " / ".join(planner.plan(call).schedule for call in calls)


def workloads(
    chosen: Sequence[Workload],
    dtypes: Sequence[torch.dtype],
    modes: Sequence[str],
    device: CPU | GPU,
    context: Context,
    compiled: bool = True,
    until: float = float("inf"),
    compile_until: float = float("inf"),
) -> Groups:
    """Every workload: forward + backward against everyone, the rest against who comes near the best of them there.

    On a CPU, what is not forward + backward in float32 is measured on the README's workloads alone, unless some are
    named, and in 16 bits without torch.compile. `compiled` says whether that takes part at all.
    """
    named = len(chosen) < len(WORKLOADS) // 2
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if device.kind == "cpu" and dtype != torch.float32:
            chosen, compiled = [w for w in chosen if w.readme or named], False
        layers = [w for w in chosen if kind(w) == "layer"]
        resident: dict[Workload, int | None] = {}
        if device.kind == "cpu" and BOTH in modes and layers:
            sizes = resident_bytes(layers, name, "auto", torch.get_num_threads())
            resident = dict(zip(layers, sizes, strict=True))
        for w in chosen:
            near: set[str] | None = None  # unless forward + backward is measured, everyone
            for mode in sorted(modes, key=lambda mode: mode != BOTH):
                if device.kind == "cpu" and mode != BOTH and not (w.readme or named):
                    continue
                if time.monotonic() > until:
                    return
                may = compiled and time.monotonic() < compile_until
                those = [p for p in peers(w, dtype, device.kind) if may or not p.compiled]
                ways = [*ours(w, device.kind), *(p for p in those if near is None or p.name in near)]
                patience = Patience() if mode == BOTH else Patience(seconds=0.7)
                group = compare(w, mode, dtype, device, ways, context, patience, study="workloads")
                if mode == BOTH:
                    near = {r.way for r in group if r.rounds and r.rounds > 1}
                    more = {"resident": resident.get(w), "plan": planned(w, dtype, context) if w in layers else ""}
                    group = [r.replace(**more) if r.role == "ours" else r for r in group]
                yield group


def scaling(axes: Sequence[str], device: CPU | GPU, context: Context, until: float = float("inf")) -> Groups:
    """Forward + backward while one size grows: ours, ours in each order, and three peers to where memory ends."""
    few = [p for p in PEERS if p.name in ALONG_SIZES and p.of == "layer"]
    dtype = torch.float32 if device.kind == "cpu" else torch.bfloat16
    backend = "cpu" if context.backend == "cpu" else context.backend
    for axis in (a for a in AXES if a.name in axes):
        for w in axis.workloads(device.kind):
            if time.monotonic() > until:
                return
            ways = [*(p for p in ours(w, device.kind) if p.name in (OURS, AGAIN)), *schedules(backend), *few]
            more = {"study": "scaling", "axis": axis.name, "most_bytes": float("inf")}
            group = compare(w, BOTH, dtype, device, ways, context, Patience(seconds=1.0), **more)
            plan = planned(w, dtype, context)
            yield [r.replace(plan=plan) if r.role == "ours" else r for r in group]
            if any(r.way == ALONG_SIZES[0] and r.note == "out of memory" for r in group):
                break


def trained(device: CPU | GPU, context: Context, seconds: float = TRAINING_SECONDS) -> Groups:
    """The training examples."""
    yield from training.measure(context, seconds, device.kind)


def chosen(only: str | None, large: bool, device: str) -> list[Workload]:
    """The workloads whose label has `only` in it: all without it; those of gigabytes only if asked for, or on a GPU.

    On a GPU they are as published, and those first that the floors are about: a budget may end before the last.
    """
    found = [w for w in WORKLOADS if (only or "").lower() in w.label.lower()]
    if device == "cpu":
        return [w for w in found if large or not w.large]
    return sorted((w.as_published() for w in found), key=lambda w: (w.N > 1, -w.B * w.N * w.R * w.I * w.O))


STUDIES = ("workloads", "scaling", "training")
__all__ = ["MODES", "STUDIES", "chosen", "scaling", "trained", "workloads"]
