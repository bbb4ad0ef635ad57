"""Seeds side by side on a pretended GPU: the default there, with the numbers of separate runs on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_experiment import SETTING, TINY, TUNED

import fasthyper
from fasthyper.experiments import Comparison, run_comparison
from fasthyper.experiments.experiment import Run
from fasthyper.experiments.methods import ATTENTION, EMBEDDING, FILM, HYPERNETWORK, WIDE_Q
from fasthyper.experiments.side_by_side import train_side_by_side
from fasthyper.experiments.training import train

METHODS = (HYPERNETWORK, EMBEDDING, WIDE_Q, FILM, ATTENTION)


@pytest.fixture(autouse=True)
def emulated():
    with fasthyper.use_backend("cuda"):
        yield


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", METHODS)
def test_seeds_side_by_side_on_a_gpu_are_separate_runs_on_the_cpu(method, optimizer):
    setting = replace(SETTING, optimizer=optimizer, lr=0.01)
    runs = [Run("tiny", 1, "line", method, seed, "cpu", setting) for seed in (3, 0, 1)]
    found = train_side_by_side(TINY, [replace(run, device="cuda") for run in runs], None)
    for run, together in zip(runs, found, strict=True):
        alone = train(TINY, run, None)
        assert together.measures == pytest.approx(alone.measures, rel=1e-4)
        assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-4)
        assert together.steps == alone.steps


def test_a_comparison_on_a_gpu_trains_seeds_side_by_side(tmp_path):
    comparison = Comparison.of(TUNED, depths="2", methods=(HYPERNETWORK, EMBEDDING), seeds=3, device="cuda")
    seen = []
    summary = run_comparison(comparison, tmp_path, workers=1, progress=lambda done, total, run: seen.append(run))
    assert {f"{method}, seeds 0 to 2" for method in (HYPERNETWORK, EMBEDDING)} < set(seen)
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {record["versions"]["device"] for record in records} == {torch.cuda.get_device_name()}
    alone = run_comparison(replace(comparison, device="cpu"), tmp_path / "cpu", workers=1)
    rates = [[(rate.method, rate.lr) for rate in found.rates] for found in (summary, alone)]
    assert rates[0] == rates[1]
    for row, expected in zip(summary.results[0].rows(), alone.results[0].rows(), strict=True):
        assert row.measured.mean == pytest.approx(expected.measured.mean, rel=1e-3)
