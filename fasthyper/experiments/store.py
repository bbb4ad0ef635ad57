"""Finished runs, one JSON line each, in a file that survives being cut off at any moment."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

_START = b'{"config"'
_ATTEMPTS, _PAUSE = 50, 0.1


@dataclass
class Loaded:
    """What a file of runs holds: its records, and in words what was wrong with it."""

    records: list[Record]
    problems: list[str] = field(default_factory=list)
    foreign: bool = False
    """Whether there are whole runs of something else."""


class RunStore:
    """An append-only file of records: the `config` of a run, the `metrics` it found, the `versions` used.

    Each line ends in a digest of the rest, so that a digit changed by an accident is seen.

    Args:
        path: the file; it need not exist.
        expected: entries of `config` without which a record is of something else.
        metrics: the names of all metrics; with other ones a record is of other code. None takes any.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = RunStore(Path(folder.name) / "runs.jsonl", {"experiment": "mine"})
        >>> store.append({"config": {"experiment": "mine"}, "metrics": {"loss": 0.1}, "versions": {}})
        >>> store.load().records
        [{'config': {'experiment': 'mine'}, 'metrics': {'loss': 0.1}, 'versions': {}}]
        >>> folder.cleanup()
    """

    def __init__(
        self, path: str | os.PathLike[str], expected: Mapping[str, Any], metrics: Collection[str] | None = None
    ) -> None:
        self.path = Path(path)
        self.expected = expected
        self.metrics = None if metrics is None else set(metrics)

    def remove(self) -> None:
        """Delete the file, unless another process is writing to it or runs of something else are there."""
        with suppress(ValueError), self.locked(attempts=1):
            if not self.load().foreign:
                self.path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, attempts: int = _ATTEMPTS) -> Iterator[None]:
        """Keep other processes from writing, as long as this one lives.

        Raises:
            ValueError: another process is writing.
        """
        try:
            import fcntl
        except ImportError:  # not on this system, where two processes are for the user to keep apart
            yield
            return
        with self.path.open("ab") as file:
            for attempt in range(attempts):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:  # perhaps by a process about to end, whose parent was killed
                    if attempt + 1 == attempts:
                        raise ValueError(f"out: another process is writing to {self.path}") from None
                    time.sleep(_PAUSE)
            yield

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
            record = _parse(line)
            if record is None:
                # What follows the last line end was being written when the writer was stopped.
                torn = number == len(lines) and _begun(line)
                what = "is torn, its run was cut off" if torn else "is no finished run, or corrupt"
                loaded.problems.append(f"{self.path}, line {number}: {what}; skipped")
            elif any(record["config"].get(name) != value for name, value in self.expected.items()):
                what = ", ".join(f"{name} {record['config'].get(name)!r}" for name in self.expected)
                loaded.problems.append(f"{self.path}, line {number}: a run of {what}; skipped")
                loaded.foreign = True
            elif self.metrics is not None and self.metrics != set(record["metrics"]):
                loaded.problems.append(f"{self.path}, line {number}: its metrics are of other code; skipped")
                loaded.foreign = True
            elif (name := key(record["config"])) in seen:
                loaded.problems.append(f"{self.path}, line {number}: this run is already listed above; skipped")
            else:
                seen.add(name)
                loaded.records.append(record)
        return loaded

    def append(self, record: Record) -> None:
        """Add one record and return once it is on the disk.

        A torn last line is cut off first, or this record would be glued to it; a last line of another kind is
        ended. Numbers that are not finite are stored as null: JSON has no other way to say them.
        """
        line = _line(_finite(record))
        self.path.touch()
        with self.path.open("r+b") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            rest = content[end:]
            if rest and _begun(rest) and _parse(rest) is None:
                file.truncate(end)
            elif rest:
                line = b"\n" + line
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _begun(line: bytes) -> bool:
    """Whether it is, or begins as, a line of ours."""
    return line[: len(_START)] == _START[: len(line)]


def _line(record: Record) -> bytes:
    return json.dumps({**record, "digest": _digest(record)}, allow_nan=False).encode() + b"\n"


def _digest(record: Record) -> str:
    return hashlib.sha256(key(record).encode()).hexdigest()[:16]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    digest = record.pop("digest", None)
    if not all(isinstance(record.get(part), dict) for part in ("config", "metrics", "versions")):
        return None
    return record if digest == _digest(record) else None


def key(config: Any) -> str:
    """One text for equal configurations, whatever the order of their entries."""
    return json.dumps(config, sort_keys=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
