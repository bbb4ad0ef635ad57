"""Initialisations of a generated layer. They fill its parameters in place.

A layer has I input and O output features, and z has R features of second moment V = E[z²] (after a ReLU, V is not the
variance). ``gain`` is that of the nonlinearity after the layer, see :func:`torch.nn.init.calculate_gain`. A generated
weight then has variance R · Var(weight) · V, which gives:

===================================  =================  ===============================  ======================
Function                             Var(weight)        Var(bias)                        base_weight, base_bias
===================================  =================  ===============================  ======================
:func:`~fasthyper.nn.hyperfan_in_`   gain² / (k·I·R·V)  gain² / (2·R·V)                  0, 0
:func:`~fasthyper.nn.hyperfan_out_`  gain² / (O·R·V)    max(0, gain² (1 − I/O) / (R·V))  0, 0
:func:`~fasthyper.nn.bias_hyper_`    0                  0                                variance gain² / I, 0
===================================  =================  ===============================  ======================

k is 2 if the layer generates a bias, else 1.

For inputs of second moment 1, ``hyperfan_in_`` and ``bias_hyper_`` give outputs of variance gain². For output gradients
of variance 1, ``hyperfan_out_`` gives gradients of x of variance gain². If O ≥ I and the layer generates a bias, its
outputs have variance gain², too. The hyperfan functions set the base to zero, because the generated weights already
have the full variance; ``bias_hyper_`` gives it to the base instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def _variance(z_second_moment: float, nonlinearity: str) -> float:
    """Return gain² / V."""
    if not (z_second_moment > 0 and math.isfinite(z_second_moment)):
        raise ValueError(f"z_second_moment must be positive and finite, got {z_second_moment}")
    return _gain_sq(nonlinearity) / z_second_moment


def _gain_sq(nonlinearity: str) -> float:
    return nn.init.calculate_gain(nonlinearity) ** 2  # type: ignore[arg-type]


def _fans(weight: Tensor) -> tuple[int, int]:
    """Return I and O of a head (O, I, R) or of a base weight (O, I)."""
    return weight.shape[1], weight.shape[0]


def _uniform_(tensor: Tensor | None, variance: float) -> None:
    if tensor is not None:
        bound = math.sqrt(3 * variance)
        nn.init.uniform_(tensor, -bound, bound)


def _features(bias: Tensor | None) -> int:
    """Return the features of the z of the bias, which may be another than that of the weight."""
    return 0 if bias is None else bias.shape[-1]


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
    fans: tuple[int, int] | None = None,
) -> None:
    """Fill a generated layer so that the variance of activations is preserved (Hyperfan-in).

    The distributions are uniform, with Var(weight) = gain² / (k·I·R·V) and Var(bias) = gain² / (2·R·V). With a bias
    k is 2 and each of weight and bias gives half of the output's variance; without a bias k is 1.

    Args:
        weight: the head, ``(O, I, R)``.
        bias: the head of the bias, ``(O, R)``, or None.
        base_weight: ``(O, I)`` or None, set to zero.
        base_bias: ``(O,)`` or None, set to zero.
        z_second_moment: V = E[z²] of one feature of z.
        nonlinearity: the function that follows the layer, by its name in :func:`torch.nn.init.calculate_gain`.
        fans: how many inputs an output sums, and how many outputs an input reaches; by default I and O.

    Raises:
        ValueError: ``nonlinearity`` is unknown, or ``z_second_moment`` is not positive and finite.

    References:
        Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020,
        `arXiv 2312.08399 <https://arxiv.org/abs/2312.08399>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import hyperfan_in_
        >>> weight = torch.empty(256, 64, 32)
        >>> hyperfan_in_(weight, z_second_moment=0.5)
        >>> abs(weight.var().item() * 64 * 32 * 0.5 - 1) < 0.02
        True
    """
    variance = _variance(z_second_moment, nonlinearity)
    (fan_in, _), features = fans or _fans(weight), weight.shape[-1]
    halves = 1 if bias is None else 2
    _uniform_(weight, variance / max(1, halves * fan_in * features))
    _uniform_(bias, variance / max(1, 2 * _features(bias)))
    _zero_(base_weight, base_bias)


def hyperfan_out_(
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    z_second_moment: float = 1.0,
    nonlinearity: str = "linear",
    fans: tuple[int, int] | None = None,
) -> None:
    """Fill a generated layer so that the variance of gradients is preserved (Hyperfan-out).

    The distributions are uniform, with Var(weight) = gain² / (O·R·V) and Var(bias) = max(0, gain² (1 − I/O) / (R·V)).
    If O ≥ I, this bias preserves the variance of activations, too.

    Args:
        weight: the head, ``(O, I, R)``.
        bias: the head of the bias, ``(O, R)``, or None.
        base_weight: ``(O, I)`` or None, set to zero.
        base_bias: ``(O,)`` or None, set to zero.
        z_second_moment: V = E[z²] of one feature of z.
        nonlinearity: the function that follows the layer, by its name in :func:`torch.nn.init.calculate_gain`.
        fans: how many inputs an output sums, and how many outputs an input reaches; by default I and O.

    Raises:
        ValueError: ``nonlinearity`` is unknown, or ``z_second_moment`` is not positive and finite.

    References:
        Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020,
        `arXiv 2312.08399 <https://arxiv.org/abs/2312.08399>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import hyperfan_out_
        >>> weight = torch.empty(256, 64, 32)
        >>> hyperfan_out_(weight, nonlinearity="relu")
        >>> abs(weight.var().item() * 256 * 32 / 2 - 1) < 0.02
        True
    """
    variance = _variance(z_second_moment, nonlinearity)
    (fan_in, fan_out), features = fans or _fans(weight), weight.shape[-1]
    _uniform_(weight, variance / max(1, fan_out * features))
    _uniform_(bias, variance * max(0.0, 1 - fan_in / max(1, fan_out)) / max(1, _features(bias)))
    _zero_(base_weight, base_bias)


def bias_hyper_(
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    *,
    z_second_moment: float = 1.0,
    nonlinearity: str = "linear",
    fans: tuple[int, int] | None = None,
) -> None:
    """Fill a generated layer so that all instances start from the same weights (Bias-HyperInit).

    The head is zero, and base_weight is uniform with variance gain² / I, as in a linear layer. The gradient of z is
    zero until the first step has changed the head.

    Args:
        weight: the head, ``(O, I, R)``, set to zero.
        bias: the head of the bias, ``(O, R)``, or None, set to zero.
        base_weight: ``(O, I)``.
        base_bias: ``(O,)`` or None, set to zero.
        z_second_moment: checked, but without effect, because the head is zero.
        nonlinearity: the function that follows the layer, by its name in :func:`torch.nn.init.calculate_gain`.
        fans: how many inputs an output sums, and how many outputs an input reaches; by default I and O.

    Raises:
        ValueError: ``base_weight`` is None, ``nonlinearity`` is unknown, or ``z_second_moment`` is not positive and
            finite.

    References:
        Beck, Jackson, Vuorio, Whiteson, "Hypernetworks in Meta-Reinforcement Learning", CoRL 2022,
        `arXiv 2210.11348 <https://arxiv.org/abs/2210.11348>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import bias_hyper_
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
    _uniform_(base_weight, _gain_sq(nonlinearity) / max(1, (fans or _fans(base_weight))[0]))


INITS: dict[str, Callable[..., None]] = {
    "hyperfan_in": hyperfan_in_,
    "hyperfan_out": hyperfan_out_,
    "bias_hyper": bias_hyper_,
}


def adapt_to_map_(weight_map: object, weight: Tensor, bias: Tensor | None, base_weight: Tensor | None) -> None:
    """Change an initialised layer so that its mapped weights, not those before the map, have the second moment.

    A relu of a symmetric P halves E[P²]. `"normalize"` gives a row the norm 1, the whole second moment, so that nothing
    is left to the bias. `"abs"` changes no second moment, and `"tanh"` almost none of small weights.
    """
    if weight_map == "relu":
        for t in (weight, base_weight):
            if t is not None:
                with torch.no_grad():
                    t.mul_(math.sqrt(2))
    if weight_map == "normalize":
        _zero_(bias)
