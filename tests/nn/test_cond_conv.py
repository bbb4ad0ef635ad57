"""CondConv2d against timm's layer, and timm's efficientnet_cc with ours in its place."""

from __future__ import annotations

import pytest
import torch

from fasthyper.nn import CondConv2d


@pytest.fixture(scope="module")
def timm():
    """timm, which imports torchvision: a build for another torch lacks its two ops, which nothing here calls."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def theirs(timm):
    return timm.layers.CondConv2d


SETTINGS = [
    {},
    {"kernel_size": 1},
    {"kernel_size": 5, "stride": 2, "groups": 8, "bias": True},
    {"padding": "same", "stride": 2},
    {"padding": "same", "kernel_size": (3, 5), "dilation": 2},
    {"padding": "valid", "stride": (2, 1)},
    {"padding": (1, 0), "groups": 2, "num_experts": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_theirs(theirs, settings):
    """The same arguments, state dict, results and gradients."""
    ours, other = (make(8, 16, **settings, dtype=torch.float64) for make in (CondConv2d, theirs))
    assert ours.dynamic_padding == other.dynamic_padding
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    for source, to in ((ours, other), (other, ours)):
        torch.nn.init.normal_(source.weight)
        to.load_state_dict(source.state_dict())
        torch.testing.assert_close(source.weight, to.weight)
    x = torch.randn(3, 8, 9, 10).double()
    routing = torch.rand(3, ours.num_experts).double()
    for last in (False, True):
        x = x.detach().to(memory_format=torch.channels_last if last else torch.contiguous_format)
        results = []
        for layer in (ours, other):
            leaves = [x.detach().requires_grad_(), routing.detach().requires_grad_(), *layer.parameters()]
            y = layer(*leaves[:2])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*results)


def test_init_as_theirs(theirs):
    weights = []
    for make in (CondConv2d, theirs):
        torch.manual_seed(0)
        weights.append(make(8, 16, bias=True).state_dict())
    torch.testing.assert_close(*weights)


def _replaced(model, theirs):
    """Put our layer in the place of each of theirs; return the model."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child) is theirs:
                layer = CondConv2d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding,
                    child.dilation, child.groups, child.bias is not None, child.num_experts,
                )  # fmt: skip
                setattr(module, name, layer)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_efficientnet(timm, theirs):
    """timm's efficientnet_cc_b0_4e with our layer: the same state dict, results, and losses in training."""
    make = lambda: timm.create_model("efficientnet_cc_b0_4e", num_classes=10, drop_rate=0.0)
    torch.manual_seed(0)
    other = make()
    ours = _replaced(make(), theirs)
    assert sum(type(m) is CondConv2d for m in ours.modules()) == 24
    ours.load_state_dict(other.state_dict())
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 7])
    ours.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), other(x), rtol=1e-3, atol=1e-4)
    losses = []
    for model in (ours, other):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses.append([])
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding": "full"}, "padding must be numbers, '', 'same' or 'valid'"),
        ({"groups": 3}, "groups must divide 8 and 16 channels"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CondConv2d(8, 16, **settings)


def test_routing_weights_of_another_batch():
    with pytest.raises(ValueError, match=r"routing_weights must have shape \(B, R\) = \(3, 4\), got \(2, 4\)"):
        CondConv2d(8, 16)(torch.randn(3, 8, 6, 6), torch.rand(2, 4))
