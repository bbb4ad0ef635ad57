"""A hypernetwork in the parametrisation in which wide networks have a limit, with its linearisation beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class WideHypernetwork(nn.Module):
    """`g(x; f(I))` with weights of variance 1 and every layer divided by the root of its inputs.

    f has hidden layers with ReLU, g has one. All weights of g are generated, and there are no biases. With a fixed
    learning rate, training changes the function by as much at any width.

    Littwin, Galanti, Wolf, Yang, On infinite-width hypernetworks, NeurIPS 2020 (arXiv 2003.12193).

    Args:
        cond: features of I.
        x: features of x.
        out: outputs.
        context: units of the hidden layers of f.
        hidden: units of g.

    Example:
        >>> model = WideHypernetwork(cond=3, x=2, out=4, context=(8, 8), hidden=5)
        >>> x, cond = torch.randn(6, 2), torch.randn(6, 3)
        >>> model(x, cond).shape, model.eval()(x, cond).shape
        (torch.Size([6, 4]), torch.Size([6, 3, 4]))
    """

    def __init__(self, cond: int, x: int, out: int, context: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.shapes = ((hidden, x), (out, hidden))
        shapes = [(o, i) for i, o in pairwise((cond, *context))]
        shapes += [(o * i, context[-1]) for o, i in self.shapes]
        self.generated = hidden * (x + out)
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)
        for number, weight in enumerate(self.weights):
            self.register_buffer(f"start_{number}", weight.detach().clone())

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return the outputs, `(B, *, O)`, for x `(B, *, I)` and cond `(B, C)`.

        In evaluation, return three, `(B, 3, *, O)`: the outputs, those at the initial weights, and those of the
        linearisation at the initial weights.
        """

        def network(*weights: Tensor) -> Tensor:
            z = cond
            for weight in weights[:-2]:
                z = math.sqrt(2) * _scaled(weight, z).relu()
            first, last = (_scaled(w, z).unflatten(1, s) for w, s in zip(weights[-2:], self.shapes, strict=True))
            return _scaled(last, math.sqrt(2) * _scaled(first, x).relu())

        weights = tuple(self.weights)
        if self.training:
            return network(*weights)
        start = tuple(self.get_buffer(f"start_{number}") for number in range(len(weights)))
        moved = tuple(weight - begin for weight, begin in zip(weights, start, strict=True))
        at_start = torch.func.jvp(network, start, moved)  # the outputs and their first-order change
        return torch.stack([network(*weights), at_start[0], at_start[0] + at_start[1]], dim=1)


def _scaled(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the weight, `(O, I)` or one for each instance `(B, O, I)`, times inputs `(B, *, I)`, divided by √I."""
    product = inputs @ weight.T if weight.ndim == 2 else torch.einsum("boi,b...i->b...o", weight, inputs)
    return product / math.sqrt(inputs.shape[-1])
