"""The ops on DTensors equal the ops on the whole tensors, and the parts of the head stay where they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import fasthyper
from fasthyper.ops import shapes, sharding
from fasthyper.ops.register import DEFINED

SIZES = {letter: 2 + k for k, letter in enumerate("EJIMNPQRSTX")} | {"B": 6, "O": 5, "C": 4, "X": 3}
SIZES |= dict.fromkeys("dhwabc", 4) | dict.fromkeys("ijk", 1) | {"P": SIZES["I"], "Q": SIZES["R"]}
SIZES |= {"X": SIZES["I"]}  # a convolution with one group
TERMS = 9
OTHERS = {
    "mask": None,
    "backend": "auto",
    "schedule": "auto",
    "map": "softplus",
    "activation": "tanh",
    "ones_x": False,
    "ones_z": False,
    "groups": 1,
    "stride": [1] * 3,
    "padding": [0] * 3,
    "dilation": [1] * 3,
    "image": [4] * 3,
    "kernel": [1] * 3,
    "output": [4] * 3,
    "sources": SIZES["S"],
    "conds": SIZES["C"],
    "targets": SIZES["T"],
}
AFFINE = ("x", "z", "weight", "bias", "base_weight", "base_bias")
linear = torch.ops.fasthyper.hyper_linear


def mesh_of(here, dims=1):
    shape = (here.size,) if dims == 1 else (2, here.size // 2)
    return init_device_mesh(here.device, shape, mesh_dim_names=("one", "two")[:dims])


def placed(t, axes, mesh, letters):
    where = [Shard(axes.index(letter)) if letter in axes else Replicate() for letter in letters]
    return distribute_tensor(t, mesh, where)


def arguments(name, device):
    """Return the arguments of an op, by name; no two sizes are equal."""
    signature, values = DEFINED[name].signature, {}
    for field in signature.types:
        if field in signature.tensors:
            axes = signature.axes[field]
            values[field] = torch.randn([SIZES[letter] for letter in axes], dtype=torch.float64, device=device)
        elif field in shapes.INDICES:
            letter = {"source": "S", "cond": "C", "target": "T"}[field]
            count = SIZES["E"] if name.endswith("groups") else TERMS
            values[field] = torch.randint(SIZES[letter], (count,), device=device).sort().values
        elif field == "mask":
            values[field] = [True] * len(signature.results)
        else:
            values[field] = OTHERS[field]
    return values


def tensors(*results):
    return results[0] if isinstance(results[0], tuple) else results


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def check_the_first_call_finds_the_rules(here):
    mesh = mesh_of(here)
    parts = [placed(torch.ones(SIZES["B"], 2).to(here.device), "B?", mesh, "B") for _ in range(2)]
    weight = placed(torch.ones(3, 2, 2).to(here.device), "OIR", mesh, "B")
    assert fasthyper.hyper_linear(*parts, weight).placements == (Shard(0),)


def check_every_op_with_every_letter_divided(here):
    mesh = mesh_of(here)
    for name, (signature, _) in DEFINED.items():
        op, values = getattr(torch.ops.fasthyper, name), arguments(name, here.device)
        expected = tensors(op(*values.values()))
        others = {letter for field in signature.tensors for letter in signature.axes[field]} - {*sharding.LETTERS[name]}
        for letter in (*sharding.LETTERS[name], *sorted(others)[:1]):
            parts = {field: placed(values[field], signature.axes[field], mesh, letter) for field in signature.tensors}
            with CommDebugMode() as traffic:
                results = tensors(op(*{**values, **parts}.values()))
            if letter in sharding.LETTERS[name]:
                assert traffic.get_total_counts() == 0, (name, letter)
            for one, other in zip(results, expected, strict=True):
                message = lambda text, case=(name, letter): f"{case}: {text}"
                torch.testing.assert_close(whole(one), other, msg=message)


def check_results_of_some_arguments_and_masks(here):
    """Sizes agree, so that only the position tells a bias from a base weight."""
    mesh = mesh_of(here)
    x, z, weight = torch.randn(6, 3, 4), torch.randn(6, 4), torch.randn(5, 4, 4)
    bias, base, base_bias, g = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5), torch.randn(6, 3, 5)
    x, z, weight, bias, base, base_bias, g = (t.to(here.device) for t in (x, z, weight, bias, base, base_bias, g))
    axes = shapes.LINEAR
    masks = [[k == only for k in range(6)] for only in range(6)]
    masks += [[not k for k in mask] for mask in masks]
    for letter in "BNOIR":
        put = lambda name, t, at=letter: None if t is None else placed(t, axes[name], mesh, at)
        for some in itertools.product((True, False), repeat=3):
            more = [t if k else None for t, k in zip((bias, base, base_bias), some, strict=True)]
            expected = linear(x, z, weight, *more)
            of = [put(n, t) for n, t in zip(AFFINE, (x, z, weight, *more), strict=True)]
            torch.testing.assert_close(linear(*of).full_tensor(), expected)
        for mask in masks:
            grads = torch.ops.fasthyper.hyper_linear_grads
            expected = grads(x, z, weight, bias, base, g, mask)
            fields = ("x", "z", "weight", "bias", "base_weight", "g")
            of = [put(n, t) for n, t in zip(fields, (x, z, weight, bias, base, g), strict=True)]
            for one, other in zip(grads(*of, mask), expected, strict=True):
                torch.testing.assert_close(whole(one), other)


def check_gradients_on_a_mesh_of_two_dimensions(here):
    mesh = mesh_of(here, 2)
    sizes = {**SIZES, "N": 3, "R": 3}
    values = {n: torch.randn([sizes[k] for k in shapes.LINEAR[n]], device=here.device) for n in (*AFFINE, "g")}
    one = {n: values[n].clone().requires_grad_() for n in AFFINE}
    y = linear(*one.values())
    y.backward(values["g"])
    for letters in itertools.product("BNOIR", repeat=2):
        parts = {n: placed(t, shapes.LINEAR[n], mesh, letters) for n, t in values.items()}
        g = parts.pop("g")
        for t in parts.values():
            t.requires_grad_()
        with CommDebugMode() as traffic:
            out = linear(*parts.values())
            out.backward(g)
        assert traffic.get_total_counts() == 0, letters
        torch.testing.assert_close(out.full_tensor(), y)
        for n, t in parts.items():
            torch.testing.assert_close(t.grad.full_tensor(), one[n].grad, msg=lambda s, at=(letters, n): f"{at}: {s}")


def check_second_order(here):
    """It runs torch's own products, which need even parts."""
    mesh = mesh_of(here)
    sizes = {letter: k * here.size for k, letter in enumerate("BNOIR", 1)}
    values = {n: torch.randn([sizes[k] for k in shapes.LINEAR[n]], dtype=torch.float64) for n in AFFINE}
    values = {n: t.to(here.device) for n, t in values.items()}

    def grads(x, z, weight, bias, base_weight, base_bias):
        y = fasthyper.hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)
        (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad((dx**2).sum(), (z, weight, base_weight))

    expected = grads(*(t.clone().requires_grad_() for t in values.values()))
    for letter in "BOIR":
        parts = [placed(t, shapes.LINEAR[n], mesh, letter).requires_grad_() for n, t in values.items()]
        for one, other in zip(grads(*parts), expected, strict=True):
            torch.testing.assert_close(one.full_tensor(), other)


def check_that_some_have_no_part(here):
    """Of a size below the number of processes, the last ones have none."""
    mesh = mesh_of(here)
    sizes = dict.fromkeys("BNOIR", here.size - 1)
    values = {n: torch.randn([sizes[k] for k in shapes.LINEAR[n]], device=here.device) for n in AFFINE}
    one = [t.clone().requires_grad_() for t in values.values()]
    linear(*one).sum().backward()
    for letter in "BNOIR":
        parts = [placed(t, shapes.LINEAR[n], mesh, letter).requires_grad_() for n, t in values.items()]
        linear(*parts).sum().backward()
        for t, other in zip(parts, one, strict=True):
            torch.testing.assert_close(t.grad.full_tensor(), other.grad)


def check_that_the_smaller_tensors_move(here):
    """x is divided by instances and the head by outputs: one of them has to move."""
    mesh = mesh_of(here)
    for batch, outputs, moved in ((8, 64, "x"), (512, 4, "weight")):
        x, z, weight = torch.randn(batch, 1, 8), torch.randn(batch, 8), torch.randn(outputs, 8, 8)
        x, z, weight = (t.to(here.device) for t in (x, z, weight))
        expected = linear(x, z, weight, None, None, None)
        parts = placed(x, "BNI", mesh, "B"), placed(z, "BR", mesh, "B"), placed(weight, "OIR", mesh, "O")
        y = linear(*parts, None, None, None)
        assert y.placements == ((Shard(2),) if moved == "x" else (Shard(0),))
        torch.testing.assert_close(y.full_tensor(), expected)


def check_partial_arguments_and_other_axes(here):
    mesh = mesh_of(here)
    x, z, weight = torch.randn(6, 3, 4), torch.randn(6, 5), torch.randn(7, 4, 5)
    x, z, weight = (t.to(here.device) for t in (x, z, weight))
    expected = linear(x, z, weight, None, None, None)
    part = DTensor.from_local(x / here.size, mesh, [Partial()], run_check=False)
    y = linear(part, placed(z, "BR", mesh, "B"), placed(weight, "OIR", mesh, "?"), None, None, None)
    torch.testing.assert_close(y.full_tensor(), expected)
    with torch.inference_mode():
        y = fasthyper.hyper_linear(
            placed(x[:, 0], "BI", mesh, "I"), placed(z, "BR", mesh, "R"), placed(weight, "OIR", mesh, "I")
        )
        torch.testing.assert_close(y.full_tensor(), expected[:, 0])


def check_errors_name_the_argument(here):
    mesh, other = mesh_of(here), mesh_of(here, 2)
    x, z, weight = (t.to(here.device) for t in (torch.randn(6, 4), torch.randn(6, 5), torch.randn(7, 4, 5)))
    parts = placed(x, "BI", mesh, "B"), placed(z, "BR", mesh, "B"), placed(weight, "OIR", mesh, "B")
    with pytest.raises(TypeError, match=r"z must be a DTensor, since x and weight are, got a Tensor of shape \(6, 5\)"):
        fasthyper.hyper_linear(parts[0], z, parts[2])
    with pytest.raises(ValueError, match="weight must be on the mesh of x"):
        fasthyper.hyper_linear(*parts[:2], placed(weight, "OIR", other, "BB"))
    with pytest.raises(ValueError, match=r"z must have shape \(6, 5\), got \(6, 4\)"):
        fasthyper.hyper_linear(parts[0], placed(z[:, :4].contiguous(), "BR", mesh, "B"), parts[2])
