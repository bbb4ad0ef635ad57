"""Every layer under ``torch.fx``: as what is traced, inside of another module, with hooks, and in a subclass."""

import copy

import pytest
import torch
from torch import nn

import fasthyper.nn
from fasthyper.nn import (
    Bilinear,
    CondConv2d,
    EmbeddingNetwork,
    HyperAffine,
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose1d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
    HyperEmbedding,
    HyperLinear,
    Hypernetwork,
    NNConv,
    PairwiseBilinear,
    QMixer,
    RGCNConv,
    hyperize,
)

B, R = 4, 5
EDGES = torch.tensor([[0, 1, 2, 2], [1, 0, 1, 3]])
some = torch.randn


def chunked():
    model = Hypernetwork.from_flat_head(nn.Linear(R + 2, 9), nn.Linear(4, 6), chunks=some(4, 2), layout="oi")
    return model.primary


def convolution(cls, dims, **kwargs):
    return lambda: cls(4, 6, 3, R, **kwargs), lambda: (some(B, 4, *(5,) * dims), some(B, R))


def points():
    return some(B, 7, 4), some(B, R)


LAYERS = {
    "linear": (lambda: HyperLinear(4, 6, R), points),
    "linear of low rank": (lambda: HyperLinear(4, 6, R, rank=2), points),
    "linear of a head": (lambda: HyperLinear.from_head(nn.Linear(R, 30), 4, 6, "io"), points),
    "linear of chunks": (chunked, points),
    "linear with a map": (lambda: HyperLinear(4, 6, R, weight_map="tanh"), points),
    "bilinear": (lambda: Bilinear(4, R, 3), lambda: (some(B, 4), some(B, R))),
    "pairs": (lambda: PairwiseBilinear(4, R, 3, bias_x=True), lambda: (some(B, 6, 4), some(B, 7, R))),
    "conv1d": convolution(HyperConv1d, 1, padding="same", padding_mode="reflect"),
    "conv2d": convolution(HyperConv2d, 2, padding=1, stride=2),
    "conv2d of low rank": convolution(HyperConv2d, 2, rank=2),
    "conv3d": convolution(HyperConv3d, 3),
    "transposed conv1d": convolution(HyperConvTranspose1d, 1),
    "transposed conv2d": convolution(HyperConvTranspose2d, 2, stride=2),
    "transposed conv3d": convolution(HyperConvTranspose3d, 3),
    "experts": (lambda: CondConv2d(4, 6, 3, num_experts=R, padding="same"), lambda: (some(B, 4, 5, 6), some(B, R))),
    "norm": (lambda: HyperAffine(nn.LayerNorm(4), R), points),
    "embedding": (lambda: HyperEmbedding(9, 3, R), lambda: (torch.randint(9, (B, 7)), some(B, R))),
    "edges": (lambda: NNConv(4, 6, nn.Linear(R, 24)), lambda: (some(B, 4), EDGES, some(4, R))),
    "relations": (lambda: RGCNConv(4, 6, 3, 2), lambda: (some(B, 4), EDGES, torch.tensor([0, 1, 2, 0]))),
    "mixer": (lambda: QMixer((R,), 8, 3), lambda: (some(B, 3, 1), some(B, R))),
    "network": (lambda: Hypernetwork(nn.Linear(R, R), hyperize(nn.Sequential(nn.Linear(4, 3)), R)), points),
    "embedding network": (lambda: EmbeddingNetwork(nn.Linear(R, 2), nn.Sequential(nn.Linear(6, 3))), points),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, inputs = LAYERS[request.param]
    model = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, inputs


class Inside(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return 2 * self.layer(*args)


class Two(Inside):
    def forward(self, x, z):
        return 2 * self.layer(x, z)


class Three(Inside):
    def forward(self, x, z, w):
        return 2 * self.layer(x, z, w)


def inside(layer, args):
    return (Two if len(args) == 2 else Three)(layer)


def assert_same(traced, model, inputs):
    """Compare values and gradients, also of a copy that is traced again."""
    again = torch.fx.symbolic_trace(copy.deepcopy(traced))
    args = inputs()
    y = model(*args)
    for graph in (traced, again):
        torch.testing.assert_close(graph(*args), y)
    expected = torch.autograd.grad(y.square().sum(), [*model.parameters()])
    found = torch.autograd.grad(traced(*args).square().sum(), [*model.parameters()])
    torch.testing.assert_close(found, expected)


def test_every_public_layer_is_tested():
    public = {c for c in vars(fasthyper.nn).values() if isinstance(c, type) and issubclass(c, nn.Module)}
    assert public <= {type(make()) for make, _ in LAYERS.values()} | {Hypernetwork}


def test_the_layer_itself(layer):
    model, inputs = layer
    assert_same(torch.fx.symbolic_trace(model), model, inputs)


def test_the_layer_itself_as_tools_trace_it(layer):
    """A graph is put together with the module that was traced."""
    model, inputs = layer
    assert_same(torch.fx.GraphModule(model, torch.fx.Tracer().trace(model)), model, inputs)
    assert "_traced_layer" not in [*model.state_dict()]


def test_inside_of_a_module(layer):
    model, inputs = layer
    around = inside(model, inputs())
    traced = torch.fx.symbolic_trace(around)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
    assert_same(traced, around, inputs)


def test_hooks_run_once(layer):
    model, inputs = layer
    model.register_forward_hook(lambda module, args, y: 3 * y)
    factor = 1 if isinstance(model, HyperEmbedding) else 2  # twice an id may be none
    model.register_forward_pre_hook(lambda module, args: (factor * args[0], *args[1:]))
    around = inside(model, inputs())
    assert_same(torch.fx.symbolic_trace(around), around, inputs)
    if not isinstance(model, Hypernetwork):  # its modules are nodes, and fx knows no hooks of what it traces
        assert_same(torch.fx.symbolic_trace(model), model, inputs)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_of_all_modules_run_once(layer, kind):
    model, inputs = layer
    if isinstance(model, Hypernetwork):
        pytest.skip("its modules are nodes, and fx knows no hooks of what it traces")
    factor = 1 if isinstance(model, HyperEmbedding) and kind == "forward_pre" else 3  # three times an id may be none
    hook = {
        "forward": lambda module, args, y: 3 * y,
        "forward_pre": lambda module, args: (factor * args[0], *args[1:]),
    }[kind]
    add = getattr(nn.modules.module, f"register_module_{kind}_hook")
    around, args = inside(model, inputs()), inputs()
    with add(lambda module, *rest: hook(module, *rest) if module is model else None):
        traced = torch.fx.symbolic_trace(around)
        torch.testing.assert_close(traced(*args), around(*args))
    with add(hook):
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(*args), model(*args))


def test_a_subclass_with_a_forward_of_its_own(layer):
    model, inputs = layer
    forward = type(model).forward
    function = (lambda self, x, z: 3 * forward(self, x, z)) if len(inputs()) == 2 else None
    model.__class__ = type("Own", (type(model),), {"forward": function or (lambda self, *a: 3 * forward(self, *a))})
    around = inside(model, inputs())
    assert_same(torch.fx.symbolic_trace(around), around, inputs)
    if function is not None:
        assert_same(torch.fx.symbolic_trace(model), model, inputs)
