"""Activation checkpoints inside a primary recompute with the z of their forward, and z receives its gradient."""

import threading

import pytest
import torch
from small_networks import B, R, TrunkByName, fill
from torch import nn
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fasthyper
from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork
from fasthyper.ops import checkpoints

KINDS = pytest.mark.parametrize("reentrant", [False, True])


def layers(n=3):
    return nn.Sequential(*[nn.Sequential(HyperLinear(4, 4, R), nn.Tanh()) for _ in range(n)]).apply(fill)


class Blocks(nn.Module):
    """Three blocks, of which some are checkpointed; x passes through a parameter of its own, as an embedding does."""

    def __init__(self, reentrant, which=(0, 1, 2), nested=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.blocks, self.reentrant, self.which, self.nested = layers(), reentrant, which, nested

    def forward(self, x):
        x = x * self.scale
        for i, block in enumerate(self.blocks):
            x = self.run(block, x) if i in self.which else block(x)
        return x

    def run(self, block, x):
        if self.nested:
            inner = block
            block = lambda x: torch.sin(checkpoint(inner, inner[0](x), use_reentrant=self.reentrant))
        return checkpoint(block, x, use_reentrant=self.reentrant)

    def plain(self, x):
        x = x * self.scale
        for i, block in enumerate(self.blocks):
            x = torch.sin(block(block[0](x))) if self.nested and i in self.which else block(x)
        return x


class DeepTrunk(nn.Module):
    """A trunk whose graph keeps tensors, so that it can run backward once; with names, one z for each."""

    def __init__(self, *names):
        super().__init__()
        self.body, self.names = nn.Sequential(nn.Linear(6, R), nn.Tanh(), nn.Linear(R, R), nn.Sigmoid()), names

    def forward(self, cond):
        z = self.body(cond)
        return {name: z * (i + 1) for i, name in enumerate(self.names)} if self.names else z


def grads(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_without(model, x, cond, run=None, plain=None):
    with_checkpoints = grads(model, (run or model)(x, cond))
    expected = grads(model, (plain or without(model))(x, cond))
    assert expected
    torch.testing.assert_close(with_checkpoints, expected)


def without(model):
    def run(x, cond):
        with model.deliver(cond) as primary:
            return primary.plain(x)

    return run


NAMES = ("blocks.0.0", "blocks.1.0", "blocks.2.0")
TRUNKS = {"one z": (), "by name": NAMES}


@KINDS
@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0, 2), (2,)])
@pytest.mark.parametrize("names", TRUNKS.values(), ids=TRUNKS)
@pytest.mark.parametrize("nested", [False, True])
def test_values_and_gradients(reentrant, which, names, nested):
    model = Hypernetwork(DeepTrunk(*names), Blocks(reentrant, which, nested))
    assert_as_without(model, torch.randn(B, 4), torch.randn(B, 6))


@KINDS
@pytest.mark.parametrize("which", [(0, 1, 2), (1,)])
def test_in_a_block_of_deliver(reentrant, which):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant, which))

    def run(x, cond):
        with fasthyper.deliver(model.trunk(cond)):
            return model.primary(x)

    assert_as_without(model, torch.randn(B, 4), torch.randn(B, 6), run)


@KINDS
def test_a_leaf_as_z(reentrant):
    primary, x = Blocks(reentrant, (0, 2)), torch.randn(B, 4)
    z = nn.Parameter(torch.randn(B, R))
    found = []
    for run in (primary, primary.plain):
        z.grad = None
        with fasthyper.deliver(z):
            y = run(x)
        y.square().sum().backward()
        found.append(z.grad)
    torch.testing.assert_close(*found)


@KINDS
@pytest.mark.parametrize("frozen", ["trunk", "primary"])
def test_frozen_parts(reentrant, frozen):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    for p in getattr(model, frozen).parameters():
        p.requires_grad_(False)
    assert_as_without(model, torch.randn(B, 4, requires_grad=True), torch.randn(B, 6))


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
@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0,)])
def test_nested_hypernetworks(reentrant, which):
    def build(which):
        torch.manual_seed(0)
        model = Hypernetwork(DeepTrunk(), Blocks(reentrant, which))

        class Inside(nn.Module):
            def __init__(self):
                super().__init__()
                self.before, self.after = HyperLinear(4, 4, R), HyperLinear(4, 4, R)
                self.inner = Hypernetwork(HyperLinear(4, R, R), Blocks(reentrant, which))

            def forward(self, x):
                return self.after(self.inner(self.before(x), x))

        model.primary.blocks[1] = Inside()
        return model.apply(fill)

    x, cond = torch.randn(B, 4), torch.randn(B, 6)
    checkpointed, plain = build(which), build(())
    torch.testing.assert_close(grads(checkpointed, checkpointed(x, cond)), grads(plain, plain(x, cond)))


@KINDS
@pytest.mark.parametrize("outside", [False, True])
def test_a_checkpoint_around_the_whole_network_too(reentrant, outside):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    x, cond = torch.randn(B, 4, requires_grad=True), torch.randn(B, 6)
    assert_as_without(model, x, cond, lambda x, cond: checkpoint(model, x, cond, use_reentrant=outside))


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


@pytest.mark.parametrize("impl", list(CheckpointImpl))
@pytest.mark.parametrize("names", TRUNKS.values(), ids=TRUNKS)
def test_checkpoint_wrapper(impl, names):
    """Names of layers do not change with the wrapper."""
    model = Hypernetwork(DeepTrunk(*names), Blocks(False, ()))
    x, cond = torch.randn(B, 4), torch.randn(B, 6)
    expected = grads(model, model(x, cond))
    for i, block in enumerate(model.primary.blocks):
        model.primary.blocks[i] = checkpoint_wrapper(block, impl)
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in grads(model, model(x, cond)).items()}
    torch.testing.assert_close(found, expected)


def test_composable_checkpoint():
    model = Hypernetwork(DeepTrunk(), Blocks(False, ()))
    x, cond = torch.randn(B, 4), torch.randn(B, 6)
    expected = grads(model, model(x, cond))
    for block in model.primary.blocks:
        composable(block)
    torch.testing.assert_close(grads(model, model(x, cond)), expected)


@KINDS
def test_checkpoint_sequential(reentrant):
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = layers(4)

        def forward(self, x):
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=reentrant)

        def plain(self, x):
            return self.blocks(x)

    model = Hypernetwork(DeepTrunk(), Segments())
    assert_as_without(model, torch.randn(B, 4, requires_grad=True), torch.randn(B, 6))


@KINDS
def test_other_saved_tensor_hooks(reentrant):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    block = model.primary.blocks[1]

    def offloaded(x):
        with torch.autograd.graph.save_on_cpu():
            return nn.Sequential.forward(block, x)

    block.forward = offloaded
    with torch.autograd.graph.save_on_cpu():
        assert_as_without(model, torch.randn(B, 4), torch.randn(B, 6))


@KINDS
def test_without_early_stop_and_under_no_grad(reentrant):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    x, cond = torch.randn(B, 4), torch.randn(B, 6)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        assert_as_without(model, x, cond)
    with torch.no_grad():
        torch.testing.assert_close(model(x, cond), without(model)(x, cond))
    with torch.inference_mode():
        torch.testing.assert_close(model(x, cond), without(model)(x, cond))


@KINDS
def test_an_incidence_is_kept(reentrant):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant))
    ids = torch.tensor([2, 0, 2, 2, 1])
    x, cond, incidence = torch.randn(5, 4), torch.randn(3, 6), Incidence.from_batch(ids, 3)
    run = lambda x, cond: model(x, cond, incidence=incidence)
    assert_as_without(model, x, cond, run, lambda x, cond: without(model)(x, cond[ids]))


@KINDS
def test_repeated_z_is_kept(reentrant):
    model = Hypernetwork(DeepTrunk(), Blocks(reentrant), repeat_z=True)
    assert_as_without(model, torch.randn(3 * B, 4), torch.randn(B, 6))


@KINDS
def test_a_pair_for_weight_and_bias(reentrant):
    model = Hypernetwork(TrunkByName(*(f"{n}.{p}" for n in NAMES for p in ("weight", "bias"))), Blocks(reentrant))
    assert_as_without(model, torch.randn(B, 4), torch.randn(B, 6))


@KINDS
def test_several_results(reentrant):
    class Pair(Blocks):
        def forward(self, x):
            return x, [super().forward(x)]

    model = Hypernetwork(DeepTrunk(*NAMES), Pair(reentrant, (0, 1)))
    run = lambda x, cond: model(x, cond)[1][0]
    assert_as_without(model, torch.randn(B, 4), torch.randn(B, 6), run)


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
    import gc
    import weakref

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
