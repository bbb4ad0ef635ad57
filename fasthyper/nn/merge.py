"""Turn generated layers into ordinary ones, with the weights of one instance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.nn.plain_linear import only_calls_forward

HEADS = ("weight", "weight_a", "weight_b", "base_weight")
"""The parameters that W is computed from. Layers with the same ones and the same z have the same W."""


def one_z(z: Tensor, features: int) -> Tensor:
    """Return z as (1, R).

    Raises:
        ValueError: it is not that of one instance.
    """
    if not isinstance(z, Tensor) or z.dim() not in (1, 2) or (z.dim() == 2 and z.shape[0] != 1):
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"z must be that of one instance, (R,) or (1, R) with R = {features}, got {got}")
    return z.reshape(1, -1)


def linear_of(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """Return an `nn.Linear` with copies of a weight (1, O, I) and a bias (1, O)."""
    _, O, I = weight.shape
    linear = nn.Linear(I, O, bias is not None, "meta", weight.dtype)
    linear.weight = nn.Parameter(weight[0].detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias[0].detach().clone())
    return linear.train(training)


def merged_copy(
    primary: nn.Module, layers: Iterable[tuple[str, Any]], kind: type[nn.Module], z_of: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """Return a copy of a network in which generated layers have become `nn.Linear`s.

    Args:
        primary: the network.
        layers: its generated layers, by name.
        kind: their class.
        z_of: returns the z of a layer.

    Raises:
        ValueError: a layer does more than its class: it has hooks or a forward of its own.
    """
    linears: dict[int, nn.Linear] = {}
    tied: dict[Hashable, nn.Parameter] = {}
    for name, layer in layers:
        if type(layer).forward is not kind.forward or not only_calls_forward(layer):
            raise ValueError(
                f"cannot merge {name!r}: it is a {type(layer).__name__} with hooks or a forward of its own"
            )
        if id(layer) not in linears:
            z = z_of(layer)
            linear = linears[id(layer)] = layer.merged(z)
            heads = tuple(id(getattr(layer, head)) for head in HEADS)
            linear.weight = tied.setdefault((heads, id(z)), linear.weight)
    with torch.no_grad():  # deepcopy takes what its memo has in place of a layer, under any name and in any list
        return copy.deepcopy(getattr(primary, "_orig_mod", primary), dict(linears))
