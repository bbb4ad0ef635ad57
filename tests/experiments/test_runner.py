from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_experiment
import torch
from tiny_experiment import ALL_FILES, TINY, comparison_of, files, lines, numbers, tuned_of

from fasthyper.experiments import DatasetUnavailable, run_comparison, runner
from fasthyper.experiments.store import RunStore
from fasthyper.experiments.training import train

pytestmark = pytest.mark.usefixtures("plain_figures")


def test_everything_is_written(tmp_path, no_notice, trained):
    out = tmp_path / "deep" / "out"
    comparison = comparison_of()
    summary = run_comparison(comparison, out, notify=no_notice)
    assert files(out) == ALL_FILES
    records = lines(out)
    assert [record["config"] for record in records] == [run.config() for run in comparison.runs()]
    assert len(trained()) == 8
    for record in records:
        assert {"fasthyper", "torch", "python", "platform", "device", "threads"} == set(record["versions"])
        assert record["metrics"]["measures"]["error"] > 0
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert len(summary.results[0].rows()) == 2 * 2 + 2
    assert summary.comparison == comparison


def test_progress_is_monotone_and_ends_at_the_total(tmp_path):
    seen = []
    run_comparison(comparison_of(epochs=4), tmp_path, progress=lambda *what: seen.append(what))
    done = [share for share, _, _ in seen]
    assert done == sorted(done)
    assert seen[0] == (0, 8, "hypernetwork, seed 0")
    assert seen[-1] == (8, 8, "embedding, seed 1")
    assert {total for _, total, _ in seen} == {8}
    assert 0.25 in done


def test_progress_of_several_processes_does_not_go_back():
    seen = []
    monotone = runner._monotone(lambda *what: seen.append(what))
    for done, run in ((1.0, "a"), (0.5, "b"), (1.5, "b")):
        monotone(done, 3, run)
    assert seen == [(1.0, 3, "a"), (1.0, 3, "b"), (1.5, 3, "b")]


def test_finished_runs_are_kept(tmp_path, no_notice, trained):
    run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    before = (tmp_path / "runs.jsonl").read_bytes()
    totals = set()
    run_comparison(comparison_of(), tmp_path, progress=lambda d, total, n: totals.add(total), notify=no_notice)
    assert (tmp_path / "runs.jsonl").read_bytes().startswith(before)
    assert len(numbers(lines(tmp_path))) == 8
    assert totals == {4}
    assert len(trained()) == len(set(trained())) == 8


def test_when_all_is_finished_nothing_is_trained_or_loaded(tmp_path, no_notice, monkeypatch):
    first = run_comparison(comparison_of(), tmp_path, notify=no_notice)
    before = (tmp_path / "runs.jsonl").read_bytes()
    (tmp_path / "report.html").unlink()

    def refuse(*arguments, **options):
        raise AssertionError("loaded or trained")

    monkeypatch.setattr(runner, "train", refuse)
    idle = replace(comparison_of(), experiment=replace(TINY, load=refuse))
    for workers in (1, 2):
        summary = run_comparison(idle, tmp_path, workers=workers, progress=refuse, notify=no_notice)
        assert summary.results[0].rows() == first.results[0].rows()
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert files(tmp_path) == ALL_FILES


def test_runs_of_another_configuration_are_left_alone(tmp_path, no_notice):
    foreign = run_comparison(comparison_of(epochs=1, seeds=1), tmp_path, notify=no_notice)
    before = lines(tmp_path)
    mixed = run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    assert lines(tmp_path)[:4] == before
    assert len(numbers(lines(tmp_path))) == 8
    alone = run_comparison(comparison_of(seeds=1), tmp_path / "alone", notify=no_notice)
    measured = [[row.measured for row in summary.results[0].rows()] for summary in (mixed, alone)]
    assert measured[0] == measured[1]
    again = run_comparison(comparison_of(epochs=1, seeds=1), tmp_path, notify=no_notice)
    assert again.results[0].rows() == foreign.results[0].rows()


def test_a_run_that_lacks_a_metric_is_of_other_code_and_is_run_again_once(tmp_path, no_notice, trained):
    run_comparison(comparison_of(), tmp_path, notify=no_notice)
    store = RunStore(tmp_path / "older" / "runs.jsonl", {})
    store.path.parent.mkdir()
    for record in lines(tmp_path):
        del record["digest"]
        if record["config"]["seed"] == 0:
            del record["metrics"]["steps"]
        store.append(record)
    before = len(trained())
    for _ in range(2):
        problems = []
        run_comparison(comparison_of(), store.path.parent, notify=problems.append)
        assert len(trained()) == before + 4
        assert len(problems) == 4
        assert all("of other code" in problem for problem in problems)


@pytest.mark.parametrize("changes", [{"protocol": 2}, {"name": "other"}])
def test_another_protocol_or_experiment_is_not_mixed_in(tmp_path, changes):
    run_comparison(comparison_of(seeds=1), tmp_path)
    problems = []
    newer = replace(comparison_of(seeds=1), experiment=replace(TINY, **changes))
    run_comparison(newer, tmp_path, notify=problems.append)
    assert len(lines(tmp_path)) == 8
    assert [re.search(r"line (\d): a run of experiment 'tiny', protocol 1", p)[1] for p in problems] == list("1234")


def test_studies_share_runs(tmp_path, trained):
    comparison = comparison_of(depths=None, seeds=1)
    summary = run_comparison(comparison, tmp_path)
    assert len(trained()) == 4 + 2
    depth, embedding = (results.rows() for results in summary.results)
    assert embedding[0].measured == embedding[1].measured == embedding[2].measured == depth[0].measured
    assert embedding[4].measured == depth[2].measured


def test_the_numbers_depend_on_nothing_but_the_configuration(tmp_path):
    run_comparison(comparison_of(), tmp_path)
    expected = numbers(lines(tmp_path))
    assert len({found["train_loss"] for found in expected.values()}) == 8
    runs = comparison_of().runs()
    random.Random(0).shuffle(runs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in runs[:4]:
            found = {"config": run.config(), "metrics": vars(train(TINY, run, None))}
            assert numbers([found]).items() <= expected.items()
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_is_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_cores", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_comparison(comparison_of(depths="2", seeds=1, epochs=1), tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {record["versions"]["threads"] for record in lines(tmp_path)} == {"1"}


@pytest.mark.parametrize("workers", [1, 2])
def test_data_that_cannot_be_had_write_nothing(tmp_path, workers):
    def load(data, data_home):
        raise DatasetUnavailable(f"{data} is not in {data_home}")

    comparison = replace(comparison_of(), experiment=replace(TINY, load=load))
    with pytest.raises(DatasetUnavailable, match="line is not in nowhere"):
        run_comparison(comparison, tmp_path / "out", data_home="nowhere", workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path, trained):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: cannot write"):
        run_comparison(comparison_of(), tmp_path / "file")
    assert trained() == []


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_are_one_or_more(tmp_path, workers):
    with pytest.raises(ValueError, match=f"^workers: expected at least 1, got {workers}"):
        run_comparison(comparison_of(), tmp_path / "out", workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_is_a_finished_run(tmp_path, no_notice, trained):
    comparison = comparison_of(depths="2", seeds=2, lr=1e9)
    run_comparison(comparison, tmp_path, notify=no_notice)
    assert {record["metrics"]["measures"]["error"] for record in lines(tmp_path)} == {None}
    before = (tmp_path / "runs.jsonl").read_bytes()
    summary = run_comparison(comparison, tmp_path, notify=no_notice)
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert len(trained()) == 4
    assert {finding.verdict for _, finding in summary.findings} == {"undecided"}
    assert "diverged" in (tmp_path / "report.html").read_text()


def test_an_exception_while_training_reaches_the_caller(tmp_path, monkeypatch):
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return train(*arguments)

    monkeypatch.setattr(runner, "train", fail)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no more"):
        run_comparison(comparison_of(), tmp_path)
    assert torch.get_num_threads() == threads
    assert len(lines(tmp_path)) == 2
    monkeypatch.undo()
    run_comparison(comparison_of(), tmp_path)
    assert len(numbers(lines(tmp_path))) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL")
@pytest.mark.parametrize("made", [comparison_of, tuned_of])
def test_killed_over_and_over_it_goes_on(tmp_path, trained, made):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tiny_experiment", str(out), "--seeds", "3", "--kills", "12"]
    command += ["--tuned"] * (made is tuned_of)
    runs = 12 + 6 if made is tuned_of else 12
    env = {**os.environ, "PYTHONPATH": str(Path(tiny_experiment.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout.split()[-1])
    assert kills >= 1
    run_comparison(made(3), out, notify=lambda problem: None)
    assert len(trained()) <= runs + kills + 1
    # A kill during the writing of the report may leave hidden files, and no others.
    assert [name for name in files(out) if not name.startswith(".")] == ALL_FILES
    run_comparison(made(3), tmp_path / "uninterrupted")
    assert len(lines(out)) == runs
    assert numbers(lines(out)) == numbers(lines(tmp_path / "uninterrupted"))
