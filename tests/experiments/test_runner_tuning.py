from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny_experiment
from tiny_experiment import TINY, lines, numbers, tuned_of

from fasthyper.experiments import run_comparison, runner
from fasthyper.experiments.training import train
from fasthyper.experiments.tuning import tuned

pytestmark = pytest.mark.usefixtures("plain_figures")


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
