"""What code that was written for an ordinary layer gets when it reads a weight that is generated.

`hyperize` puts a generated layer in the place of an ordinary one. Its `weight` is the head, (O, I, R), which for the
code around it would be a wrong weight. This code gets a `StandIn`: it has the shape, dtype and device of the ordinary
weight, and raises an error where its values are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthyper.nn.calling_code import name_of_caller
from fasthyper.nn.readers import Readers

_ATTRIBUTES = (
    "device dtype grad_fn is_cpu is_cuda is_leaf is_meta is_mkldnn is_mps is_nested is_quantized is_sparse "
    "is_sparse_csr is_xla is_xpu itemsize layout names nbytes ndim output_nr requires_grad shape _backward_hooks "
    "_version is_mtia is_maia is_ipu is_vulkan retains_grad name volatile"
)
_METHODS = (
    "__len__ dim element_size get_device is_complex is_conj is_contiguous is_floating_point is_inference is_neg "
    "is_signed ndimension nelement new_empty new_full new_ones new_tensor new_zeros numel size storage_offset stride "
    "to type type_as"
)
_WITHOUT_VALUES = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split() if hasattr(Tensor, name)}
_WITHOUT_VALUES |= {getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)}
_WITHOUT_VALUES |= {torch.empty_like, torch.zeros_like, torch.ones_like, torch.is_floating_point, torch.is_tensor}


class Replaced(NamedTuple):
    """The ordinary layer in whose place a generated one is.

    Args:
        name: its name in the module that was hyperized.
        shapes: the shapes of those of its parameters that are generated.
        readers: the code of that module.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    readers: Readers = Readers()


class StandIn(Tensor):
    """A parameter that has no values: it has other ones for each instance."""

    _is_param = True  # it is an instance of nn.Parameter, as what it stands for
    read: tuple[str, str, Readers]  # the name of the layer, that of its parameter, and who may read it

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _WITHOUT_VALUES and not (func is Tensor.to and isinstance(args[0], StandIn)):
            return Tensor.__torch_function__(func, (), args, dict(kwargs or {}))
        raise RuntimeError(_message(func, (*args, *(kwargs or {}).values())))

    def __setattr__(self, name: str, value: Any) -> None:
        if "read" in vars(self) and not hasattr(Tensor, name):  # it would be lost: each read makes another stand-in
            raise RuntimeError(_message(StandIn.__setattr__, (self,)))
        super().__setattr__(name, value)


def stand_in(layer: Any, name: str) -> Tensor:
    """Return what stands for a generated parameter of a layer."""
    like = next(p for p in layer.parameters())
    one = torch.empty(1, dtype=like.dtype, device=like.device)  # a plain tensor, where `like` may be a DTensor
    made: Any = one.expand(layer._replaced.shapes[name]).as_subclass(StandIn)
    if like.requires_grad and not torch.compiler.is_compiling():  # Dynamo breaks the graph at it
        Tensor.__torch_function__(Tensor.requires_grad_, (), (made,))
    made.read = layer._replaced.name, name, layer._replaced.readers
    return made


def _message(func: Any, args: Iterable[Any]) -> str:
    flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    found = next((a for a in flat if isinstance(a, StandIn)), None)
    layer, parameter, readers = ("", "parameter", Readers()) if found is None else found.read
    name, reader = getattr(func, "__name__", ""), name_of_caller(readers)
    how = "" if name in ("", "__get__") else f" in {name}"
    return (
        f"{reader} reads the {parameter} of the layer {layer!r}{how}. It is generated, with other values for each "
        f"instance, and never written out: call the layer instead, or leave it out, hyperize(…, exclude={layer!r})"
    )
