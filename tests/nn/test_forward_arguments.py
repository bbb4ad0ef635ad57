"""A Hypernetwork shows the arguments of its primary, in its class and through copies."""

import copy
import inspect
import pickle

import pytest
import torch
from small_networks import B, Checkpointed, R, data, fill
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fasthyper.nn import HyperLinear, Hypernetwork


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = HyperLinear(4, 3, R).apply(fill)

    def forward(self, features, mask=None, labels=None, *, scale=1.0):
        y = self.layer(features) * scale
        y = y if mask is None else y * mask
        return y if labels is None else (nn.functional.cross_entropy(y, labels), y)


NAMES = ["x", "cond", "args", "incidence", "features", "mask", "labels", "scale"]


def names(model):
    return list(inspect.signature(model.forward).parameters)


def build(primary=None):
    return Hypernetwork(nn.Linear(6, R), Classifier() if primary is None else primary)


def test_the_arguments_of_the_primary():
    model = build()
    assert names(model) == NAMES
    assert list(inspect.signature(type(model).forward).parameters) == ["self", *NAMES]
    (x, cond), labels = data(), torch.zeros(B, dtype=torch.long)
    y = model(x, cond)
    torch.testing.assert_close(model(features=x, cond=cond), y)
    torch.testing.assert_close(model(x, cond, scale=2.0), 2 * y)
    torch.testing.assert_close(model(cond=cond, features=x, labels=labels)[0], model(x, cond, None, labels)[0])


def test_a_primary_with_one_argument():
    model = build(nn.Sequential(HyperLinear(4, 3, R)))
    assert type(model) is Hypernetwork
    assert names(model) == ["x", "cond", "args", "incidence", "kwargs"]


def test_a_primary_with_any_arguments():
    class Anything(Classifier):
        def forward(self, features, mask=None, **more):
            return super().forward(features, mask, **more)

    assert names(build(Anything())) == [*NAMES[:6], "more"]

    class Nothing(Classifier):
        def forward(self, *args):
            return super().forward(*args)

    assert type(build(Nothing())) is Hypernetwork


def test_what_is_missing():
    x, cond = data()
    with pytest.raises(TypeError, match="misses cond"):
        build()(x)
    with pytest.raises(TypeError, match="features"):
        build()(cond=cond)


def test_it_stays_a_hypernetwork():
    model = build()
    assert isinstance(model, Hypernetwork)
    assert repr(model).startswith("Hypernetwork(")
    assert type(build()) is type(model)
    assert (type(model).__module__, type(model).__qualname__) == (Hypernetwork.__module__, "Hypernetwork")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled(protocol):
    model, (x, cond) = build(), data()
    clone = pickle.loads(pickle.dumps(model, protocol))
    assert type(clone) is type(model)
    assert torch.equal(clone(x, cond), model(x, cond))


def test_copies_and_state_dicts(tmp_path):
    model, (x, cond) = build(), data()
    torch.save(model, tmp_path / "model")
    loaded, other = torch.load(tmp_path / "model", weights_only=False), build()
    other.load_state_dict(model.state_dict())
    for clone in (copy.deepcopy(model), copy.copy(model), loaded, other):
        assert names(clone) == NAMES
        assert torch.equal(clone(x, cond), model(x, cond))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile, nn.DataParallel])
def test_through_wrappers(wrap):
    assert names(build(wrap(Classifier()))) == NAMES


def test_compiled():
    model, (x, cond) = build(), data()
    f = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(f(features=x, cond=cond, scale=2.0), model(x, cond, scale=2.0))


def test_exported():
    model, (x, cond) = build(), data()
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "cond": {0: batch}, "mask": {0: batch}}
    mask = torch.rand(B, 3)
    exported = torch.export.export(model, (x, cond), {"mask": mask}, dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(x[:5], cond[:5], mask=mask[:5]), model(x[:5], cond[:5], mask[:5]))


def test_a_subclass():
    class Named(Hypernetwork):
        """Has no forward of its own."""

    class Own(Hypernetwork):
        def forward(self, x, cond):
            return super().forward(x, cond, scale=3.0)

    model, (x, cond) = Own(nn.Linear(6, R), Classifier()), data()
    assert names(model) == ["x", "cond"]
    named = Named(nn.Linear(6, R), Classifier())
    assert isinstance(named, Named)
    assert names(named) == NAMES
    named.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x, cond), 3 * named(x, cond))


def test_nested():
    inner = Hypernetwork(HyperLinear(6, R, R), Classifier())
    assert names(Hypernetwork(nn.Linear(6, R), Checkpointed(inner))) == ["x", "cond", "args", "incidence", "kwargs"]
    assert names(Hypernetwork(nn.Linear(6, R), inner))[4:] == [n for n in NAMES if n not in NAMES[:4]]
