"""HyperAffine against the scale and shift written out for each instance, in float64."""

import copy

import pytest
import torch
from torch import nn

from fasthyper import Incidence
from fasthyper.nn import HyperAffine, HyperLinear, Hypernetwork

R, B = 5, 6
NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (B, 3, 4)),
    "layer of a vector": (lambda: nn.LayerNorm(4), (B, 4)),
    "layer of two axes": (lambda: nn.LayerNorm((3, 4)), (B, 2, 3, 4)),
    "layer without shift": (lambda: nn.LayerNorm(4, bias=False), (B, 3, 4)),
    "rms": (lambda: nn.RMSNorm(4), (B, 3, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (B, 4, 3, 2)),
    "batch of vectors": (lambda: nn.BatchNorm1d(4), (B, 4)),
    "batch 1d": (lambda: nn.BatchNorm1d(4), (B, 4, 3)),
    "batch 2d": (lambda: nn.BatchNorm2d(4), (B, 4, 3, 2)),
    "batch 3d": (lambda: nn.BatchNorm3d(4), (B, 4, 3, 2, 2)),
    "without scale": (lambda: nn.GroupNorm(2, 4, affine=False), (B, 4, 3, 2)),
}


def filled(layer):
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def oracle(layer, x, z):
    """Normalise, then scale and shift one instance at a time."""
    y = copy.deepcopy(layer.norm)(x)
    rows = []
    for b in range(x.shape[0]):
        scale = layer.weight @ z[b] + (0 if layer.base_weight is None else layer.base_weight)
        shift = 0 if layer.bias is None else layer.bias @ z[b]
        shift = shift if layer.base_bias is None else shift + layer.base_bias
        if isinstance(layer.norm, (nn.LayerNorm, nn.RMSNorm)):
            rows.append(y[b] * scale + shift)
        else:
            rows.append((y[b].movedim(0, -1) * scale + shift).movedim(-1, 0))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_oracle(norm, base, bias):
    make, shape = NORMS[norm]
    layer = filled(HyperAffine(make().double(), R, bias, base, "hyperfan_in").double())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    z = torch.randn(B, R, dtype=torch.float64, requires_grad=True)
    leaves = [x, z, *layer.parameters()]
    expected = oracle(layer, x, z)
    y = layer(x, z)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_starts_as_the_norm_and_leaves_it_alone():
    norm = filled(nn.BatchNorm2d(4))
    layer = HyperAffine(norm, R)
    x, z = torch.randn(B, 4, 3, 2), torch.randn(B, R)
    torch.testing.assert_close(layer(x, z), copy.deepcopy(norm)(x))
    assert norm.num_batches_tracked == 0
    assert layer.norm.num_batches_tracked == 1
    layer.eval()
    assert layer(x, z).shape == x.shape
    assert layer.norm.num_batches_tracked == 1


def test_inits():
    layer = HyperAffine(nn.LayerNorm(400), 50, base=False)
    assert layer.init == "hyperfan_in"
    z = torch.randn(100, 50)
    assert abs((z @ layer.weight.T).var() - 1) < 0.1
    with pytest.raises(ValueError, match="needs base=True"):
        HyperAffine(nn.LayerNorm(4), R, base=False, init="bias_hyper")
    with pytest.raises(ValueError, match=r"init must be one of .* got 'ones'"):
        HyperAffine(nn.LayerNorm(4), R, init="ones")
    with pytest.raises(TypeError, match=r"norm must be one of LayerNorm, .* got Linear"):
        HyperAffine(nn.Linear(4, 4), R)
    with pytest.raises(ValueError, match="cond_features must not be negative"):
        HyperAffine(nn.LayerNorm(4), -1)


def test_ragged_points():
    layer = filled(HyperAffine(nn.LayerNorm(4), R))
    ids = torch.tensor([0, 1, 1, 2, 0])
    x, z = torch.randn(5, 4), torch.randn(3, R)
    incidence = Incidence.from_batch(ids, 3)
    torch.testing.assert_close(layer(x, z, incidence), layer(x, z[ids]))
    net = Hypernetwork(nn.Identity(), nn.Sequential(layer, HyperLinear(4, 2, R)))
    torch.testing.assert_close(net(x, z, incidence=incidence), net(x, z[ids]))
    with pytest.raises(ValueError, match=r"ragged points .* not one with sources or targets"):
        layer(x, z, Incidence(source=ids))


def test_refusals():
    layer = HyperAffine(nn.LayerNorm(4), R)
    x = torch.randn(B, 3, 4)
    with pytest.raises(ValueError, match=r"z must be \(B, R\) with R = 5, got \(6, 4\)"):
        layer(x, torch.randn(B, 4))
    with pytest.raises(ValueError, match=r"z must have a row for each of the 6 rows of x \(6, 3, 4\), got 1 rows"):
        layer(x, torch.randn(1, R))
    with pytest.raises(TypeError, match=r"z must be torch\.float32"):
        layer(x, torch.randn(B, R).double())
    with pytest.raises(TypeError, match="takes one z"):
        layer(x, (torch.randn(B, R), torch.randn(B, R)))
    with pytest.raises(ValueError, match="called with no z"):
        layer(x)


def test_transforms_and_double_backward():
    layer = filled(HyperAffine(nn.LayerNorm(4), R).double())
    x = torch.randn(B, 3, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(B, R, dtype=torch.float64, requires_grad=True)
    y = layer(x, z)
    assert torch.autograd.gradcheck(layer, (x, z))
    assert torch.autograd.gradgradcheck(layer, (x, z))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, z), y)
    torch.testing.assert_close(torch.export.export(layer, (x, z)).module()(x, z), y)
    per_instance = torch.func.vmap(lambda x, z: layer(x[None], z[None])[0])(x, z)
    torch.testing.assert_close(per_instance, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_more_than_the_norm(dtype):
    layer = filled(HyperAffine(nn.LayerNorm(64), R))
    x, z = torch.randn(B, 3, 64), torch.randn(B, R)
    with torch.autocast("cpu", dtype):
        y = layer(x, z)
        assert y.dtype == layer.norm(x).dtype
        assert layer(x.to(dtype), z.to(dtype)).isfinite().all()
    torch.testing.assert_close(y, layer(x, z))
    half = copy.deepcopy(layer).to(dtype)
    exact = oracle(layer.double(), x.double(), z.double())
    written = oracle(half, x.to(dtype), z.to(dtype)).double() - exact
    ours = half(x.to(dtype), z.to(dtype)).double() - exact
    assert ours.abs().max() <= 2 * written.abs().max()
