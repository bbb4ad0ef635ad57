"""The measured ways to compute y[b,n,o] = Σ_i Σ_r H[o,i,r] x[b,n,i] z[b,r]: fasthyper's own and its peers.

The functions come first, then the class `Way` and the list of all ways. fasthyper's are in `own_ways.py`, other
libraries in `libraries.py`, the peers of graphs, ragged points and pairs in `term_ways.py`, those of convolutions
and of low rank in `conv_ways.py`, and those with a function of W in `mapped_ways.py`.
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
from fasthyper.planner import machine

from . import conv_ways, libraries, mapped_ways, term_ways
from .inputs import Function
from .own_ways import forced, fused, fused_convolution, fused_low_rank, fused_mapped, fused_pairs, fused_terms
from .roofline import contraction_flops, features
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


def in_float32(function: Function) -> Function:
    """Return the function with every operand cast to float32, for processors without 16-bit matrix products."""
    return lambda *leaves: function(*(t.float() for t in leaves)).to(leaves[0].dtype)


def _two_W(w: Workload) -> int:
    return 2 * w.B * (w.hidden * (w.I + w.O) if w.hidden else w.I * w.O)


def _two_folds(w: Workload) -> int:
    return 2 * w.B * w.N * w.I * w.R


def _two_sums(w: Workload) -> int:
    return 2 * w.T * w.I * w.R


def _two_products(w: Workload) -> int:
    return 2 * (w.S or w.B) * w.R * w.O


def _two_products_of_terms(w: Workload) -> int:
    return 2 * w.B * w.R * w.O


def _two_shared_W(w: Workload) -> int:
    return 2 * (w.C or w.B) * w.I * w.O


def _two_kernels(w: Workload) -> int:
    return 2 * w.B * sum(I * O for I, O in features(w))


def _kernels_and_patches(w: Workload) -> int:
    return _two_kernels(w) + w.B * w.N * w.I * w.kernel**2


def _two_mixtures(w: Workload) -> int:
    return 2 * w.B * w.N * w.O * w.R


def _two_images(w: Workload) -> int:
    return 2 * w.B * w.side**2 * w.I * w.R


def _few(w: Workload) -> int:
    return w.B * w.R


@dataclass(frozen=True)
class Way:
    """A named way to compute a workload: fasthyper, a variant of it, or a peer.

    Attributes:
        name: in records and tables.
        make: returns the function for a workload on a device, not compiled.
        keeps: the least number of elements that it stores besides inputs and results, gradients included.
        forms: `Workload.form` of the workloads that it computes.
        compiled: whether it runs through torch.compile.
        per_sample: whether it works at N = 1 only.
        folds: whether it multiplies x ⊗ z of every point by the head, which takes much more work if N is large.
        each: whether it multiplies by the head once for each term, which takes much more work if terms share rows.
        casts: whether it casts to float32, for processors without 16-bit matrix products.
        layout: the order in which its head has the axes O, I, R; of a convolution O, I, those of the kernel, R.
        library: the package that it needs.
        role: see `records.Record`.
    """

    name: str
    make: Callable[[Workload, str], Function]
    keeps: Callable[[Workload], int] = _two_W
    forms: tuple[str, ...] = ("layer",)
    compiled: bool = False
    per_sample: bool = False
    folds: bool = False
    each: bool = False
    casts: bool = False
    layout: tuple[int, ...] = (0, 1, 2)
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
        if self.each and (times := 2 * w.B * w.R * w.I * w.O / contraction_flops(w)) > MAX_WORK:
            return f"{times:.0f} times the work"
        if (size := self.keeps(w) * (4 if self.casts else dtype.itemsize)) > max_bytes:
            return f"would keep {size / 2**30:.0f} GiB"
        return None

    def function(self, w: Workload, device: str = "cpu") -> Function:
        """Return the function. A compiled one compiles at its first call, for the shapes of that call only."""
        function = self.make(w, device)
        function = in_float32(function) if self.casts else function
        return torch.compile(function, dynamic=False) if self.compiled else function


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
_PRIMARIES = (
    Way("materialise + bmm", _always(primary), forms=("primary",)),
    Way("vmap(functional_call)", _always(functional_primary), forms=("primary",)),
    Way("compiled materialise + bmm", _always(primary), forms=("primary",), compiled=True),
)
GRAPHS, SHARED_Z = ("graph", "relations"), ("relations", "ragged")
TERMS, CONVOLUTION = ("graph", "relations", "ragged"), ("convolution",)
X_FIRST, Z_FIRST, EXPERTS_FIRST = (1, 0, 2), (2, 0, 1), (4, 0, 1, 2, 3)
_EACH = ("materialise + bmm", "x ⊗ z first", "materialise in chunks", "compiled materialise + bmm")
"""The ways of layers that are also applied to each term: the others take longer in the same order."""


def _each_term(way: Way) -> Way:
    def make(w: Workload, device: str) -> Function:
        return term_ways.each_term(way.make(w, device), w, device)

    return replace(way, make=make, forms=TERMS, each=True)


def _compiled(way: Way) -> Way:
    return replace(way, name=f"compiled {way.name}", compiled=True)


def _in_buckets(make: Callable[..., Function]) -> Callable[[Workload, str], Function]:
    return partial(make, ratio=term_ways.SIMILAR)


_CHUNKS_OF_FOLD = Way("x ⊗ z in chunks", lambda w, d: term_ways.fold_in_chunks(w, d, CHUNK[d]), _few, TERMS, each=True)
_AGGREGATED = (
    Way("x ⊗ z of a target first, padded", term_ways.aggregate, _two_sums, forms=GRAPHS),
    Way("x ⊗ z of a target first, in buckets", _in_buckets(term_ways.aggregate), _two_sums, forms=GRAPHS),
    Way("x ⊗ z of a target first, index_add", term_ways.aggregate_added, _two_folds, forms=GRAPHS),
)
_PROJECTED = (
    Way("x · H first, gathered", term_ways.project_gathered, _two_products_of_terms, forms=GRAPHS, layout=X_FIRST),
    Way("x · H first, padded", term_ways.project, _two_products, forms=GRAPHS, layout=X_FIRST),
    Way("x · H first, in buckets", _in_buckets(term_ways.project), _two_products, forms=GRAPHS, layout=X_FIRST),
)
_GENERATED = (
    Way("W once, gathered", term_ways.gathered, forms=SHARED_Z),
    Way("W once, split", term_ways.split, _two_shared_W, forms=SHARED_Z),
    Way("W once, padded", term_ways.generate, _two_shared_W, forms=SHARED_Z),
    Way("W once, in buckets", _in_buckets(term_ways.generate), _two_shared_W, forms=SHARED_Z),
    Way("W once, nested", term_ways.nested, _two_shared_W, forms=SHARED_Z),
    Way("W once, grouped_mm", term_ways.grouped, _two_shared_W, forms=SHARED_Z),
)
_LIBRARIES = (
    Way("PyG NNConv", libraries.nnconv, forms=("graph",), layout=(1, 0, 2), library="torch_geometric"),
    Way("PyG RGCNConv", libraries.rgcnconv, forms=("relations",), layout=(2, 1, 0), library="torch_geometric"),
    Way(
        "PyG FastRGCNConv",
        partial(libraries.rgcnconv, fast=True),
        forms=("relations",),
        layout=(2, 1, 0),
        library="torch_geometric",
    ),
)
_PAIRS = (
    Way("einsum", _always(term_ways.pairs_einsum), _two_products, forms=("pairs",)),
    Way("two einsums", _always(term_ways.pairs_two_einsums), _two_products, forms=("pairs",)),
    Way("x · H first", term_ways.pairs_x_first, _two_products, forms=("pairs",), layout=X_FIRST),
    Way("z · H first", term_ways.pairs_z_first, _two_products, forms=("pairs",), layout=Z_FIRST),
    Way("output by output", _always(term_ways.pairs_each_output), _two_products, forms=("pairs",)),
)
_OVER_TERMS = (
    *(_each_term(way) for way in _LAYERS if way.name in _EACH),
    _CHUNKS_OF_FOLD,
    *_AGGREGATED,
    *_PROJECTED,
    *_GENERATED,
    *_LIBRARIES,
    *_PAIRS,
    *map(_compiled, (*_AGGREGATED, *_PROJECTED[1:], _GENERATED[2], *_PAIRS[2:4])),
)
_CONVOLUTIONS = (
    Way("instances as groups", conv_ways.instances_as_groups, _two_kernels, CONVOLUTION),
    Way("R convolutions, mixed", conv_ways.mixed, _two_mixtures, CONVOLUTION, folds=True),
    Way("unfold + bmm", conv_ways.unfolded, _kernels_and_patches, CONVOLUTION),
    Way("x ⊗ z first", conv_ways.outer, _two_images, CONVOLUTION, folds=True),
    Way("one instance at a time", conv_ways.one_by_one, _two_kernels, CONVOLUTION),
    Way("materialise in chunks", lambda w, d: conv_ways.in_chunks(w, d, CHUNK[d]), _few, CONVOLUTION),
    Way("timm CondConv2d", libraries.condconv, _two_kernels, CONVOLUTION, library="timm"),
)
_CONVOLUTIONS = tuple(replace(way, layout=EXPERTS_FIRST) for way in _CONVOLUTIONS)
_LOW_RANK = Way("materialise A, B + bmm", _always(conv_ways.low_rank), _two_kernels, ("low rank",))
_MAPPED = (
    Way("materialise + bmm", mapped_ways.materialised, forms=("mapped",)),
    Way("materialise Wᵀ + bmm", mapped_ways.materialised_x_first, forms=("mapped",), layout=X_FIRST),
    Way("materialise + einsum", mapped_ways.einsum, forms=("mapped",)),
    Way("materialise + multiply and sum", mapped_ways.summed, forms=("mapped",)),
    Way("materialise in chunks", lambda w, d: mapped_ways.in_chunks(w, d, CHUNK[d]), _few, ("mapped",)),
)
PEERS = (
    *_LAYERS,
    *_PRIMARIES,
    *_OVER_TERMS,
    *_CONVOLUTIONS,
    _LOW_RANK,
    *_MAPPED,
    *map(_compiled, (*_CONVOLUTIONS[:3], _LOW_RANK, *_MAPPED[:4])),
)
_OURS = {
    "convolution": fused_convolution,
    "low rank": fused_low_rank,
    "mapped": fused_mapped,
    "pairs": fused_pairs,
}


def peers(w: Workload, dtype: torch.dtype, device: str) -> list[Way]:
    """Return the peers that compute a workload. On a CPU without 16-bit matrix products they cast to float32."""
    ways = [way for way in PEERS if w.form in way.forms]
    if device == "cpu" and machine("cpu", dtype).work_dtype != dtype:
        return [replace(way, name=f"{way.name}, in float32", casts=True) for way in ways if not way.library]
    return ways


def ours(w: Workload, device: str) -> list[Way]:
    """Return fasthyper, the same again to measure the noise, and variants with a choice forced."""
    make = _OURS.get(w.form) or (fused_terms if w.draw else _always(fused))
    first = Way(OURS, make, _few, (w.form,), role="ours")
    variants = []
    if w.form in TERMS:
        shared = {"generate": w.C, "project": w.S, "aggregate": w.T}  # others multiply by the head once for each term
        variants = [_forced(first, name) for name, rows in shared.items() if rows]
    elif w.form == "convolution":
        variants = [replace(_forced(first, name), folds=name == "fold") for name in fasthyper.problem.CONV_SCHEDULES]
    elif w.form in ("layer", "primary") and device != "cpu":
        ready = [name for name in ("triton", "cuda") if fasthyper.backends.BACKENDS[name].unavailable() is None]
        variants = [replace(first, name=f"fasthyper, {name}", make=_always(forced(name))) for name in ready]
    return [first, replace(first, name=AGAIN, role="again"), *(replace(v, role="variant") for v in variants)]


def _forced(first: Way, schedule: str) -> Way:
    make = lambda w, device: forced("auto", schedule, first.make(w, device))
    return replace(first, name=f"fasthyper, {schedule}", make=make)


def schedules(backend: str) -> list[Way]:
    """Return fasthyper with each schedule forced."""
    names = fasthyper.problem.SCHEDULES
    return [Way(f"fasthyper, {name}", _always(forced(backend, name)), _few, role="variant") for name in names]
