"""Choices that depend on the processor: which compiled kernels run, and whether they multiply in 16 bits.

Two environment variables override these choices for the whole process. Tests use them for instruction sets that the
machine does not have; a user may avoid an instruction set that causes errors.
"""

from __future__ import annotations

import functools
import os

import torch

_KNOWN = ("default", "avx2", "avx512", "width4", "width8", "width16")


def kernels() -> str:
    """Return the name of the compiled kernels to load: those for the instruction set that torch itself uses.

    ``FASTHYPER_CPU`` names others: ``default``, ``avx2``, ``avx512``, or, in a build under sanitizers, ``width4``,
    ``width8``, ``width16``, which every processor can run.

    Raises:
        ValueError: if ``FASTHYPER_CPU`` has another value.
    """
    forced = os.environ.get("FASTHYPER_CPU")
    if forced and forced not in _KNOWN:
        raise ValueError(f"FASTHYPER_CPU must be one of {', '.join(_KNOWN)}, got {forced!r}")
    return forced or torch.backends.cpu.get_cpu_capability().lower()


@functools.cache
def has_fast(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has fast products of a 16-bit dtype. If not, float32 is tens of times faster."""
    probe = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, probe)())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def kernels_multiply(dtype: torch.dtype) -> bool:
    """Return whether the compiled kernels multiply in a 16-bit dtype: bfloat16, if the processor supports it.

    ``FASTHYPER_BFLOAT16`` forces it, ``1`` or ``0``. Kernels that cannot multiply bfloat16 compute in float32 anyway.

    Raises:
        ValueError: if ``FASTHYPER_BFLOAT16`` has another value.
    """
    if dtype != torch.bfloat16:
        return False
    if forced := os.environ.get("FASTHYPER_BFLOAT16"):
        if forced not in ("0", "1"):
            raise ValueError(f"FASTHYPER_BFLOAT16 must be 0 or 1, got {forced!r}")
        return forced == "1"
    if kernels() != "avx512" or not has_fast(dtype):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
