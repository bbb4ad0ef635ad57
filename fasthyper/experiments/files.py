"""Files and folders: write a file completely or not at all, and remove empty folders after a failure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file in one step: a reader sees the old or the new content, also if this process is killed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp allows only its owner to read it
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_writable(folder: str | os.PathLike[str], *names: str) -> None:
    """Check that files can be written to a folder, which need not exist yet. Nothing is left there.

    Several processes may check the same folder. What is made on trial has a name of its own, so that none of them
    removes what another has just made.

    Args:
        folder: where to write.
        names: files that will be written, and that may exist already.

    Raises:
        ValueError: files cannot be written there.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryDirectory(dir=there) as own:
            trial = Path(own) / folder.relative_to(there)
            trial.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=trial):
                pass
        for path in (folder / name for name in names):
            if path.exists():
                path.open("r+b").close()
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder} ({error.strerror or error})") from None


def missing_folders(folder: Path) -> list[Path]:
    """Return the folders that `mkdir(parents=True)` would make, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that exist and are empty, in the order given."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
