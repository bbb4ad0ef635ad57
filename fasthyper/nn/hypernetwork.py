"""`Hypernetwork`: a trunk that computes z, and a primary network that runs under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _modules

from fasthyper.backends.contract import Layer
from fasthyper.fused import hyper_primary, may_fuse
from fasthyper.nn.current_z import use_z
from fasthyper.nn.hyperize import ungenerated
from fasthyper.nn.linear import HyperLinear
from fasthyper.ops.primary import activation_of

_MAX_LISTED = 8
_has_global_hook = getattr(_modules, "_has_any_global_hook", lambda: True)


class Hypernetwork(nn.Module):
    """`primary(x)` with the weights of its `HyperLinear`s generated from `z = trunk(cond)`.

    The z reaches them without being passed along, so that the primary may be any network (see `hyperize`);
    one that passes a z of its own to a HyperLinear overrides it. A primary may hold Hypernetworks: the layers
    of an inner primary meet the inner z, those of an inner trunk the outer one.

    Args:
        trunk: maps cond to z, `(B, R)`, or to a dict with one z for each HyperLinear of the primary, keyed by
            its name in `primary.named_modules()` (any one of its names, if it has several).
        primary: the network, with at least one HyperLinear. All that is not generated stays an ordinary
            parameter, shared by all instances; the representation of the Hypernetwork lists it.

    Raises:
        TypeError: the trunk or the primary is not a module.
        ValueError: the primary has no HyperLinear.

    >>> import torch
    >>> from fasthyper.nn import hyperize
    >>> primary = hyperize(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), cond_features=16)
    >>> model = Hypernetwork(nn.Linear(5, 16), primary)
    >>> model(torch.randn(32, 100, 2), torch.randn(32, 5)).shape
    torch.Size([32, 100, 1])
    """

    def __init__(self, trunk: nn.Module, primary: nn.Module) -> None:
        super().__init__()
        for name, module in (("trunk", trunk), ("primary", primary)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got a {type(module).__name__}")
        self.trunk = trunk
        self.primary = primary
        if next(_generated_layers(primary), None) is None:
            raise ValueError(
                f"primary must have a HyperLinear that z reaches, got a {type(primary).__name__} with none: "
                "z would have no effect. hyperize makes them of nn.Linears; those in the primary of an inner "
                "Hypernetwork meet its z."
            )

    def forward(self, x: Any, cond: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the primary.

        Args:
            x: the primary's input; where it meets a HyperLinear, its first dimension is B.
            cond: the trunk's input.
            *args: passed to the primary after x.
            **kwargs: passed to the primary.

        Returns:
            What the primary returns.

        Raises:
            TypeError: the trunk returns neither a tensor nor a dict of tensors.
            ValueError: a dict whose names are not those of the primary's HyperLinears.
        """
        z = self.trunk(cond)
        if isinstance(z, dict):
            z = self._z_by_layer(z)
        elif not isinstance(z, Tensor):
            raise TypeError(f"trunk must return a tensor or a dict of tensors, got a {type(z).__name__}")
        elif not args and not kwargs and may_fuse(x) and (layers := _fusable_layers(self.primary)):
            return hyper_primary(x, z, *layers)
        with use_z(z):
            return self.primary(x, *args, **kwargs)

    def _z_by_layer(self, z: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
        # Looked up at every call: the modules may be replicas, or have been replaced since.
        layers = dict(_generated_layers(self.primary))
        by_layer: dict[nn.Module, Tensor] = {}
        for name, value in z.items():
            if name not in layers:
                raise ValueError(f"trunk returned a z for {name!r}; the primary's HyperLinears are {list(layers)}")
            if not isinstance(value, Tensor):
                raise TypeError(f"trunk must return tensors, got a {type(value).__name__} for {name!r}")
            if layers[name] in by_layer:
                raise ValueError(f"trunk returned a second z for {name!r}, a layer that has several names")
            by_layer[layers[name]] = value
        missing = [name for name, layer in layers.items() if layer not in by_layer]
        if missing:
            raise ValueError(f"trunk returned no z for {missing}, only for {list(z)}")
        return by_layer

    def extra_repr(self) -> str:
        names = ungenerated(self.primary)
        more = f", … ({len(names)} in all)" if len(names) > _MAX_LISTED else ""
        return f"ungenerated: {', '.join(names[:_MAX_LISTED]) or 'none'}{more}"


def _generated_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, HyperLinear]]:
    """The HyperLinears that z is for, under all their names: not those of an inner Hypernetwork's primary."""
    if isinstance(module, HyperLinear):
        yield prefix, module
    for name, child in module._modules.items():
        if child is None or (isinstance(module, Hypernetwork) and name == "primary"):
            continue
        if name == "_orig_mod":  # the wrapper of torch.compile: layers keep the names that they had before
            yield from _generated_layers(child, prefix)
        else:
            yield from _generated_layers(child, f"{prefix}.{name}" if prefix else name)


def _fusable_layers(primary: nn.Module) -> tuple[Layer, Layer, str] | None:
    """The two layers of a primary and the activation between them, where there is nothing else to its call.

    Looked at in every call: any of it may have been changed since.
    """
    if type(primary) is not nn.Sequential or len(primary._modules) != 3 or _has_global_hook():
        return None
    first, between, second = primary._modules.values()
    activation = activation_of(between)
    if activation is None or not (type(first) is type(second) is HyperLinear):
        return None
    if not all(map(_only_calls_forward, (primary, first, between, second))):
        return None
    return _parameters(first), _parameters(second), activation


def _only_calls_forward(module: nn.Module) -> bool:
    """Whether to call a module is to call the forward of its class, and no more."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or module._compiled_call_impl or "forward" in vars(module))


def _parameters(layer: HyperLinear) -> Layer:
    return Layer(layer.weight, layer.bias, layer.base_weight, layer.base_bias)
