"""`HyperAffine`: a norm whose scale and shift are generated from z for each instance."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.incidence import Incidence
from fasthyper.nn.generated import GeneratedLayer
from fasthyper.nn.init import INITS
from fasthyper.nn.linear import check_sizes
from fasthyper.nn.merge import with_parameters
from fasthyper.nn.rows import spread
from fasthyper.nn.tracing import is_proxy, recorded
from fasthyper.ops import autocast, shapes

OVER_LAST_AXES = nn.LayerNorm, nn.RMSNorm
OVER_CHANNELS = nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
NORMS: tuple[type[nn.Module], ...] = (*OVER_LAST_AXES, *OVER_CHANNELS)


class HyperAffine(GeneratedLayer):
    """A normalisation whose scale and shift are generated from z for each instance.

    ``y[b] = norm(x)[b] ⊙ (weight·z[b] + base_weight) + bias·z[b] + base_bias``

    Statistics are those of the norm: a BatchNorm normalises over all instances, and keeps its running statistics.

    Args:
        norm: a LayerNorm, RMSNorm, GroupNorm or BatchNorm; it is copied. Its scale and shift become the base; where
            it has none, the base is a scale of one and a shift of zero.
        cond_features: the number of features of z, R.
        bias: if True, generate a shift. If False, a shift of the norm stays an ordinary parameter.
        base: if True, keep the scale and shift of the norm, to which the generated ones are added.
        init: ``"bias_hyper"``: the heads are zero, which needs a base. ``"hyperfan_in"`` or ``"hyperfan_out"``: the
            generated scale has second moment 1 if z has, and the generated shift is zero. None means
            ``"bias_hyper"`` with a base, else ``"hyperfan_in"``.

    Shape:
        - x: what the norm takes. Its first dimension is B.
        - z: ``(B, R)``.
        - Output: as x.

    Attributes:
        weight: the head of the scale, ``(*C, R)``; ``*C`` are the axes of the norm's scale.
        bias: the head of the shift, ``(*C, R)``, or None.
        base_weight: the scale that all instances share, ``(*C)``, or None.
        base_bias: the shift that all instances share, ``(*C)``, or None.
        norm: the norm, without scale and shift.

    Raises:
        TypeError: the norm is of another type, or ``cond_features`` is not an integer.
        ValueError: ``cond_features`` is negative, ``init`` is unknown, or it is ``"bias_hyper"`` without a base.

    References:
        Perez, Strub, de Vries, Dumoulin, Courville, "FiLM: Visual Reasoning with a General Conditioning Layer",
        AAAI 2018, `arXiv 1709.07871 <https://arxiv.org/abs/1709.07871>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperAffine
        >>> layer = HyperAffine(torch.nn.GroupNorm(2, 8), cond_features=16)
        >>> layer(torch.randn(4, 8, 10, 10), torch.randn(4, 16)).shape
        torch.Size([4, 8, 10, 10])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    base_weight: nn.Parameter | None
    base_bias: nn.Parameter | None

    def __init__(
        self, norm: nn.Module, cond_features: int, bias: bool = True, base: bool = True, init: str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(norm, NORMS):
            raise TypeError(f"norm must be one of {', '.join(t.__name__ for t in NORMS)}, got {type(norm).__name__}")
        check_sizes(cond_features=cond_features)
        self.cond_features = cond_features
        self.init = init or ("bias_hyper" if base else "hyperfan_in")
        self.norm = copy.deepcopy(norm)
        old_scale, old_shift = (self.norm._parameters.get(name) for name in ("weight", "bias"))
        shape = _shape_of_scale(norm)
        device, dtype = (None, None) if old_scale is None else (old_scale.device, old_scale.dtype)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        def or_else(value: float, old: nn.Parameter | None) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, device=device, dtype=dtype)) if old is None else old

        self.weight = parameter(*shape, cond_features)
        self.register_parameter("bias", parameter(*shape, cond_features) if bias else None)
        self.register_parameter("base_weight", or_else(1.0, old_scale) if base else None)
        keep_shift = (base and bias) or (old_shift is not None and (base or not bias))
        self.register_parameter("base_bias", or_else(0.0, old_shift) if keep_shift else None)
        self.norm.register_parameter("weight", None)
        self.norm.register_parameter("bias", None)
        self.reset_heads()

    def reset_heads(self) -> None:
        """Initialise the heads again, as ``init`` says; the base stays as it is."""
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {self.init!r}")
        zero = self.init == "bias_hyper"
        if zero and self.base_weight is None:
            raise ValueError("init 'bias_hyper' starts from the base: it needs base=True")
        bound = 0 if zero else math.sqrt(3 / max(1, self.cond_features))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None, incidence: Incidence | None = None) -> Tensor:
        """Normalise x, and apply the scale and shift of each instance.

        Args:
            x: what the norm takes; its first dimension is B, with an incidence E.
            z: ``(B, R)``; with an incidence ``(C, R)``. If None, the z of the running Hypernetwork.
            incidence: which row of z each row of x meets; it has neither sources nor targets.

        Returns:
            As x.

        Raises:
            TypeError: the dtypes differ.
            ValueError: the sizes do not fit, or z is None outside of a Hypernetwork.
        """
        z, incidence, repeat = self._condition(z, incidence)
        if is_proxy(x):
            return recorded(self, x, *self._to_record(z, incidence, repeat))
        self._check(z)
        shapes.check_input("x", x)
        own = self._tensors()

        def generated(head: Tensor, base: Tensor | None) -> Tensor:
            with autocast.off(x):  # a scale of 16 bits would round more than the norm does, which runs in float32
                rows = F.linear(z.to(head.dtype), head.flatten(0, -2), None if base is None else base.flatten())
            return self._beside(x, spread(rows, x, incidence, repeat))

        scale = generated(own.weight, own.base_weight)
        y = self.norm(x)
        if own.bias is not None:
            return torch.addcmul(generated(own.bias, own.base_bias), y, scale)
        shift = own.base_bias
        return y * scale if shift is None else torch.addcmul(self._beside(x, shift.flatten()[None]), y, scale)

    def _beside(self, x: Tensor, rows: Tensor) -> Tensor:
        """View rows (B, ΠC) so that they broadcast with x."""
        if isinstance(self.norm, OVER_CHANNELS):
            return rows.reshape(*rows.shape, *(1,) * (x.dim() - 2))
        shape = self._own("weight").shape[:-1]
        return rows.reshape(rows.shape[0], *(1,) * (x.dim() - 1 - len(shape)), *shape)

    def merged(self, z: Tensor) -> nn.Module:
        """Return the norm with the scale and shift of one instance.

        Args:
            z: ``(R,)`` or ``(1, R)``.

        Returns:
            A copy of the norm, with parameters of its own.

        Raises:
            TypeError: z has another dtype than the parameters.
            ValueError: z is not that of one instance, or an RMSNorm would have a shift.
        """
        z, plain = self._one(z), copy.deepcopy(self.norm)
        with torch.no_grad(), autocast.off(z):
            own = self._tensors()
            scale = _written_out(z, own.weight, own.base_weight)
            shift = own.base_bias if own.bias is None else _written_out(z, own.bias, own.base_bias)
        for flag in ("affine", "elementwise_affine"):
            if hasattr(plain, flag):
                setattr(plain, flag, True)
        if isinstance(plain, nn.RMSNorm):
            if shift is not None:
                raise ValueError("an RMSNorm has no shift, but this layer has one")
            return with_parameters(plain, plain.training, weight=scale)
        return with_parameters(plain, plain.training, weight=scale, bias=shift)

    def extra_repr(self) -> str:
        bias, base = self._own("bias") is not None, self.base_weight is not None
        return f"cond_features={self.cond_features}, bias={bias}, base={base}"


def _written_out(z: Tensor, head: Tensor, base: Tensor | None) -> Tensor:
    """Return the scale or shift (*C) that z (1, R) generates."""
    rows = F.linear(z, head.flatten(0, -2), None if base is None else base.flatten())
    return rows.view(head.shape[:-1])


def _shape_of_scale(norm: nn.Module) -> tuple[int, ...]:
    if isinstance(norm, OVER_LAST_AXES):
        return tuple(norm.normalized_shape)
    return (norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features,)  # type: ignore[return-value]
