"""A kernel cannot be compiled while a CUDA graph is captured: an error that says what to do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from triton import knobs

from ..gpu import is_capturing


@contextlib.contextmanager
def refusing_to_compile(kernel: Any) -> Iterator[None]:
    """While a CUDA graph is captured, raise where this thread would have to compile or load a kernel.

    That would end the capture with an obscure error.
    """
    if not is_capturing():
        yield
        return
    before, thread = knobs.runtime.jit_cache_hook, threading.get_ident()

    def refuse(**given: Any) -> Any:
        if threading.get_ident() == thread:
            raise RuntimeError(
                f"the kernel {kernel.__name__} is not compiled yet for these sizes, strides and dtype, and cannot be "
                "while a CUDA graph is captured: warm up, that is, make the same call once before the capture"
            )
        return before(**given) if before is not None else None

    knobs.runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
