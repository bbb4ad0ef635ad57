"""NNConv: against its definition, in all that a layer must bear, and errors."""

import copy
import pickle

import pytest
import torch
from edge_networks import D, I, O, R, Trunk, data, definition, layer, network
from graphs import EDGES, gradients, reduced
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import BatchNorm1d, Linear, ReLU, Sequential, Tanh
from torch.nn.utils.parametrizations import spectral_norm

from fasthyper.nn import NNConv

AGGR = ("add", "sum", "mean", "max")


def check(conv, call, expected, *inputs):
    """Compare values and gradients."""
    g = torch.randn_like(call(conv, *inputs))
    torch.testing.assert_close(gradients(conv, call, inputs, g), gradients(conv, expected, inputs, g))


@pytest.mark.parametrize("aggr", AGGR)
@pytest.mark.parametrize("kind", EDGES)
def test_definition(kind, aggr):
    edge_index, conv = EDGES[kind](), layer(aggr=aggr)
    call = lambda m, x, a: m(x, edge_index, a)
    check(conv, call, lambda m, x, a: definition(m, x, x, edge_index, a, 6), *data(edge_index))
    assert conv.why_by_messages is None


@pytest.mark.parametrize("root_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_root_weight_or_bias(root_weight, bias):
    edge_index, conv = EDGES["random"](), layer(root_weight=root_weight, bias=bias)
    assert set(dict(conv.named_parameters())) - {f"nn.{n}" for n, _ in conv.nn.named_parameters()} == (
        {"lin.weight"} if root_weight else set()
    ) | ({"bias"} if bias else set())
    call = lambda m, x, a: m(x, edge_index, a)
    check(conv, call, lambda m, x, a: definition(m, x, x, edge_index, a, 6), *data(edge_index))


@pytest.mark.parametrize("size", [None, (6, 9), (None, 9), (6, None)])
def test_pair(size):
    edge_index, conv = EDGES["random"](), layer(in_channels=(I, 2))
    x, a = data(edge_index)
    x_target = torch.randn(9, 2).double()
    call = lambda m, x, t, a: m((x, t), edge_index, a, size)
    check(conv, call, lambda m, x, t, a: definition(m, x, t, edge_index, a, 9), x, x_target, a)


@pytest.mark.parametrize("size", [None, (6, 8)])
def test_no_features_of_targets(size):
    edge_index, conv = EDGES["random"](), layer()
    targets = 6 if size is None else 8
    call = lambda m, x, a: m((x, None), edge_index, a, size=size)
    check(conv, call, lambda m, x, a: definition(m, x, None, edge_index, a, targets), *data(edge_index))


class Doubled(Sequential):
    def forward(self, a):
        return 2 * super().forward(a)


def hooked():
    nn = network()
    nn[-1].register_forward_hook(lambda module, args, out: out + 1)
    return nn


def hooked_outside():
    nn = network()
    nn.register_forward_hook(lambda module, args, out: out + 1)
    return nn


def normed():
    nn = network()
    spectral_norm(nn[-1])
    return nn


HEADS = {
    "bare": lambda: Linear(D, I * O),
    "no bias": lambda: Sequential(Linear(D, R), ReLU(), Linear(R, I * O, bias=False)),
    "nested": lambda: Sequential(Sequential(Linear(D, R), ReLU()), Sequential(Tanh(), Sequential(Linear(R, I * O)))),
    "norm": lambda: Sequential(Linear(D, R), BatchNorm1d(R), Linear(R, I * O)),
}
BY_MESSAGES = {
    "module": (Trunk, "nn ends in a Trunk, not in an nn.Linear"),
    "activation": (lambda: Sequential(*network(), Tanh()), "nn ends in a Tanh"),
    "subclass": (lambda: Doubled(*network()), "nn has a Sequential with hooks or a forward of its own"),
    "hooked": (hooked, "nn ends in a Linear that is not plain: it has hooks"),
    "hooked outside": (hooked_outside, "nn has a Sequential with hooks"),
    "normed": (normed, "nn ends in a Linear that is not plain: its weight"),
    "empty": (lambda: Sequential(Linear(D, I * O), Sequential()), "nn has an empty Sequential at its end"),
}


@pytest.mark.parametrize("nn", HEADS.values(), ids=HEADS)
def test_heads(nn):
    edge_index, conv = EDGES["random"](), layer(nn=nn)
    assert conv.why_by_messages is None
    call = lambda m, x, a: m(x, edge_index, a)
    check(conv, call, lambda m, x, a: definition(m, x, x, edge_index, a, 6), *data(edge_index))


@pytest.mark.parametrize("aggr", AGGR)
@pytest.mark.parametrize(("nn", "why"), BY_MESSAGES.values(), ids=BY_MESSAGES)
def test_by_messages(nn, why, aggr):
    edge_index, conv = EDGES["random"](), layer(nn=nn, aggr=aggr).eval()
    call = lambda m, x, a: m(x, edge_index, a)
    check(conv, call, lambda m, x, a: definition(m, x, x, edge_index, a, 6), *data(edge_index))
    assert conv.why_by_messages.startswith(why)
    assert f"by messages, because {conv.why_by_messages}" in repr(conv)
    empty = EDGES["none"]()
    x, a = data(empty)
    torch.testing.assert_close(conv(x, empty, a), conv.lin(x) + conv.bias)


def test_a_function_generates_the_weights():
    conv = NNConv(I, O, lambda a: a.repeat(1, I * O), root_weight=False, bias=False)
    x, a = torch.randn(6, I), torch.randn(30, 1)
    edge_index = EDGES["random"]()
    messages = (a * x[edge_index[0]].sum(1, keepdim=True)).expand(-1, O)
    torch.testing.assert_close(conv(x, edge_index, a), reduced(messages, edge_index[1], 6, "add"))
    assert "function" in conv.why_by_messages


def test_a_hook_that_comes_later():
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    before = conv(x, edge_index, a)
    handle = conv.nn[-1].register_forward_hook(lambda module, args, out: 0 * out)
    torch.testing.assert_close(conv(x, edge_index, a), conv.lin(x) + conv.bias)
    handle.remove()
    assert torch.equal(conv(x, edge_index, a), before)


@pytest.mark.parametrize("nn", [network, Trunk])
def test_one_row_for_all_edges(nn):
    edge_index, conv = EDGES["random"](), layer(nn=nn)
    x, a = data(edge_index)
    torch.testing.assert_close(conv(x, edge_index, a[:1]), conv(x, edge_index, a[:1].expand(30, D)))


@pytest.mark.parametrize("aggr", ["add", "mean"])
def test_second_order(aggr):
    edge_index, conv = torch.tensor([[0, 2, 1, 2], [1, 1, 2, 1]]), layer(aggr=aggr)
    inputs = [t.requires_grad_() for t in data(edge_index, 3)]
    f = lambda x, a: conv(x, edge_index, a)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_int32():
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    for module in (conv, layer(nn=Trunk)):
        assert torch.equal(module(x, edge_index.int(), a), module(x, edge_index, a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    y = copy.deepcopy(conv).to(dtype)(x.to(dtype), edge_index, a.to(dtype))
    assert y.dtype == dtype
    bound = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), conv(x, edge_index, a), rtol=bound, atol=bound)


@pytest.mark.parametrize("nn", [network, Trunk])
def test_autocast(nn):
    edge_index, conv = EDGES["random"](), layer(nn=nn, bias=False).float()
    x, a = (t.float() for t in data(edge_index))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, edge_index, a)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv(x, edge_index, a), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("nn", "aggr"), [(network, "add"), (network, "max"), (Trunk, "mean")])
def test_compiled(nn, aggr):
    torch.compiler.reset()
    conv = layer(nn=nn, aggr=aggr)
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(conv, fullgraph=True, backend=counter)
    for count in (30, 17, 25, 41):
        edge_index = torch.randint(0, 6, (2, count))
        x, a = data(edge_index)
        call = lambda m, x, a, edge_index=edge_index: m(x, edge_index, a)
        torch.testing.assert_close(gradients(f, call, (x, a)), gradients(conv, call, (x, a)))
    assert counter.frame_count <= 2  # for any number of edges


def test_functional_call_and_grad():
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    parameters = dict(conv.named_parameters())
    loss = lambda p: torch.func.functional_call(conv, p, (x, edge_index, a)).square().sum()
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(torch.func.grad(loss)(parameters).values()), list(expected))


@pytest.mark.parametrize("nn", [network, Trunk])
def test_copies(nn):
    edge_index, conv = EDGES["random"](), layer(nn=nn)
    x, a = data(edge_index)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x, edge_index, a), conv(x, edge_index, a))
    assert str(copy.deepcopy(conv)) == str(conv)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_adjacency(layout):
    edge_index, conv = torch.tensor([[0, 1, 2, 3, 5], [0, 0, 1, 1, 3]]), layer(in_channels=(I, 2))
    x, a = data(edge_index)
    x_target = torch.randn(4, 2).double()
    transposed = torch.sparse_coo_tensor(edge_index.flip(0), a, (4, 6, D)).coalesce()
    if layout == "csr":
        transposed = torch.sparse_coo_tensor(edge_index.flip(0), a[:, 0], (4, 6)).to_sparse_csr()
        y = conv((x, x_target), transposed, a)  # edge_attr has the final word
    else:
        y = conv((x, x_target), transposed)
    torch.testing.assert_close(y, conv((x, x_target), edge_index, a))


# Errors.


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"aggr": "min"}, ValueError, "aggr must be one of 'add', 'sum', 'mean', 'max', got 'min'"),
        ({"aggr": ["add", "max"]}, ValueError, r"aggr must be one of .*, got \['add', 'max'\]"),
        ({"aggr": None}, ValueError, "aggr must be one of .*, got None"),
        ({"flow": "target_to_source"}, ValueError, "flow must be 'source_to_target', got 'target_to_source'"),
        ({"node_dim": 0}, TypeError, "node_dim"),
        ({"in_channels": -1}, ValueError, "in_channels must be positive, got -1: there is no lazy initialisation"),
        ({"in_channels": (I, 0)}, ValueError, "in_channels must be positive, got 0"),
        ({"in_channels": (I, 2, 3)}, ValueError, "in_channels must be an integer or a pair"),
        ({"in_channels": "5"}, TypeError, "in_channels must be an integer or a pair, got '5'"),
        ({"in_channels": I + 1}, ValueError, r"nn must return 6 \* 4 features.* got a last Linear with 20"),
    ],
)
def test_wrong_options(kwargs, error, message):
    with pytest.raises(error, match=message):
        layer(**kwargs)


WRONG = {
    "x of other width": ({"x": torch.randn(6, I + 1)}, ValueError, r"x must have shape \(nodes, 5\), got \(6, 6\)"),
    "x of three axes": ({"x": torch.randn(1, 6, I)}, ValueError, r"x must have shape \(nodes, 5\), got \(1, 6, 5\)"),
    "x of integers": ({"x": torch.zeros(6, I).long()}, TypeError, "x must be .*floating point.*got torch.int64"),
    "no x": ({"x": (None, torch.randn(6, I))}, TypeError, "x must be .*got NoneType"),
    "three x": ({"x": (torch.randn(6, I),) * 3}, ValueError, "x must be a tensor or a pair"),
    "targets": ({"x": (torch.randn(6, I), torch.randn(6, 2))}, ValueError, r"x\[1\] must have shape \(nodes, 5\)"),
    "size of sources": ({"size": (7, 6)}, ValueError, r"size\[0\] must be 6, the rows of x, got 7"),
    "size of targets": ({"size": (6, 5)}, ValueError, r"size\[1\] must be 6, the rows of x\[1\], got 5"),
    "size of one": ({"size": (6,)}, ValueError, "size must be a pair"),
    "too large": (
        {"edge_index": torch.tensor([[0, 6, 1], [0, 1, 2]])},
        ValueError,
        "edge_index is wrong: source must have values from 0 to 5, since there are 6 sources, got 6 at term 1",
    ),
    "negative": (
        {"edge_index": torch.tensor([[0, 1, 1], [0, 1, -1]])},
        ValueError,
        "edge_index is wrong: target must have values from 0 to 5, since there are 6 targets, got -1 at term 2",
    ),
    "one row": ({"edge_index": torch.zeros(3).long()}, ValueError, r"edge_index must have shape \(2, E\), got \(3,\)"),
    "a row each": ({"edge_index": torch.zeros(3, 2).long()}, ValueError, r"shape \(2, E\), got \(3, 2\)"),
    "float": ({"edge_index": torch.zeros(2, 3)}, TypeError, "edge_index must be int64 or int32, got torch.float32"),
    "list": ({"edge_index": [[0], [1]]}, TypeError, "edge_index must be a tensor of shape .*got list"),
    "other device": (
        {"edge_index": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
        ValueError,
        "edge_index must be on the device of x, cpu, got meta",
    ),
    "no attributes": ({"edge_attr": None}, ValueError, r"edge_attr must be a tensor \(E, D\), got None"),
    "too few attributes": (
        {"edge_attr": torch.randn(2, D)},
        ValueError,
        r"edge_attr must have a row for each of the 3 edges, got \(2, 3\) and 2 rows from nn",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs(wrong, error, message):
    given = {"x": torch.randn(6, I), "edge_index": torch.tensor([[0, 1, 2], [0, 1, 2]]), "edge_attr": torch.randn(3, D)}
    conv = layer().float()
    conv(**given)
    with pytest.raises(error, match=message):
        conv(**{**given, **wrong})
    if wrong.get("edge_attr", 0) is not None:
        with pytest.raises(error, match=message):
            layer(nn=Trunk).float()(**{**given, **wrong})
