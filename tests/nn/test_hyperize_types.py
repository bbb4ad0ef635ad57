"""hyperize for other layers than nn.Linear: which are chosen, what they become, and what the summary says."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from other_libraries import define_ops_of_torchvision
from torch import nn

from fasthyper.nn import (
    HyperAffine,
    HyperEmbedding,
    HyperLinear,
    Hypernetwork,
    hyperize,
    parameter_report,
    ungenerated,
    what_is_generated,
)

R, B = 6, 5
EVERY = ("linear", "norm", "embedding")


class Net(nn.Module):
    """Tokens, norms and linear layers; the last weight is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=1)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(3)
        self.plain = nn.LayerNorm(4, elementwise_affine=False)
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.plain(torch.tanh(self.fc(self.batch(self.norm(self.embed(ids)))))))


def kinds(module):
    return {name: type(m).__name__ for name, m in module.named_modules() if name}


def filled(module):
    for name, p in module.named_parameters():
        if name.rpartition(".")[2] in ("weight", "bias"):
            nn.init.normal_(p, std=0.3)
    return module


def per_instance(module, copied, z, x):
    """Run the original once for each instance, with its parameters replaced by the sums that they stand for."""
    results = []
    for b in range(z.shape[0]):
        parameters = {}
        for name, layer in copied.named_modules(remove_duplicate=False):
            for key in ("weight", "bias"):
                head, base = getattr(layer, key, None), getattr(layer, f"base_{key}", None)
                if isinstance(layer, (HyperAffine, HyperEmbedding, HyperLinear)):
                    if head is not None:
                        value = head @ z[b] + (0 if base is None else base)
                        parameters[f"{name}.{key}"] = value
                    elif base is not None:
                        parameters[f"{name}.{key}"] = base
        results.append(torch.func.functional_call(module, parameters, x[b : b + 1], tie_weights=False))
    return torch.cat(results)


def hyper(module):
    return Hypernetwork(nn.Identity(), module)


def test_linear_alone_by_default():
    copied = hyperize(Net(), R)
    assert {n for n, kind in kinds(copied).items() if kind.startswith("Hyper")} == {"fc", "out"}


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("norm", {"norm", "batch"}),
        (nn.LayerNorm, {"norm"}),
        ((nn.Linear, "embedding"), {"fc", "out", "embed"}),
        (EVERY, {"embed", "norm", "batch", "fc", "out"}),
    ],
)
def test_types(types, expected):
    copied = hyperize(Net(), R, types=types)
    assert {n for n, kind in kinds(copied).items() if kind.startswith("Hyper")} == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_results(base, bias):
    net = Net().double().eval()  # in training, a BatchNorm would mix the instances
    filled(net)
    net.batch.running_mean.normal_()
    copied = hyperize(net, R, types=EVERY, base=base, bias=bias)
    assert ungenerated(copied) == []
    ids, z = torch.randint(2, 7, (B, 3)), torch.randn(B, R).double()
    if base:
        torch.testing.assert_close(hyper(copied)(ids, z), net(ids))
    filled(copied)
    torch.testing.assert_close(hyper(copied)(ids, z), per_instance(net, copied, z, ids))
    assert copied.embed.weight is copied.out.weight
    assert copied.embed.base_weight is copied.out.base_weight
    assert not copied.norm.training
    assert not copied.batch.norm.training
    assert (copied.fc.base_bias is None) == (bias and not base)


def test_padding_is_not_generated():
    net = Net().double().eval()
    copied = hyperize(net, R, types="embedding")
    nn.init.normal_(copied.embed.weight)
    ids, z = torch.ones(B, 3, dtype=torch.int64), torch.randn(B, R).double()
    torch.testing.assert_close(hyper(copied)(ids, z), net(ids))


def test_parameters_of_the_old_layer_become_the_base():
    net = Net()
    net.norm.weight.requires_grad_(False)
    copied = hyperize(net, R, types=EVERY)
    for name in ("embed.weight", "norm.weight", "norm.bias", "batch.weight", "batch.bias", "fc.weight"):
        layer, _, key = name.rpartition(".")
        base = getattr(copied.get_submodule(layer), f"base_{key}")
        assert torch.equal(base, net.get_parameter(name))
        assert base.requires_grad == (name != "norm.weight")
    assert torch.equal(copied.batch.norm.running_var, net.batch.running_var)
    report = parameter_report(hyper(copied))
    assert report.n_g == sum(p.numel() for p in net.parameters())
    assert report.ungenerated == 0


def test_the_root_and_two_places():
    layer = hyperize(nn.LayerNorm(4), R, types="norm")
    assert type(layer) is HyperAffine
    shared = nn.LayerNorm(4)
    copied = hyperize(nn.Sequential(shared, nn.Tanh(), shared), R, types="norm")
    assert copied[0] is copied[2]
    x, z = torch.randn(B, 4), torch.randn(B, R)
    torch.testing.assert_close(hyper(copied)(x, z), shared(torch.tanh(shared(x))))


def test_compiled():
    net = filled(Net().double().eval())
    model = hyper(filled(hyperize(net, R, types=EVERY)))
    ids, z = torch.randint(7, (B, 3)), torch.randn(B, R).double()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids, z), model(ids, z))


def test_type_refusals():
    net = Net()
    with pytest.raises(ValueError, match="no family 'convolution'; families are 'linear', 'embedding', 'norm', 'conv'"):
        hyperize(net, R, types="convolution")
    with pytest.raises(ValueError, match=r"no rule for PReLU; pass one with replace=\{PReLU: …\}"):
        hyperize(net, R, types=(nn.Linear, nn.PReLU))
    with pytest.raises(TypeError, match="types must hold classes of modules and names of families, got 3"):
        hyperize(net, R, types=(nn.Linear, 3))
    with pytest.raises(ValueError, match=r"'norm' matches none of the nn.Linears.*types=… chooses others.*LayerNorm"):
        hyperize(net, R, include="norm")
    with pytest.raises(ValueError, match=r"'fc' matches none of the layers of the types, .*\['norm', 'batch'\]"):
        hyperize(net, R, types="norm", exclude="fc")

    class OwnForward(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="cannot generate '0': it is a OwnForward with a forward of its own"):
        hyperize(nn.Sequential(OwnForward(4)), R, types="norm")
    with pytest.raises(ValueError, match="cannot generate '0': its max_norm"):
        hyperize(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), R, types="embedding")


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (B, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2), (B, 4, 8, 7)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (B, 4, 8, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (B, 4, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (B, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (B, 4, 5, 4)),
}


@pytest.mark.parametrize("repeat_z", [False, True])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_convolutions(conv, repeat_z):
    make, shape = CONVOLUTIONS[conv]
    net = nn.Sequential(make(), nn.ReLU()).double()
    copied = hyperize(net, R, types="conv")
    x, z = torch.randn(shape).double(), torch.randn(B, R).double()
    torch.testing.assert_close(hyper(copied)(x, z), net(x))
    filled(copied)
    assert ungenerated(copied) == []
    expected = [one_instance(net, copied, z[b], x[b : b + 1]) for b in range(B)]
    torch.testing.assert_close(hyper(copied)(x, z), torch.cat(expected))
    if repeat_z:
        model = Hypernetwork(nn.Identity(), copied, repeat_z=True)
        twice = model(x.repeat_interleave(2, 0), z)
        torch.testing.assert_close(twice, torch.cat(expected).repeat_interleave(2, 0))


def one_instance(net, copied, z, x):
    """Run the original with the kernel of one instance."""
    one, layer = copy.deepcopy(net), copied[0]
    one[0].weight = nn.Parameter(layer.weight @ z + layer.base_weight)
    if layer.bias is not None:
        one[0].bias = nn.Parameter(layer.bias @ z + layer.base_bias)
    return one(x)


# replace


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.scale


class HyperScale(nn.Module):
    def __init__(self, scale, cond_features):
        super().__init__()
        self.scale = scale
        self.change = HyperLinear(1, scale.numel(), cond_features, bias=False, base=False)

    def forward(self, x):
        return x * (self.scale + self.change(x.new_ones(x.shape[0], 1)))


def test_replace():
    shared = Scale(4)
    net = nn.Sequential(nn.Linear(4, 4), shared, nn.ModuleDict({"again": shared})["again"], Scale(4))
    copied = hyperize(net, R, exclude="3", replace={Scale: lambda layer, r: HyperScale(layer.scale, r)})
    assert [type(m).__name__ for m in copied] == ["HyperLinear", "HyperScale", "HyperScale", "Scale"]
    assert copied[1] is copied[2]
    assert type(net[1]) is Scale
    x, z = torch.randn(B, 4), torch.randn(B, R)
    expected = copied[0](x, z)
    for _ in range(2):
        expected = expected * (shared.scale + z @ copied[1].change.weight[:, 0].T)
    torch.testing.assert_close(hyper(copied)(x, z), expected * net[3].scale)

    alone = hyperize(Scale(4), R, replace={Scale: lambda layer, r: HyperScale(layer.scale, r)})
    assert type(alone) is HyperScale
    left = hyperize(net, R, replace={Scale: lambda layer, r: None})
    assert type(left[1]) is Scale
    with pytest.raises(TypeError, match="replace must return a module or None for a Scale, got int"):
        hyperize(net, R, replace={Scale: lambda layer, r: 3})


def test_replace_comes_before_the_rule():
    class Mine(HyperLinear):
        pass

    def mine(linear, r):
        return Mine(linear.in_features, linear.out_features, r)

    assert [type(m) for m in hyperize(nn.Sequential(nn.Linear(4, 4)), R, replace={nn.Linear: mine})] == [Mine]


# layers of other libraries


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils")
    net = nn.Sequential(utils.Conv1D(8, 4), nn.Tanh(), nn.Linear(8, 2)).double()
    assert type(hyperize(net, R)[0]) is utils.Conv1D
    copied = hyperize(net, R, types="linear")
    assert type(copied[0]) is HyperLinear
    assert torch.equal(copied[0].base_weight, net[0].weight.T)
    filled(copied)
    x, z = torch.randn(B, 3, 4).double(), torch.randn(B, R).double()
    expected = net[1](
        torch.einsum("bni,boi->bno", x, copied[0].materialize(z)[0]) + copied[0].materialize(z)[1][:, None]
    )
    torch.testing.assert_close(hyper(copied[:2])(x, z), expected)
    tied = nn.Sequential(utils.Conv1D(4, 4), utils.Conv1D(4, 4))
    tied[1].weight = tied[0].weight
    copied = hyperize(tied, R, types=utils.Conv1D)
    assert copied[0].base_weight is copied[1].base_weight
    assert copied[0].weight is copied[1].weight


def test_linear_of_pytorch_geometric():
    pyg = pytest.importorskip("torch_geometric.nn")
    net = nn.Sequential(pyg.Linear(4, 8), nn.Tanh(), pyg.Linear(8, 2, bias=False))
    copied = hyperize(net, R, types="linear")
    assert [type(copied[i]) for i in (0, 2)] == [HyperLinear, HyperLinear]
    x, z = torch.randn(B, 4), torch.randn(B, R)
    torch.testing.assert_close(hyper(copied)(x, z), net(x))
    torch.testing.assert_close(hyper(filled(copied))(x, z), per_instance(net, copied, z, x))
    with pytest.raises(ValueError, match="cannot generate '0': it is lazy"):
        hyperize(nn.Sequential(pyg.Linear(-1, 8)), R, types="linear")


def test_gpt_with_all_its_layers():
    transformers = pytest.importorskip("transformers")
    define_ops_of_torchvision()
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    net = transformers.GPT2Model(config).eval()
    copied = hyperize(net, R, types=EVERY, exclude="wpe")  # its ids have one row for all instances
    x, z = torch.randint(11, (B, 4)), torch.randn(B, R)
    y = hyper(copied)(x, z).last_hidden_state
    torch.testing.assert_close(y, net(x).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert ungenerated(copied) == ["wpe.weight"]
    kinds = {s.kind for s in what_is_generated(copied).layers if s.generated}
    assert kinds == {"HyperLinear", "HyperAffine", "HyperEmbedding"}


def test_other_libraries_are_not_imported():
    code = (
        "import sys, fasthyper.nn; from torch import nn; fasthyper.nn.hyperize(nn.Linear(2, 2), 3, types='linear');"
        "assert not {'transformers', 'torch_geometric'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# the summary


def test_what_is_generated():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.act = nn.PReLU()

    copied = hyperize(Odd(), R, include="net.*", exclude="net.out", bias=False)
    layers = {s.name: s for s in what_is_generated(copied).layers}
    assert set(layers) == {
        "net.embed", "net.norm", "net.batch", "net.fc", "net.out", "attention", "attention.out_proj", "act",
    }  # fmt: skip
    assert (layers["net.fc"].generated, layers["net.fc"].shared, layers["net.fc"].why) == (
        ("weight",),
        ("base_bias",),
        "",
    )
    assert layers["net.out"].why == 'needs types="linear", or include or exclude leaves it out'
    assert layers["net.norm"].why == 'needs types="norm", or include or exclude leaves it out'
    assert "reads its weights and never calls it" in layers["attention.out_proj"].why
    assert layers["attention"].shared == ("in_proj_weight", "in_proj_bias")
    assert layers["act"].why == "no rule for PReLU: replace={PReLU: ...} gives one"
    table = str(what_is_generated(copied)).splitlines()
    assert len(table) == 1 + len(layers)
    assert re.split(r"  +", table[0]) == ["layer", "class", "generated", "shared", "why it is not generated"]
    assert all(line.rstrip() == line for line in table)
    assert "(itself)" in str(what_is_generated(nn.PReLU()))


# inputs with time first


@pytest.mark.parametrize(
    "make",
    [
        lambda first: nn.LSTM(4, 4, batch_first=first),
        lambda first: nn.GRU(4, 4, batch_first=first),
        lambda first: nn.RNN(4, 4, batch_first=first),
        lambda first: nn.MultiheadAttention(4, 2, batch_first=first),
        lambda first: nn.TransformerEncoderLayer(4, 2, 8, batch_first=first),
        lambda first: nn.TransformerDecoderLayer(4, 2, 8, batch_first=first),
    ],
)
def test_time_first_is_refused(make):
    def net(first):
        return nn.ModuleDict({"body": make(first), "fc": nn.Linear(4, 4)})

    with pytest.raises(ValueError, match=r"'body.*batch_first=False.*allow_time_first=True"):
        hyperize(net(False), R, include="fc")
    assert type(hyperize(net(False), R, include="fc", allow_time_first=True)["fc"]) is HyperLinear
    assert type(hyperize(net(True), R, include="fc")["fc"]) is HyperLinear
    assert isinstance(copy.deepcopy(net(False)), nn.Module)
