"""M layers of the same sizes, each with its own factors: small ones together in batched products, others one by one.

    W[m,b] = H[m]·z[m,b]   y[m,b] = x[m,b] W[m,b]ᵀ   dW[m,b] = g[m,b]ᵀ x[m,b]   dz = dW·H   dH[m] = Σ_b dW[m,b] ⊗ z[m,b]

W of some models at a time fits a tile. Gradients of heads are written where they are returned.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ... import planner
from ...problem import AUTO, Plan, Problem
from .. import aten
from ..contract import Backend
from .tiling import blocks, head_matrix, put


class _Heads(NamedTuple):
    """Heads (m, O, I, R) as matrices: of rows (o, i), or of (i, o) if they are swapped."""

    rows: Tensor
    swapped: bool

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> _Heads:
        swapped = _is_swapped(weight)
        heads = weight.transpose(1, 2) if swapped else weight
        return cls(heads.flatten(1, 2).to(dtype), swapped)

    def weights(self, z: Tensor, O: int, I: int) -> Tensor:
        """Return W (m·B, O, I) of z (m, B, R)."""
        w = torch.bmm(z, self.rows.mT)
        shape = len(z) * z.shape[1], *((I, O) if self.swapped else (O, I))
        return w.view(shape).mT if self.swapped else w.view(shape)

    def contract(self, dw: Tensor, m: int) -> Tensor:
        """Return Σ dW·H, (m, B, R), of dW (m·B, O, I)."""
        dw = dw.mT if self.swapped else dw
        return torch.bmm(dw.reshape(m, len(dw) // m, self.rows.shape[1]), self.rows)


def _is_swapped(weight: Tensor) -> bool:
    """Return whether heads are transposed views, such as that of the gradient of x."""
    return head_matrix(weight[0]) is None and head_matrix(weight[0].transpose(0, 1)) is not None


def is_shared(t: Tensor) -> bool:
    """Return whether all models have the same tensor, an expanded view."""
    return len(t) > 1 and t.stride(0) == 0


class Models(NamedTuple):
    """The two functions of `contract.OfModels`; `module` is the backend that runs one model, or a merged call."""

    module: Backend

    def apply_models(self, x: Tensor, z: Tensor, weight: Tensor, *, schedule: str) -> Tensor:
        """Return y (M, B, N, O) of x (M, B, N, I), z (M, B, R), H (M, O, I, R)."""
        M, B, N, I = x.shape
        O, R = weight.shape[1], weight.shape[3]
        y = x.new_empty(M, B, N, O)
        if M == 0:
            return y
        plan = planner.plan(Problem.of("apply", x[0], R, O))
        if is_shared(weight):  # instances of one model
            for m in blocks(M, plan.tile // max(1, B * (N * (I + O) + R))):
                merged = self.module.apply(x[m].flatten(0, 1), z[m].flatten(0, 1), weight[0], schedule=schedule)
                y[m] = merged.view(y[m].shape)
            return y
        together = self._together(x, weight, O, R, plan, schedule)
        if together < 2:
            for k in range(M):
                y[k] = self.module.apply(x[k], z[k], weight[k], schedule=schedule)
            return y
        for m in blocks(M, together):
            work = plan.work_dtype
            w = _Heads.of(weight[m], work).weights(z[m].to(work), O, I)
            out = y[m].view(len(w), N, O)
            into = out if out.dtype == work else None
            put(out, torch.bmm(x[m].flatten(0, 1).to(work), w.mT, out=into))
        return y

    def grads_models(
        self,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        g: Tensor,
        mask: tuple[bool, ...],
        *,
        schedule: str,
    ) -> tuple[Tensor | None, ...]:
        """Return dx, dz and dH where the mask is set."""
        z, weight = cast(Tensor, z), cast(Tensor, weight)  # None only if no requested gradient reads it
        M, B, _, I = x.shape
        O, R = g.shape[3], (z if weight is None else weight).shape[-1]
        to_x, to_z, to_h = mask
        dx = self.apply_models(g, z, weight.transpose(1, 2), schedule=schedule) if to_x else None
        dz = x.new_empty(M, B, R) if to_z else None
        dh = x.new_empty(M, O, I, R) if to_h else None
        if M == 0 or not (to_z or to_h):
            return dx, dz, dh
        plan = planner.plan(Problem.of("grads", x[0], R, O, (False, to_z, to_h)))
        together = self._together(x, weight if to_z else None, O, R, plan, schedule, to_h)
        if together < 2:
            for k in range(M):
                of = x[k], None if z is None else z[k], None if weight is None else weight[k], None, None, g[k]
                wanted = False, to_z, to_h, False, False, False
                outs = None, None if dz is None else dz[k], None if dh is None else dh[k]
                if self.module is aten:  # no second dH
                    aten.grads(*of, wanted, schedule=schedule, out=outs)
                    continue
                for out, found in zip(outs, self.module.grads(*of, wanted, schedule=schedule), strict=False):
                    if out is not None:
                        out.copy_(cast(Tensor, found))
            return dx, dz, dh
        for m in blocks(M, together):
            self._grads_together(x[m], z, weight, g[m], dz, dh, m, plan.work_dtype)
        return dx, dz, dh

    @staticmethod
    def _grads_together(
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        g: Tensor,
        dz: Tensor | None,
        dh: Tensor | None,
        m: slice,
        work: torch.dtype,
    ) -> None:
        """Write dz and dH of the models m, if given; x and g are those of these models."""
        M, B, N, I = x.shape
        O = g.shape[3]
        xm, gm = x.flatten(0, 1).to(work), g.flatten(0, 1).to(work)
        dw = torch.mul(gm.mT, xm) if N == 1 else torch.bmm(gm.mT, xm)  # K = 1: an outer product, much faster
        if dz is not None:
            dz[m] = _Heads.of(weight[m], work).contract(dw, M)
        if dh is not None:
            zm, out = z[m].to(work), dh[m].flatten(1, 2)
            into = out if out.dtype == work else None
            rows = dw.view(M, B, O * I)
            outer = B == 1 and work != torch.bfloat16  # in bfloat16, torch's products over K = 1 are the faster ones
            put(out, (torch.mul if outer else torch.bmm)(rows.mT, zm, out=into))

    @staticmethod
    def _together(
        x: Tensor, weight: Tensor | None, O: int, R: int, plan: Plan, schedule: str, to_h: bool = False
    ) -> int:
        """Return how many models fit a tile. A forced schedule runs them one by one: products have no choice."""
        if schedule != AUTO:
            return 1
        _, B, N, I = x.shape
        numbers = B * (O * I + N * (I + O) + R)
        converted = x.dtype != plan.work_dtype
        if weight is not None and (converted or not (_is_swapped(weight) or head_matrix(weight[0]) is not None)):
            numbers += O * I * R
        if to_h and converted:
            numbers += O * I * R
        return plan.tile // max(1, numbers)
