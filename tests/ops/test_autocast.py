"""Casts under autocast: one copy of each parameter in a region, as for `nn.Linear`."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper import compiled
from fasthyper.nn import HyperConv2d, HyperLinear, PairwiseBilinear
from fasthyper.ops import autocast

STEPS = 16
needs_eager = pytest.mark.skipif(compiled.load("eager") is not None, reason="csrc/eager.cpp was not built")


def region(enabled: bool = True, cache: bool | None = None):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cache)


def kept_bytes(layer, step) -> int:
    """Return the bytes that `step` saves for backward, without the layer's parameters; each memory once."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = step()
    y.float().sum().backward()
    return sum(n for at, n in kept.items() if at not in {p.untyped_storage().data_ptr() for p in layer.parameters()})


def recurrent(layer, x, z):
    def step():
        h = x
        with region():
            for _ in range(STEPS):
                h = torch.tanh(layer(h, z))
        return h

    return step


@needs_eager
@pytest.mark.parametrize("from_head", [False, True])
def test_a_recurrent_layer_keeps_one_copy_of_its_head(from_head):
    layer = HyperLinear(32, 32, 64)
    if from_head:
        layer = HyperLinear.from_head(torch.nn.Linear(64, 32 * 32), 32, 32, layout="oi")
    x, z = torch.randn(4, 32), torch.randn(4, 64, requires_grad=True)
    copy = sum(p.numel() for p in layer.parameters()) * 2
    activations = STEPS * 4 * (32 + 32 + 64) * 4
    assert kept_bytes(layer, recurrent(layer, x, z)) <= copy + activations


@needs_eager
@pytest.mark.parametrize(
    ("layer", "x", "z"),
    [
        (HyperConv2d(8, 8, 3, cond_features=64, padding=1), torch.randn(2, 8, 4, 4), torch.randn(2, 64)),
        (PairwiseBilinear(32, 32, 64), torch.randn(2, 3, 32), torch.randn(2, 4, 32)),
    ],
    ids=["HyperConv2d", "PairwiseBilinear"],
)
def test_other_layers_keep_one_copy(layer, x, z):
    def step():
        with region():
            return sum(layer(x, z).sum() for _ in range(STEPS))

    copy = sum(p.numel() for p in layer.parameters()) * 2
    assert kept_bytes(layer, step) <= 2 * copy


def test_gradients_are_those_of_casts_in_each_call(monkeypatch):
    layer, x, z = HyperLinear(8, 8, 5), torch.randn(4, 8), torch.randn(4, 5)
    found = torch.autograd.grad(recurrent(layer, x, z)().float().sum(), [*layer.parameters()])
    monkeypatch.setattr(compiled, "load", lambda name: "not built")
    expected = torch.autograd.grad(recurrent(layer, x, z)().float().sum(), [*layer.parameters()])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_call_without_gradients_does_not_take_those_of_a_later_one():
    layer, x, z = HyperLinear(8, 8, 5), torch.randn(4, 8), torch.randn(4, 5)
    with region():
        with torch.no_grad():
            layer(x, z)
        y = layer(x, z)
    y.float().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_region_sees_parameters_that_changed_after_the_last_one():
    layer, x, z = HyperLinear(8, 8, 5), torch.randn(4, 8), torch.randn(4, 5)
    with region():
        before = layer(x, z)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    with region():
        after = layer(x, z)
    torch.testing.assert_close(after, 2 * before)


@needs_eager
def test_the_cache_of_casts_is_torchs_own():
    weight = torch.randn(3, 4, 5, requires_grad=True)
    with region():
        copy = autocast.follow(weight)
        assert copy.data_ptr() == autocast.follow(weight).data_ptr()
        with region(enabled=False):
            pass  # a region inside does not end the outer one
        assert copy.data_ptr() == autocast.follow(weight).data_ptr()
        torch.clear_autocast_cache()
        assert copy.data_ptr() != autocast.follow(weight).data_ptr()
    with region(cache=False):
        assert autocast.follow(weight).data_ptr() != autocast.follow(weight).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_cast(dtype):
    t = torch.ones(2, 2).to(dtype)
    with region():
        expected = dtype if dtype in (torch.float64, torch.int64) else torch.bfloat16
        assert autocast.follow(t).dtype == expected
        if dtype.is_floating_point:
            assert autocast.follow(t.requires_grad_()).dtype == expected


def test_in_checkpoints_and_transforms():
    layer, x, z = HyperLinear(8, 8, 5), torch.randn(4, 8), torch.randn(4, 5, requires_grad=True)

    def loss(z):
        return torch.utils.checkpoint.checkpoint(layer, x, z, use_reentrant=False).float().sum()

    with region():
        (found,) = torch.autograd.grad(loss(z), z)
        (expected,) = torch.autograd.grad(layer(x, z).float().sum(), z)
        of_func = torch.func.grad(lambda z: layer(x, z).float().sum())(z)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_func, expected, rtol=0.02, atol=0.02)


def test_functions_that_take_parameters():
    x, a, b = torch.randn(2, 8), torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    with region():
        y = fasthyper.low_rank_linear(x, a, b)
    y.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
