"""The methods that are compared: ways to condition a small network of x on I.

    hypernetwork   g(x; f(I))       all weights of g are generated
    embedding      q(x, e(I))       q gets an encoding of I in addition to x
    film           q(x; γ(I), β(I)) the hidden units of a shared q are scaled and shifted
    biases         q(x; b(I))       only the biases of a shared q are generated
    deeponet       <t(x), b(I)>     only the weights of the last layer are generated
    plain          p(x, I)          one network of x and I together

All are built from the same `Architecture` and differ in nothing else. Some methods train as many parameters in total as
the hypernetwork, and put them into different parts:

    embedding_wide_e   the embedding method with a wide e
    embedding_wide_q   with a wide q, and an E as large as the last hidden layer of e
    embedding_deep_q   the same with two more hidden layers in q
    film_wide          FiLM with a wide q
    attention          q(x, a(x, I)), where x attends to vectors that I gives, with a wide q
    plain_wide         p(x, I) with as many hidden layers as f and g together
    deeponet_wide      DeepONet with a wide t

Variants of the embedding method are trained with as many flops as the hypernetwork (embedding_flops), or have an E that
is ten times as large (embedding_tenfold). A pair is two equal networks of x alone. Two hypernetworks in the
parametrisation of infinite width have a wide f (wide_f), or a wide g too (wide_f_and_g).

How a total is reached. One part of each method is fitted: its hidden layers are made wider or narrower, all in the same
proportion, until the total is nearest to the target. The other parts keep the sizes of the architecture, but take at
most half of the target: if they would take more, the width of e (of FiLM's or attention's network of I), or E
if e is the fitted part, is reduced. It is also reduced where the steps of the fitted width are too coarse.

    fitted               methods                                     reduced
    f, e                 the hypernetwork, FiLM, biases, DeepONet    -
    e                    embedding, embedding_wide_e                 E
    q                    embedding_wide_q, embedding_deep_q          e, and with it E
    q                    film_wide, attention                        the network of I
    p                    plain, plain_wide, a pair                   -
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fasthyper.experiments import networks
from fasthyper.experiments.networks import Architecture
from fasthyper.experiments.wide import WideHypernetwork
from fasthyper.nn import Hypernetwork, parameter_report

HYPERNETWORK = "hypernetwork"
EMBEDDING = "embedding"
WIDE_E = "embedding_wide_e"
WIDE_Q = "embedding_wide_q"
DEEP_Q = "embedding_deep_q"
EQUAL_FLOPS = "embedding_flops"
TENFOLD = "embedding_tenfold"
FILM = "film"
FILM_WIDE = "film_wide"
ATTENTION = "attention"
BIASES = "biases"
DEEPONET = "deeponet"
DEEPONET_WIDE = "deeponet_wide"
PLAIN = "plain"
PLAIN_WIDE = "plain_wide"
PAIR = "pair"
WIDE_F = "wide_f"
WIDE_BOTH = "wide_f_and_g"

EQUAL_TOTAL = (HYPERNETWORK, WIDE_E, WIDE_Q, DEEP_Q, FILM_WIDE, ATTENTION, PLAIN_WIDE)
"""The methods that train equally many parameters in total: those of a frontier."""

ALL = (HYPERNETWORK, EMBEDDING, EQUAL_FLOPS, FILM, BIASES, *EQUAL_TOTAL[1:])
"""All methods that suit any task."""

CLOSE = 0.01
"""The relative difference from a target total up to which no part but the fitted one is changed."""


class Counts(NamedTuple):
    """Numbers of trainable parameters. `primary` includes the generated weights of one instance."""

    context: int
    primary: int
    trainable: int


@dataclass(frozen=True)
class Widths:
    """The widths of some layers, changed together by one integer: their steps.

    Each width is in proportion to that of the architecture. If all are equal, one more step adds one unit to one layer.

    Attributes:
        field: the attribute of `Architecture` that has these widths.
        of: returns the widths of an architecture.
    """

    field: str
    of: Callable[[Architecture], tuple[int, ...]]

    def steps(self, a: Architecture) -> int:
        """Return the steps at which the widths are those of the architecture: 0 without layers."""
        widths = self.of(a)
        return len(widths) * max(widths, default=0)

    def set(self, a: Architecture, steps: int) -> Architecture:
        """Return the sizes after so many steps. No width is below 1."""
        widths = self.of(a)
        layers, widest = len(widths), max(widths, default=0)
        new = tuple(max(1, (width * steps // widest + i) // layers) for i, width in enumerate(widths))
        value: Any = new[0] if self.field == "embedding" else new
        return replace(a, **{self.field: value})


OF_F = Widths("context", lambda a: a.context)
OF_E = Widths("embed_context", lambda a: a.embed_hidden)
OF_Q = Widths("hidden", lambda a: a.hidden)
OF_DEEP_Q = Widths("hidden", lambda a: a.hidden[:1] * 2 + a.hidden)
OF_P = Widths("hidden", lambda a: (1,) * (len(a.context) + len(a.hidden)))
EMBEDDING_SIZE = Widths("embedding", lambda a: (a.embedding,) if a.embedding else ())


@dataclass(frozen=True)
class Method:
    """One way to use I.

    Attributes:
        label: its name in figures and tables.
        build: returns its model. Call `Method.model` instead, which fits the width.
        colour: of its line in figures, from the palette of Okabe and Ito, which colour-blind readers can distinguish.
        marker: of its line in figures.
        fitted: the widths that are fitted to a number of trained parameters.
        reduced: the widths that are reduced where they take more than half of it.
        equal: whether it trains as many parameters as the hypernetwork.
        flops_of: another method. This method is trained for as many steps as fit into the flops of the other.
        embeds: whether the model depends on E.
    """

    label: str
    build: Callable[[Architecture], nn.Module]
    colour: str
    marker: str
    fitted: Widths = OF_F
    reduced: Widths | None = None
    equal: bool = False
    flops_of: str | None = None
    embeds: bool = False

    def model(self, a: Architecture) -> nn.Module:
        """Return the model, as large as `a.size` says.

        An `equal` method trains as many parameters as the hypernetwork of this size; any other method `a.size` times as
        many as at size 1. The total is the nearest that widths, which are integers, allow.

        Raises:
            ValueError: no width changes the total, or the smallest total is more than 2 % above the target.
        """
        return self.build(self.sizes(a))

    def sizes(self, a: Architecture) -> Architecture:
        """Return the sizes whose widths are fitted. Raises what `model` raises."""
        if not self.equal and a.size == 1:
            return a
        whole = replace(a, size=1.0)
        if self.equal:
            target = float(trained(METHODS[HYPERNETWORK].build, METHODS[HYPERNETWORK].sizes(a)))
        else:
            target = a.size * trained(self.build, whole)
        return _fitted(self, whole, target)


def _wide(a: Architecture, hidden: int) -> WideHypernetwork:
    return WideHypernetwork(a.cond, a.x, a.out, a.context, hidden)


METHODS: Mapping[str, Method] = {
    HYPERNETWORK: Method("hypernetwork g(x; f(I))", networks.hypernetwork, "#0072B2", "o"),
    EMBEDDING: Method("embedding q(x, e(I))", networks.embedding, "#D55E00", "s", OF_E, EMBEDDING_SIZE, embeds=True),
    EQUAL_FLOPS: Method(
        "embedding, equal flops",
        networks.embedding,
        "#CC79A7",
        "v",
        OF_E,
        EMBEDDING_SIZE,
        flops_of=HYPERNETWORK,
        embeds=True,
    ),
    WIDE_E: Method(
        "embedding, wide e", networks.embedding, "#E69F00", "D", OF_E, EMBEDDING_SIZE, equal=True, embeds=True
    ),
    WIDE_Q: Method("embedding, wide q", networks.embedding_narrow, "#CC79A7", "p", OF_Q, OF_E, equal=True),
    DEEP_Q: Method("embedding, deep q", networks.embedding_narrow, "#882255", "h", OF_DEEP_Q, OF_E, equal=True),
    FILM_WIDE: Method("FiLM, wide q", networks.film, "#009E73", ">", OF_Q, OF_F, equal=True),
    ATTENTION: Method("attention q(x, a(x, I))", networks.Attention, "#56B4E9", "d", OF_Q, OF_F, equal=True),
    PLAIN_WIDE: Method("one network p(x, I), wide", networks.plain, "#7F7F7F", "*", OF_P, equal=True),
    TENFOLD: Method(
        "embedding, E ten times", networks.embedding_tenfold, "#882255", "<", OF_E, EMBEDDING_SIZE, embeds=True
    ),
    FILM: Method("FiLM q(x; γ(I), β(I))", networks.film, "#009E73", "^"),
    BIASES: Method("biases only q(x; b(I))", networks.biases, "#56B4E9", "P"),
    DEEPONET: Method("DeepONet ⟨t(x), b(I)⟩", networks.deeponet, "#000000", "X"),
    DEEPONET_WIDE: Method("DeepONet, wide t", networks.deeponet, "#000000", "8", OF_Q, OF_F, equal=True),
    PLAIN: Method("one network p(x, I)", networks.plain, "#7F7F7F", "*", OF_Q),
    WIDE_F: Method("wide f, small g", lambda a: _wide(a, a.hidden[-1]), "#D55E00", "s"),
    WIDE_BOTH: Method("wide f and g", lambda a: _wide(a, a.context[-1]), "#0072B2", "o"),
    PAIR: Method("two networks", networks.pair, "#0072B2", "o", OF_Q),
}


def trained(build: Callable[[Architecture], nn.Module], a: Architecture) -> int:
    """Return the number of trained parameters of a model. Allocates none of them."""
    with torch.device("meta"):
        return counts(build(a)).trainable


@lru_cache(maxsize=1024)  # the runs of all seeds need the same sizes
def _fitted(method: Method, a: Architecture, target: float) -> Architecture:
    """Return the sizes of a method whose total is nearest to the target."""
    fitted, reduced = method.fitted, method.reduced

    def total(a: Architecture) -> int:
        return trained(method.build, a)

    def far(a: Architecture) -> float:
        return abs(total(a) - target)

    if total(fitted.set(a, 1)) == total(fitted.set(a, 2 * max(1, fitted.steps(a)))):
        raise ValueError(f"{fitted.field}: {method.label} needs a hidden layer there, whose width is fitted")
    kept = a
    if reduced is not None and reduced.steps(a):
        small = fitted.set(a, 1)
        steps = _most(lambda steps: total(reduced.set(small, steps)) <= target / 2, reduced.steps(a))
        kept = reduced.set(a, steps) if steps < reduced.steps(a) else a
    if total(fitted.set(kept, 1)) > 1.02 * target:
        raise ValueError(
            f"size: {method.label} trains at least {total(fitted.set(kept, 1))} parameters, more than {target:.0f}"
        )
    below = _most(lambda steps: total(fitted.set(kept, steps)) <= target)
    nearest = min((fitted.set(kept, below + more) for more in (0, 1)), key=far)
    if far(nearest) <= CLOSE * target or reduced is None:
        return nearest
    above = fitted.set(kept, below + 1)
    less = _most(lambda steps: total(reduced.set(above, steps)) <= target, reduced.steps(kept))
    return min(nearest, *(reduced.set(above, less + more) for more in (0, 1)), key=far)


def _most(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """Return the largest number from 1 to the limit that fits, if smaller ones do as well; 1 if none fits."""
    low, high = 1, 2
    while (limit is None or high <= limit) and fits(high):
        low, high = high, 2 * high
    high = high if limit is None else min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def counts(model: nn.Module) -> Counts:
    """Return N_f or N_e, N_g or N_q, and the number of all trainable parameters."""
    if isinstance(model, Hypernetwork):
        parameters = parameter_report(model)
        assert parameters.n_f is not None
        assert parameters.n_g is not None
        assert parameters.ungenerated is not None
        return Counts(parameters.n_f, parameters.n_g + parameters.ungenerated, parameters.trainable)
    if isinstance(model, WideHypernetwork):
        return Counts(_trainable(model), model.generated, _trainable(model))
    primary = _trainable(model.primary)
    trainable = _trainable(model)
    return Counts(trainable - primary, primary, trainable)


def _trainable(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
