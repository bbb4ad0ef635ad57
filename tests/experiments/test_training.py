from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from tiny_experiment import BOTH, SETTING, TEST, TINY, TRAIN, VALIDATION, comparison_of, task, tensors

from fasthyper import backends
from fasthyper.experiments import training
from fasthyper.experiments.experiment import Batch, Examples, Run, Task, stream
from fasthyper.experiments.methods import EMBEDDING, EQUAL_FLOPS, HYPERNETWORK, METHODS, counts
from fasthyper.experiments.training import batches, build, evaluate, train


def run_of(method=EMBEDDING, seed=0, **changes):
    return Run("tiny", 1, "line", method, seed, "cpu", replace(SETTING, **changes))


def measured(metrics):
    """Return the metrics that are not times."""
    return {name: value for name, value in asdict(metrics).items() if not name.endswith("seconds")}


def sgd(p, g, state, lr, step):
    return p - lr * g


def momentum(p, g, state, lr, step):
    state["v"] = g if step == 0 else 0.9 * state["v"] + g
    return p - lr * state["v"]


def adam(p, g, state, lr, step):
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    m, v = state["m"] / (1 - 0.9 ** (step + 1)), state["v"] / (1 - 0.999 ** (step + 1))
    return p - lr * m / (v.sqrt() + 1e-8)


def adadelta(p, g, state, lr, step):
    state["v"] = 0.9 * state.get("v", 0) + 0.1 * g * g
    delta = ((state.get("d", torch.zeros_like(g)) + 1e-6) / (state["v"] + 1e-6)).sqrt() * g
    state["d"] = 0.9 * state.get("d", 0) + 0.1 * delta * delta
    return p - lr * delta


def written_out(run, update, rate=lambda step, steps: 1.0):
    """Train a run without an optimizer; returns the mean loss of the last epoch, and the model."""
    model, examples = build(TINY, run), task(run, None).train
    setting = run.setting
    generator = torch.Generator().manual_seed(stream(run.seed, "order"))
    states = [{} for _ in model.parameters()]
    step, steps = 0, setting.epochs * math.ceil(TRAIN / setting.batch_size)
    for _ in range(setting.epochs):
        losses = []
        for chosen in torch.randperm(TRAIN, generator=generator).split(setting.batch_size):
            batch = examples.draw(chosen, generator)
            loss = (model(batch.x, batch.cond) - batch.target).square().mean()
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g, state in zip(model.parameters(), gradients, states, strict=True):
                    p.copy_(update(p, g, state, setting.lr * rate(step, steps), step))
            step += 1
    return sum(losses) / len(losses), model


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(
    ("optimizer", "changes", "update"),
    [
        ("sgd", {"lr": 0.05}, sgd),
        ("sgd", {"lr": 0.05, "momentum": 0.9}, momentum),
        ("adam", {"lr": 0.003}, adam),
        ("adadelta", {"lr": 1.0}, adadelta),
    ],
)
def test_training_is_the_same_written_out(method, optimizer, changes, update, schedule):
    run = run_of(method, seed=2, optimizer=optimizer, schedule=schedule, **changes)
    cosine = lambda step, steps: (1 + math.cos(math.pi * step / steps)) / 2
    loss, model = written_out(run, update, cosine if schedule == "cosine" else lambda step, steps: 1.0)
    metrics = train(TINY, run, None)
    assert metrics.train_loss == pytest.approx(loss, rel=1e-4)
    x, cond, target = tensors(500, TEST, 0.0)
    error = (model(x, cond) - target).square().mean().item()
    assert metrics.measures["error"] == pytest.approx(error, rel=1e-4)
    assert metrics.steps == 2 * 3


def test_schedules_and_optimizers_differ():
    changes = [{}, {"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adadelta"}, {"schedule": "cosine"}]
    found = [train(TINY, run_of(**c), None).measures["error"] for c in changes]
    assert len({round(error, 6) for error in found}) == len(changes)


def test_what_a_run_found():
    run = run_of(HYPERNETWORK)
    metrics = train(TINY, run, None)
    assert set(metrics.measures) == {"error", "apart", "zero"}
    assert metrics.measures["zero"] == 0.7
    size = counts(build(TINY, run))
    assert (metrics.context_parameters, metrics.primary_parameters, metrics.trainable_parameters) == size
    for name in ("step_seconds", "run_seconds", "fused_seconds", "materialised_seconds"):
        assert getattr(metrics, name) > 0
    assert metrics.materialised_bytes > 0
    other = train(TINY, run_of(EMBEDDING), None)
    assert (other.fused_seconds, other.materialised_seconds, other.materialised_bytes) == (None, None, None)
    assert other.peak_temporary_bytes > 0


def test_memory_and_time_are_measured_as_is_and_with_weights_written_out(monkeypatch):
    def under():
        return backends.current() == backends.Choice()

    used = {"memory": [], "time": []}

    def clock(fns, times, device):
        for fn in fns:
            with monkeypatch.context() as patch:
                patch.setattr(training.Trainer, "step", lambda *arguments: used["time"].append(under()))
                fn()
        return [0.1, 0.2]

    monkeypatch.setattr(
        training, "peak_temporary_bytes", lambda fn, device: used["memory"].append(under()) or len(used["memory"])
    )
    monkeypatch.setattr(training, "interleaved_seconds", clock)
    metrics = train(TINY, run_of(HYPERNETWORK), None)
    assert used == {"memory": [True, False], "time": [True, False]}
    assert (metrics.peak_temporary_bytes, metrics.materialised_bytes) == (1, 2)
    assert (metrics.fused_seconds, metrics.materialised_seconds) == (0.1, 0.2)


def spied(seen, drawn=False):
    """Return the tiny experiment with a task that adds every batch to `seen`; `drawn`: examples are drawn at random."""

    def spy(examples, split):
        def draw(chosen, generator):
            batch = examples.draw(chosen, generator)
            if drawn:
                batch = batch._replace(x=batch.x + torch.rand(batch.x.shape, generator=generator))
            seen.append((split, batch))
            return batch

        return Examples(examples.count, draw)

    def spied_task(run, source):
        plain = task(run, source)
        splits = {name: spy(getattr(plain, name), name) for name in ("train", "test", "validation")}
        return replace(plain, **splits)

    return replace(TINY, task=spied_task)


def test_every_example_comes_once_an_epoch_in_random_order():
    seen = []
    run = run_of(batch_size=16)
    examples = spied(seen).task(run, None).train
    generator = torch.Generator().manual_seed(1)
    epochs = [[batch.x for batch in batches(run, examples, generator)] for _ in range(2)]
    whole = tensors(0, TRAIN, 0.0)[0]
    for xs in epochs:
        assert [len(x) for x in xs] == [16, 16, 8]
        joined = torch.cat(xs)
        assert not torch.equal(joined, whole)
        assert torch.equal(joined.sort(0).values, whole.sort(0).values)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_all_methods_with_one_seed_see_the_same():
    seen = {}
    for method in BOTH:
        for seed in (0, 1):
            batches_seen = seen[method, seed] = []
            train(spied(batches_seen, drawn=True), run_of(method, seed), None)
    for seed in (0, 1):
        one, other = seen[HYPERNETWORK, seed], seen[EMBEDDING, seed]
        measuring = ["train"] if seed else ["train"] * 2  # flops, and with seed 0 time and memory
        assert [split for split, _ in one] == ["train"] * 6 + ["test", *measuring]
        for (_, a), (_, b) in zip(one, other, strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    zero, one = seen[EMBEDDING, 0], seen[EMBEDDING, 1]
    assert not torch.equal(zero[0][1].x, one[0][1].x)
    assert not torch.equal(zero[0][1].x, zero[3][1].x)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("method", [HYPERNETWORK, EQUAL_FLOPS])
def test_a_run_reads_the_examples_of_its_split_once_and_of_no_other(split, method):
    seen = []
    metrics = train(spied(seen), replace(run_of(method), split=split), None)
    (batch,) = [batch for name, batch in seen if name == split]
    assert {name for name, _ in seen} == {"train", split}
    first, count = {"test": (500, TEST), "validation": (700, VALIDATION)}[split]
    for found, expected in zip(batch, tensors(first, count, 0.0), strict=True):
        assert torch.equal(found, expected)
    assert metrics.measures["zero"] == 0.7
    assert metrics.measures["error"] > 0


def test_the_split_changes_nothing_but_the_examples_of_the_measures():
    test, validation = (train(TINY, replace(run_of(), split=split), None) for split in ("test", "validation"))
    assert test.train_loss == validation.train_loss
    assert test.measures != validation.measures


def test_without_validation_examples_nothing_is_trained(monkeypatch):
    without = replace(TINY, task=lambda run, source: replace(task(run, source), validation=None))
    assert train(without, run_of(), None).measures["error"] > 0
    monkeypatch.delattr(training, "Trainer")
    with pytest.raises(ValueError, match=r"^validation: the task of tiny has no such examples"):
        train(without, replace(run_of(), split="validation"), None)


@pytest.mark.parametrize(("seed", "split"), [(1, "test"), (0, "validation")])
def test_costs_are_measured_once_for_all_seeds(seed, split):
    metrics = train(TINY, replace(run_of(HYPERNETWORK, seed), split=split), None)
    assert {name: getattr(metrics, name) for name in training.COSTS} == dict.fromkeys(training.COSTS)


def test_what_is_drawn_for_the_test_depends_on_the_seed_alone():
    found = {}
    for seed, epochs in ((0, 1), (0, 3), (1, 1)):
        seen = []
        train(spied(seen, drawn=True), run_of(seed=seed, epochs=epochs, lr=0.1 * epochs), None)
        (found[seed, epochs],) = [batch.x for split, batch in seen if split == "test"]
    assert torch.equal(found[0, 1], found[0, 3])
    assert not torch.equal(found[0, 1], found[1, 1])


def test_numbers_depend_on_nothing_that_ran_before():
    alone = measured(train(TINY, run_of(HYPERNETWORK, 1), None))
    train(TINY, run_of(EMBEDDING, 0, optimizer="adam"), None)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert measured(train(TINY, run_of(HYPERNETWORK, 1), None)) == alone
    assert torch.equal(torch.random.get_rng_state(), state)
    assert measured(train(TINY, run_of(HYPERNETWORK, 2), None)) != alone


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9}, {"optimizer": "adam", "schedule": "cosine"}])
def test_measuring_costs_changes_no_number(method, changes, monkeypatch):
    run = run_of(method, **changes)
    found = measured(train(TINY, run, None))
    nothing = training.COSTS
    monkeypatch.setattr(training, "cost_of", lambda *arguments: dict.fromkeys(nothing))
    without = measured(train(TINY, run, None))
    assert {k: v for k, v in found.items() if k not in nothing} == {
        k: v for k, v in without.items() if k not in nothing
    }


@pytest.mark.parametrize(
    ("theirs", "own", "steps"), [(20, 10, 12), (10, 10, 6), (10, 30, 2), (10, 1000, 1), (40, 30, 8)]
)
def test_equal_flops_are_as_many_steps_as_the_flops_say(monkeypatch, theirs, own, steps):
    hyper = counts(build(TINY, run_of(HYPERNETWORK)))
    monkeypatch.setattr(training, "step_flops", lambda model, task, run: theirs if counts(model) == hyper else own)
    metrics = train(TINY, run_of(EQUAL_FLOPS), None)
    assert (metrics.steps, metrics.training_flops) == (steps, steps * own)
    if steps % 3 == 0:
        whole = train(TINY, run_of(EMBEDDING, epochs=steps // 3), None)
        assert measured(whole) == measured(metrics)


@pytest.mark.parametrize("method", BOTH)
def test_flops_are_those_of_all_steps(method):
    """A product (m, k) by (k, n) has 2 m k n flops, and the gradient of its weights as many."""
    batch = 16
    layers = {HYPERNETWORK: [(3, 6)], EMBEDDING: [(3, 6), (6, 4), (6, 5), (5, 1)]}[method]
    metrics = train(TINY, run_of(method), None)
    least = metrics.steps * sum(2 * 2 * batch * fan_in * fan_out for fan_in, fan_out in layers)
    assert metrics.training_flops >= least
    assert metrics.training_flops == 2 * train(TINY, run_of(method, epochs=1), None).training_flops


def test_a_diverging_run_ends():
    metrics = train(TINY, run_of(HYPERNETWORK, lr=1e9), None)
    assert not math.isfinite(metrics.measures["error"])
    assert not math.isfinite(metrics.train_loss)
    assert metrics.steps == 6


def test_shares_of_a_run_are_told_in_order():
    shares = []
    train(TINY, run_of(epochs=4), None, shares.append)
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_measures_are_means_over_all_test_examples(monkeypatch):
    monkeypatch.setattr(training, "TEST_BATCH", 4)  # ten examples in batches of 4, 4 and 2
    target = torch.arange(10.0)[:, None]
    examples = Examples.of(torch.zeros(10, 2), torch.zeros(10, 3), target)
    seen = []

    class Zero(torch.nn.Module):
        def forward(self, x, cond):
            seen.append((len(x), self.training, torch.is_grad_enabled()))
            return torch.zeros(len(x), 1)

    model = Zero()
    squares = Task(examples, examples, torch.nn.functional.mse_loss, lambda y, t: {"square": (y - t).square()[:, 0]})
    assert evaluate(run_of(), squares, model) == {"square": pytest.approx(28.5)}
    assert seen == [(4, False, False), (4, False, False), (2, False, False)]
    assert model.training


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_classifier_whose_outputs_are_not_finite_has_no_error(number, monkeypatch):
    """Its error alone would be finite: the largest of outputs that are no numbers is the first."""
    monkeypatch.setattr(training, "TEST_BATCH", 2)
    x = torch.tensor([[1.0, 2.0], [number, 0.0], [1.0, 2.0], [3.0, 4.0]])
    examples = Examples.of(x, torch.zeros(4, 1), torch.zeros(4))
    found = evaluate(
        run_of(), Task(examples, examples, None, lambda y, t: {"error": (y.argmax(1) != t).float()}), Same()
    )
    assert math.isnan(found["error"])


class Same(torch.nn.Module):
    def forward(self, x, cond):
        return x


def test_both_methods_start_from_the_same_hidden_layers():
    hyper, embed = build(TINY, run_of(HYPERNETWORK, 1)).trunk, build(TINY, run_of(EMBEDDING, 1)).embed
    assert torch.equal(hyper[0].weight, embed[0].weight)
    assert not torch.equal(hyper[0].weight, build(TINY, run_of(HYPERNETWORK, 0)).trunk[0].weight)


def test_building_leaves_torchs_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for method in METHODS:
        build(TINY, run_of(method))
    assert torch.equal(torch.rand(3), expected)


def test_batches_are_put_on_the_device_of_the_run():
    run = replace(run_of(), device="meta")
    batch = next(batches(run, task(run, None).train, torch.Generator()))
    assert isinstance(batch, Batch)
    assert {tensor.device.type for tensor in batch} == {"meta"}


def test_the_seed_is_what_makes_runs_differ():
    errors = [train(TINY, run, None).measures["error"] for run in comparison_of(depths="2", seeds=2).runs()]
    assert len(set(errors)) == 4
