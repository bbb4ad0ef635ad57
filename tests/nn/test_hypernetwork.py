import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import fasthyper
from fasthyper.backends import cpu
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


ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)]


def doubled():
    return tuple(t.double() for t in data())


def unfused(net, *args):
    """The network by a backend that fuses nothing."""
    with fasthyper.use_backend("materialised"):
        return net(*args)


def raised(f, *args):
    try:
        f(*args)
    except Exception as error:
        return type(error), str(error)
    return None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubles(*args):
    """What a hook of any kind returns: twice what it was given last."""
    last = args[-1]
    return tuple(t if t is None else 2 * t for t in last) if isinstance(last, tuple) else 2 * last


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def replace(k, module):
    return lambda net: net.primary.__setitem__(k, module)


def _changes():
    modules = {"primary": lambda net: net.primary, **{str(k): lambda net, k=k: net.primary[k] for k in range(3)}}
    for name, module in modules.items():
        # Of forward hooks the last argument is the output, of full backward hooks what is to be replaced comes first.
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_pre_hook"):
            yield f"{kind} of {name}", lambda net, m=module, kind=kind: getattr(m(net), f"register_{kind}")(doubles)
        yield (
            f"full_backward_hook of {name}",
            lambda net, m=module: m(net).register_full_backward_hook(lambda m, dx, dy: doubles(dx)),
        )
        yield f"forward of {name} itself", lambda net, m=module: own_forward(m(net))
        yield f"{name} compiled", lambda net, m=module: m(net).compile(backend="eager")

        def subclassed(net, m=module):
            m(net).__class__ = type("Mine", (type(m(net)),), {})

        yield f"{name} of a subclass", subclassed
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_pre_hook"):
        yield f"{kind} of all", lambda net, kind=kind: getattr(torch_module, f"register_module_{kind}")(lambda *a: None)
    yield "hook of all", lambda net: torch_module.register_module_full_backward_hook(lambda *a: None)
    yield "parametrized", lambda net: parametrize.register_parametrization(net.primary[0], "weight", Doubled())
    yield "pruned", lambda net: prune.l1_unstructured(net.primary[2], "weight", 0.5)
    for other in (nn.ReLU6(), nn.GELU("tanh"), nn.Identity(), nn.Dropout(0.0), nn.Softplus(), nn.LayerNorm(5)):
        yield f"{other} between", replace(1, other)
    yield "a linear first", replace(0, nn.Linear(4, 5))
    yield "a linear last", replace(2, nn.Linear(5, 3))
    yield "an activation after", lambda net: net.primary.append(nn.ReLU())
    yield "an activation before", lambda net: net.primary.insert(0, nn.ReLU())
    yield "no second layer", lambda net: net.primary.__delitem__(2)
    yield "the primary compiled", lambda net: setattr(net, "primary", torch.compile(net.primary, backend="eager"))


CHANGES = dict(_changes())
X, Z = torch.ones(B, 4), torch.ones(B, R)
WRONG = [
    *((x, Z) for x in (None, [1.0], torch.tensor(1.0), X[0], X[:, :3], X[:-1], X[:, None, :2], X.double(), X.long())),
    *((X, z) for z in (Z[0], Z[:1], Z[:-1], Z[:, :-1], Z.double(), Z.half(), Z.int(), Z.to("meta"))),
    (X.to("meta"), Z),
]


class TestFused:
    """A primary of two layers and an activation, where the backend has it in one: the same results by other means."""

    @pytest.fixture
    def net(self):
        return Hypernetwork(nn.Linear(6, R), primary()).double()

    @staticmethod
    def agrees(net, f=None, by=by_hand):
        net.double()
        x, cond = doubled()
        y, expected = (net if f is None else f)(x.requires_grad_(), cond), by(net, x, cond)
        torch.testing.assert_close(y, expected)
        wanted = [x, *net.parameters()]
        torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), wanted) for t in (y, expected)))

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"base": False}, {"bias": False, "base": False}], ids=str)
    def test_it_is(self, activation, options, fusing):
        layers = HyperLinear(4, 5, R, **options), activation, HyperLinear(5, 3, R)
        net = Hypernetwork(nn.Linear(6, R), nn.Sequential(*layers).apply(_fill))
        self.agrees(net)
        assert fusing.ran == ["primary", "primary_grads"]

    def test_a_converted_network(self, fusing):
        mlp = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3))
        self.agrees(Hypernetwork(nn.Linear(6, R), hyperize(mlp, R).apply(_fill)))
        assert fusing.ran == ["primary", "primary_grads"]

    def test_one_layer_twice(self, fusing):
        layer = HyperLinear(4, 4, R).apply(_fill)
        net = Hypernetwork(nn.Linear(6, R), nn.Sequential(layer, nn.Tanh(), layer))
        self.agrees(net, by=lambda net, x, cond: layer(layer(x, net.trunk(cond)).tanh(), net.trunk(cond)))
        assert fusing.ran == ["primary", "primary_grads"]

    @pytest.mark.parametrize("shape", [(), (2,), (2, 8)])
    def test_points(self, net, shape, fusing):
        x, cond = torch.randn(B, *shape, 4).double(), torch.randn(B, 6).double()
        torch.testing.assert_close(net(x, cond), by_hand(net, x, cond))
        assert fusing.ran == ["primary"]

    def test_autocast(self, net, fusing):
        x, cond = data()
        net.float()
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = net(x, cond), by_hand(net, x, cond)
        assert fusing.ran == ["primary"]
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        y.float().sum().backward()
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}

    def test_parameters_given_from_outside(self, net, fusing):
        x, cond = doubled()
        parameters = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        y = torch.func.functional_call(net, parameters, (x, cond))
        assert fusing.ran == ["primary"]
        net.load_state_dict(parameters)
        torch.testing.assert_close(y, by_hand(net, x, cond))

    def test_frozen_parameters_are_not_asked_for(self, net, fusing):
        net.primary[0].requires_grad_(False)
        net(*doubled()).sum().backward()
        assert fusing.masks == [(False, True, *[False] * 4, *[True] * 4)]

    def test_checkpointing_around(self, net, fusing):
        self.agrees(net, Checkpointed(net))
        assert fusing.ran == ["primary", "primary", "primary_grads"]

    def test_copies(self, net, fusing):
        x, cond = doubled()
        for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(clone(x, cond), net(x, cond))
        assert len(fusing.ran) == 4

    def test_six_threads(self, net, fusing):
        jobs = [doubled() for _ in range(6)]
        expected = [by_hand(net, *job).detach() for job in jobs]
        wrong, start = [], threading.Barrier(6)

        def work(i):
            start.wait()
            for _ in range(20):
                if not torch.allclose(net(*jobs[i]).detach(), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert fusing.ran == ["primary"] * 120

    def test_networks_within_networks(self, fusing):
        """Each meets its own z: an inner primary that is fused, an outer one that cannot be, and an inner trunk."""

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = HyperLinear(4, 4, R)
                self.inner = Hypernetwork(HyperLinear(4, R, R), primary())
                self.last = HyperLinear(3, 2, R)

            def forward(self, x):
                return self.last(self.inner(self.first(x), x))

        net = Hypernetwork(nn.Linear(6, R), Outer().apply(_fill))

        def by(net, x, cond):
            z, p = net.trunk(cond), net.primary
            h, inner = p.first(x, z), p.inner.trunk(x, z)
            for layer in p.inner.primary:
                h = layer(h, inner) if isinstance(layer, HyperLinear) else layer(h)
            return p.last(h, z)

        self.agrees(net, by=by)
        assert fusing.ran == ["primary", "primary_grads"]

    def test_a_trunk_that_is_one(self, fusing):
        """A Hypernetwork as the trunk, fused in turn, and z of its own for the outer one."""
        inner = Hypernetwork(nn.Linear(6, R), nn.Sequential(HyperLinear(6, 5, R), nn.ReLU(), HyperLinear(5, R, R)))

        class Trunk(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner.apply(_fill)

            def forward(self, cond):
                return self.inner(cond, cond)

        net = Hypernetwork(Trunk(), primary())
        self.agrees(net)
        assert fusing.ran.count("primary") == 3  # net, and its trunk by hand

    def test_after_an_exception(self, net, fusing, monkeypatch):
        """A kernel that fails leaves no z behind."""

        def fails(*args):
            raise RuntimeError("in the kernel")

        best = fasthyper.backends.backend("auto", torch.device("cpu"))
        monkeypatch.setattr(best, "primary", fails)
        with pytest.raises(RuntimeError, match="in the kernel"):
            net(*doubled())
        with pytest.raises(ValueError, match="called with no z"):
            net.primary(doubled()[0])

    @pytest.mark.parametrize("change", CHANGES)
    def test_anything_else_is_not(self, change, net, fusing):
        """What was changed after a call, too: the modules run, with the results that they have without all this."""
        net(*doubled())
        assert fusing.ran == ["primary"]
        fusing.calls.clear()
        undo = CHANGES[change](net)
        try:
            self.agrees(net, by=unfused)
            assert fusing.calls == []
        finally:
            if hasattr(undo, "remove"):
                undo.remove()
                net(*doubled())
                assert fusing.ran == ["primary"]

    def test_a_z_per_layer_is_not(self, fusing):
        self.agrees(Hypernetwork(TrunkByName("0", "2"), primary()))
        assert fusing.calls == []

    def test_a_primary_of_another_shape_is_not(self, fusing):
        layer = HyperLinear(4, 4, R).apply(_fill)
        nested = nn.Sequential(layer, nn.Tanh(), nn.Sequential(layer))
        for net in (layer, nn.Sequential(layer), nn.Sequential(layer, nn.Tanh()), nested):
            self.agrees(Hypernetwork(nn.Linear(6, R), net), by=unfused)
        assert fusing.calls == []

    @pytest.mark.parametrize("refused", ["tanh", B, 4])
    def test_what_the_backend_does_not_fuse_is_not(self, refused, net, fusing):
        fusing.refused.add(refused)
        self.agrees(net)
        assert set(fusing.calls) == {"fuses"}

    @pytest.mark.parametrize("forced", [("materialised", None), ("auto", "fold")])
    def test_another_choice_is_not(self, forced, net, fusing):
        with fasthyper.use_backend(*forced):
            self.agrees(net)
        assert fusing.calls == []

    def test_a_backend_forced_for_what_comes_within(self, net):
        """x is where the backend cannot run, and does not meet a layer."""

        class Starts(nn.Module):
            def forward(self, x):
                return torch.zeros(x.shape, dtype=x.dtype)

        x, cond = doubled()
        net.primary.insert(0, Starts())
        with fasthyper.use_backend("aten" if cpu.unavailable() else "cpu"):
            torch.testing.assert_close(net(x.to("meta"), cond), net(x, cond))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_it_is_not(self, backend, net, fusing):
        torch._dynamo.reset()  # there is a limit to how often one forward is compiled
        self.agrees(net, torch.compile(net, fullgraph=True, backend=backend))
        assert fusing.calls == []
        self.agrees(net)
        assert fusing.ran == ["primary", "primary_grads"]

    @pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
    @pytest.mark.parametrize("strict", [False, True])
    def test_exported_it_is_not(self, strict, net, fusing):
        self.agrees(net, torch.export.export(net, doubled(), strict=strict).module())
        assert fusing.calls == []

    def test_under_a_transform_it_is_not(self, net, fusing):
        x, cond = doubled()
        one = lambda x, cond: net(x[None], cond[None])[0]
        expected = by_hand(net, x, cond)
        torch.testing.assert_close(torch.func.vmap(one)(x, cond), expected)
        dx = torch.func.grad(lambda x: net(x, cond).sum())(x)
        with forward_ad.dual_level():
            dy = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)), cond)).tangent
        assert fusing.calls == []
        x.requires_grad_()
        torch.testing.assert_close(dx, torch.autograd.grad(by_hand(net, x, cond).sum(), x)[0])
        torch.testing.assert_close(dy, torch.func.jvp(lambda x: by_hand(net, x, cond), (x,), (torch.ones_like(x),))[1])

    @pytest.mark.parametrize(("x", "z"), WRONG, ids=lambda t: str(getattr(t, "shape", t)))
    @pytest.mark.parametrize("autocast", [False, True])
    def test_errors_are_those_of_the_layers(self, x, z, autocast, fusing):
        net = Hypernetwork(Returns(z), primary())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            said = [raised(f, net, x, None) for f in (Hypernetwork.__call__, unfused)]
        assert said[0] == said[1]
        assert (said[0] is None) == ("primary" in fusing.calls)

    @pytest.mark.parametrize("sizes", [(6, 3, R), (5, 3, R + 1), (5, 3, R, True, True, "hyperfan_in", "meta")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_errors_of_the_second_layer(self, sizes, dtype, net, fusing):
        net.primary[2] = HyperLinear(*sizes).to(dtype)
        said = [raised(f, net, *doubled()) for f in (Hypernetwork.__call__, unfused)]
        assert said[0] is not None
        assert said[0] == said[1]
        assert "primary" not in fusing.calls

    def test_more_arguments(self, net, fusing):
        for args, kwargs in (((1,), {}), ((), {"scale": 2})):
            with pytest.raises(TypeError, match="argument"):
                net(*doubled(), *args, **kwargs)
        assert fusing.calls == []
