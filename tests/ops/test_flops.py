"""The flops of every op are those that torch counts for the same computation with W written out."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from op_examples import EXAMPLES, IDS, B, C, E, I, J, M, N, O, R, S, T, index, some
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fasthyper
from fasthyper import hyper_linear
from fasthyper.adapters import low_rank_linear
from fasthyper.nn import HyperLinear, Hypernetwork
from fasthyper.ops.flops import FORMULAS

ops = torch.ops.fasthyper


def counted(f, *args):
    with FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


def step(f, args, given):
    """Return the flops of forward and backward with gradients of the given arguments."""
    leaves = [t.detach().requires_grad_(k in given) if isinstance(t, torch.Tensor) else t for k, t in enumerate(args)]

    def run():
        y = f(*leaves)
        if y.requires_grad:
            y.backward(torch.ones_like(y))

    return counted(run)


def agree(ours, theirs, args, given):
    assert step(ours, args, given) == step(theirs, args, given) > 0


def generated(z, weight, base=None):
    W = F.linear(z, weight.flatten(0, -2), None if base is None else base.flatten())
    return W.view(len(z), *weight.shape[:-1])


def written_out(x, z, weight, bias=None, base_weight=None, base_bias=None):
    y = torch.bmm(x, generated(z, weight, base_weight).mT)
    y = y if bias is None else y + F.linear(z, bias, base_bias)[:, None]
    return y if bias is not None or base_bias is None else y + base_bias


LINEAR = some(B, N, I), some(B, R), some(O, I, R), some(O, R), some(O, I), some(O)
SUBSETS = [set(), *({k} for k in range(6)), {0, 1}, {1, 2, 3}, {2, 4}, {0, 1, 2, 3, 4, 5}]


def fast(x, z, weight, bias, base_weight, base_bias, **more):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias, **more)


@pytest.mark.parametrize("given", SUBSETS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(given, with_bias):
    args = LINEAR if with_bias else (*LINEAR[:3], None, LINEAR[4], None)
    agree(fast, written_out, args, given)


def test_the_backend_does_not_matter():
    for how in (("aten", "fold"), ("aten", "generate"), ("aten", "project"), ("materialised",)):
        with fasthyper.use_backend(*how):
            agree(fast, written_out, LINEAR, set(range(6)))


@pytest.mark.parametrize("given", SUBSETS, ids=str)
def test_a_function_of_the_weights(given):
    mapped = lambda x, z, weight, bias, w0, b0: (
        torch.bmm(x, generated(z, weight, w0).tanh().mT) + F.linear(z, bias, b0)[:, None]
    )
    agree(lambda *args: fast(*args, weight_map="tanh"), mapped, LINEAR, given)


@pytest.mark.parametrize("given", SUBSETS, ids=str)
@pytest.mark.parametrize("shared", ["s", "c", "t", "sct"])
def test_terms(shared, given):
    source, cond, target = (index(n) if k in shared else None for k, n in zip("sct", (S, C, T), strict=True))
    args = some(S if "s" in shared else E, N, I), some(C if "c" in shared else E, R), *LINEAR[2:]
    incidence = fasthyper.Incidence(source, cond, target)

    def gathered(x, z, weight, bias, w0, b0):
        W, b = generated(z, weight, w0), F.linear(z, bias, b0)
        x, W, b = x if source is None else x[source], W if cond is None else W[cond], b if cond is None else b[cond]
        y = torch.bmm(x, W.mT) + b[:, None]
        return y if target is None else y.new_zeros(T, *y.shape[1:]).index_add(0, target, y)

    agree(lambda *args: fast(*args, incidence=incidence), gathered, args, given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("given", [set(), {3}, {5}], ids=str)
def test_convolutions(transposed, given):
    """Torch's own formula of a convolution's backward takes it for one with all channels connected."""
    groups, channels = 2, (O, 2 * I) if transposed else (2 * I, O)
    args = some(B, channels[0], 9, 8), some(B, R), some(O, I, 3, 2, R), some(channels[1], R)
    args = *args, some(O, I, 3, 2), some(channels[1])

    def each(x, z, weight, bias, w0, b0):
        W, b = generated(z, weight, w0), F.linear(z, bias, b0)
        conv = F.conv_transpose2d if transposed else F.conv2d
        return torch.cat([
            conv(x[k : k + 1, half], W[k, of], b[k, out], stride=2)
            for k, g in itertools.product(range(B), range(groups))
            for half, of, out in [[
                slice(g * x.shape[1] // 2, (g + 1) * x.shape[1] // 2),
                slice(g * O // 2, (g + 1) * O // 2),
                slice(g * channels[1] // 2, (g + 1) * channels[1] // 2),
            ]]
        ])  # fmt: skip

    ours = fasthyper.hyper_conv_transpose2d if transposed else fasthyper.hyper_conv2d
    more = {"stride": 2, "groups": groups}
    conv = lambda x, z, h, bias, w0, b0: ours(x, z, h, bias, base_weight=w0, base_bias=b0, **more)
    agree(conv, each, args, given)


@pytest.mark.parametrize("given", SUBSETS, ids=str)
def test_a_convolution_is_a_layer_of_its_patches(given):
    image = (some(B, 2 * I, 9, 8), some(B, R), some(O, I, 3, 2, R), some(O, R), some(O, I, 3, 2), some(O))
    patches = (some(B, 7 * 7, I * 6), image[1], some(O, I * 6, R), image[3], some(O, I * 6), image[5])
    conv = lambda x, z, h, bias, *bases: fasthyper.hyper_conv2d(
        x, z, h, bias, groups=2, **dict(zip(("base_weight", "base_bias"), bases, strict=True))
    )
    assert step(conv, image, given) == step(fast, patches, given)


@pytest.mark.parametrize("given", [set(), {0}, {1}, {2}, {0, 1}, {0, 1, 2}], ids=str)
def test_pairs(given):
    args = some(B, M, I), some(B, N, R), some(O, I + 1, R + 1), some(O)
    one = lambda t: torch.cat([t, torch.ones_like(t[..., :1])], -1)

    def project(x, z, weight, bias):
        p = F.linear(one(x).flatten(0, 1), weight.transpose(1, 2).flatten(0, 1)).view(B, M * O, R + 1)
        return torch.bmm(p, one(z).mT).view(B, M, O, N).transpose(2, 3) + bias

    agree(lambda *args: ops.pairs(*args, True, True), project, args, given)


@pytest.mark.parametrize("given", [set(), {0}, {1}, {0, 1}, {0, 1, 2}], ids=str)
def test_adapters_by_id(given):
    args, ids = (some(E, I), some(C, J, I), some(C, O, J)), index(C)
    incidence = fasthyper.Incidence.from_batch(ids, C)
    gathered = lambda x, a, b: torch.bmm(torch.bmm(x[:, None], a[ids].mT), b[ids].mT)[:, 0]
    agree(lambda *args: low_rank_linear(*args, incidence=incidence, layout="rI,Or"), gathered, args, given)


@pytest.mark.parametrize("given", [set(), {0}, {1}, {2}, {6, 7}, {5, 8}, set(range(10))], ids=str)
def test_a_fused_primary(given):
    first = some(J, I, R), some(J, R), some(J, I), some(J)
    second = some(O, J, R), some(O, R), some(O, J), some(O)
    two = lambda x, z, *heads: written_out(torch.tanh(written_out(x, z, *heads[:4])), z, *heads[4:])
    agree(lambda *args: ops.primary(*args, "tanh")[0], two, (*LINEAR[:2], *first, *second), given)


@pytest.mark.parametrize(("name", "args"), EXAMPLES, ids=IDS)
def test_every_op_is_counted(name, args):
    """Under the meta device, too: a formula reads no values."""
    op = getattr(ops, name)
    flops = counted(op, *args)
    assert isinstance(flops, int)
    assert flops > 0
    if "terms" not in name and "groups" not in name:  # their kernels read indices
        assert counted(op, *(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args)) == flops
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]
        assert counted(op, *fakes) == flops


def test_every_op_has_a_formula():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "fasthyper::" in name}
    assert set(FORMULAS) == registered
    assert {getattr(ops, name) for name in registered} <= set(flop_registry)


def test_a_model_by_its_modules():
    model = Hypernetwork(nn.Linear(3, R), nn.Sequential(HyperLinear(I, J, R), nn.Tanh(), HyperLinear(J, O, R)))
    x, cond = torch.randn(B, N, I), torch.randn(B, 3)
    with FlopCounterMode(display=False) as counter:
        model(x, cond)
    layers = B * (2 * R * (I * J + J * O) + 2 * N * (I * J + J * O) + 2 * R * (J + O))
    assert counter.get_total_flops() == layers + 2 * B * 3 * R
    compiled = torch.compile(model, backend="aot_eager")
    assert counted(compiled, x, cond) == counter.get_total_flops()


@pytest.mark.parametrize("first", ["fasthyper", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter(first):
    code = f"import {first}, fasthyper, torch, torch.utils.flop_counter as c; print(len(c.flop_registry))"
    code += "; print(torch.ops.fasthyper.hyper_linear in c.flop_registry)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == "True", done.stderr
