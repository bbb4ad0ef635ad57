"""W of a layer that meets one z many times in a `deliver` block, as in a recurrent network: written out once.

Each call of a layer generates W anew, in tiles. From the fourth call with one z on, W is a node of autograd's graph,
which all further calls multiply with: it is computed once, and the sum of its gradients is contracted with the head
once. The block keeps W, where it fits the workspace, until it ends or a backward pass has used it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper import backends, planner
from fasthyper.ops import autocast, checkpoints, kept, shapes
from fasthyper.ops.register import MISSING, transformed
from fasthyper.problem import AUTO

_CALLS = 3  # as many cost about what W written out costs, so that one call more is never much slower
_FEWEST = 48  # features of z; with fewer, to generate W costs little more than to read it


class _Met:
    """The z that a layer has met, the state of all that W depends on, the number of calls, and W, if it is kept."""

    def __init__(self, z: Tensor, state: list[object]) -> None:
        self.z, self.state, self.calls = z, state, 0
        self.w: Tensor | None = None


class Reused:
    """What the layers of one block have met. It belongs to one thread, and ends with the block."""

    def __init__(self) -> None:
        self._met: dict[nn.Module, _Met] = {}

    def product(self, layer: Any, x: Any, z: Any) -> Tensor | None:
        """Return y of a HyperLinear that meets z for the fourth time or more; None if it is to be computed as ever."""
        if not _may_reuse(layer, x, z):
            return None
        state = _state(layer, z)
        met = self._met.get(layer)
        if met is None or met.z is not z or met.state != state:
            met = self._met[layer] = _Met(z, state)
        met.calls += 1
        if met.calls <= _CALLS or checkpoints.may_be_active():
            return None
        own = layer._to_apply()
        parts = [x, z, *own]
        if autocast.enabled(x.device.type):
            parts = [*map(autocast.follow, parts)]
        x, z, weight, bias, base_weight, base_bias = parts
        given = {"weight": weight, "x": x, "z": z, "bias": bias}
        if not shapes.agree({**shapes.LINEAR, "x": "BNI"}, {**given, "x": shapes.flatten_points(x)}, ("bias",)):
            return None  # the ordinary way says what is wrong
        with autocast.off(x):
            if met.w is None:
                if not self._fits(weight, z):
                    return None
                met.w = _Weights.apply(z, weight, base_weight, weakref.ref(met))
            y = kept.product(met.w, shapes.flatten_points(x), z, bias, base_bias)
        return shapes.restore_points(y, x)

    def _fits(self, weight: Tensor, z: Tensor) -> bool:
        """Return whether one more W, its gradient and the next summand of it fit the workspace."""
        own = z.shape[0] * weight.shape[0] * weight.shape[1] * z.element_size()
        others = sum(met.w.nbytes for met in self._met.values() if met.w is not None)
        return own > 0 and kept.COPIES * (own + others) <= planner.get_workspace_limit()


def _may_reuse(layer: Any, x: Any, z: Any) -> bool:
    if torch.compiler.is_compiling() or MISSING or type(z) is not Tensor or type(x) not in (Tensor, nn.Parameter):
        return False
    if layer.cond_features < _FEWEST or layer.rank is not None or layer.weight_map is not None or x.dim() < 2:
        return False
    # A weight that is computed, such as a parametrized one, may be another in each call.
    own = layer.head if "places" in vars(layer) else layer
    own = own._modules.get("head") or own  # that of a chunked head
    return "weight" in own._parameters and not transformed() and backends.current() == (AUTO, AUTO)


def _state(layer: nn.Module, z: Tensor) -> list[object]:
    """Return what is the same in two calls that have the same W: also changes in place are counted."""
    state: list[object] = [checkpoints.version(z), torch.is_grad_enabled(), _dtype(z)]
    for parameter in layer.parameters():  # with a shared head, those of the head
        state += [id(parameter), type(parameter), checkpoints.version(parameter), parameter.requires_grad]
    return state


def _dtype(z: Tensor) -> torch.dtype:
    device = z.device.type
    return torch.get_autocast_dtype(device) if autocast.enabled(device) else z.dtype


class _Weights(torch.autograd.Function):
    """W[b] = H·z[b] + W0.

    Several backward passes may come here, one for each result, where each call for itself would allow them: what this
    node needs is not freed after the first, unlike saved tensors. The block then writes W out anew: a step of an
    optimizer may follow.
    """

    @staticmethod
    def forward(ctx, z, weight, base_weight, met):
        ctx.parts, ctx.met = (z, weight), met
        ctx.versions = [*map(checkpoints.version, ctx.parts)]
        return kept.generate(z, weight, base_weight)

    @staticmethod
    def backward(ctx, dw):
        if (met := ctx.met()) is not None:
            met.w = None
        z, weight = ctx.parts
        if [*map(checkpoints.version, ctx.parts)] != ctx.versions:
            raise RuntimeError("z or weight has been changed in place since the forward, and its gradient needs it")
        with autocast.off(dw):
            return *kept.grads_of_parts(dw, z, weight, ctx.needs_input_grad[:3]), None
