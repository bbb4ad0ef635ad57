"""The whole generated two-layer primary as one op: values, derivatives, transforms, and the backend that fuses it."""

from __future__ import annotations

import itertools
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fasthyper
from fasthyper import fused as fused_module
from fasthyper.functional import hyper_linear
from fasthyper.fused import hyper_primary
from fasthyper.ops.primary import ACTIVATIONS, activation_of

RAW = torch.ops.fasthyper
SIGMA = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu}
SIZES = {"b": 4, "n": 2, "r": 5, "i": 3, "j": 7, "o": 6}
SMALL = {"b": 3, "n": 2, "r": 2, "i": 2, "j": 4, "o": 3}
TINY = {"b": 2, "n": 2, "r": 2, "i": 1, "j": 3, "o": 1}
AXES = {
    "x": "bni", "z": "br", "weight1": "jir", "bias1": "jr", "base_weight1": "ji", "base_bias1": "j",
    "weight2": "ojr", "bias2": "or", "base_weight2": "oj", "base_bias2": "o",
}  # fmt: skip
NAMES = tuple(AXES)
OPTIONAL = [name for name in NAMES if "b" in name]
UNREAD = ("base_bias1", "base_bias2")  # by any gradient
ALL = tuple(range(10))
SOME_ABSENT = [("gelu", ("bias1", "base_weight2", "base_bias2")), ("silu", tuple(OPTIONAL))]


def make(sizes=SIZES, dtype=torch.float64, absent=(), requires_grad=False, lead=(), **changed):
    """The ten arguments, None for each that is absent; `changed` gives some another shape."""
    sizes = {**SIZES, **sizes}
    shapes = {name: (*lead, *(sizes[axis] for axis in axes)) for name, axes in AXES.items()}
    return [
        None if name in absent else torch.randn(changed.get(name, shape)).to(dtype).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    ]


def reads(args):
    """Those of the ten that `primary_grads` takes."""
    return [t for name, t in zip(NAMES, args, strict=True) if name not in UNREAD]


def a_and_g(sizes=SIZES, dtype=torch.float64):
    return [torch.randn(*(sizes[axis] for axis in axes), dtype=dtype) for axes in ("bnj", "bno")]


def given(args):
    return [t for t in args if t is not None]


def fused(activation):
    """The op, as a function of ten tensors, for all that transforms do to functions."""
    return lambda *args: RAW.primary(*args, activation)[0]


def layers(activation):
    """The function of the nn modules: flattening, autocast, and the op where a backend fuses it."""
    return lambda x, z, *rest: hyper_primary(x, z, rest[:4], rest[4:], activation)


def truth_of(oracle, activation):
    """The same from einsum, in the dtype of its arguments."""
    return lambda x, z, *rest: oracle.linear(SIGMA[activation](oracle.linear(x, z, *rest[:4])), z, *rest[4:])


def one_by_one(args):
    """The two layers by hand."""
    x, z, *rest = args
    linear = lambda x, weight, bias, w0, b0: hyper_linear(x, z, weight, bias, base_weight=w0, base_bias=b0)
    return linear(torch.tanh(linear(x, *rest[:4])), *rest[4:])


def squared(f):
    return lambda *args: (f(*args) ** 2).sum()


def with_gradients(f, args, g):
    leaves = [t if t is None else t.detach().requires_grad_() for t in args]
    y = f(*leaves)
    return y, *torch.autograd.grad(y, given(leaves), g.to(y))


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return request.param


class TestValues:
    def test_values_and_gradients(self, activation, how, dtype, factors, oracle):
        """At most twice as far off as einsum in the same dtype, but for the rounding of the results."""
        args, g = [t.to(factors.DEVICE) for t in make({"b": 16}, dtype)], torch.randn(16, 2, 6)
        with fasthyper.use_backend(*how):
            got = with_gradients(fused(activation), args, g)
        f = truth_of(oracle, activation)
        usual, truth = with_gradients(f, args, g), with_gradients(f, [t.double() for t in args], g.to(dtype))
        for mine, theirs, right in zip(got, usual, truth, strict=True):
            assert (mine.shape, mine.dtype) == (right.shape, dtype)
            assert mine.is_contiguous()
            # A fold in float32 is one sum over both I and R, and adds up more rounding than two sums do.
            units = {torch.float64: 64, torch.float32: 16}.get(dtype, 4)
            rounding = units * torch.finfo(dtype).eps * right.abs().max()
            assert (mine.double() - right).abs().max() <= 2 * (theirs.double() - right).abs().max() + rounding

    @pytest.mark.parametrize("absent", range(64))
    def test_any_of_bias_and_base(self, absent, oracle):
        absent = [name for k, name in enumerate(OPTIONAL) if absent >> k & 1]
        args, g = make(absent=absent), torch.randn(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(fused("tanh"), args, g), with_gradients(truth_of(oracle, "tanh"), args, g)
        )

    @pytest.mark.parametrize("axis", SIZES)
    @pytest.mark.parametrize("size", [0, 1])
    def test_a_size_of_nothing_or_one(self, axis, size, how, factors, oracle):
        args = [t.to(factors.DEVICE) for t in make({axis: size})]
        g = torch.randn(*({**SIZES, axis: size}[a] for a in "bno"))
        with fasthyper.use_backend(*how):
            got = with_gradients(fused("silu"), args, g)
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "silu"), args, g))

    def test_any_strides(self, activation, oracle):
        args = [t.mT.contiguous().mT if t.dim() > 1 else t for t in make()]
        args[0] = args[0][:1].expand(4, 2, 3)
        g = torch.ones(1, 1, 1).expand(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(fused(activation), args, g), with_gradients(truth_of(oracle, activation), args, g)
        )

    def test_the_pre_activation(self, activation, oracle):
        args = make()
        _, a = RAW.primary(*args, activation)
        torch.testing.assert_close(a, oracle.linear(*args[:6]))
        assert a.is_contiguous()

    @pytest.mark.parametrize("some", [(), *((k,) for k in range(10)), (0, 6), (1, 7), (2, 3, 4), (5, 9), range(10)])
    def test_gradients_by_mask(self, some, activation, oracle):
        args, g = make(), torch.randn(4, 2, 6, dtype=torch.float64)
        mask = [k in some for k in range(10)]
        a = RAW.primary(*args, activation)[1]
        out = RAW.primary_grads(*reads(args), a, g, mask, activation)
        _, *truth = with_gradients(truth_of(oracle, activation), args, g)
        for got, right, wanted in zip(out, truth, mask, strict=True):
            if wanted:
                torch.testing.assert_close(got, right)
            else:
                assert got.shape == (0,)


class TestDerivatives:
    """Of every order, reverse and forward; y and a, which the second order comes in through."""

    @pytest.mark.parametrize(("activation", "absent"), [*((name, ()) for name in ACTIVATIONS), *SOME_ABSENT])
    def test_gradcheck(self, activation, absent):
        args = make(TINY, absent=absent, requires_grad=True)

        def f(*some):
            tensors = iter(some)
            return RAW.primary(*(t if t is None else next(tensors) for t in args), activation)

        checks = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
        assert gradcheck(f, given(args), **checks)
        assert gradgradcheck(f, given(args), check_fwd_over_rev=True, check_batched_grad=True)

    def test_of_the_gradients_themselves(self, activation):
        """`primary_grads` is a function of ten tensors as well, a and g among them."""
        args = [t.requires_grad_() for t in (*reads(make(TINY)), *a_and_g(TINY))]
        f = lambda *args: RAW.primary_grads(*args, [True] * 10, activation)
        assert gradcheck(f, args, check_forward_ad=True)

    @pytest.mark.parametrize("f", [fused, layers])
    def test_third_order(self, f, activation, oracle):
        def derivatives(f, args):
            leaves = [t.detach().requires_grad_() for t in args]
            total, found = (f(*leaves) ** 3).sum(), []
            for _ in range(3):
                grads = torch.autograd.grad(total, leaves, create_graph=True)
                found += [t.detach() for t in grads]
                total = sum((t**2).sum() for t in grads)
            return found

        args = make(SMALL)
        torch.testing.assert_close(derivatives(f(activation), args), derivatives(truth_of(oracle, activation), args))

    @pytest.mark.parametrize("some", [*((k,) for k in range(10)), (0, 1), (2, 6), (5, 9), (1, 3, 7)])
    def test_two_orders_of_some(self, some, oracle):
        args = make(SMALL)

        def grads(f):
            leaves = [t.detach().requires_grad_(k in some) for k, t in enumerate(args)]
            wanted = [leaves[k] for k in some]
            first = torch.autograd.grad((f(*leaves) ** 2).sum(), wanted, create_graph=True)
            return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), wanted)

        torch.testing.assert_close(grads(fused("gelu")), grads(truth_of(oracle, "gelu")))

    def test_what_else_reads_the_pre_activation(self, oracle):
        """Only y, only a, or both: where a meets no gradient, it costs none."""
        args = make(requires_grad=True)
        y, a = RAW.primary(*args, "silu")
        h = oracle.linear(*args[:6])
        right = truth_of(oracle, "silu")(*args)
        for mine, theirs in (
            ((a**2).sum(), (h**2).sum()),
            ((a * 3).sum() + (y**2).sum(), (h * 3).sum() + (right**2).sum()),
        ):
            torch.testing.assert_close(
                torch.autograd.grad(mine, args[:6], retain_graph=True),
                torch.autograd.grad(theirs, args[:6], retain_graph=True),
            )

    def test_a_pre_activation_of_constants(self):
        args = make()
        args[6].requires_grad_()
        _, a = RAW.primary(*args, "silu")
        (d,) = torch.autograd.grad(a.sum(), args[6], allow_unused=True)
        assert d is None or not d.any()

    def test_forward_mode_with_some_tangents(self, activation, oracle):
        args, dots = make(SMALL), make(SMALL)
        for some in ((0,), (1,), (2, 7), (6,), ALL):

            def tangent(f, some=some):
                with forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(t, d) if k in some else t
                        for k, (t, d) in enumerate(zip(args, dots, strict=True))
                    ]
                    return forward_ad.unpack_dual(f(*duals))

            expected = tangent(truth_of(oracle, activation))
            torch.testing.assert_close(tangent(fused(activation)), expected)
            torch.testing.assert_close(tangent(layers(activation)), expected)

    @pytest.mark.parametrize(("activation", "absent"), [*((name, ()) for name in ACTIVATIONS), *SOME_ABSENT])
    def test_opcheck(self, activation, absent):
        args = make(TINY, absent=absent, requires_grad=True)
        forced = ("aten", "fold") if absent else ()
        out = torch.library.opcheck(RAW.primary.default, (*args, activation, *forced))
        assert set(out.values()) == {"SUCCESS"}
        tensors = [t if t is None else t.requires_grad_() for t in (*reads(args), *a_and_g(TINY))]
        mask = [True, False] * 5 if absent else [True] * 10
        out = torch.library.opcheck(RAW.primary_grads.default, (*tensors, mask, activation, *forced))
        assert set(out.values()) == {"SUCCESS"}


TRANSFORMS = {
    "grad": lambda f: grad(squared(f), ALL),
    "jacrev": lambda f: jacrev(f, ALL),
    "jacfwd": lambda f: jacfwd(f, ALL),
    "hessian": lambda f: hessian(squared(f), (0, 1, 2, 6)),
    "reverse over reverse": lambda f: jacrev(jacrev(f, (0, 1, 2, 6)), (0, 1, 2, 6)),
    "reverse over forward": lambda f: jacrev(jacfwd(f, (0, 1, 2, 6)), (0, 1, 2, 6)),
    "jvp": lambda f: lambda *args: jvp(f, args, tuple(torch.cos(t) for t in args)),
    "jvp of grad": lambda f: lambda *args: jvp(grad(squared(f), ALL), args, tuple(torch.cos(t) for t in args)),
    "vmap of all": lambda f: lambda *args: vmap(f)(*(torch.stack([t, 2 * t, t.sin()]) for t in args)),
    "vmap of grad": lambda f: lambda x, z, *rest: vmap(
        grad(squared(lambda x, z, *rest: f(x[None], z[None], *rest)), ALL), (0, 0, *[None] * 8)
    )(x, z, *rest),
    "grad of vmap": lambda f: grad(
        lambda x, z, *rest: (vmap(f, (0, 0, *[None] * 8))(x[:, None], z[:, None], *rest) ** 2).sum(), ALL
    ),
}  # fmt: skip


class TestTransforms:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("f", [fused, layers])
    def test_right(self, f, transform, activation, oracle):
        args, make_ = make(TINY), TRANSFORMS[transform]
        torch.testing.assert_close(make_(f(activation))(*args), make_(truth_of(oracle, activation))(*args))

    @pytest.mark.parametrize("batched", [(k,) for k in range(10)] + [(0, 1), (2, 6), (0, 6), (1, 2, 3)])
    def test_vmap_over_some(self, batched, oracle):
        one, many = make(SMALL), make(SMALL, lead=(3,))
        dims = tuple(0 if k in batched else None for k in range(10))
        args = [many[k] if k in batched else one[k] for k in range(10)]
        f, right = fused("tanh"), truth_of(oracle, "tanh")
        torch.testing.assert_close(vmap(f, dims)(*args), vmap(right, dims)(*args))
        of = lambda f: vmap(grad(squared(f), ALL), dims)(*args)
        torch.testing.assert_close(of(f), of(right))

    @pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap of grad"])
    def test_autograd_outside_a_transform(self, transform, oracle):
        def through(f):
            leaves = [t.clone().requires_grad_() for t in args]
            out = torch.utils._pytree.tree_leaves(TRANSFORMS[transform](f)(*leaves))
            return torch.autograd.grad(sum((t**2).sum() for t in out), leaves, materialize_grads=True)

        args = make(TINY)
        torch.testing.assert_close(through(fused("gelu")), through(truth_of(oracle, "gelu")))


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f, backend="aot_eager": torch.compile(f, fullgraph=True, backend=backend)
    torch._dynamo.reset()


class TestCompiled:
    @pytest.mark.parametrize("f", [fused, layers])
    def test_forward_and_backward(self, f, activation, compiled, oracle):
        g = compiled(f(activation))
        for batch in (4, 5, 8):
            args, cotangent = make({"b": batch}), torch.randn(batch, 2, 6)
            torch.testing.assert_close(
                with_gradients(g, args, cotangent), with_gradients(truth_of(oracle, activation), args, cotangent)
            )

    def test_inductor(self, compiled, oracle):
        args, g = make(), torch.randn(4, 2, 6)
        torch.testing.assert_close(
            with_gradients(compiled(fused("silu"), "inductor"), args, g),
            with_gradients(truth_of(oracle, "silu"), args, g),
        )

    @pytest.mark.parametrize("transform", ["grad", "jvp of grad", "vmap of grad"])
    def test_a_transform_within(self, transform, compiled, oracle):
        args, make_ = make(TINY), TRANSFORMS[transform]
        torch.testing.assert_close(compiled(make_(fused("tanh")))(*args), make_(truth_of(oracle, "tanh"))(*args))

    def test_compiled_autograd(self):
        args = make(requires_grad=True)
        loss = (fused("tanh")(*args) ** 2).sum()
        expected = torch.autograd.grad(loss, args, retain_graph=True)
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
        torch.testing.assert_close([t.grad for t in args], list(expected))

    def test_exported(self, oracle):
        class Net(nn.Module):
            def forward(self, *args):
                return hyper_primary(args[0], args[1], args[2:6], args[6:], "relu")

        args = tuple(make())
        torch.testing.assert_close(torch.export.export(Net(), args).module()(*args), truth_of(oracle, "relu")(*args))


class TestContract:
    @pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("f", [fused, layers])
    def test_autocast(self, f, region, activation):
        """The function follows the region; the op computes in the dtype of its arguments, whatever the region."""
        args = make(dtype=torch.float32, requires_grad=True)
        with torch.autocast("cpu", region):
            y = f(activation)(*args)
            got = torch.autograd.grad(y.float().sum(), args)
        cast = [t.to(region) for t in args] if f is layers else args
        expected = f(activation)(*cast)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
        torch.testing.assert_close(got, torch.autograd.grad(expected.float().sum(), args))

    def test_autocast_leaves_float64_alone(self, activation, oracle):
        args = make(requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layers(activation)(*args)
        torch.testing.assert_close(y, truth_of(oracle, activation)(*args))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode, oracle):
        args = make(requires_grad=True)
        with mode():
            y, a = RAW.primary(*args, "tanh")
        assert not y.requires_grad
        assert not a.requires_grad
        torch.testing.assert_close(y, truth_of(oracle, "tanh")(*args).detach())

    def test_fake_and_meta(self, dtype):
        args = [t.to("meta").requires_grad_() for t in make(dtype=dtype)]
        y, a = RAW.primary(*args, "relu")
        assert (y.shape, a.shape, y.dtype, a.dtype) == ((4, 2, 6), (4, 2, 7), dtype, dtype)
        assert [d.shape for d in torch.autograd.grad(y.sum(), args)] == [t.shape for t in args]

    def test_what_is_saved_is_what_is_read(self):
        """The inputs that a gradient reads, and a; not σ(a), and nothing of the size of the weights."""
        saved = []
        args = make(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, a = RAW.primary(*args, "tanh")
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*reads(args), a)}
        y.sum().backward()

    def test_saved_tensors_may_be_packed_away(self, oracle):
        args = make(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t + 0):
            y = fused("silu")(*args)
        torch.testing.assert_close(
            torch.autograd.grad((y**2).sum(), args),
            torch.autograd.grad((truth_of(oracle, "silu")(*args) ** 2).sum(), args),
        )

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, reentrant, oracle):
        args = make(requires_grad=True)
        (checkpoint(fused("tanh"), *args, use_reentrant=reentrant) ** 2).sum().backward()
        expected = torch.autograd.grad((truth_of(oracle, "tanh")(*args) ** 2).sum(), args)
        torch.testing.assert_close([t.grad for t in args], list(expected))

    @pytest.mark.parametrize("name", [*NAMES, "a"])
    def test_what_is_changed_in_place_is_found_out(self, name):
        args = [t.clone() for t in make(requires_grad=True)]
        y, a = RAW.primary(*args, "tanh")
        with torch.no_grad():
            dict(zip(NAMES, args, strict=True), a=a)[name].mul_(2)
        if name in UNREAD:
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    def test_backward_twice(self):
        args = make(requires_grad=True)
        y = fused("tanh")(*args)
        first = torch.autograd.grad(y.sum(), args, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), args), first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), args)

    def test_one_layer_twice(self, oracle):
        """x, z and the layer in two places: gradients add up."""
        x, z = (torch.randn(4, 3).double().requires_grad_() for _ in range(2))
        layer = [torch.randn(s).double().requires_grad_() for s in ((3, 3, 3), (3, 3), (3, 3), (3,))]

        def grads(f):
            return torch.autograd.grad((f(x[:, None], z, *layer, *layer) ** 2).sum(), (x, z, *layer))

        torch.testing.assert_close(grads(fused("tanh")), grads(truth_of(oracle, "tanh")))


WRONG = [
    ("x", (4, 3)), ("x", (4, 2, 3, 1)), ("z", (5,)), ("z", (4, 1, 5)), ("weight1", (21, 5)), ("weight2", (42, 5)),
    ("z", (3, 5)), ("z", (1, 5)), ("z", (0, 5)), ("weight1", (7, 2, 5)), ("weight1", (7, 1, 5)), ("weight1", (7, 3, 1)),
    ("weight2", (6, 1, 5)), ("weight2", (6, 7, 1)), ("weight2", (6, 3, 5)), ("bias1", (7, 1)), ("bias1", (7,)),
    ("bias1", (6, 5)), ("base_weight1", (3, 7)), ("base_weight1", (1, 3)), ("base_bias1", (1,)), ("base_bias1", ()),
    ("bias2", (1, 5)), ("bias2", (7, 5)), ("base_weight2", (7, 6)), ("base_weight2", (6, 1)), ("base_bias2", (1,)),
    ("base_bias2", (7,)), ("base_bias2", (6, 1)),
]  # fmt: skip


class TestErrors:
    @pytest.fixture(params=["eager", "fake", "transform"])
    def surface(self, request):
        if request.param == "fake":
            with FakeTensorMode():
                yield lambda f, *args: f(*args)
        elif request.param == "transform":
            yield lambda f, *args: vmap(lambda one: f(args[0] * one, *args[1:]))(torch.ones(2))
        else:
            yield lambda f, *args: f(*args)

    @pytest.mark.parametrize(("name", "shape"), WRONG)
    def test_shapes(self, name, shape, surface, fusing):
        args = make(dtype=torch.float32, **{name: shape})
        with pytest.raises(ValueError, match=rf"{name} must have shape \(.*, got {re.escape(str(shape))}"):
            surface(lambda *args: RAW.primary(*args, "relu")[0], *args)
        if name not in UNREAD:
            rest = (*a_and_g(dtype=torch.float32), [True] * 10, "relu")
            with pytest.raises(ValueError, match=rf"{name} must have shape \(.*, got {re.escape(str(shape))}"):
                surface(lambda *args: RAW.primary_grads(*args, *rest)[0], *reads(args))
        assert fusing.calls == []

    @pytest.mark.parametrize("shape", [(4, 2, 3), (4, 1, 7), (4, 2, 1), (1, 2, 6), (4, 2)])
    @pytest.mark.parametrize("name", ["a", "g"])
    def test_shapes_of_what_a_backward_gets(self, name, shape, surface):
        a, g = torch.randn(shape if name == "a" else (4, 2, 7)), torch.randn(shape if name == "g" else (4, 2, 6))
        args = reads(make(dtype=torch.float32))
        with pytest.raises(ValueError, match=rf"{name} must have shape \(4, 2, .\), got {re.escape(str(shape))}"):
            surface(lambda *args: RAW.primary_grads(*args, a, g, [True] * 10, "relu")[0], *args)

    @pytest.mark.parametrize("name", NAMES)
    def test_dtypes_and_devices(self, name):
        args = dict(zip(NAMES, make(dtype=torch.float32), strict=True))
        with pytest.raises(TypeError, match="must be floating point"):
            RAW.primary(*{**args, name: args[name].long()}.values(), "relu")
        if name == "x":
            return
        with pytest.raises(TypeError, match=f"{name} must have the dtype of x"):
            RAW.primary(*{**args, name: args[name].half()}.values(), "relu")
        with pytest.raises(ValueError, match=f"{name} must be on the device of x"):
            RAW.primary(*{**args, name: args[name].to("meta")}.values(), "relu")

    @pytest.mark.parametrize("f", [fused, layers])
    def test_an_unknown_activation(self, f, surface):
        with pytest.raises(ValueError, match=r"activation must be one of relu, tanh, .*, got 'mish'"):
            surface(f("mish"), *make())

    @pytest.mark.parametrize("length", [0, 6, 9, 11])
    def test_a_mask_of_the_wrong_length(self, length, surface, fusing):
        with pytest.raises(ValueError, match="mask must have 10 entries"):
            surface(lambda *args: RAW.primary_grads(*args, [True] * length, "relu")[0], *reads(make()), *a_and_g())
        assert fusing.calls == []

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="backend must be one of"):
            RAW.primary(*make(), "relu", "none such", "auto")


def test_the_activation_of_a_module():
    known = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "silu": nn.SiLU(), "gelu": nn.GELU()}
    assert {activation_of(module): module for module in known.values()} == known
    assert set(known) == set(ACTIVATIONS)
    assert activation_of(nn.ReLU(inplace=True)) == "relu"
    x = torch.randn(100)
    for name, module in known.items():
        torch.testing.assert_close(ACTIVATIONS[name].forward(x), module(x), rtol=0, atol=0)
    of_another = type("Mine", (nn.ReLU,), {})()
    for module in (
        nn.GELU("tanh"),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.Identity(),
        nn.Dropout(),
        of_another,
        torch.relu,
        None,
    ):
        assert activation_of(module) is None


ELSEWHERE = {
    "another backend": lambda: fasthyper.use_backend("materialised"),
    "a schedule": lambda: fasthyper.use_backend("auto", "fold"),
    "forward mode": forward_ad.dual_level,
}


class Ours(TorchDispatchMode):
    """Which ops of fasthyper are called."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasthyper":
            self.ran.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


class TestFusing:
    @pytest.mark.parametrize("f", [fused, layers])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_it_is_called(self, f, dtype, activation, fusing, oracle):
        args, g = make(dtype=dtype), torch.randn(4, 2, 6, dtype=dtype)
        got = with_gradients(f(activation), args, g)
        assert fusing.ran == ["primary", "primary_grads"]
        truth = with_gradients(truth_of(oracle, activation), [t.double() for t in args], g)
        torch.testing.assert_close(got, tuple(t.to(dtype) for t in truth))

    def test_the_layers_are_as_given(self, fusing):
        args = make(absent=("bias1", "base_weight2"), requires_grad=True)
        layers("relu")(*args).sum().backward()
        for (first, second), lost in zip(fusing.layers, (0, 1), strict=True):
            expected = [*args[2:5], None if lost else args[5], *args[6:9], None if lost else args[9]]
            for got, t in zip((*first, *second), expected, strict=True):
                assert (got is None) == (t is None)
                assert got is None or got.data_ptr() == t.data_ptr()

    def test_a_is_what_backward_gets(self, fusing):
        args = make(requires_grad=True)
        y, a = RAW.primary(*args, "tanh")
        torch.testing.assert_close(a - fusing.mark, fasthyper.ops.reference.hyper_linear(*args[:6]))
        y.sum().backward()
        assert fusing.a.data_ptr() == a.data_ptr()

    @pytest.mark.parametrize("some", [*itertools.combinations(ALL, 1), *itertools.combinations(ALL, 9), (0, 1), (2, 6)])
    def test_the_mask_is_what_is_asked_for(self, some, fusing, oracle):
        args = [t.requires_grad_(k in some) for k, t in enumerate(make())]
        wanted = [args[k] for k in some]
        got = torch.autograd.grad((layers("tanh")(*args) ** 2).sum(), wanted)
        assert fusing.masks == [tuple(k in some for k in ALL)]
        torch.testing.assert_close(got, torch.autograd.grad((truth_of(oracle, "tanh")(*args) ** 2).sum(), wanted))

    def test_of_all_that_require_it_those_are_computed_that_are_asked_for(self, fusing):
        args = make(requires_grad=True)
        torch.autograd.grad(layers("tanh")(*args).sum(), [args[1], args[6]])
        assert fusing.masks == [tuple(k in (1, 6) for k in ALL)]

    def test_what_is_absent_is_not_asked_for(self, fusing):
        args = make(absent=("bias1", "base_bias2"), requires_grad=True)
        layers("tanh")(*args).sum().backward()
        assert fusing.masks == [tuple(name not in ("bias1", "base_bias2") for name in NAMES)]

    def test_what_is_not_asked_for_is_empty(self, fusing):
        out = RAW.primary_grads(*reads(make()), *a_and_g(), [k in (0, 6) for k in ALL], "relu")
        assert fusing.calls == ["fuses", "primary_grads"]
        assert [t.shape for t in out] == [(4, 2, 3), *[(0,)] * 5, (6, 7, 5), *[(0,)] * 3]

    def test_without_gradients(self, fusing, oracle):
        args = make(requires_grad=True)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = layers("tanh")(*args)
            torch.testing.assert_close(y, truth_of(oracle, "tanh")(*args).detach())
        assert fusing.calls.count("primary") == 2
        assert "primary_grads" not in fusing.calls

    def test_second_order_is_of_the_two_layers(self, fusing, oracle):
        """A backward that is differentiated is of the family; what is not is fused, and meets a gradient in `a` too."""
        fusing.mark = 0.0
        args = make(SMALL, requires_grad=True)

        def second(f):
            first = torch.autograd.grad((f(*args) ** 2).sum(), args, create_graph=True)
            return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), args)

        got = second(layers("tanh"))
        assert fusing.ran == ["primary", "primary_grads"]
        torch.testing.assert_close(got, second(truth_of(oracle, "tanh")))

    @pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,), (2, 1, 2)])
    def test_any_number_of_point_axes(self, shape, fusing, oracle):
        args = make(x=(4, *shape, 3))
        y = layers("tanh")(*args)
        rows = truth_of(oracle, "tanh")(args[0].reshape(4, torch.Size(shape).numel(), 3), *args[1:])
        torch.testing.assert_close(y, rows.reshape(4, *shape, 6))
        assert y.is_contiguous()
        assert "primary" in fusing.calls

    def test_autocast(self, fusing):
        args = make(dtype=torch.float32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layers("tanh")(*args)
        assert "primary" in fusing.calls
        assert {t.dtype for layer in fusing.layers[0] for t in layer} == {torch.bfloat16}
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert fusing.masks == [(True,) * 10]
        assert {t.grad.dtype for t in args} == {torch.float32}

    @pytest.mark.parametrize("f", [fused, layers])
    def test_the_choice_of_forward_holds_in_backward(self, f, fusing):
        args = make(requires_grad=True)
        y = f("tanh")(*args)
        with fasthyper.use_backend("materialised"):
            y.sum().backward()
            assert fusing.ran == ["primary", "primary_grads"]
            fusing.calls.clear()
            y = f("tanh")(*args)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
        assert fusing.calls == []

    def test_a_backward_is_one_op(self, fusing):
        """The gradient that a does not meet costs nothing."""
        args = make(requires_grad=True)
        with Ours() as ours:
            layers("tanh")(*args).sum().backward()
        assert ours.ran == [RAW.primary, RAW.primary_grads]

    def test_what_it_does_not_fuse_is_the_ops_of_the_layers(self, fusing):
        """And no op that keeps what is between the layers out of the sight of torch."""
        fusing.refused.add("tanh")
        args = make(requires_grad=True)
        with Ours() as ours:
            layers("tanh")(*args).sum().backward()
        assert ours.ran == [RAW.hyper_linear] * 2 + [RAW.hyper_linear_grads] * 2

    @pytest.mark.parametrize("f", [fused, layers])
    @pytest.mark.parametrize("where", ELSEWHERE)
    def test_where_it_is_not_called(self, f, where, fusing, oracle):
        args, g = make(), torch.randn(4, 2, 6)
        with ELSEWHERE[where]():
            got = with_gradients(f("tanh"), args, g)
        assert fusing.calls == []
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))

    @pytest.mark.parametrize("f", [fused, layers])
    @pytest.mark.parametrize("refused", ["tanh", 4])
    def test_what_it_does_not_fuse(self, f, refused, fusing, oracle):
        fusing.refused.add(refused)
        args, g = make(), torch.randn(4, 2, 6)
        got = with_gradients(f("tanh"), args, g)
        assert set(fusing.calls) == {"fuses"}
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))

    def test_a_backward_that_it_does_not_fuse(self, fusing, oracle):
        """Then the two layers have it, from the `a` that was kept."""
        fusing.mark = 0.0
        args = make(requires_grad=True)
        y = layers("tanh")(*args)
        fusing.refused.add("tanh")
        got = torch.autograd.grad(y.sum(), args)
        assert "primary_grads" not in fusing.calls
        torch.testing.assert_close(got, torch.autograd.grad(truth_of(oracle, "tanh")(*args).sum(), args))

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("f", [fused, layers])
    def test_transforms_see_the_two_layers(self, f, transform, fusing, oracle):
        args, make_ = make(TINY), TRANSFORMS[transform]
        torch.testing.assert_close(make_(f("tanh"))(*args), make_(truth_of(oracle, "tanh"))(*args))
        assert fusing.calls == []

    def test_a_compiler_sees_the_two_layers(self, fusing, compiled, oracle):
        args, g = make(), torch.randn(4, 2, 6)
        got = with_gradients(compiled(layers("tanh")), args, g)
        assert fusing.calls == []
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))

    def test_the_op_in_a_compiled_region(self, fusing, compiled, oracle):
        args, g = make(), torch.randn(4, 2, 6)
        got = with_gradients(compiled(fused("tanh")), args, g)
        assert fusing.calls == ["fuses", "primary", "fuses", "primary_grads"]
        torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))

    def test_a_subclass_of_tensor(self, fusing):
        class Mine(torch.Tensor):
            pass

        args = make()
        for k in (0, 1, 6):
            changed = [t.as_subclass(Mine) if i == k else t for i, t in enumerate(args)]
            layers("relu")(*changed)
        assert fusing.calls == []

    @pytest.mark.parametrize(("name", "shape"), WRONG[2:])
    def test_wrong_shapes_are_an_error_of_the_layers(self, name, shape, fusing):
        args = make(**{name: shape})
        with pytest.raises(ValueError, match="must have") as error:
            layers("tanh")(*args)
        with pytest.raises(ValueError, match="must have") as expected:
            one_by_one(args)
        assert str(error.value) == str(expected.value)
        assert fusing.calls == []

    @pytest.mark.parametrize("wrong", [None, [1.0], 3.0, torch.ones(4, 5).long(), torch.ones(4, 5, device="meta")])
    @pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 8])
    def test_what_is_no_right_tensor_is_an_error_of_the_layers(self, k, wrong, fusing):
        if wrong is None and k in (3, 8):
            pytest.skip("it may be absent")
        args = make(dtype=torch.float32)
        args[k] = wrong
        with pytest.raises((TypeError, ValueError), match=r".+") as error:
            layers("tanh")(*args)
        with pytest.raises((TypeError, ValueError), match=r".+") as expected:
            one_by_one(args)
        assert str(error.value) == str(expected.value)
        assert fusing.calls == []


def test_nothing_fuses_here():
    """No backend of the CPU does: the layers run, as always."""
    assert not fused_module.may_fuse(torch.ones(4, 3))
