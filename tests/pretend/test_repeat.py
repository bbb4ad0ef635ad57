"""Launches of the Triton kernels that are repeated without the Python that chose them."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import pytest
import stubbed_triton
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import fasthyper
from fasthyper.backends import gpu
from fasthyper.backends import triton as backend
from fasthyper.backends.triton import recording, repeat, tuning

NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
SIZES = [
    (64, 1, 64, 10, 32),
    (64, 1, 50, 784, 10),  # z and H are padded
    (256, 1, 256, 17, 256),  # dx and dz are two folds
    (3, 40, 48, 20, 24),  # several points
    (20000, 1, 16, 8, 8),  # sums are split
]


@pytest.fixture(autouse=True, scope="module")
def stub():
    stubbed_triton.start()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No launch is known, and temporary memory is kept, so that no two tensors have one address."""
    tuning.forget()
    repeat._thread.devices.clear()
    kept, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: kept.append(empty(*args, **options)) or kept[-1])
    yield
    stubbed_triton.launches = None


def call(args, mask=(True,) * 6):
    """Run a forward and a backward, and return the launches with the tensors that they may read and write."""
    x, z, weight, bias, base_weight, _ = args
    stubbed_triton.launches = found = []
    y = backend.apply(x, z, weight, bias, base_weight, schedule="fold")
    gradients = backend.grads(*args, mask, schedule="fold")
    stubbed_triton.launches = None
    return found, [*args, y, *(t for t in gradients if t is not None)]


def described(found, tensors):
    """Return launches with each address as a tensor's number and an offset, or as the order of its first use."""
    others = {}

    def place(value):
        if not (isinstance(value, tuple) and value and value[0] == "address"):
            return value
        for number, t in enumerate(tensors):
            if 0 <= value[1] - t.untyped_storage().data_ptr() < t.untyped_storage().nbytes():
                return (number, value[1] - t.data_ptr(), *value[2:])
        return ("temporary", others.setdefault(value[1], len(others)), *value[2:])

    return [(launch.name, launch.grid, [place(value) for value in launch.values]) for launch in found]


def compare(make, monkeypatch):
    """Compare the launches of the fourth call with those that Triton's own way makes."""
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "_is_watched", lambda: True)
        expected = described(*call(make()))
    for _ in range(3):
        call(make())
    with monkeypatch.context() as patch:
        patch.setattr(recording.Call, "launch", lambda self: pytest.fail("not repeated"))
        args = make()
        assert described(*call(args)) == expected
    assert expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_same_launches_on_other_tensors(sizes, dtype, factors, monkeypatch):
    if sizes[1] > 1:
        monkeypatch.setattr(repeat.recording, "spoil", lambda: None)
    compare(lambda: factors(sizes, dtype, NAMES), monkeypatch)


@pytest.mark.parametrize("strides", ["transposed", "swapped", "sliced", "expanded"])
def test_strides(strides, factors, monkeypatch):
    compare(lambda: factors((64, 1, 48, 10, 32), torch.bfloat16, NAMES, strides), monkeypatch)


def test_tensors_that_share_memory_are_told_apart_later(factors):
    """x and z are one tensor in the calls that could be recorded, and two in the last one."""
    x, z, weight, *_ = factors((64, 1, 64, 64, 32), torch.bfloat16)
    for given in (x[:, 0], x[:, 0], x[:, 0], z):
        stubbed_triton.launches = found = []
        backend.apply(x, given, weight, schedule="fold")
    addresses = [value[1] for one in found for value in one.values if isinstance(value, tuple)]
    assert {t.data_ptr() for t in (x, z, weight)} <= set(addresses)


@pytest.mark.parametrize("change", ["workspace", "alignment", "strides", "tf32", "deterministic"])
def test_another_problem_is_not_a_repeat(change, factors, monkeypatch):
    make = lambda: factors((64, 1, 64, 64, 32), torch.float32, NAMES)
    for _ in range(3):
        call(make())
    args = make()
    if change == "workspace":
        fasthyper.set_workspace_limit(16 << 20)
    elif change == "alignment":
        args[0] = torch.cat([args[0].flatten()[:1], args[0].flatten()])[1:].view_as(args[0])
    elif change == "strides":
        args[0] = args[0].transpose(0, 2).contiguous().transpose(0, 2)
    elif change == "tf32":
        monkeypatch.setattr(gpu, "allows_tf32", lambda: True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    launched = []
    monkeypatch.setattr(recording.Call, "launch", lambda self: launched.append(self))
    call(args)
    assert launched


def test_a_profilers_hooks_see_each_launch(factors, monkeypatch):
    args = factors((64, 1, 64, 64, 32), torch.bfloat16, NAMES)
    for _ in range(3):
        call(args)
    launched = []
    monkeypatch.setattr(recording.Call, "launch", lambda self: launched.append(self))
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda *_: None)
    call(args)
    assert launched


def test_nothing_is_recorded_during_a_capture(factors, monkeypatch):
    """The first calls of a capture may be timed later; those recorded before it are repeated."""
    args = factors((64, 1, 64, 64, 32), torch.bfloat16, NAMES)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setenv("FASTHYPER_AUTOTUNE", "0")
    for _ in range(3):
        call(args)
    assert repeat._SEEN in repeat._known.values()
    assert not any(isinstance(known, repeat.Repeat) for known in repeat._known.values())


def test_a_new_thread_makes_the_device_current_first(factors, monkeypatch):
    args = factors((64, 1, 64, 64, 32), torch.bfloat16, NAMES)
    for _ in range(3):
        call(args)
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    call(args)
    assert not made
    thread = threading.Thread(target=call, args=(args,))
    thread.start()
    thread.join()
    assert made


def test_the_oldest_are_not_kept_without_end(factors, monkeypatch):
    monkeypatch.setattr(repeat, "_MOST", 3)
    for B in range(2, 9):
        call(factors((B, 1, 16, 8, 8), torch.bfloat16, NAMES))
        assert len(repeat._known) <= 3


def test_more_than_launches_is_never_repeated():
    tensor = torch.empty(8, device="cuda")
    ran = []

    def launch():
        recording.spoil()
        ran.append(SimpleNamespace())

    for _ in range(5):
        repeat.run("test", (tensor,), launch)
    assert len(ran) == 5


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are allocated within it, and are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "empty" in func.name():
            self.add(result.untyped_storage().nbytes())
            weakref.finalize(result, self.add, -result.untyped_storage().nbytes())
        return result

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def test_recorded_launches_hold_no_memory(factors):
    """A call of many blocks frees the temporary memory of each, while its launches are recorded, too."""
    fasthyper.set_workspace_limit(1 << 20)
    x, z, weight, g = factors((500, 40, 50, 8, 24), torch.bfloat16)
    for turn in range(4):
        with Allocated() as allocated:
            dx, dz, dh, *_ = backend.grads(x, z, weight, None, None, g, (True,) * 3, schedule="fold")
        assert allocated.most - dx.nbytes - dz.nbytes - dh.nbytes <= 1 << 20, turn


def test_storages_that_overlap_are_one_piece():
    """They were not alive at the same time: one took the memory of the other."""
    ranges = [(5000, 5010), (1050, 1700), (1000, 1100), (1000, 1100), (1700, 1701)]
    memories = [repeat._Memory(begin, begin, end) for begin, end in ranges]
    assert repeat._pieces(memories) == ({1000: 0, 1700: 1024, 5000: 1536}, 2048)
    assert repeat._pieces([]) == ({}, 0)
