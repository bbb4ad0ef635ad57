"""hyper_linear: values, shapes, errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasthyper
from fasthyper import hyper_linear

SIZE = st.sampled_from([0, 1, 2, 3, 5, 7])


def affine(x, z, weight, bias, base_weight, base_bias):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


def rounded(oracle):
    return lambda *ts: [oracle.linear(*(t.detach().double() for t in ts))]


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "swapped", "sliced", "expanded"])
def test_values_and_gradients(strides, how, dtype, factors, oracle):
    args = factors(dtype=dtype, names=factors.AFFINE, strides=strides, requires_grad=True)
    with fasthyper.use_backend(*how):
        y = affine(*args)
    g = factors(dtype=dtype, names=("g",), strides=strides)[0]
    oracle.check_all([y], rounded(oracle), *args)
    oracle.check_all(torch.autograd.grad(y, args, g), oracle.linear_grads, *args[:5], g)


@pytest.mark.parametrize("present", range(8))
def test_any_of_bias_and_base(present, how, factors, oracle):
    x, z, weight, *rest = factors(names=factors.AFFINE, requires_grad=True)
    rest = [t if present >> k & 1 else None for k, t in enumerate(rest)]
    given_ = [t for t in (x, z, weight, *rest) if t is not None]
    with fasthyper.use_backend(*how):
        y = affine(x, z, weight, *rest)
    truth = oracle.linear(x, z, weight, *rest)
    torch.testing.assert_close(y, truth)
    got, expected = (torch.autograd.grad((t**2).sum(), given_) for t in (y, truth))
    torch.testing.assert_close(got, expected)


@given(batch=SIZE, points=st.lists(SIZE, max_size=3), sizes=st.tuples(SIZE, SIZE, SIZE))
@settings(max_examples=60)
def test_any_shape(batch, points, sizes, oracle):
    torch.manual_seed(0)
    R, I, O = sizes
    shapes = ((batch, *points, I), (batch, R), (O, I, R), (O, R), (O, I), (O,))
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    x, *rest = args
    y = affine(*args)
    assert y.shape == (batch, *points, O)
    assert y.is_contiguous()
    rows = 1
    for n in points:
        rows *= n
    truth = oracle.linear(x.reshape(batch, rows, I), *rest).reshape(y.shape)
    torch.testing.assert_close(y, truth)
    got, expected = (torch.autograd.grad((t**2).sum(), args) for t in (y, truth))
    torch.testing.assert_close(got, expected)


def test_points_in_any_order_of_axes(factors, oracle):
    """x of images, channels moved last: a reshape cannot be a view with these strides."""
    _, z, weight, *rest = factors(names=factors.AFFINE)
    images = torch.randn(4, 3, 5, 7, dtype=torch.float64)
    for x in (images.movedim(1, -1), images.permute(0, 3, 2, 1)):
        truth = oracle.linear(x.reshape(4, 35, 3), z, weight, *rest).reshape(*x.shape[:-1], 6)
        torch.testing.assert_close(affine(x, z, weight, *rest), truth)


def test_one_z_for_the_whole_batch(factors, oracle):
    x, z, weight, _ = factors((8, 1, 5, 3, 6))
    got = hyper_linear(x[:, 0][None], z[:1], weight)[0]
    torch.testing.assert_close(got, oracle.linear(x, z[:1].expand_as(z), weight)[:, 0])


def test_equals_linear_if_z_is_one(factors):
    """With R = 1 and z = 1, hyper_linear is nn.functional.linear."""
    x, w, b = torch.randn(7, 3).double(), torch.randn(6, 3).double(), torch.randn(6).double()
    z = torch.ones(7, 1, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, w, b)
    torch.testing.assert_close(hyper_linear(x, z, w[:, :, None], b[:, None]), expected)
    zero = torch.zeros(6, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(hyper_linear(x, z, zero, base_weight=w, base_bias=b), expected)


SHAPES = {
    "x": (4, 3), "z": (4, 5), "weight": (6, 3, 5), "bias": (6, 5), "base_weight": (6, 3), "base_bias": (6,),
}  # fmt: skip


def call(**changed):
    args = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return hyper_linear(**{**args, **changed})


WRONG = [
    ("x", (3,), "x must have shape"),
    ("x", (), "x must have shape"),
    ("x", (1,), "x must have shape"),
    ("x", (4, 2), "x must have I = 3"),
    ("x", (4, 1), "x must have I = 3"),
    ("x", (4, 7, 0), "x must have I = 3"),
    ("x", (3, 3), "z must have shape"),
    ("x", (1, 3), "z must have shape"),
    ("z", (3, 5), "z must have shape"),
    ("z", (0, 5), "z must have shape"),
    ("z", (4, 1, 5), "z must have shape"),
    ("z", (4, 4), "z must have R = 5"),
    ("z", (4, 1), "z must have R = 5"),
    ("weight", (18, 5), "weight must have shape"),
    ("weight", (6, 3, 5, 1), "weight must have shape"),
    ("weight", (6, 2, 5), "x must have I = 2"),
    ("weight", (6, 3, 1), "z must have R = 1"),
    ("bias", (6, 1), "bias must have shape"),
    ("bias", (6,), "bias must have shape"),
    ("bias", (1, 5), "bias must have shape"),
    ("base_weight", (3, 6), "base_weight must have shape"),
    ("base_weight", (1, 3), "base_weight must have shape"),
    ("base_weight", (6, 3, 1), "base_weight must have shape"),
    ("base_bias", (1,), "base_bias must have shape"),
    ("base_bias", (), "base_bias must have shape"),
    ("base_bias", (6, 1), "base_bias must have shape"),
]


def test_right_arguments_pass():
    assert call().shape == (4, 6)


@pytest.mark.parametrize(("name", "shape", "message"), WRONG)
def test_wrong_shapes(name, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(**{name: torch.randn(shape)})
    said = str(error.value)
    assert str(tuple(shape)) in said


@pytest.mark.parametrize(("name", "shape", "other"), [
    ("x", (4, 2), "weight"), ("z", (3, 5), "x"), ("z", (4, 4), "weight"), ("bias", (6, 1), "weight"),
    ("base_weight", (3, 6), "weight"), ("base_bias", (1,), "weight"),
])  # fmt: skip
def test_both_shapes_are_named(name, shape, other):
    with pytest.raises(ValueError, match=re.escape(str(shape))) as error:
        call(**{name: torch.randn(shape)})
    for said in (name, other, str(SHAPES[other])):
        assert said in str(error.value)


@pytest.mark.parametrize(("shape", "fix"), [((5,), "z[None]"), ((1, 5), "x[None] and z:")])
def test_a_z_shared_by_the_whole_batch(shape, fix):
    with pytest.raises(ValueError, match=r"x\[None\]") as error:
        call(z=torch.randn(shape))
    for said in (fix, str(shape), "(4, 3)"):
        assert said in str(error.value)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "x"])
def test_mixed_devices(name):
    with pytest.raises(ValueError, match=f"{name} must be on the device of x") as error:
        call(**{name: torch.randn(SHAPES[name], device="meta")})
    for said in ("cpu", "meta", str(SHAPES[name]), str(SHAPES["x"])):
        assert said in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "x"])
def test_mixed_dtypes(name, dtype):
    with pytest.raises(TypeError, match=f"{name} must have the dtype of x") as error:
        call(**{name: torch.randn(SHAPES[name], dtype=dtype)})
    for said in (str(dtype), "torch.float32", str(SHAPES[name]), str(SHAPES["x"])):
        assert said in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_not_floating_point(name, dtype, autocast):
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=f"{name} must be floating point.*{re.escape(str(SHAPES[name]))}.*{dtype}"),
    ):
        call(**{name: torch.ones(SHAPES[name]).to(dtype)})


@pytest.mark.parametrize("wrong", [[1.0], 3.0, "x"])
@pytest.mark.parametrize("name", SHAPES)
def test_not_a_tensor(name, wrong):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(wrong).__name__}"):
        call(**{name: wrong})


@pytest.mark.parametrize("name", ["x", "z", "weight"])
def test_required_arguments(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        call(**{name: None})


def test_base_weight_and_base_bias_are_keyword_only():
    args = [torch.randn(shape) for shape in SHAPES.values()]
    with pytest.raises(TypeError, match="positional"):
        hyper_linear(*args)


@pytest.mark.parametrize("limit", [0, -1, (1 << 20) - 1])
def test_a_workspace_limit_too_small(limit):
    with pytest.raises(ValueError, match=rf"limit must be at least 1048576 bytes.*{limit}"):
        fasthyper.set_workspace_limit(limit)
    assert fasthyper.get_workspace_limit() == 32 << 20


@pytest.mark.parametrize("limit", [2.0e7, "32 MiB", None, True])
def test_a_workspace_limit_of_another_type(limit):
    with pytest.raises(TypeError, match="limit must be an integer"):
        fasthyper.set_workspace_limit(limit)
    assert fasthyper.get_workspace_limit() == 32 << 20


def test_x_of_one_axis_is_refused_where_it_would_fit():
    with pytest.raises(ValueError, match=r"x must have shape .*got \(1,\)"):
        hyper_linear(torch.ones(1), torch.ones(1, 5), torch.ones(7, 1, 5))


def test_wrong_shapes_can_be_caught_in_compiled_code():
    def guarded(x, z, weight):
        try:
            return hyper_linear(x, z, weight)
        except ValueError:
            return x * 0

    x = torch.randn(4, 3)
    compiled = torch.compile(guarded, backend="eager", fullgraph=True)
    assert not compiled(x, torch.randn(1, 5), torch.randn(6, 3, 5)).any()


def test_one_error_says_what_is_wrong():
    with pytest.raises(ValueError, match="bias must have shape") as error:
        call(bias=torch.randn(6, 1))
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
