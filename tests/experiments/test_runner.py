from __future__ import annotations

import fcntl
import json
import math
import os
import random
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_experiment
import torch
from tiny_experiment import TINY, comparison_of, lines, numbers, tuned_of

from fasthyper.experiments import DatasetUnavailable, run_comparison, runner
from fasthyper.experiments.store import RunStore
from fasthyper.experiments.training import train
from fasthyper.experiments.tuning import tuned

pytestmark = pytest.mark.usefixtures("plain_figures")


@pytest.fixture
def trained(tmp_path_factory, monkeypatch):
    """Return a function that returns the configurations of the runs that started, in all processes."""
    log = tmp_path_factory.mktemp("log") / "trained"
    monkeypatch.setenv("TINY_LOG", str(log))
    return lambda: log.read_text().splitlines() if log.exists() else []


def files(folder):
    return sorted(os.listdir(folder))


ALL_FILES = ["report.html", "runs.jsonl", "summary.csv"]


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


def test_torn_and_corrupt_and_changed_and_double_lines(tmp_path):
    run_comparison(comparison_of(), tmp_path)
    whole = (tmp_path / "runs.jsonl").read_bytes().splitlines(keepends=True)
    expected = numbers(lines(tmp_path))
    changed = whole[5].replace(b'"steps": 6', b'"steps": 7')
    assert changed != whole[5]
    broken = [*whole[:3], b"garbage\n", whole[1], *whole[3:5], changed, whole[6][:100]]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(broken))
    problems = []
    run_comparison(comparison_of(), tmp_path, notify=problems.append)
    assert [re.search(r"line (\d): (.*);", problem).groups() for problem in problems] == [
        ("4", "is no finished run, or corrupt"),
        ("5", "this run is already listed above"),
        ("8", "is no finished run, or corrupt"),
        ("9", "is torn, its run was cut off"),
    ]
    kept = (tmp_path / "runs.jsonl").read_bytes().splitlines(keepends=True)
    assert kept[:8] == broken[:8]
    assert numbers([json.loads(line) for line in kept[:3] + kept[5:7] + kept[8:]]) == expected


def test_by_default_problems_are_warnings(tmp_path):
    run_comparison(comparison_of(seeds=1), tmp_path)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b'{"config"')
    with pytest.warns(UserWarning, match="line 5: is torn"):
        run_comparison(comparison_of(seeds=1), tmp_path)


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


def rank_file_of(comparison, out, number, runs):
    """Write the file that process `number` leaves if torchrun is killed."""
    store = RunStore(out / f"runs.{number}.jsonl", {})
    for run in runs:
        metrics = vars(train(comparison.experiment, run, None))
        store.append({"config": run.config(), "metrics": metrics, "versions": {"torch": "earlier"}})


def test_files_of_other_ranks_are_picked_up_and_removed(tmp_path, no_notice, trained):
    comparison = comparison_of()
    runs = comparison.runs()
    rank_file_of(comparison, tmp_path, 1, runs[1:3])
    rank_file_of(comparison, tmp_path, 2, runs[2:4])
    begun = len(trained())
    run_comparison(comparison, tmp_path, notify=no_notice)
    assert len(trained()) - begun == 8 - 3
    assert len(numbers(lines(tmp_path))) == 8
    assert sum(record["versions"] == {"torch": "earlier"} for record in lines(tmp_path)) == 3
    assert files(tmp_path) == ALL_FILES


def test_runs_of_another_configuration_in_a_rank_file_are_kept(tmp_path, no_notice):
    other = comparison_of(seeds=1, epochs=1)
    rank_file_of(other, tmp_path, 1, other.runs()[:2])
    run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    assert len(numbers(lines(tmp_path))) == 4 + 2
    assert files(tmp_path) == ALL_FILES


def test_runs_of_another_experiment_in_a_rank_file_are_not_thrown_away(tmp_path):
    other = replace(comparison_of(seeds=1), experiment=replace(TINY, protocol=2))
    rank_file_of(other, tmp_path, 1, other.runs()[:1])
    before = (tmp_path / "runs.1.jsonl").read_bytes()
    run_comparison(comparison_of(seeds=1), tmp_path, notify=lambda problem: None)
    kept = [path.read_bytes() for path in tmp_path.glob("runs*.jsonl")]
    assert any(before in content for content in kept)


def test_a_rank_file_that_another_process_writes_is_not_removed(tmp_path, monkeypatch):
    """A comparison runs under torchrun while another process reports its finished runs."""
    monkeypatch.setattr("fasthyper.experiments.store._PAUSE", 0.0)
    comparison = comparison_of(seeds=1)
    run_comparison(comparison, tmp_path)
    rank_file_of(comparison, tmp_path, 1, comparison_of(seeds=2).runs()[-1:])
    with (tmp_path / "runs.1.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(ValueError):  # an error is fine, too
            run_comparison(comparison, tmp_path)
        assert (tmp_path / "runs.1.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_two_comparisons_do_not_write_to_one_folder(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("fasthyper.experiments.store._PAUSE", 0.0)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out: another process is writing to"):
            run_comparison(comparison_of(), tmp_path, workers=workers)
    assert (tmp_path / "runs.jsonl").read_bytes() == b""


def by_configuration(records):
    return {json.dumps(record["config"], sort_keys=True): record for record in records}


def test_rates_are_chosen_first_and_then_used(tmp_path, no_notice):
    comparison = tuned_of()
    summary = run_comparison(comparison, tmp_path, notify=no_notice)
    records = lines(tmp_path)
    configs = [record["config"] for record in records]
    assert configs[:12] == [run.config() for run in comparison.tuning_runs()]
    chosen = tuned(comparison, by_configuration(records))
    assert configs[12:] == [run.config() for run in chosen.runs()]
    assert summary.rates == chosen.rates
    assert {rate.errors[1e9] for rate in summary.rates} == {math.inf}
    for config in configs[12:]:
        (rate,) = [rate for rate in chosen.rates if rate.method == config["method"]]
        assert config["setting"]["lr"] == rate.lr == min(rate.errors, key=rate.errors.get)
    assert summary.comparison == comparison


def test_progress_counts_the_runs_that_choose_rates(tmp_path):
    seen = []
    run_comparison(tuned_of(), tmp_path, progress=lambda *what: seen.append(what))
    assert seen[0] == (0, 16, "hypernetwork, learning rate 0.01")
    assert seen[-1] == (16, 16, "embedding, seed 1")
    done = [share for share, _, _ in seen]
    assert done == sorted(done)
    assert {total for _, total, _ in seen} == {16}


def test_finished_runs_of_both_kinds_are_kept(tmp_path, no_notice, trained):
    run_comparison(tuned_of(seeds=1), tmp_path, notify=no_notice)
    assert len(trained()) == 12 + 2
    seen = []
    for workers in (1, 2):
        run_comparison(
            tuned_of(), tmp_path, workers=workers, progress=lambda *what: seen.append(what), notify=no_notice
        )
        assert len(trained()) == len(set(trained())) == 12 + 4
    assert seen[0] == (0, 2, "hypernetwork, seed 1")


@pytest.mark.parametrize("stop", [5, 13])
def test_stopped_in_either_phase_it_goes_on(tmp_path, monkeypatch, no_notice, trained, stop):
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("no more")
        return train(*arguments)

    monkeypatch.setattr(runner, "train", fail)
    with pytest.raises(RuntimeError, match="no more"):
        run_comparison(tuned_of(), tmp_path / "out")
    assert len(lines(tmp_path / "out")) == stop - 1
    run_comparison(tuned_of(), tmp_path / "out", notify=no_notice)
    assert len(trained()) == 16
    run_comparison(tuned_of(), tmp_path / "uninterrupted")
    assert numbers(lines(tmp_path / "out")) == numbers(lines(tmp_path / "uninterrupted"))


def without_validation(run, source):
    return replace(tiny_experiment.task(run, source), validation=None)


def test_a_task_without_validation_examples_cannot_be_tuned(tmp_path):
    comparison = replace(tuned_of(), experiment=replace(TINY, task=without_validation))
    with pytest.raises(ValueError, match=r"^validation: the task of tiny has no such examples"):
        run_comparison(comparison, tmp_path)
    assert not (tmp_path / "report.html").exists()


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
