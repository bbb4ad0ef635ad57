"""The operators of the compiled CPU kernels for convolutions with weights of every instance, called directly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fasthyper.backends import cpu
from fasthyper.measure import peak_temporary_bytes

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"compiled CPU kernels: {cpu.unavailable()}")
ops = torch.ops.fasthyper_cpu
LIMIT = 32 << 20


class Convolution:
    """Random images and weights of a convolution, and the operators with the arguments that belong to them."""

    def __init__(self, B, groups, inputs, outputs, image, kernel, stride=1, padding=0, dilation=1, channels_last=False):
        pair = lambda n: (n, n) if isinstance(n, int) else n
        torch.manual_seed(B + inputs)
        image, kernel = pair(image), pair(kernel)
        self.geometry = pair(stride), pair(padding), pair(dilation)
        sizes = zip(image, kernel, *self.geometry, strict=True)
        output = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        self.groups = groups
        self.x = torch.randn(B, groups * inputs, *image)
        self.w = torch.randn(B, groups * outputs, inputs, *kernel)
        self.g = torch.randn(B, groups * outputs, *output)
        self.shift, self.back = torch.randn(self.g.shape[:2]), torch.randn(self.x.shape[:2])
        if channels_last:
            self.x, self.g = (t.to(memory_format=torch.channels_last) for t in (self.x, self.g))

    def y(self, limit: int = LIMIT) -> Tensor:
        y = torch.full_like(self.g, math.nan)
        ops.conv_instances(self.x, self.w, self.shift, y, *self.geometry, self.groups, limit)
        return y

    def dx(self, limit: int = LIMIT) -> Tensor:
        dx = torch.full_like(self.x, math.nan)
        ops.conv_instances_input(self.g, self.w, self.back, dx, *self.geometry, self.groups, limit)
        return dx

    def dw(self, limit: int = LIMIT) -> Tensor:
        dw = torch.full_like(self.w, math.nan)
        ops.conv_instances_weight(self.x, self.g, dw, *self.geometry, self.groups, limit)
        return dw

    def everything(self, limit: int = LIMIT) -> list[Tensor]:
        return [self.y(limit), self.dx(limit), self.dw(limit)]

    def by_torch(self, convert=lambda t: t) -> list[Tensor]:
        """Return y, dx and dw of converted operands, one instance at a time."""
        x, w = (convert(t).clone().requires_grad_() for t in (self.x, self.w))
        g, shift, back = (convert(t) for t in (self.g, self.shift, self.back))
        y = torch.cat([conv2d(a[None], k, None, *self.geometry, self.groups) for a, k in zip(x, w, strict=True)])
        dx, dw = torch.autograd.grad(y, (x, w), g)
        return [y.detach() + shift[:, :, None, None], dx + back[:, :, None, None], dw]

    def check(self, results: list[Tensor] | None = None) -> None:
        """Compare with torch in float64, up to rounding errors relative to the sum of absolute terms."""
        exact, scale = self.by_torch(torch.Tensor.double), self.by_torch(lambda t: t.double().abs())
        for name, got, truth, most in zip(("y", "dx", "dw"), results or self.everything(), exact, scale, strict=True):
            assert got.shape == truth.shape
            error = (got.double() - truth).abs()
            assert (error <= 64 * torch.finfo(torch.float32).eps * most).all(), name


# Groups, inputs and outputs of a group, image, kernel, stride, padding and dilation.
CASES = {
    "depthwise 3 x 3": (19, 1, 1, 14, 3, 1, 1),
    "depthwise 5 x 5": (9, 1, 1, 7, 5, 1, 2),
    "depthwise, stride 2": (16, 1, 1, (14, 15), 5, 2, 2),
    "channel multiplier": (5, 1, 3, (9, 8), 3, (1, 2), 1),
    "large channel multiplier": (1, 1, 35, 28, 3, 1, 1),
    "pointwise": (1, 80, 47, 7, 1),
    "pointwise, stride 2": (1, 13, 18, 9, 1, 2),
    "dense 3 x 3": (1, 33, 26, 14, 3, 1, 1),
    "dense, stride 2": (1, 24, 30, (15, 28), 3, 2, 1),
    "dilation": (1, 9, 11, (17, 12), 3, (2, 1), 3, (3, 2)),
    "grouped": (8, 4, 4, 14, 3, 1, 1),
    "grouped, many inputs": (3, 20, 5, 8, (1, 3), 1, (0, 1)),
    "padding larger than the kernel": (2, 3, 4, 4, 3, 1, (5, 7)),
    "stride larger than the kernel": (2, 9, 4, 23, 2, (5, 7), 1),
    "stride larger than the image": (1, 8, 2, (1, 3), (5, 1), 2, (2, 0)),
    "large kernel": (4, 1, 1, 13, (11, 7), 1, (5, 3)),
    "large image": (1, 3, 8, (90, 61), 3, 2, 1),
    "rows of one number": (1, 7, 9, (40, 1), (3, 1), 1, (1, 0)),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("B", [1, 3])
@case
def test_values(case, B, channels_last):
    Convolution(B, *case, channels_last=channels_last).check()


@case
def test_threads(case):
    """Results do not depend on the number of threads, nor on the workspace."""
    convolution, threads = Convolution(4, *case), torch.get_num_threads()
    results = []
    try:
        for count, limit in ((1, LIMIT), (2, LIMIT), (3, 1 << 16)):
            torch.set_num_threads(count)
            results.append(convolution.everything(limit))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LAYOUTS = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "instances last": lambda t: t.movedim(0, 3).contiguous().movedim(3, 0),
    "sliced": lambda t: torch.full((*t.shape[:3], 2 * t.shape[3] + 3), math.nan)[..., 1 : 1 + 2 * t.shape[3] : 2].copy_(
        t
    ),
    "sliced channels": lambda t: (
        torch.full((t.shape[0], *t.shape[2:], t.shape[1] + 3), math.nan).movedim(3, 1)[:, 2 : 2 + t.shape[1]].copy_(t)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("name", ["depthwise, stride 2", "grouped", "dense 3 x 3", "pointwise"])
def test_layouts(name, layout):
    convolution = Convolution(2, *CASES[name])
    convolution.x, convolution.g = layout(convolution.x), layout(convolution.g)
    y, dx = layout(torch.full_like(convolution.g, math.nan)), layout(torch.full_like(convolution.x, math.nan))
    held = torch.full((2, convolution.w[0].numel() + 5), math.nan)
    dw = held[:, :-5].view(convolution.w.shape)  # rows of a larger tensor
    options = (*convolution.geometry, convolution.groups, LIMIT)
    ops.conv_instances(convolution.x, convolution.w, convolution.shift, y, *options)
    ops.conv_instances_input(convolution.g, convolution.w, convolution.back, dx, *options)
    ops.conv_instances_weight(convolution.x, convolution.g, dw, *options)
    convolution.check([y, dx, dw])
    assert held[:, -5:].isnan().all()


def test_expanded_operands():
    convolution = Convolution(3, 2, 3, 5, 9, 3, padding=1)
    convolution.x = convolution.x[:1].expand_as(convolution.x)
    convolution.g = convolution.g[:, :1].expand_as(convolution.g)
    convolution.w = convolution.w[:1].expand_as(convolution.w)
    convolution.shift = convolution.shift[:, :1].expand_as(convolution.shift)
    y, dx = torch.empty(convolution.g.shape), torch.empty(convolution.x.shape)
    dw = torch.empty(convolution.w.shape)
    options = (*convolution.geometry, convolution.groups, LIMIT)
    ops.conv_instances(convolution.x, convolution.w, convolution.shift, y, *options)
    ops.conv_instances_input(convolution.g, convolution.w, convolution.back, dx, *options)
    ops.conv_instances_weight(convolution.x, convolution.g, dw, *options)
    convolution.check([y, dx, dw])


def test_an_image_with_rows_that_no_output_reaches():
    """With stride 3, the last rows and columns of x have no part in y: their gradient is the shift."""
    convolution = Convolution(2, 1, 8, 9, 11, 2, stride=3)
    dx = convolution.dx()
    assert convolution.g.shape[-1] == 4
    convolution.check()
    convolution.g = convolution.g[..., :2, :2]  # as in a transposed convolution with output padding
    dx = convolution.dx()
    assert torch.equal(dx[..., 5:, :], convolution.back[:, :, None, None].expand_as(dx)[..., 5:, :])
    assert torch.equal(dx[..., 5:], convolution.back[:, :, None, None].expand_as(dx)[..., 5:])


@pytest.mark.parametrize(
    ("sizes", "image", "kernel"),
    [
        ((0, 2, 3, 4), 5, 3),
        ((2, 2, 0, 4), 5, 3),
        ((2, 2, 3, 0), 5, 3),
        ((2, 1, 3, 4), (0, 5), 1),
        ((2, 1, 3, 4), (5, 5), (1, 0)),
    ],
)
def test_empty_sizes(sizes, image, kernel):
    convolution = Convolution(*sizes, image, kernel, padding=1)
    y, dx, dw = convolution.everything()
    sums = [(y, convolution.shift), (dx, convolution.back)]  # there are no products
    assert all(torch.equal(result, shift[:, :, None, None].expand_as(result)) for result, shift in sums)
    assert not dw.any()


def test_no_shift():
    convolution = Convolution(2, 3, 4, 5, 9, 3, padding=1)
    y, dx = convolution.y(), convolution.dx()
    convolution.shift.zero_(), convolution.back.zero_()
    without = torch.empty_like(y), torch.empty_like(dx)
    options = (*convolution.geometry, convolution.groups, LIMIT)
    ops.conv_instances(convolution.x, convolution.w, None, without[0], *options)
    ops.conv_instances_input(convolution.g, convolution.w, None, without[1], *options)
    convolution.check([*without, convolution.dw()])


def test_infinite_numbers_of_other_instances_and_channels():
    """Numbers that are not finite reach only the results that they are terms of."""
    convolution = Convolution(3, 4, 1, 1, 9, 3, padding=1)
    convolution.x[1, 2], convolution.g[1, 2] = math.inf, math.nan
    for result in convolution.everything():
        spoilt = ~result.isfinite().flatten(2).all(2)
        assert spoilt[1, 2]
        assert spoilt.sum() == 1


@pytest.mark.parametrize("name", ["depthwise 5 x 5", "dense 3 x 3", "pointwise", "large image"])
def test_workspace(name):
    convolution = Convolution(6, *CASES[name])
    results = convolution.everything()
    limit = 1 << 20
    for run, result in zip((convolution.y, convolution.dx, convolution.dw), results, strict=True):
        assert peak_temporary_bytes(lambda run=run: run(limit)) <= result.nbytes + limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.randn(2, 4, 4, 3, 3)}, "do not agree"),
        ({"shift": torch.randn(2, 3)}, "shift must have shape"),
        ({"stride": (0, 1)}, "must be positive"),
        ({"stride": (1,)}, "2 entries"),
        ({"groups": 3}, "do not agree"),
    ],
)
def test_errors(change, message):
    x, w, y = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 3, 3, 3), torch.empty(2, 4, 3, 3)
    given = {
        "x": x,
        "w": w,
        "shift": None,
        "y": y,
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 2,
    }
    with pytest.raises(ValueError, match=message):
        ops.conv_instances(*(given | change).values(), LIMIT)


def test_dtypes():
    with pytest.raises(TypeError, match="float32"):
        ops.conv_instances(
            *(torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1), None, torch.zeros(1, 1, 1, 1)),
            *((1, 1), (0, 0), (1, 1), 1, LIMIT),
        )
