"""Activation checkpoints that this thread runs or recomputes. It needs private names of torch, as `register` does.

A checkpoint drops what its layers computed and calls its function again in the backward pass. What the function takes
from its surroundings, such as a z, must then be what it was. So it is noted on the checkpoint, and found there again.
torch passes no such note from the forward to the recomputation, so the checkpoints are found on the Python stack. If a
name is missing, `MISSING` names it, and no checkpoint is found.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.utils import checkpoint as _checkpoint


def _code_inside(function: Any, name: str) -> CodeType:
    """Return the code of a function that is defined inside of another."""
    for const in function.__code__.co_consts:
        if isinstance(const, CodeType) and const.co_name == name:
            return const
    raise AttributeError(f"{function.__qualname__} has no {name}")


MISSING: str | None = None
_top_hooks: Callable[[bool], Any]
try:
    # From torch 2.14 on, another function of the module does what `checkpoint` did.
    _CHECKPOINT = inspect.unwrap(getattr(_checkpoint, "_checkpoint_impl", _checkpoint.checkpoint)).__code__
    _FORWARD = _checkpoint.CheckpointFunction.forward.__code__
    _BACKWARD = _checkpoint.CheckpointFunction.backward.__code__
    _NOTED = _code_inside(_checkpoint._checkpoint_hook.__init__, "pack_hook")
    _UNPACK = _code_inside(_checkpoint._checkpoint_hook.__init__, "unpack_hook")
    _top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
    for _code, _name in [(_CHECKPOINT, "gen"), (_FORWARD, "ctx"), (_BACKWARD, "ctx"), (_NOTED, "frame")]:
        if _name not in _code.co_varnames + _code.co_freevars:
            raise AttributeError(
                f"{_code.co_qualname if sys.version_info >= (3, 11) else _code.co_name} has no {_name}"
            )
except (ImportError, AttributeError) as error:
    MISSING = str(error)
    _top_hooks = lambda _: None


def backward_id() -> int:
    """Return the id of the backward pass that runs in this thread, -1 outside of any."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Return whether the running backward pass retains the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def computes_all() -> bool:
    """Return False in a backward pass that computes the gradients of some inputs alone, as autograd.grad does."""
    return torch.autograd._is_checkpoint_valid()


def at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs in this thread has computed everything."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def may_be_active() -> bool:
    """Return False if surely no checkpoint is run or recomputed here; one that runs without gradients is overlooked."""
    return MISSING is None and (backward_id() >= 0 or _top_hooks(True) is not None)


@torch._disable_dynamo
def active() -> tuple[list[Any], Any]:
    """Return the checkpoints whose forward runs in this thread, the innermost first, and the one that is recomputed.

    The latter is None if none is. Outer checkpoints of a recomputation do not count: what runs now belongs to the
    recomputed one. Each is an object that lives as long as the checkpoint can be recomputed, with `use_reentrant` the
    node of the graph.
    """
    running: list[Any] = []
    if MISSING is not None:
        return running, None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _CHECKPOINT:
            generator = frame.f_locals.get("gen")
            if generator is not None and generator.gi_frame is not None:
                running.append(generator.gi_frame.f_locals.get("new_frame"))
        elif code is _FORWARD:
            running.append(frame.f_locals["ctx"])
        elif code is _UNPACK:
            return _objects(running), frame.f_locals["frame"]
        elif code is _BACKWARD:
            return _objects(running), frame.f_locals["ctx"]
        frame = frame.f_back  # type: ignore[assignment]
    hooks = _top_hooks(True)
    if hooks is not None and getattr(hooks[0], "__code__", None) is _NOTED:  # torch.distributed's hooks of a module
        (cell,) = (c for n, c in zip(_NOTED.co_freevars, hooks[0].__closure__, strict=True) if n == "frame")
        running.append(cell.cell_contents)
    return _objects(running), None


def _objects(found: list[Any]) -> list[Any]:
    """Return each object once, without None."""
    return list({id(o): o for o in found if o is not None}.values())


def version(t: torch.Tensor | None) -> int | None:
    """Return how often a tensor was changed in place, None if torch does not count or there is no tensor."""
    return None if t is None or t.is_inference() else t._version


def is_reentrant(checkpoint: Any) -> bool:
    """Return whether the recomputation of a checkpoint has a backward pass of its own."""
    return isinstance(checkpoint, torch.autograd.function.FunctionCtx)


def in_compiled_code(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function that changes Python objects, and that will be undone, where Dynamo traces a checkpoint.

    Dynamo refuses such a change, because the recomputation does not repeat it. Here what it is for is traced with it.
    """
    return torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(call, *args)
