"""`deliver`: z for other methods of a primary than forward, and for many calls."""

import threading

import pytest
import torch
from small_networks import B, Checkpointed, R, TrunkByName, by_hand, data, fill, primary
from torch import nn

import fasthyper
from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork


class Decoder(nn.Module):
    """A network with methods of its own."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = HyperLinear(4, 4, R), HyperLinear(4, 4, R)
        self.apply(fill)

    def forward(self, x):
        return self.out(torch.tanh(self.cell(x)))

    def forward_features(self, x):
        return torch.tanh(self.cell(x))

    def generate(self, x, steps):
        for _ in range(steps):
            x = self(x)
        return x


def expected_generation(p, x, steps, cell, out):
    for _ in range(steps):
        x = p.out(torch.tanh(p.cell(x, cell)), out)
    return x


@pytest.mark.parametrize("named", [False, True])
def test_other_methods(named):
    model = Hypernetwork(TrunkByName("cell", "out") if named else nn.Linear(6, R), Decoder())
    (x, cond), p, calls = data(), model.primary, []
    model.trunk.register_forward_hook(lambda *_: calls.append(1))
    z = model.trunk(cond)
    cell, out = (z["cell"], z["out"]) if named else (z, z)
    calls.clear()
    with model.deliver(cond) as inside:
        assert inside is p
        y, features = p.generate(x, 3), p.forward_features(x)
    assert calls == [1]
    torch.testing.assert_close(y, expected_generation(p, x, 3, cell, out))
    torch.testing.assert_close(features, torch.tanh(p.cell(x, cell)))
    with fasthyper.deliver({p.cell: cell, p.out: out} if named else z):
        torch.testing.assert_close(p.generate(x, 3), y)
    with pytest.raises(ValueError, match="called with no z"):
        p.generate(x, 1)


def test_hooks_see_z():
    model, found = Hypernetwork(nn.Linear(6, R), primary()), []
    probe = HyperLinear(3, 2, R).apply(fill)
    model.primary.register_forward_hook(lambda module, args, y: found.append(probe(y)))
    x, cond = data()
    with model.deliver(cond):
        y = model.primary(x)
    torch.testing.assert_close(found[0], probe(y, model.trunk(cond)))


def test_nested_blocks_and_exceptions():
    layer, x = HyperLinear(4, 3, R).apply(fill), torch.randn(B, 4)
    a, b = torch.randn(B, R), torch.randn(B, R)
    with fasthyper.deliver(a):
        with fasthyper.deliver(b):
            torch.testing.assert_close(layer(x), layer(x, b))
        torch.testing.assert_close(layer(x), layer(x, a))
        with pytest.raises(ValueError, match="x must have"), fasthyper.deliver(b):
            layer(torch.randn(B, 5))
        torch.testing.assert_close(layer(x), layer(x, a))
        with pytest.raises(TypeError), fasthyper.deliver(3):
            pass
        torch.testing.assert_close(layer(x), layer(x, a))
    with pytest.raises(ValueError, match="no z"):
        layer(x)


def test_a_hypernetwork_inside_takes_its_own_z():
    model, z = Hypernetwork(nn.Linear(6, R), primary()), torch.randn(B, R)
    x, cond = data()
    with fasthyper.deliver(z):
        torch.testing.assert_close(model(x, cond), by_hand(model, x, cond))
        torch.testing.assert_close(model.primary[0](x), model.primary[0](x, z))


def test_threads():
    layer, x = HyperLinear(4, 3, R).apply(fill), torch.randn(B, 4)
    wrong, start = [], threading.Barrier(6)

    def work():
        z = torch.randn(B, R)
        expected = layer(x, z)
        with fasthyper.deliver(z):
            start.wait()
            for _ in range(50):
                if not torch.equal(layer(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_incidence_and_repeated_rows():
    p, z, ids = primary(), torch.randn(3, R), torch.tensor([2, 0, 2, 1])
    x = torch.randn(4, 4)
    with fasthyper.deliver(z, Incidence.from_batch(ids, 3)):
        y = p(x)
    with fasthyper.deliver(z[ids]):
        torch.testing.assert_close(y, p(x))
    x = torch.randn(6, 4)
    with fasthyper.deliver(z, repeat_z=True):
        y = p(x)
    with fasthyper.deliver(z.repeat_interleave(2, 0)):
        torch.testing.assert_close(y, p(x))
    model = Hypernetwork(nn.Linear(6, R), p, repeat_z=True)
    cond = torch.randn(3, 6)
    with model.deliver(cond):
        torch.testing.assert_close(p(x), model(x, cond))


def test_wrong_arguments():
    layer, z = HyperLinear(4, 3, R), torch.randn(B, R)
    incidence = Incidence.from_batch(torch.tensor([0]), 1)
    for args, error, message in [
        ((None,), TypeError, "z must be a tensor, or a dict .*, got a NoneType"),
        (([z],), TypeError, "z must be a tensor, or a dict .*, got a list"),
        (({"0": z},), TypeError, "keys of z must be the layers themselves, got '0'; Hypernetwork.deliver"),
        (({layer: [z]},), TypeError, "z must have a tensor, or a pair of tensors, for each layer, got a list"),
        (({layer: (z, None)},), TypeError, "z must have a tensor, or a pair"),
        ((z, torch.zeros(3)), TypeError, "incidence must be a fasthyper.Incidence, got Tensor"),
        ((z, None, 2), TypeError, "repeat_z must be a bool, got int"),
        ((z, incidence, True), ValueError, "incidence must be None with repeat_z=True"),
    ]:
        with pytest.raises(error, match=message), fasthyper.deliver(*args):
            pass
    model = Hypernetwork(nn.Linear(6, R), primary())
    with pytest.raises(TypeError, match="incidence must be"), model.deliver(torch.randn(B, 6), incidence=3):
        pass
    with fasthyper.deliver({layer: z}), pytest.raises(ValueError, match="no submodule"):
        HyperLinear(4, 3, R)(torch.randn(B, 4))


# Compiled.


def grads(f, model, *args):
    model.zero_grad()
    f(*args).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["around", "inside", "both"])
def test_fullgraph_with_checkpoints(model, backend, where):
    (x, cond), layers = data(), list(model.primary)
    expected = grads(model, model, x, cond)
    if where != "around":
        for i in (0, 2):
            model.primary[i] = Checkpointed(layers[i])
        if isinstance(model.trunk, TrunkByName):
            forward = model.trunk.forward
            model.trunk.forward = lambda cond: {f"{name}.inner": z for name, z in forward(cond).items()}
    net = model if where == "inside" else Checkpointed(model)
    f = torch.compile(net, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(grads(f, model, x, cond), expected)
    with pytest.raises(ValueError, match="called with no z"):
        layers[0](x)


def test_fullgraph_deliver(model):
    def f(x, cond):
        with model.deliver(cond) as p:
            return p(x), p[0](x)

    def g(x, z):
        with fasthyper.deliver(z):
            return model.primary(x)

    (x, cond), z = data(), torch.randn(B, R)
    for run, args in ((f, (x, cond)), (g, (x, z))):
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*args), run(*args))
        with pytest.raises(ValueError, match="called with no z"):
            model.primary(x)


def test_a_compiled_layer_inside_of_an_eager_checkpoint_raises():
    """Compiled code does not look for checkpoints: an error is better than a wrong z."""
    layer = HyperLinear(4, 4, R)
    model = Hypernetwork(nn.Linear(6, R), nn.Sequential(Checkpointed(torch.compile(layer, backend="eager"))))
    y = model(*data())
    with pytest.raises(ValueError, match="compiled inside of a checkpoint"):
        y.sum().backward()
