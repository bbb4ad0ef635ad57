"""`parameter_report`: the numbers of parameters by which hypernetworks and the embedding method are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fasthyper.nn.embedding import EmbeddingNetwork
from fasthyper.nn.generated import HEADS, GeneratedLayer, generating_parameters
from fasthyper.nn.hypernetwork import Hypernetwork


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of parameters of a model; a shared parameter counts once.

    The letters are those of Galanti and Wolf: a hypernetwork is a network f that generates the weights of g, and the
    embedding method is a network q that reads an embedding e. The numbers of the other method are None.

    Attributes:
        n_f: trainable parameters of f: the trunk and all generated layers, bases included.
        n_g: weights and biases that f generates for one instance; the factors A and B of weights of low rank.
        n_e: trainable parameters of e.
        n_q: trainable parameters of q.
        ungenerated: trainable parameters of a hypernetwork's primary outside of its generated layers.
        trainable: all trainable parameters.
        total: all parameters, frozen ones included.
    """

    n_f: int | None
    n_g: int | None
    n_e: int | None
    n_q: int | None
    ungenerated: int | None
    trainable: int
    total: int

    def __str__(self) -> str:
        lines = [
            ("N_f", self.n_f, "trainable, trunk and heads"),
            ("N_g", self.n_g, "generated for each instance"),
            ("N_e", self.n_e, "trainable, embedding"),
            ("N_q", self.n_q, "trainable, primary"),
            ("ungenerated", self.ungenerated, "trainable, rest of the primary"),
            ("trainable", self.trainable, "all"),
            ("total", self.total, "all, frozen ones included"),
        ]
        return "\n".join(f"{name:<11} {n:>13,}  {what}" for name, n, what in lines if n is not None)


def parameter_report(model: Hypernetwork | EmbeddingNetwork) -> ParameterReport:
    """Count the parameters of a hypernetwork or of an embedding network.

    Args:
        model: a :class:`~fasthyper.nn.Hypernetwork` or an :class:`~fasthyper.nn.EmbeddingNetwork`.

    Returns:
        The numbers; as a string, a table.

    Raises:
        TypeError: the model is of another type.

    References:
        Galanti, Wolf, "On the Modularity of Hypernetworks", NeurIPS 2020,
        `arXiv 2002.10006 <https://arxiv.org/abs/2002.10006>`_.

    Example:
        >>> from torch import nn
        >>> from fasthyper.nn import Hypernetwork, hyperize, parameter_report
        >>> g = nn.Sequential(nn.Linear(64, 10, bias=False), nn.ReLU(), nn.Linear(10, 12, bias=False))
        >>> primary = hyperize(g, cond_features=50, base=False)
        >>> print(parameter_report(Hypernetwork(nn.Linear(64, 50), primary)))
        N_f                41,250  trainable, trunk and heads
        N_g                   760  generated for each instance
        ungenerated             0  trainable, rest of the primary
        trainable          41,250  all
        total              41,250  all, frozen ones included
    """
    trainable, total = _count(model.parameters()), _count(model.parameters(), frozen=True)
    if isinstance(model, EmbeddingNetwork):
        n_e, n_q = _count(model.embed.parameters()), _count(model.primary.parameters())
        return ParameterReport(None, None, n_e, n_q, None, trainable, total)
    if not isinstance(model, Hypernetwork):
        raise TypeError(f"model must be a Hypernetwork or an EmbeddingNetwork, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, GeneratedLayer)]
    n_f = _count([*model.trunk.parameters(), *generating_parameters(model)])
    # A shared head generates its weights once.
    of_layers = ((layer._source(name), getattr(layer, name, None)) for layer in layers for name in HEADS)
    heads = {source: p.shape[:-1] for source, p in of_layers if p is not None}
    n_g = sum(shape.numel() for shape in heads.values())
    return ParameterReport(n_f, n_g, None, None, trainable - n_f, trainable, total)


def _count(parameters: Iterable[nn.Parameter], frozen: bool = False) -> int:
    distinct = {id(p): p for p in parameters if p.requires_grad or frozen}
    return sum(p.numel() for p in distinct.values())
