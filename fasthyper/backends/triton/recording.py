"""A launch as a value, and what becomes of the launches of a thread: they run, are recorded too, or go to a graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import capture


@dataclass
class Record:
    """What is kept of the launches within a `recording`, and whether more than launches was done."""

    keep: Callable[[Call, Any], Any]
    launches: list[Any] = field(default_factory=list)
    spoiled: bool = False


class _Thread(threading.local):
    def __init__(self) -> None:
        self.record: Record | None = None
        self.emit: Callable[[Call], None] | None = None


_thread = _Thread()


@contextlib.contextmanager
def recording(keep: Callable[[Call, Any], Any]) -> Iterator[Record]:
    """Record the launches of this thread: what `keep` returns of each call and its compiled kernel.

    A call holds its tensors, temporary ones included, whose memory is to be free as soon as the launcher drops them.
    """
    _thread.record = record = Record(keep)
    try:
        yield record
    finally:
        _thread.record = None


@contextlib.contextmanager
def emitting(emit: Callable[[Call], None]) -> Iterator[None]:
    """Give the calls of this thread to `emit` instead of launching them. Their tensors have no addresses."""
    _thread.emit = emit
    try:
        yield
    finally:
        _thread.emit = None


def is_traced() -> bool:
    """Return whether calls of this thread are not launched, so that sizes may be symbols, and nothing can be timed."""
    return _thread.emit is not None


def spoil() -> None:
    """Say that the work of this call is more than its launches, so that repeating them would not repeat it."""
    if _thread.record is not None:
        _thread.record.spoiled = True


class Call(NamedTuple):
    """A launch: `kernel[grid](**args, **constants, num_warps=..., num_stages=...)`."""

    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    def launch(self) -> None:
        if _thread.emit is not None:
            _thread.emit(self)
            return
        with capture.refusing_to_compile(self.kernel):
            kernel = self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)
        if (record := _thread.record) is not None:
            record.launches.append(record.keep(self, kernel))
