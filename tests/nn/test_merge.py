"""A generated layer, or a whole network, with the weights of one instance in ordinary layers."""

import copy

import pytest
import torch
from small_networks import Returns, TrunkByName, fill
from torch import nn

from fasthyper.nn import HyperLinear, Hypernetwork, hyperize

I, O, R = 6, 7, 5


def filled(**kwargs):
    layer = HyperLinear(I, O, R, dtype=torch.float64, **kwargs)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(rank, base, bias):
    layer, z = filled(rank=rank, base=base, bias=bias), torch.randn(R, dtype=torch.float64)
    linear = layer.merged(z)
    assert type(linear) is nn.Linear
    assert repr(linear) == f"Linear(in_features={I}, out_features={O}, bias={bias})"
    assert set(linear.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    x = torch.randn(1, 4, I, dtype=torch.float64)
    torch.testing.assert_close(linear(x), layer(x, z[None]))
    assert torch.equal(layer.merged(z[None]).weight, linear.weight)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    assert all(p.grad is None for p in layer.parameters())
    assert linear.weight.is_contiguous()


def test_a_bias_that_all_instances_share():
    linear = hyperize(nn.Linear(I, O), R, bias=False).merged(torch.randn(R))
    assert linear.bias.shape == (O,)


def test_a_merged_layer_has_parameters_of_its_own():
    layer, z = hyperize(nn.Linear(I, O), R, bias=False), torch.randn(R)
    linear = layer.merged(z)
    before = linear.weight.clone(), linear.bias.clone()
    with torch.no_grad():
        for p in (*layer.parameters(), z):
            p.add_(1)
    assert torch.equal(linear.weight, before[0])
    assert torch.equal(linear.bias, before[1])
    assert not layer.eval().merged(z).training


def test_in_other_dtypes_and_under_autocast():
    layer, z = filled(rank=2).float(), torch.randn(R)
    expected = layer.merged(z).weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.merged(z).weight, expected)
        assert layer.merged(z.bfloat16()).weight.dtype == torch.float32
    assert layer.bfloat16().merged(z.bfloat16()).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="z must be"):
        layer.merged(z)


def test_z_must_be_of_one_instance():
    layer = HyperLinear(I, O, R)
    for z, got in ((torch.randn(2, R), r"\(2, 5\)"), (torch.randn(1, 1, R), r"\(1, 1, 5\)")):
        with pytest.raises(ValueError, match=rf"one instance, \(R,\) or \(1, R\) with R = 5, got {got}"):
            layer.merged(z)
    with pytest.raises(ValueError, match="R = 5"):
        layer.merged(torch.randn(R + 1))
    with pytest.raises(TypeError, match="z must be a tensor, got None"):
        layer.merged(None)


class Net(nn.Module):
    """A network with a layer under two names and in a plain list, and with parameters that are not generated."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.again = self.first
        self.listed = [self.first]

    def forward(self, x):
        return self.last(self.norm(self.again(self.listed[0](self.first(x)))))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_network(rank):
    net = Net()
    model = Hypernetwork(nn.Linear(6, R), hyperize(net, R, rank=rank).apply(fill))
    cond, x = torch.randn(1, 6), torch.randn(1, 10, 4)
    merged = model.merged(cond)
    torch.testing.assert_close(merged(x), model(x, cond))
    assert not any(isinstance(m, HyperLinear) for m in merged.modules())
    assert {name: p.shape for name, p in merged.state_dict().items()} == {
        n: p.shape for n, p in net.state_dict().items()
    }
    net.load_state_dict(merged.state_dict())
    torch.testing.assert_close(net(x), model(x, cond))
    assert merged.first is merged.again is merged.listed[0]
    assert merged.norm.weight.data_ptr() != model.primary.norm.weight.data_ptr()
    other = model.merged(torch.randn(1, 6))
    assert not torch.equal(other.last.weight, merged.last.weight)
    assert isinstance(model.primary.first, HyperLinear)  # the model itself is as it was
    assert all(p.grad_fn is None for p in merged.parameters())


def test_one_z_without_a_batch():
    model = Hypernetwork(nn.Linear(6, R), hyperize(nn.Linear(4, 3), R).apply(fill))
    cond, x = torch.randn(6), torch.randn(1, 4)
    torch.testing.assert_close(model.merged(cond)(x), model(x, cond[None]))
    with pytest.raises(ValueError, match=r"one instance.*got \(2, 5\)"):
        model.merged(torch.randn(2, 6))


def test_a_z_for_each_layer():
    primary = nn.Sequential(HyperLinear(4, 5, 7), nn.Tanh(), HyperLinear(5, 3, 7, rank=2)).apply(fill)
    model, x, cond = Hypernetwork(TrunkByName("0", "2"), primary), torch.randn(1, 4), torch.randn(1, 6)
    torch.testing.assert_close(model.merged(cond)(x), model(x, cond))


def test_ties_are_kept():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    model = Hypernetwork(nn.Linear(6, R), hyperize(net, R, rank=2).apply(fill))
    merged = model.merged(torch.randn(6))
    assert merged[0].weight is merged[2].weight
    assert merged[0].bias is not merged[2].bias


def test_inner_hypernetworks():
    inner = Hypernetwork(nn.Linear(6, R), hyperize(nn.Linear(4, 4), R).apply(fill))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner
            self.head = HyperLinear(4, 3, R)

        def forward(self, x, cond):
            return self.head(self.inner(x, cond))

    model = Hypernetwork(nn.Linear(6, R), Outer())
    x, cond, inner_cond = torch.randn(1, 4), torch.randn(1, 6), torch.randn(1, 6)
    merged = model.merged(cond)
    assert type(merged.head) is nn.Linear
    assert isinstance(merged.inner.primary, HyperLinear)
    torch.testing.assert_close(merged(x, inner_cond), model(x, cond, inner_cond))


def test_a_compiled_primary():
    primary = hyperize(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), R).apply(fill)
    model = Hypernetwork(nn.Linear(6, R), torch.compile(primary, backend="eager"))
    merged = model.merged(torch.randn(1, 6))
    assert list(merged.state_dict()) == ["0.weight", "0.bias"]


def test_what_cannot_be_merged():
    class Own(HyperLinear):
        def forward(self, x, z=None):
            return 2 * super().forward(x, z)

    model = Hypernetwork(nn.Linear(6, R), nn.Sequential(Own(4, 3, R)))
    with pytest.raises(ValueError, match="cannot merge '0': it is a Own"):
        model.merged(torch.randn(1, 6))
    model = Hypernetwork(nn.Linear(6, R), nn.Sequential(HyperLinear(4, 3, R)))
    model.primary[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        model.merged(torch.randn(1, 6))
    with pytest.raises(TypeError, match="trunk must return"):
        Hypernetwork(Returns(3), HyperLinear(4, 3, R)).merged(torch.randn(1, 6))


def test_dropout_and_mode():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    model = Hypernetwork(nn.Linear(6, R), hyperize(net, R)).eval()
    merged = model.merged(torch.randn(1, 6))
    assert not any(m.training for m in merged.modules())
    assert torch.equal(copy.deepcopy(merged)(torch.ones(1, 4)), merged(torch.ones(1, 4)))
