"""The benchmark script: its peers compute the same thing, and its summary says what it claims to."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

import fasthyper

ROOT = pathlib.Path(__file__).parent.parent

with pytest.MonkeyPatch.context() as path:  # scripts, which import one another
    path.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu
    import gpu
    import gpu_cuda
    import peers
    import report
    import resident
    import timing
    import workloads

PEERS = [pytest.param(p, marks=[pytest.mark.slow] if p.compiled else [], id=p.name) for p in peers.PEERS]
EAGER = [peer for peer in peers.PEERS if not peer.compiled]
TINY = workloads.Workload("tiny", 5, 1, 3, 4, 2, "made up")


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_agree_with_the_reference(peer, N):
    if peer.per_sample and N > 1:
        pytest.skip("N = 1 only")
    inputs, g = peers.factors(dataclasses.replace(TINY, N=N), torch.float64)
    results = peers.step(peer.function(), inputs, g)()
    for actual, expected in zip(results, peers.step(fasthyper.ops.reference.apply, inputs, g)(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wrong", range(4))
def test_what_computes_something_else_is_no_peer(wrong):
    inputs, g = peers.factors(TINY, torch.float32)
    truth, results = peers.Truth(inputs, g), list(peers.step(peers.materialised, inputs, g)())
    truth.check("right", tuple(results))
    results[wrong] = results[wrong] * 1.01
    with pytest.raises(AssertionError, match=rf"wrong: {('y', 'dx', 'dz', 'dH')[wrong]} is off by 0\.01"):
        truth.check("wrong", tuple(results))


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.05)
    monkeypatch.setattr(timing, "PRODUCTS", [(64, 64, 64)])
    monkeypatch.setattr(timing, "LONG", 0.01)
    monkeypatch.setattr(timing, "SHORT", 0.01)


def test_a_workload_is_measured(brief):
    row = timing.measure(dataclasses.replace(TINY, B=32), torch.float32, 2, EAGER)
    assert {*row.peers, *row.dropped} == {peer.name for peer in EAGER}
    assert {timing.OURS, timing.AGAIN} < set(row.seconds)
    assert row.rate > 0
    assert row.share < 1
    assert row.temporary[timing.OURS] >= 0
    assert report.cells(row)[0] == "tiny"


def test_peers_without_a_chance_are_dropped(brief):
    def slow(x, z, weight):
        timing.time.sleep(0.02)
        return peers.materialised(x, z, weight)

    quick, large = (
        peers.Peer(name, peers.materialised, lambda w, n=n: n) for name, n in (("quick", 1), ("large", 1 << 31))
    )
    late = peers.Peer("late", slow, lambda w: 1)
    row = timing.measure(dataclasses.replace(TINY, B=32), torch.float32, 2, [quick, large, late])
    assert set(row.peers) == {"quick"}
    assert row.dropped["large"] == "8 GiB"
    assert row.dropped["late"].startswith("> ")
    row = timing.measure(TINY, torch.float32, 2, [quick, late])  # a batch too small for a part of it
    assert row.dropped["late"].startswith("(")


@pytest.mark.skipif(not resident.FORGET.exists(), reason="there is no /proc here")
def test_resident_memory():
    large, small = (workloads.Workload(f"W of {B // 64} MiB", B, 1, 4, 64, 64, "made up") for B in (2048, 64))
    sizes = resident.resident_bytes([large, small], "float32", "materialised", 1)
    assert sizes[0] > 30 * report.MIB
    assert sizes[1] < 10 * report.MIB  # nothing is left of the other


def made_up(B=100, N=1, R=64, I=64, O=64, speed_up=2.0, share=0.5, mib=1, **more):
    """A row with these figures: ours takes a second."""
    w = workloads.Workload("made up", B, N, R, I, O, "made up", **more)
    seconds = {timing.OURS: 1.0, timing.AGAIN: 1.0, "best": speed_up, "worse": 10.0}
    temporary = {timing.OURS: mib * report.MIB, "best": 0, "worse": 0}
    return timing.Row(w, seconds, temporary, {}, w.flops / share if N == 1 else None, mib * report.MIB)


def test_the_summary():
    rows = [
        made_up(speed_up=8.0, share=0.9),
        made_up(speed_up=2.0, share=0.7, R=63),  # 63·64·64 < 2¹⁸: too light for its share to count
        made_up(speed_up=4.0, share=0.6, R=1024, O=8, mib=7),
        made_up(speed_up=0.5, share=0.1, R=2, extra=True),
        made_up(speed_up=0.25, N=2, mib=3),
    ]
    rows[1].seconds[timing.AGAIN] = 1.5
    lines = {text: (value, floor) for text, value, _, floor in report.figures(rows, "float32")}
    assert list(lines.values()) == [
        (pytest.approx(4.0), "≥ 2.0"),  # of 8 and 2
        (pytest.approx(4.0), "≥ 1.6"),  # of 8, 2 and 4
        (0.5, "≥ 0.95"),
        (0.25, "≥ 0.9"),
        (pytest.approx(0.9), "≥ 0.8"),
        (pytest.approx(0.6), "≥ 0.65"),
        (7.0, "≤ 40"),
        (7.0, "≤ 40"),
        (1.0, ""),
        (1.5, ""),
    ]
    assert report.figures([], "float32")[0][1] is None
    assert [line[3] for line in report.figures(rows, "bfloat16")[:3]] == ["≥ 3.5 (AMX)", "≥ 2.2 (AMX)", ""]


def test_typical_times():
    long, short = [3.0, 1.0, 2.0, 100.0], [3e-4, 1e-4, 2e-4, 5e-4, 4e-4]
    assert timing.typical({"a": long}) == {"a": 2.5}
    assert timing.typical({"a": long, "b": short}) == {"a": 1.25, "b": pytest.approx(1.5e-4)}


def test_rounds():
    assert [timing.rounds(once, 7) for once in (1e-4, 0.125, 1.0, 15.0, 100.0)] == [200, 16, 7, 4, 3]
    assert timing.rounds(100.0, 2) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2345, "1,234"), (0.0999, "99.9"), (0.00123, "1.23"), (0.00012, "0.120")]
)
def test_milliseconds(seconds, text):
    assert timing.ms(seconds) == text


def test_the_registry():
    ones = [w for w in workloads.WORKLOADS if w.N == 1 and not w.extra]
    assert (len(ones), sum(w.O >= 16 for w in ones)) == (15, 8)


def test_the_readme_has_the_table(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    report.into_readme("cpu_float32", report.short([made_up(readme=True)], "here.", "cpu_float32.md"), copy)
    assert "| made up | 100 | 1 | 64 | 64 → 64 | 1.0 | 0.0 | 1,000 | 2,000 (best) | 2.00 |" in copy.read_text()
    assert "qm9" not in copy.read_text()


def test_a_report_has_every_part():
    text = report.full([made_up(), made_up(N=2, published=7)], "float32", report.machine("float32", "aten", 0.5))
    assert text.count("made up") > 4
    assert "threads; torch" in text


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="no workload has 'nonesuch'"):
        cpu.main(["--only", "nonesuch"])


def way(run):
    """Name of the function that a step calls."""
    cells_of = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))
    return cells_of["way"].cell_contents.__name__


class TestGPU:
    """The script for a GPU, with a CPU in its place: graphs are calls, and clocks the CPU's."""

    @pytest.fixture
    def pretended(self, monkeypatch):
        monkeypatch.setattr(gpu, "DEVICE", "cpu")
        monkeypatch.setattr(gpu, "captured", lambda run: run)
        monkeypatch.setattr(gpu, "temporary_bytes", lambda run: 3 * report.MIB)

    def test_a_workload_is_measured(self, pretended):
        row = gpu.measure(dataclasses.replace(TINY, B=32), torch.float32, 1e12, timing.clock, 0.0)
        assert {timing.OURS, timing.AGAIN, "materialise + bmm", "F.bilinear"} <= {*row.seconds, *row.dropped}
        assert row.dropped["compiled einsum, one"] == "no time"
        assert row.temporary[timing.OURS] == 3 * report.MIB
        text = report.full([row], "", "here.", "# On a GPU", gpu.FIGURES, gpu.NOTES)
        assert "# On a GPU\n" in text
        assert "| temporary memory, MiB, most | 3.00 | ≤ 64 |" in text

    def test_a_peer_that_fails_is_dropped_and_ours_is_not(self, pretended, monkeypatch):
        def broken(run):
            raise torch.OutOfMemoryError("too much")

        graphs = iter([lambda run: run])  # ours alone
        monkeypatch.setattr(gpu, "captured", lambda run: next(graphs, broken)(run))
        row = gpu.measure(TINY, torch.float32, 1e12, timing.clock, 0.0)
        assert row.peers == {}
        assert row.dropped["materialise + bmm"] == "OutOfMemoryError"
        with pytest.raises(ValueError, match="empty"):  # without a peer there is no row: main() says so and goes on
            report.cells(row)
        monkeypatch.setattr(gpu, "captured", broken)
        with pytest.raises(torch.OutOfMemoryError):
            gpu.measure(TINY, torch.float32, 1e12, timing.clock, 0.0)

    def test_ours_far_ahead_still_has_a_peer_to_be_ahead_of(self, pretended):
        slower = {"fused": 1e-3}
        row = gpu.measure(TINY, torch.float32, 1e12, lambda run: slower.get(way(run), 1.0), 0.0)
        assert row.speed_up == pytest.approx(1000)

    def test_the_summary(self):
        rows = [
            made_up(B=1 << 16, speed_up=2.0, share=0.7),
            made_up(B=1 << 16, O=128, speed_up=8.0, share=0.8),
            made_up(speed_up=0.5, N=2),
        ]
        lines = {text: (value, floor) for text, value, _, floor in report.figures(rows, "", gpu.FIGURES)}
        assert [value for value, _ in lines.values()] == [
            pytest.approx(4.0), 2.0, None, None, 0.5, pytest.approx(0.8), pytest.approx(0.7), 1.0, 1.0, 1.0
        ]  # fmt: skip
        assert next(iter(lines.values()))[1] == "≥ 1.7"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so(self):
        with pytest.raises(SystemExit, match="there is no GPU here"):
            gpu.main([])


class TestCUDA:
    """The script for the CUDA kernels, with a CPU in the GPU's place and other backends in theirs."""

    @pytest.fixture
    def pretended(self, monkeypatch):
        monkeypatch.setattr(gpu, "DEVICE", "cpu")
        monkeypatch.setattr(gpu, "captured", lambda run: run)
        monkeypatch.setattr(gpu_cuda, "CUDA", "aten")
        monkeypatch.setattr(gpu_cuda, "TRITON", "materialised")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    @pytest.mark.parametrize("kind", ["layer", "forward", "primary"])
    def test_a_case_is_measured(self, kind, pretended):
        if kind == "primary":
            case = gpu_cuda.primary(8, 5, 6, 4, 3, torch.float32)
        else:
            case = getattr(gpu_cuda, kind)(TINY, torch.float32)
        seconds = gpu_cuda.measured(case, timing.clock)
        assert {"aten", "materialised"} < set(seconds)
        row = gpu_cuda.cells(case, {**dict.fromkeys(seconds, 6.0), "aten": 2.0, "materialised": 3.0}, 1e12)
        assert len(row) == len(gpu_cuda.COLUMNS)
        assert row[4] == "1.50"
        assert row[5].startswith("3.00")

    def test_the_cases_are_those_with_floors(self):
        names = [make.func.__name__ for make in gpu_cuda.cases(torch.bfloat16)]
        assert names[:4] == ["layer", "primary", "primary", "primary"]
        assert names.count("forward") == 2  # qm9, and the square one

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so(self):
        with pytest.raises(SystemExit, match="there is no GPU here"):
            gpu_cuda.main([])
