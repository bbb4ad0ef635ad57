"""`EmbeddingNetwork`: the embedding method, `q(x, e(I))`, what a hypernetwork is compared with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.nn.plain_linear import why_not_plain


class EmbeddingNetwork(nn.Module):
    """`primary([x, embed(cond)])`, with x and the embedding concatenated, and the concatenation never formed.

    The first layer's weight is split instead: W [x, e] = W_x x + W_e e, the second term computed once for
    each instance and added to all of its points.

    Args:
        embed: maps cond to e, `(B, E)`.
        primary: an `nn.Linear(I + E, …)`, or an `nn.Sequential` that begins with one.

    Raises:
        TypeError: embed is no module, the primary is of another kind, or its first layer no plain nn.Linear.

    Source: Galanti, Wolf, "On the Modularity of Hypernetworks", NeurIPS 2020, arXiv 2002.10006.

    >>> import torch
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
        """Run the primary on x and the embedding.

        Args:
            x: `(B, I)` or `(B, *, I)`.
            cond: the input of `embed`.

        Returns:
            `(B, O)` or `(B, *, O)`.

        Raises:
            ValueError: x, e and the first layer do not fit.
            TypeError: `embed` returns no tensor, or there are hooks on the primary or its first layer.
        """
        first, *rest = self._layers()
        assert isinstance(first, nn.Linear)
        if any(m._forward_hooks or m._forward_pre_hooks for m in (first, self.primary)):
            raise TypeError("the primary and its first layer are not called: the hooks on them would be lost")
        e = self.embed(cond)
        if not isinstance(e, Tensor):
            raise TypeError(f"embed must return a tensor, got a {type(e).__name__}")
        if x.ndim < 2 or e.ndim != 2 or x.shape[0] != e.shape[0]:
            raise ValueError(
                "x must be (B, I) or (B, *, I) and what embed returns (B, E), with the same B, "
                f"got {tuple(x.shape)} and {tuple(e.shape)}"
            )
        if x.shape[-1] + e.shape[-1] != first.in_features:
            raise ValueError(
                "the primary's first layer must have I + E in_features, got "
                f"{first.in_features} for x {tuple(x.shape)} and an embedding {tuple(e.shape)}"
            )
        weight_x, weight_e = first.weight.split([x.shape[-1], e.shape[-1]], dim=1)
        y = F.linear(e, weight_e, first.bias)
        y = F.linear(x, weight_x) + y.view(y.shape[0], *[1] * (x.ndim - 2), y.shape[1])
        for layer in rest:
            y = layer(y)
        return y

    def _layers(self) -> list[nn.Module]:
        return list(self.primary) if isinstance(self.primary, nn.Sequential) else [self.primary]
