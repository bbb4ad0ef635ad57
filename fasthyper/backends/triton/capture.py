"""A kernel cannot be compiled while a CUDA graph is captured: an error that says what to do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from triton import knobs

from ..gpu import is_capturing

_lock = threading.Lock()
_capturing: dict[int, str] = {}  # the kernel that a thread launches into a capture
_before: Any = None  # Triton's hook, while ours is in its place


@contextlib.contextmanager
def refusing_to_compile(kernel: Any) -> Iterator[None]:
    """While a CUDA graph is captured, raise where this thread would have to compile or load a kernel.

    That would end the capture with an obscure error. The hook is that of all threads: the first of those that capture
    sets it, and the last one takes it away.
    """
    global _before
    if not is_capturing():
        yield
        return
    thread = threading.get_ident()
    with _lock:
        if not _capturing:
            _before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, _refuse
        _capturing[thread] = kernel.__name__
    try:
        yield
    finally:
        with _lock:
            del _capturing[thread]
            if not _capturing:
                _before, knobs.runtime.jit_cache_hook = None, _before


def _refuse(**given: Any) -> Any:
    name, before = _capturing.get(threading.get_ident()), _before
    if name is not None:
        raise RuntimeError(
            f"the kernel {name} is not compiled yet for these sizes, strides and dtype, and cannot be while a CUDA "
            "graph is captured: warm up, that is, make the same call once before the capture"
        )
    return before(**given) if before is not None else None
