"""`GeneratedLayer`: what all layers with generated parameters have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.incidence import Incidence
from fasthyper.nn.current_z import current_z
from fasthyper.nn.merge import one_z
from fasthyper.nn.tracing import refuse_script
from fasthyper.ops import autocast

HEADS = {"weight": "weight", "weight_a": "weight", "weight_b": "weight", "bias": "bias"}
"""The parameters that z is multiplied with, and what they generate; a weight of low rank has two."""


class GeneratedLayer(nn.Module):
    """A layer whose parameters depend on z, which it takes from the running Hypernetwork if it is not passed.

    Its heads are `weight` and `bias`, whose last axis is R, the features of z; with low rank `weight_a` and `weight_b`
    take the place of `weight`. `base_weight` and `base_bias` are added to what they generate. `Hypernetwork`,
    `ungenerated` and `parameter_report` know layers by this class.
    """

    weight: Any
    bias: Any
    base_weight: Any
    base_bias: Any
    cond_features: int
    __prepare_scriptable__ = refuse_script

    def _condition(self, z: Any, incidence: Incidence | None) -> tuple[Any, Incidence | None, bool | None]:
        """Return z and the incidence of a call, and whether z is repeated: None if the caller passed z."""
        if z is not None:
            return z, incidence, None
        z, current, repeat = current_z(self)
        return z, current if incidence is None else incidence, repeat

    def _to_record(self, z: Any, incidence: Incidence | None, repeat: bool | None) -> tuple[Any, Incidence | None]:
        """Return z and the incidence of a call that ``torch.fx`` records."""
        if repeat:
            raise ValueError(
                "repeat_z must be False where torch.fx traces the primary: the number of rows for each z is unknown. "
                "A Hypernetwork inside of the traced module is one node, with repeat_z, too"
            )
        return z, incidence

    def _check(self, z: Any, features: int | None = None) -> None:
        features = self.cond_features if features is None else features
        if not isinstance(z, Tensor):
            raise TypeError(f"{type(self).__name__} takes one z, a tensor, got a {type(z).__name__}")
        if z.ndim != 2 or z.shape[1] != features:
            raise ValueError(f"z must be (B, R) with R = {features}, got {tuple(z.shape)}")
        if z.dtype != self._dtype and not (autocast.enabled(z.device.type) and z.is_floating_point()):
            raise TypeError(f"z must be {self._dtype} as the layer's weight is, got {z.dtype}")

    def _one(self, z: Any, features: int | None = None) -> Tensor:
        """Check the z of one instance, and return it as `(1, R)`, in the dtype of the parameters under autocast."""
        features = self.cond_features if features is None else features
        z = one_z(z, features)
        z = z.to(self._dtype) if autocast.enabled(z.device.type) else z
        self._check(z, features)
        return z

    @property
    def _dtype(self) -> torch.dtype:
        return self.weight.dtype


class SharedHead(nn.Module):
    """Parameters from which several generated layers compute theirs."""


def generating_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all generated layers in a module, without those of other modules inside of them."""
    layers = [m for m in module.modules() if isinstance(m, (GeneratedLayer, SharedHead))]
    return [p for layer in layers for p in layer.parameters(recurse=False)]
