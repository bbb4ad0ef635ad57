"""`PairwiseBilinear`: the scores of all pairs of two sets, as in a biaffine parser."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fasthyper import backends
from fasthyper.nn.linear import check_sizes
from fasthyper.nn.tracing import OneNode, is_proxy, recorded
from fasthyper.ops import autocast, shapes, sharding
from fasthyper.ops.pairs import ops

_op = ops.pairs.default


class PairwiseBilinear(OneNode):
    """Bilinear layer for every member of one set with every member of another, as in a biaffine parser.

    ``y[b, m, n, o] = input1[b, m] @ weight[o] @ input2[b, n] + bias[o]``

    :class:`~fasthyper.Bilinear` has the same sum for members that are paired one to one. This layer never writes out
    ``input1 @ weight`` for all outputs (B·M·O·I2 numbers) and never copies a member for each of its pairs.

    With ``bias_x``, each row of ``input1`` has an appended one, and ``weight`` a row more: this row adds a term that is
    linear in ``input2``. With ``bias_y``, the same holds for ``input2`` and a column. The ones are not written into
    copies of the inputs.

    Args:
        in1_features: the number of features of ``input1``, I1, without the appended one.
        in2_features: the number of features of ``input2``, I2, without the appended one.
        out_features: the number of scores of a pair, O.
        bias: if True, learn a bias.
        bias_x: if True, append a one to each row of ``input1``.
        bias_y: if True, append a one to each row of ``input2``.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shape:
        - input1: ``(*, M, I1)``, with any number of leading dimensions, or none.
        - input2: ``(*, N, I2)``, with the same leading dimensions.
        - Output: ``(*, M, N, O)``.

    Attributes:
        weight: ``(O, P, Q)``, where P is I1 or, with ``bias_x``, I1 + 1, and Q is I2 or, with ``bias_y``, I2 + 1. The
            weights of ``torch.nn.Bilinear(P, Q, O)`` and of a biaffine layer ``(n_out, n_in + bias_x, n_in + bias_y)``
            have this layout. From the layout ``(P, Q, O)``, which stanza uses, ``weight.permute(2, 0, 1)`` makes it.
        bias: ``(O,)``, or None.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is negative.

    References:
        Dozat, Manning, "Deep Biaffine Attention for Neural Dependency Parsing", ICLR 2017,
        `arXiv 1611.01734 <https://arxiv.org/abs/1611.01734>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import PairwiseBilinear
        >>> labels = PairwiseBilinear(100, 100, 50, bias_x=True, bias_y=True)
        >>> dependents, heads = torch.randn(8, 20, 100), torch.randn(8, 21, 100)
        >>> labels(dependents, heads).shape
        torch.Size([8, 20, 21, 50])
        >>> labels.weight.shape
        torch.Size([50, 101, 101])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bias_x: bool = False,
        bias_y: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in1_features=in1_features, in2_features=in2_features, out_features=out_features)
        self.in1_features = in1_features
        self.in2_features = in2_features
        self.out_features = out_features
        self.bias_x = bool(bias_x)
        self.bias_y = bool(bias_y)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in1_features + self.bias_x, in2_features + self.bias_y)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters as ``torch.nn.Bilinear`` does: uniform, within ± 1 / √P.

        Parsers often start from zeros instead: ``torch.nn.init.zeros_(layer.weight)``.
        """
        bound = 1 / math.sqrt(max(1, self.weight.shape[1]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return the scores of all pairs.

        Under autocast, the arguments are cast to the region's dtype, except for float64.

        Args:
            input1: ``(*, M, I1)``, with any number of leading dimensions, or none.
            input2: ``(*, N, I2)``, with the same leading dimensions.

        Returns:
            ``(*, M, N, O)``, contiguous.

        Raises:
            TypeError: an input is not a floating point tensor, or the dtypes differ.
            ValueError: the sizes do not fit (nothing is broadcast), or the devices differ.
        """
        if is_proxy(input1):
            return recorded(self, input1, input2)
        self._check("input1", input1, "M", self.in1_features)
        self._check("input2", input2, "N", self.in2_features)
        lead = input1.shape[:-2]
        if input2.shape[:-2] != lead:
            raise ValueError(
                "input1 and input2 must have the same sizes before their last two axes, "
                f"got {tuple(input1.shape)} and {tuple(input2.shape)}"
            )
        x, z, weight, bias = input1, input2, self.weight, self.bias
        if autocast.enabled(x.device.type):
            x, z, weight, bias = map(autocast.follow, (x, z, weight, bias))
        for name, t in (("input2", z), ("weight", weight)):
            if t.dtype != x.dtype:
                raise TypeError(
                    f"{name} must have the dtype of input1: {name} has shape {tuple(t.shape)} of {t.dtype}, "
                    f"input1 has shape {tuple(x.shape)} of {x.dtype}"
                )
        if len(lead) != 1:  # reshape(-1, ...) is ambiguous where a size is 0
            x, z = (t.reshape(math.prod(lead), *t.shape[-2:]) for t in (x, z))
        sharding.prepare()
        y = _op(x, z, weight, bias, self.bias_x, self.bias_y, *backends.current())
        return y if len(lead) == 1 else y.view(*lead, *y.shape[1:])

    def _check(self, name: str, t: Tensor, members: str, features: int) -> None:
        shapes.check_input(name, t)
        if t.ndim < 2 or t.shape[-1] != features:
            raise ValueError(f"{name} must have shape (*, {members}, {features}), got {tuple(t.shape)}")

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        text = f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}, bias_x={self.bias_x}, bias_y={self.bias_y}"
