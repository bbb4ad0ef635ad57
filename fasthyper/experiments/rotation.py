"""Rotation prediction: by how much was this image turned?

The condition I is an image, x the same image turned by a uniform random angle, drawn anew at every access in
training and in testing; the target is the nearest of the twelve multiples of 30°.

    hypernetwork   g(x; f(I))   g: d -> 10 -> 12, every weight generated, no biases
    embedding      q(x, e(I))   q: (d + E) -> 10 -> 12, with biases; E = 10 d + 10

f and e are ReLU networks of `depth` linear layers, `width` units wide; f's last layer gives all weights of g.

Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), and the
authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.experiments.data import IMAGES, load_images
from fasthyper.experiments.experiment import (
    EMBEDDING,
    HYPERNETWORK,
    Batch,
    Claims,
    Defaults,
    Experiment,
    Run,
)
from fasthyper.nn import EmbeddingNetwork, HyperLinear, Hypernetwork

ANGLES = 12
HIDDEN = 10

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU}


@dataclass(frozen=True)
class Setting:
    """What depends on the data set: pixels run from 0 to `pixel_max`; `mean` and `std` normalise them."""

    pixel_max: int
    activation: str
    mean: float = 0.1307
    std: float = 0.3081


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image counter-clockwise about its centre, bilinearly, black coming in at the corners.

    Args:
        images: `(B, C, S, S)`, floating point.
        degrees: `(B,)`.

    Raises:
        ValueError: images that are not square, or another number of angles than images.

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
    # The grid says where each pixel of the result comes from, in coordinates whose y points down.
    maps = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def nearest_angle(degrees: Tensor) -> Tensor:
    """The number of the nearest multiple of 30°, on the circle: 350° is nearest to 0°.

    Example:
        >>> nearest_angle(torch.tensor([0.0, 14.0, 16.0, 344.0, 346.0]))
        tensor([ 0,  0,  1, 11,  0])
    """
    return (degrees / (360 / ANGLES)).round().long() % ANGLES


def draw(pixels: Tensor, run: Run, generator: torch.Generator) -> Batch:
    """Turn stored images `(B, C, S, S)` by fresh angles: x and I are `(B, d)`, the target is `(B,)`."""
    setting: Setting = run.setting
    # Drawn on the CPU whatever the device, so that the same seed gives the same angles everywhere.
    degrees = 360 * torch.rand(len(pixels), generator=generator)
    target = nearest_angle(degrees).to(pixels.device)
    images = pixels.float() / setting.pixel_max
    x = rotate(images, degrees.to(pixels.device))
    return Batch(_normalise(x, setting), _normalise(images, setting), target)


def build_hypernetwork(run: Run) -> Hypernetwork:
    """`g(x; f(I))`: f's first layers are the trunk, its last one the heads of g's two layers.

    Each head is an ordinary `nn.Linear` in torch's default initialisation, as in the authors' code, where one
    layer gives both weights: the initialisation depends on its inputs alone, so two are the same as one.
    """
    d = IMAGES[run.data].pixels
    trunk = _layers(d, run.width, run.depth - 1)
    first = HyperLinear.from_head(nn.Linear(run.width, HIDDEN * d), d, HIDDEN)
    last = HyperLinear.from_head(nn.Linear(run.width, ANGLES * HIDDEN), HIDDEN, ANGLES)
    return Hypernetwork(trunk, nn.Sequential(first, _activation(run), last))


def build_embedding(run: Run) -> EmbeddingNetwork:
    """`q(x, e(I))`: e gives E = 10 d + 10 numbers, as in the paper, and q takes them beside x."""
    d = IMAGES[run.data].pixels
    e = HIDDEN * d + HIDDEN
    embed = nn.Sequential(*_layers(d, run.width, run.depth - 1), nn.Linear(run.width, e))
    primary = nn.Sequential(nn.Linear(d + e, HIDDEN), _activation(run), nn.Linear(HIDDEN, ANGLES))
    return EmbeddingNetwork(embed, primary)


def _layers(inputs: int, width: int, layers: int) -> nn.Sequential:
    sizes = [inputs] + [width] * layers
    return nn.Sequential(*(m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())))


def _activation(run: Run) -> nn.Module:
    return _ACTIVATIONS[run.setting.activation]()


def _normalise(images: Tensor, setting: Setting) -> Tensor:
    return ((images - setting.mean) / setting.std).flatten(1)


def _wrong(y: Tensor, target: Tensor) -> Tensor:
    return (y.argmax(dim=1) != target).float()


ROTATION = Experiment(
    name="rotation",
    protocol=1,
    title="Rotation prediction",
    source=("Tomer Galanti and Lior Wolf, *On the Modularity of Hypernetworks*, NeurIPS 2020 (arXiv 2002.10006)"),
    question=(
        "A model sees an image I and the same image turned by a random angle, and names the nearest of the"
        " twelve multiples of 30°. The hypernetwork g(x; f(I)) generates all weights of a small network g"
        " from I and applies it to the turned image x; the embedding method q(x, e(I)) gives a small network"
        " q both x and an encoding of I. f and e are equally deep and wide."
    ),
    claims=Claims(
        wins="The hypernetwork wins by a wide margin",
        hypernetwork_improves="The hypernetwork improves with depth",
        embedding_flat="The embedding method does not improve with depth",
    ),
    choices=(
        "Depth counts the linear layers of f or e, the last one included, as in the paper; the authors' code"
        " adds two more.",
        "The learning rate, epochs and width for MNIST and CIFAR10 are the paper's; batch size,"
        " initialisation (torch's default), the activation of g and q, and the normalisation (0.1307, 0.3081"
        " for every data set) are those of the authors' code.",
        "Images are turned bilinearly without growing; the nearest angle is taken on the circle (350° is near"
        " 0°), as the paper says and the authors' code does not.",
        "Both methods see the same images in the same order, turned by the same angles, and start from the"
        " same hidden layers in f and e, for each seed.",
        "The digits and their budget are not in the paper: small images that need no download.",
    ),
    defaults={
        "digits": Defaults(
            depths=(2, 3, 4),
            seeds=5,
            epochs=40,
            lr=0.01,
            width=50,
            batch_size=64,
            threads=1,
            setting=Setting(pixel_max=16, activation="relu"),
        ),
        "mnist": Defaults(
            depths=(2, 3, 4, 5, 6, 7, 8, 9),
            seeds=5,
            epochs=10,
            lr=0.01,
            width=50,
            batch_size=64,
            setting=Setting(pixel_max=255, activation="relu"),
        ),
        "cifar10": Defaults(
            depths=(2, 3, 4, 5, 6, 7, 8, 9),
            seeds=5,
            epochs=10,
            lr=0.01,
            width=100,
            batch_size=64,
            setting=Setting(pixel_max=255, activation="elu"),
        ),
    },
    load=load_images,
    draw=draw,
    build={HYPERNETWORK: build_hypernetwork, EMBEDDING: build_embedding},
    loss=F.cross_entropy,
    wrong=_wrong,
    chance=1 - 1 / ANGLES,
)
