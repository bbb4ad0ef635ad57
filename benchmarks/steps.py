"""What is timed of a way: its forward, forward + backward, or a whole training step; and what each should give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasthyper.ops import reference

from .inputs import Inputs, Sets
from .peers import Way, kind, over_edges
from .records import BOTH, FORWARD, TRAINING
from .workloads import Workload

Step = Callable[[], tuple[Tensor, ...]]
Layout = tuple[int, int, int]
OWN: Layout = (0, 1, 2)


def step(way: Way, mode: str, sets: Sets, layout: Layout = OWN) -> Step:
    """A function that takes the next set of tensors, from the first on, and runs a way on it.

    - forward, without gradients, gives y.
    - forward + backward gives y and the gradients of x, z and the head, in the head's layout.
    - a training step makes z from a trunk, compares y with what it should be, and lets Adam update trunk and head, the
      first set's; x is what a layer below gives. It returns the loss and the gradients of x, trunk and head.

    Args:
        way: what computes y.
        mode: one of `records.MODES`.
        sets: tensors, of which each call takes the next.
        layout: order of the axes of a layer's head in which the way wants it.
    """
    if mode == TRAINING:
        return _training(way, sets, layout)
    prepared = [(_leaves(s, layout), s.g) for s in sets]

    def forward() -> tuple[Tensor, ...]:
        leaves, _ = prepared[sets.next()]
        with torch.no_grad():
            return (way(*leaves),)

    def both() -> tuple[Tensor, ...]:
        leaves, g = prepared[sets.next()]
        y = way(*leaves)
        return y, *torch.autograd.grad(y, leaves, g)

    return forward if mode == FORWARD else both


def _leaves(s: Inputs, layout: Layout) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in (s.x, s.z, *_head(s, layout)))


def _head(s: Inputs, layout: Layout) -> tuple[Tensor, ...]:
    return s.head if layout == OWN else (s.head[0].permute(layout).contiguous(),)


def _training(way: Way, sets: Sets, layout: Layout) -> Step:
    trunk, *head = (t.clone().requires_grad_() for t in (sets[0].trunk, *_head(sets[0], layout)))
    adam = torch.optim.Adam([trunk, *head], fused=True, capturable=trunk.is_cuda)
    prepared = [(s.x.detach().requires_grad_(), s.z, s.g) for s in sets]

    def train() -> tuple[Tensor, ...]:
        x, cond, target = prepared[sets.next()]
        adam.zero_grad()
        x.grad = None
        loss = torch.nn.functional.mse_loss(way(x, torch.relu(cond @ trunk.T), *head), target)
        loss.backward()
        adam.step()
        return loss.detach(), *(t.grad for t in (x, trunk, *head) if t.grad is not None)

    return train


def definition(w: Workload, device: str) -> Way:
    """The sum as it is written, by `fasthyper.ops.reference`."""

    def primary(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
        hidden = torch.relu(reference.hyper_linear(x, z, *layers[:4]))
        return reference.hyper_linear(hidden, z, *layers[4:])

    if kind(w) == "graph":
        return over_edges(reference.apply, w, device)
    return primary if kind(w) == "primary" else reference.apply


class Truth:
    """What a step gives at the first set of tensors, in float64.

    Where W would take more than `MOST` bytes, it is y, dx and dz of some instances, and a corner of dH.
    """

    MOST = 1 << 30

    def __init__(self, w: Workload, mode: str, first: Inputs):
        eps = torch.finfo(first.x.dtype).eps
        self._allowed = 4 * eps if first.x.dtype.itemsize == 2 else eps**0.5
        names = {FORWARD: ["y"], BOTH: ["y", "dx", "dz"], TRAINING: ["loss", "dx", "the trunk's gradient"]}[mode]
        few = self.MOST // (8 * w.I * w.O)
        self._whole = kind(w) != "layer" or mode == TRAINING or few >= w.B
        given = (first if self._whole else first.of_instances(max(1, few))).double()
        results = step(definition(w, str(first.x.device)), mode, Sets([given]))()
        self._results = [t.detach() for t in results]
        if not self._whole and mode == BOTH:
            x, z, g = first.x[..., :2].double(), first.z.double(), first.g[..., :1].double()
            self._results[3:] = [reference.weight_grad(x, z, g)]
        self._names = [*names, *("the head's gradient" for _ in self._results[len(names) :])]

    def check(self, name: str, results: Sequence[Tensor], layout: Layout = OWN) -> None:
        """Compare a step's results. What computes something else is no peer.

        Raises:
            AssertionError: if the norm of an error, beside that of what it is of, is more than the root of the dtype's
                precision, or more than four times that of 16 bits.
        """
        for what, expected, got in zip(self._names, self._results, results, strict=True):
            if layout != OWN and what == "the head's gradient":
                expected = expected.permute(layout)
            part = got if self._whole else got[tuple(map(slice, expected.shape))]
            same = part.detach().double()
            wrong = same.shape != expected.shape
            error = float("inf") if wrong else float((same - expected).norm() / expected.norm())
            if not error <= self._allowed:
                raise AssertionError(f"{name}: {what} is off by {error:.2g}, allowed is {self._allowed:.2g}")
