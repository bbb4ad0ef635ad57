"""Turn generated layers into ordinary ones, with the weights of one instance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.nn.plain_linear import only_calls_forward
from fasthyper.nn.wrappers import unwrapped
from fasthyper.ops import shapes

_READ = {"weight": ("weight", "weight_a", "weight_b", "base_weight"), "bias": ("bias", "base_bias")}
"""The parameters that each parameter of a merged layer is computed from."""


def one_z(z: Tensor, features: int) -> Tensor:
    """Return z as (1, R).

    Raises:
        TypeError: it is not a dense tensor.
        ValueError: it is not that of one instance.
    """
    shapes.check_dense("z", z)
    if z.dim() not in (1, 2) or (z.dim() == 2 and z.shape[0] != 1):
        raise ValueError(f"z must be that of one instance, (R,) or (1, R) with R = {features}, got {tuple(z.shape)}")
    return z.reshape(1, -1)


def with_parameters(plain: nn.Module, training: bool, **values: Tensor | None) -> Any:
    """Put copies of tensors into an ordinary layer as its parameters, and set its mode."""
    for name, value in values.items():
        parameter = None if value is None else nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
        plain.register_parameter(name, parameter)
    return plain.train(training)


def merged_copy(primary: nn.Module, layers: Iterable[tuple[str, Any]], z_of: Callable[[nn.Module], Any]) -> nn.Module:
    """Return a copy of a network in which generated layers have become ordinary ones.

    Args:
        primary: the network.
        layers: its generated layers, by name.
        z_of: returns the z of a layer, or a pair: for its weight and for its bias.

    Raises:
        TypeError: a z is of another type or dtype.
        ValueError: a z is not that of one instance, a layer has no counterpart, or it does more than its class: it has
            hooks or a forward of its own.
    """
    merged: dict[int, nn.Module] = {}
    tied: dict[Hashable, nn.Parameter] = {}
    for name, layer in layers:
        if id(layer) not in merged:
            merged[id(layer)] = _merged(name, layer, z_of(layer))
            _tie(merged[id(layer)], layer, z_of(layer), tied)
    with torch.no_grad():  # deepcopy takes what its memo has in place of a layer, under any name and in any list
        return copy.deepcopy(unwrapped(primary), dict(merged))


def _merged(name: str, layer: Any, z: Any) -> nn.Module:
    kind = type(layer).__name__
    by, run_by = (_defined_by(type(layer), method) for method in ("merged", "forward"))
    if by is None:
        raise ValueError(f"cannot merge {name!r}: there is no ordinary layer for a {kind}")
    if not issubclass(by, run_by) or not only_calls_forward(layer):
        raise ValueError(f"cannot merge {name!r}: it is a {kind} with hooks or a forward of its own")
    try:
        return layer.merged(z)
    except (TypeError, ValueError) as wrong:
        raise type(wrong)(f"cannot merge {name!r}: {wrong}") from wrong


def _defined_by(cls: type, method: str) -> Any:
    """Return the class whose method instances of a class have, or None."""
    return next((base for base in cls.__mro__ if method in vars(base)), None)


def _tie(plain: nn.Module, layer: Any, z: Any, tied: dict[Hashable, nn.Parameter]) -> None:
    """Give an ordinary layer the parameters of an earlier one that has read the same parameters and the same z."""
    of = dict(zip(("weight", "bias"), z if isinstance(z, tuple) else (z, z), strict=True))
    options = tuple(getattr(layer, option, None) for option in ("alpha", "padding_idx"))
    options += (id(getattr(layer, "weight_map", None)),)  # a function need not be hashable
    for name, read in _READ.items():
        heads = tuple(layer._source(parameter) for parameter in read)
        mine = plain._parameters.get(name)
        if mine is not None and heads != (None,) * len(heads):  # layers of a chunked head have no parameters
            plain.register_parameter(name, tied.setdefault((name, heads, id(of[name]), options), mine))
