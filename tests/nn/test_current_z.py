"""Which z a layer inside a primary takes: nested, in threads, in checkpoints, after errors."""

import gc
import threading
import weakref

import pytest
import torch
from small_networks import B, Checkpointed, R, TrunkByName, by_hand, data, fill, primary
from torch import nn

from fasthyper.nn import HyperLinear, Hypernetwork


@pytest.mark.parametrize("compiled", [False, True])
def test_six_threads(model, compiled):
    f = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    jobs = [data() for _ in range(6)]
    expected = [model(*job).detach() for job in jobs]
    f(*jobs[0])
    wrong, start = [], threading.Barrier(6)

    def work(i):
        start.wait()
        try:
            for _ in range(20):
                torch.testing.assert_close(f(*jobs[i]).detach(), expected[i])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Nested(nn.Module):
    """A primary with a Hypernetwork between two generated layers."""

    def __init__(self):
        super().__init__()
        self.first = HyperLinear(4, 5, R)
        self.inner = Hypernetwork(HyperLinear(4, 3, R), nn.Sequential(HyperLinear(5, 5, 3)))
        self.last = HyperLinear(5, 3, R)

    def forward(self, x):
        return self.last(self.inner(self.first(x), x))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_nested(compiled, named):
    trunk = TrunkByName("first", "inner.trunk", "last") if named else nn.Linear(6, R)
    model = Hypernetwork(trunk, Nested().apply(fill))
    x, cond = data()
    p, z = model.primary, model.trunk(cond)
    if not named:
        z = dict.fromkeys(("first", "inner.trunk", "last"), z)
    inner = p.inner.primary[0](p.first(x, z["first"]), p.inner.trunk(x, z["inner.trunk"]))
    f = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.testing.assert_close(f(x, cond), p.last(inner, z["last"]))


class GraphBreak(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def test_graph_break_inside_the_primary():
    model = Hypernetwork(nn.Linear(6, R), nn.Sequential(*primary()[:2], GraphBreak(), HyperLinear(5, 3, R)))
    f = torch.compile(model, backend="aot_eager")
    for b in (B, 5):
        x, cond = data(b)
        torch.testing.assert_close(f(x, cond), model(x, cond))


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("in the primary")


@pytest.mark.parametrize("compiled", [False, True])
def test_after_an_exception(compiled):
    layer = HyperLinear(4, 3, R)
    failing = Hypernetwork(nn.Linear(6, R), nn.Sequential(layer, Fails()))
    f = torch.compile(failing, backend="aot_eager") if compiled else failing
    x, cond = data()
    with pytest.raises(RuntimeError, match="in the primary"):
        f(x, cond)
    with pytest.raises(ValueError, match="called with no z"):
        layer(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.failing, self.layer = failing, HyperLinear(4, 3, R)

        def forward(self, x, cond):
            try:
                self.failing(x, cond)
            except RuntimeError:
                return self.layer(x)  # takes the outer z again

    outer = Hypernetwork(nn.Linear(6, R), Outer())
    torch.testing.assert_close(outer(x, cond, cond), outer.primary.layer(x, outer.trunk(cond)))


def test_z_is_not_kept_alive():
    class Keeps(nn.Linear):
        def forward(self, cond):
            z = super().forward(cond)
            self.z = weakref.ref(z)
            return z

    model = Hypernetwork(Keeps(6, R), primary())
    with torch.no_grad():
        model(*data())
    gc.collect()
    assert model.trunk.z() is None


def test_explicit_z_overrides():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = HyperLinear(4, 5, R), HyperLinear(5, 3, R)

        def forward(self, x, z):
            return self.b(self.a(x, z))

    model, (x, cond), z = Hypernetwork(nn.Linear(6, R), Own()), data(), torch.randn(B, R)
    y = model.primary.b(model.primary.a(x, z), model.trunk(cond))
    torch.testing.assert_close(model(x, cond, z=z), y)


def test_checkpointing_the_whole_network(model):
    x, cond = data()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x, cond).square().sum(), parameters)
    y = Checkpointed(model)(x, cond)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), parameters), expected)


def test_no_z_in_another_thread():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.error = HyperLinear(4, 3, R), None

        def forward(self, x):
            def work():
                try:
                    self.layer(x)
                except ValueError as error:
                    self.error = error

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return self.layer(x)

    model = Hypernetwork(nn.Linear(6, R), Elsewhere())
    model(*data())
    assert "another thread" in str(model.primary.error)


def test_no_z_outside_of_a_hypernetwork():
    with pytest.raises(ValueError, match=r"HyperLinear was called with no z.*layer\(x, z\).*Hypernetwork"):
        HyperLinear(4, 3, R)(torch.randn(B, 4))


def test_layer_outside_of_the_primary():
    outsider = HyperLinear(4, 4, R)

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.others = HyperLinear(4, 3, R), [outsider]

        def forward(self, x):
            return self.layer(self.others[0](x))

    x, cond = data()
    assert Hypernetwork(nn.Linear(6, R), Uses())(x, cond).shape == (B, 3)
    with pytest.raises(ValueError, match="no submodule of the primary"):
        Hypernetwork(TrunkByName("layer"), Uses())(x, cond)


def test_after_the_recompile_limit():
    """After a graph break Dynamo compiles a helper alone; at the limit, eager code calls the compiled helper."""
    torch._dynamo.reset()
    broken = Hypernetwork(nn.Linear(6, R), nn.Sequential(*primary()[:2], GraphBreak(), HyperLinear(5, 3, R)))
    torch.compile(broken, backend="eager")(*data())
    model = Hypernetwork(nn.Linear(6, R), primary())
    model.primary.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for b in (B, 5, 3):
            x, cond = data(b)
            torch.testing.assert_close(model(x, cond), by_hand(model, x, cond))
    torch._dynamo.reset()
