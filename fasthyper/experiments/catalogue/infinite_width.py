"""Infinite width: is a wide f enough for a hypernetwork to train like a linear model, or has g to be wide too?

A wide network hardly moves from its linearisation at the initial weights, so its training is convex. For hypernetworks,
the theory says that this takes a wide g as well: with a small g and any f, training stays non-linear. Measured here:
how far the outputs after training are from the linearisation's, as a share of how far training moved them.

The task is that of `rotation` with digits. f: 64 -> width -> width -> ..., g: 64 -> 10 -> 12, or 64 -> width -> 12.

Littwin, Galanti, Wolf, Yang, On infinite-width hypernetworks, NeurIPS 2020 (arXiv 2003.12193).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fasthyper.experiments.catalogue import rotation
from fasthyper.experiments.claims import Improves, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Experiment, Measure, Run, Study, Task
from fasthyper.experiments.methods import WIDE_BOTH, WIDE_F, Architecture


def task(run: Run, dataset: Any) -> Task:
    """Return the task of `rotation`, with the distance from the linearisation as a further measure."""
    return replace(rotation.task(run, dataset), measure=measure)


def measure(y: Tensor, target: Tensor) -> Mapping[str, Tensor]:
    """Return the errors of the trained network and of its linearisation, and how far they are apart.

    Where all hidden units of f are dead, neither of them moves: such an input has the distance 0.

    Args:
        y: the outputs of `WideHypernetwork` in evaluation, `(B, 3, O)`.
        target: `(B,)`.
    """
    trained, initial, linear = y.unbind(dim=1)
    return {
        "departure": (trained - linear).norm(dim=1) / (trained - initial).norm(dim=1).clamp_min(_TINY),
        "error": (trained.argmax(dim=1) != target).float(),
        "linear_error": (linear.argmax(dim=1) != target).float(),
    }


def architecture(run: Run) -> Architecture:
    """Return the sizes of `rotation`."""
    return rotation.architecture(run)


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return a study of the linearisation and one of the error, over the width; none if quick."""
    if preset == "quick":
        return ()
    paper = preset == "paper"
    setting = rotation.ROTATION.studies(preset, data)[0].setting
    assert isinstance(setting, rotation.RotationSetting)
    base = replace(
        setting,
        depth=3,
        optimizer="sgd",
        momentum=0.0,
        schedule="constant",
        size=1.0,
        batch_size=64,
    )
    axis = Axis("width", "units of each hidden layer of f, and of g where it is wide", log=True)
    return (
        Study(
            name="linear",
            title="Distance from the linearisation, over the width",
            axis=axis,
            values=(16, 32, 64, 128, 256, 512) if paper else (16, 32, 64, 128, 256),
            methods=(WIDE_F, WIDE_BOTH),
            setting=replace(base, epochs=4, lr=0.003),
            seeds=20 if paper else 10,
            measure=Measure("departure", "distance from the linearisation / distance from the start", log=True),
            also=(("error", "test error"), ("linear_error", "test error of the linearisation")),
            claims=(
                Improves(
                    text="Where f and g are wide, training gets nearer to the linearisation with the width",
                    line=WIDE_BOTH,
                    whose=_LITTWIN,
                ),
                Wins(
                    text="From 32 units on, training is nearer to the linearisation with a wide g, by a factor of 1.2",
                    line=WIDE_BOTH,
                    over=WIDE_F,
                    least=32,
                    margin=1.2,
                    whose=_LITTWIN,
                ),
            ),
        ),
        Study(
            name="error",
            title="Test error over the width",
            axis=axis,
            values=(16, 32, 64, 128, 256) if paper else (16, 32, 64, 128),
            methods=(WIDE_F, WIDE_BOTH),
            setting=replace(base, epochs=60 if paper else 10, lr=1.0),
            seeds=20 if paper else 10,
            measure=Measure("error", "test error", percent=True),
            levels=(("guessing", "guessing"),),
            also=(("departure", "distance from the linearisation / from the start"),),
            claims=(
                Wins(
                    text="From 32 units on, the error is lower with a wide g",
                    line=WIDE_BOTH,
                    over=WIDE_F,
                    least=32,
                    whose=ASKED,
                ),
            ),
        ),
    )


_LITTWIN = "Littwin et al. 2020"
_TINY = 1e-30

INFINITE_WIDTH = Experiment(
    name="infinite_width",
    protocol=2,
    title="Infinite width",
    source=(
        "Etai Littwin, Tomer Galanti, Lior Wolf, Greg Yang, On infinite-width hypernetworks, NeurIPS 2020"
        " (arXiv 2003.12193)"
    ),
    question=(
        "A very wide network trains like its linearisation, a convex problem. For a hypernetwork g(x; f(I)), is it"
        " enough that f is wide, or does this take a wide g too? Networks are trained to predict by how much a digit"
        " was turned, with g of 10 units, or as wide as f."
    ),
    choices=(
        "No published number stands beside ours: the paper shows its results on training as plots. Its code predicts"
        " rotations of MNIST and CIFAR10 by f of 200 units and four layers and g of 20 units and three layers. Here,"
        " f has three layers and g two, on digits.",
        "Weights have variance 1 and layers are divided by the root of their inputs, as in the theory, so that one"
        " learning rate suits all widths: it is not tuned. Plain SGD, batches of 64.",
        "The distance from the linearisation is measured after short training (4 epochs at 0.003): the theory fixes the"
        " time of training and lets the width grow, and long training moves networks of these widths too far. The"
        " error is measured after longer training (10 epochs at 1; paper preset: 60).",
        "The linearisation is that at the initial weights, evaluated at the trained weights.",
    ),
    data=("digits",),
    studies=studies,
    architecture=architecture,
    task=task,
    load=rotation.ROTATION.load,
)
