"""The measured ways to compute y[b,n,o] = Σ_i Σ_r H[o,i,r] x[b,n,i] z[b,r]: fasthyper's own and its peers.

The functions come first, then the class `Way` and the list of all ways. Other libraries are in `libraries.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import fasthyper
from fasthyper.fused import hyper_primary
from fasthyper.planner import machine

from . import libraries
from .inputs import Function, edges
from .workloads import Workload


def generated(z: Tensor, weight: Tensor) -> Tensor:
    """Return W, the output of a hypernetwork's last linear layer."""
    O, I, R = weight.shape
    return (z @ weight.view(O * I, R).T).view(-1, O, I)


def materialised(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Write out W, then multiply by it in one batched product."""
    return torch.bmm(x, generated(z, weight).mT)


def einsum(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Call one einsum. opt_einsum, if installed, chooses the order; otherwise it is from left to right: x ⊗ z first."""
    return torch.einsum("bni,br,oir->bno", x, z, weight)


def outer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Write out x ⊗ z, then multiply by the head in one product."""
    O, I, R = weight.shape
    return (x.unsqueeze(3) * z[:, None, None]).flatten(2) @ weight.view(O, I * R).T


@cache
def _layer(I: int, O: int) -> nn.Linear:
    return nn.Linear(I, O, bias=False, device="meta")


def functional(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Call an `nn.Linear` with the weights of each instance."""
    O, I, _ = weight.shape
    layer = _layer(I, O)
    return vmap(lambda W, points: functional_call(layer, {"weight": W}, (points,)))(generated(z, weight), x)


def bilinear(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Call PyTorch's function for this sum at N = 1."""
    return torch.nn.functional.bilinear(x[:, 0], z, weight).unsqueeze(1)


class _InChunks(torch.autograd.Function):
    """Write out W for a chunk of instances that fits in cache, and again in backward: W in the least memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, instances: int) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.instances = instances
        H = weight.flatten(0, 1)
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        for z_chunk, x_chunk, y_chunk in zip(*(t.split(instances) for t in (z, x, y)), strict=True):
            torch.bmm(x_chunk, (z_chunk @ H.T).unflatten(1, weight.shape[:2]).mT, out=y_chunk)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, weight = ctx.saved_tensors
        H = weight.flatten(0, 1)
        dx, dz = torch.empty_like(x), torch.empty_like(z)
        dH = torch.zeros_like(H, dtype=torch.promote_types(H.dtype, torch.float32))
        for b in range(0, len(x), ctx.instances):
            chunk = slice(b, b + ctx.instances)
            torch.bmm(g[chunk], (z[chunk] @ H.T).unflatten(1, weight.shape[:2]), out=dx[chunk])
            product = torch.mul if x.shape[1] == 1 else torch.bmm  # an outer product if N = 1
            dW = product(g[chunk].mT, x[chunk]).flatten(1)
            torch.mm(dW, H, out=dz[chunk])
            if dH.dtype == H.dtype:
                dH.addmm_(dW.T, z[chunk])
            else:  # a sum in 16 bits would lose digits
                dH += dW.T @ z[chunk]
        return dx, dz, dH.to(H.dtype).view_as(weight), None


def in_chunks(x: Tensor, z: Tensor, weight: Tensor, size: int) -> Tensor:
    """Write out at most `size` bytes of W at a time, at least one instance."""
    per_instance = weight.shape[0] * weight.shape[1] * weight.element_size()
    return _InChunks.apply(x, z, weight, max(1, size // per_instance))


def with_bases(x: Tensor, z: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
    """Apply a layer with generated and shared weights and biases, W written out."""
    weight, bias, base_weight, base_bias = layer
    O, I, R = weight.shape
    W = torch.addmm(base_weight.flatten(), z, weight.view(O * I, R).T).view(-1, O, I)
    return torch.baddbmm(torch.addmm(base_bias, z, bias.T).unsqueeze(1), x, W.mT)


def primary(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
    """Apply two layers and a ReLU, W written out."""
    return with_bases(torch.relu(with_bases(x, z, layers[:4])), z, layers[4:])


def functional_primary(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
    """Call an `nn.Sequential` with the weights and biases of each instance."""
    sizes = (layers[0].shape[1], layers[0].shape[0], layers[4].shape[0])
    linear = [nn.Linear(i, o, device="meta") for i, o in pairwise(sizes)]
    network, parameters = nn.Sequential(linear[0], nn.ReLU(), linear[1]), {}
    for name, (weight, bias, base_weight, base_bias) in zip("02", (layers[:4], layers[4:]), strict=True):
        W = torch.addmm(base_weight.flatten(), z, weight.flatten(0, 1).T)
        parameters[f"{name}.weight"] = W.unflatten(1, base_weight.shape)
        parameters[f"{name}.bias"] = torch.addmm(base_bias, z, bias.T)
    return vmap(lambda own, points: functional_call(network, own, (points,)))(parameters, x)


def over_edges(function: Function, w: Workload, device: str) -> Function:
    """Return a graph's layer: an edge takes x from its source node, and each node sums its incoming edges."""
    source, target = edges(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = function(x[source], z, weight)
        return y.new_zeros(w.nodes, *y.shape[1:]).index_add_(0, target, y)

    return layer


def by_source(function: Function, w: Workload, device: str) -> Function:
    """Return a graph's layer with x · H first: x generates weights for each node, and z of its edges are the points.

    The head is `(O, R, I)`.
    """
    _, target = edges(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = function(z.view(w.nodes, w.neighbours, w.R), x.squeeze(1), weight).flatten(0, 1)
        return y.new_zeros(w.nodes, w.O).index_add_(0, target, y).unsqueeze(1)

    return layer


def in_float32(function: Function) -> Function:
    """Return the function with every operand cast to float32, for processors without 16-bit matrix products."""
    return lambda *leaves: function(*(t.float() for t in leaves)).to(leaves[0].dtype)


def _two_W(w: Workload) -> int:
    return 2 * w.B * (w.hidden * (w.I + w.O) if w.hidden else w.I * w.O)


def _two_folds(w: Workload) -> int:
    return 2 * w.B * w.N * w.I * w.R


def _two_products(w: Workload) -> int:
    return 2 * w.nodes * w.R * w.O


def _few(w: Workload) -> int:
    return w.B * w.R


@dataclass(frozen=True)
class Way:
    """A named way to compute a workload: fasthyper, a variant of it, or a peer.

    Attributes:
        name: in records and tables.
        make: returns the function for a workload on a device, not compiled.
        keeps: the least number of elements that it stores besides inputs and results, gradients included.
        form: `Workload.form` of the workloads that it computes.
        compiled: whether it runs through torch.compile.
        per_sample: whether it works at N = 1 only.
        folds: whether it writes out x ⊗ z of every point, which takes much more work if N is large.
        casts: whether it casts to float32, for processors without 16-bit matrix products.
        layout: the order in which its head has the axes O, I, R.
        library: the package that it needs.
        role: see `records.Record`.
    """

    name: str
    make: Callable[[Workload, str], Function]
    keeps: Callable[[Workload], int] = _two_W
    form: str = "layer"
    compiled: bool = False
    per_sample: bool = False
    folds: bool = False
    casts: bool = False
    layout: tuple[int, int, int] = (0, 1, 2)
    library: str = ""
    role: str = "peer"

    def reason_to_skip(self, w: Workload, dtype: torch.dtype, max_bytes: float) -> str | None:
        """Return why it cannot be measured, or None; `max_bytes` limits the memory that it may keep."""
        if self.library and importlib.util.find_spec(self.library) is None:
            return "not installed"
        if self.per_sample and w.N > 1:
            return "N = 1 only"
        if self.folds and (times := w.N * w.R / (w.N + w.R)) > MAX_WORK:
            return f"{times:.0f} times the work"
        if (size := self.keeps(w) * (4 if self.casts else dtype.itemsize)) > max_bytes:
            return f"would keep {size / 2**30:.0f} GiB"
        return None

    def function(self, w: Workload, device: str = "cpu") -> Function:
        """Return the function. A compiled one compiles at its first call, for the shapes of that call only."""
        function = self.make(w, device)
        function = in_float32(function) if self.casts else function
        return torch.compile(function, dynamic=False) if self.compiled else function


def fused(x: Tensor, z: Tensor, *head: Tensor) -> Tensor:
    """Call fasthyper."""
    if len(head) == 1:
        return fasthyper.hyper_linear(x, z, *head)
    return hyper_primary(x, z, head[:4], head[4:], "relu")


def forced(backend: str, schedule: str | None = None) -> Function:
    """Return fasthyper with the given backend and schedule."""

    def function(*leaves: Tensor) -> Tensor:
        with fasthyper.use_backend(backend, schedule):
            return fused(*leaves)

    return function


def _always(function: Function) -> Callable[[Workload, str], Function]:
    return lambda w, device: function


OURS, AGAIN = "fasthyper", "fasthyper again"
MAX_WORK = 16  # times the least number of flops
CHUNK = {"cpu": 1 << 20, "cuda": 32 << 20}  # bytes of W that fit in the caches of a core, or in a GPU's L2 cache

_LAYERS = (
    Way("materialise + bmm", _always(materialised)),
    Way("einsum", _always(einsum)),
    Way("x ⊗ z first", _always(outer), _two_folds, folds=True),
    Way("vmap(functional_call)", _always(functional)),
    Way("materialise in chunks", lambda w, device: partial(in_chunks, size=CHUNK[device]), _few),
    Way("materialise by hand", _always(forced("materialised"))),
    Way("F.bilinear", _always(bilinear), _few, per_sample=True),
    Way("hypnettorch", libraries.hypnettorch, library="hypnettorch"),
    Way("hyperlight", libraries.hyperlight, library="hyperlight"),
    Way("hyper-nn", libraries.hyper_nn, library="hypernn"),
    Way("compiled materialise + bmm", _always(materialised), compiled=True),
    Way("compiled einsum", _always(einsum), compiled=True),
)
_GRAPHS = (
    Way("PyG NNConv", libraries.nnconv, form="graph", layout=(1, 0, 2), library="torch_geometric"),
    Way("x · H first", partial(by_source, materialised), _two_products, form="graph", layout=(0, 2, 1)),
    Way("compiled x · H first", partial(by_source, materialised), _two_products, "graph", True, layout=(0, 2, 1)),
)
_PRIMARIES = (
    Way("materialise + bmm", _always(primary), form="primary"),
    Way("vmap(functional_call)", _always(functional_primary), form="primary"),
    Way("compiled materialise + bmm", _always(primary), form="primary", compiled=True),
)


def _over_edges(way: Way) -> Way:
    return replace(way, make=lambda w, device: over_edges(way.make(w, device), w, device), form="graph")


# On graphs, the only compiled peer is x · H first: it is faster than any way that computes edge by edge.
_EDGES = tuple(_over_edges(way) for way in _LAYERS if not (way.library or way.compiled))
PEERS = (*_LAYERS, *_EDGES, *_GRAPHS, *_PRIMARIES)


def peers(w: Workload, dtype: torch.dtype, device: str) -> list[Way]:
    """Return the peers that compute a workload. On a CPU without 16-bit matrix products they cast to float32."""
    ways = [way for way in PEERS if way.form == w.form]
    if device == "cpu" and machine("cpu", dtype).work_dtype != dtype:
        return [replace(way, name=f"{way.name}, in float32", casts=True) for way in ways if not way.library]
    return ways


def ours(w: Workload, device: str) -> list[Way]:
    """Return fasthyper, the same again to measure the noise, and variants with a choice forced."""
    if w.form == "graph":
        make, layout = partial(by_source, fused), (0, 2, 1)
        variants = [Way("fasthyper, each edge", partial(over_edges, fused), _few, "graph")]
    else:
        make, layout, names = _always(fused), (0, 1, 2), ("triton", "cuda") if device != "cpu" else ()
        ready = [name for name in names if fasthyper.backends.BACKENDS[name].unavailable() is None]
        variants = [Way(f"fasthyper, {name}", _always(forced(name)), _few, w.form) for name in ready]
    first = Way(OURS, make, _few, w.form, layout=layout, role="ours")
    return [first, replace(first, name=AGAIN, role="again"), *(replace(v, role="variant") for v in variants)]


def schedules(backend: str) -> list[Way]:
    """Return fasthyper with each schedule forced."""
    names = fasthyper.problem.SCHEDULES
    return [Way(f"fasthyper, {name}", _always(forced(backend, name)), _few, role="variant") for name in names]
