"""Activation checkpoints inside a primary recompute with the z of their forward, and z receives its gradient."""

import pytest
import torch
from checkpointed_blocks import KINDS, NAMES, TRUNKS, Blocks, DeepTrunk, assert_as_without, grads, layers, without
from small_networks import B, R, TrunkByName, fill
from torch import nn
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fasthyper
from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork


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
