"""The processes of the stages of `make gpu`: limits, what they leave behind, what they write. It needs no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

LARGEST_FILE = 4 << 30
"""Bytes of a file that a stage may write."""
MOST_OUTPUT = 8 << 20
"""Bytes of a stage's output that are kept, of one file."""
_SET_CHILD_SUBREAPER = 36  # of prctl


def adopt_orphans() -> None:
    """Make processes whose parents end children of this one, so that `stop_new_children` finds them."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Return the processes that this one has started or adopted."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in path.read_text().split()}
    return found


def stop_new_children(before: set[int]) -> None:
    """Kill all children that were not there before, and those that are adopted from them."""
    deadline = time.monotonic() + 1
    while (new := children() - before) and time.monotonic() < deadline:
        for pid in new:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def prepare() -> None:
    """Prepare a child: it gets SIGINT even where this process ignores it, leads a group, and writes no huge file."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most == resource.RLIM_INFINITY or most > LARGEST_FILE:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, most))


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def wait(process: subprocess.Popen[bytes], limit: float, grace: float) -> tuple[int | None, bool, str]:
    """Return the exit status of a process, whether it was stopped at the limit, and a note."""
    try:
        status, cut, note = process.wait(limit), False, ""
    except subprocess.TimeoutExpired:
        _signal_group(process.pid, signal.SIGINT)
        try:
            status, cut, note = process.wait(0.8 * grace), True, ""
        except subprocess.TimeoutExpired:
            status, cut, note = -signal.SIGKILL, True, "SIGINT did not stop it"
    except BaseException:
        _signal_group(process.pid, signal.SIGKILL)
        raise
    _signal_group(process.pid, signal.SIGKILL)  # what it started may still run
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        note = "SIGKILL did not stop it"
    return status, cut, note


def written(path: Path, start: int) -> list[str]:
    """Return the lines that a stage has appended to a file, and end the last one.

    Of more than `MOST_OUTPUT` bytes, those in the middle are deleted, in the file too.
    """
    half = MOST_OUTPUT // 2
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END) - start
            file.seek(start)
            text = file.read(half if size > MOST_OUTPUT else max(0, size))
            if size > MOST_OUTPUT:
                file.seek(-half, os.SEEK_END)
                rest = f"\n== {size - 2 * half} bytes were here\n".encode() + file.read(half)
                file.seek(start + half)
                file.truncate()
                file.write(rest)
                text += rest
            if text and not text.endswith(b"\n"):
                file.write(b"\n")
    except OSError as error:
        return [f"{path.name} cannot be read or written ({error.strerror})"]
    return text.decode(errors="replace").splitlines()
