"""`HyperLinear`: a linear layer with weights generated from z for each instance."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from fasthyper import maps
from fasthyper.incidence import Incidence
from fasthyper.nn.current_z import product_of_reused
from fasthyper.nn.generated import PARAMETERS, GeneratedLayer
from fasthyper.nn.generated_norm import generated_norm_sq, mapped_norm_sq
from fasthyper.nn.heads import places_in_head
from fasthyper.nn.init import INITS, adapt_to_map_
from fasthyper.nn.linear_call import run, written_out
from fasthyper.nn.low_rank import LowRank, check_rank
from fasthyper.nn.merge import with_parameters
from fasthyper.nn.rows import in_instances
from fasthyper.nn.tracing import is_proxy, recorded
from fasthyper.ops import autocast


class HyperLinear(GeneratedLayer):
    """Linear layer whose weights are generated from z for each instance, and never written out.

    It computes ``y[b] = x[b] (weight·z[b] + base_weight)ᵀ + bias·z[b] + base_bias``. For x of shape ``(B, I)`` this
    equals::

        W = (z @ weight.flatten(0, 1).T).view(B, O, I) + base_weight
        y = torch.einsum("boi,bi->bo", W, x) + z @ bias.T + base_bias

    With a ``weight_map`` φ, the weights are ``φ(weight·z[b] + base_weight)``; biases have no map. B is the number of
    instances; the other letters are below.

    Args:
        in_features: the number of input features, I.
        out_features: the number of output features, O.
        cond_features: the number of features of z, R.
        bias: if True, generate a bias too.
        base: if True, learn weights (and with ``bias`` a bias) that all instances share; the generated ones are
            added to them.
        init: ``"hyperfan_in"``, ``"hyperfan_out"`` or ``"bias_hyper"``, see :meth:`reset_parameters`.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        rank: if given, the generated weights have this rank r, as in LoRA: ``base_weight + (alpha / r)·B[b] A[b]`` with
            ``A[b] = weight_a·z[b]`` and ``B[b] = weight_b·z[b]``. The product is never formed.
        alpha: the factor of generated weights of low rank, times r; None means r, so that the factor is 1.
        bias_cond_features: the number of features of the z of the bias, if the bias has one of its own.
        weight_map: φ, a function of the weights: ``"abs"``, ``"softplus"``, ``"relu"``, ``"sigmoid"``, ``"tanh"`` or
            ``"exp"`` of each; ``"normalize"`` (norm 1) or ``"softmax"`` of each row, the weights of one output; or an
            elementwise function of a tensor. A module becomes a part of the layer, with its parameters.

    Shape:
        - x: ``(B, I)`` or ``(B, *, I)``. The dimensions ``*`` are points, which share the weights of their instance.
        - z: ``(B, R)``, or a pair of the z of the weight and the z of the bias.
        - Output: ``(B, O)`` or ``(B, *, O)``.

    Attributes:
        weight: the head, ``(O, I, R)``: the weight of a ``torch.nn.Linear(R, O * I)``, viewed; None with a rank.
        weight_a: with a rank, the head of A, ``(r, I, R)``.
        weight_b: with a rank, the head of B, ``(O, r, R)``.
        bias: the head of the bias, ``(O, R)``, or None.
        base_weight: the shared weights, ``(O, I)``, or None.
        base_bias: the shared bias, ``(O,)``, or None.
        weight_map: φ, or None.

    Raises:
        TypeError: a size or the rank is not an integer, or ``weight_map`` is neither a string nor a function.
        ValueError: a size is negative, the rank or alpha is not positive, ``init`` or ``weight_map`` is unknown,
            ``init`` is ``"bias_hyper"`` without a base, or there are both a rank and a ``weight_map``.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
        `arXiv 2106.09685 <https://arxiv.org/abs/2106.09685>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperLinear
        >>> layer = HyperLinear(8, 4, cond_features=16)
        >>> x, z = torch.randn(32, 8), torch.randn(32, 16)  # 32 instances, each with its own weights
        >>> layer(x, z).shape
        torch.Size([32, 4])
        >>> layer(torch.randn(32, 10, 10, 8), z).shape  # 100 points per instance
        torch.Size([32, 10, 10, 4])
        >>> positive = HyperLinear(8, 4, cond_features=16, weight_map="softplus")
        >>> bool((positive.materialize(z)[0] > 0).all())
        True
    """

    weight: nn.Parameter
    weight_a: nn.Parameter | None
    weight_b: nn.Parameter | None
    bias: nn.Parameter | None
    base_weight: nn.Parameter | None
    base_bias: nn.Parameter | None
    rank: int | None = None  # class attributes, for layers that were pickled before there were ranks
    alpha: float | None = None
    weight_map: maps.Map | None

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
        *,
        rank: int | None = None,
        alpha: float | None = None,
        bias_cond_features: int | None = None,
        weight_map: maps.Map | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, cond_features=cond_features)
        if bias_cond_features is None:
            bias_cond_features = cond_features
        check_sizes(bias_cond_features=bias_cond_features)
        maps.check(weight_map)
        if rank is not None and weight_map is not None:
            raise ValueError(
                f"rank must be None with a weight_map, which needs the weights formed, got rank={rank} and "
                f"weight_map={weight_map!r}"
            )
        self.rank, self.alpha = rank, check_rank(rank, alpha)
        self.in_features = in_features
        self.out_features = out_features
        self.cond_features = cond_features
        self.init = init
        self.weight_map = weight_map

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        whole = None if rank is not None else parameter(out_features, in_features, cond_features)
        self.register_parameter("weight", whole)
        self.register_parameter("weight_a", None if rank is None else parameter(rank, in_features, cond_features))
        self.register_parameter("weight_b", None if rank is None else parameter(out_features, rank, cond_features))
        self.register_parameter("bias", parameter(out_features, bias_cond_features) if bias else None)
        self.register_parameter("base_weight", parameter(out_features, in_features) if base else None)
        self.register_parameter("base_bias", parameter(out_features) if base and bias else None)
        self.reset_parameters()

    def reset_parameters(
        self, init: str | None = None, z_second_moment: float = 1.0, nonlinearity: str = "linear"
    ) -> None:
        """Initialise all parameters again.

        With a ``weight_map``, ``"tanh"`` and ``"normalize"`` preserve variances through many layers, as without a map.
        ``"abs"`` and ``"relu"`` preserve the second moment of outputs for inputs of mean zero, in one layer: their
        weights have a mean, so that a mean of the inputs grows with each layer. The weights of the other maps, and of
        functions, have a scale of their own; pass them a suitable base or follow the layer with a norm.

        Args:
            init: ``"hyperfan_in"`` preserves the variance of activations (:func:`~fasthyper.nn.hyperfan_in_`),
                ``"hyperfan_out"`` the variance of gradients (:func:`~fasthyper.nn.hyperfan_out_`); both set the base
                to zero. ``"bias_hyper"`` sets the head to zero and initialises the base like a linear layer
                (:func:`~fasthyper.nn.bias_hyper_`). None means the ``init`` of the constructor.
            z_second_moment: E[z²] of one feature of z: 1 for a standard normal z, 0.5 for the ReLU of such a z.
            nonlinearity: the function that follows the layer, by its name in :func:`torch.nn.init.calculate_gain`.

        Raises:
            ValueError: ``init`` or ``nonlinearity`` is unknown, ``z_second_moment`` is not positive and finite, or
                ``init`` is ``"bias_hyper"`` without a base.

        Example:
            >>> from fasthyper.nn import HyperLinear
            >>> layer = HyperLinear(64, 64, cond_features=128)
            >>> layer.reset_parameters("hyperfan_in", z_second_moment=0.5, nonlinearity="relu")
        """
        name = self.init if init is None else init
        if name not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {name!r}")
        if low_rank := self._low_rank():
            return low_rank.reset(name, z_second_moment, nonlinearity)
        own = self._tensors()
        INITS[name](*own, z_second_moment=z_second_moment, nonlinearity=nonlinearity)
        adapt_to_map_(self.weight_map, own.weight, own.bias, own.base_weight)

    @classmethod
    def from_head(
        cls,
        head: nn.Linear,
        in_features: int,
        out_features: int,
        layout: str | None = None,
        weight_map: maps.Map | None = None,
    ) -> HyperLinear:
        """Create a layer of an existing head, which becomes its submodule ``head``.

        The layer has no parameters of its own: :attr:`weight`, :attr:`bias` and the base are views of the rows of
        ``head``, which is not copied. A module that has both the head and the layer has a module under two names. So
        they stay one through ``copy.deepcopy``, conversions of dtype and device, pickling, state dicts and safetensors,
        the gradients are those of ``head``, and an optimizer gets its parameters once. The layer loads a state dict
        with ``head.weight`` and ``head.bias``, that of the head, or that of a HyperLinear with parameters of its own. A
        checkpoint that has the head under its other name alone loads, too. Another head must have its sizes and dtype.

        Args:
            head: a ``torch.nn.Linear(R, O * I)``, or a ``torch.nn.Linear(R, O * I + O)`` that generates the weights
                and then the biases. Its bias becomes the base.
            in_features: the number of input features, I.
            out_features: the number of output features, O.
            layout: how the head's output was viewed: ``"oi"`` as ``(O, I)``, so that row ``o * I + i`` generates the
                weight from input i to output o, or ``"io"`` as ``(I, O)``, row ``i * O + o``. It must be given,
                unless I or O is 1.
            weight_map: the function of the weights, as in the constructor.

        Returns:
            A layer that computes with the parameters of ``head``. Frozen ones stay frozen.

        Raises:
            TypeError: ``head`` is not a :class:`torch.nn.Linear`, or it computes more than ``x @ weight.T + bias``
                (parametrized, with hooks, or of a subclass with a forward of its own), or ``weight_map`` is neither a
                string nor a function.
            ValueError: the head's out_features are neither O * I nor O * I + O, a size is negative, ``weight_map`` is
                unknown, or ``layout`` is unknown, or missing where both would fit.

        Example:
            >>> import torch
            >>> from fasthyper.nn import HyperLinear
            >>> trunk, head = torch.nn.Linear(3, 16), torch.nn.Linear(16, 4 * 8)
            >>> layer = HyperLinear.from_head(head, in_features=8, out_features=4, layout="oi")
            >>> x, cond = torch.randn(5, 8), torch.randn(5, 3)
            >>> W = head(trunk(cond)).view(5, 4, 8)  # the layer does not form this
            >>> torch.allclose(layer(x, trunk(cond)), torch.einsum("boi,bi->bo", W, x), atol=1e-5)
            True
        """
        check_sizes(in_features=in_features, out_features=out_features)
        places = places_in_head(head, in_features, out_features, layout)
        layer = cls(in_features, out_features, head.in_features, "bias" in places, device="meta", weight_map=weight_map)
        for name in PARAMETERS:
            del layer._parameters[name]
        layer.head, layer.places = head, places
        return layer

    def forward(
        self,
        x: Tensor,
        z: Tensor | tuple[Tensor, Tensor] | None = None,
        incidence: Incidence | None = None,
        reduce: str = "sum",
    ) -> Tensor:
        """Apply the generated weights of each instance to x, see :func:`fasthyper.hyper_linear`.

        Args:
            x: ``(B, I)`` or ``(B, *, I)``; with an incidence ``(S, I)`` or ``(S, *, I)``.
            z: ``(B, R)``; with an incidence ``(C, R)``; or a pair, for the weight and for the bias. If None, the layer
                takes the z of the running :class:`~fasthyper.nn.Hypernetwork`, of whose primary it is a part, and the
                incidence of this call.
            incidence: which rows of x, z and the result belong to each term of a sum.
            reduce: ``"sum"``, ``"mean"`` or ``"max"`` of the terms of each target, with an incidence.

        Returns:
            ``(B, O)`` or ``(B, *, O)``; with an incidence ``(T, O)`` or ``(T, *, O)``.

        Raises:
            TypeError: the dtypes differ or are not floating point.
            ValueError: the sizes do not fit, z is None outside of a Hypernetwork, or the layer has a rank and the
                incidence has sources or targets.
        """
        z, incidence, repeat = self._condition(z, incidence)
        if is_proxy(x):
            return recorded(self, x, *self._to_record(z, incidence, repeat), reduce)
        if repeat is None:
            return self._run(x, z, incidence, reduce)
        if not repeat and incidence is None and (y := product_of_reused(self, x, z)) is not None:
            return y
        return in_instances(lambda x, z: self._run(x, z, incidence, reduce), x, z, repeat)

    def _run(self, x: Tensor, z: Tensor | tuple[Tensor, Tensor], incidence: Incidence | None, reduce: str) -> Tensor:
        return run(self, x, z, incidence, reduce)

    def materialize(self, z: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the weights and biases of each instance, base and ``weight_map`` included, for inspection.

        Args:
            z: ``(B, R)``, or a pair, for the weight and for the bias.

        Returns:
            The weights ``(B, O, I)`` and the biases ``(B, O)``, or None for a layer without biases.

        Raises:
            TypeError: z has another dtype than the parameters, outside autocast.
            ValueError: z does not have shape ``(B, R)``.

        Example:
            >>> import torch
            >>> from fasthyper.nn import HyperLinear
            >>> W, b = HyperLinear(8, 4, cond_features=16).materialize(torch.randn(32, 16))
            >>> W.shape, b.shape
            (torch.Size([32, 4, 8]), torch.Size([32, 4]))
        """
        z, bias_z = z if isinstance(z, tuple) else (z, z)
        self._check(z)
        return written_out(self, z, bias_z)

    def weight_norm_sq(self, z: Tensor) -> Tensor:
        """Return the squared norm ‖W[b]‖² of each instance's weights, for weight decay on generated weights.

        W is ``materialize(z)[0]``: the base weight counts, biases do not. It is not kept in memory. With h the head as
        ``(O * I, R)`` and w the base weight, the formula ::

            ‖h z + w‖² = zᵀ(hᵀh)z + 2 zᵀ(hᵀw) + ‖w‖²

        needs one R × R matrix for all instances. With fewer instances than features, and with a ``weight_map``, chunks
        of W are formed and squared instead. The result is differentiable in z and in the parameters; the gradient of
        the head needs temporary memory of the head's size. Weights of low rank are not formed, only their factors.

        Args:
            z: ``(B, R)``.

        Returns:
            ``(B,)``, never negative. It is computed in float64 if z or the parameters are in float64, else in float32,
            also under autocast: in float16 it would overflow at a norm of 256. If the base nearly cancels the
            generated weights, the result loses digits, as any difference does.

        Raises:
            TypeError: z has another dtype than the parameters, outside autocast.
            ValueError: z does not have shape ``(B, R)``.

        Example:
            >>> import torch
            >>> from fasthyper.nn import HyperLinear
            >>> layer, z = HyperLinear(8, 4, cond_features=16), torch.randn(32, 16)
            >>> W, _ = layer.materialize(z)
            >>> torch.allclose(layer.weight_norm_sq(z), W.square().sum((1, 2)), rtol=1e-4)
            True
        """
        self._check(z)
        z = z.to(torch.promote_types(torch.promote_types(z.dtype, self._dtype), torch.float32))
        with autocast.off(z):
            if low_rank := self._low_rank():
                return low_rank.norm_sq(z)
            if self.weight_map is not None:
                return mapped_norm_sq(z, self._own("weight"), self._own("base_weight"), self.weight_map)
            weight, base_weight = self._own("weight"), self._own("base_weight")
            return generated_norm_sq(z, weight.flatten(0, 1), None if base_weight is None else base_weight.flatten())

    def merged(self, z: Tensor | tuple[Tensor, Tensor]) -> nn.Linear:
        """Return an ordinary linear layer with the weights of one instance, base included.

        Args:
            z: ``(R,)`` or ``(1, R)``, or a pair, for the weight and for the bias.

        Returns:
            A layer with parameters of its own: it does not follow later changes of z, heads or base.

        Raises:
            TypeError: z has another dtype than the parameters.
            ValueError: z is not that of one instance.

        Example:
            >>> import torch
            >>> from fasthyper.nn import HyperLinear
            >>> layer, x, z = HyperLinear(8, 4, cond_features=16, rank=2), torch.randn(1, 8), torch.randn(1, 16)
            >>> linear = layer.merged(z)
            >>> linear
            Linear(in_features=8, out_features=4, bias=True)
            >>> torch.allclose(linear(x), layer(x, z), atol=1e-5)
            True
        """
        z, bias_z = z if isinstance(z, tuple) else (z, z)
        z, bias_z = self._one(z), bias_z if (head := self._own("bias")) is None else self._one(bias_z, head.shape[1])
        with torch.no_grad(), autocast.off(z):
            weight, bias = written_out(self, z, bias_z)
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, "meta")
        return with_parameters(plain, self.training, weight=weight[0], bias=None if bias is None else bias[0])

    def _low_rank(self) -> LowRank | None:
        if self.rank is None or self.alpha is None or self.weight_a is None or self.weight_b is None:
            return None
        return LowRank(self.weight_a, self.weight_b, *self._tensors()[1:], self.alpha)

    @property
    def _dtype(self) -> torch.dtype:
        low_rank = self._low_rank()
        return (self._own("weight") if low_rank is None else low_rank.weight_b).dtype

    def extra_repr(self) -> str:
        more = "" if self.rank is None else f", rank={self.rank}, alpha={self.alpha}"
        if self.weight_map is not None:
            more = f", weight_map={maps.name_of(self.weight_map)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"cond_features={self.cond_features}, bias={self._own('bias') is not None}, "
            f"base={self._own('base_weight') is not None}{more}"
        )


def check_sizes(**sizes: int) -> None:
    """Check that sizes are integers, and not negative."""
    for name, size in sizes.items():
        if not isinstance(size, (Integral, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
