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
from .records import BOTH, TRAINING, Context, Record
from .resident import resident_bytes
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
    every: bool = False,
    compiled: bool = True,
    until: float = float("inf"),
    compile_until: float = float("inf"),
) -> Groups:
    """Every workload against everyone; a training step, against who comes near the best in forward + backward.

    Args:
        chosen: the workloads.
        dtypes: of all tensors.
        modes: of `records.MODES`.
        device: where.
        context: for the records.
        every: whether a CPU measures all of this. Else what is not forward + backward in float32 is measured on the
            README's workloads alone, as are libraries that do what `vmap(functional_call)` does; in 16 bits there is
            forward + backward alone, and no torch.compile.
        compiled: whether torch.compile takes part.
        until: when no more is begun, by `time.monotonic()`.
        compile_until: when no more is compiled.
    """
    fast = device.kind == "cuda" or every
    for dtype in dtypes:
        those = [w for w in chosen if fast or w.readme or dtype == torch.float32]
        resident = _resident([w for w in those if w.readme or every], modes, dtype, device)
        for w in those:
            near: set[str] | None = None
            for mode in sorted(modes, key=lambda mode: mode != BOTH):
                if mode != BOTH and not (fast or (w.readme and dtype == torch.float32)):
                    continue
                if time.monotonic() > until:
                    return
                ways = peers(w, dtype, device.kind)
                may = compiled and (fast or dtype == torch.float32) and time.monotonic() < compile_until
                without = {}
                if mode == TRAINING and near is not None:
                    without = {p.name: "slow in forward + backward" for p in ways if p.name not in near}
                if not (fast or w.readme):
                    without |= {p.name: "as vmap(functional_call)" for p in ways if p.library and p.of == "layer"}
                if not may:
                    without |= {p.name: "was not to be compiled" for p in ways if p.compiled}
                patience = Patience() if mode == BOTH and dtype == torch.float32 else Patience(seconds=0.6, most=4.0)
                more = {"without": without, "study": "workloads"}
                group = compare(w, mode, dtype, device, [*ours(w, device.kind), *ways], context, patience, **more)
                if mode == BOTH:
                    near = {r.way for r in group if r.rounds and r.rounds > 1}
                    plan = planned(w, dtype, context) if kind(w) == "layer" else ""
                    own = {"resident": resident.get(w), "plan": plan}
                    group = [r.replace(**own) if r.role == "ours" else r for r in group]
                yield group


def _resident(
    chosen: Sequence[Workload], modes: Sequence[str], dtype: torch.dtype, device: CPU | GPU
) -> dict[Workload, int | None]:
    layers = [w for w in chosen if kind(w) == "layer"]
    if device.kind != "cpu" or BOTH not in modes or not layers:
        return {}
    sizes = resident_bytes(layers, str(dtype).removeprefix("torch."), "auto", torch.get_num_threads())
    return dict(zip(layers, sizes, strict=True))


def scaling(axes: Sequence[str], device: CPU | GPU, context: Context, until: float = float("inf")) -> Groups:
    """Forward + backward while one size grows: ours, ours in each order, and three peers to where memory ends."""
    few = [p for p in PEERS if p.name in ALONG_SIZES and p.of == "layer"]
    dtype = torch.float32 if device.kind == "cpu" else torch.bfloat16
    for axis in (a for a in AXES if a.name in axes):
        for w in axis.workloads(device.kind):
            if time.monotonic() > until:
                return
            ways = [*(p for p in ours(w, device.kind) if p.name in (OURS, AGAIN)), *schedules(context.backend), *few]
            more = {"study": "scaling", "axis": axis.name, "most_bytes": float("inf")}
            group = compare(w, BOTH, dtype, device, ways, context, Patience(seconds=1.0, most=4.0), **more)
            plan = planned(w, dtype, context)
            yield [r.replace(plan=plan) if r.role == "ours" else r for r in group]
            if any(r.way == ALONG_SIZES[0] and r.note == "out of memory" for r in group):
                break


def trained(device: CPU | GPU, context: Context, until: float = float("inf")) -> Groups:
    """The training examples."""
    seconds = min(TRAINING_SECONDS, until - time.monotonic())
    if seconds > 0:
        yield from training.measure(context, seconds, device.kind)


def listed(record: Record) -> bool:
    """Whether it is of something that is measured today: sizes that the registry no longer has are no one's result."""
    sizes = (record.workload, *record.subject[3:10])
    if record.study == "workloads":
        today = [w for one in WORKLOADS for w in (one, one.as_published())]
    elif record.study == "scaling":
        today = [w for axis in AXES for w in axis.workloads(record.context.kind) if axis.name == record.axis]
    else:
        return True
    return any(sizes == (w.name, w.B, w.N, w.R, w.I, w.O, w.neighbours, w.hidden) for w in today)


def chosen(only: str | None, large: bool, device: str) -> list[Workload]:
    """The workloads whose label has `only` in it: all without it; those of gigabytes only if asked for, or on a GPU.

    On a GPU they are as published, and those first that the floors are about: a budget may end before the last.
    """
    found = [w for w in WORKLOADS if (only or "").lower() in w.label.lower()]
    if device == "cpu":
        return [w for w in found if large or not w.large]
    return sorted((w.as_published() for w in found), key=lambda w: (w.N > 1, -w.B * w.N * w.R * w.I * w.O))


STUDIES = ("workloads", "scaling", "training")
