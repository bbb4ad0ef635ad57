"""The op under `fasthyper.hyper_linear`: the family with a base and a generated bias added in place.

    y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0

It is T with x and z each extended by a one, [x, 1] and [z, 1], and H by a row and a column, so nothing new
has to be derived: `_composite` and `_composite_grads` say it in the family and plain torch, and that is what
second order, forward mode and every transform see. The kernels save what these would cost: an output-sized
temporary for each term, in forward and again in backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import compiled
from . import autocast, reference
from .checks import check_factors, check_shapes
from .dispatch import LIBRARY, MISSING, below, recording, register, rule, transformed
from .family import HOW, TAGS, check_mask, ops, resolved, run_apply, run_grads

_BLOCKS = "Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? base_weight"


def _composite(x, z, weight, bias=None, base_weight=None, base_bias=None, *how: str) -> Tensor:
    y = ops.apply(x, z, weight, *how)
    with autocast.off(x):
        if base_weight is not None:
            y = y + x @ base_weight.T
        if bias is not None:
            y = y + (z @ bias.T).unsqueeze(1)
        return y if base_bias is None else y + base_bias


def _composite_grads(x, z, weight, bias, base_weight, g, mask: list[bool], *how: str) -> tuple[Tensor, ...]:
    check_mask(mask, 6)
    dx, dz, dh = ops.grads(x, z, weight, g, list(mask[:3]), *how)
    with autocast.off(x):
        per_instance = g.sum(1) if any(mask[i] for i in (1, 3, 5)) else g
        if mask[0] and base_weight is not None:
            dx = dx + g @ base_weight
        if mask[1] and bias is not None:
            dz = dz + per_instance @ bias
        dbias = per_instance.T @ z if mask[3] else x.new_empty(0)
        dbase = g.flatten(0, 1).T @ x.flatten(0, 1) if mask[4] else x.new_empty(0)
        db0 = per_instance.sum(0) if mask[5] else x.new_empty(0)
    return dx, dz, dh, dbias, dbase, db0


def blocks(weight, bias=None, base_weight=None, base_bias=None) -> tuple[tuple, ...]:
    """Return what a layer adds to its head, each with its name and the shape that it must have."""
    O, I, R = weight.shape
    return ("bias", bias, (O, R)), ("base_weight", base_weight, (O, I)), ("base_bias", base_bias, (O,))


def _check(x, z, weight, bias=None, base_weight=None, base_bias=None, g=None) -> None:
    check_factors(x, z, weight, g)
    check_shapes(x, blocks(weight, bias, base_weight, base_bias))


def _backward(args: tuple[Any, ...], need: tuple[bool, ...], g: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight, bias, base_weight, _, *how = args
    out = ops.hyper_linear_grads(x, z, weight, bias, base_weight, g, list(need[:6]), *how)
    return *(t if k else None for t, k in zip(out, need, strict=False)), *[None] * len(how)


def _define() -> None:
    LIBRARY.define(f"hyper_linear({_BLOCKS}, Tensor? base_bias, {HOW}) -> Tensor", tags=TAGS)
    LIBRARY.define(
        f"hyper_linear_grads({_BLOCKS}, Tensor g, bool[6] mask, {HOW})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=TAGS,
    )
    if MISSING:

        def written_out(*args):
            _check(*args[:6])
            return reference.hyper_linear(*args[:6])

        LIBRARY.impl("hyper_linear", written_out, "CompositeImplicitAutograd")
        LIBRARY.impl("hyper_linear_grads", _composite_grads, "CompositeImplicitAutograd")
        return

    def kernel(x, z, weight, bias, base_weight, base_bias, *how):
        _check(x, z, weight, bias, base_weight, base_bias)
        return run_apply(how, x, z, weight, bias, base_weight, base_bias)

    def fake(x, z, weight, bias, base_weight, base_bias, *how):
        _check(x, z, weight, bias, base_weight, base_bias)
        return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])

    recorded = rule(ops.hyper_linear.default, _backward, unread=(5,))

    def autograd(keys, x, z, weight, bias, base_weight, base_bias, *how):
        how = tuple(resolved(how))
        if transformed():
            return _composite(x, z, weight, bias, base_weight, base_bias, *how)
        return recorded(keys, x, z, weight, bias, base_weight, base_bias, *how)

    def kernel_grads(x, z, weight, bias, base_weight, g, mask, *how):
        _check(x, z, weight, bias, base_weight, g=g)
        check_mask(mask, 6)
        out = run_grads(how, x, z, weight, bias, base_weight, g, tuple(mask))
        return tuple(x.new_empty(0) if t is None else t for t in out)

    def fake_grads(x, z, weight, bias, base_weight, g, mask, *how):
        _check(x, z, weight, bias, base_weight, g=g)
        check_mask(mask, 6)
        O, I, R = weight.shape
        shapes = (x.shape, z.shape, weight.shape, (O, R), (O, I), (O,))
        return tuple(x.new_empty(s if k else 0) for s, k in zip(shapes, mask, strict=True))

    def autograd_grads(keys, x, z, weight, bias, base_weight, g, mask, *how):
        how = tuple(resolved(how))
        if transformed() or recording(x, z, weight, bias, base_weight, g):
            return _composite_grads(x, z, weight, bias, base_weight, g, mask, *how)
        args = (x, z, weight, bias, base_weight, g, mask, *how)
        return below(ops.hyper_linear_grads.default, keys, args)

    register("hyper_linear", kernel, fake, autograd, _composite)
    register("hyper_linear_grads", kernel_grads, fake_grads, autograd_grads, _composite_grads)


_define()
if not MISSING:
    compiled.load("eager")  # shadows the kernels above on the CPU, where nothing looks on
