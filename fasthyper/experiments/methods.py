"""What is compared: ways to let a condition I decide what a small network does to x.

    hypernetwork   g(x; f(I))       all weights of g are generated
    embedding      q(x, e(I))       q is given an encoding of I beside x
    film           q(x; γ(I), β(I)) hidden units of a shared q are scaled and shifted
    biases         q(x; b(I))       only the biases of a shared q are generated
    deeponet       <t(x), b(I)>     only the weights of the last layer are generated
    plain          p(x, I)          one network of both

All are made of one `Architecture`, so that they differ in nothing else. Two more are the embedding method with
other budgets: as many parameters in total as the hypernetwork trains, and as much training time as it takes.
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
EQUAL_PARAMETERS = "embedding_parameters"
EQUAL_TIME = "embedding_time"
TENFOLD = "embedding_tenfold"
FILM = "film"
BIASES = "biases"
DEEPONET = "deeponet"
PLAIN = "plain"
PAIR = "pair"

ALL = (HYPERNETWORK, EMBEDDING, EQUAL_PARAMETERS, EQUAL_TIME, FILM, BIASES)
"""The paper's two methods and what a reviewer asks for next."""

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Architecture:
    """The sizes of both parts: context (f or e, which see I) and primary (g or q, which see x)."""

    cond: int
    """Numbers in I."""
    x: int
    """Numbers in x."""
    out: int
    """Outputs of the primary."""
    context: tuple[int, ...]
    """Hidden layers of f and e; their last layer gives what the method needs."""
    hidden: tuple[int, ...]
    """Hidden layers of g and q."""
    embedding: int = 0
    """E, numbers that e gives."""
    activation: str = "relu"
    """Of g and q."""
    context_activation: str = "relu"
    """Of f and e."""
    generated_bias: bool = False
    """Whether f generates biases of g, too."""
    embed_context: tuple[int, ...] | None = None
    """Hidden layers of e where they are not those of f."""


class Counts(NamedTuple):
    """Numbers of trainable parameters, but `primary` counts generated weights, too."""

    context: int
    primary: int
    trainable: int


@dataclass(frozen=True)
class Method:
    """One way to use I, and how it is drawn (Okabe and Ito's colours, so that none merge for the colour-blind)."""

    label: str
    build: Callable[[Architecture], nn.Module]
    colour: str
    marker: str
    as_long_as: str | None = None
    """It is trained for as many steps as fit into the training time of this method."""
    embeds: bool = False
    """Whether E, the dimension of an embedding, is of any meaning to it."""


def hypernetwork(a: Architecture) -> Hypernetwork:
    """`g(x; f(I))`: f's hidden layers are the trunk, its last layer the heads of g's layers."""
    trunk = _context(a, a.context)
    sizes = (a.x, *a.hidden, a.out)
    layers = (_generated(i, o, _last(a.cond, a.context), a.generated_bias) for i, o in pairwise(sizes))
    return Hypernetwork(trunk, _between(layers, a.activation))


def embedding(a: Architecture) -> EmbeddingNetwork:
    """`q(x, e(I))`: e gives E numbers, and q takes them beside x."""
    hidden = a.context if a.embed_context is None else a.embed_context
    embed = nn.Sequential(*_context(a, hidden), nn.Linear(_last(a.cond, hidden), a.embedding))
    return EmbeddingNetwork(embed, _network((a.x + a.embedding, *a.hidden, a.out), a.activation))


def embedding_tenfold(a: Architecture) -> EmbeddingNetwork:
    """The embedding method with ten times the numbers."""
    return embedding(replace(a, embedding=10 * a.embedding))


def embedding_of_equal_size(a: Architecture) -> EmbeddingNetwork:
    """The embedding method with e as wide as makes all its parameters as many as the hypernetwork trains."""
    hidden = a.context if a.embed_context is None else a.embed_context
    if not hidden:
        raise ValueError("context: e has no hidden layer whose width could be fitted")

    def of_width(width: int) -> Architecture:
        return replace(a, embed_context=(width,) * len(hidden))

    def size(build: Callable[[Architecture], nn.Module], b: Architecture) -> int:
        with torch.device("meta"):
            return counts(build(b)).trainable

    target = size(hypernetwork, a)
    low, high = 1, 2
    while size(embedding, of_width(high)) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(embedding, of_width(middle)) <= target else (low, middle)
    width = min((low, high), key=lambda w: abs(size(embedding, of_width(w)) - target))
    return embedding(of_width(width))


def deeponet(a: Architecture) -> Hypernetwork:
    """`Σ_p b_p(I) t_p(x)`: the shared trunk net ends in p functions of x, the branch gives the weights of their sum.

    Lu, Jin, Pang, Zhang, Karniadakis, Nature Machine Intelligence 2021 (arXiv 1910.03193).
    """
    branch = _context(a, a.context)
    shared = _network((a.x, *a.hidden), a.activation)
    last = _generated(a.hidden[-1], a.out, _last(a.cond, a.context), bias=False)
    return Hypernetwork(branch, nn.Sequential(*shared, ACTIVATIONS[a.activation](), last))


def plain(a: Architecture) -> Plain:
    """One network of x and I together, as wide and deep as the primary."""
    return Plain(_network((a.x + a.cond, *a.hidden, a.out), a.activation))


class Plain(nn.Module):
    """`p([x, I])` of one network; I may have no numbers at all."""

    def __init__(self, primary: nn.Module) -> None:
        super().__init__()
        self.primary = primary

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """`(B, *, I)` and `(B, C)` to `(B, *, O)`."""
        return self.primary(torch.cat([x, _beside(cond, x).expand(*x.shape[:-1], -1)], dim=-1))


class Pair(nn.Module):
    """Two networks of x that differ in their initial weights alone; their outputs are stacked, `(B, 2, O)`."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.primary = nn.ModuleList([first, second])

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Both answers to x; cond is not looked at."""
        return torch.stack([network(x) for network in self.primary], dim=1)


class Modulated(nn.Module):
    """A primary shared by all instances, whose units are scaled and shifted by what `context` says of I.

    FiLM: Perez, Strub, de Vries, Dumoulin, Courville, AAAI 2018 (arXiv 1709.07871).

    Args:
        a: the sizes.
        film: scale and shift the hidden units; otherwise shift all units, the outputs included.
    """

    def __init__(self, a: Architecture, film: bool) -> None:
        super().__init__()
        sizes = (a.x, *a.hidden, a.out)
        self.film = film
        self.units = a.hidden if film else sizes[1:]
        numbers = sum(self.units) * (2 if film else 1)
        self.context = nn.Sequential(*_context(a, a.context), nn.Linear(_last(a.cond, a.context), numbers))
        self.primary = nn.ModuleList(nn.Linear(i, o, bias=film) for i, o in pairwise(sizes))
        self.activation = ACTIVATIONS[a.activation]()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """`(B, *, I)` and `(B, C)` to `(B, *, O)`."""
        numbers = _beside(self.context(cond), x)
        if self.film:
            scales, numbers = numbers.chunk(2, dim=-1)
            by_layer = list(zip(scales.split(self.units, dim=-1), numbers.split(self.units, dim=-1), strict=True))
        else:
            by_layer = [(None, shift) for shift in numbers.split(self.units, dim=-1)]
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
    EQUAL_PARAMETERS: Method("embedding, equal parameters", embedding_of_equal_size, "#E69F00", "D", embeds=True),
    EQUAL_TIME: Method("embedding, equal time", embedding, "#CC79A7", "v", HYPERNETWORK, embeds=True),
    TENFOLD: Method("embedding, E ten times", embedding_tenfold, "#882255", "<", embeds=True),
    FILM: Method("FiLM q(x; γ(I), β(I))", lambda a: Modulated(a, film=True), "#009E73", "^"),
    BIASES: Method("biases only q(x; b(I))", lambda a: Modulated(a, film=False), "#56B4E9", "P"),
    DEEPONET: Method("DeepONet ⟨t(x), b(I)⟩", deeponet, "#000000", "X"),
    PLAIN: Method("one network p(x, I)", plain, "#7F7F7F", "*"),
    PAIR: Method("two networks", lambda a: Pair(_alone(a), _alone(a)), "#0072B2", "o"),
}


def counts(model: nn.Module) -> Counts:
    """N_f or N_e, N_g or N_q, and all that is trained."""
    if isinstance(model, Hypernetwork):
        report = parameter_report(model)
        assert report.n_f is not None
        assert report.n_g is not None
        assert report.ungenerated is not None
        return Counts(report.n_f, report.n_g + report.ungenerated, report.trainable)
    primary = _size(model.primary)
    trainable = _size(model)
    return Counts(trainable - primary, primary, trainable)


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _generated(inputs: int, outputs: int, cond: int, bias: bool) -> HyperLinear:
    """A layer whose head is initialised as torch does an `nn.Linear(cond, …)`: f's last layer is one to the paper.

    There weights and bias are uniform within ±1/√fan_in, so that several heads are the same as one.
    """
    layer = HyperLinear(inputs, outputs, cond, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1 / math.sqrt(cond), 1 / math.sqrt(cond))
    return layer


def _context(a: Architecture, hidden: Sequence[int]) -> nn.Sequential:
    """The hidden layers of f or e, each with its activation."""
    layers = (m for i, o in pairwise((a.cond, *hidden)) for m in (nn.Linear(i, o), ACTIVATIONS[a.context_activation]()))
    return nn.Sequential(*layers)


def _network(sizes: Sequence[int], activation: str) -> nn.Sequential:
    return _between((nn.Linear(i, o) for i, o in pairwise(sizes)), activation)


def _alone(a: Architecture) -> nn.Sequential:
    return _network((a.x, *a.hidden, a.out), a.activation)


def _between(layers: Any, activation: str) -> nn.Sequential:
    """The layers with an activation between any two."""
    first, *others = layers
    return nn.Sequential(first, *(m for layer in others for m in (ACTIVATIONS[activation](), layer)))


def _last(cond: int, hidden: Sequence[int]) -> int:
    return hidden[-1] if hidden else cond


def _beside(per_instance: Tensor, x: Tensor) -> Tensor:
    """`(B, C)` with as many dimensions as x, `(B, *, I)`."""
    return per_instance.view(len(per_instance), *[1] * (x.ndim - 2), per_instance.shape[-1])
