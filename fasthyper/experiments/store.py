"""Finished runs, one JSON line each, in a file that survives being cut off at any moment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """What a file of runs holds: its records, and in words what was wrong with it."""

    records: list[Record]
    problems: list[str] = field(default_factory=list)


class RunStore:
    """An append-only file of records: the `config` of a run, the `metrics` it found, the `versions` used.

    Args:
        path: the file; it need not exist.
        metrics: the metrics without which a record is not a finished run.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = RunStore(Path(folder.name) / "runs.jsonl", metrics=["test_error"])
        >>> store.append({"config": {"seed": 0}, "metrics": {"test_error": 0.1}, "versions": {}})
        >>> store.load().records
        [{'config': {'seed': 0}, 'metrics': {'test_error': 0.1}, 'versions': {}}]
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], metrics: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.metrics = tuple(metrics)

    def load(self) -> Loaded:
        """Read what is whole; a torn last line, a corrupt line, a run listed twice are reported by number.

        Of runs with the same configuration the first is kept.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return Loaded([])
        loaded = Loaded([])
        seen: set[str] = set()
        lines = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = self._parse(line)
            if record is None:
                # What follows the last line end was being written when the writer was stopped.
                what = "is torn, its run was cut off" if number == len(lines) else "is not a finished run"
                loaded.problems.append(f"{self.path}, line {number}: {what}; skipped")
            elif (name := key(record["config"])) in seen:
                loaded.problems.append(f"{self.path}, line {number}: this run is already listed above; skipped")
            else:
                seen.add(name)
                loaded.records.append(record)
        return loaded

    def append(self, record: Record) -> None:
        """Add one record and return once it is on the disk.

        A torn last line is cut off first, or this record would be glued to it. Numbers that are not finite
        are stored as null: JSON has no other way to say them.
        """
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        self.path.touch()
        with self.path.open("r+b") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if content[end:].strip() and self._parse(content[end:]) is not None:
                line = b"\n" + line  # whole but for its line end
            else:
                file.truncate(end)
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, line: bytes) -> Record | None:
        try:
            record = json.loads(line.decode())
        except ValueError:
            return None
        if not isinstance(record, dict):
            return None
        if not all(isinstance(record.get(part), dict) for part in ("config", "metrics", "versions")):
            return None
        return record if all(_is_number(record["metrics"].get(name)) for name in self.metrics) else None


def key(config: Any) -> str:
    """One text for equal configurations, whatever the order of their entries."""
    return json.dumps(config, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
