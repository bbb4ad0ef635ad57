"""Tests of all experiments, and of each of them except rotation, which has a file of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from torch import nn

from fasthyper.experiments import EXPERIMENTS, METHODS, Comparison, Learns, Wins, run_comparison
from fasthyper.experiments.catalogue.colorization import examples, grey, position_features
from fasthyper.experiments.catalogue.synthetic import target as synthetic_target
from fasthyper.experiments.comparison import PRESETS
from fasthyper.experiments.experiment import stream
from fasthyper.experiments.figures import panels_of
from fasthyper.experiments.methods import counts
from fasthyper.experiments.training import build

OF_THE_PAPER = {"rotation", "synthetic", "colorization", "operators", "scaling", "assumptions"}
BEYOND = {"modularity", "equations", "initialisation", "infinite_width"}
POINTS = [(e, p, data) for e in EXPERIMENTS.values() for p in PRESETS for data in e.data if e.studies(p, data)]


def of(name, **options):
    return Comparison.of(EXPERIMENTS[name], device="cpu", **options)


def test_all_of_the_paper_and_beyond():
    assert set(EXPERIMENTS) == OF_THE_PAPER | BEYOND
    assert {(e.name, p) for e, p, _ in POINTS} >= {(name, p) for name in EXPERIMENTS for p in PRESETS[1:]}


@pytest.mark.parametrize(("experiment", "preset", "data"), POINTS, ids=lambda p: getattr(p, "name", p))
def test_every_study_can_be_built_and_judged(experiment, preset, data):
    comparison = Comparison.of(experiment, data, preset=preset, device="cpu")
    names = [study.name for study in comparison.studies]
    assert len(set(names)) == len(names)
    for study in comparison.studies:
        assert study.methods
        assert set(study.methods) <= set(METHODS)
        for claim in study.claims:
            for field in ("line", "over", "than"):
                assert getattr(claim, field, study.methods[0]).split(":")[0] in study.methods
        for value in study.values:
            for method in study.methods:
                run = comparison.run(study, value, method, seed=0)
                assert json.loads(json.dumps(run.config())) == run.config()
                with torch.device("meta"):
                    assert counts(METHODS[method].build(experiment.architecture(run))).trainable > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_from_end_to_end(name, tmp_path):
    experiment = EXPERIMENTS[name]
    preset = "quick" if experiment.studies("quick", experiment.data[0]) else "standard"
    whole = Comparison.of(experiment, preset=preset, device="cpu", seeds=1, epochs=1)
    small = {"samples": 400, "functions": 50, "instances": 100}
    studies = []
    for study in whole.studies:
        less = {key: value for key, value in small.items() if hasattr(study.setting, key)}
        values = study.values if isinstance(study.values[0], str) else study.values[:2]
        values = (1, 2) if study.axis.field == "epochs" else values
        tuning = study.tuning
        if tuning is not None:
            tuning = replace(tuning, rates={name: rates[:2] for name, rates in tuning.rates.items()}, seeds=1)
        setting = replace(study.setting, **less)
        studies.append(replace(study, setting=setting, values=values, tuning=tuning))
    problems = []
    summary = run_comparison(replace(whole, studies=tuple(studies)), tmp_path, notify=problems.append)
    assert not problems
    assert len(summary.findings) == sum(len(study.claims) for study in studies)
    # One seed decides nothing.
    assert {finding.verdict for _, finding in summary.findings} <= {"undecided", "measured", "premise unmet"}
    page = (tmp_path / "report.html").read_text()
    assert page.count('<div class="figure">') == len(studies)
    assert page.count('<svg role="img"') == sum(len(panels_of(results)) for results in summary.results)
    assert all(study.title in unescape(page) for study in studies)


def test_the_sizes_of_the_paper():
    sizes = {}
    for name in ("colorization",):
        comparison = of(name, preset="paper")
        study = next((s for s in comparison.studies if s.axis.field == "depth"), comparison.studies[0])
        for method in ("hypernetwork", "embedding"):
            run = comparison.run(study, study.values[0], method, seed=0)
            with torch.device("meta"):
                sizes[name, method] = counts(METHODS[method].build(EXPERIMENTS[name].architecture(run))).primary
    assert sizes["colorization", "hypernetwork"] == 450
    assert sizes["colorization", "embedding"] == 4950 + 13  # its biases


def test_positions():
    features = position_features(3)
    assert features.shape == (9, 42)
    i, j = -1.0, 1.0  # the first row, the last column
    expected = [i, j]
    for k in range(10):
        expected += [i**k + j, j**k + i, i**k - j, j**k - i]
    assert features[2].tolist() == pytest.approx(expected)


def test_a_pixel_keeps_its_colour_and_its_place():
    pixels = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    batch = examples(pixels, points=7).draw(torch.tensor([3, 1]), torch.Generator().manual_seed(0))
    assert batch.x.shape == (2, 7, 42)
    assert batch.cond.shape == (2, 25)
    line = torch.linspace(-1, 1, 5)
    for b, image in enumerate((3, 1)):
        assert torch.allclose(batch.cond[b], (grey(pixels.float()) / 127.5 - 1)[image].flatten(), atol=1e-5)
        for n in range(7):
            i, j = ((line - batch.x[b, n, k]).abs().argmin() for k in (0, 1))
            assert torch.allclose(batch.target[b, n], pixels[image, :, i, j].float() / 127.5 - 1)


def test_no_model_starts_at_what_it_is_to_learn():
    """With one random stream for weights and targets, first layers would be equal up to a factor."""
    comparison = of("synthetic", seeds=1)
    study = comparison.studies[0]
    run = comparison.run(study, study.values[-1], study.methods[0], 0)
    first = next(p for p in build(EXPERIMENTS["synthetic"], run).parameters() if p.ndim == 2).detach().flatten()
    y = synthetic_target(run.setting.kind, run.setting.d, torch.Generator().manual_seed(stream(0, "task")))
    drawn = next(cell.cell_contents for cell in y.__closure__ if isinstance(cell.cell_contents, nn.Module))
    other = drawn[0].weight.detach().flatten()
    size = min(len(first), len(other))
    assert abs(np.corrcoef(first[:size], other[:size])[0, 1]) < 0.1


def test_what_a_study_is_about_cannot_be_changed():
    for name, field, value in (
        ("synthetic", "kind", "type II"),
        ("scaling", "smoothness", 2),
        ("operators", "operator", "x"),
    ):
        with pytest.raises(ValueError, match=f"^{field}: titles and claims of a study refer to it"):
            of(name, preset="standard", **{field: value})


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0].name}-{p[1]}-{p[2]}")
def test_a_claim_about_totals_needs_one_of_its_methods_to_learn(point):
    """Where neither does, their order says nothing."""
    experiment, preset, data = point
    for study in experiment.studies(preset, data):
        if study.structure and study.levels:
            wins = [claim for claim in study.claims if isinstance(claim, Wins)]
            assert wins
            assert all(any(isinstance(premise, Learns) for premise in claim.premises) for claim in wins)
