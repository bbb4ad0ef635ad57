"""RGCNConv: against its definition, against PyTorch Geometric, its memory, and errors."""

import copy
import pickle
from importlib.util import find_spec

import pytest
import torch
from graphs import EDGES, gradients, reduced
from torch._dynamo.testing import CompileCounterWithBackend

import fasthyper
from fasthyper.measure import peak_temporary_bytes
from fasthyper.nn import RGCNConv, edges

I, O, RELATIONS, BASES = 5, 4, 6, 3
AGGR = ("mean", "add", "sum", "max")
geometric = pytest.mark.skipif(find_spec("torch_geometric") is None, reason="PyTorch Geometric is not installed")


def layer(cls=RGCNConv, in_channels=I, num_bases=BASES, **kwargs):
    torch.manual_seed(5)
    conv = cls(in_channels, O, RELATIONS, num_bases, **kwargs).double()
    if conv.bias is not None:
        torch.nn.init.normal_(conv.bias)
    return conv


def theirs(**kwargs):
    return layer(pytest.importorskip("torch_geometric.nn").RGCNConv, **kwargs)


def graph(kind):
    edge_index = EDGES[kind]()
    return edge_index, torch.randint(0, RELATIONS - 1, edge_index.shape[1:])  # no edge has the last relation


def definition(conv, x, x_target, edge_index, edge_type):
    y = x.new_zeros(len(x_target), O) + (0 if conv.bias is None else conv.bias)
    for r in range(RELATIONS):
        mine = edge_type == r
        w = conv.weight[r] if conv.comp is None else torch.einsum("b,bio->io", conv.comp[r], conv.weight)
        y = y + reduced(x[edge_index[0, mine]], edge_index[1, mine], len(x_target), conv.aggr) @ w
    return y if conv.root is None else y + x_target @ conv.root


def check(conv, call, expected, *inputs):
    """Compare values and gradients."""
    g = torch.randn_like(call(conv, *inputs))
    torch.testing.assert_close(gradients(conv, call, inputs, g), gradients(conv, expected, inputs, g))


@pytest.mark.parametrize("num_bases", [BASES, 1, None])
@pytest.mark.parametrize("aggr", AGGR)
@pytest.mark.parametrize("kind", EDGES)
def test_definition(kind, aggr, num_bases):
    (edge_index, edge_type), conv = graph(kind), layer(aggr=aggr, num_bases=num_bases)
    call = lambda m, x: m(x, edge_index, edge_type)
    check(conv, call, lambda m, x: definition(m, x, x, edge_index, edge_type), torch.randn(6, I).double())


@pytest.mark.parametrize("root_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("aggr", AGGR)
def test_pair_without_root_or_bias(root_weight, bias, aggr):
    (edge_index, edge_type), conv = (
        graph("random"),
        layer(in_channels=(I, 2), aggr=aggr, root_weight=root_weight, bias=bias),
    )
    call = lambda m, x, t: m((x, t), edge_index, edge_type)
    expected = lambda m, x, t: definition(m, x, t, edge_index, edge_type)
    check(conv, call, expected, torch.randn(6, I).double(), torch.randn(9, 2).double())


@pytest.mark.parametrize("aggr", ["add", "mean"])
def test_second_order(aggr):
    edge_index, edge_type = torch.tensor([[0, 2, 1, 2], [1, 1, 2, 1]]), torch.tensor([0, 0, 3, 1])
    conv, x = layer(aggr=aggr), torch.randn(3, I).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: conv(x, edge_index, edge_type), x)
    assert torch.autograd.gradgradcheck(lambda x: conv(x, edge_index, edge_type), x)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_a_few_features_at_a_time(reduce):
    """Under a small limit, the features of neighbours are reduced in parts: with the same values and gradients."""
    source, index = torch.randint(0, 6, (1 << 16,)), torch.randint(0, 7, (1 << 16,))
    x, g = torch.randn(6, I).double().requires_grad_(), torch.randn(8, I).double()
    results = []
    for limit in (1 << 20, 32 << 20):  # two features at a time, all at once
        fasthyper.set_workspace_limit(limit)
        y = edges.reduce_neighbours(x, source, index, 8, reduce)
        results.append((y, *torch.autograd.grad(y, x, g)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("aggr", ["mean", "max"])
def test_temporary_memory(aggr):
    """Neighbours of many edges, 16 MiB of features, are reduced within a limit of 2 MiB."""
    count, width = 1 << 16, 64
    source = torch.randint(0, 50, (count,))
    index = torch.randint(0, 80, (count,))
    x = torch.randn(50, width)
    fasthyper.set_workspace_limit(2 << 20)
    peak = peak_temporary_bytes(lambda: edges.reduce_neighbours(x, source, index, 80, aggr))
    assert peak < 6 << 20


def test_int32_and_any_order():
    (edge_index, edge_type), conv = graph("random"), layer()
    x, order = torch.randn(6, I).double(), torch.randperm(30)
    y = conv(x, edge_index, edge_type)
    assert torch.equal(conv(x, edge_index.int(), edge_type.int()), y)
    torch.testing.assert_close(conv(x, edge_index[:, order], edge_type[order]), y)


@pytest.mark.parametrize("aggr", ["add", "mean", "max"])
def test_compiled(aggr):
    torch.compiler.reset()
    conv = layer(aggr=aggr)
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(conv, fullgraph=True, backend=counter)
    for count in (30, 17, 25, 41):
        edge_index, edge_type = torch.randint(0, 6, (2, count)), torch.randint(0, RELATIONS, (count,))
        call = lambda m, x, a=edge_index, b=edge_type: m(x, a, b)
        x = torch.randn(6, I).double()
        torch.testing.assert_close(gradients(f, call, (x,)), gradients(conv, call, (x,)))
    assert counter.frame_count <= 2  # for any number of edges


def test_copies():
    (edge_index, edge_type), conv = graph("random"), layer()
    x = torch.randn(6, I).double()
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x, edge_index, edge_type), conv(x, edge_index, edge_type))


@pytest.mark.parametrize("aggr", ["add", "mean"])
def test_edges_are_kept_for_their_types(monkeypatch, aggr):
    calls, make = [], edges.incidence
    monkeypatch.setattr(edges, "incidence", lambda *args: (calls.append(args), make(*args))[1])
    (edge_index, edge_type), conv = graph("random"), layer(aggr=aggr)
    x, other = torch.randn(6, I).double(), torch.randint(0, RELATIONS, (30,))

    def right(edge_type):
        y = conv(x, edge_index, edge_type)
        torch.testing.assert_close(y, definition(conv, x, x, edge_index, edge_type))

    for _ in range(3):
        right(edge_type)
    assert len(calls) == 1
    right(other)
    assert len(calls) == 2
    other.copy_(edge_type)
    right(other)
    assert len(calls) == 3
    with torch.inference_mode():
        conv(x, edge_index.copy_(edge_index.flip(1)), other)
    conv(x.requires_grad_(), edge_index, other).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("aggr", ["add", "mean"])
def test_other_types_at_the_same_address(aggr):
    (edge_index, edge_type), conv, x = graph("random"), layer(aggr=aggr), torch.randn(6, I).double()
    memory = edge_type.numpy()
    for _ in range(2):
        here = torch.from_numpy(memory)
        torch.testing.assert_close(conv(x, edge_index, here), definition(conv, x, x, edge_index, here))
        del here
        memory[:] = (memory + 1) % RELATIONS


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"aggr": "min"}, ValueError, "aggr must be one of 'add', 'sum', 'mean', 'max', got 'min'"),
        ({"num_bases": None, "num_blocks": 2}, ValueError, "num_blocks must be None, because blocks are not supported"),
        ({"num_bases": 0}, ValueError, "num_bases must be positive, got 0"),
        ({"num_bases": 2.0}, TypeError, "num_bases must be an integer, got 2.0"),
        ({"flow": "target_to_source"}, ValueError, "flow must be 'source_to_target'"),
        ({"in_channels": 0}, ValueError, "in_channels must be positive, got 0"),
        ({"node_dim": 0}, TypeError, "node_dim"),
    ],
)
def test_wrong_options(kwargs, error, message):
    with pytest.raises(error, match=message):
        layer(**kwargs)


EDGE_TYPE = torch.tensor([0, 1, 5])
WRONG = {
    "no features": ({"x": None}, TypeError, "x must be .*, not indices of nodes, got NoneType"),
    "indices": ({"x": torch.arange(6)}, TypeError, "x must be .*, not indices of nodes, got torch.int64"),
    "no targets": ({"x": (torch.randn(6, I), None)}, ValueError, r"x\[1\] must be the features of the target nodes"),
    "too large": (
        {"edge_index": torch.tensor([[0, 6, 1], [0, 1, 2]])},
        ValueError,
        "edge_index or edge_type is wrong: source must have values from 0 to 5, since there are 6 sources, got 6",
    ),
    "type too large": (
        {"edge_type": torch.tensor([0, 1, 6])},
        ValueError,
        "edge_index or edge_type is wrong: cond must have values from 0 to 5, since there are 6 conds, got 6 at term 2",
    ),
    "type negative": ({"edge_type": torch.tensor([0, -1, 2])}, ValueError, "cond must .* got -1 at term 1"),
    "no type": ({"edge_type": None}, TypeError, "edge_type must be a tensor of int64 or int32, got NoneType"),
    "type of floats": ({"edge_type": torch.zeros(3)}, TypeError, "edge_type must be .*got torch.float32"),
    "too few types": ({"edge_type": EDGE_TYPE[:2]}, ValueError, r"edge_type must have shape \(3,\).*got \(2,\)"),
    "types elsewhere": ({"edge_type": EDGE_TYPE.to("meta")}, ValueError, "edge_type must be on the device of x, cpu"),
    "sparse": ({"edge_index": torch.eye(6).to_sparse()}, TypeError, "not an adjacency matrix: got torch.sparse_coo"),
}


@pytest.mark.parametrize("aggr", ["add", "mean"])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs(wrong, error, message, aggr):
    given = {"x": torch.randn(6, I), "edge_index": torch.tensor([[0, 1, 2], [0, 1, 2]]), "edge_type": EDGE_TYPE}
    conv = layer(aggr=aggr).float()
    conv(**given)
    with pytest.raises(error, match=message):
        conv(**{**given, **wrong})


# Against PyTorch Geometric.


@geometric
@pytest.mark.parametrize("num_bases", [BASES, None])
@pytest.mark.parametrize("aggr", AGGR)
@pytest.mark.parametrize("kind", EDGES)
def test_as_theirs(kind, aggr, num_bases):
    edge_index, edge_type = graph(kind)
    ours, other = (make(aggr=aggr, num_bases=num_bases) for make in (layer, theirs))
    x, g = torch.randn(6, I).double(), torch.randn(6, O).double()
    call = lambda m, x: m(x, edge_index, edge_type)
    torch.testing.assert_close(gradients(ours, call, (x,), g), gradients(other, call, (x,), g))


@geometric
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"root_weight": False}, {"bias": False}, {"in_channels": (I, 3)}, {"num_bases": None}, {"is_sorted": True}],
    ids=str,
)
def test_same_seed_same_parameters_state_dict_and_repr(kwargs):
    made = []
    for cls in (pytest.importorskip("torch_geometric.nn").RGCNConv, RGCNConv):
        torch.manual_seed(5)
        made.append(
            cls(**{"in_channels": I, "out_channels": O, "num_relations": RELATIONS, "num_bases": BASES, **kwargs})
        )
    expected, ours = made
    assert list(ours.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), expected.parameters(), strict=True))
    assert repr(ours) == repr(expected)
    for a, b in ((ours, expected), (expected, ours)):
        for p in b.parameters():
            torch.nn.init.normal_(p)
        assert str(a.load_state_dict(b.state_dict())) == "<All keys matched successfully>"
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
