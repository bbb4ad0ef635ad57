"""Initialisations of a generated layer: they fill its parameters in place.

With fan-in I, fan-out O, R features z of second moment V = E[z²] (after a ReLU it is not the variance) and
the gain of the nonlinearity that follows the layer (`torch.nn.init.calculate_gain`), a generated weight has
variance R · Var(weight) · V, and so

| | Var(weight) | Var(bias) | base_weight, base_bias |
|---|---|---|---|
| `hyperfan_in_` | gain² / (k · I · R · V), k = 2 with a generated bias, else 1 | gain² / (2 · R · V) | 0 |
| `hyperfan_out_` | gain² / (O · R · V) | max(0, gain² (1 − I/O) / (R · V)) | 0 |
| `bias_hyper_` | 0 | 0 | Var = gain² / I, and 0 |

For inputs of second moment 1 the outputs of the first and the last then have variance gain², and so has, with
the second, the gradient that goes back to x for output gradients of variance 1 (and, where O ≥ I and a bias
is generated, the output too). The hyperfan bases start at zero because the generated part already carries all
of that variance; with `bias_hyper_` the base carries all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn


def _variance(z_second_moment: float, nonlinearity: str) -> float:
    """gain² / V."""
    if not (z_second_moment > 0 and math.isfinite(z_second_moment)):
        raise ValueError(f"z_second_moment must be positive and finite, got {z_second_moment}")
    return _gain_sq(nonlinearity) / z_second_moment


def _gain_sq(nonlinearity: str) -> float:
    return nn.init.calculate_gain(nonlinearity) ** 2  # type: ignore[arg-type]


def _uniform_(tensor: Tensor | None, variance: float) -> None:
    if tensor is not None:
        bound = math.sqrt(3 * variance)
        nn.init.uniform_(tensor, -bound, bound)


def _zero_(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            nn.init.zeros_(tensor)


def hyperfan_in_(
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    z_second_moment: float = 1.0,
    nonlinearity: str = "linear",
) -> None:
    """Keep the variance of activations: Var(weight) = gain² / (k·I·R·V), Var(bias) = gain² / (2·R·V).

    Uniform. With k = 2 half of the output's variance is left to the bias, where one is generated; else k = 1.

    Args:
        weight: `(O, I, R)`, filled in place, as all that follow.
        bias: `(O, R)` or None.
        base_weight: `(O, I)` or None, set to zero.
        base_bias: `(O,)` or None, set to zero.
        z_second_moment: V = E[z²] of one feature.
        nonlinearity: what follows the layer, a name that `torch.nn.init.calculate_gain` knows.

    Raises:
        ValueError: an unknown nonlinearity, or a second moment that is not positive and finite.

    Source: Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020,
    arXiv 2312.08399.

    >>> import torch
    >>> weight = torch.empty(256, 64, 32)
    >>> hyperfan_in_(weight, z_second_moment=0.5)
    >>> abs(weight.var().item() * 64 * 32 * 0.5 - 1) < 0.02
    True
    """
    variance = _variance(z_second_moment, nonlinearity)
    _, fan_in, features = weight.shape
    halves = 1 if bias is None else 2
    _uniform_(weight, variance / max(1, halves * fan_in * features))
    _uniform_(bias, variance / max(1, 2 * features))
    _zero_(base_weight, base_bias)


def hyperfan_out_(
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    z_second_moment: float = 1.0,
    nonlinearity: str = "linear",
) -> None:
    """Keep the variance of gradients: Var(weight) = gain² / (O·R·V).

    Uniform. Var(bias) = max(0, gain² (1 − I/O) / (R·V)), so that a layer that widens keeps the variance of
    activations too.

    Args:
        weight: `(O, I, R)`, filled in place, as all that follow.
        bias: `(O, R)` or None.
        base_weight: `(O, I)` or None, set to zero.
        base_bias: `(O,)` or None, set to zero.
        z_second_moment: V = E[z²] of one feature.
        nonlinearity: what follows the layer, a name that `torch.nn.init.calculate_gain` knows.

    Raises:
        ValueError: an unknown nonlinearity, or a second moment that is not positive and finite.

    Source: Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020,
    arXiv 2312.08399.

    >>> import torch
    >>> weight = torch.empty(256, 64, 32)
    >>> hyperfan_out_(weight, nonlinearity="relu")
    >>> abs(weight.var().item() * 256 * 32 / 2 - 1) < 0.02
    True
    """
    variance = _variance(z_second_moment, nonlinearity)
    fan_out, fan_in, features = weight.shape
    _uniform_(weight, variance / max(1, fan_out * features))
    _uniform_(bias, variance * max(0.0, 1 - fan_in / max(1, fan_out)) / max(1, features))
    _zero_(base_weight, base_bias)


def bias_hyper_(
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    z_second_moment: float = 1.0,
    nonlinearity: str = "linear",
) -> None:
    """Start every instance from the same usual weights: the head is zero, the base uniform, Var = gain² / I.

    The gradient to z is zero until the head has moved, that is after the first step.

    Args:
        weight: `(O, I, R)`, set to zero.
        bias: `(O, R)` or None, set to zero.
        base_weight: `(O, I)`, filled in place.
        base_bias: `(O,)` or None, set to zero.
        z_second_moment: checked, and of no effect: nothing is generated at the start.
        nonlinearity: what follows the layer, a name that `torch.nn.init.calculate_gain` knows.

    Raises:
        ValueError: there is no base_weight; an unknown nonlinearity; a second moment that is not positive
            and finite.

    Source: "Bias-HyperInit" of Beck, Jackson, Vuorio, Whiteson, "Hypernetworks in Meta-Reinforcement
    Learning", CoRL 2022, arXiv 2210.11348.

    >>> import torch
    >>> weight, base_weight = torch.empty(8, 4, 2), torch.empty(8, 4)
    >>> bias_hyper_(weight, None, base_weight)
    >>> weight.any().item(), base_weight.any().item()
    (False, True)
    """
    _variance(z_second_moment, nonlinearity)
    if base_weight is None:
        raise ValueError(
            "init 'bias_hyper' sets the head to zero and starts from the base: it needs a base_weight "
            "(base=True), got None"
        )
    _zero_(weight, bias, base_bias)
    _uniform_(base_weight, _gain_sq(nonlinearity) / max(1, base_weight.shape[1]))


INITS: dict[str, Callable[..., None]] = {
    "hyperfan_in": hyperfan_in_,
    "hyperfan_out": hyperfan_out_,
    "bias_hyper": bias_hyper_,
}
