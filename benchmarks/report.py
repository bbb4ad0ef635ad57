"""Rows in, Markdown out: the tables, the summary beside the floors that the project has set, the machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import torch
from peers import PEERS
from timing import OURS, SLOWER, Row, ms

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 1 << 20
NARROW, HEAVY = 32, 1 << 18  # features of a narrow layer are fewer; a head is heavy from so many numbers on

Rows = list[Row]


class Figure(NamedTuple):
    """One line of the summary: `of` gives the figure and where it was seen, from the rows that are `among` it."""

    text: str
    among: Callable[[Row], bool]
    of: Callable[[Rows], tuple[float, str]]
    floors: dict[str, str]


def mean(rows: Rows) -> tuple[float, str]:
    """The geometric mean of the speed-ups."""
    return geometric_mean([row.speed_up for row in rows]), f"{len(rows)} workloads"


def extreme(of: Callable[[Row], float], pick: Callable[..., Row] = min) -> Callable[[Rows], tuple[float, str]]:
    """The least or the most of something, and the workload where."""

    def figure(rows: Rows) -> tuple[float, str]:
        row = pick(rows, key=of)
        return of(row), row.workload.label

    return figure


def per_sample(row: Row) -> bool:
    """Whether N = 1."""
    return row.workload.N == 1


def _heavy(row: Row, narrow: bool) -> bool:
    w = row.workload
    return row.share is not None and w.head >= HEAVY and (min(w.I, w.O) < NARROW) == narrow


_LEAST_SPEED, _LEAST_SHARE = extreme(lambda row: row.speed_up), extreme(lambda row: row.share)

FIGURES = (
    Figure(
        "speed-up at N = 1 and O ≥ 16, geometric mean",
        lambda row: per_sample(row) and row.workload.O >= 16 and not row.workload.extra,
        mean,
        {"float32": "≥ 2.0", "bfloat16": "≥ 3.5 (AMX)"},
    ),
    Figure(
        "speed-up at N = 1, geometric mean",
        lambda row: per_sample(row) and not row.workload.extra,
        mean,
        {"float32": "≥ 1.6", "bfloat16": "≥ 2.2 (AMX)"},
    ),
    Figure("speed-up at N = 1, least", per_sample, _LEAST_SPEED, {"float32": "≥ 0.95"}),
    Figure("speed-up at N > 1, least", lambda row: not per_sample(row), _LEAST_SPEED, {"float32": "≥ 0.9"}),
    Figure(
        "share of sgemm, R·I·O ≥ 2¹⁸ and min(I, O) ≥ 32, least",
        lambda row: _heavy(row, narrow=False),
        _LEAST_SHARE,
        {"float32": "≥ 0.8"},
    ),
    Figure(
        "share of sgemm, R·I·O ≥ 2¹⁸ and min(I, O) < 32, least",
        lambda row: _heavy(row, narrow=True),
        _LEAST_SHARE,
        {"float32": "≥ 0.65"},
    ),
    Figure(
        "temporary memory by the profiler, MiB, most",
        lambda row: OURS in row.temporary,
        extreme(lambda row: row.temporary[OURS] / MIB, max),
        {"float32": "≤ 40", "bfloat16": "≤ 40"},
    ),
    Figure(
        "temporary memory, resident, MiB, most",
        lambda row: row.resident is not None,
        extreme(lambda row: row.resident / MIB, max),
        {"float32": "≤ 40", "bfloat16": "≤ 40"},
    ),
    Figure("noise: our time over our time, least", lambda row: True, extreme(lambda row: row.noise), {}),
    Figure("noise: our time over our time, most", lambda row: True, extreme(lambda row: row.noise, max), {}),
)


def figures(rows: Rows, dtype: str, of: tuple[Figure, ...] = FIGURES) -> list[tuple[str, float | None, str, str]]:
    """The summary: text, figure (None where no row is among it), where it was seen or of how many, floor."""
    lines = []
    for figure in of:
        among = [row for row in rows if figure.among(row)]
        value, where = figure.of(among) if among else (None, "")
        lines.append((figure.text, value, where, figure.floors.get(dtype, "")))
    return lines


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, its first column aligned to the left, the others to the right."""
    return "\n".join(map(line, (columns, ["---", *["--:"] * (len(columns) - 1)], *rows)))


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:.1f}"


def _sizes(row: Row) -> list[str]:
    w = row.workload
    return [w.name, f"{w.B:,}", f"{w.N:,}", f"{w.R:,}", f"{w.I} → {w.O}"]


SIZES = ["workload", "B", "N", "R", "I → O"]
COLUMNS = [
    *SIZES,
    "ms, fasthyper",
    "ms, best peer",
    "speed-up",
    "again",
    "share of sgemm",
    "MiB, fasthyper",
    "resident",
    "MiB, least peer",
]


def cells(row: Row) -> list[str]:
    """A row of the full table."""
    return [
        *_sizes(row),
        ms(row.seconds[OURS]),
        f"{ms(row.peers[row.best_peer])} ({row.best_peer})",
        f"{row.speed_up:.2f}",
        f"{row.noise:.2f}",
        "" if row.share is None else f"{row.share:.2f}",
        _mib(row.temporary[OURS]),
        _mib(row.resident),
        _mib(_least(row)),
    ]


def _least(row: Row) -> int:
    return min(size for name, size in row.temporary.items() if name != OURS)


def _peer_cells(row: Row, names: list[str]) -> list[str]:
    return [row.workload.label, *(ms(row.seconds[n]) if n in row.seconds else row.dropped.get(n, "") for n in names)]


def full(
    rows: Rows,
    dtype: str,
    where: str,
    title: str | None = None,
    figures_of: tuple[Figure, ...] = FIGURES,
    notes: Iterable[str] = (),
) -> str:
    """What it was measured on, the summary, the table, every peer's time; of a CPU unless told otherwise."""
    names = [peer.name for peer in PEERS]
    scaled = [f"{row.workload.name} {row.workload.published:,}" for row in rows if row.workload.published]
    rates = [row.rate / 1e9 for row in rows if row.rate]
    summary = [
        [text, "" if value is None else f"{value:.2f}", floor, place]
        for text, value, place, floor in figures(rows, dtype, figures_of)
    ]
    notes = list(notes) or [
        "Gradients of x, z and the head; runs interleaved; medians, lower quartiles under a millisecond.",
        "again: our time over our time, the noise.",
        "share of sgemm: 3·2·B·R·I·O flops over our time and over the rate of torch.mm in the same run"
        + (f" ({min(rates):,.0f} to {max(rates):,.0f} Gflop/s)." if rates else "."),
        "MiB: peak temporary memory, results apart, as torch's allocator sees it; resident: as Linux does.",
        *([f"Published B of what is scaled down: {', '.join(scaled)}."] if scaled else []),
    ]
    legend = (
        f"In parentheses: a first try, more than {SLOWER} times the fastest peer's. After >: a sixteenth of the batch, "
        "already slower than all of it by the fastest. In GiB: what it would have kept."
    )
    return "\n".join(
        [
            f"{title or f'# Forward + backward on a CPU, {dtype}'}\n",
            f"{where}\n",
            f"{' '.join(notes)}\n",
            table(["figure", "measured", "floor", "where"], summary),
            "",
            table(COLUMNS, map(cells, rows)),
            "\n## Peers, ms\n",
            f"{legend}\n",
            table(["workload", *names], (_peer_cells(row, names) for row in rows)),
            "",
        ]
    )


def short(rows: Rows, where: str, name: str) -> str:
    """The README's table: some of the rows, some of the columns. `name` is the file with all of them."""
    columns = [*SIZES, "memory, fasthyper", "memory, least peer", "ms, fasthyper", "ms, best peer", "speed-up"]
    lines = []
    for row in rows:
        if row.workload.readme:
            *sizes, ours, theirs, speed_up, _, _, memory, _, least = cells(row)
            lines.append([*sizes, memory, least, ours, theirs, speed_up])
    how = "Forward + backward of x, z and the head, medians of interleaved runs; all workloads and peers are in"
    return "\n".join([table(columns, lines), "", f"{where} {how} [{name}](benchmarks/results/{name}).", ""])


def machine(dtype: str, backend: str, load: float) -> str:
    """What it is measured on, in a sentence. `load` is the system's before: others make small runs wait."""
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, check=False, cwd=ROOT)
    commit = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", "fasthyper", "csrc", "setup.py").returncode
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    amx = " + AMX" if "amx_tile" in told.get("flags", "") else ""
    capability = f"{torch.backends.cpu.get_cpu_capability()}{amx}"
    return (
        f"Measured on {told.get('model name', 'unknown processor')} ({platform.machine()}, {capability}{_caches()}), "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}; commit "
        f"{commit}{' and changes' if changed else ''}, {date.today().isoformat()}; {dtype}, backend {backend}; "
        f"load before {load:.1f}."
    )


def _caches() -> str:
    """Sizes of the first processor's data caches, as Linux tells them."""
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            kib = int(size.removesuffix("K"))
            caches.append(f"L{level} {kib // 1024} MiB" if kib >= 1024 else f"L{level} {kib} KiB")
    return "".join(f", {cache}" for cache in caches)


def into_readme(name: str, text: str, readme: Path = ROOT / "README.md") -> None:
    """Put the table between its markers, where the README has them."""
    start, end = f"<!-- {name}: generated by `make bench` -->\n", "<!-- end -->"
    before, found, rest = readme.read_text().partition(start)
    if found:
        readme.write_text(before + start + "\n" + text + "\n" + rest[rest.index(end) :])
