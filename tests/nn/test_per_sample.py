"""Per-sample norms without per-sample gradients, and the samplers for Opacus."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fasthyper.measure import peak_temporary_bytes
from fasthyper.nn import HyperLinear, per_sample_norm_sq, register_with_opacus
from fasthyper.nn.opacus_samplers import per_sample_gradients, per_sample_norms

POINTS = [(), (1,), (3,), (2, 4), (40,), (0,)]
LAYERS = {
    "plain": {},
    "without bias": {"bias": False},
    "without base": {"base": False},
    "low rank": {"rank": 2},
    "mapped": {"weight_map": "softplus"},
}


def inputs(points, B=5, I=4, R=3, O=2, dtype=torch.float64):
    return (torch.randn(s, dtype=dtype) for s in ((B, *points, I), (B, R), (B, *points, O)))


def gradients(layer, x, z, g):
    """Return the gradients of all instances, each by a backward of its own."""
    rows = []
    for b in range(len(x)):
        y = layer(x[b : b + 1], z[b : b + 1])
        rows.append(torch.autograd.grad(y, [p for p in layer.parameters() if p.requires_grad], g[b : b + 1]))
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("points", POINTS, ids=str)
def test_the_norm_is_that_of_the_gradient(points):
    x, z, g = inputs(points)
    layer = HyperLinear(4, 2, cond_features=3, bias=False, base=False, dtype=torch.float64)
    (each,) = gradients(layer, x, z, g)
    torch.testing.assert_close(per_sample_norm_sq(x, z, g), each.square().sum((1, 2, 3)))


@pytest.mark.parametrize("points", [(), (3,), (40,)], ids=str)
def test_the_norm_is_differentiable(points):
    args = [t.requires_grad_() for t in inputs(points, B=2)]
    assert torch.autograd.gradcheck(per_sample_norm_sq, args)


def test_the_norm_needs_no_gradient_of_the_size_of_the_head():
    x, z, g = inputs((8,), B=3000, I=64, R=64, O=64, dtype=torch.float32)
    assert peak_temporary_bytes(lambda: per_sample_norm_sq(x, z, g)) < 32 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_16_bits_is_in_float32(dtype):
    x, z, g = inputs((3,), dtype=dtype)
    x = x * 200  # the square of the norm leaves the range of float16
    got = per_sample_norm_sq(x, z, g)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, per_sample_norm_sq(x.float(), z.float(), g.float()))


def test_errors():
    x, z, g = inputs((3,))
    with pytest.raises(ValueError, match=r"g must have the points of x, \(3,\), got \(2,\)"):
        per_sample_norm_sq(x, z, g[:, :2])
    with pytest.raises(ValueError, match="z must have shape"):
        per_sample_norm_sq(x, z[:2], g)
    with pytest.raises(ValueError, match="called as layer\\(x, z\\) under Opacus"):
        per_sample_gradients(HyperLinear(4, 2, cond_features=3), [x], g)


@pytest.mark.parametrize("points", POINTS[:4], ids=str)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_samplers(options, points):
    x, z, g = inputs(points)
    layer = HyperLinear(4, 2, cond_features=3, dtype=torch.float64, **options)
    [*layer.parameters()][-1].requires_grad_(False)
    expected = gradients(layer, x, z, g)
    got, norms = per_sample_gradients(layer, [x, z], g), per_sample_norms(layer, [x, z], g)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert [*got] == [*norms] == trained
    for p, each in zip(trained, expected, strict=True):
        torch.testing.assert_close(got[p], each)
        torch.testing.assert_close(norms[p], each.flatten(1).norm(dim=1))


def test_samplers_of_a_shared_head():
    x, z, g = inputs(POINTS[0])
    layer = HyperLinear.from_head(nn.Linear(3, 10, dtype=torch.float64), 4, 2, layout="oi")
    expected = gradients(layer, x, z, g)
    got, norms = per_sample_gradients(layer, [x, z], g), per_sample_norms(layer, [x, z], g)
    for p, each in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(got[p], each)
        torch.testing.assert_close(norms[p], each.flatten(1).norm(dim=1))


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.trunk, self.layer = nn.Linear(6, 3), HyperLinear(4, 2, cond_features=3, **options)

    def forward(self, x, cond):
        return self.layer(x, self.trunk(cond).tanh())


needs_opacus = pytest.mark.skipif(find_spec("opacus") is None, reason="Opacus is not installed")


@needs_opacus
@pytest.mark.parametrize("points", POINTS[:4], ids=str)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_opacus_has_the_gradients_of_vmap(options, points):
    from opacus.grad_sample import GradSampleModule

    register_with_opacus()
    model = Model(**options).double()
    x, _, g = inputs(points)
    cond = torch.randn(5, 6, dtype=torch.float64)

    def loss(params, x, cond, g):
        return (functional_call(model, params, (x[None], cond[None])) * g[None]).sum()

    params = {name: p.detach() for name, p in model.named_parameters()}
    expected = vmap(grad(loss), (None, 0, 0, 0))(params, x, cond, g)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    (wrapped(x, cond) * g).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name])


@needs_opacus
@pytest.mark.parametrize("points", POINTS[:4], ids=str)
def test_opacus_has_the_norms_of_the_gradients(points):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    register_with_opacus()
    model = Model().double()
    x, _, g = inputs(points)
    cond = torch.randn(5, 6, dtype=torch.float64)
    expected = gradients_of_model(model, x, cond, g)
    wrapped = GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )
    (wrapped(x, cond) * g).sum().backward()
    torch.testing.assert_close(wrapped.get_norm_sample(), expected)


def gradients_of_model(model, x, cond, g):
    """Return the norm of each instance's gradient of all parameters."""
    norms = []
    for b in range(len(x)):
        y = model(x[b : b + 1], cond[b : b + 1])
        each = torch.autograd.grad(y, [*model.parameters()], g[b : b + 1])
        norms.append(torch.cat([d.flatten() for d in each]).norm())
    return torch.stack(norms)


@pytest.mark.skipif(find_spec("opacus") is not None, reason="Opacus is installed")
def test_without_opacus():
    with pytest.raises(ImportError, match="opacus"):
        register_with_opacus()
