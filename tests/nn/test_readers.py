"""Which code is that of a hyperized module: what it and its classes have, and whatever this calls in its thread."""

import collections
import concurrent.futures
import copy
import functools
import operator
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from fasthyper.nn import Hypernetwork, calling_code, hyperize, readers

R, B = 5, 4


def norm_of(module):
    return module.fc.weight.norm()


def power(weight, exponent):
    return weight.square().sum() ** exponent


def counted(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Penalty:
    """An object that is no module, and reads a layer."""

    def __init__(self, layer):
        self.layer = layer

    def value(self):
        return self.layer.weight.norm()

    def later(self):
        return lambda: self.layer.weight.norm()


class Ratio:
    def __init__(self, layer):
        self.layer = layer

    def value(self):
        return self.layer.weight.norm()


class Total:
    def __init__(self, layer):
        self.layer = layer

    def value(self):
        return self.layer.weight.sum()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.penalty = Penalty(self.fc)
        self.penalties = [self.penalty]
        self.bound = functools.partial(Ratio(self.fc).value)
        self.total = Total(self.fc).value

    def forward(self, x):
        return self.fc(x)

    def method(this):
        return this.fc.weight.norm()

    def nested(self):
        def inner():
            return self.fc.weight.norm()

        return inner()

    def closure(self):
        def inner():
            return self.fc.weight.norm()

        return inner

    def of_a_layer(self):
        fc = self.fc

        def inner(factor):
            def innermost():
                return factor * fc.weight.norm()

            return innermost

        return lambda: inner(2)()

    def generator(self):
        for layer in [self.fc]:
            yield layer.weight.norm()

    def expression(self):
        return (layer.weight.norm() for layer in [self.fc])

    @property
    def norm(this):
        return this.fc.weight.norm()

    @functools.cached_property
    def cached(this):
        return this.fc.weight.norm()

    @staticmethod
    def static(layer):
        return layer.weight.norm()

    @classmethod
    def of_class(cls, layer):
        return layer.weight.norm()

    @counted
    def decorated(this):
        return this.fc.weight.norm()

    def by_function(self):
        return norm_of(self)

    def by_helper(self):
        return Penalty(self.fc).value()

    def by_partial(self):
        return functools.partial(norm_of, self)()

    def by_map(self):
        return next(map(operator.attrgetter("weight"), [self.fc])).norm()

    def by_name(self):
        return self.get_parameter("fc.weight").norm()

    def with_weight(self):
        return functools.partial(power, self.fc.weight, exponent=2)()


class Sub(Net):
    """The code is that of a base class."""


READS = {
    "method": lambda net: net.method(),
    "nested function": lambda net: net.nested(),
    "closure": lambda net: net.closure()(),
    "closure over a layer": lambda net: net.of_a_layer()(),
    "generator": lambda net: next(net.generator()),
    "generator expression": lambda net: next(net.expression()),
    "property": lambda net: net.norm,
    "cached property": lambda net: net.cached,
    "static method": lambda net: net.static(net.fc),
    "class method": lambda net: net.of_class(net.fc),
    "decorated": lambda net: net.decorated(),
    "function": lambda net: net.by_function(),
    "object": lambda net: net.by_helper(),
    "partial": lambda net: net.by_partial(),
    "map": lambda net: net.by_map(),
    "get_parameter": lambda net: net.by_name(),
    "partial of the weight": lambda net: net.with_weight(),
    "held object": lambda net: net.penalty.value(),
    "closure of a held object": lambda net: net.penalty.later()(),
    "held objects": lambda net: net.penalties[0].value(),
    "held partial": lambda net: net.bound(),
    "held method": lambda net: net.total(),
}


@pytest.fixture(params=[Net, Sub])
def net(request):
    return hyperize(request.param(), R, "fc")


@pytest.mark.parametrize("way", READS)
def test_every_read_raises(net, way):
    if way == "generator expression" and sys.version_info < (3, 11):
        pytest.skip("its code does not tell where it stands")
    READS[way](Net())  # the code runs with an ordinary layer
    for copied in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)) if way != "cached property" else net):
        with pytest.raises(RuntimeError, match=r"^(?!Other code).* reads the weight of the layer 'fc'"):
            READS[way](copied)


@pytest.mark.parametrize("way", READS)
def test_every_read_raises_while_z_is_delivered(way):
    class Outer(Net):
        def forward(self, x):
            return self.fc(x) * READS[way](self)

    model = Hypernetwork(nn.Identity(), hyperize(Outer(), R, "fc"))
    with pytest.raises(RuntimeError, match="reads the weight of the layer 'fc'"):
        model(torch.randn(B, 3), torch.randn(B, R))


NAMES = {  # as code tells them since Python 3.11
    "method": "Sub.method",
    "nested function": "Net.nested.<locals>.inner",
    "generator expression": "Net.expression",
    "function": "Sub.by_function",
    "static method": "Net.static",
    "held object": "Penalty.value",
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no qualified name")
@pytest.mark.parametrize("way", NAMES)
def test_the_error_names_the_reader(way):
    with pytest.raises(RuntimeError, match=rf"^{NAMES[way]} reads the weight"):
        READS[way](hyperize(Sub(), R, "fc"))


def penalty(net):
    return net.fc.weight.norm()


def lasso(fc):
    return fc.weight.abs().sum()


def put(name, value):
    """Put an attribute on a class of networks."""
    return type("Named", (Net,), {name: value, "__qualname__": "Other"})()


head_of = (lambda: lambda net: net.fc.weight)()


class Deep(Penalty):
    """What no other network holds."""


class Installs:
    factor = 2

    def function(self):
        return lambda net: self.factor * net.fc.weight.norm()


class Bag(dict):
    def value(self):
        return self["layer"].weight.norm()


def holding(make):
    net = Net()
    net.held = make(net)
    return net


# A network, and a read of it.
PUT = {
    "function": lambda: (put("norm", penalty), lambda net: net.norm()),
    "lambda": lambda: (put("norm", lambda net: net.fc.weight.norm()), lambda net: net.norm()),
    "property": lambda: (put("norm", property(penalty)), lambda net: net.norm),
    "cached property": lambda: (put("cached", functools.cached_property(penalty)), lambda net: net.cached),
    "static method": lambda: (put("lasso", staticmethod(lasso)), lambda net: net.lasso(net.fc)),
    "static lambda": lambda: (put("lasso", staticmethod(lambda fc: fc.weight.sum())), lambda net: net.lasso(net.fc)),
    "partial method": lambda: (put("norm", functools.partialmethod(penalty)), lambda net: net.norm()),
    "closure of another object": lambda: (put("scaled", Installs().function()), lambda net: net.scaled()),
    "wrapped": lambda: (put("norm", counted(penalty)), lambda net: net.norm()),
    "without gradients": lambda: (put("norm", torch.no_grad()(penalty)), lambda net: net.norm()),
    "method of an instance": lambda: (holding(lambda net: types.MethodType(penalty, net)), lambda net: net.held()),
    "function of an instance": lambda: (holding(lambda net: lasso), lambda net: net.held(net.fc)),
    "partial": lambda: (holding(lambda net: functools.partial(lasso, net.fc)), lambda net: net.held()),
    "nested list": lambda: (holding(lambda net: {"a": [Deep(net.fc)]}), lambda net: net.held["a"][0].value()),
    "nested partial": lambda: (holding(lambda net: [[functools.partial(lasso, net.fc)]]), lambda net: net.held[0][0]()),
    "cycle": lambda: (holding(lambda net: in_a_cycle(Deep(net.fc))), lambda net: net.held[1][1].value()),
    "deque": lambda: (holding(lambda net: collections.deque([Deep(net.fc)])), lambda net: net.held[0].value()),
    "container": lambda: (holding(lambda net: Bag(layer=net.fc)), lambda net: net.held.value()),
}


def in_a_cycle(helper):
    cycle = [helper]
    cycle[:] = [cycle, (cycle, helper)]
    return cycle


@pytest.mark.parametrize("way", PUT)
def test_what_was_put_on_a_class_or_an_instance_raises(way):
    net, read = PUT[way]()
    read(PUT[way]()[0])  # the code runs with an ordinary layer
    for copied in (made := hyperize(net, R, "fc"), copy.deepcopy(made)):
        with pytest.raises(RuntimeError, match=r"^(?!Other code).* reads the weight of the layer 'fc'"):
            read(copied)
        for other in (head_of, counted(head_of)):  # another lambda, and what has the wrapper of a method
            assert other(copied).shape == (3, 3, R)


class Mixin:
    def norm_of(self, net):
        return net.fc.weight.norm()

    def later(self, net):
        return lambda: net.fc.weight.norm() * (self is not None)

    @classmethod
    def of_class(cls, net):
        return net.fc.weight.norm()


class Mixed(Mixin, Net):
    pass


class Outside(Mixin):
    """Code that shares a base class with the network, and knows the heads."""


class Helper(Mixin):
    pass


MIXED = {
    "method": lambda owner, net: owner.norm_of(net),
    "closure": lambda owner, net: owner.later(net)(),
    "class method": lambda owner, net: type(owner).of_class(net),
}


@pytest.mark.parametrize("way", MIXED)
def test_a_base_class_is_that_of_its_owner(way):
    net = Mixed()
    net.helper = Helper()
    net = hyperize(net, R, "fc")
    nn.init.ones_(net.fc.weight)
    assert MIXED[way](Outside(), net) == net.fc.weight.norm() != 0
    for owner in (net, net.helper):
        with pytest.raises(RuntimeError, match="reads the weight of the layer 'fc'"):
            MIXED[way](owner, net)


def test_threads_have_a_stack_of_their_own():
    net = hyperize(Net(), R, "fc")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(norm_of, net).result() == 0  # the head


class Trainer:
    """Code that knows the heads."""

    def __init__(self, net):
        self.net = net

    def reset(self):
        def fill(module):
            if module is self.net.fc:
                module.weight.data.fill_(2.0)

        self.net.apply(fill)
        return self.net.fc.weight

    @property
    def head(self):
        return norm_of(self.net)


def test_other_code_reads_the_head(net):
    trainer = Trainer(net)
    assert trainer.reset().shape == (3, 3, R)
    read = lambda: net.fc.weight
    for head in (read(), functools.partial(getattr, net.fc, "weight")(), net.get_parameter("fc.weight")):
        assert type(head) is nn.Parameter
        assert bool((head == 2).all())
    torch.testing.assert_close(trainer.head, net.fc.weight.norm())


class Builds(Net):
    @classmethod
    def network(cls, head):
        return Hypernetwork.from_flat_head(head, cls(), layout="oi")


def test_the_package_reads_heads_for_readers():
    model = Builds.network(nn.Linear(R, 12))
    again = model.primary.network(model.to_flat_head())
    x, z = torch.randn(B, 3), torch.randn(B, R)
    torch.testing.assert_close(again(x, z), model(x, z))


def test_names_of_code_in_python_3_10(monkeypatch):
    """There code has no qualified name, but the function that runs it has."""
    monkeypatch.setattr(calling_code, "qualified_name", readers._name_of_function)
    for way in sorted(READS.keys() - {"generator expression"}):  # which leaves no function behind
        with pytest.raises(RuntimeError, match="reads the weight of the layer 'fc'"):
            READS[way](hyperize(Net(), R, "fc"))
