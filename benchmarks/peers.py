"""The usual ways to compute y[b,n,o] = Σ_i Σ_r H[o,i,r] x[b,n,i] z[b,r], each a function of (x, z, weight).

`step` makes forward + backward of one, and `Truth` says what it should give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from workloads import Workload

import fasthyper

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], tuple[Tensor, ...]]


def fused(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Ours."""
    return fasthyper.hyper_linear(x, z, weight)


def generated(z: Tensor, weight: Tensor) -> Tensor:
    """W, as a hypernetwork's last linear layer gives it."""
    O, I, R = weight.shape
    return (z @ weight.view(O * I, R).T).view(-1, O, I)


def materialised(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """W, then one batched product."""
    return torch.bmm(x, generated(z, weight).mT)


def einsum_of_two(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """W by an einsum, applied by another."""
    return torch.einsum("bni,boi->bno", x, torch.einsum("br,oir->boi", z, weight))


def einsum_of_three(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """One einsum: torch contracts from left to right, x ⊗ z first, unless opt_einsum is installed."""
    return torch.einsum("bni,br,oir->bno", x, z, weight)


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


def _two_W(w: Workload) -> int:
    return 2 * w.B * w.O * w.I


def _two_folds(w: Workload) -> int:
    return 2 * w.B * w.N * w.I * w.R


@dataclass(frozen=True)
class Peer:
    """A way to compare with.

    Attributes:
        name: what it is called in tables.
        way: the function, not compiled.
        numbers: how many it keeps at least beside inputs and results, a gradient as large as what it is of included.
        compiled: whether to run it through torch.compile.
        per_sample: whether it has N = 1 only.
    """

    name: str
    way: Way
    numbers: Callable[[Workload], int]
    compiled: bool = False
    per_sample: bool = False

    def function(self) -> Way:
        """What to call. A compiled one compiles at its first call, for the shapes of that call alone."""
        return torch.compile(self.way, dynamic=False) if self.compiled else self.way


PEERS = (
    Peer("materialise + bmm", materialised, _two_W),
    Peer("einsum, two", einsum_of_two, _two_W),
    Peer("einsum, one", einsum_of_three, _two_folds),
    Peer("vmap(functional_call)", functional, _two_W),
    Peer("compiled materialise + bmm", materialised, _two_W, compiled=True),
    Peer("compiled einsum, two", einsum_of_two, _two_W, compiled=True),
    Peer("compiled einsum, one", einsum_of_three, _two_folds, compiled=True),
    Peer("F.bilinear", bilinear, lambda w: w.B * w.R, per_sample=True),
)


def factors(w: Workload, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """x, z and H, which want gradients, and the gradient of y."""
    torch.manual_seed(0)
    shapes = ((w.B, w.N, w.I), (w.B, w.R), (w.O, w.I, w.R))
    inputs = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    return inputs, torch.randn(w.B, w.N, w.O, dtype=dtype, device=device)


def step(way: Way, inputs: list[Tensor], g: Tensor, instances: int | None = None) -> Step:
    """Forward + backward as a function that gives y, dx, dz and dH; of the first `instances` only, where given."""
    x, z, weight = inputs
    if instances is not None:
        x, z, g = (t.detach()[:instances] for t in (x, z, g))
        x, z = x.requires_grad_(), z.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = way(x, z, weight)
        return y, *torch.autograd.grad(y, [x, z, weight], g)

    return run


class Truth:
    """What a step gives, by `fasthyper.ops.reference` in float64: y, dx and dz of a few instances, a corner of dH."""

    INSTANCES = 4

    def __init__(self, inputs: list[Tensor], g: Tensor):
        x, z, weight = (t.detach() for t in inputs)
        corner = fasthyper.ops.reference.weight_grad(x[..., :2].double(), z.double(), g[..., :1].double())
        x, z = (t[: self.INSTANCES].double().requires_grad_() for t in (x, z))
        y = fasthyper.ops.reference.apply(x, z, weight.double())
        dx, dz = torch.autograd.grad(y, [x, z], g[: self.INSTANCES].double())
        self.results = {"y": y.detach(), "dx": dx, "dz": dz, "dH": corner}
        self.allowed = torch.finfo(g.dtype).eps ** 0.5

    def check(self, name: str, results: tuple[Tensor, ...]) -> None:
        """Compare a step's results. What computes something else is no peer.

        Raises:
            AssertionError: if one is off by more than the root of the dtype's precision, beside its largest number.
        """
        for (what, expected), actual in zip(self.results.items(), results, strict=True):
            same = actual.detach()[tuple(map(slice, expected.shape))].double()
            error = (same - expected).abs().max() / expected.abs().max()
            if not error <= self.allowed:
                raise AssertionError(f"{name}: {what} is off by {error:.2g}, allowed is {self.allowed:.2g}")
