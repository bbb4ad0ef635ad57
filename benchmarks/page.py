"""The page of a file of results, in Markdown: summary, ceilings, all tables, and links to the figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from . import plots
from .analysis import TOLERANCE, Results, Subject, common_loss, loss_curves, position, quotient
from .formatting import digits, mib, ms, ms_or_note, ms_with_quartiles, ratio, table
from .records import COPY, PRODUCT, Record, layers, quartiles
from .summary import summarise

LEGEND = """\
Sizes: B instances of N points each, R features of z, generated layers of I → O features. Of graphs, ragged points \
and pairs: E terms, which share S rows of x, C of z and T of y; where a number is missing, each term has its own row.

- best peer: the fastest peer that was timed more than once
- speed-up: the best peer's time over fasthyper's
- noise: the ratio of two times of fasthyper, both measured in the same rounds
- share: fasthyper's flop/s over the roofline's, which is the lesser of the matrix product's rate and the copy's rate \
times flops per compulsory byte
- bound: the time that the flops of the cheapest order take at the matrix product's rate, measured in the same rounds; \
of graphs, ragged points and pairs, share is this time over fasthyper's
- MiB: peak temporary memory by PyTorch's allocator, without outputs and gradients; resident: the same by the system
- ms: median (lower–upper quartile); in the tables of all ways, the median, in parentheses if the way was tried once
- `+` after a commit: with uncommitted changes"""
CONVOLUTION_LEGEND = """\
Of convolutions, N is the pixels of the output, and I and O are channels; k: taps of the kernel along each side."""
MAP_LEGEND = "A function of the generated weights is named after the features, as in 10 → 32, abs."

WORKLOAD_COLUMNS = [
    "workload",
    "B",
    "N",
    "R",
    "I → O",
    "ms, fasthyper",
    "ms, best peer",
    "speed-up",
    "noise",
    "share",
    "MiB, fasthyper",
    "resident",
    "MiB, least peer",
]
CONVOLUTION_COLUMNS = ["workload", "k", "stride", "groups", *WORKLOAD_COLUMNS[1:]]
TERM_COLUMNS = [
    "workload",
    "E",
    "S",
    "C",
    "T",
    "R",
    "I → O",
    "ms, fasthyper",
    "ms, best peer",
    "speed-up",
    "noise",
    "ms, bound",
    "share",
    "MiB, fasthyper",
    "resident",
    "MiB, best peer",
    "MiB, least peer",
]


def markdown(found: Iterable[Record], figures: Iterable[str] = ()) -> str:
    """Return the page of a file's records; `figures` are file names."""
    results = Results(found)
    context = results.context
    versions = {"torch": context.torch, "Triton": context.triton, "driver": context.driver, "Python": context.python}
    parts = [
        f"# fasthyper on {context.device}",
        f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}; "
        f"backend {context.backend}; {results.commit(context)}.",
        *footnotes(results, results.subjects),
        *legend(results),
        "## Summary",
        _summary(results),
        *_ceilings(results),
    ]
    for dtype, mode in results.modes:
        parts += [f"## {mode.capitalize()}, {dtype}", *workload_tables(results, dtype, mode)]
        parts += [f"### All ways, ms: {mode}, {dtype}", *_ways(results, results.select("workloads", dtype, mode))]
    parts += [*_compile_times(results), *_scaling(results), *training_table(results)]
    parts += [f"![{Path(name).stem.rpartition('-')[2]}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def legend(results: Results) -> list[str]:
    """Return what the letters and columns mean."""
    found = results.records
    return [
        LEGEND,
        *[CONVOLUTION_LEGEND] * any(r.kernel for r in found),
        *[MAP_LEGEND] * any(bool(r.weight_map) for r in found),
    ]


def footnotes(results: Results, subjects: list[Subject]) -> list[str]:
    """Return one paragraph that explains the marks of these subjects, or nothing if they have none."""
    marks = results.mark(*subjects)
    notes = [note for note in results.footnotes if note.split()[0] in marks]
    return [f"Raised letters mark results from elsewhere: {'. '.join(notes)}."] if notes else []


def workload_tables(results: Results, dtype: str, mode: str) -> list[str]:
    """Return the tables of all workloads in a dtype and mode: layers and networks, convolutions, sums over terms."""
    subjects = results.select("workloads", dtype, mode)
    terms = [s for s in subjects if s.record.over_terms]
    convolutions = [s for s in subjects if s.record.kernel]
    others = [s for s in subjects if not s.record.over_terms and not s.record.kernel]
    kinds = (
        (WORKLOAD_COLUMNS, _workload, others),
        (CONVOLUTION_COLUMNS, _convolution, convolutions),
        (TERM_COLUMNS, _terms, terms),
    )
    return [table(columns, (row(results, s) for s in found)) for columns, row, found in kinds if found]


def _convolution(results: Results, subject: Subject) -> list[str]:
    record, (name, *rest) = subject.record, _workload(results, subject)
    return [name, *map(str, (record.kernel, record.stride, record.groups)), *rest]


def _terms(results: Results, subject: Subject) -> list[str]:
    record, ours, best = subject.record, subject.ours, subject.best_peer
    return [
        record.workload + results.mark(subject),
        *(f"{size:,}" if size else "" for size in (record.B, record.S, record.C, record.T, record.R)),
        layers(record),
        "" if ours is None else ms_with_quartiles(ours) or ours.note,
        f"{ms_or_note(best)} ({best.way})" if best else "",
        ratio(subject.speed_up),
        ratio(subject.noise),
        ms(results.product_bound(subject)),
        ratio(results.product_share(subject)),
        mib(ours.temporary if ours else None),
        mib(ours.resident if ours else None),
        mib(best.temporary if best else None),
        mib(subject.least_memory),
    ]


def _workload(results: Results, subject: Subject) -> list[str]:
    record, ours, best = subject.record, subject.ours, subject.best_peer
    return [
        record.workload + results.mark(subject),
        f"{record.B:,}",
        f"{record.N:,}",
        f"{record.R:,}",
        layers(record),
        "" if ours is None else ms_with_quartiles(ours) or ours.note,
        f"{ms_or_note(best)} ({best.way})" if best else "",
        ratio(subject.speed_up),
        ratio(subject.noise),
        ratio(results.share(subject)),
        mib(ours.temporary if ours else None),
        mib(ours.resident if ours else None),
        mib(subject.least_memory),
    ]


def _summary(results: Results) -> str:
    held = {None: "", True: "yes", False: "**no**"}
    rows = [
        [line.metric, line.dtype, ratio(line.value), line.floor, held[line.held], line.where]
        for line in summarise(results.records)
        if line.value is not None or line.floor
    ]
    return table(["metric", "dtype", "measured", "floor", "holds", "where"], rows)


def _ceilings(results: Results) -> list[str]:
    rows = []
    for dtype in results.dtypes:
        for name, unit in ((PRODUCT, "Gflop/s"), (COPY, "GB/s")):
            rates = [rate / 1e9 for rate in results.rates(name, dtype)]
            if rates:
                low, middle, high = quartiles(rates)
                cells = [digits(middle), f"{digits(low)}–{digits(high)}", str(len(rates))]
                rows.append([f"{name}, {unit}", dtype, *cells])
    head = ["ceiling", "dtype", "median", "quartiles", "measurements"]
    return ["## The machine's ceilings", table(head, rows)] if rows else []


def _names(subjects: list[Subject], *roles: str) -> list[str]:
    """Return the names of the ways with these roles, role by role, in order of appearance."""
    return list(dict.fromkeys(r.way for role in roles for s in subjects for r in s.records if r.role == role))


def _ways(results: Results, subjects: list[Subject]) -> list[str]:
    """Return a table for each group of workloads that have ways in common."""
    groups: dict[tuple[bool, ...], list[Subject]] = {}
    for s in subjects:
        r = s.record
        groups.setdefault((r.S > 0, r.C > 0, r.T > 0, r.kernel > 0, r.rank > 0, bool(r.weight_map)), []).append(s)
    tables = []
    for group in groups.values():
        names = _names(group, "ours", "again", "variant", "peer")
        rows = [[results.label(s), *(ms_or_note(s.way(name)) for name in names)] for s in group]
        tables.append(table(["workload", *names], rows))
    return tables


def _compile_times(results: Results) -> list[str]:
    rows = []
    for dtype, mode in results.modes:
        subjects = results.select("workloads", dtype, mode)
        for name in _names(subjects, "ours", "variant", "peer"):
            timed = [(s, s.way(name)) for s in subjects]
            times = [(r.compile, results.label(s)) for s, r in timed if r is not None and r.compile is not None]
            if times:
                seconds = [one for one, _ in times]
                most, where = max(times)
                cells = [digits(min(seconds)), digits(median(seconds)), digits(most), where]
                rows.append([name, f"{mode}, {dtype}", str(len(times)), *cells])
    head = ["way", "mode and dtype", "workloads", "least, s", "median, s", "most, s", "workload of the most"]
    return ["## Seconds to compile", table(head, rows)] if rows else []


def _scaling(results: Results) -> list[str]:
    """Return the times and memory along each axis, and where the planner's choice was too slow."""
    if not results.curves:
        return []
    parts = ["## Scaling"]
    for (dtype, axis), curve in results.curves.items():
        ways = _names(curve, "variant", "peer")
        columns = [axis, "planner's choice", "fasthyper", *ways, "best schedule", "planner's choice / best", "noise"]
        parts += [
            f"### {plots.axis_title(curve[0].record)}: {curve[0].record.mode}, {dtype}",
            "Milliseconds:",
            table(columns, (_scaling_times(results, s, ways) for s in curve)),
            "MiB:",
            table([axis, "fasthyper", *ways], (_scaling_memory(results, s, ways) for s in curve)),
        ]
    checked = [(s, s.planner_ratio) for s in results.select("scaling") if s.planner_ratio is not None]
    slow = [(s, value) for s, value in checked if value > TOLERANCE]
    parts.append(
        f"The planner's choice took more than {TOLERANCE:.2f} times the best schedule at {len(slow)} of {len(checked)} "
        "points"
        + (":\n\n" if slow else ".")
        + "\n".join(
            f"- {results.label(s)} along {s.record.axis}, {s.record.dtype}: {value:.2f} times {s.best_schedule.way}; "
            f"noise {ratio(s.noise) or 'not measured'}"
            for s, value in slow
            if s.best_schedule
        )
    )
    return parts


def _scaling_size(results: Results, subject: Subject) -> str:
    return f"{position(subject.record):,}{results.mark(subject)}"


def _scaling_times(results: Results, subject: Subject, ways: list[str]) -> list[str]:
    best, value = subject.best_schedule, subject.planner_ratio
    return [
        _scaling_size(results, subject),
        subject.ours.plan if subject.ours else "",
        *(ms_or_note(subject.way(name)) for name in ("fasthyper", *ways)),
        best.way.removeprefix("fasthyper, ") if best else "",
        f"**{ratio(value)}**" if value is not None and value > TOLERANCE else ratio(value),
        ratio(subject.noise),
    ]


def _scaling_memory(results: Results, subject: Subject, ways: list[str]) -> list[str]:
    found = [subject.way(name) for name in ("fasthyper", *ways)]
    cells = ["" if record is None else mib(record.temporary) or record.note for record in found]
    return [_scaling_size(results, subject), *cells]


def training_table(results: Results) -> list[str]:
    """Return the heading, an explanation and the table of the training examples, or nothing if there are none."""
    rows = []
    for subject in results.select("training"):
        curves = loss_curves(subject)
        for ours, other in ((curves[0], other) for other in curves[1:]):
            loss = common_loss([ours, other])
            seconds, peer_seconds = ours.seconds_to(loss), other.seconds_to(loss)
            rows.append(
                [
                    f"{subject.record.workload}{results.mark(subject)}, {subject.record.dtype}",
                    f"{loss:.4g}",
                    digits(seconds),
                    f"{digits(peer_seconds)} ({other.way})",
                    ratio(quotient(peer_seconds, seconds)),
                    mib(ours.temporary),
                    mib(other.temporary),
                ]
            )
    text = "Seconds until the loss first falls to the least value that both ways reach; MiB: peak of a step."
    head = ["training", "loss that both reach", "s, fasthyper", "s, peer", "speed-up", "MiB, fasthyper", "MiB, peer"]
    return ["## Training", text, table(head, rows)] if rows else []
