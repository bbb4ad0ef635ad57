"""The types of the planner: the call (`Problem`), the rates of a device (`Machine`), the way to compute it (`Plan`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .geometry import Geometry
from .terms import Terms

SCHEDULES = ("fold", "generate", "project")
"""The orders of contraction: x ⊗ z first, z · H first, x · H first."""

TERM_SCHEDULES = (*SCHEDULES, "aggregate")
"""The orders for terms that share sources, conditions or targets: `aggregate` sums x ⊗ z of each target first."""

CONV_SCHEDULES = ("fold", "generate")
"""The orders for generated convolutions: `fold` runs the patches of the image as points of a linear layer."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the op family."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the backends that have kernels of their own."""

AUTO = "auto"
"""The choice to let the planner decide. The empty string, in contrast, means that no choice was made yet."""


class Problem(NamedTuple):
    """One call of the op family: sizes, dtype, device type.

    A tuple, because it is hashed on every call and tuples hash fastest.

    Args:
        op: ``"apply"`` or ``"grads"`` (which includes ``cond_grad`` and ``weight_grad``).
        batch: B, instances, each with its own z.
        points: N, points per instance.
        cond_features: R, features of z.
        in_features: I, in features of the generated layer.
        out_features: O, out features of the generated layer.
        dtype: dtype of all tensors.
        device: device type, such as ``"cpu"``.
        shared_x: whether all instances have the same x (a batch stride of zero).
        needs: for ``grads``, which of dx, dz, dH are requested.
        backend: the backend whose costs count; empty for torch's own operations on tiles.
    """

    op: str
    batch: int
    points: int
    cond_features: int
    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    shared_x: bool = False
    needs: tuple[bool, bool, bool] = (True, True, True)
    backend: str = ""

    @classmethod
    def of(
        cls,
        op: str,
        x: torch.Tensor,
        R: int,
        O: int,
        needs: tuple[bool, bool, bool] = (True,) * 3,
        backend: str = "",
    ) -> Problem:
        """Return the problem of a call with x (B, N, I)."""
        B, N, I = x.shape
        reads_x = op == "apply" or needs[1] or needs[2]  # else x may be a tensor without values, with strides of zero
        shared = reads_x and B > 1 and x.stride(0) == 0
        return cls(op, B, N, R, I, O, x.dtype, x.device.type, shared, needs, backend)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, N, R, I, O."""
        return self.batch, self.points, self.cond_features, self.in_features, self.out_features

    @property
    def distinct(self) -> int:
        """Distinct rows of x."""
        return self.points if self.shared_x else self.batch * self.points


class TermProblem(NamedTuple):
    """One call of the op family with an index for each factor: y[t(e)] = Σ_e (H·z[c(e)]) x[s(e)].

    Args:
        op: ``"apply"`` or ``"grads"``.
        terms: E.
        sources: S, distinct rows of x.
        conds: C, distinct rows of z.
        targets: T, rows of y.
        points: N, rows of x for each source, and of y for each target.
        cond_features: R.
        in_features: I.
        out_features: O.
        dtype: dtype of all tensors.
        device: device type.
        needs: for ``grads``, which of dx, dz, dH are requested.
        backend: the backend whose costs count.
    """

    op: str
    terms: int
    sources: int
    conds: int
    targets: int
    points: int
    cond_features: int
    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    needs: tuple[bool, bool, bool] = (True, True, True)
    backend: str = ""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """R, I, O."""
        return self.cond_features, self.in_features, self.out_features

    @property
    def is_empty(self) -> bool:
        """Whether a size is zero."""
        return 0 in (self.terms, self.sources, self.conds, self.targets, self.points, *self.sizes)

    @classmethod
    def of(
        cls,
        op: str,
        x: torch.Tensor,
        R: int,
        O: int,
        terms: Terms,
        needs: tuple[bool, bool, bool] = (True,) * 3,
        backend: str = "",
    ) -> TermProblem:
        """Return the problem of a call with x (S, N, I)."""
        S, N, I = x.shape
        counts = terms.num_terms, S, terms.conds, terms.targets
        return cls(op, *counts, N, R, I, O, x.dtype, x.device.type, needs, backend)

    def rows(self, schedule: str) -> int:
        """Return the rows of the products with H: the values of the index at which a schedule contracts."""
        N = self.points
        return {
            "fold": self.terms * N,
            "generate": self.conds,
            "project": self.sources * N,
            "aggregate": self.targets * N,
        }[schedule]


class ConvProblem(NamedTuple):
    """One generated convolution.

    Args:
        op: ``"apply"`` or ``"grads"``.
        batch: B.
        groups: G.
        in_features: numbers that an output pixel sums: I channels of a group times the taps of the kernel.
        out_features: outputs of a group, O / G.
        cond_features: R.
        image: pixels of the image.
        pixels: pixels of the output.
        taps: taps of the kernel.
        dtype: dtype of all tensors.
        device: device type.
        needs: for ``grads``, which of dx, dz, dH are requested.
        backend: the backend whose costs count.
    """

    op: str
    batch: int
    groups: int
    in_features: int
    out_features: int
    cond_features: int
    image: int
    pixels: int
    taps: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    needs: tuple[bool, bool, bool] = (True, True, True)
    backend: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether a size is zero."""
        return 0 in self[1:9]

    @classmethod
    def of(
        cls,
        op: str,
        x: torch.Tensor,
        I: int,
        O: int,
        R: int,
        geo: Geometry,
        needs: tuple[bool, bool, bool] = (True,) * 3,
        backend: str = "",
    ) -> ConvProblem:
        """Return the problem of a call with I inputs of each group and O outputs in all."""
        sizes = geo.groups, I * geo.taps, O // geo.groups, R, *geo.pixels, geo.taps
        return cls(op, x.shape[0], *sizes, x.dtype, x.device.type, needs, backend)

    def of_patches(self) -> Problem:
        """Return one group's problem with the patches of the image as points."""
        sizes = self.batch, self.pixels, self.cond_features, self.in_features, self.out_features
        return Problem(self.op, *sizes, self.dtype, self.device, False, self.needs, self.backend)


class Pairs(NamedTuple):
    """One call of `pairs`, which has two schedules: x · H first (``"project"``) or z · H first (``"generate"``).

    Args:
        op: ``"pairs"`` or ``"pairs_grads"``.
        batch: B, pairs of sets.
        rows: M, members of the first set.
        columns: N, members of the second set.
        in_features: I, features of x, without an appended one.
        cond_features: R, features of z, without an appended one.
        out_features: O.
        dtype: dtype of all tensors.
        device: device type, such as ``"cpu"``.
        needs: for ``pairs_grads``, which of dx, dz, dH are requested.
    """

    op: str
    batch: int
    rows: int
    columns: int
    in_features: int
    cond_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    needs: tuple[bool, bool, bool] = (True, True, True)

    def swapped(self) -> Pairs:
        """Return the problem with x and z in each other's place; its ``"project"`` is ``"generate"`` of this one."""
        dx, dz, dh = self.needs
        return self._replace(
            rows=self.columns,
            columns=self.rows,
            in_features=self.cond_features,
            cond_features=self.in_features,
            needs=(dz, dx, dh),
        )


@dataclass(frozen=True)
class Machine:
    """Rates that turn flops and bytes into seconds.

    Args:
        flops: peak rate of the work dtype, flop/s.
        cache_bandwidth: rate at which a tile is written and read back, byte/s.
        memory_bandwidth: rate of main memory, byte/s.
        launch: cost of one torch call, s.
        tile_bytes: the size of the largest tile that stays in cache.
        work_dtype: dtype in which tiles are computed and summed.
        short_side: length at which a side of a matrix product halves its rate.
    """

    flops: float
    cache_bandwidth: float
    memory_bandwidth: float
    launch: float
    tile_bytes: int
    work_dtype: torch.dtype
    short_side: float = 8.0


@dataclass(frozen=True)
class Plan:
    """The way to compute a problem, and its predicted cost.

    Args:
        schedule: one of `TERM_SCHEDULES`.
        tile: elements that one tile may hold.
        work_dtype: dtype of the tiles.
        flops: floating point operations.
        bytes: bytes moved, tiles and operands.
        workspace: peak temporary bytes.
        seconds: predicted time.
    """

    schedule: str
    tile: int
    work_dtype: torch.dtype
    flops: float
    bytes: float
    workspace: int
    seconds: float
