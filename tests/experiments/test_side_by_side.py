from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, fields, replace

import pytest
import torch
from tiny_experiment import SETTING, TINY, comparison_of, lines, numbers
from torch.utils._python_dispatch import TorchDispatchMode

from fasthyper.experiments import EXPERIMENTS, run_comparison, side_by_side, training
from fasthyper.experiments.catalogue import synthetic
from fasthyper.experiments.comparison import PRESETS
from fasthyper.experiments.experiment import Examples, Run
from fasthyper.experiments.methods import EMBEDDING, EQUAL_FLOPS, HYPERNETWORK, METHODS, PAIR, WIDE_BOTH, WIDE_F
from fasthyper.experiments.side_by_side import LARGEST, SideBySide, groups, name, train_side_by_side
from fasthyper.experiments.training import COSTS, Metrics, Trainer, build, train

SEEDS = (3, 0, 1)
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 1e-3, "momentum": 0.0, "schedule": "cosine"},
    "adadelta": {"optimizer": "adadelta", "lr": 1.0, "momentum": 0.0},
}
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
CONDITIONED = [method for method in METHODS if method != PAIR]
TESTED = [method for method in CONDITIONED if method not in (WIDE_F, WIDE_BOTH)]
"""Those whose outputs in a test are those of training alone."""
EXACT = {"steps", "training_flops", "context_parameters", "primary_parameters", "trainable_parameters"}


def runs_of(method=EMBEDDING, seeds=SEEDS, **changes):
    return [Run("tiny", 1, "line", method, seed, "cpu", replace(SETTING, **changes)) for seed in seeds]


def changed(experiment, change, loss=None):
    """Return an experiment whose batches are changed by `change(run, batch)`, and its losses by `loss(run, loss)`."""

    def of(run, examples):
        return Examples(examples.count, lambda chosen, generator: change(run, examples.draw(chosen, generator)))

    def task(run, dataset):
        plain = experiment.task(run, dataset)
        own = plain.loss if loss is None else loss(run, plain.loss)
        return replace(plain, train=of(run, plain.train), test=of(run, plain.test), loss=own)

    return replace(experiment, task=task)


def cast(dtype):
    """Return a change of batches to a floating-point type."""
    return lambda run, batch: type(batch)(*(t.to(dtype) if t.is_floating_point() else t for t in batch))


@pytest.fixture(params=CLOSE, ids=str)
def dtype(request, monkeypatch):
    """Return the type of all parameters. Costs are not measured, which would take most of the time."""
    for module in (training, side_by_side):
        monkeypatch.setattr(module, "build", lambda *of: build(*of).to(request.param))
        monkeypatch.setattr(module, "cost_of", lambda *of: dict.fromkeys(COSTS))
    return request.param


def check(experiment, runs, dataset=None, close=1e-5):
    """Compare runs side by side with the same runs alone."""
    found = train_side_by_side(experiment, runs, dataset)
    assert len(found) == len(runs)
    for run, together in zip(runs, found, strict=True):
        alone = train(experiment, run, dataset)
        assert together.measures == pytest.approx(alone.measures, rel=close, nan_ok=True)
        assert together.train_loss == pytest.approx(alone.train_loss, rel=close, nan_ok=True)
        assert {k: getattr(together, k) for k in EXACT} == {k: getattr(alone, k) for k in EXACT}
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", TESTED)
def test_seeds_side_by_side_are_separate_runs(method, optimizer, dtype):
    """Batches of 16, 16 and 8 in both epochs."""
    found = check(changed(TINY, cast(dtype)), runs_of(method, **OPTIMIZERS[optimizer]), close=CLOSE[dtype])
    assert len({metrics.train_loss for metrics in found}) == len(SEEDS)


SMALL = {"samples": 450, "functions": 60, "epochs": 1, "depth": 2, "width": 8, "embedding": 12, "d": 6, "points": 5}


def small(experiment_name, study=0, **changes):
    """Return an experiment, the setting of one of its studies, small, and a small part of its data."""
    experiment = EXPERIMENTS[experiment_name]
    preset = next(p for p in PRESETS if experiment.studies(p, experiment.data[0]))
    setting = experiment.studies(preset, experiment.data[0])[study].setting
    less = {key: value for key, value in SMALL.items() if hasattr(setting, key)}
    dataset = experiment.load(experiment.data[0], None)
    if experiment_name == "assumptions":
        dataset = type(dataset)(*(type(splits)(*(split[:150] for split in splits)) for splits in dataset))
    elif dataset is not None:
        dataset = type(dataset)(*(split[:150] for split in dataset))
    return experiment, replace(setting, **less, **changes), dataset


def catalogued(experiment, setting, method):
    return [Run(experiment.name, 1, experiment.data[0], method, seed, "cpu", setting) for seed in SEEDS]


FAST = {"rotation": "sgd", "synthetic": "adadelta", "colorization": "adam", "operators": "adam"}


@pytest.mark.parametrize("method", TESTED)
@pytest.mark.parametrize(
    ("experiment_name", "optimizer"),
    [
        pytest.param(name, optimizer, marks=[] if fast == optimizer else pytest.mark.slow)
        for name, fast in FAST.items()
        for optimizer in OPTIMIZERS
    ],
)
def test_an_epoch_of_the_experiments(experiment_name, method, optimizer, dtype, monkeypatch):
    monkeypatch.setattr(synthetic, "TEST_COUNT", 300)
    experiment, setting, dataset = small(experiment_name, **OPTIMIZERS[optimizer])
    check(changed(experiment, cast(dtype)), catalogued(experiment, setting, method), dataset, CLOSE[dtype])


def test_two_networks_without_a_condition(dtype):
    experiment, setting, dataset = small("assumptions")
    check(changed(experiment, cast(dtype)), catalogued(experiment, setting, PAIR), dataset, CLOSE[dtype])


@pytest.mark.parametrize("method", [WIDE_F, WIDE_BOTH])
def test_networks_beside_their_linearisation(method, dtype):
    experiment, setting, dataset = small("infinite_width")
    check(changed(experiment, cast(dtype)), catalogued(experiment, setting, method), dataset, 10 * CLOSE[dtype])


class Calls(TorchDispatchMode):
    """Counts the calls of ops."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def calls_of_step(method, seeds):
    """Return the calls of ops in a training step of some seeds side by side, by name."""
    runs = runs_of(method, range(seeds))
    tasks = [TINY.task(run, None) for run in runs]
    model = SideBySide([build(TINY, run) for run in runs])
    trainer = Trainer(model, replace(tasks[0], loss=side_by_side._losses(tasks)), SETTING, torch.device("cpu"))
    x, cond, target = torch.rand(seeds, 16, 2), torch.rand(seeds, 16, 3), torch.rand(seeds, 16, 1)
    with Calls() as calls:
        trainer.step(type(tasks[0].train.draw(torch.arange(1), None))(x, cond, target))
    return calls.of


@pytest.mark.parametrize("method", CONDITIONED)
def test_more_seeds_are_no_more_calls(method):
    few, many = (calls_of_step(method, seeds) for seeds in (2, 7))
    assert few == many
    assert few["aten::_fused_sgd_"] == 1


def test_a_generated_layer_is_one_call_for_all_seeds():
    ours = {op: count for op, count in calls_of_step(HYPERNETWORK, 7).items() if op.startswith("fasthyper::")}
    assert ours == {"fasthyper::apply_models": 2, "fasthyper::grads_models": 2}  # g has two layers


@pytest.mark.parametrize("method", TESTED)
def test_a_diverging_seed_does_not_disturb_the_others(method):
    def absurd(run, batch):
        return batch._replace(target=1e30 * batch.target) if run.seed == SEEDS[1] else batch

    found = check(changed(TINY, absurd), runs_of(method))
    assert [math.isfinite(metrics.train_loss) for metrics in found] == [True, False, True]


def test_each_seed_has_the_loss_of_its_task():
    def scaled(run, loss):
        return lambda y, target: (1 + run.seed) * loss(y, target)

    check(changed(TINY, lambda run, batch: batch, scaled), runs_of())


def test_equal_flops():
    found = check(TINY, runs_of(EQUAL_FLOPS, epochs=3))
    assert found[0].steps != train(TINY, runs_of(EMBEDDING, epochs=3)[0], None).steps


def test_times_are_shares_and_the_other_costs_those_of_one_model(monkeypatch):
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(training, "clock", lambda device: next(clock))
    times = iter((5.0, 65.0))
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: next(times))
    cost = dict.fromkeys(COSTS, 7)
    measured = []
    monkeypatch.setattr(
        side_by_side, "cost_of", lambda trainer, task, run: measured.append((trainer.model, run)) or cost
    )
    runs = runs_of(HYPERNETWORK, epochs=1)
    found = train_side_by_side(TINY, runs, None)
    for run, metrics in zip(runs, found, strict=True):
        assert (metrics.step_seconds, metrics.run_seconds) == (10 / 3, 20.0)
        assert {key: getattr(metrics, key) for key in cost} == (cost if run.seed == 0 else dict.fromkeys(COSTS))
    assert [(type(model), run) for model, run in measured] == [(type(build(TINY, runs[1])), runs[1])]
    assert {field.name for field in fields(Metrics)} == set(asdict(found[0]))


def test_shares_are_told_in_order():
    shares = []
    train_side_by_side(TINY, runs_of(epochs=4), None, shares.append)
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_runs_that_differ_in_more_than_their_seed_are_refused():
    with pytest.raises(ValueError, match="runs: expected runs that differ in their seed only, got"):
        train_side_by_side(TINY, runs_of() + runs_of(HYPERNETWORK), None)
    with pytest.raises(ValueError, match="runs: expected runs that differ in their seed only, got"):
        train_side_by_side(TINY, [], None)

    def fewer(run, dataset):
        task = TINY.task(run, dataset)
        return replace(task, train=Examples(40 - run.seed, task.train.draw))

    with pytest.raises(ValueError, match=r"as many training examples for each seed, got \[37, 40, 39\]"):
        train_side_by_side(replace(TINY, task=fewer), runs_of(), None)


def test_groups():
    a, b = runs_of(seeds=range(3)), runs_of(HYPERNETWORK, seeds=range(2))
    other = [replace(run, split="validation") for run in a]
    mixed = [a[0], b[0], other[0], a[1], b[1], other[1], a[2], other[2]]
    assert groups(mixed) == [a, b, other]
    assert groups([]) == []
    many = runs_of(seeds=range(2 * LARGEST + 1))
    mixed = [*many[:2], b[0], *many[2:]]
    assert [len(group) for group in groups(mixed)] == [LARGEST, 1, LARGEST, 1]
    assert sorted(run.seed for group in groups(many) for run in group) == list(range(2 * LARGEST + 1))
    assert (name(a), name(b[1:])) == ("embedding, seeds 0 to 2", "hypernetwork, seed 1")


@pytest.fixture
def trained(monkeypatch):
    """Return the list of groups that are trained side by side: the seeds of each."""
    seen = []

    def spy(experiment, runs, *rest):
        seen.append([run.seed for run in runs])
        return train_side_by_side(experiment, runs, *rest)

    monkeypatch.setattr("fasthyper.experiments.runner.train_side_by_side", spy)
    return seen


@pytest.mark.usefixtures("plain_figures")
def test_a_comparison_side_by_side(tmp_path, trained, no_notice):
    comparison, progress = comparison_of(seeds=3), []
    told = lambda *what: progress.append(what)
    run_comparison(comparison, tmp_path / "together", side_by_side=True, progress=told, notify=no_notice)
    assert trained == [[0, 1, 2]] * 4
    run_comparison(comparison, tmp_path / "alone", notify=no_notice)
    assert len(trained) == 4  # on a CPU, only where it is asked for
    together, alone = (numbers(lines(tmp_path / folder)) for folder in ("together", "alone"))
    assert set(together) == set(alone)
    assert len(together) == 12
    for key, metrics in together.items():
        assert metrics["measures"] == pytest.approx(alone[key]["measures"], rel=1e-5)
    assert progress[0] == (0, 12, "hypernetwork, seeds 0 to 2")
    assert progress[-1] == (12, 12, "embedding, seeds 0 to 2")
    done = [share for share, _, _ in progress]
    assert done == sorted(done)


@pytest.mark.usefixtures("plain_figures")
def test_only_missing_seeds_are_trained(tmp_path, trained, no_notice):
    run_comparison(comparison_of(seeds=3), tmp_path, side_by_side=True, notify=no_notice)
    records = lines(tmp_path)
    lost = [record for record in records if record["config"]["seed"] == 1]  # as of a process killed while writing
    kept = [line for line in (tmp_path / "runs.jsonl").read_text().splitlines(True) if '"seed": 1,' not in line]
    assert len(lost) == 4
    assert len(kept) == 8
    (tmp_path / "runs.jsonl").write_text("".join(kept))
    trained.clear()
    run_comparison(comparison_of(seeds=4), tmp_path, side_by_side=True, notify=no_notice)
    assert trained == [[1, 3]] * 4
    assert len(numbers(lines(tmp_path))) == 16
