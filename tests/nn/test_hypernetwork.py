"""Hypernetwork: values and gradients, compile and export, z by layer name, errors."""

import copy
import pickle

import pytest
import torch
from small_networks import B, R, Returns, TrunkByName, by_hand, data, fill, primary
from torch import nn

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
