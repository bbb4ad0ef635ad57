"""Which code is that of a hyperized module: whatever stands in its classes, and whatever this calls."""

import copy
import functools
import operator
import pickle
import sys

import pytest
import torch
from torch import nn

from fasthyper.nn import Hypernetwork, hyperize, reads

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
    monkeypatch.setattr(reads, "_qualified_name", reads._name_of_function)
    for way in sorted(READS.keys() - {"generator expression"}):  # which leaves no function behind
        with pytest.raises(RuntimeError, match="reads the weight of the layer 'fc'"):
            READS[way](hyperize(Net(), R, "fc"))
