"""What ``"auto"`` takes on a GPU: the CUDA kernels for the problems that are theirs, else Triton's."""

from __future__ import annotations

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
