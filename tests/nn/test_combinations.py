"""What the options of generated layers do together: ranks, maps, a z of the bias, other families, and merging."""

import copy

import pytest
import torch
from small_networks import Returns
from torch import nn

from fasthyper.nn import (
    HyperAffine,
    HyperConv2d,
    HyperConvTranspose1d,
    HyperEmbedding,
    HyperLinear,
    Hypernetwork,
    hyperize,
    what_is_generated,
)
from fasthyper.nn.fusable import fusable_layers
from fasthyper.nn.generated import GeneratedLayer

R = 5


def fill(module):
    if isinstance(module, GeneratedLayer):
        for p in module.parameters(recurse=False):
            nn.init.normal_(p, std=0.5)


def merged_like_the_model(primary, *inputs, trunk=None):
    """Return the merged network, after a comparison with the model in float64."""
    model = Hypernetwork(trunk or nn.Linear(3, R), primary.apply(fill)).double().eval()
    cond = torch.randn(1, 3, dtype=torch.float64)
    merged = model.merged(cond)
    assert not any(isinstance(m, GeneratedLayer) for m in merged.modules())
    torch.testing.assert_close(merged(*inputs), model(inputs[0], cond, *inputs[1:]))
    return merged


def test_a_rank_beside_norms():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    primary = hyperize(net, R, types=("linear", "norm"), rank=2, alpha=4)
    assert primary[0].rank == primary[3].rank == 2
    assert primary[0].weight is None
    assert isinstance(primary[1], HyperAffine)
    x, z = torch.randn(4, 7, 6), torch.randn(4, R)
    torch.testing.assert_close(Hypernetwork(nn.Identity(), primary)(x, z), net(x))
    primary.apply(fill)
    h = torch.relu(primary[1](primary[0](x, z), z))
    torch.testing.assert_close(Hypernetwork(nn.Identity(), primary)(x, z), primary[3](h, z))
    assert [s.generated for s in what_is_generated(primary).layers] == [
        ("weight_a", "weight_b", "bias"),
        ("weight", "bias"),
        ("weight_a", "weight_b", "bias"),
    ]
    merged_like_the_model(primary, torch.randn(1, 7, 6, dtype=torch.float64))


def test_a_rank_is_checked_without_a_linear():
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        hyperize(nn.Sequential(nn.LayerNorm(4)), R, types="norm", rank=0)


def test_tied_linears_of_low_rank_share_all_heads():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight, net[1].bias = net[0].weight, net[0].bias
    primary = hyperize(net, R, rank=2)
    for name in ("weight_a", "weight_b", "bias", "base_weight", "base_bias"):
        assert getattr(primary[0], name) is getattr(primary[1], name)
    merged = merged_like_the_model(primary, torch.randn(1, 4, dtype=torch.float64))
    assert merged[0].weight is merged[1].weight
    assert merged[0].bias is merged[1].bias


def test_a_rank_without_a_base():
    layer = hyperize(nn.Linear(4, 3), R, rank=2, base=False)
    assert layer.base_weight is layer.base_bias is None
    layer = hyperize(nn.Linear(4, 3), R, rank=2, base=False, bias=False)
    assert layer.base_weight is layer.bias is None
    assert layer.base_bias.shape == (3,)


@pytest.mark.parametrize("points", [(), (7,), (100,)])
def test_a_rank_with_a_z_of_the_bias(points):
    layer = HyperLinear(6, 4, R, rank=2, alpha=3, bias_cond_features=R + 1).double().apply(fill)
    x = torch.randn(3, *points, 6, dtype=torch.float64)
    z, bias_z = torch.randn(3, R, dtype=torch.float64), torch.randn(3, R + 1, dtype=torch.float64)
    a, b = (torch.einsum("oir,br->boi", head, z) for head in (layer.weight_a, layer.weight_b))
    W = 3 / 2 * b @ a + layer.base_weight
    biases = bias_z @ layer.bias.T + layer.base_bias
    expected = torch.einsum("b...i,boi->b...o", x, W) + biases.view(3, *[1] * len(points), 4)
    torch.testing.assert_close(layer(x, (z, bias_z)), expected)
    torch.testing.assert_close(layer.materialize((z, bias_z)), (W, biases))
    with pytest.raises(ValueError, match="z must be a pair: the z of the weight has 5 features, that of the bias 6"):
        layer(x, z)
    with pytest.raises(ValueError, match=r"z of the bias must be \(B, R\) = \(3, 6\), got \(3, 5\)"):
        layer.materialize(z)
    merged = Hypernetwork(Returns({"0.weight": z[:1], "0.bias": bias_z[:1]}), nn.Sequential(layer)).merged(None)
    torch.testing.assert_close(merged(x[:1]), expected[:1])


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"weight_map": "abs"}, {"bias_cond_features": R + 1}], ids=lambda o: next(iter(o))
)
def test_what_is_not_fused(options):
    plain = nn.Sequential(HyperLinear(4, 4, R), nn.ReLU(), HyperLinear(4, 4, R))
    assert fusable_layers(plain) is not None
    for i in (0, 2):
        net = copy.deepcopy(plain)
        net[i] = HyperLinear(4, 4, R, **options)
        assert fusable_layers(net) is None


def test_a_rank_and_a_map():
    with pytest.raises(ValueError, match=r"rank must be None with a weight_map.*rank=2 and weight_map='abs'"):
        HyperLinear(4, 3, R, rank=2, weight_map="abs")


def test_merging_with_a_map():
    primary = nn.Sequential(HyperLinear(4, 3, R, weight_map="softplus"), nn.Tanh(), HyperLinear(3, 2, R, rank=2))
    merged = merged_like_the_model(primary, torch.randn(1, 6, 4, dtype=torch.float64))
    assert (merged[0].weight > 0).all()


def test_merging_convolutions_and_norms():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular", groups=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, (3, 1), stride=2, padding=1, dilation=(2, 1), groups=2, bias=False),
        nn.GroupNorm(2, 6),
        nn.ConvTranspose2d(6, 2, 3, stride=2, output_padding=1),
        nn.LayerNorm(14),
    )
    with torch.no_grad():
        net(torch.randn(8, 3, 8, 9))  # statistics of the BatchNorm
    shapes = {name: t.shape for name, t in net.state_dict().items()}
    primary = hyperize(net, R, types=("conv", "norm"))
    merged = merged_like_the_model(primary, torch.randn(1, 3, 8, 9, dtype=torch.float64))
    assert {name: t.shape for name, t in merged.state_dict().items()} == shapes
    assert [type(m) for m in merged] == [type(m) for m in net]
    assert str(merged) == str(net)


def test_merging_layers_that_were_not_converted():
    norm = HyperAffine(nn.RMSNorm(6, elementwise_affine=False), R, bias=False)
    merged = merged_like_the_model(nn.Sequential(norm), torch.randn(1, 4, 6, dtype=torch.float64))
    assert merged[0].elementwise_affine
    primary = nn.Sequential(HyperConvTranspose1d(3, 4, 2, R), HyperConv2d(1, 2, 3, R, padding=1))
    assert [str(m) for m in Hypernetwork(nn.Identity(), primary).merged(torch.randn(R))] == [
        "ConvTranspose1d(3, 4, kernel_size=(2,), stride=(1,))",
        "Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
    ]


class Language(nn.Module):
    """A model of language whose last layer has the table of the first."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, padding_idx=padding_idx), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).tanh())


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_merging_a_tied_embedding(padding_idx):
    primary = hyperize(Language(padding_idx), R, types=("linear", "embedding"))
    assert isinstance(primary.table, HyperEmbedding)
    merged = merged_like_the_model(primary, torch.arange(9)[None])
    assert (merged.table.weight is merged.head.weight) == (padding_idx is None)  # the padding row is not generated


def test_merging_a_chunked_head():
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(1, 4, 2)
    model = Hypernetwork.from_flat_head(nn.Linear(R + 2, 7), net, layout="oi", chunks=torch.randn(5, 2))
    z = torch.randn(1, R)
    torch.testing.assert_close(model.merged(z)(x), model(x, z))
    model = Hypernetwork.from_flat_head(nn.Linear(R, 7), net, layout="oi", chunks=5)
    z = torch.randn(1, 5, R)
    torch.testing.assert_close(model.merged(z)(x), model(x, z))
    with pytest.raises(ValueError, match=r"cannot merge '0'.*one instance"):
        model.merged(torch.randn(2, 5, R))


def test_what_has_no_ordinary_counterpart():
    with pytest.raises(ValueError, match="cannot merge '0': an RMSNorm has no shift"):
        Hypernetwork(nn.Identity(), nn.Sequential(HyperAffine(nn.RMSNorm(4), R))).merged(torch.randn(R))

    class Scale(GeneratedLayer):
        weight = bias = base_weight = base_bias = None

    with pytest.raises(ValueError, match="cannot merge '0': there is no ordinary layer for a Scale"):
        Hypernetwork(nn.Identity(), nn.Sequential(Scale())).merged(torch.randn(R))
    with pytest.raises(ValueError, match=r"cannot merge '0': z must be that of one instance.*got \(2, 5\)"):
        Hypernetwork(nn.Identity(), nn.Sequential(HyperConv2d(1, 1, 1, R))).merged(torch.randn(2, R))
    with pytest.raises(TypeError, match=r"cannot merge '0': z must be torch\.float32"):
        Hypernetwork(nn.Identity(), nn.Sequential(HyperConv2d(1, 1, 1, R))).merged(torch.randn(R).double())
