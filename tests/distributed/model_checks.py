"""Models that are trained by several processes equal those that are trained by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fasthyper import HyperLinear, Hypernetwork, hyperize
from fasthyper.distributed import HeadParallel, reset_parts

I, O, R, HIDDEN, ROWS = 6, 4, 8, 16, 8


class Twice(nn.Module):
    """Two layers that share their head, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.first, self.unused = HyperLinear(I, I, R), HyperLinear(I, I, R)
        self.last = HyperLinear(I, O, R)

    def forward(self, x):
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


def plain(**of):
    return nn.Sequential(HyperLinear(I, HIDDEN, R, **of), nn.Tanh(), HyperLinear(HIDDEN, O, R, **of))


def hyperized():
    return hyperize(nn.Sequential(nn.Linear(I, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, O)), R)


def model_of(primary, here):
    """Return a Hypernetwork with the same parameters in every process, whose bases are not zero."""
    torch.manual_seed(0)
    model = Hypernetwork(nn.Linear(3, R), primary).to(here.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def batch(here):
    torch.manual_seed(1)
    return [torch.randn(ROWS, 5, I, device=here.device), torch.randn(ROWS, 3, device=here.device)]


def part(tensors, here):
    return [t.chunk(here.size)[here.rank] for t in tensors]


def train(model, args, steps=2):
    """Take steps of SGD; return the output of the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(*args)
        (y**2).mean().backward()
        optimizer.step()
    return y.detach()


def equal(model, one, **of):
    expected = dict(one.named_parameters())
    for name, parameter in model.named_parameters():
        parameter = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(parameter, expected[name], msg=lambda text, name=name: f"{name}: {text}", **of)


def check_data_parallel(here):
    cases = [
        (Twice, {"find_unused_parameters": True}),
        (Twice, {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
        (Twice, {"static_graph": True}),
        (plain, {}),
        (plain, {"gradient_as_bucket_view": True, "static_graph": True}),
        (lambda: HyperLinear(I, O, R), {"gradient_as_bucket_view": True}),
    ]
    for make, options in cases:
        torch.manual_seed(0)
        primary = make()
        one = model_of(primary, here)
        model = DistributedDataParallel(copy.deepcopy(one), **options)
        expected = train(one, batch(here), 3)
        y = train(model, part(batch(here), here), 3)
        torch.testing.assert_close(y, expected.chunk(here.size)[here.rank])
        equal(model.module, one)


def check_fully_sharded(here):
    for make in (plain, Twice, hyperized):
        for per_layer in (False, True):
            one = model_of(make(), here)
            model = copy.deepcopy(one)
            if per_layer:
                for layer in [m for m in model.modules() if isinstance(m, HyperLinear)]:
                    fully_shard(layer)
            fully_shard(model)
            assert all(p.to_local().numel() < p.numel() for p in model.parameters())
            expected = train(one, batch(here))
            y = train(model, part(batch(here), here))
            torch.testing.assert_close(y, expected.chunk(here.size)[here.rank])
            equal(model, one)
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if here.rank == 0:
                torch.testing.assert_close(whole, one.state_dict())
            other = model_of(make(), here)
            fully_shard(other)
            set_model_state_dict(
                other, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            )
            equal(other, one)


def check_mixed_precision(here):
    """Gradients in bfloat16 of each process's part, added in float32."""
    one = model_of(plain(), here)
    model, low = copy.deepcopy(one), copy.deepcopy(one).bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in [m for m in model.modules() if isinstance(m, HyperLinear)]:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    args = part(batch(here), here)
    y, expected = model(*args), low(*(t.bfloat16() for t in args))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    for out in (y, expected):
        (out.float() ** 2).mean().backward()
    for (name, p), q in zip(model.named_parameters(), low.parameters(), strict=True):
        mean = q.grad.float()
        dist.all_reduce(mean)
        mean /= here.size
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad.full_tensor(), mean, msg=lambda text, name=name: f"{name}: {text}")


PLANS = {
    "out, in": ({"primary.0": HeadParallel("out"), "primary.2": HeadParallel("in")}, {"all_reduce": 4}),
    "cond": (
        {"primary.0": HeadParallel("cond"), "primary.2": HeadParallel("cond")},
        {"all_reduce": 4, "all_gather_into_tensor": 2},
    ),
}
"""Each with what is sent. Out, in: y of the last layer, dx of the first, dz of both. Cond: y, dx and dz of both."""


def check_heads_in_parts(here):
    mesh = init_device_mesh(here.device, (here.size,))
    for name, (plan, sent) in PLANS.items():
        for of in ({}, {"bias": False}, {"base": False}, {"rank": 4}):
            if of.get("rank") and name != "out, in":
                continue
            one = model_of(plain(**of), here)
            model = parallelize_module(copy.deepcopy(one), mesh, plan)
            heads = [p for n, p in model.named_parameters() if n.endswith((".weight", "weight_b")) and "primary" in n]
            assert all(p.to_local().numel() * here.size == p.numel() for p in heads if p.placements[0].is_shard())
            args = batch(here)
            for t in args:
                t.requires_grad_()
            with CommDebugMode() as traffic:
                y = model(*args)
                (y**2).mean().backward()
            counts = {str(op).rpartition(".")[2]: count for op, count in traffic.get_comm_counts().items() if count}
            if not of.get("rank"):
                assert counts == sent
            args2 = [t.detach().clone().requires_grad_() for t in args]
            y2 = one(*args2)
            (y2**2).mean().backward()
            torch.testing.assert_close(y, y2)
            for t, t2 in zip(args, args2, strict=True):
                torch.testing.assert_close(t.grad, t2.grad)
            train(model, batch(here)), train(one, batch(here))
            equal(model, one)


def check_sizes_that_are_no_multiples_of_the_processes(here):
    mesh = init_device_mesh(here.device, (here.size,))
    torch.manual_seed(0)
    hidden = 4 * here.size + 1
    one = nn.Sequential(HyperLinear(I, hidden, R), HyperLinear(hidden, O, R)).to(here.device)
    two = copy.deepcopy(one)
    for layer, by in zip(two, ("out", "in"), strict=True):
        parallelize_module(layer, mesh, HeadParallel(by))
    x, z = torch.randn(ROWS, I, device=here.device), torch.randn(ROWS, R, device=here.device)
    y, expected = (layers[1](layers[0](x, z).tanh(), z) for layers in (two, one))
    torch.testing.assert_close(y, expected)
    y.square().mean().backward(), expected.square().mean().backward()
    for p, q in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    with pytest.raises(ValueError, match=r"x must have the \d+ of \d+ features that this process has"):
        two[1](torch.randn(ROWS, hidden, device=here.device), z)


def check_heads_in_parts_and_data_in_parts(here):
    """FSDP along one dimension of a mesh, and parts of heads along the other."""
    if here.size < 4:
        return
    mesh = init_device_mesh(here.device, (2, here.size // 2), mesh_dim_names=("data", "head"))
    one = model_of(plain(), here)
    model = parallelize_module(copy.deepcopy(one), mesh["head"], PLANS["out, in"][0])
    for layer in [m for m in model.modules() if isinstance(m, HyperLinear)]:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    args = [t.chunk(2)[mesh.get_local_rank("data")] for t in batch(here)]
    train(model, args), train(one, batch(here))
    equal(model, one)


def check_maps_and_two_z(here):
    mesh = init_device_mesh(here.device, (here.size,))
    x, (z, z2) = torch.randn(ROWS, I, device=here.device), torch.randn(2, ROWS, R, device=here.device)
    for by, args, of in (
        ("out", (x, z), {"weight_map": "softplus"}),
        ("in", (x, (z, z2)), {}),
        ("cond", (x, (z, z2)), {}),
    ):
        torch.manual_seed(0)
        one = HyperLinear(I, O, R, **of).to(here.device)
        style = HeadParallel(by, input_layouts=Replicate(), output_layouts=Replicate())
        layer = parallelize_module(copy.deepcopy(one), mesh, style)
        y, expected = layer(*args), one(*args)
        torch.testing.assert_close(y, expected)
        y.square().mean().backward(), expected.square().mean().backward()
        for p, q in zip(layer.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)


def check_errors_of_the_style(here):
    mesh = init_device_mesh(here.device, (here.size,))
    with pytest.raises(ValueError, match="by must be one of 'out', 'in', 'cond', got 'both'"):
        HeadParallel("both")
    with pytest.raises(TypeError, match="takes a HyperLinear, got a Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, HeadParallel("out"))
    with pytest.raises(ValueError, match="by must be 'out' for a layer with a weight_map, got 'in'"):
        parallelize_module(HyperLinear(I, O, R, weight_map="abs"), mesh, HeadParallel("in"))
    with pytest.raises(ValueError, match="must have parameters of its own, not those of a shared head"):
        parallelize_module(HyperLinear.from_head(nn.Linear(R, O * I), I, O, layout="oi"), mesh, HeadParallel("out"))
    model = Hypernetwork(
        nn.Linear(3, R), parallelize_module(HyperLinear(I, O, R), mesh, HeadParallel("out")), repeat_z=True
    )
    with pytest.raises(ValueError, match="repeat_z must be False"):
        model(torch.randn(4, I), torch.randn(2, 3))


def check_reset_parts(here):
    mesh = init_device_mesh(here.device, (here.size,))
    for plan, _ in PLANS.values():
        with torch.device("meta"):
            model = Hypernetwork(nn.Identity(), plain(base=False))
        parallelize_module(model, mesh, plan)
        reset_parts(model.to_empty(device=here.device), seed=3)
        for name, parameter in model.named_parameters():
            local = parameter.to_local()
            others = [torch.empty_like(local) for _ in range(here.size)]
            dist.all_gather(others, local)
            assert 0 < local.var() < 1
            for other in others[1:]:
                assert torch.equal(others[0], other) == parameter.placements[0].is_replicate(), name
