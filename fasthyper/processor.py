"""What the processor decides, each thing in one place: which compiled kernels run, and what they multiply in 16 bits.

Two environment variables put something else in the place of what it is, for the whole process: so that what a machine
does not have is tested there, and an instruction set that misbehaves can be avoided.
"""

from __future__ import annotations

import functools
import os

import torch

_KNOWN = ("default", "avx2", "avx512", "width4", "width8", "width16")


def kernels() -> str:
    """Return the name of the compiled kernels to load: those for the instruction set that torch takes here.

    ``FASTHYPER_CPU`` names others: ``default``, ``avx2``, ``avx512``, or of a build under sanitizers ``width4``,
    ``width8``, ``width16``, which every processor can run.

    Raises:
        ValueError: if it names none of them.
    """
    forced = os.environ.get("FASTHYPER_CPU")
    if forced and forced not in _KNOWN:
        raise ValueError(f"FASTHYPER_CPU must be one of {', '.join(_KNOWN)}, got {forced!r}")
    return forced or torch.backends.cpu.get_cpu_capability().lower()


@functools.cache
def has_fast(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this 16-bit dtype; elsewhere float32 is tens of times faster."""
    probe = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, probe)())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def kernels_multiply(dtype: torch.dtype) -> bool:
    """Whether the compiled kernels multiply in this 16-bit dtype: bfloat16, where there are instructions for it.

    ``FASTHYPER_BFLOAT16`` is ``1`` or ``0`` to say so whatever the processor has; kernels that cannot compute in
    float32 all the same.

    Raises:
        ValueError: if it is something else.
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
