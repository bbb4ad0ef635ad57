"""When and where the backward pass of a checkpointed primary may run, and what it refuses."""

import gc
import threading
import weakref

import pytest
import torch
from checkpointed_blocks import KINDS, NAMES, TRUNKS, Blocks, DeepTrunk, grads, without
from small_networks import B, R
from torch import nn

import fasthyper
from fasthyper.nn import HyperLinear, Hypernetwork
from fasthyper.ops import checkpoints


@KINDS
def test_several_forwards_before_one_backward(reentrant):
    a, b = (Hypernetwork(DeepTrunk(), Blocks(reentrant)) for _ in range(2))
    both, data = nn.ModuleList([a, b]), [(torch.randn(B, 4), torch.randn(B, 6)) for _ in range(2)]
    run = lambda a, b: sum(model(x, cond).square().sum() for x, cond in data for model in (a, b))
    torch.testing.assert_close(grads(both, run(a, b)), grads(both, run(without(a), without(b))))


@KINDS
def test_a_backward_during_the_forward_of_another_network(reentrant):
    inner = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    x, cond = torch.randn(B, 4), torch.randn(B, 6)
    expected = grads(inner, without(inner)(x, cond))
    y, found = inner(x, cond), []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = HyperLinear(4, 4, R)

        def forward(self, x):
            found.append(grads(inner, y))
            return self.layer(x)

    outer = Hypernetwork(nn.Linear(6, R), Outer())
    torch.testing.assert_close(outer(x, cond), outer.primary.layer(x, outer.trunk(cond)))
    torch.testing.assert_close(found[0], expected)


def test_a_recomputation_outside_of_a_backward_pass():
    model = Hypernetwork(DeepTrunk(), Blocks(False))
    y = model(torch.randn(B, 4), torch.randn(B, 6))
    with fasthyper.deliver(torch.randn(B, R)):
        torch.testing.assert_close(y.grad_fn._saved_result, y)  # tanh keeps its result


@KINDS
def test_backward_in_another_thread(reentrant):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    x, cond, found = torch.randn(B, 4), torch.randn(B, 6), []
    y = model(x, cond)
    thread = threading.Thread(target=lambda: found.append(grads(model, y)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], grads(model, without(model)(x, cond)))


@KINDS
def test_a_graph_that_is_kept(reentrant):
    for names in ((), NAMES):
        model = Hypernetwork(DeepTrunk(*names), Blocks(reentrant))
        x, cond = torch.randn(B, 4), torch.randn(B, 6)
        y = model(x, cond).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        expected = grads(model, without(model)(x, cond))
        torch.testing.assert_close(found, {name: 2 * g for name, g in expected.items()})


def test_second_order():
    model = Hypernetwork(DeepTrunk(), Blocks(False)).double()
    x, cond = torch.randn(B, 4, dtype=torch.double, requires_grad=True), torch.randn(B, 6, dtype=torch.double)
    found = []
    for run in (model, without(model)):
        (g,) = torch.autograd.grad(run(x, cond).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), list(model.trunk.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("names", TRUNKS.values(), ids=TRUNKS)
def test_no_gradient_of_some_inputs_through_reentrant_checkpoints(which, names):
    """It would leave out what the checkpoints add: torch does not run them, since they do not lead to the trunk."""
    model = Hypernetwork(DeepTrunk(*names), Blocks(True, which))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        torch.autograd.grad(model(torch.randn(B, 4), torch.randn(B, 6)).sum(), list(model.trunk.parameters()))


@KINDS
def test_z_changed_in_place(reentrant):
    primary, z = Blocks(reentrant), torch.randn(B, R)
    with fasthyper.deliver(z):
        y = primary(torch.randn(B, 4))
    z.zero_()
    with pytest.raises(RuntimeError, match="z was changed in place"):
        y.sum().backward()


def test_a_gradient_that_comes_too_late():
    """The user's own use of z frees the graph that computed it, and nothing says that checkpoints need it, too."""
    trunk, primary = DeepTrunk(), Blocks(True)
    body = trunk.body[:2]
    h = body(torch.randn(B, 6))
    with fasthyper.deliver(torch.sigmoid(trunk.body[2](h))):
        y = primary(torch.randn(B, 4))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (y.sum() + h.square().sum()).backward()


def test_another_recomputation_raises():
    """A function that recomputes by itself in backward, as reversible networks do, has no z there."""
    layer = HyperLinear(4, 4, R)

    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx, g):
            layer(ctx.saved_tensors[0])

    with fasthyper.deliver(torch.randn(B, R)):
        y = Recomputes.apply(torch.randn(B, 4, requires_grad=True))
        with pytest.raises(ValueError, match=r"no z.*recomputes the layer"):
            y.sum().backward()


def test_z_lives_as_long_as_the_checkpoint():
    primary, z = Blocks(False), torch.randn(B, R)
    alive = weakref.ref(z)
    with fasthyper.deliver(z):
        y = primary(torch.randn(B, 4))
    del z
    assert alive() is not None
    y.sum().backward()
    del y
    gc.collect()
    assert alive() is None


def test_torch_has_what_finds_checkpoints():
    assert checkpoints.MISSING is None


@KINDS
def test_without_what_finds_checkpoints(reentrant, monkeypatch):
    monkeypatch.setattr(checkpoints, "MISSING", "a name")
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    y = model(torch.randn(B, 4), torch.randn(B, 6))
    with pytest.raises(ValueError, match="no z"):
        y.sum().backward()
