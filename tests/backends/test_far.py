"""Strides of any size: rows of an operand gigabytes apart. The memory between them is never touched."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper.backends import cpu
from fasthyper.measure import peak_temporary_bytes
from fasthyper.problem import SCHEDULES

NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
EVERYTHING = (True,) * 6
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"compiled CPU kernels: {cpu.unavailable()}")


def far(t: torch.Tensor, axis: int, gap: int) -> torch.Tensor:
    """Return a copy with a stride of `gap` bytes along one axis."""
    step = gap // t.element_size()
    rows = t.movedim(axis, 0).contiguous()
    memory = torch.empty(step * (len(rows) - 1) + rows[0].numel(), dtype=t.dtype)
    view = memory.as_strided(rows.shape, (step, *rows.stride()[1:])).movedim(0, axis)
    return view.copy_(t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(5, 1, 4, 6, 1), (5, 1, 4, 6, 5), (5, 3, 4, 6, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "axis"), [("x", 0), ("z", 0), ("g", 0), ("weight", 0), ("weight", 1), ("weight", 2), ("base_weight", 0)]
)
@pytest.mark.parametrize("gap", [(1 << 30) + 64, (1 << 32) + 64], ids=["a GiB", "4 GiB"])
def test_rows_far_apart(gap, name, axis, sizes, dtype, schedule, factors, oracle):
    args = dict(zip(NAMES, factors(sizes, dtype, NAMES), strict=True))
    args[name] = far(args[name], axis, gap)
    given = list(args.values())
    results = []

    def step():
        y = cpu.apply(*given[:5], schedule=schedule)
        results[:] = [y, *cpu.grads(*given, EVERYTHING, schedule=schedule)]
        return results

    assert peak_temporary_bytes(step) < fasthyper.get_workspace_limit()
    oracle.check_linear(given, results)


@pytest.mark.parametrize("points", [1, 40])
@pytest.mark.parametrize("name", ["x", "g"])
def test_many_rows_some_distance_apart(name, points, factors, oracle):
    """40 rows, 60 MiB apart, which one product can address only in part."""
    args = dict(zip(NAMES, factors((40 // points * 2, points, 8, 16, 6), torch.float32, NAMES), strict=True))
    args[name] = far(args[name], 1 if points > 1 else 0, 60 << 20)
    given = list(args.values())
    for schedule in SCHEDULES:
        y = cpu.apply(*given[:5], schedule=schedule)
        oracle.check_linear(given, [y, *cpu.grads(*given, EVERYTHING, schedule=schedule)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("O", [17, pytest.param(65, marks=pytest.mark.slow)])  # more than 2³¹ bytes, and numbers
def test_a_large_head(O, schedule):
    """I·R = 2²⁵: an H of gigabytes, zero except for a few numbers."""
    B, R, I = 3, 1 << 10, 1 << 15
    weight = torch.zeros(1, dtype=torch.float32).new_empty(O, I, R)  # pages are zero until they are written
    x, z, g = torch.randn(B, 1, I), torch.randn(B, R), torch.randn(B, 1, O)
    nonzero = [(0, 0, 0), (O - 1, I - 1, R - 1), (O - 1, 0, 5), (3, I // 2, R // 3), (16, I - 2, 0)]
    y, dx, dz = torch.zeros(B, 1, O), torch.zeros(B, 1, I), torch.zeros(B, R)
    for k, (o, i, r) in enumerate(nonzero):
        weight[o, i, r] = h = float(k + 1)
        y[:, 0, o] += h * x[:, 0, i] * z[:, r]
        dx[:, 0, i] += h * g[:, 0, o] * z[:, r]
        dz[:, r] += h * x[:, 0, i] * g[:, 0, o]
    got = cpu.apply(x, z, weight, schedule=schedule)
    torch.testing.assert_close(got, y)
    gradients = cpu.grads(x, z, weight, None, None, g, (True, True, False, False, False, False), schedule=schedule)
    torch.testing.assert_close(gradients[0], dx)
    torch.testing.assert_close(gradients[1], dz)
