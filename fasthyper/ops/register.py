"""How an op is registered with torch: `define`. All of torch's private names are here.

``torch.library.register_autograd`` makes torch.func raise and forward mode silently wrong; an ``autograd.Function``
around the op makes compiled second order silently wrong. What is right everywhere is a kernel for the Autograd key
around a single-level Function, which redispatches below autograd. It needs names that torch does not promise to keep.
If one is missing, `MISSING` names it, and every op runs by its definition, which writes out the weights and which
every transform understands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..problem import AUTO
from . import shapes

MISSING: str | None = None
try:
    from torch._C import (
        _after_autograd_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
        _will_engine_execute_node,
    )
    from torch._functorch.autograd_function import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    _ = (
        torch.autograd.Function._compiled_autograd_key,
        forward_ad._current_level,
        forward_ad._set_fwd_grad_enabled,
        torch.ops.aten.add.Tensor.redispatch,
    )
except (ImportError, AttributeError) as error:
    MISSING = str(error)

LIBRARY = torch.library.Library("fasthyper", "DEF")
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str"}

Op = Callable[..., Any]
Gradients = Mapping[str, Tensor | None]
"""Gradients, or tangents, by the name of an argument."""


class Arguments(Protocol):
    """The arguments of an op: a named tuple that ends in the choice of a backend."""

    @property
    def backend(self) -> str: ...

    @property
    def schedule(self) -> str: ...


def choice(a: Arguments) -> backends.Choice:
    """Return the backend and the schedule of a call: those that travel with it, or those in force.

    They are resolved in forward, so that a backward in another thread does as its forward did.
    """
    if not (a.backend or a.schedule):
        return backends.current()
    return backends.checked(a.backend or AUTO, a.schedule or AUTO)


def transformed() -> bool:
    """Return whether a torch.func transform or a level of forward mode is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def define(
    name: str,
    arguments: type,
    results: Mapping[str, str],
    *,
    axes: shapes.Axes,
    kernel: Op,
    composite: Op | None = None,
    definition: Op | None = None,
    backward: Op | None = None,
    jvp: Op | None = None,
    vmap: Op | None = None,
    unread: Sequence[str] = (),
    reread: Sequence[str] = (),
    validate: Op | None = None,
) -> None:
    """Register an op: schema, kernel, fake kernel, derivatives, vmap, and what runs if torch lacks a name.

    An op has a composite, or else a backward, a jvp and a vmap. Every function below takes the arguments as one named
    tuple, checked once before.

    Args:
        name: name of the op in ``torch.ops.fasthyper``.
        arguments: a NamedTuple class: the names and the types of the arguments make the schema. An argument ``mask``
            has an entry for each result: which results are wanted.
        results: the name and the axes of each tensor that is returned.
        axes: the table of axes, for the check and for the shapes of results.
        kernel: computes the results below autograd. None stands for a result that is not wanted.
        composite: computes the same by other ops. Transforms, forward mode, and autograd without `backward`, see it.
        definition: computes the same by torch's own ops, where there is no composite.
        backward: ``(a, wanted, *g)`` returns gradients by name. `wanted` says of each argument whether its gradient
            is asked for. Of an op with several results, g is None for one that met no gradient.
        jvp: ``(a, tangents)`` returns the tangent of the result, from those of some arguments.
        vmap: ``(info, dims, *arguments)``, as `torch.library.register_vmap` has it.
        unread: arguments that backward does not read; they are not kept.
        reread: results that backward reads; it gets them as ``(a, wanted, *reread, *g)``.
        validate: raises for an argument that is no tensor.
    """
    signature = _Signature(name, arguments, results, axes, validate)
    by_ops = signature.checked(composite or definition)
    LIBRARY.define(signature.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    if MISSING:
        LIBRARY.impl(name, by_ops, "CompositeImplicitAutograd")
        return

    op = getattr(torch.ops.fasthyper, name).default
    kept = [[*results].index(result) for result in reread]
    recorded = None if backward is None else _record(op, arguments, backward, jvp, unread, kept)

    def autograd(keys: Any, *args: Any) -> Any:
        a = arguments(*args)
        a = a._replace(**choice(a)._asdict())
        if composite is not None and transformed():
            return by_ops(*a)
        if recorded is not None:
            return recorded(keys, *a)
        if torch.is_grad_enabled() and _requires_grad(a):
            return by_ops(*a)
        return _below(op, keys, a)

    LIBRARY.impl(name, signature.checked(kernel), "CompositeExplicitAutograd")
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fasthyper::{name}", signature.checked(signature.empty), lib=LIBRARY)
    if composite is not None:
        LIBRARY.impl(name, by_ops, "FuncTorchBatched")
    else:
        torch.library.register_vmap(f"fasthyper::{name}", vmap, lib=LIBRARY)


class _Signature:
    """The names, types and axes of an op: its schema, the check of its arguments, the shapes of its results."""

    def __init__(
        self, name: str, arguments: Any, results: Mapping[str, str], axes: shapes.Axes, validate: Op | None
    ) -> None:
        self.name, self.arguments, self.results, self.axes, self.validate = name, arguments, results, axes, validate
        self.types = get_type_hints(arguments)
        self.masked = "mask" in self.types
        self.tensors = [field for field, kind in self.types.items() if kind in (Tensor, Tensor | None)]
        self.optional = [field for field in self.tensors if self.types[field] != Tensor]

    def schema(self) -> str:
        arguments = []
        for field, kind in self.types.items():
            text = f"bool[{len(self.results)}]" if field == "mask" else _SCHEMA[kind]
            arguments.append(f'{text} {field}=""' if field in ("backend", "schedule") else f"{text} {field}")
        returns = ["Tensor" if self.masked else f"Tensor {result}" for result in self.results]
        returned = "Tensor" if len(returns) == 1 else f"({', '.join(returns)})"
        return f"{self.name}({', '.join(arguments)}) -> {returned}"

    def checked(self, run: Op | None) -> Op:
        """Return a function of the op's arguments that checks them and calls `run` with their named tuple."""

        def call(*args: Any) -> Any:
            a = self.arguments(*args)
            given = self.given(a)
            if not shapes.agree(self.axes, given):
                shapes.check(self.axes, given, self.optional)
            if self.masked and len(a.mask) != len(self.results):
                raise ValueError(
                    f"mask must have {len(self.results)} entries, one for each gradient, got {list(a.mask)}"
                )
            if self.validate is not None:
                self.validate(a)
            out = run(a)  # type: ignore[misc]
            return out if len(self.results) == 1 else tuple(a.x.new_empty(0) if t is None else t for t in out)

        return call

    def given(self, a: Any) -> dict[str, Tensor | None]:
        return {field: getattr(a, field) for field in self.tensors}

    def empty(self, a: Any) -> Any:
        """Return results of the right shapes with no values."""
        sizes = shapes.sizes_of(self.axes, {field: t.shape for field, t in self.given(a).items() if t is not None})
        wanted = a.mask if self.masked else [True] * len(self.results)
        out = [
            a.x.new_empty(shapes.shape_of(letters, sizes)) if k else None
            for letters, k in zip(self.results.values(), wanted, strict=True)
        ]
        return out[0] if len(out) == 1 else tuple(out)


def _requires_grad(a: Sequence[Any]) -> bool:
    return _any_requires_grad(*(t for t in a if isinstance(t, Tensor)))


def _below(op: Op, keys: Any, a: Sequence[Any]) -> Any:
    """Run the kernel of an op, below autograd."""
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keys & _after_autograd_keyset, *a)  # type: ignore[attr-defined]


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """Return which gradients this pass asks for; needs_input_grad only says which it could ask for."""
    nodes = iter(ctx.next_functions)
    needed = ctx.needs_input_grad[1:]
    return tuple(t and _runs(next(nodes)[0]) and n for t, n in zip(ctx.is_tensor, needed, strict=True))


def _runs(node: Any) -> bool:
    if node is None:
        return False
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad asks for; torch does not answer for these
        return True


def _record(op: Op, arguments: type, backward: Op, jvp: Op | None, unread: Sequence[str], reread: Sequence[int]) -> Op:
    """Return a function of the dispatch keys and the arguments of an op that records it for backward."""
    fields = arguments._fields  # type: ignore[attr-defined]

    class Rule(_SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

        @staticmethod
        def forward(keys, *args):
            if not _are_functorch_transforms_active():
                return _below(op, keys, args)
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below(op, keys, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            args = inputs[1:]
            ctx.is_tensor = tuple(isinstance(t, Tensor) for t in args)
            ctx.is_saved = tuple(t and field not in unread for t, field in zip(ctx.is_tensor, fields, strict=True))
            tensors = [t for t, saved in zip(args, ctx.is_saved, strict=True) if saved]
            tensors += [output[i] for i in reread]
            ctx.set_materialize_grads(isinstance(output, Tensor))
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.others = tuple(None if t else a for a, t in zip(args, ctx.is_tensor, strict=True))

        @staticmethod
        def backward(ctx, *g):
            a, outputs = _saved(ctx)
            wanted = dict(zip(fields, _wanted(ctx), strict=True))
            found = backward(a, wanted, *outputs, *g)
            return None, *(found.get(field) if wanted[field] else None for field in fields)

        @staticmethod
        def jvp(ctx, _, *tangents):
            assert jvp is not None  # an op without one has a composite, which forward mode sees instead
            # torch turns forward mode off here, and an outer level would see constants. With it on, the arguments
            # must lose the tangents of this level, or the rule would call itself.
            with forward_ad._set_fwd_grad_enabled(True):
                a, _ = _saved(ctx)
                primals = (forward_ad.unpack_dual(t, level=0).primal if isinstance(t, Tensor) else t for t in a)
                given = {field: t for field, t in zip(fields, tangents, strict=True) if t is not None}
                return jvp(arguments(*primals), given)

    def _saved(ctx: Any) -> tuple[Any, list[Tensor]]:
        saved = iter(ctx.saved_tensors)
        a = arguments(*(next(saved) if s else t for s, t in zip(ctx.is_saved, ctx.others, strict=True)))
        return a, list(saved)

    def recorded(keys: Any, *args: Any) -> Any:
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return Rule.apply(keys, *args)  # type: ignore[attr-defined]
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _requires_grad(args)):
            return Rule.apply(keys, *args)  # type: ignore[attr-defined]
        return _below(op, keys, args)

    return recorded
