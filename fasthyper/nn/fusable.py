"""Which primaries run as one op: two generated layers and an activation between them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _modules

from fasthyper.backends.contract import Layer
from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.plain_linear import only_calls_forward
from fasthyper.ops.primary import activation_of

_has_global_hook = getattr(_modules, "_has_any_global_hook", lambda: True)


def fusable_layers(primary: nn.Module) -> tuple[Layer, Layer, str] | None:
    """Return the parameters of a primary's two layers and the name of the activation between them.

    Return None if a call of the primary does anything else. The result is not cached, because modules may change.
    """
    if type(primary) is not nn.Sequential or len(primary._modules) != 3 or _has_global_hook():
        return None
    first, between, second = primary._modules.values()
    activation = activation_of(between)
    if activation is None or not (type(first) is type(second) is HyperLinear):
        return None
    if not (_is_of_one_head(first) and _is_of_one_head(second)):
        return None
    if not all(map(only_calls_forward, (primary, first, between, second))):
        return None
    return _parameters(first), _parameters(second), activation


def _is_of_one_head(layer: HyperLinear) -> bool:
    """Return whether one z is multiplied with one head, and nothing else comes before the product with x."""
    bias = layer._own("bias")
    one_z = bias is None or bias.shape[1] == layer.cond_features
    return layer.rank is None and layer.weight_map is None and one_z


def _parameters(layer: HyperLinear) -> Layer:
    return Layer(*layer._to_apply())
