"""HyperConv… and HyperConvTranspose…: a loop over instances with torch's own layers, and what every layer does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fasthyper
from fasthyper.nn import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose1d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
    HyperLinear,
    Hypernetwork,
    hyperize,
)

CONVOLUTIONS = {1: HyperConv1d, 2: HyperConv2d, 3: HyperConv3d}
TRANSPOSED = {1: HyperConvTranspose1d, 2: HyperConvTranspose2d, 3: HyperConvTranspose3d}
SETTINGS = [
    {},
    {"padding": "same", "kernel_size": 2},
    {"padding": "same", "kernel_size": 3, "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "stride": 2},
    {"groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    {"padding": 2, "padding_mode": "replicate", "bias": False},
    {"kernel_size": 1},
]
OF_TRANSPOSED = [
    {},
    {"padding": 1, "stride": 2, "output_padding": 1},
    {"groups": 2, "bias": False},
    {"stride": 2, "dilation": 4, "output_padding": 3},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": 1, "dilation": 2, "output_padding": 1},
]


def loop(layer, plain, x, z):
    """Return what torch's layer gives for each instance with its own kernel and bias."""
    kernels, biases = layer.materialize(z)
    each = []
    for b in range(len(x)):
        own = {"weight": kernels[b]} if biases is None else {"weight": kernels[b], "bias": biases[b]}
        each.append(torch.func.functional_call(plain, own, (x[b, None],)))
    return torch.cat(each)


def check(layer, plain, x, z):
    for t in layer.parameters():
        nn.init.normal_(t)
    x.requires_grad_(), z.requires_grad_()
    y, expected = layer(x, z), loop(layer, plain, x, z)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    wanted = [x, z, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_a_loop_of_convolutions(settings, dims):
    settings = {"kernel_size": 3, **settings}
    layer = CONVOLUTIONS[dims](4, 6, cond_features=5, dtype=torch.float64, **settings)
    plain = getattr(nn, f"Conv{dims}d")(4, 6, dtype=torch.float64, **settings)
    check(layer, plain, torch.randn(3, 4, *range(6, 6 + dims)).double(), torch.randn(3, 5).double())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", OF_TRANSPOSED, ids=str)
def test_as_a_loop_of_transposed_convolutions(settings, dims):
    settings = {"kernel_size": 3, **settings}
    layer = TRANSPOSED[dims](4, 6, cond_features=5, dtype=torch.float64, **settings)
    plain = getattr(nn, f"ConvTranspose{dims}d")(4, 6, dtype=torch.float64, **settings)
    check(layer, plain, torch.randn(3, 4, *range(3, 3 + dims)).double(), torch.randn(3, 5).double())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"groups": 2, "stride": 2}, {"padding": "same", "bias": False, "base": False}], ids=str
)
def test_low_rank_as_a_loop_of_convolutions(settings, dims):
    layer = CONVOLUTIONS[dims](4, 6, 3, cond_features=5, rank=2, alpha=3, dtype=torch.float64, **settings)
    plain = getattr(nn, f"Conv{dims}d")(
        4, 6, 3, dtype=torch.float64, **{k: v for k, v in settings.items() if k != "base"}
    )
    assert layer.weight is None
    check(layer, plain, torch.randn(3, 4, *range(6, 6 + dims)).double(), torch.randn(3, 5).double())


def test_low_rank_starts_from_the_base_and_merges():
    """A convolution of hyperize starts as it was; one instance's kernel becomes an ordinary layer."""
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2))
    primary = hyperize(plain, 5, types="conv", rank=2, alpha=4)
    assert primary[0].rank == 2
    assert primary[2].weight is not None  # a transposed convolution has full rank
    model, x, cond = Hypernetwork(nn.Identity(), primary), torch.randn(3, 4, 6, 6), torch.randn(3, 5)
    torch.testing.assert_close(model(x, cond), plain(x))
    nn.init.normal_(primary[0].weight_b)
    merged = model.merged(cond[1:2])
    assert type(merged[0]) is nn.Conv2d
    torch.testing.assert_close(merged(x[1:2]), model(x, cond)[1:2], rtol=1e-4, atol=1e-4)


def test_low_rank_init_keeps_the_variance():
    for groups in (1, 4):
        layer = HyperConv2d(64, 64, 3, cond_features=32, groups=groups, rank=16)
        z = nn.functional.normalize(torch.randn(64, 32)) * 32**0.5
        assert 0.5 < layer(torch.randn(64, 64, 12, 12), z)[:, :, 2:-2, 2:-2].var() < 2
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match="rank must be a multiple of the groups of each convolution"):
        hyperize(depthwise, 5, types="conv", rank=2)
    with pytest.raises(ValueError, match="rank must be a multiple of groups"):
        HyperConv2d(64, 64, 3, cond_features=32, groups=4, rank=6)


@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"rank": 8, "groups": 4}], ids=str)
def test_hyperfan_out_keeps_the_gradients_of_ten_layers(options):
    x = torch.randn(4, 64, 8, 8, requires_grad=True)
    y = x
    for _ in range(10):
        of = {"padding": 1, "padding_mode": "circular", "bias": False, "init": "hyperfan_out", **options}
        z = nn.functional.normalize(torch.randn(4, 32)) * 32**0.5
        y = HyperConv2d(64, 64, 3, 32, **of)(y, z)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert 0.5 < dx.var() < 2


def test_pointwise_is_a_linear_layer():
    conv, linear = HyperConv2d(4, 6, 1, cond_features=5), HyperLinear(4, 6, cond_features=5)
    for name, t in linear.named_parameters():
        own = getattr(conv, name)
        own.data = t.detach().view_as(own)
    x, z = torch.randn(3, 4, 5, 7), torch.randn(3, 5)
    torch.testing.assert_close(conv(x, z), linear(x.movedim(1, -1), z).movedim(-1, 1))


def test_memory_format_is_kept():
    layer = HyperConv2d(4, 6, 3, cond_features=5)
    x, z = torch.randn(3, 4, 5, 7), torch.randn(3, 5)
    assert layer(x, z).is_contiguous()
    assert layer(x.to(memory_format=torch.channels_last), z).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "layer", [HyperConv2d(2, 4, 3, cond_features=5), HyperConvTranspose2d(2, 4, 3, cond_features=5)]
)
def test_copies_and_checkpoints(layer):
    x, z = torch.randn(3, 2, 6, 6), torch.randn(3, 5)
    y = layer(x, z)
    torch.testing.assert_close(copy.deepcopy(layer)(x, z), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x, z), y)
    other = type(layer)(2, 4, 3, cond_features=5)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x, z), y)
    assert "kernel_size=(3, 3)" in repr(layer)


def test_in_a_hypernetwork():
    """z reaches the layers of a primary; a step changes the trunk."""
    primary = nn.Sequential(
        HyperConv2d(1, 4, 3, cond_features=8, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        HyperLinear(4 * 36, 3, cond_features=8),
    )
    model = Hypernetwork(nn.Linear(2, 8), primary)
    x, cond = torch.randn(5, 1, 6, 6), torch.randn(5, 2)
    assert model(x, cond).shape == (5, 3)
    model(x, cond).square().sum().backward()
    assert model.trunk.weight.grad.abs().sum() > 0
    by_name = Hypernetwork(_Heads(), primary)
    assert by_name(x, cond).shape == (5, 3)
    with pytest.raises(ValueError, match="HyperConv2d takes no incidence"):
        model(x, cond, incidence=fasthyper.Incidence.from_batch(torch.arange(5)))


class _Heads(nn.Module):
    def forward(self, cond):
        return {"0": cond.repeat(1, 4), "3": -cond.repeat(1, 4)}


def test_autocast():
    layer = HyperConv2d(2, 4, 3, cond_features=5)
    x, z = torch.randn(3, 2, 6, 6), torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, z)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, z), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [HyperConv2d, HyperConvTranspose2d])
def test_compiled_and_exported(kind, compiled_fullgraph):
    layer = kind(4, 6, 3, cond_features=5, padding=1, stride=2, groups=2)
    f = compiled_fullgraph(layer)
    for B in (3, 5, 2):
        x, z = torch.randn(B, 4, 6, 7, requires_grad=True), torch.randn(B, 5, requires_grad=True)
        y, expected = f(x, z), layer(x, z)
        torch.testing.assert_close(y, expected)
        found, exact = (torch.autograd.grad(t.square().sum(), (x, z)) for t in (y, expected))
        torch.testing.assert_close(found, exact)
    B = torch.export.Dim("B")
    exported = torch.export.export(layer, (x.detach(), z.detach()), dynamic_shapes=({0: B}, {0: B}))
    x, z = torch.randn(7, 4, 6, 7), torch.randn(7, 5)
    torch.testing.assert_close(exported.module()(x, z), layer(x, z))


@pytest.fixture
def compiled_fullgraph():
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [HyperConv2d, HyperConvTranspose2d])
@pytest.mark.parametrize("init", ["hyperfan_in", "bias_hyper"])
def test_init_keeps_the_variance(kind, init):
    """Outputs have the variance of an ordinary layer of gain 1, whatever the groups."""
    for groups in (1, 4):
        layer = kind(64, 64, 3, cond_features=32, groups=groups, init=init)
        y = layer(torch.randn(64, 64, 12, 12), torch.randn(64, 32))
        assert 0.7 < y[:, :, 2:-2, 2:-2].var() < 1.4


def test_hyperfan_out_keeps_the_variance_of_gradients():
    layer = HyperConv2d(64, 32, 3, cond_features=32, groups=2, init="hyperfan_out")
    x = torch.randn(64, 64, 12, 12, requires_grad=True)
    y = layer(x, torch.randn(64, 32))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert 0.7 < dx[:, :, 2:-2, 2:-2].var() < 1.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "in_channels must be a multiple of groups"),
        ({"in_channels": -1}, "in_channels must not be negative"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"kernel_size": (1, 2, 3)}, "kernel_size must be an integer or 2"),
        ({"padding": "full"}, "padding must be numbers, 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, "stride must be 1"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of"),
        ({"init": "zeros"}, "init must be one of"),
        ({"init": "bias_hyper", "base": False}, "needs a base_weight"),
    ],
    ids=str,
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        HyperConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "cond_features": 5, **change})


def test_wrong_inputs():
    layer = HyperConv2d(4, 4, 3, cond_features=5)
    with pytest.raises(ValueError, match="was called with no z"):
        layer(torch.randn(2, 4, 6, 6))
    with pytest.raises(ValueError, match=r"x must have shape \(B, X, h, w\)"):
        layer(torch.randn(4, 6, 6), torch.randn(1, 5))
    with pytest.raises(ValueError, match="z must be"):
        layer.materialize(torch.randn(5))
    with pytest.raises(ValueError, match="padding must be numbers"):
        HyperConvTranspose2d(4, 4, 3, cond_features=5, padding="same")
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        HyperConvTranspose2d(4, 4, 3, cond_features=5, padding_mode="reflect")
