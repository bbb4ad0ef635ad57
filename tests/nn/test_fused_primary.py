"""A primary of two layers and an activation runs as one op if the backend fuses it, with the same results."""

import copy
import pickle
import threading

import pytest
import torch
from small_networks import B, Checkpointed, R, Returns, TrunkByName, by_hand, data, fill, primary
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

import fasthyper
from fasthyper.backends import cpu
from fasthyper.nn import HyperLinear, Hypernetwork, hyperize

ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)]


def doubled():
    return tuple(t.double() for t in data())


def unfused(net, *args):
    """Run the network with a backend that fuses nothing."""
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
    """Return twice the last argument, as a hook of any kind."""
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
        # The hook replaces its last argument, except a full backward hook: it replaces the first of the two.
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


@pytest.fixture
def net():
    return Hypernetwork(nn.Linear(6, R), primary()).double()


def assert_agrees(net, f=None, by=by_hand):
    net.double()
    x, cond = doubled()
    y, expected = (net if f is None else f)(x.requires_grad_(), cond), by(net, x, cond)
    torch.testing.assert_close(y, expected)
    wanted = [x, *net.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), wanted) for t in (y, expected)))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"base": False}, {"bias": False, "base": False}], ids=str)
def test_fused(activation, options, fusing):
    layers = HyperLinear(4, 5, R, **options), activation, HyperLinear(5, 3, R)
    net = Hypernetwork(nn.Linear(6, R), nn.Sequential(*layers).apply(fill))
    assert_agrees(net)
    assert fusing.ran == ["primary", "primary_grads"]


def test_fused_after_hyperize(fusing):
    mlp = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3))
    assert_agrees(Hypernetwork(nn.Linear(6, R), hyperize(mlp, R).apply(fill)))
    assert fusing.ran == ["primary", "primary_grads"]


def test_one_layer_twice(fusing):
    layer = HyperLinear(4, 4, R).apply(fill)
    net = Hypernetwork(nn.Linear(6, R), nn.Sequential(layer, nn.Tanh(), layer))
    assert_agrees(net, by=lambda net, x, cond: layer(layer(x, net.trunk(cond)).tanh(), net.trunk(cond)))
    assert fusing.ran == ["primary", "primary_grads"]


@pytest.mark.parametrize("shape", [(), (2,), (2, 8)])
def test_points(net, shape, fusing):
    x, cond = torch.randn(B, *shape, 4).double(), torch.randn(B, 6).double()
    torch.testing.assert_close(net(x, cond), by_hand(net, x, cond))
    assert fusing.ran == ["primary"]


def test_autocast(net, fusing):
    x, cond = data()
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(x, cond), by_hand(net, x, cond)
    assert fusing.ran == ["primary"]
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_functional_call(net, fusing):
    x, cond = doubled()
    parameters = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    y = torch.func.functional_call(net, parameters, (x, cond))
    assert fusing.ran == ["primary"]
    net.load_state_dict(parameters)
    torch.testing.assert_close(y, by_hand(net, x, cond))


def test_no_gradients_of_frozen_parameters(net, fusing):
    net.primary[0].requires_grad_(False)
    net(*doubled()).sum().backward()
    assert fusing.masks == [(False, True, *[False] * 4, *[True] * 4)]


def test_checkpointed(net, fusing):
    assert_agrees(net, Checkpointed(net))
    assert fusing.ran == ["primary", "primary", "primary_grads"]


def test_copies(net, fusing):
    x, cond = doubled()
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(clone(x, cond), net(x, cond))
    assert len(fusing.ran) == 4


def test_six_threads(net, fusing):
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


def test_nested(fusing):
    """Layers take their own z: in a fused inner primary, in an outer one that cannot be fused, in an inner trunk."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = HyperLinear(4, 4, R)
            self.inner = Hypernetwork(HyperLinear(4, R, R), primary())
            self.last = HyperLinear(3, 2, R)

        def forward(self, x):
            return self.last(self.inner(self.first(x), x))

    net = Hypernetwork(nn.Linear(6, R), Outer().apply(fill))

    def by(net, x, cond):
        z, p = net.trunk(cond), net.primary
        h, inner = p.first(x, z), p.inner.trunk(x, z)
        for layer in p.inner.primary:
            h = layer(h, inner) if isinstance(layer, HyperLinear) else layer(h)
        return p.last(h, z)

    assert_agrees(net, by=by)
    assert fusing.ran == ["primary", "primary_grads"]


def test_fused_trunk(fusing):
    """A trunk that is a fused Hypernetwork, and computes z for another one."""
    inner = Hypernetwork(nn.Linear(6, R), nn.Sequential(HyperLinear(6, 5, R), nn.ReLU(), HyperLinear(5, R, R)))

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner.apply(fill)

        def forward(self, cond):
            return self.inner(cond, cond)

    net = Hypernetwork(Trunk(), primary())
    assert_agrees(net)
    assert fusing.ran.count("primary") == 3  # net, its trunk, and its trunk in by_hand


def test_after_an_exception(net, fusing, monkeypatch):
    """A kernel that fails leaves no current z behind."""

    def fails(*args):
        raise RuntimeError("in the kernel")

    best = fasthyper.backends.backend("auto", torch.device("cpu"))
    monkeypatch.setattr(best, "primary", fails)
    with pytest.raises(RuntimeError, match="in the kernel"):
        net(*doubled())
    with pytest.raises(ValueError, match="called with no z"):
        net.primary(doubled()[0])


@pytest.mark.parametrize("change", CHANGES)
def test_not_fused_after_a_change(change, net, fusing):
    """After a change, even after the first call, the modules run one by one, with the results of an unfused network."""
    net(*doubled())
    assert fusing.ran == ["primary"]
    fusing.calls.clear()
    undo = CHANGES[change](net)
    try:
        assert_agrees(net, by=unfused)
        assert fusing.calls == []
    finally:
        if hasattr(undo, "remove"):
            undo.remove()
            net(*doubled())
            assert fusing.ran == ["primary"]


def test_not_fused_with_a_z_per_layer(fusing):
    assert_agrees(Hypernetwork(TrunkByName("0", "2"), primary()))
    assert fusing.calls == []


def test_not_fused_with_repeated_z(net, fusing):
    x, cond = doubled()
    y = Hypernetwork(net.trunk, net.primary, repeat_z=True)(torch.cat([x, x], 1).view(2 * B, 4), cond)
    assert fusing.calls == []
    torch.testing.assert_close(y[::2], by_hand(net, x, cond))


def test_not_fused_with_other_layers(fusing):
    layer = HyperLinear(4, 4, R).apply(fill)
    nested = nn.Sequential(layer, nn.Tanh(), nn.Sequential(layer))
    for net in (layer, nn.Sequential(layer), nn.Sequential(layer, nn.Tanh()), nested):
        assert_agrees(Hypernetwork(nn.Linear(6, R), net), by=unfused)
    assert fusing.calls == []


@pytest.mark.parametrize("refused", ["tanh", B, 4])
def test_not_fused_when_the_backend_declines(refused, net, fusing):
    fusing.refused.add(refused)
    assert_agrees(net)
    assert set(fusing.calls) == {"fuses"}


@pytest.mark.parametrize("forced", [("materialised", None), ("auto", "fold")])
def test_not_fused_by_another_backend_or_schedule(forced, net, fusing):
    with fasthyper.use_backend(*forced):
        assert_agrees(net)
    assert fusing.calls == []


def test_forced_backend_that_cannot_run_on_the_device_of_x(net):
    """x is on a device on which the backend cannot run, but no layer takes it."""

    class Starts(nn.Module):
        def forward(self, x):
            return torch.zeros(x.shape, dtype=x.dtype)

    x, cond = doubled()
    net.primary.insert(0, Starts())
    with fasthyper.use_backend("aten" if cpu.unavailable() else "cpu"):
        torch.testing.assert_close(net(x.to("meta"), cond), net(x, cond))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_not_fused_when_compiled(backend, net, fusing):
    torch._dynamo.reset()  # the number of compilations of one forward is limited
    assert_agrees(net, torch.compile(net, fullgraph=True, backend=backend))
    assert fusing.calls == []
    assert_agrees(net)
    assert fusing.ran == ["primary", "primary_grads"]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_not_fused_when_exported(strict, net, fusing):
    assert_agrees(net, torch.export.export(net, doubled(), strict=strict).module())
    assert fusing.calls == []


def test_not_fused_under_a_transform(net, fusing):
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
def test_errors_equal_those_of_the_layers(x, z, autocast, fusing):
    net = Hypernetwork(Returns(z), primary())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        said = [raised(f, net, x, None) for f in (Hypernetwork.__call__, unfused)]
    assert said[0] == said[1]
    assert (said[0] is None) == ("primary" in fusing.calls)


@pytest.mark.parametrize("sizes", [(6, 3, R), (5, 3, R + 1), (5, 3, R, True, True, "hyperfan_in", "meta")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_the_second_layer(sizes, dtype, net, fusing):
    net.primary[2] = HyperLinear(*sizes).to(dtype)
    said = [raised(f, net, *doubled()) for f in (Hypernetwork.__call__, unfused)]
    assert said[0] is not None
    assert said[0] == said[1]
    assert "primary" not in fusing.calls


def test_more_arguments(net, fusing):
    for args, kwargs in (((1,), {}), ((), {"scale": 2})):
        with pytest.raises(TypeError, match="argument"):
            net(*doubled(), *args, **kwargs)
    assert fusing.calls == []
