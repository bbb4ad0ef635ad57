"""Per-sample gradients of `HyperLinear` for Opacus: `register_with_opacus`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.per_sample import per_sample_norm_sq
from fasthyper.ops import shapes


def register_with_opacus() -> None:
    """Register per-sample gradients, and their norms, of :class:`~fasthyper.nn.HyperLinear` with Opacus.

    Opacus then trains models that call ``layer(x, z)`` with both tensors as positional arguments. A layer that takes
    z from a running :class:`~fasthyper.nn.Hypernetwork` is not supported: Opacus does not record this z. With
    ``grad_sample_mode="ghost"`` the norms need no per-sample gradients.

    Raises:
        ImportError: Opacus is not installed.

    Example:
        >>> from fasthyper.nn import register_with_opacus
        >>> register_with_opacus()  # doctest: +SKIP
    """
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler

    register_grad_sampler(HyperLinear)(per_sample_gradients)
    register_norm_sampler(HyperLinear)(per_sample_norms)


def per_sample_gradients(layer: HyperLinear, activations: Sequence[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradient that each instance gives to each trainable parameter, a grad sampler of Opacus.

    Args:
        layer: the layer.
        activations: x ``(B, I)`` or ``(B, *, I)``, and z ``(B, R)``.
        g: gradient of the output, ``(B, O)`` or ``(B, *, O)``.

    Raises:
        ValueError: there is no z among the activations.
    """
    x, z = _inputs(activations, g)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if not _has_rules(layer):
        return _by_vmap(layer, trained, x, z, g)
    x, g = shapes.flatten_points(x), shapes.flatten_points(g)
    sums = g.sum(1)
    of = {
        "weight": lambda: torch.ops.fasthyper.weight_grad_models(x[:, None], z[:, None], g[:, None]),
        "bias": lambda: sums[:, :, None] * z[:, None],
        "base_weight": lambda: g.mT @ x,
        "base_bias": lambda: sums,
    }
    return {p: of[name]() for name, p in trained.items()}


def per_sample_norms(layer: HyperLinear, activations: Sequence[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the norm of the gradient that each instance gives to each trainable parameter, ``(B,)``.

    The arguments are those of `per_sample_gradients`: a norm sampler of Opacus.
    """
    if not _has_rules(layer):
        return {p: d.flatten(1).norm(dim=1) for p, d in per_sample_gradients(layer, activations, g).items()}
    x, z = _inputs(activations, g)
    sums = shapes.flatten_points(g).sum(1)
    of = {
        "weight": lambda: per_sample_norm_sq(x, z, g).sqrt(),
        "bias": lambda: sums.norm(dim=1) * z.norm(dim=1),
        "base_weight": lambda: per_sample_norm_sq(x, z.new_ones(len(z), 1), g).sqrt(),
        "base_bias": lambda: sums.norm(dim=1),
    }
    return {p: of[name]() for name, p in layer.named_parameters() if p.requires_grad}


def _has_rules(layer: HyperLinear) -> bool:
    """Return whether the gradients are those of one product with parameters of the layer's own."""
    return layer.rank is None and layer.weight_map is None and "places" not in vars(layer)


def _inputs(activations: Sequence[Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
    if len(activations) != 2:
        raise ValueError(
            f"layer must be called as layer(x, z) under Opacus, got {len(activations)} positional arguments: Opacus "
            "records no other z"
        )
    if not all(isinstance(t, Tensor) for t in activations):
        raise TypeError(f"z must be one tensor under Opacus, got a {type(activations[1]).__name__}")
    x, z = (t.to(g.dtype) for t in activations)
    return x, z


def _by_vmap(
    layer: HyperLinear, trained: dict[str, nn.Parameter], x: Tensor, z: Tensor, g: Tensor
) -> dict[nn.Parameter, Tensor]:
    bare: Any = copy.copy(layer)  # without the hooks of Opacus
    bare._parameters = dict(layer._parameters)
    bare._forward_hooks, bare._backward_hooks = OrderedDict(), OrderedDict()

    def inner(values: dict[str, Tensor], x: Tensor, z: Tensor, g: Tensor) -> Tensor:
        return (functional_call(bare, values, (x[None], z[None])) * g[None]).sum()

    values = {name: p.detach().to(g.dtype) for name, p in trained.items()}
    each = vmap(grad(inner), (None, 0, 0, 0))(values, x, z, g)
    return {p: each[name] for name, p in trained.items()}
