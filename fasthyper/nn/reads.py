"""What code that was written for an ordinary layer gets when it reads a weight that is generated.

`hyperize` puts a generated layer in the place of an ordinary one. Its `weight` is the head, (O, I, R), which for the
code around it would be a wrong weight. This code gets a `StandIn`: it has the shape, dtype and device of the ordinary
weight, and raises an error where its values are needed.
"""

from __future__ import annotations

import functools
import gc
import re
import sys
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType, FunctionType, MethodType
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


class Readers(NamedTuple):
    """The code that was written for ordinary layers: names of classes, with those of their modules.

    Args:
        modules: the classes of the modules around the layers.
        helpers: the classes of other objects that these modules hold.
    """

    modules: frozenset[str] = frozenset()
    helpers: frozenset[str] = frozenset()


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


def stand_in(layer: Any, name: str) -> Tensor:
    """Return what stands for a generated parameter of a layer."""
    like = next(p for p in layer.parameters())
    one = torch.empty(1, dtype=like.dtype, device=like.device)  # a plain tensor, where `like` may be a DTensor
    made: Any = one.expand(layer._replaced.shapes[name]).as_subclass(StandIn)
    if like.requires_grad and not torch.compiler.is_compiling():  # Dynamo breaks the graph at it
        Tensor.__torch_function__(Tensor.requires_grad_, (), (made,))
    made.read = layer._replaced.name, name, layer._replaced.readers
    return made


def mark_readers(modules: Iterable[nn.Module]) -> Readers:
    """Mark the modules whose methods were written for ordinary layers; return what is known of their code."""
    found, helpers = set(), set()
    for module in modules:
        vars(module)["_reads_ordinary_layers"] = True
        found |= _names_of_classes(type(module))
        for value in vars(module).values():
            helpers |= {name for held in _held(value) for name in _names_of_classes(type(held))}
    return Readers(frozenset(found), frozenset(helpers - found))


def _names_of_classes(cls: type) -> set[str]:
    return {
        f"{c.__module__}.{c.__qualname__}"
        for c in cls.__mro__
        if c not in (object, nn.Module) and c.__module__.partition(".")[0] not in ("builtins", "fasthyper")
    }


def _held(value: Any) -> Iterable[Any]:
    """Return the objects that an attribute of a module holds: not the modules, which are readers themselves."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    values = value if isinstance(value, (list, tuple, set)) else (value,)
    for held in values:
        if isinstance(held, functools.partial):
            yield from _held((getattr(held.func, "__self__", None), *held.args, *held.keywords.values()))
        elif isinstance(held, MethodType):
            yield from _held(held.__self__)
        elif not isinstance(held, (nn.Module, Tensor, type, FunctionType)):
            yield held


def from_outside(readers: Readers) -> bool:
    """Return whether the attribute that is looked up is read by the code around the layers.

    This code runs while a Hypernetwork delivers z, or it is that of the classes of the marked modules: their methods,
    properties, the functions inside of these, and whatever they call. Other code, such as the script that trains,
    reads the heads.
    """
    if torch.compiler.is_compiling():  # Dynamo knows no frames
        return is_running()
    return is_running() or _reads(sys._getframe(2), readers)


def _reads(frame: FrameType | None, readers: Readers) -> bool:
    """Return whether a frame, in which an attribute is looked up, is that of a reader or was called by one."""
    while frame is not None and _is_get_parameter(frame):
        frame = frame.f_back
    if frame is None or _is_reader(frame, readers) or _is_of(frame, readers.helpers):
        return frame is not None
    if _module_of(frame).partition(".")[0] == "fasthyper":  # such as from_flat_head, which puts the heads in place
        return False
    return _called_by(frame, readers) is not None


def _called_by(frame: FrameType | None, readers: Readers) -> FrameType | None:
    """Return the innermost frame of a reader, from a frame outwards."""
    while frame is not None and not _is_reader(frame, readers):
        frame = frame.f_back
    return frame


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_get_parameter(frame: FrameType) -> bool:
    return frame.f_code is nn.Module.get_parameter.__code__


def _is_reader(frame: FrameType, readers: Readers) -> bool:
    """Return whether a frame is that of the code of a marked module, or of the code of its class."""
    if _module_of(frame) == "torch.nn.modules.module":  # such as apply, which calls the functions of a script
        return False
    written = _is_of(frame, readers.modules)
    owner = _owner(frame) if written or _calls_it_self(frame) else None
    return "_reads_ordinary_layers" in vars(owner) if isinstance(owner, nn.Module) else written


def _is_of(frame: FrameType, classes: frozenset[str]) -> bool:
    """Return whether the code of a frame stands in one of the classes, also within a function."""
    if not classes:
        return False
    name = f"{_module_of(frame)}.{_qualified_name(frame.f_code)}"
    dots = (i for i, letter in enumerate(name) if letter == ".")
    return any(name[:i] in classes for i in dots)


@functools.lru_cache(maxsize=1024)
def _qualified_name(code: CodeType) -> str:
    return str(getattr(code, "co_qualname", None) or _name_of_function(code))  # since Python 3.11


def _name_of_function(code: CodeType) -> str:
    """Return the qualified name of a function that has a code, if there is one."""
    functions = (f for f in gc.get_referrers(code) if isinstance(f, FunctionType))
    return next((f.__qualname__ for f in functions), code.co_name)


def _calls_it_self(frame: FrameType) -> bool:
    code = frame.f_code
    return bool(code.co_argcount) and code.co_varnames[0] == "self"


def _owner(frame: FrameType) -> Any:
    """Return the object whose method a frame runs."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    owner = frame.f_locals.get(code.co_varnames[0])
    is_method = getattr(getattr(type(owner), code.co_name, None), "__code__", None) is code
    return owner if is_method or _calls_it_self(frame) else None


def _message(func: Any, args: Iterable[Any]) -> str:
    flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    found = next((a for a in flat if isinstance(a, StandIn)), None)
    layer, parameter, readers = ("", "parameter", Readers()) if found is None else found.read
    name, reader = getattr(func, "__name__", ""), _reader(readers)
    how = "" if name in ("", "__get__") else f" in {name}"
    return (
        f"{reader} reads the {parameter} of the layer {layer!r}{how}. It is generated, with other values for each "
        f"instance, and never written out: call the layer instead, or leave it out, hyperize(…, exclude={layer!r})"
    )


def _reader(readers: Readers) -> str:
    if torch.compiler.is_compiling():
        return "The module"
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_reader(frame, readers) or _is_of(frame, readers.helpers):
            if (owner := _owner(frame)) is not None:
                return f"{type(owner).__name__}.{frame.f_code.co_name}"
            return re.sub(r"(\.<locals>\.<\w+>)+$", "", _qualified_name(frame.f_code))  # without comprehensions
        frame = frame.f_back
    return "Other code"
