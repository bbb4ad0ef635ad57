"""The three studies: workloads against all peers, cost along a size, and training. Each yields groups of records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from fasthyper import planner
from fasthyper.problem import ConvProblem, Problem, TermProblem

from . import training
from .context import Context
from .devices import CPU, GPU
from .records import FORWARD_BACKWARD, TRAINING_STEP, Record, read, sizes, write
from .resident import resident_bytes
from .roofline import features
from .timing import RoundLimits, compare
from .ways import AGAIN, OURS, PEERS, TERMS, ours, peers, schedules
from .workloads import AXES, WORKLOADS, Workload

STUDIES = ("workloads", "scaling", "training")
SCALING_PEERS = ("materialise + bmm", "x ⊗ z first", "materialise in chunks")
TRAINING_SECONDS = 100.0

Groups = Iterator[list[Record]]


def select(only: str | None, large: bool, kind: str) -> list[Workload]:
    """Return the workloads whose label contains one of the words in `only`, which commas separate, or all.

    On a CPU, large workloads are left out unless `large`. On a GPU, all have as many instances as published, and those
    that have floors come first, in case the time runs out.
    """
    words = [word.strip().lower() for word in (only or "").split(",")]
    found = [w for w in WORKLOADS if any(word in w.label.lower() for word in words)]
    if kind == "cpu":
        return [w for w in found if large or not w.large]
    return sorted((w.as_published() for w in found), key=lambda w: (w.N > 1, -w.B * w.N * w.R * w.I * w.O))


def is_current(record: Record) -> bool:
    """Return whether the workload or axis of a record still exists, with the record's sizes and function of W."""
    if record.study == "workloads":
        current = [w for one in WORKLOADS for w in (one, one.as_published())]
    elif record.study == "scaling":
        current = [w for axis in AXES for w in axis.workloads(record.context.kind) if axis.name == record.axis]
    else:
        return True
    return any((record.workload, sizes(record)) == (w.name, sizes(w)) for w in current)


def drop_outdated(path: Path) -> list[Record]:
    """Delete the records of a file that are not current, and return them. They would be shown as the new workload's."""
    found = read(path)
    outdated = [record for record in found if not is_current(record)]
    if outdated:
        write(path, [record for record in found if is_current(record)])
    return outdated


def planned_schedules(w: Workload, dtype: torch.dtype, context: Context) -> str:
    """Return the planner's schedules for forward and backward; backward has two if the head's gradient has its own."""
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
    backward = [(True, True, False), (False, False, True)] if apart else [(True, True, True)]
    calls = [problem("apply"), *(problem("grads", needs=needs) for needs in backward)]
    return " / ".join(planner.plan(call).schedule for call in calls)


def planned_term_schedules(w: Workload, dtype: torch.dtype, context: Context) -> str:
    """Return the planner's schedules for forward and backward over terms."""
    rows = (w.S or w.B, w.C or w.B, w.T or w.B)
    like = (w.B, *rows, w.N, w.R, w.I, w.O, dtype, context.kind)
    calls = [TermProblem(op, *like, backend=context.backend) for op in ("apply", "grads")]
    return " / ".join(planner.plan(call).schedule for call in calls)


def planned_convolution_schedules(w: Workload, dtype: torch.dtype, context: Context) -> str:
    """Return the planner's schedules for forward and backward of a convolution."""
    ((I, _),) = features(w)
    sizes = (w.B, w.groups, I, w.O // w.groups, w.R, w.side**2, w.N, w.kernel**2, dtype, context.kind)
    calls = [ConvProblem(op, *sizes, backend=context.backend) for op in ("apply", "grads")]
    return " / ".join(planner.plan(call).schedule for call in calls)


PLANNED = {
    "layer": planned_schedules,
    "convolution": planned_convolution_schedules,
    **dict.fromkeys(TERMS, planned_term_schedules),
}
"""The planner's schedules, by the form of a workload."""


def measure_workloads(
    workloads: Sequence[Workload],
    dtypes: Sequence[torch.dtype],
    modes: Sequence[str],
    device: CPU | GPU,
    context: Context,
    every: bool = False,
    compiled: bool = True,
    until: float = float("inf"),
    compile_until: float = float("inf"),
) -> Groups:
    """Compare fasthyper with all peers on each workload.

    In a training step, only peers that are near the best in forward + backward are measured.

    Args:
        workloads: to measure.
        dtypes: of all tensors.
        modes: of `records.MODES`.
        device: where to run.
        context: for the records.
        every: whether a CPU measures every combination. Otherwise, other modes and dtypes than forward + backward in
            float32 are measured only on the README's workloads, and so are libraries that do the same as
            `vmap(functional_call)`; 16-bit dtypes are measured only in forward + backward and without torch.compile.
        compiled: whether to measure the ways that use torch.compile.
        until: the `time.monotonic()` after which no comparison starts.
        compile_until: the `time.monotonic()` after which nothing is compiled.
    """
    all_modes = device.kind == "cuda" or every
    for dtype in dtypes:
        chosen = [w for w in workloads if all_modes or w.readme or dtype == torch.float32]
        resident = _resident([w for w in chosen if w.readme or every], modes, dtype, device)
        for w in chosen:
            near_best: set[str] | None = None
            for mode in sorted(modes, key=lambda mode: mode != FORWARD_BACKWARD):
                if mode != FORWARD_BACKWARD and not (all_modes or (w.readme and dtype == torch.float32)):
                    continue
                if time.monotonic() > until:
                    return
                others = peers(w, dtype, device.kind)
                compiles = compiled and (all_modes or dtype == torch.float32) and time.monotonic() < compile_until
                skip = {}
                if mode == TRAINING_STEP and near_best is not None:
                    skip = {way.name: "slow in forward + backward" for way in others if way.name not in near_best}
                if not (all_modes or w.readme):
                    libraries = [way for way in others if way.library and "layer" in way.forms]
                    skip |= {way.name: "same as vmap(functional_call)" for way in libraries}
                if not compiles:
                    skip |= {way.name: "not compiled" for way in others if way.compiled}
                main = mode == FORWARD_BACKWARD and dtype == torch.float32
                limits = RoundLimits() if main else RoundLimits(target_seconds=0.6)
                ways = [*ours(w, device.kind), *others]
                group = compare(w, mode, dtype, device, ways, context, limits, skip=skip, study="workloads")
                if mode == FORWARD_BACKWARD:
                    near_best = {r.way for r in group if r.rounds and r.rounds > 1}
                    plan = PLANNED[w.form](w, dtype, context) if w.form in PLANNED else ""
                    group = _with(group, resident=resident.get(w), plan=plan)
                yield group


def _resident(
    workloads: Sequence[Workload], modes: Sequence[str], dtype: torch.dtype, device: CPU | GPU
) -> dict[Workload, int | None]:
    chosen = [w for w in workloads if w.form != "primary" and not ours(w, "cpu")[0].reason_to_skip(w, dtype, 1 << 40)]
    if device.kind != "cpu" or FORWARD_BACKWARD not in modes or not chosen:
        return {}
    found = resident_bytes(chosen, str(dtype).removeprefix("torch."), "auto", torch.get_num_threads())
    return dict(zip(chosen, found, strict=True))


def _with(group: list[Record], **fields: object) -> list[Record]:
    """Set fields of fasthyper's own record."""
    return [r.replace(**fields) if r.role == "ours" else r for r in group]


def measure_scaling(axes: Sequence[str], device: CPU | GPU, context: Context, until: float = float("inf")) -> Groups:
    """Compare fasthyper, each schedule and three peers in forward + backward while one size grows.

    An axis ends where the first of the peers runs out of memory.
    """
    few = [way for way in PEERS if way.name in SCALING_PEERS and "layer" in way.forms]
    dtype = torch.float32 if device.kind == "cpu" else torch.bfloat16
    for axis in (axis for axis in AXES if axis.name in axes):
        for w in axis.workloads(device.kind):
            if time.monotonic() > until:
                return
            own = [way for way in ours(w, device.kind) if way.name in (OURS, AGAIN)]
            group = compare(
                w,
                FORWARD_BACKWARD,
                dtype,
                device,
                [*own, *schedules(context.backend), *few],
                context,
                RoundLimits(target_seconds=1.0),
                max_bytes=float("inf"),
                study="scaling",
                axis=axis.name,
            )
            yield _with(group, plan=planned_schedules(w, dtype, context))
            if any(r.way == SCALING_PEERS[0] and r.note == "out of memory" for r in group):
                break


def measure_training(device: CPU | GPU, context: Context, until: float = float("inf")) -> Groups:
    """Train the examples of `training_examples.py`."""
    seconds = min(TRAINING_SECONDS, until - time.monotonic())
    if seconds > 0:
        yield from training.train_all(context, seconds, device.kind)
