"""Rotation prediction: by how much was this image turned?

The condition I is an image, x is the same image turned by a uniform random angle, a new one at every access in training
and testing. The target is the nearest of the twelve multiples of 30°.

    hypernetwork   g(x; f(I))   g: d -> 10 -> 12, every weight generated, no biases
    embedding      q(x, e(I))   q: (d + E) -> 10 -> 12, with biases; E = 10 d + 10

f and e are ReLU networks of `depth` linear layers, `width` units wide; the last layer of f returns all weights of g.

Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), and the
authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.catalogue.data import IMAGES, load_images
from fasthyper.experiments.claims import AGAINST_OTHERS, Flat, Improves, Wins
from fasthyper.experiments.experiment import Axis, Batch, Examples, Experiment, Measure, Run, Study, Task
from fasthyper.experiments.methods import (
    ALL,
    EMBEDDING,
    HYPERNETWORK,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

ANGLES = 12
HIDDEN = 10
MEAN, STD = 0.1307, 0.3081  # of MNIST; the authors' code normalises every data set by them
BOTH = (HYPERNETWORK, EMBEDDING)


@dataclass(frozen=True, kw_only=True)
class RotationSetting(ContextSetting):
    """A setting with the `activation` of g and q."""

    activation: str


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image counter-clockwise about its centre, with bilinear interpolation and black outside of it.

    Args:
        images: `(B, C, S, S)`, floating point.
        degrees: `(B,)`.

    Raises:
        ValueError: the images are not square, or the number of angles is not that of the images.

    Example:
        >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> rotate(image, torch.tensor([90.0])).round(decimals=4)
        tensor([[[[2., 4.],
                  [1., 3.]]]])
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected (B, C, S, S), got {tuple(images.shape)}")
    if degrees.shape != images.shape[:1]:
        raise ValueError(f"degrees: expected one for each of {len(images)} images, got {tuple(degrees.shape)}")
    angle = torch.deg2rad(degrees.to(images.dtype))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid has the source of each pixel of the result; its y axis points down.
    maps = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def nearest_angle(degrees: Tensor) -> Tensor:
    """Return the number of the nearest multiple of 30° on the circle: 350° is nearest to 0°.

    Example:
        >>> nearest_angle(torch.tensor([0.0, 14.0, 16.0, 344.0, 346.0]))
        tensor([ 0,  0,  1, 11,  0])
    """
    return (degrees / (360 / ANGLES)).round().long() % ANGLES


def examples(pixels: Tensor, pixel_max: int) -> Examples:
    """Return examples of images `(n, C, S, S)` and new angles at every access: x and I are `(B, d)`, targets `(B,)`."""

    def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
        # Drawn on the CPU on any device, so that the angles depend on the seed only.
        degrees = 360 * torch.rand(len(chosen), generator=generator)
        images = pixels[chosen.to(pixels.device)].float() / pixel_max
        x = rotate(images, degrees.to(pixels.device))
        return Batch(_normalise(x), _normalise(images), nearest_angle(degrees).to(pixels.device))

    return Examples(len(pixels), draw)


def task(run: Run, dataset: Any) -> Task:
    """Return the task of turned images."""
    train, test = (examples(split.to(run.device), IMAGES[run.data].pixel_max) for split in dataset)
    return Task(train, test, F.cross_entropy, _measure, levels={"guessing": 1 - 1 / ANGLES})


def architecture(run: Run) -> Architecture:
    """Return the sizes: g, q: d -> 10 -> 12; f, e: `depth` layers."""
    setting, d = run.setting, IMAGES[run.data].pixels
    assert isinstance(setting, RotationSetting)
    return Architecture(
        cond=d,
        x=d,
        out=ANGLES,
        context=setting.context,
        hidden=(HIDDEN,),
        embedding=setting.embedding,
        activation=setting.activation,
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return studies over depth, over the dimension of the embedding, and over the learning rate."""
    d, quick = IMAGES[data].pixels, preset == "quick"
    base = _BASES[data]
    if data == "digits" and not quick:
        base = replace(base, epochs=60)
    error = Measure("error", "test error", percent=True)
    guessing = (("guessing", "guessing"),)
    unit = 10 * d if data == "digits" else 10_000
    seeds = {"digits": 5, "mnist": 3, "cifar10": 3}[data] if quick else 100
    return (
        Study(
            name="depth",
            title="Over the depth of f and e",
            axis=Axis("depth", "depth of f and e (linear layers)"),
            values=(2, 3, 4) if quick else tuple(range(2, 10)),
            methods=ALL,
            setting=base,
            seeds=seeds,
            measure=error,
            levels=guessing,
            claims=(
                Wins(text="The hypernetwork wins by a wide margin (10 points at least)", margin=0.1),
                Improves(text="The hypernetwork improves with depth"),
                Flat(text="The embedding method does not improve with depth"),
                *AGAINST_OTHERS,
            ),
        ),
        Study(
            name="embedding",
            title="Over the dimension of the embedding",
            axis=Axis("embedding", "E, numbers in the embedding", log=True),
            values=tuple(unit * i for i in ((1, 4) if quick else range(1, 9))),
            methods=BOTH,
            setting=replace(base, depth=4),
            seeds=seeds,
            measure=error,
            levels=guessing,
            claims=(
                Wins(text="The hypernetwork wins whatever the dimension of the embedding"),
                Flat(text="The embedding method does not improve with the dimension of the embedding"),
            ),
            note="The hypernetwork does not depend on E: its line shows the same runs at every value.",
        ),
        Study(
            name="rate",
            title="Over the learning rate",
            axis=Axis("lr", "learning rate", log=True),
            values=tuple(1e-4 * 10 ** (j / 4) for j in ((6, 8, 9) if quick else range(2, 10))),
            methods=BOTH,
            setting=replace(base, depth=4),
            seeds=seeds,
            measure=error,
            levels=guessing,
            claims=(Wins(text="The hypernetwork wins at every learning rate that is not trivially small", least=1e-3),),
        ),
    )


_BASES: Mapping[str, RotationSetting] = {
    "digits": RotationSetting(epochs=30, lr=0.01, batch_size=64, depth=4, width=50, embedding=650, activation="relu"),
    "mnist": RotationSetting(epochs=10, lr=0.01, batch_size=64, depth=4, width=50, embedding=7850, activation="relu"),
    "cifar10": RotationSetting(
        epochs=10, lr=0.01, batch_size=64, depth=4, width=100, embedding=30_730, activation="elu"
    ),
}


def _normalise(images: Tensor) -> Tensor:
    return ((images - MEAN) / STD).flatten(1)


def _measure(y: Tensor, target: Tensor) -> Mapping[str, Tensor]:
    return {"error": (y.argmax(dim=1) != target).float()}


ROTATION = Experiment(
    name="rotation",
    protocol=2,
    title="Rotation prediction",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006)",
    question=(
        "A model sees an image I and the same image turned by a random angle, and predicts the nearest of the"
        " twelve multiples of 30°. The hypernetwork g(x; f(I)) generates all weights of a small network g"
        " from I and applies it to the turned image x; the embedding method q(x, e(I)) applies a small"
        " network q to x and an encoding of I. f and e are equally deep and wide."
    ),
    choices=(
        "Depth counts the linear layers of f or e, including the last one, as in the paper. The code of the"
        " authors has two more.",
        "The learning rate, epochs and width for MNIST and CIFAR10 are the paper's; batch size,"
        " initialisation (torch's default), the activation of g and q, and the normalisation (0.1307, 0.3081"
        " for every data set) are those of the code of the authors.",
        "Images are turned with bilinear interpolation and keep their size. The nearest angle is taken on the circle"
        " (350° is near 0°), as in the paper, unlike the code of the authors.",
        "For each seed, all methods see the same images in the same order, turned by the same angles. The two methods"
        " of the paper start from the same hidden layers in f and e.",
        "The digits, small images that need no download, and their budget (30 epochs in the quick preset, otherwise 60)"
        " are not in the paper. Learning rates below 0.001 count as trivially small.",
    ),
    data=("digits", "mnist", "cifar10"),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load_images,
)
