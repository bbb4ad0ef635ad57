"""Find and load the compiled libraries that were built for the installed torch.

They are in the package, where setup.py builds them, or in the user's cache, where `fasthyper build` does.
``FASTHYPER_COMPILED`` names one folder instead of both, such as that of the libraries built under sanitizers.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import building
from ._version import __version__

PACKAGED = Path(__file__).parent / "_compiled"


def cache() -> Path:
    """Return the folder for all that fasthyper keeps: ``FASTHYPER_CACHE``, or the one for it in the user's cache."""
    if given := os.environ.get("FASTHYPER_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "fasthyper"


def cached() -> Path:
    """Return the folder of `fasthyper build` for this fasthyper, this torch and this kind of processor."""
    return cache() / "kernels" / f"{__version__}-torch-{torch.__version__}-{platform.machine()}-{building.digest()}"


def folders() -> Iterator[Path]:
    """Yield the folders that may have libraries; the first one that has a library for this torch wins."""
    if given := os.environ.get("FASTHYPER_COMPILED"):
        yield Path(given)
    else:
        yield PACKAGED
        yield cached()


def why_unsafe(path: Path) -> str | None:
    """Return why another user could have put code into a file or a folder of the cache, or None.

    It must belong to this user or to root, and no other may write to it.
    """
    found = path.stat()
    if found.st_uid not in (0, os.getuid()):
        return f"{path} belongs to user {found.st_uid}, and this is {os.getuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path}; run chmod go-w on it"
    return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a build, None without one.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        record = json.loads((folder / building.RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{folder / building.RECORD} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / building.RECORD} is damaged ({type(error).__name__})") from error
    right = isinstance(record, dict) and (
        isinstance(record.get("error"), str)
        or (isinstance(record.get("torch"), str) and isinstance(record.get("missing", {}), dict))
    )
    if not right:
        raise ValueError(f"{folder / building.RECORD} is damaged (its content is no record)")
    return record


def look(folder: Path, name: str) -> Path | str | None:
    """Return the file of a library in a folder, or why it has none for this torch; None if nothing was built there."""
    again = f"run `{command(name)}`"
    try:
        record = read_record(folder)
    except ValueError as error:
        return f"not built: {error}; {again}"
    if record is None:
        return None
    if "error" in record:
        return f"not built: {record['error']}"
    if record["torch"] != torch.__version__:
        return f"built for torch {record['torch']}, and this is {torch.__version__}: {again}"
    if record.get("sources") != building.digest():
        return f"built from other sources than those that are here: {again}"
    if name in (missing := record.get("missing", {})):
        return f"not built: {missing[name]}"
    library = folder / f"{name}.so"
    if not library.exists():
        return f"not built: there is no {name}; {again}"
    if folder.is_relative_to(cache()):
        for path in (folder.parent, folder, library):
            if why := why_unsafe(path):
                return f"built, but not loaded: {why}"
    return library


def command(name: str) -> str:
    """Return the command that builds a library here."""
    return "fasthyper build cuda" if name == "cuda" else "fasthyper build"


@functools.cache
def load(name: str) -> str | None:
    """Load a library, which registers its operators with torch; return why that is impossible, or None."""
    why = None
    for folder in folders():
        try:
            found = look(folder, name)
            if isinstance(found, Path):
                torch.ops.load_library(str(found))
                return None
        except OSError as error:
            found = f"built, but cannot be loaded: {error}"
        why = found or why
    return why or f"not built: {building.unsupported(name) or f'run `{command(name)}`'}"


_warned = False


def warn_once(why: str) -> None:
    """Say once in a process that calls run without the compiled CPU kernels, and why; not where there can be none."""
    global _warned
    if _warned or building.unsupported("cpu"):
        return
    _warned = True
    if os.environ.get("FASTHYPER_NO_WARNING", "0") in ("", "0"):
        warnings.warn(
            f"fasthyper runs without its compiled CPU kernels, and slower, until `{command('cpu')}` has made them "
            f"({why}; FASTHYPER_NO_WARNING=1 silences this warning)",
            RuntimeWarning,
            stacklevel=2,
        )
