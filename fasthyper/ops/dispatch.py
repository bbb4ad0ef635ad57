"""torch's private names, all of them, and how an op's derivative rule is hung on the Autograd key.

``torch.library.register_autograd`` makes torch.func raise and forward mode silently wrong; a plain
``autograd.Function`` makes compiled second order silently wrong. What is right everywhere is a kernel at the
Autograd key around a single-level Function, redispatching below autograd. It leans on names that torch does
not promise: where one is gone, `MISSING` says which and the ops run by their reference, which every transform
understands, at the price of writing out the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

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
Op = Callable[..., Any]


def transformed() -> bool:
    """Whether a torch.func transform or a level of forward mode is in force."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def recording(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to record an op on these tensors."""
    return torch.is_grad_enabled() and _any_requires_grad(*(t for t in tensors if t is not None))


def below(op: Op, keys: Any, args: tuple[Any, ...]) -> Any:
    """Run an op's kernel, with autograd done."""
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keys & _after_autograd_keyset, *args)  # type: ignore[attr-defined]


def _asked_for(ctx: Any) -> tuple[bool, ...]:
    """Return which gradients this backward pass asks for: needs_input_grad says only which there could be."""
    nodes = iter(ctx.next_functions)
    need = ctx.needs_input_grad[1:]
    return tuple(t and _runs(next(nodes)[0]) and n for t, n in zip(ctx.is_tensor, need, strict=True))


def _runs(node: Any) -> bool:
    if node is None:
        return False
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad asks for: torch finds it, and will not say so
        return True


def rule(op: Op, backward: Op, jvp: Op | None = None, unread: tuple[int, ...] = (), reread: tuple[int, ...] = ()) -> Op:
    """Make the Autograd kernel of an op that returns one tensor or several.

    Args:
        op: the overload, such as ``torch.ops.fasthyper.apply.default``.
        backward: ``(args, need, g)`` -> one gradient, or None, for each argument. Of an op that returns several
            tensors it takes a g for each, None where that one met no gradient.
        jvp: ``(args, tangents)`` -> tangent of the output; the tangents of some arguments are None.
        unread: positions of arguments that backward does not read, and that are not kept for it.
        reread: positions of the outputs that backward reads: kept for it, and the last of its args.

    Returns:
        A function of the dispatch keys and the op's arguments, recording them when it has to.
    """

    class Rule(_SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

        @staticmethod
        def forward(keys, *args):
            if not _are_functorch_transforms_active():
                return below(op, keys, args)
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below(op, keys, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            args = inputs[1:]
            ctx.is_tensor = tuple(isinstance(a, torch.Tensor) for a in args)
            ctx.is_saved = tuple(t and i not in unread for i, t in enumerate(ctx.is_tensor))
            tensors = [a for a, saved in zip(args, ctx.is_saved, strict=True) if saved]
            tensors += [output[i] for i in reread]
            ctx.set_materialize_grads(isinstance(output, torch.Tensor))
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.args = tuple(None if t else a for a, t in zip(args, ctx.is_tensor, strict=True))

        @staticmethod
        def backward(ctx, *g):
            return None, *backward(_args(ctx), _asked_for(ctx), *g)

        @staticmethod
        def jvp(ctx, _, *tangents):
            assert jvp is not None  # an op without one is taken apart before it gets here
            # torch turns forward mode off here, so that an outer level would see constants. With it on, the
            # arguments must lose the tangents of this level, or the rule would call itself.
            with forward_ad._set_fwd_grad_enabled(True):
                args = (
                    forward_ad.unpack_dual(a, level=0).primal if isinstance(a, torch.Tensor) else a for a in _args(ctx)
                )
                return jvp(tuple(args), tangents)

    def _args(ctx):
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if s else a for s, a in zip(ctx.is_saved, ctx.args, strict=True)]
        return *args, *saved

    def autograd(keys, *args):
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return Rule.apply(keys, *args)  # type: ignore[attr-defined]
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if forward_ad._current_level >= 0 or recording(*tensors):
            return Rule.apply(keys, *args)  # type: ignore[attr-defined]
        return below(op, keys, args)

    return autograd


def register(name: str, kernel: Op, fake: Op, autograd: Op, composite: Op) -> None:
    """Register an op that every transform sees as its composite."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    LIBRARY.impl(name, composite, "FuncTorchBatched")
    torch.library.register_fake(f"fasthyper::{name}", fake, lib=LIBRARY)
