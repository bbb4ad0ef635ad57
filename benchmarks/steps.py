"""The step that is timed: forward, forward + backward, or a training step; and the check of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fasthyper.ops import reference

from .inputs import Function, Inputs, Sets
from .mapped_ways import MAPS
from .records import FORWARD, FORWARD_BACKWARD, TRAINING_STEP
from .terms import indices
from .workloads import Workload

Step = Callable[[], tuple[Tensor, ...]]
Layout = tuple[int, ...]
DEFAULT: Layout = (0, 1, 2)


def step(function: Function, mode: str, sets: Sets, layout: Layout = DEFAULT) -> Step:
    """Return a function without arguments that takes the next set of tensors and runs a step on it.

    - `"forward"` returns y, computed without gradients.
    - `"forward + backward"` returns y and the gradients of x, z and the head, in the head's layout.
    - `"training step"` computes z by a trunk, takes the mean squared error of y, and updates trunk and head, both from
      the first set, by Adam. x stands for the output of a previous layer. It returns the loss and the gradients of x,
      trunk and head.

    Args:
        function: computes y.
        mode: one of `records.MODES`.
        sets: the tensors.
        layout: the order of the head's axes that the function takes.
    """
    if mode == TRAINING_STEP:
        return _training(function, sets, layout)
    prepared = [(_leaves(s, layout), s.g) for s in sets]

    def forward() -> tuple[Tensor, ...]:
        leaves, _ = prepared[sets.next()]
        with torch.no_grad():
            return (function(*leaves),)

    def forward_backward() -> tuple[Tensor, ...]:
        leaves, g = prepared[sets.next()]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, g)

    return forward if mode == FORWARD else forward_backward


def _leaves(s: Inputs, layout: Layout) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in (s.x, s.z, *_head(s, layout)))


def _head(s: Inputs, layout: Layout) -> tuple[Tensor, ...]:
    return s.head if layout == DEFAULT else (s.head[0].permute(layout).contiguous(),)


def _training(function: Function, sets: Sets, layout: Layout) -> Step:
    trunk, *head = (t.clone().requires_grad_() for t in (sets[0].trunk, *_head(sets[0], layout)))
    adam = torch.optim.Adam([trunk, *head], fused=True, capturable=trunk.is_cuda)
    prepared = [(s.x.detach().requires_grad_(), s.z, s.g) for s in sets]

    def train() -> tuple[Tensor, ...]:
        x, cond, target = prepared[sets.next()]
        adam.zero_grad()
        x.grad = None
        loss = torch.nn.functional.mse_loss(function(x, torch.relu(cond @ trunk.T), *head), target)
        loss.backward()
        adam.step()
        return loss.detach(), *(t.grad for t in (x, trunk, *head) if t.grad is not None)

    return train


def definition(w: Workload, device: str) -> Function:
    """Return the defining sum as a function, by `fasthyper.ops.reference`."""

    def primary(x: Tensor, z: Tensor, *layers: Tensor) -> Tensor:
        hidden = torch.relu(reference.hyper_linear(x, z, *layers[:4]))
        return reference.hyper_linear(hidden, z, *layers[4:])

    if w.form == "pairs":
        return lambda x, z, weight: torch.einsum("bmi,oir,bnr->bmno", x, weight, z)
    if w.draw:
        return _sum_of_terms(w, device)
    if w.form == "convolution":
        return partial(_convolution, w)
    if w.form == "low rank":
        return lambda x, z, a, b: reference.apply(reference.apply(x, z, a), z, b)
    if w.form == "mapped":
        return partial(_mapped, MAPS[w.weight_map])
    return primary if w.form == "primary" else reference.apply


def _mapped(phi: Callable[[Tensor], Tensor], x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bni,boi->bno", x, phi(torch.einsum("br,oir->boi", z, weight)))


def _convolution(w: Workload, x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    W = torch.einsum("br,oikmr->boikm", z, weight).flatten(0, 1)
    y = torch.nn.functional.conv2d(
        x.flatten(0, 1).unsqueeze(0), W, stride=w.stride, padding=w.kernel // 2, groups=len(x) * w.groups
    )
    return y.view(len(x), w.O, *y.shape[2:])


def _sum_of_terms(w: Workload, device: str) -> Function:
    source, cond, target = indices(w, device)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        W = torch.einsum("cr,oir->coi", z, weight)
        W = W if cond is None else W.index_select(0, cond)
        y = torch.einsum("ei,eoi->eo", x if source is None else x.index_select(0, source), W)
        return y if target is None else y.new_zeros(w.T, w.O).index_add(0, target, y)

    return layer


class Truth:
    """The results of a step on the first set of tensors, in float64.

    If W would take more than `MAX_BYTES`, they are y, dx and dz of the first instances and a corner of dH.
    """

    MAX_BYTES = 1 << 30
    KINK = 5e-3
    """Allowed with a φ that has a kink: where P is almost 0, a rounding error flips the sign of φ's derivative."""

    def __init__(self, w: Workload, mode: str, first: Inputs):
        eps = torch.finfo(first.x.dtype).eps
        self._allowed = 4 * eps if first.x.dtype.itemsize == 2 else eps**0.5
        if w.form == "mapped":
            self._allowed = max(self._allowed, self.KINK)
        names = {
            FORWARD: ["y"],
            FORWARD_BACKWARD: ["y", "dx", "dz"],
            TRAINING_STEP: ["loss", "dx", "the trunk's gradient"],
        }[mode]
        few = self.MAX_BYTES // (8 * w.I * w.O)
        self._whole = w.form != "layer" or mode == TRAINING_STEP or few >= w.B
        given = (first if self._whole else first.of_instances(max(1, few))).double()
        results = step(definition(w, str(first.x.device)), mode, Sets([given]))()
        self._results = [t.detach() for t in results]
        if not self._whole and mode == FORWARD_BACKWARD:
            x, z, g = first.x[..., :2].double(), first.z.double(), first.g[..., :1].double()
            self._results[3:] = [reference.weight_grad(x, z, g)]
        self._names = [*names, *("the head's gradient" for _ in self._results[len(names) :])]

    def check(self, name: str, results: Sequence[Tensor], layout: Layout = DEFAULT) -> None:
        """Compare a step's results with the expected ones.

        Raises:
            AssertionError: if a relative error, by norms, exceeds the square root of the dtype's precision; for 16-bit
                dtypes, four times the precision.
        """
        for result, expected, got in zip(self._names, self._results, results, strict=True):
            if layout != DEFAULT and result == "the head's gradient":
                expected = expected.permute(layout)
            checked = got if self._whole else got[tuple(map(slice, expected.shape))]
            checked = checked.detach().double()
            wrong = checked.shape != expected.shape
            error = float("inf") if wrong else float((checked - expected).norm() / expected.norm())
            if not error <= self._allowed:
                raise AssertionError(f"{name}: {result} is off by {error:.2g}, allowed is {self._allowed:.2g}")
