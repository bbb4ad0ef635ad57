"""Load the compiled libraries, if they were built for the installed torch.

``FASTHYPER_COMPILED`` names another folder of libraries, such as those built under sanitizers.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

FOLDER = Path(os.environ.get("FASTHYPER_COMPILED") or Path(__file__).parent / "_compiled")


@functools.cache
def load(name: str) -> str | None:
    """Load a library, which registers its operators with torch; return why that is impossible, or None."""
    try:
        record = json.loads((FOLDER / "build.json").read_text())
    except FileNotFoundError:
        return "not built: the build could not see torch, or was disabled; install with pip's --no-build-isolation"
    if "error" in record:
        return f"not built: {record['error']}"
    if record["torch"] != torch.__version__:
        return f"built for torch {record['torch']}, and this is {torch.__version__}: install fasthyper again"
    if name in (missing := record.get("missing", {})):
        return f"not built: {missing[name]}"
    library = FOLDER / f"{name}.so"
    if not library.exists():
        return f"not built: there is no {name}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"built, but cannot be loaded: {error}"
    return None
