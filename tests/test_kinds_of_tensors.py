"""Every public function and layer, given a tensor of a kind that it does not take: the error names the argument."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fasthyper
from fasthyper import Incidence
from fasthyper import nn as layers

B, I, O, R = 4, 3, 6, 5
EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])


def randn(*shape):
    return torch.randn(shape)


def linear_arguments(**more):
    more = {"bias": randn(O, R), "base_weight": randn(O, I), "base_bias": randn(O), **more}
    return {"x": randn(B, I), "z": randn(B, R), "weight": randn(O, I, R), **more}


def conv_arguments(dims, first=O, second=I):
    taps, pixels = (2,) * dims, (5,) * dims
    return {"x": randn(B, I, *pixels), "z": randn(B, R), "weight": randn(first, second, *taps, R), "bias": randn(O, R)}


def of_incidence(**given):
    incidence = Incidence(EDGES[0], None, EDGES[1], num_sources=B, num_targets=B)
    return fasthyper.hyper_linear(**given, incidence=incidence)


def in_network(x, z):
    return layers.Hypernetwork(nn.Identity(), nn.Sequential(layers.HyperLinear(I, O, R)))(x, z)


def fused(x, z):
    primary = nn.Sequential(layers.HyperLinear(I, O, R), nn.ReLU(), layers.HyperLinear(O, I, R))
    return layers.Hypernetwork(nn.Identity(), primary)(x, z)


def with_bias_z(z):
    return layers.HyperLinear(I, O, R, bias_cond_features=2)(randn(B, I), (randn(B, R), z))


def with_embedding(x):
    return layers.EmbeddingNetwork(nn.Identity(), nn.Linear(I + R, O))(x, randn(B, R))


def edge_network(x, edge_attr):
    return layers.NNConv(I, O, nn.Linear(R, I * O))(x, EDGES, edge_attr)


ops, hyper = fasthyper.ops, layers.HyperLinear
X_Z = {"x": randn(B, I), "z": randn(B, R)}
IMAGE = {"x": randn(B, I, 5, 5), "z": randn(B, R)}
POINTS = {"x": randn(B, 2, I), "z": randn(B, R), "weight": randn(O, I, R), "g": randn(B, 2, O)}
TWO = {"input1": randn(B, I), "input2": randn(B, R)}
ADAPTERS = {"x": randn(B, 2, I), "a": randn(B, 2, I), "b": randn(B, O, 2), "base_weight": randn(O, I)}

# What is called, and the arguments that it takes.
CALLS = {
    "hyper_linear": (fasthyper.hyper_linear, linear_arguments()),
    "with a map": (lambda **given: fasthyper.hyper_linear(**given, weight_map="abs"), linear_arguments()),
    "with a function": (lambda **given: fasthyper.hyper_linear(**given, weight_map=torch.sin), linear_arguments()),
    "with an incidence": (of_incidence, linear_arguments(z=randn(5, R))),
    "low_rank_linear": (lambda **given: fasthyper.low_rank_linear(**given, layout="rI,Or"), ADAPTERS),
    "hyper_conv1d": (fasthyper.hyper_conv1d, conv_arguments(1)),
    "hyper_conv2d": (fasthyper.hyper_conv2d, conv_arguments(2)),
    "hyper_conv3d": (fasthyper.hyper_conv3d, conv_arguments(3)),
    "hyper_conv_transpose1d": (fasthyper.hyper_conv_transpose1d, conv_arguments(1, I, O)),
    "hyper_conv_transpose2d": (fasthyper.hyper_conv_transpose2d, conv_arguments(2, I, O)),
    "hyper_conv_transpose3d": (fasthyper.hyper_conv_transpose3d, conv_arguments(3, I, O)),
    "apply": (ops.apply, {name: POINTS[name] for name in ("x", "z", "weight")}),
    "cond_grad": (ops.cond_grad, {name: POINTS[name] for name in ("x", "g", "weight")}),
    "weight_grad": (ops.weight_grad, {name: POINTS[name] for name in ("x", "z", "g")}),
    "grads": (ops.grads, POINTS),
    "HyperLinear": (hyper(I, O, R), X_Z),
    "HyperLinear of a rank": (hyper(I, O, R, rank=2), X_Z),
    "HyperLinear of a map": (hyper(I, O, R, weight_map="normalize"), X_Z),
    "HyperLinear of a head": (hyper.from_head(nn.Linear(R, I * O + O), I, O, "oi"), X_Z),
    "materialize": (hyper(I, O, R).materialize, {"z": randn(B, R)}),
    "weight_norm_sq": (hyper(I, O, R).weight_norm_sq, {"z": randn(B, R)}),
    "merged": (hyper(I, O, R).merged, {"z": randn(R)}),
    "z of the bias": (with_bias_z, {"z": randn(B, 2)}),
    "Hypernetwork": (in_network, X_Z),
    "Hypernetwork that fuses": (fused, X_Z),
    "Bilinear": (layers.Bilinear(I, R, O), TWO),
    "PairwiseBilinear": (layers.PairwiseBilinear(I, R, O), {"input1": randn(B, 2, I), "input2": randn(B, 3, R)}),
    "EmbeddingNetwork": (with_embedding, {"x": randn(B, I)}),
    "HyperAffine": (layers.HyperAffine(nn.LayerNorm(I), R), X_Z),
    "HyperAffine of channels": (layers.HyperAffine(nn.BatchNorm1d(I), R), X_Z),
    "HyperEmbedding": (lambda z: layers.HyperEmbedding(7, I, R)(torch.arange(B), z), {"z": randn(B, R)}),
    "HyperConv2d": (layers.HyperConv2d(I, O, 2, R), IMAGE),
    "HyperConv2d that reflects": (layers.HyperConv2d(I, O, 3, R, padding=1, padding_mode="reflect"), IMAGE),
    "HyperConv2d of a rank": (layers.HyperConv2d(I, O, 3, R, rank=2), IMAGE),
    "HyperConvTranspose2d": (layers.HyperConvTranspose2d(I, O, 3, R), IMAGE),
    "CondConv2d": (layers.CondConv2d(I, O, num_experts=R), {"x": randn(B, I, 5, 5), "routing_weights": randn(B, R)}),
    "QMixer": (layers.QMixer((R,), 8, I), {"chosen_action_value": randn(B, I, 1), "state": randn(B, R)}),
    "NNConv": (edge_network, {"x": randn(B, I), "edge_attr": randn(5, R)}),
    "RGCNConv": (lambda x: layers.RGCNConv(I, O, 2)(x, EDGES, torch.zeros(5, dtype=torch.long)), {"x": randn(B, I)}),
}  # fmt: skip


def nested(t, layout=torch.strided):
    return torch.nested.nested_tensor([t[:1].clone(), t[:1].clone()], layout=layout)


class Unknown(torch.Tensor):
    """A subclass that knows no op of this package."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "fasthyper" in f"{func} {getattr(func, '__module__', '')}":
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


KINDS = {
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: t.flatten(1).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
    "csc": lambda t: t.flatten(1).to_sparse_csc() if t.dim() > 1 else t.to_sparse(),
    "mkldnn": lambda t: (t.flatten(1) if t.dim() > 5 else t).to_mkldnn(),  # it has no more axes
    "nested": nested,
    "jagged": lambda t: nested(t, torch.jagged),
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "int": lambda t: t.to(torch.int64),
    "bool": lambda t: t > 0,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "number": lambda t: 1.5,
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes in torch
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "argument"), [(call, argument) for call, (_, given) in CALLS.items() for argument in given]
)
def test_the_error_names_the_argument(call, argument, kind):
    function, given = CALLS[call]
    wrong = {**given, argument: KINDS[kind](given[argument])}
    subject = f"{argument}|{call}" if call == "z of the bias" else argument
    is_pair = call in ("NNConv", "RGCNConv") and argument == "x" and kind == "list"
    with pytest.raises(
        ValueError if is_pair else TypeError, match=rf"^({subject}|trunk) must |takes one {argument}, a tensor"
    ):
        function(**wrong)


@pytest.mark.parametrize("call", CALLS)
def test_they_run_with_dense_tensors(call):
    function, given = CALLS[call]
    for _ in range(2):
        function(**given)


@pytest.mark.parametrize("argument", ["x", "z", "weight"])
def test_a_subclass_without_a_rule(argument):
    for function, given in (CALLS["hyper_linear"], CALLS["hyper_conv2d"], CALLS["apply"]):
        wrong = {**given, argument: given[argument].as_subclass(Unknown)}
        with pytest.raises(TypeError, match=f"{argument} must be an ordinary tensor, got a Unknown"):
            function(**wrong)


def test_a_z_for_each_point():
    for function in (hyper(I, O, R), in_network, fused):
        with pytest.raises(
            ValueError, match=r"z must have shape .*\(4, 7, 5\).*x\.flatten\(0, 1\) and z\.flatten\(0, 1\)"
        ):
            function(randn(B, 7, I), randn(B, 7, R))
    x, z = randn(B, 7, I), randn(B, 7, R)
    assert hyper(I, O, R)(x.flatten(0, 1), z.flatten(0, 1)).shape == (B * 7, O)  # as the message says


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("rank", [None, 2])
def test_messages_of_padded_convolutions_have_the_shapes_that_were_passed(mode, rank):
    layer = layers.HyperConv2d(I, O, 3, R, padding=1, padding_mode=mode, rank=rank)
    with pytest.raises(ValueError, match=re.escape(f"x (B, X, d, h, w) has shape {(B, I, 5, 5)}".replace("d, ", ""))):
        layer(IMAGE["x"], randn(B + 1, R))
    with pytest.raises(ValueError, match=re.escape(f"x has shape {(B, I + 1, 5, 5)}")):
        layer(randn(B, I + 1, 5, 5), IMAGE["z"])


def test_a_kernel_without_taps():
    for function, weight in ((fasthyper.hyper_conv2d, (O, I)), (fasthyper.hyper_conv_transpose2d, (I, O))):
        with pytest.raises(ValueError, match="weight must have a kernel of at least one tap"):
            function(**{**conv_arguments(2), "weight": randn(*weight, 0, 2, R)})


def test_integers_of_numpy():
    two = np.int64(2)
    y = fasthyper.hyper_conv2d(**conv_arguments(2), stride=two, padding=(two, 1), dilation=[1, two], groups=np.int64(1))
    assert y.shape == (B, O, 4, 3)
    layer = layers.HyperConv2d(two, two, two, np.int64(R), stride=two, groups=two)
    assert layer(randn(B, 2, 6, 6), randn(B, R)).shape == (B, 2, 3, 3)
    assert hyper(np.int64(I), np.int64(O), np.int64(R), rank=two)(**X_Z).shape == (B, O)
    with pytest.raises(TypeError, match=r"stride must be an integer or 2 of them, got 1\.5"):
        fasthyper.hyper_conv2d(**conv_arguments(2), stride=1.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replace": [nn.Linear]}, "replace must be a dict of classes and functions, got a list"),
        ({"replace": {"linear": nn.Linear}}, "replace must have classes of modules as its keys, got 'linear'"),
        ({"replace": {nn.PReLU: 3}}, "replace must have functions as its values, got 3 for PReLU"),
        ({"types": 3}, "types must hold classes of modules and names of families, got 3"),
        ({"include": 3}, "include must hold patterns of names .*, got a int"),
    ],
)
def test_arguments_of_hyperize(wrong, message):
    with pytest.raises(TypeError, match=message):
        layers.hyperize(nn.Sequential(nn.Linear(2, 2)), R, **wrong)


def test_qmixer_given_none():
    with pytest.raises(TypeError, match="state must be a tensor, got None"):
        layers.QMixer((R,), 8, I)(randn(B, I, 1), None)
