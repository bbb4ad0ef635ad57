"""The measuring half: everyone computes the same, what is slow or fails is said, and what is slower shows."""

from __future__ import annotations

import dataclasses
import pathlib
import time

import pytest
import torch

import fasthyper

ROOT = pathlib.Path(__file__).parent.parent.parent

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    from benchmarks import __main__ as command
    from benchmarks import devices, inputs, measure, peers, records, resident, steps, timing, workloads

Workload = workloads.Workload
TINY = Workload("tiny", 5, 1, 3, 4, 2, "made up")
POINTS = dataclasses.replace(TINY, N=3)
GRAPH = Workload("graph", 24, 1, 3, 4, 2, "made up", neighbours=4)
PRIMARY = Workload("primary", 5, 2, 3, 4, 2, "made up", hidden=6)
KINDS = [TINY, POINTS, GRAPH, PRIMARY]
HERE = records.Context(
    device="a processor", kind="cpu", backend="cpu", torch="2", triton="", driver="", python="3", commit="a", date="b"
)


def those(w, dtype=torch.float64):
    return [*peers.ours(w, "cpu"), *peers.peers(w, dtype, "cpu")]


def cases():
    for w in KINDS:
        for peer in those(w):
            marks = [pytest.mark.slow] if peer.compiled else []
            yield pytest.param(w, peer, marks=marks, id=f"{w.name}{w.N}-{peer.name}")


@pytest.mark.parametrize(("w", "peer"), list(cases()))
@pytest.mark.parametrize("mode", records.MODES)
def test_everyone_computes_what_the_reference_says(w, peer, mode):
    if why := peer.unfit(w, torch.float64, 1 << 30):
        pytest.skip(why)
    first = inputs.inputs(w, torch.float64)
    run = steps.step(peer.function(w), mode, inputs.Sets([first]), peer.layout)
    results = run()
    truth = steps.step(steps.definition(w, "cpu"), mode, inputs.Sets([first]))()
    steps.Truth(w, mode, first).check(peer.name, results, peer.layout)
    for got, expected in zip(results, truth, strict=True):
        if mode != records.FORWARD and got is results[-1] and peer.layout != steps.OWN:
            expected = expected.permute(peer.layout)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("w", KINDS, ids=lambda w: f"{w.name}{w.N}")
def test_the_reference_is_the_sum_instance_by_instance(w):
    given = inputs.inputs(w, torch.float64)

    def layer(x, z, head):
        H, bias, base, base_bias = head if len(head) == 4 else (*head, None, None, None)
        y = x @ (H @ z).T
        return y if bias is None else y + x @ base.T + bias @ z + base_bias

    if w.neighbours > 1:
        y = torch.zeros(w.nodes, 1, w.O, dtype=torch.float64)
        for edge in range(w.B):
            source = edge // w.neighbours
            target = (source + 1 + edge % w.neighbours) % w.nodes
            y[target] += layer(given.x[source], given.z[edge], given.head)
    else:
        rows = []
        for x, z in zip(given.x, given.z, strict=True):
            x = torch.relu(layer(x, z, given.head[:4])) if w.hidden else x
            rows.append(layer(x, z, given.head[4:] if w.hidden else given.head))
        y = torch.stack(rows)
    torch.testing.assert_close(steps.definition(w, "cpu")(*given.leaves), y)


@pytest.mark.parametrize("wrong", range(4))
def test_what_computes_something_else_is_no_peer(wrong):
    first = inputs.inputs(TINY, torch.float32)
    truth = steps.Truth(TINY, records.BOTH, first)
    results = list(steps.step(peers.materialised, records.BOTH, inputs.Sets([first]))())
    truth.check("right", results)
    results[wrong] = results[wrong] * 1.01
    name = ("y", "dx", "dz", "the head's gradient")[wrong]
    with pytest.raises(AssertionError, match=rf"wrong: {name} is off by 0\.01"):
        truth.check("wrong", results)
    results[wrong] = results[wrong].unsqueeze(0)
    with pytest.raises(AssertionError, match="off by inf"):
        truth.check("of another shape", results)


def test_a_training_step_trains():
    sets = inputs.Sets(inputs.inputs(dataclasses.replace(TINY, B=64), torch.float32, seed=k) for k in range(2))
    train = steps.step(peers.fused, records.TRAINING, sets)
    losses = [train()[0].item() for _ in range(400)]
    assert losses[0] != losses[1]  # another set
    assert losses[-2] < 0.95 * losses[0]
    assert losses[-1] < 0.95 * losses[1]


def test_no_call_finds_its_tensors_in_the_cache():
    sets = inputs.rotated(TINY, torch.float32, 1 << 14)
    size = sum(t.nbytes for t in (*sets[0].leaves, sets[0].g))
    assert len(sets) * size >= 2 << 14
    assert (len(sets) - 1) * size < 2 << 14
    ways = [steps.step(way, records.FORWARD, sets) for way in (peers.materialised, peers.fused)]
    for turn, one in enumerate((*sets, sets[0])):  # whoever runs takes the next
        torch.testing.assert_close(ways[turn % 2]()[0], peers.materialised(*one.leaves))
    sets.rewind()
    torch.testing.assert_close(ways[0]()[0], peers.materialised(*sets[0].leaves))
    assert len(inputs.rotated(TINY, torch.float32, 0)) == 1


def test_each_node_of_a_graph_has_as_many_edges_in_as_out():
    source, target = inputs.edges(GRAPH)
    assert source.tolist() == sorted(source.tolist())
    assert source.bincount().tolist() == target.bincount().tolist() == [4] * 6
    assert not (source == target).any()


def test_both_kinds_of_device_are_used_alike():
    cpu, gpu = ({name for name in vars(one) if not name.startswith("_")} for one in (devices.CPU, devices.GPU))
    assert cpu == gpu


class Clock(devices.CPU):
    """A processor on which everything takes as long as it sleeps."""

    def __init__(self):
        super().__init__()
        self._cache = 1 << 12

    def ceilings(self, dtype):
        return devices._ceilings("cpu", dtype, 16, 1 << 10)


BRIEF = timing.Patience(seconds=0.05, least=3, most=1.0, rounds=5)


def late(seconds, name="late", way=peers.materialised, **more):
    def slow(*leaves):
        time.sleep(seconds)
        return way(*leaves)

    return peers.Peer(name, lambda w, device: slow, **more)


def compared(*others, w=TINY, mode=records.BOTH, dtype=torch.float32, **more):
    ways = [*peers.ours(w, "cpu"), *others]
    group = timing.compare(w, mode, dtype, Clock(), ways, HERE, BRIEF, study="workloads", **more)
    return {r.way: r for r in group}


@pytest.mark.parametrize("mode", records.MODES)
def test_a_record_says_what_was_measured(mode):
    found = compared(peers.PEERS[0], mode=mode)
    assert list(found) == [peers.OURS, peers.AGAIN, "materialise + bmm", "matrix product", "copy"]
    ours, product = found[peers.OURS], found["matrix product"]
    assert (ours.workload, ours.B, ours.O, ours.dtype, ours.mode, ours.role) == ("tiny", 5, 2, "float32", mode, "ours")
    assert 0 < ours.q1 <= ours.median <= ours.q3
    assert ours.rounds >= 3
    assert ours.temporary >= 0
    assert ours.compile is None
    assert (product.role, product.median) == ("ceiling", None)
    assert product.rate > 0


def test_a_peer_that_is_slowed_down_shows():
    found = compared(late(0.004), late(0.006, "later"))
    assert 0.004 < found["late"].median < found["later"].median
    assert found["later"].rounds == found["late"].rounds >= 3
    assert found["late"].q1 > 0.004


def test_who_is_far_slower_is_tried_and_no_more():
    found = compared(late(0.005, "quick"), late(0.03))
    assert (found["late"].rounds, found["late"].note) == (1, "tried once")
    assert found["late"].median >= 0.03
    assert found["late"].q1 is None
    assert found["quick"].rounds > 1


def test_what_does_not_fit_is_said():
    def lacking(*leaves):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def broken(*leaves):
        raise ValueError("no")

    found = compared(
        peers.Peer("large", lambda w, device: peers.materialised, keeps=lambda w: 1 << 40),
        peers.Peer("absent", lambda w, device: peers.materialised, library="no_such_library"),
        peers.Peer("lacking", lambda w, device: lacking),
        peers.Peer("broken", lambda w, device: broken),
        peers.Peer("wrong", lambda w, device: lambda *leaves: 2 * peers.materialised(*leaves)),
        peers.Peer("bilinear", lambda w, device: peers.bilinear, per_sample=True),
        peers.Peer("folded", lambda w, device: peers.outer, folds=True),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_feature_that_is_left_out_is_seen(dtype):
    w = Workload("wide", 8, 1, 128, 16, 16, "made up")
    first = inputs.inputs(w, dtype)
    truth = steps.Truth(w, records.FORWARD, first)
    x, z, H = first.leaves
    truth.check("whole", [peers.materialised(x, z, H)])
    with pytest.raises(AssertionError, match="y is off"):
        truth.check("without", [peers.materialised(x, z[:, :-1], H[..., :-1].contiguous())])


def test_of_what_is_large_a_part_is_checked(monkeypatch):
    monkeypatch.setattr(steps.Truth, "MOST", 8 * TINY.I * TINY.O * 2)
    first = inputs.inputs(TINY, torch.float32)
    truth = steps.Truth(TINY, records.BOTH, first)
    y, dx, dz, dH = steps.step(peers.materialised, records.BOTH, inputs.Sets([first]))()
    truth.check("right", [y, dx, dz, dH])
    with pytest.raises(AssertionError, match="y is off"):
        truth.check("wrong", [y + 1, dx, dz, dH])
    with pytest.raises(AssertionError, match="head's gradient is off"):
        truth.check("wrong", [y, dx, dz, 2 * dH])


def test_who_is_not_to_run_is_said():
    found = compared(peers.PEERS[0], without={"materialise + bmm": "for a reason"})
    assert (found["materialise + bmm"].note, found["materialise + bmm"].median) == ("for a reason", None)


def test_what_the_registry_no_longer_has_goes():
    assert measure.listed(record(study="training"))
    w = workloads.WORKLOADS[0]
    sizes = {name: getattr(w, name) for name in ("B", "N", "R", "I", "O")}
    assert measure.listed(record(workload=w.name, **sizes))
    assert not measure.listed(record(workload=w.name, **{**sizes, "B": 7}))
    point = next(workloads.AXES[0].workloads())
    sizes = {name: getattr(point, name) for name in ("B", "N", "R", "I", "O")}
    assert measure.listed(record(study="scaling", axis="B", workload=point.name, **sizes))
    assert not measure.listed(record(study="scaling", axis="R", workload=point.name, **sizes))


def test_what_is_left_out_is_recorded(monkeypatch):
    monkeypatch.setattr(measure, "Patience", lambda **more: BRIEF)
    made = measure.workloads([TINY], [torch.float32], records.MODES, Clock(), HERE, every=True, compiled=False)
    groups = {group[0].mode: {r.way: r for r in group} for group in made}
    assert set(groups) == set(records.MODES)
    for ways in groups.values():
        assert ways["compiled einsum"].note == "was not to be compiled"
    assert groups[records.BOTH]["fasthyper"].plan
    only = measure.workloads([TINY], [torch.float32, torch.bfloat16], records.MODES, Clock(), HERE, compiled=False)
    groups = list(only)
    assert [(g[0].mode, g[0].dtype) for g in groups] == [(records.BOTH, "float32")]
    notes = {r.way: r.note for r in groups[0]}
    assert notes["hyperlight"] == "as vmap(functional_call)"
    shown = dataclasses.replace(TINY, readme=True)
    dtypes = [torch.float32, torch.bfloat16]
    some = measure.workloads([shown], dtypes, records.MODES, Clock(), HERE, compiled=False)
    assert [(g[0].dtype, g[0].mode) for g in some] == [
        *(("float32", mode) for mode in (records.BOTH, records.FORWARD, records.TRAINING)),
        ("bfloat16", records.BOTH),
    ]


def test_ours_must_not_fail():
    broken = dataclasses.replace(peers.ours(TINY, "cpu")[0], make=lambda w, device: lambda *leaves: leaves[0])
    with pytest.raises(AssertionError, match="fasthyper: y is off"):
        timing.compare(TINY, records.FORWARD, torch.float32, Clock(), [broken], HERE, BRIEF, study="workloads")


def test_a_long_run_is_tried_on_a_part_first(monkeypatch):
    w = dataclasses.replace(TINY, B=64)
    monkeypatch.setattr(timing, "LONG", 1e-4)
    found = compared(late(0.2, "last"), w=w)
    assert found["last"].note == f"4 instances took {found['last'].note.split()[-2]} s"
    assert found["last"].median is None


def test_what_memory_will_refuse_is_not_tried_on_a_part(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 1e-4)
    monkeypatch.setattr(Clock, "free", lambda self: 1)
    found = compared(late(0.02, "last"), w=dataclasses.replace(TINY, B=64))
    assert found["last"].median >= 0.02


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="Linux tells what is free")
def test_memory_that_is_not_there_is_refused_at_once():
    start = time.perf_counter()
    with devices.CPU().bounded(), pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(1 << 46, dtype=torch.uint8)
    assert time.perf_counter() - start < 10


def test_rounds():
    patience = timing.Patience(seconds=1.5, least=7, most=8.0, rounds=60)
    assert [patience.turns(once) for once in (1e-4, 0.1, 1.0, 2.0, 10.0, 100.0)] == [60, 15, 7, 4, 3, 2]


def test_sixteen_bits_are_widened_where_a_processor_has_none(monkeypatch):
    names = {p.name for p in peers.peers(TINY, torch.float16, "cpu")}
    assert "materialise + bmm, in float32" in names
    found = compared(*peers.peers(TINY, torch.float16, "cpu")[:2], dtype=torch.float16)
    assert found["materialise + bmm, in float32"].median > 0


def test_the_registry():
    ones = [w for w in workloads.WORKLOADS if w.N == 1 and not w.extra and peers.kind(w) == "layer"]
    assert (len(ones), sum(w.O >= 16 for w in ones)) == (15, 8)
    assert all(w.source for w in workloads.WORKLOADS)
    assert all(w.B % w.neighbours == 0 for w in workloads.WORKLOADS)
    assert [w.B for w in measure.chosen("qm9 mpnn", False, "cuda")] == [39_168]
    assert [w.B for w in measure.chosen("qm9 mpnn", False, "cpu")] == [4_896]
    assert not measure.chosen("mothernet", False, "cpu")
    assert measure.chosen("mothernet", True, "cpu")


def test_axes_vary_one_size():
    for axis in workloads.AXES:
        points = list(axis.workloads())
        varied = {name for name in "BNRIO" if len({getattr(w, name) for w in points}) > 1}
        assert varied == ({"I", "O"} if axis.name == "width" else {axis.name})
        assert len(list(axis.workloads("cuda"))) == len(points) + len(axis.more)
        assert all(min(w.B, w.N, w.R, w.I, w.O) > 0 for w in points)


@pytest.mark.skipif(fasthyper.backends.BACKENDS["cpu"].unavailable() is not None, reason="no compiled kernels")
def test_the_planner_is_told_beside_what_it_chose():
    w = Workload("wide", 4096, 1, 64, 256, 256, "made up")
    plan = measure.planned(w, torch.float32, HERE).split(" / ")
    assert len(plan) == 3  # forward, x and z, the head
    assert set(plan) <= set(fasthyper.problem.SCHEDULES)
    assert len(measure.planned(dataclasses.replace(w, N=100), torch.float32, HERE).split(" / ")) == 2


def test_scaling_ends_where_memory_does(monkeypatch):
    axis = workloads.Axis("B", (0, 1, 2, 3, 4), (2, 4, 8))
    monkeypatch.setattr(measure, "AXES", (axis,))

    def lacking(x, z, weight):
        if len(x) > 2:
            raise torch.OutOfMemoryError("no more")
        return peers.materialised(x, z, weight)

    few = [
        dataclasses.replace(p, make=lambda w, d: lacking) if p.name == "materialise + bmm" else p for p in peers.PEERS
    ]
    monkeypatch.setattr(measure, "PEERS", few)
    groups = list(measure.scaling(["B"], Clock(), dataclasses.replace(HERE, backend="aten")))
    assert [group[0].B for group in groups] == [2, 4]
    by_way = {r.way: r for r in groups[1]}
    assert by_way["materialise + bmm"].note == "out of memory"
    assert by_way["fasthyper, fold"].role == "variant"
    assert by_way["fasthyper"].plan
    assert by_way["fasthyper"].axis == "B"


@pytest.mark.skipif(not resident.FORGET.exists(), reason="there is no /proc here")
def test_resident_memory():
    large, small = (Workload(f"W of {B // 64} MiB", B, 1, 4, 64, 64, "made up") for B in (2048, 64))
    sizes = resident.resident_bytes([large, small], "float32", "materialised", 1)
    assert sizes[0] > 30 << 20
    assert sizes[1] < 10 << 20  # nothing is left of the other


def record(**more):
    return records.Record(**{"study": "workloads", "workload": "tiny", "way": "ours", "context": HERE, **more})


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "here.csv"
    assert records.read(path) == []
    written = [
        record(median=0.125, q1=0.1, q3=0.2, rounds=7, note='a "note", with commas', temporary=1 << 33),
        record(way="copy", role="ceiling", rate=2.5e10, context=dataclasses.replace(HERE, commit="c")),
    ]
    records.write(path, written)
    assert records.read(path) == written
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"here\.csv has other columns"):
        records.read(path)


def test_what_is_measured_again_replaces_what_was_there():
    old = [record(B=1, way=way) for way in ("ours", "gone")] + [record(B=2), record(B=3)]
    new = [record(B=2, median=1.0), record(B=4)]
    found = records.replaced(old, new)
    assert [(r.B, r.way, r.median) for r in found] == [
        (1, "ours", None), (1, "gone", None), (2, "ours", 1.0), (3, "ours", None), (4, "ours", None)
    ]  # fmt: skip
    assert [(r.B, r.way) for r in records.replaced(old, [record(B=1)])] == [(1, "ours"), (2, "ours"), (3, "ours")]


def test_a_file_is_named_after_its_device():
    assert dataclasses.replace(HERE, device="AMD EPYC, AVX2, 2 threads").slug == "amd-epyc-avx2-2-threads"
    here = records.context("cpu")
    assert here.torch == torch.__version__
    assert f"{torch.get_num_threads()} threads" in here.device


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "WORKLOADS", (TINY, POINTS))
    monkeypatch.setattr(command, "CPU", Clock)
    options = ["--modes", "forward + backward", "--dtypes", "float32", "--eager", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        command.main(["measure", "--only", "tiny", "--no-report", "--threads", "1", *options])
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*.csv")
    assert {(r.N, r.mode) for r in records.read(path)} == {(1, records.BOTH), (3, records.BOTH)}
    assert "tiny, B 5 N 3 R 3 4 → 2, forward + backward, float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "nonesuch"], "no workload has 'nonesuch'"),
        (["--only", "mothernet"], "wants --large"),
        pytest.param(
            ["--device", "cuda"],
            "there is no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_is_not_there_is_refused(given, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main(["measure", "--out", str(tmp_path), *given])


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["measure", "--modes", "sideways"])
    assert "sideways: not of forward, forward + backward, training step" in capsys.readouterr().err
