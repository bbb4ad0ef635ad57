"""The arguments of a Hypernetwork's forward, by name, for tools that read signatures.

Hugging Face's Trainer drops the columns of a data set that are no argument of the model, and takes the labels to be the
arguments of that name in the model's class. So a Hypernetwork whose primary has named arguments is of a class of its
own, whose forward is the same function and shows them.
"""

from __future__ import annotations

import functools
import inspect
import types
from inspect import Parameter, Signature
from typing import Any

from torch import nn

from fasthyper.nn.wrappers import unwrapped


class ShowsArguments(nn.Module):
    """A module whose forward shows the arguments of its primary; not if a subclass has a forward of its own."""

    primary: nn.Module

    def _show_arguments(self) -> None:
        base: Any = next(c for c in type(self).__mro__ if ShowsArguments in c.__bases__)
        if type(self).forward is base.forward:
            signature = shown(base.forward, self.primary)
            if signature is not None:
                self.__class__ = class_showing(type(self), signature)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = type(self).__dict__.get("_plain_class")
        if plain is None:
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(2)
        return _new, (plain,), *reduced[2:]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._show_arguments()


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def shown(forward: Any, primary: nn.Module) -> Signature | None:
    """Return the signature of a Hypernetwork's forward with the arguments of its primary; None if these say no more.

    The first argument of the primary is x, and can also be passed by its own name.
    """
    try:
        first, *others = inspect.signature(type(unwrapped(primary)).forward).parameters.values()
        first, *others = others  # without self
    except (ValueError, TypeError):
        return None
    named = [p for p in others if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    if not named or first.kind is not Parameter.POSITIONAL_OR_KEYWORD:
        return None
    own = dict(inspect.signature(forward).parameters)
    taken = [own["self"], own["x"], own["cond"], own["incidence"]]
    added = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (first, *named) if p.name not in own]
    optional = [p.replace(default=None) if p.default is Parameter.empty else p for p in added]
    more = [p for p in others if p.kind is Parameter.VAR_KEYWORD]
    return Signature([*taken[:3], own["args"], taken[3], *optional, *more])


def class_showing(cls: type, signature: Signature) -> type:
    """Return a subclass whose forward is that of `cls` and shows a signature; one for all that show the same."""
    known = cls.__dict__.get("_classes_showing")
    if known is None:
        known = {}
        cls._classes_showing = known  # type: ignore[attr-defined]
    made = known.get(str(signature))
    if made is None:
        made = known[str(signature)] = _class_showing(cls, signature)
    return made


def _class_showing(cls: Any, signature: Signature) -> type:
    plain = cls.forward
    # A function of the same code, so that torch.compile and torch.fx see no other.
    forward = types.FunctionType(
        plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    forward.__kwdefaults__ = plain.__kwdefaults__
    functools.update_wrapper(forward, plain)
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type(cls)(
        cls.__name__,
        (cls,),
        {
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "_plain_class": cls,
            "forward": forward,
        },
    )
