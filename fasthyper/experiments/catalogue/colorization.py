"""Colorization: which colour does this pixel of a grey image have?

The condition I is a grey image, x the position of one of its pixels, and the target the pixel's red, green and
blue, from -1 to 1. Each batch has many pixels of an image: N points of one instance.

    hypernetwork   g(x; f(I))   g: 42 -> 10 -> 3, ELU, every weight generated, no biases (N_g = 450)
    embedding      q(x, e(I))   q: (42 + 450) -> 10 -> 3, ELU

The features of a position (i, j) are i, j and, for k = 0 … 9, i^k + j, j^k + i, i^k - j, j^k - i.

Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.catalogue.data import Splits, load_images, load_patches, validation_split
from fasthyper.experiments.catalogue.frontiers import SIZES, TUNING, about_primaries, frontier, optimizers, wins
from fasthyper.experiments.experiment import Axis, Batch, Examples, Experiment, Measure, Run, Study, Task
from fasthyper.experiments.methods import BIASES, EMBEDDING, EQUAL_FLOPS, FILM, HYPERNETWORK, Architecture
from fasthyper.experiments.setting import ContextSetting

POWERS = 10
FEATURES = 2 + 4 * POWERS
HEIGHTS: Mapping[str, int] = {"patches": 16, "cifar10": 32}
TEST_POINTS = 64
STRUCTURE = "I gives a function of position: many points for each I"
COPIED = ("copied", "the grey value as colour")


@dataclass(frozen=True, kw_only=True)
class ColorizationSetting(ContextSetting):
    """A setting with `points`: N, the pixels of an image in a training batch."""

    points: int


def position_features(size: int) -> Tensor:
    """Return the features of the position of each pixel of a square image, row by row: `(size², 42)`.

    Example:
        >>> position_features(2)[1, :6]  # the first row, the second column; then k = 0
        tensor([-1.,  1.,  2.,  0.,  0.,  2.])
    """
    coordinates = torch.linspace(-1, 1, size)
    i, j = (grid.flatten() for grid in torch.meshgrid(coordinates, coordinates, indexing="ij"))
    powers = (f for k in range(POWERS) for f in (i**k + j, j**k + i, i**k - j, j**k - i))
    return torch.stack([i, j, *powers], dim=1)


def grey(images: Tensor) -> Tensor:
    """Return the brightness of colour images, `(n, 3, S, S)` to `(n, S, S)`, by ITU-R BT.601."""
    red, green, blue = images.unbind(dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def load(data: str, data_home: Any) -> Splits:
    """Load colour images for training and testing."""
    return load_patches(HEIGHTS[data]) if data == "patches" else load_images(data, data_home)


def examples(pixels: Tensor, points: int) -> Examples:
    """Return examples of images `(n, 3, S, S)`, with new pixels at every access.

    x is `(B, N, 42)`, I is `(B, S²)`, the target is `(B, N, 3)`.
    """
    size = pixels.shape[-1]
    features = position_features(size).to(pixels.device)

    def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
        at = torch.randint(size**2, (len(chosen), points), generator=generator).to(pixels.device)
        images = pixels[chosen.to(pixels.device)].float() / 127.5 - 1
        colours = images.flatten(2).transpose(1, 2)
        return Batch(features[at], grey(images).flatten(1), colours.gather(1, at[:, :, None].expand(-1, -1, 3)))

    return Examples(len(pixels), draw)


def task(run: Run, dataset: Splits) -> Task:
    """Return the task, with the errors of two predictors as levels: the grey value as colour, and the mean colour.

    Runs that choose a learning rate train without the validation images; all others train on all training images.
    """
    setting = run.setting
    assert isinstance(setting, ColorizationSetting)
    train, validation, test = (
        part.to(run.device) for part in (*validation_split(dataset.train, run.split), dataset.test)
    )
    colours, mean = (split.float() / 127.5 - 1 for split in (test, train))
    copied = (colours - grey(colours)[:, None]).square().mean()
    constant = (colours - mean.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    return Task(
        examples(train, setting.points),
        examples(test, TEST_POINTS),
        F.mse_loss,
        lambda y, target: {"mse": (y - target).square().mean(dim=(1, 2))},
        levels={"copied": copied.item(), "constant": constant.item()},
        validation=examples(validation, TEST_POINTS) if len(validation) else None,
    )


def architecture(run: Run) -> Architecture:
    """Return the sizes: g, q: 42 -> 10 -> 3; f, e: `depth` layers."""
    setting = run.setting
    assert isinstance(setting, ColorizationSetting)
    return Architecture(
        cond=HEIGHTS[run.data] ** 2,
        x=FEATURES,
        out=3,
        context=setting.context,
        hidden=(10,),
        embedding=setting.embedding,
        activation="elu",
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return a frontier, and unless quick studies over depth and of the optimizers.

    All have tuned learning rates, since the paper gives none.
    """
    quick, paper = preset == "quick", preset == "paper"
    epochs = {"patches": {"quick": 20, "standard": 30, "paper": 200}[preset], "cifar10": 10 if paper else 1}[data]
    setting = ColorizationSetting(
        epochs=epochs,
        lr=3e-3,
        batch_size=32,
        optimizer="adam",
        schedule="cosine",
        depth=3,
        width=100,
        embedding=450,
        points=64 if paper else 16,
    )
    found = [
        frontier(
            title="Over all trained parameters",
            structure=STRUCTURE,
            level=COPIED,
            values=SIZES[:2] if quick else SIZES,
            setting=setting,
            seeds=5 if quick else 10,
            measure=_MSE,
            levels=_LEVELS,
            claims=(about_primaries(COPIED),),
        )
    ]
    if not quick:
        found += [_depth(paper, setting), *optimizers(found, preset)]
    return tuple(found)


def _depth(paper: bool, setting: ColorizationSetting) -> Study:
    return Study(
        name="depth",
        title="Over the depth of f and e, at the paper's sizes",
        axis=Axis("depth", "depth of f and e (linear layers)"),
        values=tuple(range(2, 8)) if paper else (2, 4, 6),
        methods=(HYPERNETWORK, EMBEDDING, EQUAL_FLOPS, FILM, BIASES) if paper else (HYPERNETWORK, EMBEDDING),
        setting=setting,
        seeds=30 if paper else 10,
        measure=_MSE,
        levels=_LEVELS,
        claims=(wins(COPIED, text="At the paper's sizes (N_q >= N_g), the hypernetwork wins"),),
        tuning=TUNING,
        note='The paper says "by a large margin", without a number: the evidence has the factor.',
    )


_MSE = Measure("mse", "mean squared error (colours from -1 to 1)", log=True)
_LEVELS = (COPIED, ("constant", "the mean colour"))


COLORIZATION = Experiment(
    name="colorization",
    protocol=2,
    title="Colorization",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006)",
    question=(
        "A model sees a grey image I and the position x of a pixel, and predicts the colour of the pixel. The"
        " hypernetwork generates for each image a small network from positions to colours; the embedding method has one"
        " network for all images, which gets 450 numbers about the image in addition to the position. The default"
        " images are patches of two photographs, and those for testing lie beside those for training: errors on other"
        " scenes would be larger."
    ),
    choices=(
        "The patches are 16 × 16 squares, without overlap, of the two photographs that come with scikit-learn. They are"
        " not in the paper and need no download. Three quarters, chosen at random once, are for training.",
        "The paper leaves open: positions run from -1 to 1 before they are raised to powers; pixels of an image are"
        " drawn at every access, 16 in training (64 in the paper preset) and 64 in testing; batches of 32; Adam.",
        "The paper gives no learning rate, so all studies are tuned: the rate falls along a cosine to 0, and its first"
        " value is the best on validation images, the last sixth of the training images. The chosen rate is then used"
        " to train on all training images, with other seeds, and the test images are read once.",
        "Colours run from -1 to 1, and their standard deviation is about 0.7: they are not scaled further.",
        "The frontier is not in the paper. Where the methods train equally many parameters, the"
        " hypernetwork's total is divided differently among f or e and g or q; f and e have 3 layers there.",
        "Training takes 20 epochs on patches (quick), 30 (standard) or 200 (paper); on CIFAR10 1 or 10.",
        "q has biases, which the N_q of 4,950 in the paper does not include.",
    ),
    data=("patches", "cifar10"),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load,
)
