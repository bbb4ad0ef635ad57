from __future__ import annotations

import gzip
import hashlib
import http.client
import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch

from fasthyper.experiments.catalogue import data
from fasthyper.experiments.catalogue.data import (
    IMAGES,
    DatasetUnavailable,
    Images,
    load_images,
    load_labelled,
    load_patches,
)


def test_digits_are_those_of_scikit_learn():
    train, test = load_images("digits")
    expected = sklearn.datasets.load_digits().images
    assert train.shape == (1500, 1, 8, 8)
    assert test.shape == (297, 1, 8, 8)
    np.testing.assert_array_equal(torch.cat([train, test])[:, 0].numpy(), expected)


def test_labels_go_with_the_images():
    images, (train, test) = load_labelled("digits")
    assert all(torch.equal(a, b) for a, b in zip(images, load_images("digits"), strict=True))
    assert train.dtype == torch.int64
    np.testing.assert_array_equal(torch.cat([train, test]).numpy(), sklearn.datasets.load_digits().target)


def test_patches_are_all_squares_of_the_photographs_each_once():
    train, test = load_patches(16)
    assert len(train) == 3 * len(test)
    found = torch.cat([train, test]).movedim(1, 3).numpy()
    squares = [
        photograph[row : row + 16, column : column + 16].tobytes()
        for photograph in sklearn.datasets.load_sample_images().images
        for row in range(0, photograph.shape[0] - 15, 16)
        for column in range(0, photograph.shape[1] - 15, 16)
    ]
    assert sorted(np.ascontiguousarray(patch).tobytes() for patch in found) == sorted(squares)
    assert all(torch.equal(a, b) for a, b in zip(load_patches(16), (train, test), strict=True))
    assert train.dtype == torch.uint8


@pytest.mark.parametrize(("name", "pixels"), [("digits", 64), ("mnist", 784), ("cifar10", 3072)])
def test_sizes_are_those_of_the_paper(name, pixels):
    assert IMAGES[name].pixels == pixels


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"data: 'imagenet' .* digits, mnist, .*cifar10"):
        load_images("imagenet")


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route"),
        TimeoutError("slow"),
        http.client.IncompleteRead(b""),
        ValueError("md5"),
        KeyError("url"),
    ],
)
def test_without_a_network_the_error_says_what_to_put_where(monkeypatch, tmp_path, error):
    home = tmp_path / "deep" / "home"

    def fetch(name, data_home, **options):
        (Path(data_home) / "openml" / "openml.org" / "api").mkdir(parents=True)
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(DatasetUnavailable) as caught:
        load_images("cifar10", home)
    message = str(caught.value)
    assert f"cifar10 is not in {home}" in message
    assert f"{home}/openml/openml.org/api/v1/json/data/list/data_name/cifar_10/limit/2/data_version/1.gz" in message
    assert "load_images('cifar10', 'DIR')" in message
    assert list(tmp_path.iterdir()) == []


def test_a_failed_fetch_leaves_what_was_in_the_cache(monkeypatch, tmp_path):
    kept = tmp_path / "openml" / "openml.org" / "kept.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")

    def fetch(name, **options):
        raise URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(DatasetUnavailable):
        load_images("mnist", tmp_path)
    assert kept.exists()


def test_the_files_that_the_error_names_are_all_that_is_needed(monkeypatch, tmp_path):
    """Lay out just those files, with three images for 70,000, and load them with no network."""
    monkeypatch.setitem(
        data.IMAGES, "mnist", Images(channels=1, size=28, train=2, test=1, pixel_max=255, openml=("mnist_784", 554))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (3, 784))
    names = [f"pixel{i}" for i in range(784)]
    arff = "@RELATION mnist\n" + "".join(f"@ATTRIBUTE {name} INTEGER\n" for name in names)
    arff += "@ATTRIBUTE class {0,1,2}\n@DATA\n"
    arff += "".join(",".join(map(str, [*row, label])) + "\n" for label, row in enumerate(pixels))
    features = [
        {"index": str(i), "name": name, "data_type": "numeric", "is_target": "false"} for i, name in enumerate(names)
    ]
    features.append({"index": "784", "name": "class", "data_type": "nominal", "is_target": "true"})
    for feature in features:
        feature.update(is_ignore="false", is_row_identifier="false", number_of_missing_values="0")
    description = {
        "id": "554",
        "name": "mnist_784",
        "version": "1",
        "format": "ARFF",
        "status": "active",
        "description": "",
        "url": "https://www.openml.org/data/v1/download/52667/mnist_784.arff",
        "md5_checksum": hashlib.md5(arff.encode()).hexdigest(),
    }
    files = {
        "api/v1/json/data/list/data_name/mnist_784/limit/2/data_version/1": {
            "data": {"dataset": [{"did": 554, "name": "mnist_784", "version": 1, "status": "active"}]}
        },
        "api/v1/json/data/554": {"data_set_description": description},
        "api/v1/json/data/features/554": {"data_features": {"feature": features}},
        "api/v1/json/data/qualities/554": {
            "data_qualities": {"quality": [{"name": "NumberOfInstances", "value": "3"}]}
        },
        "data/v1/download/52667/mnist_784.arff": arff,
    }
    for name, content in files.items():
        path = tmp_path / "openml" / "openml.org" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(gzip.compress(text.encode()))
    train, test = load_images("mnist", tmp_path)
    assert train.shape == (2, 1, 28, 28)
    np.testing.assert_array_equal(torch.cat([train, test]).flatten(1).numpy(), pixels)


def test_other_images_than_expected_are_refused(monkeypatch, tmp_path):
    class Bunch:
        data = np.zeros((20, 784))
        target = np.zeros(20)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda name, **options: Bunch)
    with pytest.raises(DatasetUnavailable, match=r"\(20, 784\) where \(70000, 784\)"):
        load_images("mnist", tmp_path)
