"""Which code was written for the ordinary layers of a module that was hyperized.

It is that of the module's classes, that of functions which were put on a class or on the module, and that of other
objects which the module holds.
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn


class Readers(NamedTuple):
    """The code that was written for ordinary layers: names of classes and of functions, with those of their modules.

    Args:
        modules: the classes of the modules around the layers, and the functions that these classes and modules have.
        helpers: the classes of other objects that these modules hold.
    """

    modules: frozenset[str] = frozenset()
    helpers: frozenset[str] = frozenset()


def mark_readers(modules: Iterable[nn.Module]) -> Readers:
    """Mark the modules whose methods were written for ordinary layers; return what is known of their code."""
    classes: set[str] = set()
    functions: set[str] = set()
    helpers: set[str] = set()
    for module in modules:
        vars(module)["_reads_ordinary_layers"] = True
        classes |= _names_of_classes(type(module))
        attributes = [vars(module), *(vars(cls) for cls in type(module).__mro__ if _is_of_others(cls))]
        for held in _held([[*of.values()] for of in attributes], set()):
            functions |= _names_of_functions(held)
            helpers |= _names_of_classes(type(held))
    named = frozenset(classes | helpers)
    return Readers(frozenset(classes | {name for name in functions if not stands_in(name, named)}), frozenset(helpers))


def stands_in(name: str, names: frozenset[str]) -> bool:
    """Return whether code is one of the names, or stands in a class or a function that is one."""
    dots = (i for i, letter in enumerate(name) if letter == ".")
    return name in names or any(name[:i] in names for i in dots)


def name_of_class(cls: type) -> str:
    """Return the name of a class with that of its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def name_of_code(code: CodeType, module: str, qualified: str) -> str:
    """Return the name of code with that of its module; of a lambda, which has no name, with its line."""
    return f"{module}.{qualified}" + (f":{code.co_firstlineno}" if code.co_name == "<lambda>" else "")


@functools.lru_cache(maxsize=1024)
def qualified_name(code: CodeType) -> str:
    """Return the name of code with those of the class and the functions in which it stands."""
    return str(getattr(code, "co_qualname", None) or _name_of_function(code))  # since Python 3.11


def _name_of_function(code: CodeType) -> str:
    """Return the qualified name of a function that has a code, if there is one."""
    functions = (f for f in gc.get_referrers(code) if isinstance(f, FunctionType))
    return next((f.__qualname__ for f in functions), code.co_name)


def _names_of_classes(cls: type) -> set[str]:
    return {
        name_of_class(c)
        for c in cls.__mro__
        if c not in (object, nn.Module) and c.__module__.partition(".")[0] not in ("builtins", "fasthyper", "functools")
    }


def _is_of_others(what: Any) -> bool:
    """Return whether a class or a function is neither torch's nor the package's."""
    return str(what.__module__).partition(".")[0] not in ("builtins", "fasthyper", "torch")


def _names_of_functions(value: Any) -> set[str]:
    """Return the names of the functions that a value of a class or of a module runs, such as a property."""
    functions = [f for f in _functions(value) if _is_of_others(f)]
    named = ((f, getattr(f.__code__, "co_qualname", f.__qualname__)) for f in functions)
    return {name_of_code(f.__code__, str(f.__globals__.get("__name__", "")), name) for f, name in named}


def _functions(value: Any) -> Iterable[FunctionType]:
    if isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            yield from _functions(part)
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from _functions(value.__func__)
    elif isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
        yield from _functions(value.func)
    elif isinstance(value, (FunctionType, functools._lru_cache_wrapper)) and hasattr(value, "__wrapped__"):
        yield from _functions(value.__wrapped__)  # other functions have the same wrapper
    elif isinstance(value, FunctionType):
        yield value


def _held(value: Any, seen: set[int]) -> Iterable[Any]:
    """Return the objects and functions in the attributes of a module: not the modules, which are readers themselves."""
    if value is None or isinstance(value, (nn.Module, Tensor, type, str, bytes, int, float)) or id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = [*value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside = [*value]
    elif isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inside = [value.__self__]
    yield value
    for held in inside:
        yield from _held(held, seen)
