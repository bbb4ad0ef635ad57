"""`Bilinear`: a drop-in for `torch.nn.Bilinear`, which is the same sum over the head, x and z."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fasthyper.functional import hyper_linear


class Bilinear(nn.Bilinear):
    """`torch.nn.Bilinear`, computed without its intermediate of B·O·I elements.

    The constructor, the parameters `weight (O, I, R)` and `bias (O,)`, their initialisation, the state dict
    and the results are those of `torch.nn.Bilinear` with in1_features = I, in2_features = R and out_features
    = O, of which it is a subclass: swapped in for it, it loads what the other saved.

    Args:
        in1_features: I, positive.
        in2_features: R, positive.
        out_features: O, positive.
        bias: learn a bias too.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: in1_features is not positive.

    >>> import torch
    >>> ours, theirs = Bilinear(5, 6, 8), torch.nn.Bilinear(5, 6, 8)
    >>> ours.load_state_dict(theirs.state_dict())
    <All keys matched successfully>
    >>> x, z = torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    >>> torch.allclose(ours(x, z), theirs(x, z), atol=1e-5)
    True
    """

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """`input1ᵀ weight input2 + bias`.

        Args:
            input1: `(*, I)`, any number of leading sizes, none included.
            input2: `(*, R)`, with the same leading sizes.

        Returns:
            `(*, O)`.

        Raises:
            ValueError: sizes that do not fit; nothing is broadcast.
            TypeError: dtypes that differ, or integers.
        """
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
        # Not reshape(-1, ...): the -1 is ambiguous where a size is 0.
        batch = math.prod(lead)
        y = hyper_linear(
            input1.reshape(batch, self.in1_features),
            input2.reshape(batch, self.in2_features),
            self.weight,
            base_bias=self.bias,
        )
        return y.view(*lead, self.out_features)
