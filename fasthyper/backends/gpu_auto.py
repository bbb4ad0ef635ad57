"""What ``"auto"`` takes on a GPU: the CUDA kernels for the problems that are theirs, else Triton's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import cuda, triton

DTYPES, PREFERRED_ON, COSTS, REMARK = triton.DTYPES, triton.PREFERRED_ON, triton.COSTS, triton.REMARK
devices, unavailable, takes = triton.devices, triton.unavailable, triton.takes
apply_terms, grads_terms = triton.apply_terms, triton.grads_terms


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    schedule: str,
) -> Tensor:
    """Return y (B, N, O); see `contract.Backend`."""
    backend = cuda if cuda.is_best(x, weight.shape[2], weight.shape[0]) else triton
    return backend.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    *,
    schedule: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients where the mask is set; see `contract.Backend`."""
    R = (z if weight is None else weight).shape[-1]  # type: ignore[union-attr]
    backend = cuda if cuda.is_best(x, R, g.shape[2]) else triton
    return backend.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)


def trace_apply(x: Tensor, z: Tensor, weight: Tensor, *others: Tensor | None, **options: Any) -> Tensor | None:
    """Return y if Triton's kernels compute it, else None; see `contract.Traced`."""
    if cuda.is_best(x, weight.shape[2], weight.shape[0]):
        return None
    return triton.trace_apply(x, z, weight, *others, **options)


def trace_grads(
    x: Tensor, z: Tensor | None, weight: Tensor | None, *others: Any, **options: Any
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients if Triton's kernels compute them, else None; see `contract.Traced`."""
    R, g = (z if weight is None else weight).shape[-1], others[2]  # type: ignore[union-attr]
    if cuda.is_best(x, R, g.shape[2]):
        return None
    return triton.trace_grads(x, z, weight, *others, **options)
