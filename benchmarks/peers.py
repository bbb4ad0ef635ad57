"""The usual ways to compute y[b,n,o] = Σ_i Σ_r H[o,i,r] x[b,n,i] z[b,r], each at its best.

A way is a function of (x, z, *head), as `Inputs.leaves` has them. Layers of graphs are made of those of edges here;
ways with a form of their own for graphs, and those of other libraries, are in `libraries.py`.
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
from .inputs import edges
from .workloads import Workload

Way = Callable[..., Tensor]


def generated(z: Tensor, weight: Tensor) -> Tensor:
    """W, as a hypernetwork's last linear layer gives it."""
    O, I, R = weight.shape
    return (z @ weight.view(O * I, R).T).view(-1, O, I)


def materialised(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """W, then one batched product."""
    return torch.bmm(x, generated(z, weight).mT)


def einsum(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """One einsum, in the order that opt_einsum finds where it is installed, else from left to right: x ⊗ z first."""
    return torch.einsum("bni,br,oir->bno", x, z, weight)


def outer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """x ⊗ z first, then one product."""
    O, I, R = weight.shape
    return (x.unsqueeze(3) * z[:, None, None]).flatten(2) @ weight.view(O, I * R).T


@cache
def _layer(I: int, O: int) -> nn.Linear:
    return nn.Linear(I, O, bias=False, device="meta")


def functional(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """An `nn.Linear` called with each instance's weights."""
    O, I, _ = weight.shape
    layer = _layer(I, O)
    return vmap(lambda W, rows: functional_call(layer, {"weight": W}, (rows,)))(generated(z, weight), x)


def bilinear(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own name for this sum, at N = 1."""
    return torch.nn.functional.bilinear(x[:, 0], z, weight).unsqueeze(1)


class _InChunks(torch.autograd.Function):
    """W of some instances at a time, in cache, and again in backward: as little memory as the usual way can do with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, instances: int) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.instances = instances
        H = weight.flatten(0, 1)
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        for part, rows, out in zip(z.split(instances), x.split(instances), y.split(instances), strict=True):
            torch.bmm(rows, (part @ H.T).unflatten(1, weight.shape[:2]).mT, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, weight = ctx.saved_tensors
        H = weight.flatten(0, 1)
        dx, dz = torch.empty_like(x), torch.empty_like(z)
        dH = torch.zeros_like(H, dtype=torch.promote_types(H.dtype, torch.float32))
        for b in range(0, len(x), ctx.instances):
            now = slice(b, b + ctx.instances)
            torch.bmm(g[now], (z[now] @ H.T).unflatten(1, weight.shape[:2]), out=dx[now])
            product = torch.mul if x.shape[1] == 1 else torch.bmm  # of one point it is an outer product
            dW = product(g[now].mT, x[now]).flatten(1)
            torch.mm(dW, H, out=dz[now])
            if dH.dtype == H.dtype:
                dH.addmm_(dW.T, z[now])
            else:  # a sum in 16 bits would lose digits
                dH += dW.T @ z[now]
        return dx, dz, dH.to(H.dtype).view_as(weight), None


def in_chunks(x: Tensor, z: Tensor, weight: Tensor, size: int) -> Tensor:
    """W of so many instances at a time as make `size` bytes, at least one."""
    per_instance = weight.shape[0] * weight.shape[1] * weight.element_size()
    return _InChunks.apply(x, z, weight, max(1, size // per_instance))


def with_bases(x: Tensor, z: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
    """A layer with all that is generated and shared, W written out."""
    weight, bias, base_weight, base_bias = layer
    O, I, R = weight.shape
    W = torch.addmm(base_weight.flatten(), z, weight.view(O * I, R).T).view(-1, O, I)
    return torch.baddbmm(torch.addmm(base_bias, z, bias.T).unsqueeze(1), x, W.mT)


def primary(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
    """Two layers and a ReLU, W written out."""
    return with_bases(torch.relu(with_bases(x, z, layers[:4])), z, layers[4:])


def functional_primary(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
    """An `nn.Sequential` called with each instance's weights and biases."""
    sizes = (layers[0].shape[1], layers[0].shape[0], layers[4].shape[0])
    linear = [nn.Linear(i, o, device="meta") for i, o in pairwise(sizes)]
    network, made = nn.Sequential(linear[0], nn.ReLU(), linear[1]), {}
    for name, (weight, bias, base_weight, base_bias) in zip("02", (layers[:4], layers[4:]), strict=True):
        W = torch.addmm(base_weight.flatten(), z, weight.flatten(0, 1).T)
        made[f"{name}.weight"] = W.unflatten(1, base_weight.shape)
        made[f"{name}.bias"] = torch.addmm(base_bias, z, bias.T)
    return vmap(lambda own, rows: functional_call(network, own, (rows,)))(made, x)


def over_edges(way: Way, w: Workload, device: str) -> Way:
    """A graph's layer: each edge's x is that of the node where it starts, and each node sums what comes in."""
    source, target = edges(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = way(x[source], z, weight)
        return y.new_zeros(w.nodes, *y.shape[1:]).index_add_(0, target, y)

    return layer


def by_source(way: Way, w: Workload, device: str) -> Way:
    """A graph's layer, x · H first: the edges that leave a node are the points of a layer whose weights x generates.

    The head is `(O, R, I)` here.
    """
    _, target = edges(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        y = way(z.view(w.nodes, w.neighbours, w.R), x.squeeze(1), weight).flatten(0, 1)
        return y.new_zeros(w.nodes, w.O).index_add_(0, target, y).unsqueeze(1)

    return layer


def in_float32(way: Way) -> Way:
    """The same with every operand cast: what to do where a processor has no products of 16 bits."""
    return lambda *leaves: way(*(t.float() for t in leaves)).to(leaves[0].dtype)


def kind(w: Workload) -> str:
    """What is computed: `"layer"`, `"graph"` or `"primary"`."""
    return "graph" if w.neighbours > 1 else "primary" if w.hidden else "layer"


def _two_W(w: Workload) -> int:
    return 2 * w.B * (w.hidden * (w.I + w.O) if w.hidden else w.I * w.O)


def _two_folds(w: Workload) -> int:
    return 2 * w.B * w.N * w.I * w.R


def _two_products(w: Workload) -> int:
    return 2 * w.nodes * w.R * w.O


def _few(w: Workload) -> int:
    return w.B * w.R


@dataclass(frozen=True)
class Peer:
    """A way to compare with, or one of ours.

    Attributes:
        name: what it is called in tables.
        make: the function for a workload on a device, not compiled.
        keeps: how many numbers it keeps at least beside inputs and results, gradients of these included.
        of: what it computes, see `kind`.
        compiled: whether to run it through torch.compile.
        per_sample: whether it has N = 1 only.
        folds: whether it makes x ⊗ z of every point, which with many of them is many times the work.
        wide: whether it casts to float32, for processors without products of 16 bits.
        layout: the order of the head's axes O, I, R in which it keeps its head.
        library: the package that it needs.
        role: see `records.Record`.
    """

    name: str
    make: Callable[[Workload, str], Way]
    keeps: Callable[[Workload], int] = _two_W
    of: str = "layer"
    compiled: bool = False
    per_sample: bool = False
    folds: bool = False
    wide: bool = False
    layout: tuple[int, int, int] = (0, 1, 2)
    library: str = ""
    role: str = "peer"

    def unfit(self, w: Workload, dtype: torch.dtype, most: float) -> str | None:
        """Why it is not measured, or None; `most` is how many bytes it may keep."""
        if self.library and importlib.util.find_spec(self.library) is None:
            return "not installed"
        if self.per_sample and w.N > 1:
            return "N = 1 only"
        if self.folds and (times := w.N * w.R / (w.N + w.R)) > MOST_WORK:
            return f"{times:.0f} times the work"
        if (size := self.keeps(w) * (4 if self.wide else dtype.itemsize)) > most:
            return f"would keep {size / 2**30:.0f} GiB"
        return None

    def function(self, w: Workload, device: str = "cpu") -> Way:
        """What to call. A compiled one compiles at its first call, for the shapes of that call alone."""
        way = self.make(w, device)
        way = in_float32(way) if self.wide else way
        return torch.compile(way, dynamic=False) if self.compiled else way


def fused(x: Tensor, z: Tensor, *head: Tensor) -> Tensor:
    """Ours."""
    if len(head) == 1:
        return fasthyper.hyper_linear(x, z, *head)
    return hyper_primary(x, z, head[:4], head[4:], "relu")


def forced(backend: str, schedule: str | None = None) -> Way:
    """Ours by a backend, or in an order, of one's choice."""

    def way(*leaves: Tensor) -> Tensor:
        with fasthyper.use_backend(backend, schedule):
            return fused(*leaves)

    return way


def _just(way: Way) -> Callable[[Workload, str], Way]:
    return lambda w, device: way


OURS, AGAIN = "fasthyper", "fasthyper again"
MOST_WORK = 16
CHUNK = {"cpu": 1 << 20, "cuda": 32 << 20}  # bytes of W that stay in the caches of a core, or in the L2 of a GPU

_LAYERS = (
    Peer("materialise + bmm", _just(materialised)),
    Peer("einsum", _just(einsum)),
    Peer("x ⊗ z first", _just(outer), _two_folds, folds=True),
    Peer("vmap(functional_call)", _just(functional)),
    Peer("materialise in chunks", lambda w, device: partial(in_chunks, size=CHUNK[device]), _few),
    Peer("materialise by hand", _just(forced("materialised"))),
    Peer("F.bilinear", _just(bilinear), _few, per_sample=True),
    Peer("hypnettorch", libraries.hypnettorch, library="hypnettorch"),
    Peer("hyperlight", libraries.hyperlight, library="hyperlight"),
    Peer("hyper-nn", libraries.hyper_nn, library="hypernn"),
    Peer("compiled materialise + bmm", _just(materialised), compiled=True),
    Peer("compiled einsum", _just(einsum), compiled=True),
)
_GRAPHS = (
    Peer("PyG NNConv", libraries.nnconv, of="graph", layout=(1, 0, 2), library="torch_geometric"),
    Peer("x · H first", partial(by_source, materialised), _two_products, of="graph", layout=(0, 2, 1)),
    Peer("compiled x · H first", partial(by_source, materialised), _two_products, "graph", True, layout=(0, 2, 1)),
)
_PRIMARIES = (
    Peer("materialise + bmm", _just(primary), of="primary"),
    Peer("vmap(functional_call)", _just(functional_primary), of="primary"),
    Peer("compiled materialise + bmm", _just(primary), of="primary", compiled=True),
)


def _over_edges(peer: Peer) -> Peer:
    return replace(peer, make=lambda w, device: over_edges(peer.make(w, device), w, device), of="graph")


# Of the ways edge by edge, none is compiled: on a graph x · H comes first, and that is.
_EDGES = tuple(_over_edges(p) for p in _LAYERS if not (p.library or p.compiled))
PEERS = (*_LAYERS, *_EDGES, *_GRAPHS, *_PRIMARIES)


def peers(w: Workload, dtype: torch.dtype, device: str) -> list[Peer]:
    """Everyone who computes what a workload asks for, in float32 where a processor has no products of 16 bits."""
    those = [p for p in PEERS if p.of == kind(w)]
    if device == "cpu" and machine("cpu", dtype).work_dtype != dtype:
        return [replace(p, name=f"{p.name}, in float32", wide=True) for p in those if not p.library]
    return those


def ours(w: Workload, device: str) -> list[Peer]:
    """Ours, once more for the noise, and ours with something forced."""
    if w.neighbours > 1:
        way, layout = partial(by_source, fused), (0, 2, 1)
        variants = [Peer("fasthyper, each edge", partial(over_edges, fused), _few, "graph")]
    else:
        way, layout, names = _just(fused), (0, 1, 2), ("triton", "cuda") if device != "cpu" else ()
        ready = [name for name in names if fasthyper.backends.BACKENDS[name].unavailable() is None]
        variants = [Peer(f"fasthyper, {name}", _just(forced(name)), _few, kind(w)) for name in ready]
    first = Peer(OURS, way, _few, kind(w), layout=layout, role="ours")
    return [first, replace(first, name=AGAIN, role="again"), *(replace(v, role="variant") for v in variants)]


def schedules(backend: str) -> list[Peer]:
    """Ours in each order of contraction."""
    orders = fasthyper.problem.SCHEDULES
    return [Peer(f"fasthyper, {order}", _just(forced(backend, order)), _few, role="variant") for order in orders]
