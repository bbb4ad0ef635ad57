"""Comparisons: records are complete, slow ways are found, and ways that fail are left out with a reason."""

from __future__ import annotations

import dataclasses
import pathlib
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    path.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    from example_records import BRIEF, GRAPH, HERE, PAIRS, POINTS, RAGGED, RELATIONS, TINY, Clock

    from benchmarks import devices, records, term_ways, timing, ways
    from benchmarks.terms import indices


def slowed(seconds, name="late", way=ways.materialised, **fields):
    def slow(*leaves):
        time.sleep(seconds)
        return way(*leaves)

    return ways.Way(name, lambda w, device: slow, **fields)


def compared(*others, w=TINY, mode=records.FORWARD_BACKWARD, dtype=torch.float32, **fields):
    group = timing.compare(
        w, mode, dtype, Clock(), [*ways.ours(w, "cpu"), *others], HERE, BRIEF, study="workloads", **fields
    )
    return {r.way: r for r in group}


def test_both_devices_have_the_same_methods():
    cpu, gpu = ({name for name in vars(one) if not name.startswith("_")} for one in (devices.CPU, devices.GPU))
    assert cpu == gpu


@pytest.mark.parametrize("mode", records.MODES)
def test_records_are_complete(mode):
    found = compared(ways.PEERS[0], mode=mode)
    assert list(found) == [ways.OURS, ways.AGAIN, "materialise + bmm", "matrix product", "copy"]
    ours, product = found[ways.OURS], found["matrix product"]
    assert (ours.workload, ours.B, ours.O, ours.dtype, ours.mode, ours.role) == ("tiny", 5, 2, "float32", mode, "ours")
    assert 0 < ours.q1 <= ours.median <= ours.q3
    assert ours.rounds >= 3
    assert ours.temporary >= 0
    assert ours.compile is None
    assert (product.role, product.median) == ("ceiling", None)
    assert product.rate > 0


def test_a_slower_peer_has_longer_times(monkeypatch):
    # On a busy machine either could look far slower than the other.
    monkeypatch.setattr(timing, "SLOWER", {"peer": float("inf"), "variant": float("inf")})
    found = compared(slowed(0.008), slowed(0.012, "later"))
    assert 0.008 < found["late"].median < found["later"].median
    assert found["later"].rounds == found["late"].rounds >= 3
    assert found["late"].q1 > 0.008


def test_a_far_slower_peer_is_tried_once():
    found = compared(slowed(0.005, "quick"), slowed(0.03))
    assert (found["late"].rounds, found["late"].note) == (1, "tried once")
    assert found["late"].median >= 0.03
    assert found["late"].q1 is None
    assert found["quick"].rounds > 1


def test_a_peer_that_cannot_be_timed_has_a_note():
    def lacking(*leaves):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def broken(*leaves):
        raise ValueError("no")

    found = compared(
        ways.Way("large", lambda w, device: ways.materialised, keeps=lambda w: 1 << 40),
        ways.Way("absent", lambda w, device: ways.materialised, library="no_such_library"),
        ways.Way("lacking", lambda w, device: lacking),
        ways.Way("broken", lambda w, device: broken),
        ways.Way("wrong", lambda w, device: lambda *leaves: 2 * ways.materialised(*leaves)),
        ways.Way("bilinear", lambda w, device: ways.bilinear, per_sample=True),
        ways.Way("folded", lambda w, device: ways.outer, folds=True),
        w=dataclasses.replace(POINTS, N=100, R=100),
    )
    notes = {name: r.note for name, r in found.items() if r.role == "peer"}
    assert notes.pop("wrong").startswith("wrong: y is off by")
    assert notes == {
        "large": "would keep 4096 GiB",
        "absent": "not installed",
        "lacking": "out of memory",
        "broken": "ValueError: no",
        "bilinear": "N = 1 only",
        "folded": "50 times the work",
    }
    assert all(r.median is None for r in found.values() if r.role == "peer")


def test_a_skipped_peer_has_its_reason_as_note():
    found = compared(ways.PEERS[0], skip={"materialise + bmm": "for a reason"})
    assert (found["materialise + bmm"].note, found["materialise + bmm"].median) == ("for a reason", None)


def test_a_wrong_result_of_fasthyper_raises():
    broken = dataclasses.replace(ways.ours(TINY, "cpu")[0], make=lambda w, device: lambda *leaves: leaves[0])
    with pytest.raises(AssertionError, match="fasthyper: y is off"):
        timing.compare(TINY, records.FORWARD, torch.float32, Clock(), [broken], HERE, BRIEF, study="workloads")


@pytest.mark.parametrize("mode", [records.FORWARD, records.FORWARD_BACKWARD])
@pytest.mark.parametrize("w", [GRAPH, RELATIONS, RAGGED], ids=lambda w: w.name)
def test_a_peer_with_a_wrong_sum_over_terms_is_left_out(w, mode):
    def without_the_last_term(w, device):
        right = term_ways.each_term(ways.materialised, w, device)
        source, cond, target = indices(w, device)
        last = [rows - 1 if index is None else index[-1] for index, rows in ((source, w.B), (cond, w.B))]

        def wrong(x, z, weight):
            y = right(x, z, weight).clone()
            term = ways.materialised(x[last[0]].view(1, 1, -1), z[last[1]].view(1, -1), weight).flatten()
            y[-1 if target is None else target[-1]] -= term
            return y

        return wrong

    wrong = ways.Way("wrong", without_the_last_term, forms=(w.form,))
    found = compared(wrong, *ways.peers(w, torch.float32, "cpu")[:1], w=w, mode=mode)
    assert found["wrong"].note.startswith("wrong: y is off by")
    assert found["wrong"].median is None
    assert found["materialise + bmm"].median > 0
    assert found["fasthyper"].median > 0
    assert (found["wrong"].B, found["wrong"].S, found["wrong"].C, found["wrong"].T) == (w.B, w.S, w.C, w.T)


def test_pairs_are_timed():
    found = compared(*ways.peers(PAIRS, torch.float32, "cpu")[:2], w=PAIRS)
    assert found["fasthyper"].median > 0
    assert found["two einsums"].median > 0


def test_a_slow_peer_runs_a_fraction_of_the_batch_first(monkeypatch):
    w = dataclasses.replace(TINY, B=64)
    monkeypatch.setattr(timing, "LONG", 1e-4)
    found = compared(slowed(0.2, "last"), w=w)
    assert found["last"].note == f"4 instances took {found['last'].note.split()[-2]} s"
    assert found["last"].median is None


def test_a_peer_that_runs_out_of_memory_does_not_run_a_fraction(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 1e-4)
    monkeypatch.setattr(Clock, "available_bytes", lambda self: 1)
    found = compared(slowed(0.02, "last"), w=dataclasses.replace(TINY, B=64))
    assert found["last"].median >= 0.02


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="needs /proc/meminfo")
def test_too_large_an_allocation_fails_at_once():
    start = time.perf_counter()
    with devices.CPU().memory_limit(), pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(1 << 46, dtype=torch.uint8)
    assert time.perf_counter() - start < 10


def test_number_of_rounds():
    limits = timing.RoundLimits(target_seconds=1.5, min_rounds=7, max_seconds=8.0, max_rounds=60)
    assert [limits.rounds(once) for once in (1e-4, 0.1, 1.0, 2.0, 10.0, 100.0)] == [60, 15, 7, 4, 3, 2]


def test_peers_cast_16_bits_to_float32_without_16_bit_products(monkeypatch):
    names = {p.name for p in ways.peers(TINY, torch.float16, "cpu")}
    assert "materialise + bmm, in float32" in names
    found = compared(*ways.peers(TINY, torch.float16, "cpu")[:2], dtype=torch.float16)
    assert found["materialise + bmm, in float32"].median > 0
