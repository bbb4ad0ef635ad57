"""The contract of a backend: a module with the names of `Backend`, and those of `Fusing` if it fuses two layers.

A backend runs the op family with a base and a generated bias,

    y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0

and its gradients. Calls without bias and base are the ops of the family. The ops check all arguments. A backend must
accept any strides, must not write to its inputs, and returns contiguous results. Temporary memory stays within
`planner.get_workspace_limit()` and does not grow with B.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..costs import Costs
from ..geometry import Geometry
from ..problem import Problem
from ..terms import Terms


class Wanted(NamedTuple):
    """The requested gradients: of x, z, H, bias, W0 and b0, in the order in which a backend returns them."""

    x: bool = False
    z: bool = False
    weight: bool = False
    bias: bool = False
    base_weight: bool = False
    base_bias: bool = False


class Layer(NamedTuple):
    """The parameters of a generated layer."""

    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None


class Backend(Protocol):
    """A module that computes the op family."""

    @property
    def DTYPES(self) -> tuple[torch.dtype, ...]:
        """The dtypes that it has kernels for; it passes calls in others to another backend."""

    @property
    def PREFERRED_ON(self) -> tuple[str, ...]:
        """The types of device, such as ``"cuda"``, where ``"auto"`` takes it if it can run."""

    @property
    def COSTS(self) -> Costs:
        """The cost model of its schedules."""

    @property
    def REMARK(self) -> str:
        """A remark that `fasthyper info` adds to its name; may be empty."""

    def devices(self) -> tuple[str, ...] | None:
        """Return the types of device that it runs on; None stands for any."""

    def unavailable(self) -> str | None:
        """Return why it cannot run here, or None."""

    def takes(self, problem: Problem) -> bool:
        """Return whether it has kernels for these sizes and this dtype. It passes other calls to another backend."""

    def apply(
        self,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        base_weight: Tensor | None = None,
        base_bias: Tensor | None = None,
        *,
        schedule: str,
    ) -> Tensor:
        """Return y (B, N, O).

        Args:
            x: inputs, (B, N, I).
            z: features, (B, R).
            weight: the head H, (O, I, R).
            bias: (O, R), or None.
            base_weight: W0, (O, I), or None.
            base_bias: b0, (O,), or None.
            schedule: one of `problem.SCHEDULES`, or ``"auto"`` for the one that the planner chooses.
        """

    def grads(
        self,
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
        """Return the gradients of x, z, H, bias, W0 and b0, None for each that is not requested.

        Args:
            x: inputs, (B, N, I).
            z: features, (B, R); may be None if only dz is requested, which does not depend on z.
            weight: the head H, (O, I, R); may be None if only dH is requested, which does not depend on H.
            bias: (O, R), or None.
            base_weight: W0, (O, I), or None.
            g: gradient of y, (B, N, O).
            mask: which gradients are requested, in the order of `Wanted`.
            schedule: as for `apply`.
        """


class Traced(Protocol):
    """Additional functions of a backend whose launches ``torch.compile`` sees; other backends' calls are opaque to it.

    They run in a trace: tensors have no values, and sizes may be symbols. `emit` gets each launch, and puts it into the
    graph. A function that returns None has put nothing into it; the op then stays there.
    """

    def trace_apply(
        self,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_weight: Tensor | None,
        base_bias: Tensor | None,
        *,
        schedule: str,
        emit: Any,
    ) -> Tensor | None:
        """Return y, as `Backend.apply` does, or None."""

    def trace_grads(
        self,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base_weight: Tensor | None,
        g: Tensor,
        mask: tuple[bool, ...],
        *,
        schedule: str,
        emit: Any,
    ) -> tuple[Tensor | None, ...] | None:
        """Return the gradients, as `Backend.grads` does, or None."""


class OverTerms(Protocol):
    """Additional functions of a backend that runs the family over terms (see `terms.Terms`); `aten` runs the others'.

        y[t] = Σ_{e: t(e)=t} (H·z[c(e)] + W0) x[s(e)] + bias·z[c(e)] + b0

    The ranges of the indices are checked. x is (S, N, I), z (C, R), y and g (T, N, O).
    """

    def apply_terms(
        self,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_weight: Tensor | None,
        base_bias: Tensor | None,
        *,
        terms: Terms,
        schedule: str,
    ) -> Tensor:
        """Return y (T, N, O). The schedule is one of `problem.TERM_SCHEDULES`, or ``"auto"``."""

    def grads_terms(
        self,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base_weight: Tensor | None,
        g: Tensor,
        mask: tuple[bool, ...],
        *,
        terms: Terms,
        schedule: str,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, z, H, bias, W0 and b0, None for each that is not requested."""


class OfModels(Protocol):
    """Additional functions of a backend that runs M layers in one call; `aten.models` runs the others'.

        y[m,b,n] = (H[m]·z[m,b]) x[m,b,n]

    x is (M, B, N, I), z (M, B, R), H (M, O, I, R), y and g (M, B, N, O). Factors may be views of stride 0 along M.
    Temporary memory does not grow with M.
    """

    def apply_models(self, x: Tensor, z: Tensor, weight: Tensor, *, schedule: str) -> Tensor:
        """Return y. The schedule is as for `Backend.apply`."""

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
        """Return the gradients of x, z and H, None for each that is not requested.

        z may be None if only dz is requested, and H if only dH is.
        """


class Convolving(Protocol):
    """Additional functions of a backend that runs generated convolutions; `aten` runs the others'.

        y[b] = conv(x[b], H·z[b] + W0) + bias·z[b] + b0

    The geometry has three spatial axes, `transposed` is whether it is a transposed convolution, and the schedule is
    one of `problem.CONV_SCHEDULES`, or ``"auto"``. x and y are (B, channels, *pixels), H is (O, I, *taps, R).
    """

    def apply_conv(
        self,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_weight: Tensor | None,
        base_bias: Tensor | None,
        y: Tensor,
        *,
        geometry: Geometry,
        transposed: bool,
        schedule: str,
    ) -> None:
        """Write y."""

    def grads_conv(
        self,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base_weight: Tensor | None,
        g: Tensor,
        dx: Tensor | None,
        dh: Tensor | None,
        mask: tuple[bool, ...],
        *,
        geometry: Geometry,
        transposed: bool,
        schedule: str,
    ) -> tuple[Tensor | None, ...]:
        """Write dx and dh if given; return the gradients of z, bias, W0 and b0, None for each that is not requested.

        The mask is as in `Wanted`.
        """


class Fusing(Protocol):
    """Additional functions of a backend that fuses two layers and the activation between them.

    In `primary_grads`, and in the call of `fuses` that precedes it, base_bias is None in both layers: no gradient
    depends on it.
    """

    def fuses(self, x: Tensor, z: Tensor, first: Layer, second: Layer, activation: str) -> bool:
        """Return whether it fuses this call, from sizes, dtypes and strides: they may be fake tensors."""

    def primary(self, x: Tensor, z: Tensor, first: Layer, second: Layer, activation: str) -> tuple[Tensor, Tensor]:
        """Return y (B, N, O), and a (B, N, J), to which the activation is applied."""

    def primary_grads(
        self,
        x: Tensor,
        z: Tensor,
        first: Layer,
        second: Layer,
        activation: str,
        a: Tensor,
        g: Tensor,
        mask: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, z, the four of first and the four of second; None if not requested."""
