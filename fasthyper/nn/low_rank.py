"""Generated weights of low rank, ``W[b] = base + (alpha / r)·B[b] A[b]``, whose product is never formed."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasthyper.adapters import add_base, check_alpha, low_rank_linear
from fasthyper.functional import hyper_linear
from fasthyper.incidence import Incidence
from fasthyper.nn.init import INITS, hyperfan_in_
from fasthyper.ops import autocast, shapes
from fasthyper.ops.register import transformed
from fasthyper.planner import get_workspace_limit

_CHUNK_ELEMENTS = 2**22
"""Elements of A, B and what is computed from them that `norm_sq` has at a time."""
_FEW = 2
"""Points for each rank, on average, from which A and B are written out."""


def check_rank(rank: int | None, alpha: float | None) -> float | None:
    """Check a rank and its alpha; return alpha, which is the rank by default.

    Raises:
        TypeError: the rank is not an integer, or alpha is not a number.
        ValueError: the rank is not positive, alpha is not positive and finite, or there is an alpha without a rank.
    """
    if rank is None:
        if alpha is not None:
            raise ValueError(f"alpha scales weights of low rank: it needs a rank, got alpha={alpha!r} and rank=None")
        return None
    if not isinstance(rank, (Integral, torch.SymInt)) or isinstance(rank, bool):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    return check_alpha(rank if alpha is None else alpha)


class LowRank(NamedTuple):
    """The parameters of a layer whose weights have low rank, and what it computes from them.

    Args:
        weight_a: the head of A, ``(r, I, R)``.
        weight_b: the head of B, ``(O, r, R)``.
        bias: ``(O, R)`` or None.
        base_weight: ``(O, I)`` or None.
        base_bias: ``(O,)`` or None.
        alpha: the factor of B A, times r.
    """

    weight_a: Tensor
    weight_b: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None
    alpha: float

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.weight_a.shape[0]

    def forward(self, x: Tensor, z: Tensor, incidence: Incidence | None, reduce: str) -> Tensor:
        """Apply two generated layers, from x to r features and from these to O, and add the base.

        A and B of few instances with many points are written out: they are small, and each point is cheaper then.

        Raises:
            TypeError: x or z is not a dense tensor of floating point numbers.
            ValueError: the incidence has sources or targets.
        """
        for name, t in (("x", x), ("z", z)):
            shapes.check_input(name, t)
        if isinstance(incidence, Incidence) and (incidence.source is not None or incidence.target is not None):
            raise ValueError(
                "incidence must have no sources and no targets for a layer with a rank, as Incidence.from_batch(ids), "
                f"got {incidence}"
            )
        if incidence is None and reduce == "sum" and _has_room(x, z, self.weight_a, self.weight_b):
            a, b = _generated(z, self.weight_a), _generated(z, self.weight_b)
            y = low_rank_linear(x, a, b, self.base_weight, self.base_bias, alpha=self.alpha, layout="rI,Or")
            return y if self.bias is None else y + _as_points(F.linear(z, self.bias), y)
        h = hyper_linear(x, z, self.weight_a, incidence=incidence, reduce=reduce)
        if self.scale != 1:
            h = h * self.scale  # the smallest of the tensors that the factor can be applied to
        y = hyper_linear(h, z, self.weight_b, self.bias, base_bias=self.base_bias, incidence=incidence, reduce=reduce)
        return add_base(y, x, self.base_weight)

    def weight(self, z: Tensor) -> Tensor:
        """Return W (B, O, I), written out."""
        a, b = _generated(z, self.weight_a), _generated(z, self.weight_b)
        if self.base_weight is None:
            return torch.bmm(b, a * self.scale)
        return torch.baddbmm(self.base_weight.expand(z.shape[0], -1, -1), b, a, alpha=self.scale)

    def norm_sq(self, z: Tensor) -> Tensor:
        """Return ‖W[b]‖² (B,), never negative; z has the dtype of the computation.

        With s the scale and W0 the base weight it is s² tr((A Aᵀ)(Bᵀ B)) + 2 s Σ B ∘ (W0 Aᵀ) + ‖W0‖². W is not formed.
        """
        weight_a, weight_b = self.weight_a.to(z.dtype), self.weight_b.to(z.dtype)
        base = None if self.base_weight is None else self.base_weight.to(z.dtype)
        (r, I, _), O, s = weight_a.shape, weight_b.shape[0], self.scale

        def of_chunk(z: Tensor) -> Tensor:
            a, b = _generated(z, weight_a), _generated(z, weight_b)
            norm = s**2 * (torch.bmm(a, a.mT) * torch.bmm(b.mT, b)).sum((1, 2))
            return norm if base is None else norm + 2 * s * (b * torch.matmul(base, a.mT)).sum((1, 2))

        size = max(1, _CHUNK_ELEMENTS // max(1, r * (I + 2 * O + 2 * r)))
        if z.shape[0] <= size or transformed():  # torch.func does not support checkpoints
            norm = of_chunk(z)
        else:
            chunks = z.split(size)
            norm = torch.cat([checkpoint(of_chunk, c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
        return (norm if base is None else norm + base.square().sum()).clamp_min(0)

    def reset(
        self,
        init: str,
        z_second_moment: float,
        nonlinearity: str,
        fans: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        """Initialise the heads so that W has the variance of one of full rank; the biases and the base as beside it.

        B has the gain and the scale, and its fan-in is r. An entry of A has second moment 1 / I, or 1 / r with
        "hyperfan_out". With "bias_hyper" B's head is zero, and A's is not. `fans` has the fan-in and the fan-out of A,
        of B and of their product; by default those of matrices.
        """
        (_, I, R), O = self.weight_a.shape, self.weight_b.shape[0]
        of_a, of_b, of_product = fans or (None, None, None)
        zero_b = init == "bias_hyper"
        (hyperfan_in_ if zero_b else INITS[init])(self.weight_a, z_second_moment=z_second_moment, fans=of_a)
        if zero_b:
            torch.nn.init.zeros_(self.weight_b)
        else:
            more = {"z_second_moment": z_second_moment, "nonlinearity": nonlinearity}
            INITS[init](self.weight_b, self.bias, **more, fans=of_b)
            with torch.no_grad():
                self.weight_b.div_(self.scale)
        full = torch.empty(O, I, R, device="meta"), self.bias, self.base_weight, self.base_bias
        INITS[init](*full, z_second_moment=z_second_moment, nonlinearity=nonlinearity, fans=of_product)


def _has_room(x: Tensor, z: Tensor, weight_a: Tensor, weight_b: Tensor) -> bool:
    """Return whether A and B, written out, are small beside the points and the workspace; not in traced code.

    It is False for arguments that do not fit, which `hyper_linear` describes.
    """
    if torch.compiler.is_compiling() or not (isinstance(x, Tensor) and isinstance(z, Tensor)):
        return False
    (r, I, R), O = weight_a.shape, weight_b.shape[0]
    if x.dim() < 3 or x.shape[-1] != I or z.shape != (x.shape[0], R) or not x.device == z.device == weight_a.device:
        return False
    dtypes = {x.dtype, z.dtype, weight_a.dtype}
    cast = autocast.enabled(x.device.type) and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
    many_points = x.numel() >= _FEW * x.shape[0] * r * I
    small = 4 * z.shape[0] * r * (I + O) * z.element_size() <= get_workspace_limit()
    return many_points and small and (cast or len(dtypes) == 1)


def _as_points(rows: Tensor, y: Tensor) -> Tensor:
    """View rows (B, O) so that they are added to every point of y (B, *, O)."""
    return rows.view(rows.shape[0], *[1] * (y.dim() - 2), rows.shape[1])


def _generated(z: Tensor, head: Tensor) -> Tensor:
    """Return the factor (B, *, *) of each instance that a head (*, *, R) generates."""
    return F.linear(z, head.flatten(0, 1)).view(z.shape[0], *head.shape[:2])
