"""Call a compiled CPU library with random convolutions of instances, and compare its results with torch's in float64.

    python tests/kernels/fuzz_conv.py fasthyper/_compiled/cpu_avx2.so --cases 1000 --seed 0

Arguments, output and operands are those of fuzz.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from fuzz import Guarded, check, guarded, main
from torch import Tensor
from torch.nn.functional import conv2d

LAYOUTS = ("contiguous", "contiguous", "channels_last", "channels_last", "permuted", "sliced", "padded", "far")
MOST_WORK = 300_000  # multiplications of a case


@dataclass(frozen=True)
class Case:
    """Operands of one convolution, for its three operators."""

    sizes: tuple[int, int, int, int]  # B, groups, and inputs and outputs of a group
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    layouts: tuple[str, ...]  # of x, y and g
    shifts: bool
    workspace: int
    threads: int

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @property
    def output(self) -> tuple[int, ...]:
        axes = zip(self.image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def draw(rng: random.Random) -> Case:
    """Draw a case; sizes are drawn until it is quick."""
    pair = lambda *choices: (rng.choice(choices), rng.choice(choices))
    while True:
        groups = rng.choice((1, 1, 1, 2, 3, 8, 9, 16, 33))
        inputs, outputs = (rng.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31, 33, 64, 100)) for _ in range(2))
        case = Case(
            (rng.choice((1, 1, 2, 3, 5)), groups, inputs, outputs),
            pair(1, 2, 3, 5, 7, 8, 9, 14, 15, 16, 17, 28, 33, 60),
            pair(1, 1, 2, 3, 3, 5, 7),
            pair(1, 1, 1, 2, 2, 3, 5),
            pair(0, 0, 1, 1, 2, 3, 6),
            pair(1, 1, 1, 2, 3),
            tuple(rng.choice(LAYOUTS) for _ in range(3)),
            rng.random() < 0.5,
            rng.choice((1 << 16, 1 << 20, 32 << 20)),
            rng.choice((1, 2, 3)),
        )
        work = math.prod(case.sizes) * math.prod(case.kernel) * math.prod(case.output)
        if min(case.output) > 0 and work <= MOST_WORK:
            return case


def image(shape: list[int], layout: str, rng: random.Random) -> tuple[Guarded, Tensor]:
    """Draw images of a layout, in memory of their own."""
    off = 1 if rng.random() < 0.05 else 0
    if layout != "channels_last":
        return guarded(shape, layout, torch.float32, off, rng)
    memory, view = guarded(
        [shape[k] for k in (0, 2, 3, 1)], rng.choice(("contiguous", "padded")), torch.float32, off, rng
    )
    return memory, view.permute(0, 3, 1, 2)


@contextmanager
def operands(case: Case, rng: random.Random) -> Iterator[dict[str, Tensor]]:
    """Yield images x, y and g, and weights and shifts."""
    B, groups, inputs, outputs = case.sizes
    C, O = groups * inputs, groups * outputs
    held, tensors = [], {}
    for name, layout, shape in zip(
        "xyg", case.layouts, ([B, C, *case.image], [B, O, *case.output], [B, O, *case.output]), strict=True
    ):
        memory, tensors[name] = image(shape, layout, rng)
        held.append(memory)
    for name, shape in {"w": [B, O, inputs, *case.kernel], "shift": [B, O], "back": [B, C]}.items():
        memory, tensors[name] = guarded(shape, "contiguous", torch.float32, 0, rng)
        held.append(memory)
    try:
        yield tensors
    finally:
        tensors.clear()
        for memory in held:
            memory.free()


def expected(case: Case, t: dict[str, Tensor]) -> list[Tensor]:
    """Return y, dx and dw in float64."""
    x, w, g = (t[name].double().clone().requires_grad_(name != "g") for name in "xwg")
    options = (None, case.stride, case.padding, case.dilation, case.sizes[1])
    y = torch.cat([conv2d(a[None], k, *options) for a, k in zip(x, w, strict=True)])
    dx, dw = torch.autograd.grad(y, (x, w), g)
    y = y.detach()
    if case.shifts:
        y, dx = y + t["shift"].double()[:, :, None, None], dx + t["back"].double()[:, :, None, None]
    return [y, dx, dw]


def run(case: Case, rng: random.Random) -> None:
    """Run the operators on a case, and compare their results with torch's."""
    torch.set_num_threads(case.threads)
    ops = torch.ops.fasthyper_cpu
    options = (case.stride, case.padding, case.dilation, case.sizes[1], case.workspace)
    with operands(case, rng) as t:
        truth = expected(case, t)
        scale = expected(case, {name: tensor.abs() for name, tensor in t.items()})
        shift, back = (t["shift"], t["back"]) if case.shifts else (None, None)
        y, dx, dw = t["y"], torch.full_like(t["x"], math.nan), torch.full_like(t["w"], math.nan)
        if y.data_ptr() % 4:
            y = y.clone()
        y.fill_(math.nan)
        ops.conv_instances(t["x"], t["w"], shift, y, *options)
        check("y", y, truth[0], scale[0], torch.float32)
        ops.conv_instances_input(t["g"], t["w"], back, dx, *options)
        check("dx", dx, truth[1], scale[1], torch.float32)
        ops.conv_instances_weight(t["x"], t["g"], dw, *options)
        check("dw", dw, truth[2], scale[2], torch.float32)


if __name__ == "__main__":
    main(draw, run, __doc__.partition("\n")[0])
