"""Wrong arguments of the ops: one clear error that names the argument and both shapes, in eager and fake mode."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fasthyper

RAW = torch.ops.fasthyper
INPUTS = {
    "apply": ("x", "z", "weight"),
    "cond_grad": ("x", "g", "weight"),
    "weight_grad": ("x", "z", "g"),
    "grads": ("x", "z", "weight", "g"),
}
SHAPES = {"x": (4, 2, 3), "z": (4, 5), "weight": (6, 3, 5), "g": (4, 2, 6)}


def call(op: str, surface: str, args: dict[str, torch.Tensor]):
    tensors = [args[name] for name in INPUTS[op]]
    if surface == "public":
        return getattr(fasthyper.ops, op)(*tensors)
    return getattr(RAW, op)(*tensors, *([[True] * 3] if op == "grads" else []))


def make(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in {**SHAPES, **shapes}.items()}


@pytest.fixture(params=["public", "raw", "fake"])
def surface(request):
    """Return the public function, the raw op, or the raw op on fake tensors, as torch.compile traces it."""
    if request.param == "fake":
        with FakeTensorMode():
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("op", INPUTS)
def test_right_arguments_pass(op, surface):
    out = call(op, surface, make())
    shapes = [t.shape for t in out] if op == "grads" else [out.shape]
    results = {"apply": ["g"], "cond_grad": ["z"], "weight_grad": ["weight"], "grads": ["x", "z", "weight"]}
    assert shapes == [SHAPES[name] for name in results[op]]


WRONG_SIZES = [
    ("z", (3, 5), "x"),
    ("z", (1, 5), "x"),
    ("x", (1, 2, 3), "z"),
    ("weight", (6, 2, 5), "x"),
    ("weight", (6, 1, 5), "x"),
    ("weight", (6, 3, 1), "z"),
    ("weight", (1, 3, 5), "g"),
    ("g", (4, 1, 6), "x"),
    ("g", (3, 2, 6), "x"),
    ("g", (4, 2, 1), "weight"),
    ("x", (4, 2, 0), "weight"),
    ("z", (0, 5), "x"),
]


@pytest.mark.parametrize(
    ("op", "name", "shape", "other"),
    [(op, *wrong) for op, names in INPUTS.items() for wrong in WRONG_SIZES if {wrong[0], wrong[2]} <= set(names)],
)
def test_sizes_that_disagree_raise(op, name, shape, other, surface):
    args = make(**{name: shape})
    with pytest.raises(ValueError, match=r".+") as error:
        call(op, surface, args)
    message = str(error.value)
    for argument in (name, other):
        assert re.search(rf"\b{argument}\b", message), message
        assert str(tuple(args[argument].shape)) in message


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in INPUTS.items() for name in names])
@pytest.mark.parametrize("more", [-1, 1])
def test_wrong_ranks(op, name, more, surface):
    shape = SHAPES[name][:-1] if more < 0 else (*SHAPES[name], 1)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(.*got {re.escape(str(shape))}"):
        call(op, surface, make(**{name: shape}))


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_not_floating_point(op, dtype, surface):
    args = {name: t.to(dtype) for name, t in make().items()}
    with pytest.raises(TypeError, match=rf"x must be floating point, got shape \(4, 2, 3\) of {dtype}"):
        call(op, surface, args)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_mixed_dtypes(op, dtype, surface):
    name = INPUTS[op][-1]
    args = make()
    args[name] = args[name].to(dtype)
    with pytest.raises(TypeError, match=rf"{name} must .*{re.escape(str(SHAPES[name]))}.*{dtype}"):
        call(op, surface, args)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("surface", ["public", "raw"])
def test_mixed_devices(op, surface):
    for name in INPUTS[op]:
        args = make()
        args[name] = args[name].to("meta")
        with pytest.raises(ValueError, match=r"must be on the device of x: .*(cpu.*meta|meta.*cpu)") as error:
            call(op, surface, args)
        assert str(SHAPES[name]) in str(error.value)


@pytest.mark.parametrize("mask", [(), (True,), (True,) * 2, (True,) * 4])
def test_a_mask_of_the_wrong_length(mask, surface):
    args = [make()[name] for name in INPUTS["grads"]]
    grads = fasthyper.ops.grads if surface == "public" else RAW.grads
    with pytest.raises(ValueError, match="mask"):
        grads(*args, list(mask))


@pytest.mark.parametrize("op", INPUTS)
def test_a_raw_op_with_an_unknown_backend_or_schedule(op):
    args = [make()[name] for name in INPUTS[op]] + ([[True] * 3] if op == "grads" else [])
    with pytest.raises(ValueError, match=r"backend must be one of .*aten.*, got 'none such'"):
        getattr(RAW, op)(*args, "none such", "auto")
    for backend in ("aten", "materialised", "auto"):
        with pytest.raises(ValueError, match=r"schedule must be one of .*fold.*, got 'none such'"):
            getattr(RAW, op)(*args, backend, "none such")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("bias", (6, 1)), ("bias", (1, 5)), ("bias", (6,)), ("base_weight", (6, 1)), ("base_weight", (3, 6)),
     ("base_weight", (1, 6, 3)), ("base_bias", (1,)), ("base_bias", ()), ("base_bias", (6, 1))],
)  # fmt: skip
def test_the_raw_affine_ops_never_broadcast(name, shape, surface):
    args = make()
    optional = dict.fromkeys(("bias", "base_weight", "base_bias"))
    optional[name] = torch.randn(shape)
    with pytest.raises(ValueError, match=rf"{name} must have shape .*{re.escape(str(shape))}"):
        RAW.hyper_linear(args["x"], args["z"], args["weight"], *optional.values())
    if name != "base_bias":
        bias, base_weight = optional["bias"], optional["base_weight"]
        with pytest.raises(ValueError, match=rf"{name} must have shape .*{re.escape(str(shape))}"):
            RAW.hyper_linear_grads(args["x"], args["z"], args["weight"], bias, base_weight, args["g"], [True] * 6)


@pytest.mark.parametrize(("name", "shape", "other"), [w for w in WRONG_SIZES if "g" not in (w[0], w[2])])
def test_the_raw_affine_op_checks_its_factors(name, shape, other, surface):
    args = make(**{name: shape})
    with pytest.raises(ValueError, match=rf"\b({name}|{other})\b.*\b({name}|{other})\b"):
        RAW.hyper_linear(args["x"], args["z"], args["weight"], None, None, None)


def test_not_a_tensor():
    args = make()
    with pytest.raises(TypeError, match="z must be a tensor, got list"):
        fasthyper.ops.apply(args["x"], [1.0], args["weight"])


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_required_tensor_is_not_left_out(op, device):
    """torch passes None for a tensor: without a check, kernels would read it."""
    for name in INPUTS[op]:
        args = {key: t.to(device) for key, t in make().items()}
        args[name] = None
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
            call(op, "raw", args)


def test_hyper_linear_grads_checks_before_it_reads():
    args = make()
    right = (args["x"], args["z"], args["weight"], None, None, args["g"], [True] * 6)
    for place, name in enumerate(("x", "z", "weight")):
        wrong = list(right)
        wrong[place] = None
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
            RAW.hyper_linear_grads(*wrong)
    with pytest.raises(ValueError, match="x must have shape"):
        RAW.hyper_linear_grads(torch.randn(2), *right[1:])


@pytest.mark.parametrize(("op", "name", "shape"), [
    ("apply", "x", (4, 3)), ("apply", "x", (4, 2, 1)), ("apply", "z", (1, 5)), ("cond_grad", "g", (4, 1, 6)),
    ("weight_grad", "z", (4,)), ("weight_grad", "g", (4, 2)),
])  # fmt: skip
@pytest.mark.parametrize("batch", [0, 3])
def test_vmap_checks_the_shapes_of_one_call(op, name, shape, batch):
    args = make(**{name: shape})
    dims = tuple(0 if key == name else None for key in INPUTS[op])
    args[name] = args[name].expand(batch, *shape)
    with pytest.raises(ValueError, match=rf"must have shape \(.*got {re.escape(str(shape))}"):
        torch.func.vmap(getattr(fasthyper.ops, op), in_dims=dims)(*(args[key] for key in INPUTS[op]))
