"""The base and the generated bias of the family over terms, and their gradients.

    y[t] += Σ_{e: t(e)=t} W0 x[s(e)] + bias·z[c(e)] + b0

Each is a matrix applied to rows that move from one index to another. The product with the matrix runs at the index
with fewer rows. `sum_terms` moves rows: out[to[e]] += rows[from[e]].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...terms import Terms
from .tiling import Tiling, accumulate, blocks

SumTerms = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]


def sum_terms(out: Tensor, rows: Tensor, source: Tensor | None, target: Tensor | None) -> None:
    """Compute out[target[e]] += rows[source[e]] for matrices, a block of terms at a time."""
    if source is None and target is None:
        out += rows
        return
    count = len(source if target is None else target)  # type: ignore[arg-type]
    for e in blocks(count, (1 << 18) // max(1, rows.shape[1])):
        moved = (rows[e] if source is None else rows[source[e]]).to(out.dtype)
        if target is None:
            out[e] += moved
        else:
            out.index_add_(0, target[e], moved)


class Bases:
    """The products with bias, W0 and b0, and their gradients, on one call."""

    def __init__(self, terms: Terms, tiling: Tiling, sum_terms: SumTerms = sum_terms) -> None:
        self.terms, self.tiling, self._sum_terms = terms, tiling, sum_terms

    def add(
        self, y: Tensor, x: Tensor, z: Tensor, bias: Tensor | None, base_weight: Tensor | None, base_bias: Tensor | None
    ) -> None:
        """Add W0 x + bias·z + b0 of all terms to y (T, N, O)."""
        source, cond, target = self.terms[:3]
        if base_bias is not None:
            degrees, b0 = self.degrees(y), base_bias.to(self.tiling.sum_dtype)
            for t in blocks(len(y), self.tiling.elements // max(1, y[:1].numel())):
                y[t] += (degrees[t].unsqueeze(1) * b0).unsqueeze(1)
        for n in range(y.shape[1]):
            if base_weight is not None:
                self._move(y[:, n], x[:, n], base_weight, source, target)
            if bias is not None:
                self._move(y[:, n], z, bias, cond, target)

    def add_to_grads(
        self, dx: Tensor | None, dz: Tensor | None, g: Tensor, bias: Tensor | None, base_weight: Tensor | None
    ) -> None:
        """Add the gradients through W0 to dx (S, N, I), and those through bias to dz (C, R)."""
        source, cond, target = self.terms[:3]
        for n in range(g.shape[1]):
            if dx is not None and base_weight is not None:
                self._move(dx[:, n], g[:, n], base_weight.T, target, source)
            if dz is not None and bias is not None:
                self._move(dz, g[:, n], bias.T, target, cond)

    def grads(self, x: Tensor, z: Tensor | None, g: Tensor, R: int, mask: tuple[bool, ...]) -> list[Tensor | None]:
        """Return dbias = Σ_e g ⊗ z, dW0 = Σ_e g ⊗ x and db0 = Σ_e g, where the mask is set."""
        source, cond, target = self.terms[:3]
        O, I = g.shape[2], x.shape[2]
        out: list[Tensor | None] = [None, None, None]
        if mask[3] and z is not None:
            out[0] = self._outer(g, lambda n: z, target, cond, (O, R))
        if mask[4]:
            out[1] = self._outer(g, lambda n: x[:, n], target, source, (O, I))
        if mask[5]:
            degrees, total = self.degrees(g), g.new_zeros(O, dtype=self.tiling.sum_dtype)
            for n in range(g.shape[1]):
                for t in blocks(len(g), self.tiling.elements // max(1, O)):
                    total += degrees[t] @ g[t, n].to(total.dtype)
            out[2] = total.to(g.dtype)
        return out

    def degrees(self, t: Tensor) -> Tensor:
        """Return the number of terms of each target (T,), in the dtype of sums."""
        by = self.terms.sort("target")
        return (
            t.new_ones(len(t), dtype=self.tiling.sum_dtype) if by is None else by.ptr.diff().to(self.tiling.sum_dtype)
        )

    def _sum_of(self, rows: Tensor, source: Tensor | None, target: Tensor | None, size: int) -> Tensor:
        """Return (size, F): for each value of `target`, the sum of the rows that its terms have in `source`."""
        if source is None and target is None:
            return rows.to(self.tiling.sum_dtype)
        total = rows.new_zeros(size, rows.shape[1], dtype=self.tiling.sum_dtype)
        self._sum_terms(total, rows, source, target)
        return total

    def _move(self, out: Tensor, rows: Tensor, matrix: Tensor, source: Tensor | None, target: Tensor | None) -> None:
        """Compute out[target[e]] += matrix · rows[source[e]] for all terms."""
        work, room = self.tiling.work, self.tiling.elements
        K, I = rows.shape
        for o in blocks(out.shape[1], room // max(1, K, len(out))):
            part, m = out[:, o], matrix[o]
            if source is None and target is None:
                for k in blocks(K, room // max(1, I)):
                    part[k] += work(rows[k]) @ work(m).T
                continue
            direct = out.dtype == self.tiling.sum_dtype
            total = part if direct else torch.zeros(part.shape, dtype=self.tiling.sum_dtype, device=out.device)
            if target is None or len(out) >= K:
                products = torch.empty(K, len(m), dtype=self.tiling.dtype, device=out.device)
                for k in blocks(K, room // max(1, I)):
                    torch.mm(work(rows[k]), work(m).T, out=products[k])
                self._sum_terms(total, products, source, target)
            else:
                for i in blocks(I, room // max(1, len(out))):
                    accumulate(total, self._sum_of(rows[:, i], source, target, len(out)), work(m[:, i]).T)
            if not direct:
                part += total

    def _outer(
        self,
        g: Tensor,
        rows_at: Callable[[int], Tensor],
        left: Tensor | None,
        right: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        """Return Σ_{e,n} g[left[e],n] ⊗ rows[right[e]], with the rows of each point n."""
        total = torch.zeros(shape, dtype=self.tiling.sum_dtype, device=g.device)
        for n in range(g.shape[1]):
            rows = rows_at(n)
            at_left = len(g) <= len(rows)  # sum the rows by the index with fewer values
            moved, fixed, source, target = (rows, g[:, n], right, left) if at_left else (g[:, n], rows, left, right)
            out = total if at_left else total.T
            for f in blocks(moved.shape[1], self.tiling.elements // max(1, len(fixed))):
                sums = self._sum_of(moved[:, f], source, target, len(fixed))
                for k in blocks(len(fixed), self.tiling.elements // max(1, fixed.shape[1])):
                    accumulate(out[:, f], self.tiling.work(fixed[k]).T, sums[k])
        return total.to(g.dtype)
