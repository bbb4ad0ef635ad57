"""A file of results in, its Markdown and its figures out, and the README's part: all that says how fast this is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from . import plots, records
from .records import BOTH, COPY, PRODUCT, RESULTS, ROOT, Record, layers, quartiles
from .subjects import TOLERANCE, Results, Subject, along, common_loss, over, runs
from .summary import Line, figures
from .tables import digits, mib, ms, ratio, spread, table, time_of
from .workloads import WORKLOADS

__all__ = ["Line", "figures", "markdown", "short", "write_all"]

SIZES = ["workload", "B", "N", "R", "I → O"]
LEGEND = (
    "B instances (B / n: each x is shared by n of them), N points each, R features into the head, layers I → O; ms: "
    "median (lower–upper quartile); best peer: the fastest of the usual ways that was timed more than once; speed-up: "
    "its median over ours; noise: our time measured twice in turns, a ratio; share: our flop/s over the lesser of "
    "the matrix product's rate and the copy's rate times flops per compulsory byte, both measured in the same turns; "
    "MiB: peak temporary memory by PyTorch's allocator, outputs and gradients apart; resident: the same by the system; "
    "in parentheses: tried once; +: the commit with changes of its sources."
)


def write_all(folder: Path = RESULTS, readme: Path = ROOT / "README.md") -> list[Path]:
    """Write the Markdown and the figures of each file of results beside it, and the README's blocks.

    Returns:
        What was written.
    """
    written: list[Path] = []
    newest: dict[str, tuple[str, Path, list[Record]]] = {}
    for source in sorted(folder.glob("*.csv")):
        found = records.read(source)
        if not found:
            continue
        pictures = _pictures(found, source)
        page = source.with_suffix(".md")
        page.write_text(markdown(found, [path.name for path in pictures]), encoding="utf-8")
        written += [page, *pictures]
        if any((r.study, r.mode) == ("workloads", BOTH) for r in found):
            this = (max(r.context.date for r in found), source, found)
            kind = Results(found).context.kind
            newest[kind] = max(newest.get(kind, this), this, key=lambda one: one[0])
    for kind, (_, source, found) in newest.items():
        if _into(readme, f"benchmarks, {kind}", short(found, source, readme.parent)):
            written.append(readme)
    return list(dict.fromkeys(written))


def _pictures(found: list[Record], source: Path) -> list[Path]:
    """Draw what there is data for; an older picture of what there is none for any more goes."""
    results, written = Results(found), []
    for name, draw, study in (
        ("speedups", plots.speedups, "workloads"),
        ("scaling", plots.scaling, "scaling"),
        ("roofline", plots.roofline, "workloads"),
        ("training", plots.training, "training"),
    ):
        path = source.with_name(f"{source.stem}-{name}.png")
        if results.among(study):
            draw(found).savefig(path, metadata={"Software": None})
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def markdown(found: Iterable[Record], pictures: Iterable[str] = ()) -> str:
    """The page of a file of results: where it is from, summary, tables, and pictures by their file names."""
    results = Results(found)
    context = results.context
    versions = {"torch": context.torch, "Triton": context.triton, "driver": context.driver, "Python": context.python}
    parts = [
        f"# fasthyper on {context.device}",
        f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}; "
        f"backend {context.backend}; {results.commit(context)}.",
        *_footnotes(results),
        LEGEND,
        _summary(results),
        *_ceilings(results),
    ]
    for dtype, mode in results.modes:
        subjects = results.among("workloads", dtype, mode)
        parts += [f"## {mode.capitalize()}, {dtype}", table(COLUMNS, (_cells(results, s) for s in subjects))]
        parts += [f"### All ways, ms: {mode}, {dtype}", _ways(results, subjects)]
    parts += [*_compiled(results), *_scaling(results), *_training(results)]
    parts += [f"![{Path(name).stem.rpartition('-')[2]}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _footnotes(results: Results) -> list[str]:
    """One paragraph of what was measured with something else, if anything was."""
    return [f"Marked: {'. '.join(results.footnotes)}."] if results.others else []


def _summary(results: Results) -> str:
    rows = [
        [
            line.text,
            line.dtype,
            ratio(line.value),
            line.floor,
            {None: "", True: "yes", False: "**no**"}[line.held],
            line.where,
        ]
        for line in figures(results.records)
        if line.value is not None or line.floor
    ]
    return table(["figure", "dtype", "measured", "floor", "held", "where"], rows)


def _ceilings(results: Results) -> list[str]:
    rows = []
    for dtype in results.dtypes:
        for way, unit in ((PRODUCT, "Gflop/s"), (COPY, "GB/s")):
            rates = [rate / 1e9 for rate in results.rates(way, dtype)]
            if rates:
                low, middle, high = quartiles(rates)
                rows.append([f"{way}, {unit}", dtype, digits(middle), f"{digits(low)}–{digits(high)}", str(len(rates))])
    head = ["ceiling", "dtype", "median", "quartiles", "measurements"]
    return ["## What the machine does at best", table(head, rows)] if rows else []


COLUMNS = [
    *SIZES,
    "ms, fasthyper",
    "ms, best peer",
    "speed-up",
    "noise",
    "share",
    "MiB, fasthyper",
    "resident",
    "MiB, least peer",
]


def _sizes(results: Results, subject: Subject) -> list[str]:
    of = subject.of
    instances = f"{of.B:,}" + (f" / {of.neighbours}" if of.neighbours > 1 else "")
    return [of.workload + results.mark(subject), instances, f"{of.N:,}", f"{of.R:,}", layers(of)]


def _best_peer(subject: Subject) -> str:
    best = subject.best_peer
    return f"{time_of(best)} ({best.way})" if best else ""


def _cells(results: Results, subject: Subject) -> list[str]:
    ours = subject.ours
    return [
        *_sizes(results, subject),
        "" if ours is None else spread(ours) or ours.note,
        _best_peer(subject),
        ratio(subject.speed_up),
        ratio(subject.noise),
        ratio(results.share(subject)),
        mib(ours.temporary if ours else None),
        mib(ours.resident if ours else None),
        mib(subject.least_memory),
    ]


def _names(subjects: list[Subject], *roles: str) -> list[str]:
    """The ways of these roles, one role after the other, in the order in which they come."""
    return list(dict.fromkeys(r.way for role in roles for s in subjects for r in s.records if r.role == role))


def _ways(results: Results, subjects: list[Subject]) -> str:
    names = _names(subjects, "ours", "again", "variant", "peer")
    rows = [[results.label(s), *(time_of(s.way(name)) for name in names)] for s in subjects]
    return table(["workload", *names], rows)


def _compiled(results: Results) -> list[str]:
    """Seconds of the first call of what compiles, over the workloads."""
    rows = []
    for dtype, mode in results.modes:
        subjects = results.among("workloads", dtype, mode)
        for name in _names(subjects, "ours", "variant", "peer"):
            ways = [(s, s.way(name)) for s in subjects]
            took = [(r.compile, results.label(s)) for s, r in ways if r is not None and r.compile is not None]
            if took:
                seconds = [one for one, _ in took]
                most, where = max(took)
                rows.append(
                    [
                        name,
                        f"{mode}, {dtype}",
                        str(len(took)),
                        digits(min(seconds)),
                        digits(median(seconds)),
                        digits(most),
                        where,
                    ]
                )
    head = ["way", "of", "workloads", "least, s", "median, s", "most, s", "where"]
    return ["## Seconds to compile", table(head, rows)] if rows else []


def _scaling(results: Results) -> list[str]:
    """For each axis the times with the planner's choice and the memory; then where the planner could do better."""
    if not results.curves:
        return []
    parts = ["## Scaling"]
    for (dtype, axis), curve in results.curves.items():
        ways = _names(curve, "variant", "peer")
        times = [axis, "planner's choice", "fasthyper", *ways, "best schedule", "over the best", "noise"]
        parts += [
            f"### {plots.axis_title(curve[0].of)}: {curve[0].of.mode}, {dtype}",
            "Milliseconds:",
            table(times, (_point(results, s, ways) for s in curve)),
            "MiB:",
            table([axis, "fasthyper", *ways], (_memory(results, s, ways) for s in curve)),
        ]
    checked = [(s, s.planner) for s in results.among("scaling") if s.planner is not None]
    late = [(s, value) for s, value in checked if value > TOLERANCE]
    parts.append(
        f"The planner's choice took more than {TOLERANCE:.2f} times the best schedule at {len(late)} of {len(checked)} "
        "points"
        + (":\n\n" if late else ".")
        + "\n".join(
            f"- {results.label(s)} along {s.of.axis}, {s.of.dtype}: {value:.2f} times {s.best_schedule.way}; "
            f"noise {ratio(s.noise) or 'not measured'}"
            for s, value in late
            if s.best_schedule
        )
    )
    return parts


def _size(results: Results, subject: Subject) -> str:
    return f"{along(subject.of):,}{results.mark(subject)}"


def _point(results: Results, subject: Subject, ways: list[str]) -> list[str]:
    best, value = subject.best_schedule, subject.planner
    return [
        _size(results, subject),
        subject.ours.plan if subject.ours else "",
        *(time_of(subject.way(name)) for name in ("fasthyper", *ways)),
        best.way.removeprefix("fasthyper, ") if best else "",
        f"**{ratio(value)}**" if value is not None and value > TOLERANCE else ratio(value),
        ratio(subject.noise),
    ]


def _memory(results: Results, subject: Subject, ways: list[str]) -> list[str]:
    cells = []
    for record in (subject.way(name) for name in ("fasthyper", *ways)):
        cells.append("" if record is None else mib(record.temporary) or record.note)
    return [_size(results, subject), *cells]


def _training(results: Results) -> list[str]:
    rows = []
    for subject in results.among("training"):
        for other in runs(subject)[1:]:
            ours = runs(subject)[0]
            loss = common_loss([ours, other])
            mine, theirs = ours.seconds_to(loss), other.seconds_to(loss)
            rows.append(
                [
                    f"{subject.of.workload}{results.mark(subject)}, {subject.of.dtype}",
                    f"{loss:.4g}",
                    digits(mine),
                    f"{digits(theirs)} ({other.way})",
                    ratio(over(theirs, mine)),
                    mib(ours.temporary),
                    mib(other.temporary),
                ]
            )
    how = "Seconds until the loss is for the first time as low as the least that both come to; MiB: peak of a step."
    head = ["training", "loss that both reach", "s, fasthyper", "s, peer", "speed-up", "MiB, fasthyper", "MiB, peer"]
    return ["## Training", how, table(head, rows)] if rows else []


def short(found: Iterable[Record], source: Path, base: Path) -> str:
    """The README's block: forward + backward of what the registry marks for it; `base` is where links start from."""
    results = Results(found)
    dtype = min((dtype for dtype, mode in results.modes if mode == BOTH), key=lambda dtype: dtype != "float32")
    shown = {(w.name, w.R, w.I, w.O) for w in WORKLOADS if w.readme}
    subjects = [s for s in results.among("workloads", dtype, BOTH) if _key(s.of) in shown]
    columns = [*SIZES, "MiB, fasthyper", "MiB, least peer", "ms, fasthyper", "ms, best peer", "speed-up"]
    rows = [
        [
            *_sizes(results, s),
            mib(s.ours.temporary if s.ours else None),
            mib(s.least_memory),
            ms(s.seconds),
            _best_peer(s),
            ratio(s.speed_up),
        ]
        for s in subjects
    ]
    link = Path(os.path.relpath(source.with_suffix(""), base)).as_posix()
    pictures = [
        f"![{alt}]({link}-{name}.png)"
        for name, alt, study in (
            ("speedups", "speed-up over the best peer", "workloads"),
            ("scaling", "time and memory along B, N, R and width", "scaling"),
        )
        if results.among(study)
    ]
    where = (
        f"{dtype}, {BOTH}; {results.headline}; torch {results.context.torch}. "
        f"Medians of runs in turns; all layers, ways, dtypes and modes are in [{source.stem}.md]({link}.md)."
    )
    return "\n\n".join([table(columns, rows), where, *_footnotes(results), *pictures])


def _key(of: Record) -> tuple[str, int, int, int]:
    return of.workload, of.R, of.I, of.O


def _into(readme: Path, name: str, text: str) -> bool:
    """Put a text between its markers, if the README has them."""
    start, end = f"<!-- {name}: generated by `make bench` -->\n", "<!-- end -->"
    before, found, rest = readme.read_text(encoding="utf-8").partition(start)
    if not found:
        return False
    if end not in rest:
        raise ValueError(f"{readme.name} has no {end} after {start.strip()}")
    readme.write_text(f"{before}{start}\n{text}\n\n{rest[rest.index(end) :]}", encoding="utf-8")
    return True
