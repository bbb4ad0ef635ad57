"""The command `fasthyper build`: compile the kernels for the installed torch into the user's cache."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from . import building, compiled, processor

NAMES = [name for name in building.NAMES if name != "cuda_emulated"]
"""The libraries that the command builds; the emulated one is for tests."""


def build(names: Sequence[str] = (), *, every: bool = False, force: bool = False) -> str:
    """Compile libraries into the cache and return a line about them.

    Args:
        names: of `NAMES`; by default those that this machine loads.
        every: all libraries that can be built here instead.
        force: also those that are there already.

    Raises:
        ValueError: if a library is unknown or cannot be built here.
        RuntimeError: if the compiler fails, or the cache cannot be used.
    """
    if why := building.why_nothing():
        raise ValueError(why)
    names = _names(names, every)
    archs = "" if every else _archs()
    folder, start = compiled.cached(), time.monotonic()
    try:
        with _locked(folder):
            todo = [name for name in names if force or not _is_built(name, folder)]
            failed = _build(todo, folder, archs) if todo else {}
    except OSError as error:
        raise RuntimeError(f"cannot write to {folder} ({error}); FASTHYPER_CACHE names another folder") from error
    if failed:
        raise RuntimeError("; ".join(f"{name} cannot be built: {why}" for name, why in failed.items()))
    if not todo:
        return f"{', '.join(names)}: built already for torch {torch.__version__}"
    return f"built {', '.join(todo)} for torch {torch.__version__} in {time.monotonic() - start:.0f} s: {folder}"


def remove() -> str:
    """Delete all libraries in the cache, those of other versions too; return a line about them."""
    found = [path for path in (compiled.cached().parent).glob("*-torch-*") if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    return f"removed the kernels of {len(found)} builds from {compiled.cached().parent}"


def _names(names: Sequence[str], every: bool) -> list[str]:
    """Return the libraries to build."""
    if names:
        for name in names:
            if name not in NAMES:
                raise ValueError(f"names: unknown library {name!r}; choose from {', '.join(NAMES)}")
            if why := building.why_not(name):
                raise ValueError(f"{name}: {why}")
        return list(dict.fromkeys(names))
    wanted = (
        NAMES if every else [f"cpu_{processor.kernels()}", "eager", *(["cuda"] if torch.cuda.is_available() else [])]
    )
    left_out = {name: why for name in wanted if (why := building.why_not(name))}
    if len(left_out) == len(wanted):
        raise ValueError(next(iter(left_out.values())))
    for name, why in left_out.items():
        print(f"without {name}: {why}", file=sys.stderr)
    return [name for name in wanted if name not in left_out]


def _archs() -> str:
    """Return the architectures of the GPUs of this machine."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return " ".join(f"{major}.{minor}" for major, minor in sorted(found))


def _is_built(name: str, cache: Path) -> bool:
    return any(isinstance(compiled.look(folder, name), Path) for folder in (*compiled.folders(), cache))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of the cache, for this user alone, and keep other builds out of it."""
    import fcntl

    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
        if why := compiled.why_unsafe(path):
            raise RuntimeError(f"{why}; or name another folder in FASTHYPER_CACHE")
    with (folder.parent / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another `fasthyper build`", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(names: Sequence[str], folder: Path, archs: str) -> dict[str, str]:
    """Compile libraries, record them beside those that are there, and return the reasons of those that failed."""
    for part in folder.glob(".*"):  # of a build that was killed
        part.unlink()
    print(f"compiling {', '.join(names)} for torch {torch.__version__}, which takes up to some minutes", flush=True)
    with tempfile.TemporaryDirectory() as objects, _progress() as report:
        failed = building.build(names, folder, Path(objects), archs=archs, report=report)
    try:
        known = (compiled.read_record(folder) or {}).get("missing", {})
    except ValueError:
        known = {}
    missing = {name: why for name, why in {**known, **failed}.items() if not (folder / f"{name}.so").exists()}
    building.write_record(folder, building.record(torch.__version__, missing))
    return failed


@contextlib.contextmanager
def _progress() -> Iterator[building.Report]:
    """Show the steps as a bar on a terminal, if rich is installed, and otherwise as lines."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        yield lambda done, steps, name: print(f"{done}/{steps} {name}", flush=True) if name else None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("building"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("building", total=None)
        yield lambda done, steps, name: bar.update(task, completed=done, total=steps)
