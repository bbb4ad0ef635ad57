"""Initialisation of generated weights: which one trains a hypernetwork best, and with which does it diverge?

    torch                 the heads are initialised like linear layers of torch, as in Galanti and Wolf's code
    ours                  as `HyperLinear` initialises itself
    hyperfan              Chang, Flokas, Lipson, ICLR 2020 (arXiv 2312.08399): as if generated weights were trained
    magnitude_invariant   Ortiz, Guttag, Dalca, 2023 (arXiv 2304.07645): generated weights do not scale with I

The tasks are those of the experiments `rotation` (digits) and `operators` (identity).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fasthyper.experiments.catalogue import operators, rotation
from fasthyper.experiments.catalogue.frontiers import TUNING
from fasthyper.experiments.experiment import Axis, Experiment, Measure, Run, Study, Task
from fasthyper.experiments.methods import HYPERNETWORK, Architecture
from fasthyper.experiments.networks import INITIALISATIONS
from fasthyper.experiments.setting import Setting


def of_setting(setting: Setting) -> Experiment:
    """Return the experiment whose task a setting belongs to."""
    return rotation.ROTATION if isinstance(setting, rotation.RotationSetting) else operators.OPERATOR_LEARNING


def task(run: Run, dataset: Any) -> Task:
    """Return the task of the experiment that the setting belongs to."""
    return of_setting(run.setting).task(run, dataset)


def architecture(run: Run) -> Architecture:
    """Return the sizes in the experiment that the setting belongs to."""
    return of_setting(run.setting).architecture(run)


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return a study for each task and optimizer; none if quick."""
    if preset == "quick":
        return ()
    paper = preset == "paper"
    images = replace(rotation.ROTATION.studies(preset, data)[0].setting, epochs=60 if paper else 30)
    functions = operators.OPERATOR_LEARNING.studies(preset, operators.OPERATOR_LEARNING.data[0])[0].setting
    assert isinstance(functions, operators.OperatorSetting)
    functions = replace(functions, epochs=500 if paper else 100, operator="identity")
    tasks = (
        ("rotation", "Rotation of digits", images, Measure("error", "test error", percent=True)),
        ("identity", "The identity operator", functions, Measure("relative_l2", "relative L2 error", log=True)),
    )
    return tuple(
        Study(
            name=f"{name} {optimizer}",
            title=f"{title}, with {optimizer.upper() if optimizer == 'sgd' else optimizer.capitalize()}",
            axis=Axis("initialisation", "initialisation of generated weights"),
            values=INITIALISATIONS,
            methods=(HYPERNETWORK,),
            setting=replace(setting, optimizer=optimizer, lr=TUNING.rates[optimizer][2], schedule="cosine", size=1.0),
            seeds=20 if paper else 10,
            measure=measure,
            tuning=TUNING,
        )
        for name, title, setting, measure in tasks
        for optimizer in TUNING.rates
    )


INITIALISATION = Experiment(
    name="initialisation",
    protocol=1,
    title="Initialisation of generated weights",
    source=(
        "Oscar Chang, Lampros Flokas, Hod Lipson, Principled weight initialization for hypernetworks, ICLR 2020"
        " (arXiv 2312.08399); Jose Javier Gonzalez Ortiz, John Guttag, Adrian Dalca, Magnitude invariant"
        " parametrizations improve hypernetwork learning, 2023 (arXiv 2304.07645)"
    ),
    question=(
        "A hypernetwork's first weights come from its heads. Do they start like linear layers of torch, at the scale of"
        " trained weights, or so that they do not scale with the condition? Each start gets its own learning rate, for"
        " SGD and for Adam: which one errs least after the same number of steps, and which runs diverge?"
    ),
    choices=(
        "The tasks are the rotation of digits and the identity operator, with the networks and data of those"
        " experiments; the two publications measure on other tasks, so no published number stands beside ours.",
        "The learning rate falls along a cosine. It is chosen for each optimizer and initialisation."
        " Rotation: 30 epochs (paper preset: 60); identity: 4,000 steps (20,000).",
        "A run that diverges counts as diverged and has no error.",
    ),
    data=("digits",),
    studies=studies,
    architecture=architecture,
    task=task,
    load=rotation.ROTATION.load,
)
