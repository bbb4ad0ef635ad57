from __future__ import annotations

import torch

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.catalogue.infinite_width import measure
from fasthyper.experiments.methods import WIDE_BOTH, WIDE_F
from fasthyper.experiments.training import train

INFINITE_WIDTH = EXPERIMENTS["infinite_width"]


def test_the_measures():
    trained = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    initial = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    linear = torch.tensor([[3.0, 1.0], [5.0, 4.0]])
    found = measure(torch.stack([trained, initial, linear], dim=1), torch.tensor([1, 1]))
    assert found["departure"].tolist() == [0.5, 2.5]
    assert found["error"].tolist() == [1.0, 0.0]
    assert found["linear_error"].tolist() == [1.0, 1.0]


def test_an_input_that_neither_moves_is_not_apart():
    dead = torch.zeros(1, 3, 2)
    assert measure(dead, torch.tensor([1]))["departure"].tolist() == [0.0]


def test_training_is_nearly_linear_only_where_g_is_wide_too():
    comparison = Comparison.of(INFINITE_WIDTH, preset="standard", studies=["linear"], seeds=1, device="cpu")
    (study,) = comparison.studies
    dataset = INFINITE_WIDTH.load("digits", None)
    departures = {
        (method, width): train(INFINITE_WIDTH, comparison.run(study, width, method, 0), dataset).measures["departure"]
        for method in (WIDE_F, WIDE_BOTH)
        for width in (16, 128)
    }
    assert departures[WIDE_BOTH, 128] < 0.4 * departures[WIDE_BOTH, 16]
    assert departures[WIDE_BOTH, 128] < 0.8 * departures[WIDE_F, 128]
    assert departures[WIDE_F, 128] > 0.4 * departures[WIDE_F, 16]
