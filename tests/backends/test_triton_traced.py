"""Launches that are put into a graph compute what launches of the same call do; in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasthyper.backends import gpu, triton
from fasthyper.ops.launches import arguments_of

pytestmark = pytest.mark.skipif(triton.unavailable() is not None, reason=f"Triton kernels: {triton.unavailable()}")
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
SIZES = [
    (33, 1, 20, 6, 10),  # padded copies of z and H
    (70, 1, 8, 40, 17),
    (17, 1, 48, 5, 33),  # dx and dz in separate kernels
    (100, 1, 16, 16, 3),  # the sums of dH are split
    (3, 11, 18, 7, 5),
]


def launched(call) -> None:
    """Launch what a graph would get."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    arguments, boxes = arguments_of(call)
    descriptors = {name: TensorDescriptor.from_tensor(arguments[name], box) for name, box in boxes.items()}
    call.kernel[call.grid](**arguments | descriptors, num_warps=call.warps, num_stages=call.stages)


def results(x, z, weight, bias, base_weight, g, mask=(True,) * 6, emit=launched):
    from fasthyper.backends.triton import traced

    y = traced.apply(x, z, weight, bias, base_weight, None, "fold", emit)
    return y, *traced.grads(x, z, weight, bias, base_weight, g, mask, "fold", emit)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results(sizes, dtype, factors, oracle):
    args = factors(sizes, dtype, NAMES)
    oracle.check_linear(args, results(*args))


@settings(max_examples=12)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (20, 3, 36, 20, 36))),
    strides=st.sampled_from(("transposed", "swapped", "sliced", "expanded")),
)
def test_any_strides(sizes, strides, factors, oracle):
    args = factors(sizes, torch.float32, NAMES, strides)
    oracle.check_linear(args, results(*args))


@pytest.mark.parametrize("mask", [(1, 0, 0, 0, 0, 0), (0, 1, 0, 0, 1, 0), (0, 0, 1, 1, 0, 0)], ids=str)
def test_only_what_is_asked_for_is_launched(mask, factors):
    x, z, weight, bias, base_weight, g = factors((20, 1, 16, 7, 20), torch.float32, NAMES)
    wanted = [bool(k) for k in mask]
    _, *whole = results(x, z, weight, bias, base_weight, g)
    names = []

    def emit(call):
        names.append(call.kernel.__name__)
        launched(call)

    _, *some = results(x, z, weight, bias, base_weight, g, wanted, emit)
    for k, expected, got in zip(wanted, whole, some, strict=True):
        assert (got is not None) == k
        if k:
            torch.testing.assert_close(got, expected)
    assert ("weight_grad" in names) == wanted[2]
    assert names.count("fold") == 1 + wanted[0] + wanted[1]


@pytest.mark.parametrize("schedule", ["generate", "project"])
def test_other_schedules_stay_ops(schedule, factors):
    from fasthyper.backends.triton import traced

    x, z, weight, bias, base_weight, g = factors((20, 4, 16, 7, 20), torch.float32, NAMES)
    assert traced.apply(x, z, weight, bias, base_weight, None, schedule, launched) is None
    assert traced.grads(x, z, weight, bias, base_weight, g, (True,) * 6, schedule, launched) is None


def test_what_needs_several_blocks_stays_an_op(factors, monkeypatch):
    """Padded copies of z, and rows of dz, are written in blocks where the workspace has no room for all."""
    from fasthyper.backends.triton import traced

    monkeypatch.setattr(gpu, "partial_sums_limit", lambda: 1000)
    for sizes in [(200, 1, 5, 3, 4), (5, 9, 16, 7, 8)]:
        x, z, weight, g = factors(sizes, torch.float32)
        assert traced.grads(x, z, weight, None, None, g, (True,) * 6, "fold", launched) is None
