"""Files and folders: written as a whole or not at all, and nothing left behind in vain."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file as a whole: a reader, or a kill, sees the old one or the new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it readable to its owner alone
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_writable(folder: str | os.PathLike[str], *names: str) -> None:
    """Try whether a folder, which need not exist yet, takes files, and leave nothing behind.

    Args:
        folder: where to write.
        names: files that may be there already and will be written to.

    Raises:
        ValueError: it cannot be written to.
    """
    folder = Path(folder)
    missing = missing_folders(folder)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            for path in (folder / name for name in names):
                if path.exists():
                    path.open("r+b").close()
        finally:
            remove_empty(missing)
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder} ({error.strerror or error})") from None


def missing_folders(folder: Path) -> list[Path]:
    """The folders that `mkdir(parents=True)` would make, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are there and empty, in the order given."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
