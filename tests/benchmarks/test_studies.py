"""The studies and the command line: which combinations are measured, and where a study ends."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

import fasthyper

ROOT = pathlib.Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    path.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    from example_records import (
        BRIEF,
        DEPTHWISE,
        GRAPH,
        HERE,
        LOW_RANK,
        MAPPED,
        POINTS,
        RAGGED,
        TINY,
        Clock,
        Workload,
        record,
    )

    from benchmarks import __main__ as command
    from benchmarks import records, resident, studies, ways, workloads


def test_records_of_other_sizes_are_not_current():
    assert studies.is_current(record(study="training"))
    w = workloads.WORKLOADS[0]
    sizes = {name: getattr(w, name) for name in ("B", "N", "R", "I", "O")}
    assert studies.is_current(record(workload=w.name, **sizes))
    assert not studies.is_current(record(workload=w.name, **{**sizes, "B": 7}))
    point = next(workloads.AXES[0].workloads())
    sizes = {name: getattr(point, name) for name in ("B", "N", "R", "I", "O")}
    assert studies.is_current(record(study="scaling", axis="B", workload=point.name, **sizes))
    assert not studies.is_current(record(study="scaling", axis="R", workload=point.name, **sizes))


def test_the_report_deletes_records_that_are_not_current(tmp_path, capsys):
    w = next(w for w in workloads.WORKLOADS if w.weight_map)
    sizes = dict(zip(records.SIZES, records.sizes(w), strict=True))
    found = [
        record(workload=w.name, **sizes),
        record(workload=w.name, **{**sizes, "weight_map": ""}),  # the same sizes without the function of W
        record(workload="gone", **sizes),
        record(study="training", workload="any"),
    ]
    path = tmp_path / "here.csv"
    records.write(path, found)
    command.main(["report", "--out", str(tmp_path)])
    assert records.read(path) == [found[0], found[3]]
    assert capsys.readouterr().out.startswith(f"deleted from here.csv: {w.name}, ")
    before = path.read_bytes()
    assert studies.drop_outdated(path) == []
    assert path.read_bytes() == before


def test_other_forms(monkeypatch):
    monkeypatch.setattr(studies, "RoundLimits", lambda **limits: BRIEF)
    given = [DEPTHWISE, LOW_RANK, *MAPPED], [torch.float32], [records.FORWARD_BACKWARD]
    with fasthyper.use_backend("aten"):
        groups = [*studies.measure_workloads(*given, Clock(), HERE, compiled=False)]
    for group, w in zip(groups, given[0], strict=True):
        assert {records.sizes(r) for r in group} == {records.sizes(w)}
        assert all(r.median or r.note == "not compiled" for r in group if r.role == "peer")
    planned = [next(r.plan for r in group if r.role == "ours") for group in groups]
    assert set(planned[0].split(" / ")) <= set(fasthyper.problem.CONV_SCHEDULES)
    assert planned[1:] == ["", "", ""]


def test_skipped_ways_have_a_note(monkeypatch):
    monkeypatch.setattr(studies, "RoundLimits", lambda **limits: BRIEF)
    made = studies.measure_workloads([TINY], [torch.float32], records.MODES, Clock(), HERE, every=True, compiled=False)
    groups = {group[0].mode: {r.way: r for r in group} for group in made}
    assert set(groups) == set(records.MODES)
    for by_way in groups.values():
        assert by_way["compiled einsum"].note == "not compiled"
    assert groups[records.FORWARD_BACKWARD]["fasthyper"].plan
    only = studies.measure_workloads(
        [TINY], [torch.float32, torch.bfloat16], records.MODES, Clock(), HERE, compiled=False
    )
    groups = list(only)
    assert [(g[0].mode, g[0].dtype) for g in groups] == [(records.FORWARD_BACKWARD, "float32")]
    notes = {r.way: r.note for r in groups[0]}
    assert notes["hyperlight"] == "same as vmap(functional_call)"
    shown = dataclasses.replace(TINY, readme=True)
    dtypes = [torch.float32, torch.bfloat16]
    some = studies.measure_workloads([shown], dtypes, records.MODES, Clock(), HERE, compiled=False)
    assert [(g[0].dtype, g[0].mode) for g in some] == [
        *(("float32", mode) for mode in (records.FORWARD_BACKWARD, records.FORWARD, records.TRAINING_STEP)),
        ("bfloat16", records.FORWARD_BACKWARD),
    ]


@pytest.mark.skipif(fasthyper.backends.BACKENDS["cpu"].unavailable() is not None, reason="no compiled kernels")
def test_planned_schedules():
    w = Workload("wide", 4096, 1, 64, 256, 256, "made up")
    plan = studies.planned_schedules(w, torch.float32, HERE).split(" / ")
    assert len(plan) == 3  # forward, x and z, the head
    assert set(plan) <= set(fasthyper.problem.SCHEDULES)
    assert len(studies.planned_schedules(dataclasses.replace(w, N=100), torch.float32, HERE).split(" / ")) == 2


def test_an_axis_ends_where_memory_runs_out(monkeypatch):
    axis = workloads.Axis("B", (0, 1, 2, 3, 4), (2, 4, 8))
    monkeypatch.setattr(studies, "AXES", (axis,))

    def lacking(x, z, weight):
        if len(x) > 2:
            raise torch.OutOfMemoryError("no more")
        return ways.materialised(x, z, weight)

    few = [
        dataclasses.replace(p, make=lambda w, d: lacking) if p.name == "materialise + bmm" else p for p in ways.PEERS
    ]
    monkeypatch.setattr(studies, "PEERS", few)
    groups = list(studies.measure_scaling(["B"], Clock(), dataclasses.replace(HERE, backend="aten")))
    assert [group[0].B for group in groups] == [2, 4]
    by_way = {r.way: r for r in groups[1]}
    assert by_way["materialise + bmm"].note == "out of memory"
    assert by_way["fasthyper, fold"].role == "variant"
    assert by_way["fasthyper"].plan
    assert by_way["fasthyper"].axis == "B"


@pytest.mark.skipif(not resident.CLEAR_REFS.exists(), reason="needs /proc")
def test_resident_memory():
    large, small = (Workload(f"W of {B // 64} MiB", B, 1, 4, 64, 64, "made up") for B in (2048, 64))
    sizes = resident.resident_bytes([large, small], "float32", "materialised", 1)
    assert sizes[0] > 30 << 20
    assert sizes[1] < 10 << 20  # the peak of the first was reset


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "WORKLOADS", (TINY, POINTS))
    monkeypatch.setattr(command, "CPU", Clock)
    options = ["--modes", "forward + backward", "--dtypes", "float32", "--eager", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        command.main(["measure", "--only", "tiny", "--no-report", "--threads", "1", *options])
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*.csv")
    assert {(r.N, r.mode) for r in records.read(path)} == {(1, records.FORWARD_BACKWARD), (3, records.FORWARD_BACKWARD)}
    assert "tiny, B 5 N 3 R 3 4 → 2, forward + backward, float32" in capsys.readouterr().out


def test_terms_at_two_numbers_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "WORKLOADS", (TINY, GRAPH, RAGGED))
    monkeypatch.setattr(command, "CPU", Clock)
    monkeypatch.setattr(studies, "RoundLimits", lambda **limits: BRIEF)
    options = ["--modes", "forward + backward", "--dtypes", "float32", "--eager", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        command.main(["measure", "--only", "graph,ragged,pairs", "--no-report", "--threads", "1,2", *options])
    finally:
        torch.set_num_threads(threads)
    files = sorted(tmp_path.glob("*.csv"))
    assert [path.stem[-9:] for path in files] == ["1-threads", "2-threads"]
    for path in files:
        ours = {r.workload: r for r in records.read(path) if r.role == "ours"}
        assert set(ours) == {"graph", "ragged"}
        assert all(r.median and r.plan for r in ours.values())
        assert (ours["graph"].S, ours["graph"].C, ours["graph"].T) == (GRAPH.S, GRAPH.C, GRAPH.T)
        assert ours["graph"].resident is not None or not resident.CLEAR_REFS.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "nonesuch"], "no workload has 'nonesuch'"),
        (["--only", "mothernet"], "need --large"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_measuring_nothing_is_an_error(given, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main(["measure", "--out", str(tmp_path), *given])


def test_an_unknown_name_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["measure", "--modes", "sideways"])
    assert "sideways: not one of forward, forward + backward, training step" in capsys.readouterr().err
