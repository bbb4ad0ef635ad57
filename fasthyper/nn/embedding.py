"""`EmbeddingNetwork`: the embedding method `q(x, e(I))`, the baseline for hypernetworks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.nn.plain_linear import split_head, why_not_plain
from fasthyper.nn.tracing import OneNode, is_proxy, recorded
from fasthyper.ops import shapes


class EmbeddingNetwork(OneNode):
    """Run a primary network on x concatenated with an embedding, without forming the concatenation.

    This is the embedding method, the baseline that hypernetworks are compared with. For x of shape ``(B, I)`` it
    equals ``primary(torch.cat([x, embed(cond)], dim=-1))``. The weight of the first layer is split instead,
    W [x, e] = Wx x + We e; the second term is computed once per instance and added at all of its points.

    Where ``embed`` ends in a :class:`torch.nn.Linear`, e = V z + b, nothing nonlinear is between V and We. Then We e is
    computed as (We V) z + We b whenever this needs fewer flops: with fewer units in the first layer than instances,
    roughly. The result is the same to rounding. Embeddings are formed, as usual, if the last layer of ``embed`` has
    hooks, a parametrization or a forward of its own, and in ``torch.export``, whose batch size may be unknown. Hooks
    that torch calls for all modules are not called for a layer whose product is split or reordered.

    Args:
        embed: maps cond to the embedding e, ``(B, E)``.
        primary: a ``torch.nn.Linear(I + E, ...)``, or a :class:`torch.nn.Sequential` that begins with one.

    Shape:
        - x: ``(B, I)`` or ``(B, *, I)``.
        - cond: the input of ``embed``.
        - Output: ``(B, O)`` or ``(B, *, O)``.

    Raises:
        TypeError: ``embed`` is not a module, ``primary`` is of another type, or its first layer is not a plain
            :class:`torch.nn.Linear`.

    References:
        Galanti, Wolf, "On the Modularity of Hypernetworks", NeurIPS 2020,
        `arXiv 2002.10006 <https://arxiv.org/abs/2002.10006>`_.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fasthyper.nn import EmbeddingNetwork
        >>> primary = nn.Sequential(nn.Linear(2 + 16, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> model = EmbeddingNetwork(nn.Linear(5, 16), primary)
        >>> model(torch.randn(32, 100, 2), torch.randn(32, 5)).shape
        torch.Size([32, 100, 1])
    """

    def __init__(self, embed: nn.Module, primary: nn.Linear | nn.Sequential) -> None:
        super().__init__()
        if not isinstance(embed, nn.Module):
            raise TypeError(f"embed must be an nn.Module, got a {type(embed).__name__}")
        self.embed = embed
        self.primary = primary
        first = next(iter(self._layers()), None)
        own_forward = isinstance(primary, nn.Sequential) and type(primary).forward is not nn.Sequential.forward
        if not isinstance(first, nn.Linear) or own_forward:
            raise TypeError(
                "primary must be an nn.Linear, or an nn.Sequential whose first module is one, "
                f"got {type(primary).__name__}" + (f" of {type(first).__name__}" if first is not primary else "")
            )
        if problem := why_not_plain(first):
            raise TypeError(f"the primary's first layer cannot be split: {problem}")

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        """Run the primary on x and the embedding of cond.

        Args:
            x: ``(B, I)`` or ``(B, *, I)``.
            cond: the input of ``embed``.

        Returns:
            ``(B, O)`` or ``(B, *, O)``.

        Raises:
            TypeError: ``embed`` does not return a tensor, or the primary or its first layer has hooks.
            ValueError: the sizes of x, the embedding and the first layer do not fit.
        """
        if is_proxy(x):
            return recorded(self, x, cond)
        shapes.check_input("x", x)
        first, *others = self._layers()
        assert isinstance(first, nn.Linear)
        if any(m._forward_hooks or m._forward_pre_hooks for m in (first, self.primary)):
            raise TypeError(
                "the primary and its first layer must have no hooks: they are not called, so hooks would not run"
            )
        e, last = self._embedding(cond, first)
        if not isinstance(e, Tensor):
            raise TypeError(f"embed must return a tensor, got a {type(e).__name__}")
        shape = tuple(e.shape) if last is None else (e.shape[0], last.out_features)
        if x.ndim < 2 or len(shape) != 2 or x.shape[0] != shape[0]:
            raise ValueError(
                "x must be (B, I) or (B, *, I) and the embedding (B, E), with the same B, "
                f"got {tuple(x.shape)} and {shape}"
            )
        if x.shape[-1] + shape[1] != first.in_features:
            raise ValueError(
                "the primary's first layer must have I + E in_features, got "
                f"{first.in_features} for x {tuple(x.shape)} and an embedding {shape}"
            )
        weight_x, weight_e = first.weight.split([x.shape[-1], shape[1]], dim=1)
        bias: Tensor | None = first.bias
        if last is not None:
            bias = bias if last.bias is None else F.linear(last.bias, weight_e, bias)
            weight_e = weight_e @ last.weight
        y = F.linear(e, weight_e, bias)
        y = F.linear(x, weight_x) + y.view(y.shape[0], *[1] * (x.ndim - 2), y.shape[1])
        for layer in others:
            y = layer(y)
        return y

    def _embedding(self, cond: Any, first: nn.Linear) -> tuple[Any, nn.Linear | None]:
        """Return e and None; or the input of the last layer of `embed` and that layer, if it should not be called."""
        split = _last_linear(self.embed)
        if split is None:
            return self.embed(cond), None
        before, last = split
        for layer in before:
            cond = layer(cond)
        if isinstance(cond, Tensor) and cond.ndim == 2 and _is_shorter(cond, last, first):
            return cond, last
        return last(cond), None

    def _layers(self) -> list[nn.Module]:
        return list(self.primary) if isinstance(self.primary, nn.Sequential) else [self.primary]


def _last_linear(embed: nn.Module) -> tuple[list[nn.Module], nn.Linear] | None:
    """Return the modules before the last Linear of a network, and that Linear, if its call may be left out."""
    if torch.compiler.is_exporting():
        return None
    split = split_head(embed)
    return None if isinstance(split, str) else split


def _is_shorter(z: Tensor, last: nn.Linear, first: nn.Linear) -> bool:
    """Return whether the product of both weights needs fewer flops than embeddings. Backward needs twice as many."""
    instances, features = z.shape
    units, embedding = first.out_features, last.out_features
    together = units * embedding * features + instances * units * features
    return together < instances * embedding * (features + units)
