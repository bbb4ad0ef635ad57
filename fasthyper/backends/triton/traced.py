"""Put the launches of a call into a graph that torch traces, where ``torch.compile`` would else see an opaque op.

B and N may be symbols. The tiles and the splits are those of the example's sizes, and right for all sizes. A choice
that is right for some sizes alone is a branch, which torch makes a guard of the graph. A function returns None, and
puts nothing into the graph, if other code than these kernels computes the call, or if it has several blocks of
instances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import planner
from ...problem import Problem
from .. import gpu
from ..gpu import padded
from . import launch, layouts, recording
from .recording import Call

Emit = Callable[[Call], None]


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    schedule: str,
    emit: Emit,
) -> Tensor | None:
    """Return y (B, N, O)."""
    (B, N, _), (O, _, R) = x.shape, weight.shape
    if not (_takes("apply", x, R, O, schedule) and _fits(z)):
        return None
    with _emitting(emit):
        wide, h = _padded_factors(z, weight)
        y = x.new_empty(B * N, O)
        launch._fold(x, launch._rows(cast(Tensor, wide), N), h.permute(1, 2, 0), base_weight, bias, base_bias, y)
    return y.view(B, N, O)


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    mask: tuple[bool, ...],
    schedule: str,
    emit: Emit,
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of x, z, H, bias, W0, b0 where the mask is set, else None."""
    (B, N, I), O = x.shape, g.shape[2]
    R = cast(Tensor, z if weight is None else weight).shape[-1]
    needs = mask[0], mask[1], mask[2]
    if not (_takes("grads", x, R, O, schedule, needs) and (z is None or _fits(z))):
        return None
    if mask[1] and N != 1 and launch._share() < B * N * R * 4:
        return None
    g = g.contiguous() if _is_expanded(g) else g
    dx = x.new_empty(B * N, I) if mask[0] else None
    dz = x.new_empty(B * N, R, dtype=x.dtype if N == 1 else torch.float32) if mask[1] else None
    dh = x.new_empty(O, I, R) if mask[2] else None
    with _emitting(emit):
        wide = z
        if mask[0] or mask[1]:
            wide, h = _padded_factors(z, cast(Tensor, weight))
            launch._grads_of_rows(x, wide, h, base_weight, bias, g, dx, dz)
        elif z is not None and layouts.unit(z, R) == 1:
            wide = _padded(z)
        if dh is not None:
            launch._weight_grad(x, cast(Tensor, wide), g, dh)
    if dx is not None:
        dx = dx.view(B, N, I)
    if dz is not None and N != 1:
        dz = dz.view(B, N, R).sum(1).to(x.dtype)
    return dx, dz, dh, *_base_grads(x, z, g, mask)


def _base_grads(x: Tensor, z: Tensor | None, g: Tensor, mask: tuple[bool, ...]) -> list[Tensor | None]:
    """Return dbias (O, R), dW0 (O, I) and db0 (O,) where the mask is set, in operations that torch fuses."""
    out: list[Tensor | None] = [None] * len(mask[3:])
    if any(mask[3:4]):
        of_instance = g[:, 0] if g.shape[1] == 1 else g.sum(1, dtype=torch.float32)
        out[0] = (of_instance.T @ cast(Tensor, z).to(of_instance.dtype)).to(g.dtype)
    if any(mask[4:5]):
        out[1] = g.flatten(0, 1).T @ x.flatten(0, 1)
    if any(mask[5:6]):
        out[2] = g.sum((0, 1), dtype=torch.float32).to(g.dtype)
    return out


@contextmanager
def _emitting(emit: Emit) -> Iterator[None]:
    def checked(call: Call) -> None:
        partial = call.args.get("partial_ptr")
        assert partial is None or partial.numel() * 4 <= gpu.partial_sums_limit()  # a guard where B is a symbol
        emit(call)

    with recording.emitting(checked):
        yield


def _takes(op: str, x: Tensor, R: int, O: int, schedule: str, needs: tuple[bool, bool, bool] = (True,) * 3) -> bool:
    """Return whether these kernels compute a call with the example's sizes."""
    B, N, I = x.shape
    if not all(isinstance(n, int) for n in (R, I, O)) or not all(gpu.has_hint(n) for n in (B, N)):
        return False
    problem = Problem.of(op, x, R, O, needs, "triton")._replace(device="cuda", batch=gpu.hint(B), points=gpu.hint(N))
    problem = problem._replace(shared_x=bool(problem.shared_x))
    if not gpu.takes(problem) or not any(needs) or B * N >= 1 << 31:
        return False
    return planner.plan(problem, schedule).schedule == "fold"


def _fits(z: Tensor) -> bool:
    """Return whether z needs no padding along R, or its copy fits in one block."""
    return z.shape[1] % 16 == 0 or launch._fits(z)


def _padded_factors(z: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return z and H as the kernels read them best: padded along R, or as they are."""
    h = weight if launch._in_place(z, weight) else _padded(weight)
    return (z if z is None or h is weight else _padded(z)), h


def _padded(t: Tensor) -> Tensor:
    """Return z or H with R padded to a multiple of 16; unchanged if the copy does not fit its share."""
    return F.pad(t, (0, padded(t.shape[-1]) - t.shape[-1])) if t.shape[-1] % 16 and launch._fits(t) else t


def _is_expanded(t: Tensor) -> bool:
    strides: Any = t.stride()
    return any(isinstance(s, int) and s == 0 for s in strides)
