"""Which calls a backend that fuses the two layers runs, and its arguments; other calls run layer by layer."""

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
    WRONG_SHAPES,
    a_and_g,
    arguments,
    layer_by_layer,
    primary_function,
    primary_op,
    read_by_backward,
    truth_of,
    with_gradients,
)

import fasthyper
from fasthyper import fused as fused_module

NEVER_FUSED = {
    "another backend": lambda: fasthyper.use_backend("materialised"),
    "a schedule": lambda: fasthyper.use_backend("auto", "fold"),
    "forward mode": forward_ad.dual_level,
}


class OpRecorder(TorchDispatchMode):
    """Records the ops of fasthyper that run."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasthyper":
            self.ran.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("f", [primary_op, primary_function])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_and_backward_are_fused(f, dtype, activation, fusing, oracle):
    args, g = arguments(dtype=dtype), torch.randn(4, 2, 6, dtype=dtype)
    got = with_gradients(f(activation), args, g)
    assert fusing.ran == ["primary", "primary_grads"]
    truth = with_gradients(truth_of(oracle, activation), [t.double() for t in args], g)
    torch.testing.assert_close(got, tuple(t.to(dtype) for t in truth))


def test_the_backend_gets_the_parameters_of_both_layers(fusing):
    args = arguments(absent=("bias1", "base_weight2"), requires_grad=True)
    primary_function("relu")(*args).sum().backward()
    for (first, second), in_backward in zip(fusing.layers, (False, True), strict=True):
        expected = [*args[2:5], None if in_backward else args[5], *args[6:9], None if in_backward else args[9]]
        for got, t in zip((*first, *second), expected, strict=True):
            assert (got is None) == (t is None)
            assert got is None or got.data_ptr() == t.data_ptr()


def test_backward_gets_the_pre_activation_of_forward(fusing):
    args = arguments(requires_grad=True)
    y, a = RAW.primary(*args, "tanh")
    torch.testing.assert_close(a - fusing.mark, fasthyper.ops.reference.hyper_linear(*args[:6]))
    y.sum().backward()
    assert fusing.a.data_ptr() == a.data_ptr()


@pytest.mark.parametrize("some", [*itertools.combinations(ALL, 1), *itertools.combinations(ALL, 9), (0, 1), (2, 6)])
def test_the_mask_holds_the_arguments_that_require_gradients(some, fusing, oracle):
    args = [t.requires_grad_(k in some) for k, t in enumerate(arguments())]
    wanted = [args[k] for k in some]
    got = torch.autograd.grad((primary_function("tanh")(*args) ** 2).sum(), wanted)
    assert fusing.masks == [tuple(k in some for k in ALL)]
    torch.testing.assert_close(got, torch.autograd.grad((truth_of(oracle, "tanh")(*args) ** 2).sum(), wanted))


def test_only_gradients_asked_for_are_computed(fusing):
    args = arguments(requires_grad=True)
    torch.autograd.grad(primary_function("tanh")(*args).sum(), [args[1], args[6]])
    assert fusing.masks == [tuple(k in (1, 6) for k in ALL)]


def test_absent_parameters_are_not_in_the_mask(fusing):
    args = arguments(absent=("bias1", "base_bias2"), requires_grad=True)
    primary_function("tanh")(*args).sum().backward()
    assert fusing.masks == [tuple(name not in ("bias1", "base_bias2") for name in NAMES)]


def test_gradients_outside_the_mask_are_empty(fusing):
    out = RAW.primary_grads(*read_by_backward(arguments()), *a_and_g(), [k in (0, 6) for k in ALL], "relu")
    assert fusing.calls == ["fuses", "primary_grads"]
    assert [t.shape for t in out] == [(4, 2, 3), *[(0,)] * 5, (6, 7, 5), *[(0,)] * 3]


def test_forward_is_fused_without_gradients(fusing, oracle):
    args = arguments(requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = primary_function("tanh")(*args)
        torch.testing.assert_close(y, truth_of(oracle, "tanh")(*args).detach())
    assert fusing.calls.count("primary") == 2
    assert "primary_grads" not in fusing.calls


def test_backward_with_create_graph_runs_the_two_layers(fusing, oracle):
    """The second backward, without create_graph, is fused, and has a gradient of `a`, too."""
    fusing.mark = 0.0
    args = arguments(SMALL, requires_grad=True)

    def second(f):
        first = torch.autograd.grad((f(*args) ** 2).sum(), args, create_graph=True)
        return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), args)

    got = second(primary_function("tanh"))
    assert fusing.ran == ["primary", "primary_grads"]
    torch.testing.assert_close(got, second(truth_of(oracle, "tanh")))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,), (2, 1, 2)])
def test_any_number_of_point_axes(shape, fusing, oracle):
    args = arguments(x=(4, *shape, 3))
    y = primary_function("tanh")(*args)
    truth = truth_of(oracle, "tanh")(args[0].reshape(4, torch.Size(shape).numel(), 3), *args[1:])
    torch.testing.assert_close(y, truth.reshape(4, *shape, 6))
    assert y.is_contiguous()
    assert "primary" in fusing.calls


def test_autocast_is_fused(fusing):
    args = arguments(dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = primary_function("tanh")(*args)
    assert "primary" in fusing.calls
    assert {t.dtype for layer in fusing.layers[0] for t in layer} == {torch.bfloat16}
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert fusing.masks == [(True,) * 10]
    assert {t.grad.dtype for t in args} == {torch.float32}


@pytest.mark.parametrize("f", [primary_op, primary_function])
def test_the_choice_of_forward_holds_in_backward(f, fusing):
    args = arguments(requires_grad=True)
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
    """Where the loss does not read a, no op runs for its gradient."""
    args = arguments(requires_grad=True)
    with OpRecorder() as recorder:
        primary_function("tanh")(*args).sum().backward()
    assert recorder.ran == [RAW.primary, RAW.primary_grads]


def test_a_refused_call_runs_the_ops_of_the_layers(fusing):
    """It does not run as one op, so that torch sees the operations between the layers."""
    fusing.refused.add("tanh")
    args = arguments(requires_grad=True)
    with OpRecorder() as recorder:
        primary_function("tanh")(*args).sum().backward()
    assert recorder.ran == [RAW.hyper_linear] * 2 + [RAW.hyper_linear_grads] * 2


@pytest.mark.parametrize("f", [primary_op, primary_function])
@pytest.mark.parametrize("context", NEVER_FUSED.values(), ids=NEVER_FUSED)
def test_calls_that_are_never_fused(f, context, fusing, oracle):
    args, g = arguments(), torch.randn(4, 2, 6)
    with context():
        got = with_gradients(f("tanh"), args, g)
    assert fusing.calls == []
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


@pytest.mark.parametrize("f", [primary_op, primary_function])
@pytest.mark.parametrize("refused", ["tanh", 4])
def test_a_backend_may_refuse_a_call(f, refused, fusing, oracle):
    fusing.refused.add(refused)
    args, g = arguments(), torch.randn(4, 2, 6)
    got = with_gradients(f("tanh"), args, g)
    assert set(fusing.calls) == {"fuses"}
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


def test_a_backend_may_refuse_a_backward(fusing, oracle):
    """The two layers run it, from the `a` that forward saved."""
    fusing.mark = 0.0
    args = arguments(requires_grad=True)
    y = primary_function("tanh")(*args)
    fusing.refused.add("tanh")
    got = torch.autograd.grad(y.sum(), args)
    assert "primary_grads" not in fusing.calls
    torch.testing.assert_close(got, torch.autograd.grad(truth_of(oracle, "tanh")(*args).sum(), args))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("f", [primary_op, primary_function])
def test_transforms_see_the_two_layers(f, transform, fusing, oracle):
    args = arguments(TINY)
    torch.testing.assert_close(transform(f("tanh"))(*args), transform(truth_of(oracle, "tanh"))(*args))
    assert fusing.calls == []


def test_a_compiler_sees_the_two_layers(fusing, compiled, oracle):
    args, g = arguments(), torch.randn(4, 2, 6)
    got = with_gradients(compiled(primary_function("tanh")), args, g)
    assert fusing.calls == []
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


def test_the_op_is_fused_in_a_compiled_region(fusing, compiled, oracle):
    args, g = arguments(), torch.randn(4, 2, 6)
    got = with_gradients(compiled(primary_op("tanh")), args, g)
    assert fusing.calls == ["fuses", "primary", "fuses", "primary_grads"]
    torch.testing.assert_close(got, with_gradients(truth_of(oracle, "tanh"), args, g))


def test_a_subclass_of_tensor_is_not_fused(fusing):
    class Mine(torch.Tensor):
        pass

    args = arguments()
    for k in (0, 1, 6):
        changed = [t.as_subclass(Mine) if i == k else t for i, t in enumerate(args)]
        primary_function("relu")(*changed)
    assert fusing.calls == []


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES[2:])
def test_wrong_shapes_raise_the_error_of_the_layers(name, shape, fusing):
    args = arguments(**{name: shape})
    with pytest.raises(ValueError, match="must have") as error:
        primary_function("tanh")(*args)
    with pytest.raises(ValueError, match="must have") as expected:
        layer_by_layer(args)
    assert str(error.value) == str(expected.value)
    assert fusing.calls == []


@pytest.mark.parametrize("wrong", [None, [1.0], 3.0, torch.ones(4, 5).long(), torch.ones(4, 5, device="meta")])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 8])
def test_wrong_arguments_raise_the_error_of_the_layers(k, wrong, fusing):
    if wrong is None and k in (3, 8):
        pytest.skip("it may be absent")
    args = arguments(dtype=torch.float32)
    args[k] = wrong
    with pytest.raises((TypeError, ValueError), match=r".+") as error:
        primary_function("tanh")(*args)
    with pytest.raises((TypeError, ValueError), match=r".+") as expected:
        layer_by_layer(args)
    assert str(error.value) == str(expected.value)
    assert fusing.calls == []


def test_no_backend_of_the_processor_fuses():
    assert not fused_module.may_fuse(torch.ones(4, 3))
