"""Hypernetwork: values and gradients, compile and export, z by layer name, errors."""

import copy
import pickle
import threading

import pytest
import torch
from small_networks import B, Checkpointed, R, Returns, TrunkByName, by_hand, data, fill, primary
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork, hyperize


def test_forward_and_gradients(model):
    x, cond = data()
    y, expected = model(x, cond), by_hand(model, x, cond)
    torch.testing.assert_close(y, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
    )


def test_points(model):
    x, cond = torch.randn(B, 2, 8, 4), torch.randn(B, 6)
    torch.testing.assert_close(model(x, cond)[:, 1, 3], model(x[:, 1, 3], cond))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(model, backend):
    f = torch.compile(model, fullgraph=True, backend=backend)
    for b in (B, B, 5, 3):
        x, cond = data(b)
        y, expected = f(x, cond), model(x, cond)
        torch.testing.assert_close(y, expected)
        parameters = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
        )
    with pytest.raises(ValueError, match="called with no z"):
        model.primary(x)


def test_only_the_primary_compiled(model):
    compiled = Hypernetwork(model.trunk, torch.compile(model.primary, fullgraph=True, backend="aot_eager"))
    for _ in range(3):
        x, cond = data()
        torch.testing.assert_close(compiled(x, cond), model(x, cond))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(model, strict):
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "cond": {0: batch}}
    exported = torch.export.export(model, data(), dynamic_shapes=shapes, strict=strict).module()
    for b in (B, 5):
        x, cond = data(b)
        torch.testing.assert_close(exported(x, cond), model(x, cond))


def test_wrong_z_by_name():
    z = torch.randn(B, R)
    for returned, message in [
        ({"0": z}, r"no z for \['2'\], only for \['0'\]"),
        ({}, r"no z for \['0', '2'\]"),
        ({"0": z, "2": z, "1": z}, r"a z for '1'; .*\['0', '2'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            Hypernetwork(Returns(returned), primary())(*data())
    with pytest.raises(TypeError, match="a list for '2'"):
        Hypernetwork(Returns({"0": z, "2": [z]}), primary())(*data())
    with pytest.raises(TypeError, match="tensor or a dict of tensors, got a tuple"):
        Hypernetwork(Returns((z,)), primary())(*data())


def test_layer_with_two_names():
    layer = HyperLinear(4, 4, R).apply(fill)
    z, x = torch.randn(B, R), torch.randn(B, 4)
    for name in ("0", "1"):
        model = Hypernetwork(Returns({name: z}), nn.Sequential(layer, layer))
        torch.testing.assert_close(model(x, None), layer(layer(x, z), z))
    with pytest.raises(ValueError, match="second z for '1'"):
        Hypernetwork(Returns({"0": z, "1": z}), nn.Sequential(layer, layer))(x, None)


def test_the_primary_itself_a_layer():
    layer, z, x = HyperLinear(4, 3, R), torch.randn(B, R), torch.randn(B, 4)
    assert torch.equal(Hypernetwork(Returns(z), layer)(x, None), layer(x, z))
    assert torch.equal(Hypernetwork(Returns({"": z}), layer)(x, None), layer(x, z))


def test_wrong_z():
    for z in (torch.randn(R), torch.randn(B + 1, R), torch.randn(B, R + 1)):
        with pytest.raises(ValueError, match=r"\bz\b"):
            Hypernetwork(Returns(z), primary())(*data())


def test_primary_without_a_generated_layer():
    with pytest.raises(ValueError, match=r"must have a HyperLinear.*Linear"):
        Hypernetwork(nn.Linear(6, R), nn.Linear(4, 3))
    for trunk, net in [(lambda cond: cond, primary()), (nn.Linear(6, R), lambda x: x)]:
        with pytest.raises(TypeError, match=r"must be an nn\.Module, got a function"):
            Hypernetwork(trunk, net)
    with pytest.raises(ValueError, match="inner Hypernetwork"):
        Hypernetwork(nn.Linear(6, R), Hypernetwork(nn.Linear(6, R), primary()))


def test_repr_lists_ungenerated_parameters():
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    assert "ungenerated: 1.weight, 1.bias\n" in repr(Hypernetwork(nn.Linear(6, R), hyperize(net, R)))
    assert "ungenerated: none" in repr(Hypernetwork(nn.Linear(6, R), primary()))
    deep = nn.Sequential(*[nn.LayerNorm(4) for _ in range(9)], nn.Linear(4, 3))
    assert "3.bias, … (18 in all)" in repr(Hypernetwork(nn.Linear(6, R), hyperize(deep, R)))


def test_copies(model):
    x, cond = data()
    expected = model(x, cond)
    other = Hypernetwork(copy.deepcopy(model.trunk), primary())
    other.load_state_dict(model.state_dict())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(clone(x, cond), expected)


def test_one_primary_in_two_hypernetworks():
    shared = primary()
    models = [Hypernetwork(nn.Linear(6, R), shared), Hypernetwork(TrunkByName("0", "2"), shared)]
    x, cond = data()
    for model in models:
        torch.testing.assert_close(model(x, cond), by_hand(model, x, cond))


def test_functional_transforms(model):
    model, (x, cond) = model.double(), (t.double() for t in data())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, cond):
        return torch.func.functional_call(model, parameters, (x[None], cond[None])).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, cond)
    model(x, cond).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)


# With an incidence: ragged points.


def ragged(ids=(2, 0, 2, 2, 1, 0, 2)):
    """Return x, cond and the instance of each row of x."""
    return torch.randn(len(ids), 4), torch.randn(3, 6), torch.tensor(ids)


def test_ragged_points(model):
    x, cond, ids = ragged()
    parameters = list(model.parameters())
    y, expected = model(x, cond, incidence=Incidence.from_batch(ids, 3)), model(x, cond[ids])
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, parameters, g), torch.autograd.grad(expected, parameters, g), rtol=1e-4, atol=1e-5
    )


def test_ragged_points_in_one_list(model):
    x, cond, _ = ragged()
    y = model(x, cond, incidence=Incidence.from_ptr(torch.tensor([0, 2, 2, 7])))
    torch.testing.assert_close(y, model(x, cond[[0, 0, 2, 2, 2, 2, 2]]))


def test_ragged_points_with_points(model):
    (_, cond, ids), x = ragged(), torch.randn(7, 2, 3, 4)
    torch.testing.assert_close(model(x, cond, incidence=Incidence.from_batch(ids, 3)), model(x, cond[ids]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ragged_points_compiled(model, backend):
    """Batches of other sizes compile again until the sizes are symbols, and then no more."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    f = torch.compile(model, fullgraph=True, backend=counter)
    for graphs, nodes in ((3, 7), (4, 9), (5, 11), (6, 8), (7, 20)):
        x, cond, ids = torch.randn(nodes, 4), torch.randn(graphs, 6), torch.randint(0, graphs, (nodes,))
        y = f(x, cond, incidence=Incidence.from_batch(ids, graphs))
        torch.testing.assert_close(y, model(x, cond[ids]))
    assert counter.frame_count <= 2


def test_ragged_points_exported(model):
    x, cond, ids = ragged()
    exported = torch.export.export(model, (x, cond), {"incidence": Incidence.from_batch(ids, 3)}).module()
    for order in (ids, ids.flip(0)):
        y = exported(x, cond, incidence=Incidence.from_batch(order, 3))
        torch.testing.assert_close(y, model(x, cond[order]))


def test_edges_in_every_layer(model):
    """A graph with one z for each edge: every layer sums over the edges."""
    x, cond = torch.randn(5, 4), torch.randn(12, 6)
    edge_index = torch.randint(0, 5, (2, 12))
    incidence = Incidence.from_edge_index(edge_index, 5, 5)
    z = model.trunk(cond)
    z = z if isinstance(z, dict) else {"0": z, "2": z}
    first, act, second = model.primary
    h = act(first(x, z["0"], incidence))
    torch.testing.assert_close(model(x, cond, incidence=incidence), second(h, z["2"], incidence))


def test_a_layer_that_the_incidence_does_not_fit(model):
    x, cond = torch.randn(5, 4), torch.randn(12, 6)
    edge_index = torch.stack([torch.arange(12) % 5, torch.arange(12) % 2])
    with pytest.raises(ValueError, match="x must have 5 rows, the incidence's num_sources, got 2"):
        model(x, cond, incidence=Incidence.from_edge_index(edge_index, 5, 2))
    with pytest.raises(ValueError, match="source must have values from 0 to 1, since there are 2 sources, got 2"):
        model(x, cond, incidence=Incidence.from_edge_index(edge_index))
    one = Hypernetwork(nn.Linear(6, R), HyperLinear(4, 3, R))
    y = one(x, cond, incidence=Incidence.from_edge_index(edge_index))
    torch.testing.assert_close(y, torch.zeros(2, 3).index_add(0, edge_index[1], one(x[edge_index[0]], cond)))


def test_wrong_incidence(model):
    x, cond, ids = ragged()
    with pytest.raises(TypeError, match=r"incidence must be a fasthyper.Incidence, got Tensor"):
        model(x, cond, incidence=ids)
    with pytest.raises(ValueError, match="z must have 4 rows, the incidence's num_conds, got 3"):
        model(x, cond, incidence=Incidence.from_batch(ids, 4))


class WithInner(nn.Module):
    """A primary with an inner Hypernetwork, whose trunk is generated too, and a layer that is called with its own z."""

    def __init__(self):
        super().__init__()
        self.first = HyperLinear(4, 5, R)
        self.inner = Hypernetwork(HyperLinear(4, 3, R), HyperLinear(5, 5, 3))
        self.after = HyperLinear(5, 5, R)
        self.own = HyperLinear(5, 3, R)
        self.apply(fill)

    def forward(self, x, z):
        return self.own(self.after(self.inner(self.first(x), x)), z)


def test_an_incidence_reaches_only_the_layers_that_take_z():
    model = Hypernetwork(nn.Linear(6, R), WithInner())
    x, cond, ids = ragged()
    z = torch.randn(7, R)
    incidence = Incidence.from_batch(ids, 3)
    torch.testing.assert_close(model(x, cond, z, incidence=incidence), model(x, cond[ids], z))
    p = model.primary
    p.forward = lambda x: p.own(p.first(x), None, Incidence.from_batch(1 - ids.clamp(max=1), 3))  # its own comes first
    z = model.trunk(cond)
    h = p.first(x, z, incidence)
    torch.testing.assert_close(model(x, cond, incidence=incidence), p.own(h, z[1 - ids.clamp(max=1)]))


def test_after_an_error_no_incidence_stays(model):
    x, cond, ids = ragged()
    with pytest.raises(ValueError, match="z must have"):
        model(x, cond, incidence=Incidence.from_batch(ids, 4))
    with pytest.raises(ValueError, match="called with no z"):
        model.primary(x)
    torch.testing.assert_close(model(x[:3], cond), by_hand(model, x[:3], cond))


def test_ragged_points_in_threads(model):
    jobs = [ragged(tuple(torch.randint(0, 3, (n,)).tolist())) for n in range(2, 8)]
    expected, wrong, start = [model(x, cond[ids]) for x, cond, ids in jobs], [], threading.Barrier(6)

    def work(job, y):
        x, cond, ids = job
        start.wait()
        try:
            for _ in range(20):
                torch.testing.assert_close(model(x, cond, incidence=Incidence.from_batch(ids, 3)), y)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_checkpointing_with_an_incidence(model):
    x, cond, ids = ragged()
    incidence, parameters = Incidence.from_batch(ids, 3), list(model.parameters())
    whole = Checkpointed(lambda x, cond: model(x, cond, incidence=incidence))
    expected = torch.autograd.grad(model(x, cond[ids]).square().sum(), parameters)
    torch.testing.assert_close(
        torch.autograd.grad(whole(x, cond).square().sum(), parameters), expected, rtol=1e-4, atol=1e-4
    )


def test_an_incidence_is_not_fused(fusing):
    model = Hypernetwork(nn.Linear(6, R), primary())
    x, cond, ids = ragged()
    y = model(x, cond, incidence=Incidence.from_batch(ids, 3))
    assert fusing.ran == []
    model(x, cond[ids])
    assert fusing.ran == ["primary"]
    torch.testing.assert_close(y, by_hand(model, x, cond[ids]))
