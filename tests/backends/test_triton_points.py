"""The Triton kernels on several points of an instance: the sum of dz over points. test_kernels.py has more sizes."""

from __future__ import annotations

import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasthyper.backends import gpu, triton

ready = pytest.mark.skipif(triton.unavailable() is not None, reason=f"Triton kernels: {triton.unavailable()}")
MASK = (True, True, False, False, False, False)
MANY = [(1, 150, 20, 3, 4), (2, 131, 3, 2, 5), (1, 70, 130, 2, 3)]
"""Sizes whose points are summed in parts; the last ones are shorter."""


@ready
@pytest.mark.parametrize("room", [None, 8000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", MANY, ids=str)
def test_many_points(sizes, dtype, room, factors, oracle, monkeypatch):
    if room is not None:
        monkeypatch.setattr(gpu, "partial_sums_limit", lambda: room)
    x, z, weight, g = factors(sizes, dtype)
    dx, dz = triton.grads(x, z, weight, None, None, g, MASK, schedule="fold")[:2]
    for got, exact, scale in zip(
        (dx, dz), oracle.grads(x, z, weight, g), oracle.grads(*(t.abs() for t in (x, z, weight, g))), strict=False
    ):
        oracle.check(got, exact, scale, dtype)


@ready
@pytest.mark.parametrize("N", [40, 120])
def test_sums_of_pieces_have_little_memory(N, factors, oracle, monkeypatch):
    """Their number grows with that of the points, but not their memory."""
    from fasthyper.backends.triton import calls

    monkeypatch.setattr(gpu, "partial_sums_limit", lambda: 1000)
    sums, reduce_points_call = set(), calls.reduce_points_call

    def spy(rows, out):
        if out.dtype == torch.float32:
            sums.add(out.untyped_storage().nbytes())
        return reduce_points_call(rows, out)

    monkeypatch.setattr(calls, "reduce_points_call", spy)
    x, z, weight, g = factors((1, N, 20, 3, 4), torch.bfloat16)
    dz = triton.grads(x, z, weight, None, None, g, MASK, schedule="fold")[1]
    oracle.check_op("cond_grad", dz, x, g, weight)
    assert sums == {2 * 4 * 20}


class Values(TorchDispatchMode):
    """Fails where torch computes a value."""

    ALLOCATE = ("empty", "new_empty", "empty_strided")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.is_view or func._schema.name.removeprefix("aten::") in self.ALLOCATE, f"torch computes {func}"
        return func(*args, **(kwargs or {}))


@ready
@pytest.mark.parametrize("room", [None, 8000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("sizes", [(3, 4, 18, 5, 6), *MANY], ids=str)
def test_a_backward_is_launches_alone(sizes, room, factors, monkeypatch):
    """So it is repeated as it was recorded: temporary memory and the call's tensors are all that it needs."""
    from fasthyper.backends.triton import launch, recording, repeat

    if room is not None:
        monkeypatch.setattr(gpu, "partial_sums_limit", lambda: room)
    x, z, weight, g = factors(sizes, torch.bfloat16)
    out = torch.empty_like(x), torch.empty_like(z), torch.empty_like(weight)
    with monkeypatch.context() as patch:
        patch.setattr(recording.Call, "launch", lambda self: record.launches.append(repeat._keep(self, None)))
        with recording.recording(repeat._keep) as record, Values():
            launch.grads(x, z, weight, None, None, g, *out)
    repeated = repeat._repeat(record, (x, z, weight, None, None, g, *out))
    assert repeated is not None
    assert len(repeated.launches) == len(record.launches)
    written = {place.slot for each in repeated.launches for place in each.pointers}
    assert {6, 7, 8} <= written


class Compiled:
    """What Triton returns of a launch: here an interpreted call, which is run again on memory at other addresses."""

    function = packed_metadata = None

    def __init__(self, call):
        args = dict(call.args)
        for name, value in args.items():
            if isinstance(value, Tensor):
                args[name] = without_memory(value)
            elif hasattr(value, "base"):
                args[name] = copy.copy(value)
                args[name].base = without_memory(value.base)
        self.call = call._replace(args=args)

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        call, given = self.call, {}
        for name, value in zip(call.kernel.arg_names, values, strict=True):
            recorded = {**call.args, **call.constants}[name]
            if isinstance(recorded, Tensor):
                value = at_address(value, recorded)
            elif hasattr(recorded, "base"):
                value.base = at_address(value.base.data_ptr(), recorded.base)
            given[name] = value
        call.kernel[x, y, z](**given, num_warps=call.warps, num_stages=call.stages)


def without_memory(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def at_address(address, like):
    """Return a tensor with the shape, strides and dtype of another one, at an address."""
    last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_byte * ((last + 1) * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.mark.skipif(not triton.interpreting(), reason="on a GPU, the suite repeats calls itself")
@pytest.mark.parametrize("room", [None, 8000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("sizes", [(3, 4, 18, 5, 6), (1, 150, 20, 3, 4)], ids=str)
def test_a_repeated_backward_is_that_of_its_own_tensors(sizes, room, factors, oracle, monkeypatch):
    from fasthyper.backends.triton import launch, recording, repeat

    if room is not None:
        monkeypatch.setattr(gpu, "partial_sums_limit", lambda: room)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 0))
    monkeypatch.setattr(repeat, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))

    def tensors():
        x, z, weight, g = factors(sizes, torch.bfloat16)
        return x, z, weight, None, None, g, *(torch.full_like(t, float("nan")) for t in (x, z, weight))

    first, second = tensors(), tensors()
    with recording.recording(lambda call, _: repeat._keep(call, Compiled(call))) as record:
        launch.grads(*first)
    repeat._repeat(record, first).run(second, torch.device("cpu"))
    x, z, weight, _, _, g, *out = second
    oracle.check_all(out, oracle.grads, x, z, weight, g)
