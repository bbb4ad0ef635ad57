"""Which code reads an attribute: a search of the stack for the code that was written for ordinary layers."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from fasthyper.nn.current_z import is_running
from fasthyper.nn.readers import Readers, name_of_class, name_of_code, qualified_name, stands_in


def is_called_by(readers: Readers) -> bool:
    """Return whether the attribute that is looked up is read by the code around the layers.

    This code runs while a Hypernetwork delivers z, or it is that of the classes of the marked modules: their methods,
    properties, the functions inside of these, and whatever they call in their own thread. Other code, such as the
    script that trains, reads the heads; so does a function that runs in another thread.
    """
    if torch.compiler.is_compiling():  # Dynamo knows no frames
        return is_running()
    return is_running() or _reads(sys._getframe(2), readers)


def name_of_caller(readers: Readers) -> str:
    """Return the name of the function around the layers that runs, for messages."""
    if torch.compiler.is_compiling():
        return "The module"
    for frame in _outwards(sys._getframe(1)):
        if _is_reader(frame, readers) or _is_helper(frame, readers):
            if (owner := _argument(frame)) is not None:
                return f"{_class_of(owner).__name__}.{frame.f_code.co_name}"
            return re.sub(r"(\.<locals>\.<\w+>)+$", "", qualified_name(frame.f_code))  # without comprehensions
    return "Other code"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _reads(frame: FrameType, readers: Readers) -> bool:
    """Return whether a frame, in which an attribute is looked up, is that of a reader or was called by one."""
    frames = itertools.dropwhile(lambda f: f.f_code is nn.Module.get_parameter.__code__, _outwards(frame))
    if (innermost := next(frames, None)) is None:
        return False
    if _is_reader(innermost, readers) or _is_helper(innermost, readers):
        return True
    if _module_of(innermost).partition(".")[0] == "fasthyper":  # such as from_flat_head, which puts the heads in place
        return False
    return any(_is_reader(f, readers) for f in frames)


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_reader(frame: FrameType, readers: Readers) -> bool:
    """Return whether a frame is that of the code of a marked module, or of the code of its class."""
    if _module_of(frame) == "torch.nn.modules.module":  # such as apply, which calls the functions of a script
        return False
    written = _is_of(frame, readers.modules)
    if not written and not _calls_it_self(frame):
        return False
    owner = _owner(frame)
    if isinstance(owner, nn.Module):
        return _is_marked(owner)
    # Not an object of another class that shares a base class with a marked module.
    return written and (owner is None or issubclass(_class_of(owner), nn.Module))


def _is_helper(frame: FrameType, readers: Readers) -> bool:
    """Return whether a frame is that of a method of an object that a marked module holds."""
    if not _is_of(frame, readers.helpers):
        return False
    owner = _owner(frame)
    return owner is None or name_of_class(_class_of(owner)) in readers.helpers


def _is_of(frame: FrameType, names: frozenset[str]) -> bool:
    code = frame.f_code
    return bool(names) and stands_in(name_of_code(code, _module_of(frame), qualified_name(code)), names)


def _is_marked(owner: Any) -> bool:
    return isinstance(owner, nn.Module) and "_reads_ordinary_layers" in vars(owner)


def _class_of(owner: Any) -> type:
    return owner if isinstance(owner, type) else type(owner)


def _calls_it_self(frame: FrameType) -> bool:
    code = frame.f_code
    return bool(code.co_argcount) and code.co_varnames[0] == "self"


def _owner(frame: FrameType) -> Any:
    """Return the object, or the class, whose method a frame runs, or in whose method its function stands."""
    owner = _argument(frame)
    return frame.f_locals.get("self") if owner is None and "self" in frame.f_code.co_freevars else owner


def _argument(frame: FrameType) -> Any:
    """Return the first argument of a method, or of a function that takes a marked module; None for other code."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    is_method = getattr(getattr(type(first), code.co_name, None), "__code__", None) is code
    is_of_class = isinstance(first, type) and code.co_varnames[0] == "cls"
    return first if is_method or is_of_class or _calls_it_self(frame) or _is_marked(first) else None
