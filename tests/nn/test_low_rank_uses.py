"""Generated weights of low rank in networks, under transforms and in memory."""

import copy

import pytest
import torch
from low_rank_layers import B, I, O, R, filled, inputs, oracle, r
from small_networks import TrunkByName
from torch import nn

import fasthyper
from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork, hyperize, parameter_report, ungenerated


def test_in_a_hypernetwork_and_not_fused(fusing):
    primary = nn.Sequential(HyperLinear(4, 5, R, rank=2), nn.ReLU(), HyperLinear(5, 3, R, rank=2))
    for p in primary.parameters():
        nn.init.normal_(p)
    model, x, cond = Hypernetwork(nn.Linear(6, R), primary), torch.randn(B, 4), torch.randn(B, 6)
    z = model.trunk(cond)
    torch.testing.assert_close(model(x, cond), primary[2](primary[0](x, z).relu(), z))
    report = parameter_report(model)
    assert report.n_g == (2 * 4 + 5 * 2 + 5) + (2 * 5 + 3 * 2 + 3)
    mixed = nn.Sequential(HyperLinear(4, 5, R), nn.ReLU(), HyperLinear(5, 3, R, rank=2))
    assert Hypernetwork(nn.Linear(6, R), mixed)(x, cond).shape == (B, 3)
    assert not fusing.calls


def test_z_by_name():
    primary = nn.Sequential(filled(4, 5, 7, dtype=torch.float32), nn.ReLU(), HyperLinear(5, 3, 7))
    model, x, cond = Hypernetwork(TrunkByName("0", "2"), primary), torch.randn(B, 4), torch.randn(B, 6)
    z = model.trunk(cond)
    torch.testing.assert_close(model(x, cond), primary[2](primary[0](x, z["0"]).relu(), z["2"]))


def test_hyperize():
    net = nn.ModuleDict({"q_proj": nn.Linear(I, O), "k_proj": nn.Linear(I, O), "v_proj": nn.Linear(I, O, bias=False)})
    converted = hyperize(net, R, ["*q_proj", "*v_proj"], rank=r, alpha=8, bias=False)
    assert ungenerated(converted) == ["k_proj.weight", "k_proj.bias"]
    q, v = converted["q_proj"], converted["v_proj"]
    assert (q.rank, q.alpha, v.rank) == (r, 8, r)
    assert q.weight_a.any()
    assert not q.weight_b.any()
    assert torch.equal(q.base_weight, net["q_proj"].weight)
    x, z = torch.randn(B, 2, I), torch.randn(B, R)
    torch.testing.assert_close(q(x, z), net["q_proj"](x))
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        hyperize(net, R, rank=0)
    assert hyperize(net, R, rank=r, base=False)["q_proj"].weight_b.any()


def test_hyperize_keeps_ties():
    net = nn.Sequential(nn.Linear(I, I), nn.Linear(I, I))
    net[1].weight = net[0].weight
    converted = hyperize(net, R, rank=r)
    for name in ("base_weight", "weight_a", "weight_b"):
        assert getattr(converted[0], name) is getattr(converted[1], name)
    assert converted[0].bias is not converted[1].bias


# transforms


@pytest.mark.parametrize("points", [(), (3,), (8,)])
def test_autocast(points):
    layer, (x, z) = filled(dtype=torch.float32), inputs(*points, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, z)
        assert y.dtype == torch.bfloat16
        assert layer(x.bfloat16(), z).dtype == torch.bfloat16
        assert layer.materialize(z)[0].shape == (B, O, I)
        norm = layer.weight_norm_sq(z)
        double = copy.deepcopy(layer).double()
        assert double(x.double(), z.double()).dtype == torch.float64
    assert torch.equal(norm, layer.weight_norm_sq(z))
    torch.testing.assert_close(y.double(), oracle(layer, x, z), rtol=0.05, atol=1)
    y.sum().backward()
    assert layer.weight_a.grad.dtype == torch.float32


@pytest.mark.parametrize("ragged", [False, True])
def test_compile(ragged):
    layer, (x, z) = filled(), inputs(2)
    incidence = Incidence.from_batch(torch.tensor([1, 0, 0]), num_conds=B) if ragged else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        given = x.reshape(-1, I)[:3] if ragged else torch.randn(rows, 2, I, dtype=torch.float64)
        cond = z if ragged else torch.randn(rows, R, dtype=torch.float64)
        given.requires_grad_()
        y = compiled(given, cond, incidence)
        torch.testing.assert_close(y, layer(given, cond, incidence))
        got = torch.autograd.grad(y.square().sum(), (given, *layer.parameters()))
        expected = torch.autograd.grad(layer(given, cond, incidence).square().sum(), (given, *layer.parameters()))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        given = given.detach()


def test_export():
    layer, (x, z) = filled(), inputs(2)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x, z), dynamic_shapes={"x": {0: batch}, "z": {0: batch}})
    x, z = torch.randn(9, 2, I, dtype=torch.float64), torch.randn(9, R, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x, z), layer(x, z))


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("points", [2, 8])
def test_vmap(dims, points):
    layer = filled()
    x = torch.randn(*(3,) * (dims[0] == 0), B, points, I, dtype=torch.float64)
    z = torch.randn(*(3,) * (dims[1] == 0), B, R, dtype=torch.float64)
    expected = [layer(x if dims[0] is None else x[k], z if dims[1] is None else z[k]) for k in range(3)]
    torch.testing.assert_close(torch.func.vmap(layer, dims)(x, z), torch.stack(expected))


def test_vmap_of_the_norm():
    layer, z = filled(), torch.randn(3, B, R, dtype=torch.float64)
    expected = torch.stack([layer.weight_norm_sq(each) for each in z])
    torch.testing.assert_close(torch.func.vmap(layer.weight_norm_sq)(z), expected)


def test_per_sample_gradients():
    layer, (x, z) = filled(), inputs()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x, z):
        return torch.func.functional_call(layer, parameters, (x[None], z[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, z)
    for b in range(B):
        layer.zero_grad()
        layer(x[b : b + 1], z[b : b + 1]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][b], p.grad)


@pytest.mark.parametrize("points", [2, 8])
def test_written_out_factors_or_not(points, monkeypatch):
    """With no room for A and B they are generated in tiles; the results are the same."""
    layer, (x, z) = filled(), inputs(points)
    expected = layer(x, z)
    monkeypatch.setattr("fasthyper.nn.low_rank.get_workspace_limit", lambda: 0)
    torch.testing.assert_close(layer(x, z), expected)


def test_temporary_memory_has_no_w():
    """Beside activations, a call has neither W nor its gradient: those would be B · O · I numbers."""
    from fasthyper.measure import peak_temporary_bytes

    instances, width = 64, 256
    layer = HyperLinear(width, width, 8, rank=4)
    x, z = torch.randn(instances, width, requires_grad=True), torch.randn(instances, 8, requires_grad=True)
    step = lambda: torch.autograd.grad(layer(x, z).sum(), (x, z, *layer.parameters()))
    assert fasthyper.get_workspace_limit() > 0
    assert peak_temporary_bytes(step) < 4 * instances * width * width / 4
