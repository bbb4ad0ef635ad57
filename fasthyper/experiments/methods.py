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
    embedding_wide_q   with a wide q, and an E as large as a hidden layer of e
    embedding_deep_q   the same with two more hidden layers in q
    film_wide          FiLM with a wide q
    attention          q(x, a(x, I)), where a attends from x to parts of I
    plain_wide         p(x, I) with as many hidden layers as f and g together

Variants of the embedding method are trained with as many flops as the hypernetwork (embedding_flops), or have an E that
is ten times as large (embedding_tenfold). A pair is two equal networks of x alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthyper.nn import EmbeddingNetwork, HyperLinear, Hypernetwork, parameter_report

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
PLAIN = "plain"
PLAIN_WIDE = "plain_wide"
PAIR = "pair"

EQUAL_TOTAL = (HYPERNETWORK, WIDE_E, WIDE_Q, DEEP_Q, FILM_WIDE, ATTENTION, PLAIN_WIDE)
"""The methods that train equally many parameters in total: those of a frontier."""

ALL = (HYPERNETWORK, EMBEDDING, EQUAL_FLOPS, FILM, BIASES, *EQUAL_TOTAL[1:])
"""All methods that suit any task."""

INITIALISATIONS = ("torch", "ours", "hyperfan", "magnitude_invariant")
"""Of generated weights: the head as a linear layer of torch, `HyperLinear`'s own, Chang et al., and Ortiz et al."""

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Architecture:
    """The sizes of both networks: the context network (f or e), a function of I, and the primary (g or q), one of x.

    Attributes:
        cond: features of I.
        x: features of x.
        out: outputs of the primary.
        context: widths of the hidden layers of f and e. The size of their last layer depends on the method.
        hidden: widths of the hidden layers of g and q.
        embedding: E, the outputs of e.
        activation: of g and q: `"relu"`, `"elu"` or `"tanh"`.
        context_activation: of f and e.
        generated_bias: whether f also generates biases of g.
        embed_context: widths of the hidden layers of e; None: as in `context`.
        size: the trained parameters in total, as a multiple of those of the hypernetwork at size 1 (for methods that
            train as many as it), or of the method's own at size 1 (for the others).
        initialisation: of generated weights, one of `INITIALISATIONS`.
    """

    cond: int
    x: int
    out: int
    context: tuple[int, ...]
    hidden: tuple[int, ...]
    embedding: int = 0
    activation: str = "relu"
    context_activation: str = "relu"
    generated_bias: bool = False
    embed_context: tuple[int, ...] | None = None
    size: float = 1.0
    initialisation: str = "torch"


class Counts(NamedTuple):
    """Numbers of trainable parameters. `primary` includes the generated weights of one instance."""

    context: int
    primary: int
    trainable: int


def widen_context(a: Architecture, width: int) -> Architecture:
    """Return the sizes with hidden layers of this width in f and e."""
    embed = None if a.embed_context is None else (width,) * len(a.embed_context)
    return replace(a, context=(width,) * len(a.context), embed_context=embed)


def widen_primary(a: Architecture, width: int, more: int = 0) -> Architecture:
    """Return the sizes with hidden layers of this width in q, `more` of them, and an E as large as a layer of e."""
    return replace(a, hidden=(width,) * (len(a.hidden) + more), embedding=_context_size(a.cond, a.context))


@dataclass(frozen=True)
class Method:
    """One way to use I.

    Attributes:
        label: its name in figures and tables.
        build: returns its model. Call `Method.model` instead, which fits the width.
        colour: of its line in figures, from the palette of Okabe and Ito, which colour-blind readers can distinguish.
        marker: of its line in figures.
        widen: returns the sizes of a width: the one that is fitted to a number of trained parameters.
        equal: whether it trains as many parameters as the hypernetwork.
        flops_of: another method. This method is trained for as many steps as fit into the flops of the other.
        embeds: whether the model depends on E.
    """

    label: str
    build: Callable[[Architecture], nn.Module]
    colour: str
    marker: str
    widen: Callable[[Architecture, int], Architecture] = widen_context
    equal: bool = False
    flops_of: str | None = None
    embeds: bool = False

    def model(self, a: Architecture) -> nn.Module:
        """Return the model, as large as `a.size` says.

        Raises:
            ValueError: no width changes the number of trained parameters.
        """
        if not self.equal and a.size == 1:
            return self.build(a)
        whole = replace(a, size=1.0)
        target = a.size * _trained(hypernetwork if self.equal else self.build, whole)
        return self.build(
            self.widen(whole, _fitted_width(lambda width: _trained(self.build, self.widen(whole, width)), target))
        )


def hypernetwork(a: Architecture) -> Hypernetwork:
    """Build `g(x; f(I))`: the hidden layers of f are the trunk, its last layer is the heads of the layers of g."""
    trunk = _hidden_layers(a, a.context)
    sizes = (a.x, *a.hidden, a.out)
    layers = (_generated_layer(i, o, _context_size(a.cond, a.context), a.generated_bias) for i, o in pairwise(sizes))
    return Hypernetwork(trunk, _with_activations(layers, a.activation))


def embedding(a: Architecture) -> EmbeddingNetwork:
    """Build `q(x, e(I))`: q gets x and the E outputs of e."""
    hidden = a.context if a.embed_context is None else a.embed_context
    embed = nn.Sequential(*_hidden_layers(a, hidden), nn.Linear(_context_size(a.cond, hidden), a.embedding))
    return EmbeddingNetwork(embed, _network((a.x + a.embedding, *a.hidden, a.out), a.activation))


def embedding_tenfold(a: Architecture) -> EmbeddingNetwork:
    """Build the embedding method with an E that is ten times as large."""
    return embedding(replace(a, embedding=10 * a.embedding))


def attention(a: Architecture) -> Attention:
    """Build `q(x, a(x, I))`."""
    return Attention(a)


def deeponet(a: Architecture) -> Hypernetwork:
    """Build `Σ_p b_p(I) t_p(x)`: a shared network computes functions t_p of x, the branch the weights b_p of their sum.

    Lu, Jin, Pang, Zhang, Karniadakis, Nature Machine Intelligence 2021 (arXiv 1910.03193).
    """
    branch = _hidden_layers(a, a.context)
    shared = _network((a.x, *a.hidden), a.activation)
    last = _generated_layer(a.hidden[-1], a.out, _context_size(a.cond, a.context), bias=False)
    return Hypernetwork(branch, nn.Sequential(*shared, ACTIVATIONS[a.activation](), last))


def plain(a: Architecture) -> Plain:
    """Build one network of x and I together, as wide and deep as the primary."""
    return Plain(_network((a.x + a.cond, *a.hidden, a.out), a.activation))


class Plain(nn.Module):
    """One network `p([x, I])`. I may have no features."""

    def __init__(self, primary: nn.Module) -> None:
        super().__init__()
        self.primary = primary

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return `(B, *, O)` for x `(B, *, I)` and cond `(B, C)`."""
        return self.primary(torch.cat([x, _over_points(cond, x).expand(*x.shape[:-1], -1)], dim=-1))


class Attention(nn.Module):
    """A network of x and of what x finds in I: I is cut into parts, and x attends to them.

    Vaswani et al., Attention Is All You Need, NeurIPS 2017 (arXiv 1706.03762).
    """

    PARTS, HEADS = 16, 4

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        width = a.hidden[0]
        self.parts = min(self.PARTS, a.cond)
        features = math.ceil(a.cond / self.parts)
        self.missing = self.parts * features - a.cond
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(self.parts, width) / math.sqrt(width))
        self.ask = nn.Linear(a.x, width)
        self.attend = nn.MultiheadAttention(width, math.gcd(self.HEADS, width), batch_first=True)
        self.primary = _network((a.x + width, *a.hidden, a.out), a.activation)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return `(B, *, O)` for x `(B, *, I)` and cond `(B, C)`."""
        parts = nn.functional.pad(cond, (0, self.missing)).unflatten(1, (self.parts, -1))
        keys = self.embed(parts) + self.position
        points = x.view(len(x), -1, x.shape[-1])
        found, _ = self.attend(self.ask(points), keys, keys, need_weights=False)
        return self.primary(torch.cat([points, found], dim=-1)).view(*x.shape[:-1], -1)


class Pair(nn.Module):
    """Two networks of x that differ only in their initial weights. Their outputs are stacked, `(B, 2, O)`."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.primary = nn.ModuleList([first, second])

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return the outputs of both networks for x; cond is ignored."""
        return torch.stack([network(x) for network in self.primary], dim=1)


class Modulated(nn.Module):
    """A primary shared by all instances. Outputs of `context`, a network of I, scale and shift its units.

    FiLM: Perez, Strub, de Vries, Dumoulin, Courville, AAAI 2018 (arXiv 1709.07871).

    Args:
        a: the sizes.
        film: scale and shift the hidden units. Otherwise shift all units, including the outputs.
    """

    def __init__(self, a: Architecture, film: bool) -> None:
        super().__init__()
        sizes = (a.x, *a.hidden, a.out)
        self.film = film
        self.units = a.hidden if film else sizes[1:]
        outputs = sum(self.units) * (2 if film else 1)
        self.context = nn.Sequential(
            *_hidden_layers(a, a.context), nn.Linear(_context_size(a.cond, a.context), outputs)
        )
        self.primary = nn.ModuleList(nn.Linear(i, o, bias=film) for i, o in pairwise(sizes))
        self.activation = ACTIVATIONS[a.activation]()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return `(B, *, O)` for x `(B, *, I)` and cond `(B, C)`."""
        shifts = _over_points(self.context(cond), x)
        if self.film:
            scales, shifts = shifts.chunk(2, dim=-1)
            by_layer = list(zip(scales.split(self.units, dim=-1), shifts.split(self.units, dim=-1), strict=True))
        else:
            by_layer = [(None, shift) for shift in shifts.split(self.units, dim=-1)]
        for number, layer in enumerate(self.primary):
            x = layer(x)
            if number < len(by_layer):
                scale, shift = by_layer[number]
                x = x + shift if scale is None else torch.addcmul(x + shift, x, scale)
            if number + 1 < len(self.primary):
                x = self.activation(x)
        return x


METHODS: Mapping[str, Method] = {
    HYPERNETWORK: Method("hypernetwork g(x; f(I))", hypernetwork, "#0072B2", "o"),
    EMBEDDING: Method("embedding q(x, e(I))", embedding, "#D55E00", "s", embeds=True),
    EQUAL_FLOPS: Method("embedding, equal flops", embedding, "#CC79A7", "v", flops_of=HYPERNETWORK, embeds=True),
    WIDE_E: Method("embedding, wide e", embedding, "#E69F00", "D", equal=True, embeds=True),
    WIDE_Q: Method("embedding, wide q", embedding, "#D55E00", "p", widen_primary, equal=True),
    DEEP_Q: Method("embedding, deep q", embedding, "#882255", "h", lambda a, w: widen_primary(a, w, 2), equal=True),
    FILM_WIDE: Method("FiLM, wide q", lambda a: Modulated(a, film=True), "#009E73", "^", widen_primary, equal=True),
    ATTENTION: Method("attention q(x, a(x, I))", attention, "#56B4E9", "d", widen_primary, equal=True),
    PLAIN_WIDE: Method(
        "one network p(x, I), wide", plain, "#7F7F7F", "*", lambda a, w: widen_primary(a, w, len(a.context)), equal=True
    ),
    TENFOLD: Method("embedding, E ten times", embedding_tenfold, "#882255", "<", embeds=True),
    FILM: Method("FiLM q(x; γ(I), β(I))", lambda a: Modulated(a, film=True), "#009E73", "^"),
    BIASES: Method("biases only q(x; b(I))", lambda a: Modulated(a, film=False), "#56B4E9", "P"),
    DEEPONET: Method("DeepONet ⟨t(x), b(I)⟩", deeponet, "#000000", "X"),
    PLAIN: Method("one network p(x, I)", plain, "#7F7F7F", "*"),
    PAIR: Method("two networks", lambda a: Pair(_network_of_x(a), _network_of_x(a)), "#0072B2", "o"),
}


def _trained(build: Callable[[Architecture], nn.Module], a: Architecture) -> int:
    """Return the number of trained parameters of a model."""
    with torch.device("meta"):
        return counts(build(a)).trainable


def _fitted_width(size: Callable[[int], int], target: float) -> int:
    """Return the width whose size, an increasing function, is nearest to the target."""
    if size(1) == size(2):
        raise ValueError("context: there is no hidden layer whose width could be fitted")
    low, high = 1, 2
    while size(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= target else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - target))


def counts(model: nn.Module) -> Counts:
    """Return N_f or N_e, N_g or N_q, and the number of all trainable parameters."""
    if isinstance(model, Hypernetwork):
        parameters = parameter_report(model)
        assert parameters.n_f is not None
        assert parameters.n_g is not None
        assert parameters.ungenerated is not None
        return Counts(parameters.n_f, parameters.n_g + parameters.ungenerated, parameters.trainable)
    primary = _trainable(model.primary)
    trainable = _trainable(model)
    return Counts(trainable - primary, primary, trainable)


def _trainable(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _generated_layer(inputs: int, outputs: int, cond: int, bias: bool) -> HyperLinear:
    """Return a layer whose head is initialised like an `nn.Linear(cond, …)`: in the paper, the last layer of f is one.

    Its weights and biases are uniform within ±1/√cond. Several heads have the same distribution as one large layer.
    """
    layer = HyperLinear(inputs, outputs, cond, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1 / math.sqrt(cond), 1 / math.sqrt(cond))
    return layer


def _hidden_layers(a: Architecture, hidden: Sequence[int]) -> nn.Sequential:
    """Return the hidden layers of f or e, each with its activation."""
    layers = (m for i, o in pairwise((a.cond, *hidden)) for m in (nn.Linear(i, o), ACTIVATIONS[a.context_activation]()))
    return nn.Sequential(*layers)


def _network(sizes: Sequence[int], activation: str) -> nn.Sequential:
    return _with_activations((nn.Linear(i, o) for i, o in pairwise(sizes)), activation)


def _network_of_x(a: Architecture) -> nn.Sequential:
    return _network((a.x, *a.hidden, a.out), a.activation)


def _with_activations(layers: Any, activation: str) -> nn.Sequential:
    """Return the layers with an activation between any two."""
    first, *others = layers
    return nn.Sequential(first, *(m for layer in others for m in (ACTIVATIONS[activation](), layer)))


def _context_size(cond: int, hidden: Sequence[int]) -> int:
    return hidden[-1] if hidden else cond


def _over_points(per_instance: Tensor, x: Tensor) -> Tensor:
    """Return `(B, C)` with as many dimensions as x, `(B, *, I)`."""
    return per_instance.view(len(per_instance), *[1] * (x.ndim - 2), per_instance.shape[-1])
