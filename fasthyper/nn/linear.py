"""`HyperLinear`: a linear layer whose weights are generated from `z`, one set for each instance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.functional import hyper_linear
from fasthyper.nn.current_z import current_z
from fasthyper.nn.generated_norm import generated_norm_sq
from fasthyper.nn.init import INITS
from fasthyper.nn.plain_linear import why_not_plain
from fasthyper.ops import autocast


class HyperLinear(nn.Module):
    """A linear layer with its own weights and bias for each instance, generated from z and never written out.

        y[b] = x[b] (weight·z[b] + base_weight)ᵀ + bias·z[b] + base_bias

    In the names used throughout: B instances, R features of z, I in and O out features.

    Args:
        in_features: I.
        out_features: O.
        cond_features: R.
        bias: generate a bias too.
        base: learn weights (and with `bias` a bias) shared by all instances, to which the generated ones are
            added.
        init: "hyperfan_in", "hyperfan_out" or "bias_hyper", see `reset_parameters`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: the head, `(O, I, R)`, what an `nn.Linear(R, O * I).weight` holds.
        bias: `(O, R)` or None.
        base_weight: `(O, I)` or None.
        base_bias: `(O,)` or None.

    Raises:
        ValueError: a negative size, an unknown `init`, or "bias_hyper" without a base.

    >>> layer = HyperLinear(8, 4, cond_features=16)
    >>> x, z = torch.randn(32, 8), torch.randn(32, 16)  # each of 32 instances meets its own weights
    >>> layer(x, z).shape
    torch.Size([32, 4])
    >>> layer(torch.randn(32, 10, 10, 8), z).shape  # here 100 points of an instance share them
    torch.Size([32, 10, 10, 4])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    base_weight: nn.Parameter | None
    base_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        cond_features: int,
        bias: bool = True,
        base: bool = True,
        init: str = "hyperfan_in",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features=in_features, out_features=out_features, cond_features=cond_features)
        self.in_features = in_features
        self.out_features = out_features
        self.cond_features = cond_features
        self.init = init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features, cond_features)
        self.register_parameter("bias", parameter(out_features, cond_features) if bias else None)
        self.register_parameter("base_weight", parameter(out_features, in_features) if base else None)
        self.register_parameter("base_bias", parameter(out_features) if base and bias else None)
        self.reset_parameters()

    def reset_parameters(
        self, init: str | None = None, z_second_moment: float = 1.0, nonlinearity: str = "linear"
    ) -> None:
        """Initialise all parameters anew; the formulas and their sources are in `fasthyper.nn.init`.

        Args:
            init: "hyperfan_in" keeps the variance of activations, "hyperfan_out" that of gradients; with both
                the base starts at zero. "bias_hyper" sets the head to zero and gives the base the usual
                initialisation of a linear layer. None takes what the layer was made with.
            z_second_moment: E[z²] of one feature of z: 1 for a standard normal z, ½ for the ReLU of one.
            nonlinearity: what follows the layer, a name that `torch.nn.init.calculate_gain` knows.

        Raises:
            ValueError: one of the three is not as said, or "bias_hyper" without a base.

        >>> layer = HyperLinear(64, 64, cond_features=128)
        >>> layer.reset_parameters("hyperfan_in", z_second_moment=0.5, nonlinearity="relu")
        """
        name = self.init if init is None else init
        if name not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {name!r}")
        INITS[name](
            self.weight,
            self.bias,
            self.base_weight,
            self.base_bias,
            z_second_moment=z_second_moment,
            nonlinearity=nonlinearity,
        )

    @classmethod
    def from_head(cls, head: nn.Linear, in_features: int, out_features: int) -> HyperLinear:
        """The layer whose weights an existing head generates; it shares the head's storage.

        Args:
            head: an `nn.Linear(R, O*I)`, or an `nn.Linear(R, O*I + O)` that generates weights, then biases;
                its row `o * I + i` generates the weight from input i to output o. Its own bias becomes the
                base.
            in_features: I.
            out_features: O.

        Returns:
            A layer with parameters that are views of the head's: what trains or loads one in place changes
            the other. Gradients are each their own, so give an optimizer one of the two. Parameters that are
            frozen stay frozen.

        Raises:
            TypeError: `head` is not an nn.Linear, or it computes something else (a subclass, parametrized,
                hooked).
            ValueError: the head's out_features are neither O*I nor O*I + O, or a size is negative.

        >>> trunk, head = torch.nn.Linear(3, 16), torch.nn.Linear(16, 4 * 8)
        >>> layer = HyperLinear.from_head(head, in_features=8, out_features=4)
        >>> x, cond = torch.randn(5, 8), torch.randn(5, 3)
        >>> W = head(trunk(cond)).view(5, 4, 8)  # what the layer spares
        >>> torch.allclose(layer(x, trunk(cond)), torch.einsum("boi,bi->bo", W, x), atol=1e-5)
        True
        """
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
        if problem := why_not_plain(head):
            raise TypeError(f"head cannot be taken over: {problem}")
        _check_sizes(in_features=in_features, out_features=out_features)
        weights = out_features * in_features
        if head.out_features not in (weights, weights + out_features):
            raise ValueError(
                f"head must be an nn.Linear(R, O*I) or nn.Linear(R, O*I + O), that is with {weights} or "
                f"{weights + out_features} out_features for in_features={in_features} and "
                f"out_features={out_features}, got {tuple(head.weight.shape)} (out_features, in_features)"
            )
        bias, base = head.out_features != weights, head.bias is not None
        layer = cls(in_features, out_features, head.in_features, bias, base, device="meta")

        def share(rows: Tensor, *shape: int) -> nn.Parameter:
            return nn.Parameter(rows.detach().view(shape), requires_grad=rows.requires_grad)

        layer.weight = share(head.weight[:weights], out_features, in_features, head.in_features)
        if bias:
            layer.bias = share(head.weight[weights:], out_features, head.in_features)
        if base:
            layer.base_weight = share(head.bias[:weights], out_features, in_features)
        if bias and base:
            layer.base_bias = share(head.bias[weights:], out_features)
        return layer

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Apply each instance's weights.

        Args:
            x: `(B, I)` or `(B, *, I)`.
            z: `(B, R)`; None takes the z that the `Hypernetwork` in whose primary the layer runs delivers.

        Returns:
            `(B, O)` or `(B, *, O)`.

        Raises:
            ValueError: sizes that do not fit, or no z given and none delivered.
            TypeError: dtypes that differ, or integers.
        """
        if z is None:
            z = current_z(self)
        return hyper_linear(x, z, self.weight, self.bias, base_weight=self.base_weight, base_bias=self.base_bias)

    def materialize(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The generated weights `(B, O, I)` and biases `(B, O)`, or None, base included: for inspection.

        Args:
            z: `(B, R)`.

        Raises:
            ValueError: z is not `(B, R)`.
            TypeError: z has another dtype than the parameters, outside autocast.

        >>> W, b = HyperLinear(8, 4, cond_features=16).materialize(torch.randn(32, 16))
        >>> W.shape, b.shape
        (torch.Size([32, 4, 8]), torch.Size([32, 4]))
        """
        self._check(z)
        base_weight = None if self.base_weight is None else self.base_weight.flatten()
        weight = F.linear(z, self.weight.flatten(0, 1), base_weight)
        weight = weight.view(z.shape[0], self.out_features, self.in_features)
        if self.bias is not None:
            return weight, F.linear(z, self.bias, self.base_bias)
        if self.base_bias is not None:
            return weight, self.base_bias.expand(z.shape[0], -1)
        return weight, None

    def weight_norm_sq(self, z: Tensor) -> Tensor:
        """‖W_b‖² of each instance, for weight decay on generated weights: base weight included, biases not.

        W is not kept. With h the head as `(O*I, R)` and w the base weight,

            ‖h z + w‖² = zᵀ(hᵀh)z + 2 zᵀ(hᵀw) + ‖w‖²

        needs an R × R matrix, once for all instances; where B is below R, pieces of W are formed and squared
        instead, which is less work. Differentiable in z and in the parameters; the gradient of the head takes
        temporary memory of the head's size.

        Args:
            z: `(B, R)`.

        Returns:
            `(B,)`, never negative; in float64 where z or the parameters are, else in float32, in which it is
            also summed, autocast or not: a half precision would overflow at norms of 256. Where the base
            nearly cancels what is generated, digits are lost as in any difference.

        Raises:
            ValueError: z is not `(B, R)`.
            TypeError: z has another dtype than the parameters, outside autocast.

        >>> layer, z = HyperLinear(8, 4, cond_features=16), torch.randn(32, 16)
        >>> W, _ = layer.materialize(z)
        >>> torch.allclose(layer.weight_norm_sq(z), W.square().sum((1, 2)), rtol=1e-4)
        True
        """
        self._check(z)
        h = self.weight.flatten(0, 1)
        w = None if self.base_weight is None else self.base_weight.flatten()
        z = z.to(torch.promote_types(torch.promote_types(z.dtype, h.dtype), torch.float32))
        with autocast.off(z):
            return generated_norm_sq(z, h, w)

    def _check(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.cond_features:
            raise ValueError(f"z must be (B, R) with R = {self.cond_features}, got {tuple(z.shape)}")
        if z.dtype != self.weight.dtype and not (autocast.enabled(z.device.type) and z.is_floating_point()):
            raise TypeError(f"z must be {self.weight.dtype} as the layer's weight is, got {z.dtype}")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"cond_features={self.cond_features}, bias={self.bias is not None}, "
            f"base={self.base_weight is not None}"
        )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
