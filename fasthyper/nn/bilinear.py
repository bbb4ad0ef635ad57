"""`Bilinear`: a drop-in replacement for `torch.nn.Bilinear`."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fasthyper.functional import hyper_linear
from fasthyper.nn.tracing import OneNode, is_proxy, recorded
from fasthyper.ops import shapes


class Bilinear(OneNode, nn.Bilinear):
    """Drop-in replacement for :class:`torch.nn.Bilinear` that never forms its intermediate of B·O·I elements.

    It computes ``y[b, o] = input1[b] @ weight[o] @ input2[b] + bias[o]``, which equals
    ``torch.nn.functional.bilinear(input1, input2, weight, bias)``.

    The class is a subclass of :class:`torch.nn.Bilinear`, with the same constructor, initialisation, parameters and
    state dict: a checkpoint of one loads into the other. In the letters of this library, ``input1`` is x and
    ``input2`` is z.

    Args:
        in1_features: the number of features of ``input1``, I, positive.
        in2_features: the number of features of ``input2``, R, positive.
        out_features: the number of output features, O, positive.
        bias: if True, learn a bias.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shape:
        - input1: ``(*, I)``, with any number of leading dimensions, or none.
        - input2: ``(*, R)``, with the same leading dimensions.
        - Output: ``(*, O)``.

    Attributes:
        weight: ``(O, I, R)``.
        bias: ``(O,)``, or None.

    Raises:
        ValueError: ``in1_features`` is not positive.

    Example:
        >>> import torch
        >>> from fasthyper.nn import Bilinear
        >>> ours, theirs = Bilinear(5, 6, 8), torch.nn.Bilinear(5, 6, 8)
        >>> ours.load_state_dict(theirs.state_dict())
        <All keys matched successfully>
        >>> x, z = torch.randn(2, 3, 5), torch.randn(2, 3, 6)
        >>> torch.allclose(ours(x, z), theirs(x, z), atol=1e-5)
        True
    """

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return ``input1ᵀ weight input2 + bias``.

        Args:
            input1: ``(*, I)``, with any number of leading dimensions, or none.
            input2: ``(*, R)``, with the same leading dimensions.

        Returns:
            ``(*, O)``.

        Raises:
            TypeError: the dtypes differ or are not floating point.
            ValueError: the sizes do not fit; nothing is broadcast.
        """
        if is_proxy(input1):
            return recorded(self, input1, input2)
        for name, t in (("input1", input1), ("input2", input2)):
            shapes.check_input(name, t)
        lead = input1.shape[:-1]
        if input1.ndim == 0 or input1.shape[-1] != self.in1_features:
            raise ValueError(f"input1 must be (*, {self.in1_features}), got {tuple(input1.shape)}")
        if input2.ndim == 0 or input2.shape[-1] != self.in2_features:
            raise ValueError(f"input2 must be (*, {self.in2_features}), got {tuple(input2.shape)}")
        if input2.shape[:-1] != lead:
            raise ValueError(
                "input1 and input2 must have the same leading sizes, "
                f"got {tuple(input1.shape)} and {tuple(input2.shape)}"
            )
        # reshape(-1, ...) is ambiguous where a size is 0.
        batch = math.prod(lead)
        y = hyper_linear(
            input1.reshape(batch, self.in1_features),
            input2.reshape(batch, self.in2_features),
            self.weight,
            base_bias=self.bias,
        )
        return y.view(*lead, self.out_features)
