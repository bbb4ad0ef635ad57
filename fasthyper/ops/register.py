"""Register ops with torch: `define`. Only this module, `launches` and `checkpoints` use torch's private names.

``torch.library.register_autograd`` makes torch.func raise and forward mode silently wrong; an ``autograd.Function``
around the op makes compiled second order silently wrong. A kernel for the Autograd key is right everywhere: it calls
a single-level Function, and the forward of this Function redispatches below autograd. It needs private names of torch.
If one is missing, `MISSING` names it, and every op runs its definition in torch's own operations, which writes out the
weights and works under every transform.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, Protocol

import torch
import torch.export
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends, compiled
from ..problem import AUTO
from .shapes import Axes
from .signature import Op, Signature

MISSING: str | None = None
try:
    from torch._C import (
        _after_autograd_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
        _current_autograd_node,
        _will_engine_execute_node,
    )
    from torch._C._functorch import TransformType, get_interpreter_stack
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
_NOT_DENSE = [
    f"{layout}{device}" for layout in ("Sparse", "SparseCsr", "NestedTensor") for device in ("CPU", "CUDA")
] + ["MkldnnCPU"]
"""The dispatch keys of tensors whose layout is not strided."""

Gradients = Mapping[str, Tensor | None]
"""Gradients, or tangents, by the name of an argument."""


class Defined(NamedTuple):
    """An op that `define` has registered: its signature, and the same computation by other ops."""

    signature: Signature
    composite: Op


DEFINED: dict[str, Defined] = {}
"""All ops, by name."""


class Arguments(Protocol):
    """The arguments of an op: a named tuple that ends in the choice of a backend."""

    @property
    def backend(self) -> str: ...

    @property
    def schedule(self) -> str: ...


def choice(args: Arguments) -> backends.Choice:
    """Return the backend and the schedule of a call: those passed with the call, or else the current ones.

    They are resolved in forward, so that a backward in another thread uses those of its forward.
    """
    current = backends.current()
    if not (args.backend or args.schedule) or (args.backend, args.schedule) == current:
        return current
    return backends.checked(args.backend or AUTO, args.schedule or AUTO)


def transformed() -> bool:
    """Return whether a torch.func transform or a level of forward mode is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def vmapped() -> bool:
    """Return whether a vmap is active, so that a tensor may stand for many."""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def current_node() -> Any:
    """Return the node of autograd's graph whose backward runs in this thread, or None."""
    return _current_autograd_node()


def has_global_hooks() -> bool:
    """Return whether torch calls hooks for every module, which `register_module_forward_hook` and its like add."""
    has_any: Any = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: False)
    return bool(has_any())


def define(
    name: str,
    arguments: type,
    results: Mapping[str, str],
    *,
    axes: Axes,
    kernel: Op,
    composite: Op | None = None,
    definition: Op | None = None,
    backward: Op | None = None,
    jvp: Op | None = None,
    vmap: Op | None = None,
    reads: Mapping[str, Sequence[str]] | None = None,
    saved_results: Sequence[str] = (),
    validate: Op | None = None,
    empty: Op | None = None,
) -> None:
    """Register an op: schema, check, kernel, fake kernel, derivatives, vmap, and the fallback if torch lacks a name.

    An op without a composite needs a definition, a backward, a jvp and a vmap. Every function below takes the arguments
    as one named tuple. They are checked once, before the function is called.

    Args:
        name: name of the op in ``torch.ops.fasthyper``.
        arguments: a NamedTuple class: the names and the types of the arguments make the schema. An argument ``mask``
            has an entry for each result: whether it is requested.
        results: the name and the axes of each tensor that is returned.
        axes: the table of axes, for the check and for the shapes of results.
        kernel: computes the results below autograd. None stands for a result that is not requested.
        composite: computes the same by other ops. It runs under transforms, in forward mode, and under autograd if
            there is no `backward`.
        definition: computes the same by torch's own operations, if there is no composite.
        backward: ``(args, wanted, *g)`` returns gradients by name. `wanted` has, for each argument, whether its
            gradient is requested. If an op has several results, g is None for a result without a gradient.
        jvp: ``(args, tangents)`` returns the tangent of the result from the tangents of some arguments, by name.
        vmap: ``(info, dims, *arguments)``, as for `torch.library.register_vmap`.
        reads: for each differentiable argument, the other ones that its gradient reads. Only those are saved that the
            gradients of this call may read; in backward, the others have their shapes, and NaN as values.
            None saves all.
        saved_results: results that backward reads: ``(args, wanted, *saved_results, *g)``.
        validate: checks the other arguments, such as a string, and raises.
        empty: returns the results with no values; None for contiguous results whose sizes the axes tell.
    """
    signature = Signature(name, arguments, results, axes, validate)
    run_composite = signature.with_check(composite or definition)
    DEFINED[name] = Defined(signature, run_composite)
    LIBRARY.define(signature.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    if MISSING:
        LIBRARY.impl(name, run_composite, "CompositeImplicitAutograd")
        return

    op = getattr(torch.ops.fasthyper, name).default
    positions = [[*results].index(result) for result in saved_results]
    recorded = None if backward is None else _record(op, arguments, backward, jvp, reads or {}, positions)

    def autograd(keys: Any, *values: Any) -> Any:
        args = arguments(*values)
        backend, schedule = choice(args)
        if (backend, schedule) != (args.backend, args.schedule):
            args = args._replace(backend=backend, schedule=schedule)
        if composite is not None and transformed():
            return run_composite(*args)
        if recorded is not None:
            return recorded(keys, *args)
        if torch.is_grad_enabled() and _requires_grad(args):
            return run_composite(*args)
        return _below_autograd(op, keys, args)

    LIBRARY.impl(name, signature.with_check(kernel), "CompositeExplicitAutograd")
    for key in _NOT_DENSE:  # here, where it costs the calls of dense tensors nothing
        LIBRARY.impl(name, signature.refuse, key)
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fasthyper::{name}", signature.with_check(empty or signature.empty), lib=LIBRARY)
    if composite is not None:
        LIBRARY.impl(name, run_composite, "FuncTorchBatched")
    else:
        assert vmap is not None
        torch.library.register_vmap(f"fasthyper::{name}", signature.with_check_of_one(vmap), lib=LIBRARY)


def add_to_export(decompositions: Callable[[], Mapping[Any, Op]]) -> None:
    """Add decompositions to the default table of ``torch.export``, from which a user may remove them.

    torch takes custom ops into this table only if they are CompositeImplicitAutograd, and then ``torch.compile``
    decomposes them, too. So the two functions of ``torch.export`` that make the table are replaced. Inductor makes its
    own from another function of torch, and must not have them.
    """
    default, run = torch.export.default_decompositions, torch.export.ExportedProgram.run_decompositions

    @functools.wraps(default)
    def default_decompositions() -> Any:
        table = default()
        table.update(decompositions())
        return table

    @functools.wraps(run)
    def run_decompositions(self: Any, decomp_table: Any = None, *args: Any, **more: Any) -> Any:
        return run(self, default_decompositions() if decomp_table is None else decomp_table, *args, **more)

    torch.export.default_decompositions = default_decompositions
    torch.export.ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]


def _requires_grad(args: Sequence[Any]) -> bool:
    return _any_requires_grad(*(t for t in args if isinstance(t, Tensor)))


def _below_autograd(op: Op, keys: Any, args: Sequence[Any]) -> Any:
    """Run the kernel of an op, below autograd."""
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keys & _after_autograd_keyset, *args)  # type: ignore[attr-defined]


# The compiled function that returns a bit for each edge of the node that runs: whether this pass asks for its gradient.
_asked = None if MISSING or compiled.load("eager") else torch.ops.fasthyper_eager.asked.default


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """Return which gradients this pass requests; needs_input_grad only has the inputs that require one."""
    run = _edges_that_run(ctx, sum(ctx.is_tensor))  # an edge for each tensor
    edge_of = itertools.accumulate(ctx.is_tensor, initial=0)
    needed = zip(ctx.is_tensor, ctx.needs_input_grad[1:], edge_of, strict=False)
    return tuple(is_tensor and needs and run[edge] for is_tensor, needs, edge in needed)


def _edges_that_run(ctx: Any, count: int) -> list[bool]:
    if _asked is not None and not torch.compiler.is_compiling() and current_node() is ctx:
        bits = _asked()
        return [bool(bits >> edge & 1) for edge in range(count)]
    return [_will_run(node) for node, _ in ctx.next_functions]


def _will_run(node: Any) -> bool:
    if node is None:
        return False
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:  # torch raises for a leaf among the inputs of autograd.grad
        return True


class _NotSaved(NamedTuple):
    """An argument that no gradient of a call reads."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> Tensor:
        """Return a tensor of the argument's shape with one number in memory: NaN, which spreads if it is read."""
        return torch.full((), math.nan, dtype=self.dtype, device=self.device).expand(self.shape)


# Types whose values cannot be wrapper subclasses; torch's own test takes longer.
_PLAIN = {Tensor, torch.nn.Parameter, NoneType, bool, int, str}


def _are_read(fields: Sequence[str], requires_grad: Sequence[bool], reads: Mapping[str, Sequence[str]]) -> list[bool]:
    """Return which arguments the gradients of a call read: those of arguments that require one."""
    used = {
        name for field, needed in zip(fields, requires_grad, strict=True) if needed for name in reads.get(field, ())
    }
    return [field not in reads or field in used for field in fields]


def _record(
    op: Op,
    arguments: type,
    backward: Op,
    jvp: Op | None,
    reads: Mapping[str, Sequence[str]],
    positions: Sequence[int],
) -> Op:
    """Return a function of the dispatch keys and the arguments of an op that records it for backward."""
    fields = arguments._fields  # type: ignore[attr-defined]

    class Rule(_SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

        @staticmethod
        def forward(keys, *args):
            if not _are_functorch_transforms_active():
                return _below_autograd(op, keys, args)
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below_autograd(op, keys, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            values = inputs[1:]
            ctx.is_tensor = tuple(isinstance(t, Tensor) for t in values)
            whole = transformed() or any(type(t) not in _PLAIN and is_traceable_wrapper_subclass(t) for t in values)
            read = [True] * len(values) if whole else _are_read(fields, ctx.needs_input_grad[1:], reads)
            ctx.is_saved = tuple(t and r for t, r in zip(ctx.is_tensor, read, strict=True))
            tensors = [t for t, saved in zip(values, ctx.is_saved, strict=True) if saved]
            tensors += [output[i] for i in positions]
            ctx.set_materialize_grads(isinstance(output, Tensor))
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.others = tuple(
                None if saved else _NotSaved(value.shape, value.dtype, value.device) if t else value
                for value, t, saved in zip(values, ctx.is_tensor, ctx.is_saved, strict=True)
            )

        @staticmethod
        def backward(ctx, *g):
            args, outputs = _restore(ctx)
            wanted = dict(zip(fields, _wanted(ctx), strict=True))
            found = backward(args, wanted, *outputs, *g)
            return None, *(found.get(field) if wanted[field] else None for field in fields)

        @staticmethod
        def jvp(ctx, _, *tangents):
            assert jvp is not None  # an op without one has a composite, which runs in forward mode
            # torch turns forward mode off here, so that an outer level would see constants. With it on, the arguments
            # must lose the tangents of this level, or the rule would call itself.
            with forward_ad._set_fwd_grad_enabled(True):
                args, _ = _restore(ctx)
                primals = (forward_ad.unpack_dual(t, level=0).primal if isinstance(t, Tensor) else t for t in args)
                given = {field: t for field, t in zip(fields, tangents, strict=True) if t is not None}
                return jvp(arguments(*primals), given)

    # Profilers and graphs of autograd show these names, as those of torch's own nodes.
    node = "".join(part.capitalize() for part in op.name().partition("::")[2].split("_"))  # type: ignore[attr-defined]
    Rule.__name__, Rule._backward_cls.__name__ = node, f"{node}Backward"

    def _restore(ctx: Any) -> tuple[Any, list[Tensor]]:
        saved = iter(ctx.saved_tensors)
        others = (t.stand_in() if isinstance(t, _NotSaved) else t for t in ctx.others)
        args = arguments(*(next(saved) if s else t for s, t in zip(ctx.is_saved, others, strict=True)))
        return args, list(saved)

    def recorded(keys: Any, *values: Any) -> Any:
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return Rule.apply(keys, *values)  # type: ignore[attr-defined]
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _requires_grad(values)):
            return Rule.apply(keys, *values)  # type: ignore[attr-defined]
        return _below_autograd(op, keys, values)

    return recorded
