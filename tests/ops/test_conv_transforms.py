"""The ops of generated convolutions: derivatives, transforms, compiled code."""

from __future__ import annotations

import itertools

import pytest
import torch
from convolutions import ALL, GEOMETRIES, geometry, op, ops, tensors, with_gradients
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from fasthyper.ops import reference


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives(transposed):
    geo = geometry((1, 3, 3), (1, 2, 2), (1, 2, 1), (0, 1, 0), groups=2)
    *args, _ = tensors(geo, transposed, B=2, I=1, O=2, R=2)
    args = [t.requires_grad_() for t in args]

    def f(*t):
        return op(transposed)(*t, *geo)

    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, args)


@pytest.mark.parametrize("name", ["conv_apply", "conv_transpose_apply", "conv_cond_grad", "conv_weight_grad"])
def test_family(name):
    """Each op of the family: its definition, its derivatives, and vmap over every subset of its arguments."""
    geo = geometry((1, 4, 3), (1, 2, 2), (1, 2, 1), (0, 1, 0), groups=2)
    x, z, weight, *_, y = tensors(geo, False, B=3, I=1, O=4, R=2)
    args = {
        "conv_apply": (x, z, weight),
        "conv_transpose_apply": (y, z, weight),
        "conv_cond_grad": (x, y, weight),
        "conv_weight_grad": (x, z, y),
    }[name]
    f = lambda *t: getattr(ops, name)(*t, *geo)
    torch.testing.assert_close(f(*args), getattr(reference, name)(*args, geo))
    leaves = [t.clone().requires_grad_() for t in args]
    torch.library.opcheck(getattr(ops, name).default, (*leaves, *geo))
    assert gradcheck(f, leaves, check_forward_ad=True)
    for batched in itertools.product((False, True), repeat=3):
        if any(batched):
            many = [torch.stack([t, 2 * t, t + 1]) if b else t for t, b in zip(args, batched, strict=True)]
            dims = tuple(0 if b else None for b in batched)
            each = [f(*(t[v] if b else t for t, b in zip(many, batched, strict=True))) for v in range(3)]
            torch.testing.assert_close(vmap(f, dims)(*many), torch.stack(each))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    geo = GEOMETRIES["groups"]
    *args, g = tensors(geo, transposed, dtype=torch.float32)
    args = [t.requires_grad_() for t in args]
    name = "hyper_conv_transpose" if transposed else "hyper_conv"
    torch.library.opcheck(getattr(ops, name).default, (*args, *geo))
    of = *args[:5], g, *geo, [*ALL]
    torch.library.opcheck(getattr(ops, f"{name}_grads").default, tuple(of))


def test_transforms():
    geo = GEOMETRIES["groups"]
    x, z, weight, *_ = tensors(geo, False)
    loss = lambda w, x, z: ops.conv_apply(x, z, w, *geo).square().sum()
    each = [
        torch.autograd.functional.jacobian(lambda w, k=k: loss(w, x[k, None], z[k, None]), weight) for k in range(5)
    ]
    per_sample = vmap(grad(loss), (None, 0, 0))(weight, x.unsqueeze(1), z.unsqueeze(1))
    torch.testing.assert_close(per_sample, torch.stack(each))
    torch.testing.assert_close(jacrev(loss, 2)(weight, x, z), grad(loss, 2)(weight, x, z))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled(transposed, last, compiled):
    """Compiled code gives the same values, gradients and memory formats, for any batch size."""
    geo = GEOMETRIES["groups"]
    f = compiled(lambda *t: op(transposed)(*t, *geo))
    for B in (5, 3, 2):
        *args, g = tensors(geo, transposed, B=B)
        if last:
            args[0] = args[0].to(memory_format=torch.channels_last_3d)
        found, exact = with_gradients(f, args, g), with_gradients(lambda *t: op(transposed)(*t, *geo), args, g)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
