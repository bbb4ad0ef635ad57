"""Made-up results: records and summaries of a study with given numbers, without training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_experiment import BOTH, SETTING, TINY

from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.experiment import Axis, Measure, Study
from fasthyper.experiments.methods import HYPERNETWORK
from fasthyper.experiments.results import Results
from fasthyper.experiments.summary import summarise
from fasthyper.experiments.verdicts import judged

SIZE = Axis("size", "trained parameters, as a multiple of the hypernetwork's", log=True, count="trainable_parameters")
DEPTH = Axis("depth", "layers of f and e")
PERCENT = Measure("error", "test error", percent=True)
DISTANCE = Measure("error", "distance")
LOG = Measure("error", "squared error", log=True)
JITTER = 0.002 * np.array([-1.0, 0.0, 1.0])[:, None]
"""Of three seeds."""
NOISE = np.array([-0.02, 0.0, 0.02])[:, None]
"""Of three seeds, as a share."""
SIZES = (0.25, 1.0, 4.0)
LOW, HIGH = JITTER * [1, 1] + 0.2, JITTER * [1, -1] + 0.5
DOWN, LEVEL, UP = JITTER * [1, 2] + [0.3, 0.2], JITTER * [1, 1] + [0.3, 0.3], JITTER * [1, 2] + [0.2, 0.3]
"""Of three seeds at two values, as `LOW` and `HIGH`."""
DEPTHS = (2, 3, 5)
RANDOM = np.random.default_rng(2)
A, B = (0.3 + 0.05 * RANDOM.standard_normal((6, 3)) for _ in "ab")
"""Of six seeds at `DEPTHS`."""


def study_of(errors, values=(2, 3), *, axis=DEPTH, measure=PERCENT, **more):
    """Return a study of the methods and seeds of `errors`, which has an array (seeds, values) for each line."""
    methods = tuple(dict.fromkeys(name.split(":")[0] for name in errors))
    seeds = len(next(iter(errors.values())))
    return Study(
        name="made-up",
        title="Made up",
        axis=axis,
        values=values,
        methods=methods,
        setting=SETTING,
        seeds=seeds,
        measure=measure,
        **more,
    )


def comparison_of(study, **changes):
    return Comparison(replace(TINY, **changes), "quick", TINY.data[0], (study,), "cpu", ("seeds 3",))


def records_of(comparison, errors, counts=lambda run: 100, **extra):
    """Return a record for each run; `counts` returns the parameters of the primary of a run."""
    (study,) = comparison.studies
    records = []
    for run in comparison.runs():
        at = study.values.index(getattr(run.setting, study.axis.field))
        measures = {}
        for name, numbers in errors.items():
            method, _, measure = name.partition(":")
            if method == run.method:
                number = np.asarray(numbers, dtype=float)[run.seed, at]
                measures[measure or study.measure.name] = float(number) if np.isfinite(number) else None
        hyper = run.method == HYPERNETWORK
        metrics = {
            "measures": {**measures, **extra},
            "train_loss": 0.5,
            "context_parameters": 1000 * (at + 1),
            "primary_parameters": counts(run),
            "trainable_parameters": round(2000 * run.setting.size),
            "steps": 12 + run.seed,
            "training_flops": round(1000 * (12 + run.seed) * run.setting.size),
            "step_seconds": 0.001 * (run.seed + 1),
            "run_seconds": 1.0,
            "peak_temporary_bytes": 2048 + run.seed,
            "fused_seconds": 0.001 * (run.seed + 1) if hyper else None,
            "materialised_seconds": 0.004 * (run.seed + 1) if hyper else None,
            "materialised_bytes": 8192 if hyper else None,
        }
        records.append({"config": run.config(), "metrics": metrics, "versions": {"torch": "2"}})
    return records


def summary_of(errors, values=(2, 3), *, counts=lambda run: 100, extra=None, changes=None, **study):
    comparison = comparison_of(study_of(errors, values, **study), **(changes or {}))
    return summarise(comparison, records_of(comparison, errors, counts, **(extra or {})))


def results_of(errors, values=(2, 3), **options):
    return summary_of(errors, values, **options).results[0]


def pair(hypernetwork, embedding):
    return dict(zip(BOTH, map(np.asarray, (hypernetwork, embedding)), strict=True))


def errors(**means):
    """Return errors of three seeds at three sizes around the means; each method has noise of its own."""
    return {
        name: mean * np.array([2.0, 1.0, 0.5]) * (1 + np.roll(NOISE, number))
        for number, (name, mean) in enumerate(means.items())
    }


def frontier(measure=LOG, **means):
    return summary_of(errors(**means), SIZES, axis=SIZE, structure="a product", measure=measure)


def finding_of(claim, results):
    """Return the finding on a claim that is alone on its page; None if there is none."""
    found = judged([Results(replace(results.study, claims=(claim,)), results.metrics)])
    return found[0][1] if found else None


def evidence(claim, errors, values=(2, 3), **options):
    return finding_of(claim, results_of(errors, values, **options)).evidence


def diverging(errors, *places):
    broken = errors.copy()
    for place in places:
        broken[place] = np.nan
    return broken
