"""Rows of an existing head as the parameters of generated layers: views, in the layouts that other code uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fasthyper.nn.plain_linear import why_not_plain

LAYOUTS = ("oi", "io")


@dataclass(frozen=True)
class Place:
    """Where a parameter of the primary stands in a flat vector."""

    name: str
    start: int
    shape: tuple[int, ...]
    layout: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.count

    def view(self, rows: Tensor) -> Tensor:
        """View rows of a head `(count, R)`, or of its bias `(count,)`, in the shape of the parameter."""
        if self.layout == "oi":
            return rows.unflatten(0, self.shape)
        first, second, *rest = self.shape
        return rows.unflatten(0, (second, first, *rest)).transpose(0, 1)

    def rows(self, parameter: Tensor) -> Tensor:
        """Return the rows of a parameter in the order of the flat vector: the inverse of `view`."""
        last = len(self.shape) - 1
        return (parameter if self.layout == "oi" else parameter.transpose(0, 1)).flatten(0, last)

    def parameter(self, rows: Tensor) -> nn.Parameter:
        """Return a parameter that is a view of all rows of a head or of its bias; frozen if these are."""
        mine = rows.detach()[self.start : self.stop]
        return nn.Parameter(self.view(mine), requires_grad=rows.requires_grad)


def check_head(head: object) -> None:
    """Check that a head is an nn.Linear that computes `z @ weight.T + bias` and no more."""
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
    if problem := why_not_plain(head):
        raise TypeError(f"head cannot be converted: {problem}")


def checked_layout(layout: str | None, shape: Sequence[int], of: str) -> str:
    """Return the layout of a weight `(O, I, …)`; None is enough where both layouts are the same."""
    if layout is None:
        if len(shape) > 1 and shape[0] != 1 and shape[1] != 1:
            raise ValueError(
                f"layout is needed: {of} may hold the weight of {shape[1]} inputs and {shape[0]} outputs either way. "
                f"Pass layout='oi' if it is viewed as (O, I) = ({shape[0]}, {shape[1]}), row o*I + i, or "
                f"layout='io' if it is viewed as (I, O) = ({shape[1]}, {shape[0]}), row i*O + o"
            )
        return "oi"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'oi', 'io' or None, got {layout!r}")
    return layout if len(shape) > 1 else "oi"


def parameters_of_head(
    head: nn.Linear, in_features: int, out_features: int, layout: str | None
) -> dict[str, nn.Parameter]:
    """Return the parameters of a HyperLinear as views of those of a head, by name; see `HyperLinear.from_head`."""
    check_head(head)
    weights = out_features * in_features
    if head.out_features not in (weights, weights + out_features):
        raise ValueError(
            f"head must be an nn.Linear(R, O*I) or nn.Linear(R, O*I + O), that is with {weights} or "
            f"{weights + out_features} out_features for in_features={in_features} and "
            f"out_features={out_features}, got {tuple(head.weight.shape)} (out_features, in_features)"
        )
    layout = checked_layout(layout, (out_features, in_features), "head")
    places = [Place("weight", 0, (out_features, in_features), layout)]
    if head.out_features != weights:
        places.append(Place("bias", weights, (out_features,), "oi"))
    parameters = {place.name: place.parameter(head.weight) for place in places}
    if head.bias is not None:
        parameters |= {f"base_{place.name}": place.parameter(head.bias) for place in places}
    return parameters
