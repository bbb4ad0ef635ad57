"""A layer that meets one z again and again writes W out once; values, gradients and errors are those of each call."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasthyper
from fasthyper.nn import HyperLinear
from fasthyper.ops import reused

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
    for _ in range(steps):
        x = torch.tanh(layer(x, z))
    return x


def by_hand(layer, x, z, steps=STEPS):
    W, b = layer.materialize(z)
    for _ in range(steps):
        x = torch.tanh(torch.einsum("boi,bi->bo", W, x) + b)
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
    z = z * 1
    for _ in range(STEPS):
        x = two(one(x, z), z)
    assert len(written) == 2
    x.sum().backward()


def test_layers_that_share_memory():
    """Two layouts of one head, and two bases of one head, are different layers."""
    head, (x, z) = nn.Linear(R, F * F, dtype=torch.float64), inputs()
    z, base = z * 1, torch.randn(F, F, dtype=torch.float64)
    weights = [HyperLinear.from_head(head, F, F, layout=layout).weight for layout in ("oi", "io")]
    for _ in range(STEPS):
        for weight in weights:
            for w0 in (None, base, 2 * base):
                W = torch.einsum("oir,br->boi", weight, z) + (0 if w0 is None else w0)
                y = fasthyper.hyper_linear(x, z, weight, base_weight=w0)
                torch.testing.assert_close(y, torch.einsum("boi,bi->bo", W, x))


def test_a_changed_argument_is_seen(written):
    layer, (x, z) = layer_of(), inputs()
    of_trunk = z * 1
    recurrent(layer, x, of_trunk)
    for change in (layer.weight, layer.base_weight):
        with torch.no_grad():
            change.mul_(2)
        torch.testing.assert_close(recurrent(layer, x, of_trunk), by_hand(layer, x, of_trunk))
    other = z * 2
    torch.testing.assert_close(recurrent(layer, x, other), by_hand(layer, x, other))
    with torch.no_grad():
        of_trunk.mul_(2)
    torch.testing.assert_close(recurrent(layer, x, of_trunk), by_hand(layer, x, of_trunk))


def test_a_change_before_backward_raises(written):
    layer, (x, z) = layer_of(), inputs()
    y = recurrent(layer, x, z * 1)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        y.sum().backward()


def test_the_graph_alone_keeps_w(written):
    layer, (x, z) = layer_of(), inputs()
    of_trunk = z * 1
    recurrent(layer, x.requires_grad_(), of_trunk).sum().backward(retain_graph=True)
    recurrent(layer, x, of_trunk)
    assert len(written) == 2  # the first graph is gone


def test_several_backward_passes_through_one_z(written):
    """Each result has its own backward, where the trunk saves nothing."""
    layer, (x, _) = layer_of(), inputs()
    p = torch.randn(R, dtype=torch.float64, requires_grad=True)
    z = p.expand(B, R)
    losses = [layer(x.requires_grad_(), z).square().sum() for _ in range(STEPS)]
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
    y, of_trunk = x.requires_grad_(), z * 1
    for _ in range(STEPS):
        y = torch.tanh(checkpoint(layer, y, of_trunk, use_reentrant=use_reentrant))
    wanted = [z, *layer.parameters()]
    y.sum().backward()
    expected = torch.autograd.grad(by_hand(layer, x, z).sum(), wanted)
    torch.testing.assert_close([t.grad for t in wanted], [*expected])


def not_kept(layer, x, z) -> dict:
    return {
        "a leaf": lambda: recurrent(layer, x, z),
        "no gradients": torch.no_grad()(lambda: recurrent(layer, x, z * 1)),
        "a forced order": lambda: _forced(layer, x, z * 1),
        "a z without a graph": lambda: recurrent(layer, x, z.detach() * 1),
    }


def _forced(layer, x, z):
    with fasthyper.use_backend("aten", "fold"):
        return recurrent(layer, x, z)


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
    assert written


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
    of_trunk = z * 1
    recurrent(layer, x, of_trunk)
    with pytest.raises(ValueError, match="x must have shape"):
        layer(torch.randn(B, F + 1, dtype=torch.float64), of_trunk)
    with pytest.raises(TypeError, match="dtype of x"):
        layer(x.float(), of_trunk)


@pytest.mark.parametrize("points", [(), (3,), (2, 3)])
def test_any_number_of_point_axes(points, written):
    layer, (_, z) = layer_of(), inputs()
    x, of_trunk = torch.randn(B, *points, F, dtype=torch.float64), z * 1
    results = [layer(x, of_trunk) for _ in range(5)]
    assert written
    for y in results:
        assert y.is_contiguous()
        assert y.shape == x.shape
        torch.testing.assert_close(y, results[0])


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, g):
        return -g


OTHERS = {
    "detached": lambda weight: weight.detach(),
    "leaf": lambda weight: nn.Parameter(weight.detach()),
    "reversed": _Reverse.apply,
}
"""Other tensors in the memory of a head."""


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_head_in_the_same_memory_has_gradients_of_its_own(other, first):
    weight, (x, z) = layer_of().weight, inputs()
    heads = [weight, OTHERS[other](weight)]
    heads = [head for head in (heads if first else heads[::-1]) for _ in range(STEPS)]
    z = z * 1
    found = _weighted(weight, heads, lambda head: fasthyper.hyper_linear(x, z, head))
    expected = _weighted(weight, heads, lambda head: torch.einsum("oir,bi,br->bo", head, x, z))
    torch.testing.assert_close(found, expected)


def _weighted(weight, heads, call):
    loss = sum((k + 1) * call(head).sin().sum() for k, head in enumerate(heads))
    return torch.autograd.grad(loss, weight, retain_graph=True)


def test_requires_grad_changes():
    layer, (x, z) = layer_of(), inputs()
    z = z * 1
    layer.requires_grad_(False)
    frozen = [layer(x, z) for _ in range(STEPS)]
    layer.requires_grad_(True)
    (layer(x, z).sum() + sum(frozen).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bi,br->ir", x, z.detach()).expand(F, F, R))


def test_a_base_in_memory_that_was_freed():
    layer, (x, z) = layer_of(), inputs()
    base, z = torch.randn(F, F, dtype=x.dtype), z * 1
    memory = torch.empty_like(base)

    def same_address(t):
        found = torch.from_numpy(memory.numpy())  # another tensor, which counts its changes anew
        memory.numpy()[:] = t
        return found

    kept = [fasthyper.hyper_linear(x, z, layer.weight, base_weight=same_address(base * k)) for k in range(STEPS)]
    one = fasthyper.hyper_linear(x, z, layer.weight)
    for k, y in enumerate(kept):
        torch.testing.assert_close(y, one + k * x @ base.T)


def test_an_uncounted_step_between_backward_passes():
    layer, (x, z) = layer_of(), inputs()
    z = z * 1
    for _ in range(STEPS):
        y = layer(x, z)
        y.sum().backward(retain_graph=True)
        layer.weight.data.mul_(0.5)
    torch.testing.assert_close(layer(x, z), by_linear(layer, x, z))


def by_linear(layer, x, z):
    W, b = layer.materialize(z)
    return torch.einsum("boi,bi->bo", W, x) + b


@pytest.mark.parametrize(("out_features", "in_features"), [(0, 3), (3, 0)])
def test_sizes_of_zero(out_features, in_features):
    layer = HyperLinear(in_features, out_features, R)
    z = torch.randn(B, R, requires_grad=True) * 1
    for _ in range(STEPS):
        assert layer(torch.randn(B, in_features), z).shape == (B, out_features)


def test_compiled_with_a_z_from_outside():
    layer, (x, z) = layer_of(), inputs()
    y = torch.compile(layer, backend="eager", fullgraph=True)(x, z * 1)
    torch.testing.assert_close(y, layer(x, z * 1))


def test_w_is_freed_by_the_backward_although_the_loss_is_kept():
    layer, (x, z) = layer_of(), inputs()
    reused._thread.met.clear()
    loss = recurrent(layer, x, z * 1).sum()
    (kept,) = [met.kept() for met in reused._thread.met.values() if met.kept is not None and met.kept() is not None]
    w = weakref.ref(kept.w)
    loss.backward()
    assert w() is None
