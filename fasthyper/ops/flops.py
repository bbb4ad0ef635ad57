"""Flop formulas of all ops, for ``torch.utils.flop_counter.FlopCounterMode`` and the tools that use it.

A call counts as what torch counts for the same call with W written out. In forward that is W = H·z, then W·x; in
backward W is at hand, as autograd keeps it:

| product                  | flops         | counted for                                          |
|--------------------------|---------------|------------------------------------------------------|
| H with z, dW or its like | 2·C·R·I·O     | W in forward; dz; dH                                 |
| W with x, g or its like  | 2·E·N·I·O     | y; dx; dW, if dz, dH or the gradient of W0 is wanted |
| bias head with z         | 2·C·R·O       | the generated bias; its part of dz; its gradient     |

C are the rows of z, and E the terms of the sum; without an incidence both are B. In a convolution I are the inputs of
one output pixel, and N are the output pixels. `pairs` computes x·H first. As in torch, sums and elementwise functions
count nothing.

The count depends on the sizes alone, so that it is the same on every machine and for every backend, and models can be
compared with others. It is no count of what a schedule runs: `fold` and `project` need fewer or more, and a backward
computes W again. ``fasthyper plan`` prints the flops of a schedule.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import register

_COUNTER = "torch.utils.flop_counter"
_GRADS = ("x", "z", "weight", "bias", "base_weight", "base_bias")


def _layer(
    C: int, E: int, N: int, weight: Sequence[int], bias: Sequence[int] | None, wanted: Sequence[bool] | None
) -> int:
    """Return the flops of a generated layer.

    Args:
        C: rows of z.
        E: terms.
        N: points of each term.
        weight: the shape of H, ``(O, …, R)``.
        bias: the shape of the bias head, if there is one.
        wanted: which gradients a backward computes, in the order of `_GRADS`; None for a forward.
    """
    numbers = math.prod(weight[:-1])
    head, use = 2 * C * weight[-1] * numbers, 2 * E * N * numbers
    head_of_bias = 0 if bias is None else 2 * C * math.prod(bias)
    if wanted is None:
        return head + use + head_of_bias
    x, z, h, db, w0, *_ = (*map(int, wanted), *[0] * len(_GRADS))
    return use * (x + (z or h or w0)) + head * (z + h) + head_of_bias * (z + db)


def _wanted(args: Any, *names: str) -> list[bool] | None:
    """Return which gradients an op computes: those of its mask, or the names; None for a forward."""
    if names:
        return [name in names for name in _GRADS]
    return getattr(args, "mask", None)


def _bias(args: Any, axis: int) -> Sequence[int] | None:
    """Return the shape of the bias head; `axis` of g are the outputs. Its own gradient is computed without it."""
    bias = getattr(args, "bias", None)
    wanted = bias is None and hasattr(args, "mask") and len(args.mask) > 3 and args.mask[3]
    return (args.g[axis], args.z[-1]) if wanted else bias


def _linear(args: Any, *names: str) -> int:
    B, N, I = args.x
    weight = args.weight if hasattr(args, "weight") else (args.g[-1], I, args.z[-1])
    return _layer(B, B, N, weight, _bias(args, -1), _wanted(args, *names))


def _terms(args: Any, *names: str) -> int:
    S, N, I = args.x
    weight = args.weight if hasattr(args, "weight") else (args.g[-1], I, args.z[-1])
    C = args.z[0] if hasattr(args, "z") else args.conds
    E = next((index[0] for index in (args.source, args.cond, args.target) if index is not None), S)
    return _layer(C, E, N, weight, _bias(args, -1), _wanted(args, *names))


def _conv(args: Any, *names: str) -> int:
    outputs = args.g[1] if hasattr(args, "g") else args.x[1]
    inputs = args.x[1] // args.groups
    weight = args.weight if hasattr(args, "weight") else (outputs, inputs, *args.kernel, args.z[-1])
    pixels = math.prod(args.output)
    return _layer(args.x[0], args.x[0], pixels, weight, _bias(args, 1), _wanted(args, *names))


def _groups(args: Any) -> int:
    """Return the flops of a product of each row with a matrix, or with a row."""
    return 2 * math.prod(args.x) * (args.weight if hasattr(args, "weight") else args.g)[-1]


def _pairs(args: Any) -> int:
    (B, M, _), N = args.x, args.z[1]
    head, scores = 2 * B * M * math.prod(args.weight), 2 * B * M * N * args.weight[0] * args.weight[2]
    if not hasattr(args, "mask"):
        return head + scores
    x, z, h, _ = map(int, args.mask)
    return scores * ((x or h) + z) + head * (x + h)


def _primary(args: Any) -> int:
    B, N, _ = args.x
    layers = (args.weight1, args.bias1), (args.weight2, args.bias2)
    if not hasattr(args, "mask"):
        return sum(_layer(B, B, N, *layer, None) for layer in layers)
    first, second = args.mask[:6], [any(args.mask[:6]), args.mask[1], *args.mask[6:]]
    return sum(_layer(B, B, N, *layer, mask) for layer, mask in zip(layers, (first, second), strict=True))


def _gradient(of: Callable[..., int], name: str) -> Callable[[Any], int]:
    return lambda args: of(args, name)


def _models(of: Callable[..., int], *names: str) -> Callable[[Any], int]:
    """Return the formula of M models, whose tensors have a leading axis M."""

    def flops(args: Any) -> int:
        one = {name: shape[1:] for name in ("x", "z", "weight", "g") if (shape := getattr(args, name, None))}
        return args.x[0] * of(args._replace(**one), *names)

    return flops


FORMULAS: dict[str, Callable[[Any], int]] = {
    "apply": _linear,
    "cond_grad": _gradient(_linear, "z"),
    "weight_grad": _gradient(_linear, "weight"),
    "grads": _linear,
    "hyper_linear": _linear,
    "hyper_linear_grads": _linear,
    "mapped_linear": _linear,
    "mapped_linear_grads": _linear,
    "apply_models": _models(_linear),
    "cond_grad_models": _models(_linear, "z"),
    "weight_grad_models": _models(_linear, "weight"),
    "grads_models": _models(_linear),
    "apply_terms": _terms,
    "cond_grad_terms": _gradient(_terms, "z"),
    "weight_grad_terms": _gradient(_terms, "weight"),
    "grads_terms": _terms,
    "hyper_linear_terms": _terms,
    "hyper_linear_terms_grads": _terms,
    "conv_apply": _conv,
    "conv_transpose_apply": _conv,
    "conv_cond_grad": _gradient(_conv, "z"),
    "conv_weight_grad": _gradient(_conv, "weight"),
    "hyper_conv": _conv,
    "hyper_conv_grads": _conv,
    "hyper_conv_transpose": _conv,
    "hyper_conv_transpose_grads": _conv,
    "apply_groups": _groups,
    "weight_grad_groups": _groups,
    "pairs": _pairs,
    "pairs_grads": _pairs,
    "primary": _primary,
    "primary_grads": _primary,
}
"""The flops of each op, from its arguments with shapes in place of tensors."""


def _register() -> None:
    """Register the formulas with torch's counter, which is imported."""
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        register_flop_formula(getattr(torch.ops.fasthyper, name))(_of_shapes(name, formula))


def _of_shapes(name: str, formula: Callable[[Any], int]) -> Callable[..., int]:
    """Return a formula as torch calls it: with the arguments of the op, each tensor replaced by its shape."""
    arguments = register.DEFINED[name].signature.arguments

    def flops(*args: Any, out_shape: Any = None, **more: Any) -> int:
        return formula(arguments(*args, **more))

    return flops


class _OnImport:
    """Registers the formulas when the counter is imported, which imports triton: `import fasthyper` does not."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Register the formulas: at once if torch's counter is imported, or else when it will be."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport)
