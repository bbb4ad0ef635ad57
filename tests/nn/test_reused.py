"""A layer that meets one z again and again in a block writes W out once; nothing else is different."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasthyper
from fasthyper.nn import HyperLinear, Hypernetwork, current_z, reused

B, F, R, STEPS = 4, 16, 64, 6


@pytest.fixture
def written(monkeypatch):
    """Return a list that has an entry for each W that is written out."""
    made, generate = [], reused.kept.generate
    monkeypatch.setattr(reused.kept, "generate", lambda *parts: made.append(parts[0].dtype) or generate(*parts))
    return made


def layer_of(dtype=torch.float64, head=False) -> HyperLinear:
    torch.manual_seed(0)
    if head:
        return HyperLinear.from_head(nn.Linear(R, F * F + F, dtype=dtype), F, F, layout="oi")
    return HyperLinear(F, F, R, dtype=dtype)


def recurrent(layer, x, z, steps=STEPS):
    with fasthyper.deliver(z):
        for _ in range(steps):
            x = torch.tanh(layer(x))
    return x


def once(layer, x, z):
    W, b = layer.materialize(z)
    y = torch.einsum("boi,bi->bo", W, x)
    return y if b is None else y + b


def by_hand(layer, x, z, steps=STEPS):
    for _ in range(steps):
        x = torch.tanh(once(layer, x, z))
    return x


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(B, F, dtype=dtype), torch.randn(B, R, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("head", [False, True])
def test_values_and_gradients_of_all_orders(head, written):
    layer, (x, z) = layer_of(head=head), inputs()
    found, expected = [], []
    for run, out in ((recurrent, found), (by_hand, expected)):
        y = run(layer, x, z * 1)
        first = torch.autograd.grad(y.square().sum(), [z, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), [z, *layer.parameters()])
        out += [y, *first, *second]
    torch.testing.assert_close(found, expected)
    assert written[0] == torch.float64


@pytest.mark.parametrize("steps", [1, 3, 4, 9])
def test_w_is_written_out_once_from_the_fourth_call_on(steps, written):
    layer, (x, z) = layer_of(), inputs()
    y = recurrent(layer, x.requires_grad_(), z * 1, steps)
    assert len(written) == (steps > 3)
    y.sum().backward()
    assert len(written) == (steps > 3)


def test_two_layers_in_turn(written):
    one, two, (x, z) = layer_of(), layer_of(), inputs()
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            x = two(one(x))
    assert len(written) == 2
    x.sum().backward()


def test_layers_that_share_a_head():
    """Two layouts of one head, and a head with a base of another layer, are different layers."""
    head, (x, z) = nn.Linear(R, F * F, dtype=torch.float64), inputs()
    layers = [HyperLinear.from_head(head, F, F, layout=layout) for layout in ("oi", "io")]
    other = HyperLinear(F, F, R, dtype=torch.float64)
    other.weight = nn.Parameter(layers[0].weight.detach())
    nn.init.normal_(other.base_weight)
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            for layer in (*layers, other):
                torch.testing.assert_close(layer(x), once(layer, x, z))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = layer_of()

    def forward(self, x):
        for _ in range(STEPS):
            x = torch.tanh(self.fc(x))
        return x


def test_a_recurrent_primary(written):
    model, (x, _) = Hypernetwork(nn.Linear(3, R).double(), Cell()), inputs()
    for _ in range(2):
        y = model(x, torch.ones(B, 3, dtype=torch.float64))
        torch.testing.assert_close(y, by_hand(model.primary.fc, x, model.trunk(torch.ones(B, 3, dtype=torch.float64))))
    assert len(written) == 2


def test_a_new_block_begins_anew(written):
    layer, (x, z) = layer_of(), inputs()
    for _ in range(STEPS):
        recurrent(layer, x, z, 3)
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            with fasthyper.deliver(z):
                layer(x)
    for _ in range(STEPS):
        layer(x, z)
    assert not written


def test_a_changed_argument_is_seen(written):
    layer, (x, z) = layer_of(), inputs()
    z = z.detach()
    with fasthyper.deliver(z):
        check = lambda: torch.testing.assert_close(layer(x), once(layer, x, z))
        for change in (layer.weight, layer.base_weight, z):
            for _ in range(STEPS):
                check()
            with torch.no_grad():
                change.mul_(0.5)
            check()
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
        check()
    assert len(written) == 3


def test_a_change_before_backward_raises(written):
    layer, (x, z) = layer_of(), inputs()
    y = recurrent(layer, x, z * 1)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        y.sum().backward()


def test_w_ends_with_the_block_and_with_a_backward_pass(written):
    layer, (x, z) = layer_of(), inputs()
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            y = layer(x)
        (met,) = current_z._current.entry.reused._met.values()
        w = weakref.ref(met.w)
        y.sum().backward()
        assert w() is None
        layer(x)
        w = weakref.ref(met.w)
        del met
    assert w() is None
    assert len(written) == 2


def test_several_backward_passes_through_one_z(written):
    """Each result has its own backward, where the trunk saves nothing."""
    layer, (x, _) = layer_of(), inputs()
    p = torch.randn(R, dtype=torch.float64, requires_grad=True)
    z = p.expand(B, R)
    with fasthyper.deliver(z):
        losses = [layer(x.requires_grad_()).square().sum() for _ in range(STEPS)]
    for loss in losses:
        loss.backward()
    found = p.grad
    q = p.detach().clone().requires_grad_()
    for _ in range(STEPS):
        W, b = layer.materialize(q.expand(B, R))
        (torch.einsum("boi,bi->bo", W, x) + b).square().sum().backward()
    torch.testing.assert_close(found, q.grad)
    assert len(written) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_in_checkpoints(use_reentrant):
    layer, (x, z) = layer_of(), inputs()
    y = x.requires_grad_()
    with fasthyper.deliver(z):
        for k in range(2 * STEPS):
            y = torch.tanh(checkpoint(layer, y, use_reentrant=use_reentrant) if k % 2 else layer(y))
    wanted = [z, *layer.parameters()]
    y.sum().backward()
    expected = torch.autograd.grad(by_hand(layer, x, z, 2 * STEPS).sum(), wanted)
    torch.testing.assert_close([t.grad for t in wanted], [*expected])


def not_kept(layer, x, z) -> dict:
    return {
        "a forced order": lambda: _forced(layer, x, z * 1),
        "z is passed": lambda: _passed(layer, x, z),
        "an incidence": lambda: _with_incidence(layer, x, z),
        "several rows for each z": lambda: _repeated(layer, x, z),
    }


def _forced(layer, x, z):
    with fasthyper.use_backend("aten", "fold"):
        return recurrent(layer, x, z)


def _passed(layer, x, z):
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            x = torch.tanh(layer(x, z))
    return x


def _with_incidence(layer, x, z):
    with fasthyper.deliver(z, fasthyper.Incidence.from_batch(torch.arange(B))):
        for _ in range(STEPS):
            x = torch.tanh(layer(x))
    return x


def _repeated(layer, x, z):
    with fasthyper.deliver(z, repeat_z=True):
        for _ in range(STEPS):
            x = torch.tanh(layer(x))
    return x


@pytest.mark.parametrize("case", not_kept(None, None, torch.zeros(())))
def test_where_w_is_not_kept(case, written):
    layer, (x, z) = layer_of(), inputs()
    y = not_kept(layer, x, z)[case]()
    assert not written
    torch.testing.assert_close(y, by_hand(layer, x, z))


def test_w_beyond_the_workspace_is_not_kept(written):
    layer = HyperLinear(256, 256, R)
    x, z = torch.randn(8, 256), torch.randn(8, R, requires_grad=True)
    fasthyper.set_workspace_limit(5 << 20)
    recurrent(layer, x, z * 1)
    assert not written
    fasthyper.set_workspace_limit(6 << 20)
    recurrent(layer, x, z * 1)
    assert len(written) == 1
    other = HyperLinear(256, 256, R)
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            layer(x), other(x)
    assert len(written) == 2  # no room for the other one


def test_without_gradients(written):
    layer, (x, z) = layer_of(), inputs()
    with torch.no_grad():
        y = recurrent(layer, x, z)
    assert len(written) == 1
    torch.testing.assert_close(y, by_hand(layer, x, z))
    with fasthyper.deliver(z):
        with torch.no_grad():
            for _ in range(STEPS):
                layer(x)
        layer(x).sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("options", [{"rank": 2}, {"weight_map": "tanh"}, {"bias_cond_features": 5}], ids=str)
def test_other_kinds_of_layers(options):
    layer, (x, z) = HyperLinear(F, F, R, **options).double(), inputs()
    both = (z, torch.randn(B, 5, dtype=torch.float64)) if "bias_cond_features" in options else z
    with fasthyper.deliver({layer: both}):
        results = [layer(x) for _ in range(STEPS)]
    for y in results:
        torch.testing.assert_close(y, layer(x, both))


def test_a_parametrized_head_is_computed_in_each_call():
    layer, (x, z) = layer_of(), inputs()
    scales = iter(range(1, 100))

    class Changing(nn.Module):
        def forward(self, weight):
            return weight * next(scales)

    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Changing())
    with fasthyper.deliver(z):
        results = [layer(x) for _ in range(STEPS)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_compiled_code_generates_w_in_each_call(written):
    layer, (x, z) = layer_of(), inputs()
    torch._dynamo.reset()
    f = torch.compile(lambda x, z: recurrent(layer, x, z * 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x, z), by_hand(layer, x, z))
    assert not written


def test_under_autocast(written):
    layer, (x, z) = layer_of(torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = recurrent(layer, x, z * 1)
    assert written == [torch.bfloat16]
    y.float().sum().backward()
    (expected,) = torch.autograd.grad(by_hand(layer, x, z).sum(), z)
    torch.testing.assert_close(z.grad, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_wrong_arguments_are_named():
    layer, (x, z) = layer_of(), inputs()
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            layer(x)
        with pytest.raises(ValueError, match="x must have shape"):
            layer(torch.randn(B, F + 1, dtype=torch.float64))
        with pytest.raises(ValueError, match="repeat_z=True"):
            layer(torch.randn(2 * B, F, dtype=torch.float64))
        with pytest.raises(TypeError, match="dtype of x"):
            layer(x.float())
        with pytest.raises(TypeError, match="x must be a tensor"):
            layer(None)


@pytest.mark.parametrize("points", [(), (3,), (2, 3)])
def test_any_number_of_point_axes(points, written):
    layer, (_, z) = layer_of(), inputs()
    x = torch.randn(B, *points, F, dtype=torch.float64)
    with fasthyper.deliver(z):
        results = [layer(x) for _ in range(5)]
    assert written
    for y in results:
        assert y.is_contiguous()
        assert y.shape == x.shape
        torch.testing.assert_close(y, results[0])


def test_requires_grad_changes():
    layer, (x, z) = layer_of(), inputs()
    layer.requires_grad_(False)
    with fasthyper.deliver(z):
        frozen = [layer(x) for _ in range(STEPS)]
        layer.requires_grad_(True)
        (layer(x).sum() + sum(frozen).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bi,br->ir", x, z.detach()).expand(F, F, R))


def test_an_uncounted_step_between_backward_passes():
    layer, (x, z) = layer_of(), inputs()
    with fasthyper.deliver(z):
        for _ in range(STEPS):
            layer(x).sum().backward(retain_graph=True)
            layer.weight.data.mul_(0.5)
        torch.testing.assert_close(layer(x), once(layer, x, z))


@pytest.mark.parametrize(("out_features", "in_features"), [(0, 3), (3, 0)])
def test_sizes_of_zero(out_features, in_features):
    layer = HyperLinear(in_features, out_features, R)
    with fasthyper.deliver(torch.randn(B, R, requires_grad=True)):
        for _ in range(STEPS):
            assert layer(torch.randn(B, in_features)).shape == (B, out_features)


def test_compiled_with_a_z_from_outside():
    layer, (x, z) = layer_of(), inputs()
    y = torch.compile(layer, backend="eager", fullgraph=True)(x, z * 1)
    torch.testing.assert_close(y, layer(x, z * 1))


def test_a_compiled_layer_in_a_block(written):
    layer, (x, z) = layer_of(), inputs()
    f = torch.compile(layer, backend="aot_eager")
    with fasthyper.deliver(z):
        results = [f(x) for _ in range(STEPS)]
    assert not written
    for y in results:
        torch.testing.assert_close(y, layer(x, z))


def test_transforms_in_a_block(written):
    layer, (x, z) = layer_of(), inputs()
    with fasthyper.deliver(z.detach()):
        for _ in range(STEPS):
            found = torch.func.grad(lambda x: layer(x).square().sum())(x)
    assert not written
    (expected,) = torch.autograd.grad(layer(x.requires_grad_(), z).square().sum(), x)
    torch.testing.assert_close(found, expected)
