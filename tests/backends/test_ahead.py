"""Tiles of W that are made on another stream: values, and that no order of the streams' work changes them.

Without a GPU, the streams are pretended: all is computed at once, and clocks say what a GPU could do in another order.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fasthyper
from fasthyper.backends import aten
from fasthyper.backends.aten import ahead
from fasthyper.backends.aten.tiling import Affine, Tiling

NAMES = ("x", "z", "weight", "bias", "base_weight", "base_bias")
SIZES = (6, 4, 5, 3, 7)
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or (torch.version.cuda or torch.version.hip) is None, reason="there is no GPU"
)


class Spy:
    """A function whose answers are kept."""

    def __init__(self, function):
        self.function, self.answers = function, []

    def __call__(self, *args):
        self.answers.append(self.function(*args))
        return self.answers[-1]


class Stream:
    """A stream whose clock has, for each stream, how much of its work is done before what comes next."""

    def __init__(self, *device):
        self.clock = {}

    def wait_event(self, event):
        for stream, count in event.clock.items():
            self.clock[stream] = max(count, self.clock.get(stream, 0))

    def wait_stream(self, stream):
        self.wait_event(SimpleNamespace(clock=stream.clock))


class Event:
    def record(self, stream):
        self.clock = dict(stream.clock)


class Streams(TorchDispatchMode):
    """The streams of a process, and every access to memory; fails where another order would give another result."""

    def __init__(self):
        super().__init__()
        self.caller = self.current = Stream()
        self.work = {}  # the time of each stream
        self.accesses = {}  # by storage: (stream, its time, whether it writes)
        self.allocated = {}  # the stream that a storage belongs to
        self.overlaps = False  # whether the caller's stream had work while the other one may have had, too
        self.kept = []  # so that no address is used again

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        values = [*zip(func._schema.arguments, args, strict=False)]
        values += [(a, (kwargs or {})[a.name]) for a in func._schema.arguments if a.name in (kwargs or {})]
        tensors = [(t, a.alias_info is not None and a.alias_info.is_write) for a, t in values]
        clock = self.current.clock
        clock[self.current] = clock.get(self.current, 0) + 1
        self.work[self.current] = clock[self.current]
        self.overlaps |= self.current is self.caller and not self.is_joined()
        for t, writes in [*tensors, (result, True)]:
            if isinstance(t, torch.Tensor):
                self.access(t, writes)
        return result

    def access(self, t, writes):
        self.kept.append(t)
        storage = t.untyped_storage().data_ptr()
        owner = self.allocated.setdefault(storage, self.current if writes else self.caller)
        assert owner in (self.current, self.caller), "memory of the other stream is used by the caller's"
        for stream, time, wrote in self.accesses.setdefault(storage, []):
            done = self.current.clock.get(stream, 0) >= time
            assert done or not wrote | writes, "memory is written while another stream uses it"
        self.accesses[storage].append((self.current, self.current.clock[self.current], writes))

    def is_joined(self):
        """Return whether all that comes next on the caller's stream is after all other work."""
        return all(self.caller.clock.get(stream, 0) >= time for stream, time in self.work.items())


@pytest.fixture
def streams(monkeypatch):
    """Pretend streams, and make all tiles ahead."""
    mode = Streams()
    monkeypatch.setattr(ahead, "is_worth_it", lambda t, flops: True)
    monkeypatch.setattr(ahead, "_thread", ahead._Thread())
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": mode.on,
        "current_stream": lambda device: mode.current,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return mode


def generate(args, streams):
    """Return y, and check that the other stream had work at the same time, and has none left."""
    with streams:
        y = aten.apply(*args, schedule="generate")
    assert streams.overlaps
    assert streams.is_joined()
    return y


@pytest.mark.parametrize("strides", ["contiguous", "swapped", "sliced"])
@pytest.mark.parametrize("elements", [10, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_in_any_order_of_the_streams(dtype, elements, strides, streams, factors, tiles, oracle):
    """Few outputs, few instances, or both in a tile; the head is read in place, or copied on the other stream."""
    args = factors(SIZES, dtype, NAMES, strides)
    with tiles(elements):
        y = generate(args, streams)
    exact, scale = (oracle.linear(*(f(t.double()) for t in args)) for f in (torch.clone, torch.abs))
    oracle.check(y, exact, scale, dtype)


@pytest.mark.parametrize(("name", "missing"), [("wait_stream", 0), *(("wait_event", n) for n in range(5))])
def test_every_wait_is_needed(name, missing, streams, factors, tiles, monkeypatch):
    waits, wait = [], getattr(Stream, name)

    def skips_one(self, what):
        waits.append(what)
        if len(waits) - 1 != missing:
            wait(self, what)

    args = factors(SIZES, torch.float32, NAMES)
    monkeypatch.setattr(Stream, name, skips_one)
    with tiles(60), pytest.raises(AssertionError, match="memory is written"):
        generate(args, streams)


def test_a_call_that_is_cut_short_waits_for_the_other_stream(streams, factors, tiles, monkeypatch):
    args = factors(SIZES, torch.float32, NAMES)

    def fails(*block):
        raise MemoryError

    monkeypatch.setattr(Affine, "add", fails)
    with tiles(20), streams, pytest.raises(MemoryError):
        aten.apply(*args, schedule="generate")
    assert streams.is_joined()


@pytest.mark.parametrize(("bits", "itemsize"), [(16, 2), (32, 4)])
def test_two_tiles_fit_the_share_of_one_of_float32(bits, itemsize, streams, factors, monkeypatch):
    x, z, weight = factors((40, 3, 5, 16, 16), torch.bfloat16 if bits == 16 else torch.float32, NAMES[:3])
    y, tiling = x.new_empty(40, 3, 16), Tiling(1024, x.dtype, torch.float32)
    with streams:
        aten.generate.apply(x, z, weight, y, Affine(x, z, None, None, None, tiling), tiling)
    rooms = {t.untyped_storage().nbytes() for t in streams.kept if t.dim() == 1}
    assert len(rooms) == 1
    assert 2 * rooms.pop() <= 2 * 1024 * 4


def test_only_large_tiles_of_a_gpu_are_made_ahead():
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert ahead.is_worth_it(on_gpu, 1 << 34)
    assert not ahead.is_worth_it(on_gpu, 1 << 30)
    assert not ahead.is_worth_it(torch.empty(0), 1 << 40)
    torch.use_deterministic_algorithms(True)
    try:
        assert not ahead.is_worth_it(on_gpu, 1 << 34)
    finally:
        torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_captured_graph(dtype, oracle, tiles, monkeypatch):
    """The values of a graph that is replayed with other values, and of calls without one, many times."""
    monkeypatch.setattr(ahead, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(ahead, "is_worth_it", spied := Spy(ahead.is_worth_it))
    new = lambda: [torch.randn(size, device="cuda").to(dtype) for size in ((64, 128, 64), (64, 64), (64, 64, 64))]
    args = new()
    with tiles(1 << 15), fasthyper.use_backend("aten", schedule="generate"), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fasthyper.hyper_linear(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fasthyper.hyper_linear(*args)
        for _ in range(5):
            for t, other in zip(args, new(), strict=True):
                t.copy_(other)
            graph.replay()
            oracle.check_op("apply", y, *args)
            oracle.check_op("apply", fasthyper.hyper_linear(*args), *args)
    assert all(spied.answers)
    assert spied.answers
