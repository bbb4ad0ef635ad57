from __future__ import annotations

import json

import pytest
import torch

from fasthyper.experiments import ROTATION, Comparison
from fasthyper.experiments.experiment import parse_depths, resolve_device


@pytest.mark.parametrize(
    ("text", "depths"),
    [("3", (3,)), ("2-9", tuple(range(2, 10))), ("2,4,8", (2, 4, 8)), (" 2 - 3 , 7", (2, 3, 7))],
)
def test_depths(text, depths):
    assert parse_depths(text) == depths


@pytest.mark.parametrize(
    "text", ["", "9-2", "1", "0-3", "-3", "2.5", "a", "2,", "2--4", "2-4-6", "1e3", "٣", "99999999"]
)
def test_bad_depths(text):
    with pytest.raises(ValueError, match="depths: "):
        Comparison.of(ROTATION, "digits", depths=text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", ()),
        ("depths", (1, 2)),
        ("depths", (2, 2)),
        ("depths", (2.0,)),
        ("seeds", 0),
        ("seeds", True),
        ("epochs", 0),
        ("epochs", 1.5),
        ("width", -1),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "fast"),
        ("device", "tpu"),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Comparison.of(ROTATION, "digits", **{name: value})


def test_an_unknown_data_set():
    with pytest.raises(ValueError, match=r"^data: 'svhn'"):
        Comparison.of(ROTATION, "svhn")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="device: cuda was asked for"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    assert resolve_device("cpu") == "cpu"


def test_the_runs_of_a_comparison():
    runs = Comparison.of(ROTATION, "digits", depths="3,2", seeds=2, lr=1).runs()
    assert len(set(runs)) == len(runs) == 8
    assert [(run.seed, run.depth) for run in runs] == [(s, d) for s in (0, 1) for d in (2, 3) for _ in range(2)]
    config = json.loads(json.dumps(runs[0].config()))
    assert config["setting"]["activation"] == "relu"
    assert config["lr"] == 1.0
    assert {
        "experiment",
        "protocol",
        "data",
        "method",
        "depth",
        "seed",
        "epochs",
        "width",
        "batch_size",
    } < set(config)
