"""The networks that the methods build, all from the same `Architecture`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasthyper.nn import EmbeddingNetwork, HyperLinear, Hypernetwork

INITIALISATIONS = ("torch", "ours", "hyperfan", "magnitude_invariant")
"""Of generated weights: the head as a linear layer of torch, `HyperLinear`'s own, Chang et al., and Ortiz et al."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh, "linear": nn.Identity}


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
        context_activation: of f and e: one of these, or `"linear"` for none.
        generated_bias: whether f also generates biases of g.
        embed_context: widths of the hidden layers of e; None: as in `context`.
        size: the trained parameters in total, as a multiple of those at size 1. See `Method.model`.
        initialisation: of generated weights, one of `INITIALISATIONS`.
        unit_rows: in a pair, divide each row of a weight matrix by its norm at the start.
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
    unit_rows: bool = False

    @property
    def embed_hidden(self) -> tuple[int, ...]:
        """The widths of the hidden layers of e."""
        return self.context if self.embed_context is None else self.embed_context


def hypernetwork(a: Architecture) -> Hypernetwork:
    """Build `g(x; f(I))`: the hidden layers of f are the trunk, its last layer is the heads of the layers of g."""
    trunk = _trunk(a)
    return Hypernetwork(
        trunk, _with_activations(_generated(a, (a.x, *a.hidden, a.out), trunk, a.generated_bias), a.activation)
    )


def embedding(a: Architecture) -> EmbeddingNetwork:
    """Build `q(x, e(I))`: q gets x and the E outputs of e."""
    hidden = a.embed_hidden
    embed = nn.Sequential(*_hidden_layers(a, hidden), nn.Linear(_last(a.cond, hidden), a.embedding))
    return EmbeddingNetwork(embed, _network((a.x + a.embedding, *a.hidden, a.out), a.activation))


def embedding_tenfold(a: Architecture) -> EmbeddingNetwork:
    """Build the embedding method with an E that is ten times as large."""
    return embedding(replace(a, embedding=10 * a.embedding))


def embedding_narrow(a: Architecture) -> EmbeddingNetwork:
    """Build the embedding method with an E as large as the last hidden layer of e."""
    return embedding(replace(a, embedding=_last(a.cond, a.embed_hidden)))


def film(a: Architecture) -> Modulated:
    """Build `q(x; γ(I), β(I))`."""
    return Modulated(a, film=True)


def biases(a: Architecture) -> Modulated:
    """Build `q(x; b(I))`."""
    return Modulated(a, film=False)


def deeponet(a: Architecture) -> Hypernetwork:
    """Build `Σ_p b_p(I) t_p(x)`: a shared network computes functions t_p of x, the branch the weights b_p of their sum.

    Lu, Jin, Pang, Zhang, Karniadakis, Nature Machine Intelligence 2021 (arXiv 1910.03193).
    """
    branch = _trunk(a)
    shared = _network((a.x, *a.hidden), a.activation)
    last = _generated(a, (a.hidden[-1], a.out), branch, bias=False)
    return Hypernetwork(branch, nn.Sequential(*shared, ACTIVATIONS[a.activation](), *last))


def plain(a: Architecture) -> Plain:
    """Build one network of x and I together, as wide and deep as the primary."""
    return Plain(_network((a.x + a.cond, *a.hidden, a.out), a.activation))


def pair(a: Architecture) -> Pair:
    """Build two equal networks of x alone."""
    built = Pair(*(_network((a.x, *a.hidden, a.out), a.activation) for _ in range(2)))
    if a.unit_rows:
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.ndim == 2:
                    parameter.div_(parameter.norm(dim=1, keepdim=True))
    return built


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
        self.context = nn.Sequential(*_hidden_layers(a, a.context), nn.Linear(_last(a.cond, a.context), outputs))
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


class Attention(nn.Module):
    """A network `q(x, a(x, I))` of x and of what x finds in I: I becomes 16 vectors, and x asks them.

    A network of I, with the hidden layers of f, returns the vectors, as wide as its last hidden layer, rounded down to
    a multiple of 4 (below 4, as wide as this). Each point x asks them by attention with 4 heads (below a width of 4:
    one): the vectors are the keys and the values. q gets x and the answer.

    Vaswani et al., Attention Is All You Need, NeurIPS 2017 (arXiv 1706.03762). The products are matrix products, which
    a counter of flops sees.
    """

    VECTORS, HEADS = 16, 4

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        units = _last(a.cond, a.context)
        self.heads = self.HEADS if units >= self.HEADS else 1
        width = max(1, units - units % self.heads)
        self.context = nn.Sequential(*_hidden_layers(a, a.context), nn.Linear(units, self.VECTORS * width))
        self.ask, self.answer = nn.Linear(a.x, width), nn.Linear(width, width)
        self.primary = _network((a.x + width, *a.hidden, a.out), a.activation)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return `(B, *, O)` for x `(B, *, I)` and cond `(B, C)`."""
        points = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
        asking, vectors = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.ask(points), self.context(cond).unflatten(1, (self.VECTORS, -1)))
        )
        shares = (asking @ vectors.transpose(-1, -2) / math.sqrt(asking.shape[-1])).softmax(dim=-1)
        found = self.answer((shares @ vectors).transpose(1, 2).flatten(2))
        return self.primary(torch.cat([points, found], dim=-1)).reshape(*x.shape[:-1], -1)


class ConstantNorm(nn.Module):
    """The input encoding `[cos(π I / 2), sin(π I / 2)]`, whose norm is √C for any I. It is unique for I in [-2, 2)."""

    def forward(self, cond: Tensor) -> Tensor:
        """Return `(B, 2 C)` for cond `(B, C)`."""
        angles = cond * (math.pi / 2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _trunk(a: Architecture) -> nn.Sequential:
    """Return the hidden layers of a network that generates weights."""
    if a.initialisation != "magnitude_invariant":
        return _hidden_layers(a, a.context)
    trunk = _hidden_layers(replace(a, cond=2 * a.cond), a.context)
    for layer in trunk:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity=_gain_of(a.context_activation))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(ConstantNorm(), *trunk)


def _generated(a: Architecture, sizes: Sequence[int], trunk: nn.Sequential, bias: bool) -> list[HyperLinear]:
    """Return the generated layers of these sizes, initialised.

    - `"torch"`: heads and base as in an `nn.Linear(R, …)`, uniform within ±1/√R for R features of z: in Galanti and
      Wolf's paper, the last layer of f is one. Several heads have the same distribution as one large layer.
    - `"ours"`: as `HyperLinear` does: Hyperfan-in for a z of second moment 1.
    - `"hyperfan"`: Hyperfan-in (Chang, Flokas, Lipson, ICLR 2020, arXiv 2312.08399), gain² 2 before a ReLU and else 1.
      The second moment of z is that of the initialised trunk for I from a standard normal distribution.
    - `"magnitude_invariant"`: Ortiz, Guttag, Dalca, Magnitude Invariant Parametrizations Improve Hypernetwork Learning
      (arXiv 2304.07645). Taken from there: the input encoding `ConstantNorm`; the additive form, weights = base + head
      z, with a base initialised as a network of its own (Kaiming, normal, fan-in; biases 0); trunk and heads Kaiming,
      normal, fan-out, the fan-out of the heads being all generated numbers, with biases 0. Theirs has LeakyReLUs; here
      the gain is √2 before a ReLU and else 1. The encoding doubles the inputs of f: its first layer is larger.
    """
    features = a.context[-1] if a.context else a.cond * (2 if a.initialisation == "magnitude_invariant" else 1)
    generated = sum(i * o + o * bias for i, o in pairwise(sizes))
    moment = _second_moment(trunk, a.cond) if a.initialisation == "hyperfan" else 1.0
    layers = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = HyperLinear(inputs, outputs, features, bias=bias)
        gain = _gain_of(a.activation) if number + 2 < len(sizes) else "linear"
        with torch.no_grad():
            if a.initialisation == "torch":
                for parameter in layer.parameters():
                    parameter.uniform_(-1 / math.sqrt(features), 1 / math.sqrt(features))
            elif a.initialisation == "hyperfan":
                layer.reset_parameters("hyperfan_in", z_second_moment=moment, nonlinearity=gain)
            elif a.initialisation == "magnitude_invariant":
                for head in (layer.weight, layer.bias):
                    if head is not None:
                        head.normal_(0, 1 / math.sqrt(generated))
                assert layer.base_weight is not None
                nn.init.kaiming_normal_(layer.base_weight, nonlinearity=gain)
        layers.append(layer)
    return layers


def _second_moment(trunk: nn.Module, cond: int) -> float:
    """Return the mean of z² over its features, for I from a standard normal distribution."""
    with torch.no_grad():
        z = trunk(torch.randn(1000, cond))
    return 1.0 if z.is_meta else z.square().mean().item()


def _gain_of(activation: str) -> Literal["relu", "linear"]:
    """Return the function whose gain is used for an activation: 2 for the square of a ReLU's, and else 1."""
    return "relu" if activation == "relu" else "linear"


def _hidden_layers(a: Architecture, hidden: Sequence[int]) -> nn.Sequential:
    """Return the hidden layers of f or e, each with its activation."""
    layers = (m for i, o in pairwise((a.cond, *hidden)) for m in (nn.Linear(i, o), ACTIVATIONS[a.context_activation]()))
    return nn.Sequential(*layers)


def _network(sizes: Sequence[int], activation: str) -> nn.Sequential:
    return _with_activations((nn.Linear(i, o) for i, o in pairwise(sizes)), activation)


def _with_activations(layers: Any, activation: str) -> nn.Sequential:
    """Return the layers with an activation between any two."""
    first, *others = layers
    return nn.Sequential(first, *(m for layer in others for m in (ACTIVATIONS[activation](), layer)))


def _last(cond: int, hidden: Sequence[int]) -> int:
    """Return the units of the last hidden layer, or the features of I if there is none."""
    return hidden[-1] if hidden else cond


def _over_points(per_instance: Tensor, x: Tensor) -> Tensor:
    """Return `(B, C)` with as many dimensions as x, `(B, *, I)`."""
    return per_instance.view(len(per_instance), *[1] * (x.ndim - 2), per_instance.shape[-1])
