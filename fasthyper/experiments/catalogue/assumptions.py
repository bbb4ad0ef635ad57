"""The two assumptions behind the paper's theorems, checked on networks without any condition.

    A1   the best approximator is unique as a function: two networks d -> 100 -> 10 (ReLU) that start apart and learn
         the same target, a random convolutional network, come closer to each other than to the target
    A2   one more hidden neuron lowers the error strictly: one hidden layer (ELU), one-hot labels, its width swept

Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), and the
authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.experiments.catalogue.data import IMAGES, Labelled, load_labelled
from fasthyper.experiments.claims import FallsAtEachStep, WellBelow, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Examples, Experiment, Line, Measure, Run, Study, Task, stream
from fasthyper.experiments.methods import PAIR, PLAIN, Architecture
from fasthyper.experiments.setting import Setting

CLASSES = 10
SIZE = 28
"""Digits are enlarged to this, or the paper's convolutions would not fit; it is the size of the noise, too."""
NOISE = "noise"


@dataclass(frozen=True, kw_only=True)
class AssumptionSetting(Setting):
    """Which check on what, and the hidden layer."""

    DEFINING: ClassVar[tuple[str, ...]] = ("check", "inputs")

    check: str
    """A1 or A2."""
    inputs: str
    """The data set, or noise."""
    hidden: int
    """Units."""
    activation: str


def convolutional_target(channels: int, size: int, generator: torch.Generator) -> nn.Module:
    """A fixed random network of two convolutions (kernel 10, stride 2) and a linear layer to 10 numbers.

    The kernel of the second is no larger than what the first leaves.
    """
    first = (size - 10) // 2 + 1
    second = (first - min(10, first)) // 2 + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return nn.Sequential(
            nn.Conv2d(channels, 10, 10, stride=2),
            nn.ReLU(),
            nn.Conv2d(10, 20, min(10, first), stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * second**2, CLASSES),
        )


@torch.no_grad()
def task(run: Run, source: Labelled) -> Task:
    """A1: the random network's answers; A2: the labels."""
    setting = run.setting
    assert isinstance(setting, AssumptionSetting)
    generator = torch.Generator().manual_seed(stream(run.seed, "task"))
    counts = [len(split) for split in source.images]
    if setting.inputs == NOISE:
        splits = [2 * torch.rand(count, 1, SIZE, SIZE, generator=generator) - 1 for count in counts]
    else:
        splits = [_prepared(split, IMAGES[run.data].pixel_max) for split in source.images]
    if setting.check == "A1":
        network = convolutional_target(splits[0].shape[1], splits[0].shape[-1], generator)
        targets = [torch.cat([network(part) for part in split.split(1000)]) for split in splits]
    else:
        targets = [F.one_hot(labels, CLASSES).float() for labels in source.labels]
    none = (torch.zeros(count, 0) for count in counts)
    parts = zip(splits, none, targets, strict=True)
    train, test = (
        Examples.of(split.flatten(1).to(run.device), cond.to(run.device), target.to(run.device))
        for split, cond, target in parts
    )
    spread = (targets[1] - targets[0].mean(dim=0)).norm(dim=1).mean().item()
    loss, measure = (_pair_loss, _pair_measure) if setting.check == "A1" else (F.mse_loss, _mse)
    return Task(train, test, loss, measure, levels={"spread": spread})


def architecture(run: Run) -> Architecture:
    """d -> hidden -> 10."""
    setting = run.setting
    assert isinstance(setting, AssumptionSetting)
    images = IMAGES[run.data]
    large = images.channels * max(images.size, SIZE) ** 2
    inputs = SIZE**2 if setting.inputs == NOISE else large
    return Architecture(
        cond=0, x=inputs, out=CLASSES, context=(), hidden=(setting.hidden,), activation=setting.activation
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """A1 on the images and on noise; A2 over the hidden layer's width."""
    quick, digits = preset == "quick", data == "digits"
    one = AssumptionSetting(
        epochs=200 if digits else 50,
        lr=0.01,
        batch_size=64,
        momentum=0.5,
        check="A1",
        inputs=data,
        hidden=100,
        activation="relu",
    )
    two = AssumptionSetting(
        epochs=20 if digits else 2,
        lr=1.0,
        batch_size=64,
        optimizer="adadelta",
        check="A2",
        inputs=data,
        hidden=1,
        activation="elu",
    )
    widths = (1, 2, 3, 4, 6, 8, 12, 16, 22, 29) if quick else tuple(range(1, 30))
    return (
        Study(
            name="A1",
            title="A1: the best approximator is unique",
            axis=Axis("inputs", "inputs"),
            values=(data, NOISE),
            methods=(PAIR,),
            setting=one,
            seeds=5 if quick else 20,
            measure=Measure("between", "distance of outputs (L2 norm, mean over test inputs)", log=True),
            lines=(
                Line(PAIR, "between", "between the two networks, ‖f₁ - f₂‖"),
                Line(PAIR, "to_target", "from either to the target, ‖fᵢ - y‖"),
            ),
            levels=(("spread", "from the best constant to the target"),),
            claims=(
                WellBelow(
                    text="The two networks are well closer to each other than to the target (less than half as far)",
                    line=f"{PAIR}:between",
                    than=f"{PAIR}:to_target",
                ),
                Wins(
                    text="They have come closer to the target than the best constant, or the claim says nothing",
                    line=f"{PAIR}:to_target",
                    over=f"{PAIR}:spread",
                    whose=ASKED,
                ),
            ),
        ),
        Study(
            name="A2",
            title="A2: one more neuron lowers the error",
            axis=Axis("hidden", "hidden neurons"),
            values=widths,
            methods=(PLAIN,),
            setting=two,
            seeds=5 if quick else 20,
            measure=Measure("mse", "mean squared error on one-hot labels", log=True),
            claims=(FallsAtEachStep(text="The error falls strictly with the width", line=PLAIN),),
        ),
    )


def _prepared(images: Tensor, pixel_max: int) -> Tensor:
    images = images.float() / pixel_max
    small = images.shape[-1] < SIZE
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False) if small else images


def _pair_loss(y: Tensor, target: Tensor) -> Tensor:
    # The sum over both networks: each has the gradient of its own loss.
    return y.shape[1] * F.mse_loss(y, target[:, None].expand_as(y))


def _pair_measure(y: Tensor, target: Tensor) -> dict[str, Tensor]:
    to_target = (y - target[:, None]).norm(dim=2).mean(dim=1)
    return {"between": (y[:, 0] - y[:, 1]).norm(dim=1), "to_target": to_target}


def _mse(y: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"mse": (y - target).square().mean(dim=1)}


ASSUMPTIONS = Experiment(
    name="assumptions",
    protocol=1,
    title="The two assumptions",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006)",
    question=(
        "The paper's lower bounds rest on two assumptions about networks as such, without conditions: that the best"
        " approximator of a target is unique as a function (A1), and that one more hidden neuron lowers the error"
        " strictly (A2)."
    ),
    choices=(
        "Digits are enlarged to 28 × 28 by bilinear interpolation, since the convolutions of the target (kernel 10,"
        " stride 2, twice) do not fit otherwise; on 3 × 32 × 32 the second kernel is 10, too.",
        "The target's convolutions have 10 and 20 channels with ReLU after each, batches are 64: open in the paper.",
        "Distances are of outputs on test inputs, averaged; noise is uniform on [-1, 1]^(28×28), as many as images.",
        "In A1, well closer is taken as less than half as far. At the quick preset A2 tries ten of the widths from 1 to"
        " 29, steps of several neurons among them.",
        "Digits are few, so that A1 takes 200 epochs of them instead of 50, and A2 20 instead of 2.",
        "No hypernetwork takes part, so that the other methods have no place here.",
    ),
    data=("digits", "mnist", "fashion", "cifar10"),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load_labelled,
)
