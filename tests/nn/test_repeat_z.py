"""Inputs that fold windows, heads or beams into the batch, and a z for each parameter."""

import copy

import pytest
import torch
from other_libraries import define_ops_of_torchvision
from torch import nn

from fasthyper import Incidence
from fasthyper.nn import HyperAffine, HyperEmbedding, HyperLinear, Hypernetwork, hyperize

R, B = 6, 3


class Windows(nn.Module):
    """Cut (B, 4, 6) into windows of k steps, (B·4/k, k, 6), as Swin does, and put the windows together again."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.norm(torch.tanh(self.first(x.reshape(-1, 2, 6))))
        return self.second(h.reshape(-1, 5)).view(x.shape[0], 4, 2)


def filled(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def windows():
    return filled(hyperize(Windows().double(), R, types=("linear", "norm")))


def test_rows_of_an_instance_meet_its_z():
    primary = windows()
    model = Hypernetwork(nn.Identity(), primary, repeat_z=True)
    x = torch.randn(B, 4, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(B, R, dtype=torch.float64, requires_grad=True)
    y = model(x, z)
    by_hand = []
    for b in range(B):
        (W1, b1), (W2, b2) = (layer.materialize(z[b : b + 1]) for layer in (primary.first, primary.second))
        scale, shift = (head @ z[b] + base for head, base in (
            (primary.norm.weight, primary.norm.base_weight), (primary.norm.bias, primary.norm.base_bias)))  # fmt: skip
        h = nn.functional.layer_norm(torch.tanh(x[b] @ W1[0].T + b1[0]), (5,)) * scale + shift
        by_hand.append(h @ W2[0].T + b2[0])
    torch.testing.assert_close(y, torch.stack(by_hand))
    g = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, z), g), torch.autograd.grad(torch.stack(by_hand), (x, z), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_points_are_a_view(monkeypatch):
    layer = HyperLinear(6, 5, R)
    seen = []
    run = HyperLinear._run
    monkeypatch.setattr(HyperLinear, "_run", lambda self, x, *args: seen.append(x) or run(self, x, *args))
    x = torch.randn(4 * B, 6)
    y = Hypernetwork(nn.Identity(), layer, repeat_z=True)(x, torch.randn(B, R))
    assert seen[0].shape == (B, 4, 6)
    assert seen[0].data_ptr() == x.data_ptr()
    assert y.shape == (4 * B, 5)


@pytest.mark.parametrize("shape", [(6,), (2, 6)])
def test_any_multiple(shape):
    layer = filled(HyperLinear(6, 5, R))
    model = Hypernetwork(nn.Identity(), nn.Sequential(layer), repeat_z=True)
    z = torch.randn(B, R)
    for k in (0, 1, 4):
        x = torch.randn(k * B, *shape)
        torch.testing.assert_close(model(x, z), layer(x, z.repeat_interleave(k, 0)))
    assert model(torch.randn(0, *shape), torch.randn(0, R)).shape == (0, *shape[:-1], 5)


def test_two_layers_that_would_run_as_one_op():
    first, second = filled(HyperLinear(6, 5, R)), filled(HyperLinear(5, 2, R))
    model = Hypernetwork(nn.Identity(), nn.Sequential(first, nn.Tanh(), second), repeat_z=True)
    x, z = torch.randn(2 * B, 6), torch.randn(B, R)
    spread = z.repeat_interleave(2, 0)
    torch.testing.assert_close(model(x, z), second(torch.tanh(first(x, spread)), spread))


def test_embedding_and_affine():
    embedding, z = filled(HyperEmbedding(7, 4, R)), torch.randn(B, R)
    ids = torch.randint(7, (2 * B, 3))
    model = Hypernetwork(nn.Identity(), embedding, repeat_z=True)
    torch.testing.assert_close(model(ids, z), embedding(ids, z.repeat_interleave(2, 0)))
    affine, x = filled(HyperAffine(nn.GroupNorm(2, 4), R)), torch.randn(2 * B, 4, 3)
    model = Hypernetwork(nn.Identity(), affine, repeat_z=True)
    torch.testing.assert_close(model(x, z), affine(x, z.repeat_interleave(2, 0)))


def test_compiled_and_exported():
    model = Hypernetwork(nn.Identity(), windows(), repeat_z=True)
    x, z = torch.randn(B, 4, 6).double(), torch.randn(B, R).double()
    y = model(x, z)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, z), y)
    torch.testing.assert_close(torch.export.export(model, (x, z)).module()(x, z), y)
    dynamic = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 5):
        x, z = torch.randn(b, 4, 6).double(), torch.randn(b, R).double()
        torch.testing.assert_close(dynamic(x, z), model(x, z))
    torch.testing.assert_close(copy.deepcopy(model)(x, z), model(x, z))


def test_swin():
    define_ops_of_torchvision()
    timm = pytest.importorskip("timm")
    net = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), num_classes=3
    )
    net = net.double().eval()
    primary = hyperize(net, R, types=("linear", "norm"))
    for name, p in primary.named_parameters():
        if name.endswith((".weight", ".bias")) and "base" not in name and p.shape[-1] == R:
            nn.init.normal_(p, std=0.1)
    model = Hypernetwork(nn.Identity(), primary, repeat_z=True)
    images, z = torch.randn(B, 3, 32, 32).double(), torch.randn(B, R).double()
    y = model(images, z)
    one_by_one = [model(images[b : b + 1], z[b : b + 1]) for b in range(B)]
    torch.testing.assert_close(y, torch.cat(one_by_one))
    assert not torch.allclose(y, net(images), atol=1e-2)
    with pytest.raises(ValueError, match=r"4 consecutive rows of x .* repeat_z=True"):
        Hypernetwork(nn.Identity(), primary)(images, z)


def test_an_inner_hypernetwork_has_its_own():
    layer = filled(HyperLinear(6, 6, R))

    class Inner(nn.Module):
        def __init__(self, repeat_z):
            super().__init__()
            self.layer = filled(HyperLinear(6, 6, R))
            self.inner = Hypernetwork(nn.Identity(), layer, repeat_z=repeat_z)

        def forward(self, x, z):
            return self.inner(self.layer(x), z)

    x, z = torch.randn(2 * B, 6), torch.randn(B, R)
    assert Hypernetwork(nn.Identity(), Inner(True), repeat_z=True)(x, z, z).shape == x.shape
    with pytest.raises(ValueError, match="repeat_z"):
        Hypernetwork(nn.Identity(), Inner(False), repeat_z=True)(x, z, z)


def test_the_error_without_it_names_it():
    x, z = torch.randn(4 * B, 6), torch.randn(B, R)
    message = r"4 consecutive rows of x belong to each row of z, pass repeat_z=True to the Hypernetwork"
    for primary in (HyperLinear(6, 5, R), HyperAffine(nn.LayerNorm(6), R)):
        model = Hypernetwork(nn.Identity(), nn.Sequential(primary))
        with pytest.raises(ValueError, match=rf"z must have .*{message}"):
            model(x, z)
        with pytest.raises(ValueError, match="z must have ") as wrong:
            model(x[:-1], z)
        assert "repeat_z" not in str(wrong.value)
        with pytest.raises(ValueError, match="z must have ") as wrong:
            primary(x, z)
        assert "repeat_z" not in str(wrong.value)
    model = Hypernetwork(nn.Identity(), HyperLinear(6, 5, R), repeat_z=True)
    with pytest.raises(ValueError, match=r"x must have k·B rows with repeat_z=True, where B = 3 .* got \(11, 6\)"):
        model(x[:-1], z)
    with pytest.raises(ValueError, match="incidence must be None with repeat_z=True"):
        model(x, z, incidence=Incidence.from_batch(torch.zeros(12, dtype=torch.int64), 3))


# a z for each parameter


class Trunks(nn.Module):
    def __init__(self, **features):
        super().__init__()
        self.trunks = nn.ModuleDict({name: nn.Linear(2, r).double() for name, r in features.items()})

    def forward(self, cond):
        return {name.replace("_", "."): trunk(cond) for name, trunk in self.trunks.items()}


def siren(**kwargs):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return filled(hyperize(net, R, **kwargs))


def by_hand(primary, x, z):
    for name, layer in primary.named_children():
        if isinstance(layer, HyperLinear):
            whole = z.get(name)
            W = torch.einsum("oir,br->boi", layer.weight, z.get(f"{name}.weight", whole)) + layer.base_weight
            b = z.get(f"{name}.bias", whole) @ layer.bias.T + layer.base_bias
            x = torch.einsum("boi,bni->bno", W, x) + b[:, None]
        else:
            x = layer(x)
    return x


def test_bias_with_a_trunk_of_its_own():
    primary = siren(bias_cond_features=3)
    assert primary[0].bias.shape == (4, 3)
    model = Hypernetwork(Trunks(**{"0_weight": R, "0_bias": 3, "2": R, "2_bias": 3}), primary)
    x = torch.randn(B, 7, 3, dtype=torch.float64, requires_grad=True)
    cond = torch.randn(B, 2, dtype=torch.float64, requires_grad=True)
    y, expected = model(x, cond), by_hand(primary, x, model.trunk(cond))
    torch.testing.assert_close(y, expected)
    leaves = [x, cond, *model.parameters()]
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, cond), y)
    torch.testing.assert_close(torch.export.export(model, (x, cond)).module()(x, cond), y)
    z = model.trunk(cond)
    W, b = primary[0].materialize((z["0.weight"], z["0.bias"]))
    torch.testing.assert_close(primary[0](x, (z["0.weight"], z["0.bias"])), x @ W.mT + b[:, None])


def test_parameter_names_with_one_size():
    primary = siren()
    x, cond = torch.randn(B, 7, 3).double(), torch.randn(B, 2).double()
    model = Hypernetwork(Trunks(**{"0": R, "2": R, "2_bias": R}), primary)
    torch.testing.assert_close(model(x, cond), by_hand(primary, x, model.trunk(cond)))
    model = Hypernetwork(Trunks(**{"0": R, "2_weight": R}), siren())
    with pytest.raises(ValueError, match=r"no z for \['2'\]"):
        model(x, cond)
    model = Hypernetwork(Trunks(**{"0": R, "2_base": R}), siren())
    with pytest.raises(ValueError, match=r"z for '2\.base'"):
        model(x, cond)
    without = siren(bias=False)
    model = Hypernetwork(Trunks(**{"0": R, "2_weight": R}), without)
    assert model(x, cond).shape == (B, 7, 2)
    model = Hypernetwork(Trunks(**{"0": R, "2": R, "2_bias": R}), without)
    with pytest.raises(ValueError, match="has no generated bias"):
        model(x, cond)


def test_with_ragged_points_and_repeated_z():
    primary, trunk = siren(bias_cond_features=3), Trunks(**{"0": R, "0_bias": 3, "2": R, "2_bias": 3})
    x, cond, ids = torch.randn(5, 3).double(), torch.randn(B, 2).double(), torch.tensor([0, 2, 1, 1, 0])
    y = Hypernetwork(trunk, primary)(x, cond, incidence=Incidence.from_batch(ids, B))
    torch.testing.assert_close(y, by_hand(primary, x[:, None], {k: z[ids] for k, z in trunk(cond).items()})[:, 0])
    x = torch.randn(2 * B, 3).double()
    y = Hypernetwork(trunk, primary, repeat_z=True)(x, cond)
    torch.testing.assert_close(y, by_hand(primary, x.view(B, 2, 3), trunk(cond)).flatten(0, 1))
    layer, (z, bias_z) = primary[0], (trunk(cond)["0"], trunk(cond)["0.bias"])
    edges = Incidence(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]), num_targets=2)
    one = nn.Sequential(layer)
    terms = [
        by_hand(one, x[s][None, None], {"0": z[c][None], "0.bias": bias_z[c][None]})
        for s, c in ((0, 0), (1, 1), (1, 2))
    ]
    terms = torch.cat(terms)[:, 0]
    torch.testing.assert_close(layer(x[:2], (z, bias_z), edges), torch.stack([terms[1], terms[0] + terms[2]]))
    mean = torch.stack([terms[1], (terms[0] + terms[2]) / 2])
    torch.testing.assert_close(layer(x[:2], (z, bias_z), edges, "mean"), mean)
    with pytest.raises(ValueError, match="reduce must be 'sum' or 'mean' where the bias"):
        layer(x[:2], (z, bias_z), edges, "max")


def test_refusals():
    layer, x, z = HyperLinear(3, 4, R, bias_cond_features=2), torch.randn(B, 3), torch.randn(B, R)
    with pytest.raises(ValueError, match=r"z must be a pair: the z of the weight has 6 features, that of the bias 2"):
        layer(x, z)
    with pytest.raises(ValueError, match=r"z of the bias must be \(B, R\) with R = 2, got \(3, 6\)"):
        layer(x, (z, z))
    with pytest.raises(ValueError, match=r"z of the bias must have the 3 rows of x, got \(2, 2\)"):
        layer(x, (z, torch.randn(2, 2)))
    with pytest.raises(ValueError, match="bias_cond_features must not be negative"):
        HyperLinear(3, 4, R, bias_cond_features=-1)
    for init, variance in (("hyperfan_in", 1 / 2 / 50), ("hyperfan_out", 1 / 2 / 50)):
        layer = HyperLinear(100, 200, R, init=init, bias_cond_features=50)
        assert abs(layer.bias.var() / variance - 1) < 0.1
