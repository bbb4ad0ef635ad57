"""The images: digits and two photographs, which come with scikit-learn, and data sets that it downloads from OpenML."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthyper.experiments.experiment import DatasetUnavailable
from fasthyper.experiments.files import missing_folders, remove_empty


class Splits(NamedTuple):
    """Training and test images, `(n, channels, height, width)`, uint8 as stored."""

    train: Tensor
    test: Tensor


class Labelled(NamedTuple):
    """Images and their classes."""

    images: Splits
    labels: Splits


@dataclass(frozen=True)
class Images:
    """A data set of square images.

    Attributes:
        channels: colours of a pixel.
        size: height and width.
        train: training images.
        test: test images.
        pixel_max: the value of white.
        openml: name and number of the data set at OpenML, always version 1; None if it comes with scikit-learn.
    """

    channels: int
    size: int
    train: int
    test: int
    pixel_max: int
    openml: tuple[str, int] | None = None

    @property
    def pixels(self) -> int:
        """Numbers in one image."""
        return self.channels * self.size**2


IMAGES: Mapping[str, Images] = {
    "digits": Images(channels=1, size=8, train=1500, test=297, pixel_max=16),
    "mnist": Images(channels=1, size=28, train=60_000, test=10_000, pixel_max=255, openml=("mnist_784", 554)),
    "fashion": Images(channels=1, size=28, train=60_000, test=10_000, pixel_max=255, openml=("Fashion-MNIST", 40996)),
    "cifar10": Images(channels=3, size=32, train=50_000, test=10_000, pixel_max=255, openml=("CIFAR_10", 40927)),
}

MEAN, STD = 0.1307, 0.3081
"""Of MNIST. The code of Galanti and Wolf normalises every data set by them."""


def load_images(name: str, data_home: str | os.PathLike[str] | None = None) -> Splits:
    """Load the images of a data set. The first `Images.train` are for training, as their publishers split them.

    Args:
        name: `"digits"`, `"mnist"`, `"fashion"` or `"cifar10"`.
        data_home: the folder of scikit-learn's downloads; None: its default.

    Raises:
        ValueError: an unknown name.
        DatasetUnavailable: it is not in `data_home` and cannot be downloaded. The message says what to do.

    Example:
        >>> train, test = load_images("digits")
        >>> train.shape, test.shape, train.dtype
        (torch.Size([1500, 1, 8, 8]), torch.Size([297, 1, 8, 8]), torch.uint8)
    """
    images = _images_of(name)
    values, _ = _load_stored(name, images, data_home)
    return _split_pixels(values, images)


def load_labelled(name: str, data_home: str | os.PathLike[str] | None = None) -> Labelled:
    """Load images and their classes, `(n,)`, int64 from 0 to 9. Arguments and errors are those of `load_images`.

    Example:
        >>> load_labelled("digits").labels.train[:4]
        tensor([0, 1, 2, 3])
    """
    images = _images_of(name)
    values, labels = _load_stored(name, images, data_home)
    classes = torch.as_tensor([int(label) for label in labels])
    return Labelled(_split_pixels(values, images), Splits(classes[: images.train], classes[images.train :]))


def load_patches(size: int) -> Splits:
    """Load squares, without overlap, of the two photographs that come with scikit-learn. A quarter is for testing.

    Returns:
        `(n, 3, size, size)`, uint8, in a random order that is the same at every call.

    Example:
        >>> train, test = load_patches(16)
        >>> train.shape, test.shape
        (torch.Size([1560, 3, 16, 16]), torch.Size([520, 3, 16, 16]))
    """
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).movedim(3, 1)
    squares = photographs.unfold(2, size, size).unfold(3, size, size)  # (photographs, 3, rows, columns, size, size)
    squares = squares.movedim(1, 3).flatten(0, 2).contiguous()
    squares = squares[torch.randperm(len(squares), generator=torch.Generator().manual_seed(0))]
    train = len(squares) * 3 // 4
    return Splits(squares[:train], squares[train:])


def validation_split(images: Tensor, split: str) -> Splits:
    """Cut the training images of a run into those to train on and those to choose a learning rate on.

    Args:
        images: `(n, …)`, the training images.
        split: of the run. `"validation"` keeps the last sixth for validation; with `"test"`, all are trained on.

    Returns:
        Training and validation images. The second part is empty if the split is `"test"`.

    Example:
        >>> [len(part) for part in validation_split(torch.zeros(12, 1, 2, 2), "validation")]
        [10, 2]
    """
    kept = len(images) - (len(images) // 6 if split == "validation" else 0)
    return Splits(images[:kept], images[kept:])


def _images_of(name: str) -> Images:
    if name not in IMAGES:
        raise ValueError(f"data: {name!r} is not a known data set; known are {', '.join(IMAGES)}")
    return IMAGES[name]


def _split_pixels(values: Any, images: Images) -> Splits:
    pixels = torch.as_tensor(values, dtype=torch.uint8).view(-1, images.channels, images.size, images.size)
    return Splits(pixels[: images.train], pixels[images.train :])


def _load_stored(name: str, images: Images, data_home: str | os.PathLike[str] | None) -> tuple[Any, Any]:
    """Return pixels, `(n, pixels)`, and classes, `(n,)`, as their publishers store them."""
    values, labels = _digits() if images.openml is None else _fetch(name, images, data_home)
    expected = (images.train + images.test, images.pixels)
    if values.shape != expected:
        raise DatasetUnavailable(f"data: {name} has shape {tuple(values.shape)} where {expected} was expected")
    return values, labels


def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data.astype("uint8"), digits.target


def _fetch(name: str, images: Images, data_home: str | os.PathLike[str] | None) -> tuple[Any, Any]:
    from sklearn.datasets import fetch_openml

    assert images.openml is not None
    openml, number = images.openml
    home = Path("~/scikit_learn_data" if data_home is None else data_home).expanduser()
    missing = missing_folders(home)
    # Pixels come first, the class last. Without these types, scikit-learn needs gigabytes, and fails with newer pandas
    # where classes are numbers.
    dtypes = {**dict.fromkeys(range(images.pixels), "float32"), images.pixels: "str"}
    options: dict[str, Any] = {"as_frame": False, "parser": "pandas", "read_csv_kwargs": {"dtype": dtypes}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at every attempt; one error below is enough
            fetched = fetch_openml(openml, version=1, data_home=str(home), **options)
            return fetched.data.astype("uint8"), fetched.target
    except Exception as error:  # no network, no server, a wrong file, a damaged cache and more
        # A failed download leaves the empty folders of its cache.
        remove_empty(Path(folder) for folder, _, _ in os.walk(home / "openml", topdown=False))
        remove_empty(missing)
        raise DatasetUnavailable(_download_instructions(name, openml, number, home, error)) from error


def _download_instructions(name: str, openml: str, number: int, home: Path, error: Exception) -> str:
    cache = home / "openml" / "openml.org"
    call = f"load_images({name!r}, 'DIR')"
    return (
        f"data: {name} is not in {home} and could not be downloaded from OpenML"
        f" ({type(error).__name__}: {error}).\n"
        "On a machine with a network, run\n"
        f'  python -c "from fasthyper.experiments.catalogue.data import load_images; {call}"\n'
        f"and copy DIR/openml to {home / 'openml'}. It then has these files:\n"
        f"  {cache}/api/v1/json/data/list/data_name/{openml.lower()}/limit/2/data_version/1.gz\n"
        f"  {cache}/api/v1/json/data/{number}.gz\n"
        f"  {cache}/api/v1/json/data/features/{number}.gz\n"
        f"  {cache}/api/v1/json/data/qualities/{number}.gz\n"
        f"  {cache}/data/v1/download/.../*.arff.gz (the images)\n"
        "Use --data-home to name another folder that has them. --data digits needs no network."
    )
