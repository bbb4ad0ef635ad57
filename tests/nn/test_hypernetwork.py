import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasthyper.nn import HyperLinear, Hypernetwork, hyperize

R, B = 7, 9


def primary():
    """Two generated layers with parameters away from zero."""
    return nn.Sequential(HyperLinear(4, 5, R), nn.Tanh(), HyperLinear(5, 3, R)).apply(_fill)


def _fill(module):
    if isinstance(module, HyperLinear):
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)


class TrunkByName(nn.Module):
    """One z per layer name."""

    def __init__(self, *names):
        super().__init__()
        self.trunks = nn.ModuleDict({name.replace(".", "_"): nn.Linear(6, R) for name in names})
        self.names = names

    def forward(self, cond):
        return {name: self.trunks[name.replace(".", "_")](cond) for name in self.names}


class Returns(nn.Module):
    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, cond):
        return self.z


def data(b=B):
    return torch.randn(b, 4), torch.randn(b, 6)


def by_hand(model, x, cond):
    """The sequential primary, with z passed along."""
    z = model.trunk(cond)
    for name, layer in model.primary.named_children():
        x = layer(x, z[name] if isinstance(z, dict) else z) if isinstance(layer, HyperLinear) else layer(x)
    return x


@pytest.fixture(params=["one z", "a z per layer"])
def model(request):
    trunk = nn.Linear(6, R) if request.param == "one z" else TrunkByName("0", "2")
    return Hypernetwork(trunk, primary())


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


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(model, strict):
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "cond": {0: batch}}
    exported = torch.export.export(model, data(), dynamic_shapes=shapes, strict=strict).module()
    for b in (B, 5):
        x, cond = data(b)
        torch.testing.assert_close(exported(x, cond), model(x, cond))


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
    model = Hypernetwork(trunk, Nested().apply(_fill))
    x, cond = data()
    p, z = model.primary, model.trunk(cond)
    if not named:
        z = dict.fromkeys(("first", "inner.trunk", "last"), z)
    inner = p.inner.primary[0](p.first(x, z["first"]), p.inner.trunk(x, z["inner.trunk"]))
    f = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.testing.assert_close(f(x, cond), p.last(inner, z["last"]))


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
                return self.layer(x)  # under the outer z again

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


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=False)


def test_checkpointing_inside_the_primary_is_refused():
    model = Hypernetwork(nn.Linear(6, R), Checkpointed(primary()))
    y = model(*data())
    with pytest.raises(ValueError, match=r"no z.*checkpointing inside the primary.*whole Hypernetwork"):
        y.sum().backward()


def test_checkpointing_around_works(model):
    x, cond = data()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x, cond).square().sum(), parameters)
    y = Checkpointed(model)(x, cond)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), parameters), expected)


def test_another_thread_meets_no_z():
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


def test_called_outside():
    with pytest.raises(ValueError, match=r"HyperLinear was called with no z.*layer\(x, z\).*Hypernetwork"):
        HyperLinear(4, 3, R)(torch.randn(B, 4))


def test_layer_that_the_primary_does_not_hold():
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


def test_z_by_name_is_checked():
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
    layer = HyperLinear(4, 4, R).apply(_fill)
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


def test_repr_lists_what_is_not_generated():
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


class CheckpointedHyperLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = HyperLinear(4, 4, R)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def test_a_checkpoint_recomputed_under_another_network_raises():
    inner = Hypernetwork(nn.Linear(6, R), CheckpointedHyperLinear())

    class Primary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = HyperLinear(4, 4, R)

        def forward(self, x):
            torch.autograd.grad(inner(x, torch.randn(len(x), 6)).sum(), inner.trunk.weight)
            return self.layer(x)

    with pytest.raises(ValueError, match="checkpointing"):
        Hypernetwork(nn.Linear(6, R), Primary())(torch.randn(5, 4), torch.randn(5, 6))
