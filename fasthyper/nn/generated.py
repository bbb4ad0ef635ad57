"""`GeneratedLayer`: what all layers with generated parameters have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthyper.incidence import Incidence
from fasthyper.nn import reads
from fasthyper.nn.calling_code import is_called_by
from fasthyper.nn.current_z import current_z
from fasthyper.nn.heads import Place, check_new_head, check_shapes, load_as_head, refuse_deletion, tensors_of
from fasthyper.nn.merge import one_z
from fasthyper.nn.tracing import OneNode
from fasthyper.ops import autocast, shapes

HEADS = {"weight": "weight", "weight_a": "weight", "weight_b": "weight", "bias": "bias"}
"""The parameters that z is multiplied with, and what they generate; a weight of low rank has two."""


PARAMETERS = ("weight", "bias", "base_weight", "base_bias")


class Tensors(NamedTuple):
    """The parameters of a layer, as it computes with them."""

    weight: Any
    bias: Any
    base_weight: Any
    base_bias: Any


class GeneratedLayer(OneNode):
    """A layer whose parameters depend on z, which it takes from the running Hypernetwork if it is not passed.

    Its heads are `weight` and `bias`, whose last axis is R, the features of z; with low rank `weight_a` and `weight_b`
    take the place of `weight`. `base_weight` and `base_bias` are added to what they generate. `Hypernetwork`,
    `ungenerated` and `parameter_report` know layers by this class.

    A layer of a shared head has no parameters of its own. Its submodule `head` has them, and `places` says which rows
    each parameter is: `layer.weight` is then a view of them, computed at each access.

    A layer that `hyperize` made is read by code that was written for an ordinary layer, see `reads.py`. The layers
    themselves therefore read `_tensors()` or `_own(name)`, not `weight` and `bias`.
    """

    weight: Any
    bias: Any
    base_weight: Any
    base_bias: Any
    cond_features: int
    head: Any
    places: dict[str, Place]
    _replaced: reads.Replaced | None = None

    def __getattr__(self, name: str) -> Any:
        if name in PARAMETERS:
            replaced = self._replaced
            if replaced is not None and name in replaced.shapes and is_called_by(replaced.readers):
                return reads.stand_in(self, name)
            if "places" in self.__dict__:
                return self._taken(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARAMETERS and "places" in self.__dict__:
            raise AttributeError(f"{name} is a view of rows of the layer's head: change the parameters of head instead")
        # nn.DataParallel puts its replicas together: first the modules, and then their parameters.
        if name == "head" and "places" in self.__dict__ and "_is_replica" not in self.__dict__:
            self._check_new_head(value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "head" and "places" in self.__dict__:
            refuse_deletion(self)
        super().__delattr__(name)

    def _check_new_head(self, head: Any) -> None:
        check_new_head(self, head, self._shape_of_head(), self.head.weight.dtype)

    def _own(self, name: str) -> Any:
        """Return a parameter, as the layer itself reads it."""
        parameters = self._parameters
        if name in parameters:
            return parameters[name]
        return self._taken(name) if "places" in self.__dict__ else getattr(self, name)

    def _tensors(self) -> Tensors:
        if "places" in self.__dict__:
            return Tensors(*self._all_taken())
        return Tensors(self._own("weight"), self._own("bias"), self._own("base_weight"), self._own("base_bias"))

    def _taken(self, name: str) -> Any:
        """Return the rows of the shared head that are a parameter."""
        return self.places[name.removeprefix("base_")].of(self.head, name) if self._has_place(name) else None

    def _has_place(self, name: str) -> bool:
        return name.removeprefix("base_") in self.places

    def _all_taken(self) -> Any:
        return self._split_rows(self.head.weight, self.head.bias)

    def _split_rows(self, weight: Tensor, bias: Tensor | None) -> Any:
        """Return the parameters that are rows of a head's weight and bias."""
        try:
            return tensors_of(weight, bias, self.places)
        except RuntimeError:
            self._check_head()
            raise

    def _check_head(self) -> None:
        """Check the shapes of a shared head's parameters, which may have been replaced."""
        check_shapes(self, self.head, self._shape_of_head())

    def _shape_of_head(self) -> tuple[int, int]:
        return max(place.stop for place in self.places.values()), self.cond_features

    def _to_apply(self) -> Tensors:
        """Return the parameters for a call. Under autocast, all calls of a region share one cast of a shared head."""
        head = self._modules.get("head") if "places" in self.__dict__ else None
        if isinstance(head, nn.Linear) and autocast.enabled(head.weight.device.type):
            return Tensors(*self._split_rows(autocast.follow(head.weight), autocast.follow(head.bias)))
        return self._tensors()

    def _source(self, name: str) -> Any:
        """Return what two layers have in common exactly if they share this parameter; None if there is none."""
        if "places" not in self.__dict__:
            return None if (p := self._parameters.get(name)) is None else id(p)
        rows = self.head.bias if name.startswith("base_") else self.head.weight
        return (
            (id(rows), self.places[name.removeprefix("base_")]) if rows is not None and self._has_place(name) else None
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if isinstance(self._modules.get("head"), nn.Linear):
            load_as_head(self.head, self.places, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        if isinstance(z, (tuple, list)):
            raise TypeError(f"{type(self).__name__} takes one z, a tensor, got a {type(z).__name__}")
        shapes.check_dense("z", z)
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
        return self._own("weight").dtype


class SharedHead(nn.Module):
    """A module with the parameters from which several generated layers compute theirs."""


def generating_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all generated layers in a module, without those of other modules inside of them."""
    layers = [m for m in module.modules() if isinstance(m, GeneratedLayer)]
    heads = [part for layer in layers if "places" in vars(layer) for part in layer.head.modules()]
    return [p for owner in (*layers, *heads) for p in owner.parameters(recurse=False)]
