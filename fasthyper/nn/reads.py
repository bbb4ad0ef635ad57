"""What code that was written for an ordinary layer gets when it reads a weight that is generated.

`hyperize` puts a generated layer in the place of an ordinary one. Its `weight` is the head, (O, I, R), which for the
code around it would be a wrong weight. This code gets a `StandIn`: it has the shape, dtype and device of the ordinary
weight, and raises an error where its values are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthyper.nn.current_z import is_running

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
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")


class Replaced(NamedTuple):
    """The ordinary layer in whose place a generated one is.

    Args:
        name: its name in the module that was hyperized.
        shapes: the shapes of those of its parameters that are generated.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]


class StandIn(Tensor):
    """A parameter that has no values: it has other ones for each instance."""

    _is_param = True  # it is an instance of nn.Parameter, as what it stands for
    layer: str
    parameter: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _WITHOUT_VALUES and not (func is Tensor.to and isinstance(args[0], StandIn)):
            return Tensor.__torch_function__(func, (), args, dict(kwargs or {}))
        raise RuntimeError(_message(func, (*args, *(kwargs or {}).values())))


def stand_in(layer: Any, name: str) -> Tensor:
    """Return what stands for a generated parameter of a layer."""
    like = next(p for p in layer.parameters())
    one = torch.empty(1, dtype=like.dtype, device=like.device)  # a plain tensor, where `like` may be a DTensor
    made: Any = one.expand(layer._replaced.shapes[name]).as_subclass(StandIn)
    if like.requires_grad and not torch.compiler.is_compiling():  # Dynamo breaks the graph at it
        Tensor.__torch_function__(Tensor.requires_grad_, (), (made,))
    made.layer, made.parameter = layer._replaced.name, name
    return made


def mark_readers(modules: Iterable[nn.Module]) -> None:
    """Mark the modules whose methods were written for ordinary layers."""
    for module in modules:
        vars(module)["_reads_ordinary_layers"] = True


def from_outside() -> bool:
    """Return whether the attribute that is looked up is read by the code around the layers.

    This code runs while a Hypernetwork delivers z, or it is a method of one of the marked modules. Other code, such as
    the script that trains, reads the heads.
    """
    if torch.compiler.is_compiling():  # Dynamo knows no frames
        return is_running()
    return is_running() or _is_marked(_caller(sys._getframe(2)))


def _caller(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_name in _COMPREHENSIONS:
        frame = frame.f_back
    return frame


def _is_marked(frame: FrameType | None) -> bool:
    """Return whether a frame is that of a method of a marked module."""
    if frame is None or frame.f_globals.get("__name__") == "torch.nn.modules.module":  # such as get_parameter
        return False
    owner = _owner(frame)
    return isinstance(owner, nn.Module) and "_reads_ordinary_layers" in vars(owner)


def _owner(frame: FrameType) -> Any:
    """Return the object whose method a frame runs."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    first = code.co_varnames[0]
    owner = frame.f_locals.get(first)
    is_method = getattr(getattr(type(owner), code.co_name, None), "__code__", None) is code
    return owner if is_method or first == "self" else None


def _message(func: Any, args: Iterable[Any]) -> str:
    flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    found = next((a for a in flat if isinstance(a, StandIn)), None)
    layer, parameter = ("", "parameter") if found is None else (found.layer, found.parameter)
    name = getattr(func, "__name__", "")
    how = "" if name in ("", "__get__") else f" in {name}"
    return (
        f"{_reader()} reads the {parameter} of the layer {layer!r}{how}. It is generated, with other values for each "
        f"instance, and never written out: call the layer instead, or leave it out, hyperize(…, exclude={layer!r})"
    )


def _reader() -> str:
    if torch.compiler.is_compiling():
        return "The module"
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if _is_marked(frame):
            return f"{type(_owner(frame)).__name__}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "Other code"
