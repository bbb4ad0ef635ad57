"""The aten backend with tiles of any size: for any sizes and strides, the result is that of the einsum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fasthyper import planner
from fasthyper.backends import BACKENDS, aten
from fasthyper.problem import SCHEDULES, Problem

SIZE = st.sampled_from([0, 1, 2, 3, 5, 7, 11, 13])
ALL = (True,) * 6


def check(factors, oracle, backend, schedule, sizes, dtype, strides):
    torch.manual_seed(0)  # for every example, so that a failure can be reproduced
    x, z, weight, bias, base_weight, base_bias, g = factors(sizes, dtype, (*factors.AFFINE, "g"), strides)
    args = (x, z, weight, bias, base_weight, base_bias)
    y = backend.apply(*args, schedule=schedule)
    oracle.check_all([y], lambda *ts: [oracle.linear(*(t.double() for t in ts))], *args)
    out = backend.grads(x, z, weight, bias, base_weight, g, ALL, schedule=schedule)
    oracle.check_all(out, oracle.linear_grads, x, z, weight, bias, base_weight, g)
    # as the ops of the family call it: without z for dz alone, and without H for dH alone
    alone = backend.grads(x, None, weight, None, None, g, (False, True, *[False] * 4), schedule=schedule)
    oracle.check_op("cond_grad", alone[1], x, g, weight)
    alone = backend.grads(x, z, None, None, None, g, (False, False, True, *[False] * 3), schedule=schedule)
    oracle.check_op("weight_grad", alone[2], x, z, g)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    sizes=st.tuples(SIZE, SIZE, SIZE, SIZE, SIZE),
    elements=st.sampled_from([1, 2, 7, 64, 300, 1 << 18]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    strides=st.sampled_from(["contiguous", "transposed", "swapped", "sliced", "expanded"]),
)
@settings(max_examples=80)
@example(sizes=(13, 3, 8, 9, 10), elements=7, dtype=torch.float64, strides="contiguous")
@example(sizes=(13, 3, 8, 9, 10), elements=64, dtype=torch.bfloat16, strides="swapped")
@example(sizes=(13, 1, 8, 9, 10), elements=64, dtype=torch.float32, strides="expanded")
def test_any_size_tile_dtype_and_stride(schedule, sizes, elements, dtype, strides, factors, oracle, tiles):
    with tiles(elements):
        check(factors, oracle, aten, schedule, sizes, dtype, strides)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    sizes=st.tuples(SIZE, SIZE, SIZE, SIZE, SIZE),
    elements=st.sampled_from([2, 64, 1 << 18]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    strides=st.sampled_from(["contiguous", "transposed", "swapped", "expanded"]),
)
@settings(max_examples=40)
@example(sizes=(13, 3, 8, 9, 10), elements=64, dtype=torch.bfloat16, strides="swapped")
def test_tiles_in_16_bits(schedule, sizes, elements, dtype, strides, factors, oracle, tiles, native_low_precision):
    """Where the CPU multiplies 16 bits natively, tiles are rounded to them, and their sums are not."""
    with native_low_precision(True), tiles(elements):
        check(factors, oracle, aten, schedule, sizes, dtype, strides)


@given(
    sizes=st.tuples(SIZE, SIZE, SIZE, SIZE, SIZE),
    strides=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
)
@settings(max_examples=40)
def test_materialised(sizes, strides, factors, oracle):
    check(factors, oracle, BACKENDS["materialised"], "auto", sizes, torch.float64, strides)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", range(1, 64))
def test_every_mask(schedule, mask, factors, oracle, tiles):
    wanted = tuple(bool(mask >> k & 1) for k in range(6))
    x, z, weight, bias, base_weight, g = factors(names=("x", "z", "weight", "bias", "base_weight", "g"))
    with tiles(16):
        out = aten.grads(x, z, weight, bias, base_weight, g, wanted, schedule=schedule)
    for got, truth, asked in zip(out, oracle.linear_grads(x, z, weight, bias, base_weight, g), wanted, strict=True):
        assert (got is not None) == asked
        if asked:
            torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("present", range(8))
def test_every_choice_of_base_and_bias(schedule, present, factors, oracle, tiles):
    x, z, weight, *rest = factors(names=factors.AFFINE)
    rest = [t if present >> k & 1 else None for k, t in enumerate(rest)]
    with tiles(16):
        y = aten.apply(x, z, weight, *rest, schedule=schedule)
    torch.testing.assert_close(y, oracle.linear(x, z, weight, *rest))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inputs_are_left_as_they_were(schedule, factors, tiles):
    ts = factors(names=(*factors.AFFINE, "g"))
    before = [t.clone() for t in ts]
    with tiles(16):
        aten.apply(*ts[:6], schedule=schedule)
        aten.grads(*ts[:5], ts[6], ALL, schedule=schedule)
    for t, was in zip(ts, before, strict=True):
        assert torch.equal(t, was)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_contracts_in_its_own_order(schedule, factors, monkeypatch):
    """A forced schedule is the one that runs."""
    ran = []
    for name in SCHEDULES:
        module = getattr(aten, name)
        monkeypatch.setattr(module, "apply", lambda *a, _name=name: ran.append(_name))
    x, z, weight, _ = factors()
    aten.apply(x, z, weight, schedule=schedule)
    assert ran == [schedule]


@pytest.mark.parametrize(
    ("dtype", "instances", "once"), [(torch.bfloat16, 4, True), (torch.bfloat16, 9, False), (torch.float16, 4, False)]
)
def test_a_head_larger_than_a_tile(dtype, instances, once, factors, oracle, monkeypatch, tiles, native_low_precision):
    """If all of W is a tile, dz and dH are each one product in bfloat16, although H has more numbers than a tile."""
    O, I, R = 8, 4, 16
    generate, called = aten.generate, []
    outer = generate.outer
    monkeypatch.setattr(generate, "outer", lambda *a: called.append(a[0].shape) or outer(*a))
    x, z, weight, g = factors((instances, 3, R, I, O), dtype, ("x", "z", "weight", "g"))
    with native_low_precision(True), tiles(4 * O * I):
        assert planner.plan(Problem.of("grads", x, R, O), "generate").tile < weight.numel()
        out = aten.grads(x, z, weight, None, None, g, (True,) * 3 + (False,) * 3, schedule="generate")
    oracle.check_all(out[:3], oracle.grads, x, z, weight, g)
    assert (len(called) == 1) == once
