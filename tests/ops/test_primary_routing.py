"""Which calls of a primary network a backend that fuses two layers runs, and what it gets; all others run as layers."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from two_layers import (
    ALL,
    NAMES,
    RAW,
    SMALL,
    TINY,
    TRANSFORMS,
    WRONG,
    a_and_g,
    fused,
    layers,
    make,
    one_by_one,
    reads,
    truth_of,
    with_gradients,
)

import fasthyper
from fasthyper import fused as fused_module

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


@pytest.mark.parametrize("f", [fused, layers])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_called(f, dtype, activation, fusing, oracle):
    args, g = make(dtype=dtype), torch.randn(4, 2, 6, dtype=dtype)
    got = with_gradients(f(activation), args, g)
    assert fusing.ran == ["primary", "primary_grads"]
    truth = with_gradients(truth_of(oracle, activation), [t.double() for t in args], g)
    torch.testing.assert_close(got, tuple(t.to(dtype) for t in truth))


def test_the_layers_are_as_given(fusing):
    args = make(absent=("bias1", "base_weight2"), requires_grad=True)
    layers("relu")(*args).sum().backward()
    for (first, second), lost in zip(fusing.layers, (0, 1), strict=True):
        expected = [*args[2:5], None if lost else args[5], *args[6:9], None if lost else args[9]]
        for got, t in zip((*first, *second), expected, strict=True):
            assert (got is None) == (t is None)
            assert got is None or got.data_ptr() == t.data_ptr()


def test_a_is_what_backward_gets(fusing):
    args = make(requires_grad=True)
    y, a = RAW.primary(*args, "tanh")
    torch.testing.assert_close(a - fusing.mark, fasthyper.ops.reference.hyper_linear(*args[:6]))
    y.sum().backward()
    assert fusing.a.data_ptr() == a.data_ptr()


@pytest.mark.parametrize("some", [*itertools.combinations(ALL, 1), *itertools.combinations(ALL, 9), (0, 1), (2, 6)])
def test_the_mask_is_what_is_asked_for(some, fusing, oracle):
    args = [t.requires_grad_(k in some) for k, t in enumerate(make())]
    wanted = [args[k] for k in some]
    got = torch.autograd.grad((layers("tanh")(*args) ** 2).sum(), wanted)
    assert fusing.masks == [tuple(k in some for k in ALL)]
    torch.testing.assert_close(got, torch.autograd.grad((truth_of(oracle, "tanh")(*args) ** 2).sum(), wanted))


def test_of_all_that_require_it_those_are_computed_that_are_asked_for(fusing):
    args = make(requires_grad=True)
    torch.autograd.grad(layers("tanh")(*args).sum(), [args[1], args[6]])
    assert fusing.masks == [tuple(k in (1, 6) for k in ALL)]


def test_what_is_absent_is_not_asked_for(fusing):
    args = make(absent=("bias1", "base_bias2"), requires_grad=True)
    layers("tanh")(*args).sum().backward()
    assert fusing.masks == [tuple(name not in ("bias1", "base_bias2") for name in NAMES)]


def test_what_is_not_asked_for_is_empty(fusing):
    out = RAW.primary_grads(*reads(make()), *a_and_g(), [k in (0, 6) for k in ALL], "relu")
    assert fusing.calls == ["fuses", "primary_grads"]
    assert [t.shape for t in out] == [(4, 2, 3), *[(0,)] * 5, (6, 7, 5), *[(0,)] * 3]


def test_without_gradients(fusing, oracle):
    args = make(requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layers("tanh")(*args)
        torch.testing.assert_close(y, truth_of(oracle, "tanh")(*args).detach())
    assert fusing.calls.count("primary") == 2
    assert "primary_grads" not in fusing.calls


def test_second_order_is_of_the_two_layers(fusing, oracle):
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
def test_any_number_of_point_axes(shape, fusing, oracle):
    args = make(x=(4, *shape, 3))
    y = layers("tanh")(*args)
    rows = truth_of(oracle, "tanh")(args[0].reshape(4, torch.Size(shape).numel(), 3), *args[1:])
    torch.testing.assert_close(y, rows.reshape(4, *shape, 6))
    assert y.is_contiguous()
    assert "primary" in fusing.calls


def test_autocast(fusing):
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
def test_the_choice_of_forward_holds_in_backward(f, fusing):
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


def test_a_backward_is_one_op(fusing):
    """The gradient that a does not meet costs nothing."""
    args = make(requires_grad=True)
    with Ours() as ours:
        layers("tanh")(*args).sum().backward()
    assert ours.ran == [RAW.primary, RAW.primary_grads]


def test_what_it_does_not_fuse_is_the_ops_of_the_layers(fusing):
    """And no op that keeps what is between the layers out of the sight of torch."""
    fusing.refused.add("tanh")
    args = make(requires_grad=True)
    with Ours() as ours:
        layers("tanh")(*args).sum().backward()
    assert ours.ran == [RAW.hyper_linear] * 2 + [RAW.hyper_linear_grads] * 2


@pytest.mark.parametrize("f", [fused, layers])
@pytest.mark.parametrize("where", ELSEWHERE)
def test_where_it_is_not_called(f, where, fusing, oracle):
    args, g = make(), torch.randn(4, 2, 6)
    with ELSEWHERE[where]():
        got = with_gradients(f("tanh"), args, g)
    assert fusing.calls == []
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


@pytest.mark.parametrize("f", [fused, layers])
@pytest.mark.parametrize("refused", ["tanh", 4])
def test_what_it_does_not_fuse(f, refused, fusing, oracle):
    fusing.refused.add(refused)
    args, g = make(), torch.randn(4, 2, 6)
    got = with_gradients(f("tanh"), args, g)
    assert set(fusing.calls) == {"fuses"}
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


def test_a_backward_that_it_does_not_fuse(fusing, oracle):
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
def test_transforms_see_the_two_layers(f, transform, fusing, oracle):
    args, make_ = make(TINY), TRANSFORMS[transform]
    torch.testing.assert_close(make_(f("tanh"))(*args), make_(truth_of(oracle, "tanh"))(*args))
    assert fusing.calls == []


def test_a_compiler_sees_the_two_layers(fusing, compiled, oracle):
    args, g = make(), torch.randn(4, 2, 6)
    got = with_gradients(compiled(layers("tanh")), args, g)
    assert fusing.calls == []
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


def test_the_op_in_a_compiled_region(fusing, compiled, oracle):
    args, g = make(), torch.randn(4, 2, 6)
    got = with_gradients(compiled(fused("tanh")), args, g)
    assert fusing.calls == ["fuses", "primary", "fuses", "primary_grads"]
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


def test_a_subclass_of_tensor(fusing):
    class Mine(torch.Tensor):
        pass

    args = make()
    for k in (0, 1, 6):
        changed = [t.as_subclass(Mine) if i == k else t for i, t in enumerate(args)]
        layers("relu")(*changed)
    assert fusing.calls == []


@pytest.mark.parametrize(("name", "shape"), WRONG[2:])
def test_wrong_shapes_are_an_error_of_the_layers(name, shape, fusing):
    args = make(**{name: shape})
    with pytest.raises(ValueError, match="must have") as error:
        layers("tanh")(*args)
    with pytest.raises(ValueError, match="must have") as expected:
        one_by_one(args)
    assert str(error.value) == str(expected.value)
    assert fusing.calls == []


@pytest.mark.parametrize("wrong", [None, [1.0], 3.0, torch.ones(4, 5).long(), torch.ones(4, 5, device="meta")])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 8])
def test_what_is_no_right_tensor_is_an_error_of_the_layers(k, wrong, fusing):
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
