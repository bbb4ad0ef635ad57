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

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.catalogue.data import IMAGES, MEAN, STD, Splits, load_images, validation_split
from fasthyper.experiments.catalogue.frontiers import SIZES, about_primaries, frontier, learns, optimizers, wins
from fasthyper.experiments.claims import Flat, Improves
from fasthyper.experiments.experiment import (
    Axis,
    Batch,
    Examples,
    Experiment,
    Measure,
    Run,
    Study,
    Task,
)
from fasthyper.experiments.methods import (
    BIASES,
    EMBEDDING,
    EQUAL_FLOPS,
    FILM,
    HYPERNETWORK,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

ANGLES = 12
HIDDEN = 10
BOTH = (HYPERNETWORK, EMBEDDING)
TURNS: Mapping[str, int] = {"digits": 8, "mnist": 1, "cifar10": 1}
"""Angles for each image in testing and validation: there are few digits."""
STRUCTURE = "x is I, turned by the angle to predict"
GUESSING = ("guessing", "guessing")


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


def examples(pixels: Tensor, pixel_max: int, turns: int = 1) -> Examples:
    """Return examples of images `(n, C, S, S)`, each turned `turns` times, by new angles at every access.

    x and I are `(B, d)`, targets `(B,)`.
    """

    def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
        # Drawn on the CPU on any device, so that the angles depend on the seed only.
        degrees = 360 * torch.rand(len(chosen), generator=generator)
        images = pixels[chosen.to(pixels.device) % len(pixels)].float() / pixel_max
        x = rotate(images, degrees.to(pixels.device))
        return Batch(_normalise(x), _normalise(images), nearest_angle(degrees).to(pixels.device))

    return Examples(turns * len(pixels), draw)


def task(run: Run, dataset: Splits) -> Task:
    """Return the task of turned images.

    Runs that choose a learning rate train without the validation images; all others train on all training images.
    """
    pixel_max = IMAGES[run.data].pixel_max
    train, validation, test = (
        part.to(run.device) for part in (*validation_split(dataset.train, run.split), dataset.test)
    )
    return Task(
        examples(train, pixel_max),
        examples(test, pixel_max, TURNS[run.data]),
        F.cross_entropy,
        _measure,
        levels={"guessing": 1 - 1 / ANGLES},
        validation=examples(validation, pixel_max, TURNS[run.data]) if len(validation) else None,
    )


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
    """Return a frontier at tuned rates, a study over depth at the paper's rate, and further ones unless quick.

    The further ones are over the optimizer, the dimension of the embedding and the learning rate.
    """
    first = (_frontier(preset, data), _depth(preset, data))
    if preset == "quick":
        return first
    return (*first, *optimizers(first[:1], preset), _embedding(preset, data), _rate(preset, data))


def _frontier(preset: str, data: str) -> Study:
    quick = preset == "quick"
    return frontier(
        title="Over all trained parameters, at tuned learning rates",
        structure=STRUCTURE,
        level=GUESSING,
        values=SIZES[:2] if quick else SIZES,
        setting=_tuned(preset, data),
        seeds=5 if quick else 10,
        measure=_ERROR,
        levels=_LEVELS,
        claims=(about_primaries(GUESSING),),
    )


def _depth(preset: str, data: str) -> Study:
    trends = (
        Improves(text="The hypernetwork improves with depth", premises=(learns(GUESSING, HYPERNETWORK),)),
        Flat(
            text="The embedding method does not improve with depth",
            premises=(learns(GUESSING, EMBEDDING),),
        ),
    )
    return Study(
        name="depth",
        title="Over the depth of f and e, at the paper's fixed learning rate and sizes",
        axis=Axis("depth", "depth of f and e (linear layers)"),
        values={"quick": (2, 4), "standard": (2, 4, 6), "paper": tuple(range(2, 10))}[preset],
        methods=(HYPERNETWORK, EMBEDDING, EQUAL_FLOPS, FILM, BIASES) if preset == "paper" else BOTH,
        setting=_fixed(preset, data, long=True),
        seeds=_SEEDS[preset],
        measure=_ERROR,
        levels=_LEVELS,
        claims=(
            wins(
                GUESSING,
                text="At the paper's sizes (N_q >= N_g), the hypernetwork wins by a wide margin, 10 points",
                margin=0.1,
            ),
            *(() if preset == "quick" else trends),
        ),
        note="" if data != "digits" else _TOO_SHORT if preset == "quick" else _LONG_ENOUGH,
    )


def _embedding(preset: str, data: str) -> Study:
    unit = 10 * IMAGES[data].pixels if data == "digits" else 10_000
    return Study(
        name="embedding",
        title="Over the dimension of the embedding, at the paper's rate: one class of functions",
        axis=Axis("embedding", "E, numbers in the embedding", log=True),
        values=tuple(unit * i for i in (range(1, 9) if preset == "paper" else (1, 4))),
        methods=BOTH,
        setting=_fixed(preset, data),
        seeds=_SEEDS[preset],
        measure=_ERROR,
        levels=_LEVELS,
        claims=(
            wins(GUESSING, text="The hypernetwork wins at the paper's sizes, whatever the dimension of the embedding"),
            Flat(
                text="The embedding method does not improve with the dimension of the embedding (true by construction)",
                premises=(learns(GUESSING, EMBEDDING),),
            ),
        ),
        note=(
            "e ends and q begins with a linear layer, so q's 10 hidden units see at most 10 numbers of e: every E of 10"
            " or more gives the same functions, and E changes training only. The hypernetwork does not depend on E: its"
            " line shows the same runs at every value."
        ),
    )


def _rate(preset: str, data: str) -> Study:
    return Study(
        name="rate",
        title="Over the learning rate",
        axis=Axis("lr", "learning rate", log=True),
        values=tuple(1e-4 * 10 ** (j / 4) for j in (range(2, 10) if preset == "paper" else (6, 8, 9))),
        methods=BOTH,
        setting=_fixed(preset, data),
        seeds=_SEEDS[preset],
        measure=_ERROR,
        levels=_LEVELS,
        claims=(
            wins(
                GUESSING,
                text="At the paper's sizes, the hypernetwork wins at learning rates that are not trivially small",
                least=1e-3,
            ),
        ),
        note="All rates have the same number of epochs, so the error at a small rate is that of a short training.",
    )


def _fixed(preset: str, data: str, long: bool = False) -> RotationSetting:
    """Return the setting at the paper's rate; `long` on digits, where errors fall for hundreds of epochs."""
    setting = _PAPERS[data]
    if data != "digits":
        return setting
    return replace(setting, epochs=_LONG if preset == "paper" or (long and preset == "standard") else 60)


def _tuned(preset: str, data: str) -> RotationSetting:
    """Return the setting of tuned studies. Its learning rate stands for the one that is chosen."""
    setting = replace(_PAPERS[data], depth=3, optimizer="adam", lr=3e-3, schedule="cosine")
    return replace(setting, epochs={"quick": 50, "standard": 60, "paper": 200}[preset]) if data == "digits" else setting


_PAPERS: Mapping[str, RotationSetting] = {
    "digits": RotationSetting(epochs=60, lr=0.01, batch_size=64, depth=4, width=50, embedding=650, activation="relu"),
    "mnist": RotationSetting(epochs=10, lr=0.01, batch_size=64, depth=4, width=50, embedding=7850, activation="relu"),
    "cifar10": RotationSetting(
        epochs=10, lr=0.01, batch_size=64, depth=4, width=100, embedding=30_730, activation="elu"
    ),
}
_LONG = 400
_SEEDS = {"quick": 5, "standard": 10, "paper": 100}
_ERROR = Measure("error", "test error", percent=True)
_LEVELS = (GUESSING,)
_LONG_ENOUGH = (
    "On digits, errors at this rate fall for hundreds of epochs, and fall later in deeper networks: runs have 400."
)
_TOO_SHORT = (
    "After 60 epochs at this rate, errors on digits still fall, and fall later in deeper networks. So this preset says"
    " nothing about depth; the others train for 400 epochs."
)


def _normalise(images: Tensor) -> Tensor:
    return ((images - MEAN) / STD).flatten(1)


def _measure(y: Tensor, target: Tensor) -> Mapping[str, Tensor]:
    return {"error": (y.argmax(dim=1) != target).float()}


ROTATION = Experiment(
    name="rotation",
    protocol=3,
    title="Rotation prediction",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006)",
    question=(
        "A model sees an image I and the same image turned by a random angle, and predicts the nearest of the"
        " twelve multiples of 30°. The hypernetwork g(x; f(I)) generates all weights of a small network g"
        " from I and applies it to the turned image x; the embedding method q(x, e(I)) applies a small"
        " network q to x and an encoding of I. The paper compares them with equally deep and wide f and e, where"
        " N_q is about ten times N_g. The first study asks what holds where all methods train equally many parameters."
    ),
    choices=(
        "Depth counts the linear layers of f or e, including the last one, as in the paper. The code of the"
        " authors has two more.",
        "Fixed by the paper: the learning rate of 0.01, SGD, epochs and width for MNIST and CIFAR10. Fixed by the"
        " code of the authors: batch size, initialisation (torch's default), the activation of g and q, and the"
        " normalisation (0.1307, 0.3081 for every data set). The default learning rate of that code is 0.001, and its"
        " f and e have 100 units on every data set.",
        "Images are turned with bilinear interpolation and keep their size; the code of the authors takes the nearest"
        " pixel. The nearest angle is found on the circle (350° is near 0°), as in the paper, unlike that code.",
        "In the study over the learning rate, e has as many layers as f, and E = 10 d + 10. In the code of the authors,"
        " e has one layer less there, and E = 50,000.",
        "The frontier and the optimizer study are not in the paper. f and e have 3 layers, and the learning"
        " rate follows a cosine to 0. Its first value is tuned for each method, size and optimizer: the best of six on"
        " validation images, the last sixth of the training images. The chosen rate is then used to train on all"
        " training images, with other seeds, and the test images are read once. All other studies have the paper's"
        " rate, or rates that they vary.",
        "Where the methods train equally many parameters, the hypernetwork's total is divided differently among f or e"
        " and g or q.",
        "For each seed, all methods see the same images in the same order, turned by the same angles. The two methods"
        " of the paper start from the same hidden layers in f and e.",
        "The digits, small images that need no download, are not in the paper. Each test digit is turned 8 times, since"
        " there are few. At the paper's rate, training takes 60 epochs, except over depth (400; 60 if quick) and in"
        " the paper preset (400); at tuned rates 50 (quick), 60 (standard) or 200 (paper).",
        "The paper gives no number for its wide margin: 10 points are ours, as is the limit of 0.001 below which"
        " a learning rate counts as trivially small.",
    ),
    data=("digits", "mnist", "cifar10"),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load_images,
)
