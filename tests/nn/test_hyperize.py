import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fasthyper.nn import HyperLinear, Hypernetwork, hyperize, ungenerated

R = 6


def mlp(**kwargs):
    return nn.Sequential(nn.Linear(3, 4, **kwargs), nn.Tanh(), nn.Linear(4, 4, **kwargs), nn.Linear(4, 2, **kwargs))


def hyper(module):
    """Return a Hypernetwork whose z is its input."""
    return Hypernetwork(nn.Identity(), module)


def generated(module):
    return [name for name, m in module.named_modules(remove_duplicate=False) if isinstance(m, HyperLinear)]


def fill(module):
    """Set the heads to random values."""
    for m in module.modules():
        if isinstance(m, HyperLinear):
            nn.init.normal_(m.weight, std=0.3)
            if m.bias is not None:
                nn.init.normal_(m.bias, std=0.3)
    return module


def per_instance(module, copied, z, *inputs):
    """Run the original once per instance, with the weights generated for this instance in its Linears."""
    outputs = []
    for b in range(z.shape[0]):
        one = copy.deepcopy(module)
        for name in generated(copied):
            W, bias = copied.get_submodule(name).materialize(z[b : b + 1])
            linear = one.get_submodule(name)
            linear.weight = nn.Parameter(W[0].detach())
            if bias is not None:
                linear.bias = nn.Parameter(bias[0].detach())
        outputs.append(one(*(t[b : b + 1] for t in inputs)))
    return torch.cat(outputs)


def test_starts_with_the_outputs_of_the_original():
    net = mlp()
    copied = hyperize(net, R)
    x, z = torch.randn(5, 3), torch.randn(5, R)
    torch.testing.assert_close(hyper(copied)(x, z), net(x))
    assert not any(isinstance(m, HyperLinear) for m in net.modules())
    for name in ("0", "2", "3"):
        layer, linear = copied.get_submodule(name), net.get_submodule(name)
        assert torch.equal(layer.base_weight, linear.weight)
        assert torch.equal(layer.base_bias, linear.bias)
        assert layer.base_weight.data_ptr() != linear.weight.data_ptr()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_function(bias, base, has_bias):
    net = mlp(bias=has_bias)
    copied = fill(hyperize(net, R, bias=bias, base=base))
    x, z = torch.randn(5, 3), torch.randn(5, R)
    torch.testing.assert_close(hyper(copied)(x, z), per_instance(net, copied, z, x))
    for m in copied.modules():
        if isinstance(m, HyperLinear):
            assert (m.bias is not None) == (bias and has_bias)
            assert (m.base_weight is not None) == base
            # a bias that is not generated stays an ordinary parameter
            assert (m.base_bias is not None) == (has_bias and (base or not bias))


def test_inits():
    assert not any(m.weight.any() for m in hyperize(mlp(), R).modules() if isinstance(m, HyperLinear))
    for kwargs in ({"init": "hyperfan_out"}, {"base": False}):
        net = mlp()
        copied = hyperize(net, R, **kwargs)
        assert copied[0].weight.any()
        assert copied[0].init == kwargs.get("init", "hyperfan_in")
    with pytest.raises(ValueError, match="kaiming"):
        hyperize(mlp(), R, init="kaiming")
    with pytest.raises(ValueError, match="base=True"):
        hyperize(mlp(), R, init="bias_hyper", base=False)
    with pytest.raises(ValueError, match="cond_features must not be negative"):
        hyperize(mlp(), -1)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["in", "body.0", "body.1", "out"]),
        ("body.*", None, ["body.0", "body.1"]),
        (["in", "out"], None, ["in", "out"]),
        (None, "body.*", ["in", "out"]),
        (("*",), ("in", "*.1"), ["body.0", "out"]),
        ((name for name in ("body.?",)), "body.0", ["body.1"]),
    ],
)
def test_patterns(include, exclude, expected):
    net = nn.ModuleDict({"in": nn.Linear(2, 2), "body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    net["out"] = nn.Linear(2, 2)
    assert generated(hyperize(net, R, include, exclude)) == expected


def test_patterns_are_checked():
    net = mlp()
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{argument}: 'fc\*' matches none .*\['0', '2', '3'\]"):
            hyperize(net, R, **{argument: ["0", "fc*"]})
        with pytest.raises(TypeError, match=f"{argument} must hold patterns .* int"):
            hyperize(net, R, **{argument: [0]})
    with pytest.raises(ValueError, match=r"leave none .*\['0', '2', '3'\]"):
        hyperize(net, R, exclude="*")
    with pytest.raises(ValueError, match=r"has none of the nn\.Linears"):
        hyperize(nn.ReLU(), R)
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got builtin"):
        hyperize(F.linear, R)


def test_the_root_itself():
    linear = nn.Linear(3, 4)
    layer = fill(hyperize(linear, R))
    assert type(layer) is HyperLinear
    assert type(linear) is nn.Linear
    x, z = torch.randn(5, 3), torch.randn(5, R)
    torch.testing.assert_close(layer(x, z), per_instance(linear, layer, z, x))
    assert "in_features=3, out_features=4, cond_features=6" in repr(layer)


def test_frozen_training_dtype_device():
    net = mlp(dtype=torch.float64, device="meta").eval()
    net[0].weight.requires_grad_(False)
    copied = hyperize(net, R)
    assert {name for name, p in copied.named_parameters() if not p.requires_grad} == {"0.base_weight"}
    assert all(p.is_meta and p.dtype == torch.float64 for p in copied.parameters())
    assert not any(m.training for m in copied.modules())


def test_generated_layers_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), HyperLinear(4, 4, R))
    assert generated(hyperize(net, R)) == ["0", "1"]
    with pytest.raises(ValueError, match=r"has none of the nn\.Linears"):
        hyperize(hyperize(net, R), R)


# ties


def test_one_layer_in_two_places():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Linear(3, 4), shared, nn.Tanh(), shared)
    for include in (None, "3"):
        copied = fill(hyperize(net, R, include))
        assert copied[1] is copied[3]
        assert isinstance(copied[1], HyperLinear)
        x, z = torch.randn(5, 3), torch.randn(5, R)
        torch.testing.assert_close(hyper(copied)(x, z), per_instance(net, copied, z, x))


def test_one_layer_in_a_plain_list():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.unregistered = [self.fc]

        def forward(self, x):
            return self.unregistered[0](x)

    net = Net()
    copied = fill(hyperize(net, R))
    x, z = torch.randn(5, 3), torch.randn(5, R)
    torch.testing.assert_close(hyper(copied)(x, z), copied.fc(x, z))


def test_one_parameter_in_two_linears():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    copied = hyperize(net, R)
    assert copied[0] is not copied[1]
    assert copied[0].base_weight is copied[1].base_weight
    assert copied[0].weight is copied[1].weight
    assert copied[0].bias is not copied[1].bias
    W = [layer.materialize(torch.randn(1, R).fill_(1))[0] for layer in fill(copied)]
    assert torch.equal(*W)
    copied = hyperize(net, R, "0")
    assert copied[0].base_weight is copied[1].weight


def test_weight_tied_to_an_embedding():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    net[1].weight = net[0].weight
    copied = hyperize(net, R)
    assert copied[1].base_weight is copied[0].weight
    tokens, z = torch.randint(7, (5, 3)), torch.randn(5, R)
    torch.testing.assert_close(hyper(copied)(tokens, z), net(tokens))


# refusals


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnParameter(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))


class OnlyAnotherInit(nn.Linear):
    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


def hooked():
    linear = nn.Linear(2, 2)
    linear.register_forward_pre_hook(lambda *_: None)
    return linear


def replaced_forward():
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x
    return linear


def pruned():
    return prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("linear", "why"),
    [
        (lambda: OwnForward(2, 2), "OwnForward with a forward of its own"),
        (lambda: OwnParameter(2, 2), "OwnParameter with parameters"),
        (lambda: nn.LazyLinear(2), "lazy"),
        (hooked, "hooks"),
        (replaced_forward, "forward of its own"),
        (pruned, "pruning"),
        (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), "weight norm"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "parametrization"),
    ],
)
def test_refused(linear, why):
    net = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"odd": linear()}))
    with pytest.raises(ValueError, match=f"cannot generate '1.odd': .*{why}.*exclude"):
        hyperize(net, R)


def test_excluded_is_not_refused():
    assert generated(hyperize(nn.Sequential(nn.Linear(2, 2), hooked()), R, exclude="1")) == ["0"]


def test_the_error_names_all_refused_layers():
    with pytest.raises(ValueError, match=r"'0': .*'2': "):
        hyperize(nn.Sequential(OwnForward(2, 2), nn.Linear(2, 2), nn.LazyLinear(2)), R)


def test_subclass_with_the_same_forward_is_converted():
    net = nn.Sequential(OnlyAnotherInit(2, 2))
    copied = hyperize(net, R)
    assert type(copied[0]) is HyperLinear
    assert (copied[0].base_weight == 1).all()


def test_initialised_lazy_layer_is_converted():
    net = nn.Sequential(nn.LazyLinear(2))
    x, z = torch.randn(5, 3), torch.randn(5, R)
    y = net(x)
    torch.testing.assert_close(hyper(hyperize(net, R))(x, z), y)


def test_attention_is_refused_by_name():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"'self_attn\.out_proj': .*MultiheadAttention"):
        hyperize(layer, R)
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)  # its type does not matter: it is read and never called
    with pytest.raises(ValueError, match=r"'out_proj': .*MultiheadAttention"):
        hyperize(attention, R)


# transformers


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layer(training, norm_first):
    """The fast path of the layer for inference would read linear1.weight directly."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer.train(training)
    copied = fill(hyperize(layer, R, "linear?"))
    x, z = torch.randn(5, 3, 8), torch.randn(5, R)
    expected = per_instance(layer, copied, z, x)
    torch.testing.assert_close(hyper(copied)(x, z), expected)
    with torch.no_grad():
        torch.testing.assert_close(hyper(copied)(x, z), expected)
        torch.testing.assert_close(per_instance(layer, copied, z, x), expected)
    assert layer.activation_relu_or_gelu == 1  # the original is unchanged


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_with_padding():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    copied = fill(hyperize(encoder, R, "layers.1.linear?"))
    x, z = torch.randn(5, 4, 8), torch.randn(5, R)
    padding = torch.arange(4) >= torch.tensor([4, 3, 2, 4, 1])[:, None]
    with torch.no_grad():
        y = hyper(copied)(x, z, src_key_padding_mask=padding)
        expected = per_instance(Padded(encoder), Padded(copied), z, x, padding)
    torch.testing.assert_close(y[~padding], expected[~padding])


class Padded(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


def test_ungenerated():
    encoder = hyperize(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), R, "linear?")
    assert ungenerated(encoder) == [
        "self_attn.in_proj_weight",
        "self_attn.in_proj_bias",
        "self_attn.out_proj.weight",
        "self_attn.out_proj.bias",
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
    ]
    assert ungenerated(hyperize(mlp(), R)) == []


def test_compiled():
    net = mlp()
    model = Hypernetwork(nn.Linear(2, R), fill(hyperize(net, R)))
    f = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, cond = torch.randn(5, 3), torch.randn(5, 2)
    torch.testing.assert_close(f(x, cond), per_instance(net, model.primary, model.trunk(cond), x))
