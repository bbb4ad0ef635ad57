"""`hyper_linear(…, weight_map=…)` under derivatives and transforms of torch, compiled, exported and under autocast."""

from __future__ import annotations

import pytest
import torch
from mapped_layers import PHI, SMALL, mapped, results, snake, written_out
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap


@pytest.mark.parametrize("strides", ["contiguous", "swapped"])
def test_gradcheck(strides, weight_map, factors):
    args = factors(SMALL, names=factors.AFFINE, strides=strides, requires_grad=True)
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(mapped(weight_map), args, **options)
    assert gradgradcheck(mapped(weight_map), args, check_fwd_over_rev=True, check_batched_grad=True)


TRANSFORMS = {
    "grad": lambda f, wrt: grad(lambda *a: (f(*a) ** 2).sum(), wrt),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f, wrt: hessian(lambda *a: (f(*a) ** 2).sum(), wrt),
    "reverse over forward": lambda f, wrt: jacrev(jacfwd(f, wrt), wrt),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform, weight_map, factors):
    args, wrt = factors((2, 1, 2, 2, 1), names=factors.AFFINE), tuple(range(6))
    torch.testing.assert_close(
        transform(mapped(weight_map), wrt)(*args), transform(written_out(weight_map), wrt)(*args)
    )


@pytest.mark.parametrize("batched", [1, 2, 4, 7, 18, 63])
def test_vmap(batched, weight_map, factors):
    dims = tuple(0 if batched >> k & 1 else None for k in range(6))
    one, many = factors(SMALL, names=factors.AFFINE), factors(SMALL, names=factors.AFFINE, lead=3)
    args = [m if d == 0 else t for t, m, d in zip(one, many, dims, strict=True)]
    for transform in (lambda f: f, lambda f: grad(lambda *a: (f(*a) ** 2).sum(), tuple(range(6)))):
        got, truth = (vmap(transform(f(weight_map)), dims)(*args) for f in (mapped, written_out))
        torch.testing.assert_close(got, truth)


def test_jvp_and_backward_through_it(weight_map, factors):
    args, tangents = (tuple(factors(SMALL, names=factors.AFFINE)) for _ in range(2))

    def through(f):
        leaves = [t.clone().requires_grad_() for t in args]
        y, dy = jvp(f, tuple(leaves), tangents)
        return y, dy, *torch.autograd.grad((dy**2).sum(), leaves[:3])

    torch.testing.assert_close(through(mapped(weight_map)), through(written_out(weight_map)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, weight_map, factors, compiled):
    f = compiled(mapped(weight_map), backend)
    for batch in (3, 5, 8):
        args = factors((batch, 2, 5, 3, 6), names=factors.AFFINE)
        (g,) = factors((batch, 2, 5, 3, 6), names=("g",))
        torch.testing.assert_close(results(f, args, g), results(written_out(weight_map), args, g))


def test_inductor(factors, compiled):
    args = factors(names=factors.AFFINE)
    (g,) = factors(names=("g",))
    for weight_map in ("normalize", snake):
        f = compiled(mapped(weight_map), "inductor")
        torch.testing.assert_close(results(f, args, g), results(written_out(weight_map), args, g))


@pytest.mark.parametrize("name", PHI)
def test_transforms_inside_compiled_code(name, factors, compiled, unless_torch_fails):
    args = factors((2, 1, 2, 2, 1), names=factors.AFFINE)
    for transform in (TRANSFORMS["grad"], TRANSFORMS["hessian"]):
        truth = transform(written_out(name), (0, 1, 2))
        with unless_torch_fails(lambda truth=truth: compiled(truth)(*args)):
            torch.testing.assert_close(compiled(transform(mapped(name), (0, 1, 2)))(*args), truth(*args))


def test_export(weight_map, factors):
    class Model(nn.Module):
        def forward(self, *args):
            return mapped(weight_map)(*args)

    args = tuple(factors(names=factors.AFFINE))
    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = {"args": tuple({0: batch} if k < 2 else None for k in range(6))}
    program = torch.export.export(Model(), args, dynamic_shapes=dynamic)
    others = factors((9, 2, 5, 3, 6), names=factors.AFFINE)
    torch.testing.assert_close(program.module()(*others), written_out(weight_map)(*others))


def test_autocast(weight_map, factors):
    args = factors(dtype=torch.float32, names=factors.AFFINE)
    (g,) = factors(dtype=torch.bfloat16, names=("g",))
    with torch.autocast("cpu", torch.bfloat16):
        got = results(mapped(weight_map), args, g)
    low = results(mapped(weight_map), [t.bfloat16() for t in args], g)
    assert got[0].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in got[1:])
    torch.testing.assert_close(got, [low[0], *(t.float() for t in low[1:])])


OPCHECKS = {
    "mapped_linear": ("x", "z", "weight", "bias", "base_weight", "base_bias"),
    "mapped_linear without bias and base": ("x", "z", "weight", None, None, None),
    "mapped_linear_grads": ("x", "z", "weight", "bias", "base_weight", "g"),
    "mapped_linear_grads without bias and base": ("x", "z", "weight", None, None, "g"),
}


@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("forced", [(), ("materialised", "auto")])
def test_opcheck(case, forced, factors):
    names = tuple(filter(None, OPCHECKS[case]))
    tensors = dict(zip(names, factors(names=names, requires_grad=True), strict=True))
    mask = [[True, True, True, "bias" in names, "base_weight" in names, False]] if "grads" in case else []
    op = getattr(torch.ops.fasthyper, case.split()[0]).default
    args = [None if a is None else tensors[a] for a in OPCHECKS[case]]
    outcomes = torch.library.opcheck(op, (*args, "softplus", *mask, *forced))
    assert set(outcomes.values()) == {"SUCCESS"}
