from __future__ import annotations

import pytest
import torch

from fasthyper import measure
from fasthyper.measure import interleaved_seconds, peak_temporary_bytes

KIB = 1024


def kib(number: int) -> torch.Tensor:
    return torch.empty(number * KIB, dtype=torch.uint8)


def test_what_is_returned_is_not_temporary():
    assert peak_temporary_bytes(lambda: kib(100)) == 0


def test_what_is_stored_elsewhere_is_not_temporary():
    store = []
    assert peak_temporary_bytes(lambda: store.append(kib(100))) == 0


def test_temporaries_count_while_they_live():
    def fn():
        a, b = kib(10), kib(20)  # 30 together
        del a
        c = kib(5)  # 25
        del b, c
        d = kib(28)  # 28
        del d
        return kib(40)  # more than all of them, but none of it is temporary

    assert peak_temporary_bytes(fn) == 30 * KIB


def test_the_worst_moment_counts():
    def fn():
        result = kib(3)
        a, b = kib(10), kib(20)
        del a, b
        c = kib(25)
        del c
        return result

    assert peak_temporary_bytes(fn) == 30 * KIB


def test_freeing_what_was_there_before_changes_nothing():
    before = [kib(1000)]

    def fn():
        before.clear()
        kib(7)

    assert peak_temporary_bytes(fn) == 7 * KIB


def test_freeing_what_an_earlier_measurement_left_changes_nothing():
    store = []
    peak_temporary_bytes(lambda: store.append(kib(1000)))

    def fn():
        store.clear()
        kib(7)

    assert peak_temporary_bytes(fn) == 7 * KIB


def test_gradients_do_not_count_but_saved_activations_do():
    x = torch.randn(64, 256)
    w = torch.randn(256, 256, requires_grad=True)

    def fn():
        y = (x @ w).exp()  # 64 KiB for the product, freed at once, 64 KiB for the result, kept for backward
        y.sum().backward()  # an expanded gradient, then 64 KiB for exp's
        return y

    expected = 64 * KIB
    assert expected <= peak_temporary_bytes(fn) < expected + KIB
    assert w.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    x = torch.ones(1 << 20, device="cuda")
    assert peak_temporary_bytes(lambda: (x + 1) * (x + 2), "cuda") == 8 << 20


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"device: .* not on 'meta'"):
        peak_temporary_bytes(lambda: None, "meta")


def test_timed_in_turns_once_before_the_clock_runs(monkeypatch):
    called = []
    now = iter(range(100))
    monkeypatch.setattr(measure, "clock", lambda device: next(now))
    seconds = interleaved_seconds([lambda: called.append("a"), lambda: called.append("b")], 3, torch.device("cpu"))
    assert called == ["a", "b"] * 4
    assert seconds == [1, 1]


def test_the_median_is_what_counts(monkeypatch):
    ticks = iter([0, 1, 10, 30, 100, 101, 200, 209, 300, 305, 400, 407])
    monkeypatch.setattr(measure, "clock", lambda device: next(ticks))
    assert interleaved_seconds([lambda: None, lambda: None], 3, torch.device("cpu")) == [1, 9]
