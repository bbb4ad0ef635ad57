"""The results: one tidy file for each device, a row for each way on each workload, every row with where it is from.

Measuring something again replaces its rows and leaves the others, which keep their own commit and date.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

import fasthyper

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORWARD, BOTH, TRAINING = MODES = ("forward", "forward + backward", "training step")
PRODUCT, COPY = "matrix product", "copy"
SOURCES = ("fasthyper", "csrc", "setup.py", "benchmarks", ":(exclude)benchmarks/results")
"""What a figure depends on: a commit that changes none of these is as good as the one before."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where and with what something was measured.

    Attributes:
        device: name of the processor or GPU, what matters of it, and the threads in use.
        kind: `"cpu"` or `"cuda"`.
        backend: what `fasthyper` takes by itself there.
        torch: version of torch.
        triton: version of Triton, empty where there is none.
        driver: of the GPU.
        python: version of Python.
        commit: what was measured; with `+` where its sources had been changed.
        date: the day, in ISO 8601.
    """

    device: str
    kind: str
    backend: str
    torch: str
    triton: str
    driver: str
    python: str
    commit: str
    date: str

    @property
    def slug(self) -> str:
        """Name of the device's file."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One way on one workload.

    Attributes:
        study: `"workloads"`, `"scaling"`, `"training"`.
        workload: its name in `workloads.py`; of a training example, its own.
        B, N, R, I, O: sizes; see `workloads.Workload`.
        neighbours: instances that share one x, 1 where none do.
        hidden: units between the two layers of a generated network, 0 where there is one layer.
        axis: of `scaling`, the size that is varied: `"B"`, `"N"`, `"R"` or `"width"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        mode: `"forward"`, `"forward + backward"` or `"training step"`.
        way: what ran.
        role: `"ours"`; `"again"`, the same once more, to see the noise; `"variant"`, ours with something forced;
            `"peer"`; or `"ceiling"`, what the machine can do at best, measured in turns with the others.
        q1, median, q3: seconds of one call; only the median where there was one call.
        rounds: calls that these are of; 1 for a peer that was tried once and found not to be worth more.
        rate: of a ceiling, flop/s or byte/s.
        compile: seconds of the first call, where it compiles.
        temporary: peak temporary bytes, as torch's allocator sees them; outputs and gradients apart.
        resident: the same as the operating system sees it.
        note: why there are no times, or not more.
        plan: of ours, the order of contraction that the planner takes, for forward and for backward.
        step: of a training example: the steps taken so far; `median` is the time that they took together.
        loss: of a training example: the loss then.
    """

    study: str
    workload: str
    B: int = 0
    N: int = 0
    R: int = 0
    I: int = 0
    O: int = 0
    neighbours: int = 1
    hidden: int = 0
    axis: str = ""
    dtype: str = "float32"
    mode: str = ""
    way: str = ""
    role: str = "peer"
    q1: float | None = None
    median: float | None = None
    q3: float | None = None
    rounds: int | None = None
    rate: float | None = None
    compile: float | None = None
    temporary: int | None = None
    resident: int | None = None
    note: str = ""
    plan: str = ""
    step: int | None = None
    loss: float | None = None
    context: Context

    def replace(self, **changes: Any) -> Record:
        """The record with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def subject(self) -> tuple:
        """What it is a measurement of, the way apart: what is compared, and what a new measurement replaces."""
        sizes = (self.B, self.N, self.R, self.I, self.O, self.neighbours, self.hidden)
        return (self.study, self.axis, self.workload, *sizes, self.dtype, self.mode)


_FIELDS = [f for f in dataclasses.fields(Record) if f.name != "context"]
_HERE = [f.name for f in dataclasses.fields(Context)]
COLUMNS = [*(f.name for f in _FIELDS), *_HERE]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(kind: str, text: str) -> object:
    """A cell as a field of this annotation."""
    if kind.startswith("str"):
        return text
    if text == "":
        return None
    return int(text) if kind.startswith("int") else float(text)


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no file.

    Raises:
        ValueError: if its columns are not those of today.
    """
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        if rows.fieldnames != COLUMNS:
            raise ValueError(f"{path.name} has other columns than {', '.join(COLUMNS)}: measure again")
        return [
            Record(
                context=Context(**{name: row[name] for name in _HERE}),
                **{f.name: _value(str(f.type), row[f.name]) for f in _FIELDS},  # type: ignore[arg-type]
            )
            for row in rows
        ]


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records, each with its context, in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as lines:
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(COLUMNS)
        for r in records:
            rows.writerow([*(_text(getattr(r, f.name)) for f in _FIELDS), *(getattr(r.context, n) for n in _HERE)])
    part.replace(path)


def replaced(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """The old records but for those of a subject that was measured again, which stand where the old ones stood."""
    groups: dict[tuple, list[Record]] = {}
    for record in old:
        groups.setdefault(record.subject, []).append(record)
    again: dict[tuple, list[Record]] = {}
    for record in new:
        again.setdefault(record.subject, []).append(record)
    groups.update(again)
    return [record for group in groups.values() for record in group]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile; of one value, that."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def layers(of: Any) -> str:
    """Features in and out of what is generated: of one layer, or two."""
    return " → ".join(str(features) for features in (of.I, of.hidden, of.O) if features)


def output(*command: str) -> str:
    """The first line that a command prints; `"unknown"` where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def commit() -> str:
    """The last commit that changed the sources, with `+` where they are not as it left them.

    A copy without its history is told by the environment, in `FASTHYPER_COMMIT`.
    """
    if told := os.environ.get("FASTHYPER_COMMIT"):
        return told
    last = output("git", "log", "-1", "--format=%h", "--", *SOURCES)
    return last + ("" if output("git", "status", "--porcelain", "--", *SOURCES) == "unknown" else "+")


def context(kind: str) -> Context:
    """What is here."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    taken = fasthyper.backends.backend("auto", torch.device(kind)).__name__.rpartition(".")[2]
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if kind == "cuda" else ""
    return Context(
        device=torch.cuda.get_device_name(0) if kind == "cuda" else processor(),
        kind=kind,
        backend=taken,
        torch=torch.__version__,
        triton=version,
        driver=driver,
        python=platform.python_version(),
        commit=commit(),
        date=date.today().isoformat(),
    )


def processor() -> str:
    """The processor's name, its vector set, its last-level cache and the threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = told.get("model name") or platform.processor() or platform.machine()
    amx = " + AMX" if "amx_tile" in told.get("flags", "") else ""
    cache = f", {last_level_cache() >> 20} MiB L{_levels()}" if last_level_cache() else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}{amx}{cache}, {torch.get_num_threads()} threads"


def _caches() -> dict[int, int]:
    """Bytes of the first processor's caches by level, as Linux tells them; instructions' apart."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            sizes[int(level)] = int(size.rstrip("KM")) * unit
    return sizes


def _levels() -> int:
    return max(_caches())


def last_level_cache() -> int:
    """Bytes of the processor's last-level cache, 0 where the system does not tell."""
    return max(_caches().values(), default=0)
