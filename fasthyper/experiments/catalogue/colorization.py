"""Colorization: which colour has this pixel of a grey image?

The condition I is a grey image, x the position of one of its pixels, and the target the pixel's red, green and
blue, from -1 to 1. Many pixels of an image are asked for at once: N points of one instance.

    hypernetwork   g(x; f(I))   g: 42 -> 10 -> 3, ELU, every weight generated, no biases (N_g = 450)
    embedding      q(x, e(I))   q: (42 + 450) -> 10 -> 3, ELU

A position (i, j) is given as i, j and, for k = 0 … 9, i^k + j, j^k + i, i^k - j, j^k - i.

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
    """And how many pixels of an image are asked for at a time."""

    points: int
    """N."""


def position_features(size: int) -> Tensor:
    """What x says of each pixel of a square image, row by row: `(size², 42)`.

    Example:
        >>> position_features(2)[1, :6]  # the first row, the second column; then k = 0
        tensor([-1.,  1.,  2.,  0.,  0.,  2.])
    """
    line = torch.linspace(-1, 1, size)
    i, j = (grid.flatten() for grid in torch.meshgrid(line, line, indexing="ij"))
    powers = (f for k in range(POWERS) for f in (i**k + j, j**k + i, i**k - j, j**k - i))
    return torch.stack([i, j, *powers], dim=1)


def grey(images: Tensor) -> Tensor:
    """The brightness of colour images, `(n, 3, S, S)` to `(n, S, S)`, by ITU-R BT.601."""
    red, green, blue = images.unbind(dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def load(data: str, data_home: Any) -> Splits:
    """Colour images for training and testing."""
    return load_patches(SIZES[data]) if data == "patches" else load_images(data, data_home)


def examples(pixels: Tensor, points: int) -> Examples:
    """Stored images `(n, 3, S, S)`: x is `(B, N, 42)`, I `(B, S²)`, the target `(B, N, 3)`; pixels drawn anew."""
    size = pixels.shape[-1]
    features = position_features(size).to(pixels.device)

    def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
        at = torch.randint(size**2, (len(chosen), points), generator=generator).to(pixels.device)
        images = pixels[chosen.to(pixels.device)].float() / 127.5 - 1
        colours = images.flatten(2).transpose(1, 2)
        return Batch(features[at], grey(images).flatten(1), colours.gather(1, at[:, :, None].expand(-1, -1, 3)))

    return Examples(len(pixels), draw)


def task(run: Run, source: Splits) -> Task:
    """The images of a data set, coloured; beside it what is reached without looking, or by copying the grey."""
    setting = run.setting
    assert isinstance(setting, ColorizationSetting)
    train, test = (split.to(run.device) for split in source)
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
    """g, q: 42 -> 10 -> 3; f, e: `depth` layers."""
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
    """Over depth."""
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
                Wins(text="It wins at all", whose=ASKED),
                Wins(text="It does better than copying the grey value", over=f"{HYPERNETWORK}:copied", whose=ASKED),
                Wins(text="So does the embedding method", line=EMBEDDING, over=f"{EMBEDDING}:copied", whose=ASKED),
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
        "A model sees a grey image I and the position x of a pixel, and names the pixel's colour. The hypernetwork"
        " makes of each image a small network from positions to colours; the embedding method has one network for all"
        " images, which is given 450 numbers about the image beside the position."
    ),
    choices=(
        "The patches are 16 × 16 squares without overlap of the two photographs that come with scikit-learn, three"
        " quarters for training, drawn by lot once and for all, so that those for testing have neighbours among them:"
        " not in the paper, and no download.",
        "Positions run from -1 to 1 before they are raised to powers; 64 pixels of an image are drawn anew at every"
        " access, in training and testing; Adam at 0.001, batches of 32 images: all open in the paper.",
        "q has biases, which its N_q of 4,950 leaves out.",
    ),
    data=("patches", "cifar10"),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load,
)
