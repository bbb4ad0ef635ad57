"""The file of finished runs, one JSON line for each. A process that is killed while writing loses only that line."""

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

_RECORD_START = b'{"config"'
_ATTEMPTS, _PAUSE = 50, 0.1


@dataclass
class Loaded:
    """The content of a file of runs.

    Attributes:
        records: the records that can be used.
        problems: a sentence for each line that cannot be used.
        foreign: whether some lines are whole records of another experiment, protocol or set of metrics.
    """

    records: list[Record]
    problems: list[str] = field(default_factory=list)
    foreign: bool = False


class RunStore:
    """An append-only file of records: the `config` of a run, its `metrics`, and the `versions` it was made with.

    Each line ends in a digest of the record, which detects changed digits.

    Args:
        path: the file; it need not exist.
        expected: entries that the `config` of every record must have. Records without them are skipped.
        metrics: the names that the `metrics` of every record must have; None accepts any.

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
        """Delete the file, unless another process is writing to it or it has foreign records."""
        with suppress(ValueError), self.locked(attempts=1):
            if not self.load().foreign:
                self.path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, attempts: int = _ATTEMPTS) -> Iterator[None]:
        """Lock the file against writing by other processes. The end of this process releases the lock, too.

        Raises:
            ValueError: another process is writing.
        """
        try:
            import fcntl
        except ImportError:  # this system has no such lock
            yield
            return
        with self.path.open("ab") as file:
            for attempt in range(attempts):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:  # the lock may belong to a process that is about to end
                    if attempt + 1 == attempts:
                        raise ValueError(f"out: another process is writing to {self.path}") from None
                    time.sleep(_PAUSE)
            yield

    def load(self) -> Loaded:
        """Read the records. A torn last line, a corrupt line and a repeated run are listed as problems.

        Of several runs with the same configuration the first is kept.
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
            record = _decode(line)
            if record is None:
                # A last line without a line end was being written when its process was stopped.
                torn = number == len(lines) and _is_record_start(line)
                what = "is torn, its run was cut off" if torn else "is no finished run, or corrupt"
                loaded.problems.append(f"{self.path}, line {number}: {what}; skipped")
            elif any(record["config"].get(name) != value for name, value in self.expected.items()):
                what = ", ".join(f"{name} {record['config'].get(name)!r}" for name in self.expected)
                loaded.problems.append(f"{self.path}, line {number}: a run of {what}; skipped")
                loaded.foreign = True
            elif self.metrics is not None and self.metrics != set(record["metrics"]):
                loaded.problems.append(f"{self.path}, line {number}: its metrics are of other code; skipped")
                loaded.foreign = True
            elif (name := config_key(record["config"])) in seen:
                loaded.problems.append(f"{self.path}, line {number}: this run is already listed above; skipped")
            else:
                seen.add(name)
                loaded.records.append(record)
        return loaded

    def append(self, record: Record) -> None:
        """Append one record, and return when it is on the disk.

        A torn last line is removed first. Any other last line without a line end gets one. Numbers that are not finite
        are stored as null, since JSON has none.
        """
        line = _encode(_finite(record))
        self.path.touch()
        with self.path.open("r+b") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            last = content[end:]
            if last and _is_record_start(last) and _decode(last) is None:
                file.truncate(end)
            elif last:
                line = b"\n" + line
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _is_record_start(line: bytes) -> bool:
    """Return whether a line, which may be torn, begins like a record."""
    return line[: len(_RECORD_START)] == _RECORD_START[: len(line)]


def _encode(record: Record) -> bytes:
    return json.dumps({**record, "digest": _digest(record)}, allow_nan=False).encode() + b"\n"


def _digest(record: Record) -> str:
    return hashlib.sha256(config_key(record).encode()).hexdigest()[:16]


def _decode(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    digest = record.pop("digest", None)
    if not all(isinstance(record.get(section), dict) for section in ("config", "metrics", "versions")):
        return None
    return record if digest == _digest(record) else None


def config_key(config: Any) -> str:
    """Return a text that is equal for equal configurations; the order of their entries does not matter."""
    return json.dumps(config, sort_keys=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
