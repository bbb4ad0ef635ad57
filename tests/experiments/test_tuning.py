from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tiny_experiment import BOTH, SETTING, TINY, TUNED, TUNING, tuned_of

from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.experiment import Axis, Tuning
from fasthyper.experiments.rates import Rate
from fasthyper.experiments.store import config_key
from fasthyper.experiments.summary import summarise
from fasthyper.experiments.tuning import tuned

BEST = {("hypernetwork", 2): 0.1, ("embedding", 2): 0.01, ("hypernetwork", 3): 0.01, ("embedding", 3): 0.1}


def comparison_with(tuning=TUNING, **changes):
    """Return a comparison of one study, with a grid."""
    (study,) = tuned_of(depths="2-3").studies
    study = replace(study, tuning=tuning, **changes)
    return Comparison(TINY, "quick", "line", (study,), "cpu")


def record_of(run, error):
    metrics = {"measures": {"error": error, "apart": -error}, "train_loss": 0.5}
    return {"config": run.config(), "metrics": metrics, "versions": {}}


def records_of(comparison, error):
    """Return a record of each tuning run, by configuration; `error` returns the error of a run."""
    return {config_key(run.config()): record_of(run, error(run)) for run in comparison.tuning_runs()}


def test_the_least_error_is_best():
    rate = Rate.of("depth", "film", 2, "sgd", {0.1: 0.5, 0.01: 0.25, 0.001: 0.3})
    assert (rate.lr, rate.at_edge) == (0.01, False)


@pytest.mark.parametrize(("errors", "lr"), [((1.0, 2.0, 3.0), 0.001), ((3.0, 2.0, 1.0), 0.1)])
def test_a_rate_at_the_edge_says_so(errors, lr):
    rate = Rate.of("depth", "film", 2, "sgd", dict(zip((0.001, 0.01, 0.1), errors, strict=True)))
    assert (rate.lr, rate.at_edge) == (lr, True)


def test_a_grid_of_one_rate_has_no_edge():
    assert not Rate.of("depth", "film", 2, "sgd", {0.1: 0.5}).at_edge


def test_of_equal_rates_the_smallest_is_taken():
    assert Rate.of("depth", "film", 2, "sgd", {0.1: 0.5, 0.01: 0.5, 1.0: 0.5}).lr == 0.01


def test_if_all_runs_diverge_the_smallest_rate_is_taken_and_it_says_so():
    rate = Rate.of("depth", "film", 2, "sgd", dict.fromkeys((0.1, 0.01), math.inf))
    assert (rate.lr, rate.at_edge) == (0.01, True)


def test_the_tuning_runs_of_a_comparison():
    comparison = comparison_with()
    found = [(run.seed, run.setting.depth, run.method, run.setting.lr) for run in comparison.tuning_runs()]
    assert found == [
        (seed, depth, method, lr)
        for seed in (1_000_000, 1_000_001)
        for depth in (2, 3)
        for method in BOTH
        for lr in (0.01, 0.1, 1e9)
    ]
    assert {run.split for run in comparison.tuning_runs()} == {"validation"}
    (run, *_) = comparison.tuning_runs()
    assert run.setting == replace(SETTING, lr=0.01)


def test_a_study_without_a_grid_or_over_the_learning_rate_has_no_tuning_runs():
    assert comparison_with(None).tuning_runs() == []
    over = comparison_with(axis=Axis("lr", "learning rate"), values=(0.5, 0.6))
    assert over.tuning_runs() == []
    assert {run.setting.lr for run in tuned(over, {}).runs()} == {0.5, 0.6}


def test_each_method_gets_its_best_rate_at_each_value():
    comparison = comparison_with()
    best = lambda run: float(run.setting.lr != BEST[run.method, run.setting.depth])
    chosen = tuned(comparison, records_of(comparison, best))
    assert {(rate.method, rate.value): rate.lr for rate in chosen.rates} == BEST
    assert {rate.optimizer for rate in chosen.rates} == {"sgd"}
    assert {(run.method, run.setting.depth): run.setting.lr for run in chosen.runs()} == BEST
    assert {(run.split, run.seed) for run in chosen.runs()} == {("test", 0), ("test", 1)}
    assert replace(chosen, rates=()) == comparison


def test_errors_are_means_over_the_seeds_and_a_run_that_diverged_is_never_best():
    comparison = comparison_with()
    errors = {(0.01, 0): 1.0, (0.01, 1): 3.0, (0.1, 0): 1.5, (0.1, 1): 1.0, (1e9, 0): 0.0}
    found = records_of(comparison, lambda run: errors.get((run.setting.lr, run.seed - 1_000_000), math.nan))
    for rate in tuned(comparison, found).rates:
        assert rate.errors == {0.01: 2.0, 0.1: 1.25, 1e9: math.inf}
        assert rate.lr == 0.1
    stored = records_of(comparison, lambda run: 1.0)
    for record in stored.values():  # a stored run that diverged has null
        if record["config"]["setting"]["lr"] == 0.01:
            record["metrics"]["measures"]["error"] = None
    assert {rate.lr for rate in tuned(comparison, stored).rates} == {0.1}


def test_the_grid_is_that_of_the_optimizer():
    over = comparison_with(axis=Axis("optimizer", "optimizer"), values=("sgd", "adam"))
    by_optimizer = {
        name: {run.setting.lr for run in over.tuning_runs() if run.setting.optimizer == name}
        for name in over.studies[0].values
    }
    assert by_optimizer == {name: set(rates) for name, rates in TUNING.rates.items()}
    chosen = tuned(over, records_of(over, lambda run: -run.setting.lr))
    assert {(rate.value, rate.optimizer, rate.lr) for rate in chosen.rates} == {
        ("sgd", "sgd", 1e9),
        ("adam", "adam", 0.01),
    }


def test_equal_tuning_runs_are_shared():
    """A method without an embedding has the same runs at all E, and two studies may have the same runs."""
    over = comparison_with(axis=Axis("embedding", "E"), values=(2, 4))
    assert len(over.tuning_runs()) == (1 + 2) * 3 * 2
    (study,) = over.studies
    twice = replace(over, studies=(study, replace(study, name="again")))
    assert twice.tuning_runs() == over.tuning_runs()
    chosen = tuned(twice, records_of(twice, lambda run: run.setting.lr))
    assert len(chosen.rates) == 2 * 2 * 2
    assert len(chosen.runs()) == 2 * 3


def test_the_learning_rate_of_the_user_is_that_of_all_runs():
    assert Comparison.of(TUNED, device="cpu", epochs=1).tuning_runs()
    fixed = Comparison.of(TUNED, device="cpu", lr=0.5)
    assert fixed.tuning_runs() == []
    assert {run.setting.lr for run in tuned(fixed, {}).runs()} == {0.5}


@pytest.mark.parametrize(
    ("tuning", "reason"),
    [
        (Tuning({"adam": (0.1,)}), "rates for sgd"),
        (Tuning({"sgd": ()}), "rates for sgd"),
        (Tuning({"sgd": (0.1, 0.1)}), "each named once"),
        (Tuning({"sgd": (1,)}), "of type float"),
        (Tuning({"sgd": (0.1,)}, seeds=0), "seeds of at least 1"),
        (Tuning({"sgd": (0.1,)}, seeds=True), "seeds of at least 1"),
    ],
)
def test_bad_grids(tuning, reason):
    with pytest.raises(ValueError, match=f"^tuning: .*{reason}"):
        comparison_with(tuning)


def test_a_rate_that_is_not_positive():
    with pytest.raises(ValueError, match=r"^lr: "):
        comparison_with(Tuning({"sgd": (-0.1,)}))


def test_a_summary_has_the_rates_and_the_results_with_them():
    comparison = comparison_with()
    found = records_of(comparison, lambda run: run.setting.lr)
    costs = ("steps", "training_flops", "step_seconds", "peak_temporary_bytes", "fused_seconds")
    more = ("materialised_seconds", "materialised_bytes")
    sizes = ("context_parameters", "primary_parameters", "trainable_parameters")
    results = [record_of(run, 1.0 + run.seed) for run in tuned(comparison, found).runs()]
    for record in results:
        record["metrics"]["measures"]["zero"] = 0.7
        record["metrics"] |= dict.fromkeys((*costs, *more, *sizes), 1)
    summary = summarise(comparison, [*found.values(), *results])
    assert summary.rates == tuned(comparison, found).rates
    assert summary.results[0].rows()[0].measured.mean == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="records: expected all 24 runs that choose learning rates"):
        summarise(comparison, [*list(found.values())[1:], *results])
    with pytest.raises(ValueError, match="records: expected the 32 runs"):
        summarise(comparison, [*found.values(), *results[1:]])
