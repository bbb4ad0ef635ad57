"""What a `HyperLinear` computes: y, with one z or with one for the weight and one for the bias, and W written out."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fasthyper import maps
from fasthyper.functional import hyper_linear
from fasthyper.incidence import Incidence
from fasthyper.ops import shapes

Z = Tensor | tuple[Tensor, Tensor]
"""One z, or a pair of the z of the weight and the z of the bias."""

# `layer` is a HyperLinear, whose module imports this one.


def run(layer: Any, x: Tensor, z: Z, incidence: Incidence | None, reduce: str) -> Tensor:
    """Return the output of a layer, whose arguments are those of `HyperLinear.forward`."""
    own = layer._to_apply()
    z, bias, more = _split(layer, own.bias, x, z, incidence, reduce)
    if low_rank := layer._low_rank():
        y = low_rank._replace(bias=bias).forward(x, z, incidence, reduce)
    else:
        base = {"base_weight": own.base_weight, "base_bias": own.base_bias}
        of = {"incidence": incidence, "reduce": reduce, "weight_map": layer.weight_map}
        y = hyper_linear(x, z, own.weight, bias, **base, **of)
    return y if more is None else y + more


def _split(
    layer: Any, head: Tensor | None, x: Tensor, z: Z, incidence: Incidence | None, reduce: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the z of the weight, the head of the bias if it has the same z, and otherwise the generated bias."""
    if isinstance(z, tuple):
        return z[0], None, _generated_bias(head, x, z[1], incidence, reduce)
    if head is not None and head.shape[1] != layer.cond_features:
        if "places" in vars(layer):
            layer._check_head()
        shapes.check_input("z", z)
        raise ValueError(
            f"z must be a pair: the z of the weight has {layer.cond_features} features, that of the bias "
            f"{head.shape[1]}; got one z {tuple(z.shape)}"
        )
    return z, head, None


def _generated_bias(head: Tensor | None, x: Tensor, z: Tensor, incidence: Incidence | None, reduce: str) -> Tensor:
    """Return the generated bias, without the base, of each row of the result, from a z of its own."""
    if head is None:
        raise ValueError("z must be one tensor: the layer has no generated bias, which could take a second z")
    for name, t in (("x", x), ("z of the bias", z)):
        shapes.check_input(name, t)
    if z.dim() != 2 or z.shape[1] != head.shape[1]:
        raise ValueError(f"z of the bias must be (B, R) with R = {head.shape[1]}, got {tuple(z.shape)}")
    if incidence is None:
        if z.shape[0] != x.shape[0]:
            raise ValueError(f"z of the bias must have the {x.shape[0]} rows of x, got {tuple(z.shape)}")
        return F.linear(z, head).view(z.shape[0], *(1,) * (x.dim() - 2), -1)
    if reduce == "max":
        raise ValueError("reduce must be 'sum' or 'mean' where the bias has a z of its own, got 'max'")
    ones = x.new_ones(*x.shape[:-1], 1)
    return hyper_linear(ones, z, head.unsqueeze(1), incidence=incidence, reduce=reduce)


def written_out(layer: Any, z: Tensor, bias_z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weights (B, O, I) and the biases (B, O) of each instance, base and map included."""
    own = layer._tensors()
    if low_rank := layer._low_rank():
        weight = low_rank.weight(z)
    else:
        base_weight = None if own.base_weight is None else own.base_weight.flatten()
        weight = F.linear(z, own.weight.flatten(0, 1), base_weight)
        weight = weight.view(z.shape[0], layer.out_features, layer.in_features)
        if layer.weight_map is not None:
            weight = maps.value(layer.weight_map, weight)
    if own.bias is not None:
        if bias_z.shape != (z.shape[0], own.bias.shape[1]):
            expected = z.shape[0], own.bias.shape[1]
            raise ValueError(f"z of the bias must be (B, R) = {expected}, got {tuple(bias_z.shape)}")
        return weight, F.linear(bias_z, own.bias, own.base_bias)
    return weight, None if own.base_bias is None else own.base_bias.expand(z.shape[0], -1)
