"""Code that was written for an ordinary layer, and reads a weight that is generated."""

import copy

import pytest
import torch
import torch.nn.functional as F
from other_libraries import define_ops_of_torchvision
from torch import nn

from fasthyper.nn import HyperLinear, Hypernetwork, hyperize

R, B = 5, 4


class Reader(nn.Module):
    """A module that uses its layer in one of the ways in which code does."""

    def __init__(self, way, layer=None):
        super().__init__()
        self.fc = nn.Linear(3, 3) if layer is None else layer
        self.other = nn.Linear(3, 3)
        self.way = way

    def forward(self, x):
        return self.way(self, x)

    def penalty(self):
        return sum(layer.weight.square().sum() for layer in [self.fc])

    def tie(self):
        self.other.weight = self.fc.weight


VALUES = {
    "linear": lambda self, x: F.linear(x, self.fc.weight, self.fc.bias),
    "bias": lambda self, x: x + self.fc.bias,
    "matmul": lambda self, x: x @ self.fc.weight.t(),
    "property": lambda self, x: x @ self.fc.weight.T,
    "norm": lambda self, x: self.fc(x) / self.fc.weight.norm(),
    "cat": lambda self, x: F.linear(x, torch.cat([self.fc.weight, self.other.weight])),
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.fc.weight),
    "item": lambda self, x: self.fc(x) * self.fc.weight[0, 0].item(),
    "data": lambda self, x: self.fc(x) + self.fc.weight.data.sum(),
    "detach": lambda self, x: self.fc(x) + self.fc.weight.detach().sum(),
    "to": lambda self, x: x @ self.fc.weight.to(torch.float64).to(x.dtype),
    "keyword": lambda self, x: F.linear(input=x, weight=self.fc.weight),
    "tolist": lambda self, x: self.fc(x) * len(self.fc.weight.tolist()),
    "clone": lambda self, x: F.linear(x, self.fc.weight.clone()),
    "compare": lambda self, x: self.fc(x) if (self.fc.weight > 0).all() else x,
    "truth": lambda self, x: self.fc(x) if self.fc.bias[:1] else x,
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("way", VALUES)
def test_values_raise(way, rank):
    net = Reader(VALUES[way])
    net(torch.randn(B, 3))  # the code runs with an ordinary layer
    model = Hypernetwork(nn.Identity(), hyperize(net, R, "fc", rank=rank))
    parameter = "bias" if way in ("bias", "truth") else "weight"
    with pytest.raises(RuntimeError, match=rf"Reader.* reads the {parameter} of the layer 'fc'.*exclude='fc'"):
        model(torch.randn(B, 3), torch.randn(B, R))


METADATA = {
    "dtype": lambda self, x: self.fc(x.to(self.fc.weight.dtype)),
    "device": lambda self, x: self.fc(x.to(self.fc.weight.device)),
    "to": lambda self, x: self.fc(x.to(self.fc.weight)),
    "type_as": lambda self, x: self.fc(x.type_as(self.fc.weight)),
    "shape": lambda self, x: self.fc(x[:, : self.fc.weight.shape[1]]) * (self.fc.weight.dim() - 1),
    "size": lambda self, x: self.fc(x).view(-1, self.fc.weight.size(0)),
    "new_zeros": lambda self, x: self.fc(x) + self.fc.weight.new_zeros(3),
    "is_tensor": lambda self, x: self.fc(x) if isinstance(self.fc.weight, nn.Parameter) else None,
    "is_none": lambda self, x: self.fc(x) if self.fc.bias is not None else None,
    "trained": lambda self, x: self.fc(x) if torch.compiler.is_compiling() or self.fc.weight.requires_grad else None,
    "is_floating": lambda self, x: self.fc(x) if self.fc.weight.is_floating_point() else None,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", METADATA)
def test_what_is_not_a_value_is_that_of_the_ordinary_layer(way, compiled):
    net = Reader(METADATA[way])
    model = Hypernetwork(nn.Identity(), hyperize(net, R, "fc"))
    x, z = torch.randn(B, 3), torch.randn(B, R)
    if compiled:
        if way in ("is_tensor", "type_as"):
            pytest.skip("Dynamo has no rule for it")
        torch.compiler.reset()  # each way compiles the forward of a Hypernetwork anew, up to Dynamo's limit
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = model(x, z)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, net(x))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_raises(fullgraph):
    model = Hypernetwork(nn.Identity(), hyperize(Reader(VALUES["linear"]), R, "fc"))
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match=r"(?s)reads the weight of the layer 'fc'|Observed exception"):
        compiled(torch.randn(B, 3), torch.randn(B, R))
    torch.compiler.reset()  # Dynamo would skip the forward of a Hypernetwork from here on


def test_methods_that_are_called_outside_of_the_forward():
    net = hyperize(Reader(METADATA["dtype"]), R, "fc")
    for copied in (net, copy.deepcopy(net), Hypernetwork(nn.Identity(), net).primary):
        with pytest.raises(RuntimeError, match="penalty reads the weight of the layer 'fc'"):
            copied.penalty()
    net.tie()
    with pytest.raises(RuntimeError, match="reads the weight of the layer 'fc'"):
        net.other(torch.randn(B, 3))


def test_an_attribute_that_would_be_lost_raises():
    def mark(self, x):
        self.fc.weight.is_special = True
        return self.fc(x)

    net = Reader(mark)
    net(torch.randn(B, 3))
    model = Hypernetwork(nn.Identity(), hyperize(net, R, "fc"))
    with pytest.raises(RuntimeError, match=r"mark.* reads the weight of the layer 'fc' in __setattr__"):
        model(torch.randn(B, 3), torch.randn(B, R))
    model.primary.fc.weight.is_special = True  # the head has it
    assert model.primary.fc.weight.is_special


class OtherNames(nn.Module):
    def __init__(this):
        super().__init__()
        this.fc = nn.Linear(3, 3)

    def penalty(this):
        return this.fc.weight.norm()

    def forward(this, x):
        return this.fc(x)


def test_methods_that_call_their_object_otherwise():
    with pytest.raises(RuntimeError, match="penalty reads the weight of the layer 'fc'"):
        hyperize(OtherNames(), R).penalty()


def test_other_code_reads_the_head():
    net = hyperize(Reader(METADATA["dtype"]), R, "fc")
    assert net.fc.weight.shape == (3, 3, R)
    assert net.get_parameter("fc.weight") is net.fc.weight is dict(net.named_parameters())["fc.weight"]
    model = Hypernetwork(nn.Linear(2, R), net)
    nn.init.normal_(model.primary.fc.weight)

    def fill(module):
        module.fc.weight.data.zero_()

    fill(net)
    assert not net.fc.weight.any()

    class Whole(nn.Module):  # was not hyperized: it knows that the weight is a head
        def __init__(self):
            super().__init__()
            self.model = model
            nn.init.ones_(self.model.primary.fc.weight)

        def forward(self, x, cond):
            return self.model(x, cond) * self.model.primary.fc.weight.mean()

    whole = Whole()
    x, cond = torch.randn(B, 3), torch.randn(B, 2)
    torch.testing.assert_close(whole(x, cond), model(x, cond))


def test_a_layer_that_was_not_hyperized_may_be_read():
    net = Reader(lambda self, x: self.fc(x) * self.fc.weight.mean(), HyperLinear(3, 3, R))
    x, z = torch.randn(B, 3), torch.randn(B, R)
    torch.testing.assert_close(Hypernetwork(nn.Identity(), net)(x, z), net.fc(x, z) * net.fc.weight.mean())


LAYERS = {
    "linear": (nn.Linear(3, 3), (B, 3)),
    "conv": (nn.Conv1d(3, 3, 3, padding=1), (B, 3, 4)),
    "norm": (nn.LayerNorm(3), (B, 3)),
    "batchnorm": (nn.BatchNorm1d(3), (B, 3)),
    "embedding": (nn.Embedding(7, 3), None),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_family(kind):
    layer, shape = LAYERS[kind]
    x = torch.randint(7, (B, 2)) if shape is None else torch.randn(shape)
    types = [type(layer)]
    shapes = []
    fine = Reader(lambda self, x: shapes.append(self.fc.weight.shape) or self.fc(x), layer)
    Hypernetwork(nn.Identity(), hyperize(fine, R, "fc", types=types))(x, torch.randn(B, R))
    assert shapes == [layer.weight.shape]
    wrong = Reader(lambda self, x: self.fc(x) * self.fc.weight.sum(), layer)
    with pytest.raises(RuntimeError, match="reads the weight of the layer 'fc' in sum"):
        Hypernetwork(nn.Identity(), hyperize(wrong, R, "fc", types=types))(x, torch.randn(B, R))


def test_timm():
    define_ops_of_torchvision()
    beit = pytest.importorskip("timm.models.beit")
    attention = beit.Attention(8, num_heads=2, qkv_bias=True)
    model = Hypernetwork(nn.Identity(), hyperize(attention, R))
    x, z = torch.randn(B, 6, 8), torch.randn(B, R)
    with pytest.raises(RuntimeError, match=r"Attention\.forward reads the weight of the layer 'qkv' in linear"):
        model(x, z)
    others = Hypernetwork(nn.Identity(), hyperize(attention, R, exclude="qkv"))
    torch.testing.assert_close(others(x, z), attention(x))


def test_transformers():
    define_ops_of_torchvision()
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    dense = t5.T5DenseActDense(t5.T5Config(d_model=8, d_ff=16)).eval()  # it reads the dtype of wo.weight alone
    x, z = torch.randn(B, 6, 8), torch.randn(B, R)
    torch.testing.assert_close(Hypernetwork(nn.Identity(), hyperize(dense, R))(x, z), dense(x))
