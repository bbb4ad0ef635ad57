"""HyperEmbedding against the table of each instance written out, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasthyper
from fasthyper import Incidence
from fasthyper.measure import peak_temporary_bytes
from fasthyper.nn import HyperEmbedding

R, B, V, D = 5, 6, 11, 3


def filled(**kwargs):
    layer = HyperEmbedding(V, D, R, **kwargs).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def oracle(layer, ids, z):
    """Write out the table of each instance."""
    tables = torch.einsum("vdr,br->bvd", layer.weight, z)
    if layer.padding_idx is not None:
        tables = tables * (torch.arange(V) != layer.padding_idx)[:, None]
    if layer.base_weight is not None:
        tables = tables + layer.base_weight
    rows = [F.embedding(ids[b], tables[b], layer.padding_idx) for b in range(ids.shape[0])]
    return torch.stack(rows) if rows else tables.expand(-1, V, -1).reshape(*ids.shape, D)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Run with a workspace in which all rows fit, and with one for four of them."""
    if request.param == "many chunks":
        monkeypatch.setattr("fasthyper.planner._limit", 4 * 4 * D * R * 8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(B,), (B, 4), (B, 2, 3), (B, 0), (0, 4)])
@pytest.mark.parametrize("kwargs", [{}, {"base": False}, {"padding_idx": 2}, {"padding_idx": -1, "base": False}])
def test_equals_the_oracle(kwargs, shape, dtype, chunks):
    layer = filled(**kwargs)
    ids = torch.randint(V, shape, dtype=dtype)
    z = torch.randn(shape[0], R, dtype=torch.float64, requires_grad=True)
    leaves = [z, *layer.parameters()]
    y, expected = layer(ids, z), oracle(layer, ids, z)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, g, retain_graph=True)
    differentiable = torch.autograd.grad(y, leaves, g, create_graph=True)
    for a, b, c in zip(ours, differentiable, torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_double_backward(chunks):
    layer = filled(base=False)
    ids = torch.randint(V, (B, 4))
    z = torch.randn(B, R, dtype=torch.float64, requires_grad=True)

    def f(z, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (ids, z))

    assert torch.autograd.gradcheck(f, (z, layer.weight))
    assert torch.autograd.gradgradcheck(f, (z, layer.weight))


def test_transforms():
    layer = filled(padding_idx=0)
    ids, z = torch.randint(V, (B, 4)), torch.randn(B, R).double()
    y = layer(ids, z)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids, z), y)
    torch.testing.assert_close(torch.export.export(layer, (ids, z)).module()(ids, z), y)
    torch.testing.assert_close(torch.func.vmap(lambda i, z: layer(i[None], z[None])[0])(ids, z), y)
    torch.testing.assert_close(copy.deepcopy(layer)(ids, z), y)
    _, tangent = torch.func.jvp(lambda z: layer(ids, z), (z,), (z,))
    torch.testing.assert_close(tangent, oracle(layer, ids, z) - oracle(layer, ids, torch.zeros_like(z)))


def test_compiled_with_gradients_for_any_size():
    layer = filled()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for b, n in ((4, 3), (5, 7)):
        ids, z = torch.randint(V, (b, n)), torch.randn(b, R).double()
        grads = [torch.autograd.grad(f(ids, z).square().sum(), list(layer.parameters())) for f in (compiled, layer)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_ragged_points():
    layer, ids, batch = filled(), torch.randint(V, (7,)), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    z = torch.randn(3, R).double()
    torch.testing.assert_close(layer(ids, z, Incidence.from_batch(batch, 3)), layer(ids, z[batch]))


def test_memory_stays_within_the_workspace():
    layer = HyperEmbedding(100, 64, 64)
    fasthyper.set_workspace_limit(1 << 20)
    try:
        ids, z = torch.randint(100, (32, 64)), torch.randn(32, 64, requires_grad=True)  # rows of the head: 32 MiB

        def step():
            layer(ids, z).sum().backward()
            z.grad = None
            layer.zero_grad()

        outputs = 4 * (3 * ids.numel() * 64 + layer.weight.numel() + layer.base_weight.numel())
        assert peak_temporary_bytes(step) < (1 << 20) + 2 * outputs
    finally:
        fasthyper.set_workspace_limit(32 << 20)


def test_inits_and_refusals():
    layer = HyperEmbedding(50, 40, 30, padding_idx=0)
    assert abs((layer.weight @ torch.randn(30, 20)).var() - 1) < 0.2
    assert not layer.base_weight.any()
    layer = HyperEmbedding(50, 40, 30, padding_idx=0, init="bias_hyper")
    assert not layer.weight.any()
    assert not layer.base_weight[0].any()
    assert abs(layer.base_weight.var() - 1) < 0.2
    for kwargs, message in (
        ({"init": "bias_hyper", "base": False}, "needs base=True"),
        ({"init": "ones"}, "init must be one of"),
        ({"padding_idx": V}, "padding_idx must be an id of 11 embeddings, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            HyperEmbedding(V, D, R, **kwargs)
    layer, z = HyperEmbedding(V, D, R), torch.randn(B, R)
    with pytest.raises(TypeError, match=r"ids must be a tensor of int64 or int32, got torch\.float32"):
        layer(torch.randn(B, 4), z)
    with pytest.raises(ValueError, match=r"z must have a row for each of the 3 rows of x \(3,\), got 6"):
        layer(torch.zeros(3, dtype=torch.int64), z)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        layer(torch.full((B, 1), V), z)
