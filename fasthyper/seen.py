"""What a GPU has shown: the runs of `make gpu` that were committed, in seen.json.

Kernels that no GPU has run are only taken where a caller names them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("seen.json")


class Run(NamedTuple):
    """One run of `make gpu`.

    Args:
        device: the product's name.
        arch: its architecture, such as ``"sm_90"``.
        date: the day of the run, as YYYY-MM-DD.
        torch: the version of torch.
        triton: the version of Triton.
        commit: the commit that ran.
        right: the backends whose tests passed, every one of them.
    """

    device: str
    arch: str
    date: str
    torch: str
    triton: str
    commit: str
    right: tuple[str, ...]


@functools.cache
def _read() -> tuple[tuple[Run, ...], str | None]:
    """Return all runs, the latest first; none if the file is damaged, and why it cannot be read."""
    try:
        found = [_run(record) for record in json.loads(FILE.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return (), f"{FILE.name} cannot be read ({type(error).__name__}: {error})"
    return tuple(sorted(found, key=lambda run: run.date, reverse=True)), None


def _run(record: Any) -> Run:
    run = Run(**record)
    if not all(isinstance(text, str) for text in (*run[:-1], *run.right)) or isinstance(run.right, str):
        raise ValueError(f"a field of {record} is no text")
    return run._replace(right=tuple(run.right))


def runs() -> tuple[Run, ...]:
    """Return all runs, the latest first; none if the file is damaged."""
    return _read()[0]


def is_right(backend: str, arch: str) -> bool:
    """Return whether the tests of a backend passed in the latest run on an architecture."""
    return arch in _latest() and backend in _latest()[arch].right


def describe(backend: str) -> str:
    """Return what was seen of a backend, in words: the latest run on each architecture."""
    said = []
    for run in _latest().values():
        passed = "passed" if backend in run.right else "did not all pass"
        said.append(f"its tests {passed} on {run.device}, {run.date}, with torch {run.torch}")
    return "; ".join(said) or _read()[1] or "it has never run on a GPU"


def _latest() -> dict[str, Run]:
    """Return the latest run by architecture."""
    return {run.arch: run for run in reversed(runs())}
