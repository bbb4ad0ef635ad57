"""The methods that are compared: ways to condition a small network of x on I.

    hypernetwork   g(x; f(I))       all weights of g are generated
    embedding      q(x, e(I))       q gets an encoding of I in addition to x
    film           q(x; γ(I), β(I)) the hidden units of a shared q are scaled and shifted
    biases         q(x; b(I))       only the biases of a shared q are generated
    deeponet       <t(x), b(I)>     only the weights of the last layer are generated
    plain          p(x, I)          one network of x and I together

All are built from the same `Architecture` and differ in nothing else. Variants of the embedding method have as many
trained parameters in total as the hypernetwork (embedding_parameters), as much training time (embedding_time), or an E
that is ten times as large (embedding_tenfold). A pair is two equal networks of x alone.
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
"""The two methods of the paper and the four that answer the usual objections to comparing only these."""

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


class Counts(NamedTuple):
    """Numbers of trainable parameters. `primary` includes the generated weights of one instance."""

    context: int
    primary: int
    trainable: int


@dataclass(frozen=True)
class Method:
    """One way to use I.

    Attributes:
        label: its name in figures and tables.
        build: returns its model.
        colour: of its line in figures, from the palette of Okabe and Ito, which colour-blind readers can distinguish.
        marker: of its line in figures.
        as_long_as: another method. This method is trained for as many steps as fit into the training time of the other.
        embeds: whether the model depends on E.
    """

    label: str
    build: Callable[[Architecture], nn.Module]
    colour: str
    marker: str
    as_long_as: str | None = None
    embeds: bool = False


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


def embedding_of_equal_size(a: Architecture) -> EmbeddingNetwork:
    """Build the embedding method, with e so wide that it trains as many parameters as the hypernetwork.

    Raises:
        ValueError: e has no hidden layer.
    """
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
    EQUAL_PARAMETERS: Method("embedding, equal parameters", embedding_of_equal_size, "#E69F00", "D", embeds=True),
    EQUAL_TIME: Method("embedding, equal time", embedding, "#CC79A7", "v", HYPERNETWORK, embeds=True),
    TENFOLD: Method("embedding, E ten times", embedding_tenfold, "#882255", "<", embeds=True),
    FILM: Method("FiLM q(x; γ(I), β(I))", lambda a: Modulated(a, film=True), "#009E73", "^"),
    BIASES: Method("biases only q(x; b(I))", lambda a: Modulated(a, film=False), "#56B4E9", "P"),
    DEEPONET: Method("DeepONet ⟨t(x), b(I)⟩", deeponet, "#000000", "X"),
    PLAIN: Method("one network p(x, I)", plain, "#7F7F7F", "*"),
    PAIR: Method("two networks", lambda a: Pair(_network_of_x(a), _network_of_x(a)), "#0072B2", "o"),
}


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
