"""The workloads by fasthyper itself; `ways.py` has the list."""

from __future__ import annotations

from torch import Tensor
from torch.func import functional_call

import fasthyper
from fasthyper.fused import hyper_primary

from .inputs import Function
from .terms import indices
from .workloads import Workload


def fused(x: Tensor, z: Tensor, *head: Tensor) -> Tensor:
    """Call fasthyper."""
    if len(head) == 1:
        return fasthyper.hyper_linear(x, z, *head)
    return hyper_primary(x, z, head[:4], head[4:], "relu")


def fused_terms(w: Workload, device: str) -> Function:
    """Return fasthyper's sum over terms. Its `Incidence` is made once."""
    source, cond, target = indices(w, device)
    rows = {"num_sources": w.S or None, "num_conds": w.C or None, "num_targets": w.T or None}
    incidence = fasthyper.Incidence(source, cond, target, **rows)
    return lambda x, z, weight: fasthyper.hyper_linear(x, z, weight, incidence=incidence)


def fused_pairs(w: Workload, device: str) -> Function:
    """Return fasthyper's layer of pairs."""
    layer = fasthyper.nn.PairwiseBilinear(w.I, w.R, w.O, bias=False, device="meta")
    return lambda x, z, weight: functional_call(layer, {"weight": weight}, (x, z))


def fused_convolution(w: Workload, device: str) -> Function:
    """Return fasthyper's generated convolution."""
    settings = {"stride": w.stride, "padding": w.kernel // 2, "groups": w.groups}
    return lambda x, z, weight: fasthyper.hyper_conv2d(x, z, weight, **settings)


def fused_mapped(w: Workload, device: str) -> Function:
    """Return fasthyper's layer with a function of its weights."""
    return lambda x, z, weight: fasthyper.hyper_linear(x, z, weight, weight_map=w.weight_map)


def fused_low_rank(w: Workload, device: str) -> Function:
    """Return fasthyper's layer with a rank."""
    layer = fasthyper.nn.HyperLinear(w.I, w.O, w.R, bias=False, base=False, rank=w.rank, device="meta")
    return lambda x, z, a, b: functional_call(layer, {"weight_a": a, "weight_b": b}, (x, z))


def forced(backend: str, schedule: str | None = None, function: Function = fused) -> Function:
    """Return fasthyper with the given backend and schedule."""

    def with_choice(*leaves: Tensor) -> Tensor:
        with fasthyper.use_backend(backend, schedule):
            return function(*leaves)

    return with_choice
