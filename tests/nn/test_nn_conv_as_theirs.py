"""NNConv against that of PyTorch Geometric."""

import pytest
import torch
from edge_networks import D, I, O, R, Trunk, data, layer, network
from graphs import EDGES, gradients
from torch.nn import Linear

from fasthyper.nn import NNConv

geometric = pytest.importorskip("torch_geometric")
pytest.importorskip("torch_geometric.nn")
AGGR = ("add", "sum", "mean", "max")


def theirs(**kwargs):
    return layer(geometric.nn.NNConv, **kwargs)


@pytest.mark.parametrize("aggr", AGGR)
@pytest.mark.parametrize("kind", EDGES)
def test_as_theirs(kind, aggr):
    edge_index, ours, other = EDGES[kind](), layer(aggr=aggr), theirs(aggr=aggr)
    x, a = data(edge_index)
    call = lambda m, x, a: m(x, edge_index, a)
    g = torch.randn(6, O).double()
    found, expected = gradients(ours, call, (x, a), g), gradients(other, call, (x, a), g)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"root_weight": False}, {"bias": False}, {"aggr": "mean"}, {"in_channels": (I, 3)}, {"nn": Trunk}],
    ids=str,
)
def test_same_seed_same_parameters_state_dict_and_repr(kwargs):
    torch.manual_seed(5)
    expected = geometric.nn.NNConv(**{"in_channels": I, "out_channels": O, **kwargs, "nn": kwargs.get("nn", network)()})
    torch.manual_seed(5)
    ours = NNConv(**{"in_channels": I, "out_channels": O, **kwargs, "nn": kwargs.get("nn", network)()})
    assert list(ours.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), expected.parameters(), strict=True))
    if ours.why_by_messages is None:
        assert repr(ours) == repr(expected)
    for a, b in ((ours, expected), (expected, ours)):
        for p in b.parameters():
            torch.nn.init.normal_(p)
        assert str(a.load_state_dict(b.state_dict())) == "<All keys matched successfully>"
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("size", [None, (6, 9)])
def test_pairs_as_theirs(size):
    edge_index, ours, other = EDGES["random"](), layer(in_channels=(I, 2)), theirs(in_channels=(I, 2))
    x, a = data(edge_index)
    x_target = torch.randn(9, 2).double()
    torch.testing.assert_close(ours((x, x_target), edge_index, a, size), other((x, x_target), edge_index, a, size))
    torch.testing.assert_close(ours((x, None), edge_index, a, size), other((x, None), edge_index, a, size))


def test_their_edge_index():
    EdgeIndex = geometric.EdgeIndex
    edge_index, ours, other = EDGES["random"](), layer(), theirs()
    x, a = data(edge_index)
    for kwargs in ({}, {"sparse_size": (6, 6)}):
        wrapped = EdgeIndex(edge_index, **kwargs)
        torch.testing.assert_close(ours(x, wrapped, a), other(x, wrapped, a))
    wrapped = EdgeIndex(edge_index, sparse_size=(6, 8))
    torch.testing.assert_close(ours((x, None), wrapped, a), other((x, None), wrapped, a))


def test_their_mlp():
    MLP = geometric.nn.MLP
    edge_index, ours, other = EDGES["random"](), *(f(nn=lambda: MLP([D, R, I * O])) for f in (layer, theirs))
    x, a = data(edge_index)
    torch.testing.assert_close(ours(x, edge_index, a), other(x, edge_index, a))
    assert ours.why_by_messages == "nn ends in a MLP, not in an nn.Linear"


@pytest.mark.parametrize("aggr", ["add", "mean", "max"])
def test_training_as_theirs(aggr):
    """Three layers of one graph network, twenty steps of Adam."""
    losses = []
    edge_index = EDGES["random"]()
    x, a = data(edge_index)
    y = torch.randn(6, O).double()
    for make in (layer, theirs):
        conv = make(aggr=aggr)
        back = Linear(O, I).double()
        torch.manual_seed(1)
        torch.nn.init.normal_(back.weight, std=0.3)
        torch.nn.init.zeros_(back.bias)
        optimizer = torch.optim.Adam([*conv.parameters(), *back.parameters()], lr=0.01)
        losses.append([])
        for _ in range(20):
            h = x
            for _ in range(2):
                h = back(conv(h, edge_index, a).relu())
            loss = (conv(h, edge_index, a) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] / 2
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-6, atol=1e-6)
