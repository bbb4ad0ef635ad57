"""`HyperLinear.from_head`: the head stays one module, whatever is done to the model that has it."""

import copy

import pytest
import torch
from changes import CHANGES
from torch import nn

from fasthyper.nn import HyperLinear, Hypernetwork, hyperize, parameter_report, ungenerated, what_is_generated

I, O, R, B = 3, 4, 5, 6


class Net(nn.Module):
    """A model that had a head, and now has a layer of it, too."""

    def __init__(self, layout="oi", head_bias=True, bias=True):
        super().__init__()
        self.head = nn.Linear(R, O * I + O * bias, bias=head_bias)
        self.layer = HyperLinear.from_head(self.head, I, O, layout)


@pytest.fixture(params=[("oi", True, True), ("io", True, True), ("oi", False, False), ("io", True, False)], ids=str)
def net(request):
    torch.manual_seed(0)
    return Net(*request.param)


def inputs(dtype=torch.float32):
    return torch.randn(B, 2, I, dtype=dtype), torch.randn(B, R, dtype=dtype)


def by_hand(net, x, z):
    """Compute what the layer does from the output of the head."""
    weight, bias = net.head(z).split([O * I, net.head.out_features - O * I], 1)
    shape = (O, I) if net.layer.places["weight"].layout == "oi" else (I, O)
    weight = weight.view(B, *shape)
    y = x @ (weight.mT if shape == (O, I) else weight)
    return y + bias[:, None] if bias.shape[1] else y


def is_tied(net):
    """Change the head, and see whether the layer follows; the layer then computes what the head says."""
    x, z = inputs(net.head.weight.dtype)
    with torch.no_grad():
        for p in net.head.parameters():
            p.copy_(torch.randn_like(p))
    torch.testing.assert_close(net.layer(x, z), by_hand(net, x, z))
    return len(list(net.parameters())) == len(list(net.head.parameters()))


@pytest.mark.parametrize("change", CHANGES)
def test_the_head_stays_shared(net, change):
    changed = CHANGES[change](net)
    assert changed.layer.head is changed.head
    assert is_tied(changed)


@pytest.mark.parametrize("change", ["deepcopy", "double", "pickle"])
def test_the_layer_alone(net, change):
    alone = CHANGES[change](net.layer)
    assert [*dict(alone.named_parameters())] == [f"head.{name}" for name, _ in net.head.named_parameters()]
    torch.testing.assert_close(alone(*inputs(alone.head.weight.dtype)).shape, torch.Size([B, 2, O]))


def test_state_dicts(net):
    x, z = inputs()
    y, state = net.layer(x, z), net.state_dict()
    head = net.head.state_dict()
    other = Net(net.layer.places["weight"].layout, "bias" in head, "bias" in net.layer.places)

    def loads(module, entries):
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(float("nan"))
        module.load_state_dict(entries)
        torch.testing.assert_close(other.layer(x, z), y)

    loads(other, state)
    loads(other, {f"head.{name}": t for name, t in head.items()})  # the checkpoint from before there was a layer
    loads(other.layer, net.layer.state_dict())
    loads(other.layer, head)  # that of the head alone
    loads(other.head, net.layer.head.state_dict())
    own = HyperLinear(I, O, R, bias="bias" in net.layer.places, base="bias" in head)
    entries = {name: getattr(net.layer, name).detach() for name in own.state_dict()}
    loads(other.layer, entries)  # that of a layer with parameters of its own
    loads(other, {f"layer.{name}": t for name, t in entries.items()} | {f"head.{name}": t for name, t in head.items()})
    own.load_state_dict(entries)
    torch.testing.assert_close(own(x, z), y)


@pytest.mark.parametrize(("drop", "missing"), [("weight", r"head\.weight"), ("", r"head\.weight.*head\.bias")])
def test_a_missing_head_is_missed(drop, missing):
    alone = nn.ModuleDict({"layer": HyperLinear.from_head(nn.Linear(R, O * I), I, O, "oi")})
    state = {name: t for name, t in alone.state_dict().items() if drop and drop not in name}
    with pytest.raises(RuntimeError, match=rf"Missing.*layer\.{missing}"):
        alone.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing.*head\.weight"):
        Net().load_state_dict({})
    with pytest.raises(RuntimeError, match=r"(Unexpected|size mismatch).*weight"):
        alone.load_state_dict({"layer.weight": torch.zeros(O, I, R + 1), "layer.base_weight": torch.zeros(O, I)})


def test_safetensors(net, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for module, name in ((net, "net"), (net.layer, "layer")):
        safetensors.save_model(module, str(tmp_path / name))
    x, z = inputs()
    y = net.layer(x, z)
    for choose, name in ((lambda net: net, "net"), (lambda net: net.layer, "layer")):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.head.weight.zero_()
        safetensors.load_model(choose(other), str(tmp_path / name))
        torch.testing.assert_close(other.layer(x, z), y)


def test_gradients_are_those_of_the_head(net):
    x, z = inputs()
    g = torch.randn(B, 2, O)
    expected = torch.autograd.grad(by_hand(net, x, z), [*net.head.parameters()], g)
    net.layer(x, z).backward(g)
    torch.testing.assert_close([p.grad for p in net.head.parameters()], [*expected])
    before = net.head(z).detach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(expected)
    optimizer.step()
    assert not torch.equal(net.head(z), before)
    torch.testing.assert_close(net.layer(x, z), by_hand(net, x, z))


def test_frozen_stays_frozen():
    head = nn.Linear(R, O * I + O)
    head.bias.requires_grad_(False)
    layer = HyperLinear.from_head(head, I, O, "oi")
    tensors = {name: getattr(layer, name).requires_grad for name in ("weight", "bias", "base_weight", "base_bias")}
    assert tensors == {"weight": True, "bias": True, "base_weight": False, "base_bias": False}
    assert not copy.deepcopy(layer).head.bias.requires_grad


def test_transforms(net):
    x, z = inputs()
    y = net.layer(x, z)
    parameters = dict(net.layer.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(net.layer, parameters, (x, z)), y)
    half = {name: p / 2 for name, p in parameters.items()}
    torch.testing.assert_close(torch.func.functional_call(net.layer, half, (x, z)), y / 2)
    torch.testing.assert_close(net.layer(x, z), y)
    compiled = torch.compile(net.layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, z), y)
    program = torch.export.export(net.layer, (x, z)).module()
    torch.testing.assert_close(program(x, z), y)


def test_parameters_are_initialised_in_place(net):
    old = [*net.parameters()]
    net.layer.reset_parameters("hyperfan_in")
    assert all(p is q for p, q in zip(old, net.parameters(), strict=True))
    if net.head.bias is not None:
        assert not net.head.bias.any()
    bound = (3 / (2 if net.layer.bias is not None else 1) / I / R) ** 0.5
    assert 0.5 * bound < net.layer.weight.abs().max() <= bound
    with pytest.raises(AttributeError, match="weight is a view of rows of the layer's head"):
        net.layer.weight = nn.Parameter(torch.zeros(O, I, R))


def test_what_the_rest_of_the_package_sees(net):
    model = Hypernetwork(nn.Linear(2, R), nn.Sequential(net.layer, nn.ReLU(), nn.Linear(O, 1)))
    assert ungenerated(model) == ["trunk.weight", "trunk.bias", "primary.2.weight", "primary.2.bias"]
    assert [s.name for s in what_is_generated(model.primary).layers] == ["0", "2"]
    report = parameter_report(model)
    assert report.n_f == 3 * R + sum(p.numel() for p in net.head.parameters())
    assert report.n_g == net.head.out_features
    again = hyperize(model.primary, R)
    assert isinstance(again[0].head, nn.Linear)
    assert isinstance(again[2], HyperLinear)
    x, cond = torch.randn(1, I), torch.randn(1, 2)
    torch.testing.assert_close(model.merged(cond)(x), model(x, cond))


def test_two_layers_of_one_head_are_merged_as_one():
    head = nn.Linear(R, I * I)
    layers = [HyperLinear.from_head(head, I, I, "oi") for _ in range(2)]
    model = Hypernetwork(nn.Identity(), nn.Sequential(*layers))
    merged = model.merged(torch.randn(1, R))
    assert merged[0].weight is merged[1].weight
    assert parameter_report(model).n_g == I * I


OUTPUTS = O * I + O
WRONG_HEADS = {
    "rows": (lambda: nn.Linear(R, O * I), ValueError, r"must have a weight \(16, 5\), got \(12, 5\)"),
    "features": (lambda: nn.Linear(R + 1, OUTPUTS), ValueError, r"must have a weight \(16, 5\), got \(16, 6\)"),
    "dtype": (lambda: nn.Linear(R, OUTPUTS).double(), TypeError, r"\(16, 5\) of torch.float32, got torch.float64"),
    "module": (lambda: nn.Sequential(nn.Linear(R, OUTPUTS)), TypeError, r"an nn.Linear .* \(16, 5\), got Sequential"),
    "parameter": (lambda: nn.Parameter(torch.zeros(OUTPUTS, R)), TypeError, r"an nn.Linear .* got Parameter \(16, 5\)"),
    "none": (lambda: None, TypeError, r"an nn.Linear with a weight \(16, 5\), got NoneType"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(R, OUTPUTS)),
        TypeError,
        "cannot be replaced: its weight is computed",
    ),
}


@pytest.mark.parametrize("case", WRONG_HEADS)
def test_a_wrong_head_is_refused(case):
    net = Net()
    make, error, message = WRONG_HEADS[case]
    with pytest.raises(error, match=rf"head of the HyperLinear with in_features=3 and out_features=4 .*{message}"):
        net.layer.head = make()
    assert net.layer.head is net.head


@pytest.mark.parametrize("bias", [True, False])
def test_another_head_of_the_same_sizes(bias):
    net = Net()
    net.head = net.layer.head = nn.Linear(R, OUTPUTS, bias=bias)
    assert is_tied(net)


def test_parameters_of_the_head_that_do_not_fit():
    x, z = inputs()
    for name, shape in (("weight", (7, R)), ("weight", (OUTPUTS, R + 1)), ("bias", (7,))):
        net = Net()
        setattr(net.head, name, nn.Parameter(torch.randn(shape)))
        with pytest.raises(ValueError, match=rf"head of the HyperLinear .* a {name} .*, got \({shape[0]}, *"):
            net.layer(x, z)
        net.layer.head = nn.Linear(R, OUTPUTS)
        assert net.layer(x, z).shape == (B, 2, O)


def test_replicas_are_put_together():
    """As nn.DataParallel does it: a replica of the head has no parameters yet."""
    net = Net()
    replica, head = net.layer._replicate_for_data_parallel(), net.head._replicate_for_data_parallel()
    replica.head = head
    head.weight, head.bias = net.head.weight.detach(), net.head.bias.detach()
    x, z = inputs()
    torch.testing.assert_close(replica(x, z), net.layer(x, z))
