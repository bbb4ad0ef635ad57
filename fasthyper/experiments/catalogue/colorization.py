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

from fasthyper.experiments.catalogue.data import Splits, load_images, load_patches
from fasthyper.experiments.claims import AGAINST_OTHERS, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Batch, Examples, Experiment, Measure, Run, Study, Task
from fasthyper.experiments.methods import (
    ALL,
    EMBEDDING,
    HYPERNETWORK,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

POWERS = 10
FEATURES = 2 + 4 * POWERS
SIZES: Mapping[str, int] = {"patches": 16, "cifar10": 32}


@dataclass(frozen=True, kw_only=True)
class ColorizationSetting(ContextSetting):
    """A setting with `points`: N, the pixels of an image in a batch."""

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
    return load_patches(SIZES[data]) if data == "patches" else load_images(data, data_home)


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
    """Return the task, with the errors of two predictors as levels: the grey value as colour, and the mean colour."""
    setting = run.setting
    assert isinstance(setting, ColorizationSetting)
    train, test = (split.to(run.device) for split in dataset)
    colours, mean = (split.float() / 127.5 - 1 for split in (test, train))
    copied = (colours - grey(colours)[:, None]).square().mean()
    constant = (colours - mean.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    return Task(
        examples(train, setting.points),
        examples(test, setting.points),
        F.mse_loss,
        lambda y, target: {"mse": (y - target).square().mean(dim=(1, 2))},
        levels={"copied": copied.item(), "constant": constant.item()},
    )


def architecture(run: Run) -> Architecture:
    """Return the sizes: g, q: 42 -> 10 -> 3; f, e: `depth` layers."""
    setting = run.setting
    assert isinstance(setting, ColorizationSetting)
    return Architecture(
        cond=SIZES[run.data] ** 2,
        x=FEATURES,
        out=3,
        context=setting.context,
        hidden=(10,),
        embedding=setting.embedding,
        activation="elu",
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return one study, over depth."""
    quick = preset == "quick"
    epochs = {"patches": 35 if quick else 200, "cifar10": 1 if quick else 10}[data]
    return (
        Study(
            name="depth",
            title="Over the depth of f and e",
            axis=Axis("depth", "depth of f and e (linear layers)"),
            values=(2, 4) if quick else tuple(range(2, 8)),
            methods=ALL,
            setting=ColorizationSetting(
                epochs=epochs, lr=1e-3, batch_size=32, optimizer="adam", depth=2, width=100, embedding=450, points=64
            ),
            seeds=4 if quick else 30,
            measure=Measure("mse", "mean squared error (colours from -1 to 1)", log=True),
            levels=(("copied", "the grey value as colour"), ("constant", "the mean colour")),
            claims=(
                Wins(text="The hypernetwork wins by a large margin (a factor of 1.5 at least)", margin=1.5),
                Wins(text="The hypernetwork wins", whose=ASKED),
                Wins(
                    text="The hypernetwork does better than copying the grey value",
                    over=f"{HYPERNETWORK}:copied",
                    whose=ASKED,
                ),
                Wins(
                    text="The embedding method does better than copying the grey value",
                    line=EMBEDDING,
                    over=f"{EMBEDDING}:copied",
                    whose=ASKED,
                ),
                *AGAINST_OTHERS,
            ),
        ),
    )


COLORIZATION = Experiment(
    name="colorization",
    protocol=1,
    title="Colorization",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006)",
    question=(
        "A model sees a grey image I and the position x of a pixel, and predicts the colour of the pixel. The"
        " hypernetwork generates for each image a small network from positions to colours; the embedding method has one"
        " network for all images, which gets 450 numbers about the image in addition to the position."
    ),
    choices=(
        "The patches are 16 × 16 squares, without overlap, of the two photographs that come with scikit-learn. They are"
        " not in the paper and need no download. Three quarters, chosen at random once, are for training: patches for"
        " testing have neighbours among them.",
        "The paper leaves open: positions run from -1 to 1 before they are raised to powers; 64 pixels of an image are"
        " drawn at every access, in training and testing; Adam at 0.001, batches of 32 images.",
        "q has biases, which the N_q of 4,950 in the paper does not include.",
    ),
    data=("patches", "cifar10"),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load,
)
