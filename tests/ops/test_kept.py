"""W written out once for derivatives of derivatives, where instances have points and W fits the workspace."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad, gradgradcheck

import fasthyper
from fasthyper import hyper_linear, planner
from fasthyper.ops import kept, linear

SIZES = (3, 40, 7, 4, 5)  # B, N, R, I, O with points enough for the planner to generate W
SMALL = (2, 40, 7, 4, 5)


def affine(x, z, weight, bias=None, base_weight=None, base_bias=None):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


@pytest.fixture
def saved():
    """Return the list of all tensors that autograd saves."""
    found = []

    def pack(t):
        found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def count_weights(saved, *shape):
    """Return how many W of a shape, (B, O, I), have been written out and saved."""
    return len({t.data_ptr() for t in saved if t.shape == shape})


@pytest.fixture(params=[True, False], ids=["kept", "too large"])
def is_kept(request, monkeypatch):
    """Run a test with room for W, and without."""
    if not request.param:
        monkeypatch.setattr(kept, "COPIES", 1 << 40)
    planner.forget()
    yield request.param
    planner.forget()


def two_layers(linear, x, z, first, second):
    return linear(torch.sin(linear(x, z, *first)), z, *second)


def layers(factors, dtype=torch.float64):
    B, N, R, _, O = SIZES
    x, z, *first = factors(SIZES, dtype, factors.AFFINE, requires_grad=True)
    _, _, *second = factors((B, N, R, O, 3), dtype, factors.AFFINE, requires_grad=True)
    return x, z, first, second


def gradient_of(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def laplacian_of(y, x):
    d = gradient_of(torch.sin(y), x)
    return sum(gradient_of(d[..., i], x)[..., i] for i in range(x.shape[-1]))


LOSSES = {
    "gradient": lambda y, x: gradient_of(torch.sin(y), x).square().sum(),
    "laplacian": lambda y, x: laplacian_of(y, x).square().sum(),
    "both and y": lambda y, x: (gradient_of(y, x).sum(-1) + laplacian_of(y, x)).square().sum() + y.square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_on_derivatives(loss, factors, oracle, saved, is_kept):
    x, z, first, second = layers(factors)
    leaves = [x, z, *first, *second]

    def grads(linear):
        return torch.autograd.grad(LOSSES[loss](two_layers(linear, x, z, first, second), x), leaves, allow_unused=True)

    got = grads(affine)
    written = count_weights(saved, 3, 5, 4), count_weights(saved, 3, 3, 5)
    for a, b in zip(got, grads(oracle.linear), strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros_like(a) if b is None else b)
    if loss != "both and y":  # there, the graph of a constant gradient needs no W
        assert written == ((1, 1) if is_kept else (0, 0))  # one for each layer, in all passes together


@pytest.mark.parametrize("some", range(1, 64))
def test_two_orders_of_some_arguments(some, factors, oracle):
    args = factors(SIZES, names=factors.AFFINE)
    wanted = [t.requires_grad_() for k, t in enumerate(args) if some >> k & 1]

    def both(f):
        first = torch.autograd.grad((f(*args) ** 2).sum(), wanted, create_graph=True)
        return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), wanted)

    torch.testing.assert_close(both(affine), both(oracle.linear))


def test_third_order(factors, oracle, is_kept):
    args = factors(SIZES, names=factors.AFFINE, requires_grad=True)

    def derivatives(f):
        total, found = (f(*args) ** 3).sum() / 100, []
        for _ in range(3):
            grads = torch.autograd.grad(total, args, create_graph=True)
            found += grads
            total = sum((t**2).mean() for t in grads)
        return found

    torch.testing.assert_close(derivatives(affine), derivatives(oracle.linear))


def test_gradgradcheck(factors):
    args = factors(SMALL, names=factors.AFFINE, requires_grad=True)
    assert kept.fits(linear.HyperLinear(*args))
    assert gradgradcheck(affine, args, check_fwd_over_rev=True, fast_mode=True, check_batched_grad=True)


TRANSFORMS = {
    "grad of grad": lambda f: torch.func.grad(lambda *a: torch.func.grad(f)(*a).square().sum(), (0, 1, 2)),
    "hessian": lambda f: torch.func.hessian(f, (0, 1, 2)),
    "jacrev of grad": lambda f: torch.func.jacrev(torch.func.grad(f, (0, 1)), (1, 2)),
    "jvp of grad": lambda f: lambda *a: torch.func.jvp(torch.func.grad(f, (0, 1, 2)), a, tuple(t.cos() for t in a)),
    "vmap of grad of grad": lambda f: (
        lambda x, z, w: torch.func.vmap(
            torch.func.grad(lambda *a: torch.func.grad(f)(*a).square().sum()), (0, None, None)
        )(torch.stack([x, 2 * x]), z, w)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, factors, oracle, is_kept):
    args = factors(SMALL)[:3]
    assert kept.fits(linear.HyperLinear(*args, None, None, None)) == is_kept
    got, expected = (
        TRANSFORMS[transform](lambda *a, f=f: torch.sin(f(*a)).sum())(*args) for f in (affine, oracle.linear)
    )
    torch.testing.assert_close(got, expected)


def test_a_compiled_loss_on_gradients(factors):
    x, z, first, second = layers(factors)
    leaves = z, *first

    def loss(x, z, *first):
        f = lambda x: torch.sin(two_layers(affine, x, z, first, [t.detach() for t in second])).sum()
        return torch.func.grad(f)(x).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(x.detach(), z, *first), leaves, allow_unused=True) for f in (compiled, loss))
    torch.testing.assert_close(got, expected)


def test_a_forward_over_reverse_laplacian(factors, oracle):
    x, z, weight, _ = factors(SIZES, requires_grad=True)

    def second(f):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            (d,) = torch.autograd.grad(torch.sin(f(dual, z, weight)).sum(), dual, create_graph=True)
            return torch.autograd.grad(forward_ad.unpack_dual(d).tangent.square().sum(), (z, weight))

    torch.testing.assert_close(second(affine), second(oracle.linear))


@pytest.mark.parametrize("choice", [("auto", "generate"), ("aten", None), ("materialised", None)])
def test_a_forced_way_keeps_no_w(choice, factors, saved):
    x, z, weight, _ = factors(SIZES, requires_grad=True)
    with fasthyper.use_backend(*choice):
        y = hyper_linear(x, z, weight)
    gradient_of(y, x).square().sum().backward()
    assert not count_weights(saved, 3, 5, 4)


@pytest.mark.parametrize("sizes", [(3, 1, 7, 4, 5), (0, 40, 7, 4, 5), (3, 40, 0, 4, 5), (1 << 9, 40, 7, 64, 128)])
def test_calls_that_keep_no_w(sizes, factors, saved):
    """One point, an empty axis, a W larger than the workspace."""
    x, z, weight, _ = factors(sizes, torch.float32, requires_grad=True)
    gradient_of(hyper_linear(x, z, weight), x).square().sum().backward()
    assert not count_weights(saved, sizes[0], sizes[4], sizes[3])


def test_first_order_keeps_no_w(factors, saved):
    x, z, weight, _ = factors(SIZES, requires_grad=True)
    hyper_linear(x, z, weight).sum().backward()
    assert not count_weights(saved, 3, 5, 4)


@pytest.mark.parametrize("which", ["z", "weight", "base_weight"])
def test_a_change_in_place_raises(which, factors):
    x, z, weight, bias, base_weight, base_bias = args = factors(SIZES, names=factors.AFFINE, requires_grad=True)
    changed = dict(zip(factors.AFFINE, args, strict=True))[which]
    y = affine(x, z, weight, bias, base_weight, base_bias)
    d = gradient_of(torch.sin(y), x)
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(d.square().sum(), (z, weight, base_weight))


def test_a_new_forward_after_a_change_writes_out_a_new_w(factors, oracle):
    x, z, weight, _ = factors(SIZES, requires_grad=True)
    graphs = []
    for _ in range(2):
        y = hyper_linear(x, z, weight)
        d = gradient_of(torch.sin(y), x)
        graphs.append(d)  # the graph, and its W, stay alive
        expected = gradient_of(torch.sin(oracle.linear(x, z, weight)), x)
        torch.testing.assert_close(d, expected)
        weight.data.mul_(2)


def test_losses_of_one_forward_may_be_backpropagated_one_after_another(factors, oracle):
    x, z, weight, _ = factors(SIZES, requires_grad=True)

    def grads(f):
        y = f(x, z, weight)
        rows = [gradient_of(y[..., k], x).square().sum() for k in range(2)]
        return [torch.autograd.grad(row, (z, weight), retain_graph=True) for row in [*rows, rows[0], y.square().sum()]]

    torch.testing.assert_close(grads(affine), grads(oracle.linear))


def test_w_dies_with_the_graph(factors):
    x, z, weight, _ = factors(SIZES, requires_grad=True)
    alive = []

    def pack(t):
        if t.shape == (3, 5, 4):
            alive.append(weakref.ref(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = hyper_linear(x, z, weight)
        d = gradient_of(torch.sin(y), x)
        assert alive
        d.square().sum().backward()
    del d
    gc.collect()
    assert all(w() is None for w in alive)
    y.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, factors, oracle):
    """The error is at most twice that of W written out, plus rounding."""
    x, z, first, second = layers(factors, dtype)
    leaves = [x, z, first[0], second[0]]

    def grads(linear, dtype=dtype):
        wide = [t.detach().to(dtype).requires_grad_() for t in (x, z, *first, *second)]
        y = two_layers(linear, wide[0], wide[1], wide[2:6], wide[6:])
        loss = LOSSES["gradient"](y, wide[0]) / 1024
        return torch.autograd.grad(loss, [wide[0], wide[1], wide[2], wide[6]])

    def written_out(x, z, weight, bias, base_weight, base_bias):
        w = (z @ weight.flatten(0, 1).T + base_weight.flatten()).view(len(z), *base_weight.shape)
        return torch.bmm(x, w.mT) + (z @ bias.T + base_bias)[:, None]

    truth = grads(oracle.linear, torch.float64)
    for got, theirs, exact, leaf in zip(grads(affine), grads(written_out), truth, leaves, strict=True):
        error, allowed = ((t.double() - exact).norm() for t in (got, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.norm(), leaf.shape


LARGE = (2, 64, 8, 128, 128)
"""Sizes at which the forward's own gradient of W goes to the node of W, too."""


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_call_has_one_contraction(loss, autocast, factors, oracle):
    args = [(t / 8).requires_grad_() for t in factors(LARGE, torch.float64, factors.AFFINE)]

    def grads(f):
        with torch.autocast("cpu", enabled=autocast):
            return torch.autograd.grad(LOSSES[loss](f(*args)[..., :2].tanh(), args[0]), args)

    torch.testing.assert_close(grads(affine), grads(oracle.linear))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_first_order_of_a_large_call_beside_second_order(order, factors, oracle):
    """Each alone, after the other, with and without the graph of the other."""
    x, z, weight, _ = [(t / 8).requires_grad_() for t in factors(LARGE)]

    def grads(f):
        y = f(x, z, weight)
        losses = y.square().sum(), gradient_of(y.tanh(), x).square().sum()
        return [torch.autograd.grad(losses[k], (x, z, weight), retain_graph=True) for k in (*order, *order)]

    torch.testing.assert_close(grads(affine), grads(oracle.linear))


@pytest.mark.parametrize("frozen", [(), ("z",), ("weight", "bias"), ("z", "base_weight", "base_bias"), ("weight",)])
def test_a_large_call_with_frozen_arguments(frozen, factors, oracle):
    """The forward has saved only what its gradients read."""
    args = [t / 8 for t in factors(LARGE, torch.float64, factors.AFFINE)]
    trained = [t.requires_grad_() for t, name in zip(args, factors.AFFINE, strict=True) if name not in frozen]

    def grads(f):
        return torch.autograd.grad(LOSSES["both and y"](f(*args)[..., :2].tanh(), args[0]), trained)

    torch.testing.assert_close(grads(affine), grads(oracle.linear))


ON_KERNELS = {
    "many instances": (16, 4, 8, 16, 16),
    "many points": (2, 256, 8, 128, 128),
    "few inputs": (2, 256, 8, 3, 64),
    "some points": (2, 64, 8, 64, 64),
}
"""B, N, R, I, O of products that csrc/eager/products.h runs on the kernels of the family."""


@pytest.mark.parametrize("sizes", ON_KERNELS.values(), ids=ON_KERNELS)
def test_three_orders_on_the_kernels(sizes, factors, oracle):
    args = [t / 8 for t in factors(sizes, torch.float32, factors.AFFINE)]

    def derivatives(f, dtype):
        given = [t.to(dtype, copy=True).requires_grad_() for t in args]
        total, found = f(*given).tanh().square().mean(), []
        for _ in range(3):
            grads = torch.autograd.grad(total, given, create_graph=True)
            found += grads
            total = sum(t.tanh().square().mean() for t in grads)
        return found

    got = derivatives(affine, torch.float32)
    for a, exact in zip(got, derivatives(oracle.linear, torch.float64), strict=True):
        assert (a.double() - exact).norm() <= 1e-5 * exact.norm(), a.shape


@pytest.mark.parametrize("sizes", ON_KERNELS.values(), ids=ON_KERNELS)
def test_transforms_beside_the_kernels(sizes, factors, oracle):
    """Batched gradients, and forward mode over a graph, which torch's own products have to see."""
    x, z, weight, _ = [(t / 8).requires_grad_() for t in factors(sizes, torch.float32)]

    def second(f):
        d = gradient_of(torch.sin(f(x, z, weight)), x)
        rows = torch.stack([torch.ones_like(d), torch.linspace(0, 1, d.numel()).view_as(d)])
        return torch.autograd.grad(d, (x, z, weight), rows, is_grads_batched=True)

    torch.testing.assert_close(second(hyper_linear), second(oracle.linear), rtol=1e-3, atol=1e-4)


def test_compiled_autograd_of_a_call_with_a_node_of_w(factors):
    """It has no undefined gradients."""
    args = factors(SIZES, torch.float32, factors.AFFINE, requires_grad=True)
    y = affine(*args).square().sum()
    expected = torch.autograd.grad(y, args, retain_graph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="eager")(y)
    torch.testing.assert_close([t.grad for t in args], list(expected))


def test_few_points_keep_w_if_z_has_features_enough(factors, saved):
    """Whatever order the planner has for the first derivative."""
    x, z, weight, _ = factors((64, 2, 64, 64, 1), torch.float32, requires_grad=True)
    gradient_of(torch.sin(hyper_linear(x, z, weight)), x).square().sum().backward()
    assert count_weights(saved, 64, 1, 64) == 1
