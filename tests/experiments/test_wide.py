from __future__ import annotations

import math

import pytest
import torch

from fasthyper.experiments.methods import METHODS, WIDE_BOTH, WIDE_F, Architecture, counts
from fasthyper.experiments.wide import WideHypernetwork

B = 6


def model_of(width=8, hidden=5, seed=0):
    torch.manual_seed(seed)
    return WideHypernetwork(cond=7, x=3, out=2, context=(width, width), hidden=hidden).double()


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, generator=generator, dtype=torch.float64) for n in (3, 7))


def moved(model, by, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.weights:
            weight += by * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def test_f_generates_the_weights_of_g():
    model, (x, cond) = model_of(), inputs()
    y = model(x, cond)
    one, two, first, last = model.weights
    for b in range(B):
        z = math.sqrt(2) * torch.relu(one @ cond[b] / math.sqrt(7))
        z = math.sqrt(2) * torch.relu(two @ z / math.sqrt(8))
        w1, w2 = (first @ z / math.sqrt(8)).view(5, 3), (last @ z / math.sqrt(8)).view(2, 5)
        expected = w2 @ (math.sqrt(2) * torch.relu(w1 @ x[b] / math.sqrt(3))) / math.sqrt(5)
        torch.testing.assert_close(y[b], expected)


def test_before_training_the_outputs_are_those_of_the_start_and_of_the_linearisation():
    model, (x, cond) = model_of(), inputs()
    y = model(x, cond)
    with torch.no_grad():
        for found in model.eval()(x, cond).unbind(dim=1):
            torch.testing.assert_close(found, y)


def test_the_linearisation_is_the_first_term_of_the_change():
    x, cond = inputs()
    apart = []
    for by in (1e-3, 1e-4):
        trained, initial, linear = moved(model_of(), by)(x, cond).unbind(dim=1)
        torch.testing.assert_close(initial, model_of()(x, cond))
        apart.append(((trained - linear).norm() / (trained - initial).norm()).item())
    assert apart[0] < 0.02
    assert apart[0] / apart[1] == pytest.approx(10, rel=0.2)  # of second order


def test_the_start_is_kept_with_the_weights():
    x, cond = inputs()
    model, other = moved(model_of(), 0.1), model_of(seed=5)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x, cond), model(x, cond))


@pytest.mark.parametrize("width", [32, 256])
def test_outputs_have_one_scale_at_any_width(width):
    x, cond = inputs()
    x, cond = x / x.square().mean(1, keepdim=True).sqrt(), cond / cond.square().mean(1, keepdim=True).sqrt()
    y = torch.stack([model_of(width, width, seed)(x, cond) for seed in range(60)])
    assert y.square().mean().item() == pytest.approx(1, rel=0.4)


def test_the_two_methods_differ_in_the_width_of_g():
    a = Architecture(cond=7, x=3, out=2, context=(16, 16), hidden=(5,))
    for name, hidden in ((WIDE_F, 5), (WIDE_BOTH, 16)):
        found = counts(METHODS[name].model(a))
        assert found.primary == 5 * hidden
        assert found.trainable == found.context == 16 * 7 + 16 * 16 + 16 * 5 * hidden
