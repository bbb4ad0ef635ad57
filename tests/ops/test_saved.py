"""What the ops save for backward: the arguments that the gradients of a call may read, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fasthyper
from fasthyper import hyper_linear
from fasthyper.nn import HyperLinear, PairwiseBilinear
from fasthyper.ops import mapped, primary, rules

NAMES = ("x", "z", "weight", "bias", "base_weight", "base_bias")
B, N, R, I, O, K, SIDE = 7, 5, 17, 11, 13, 3, 4
SHAPES = {"x": (B, N, I), "z": (B, R), "weight": (O, I, R), "bias": (O, R), "base_weight": (O, I), "base_bias": (O,)}
CONV_SHAPES = {
    **SHAPES,
    "x": (B, I, SIDE, SIDE),
    "weight": (O, I, K, K, R),
    "base_weight": (O, I, K, K),
}
SUBSETS = range(64)


class Kept:
    """Collects the tensors that are saved for backward, without views of them."""

    def __enter__(self) -> list[Tensor]:
        self.tensors: list[Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self.tensors

    def __exit__(self, *exc: object) -> None:
        self.hooks.__exit__(*exc)

    def pack(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t


def arguments(shapes, some: int, dtype=torch.float64) -> dict[str, Tensor]:
    """Return arguments, of which those in the bits of `some` require gradients."""
    torch.manual_seed(0)
    return {
        name: torch.randn(shape, dtype=dtype).requires_grad_(bool(some >> k & 1))
        for k, (name, shape) in enumerate(shapes.items())
    }


def kept_names(f, args: dict[str, Tensor]) -> tuple[Tensor, set[str]]:
    """Return the output of a call, and the names of the arguments whose memory is saved."""
    with Kept() as kept:
        y = f(**args)
    by_memory = {t.data_ptr(): name for name, t in args.items()}
    return y, {by_memory.get(t.data_ptr(), f"a tensor {tuple(t.shape)}") for t in kept}


def linear(x, z, weight, bias, base_weight, base_bias) -> Tensor:
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


def over_terms(x, z, weight, bias, base_weight, base_bias) -> Tensor:
    incidence = fasthyper.Incidence(source=torch.arange(B).flip(0), cond=torch.arange(B), target=torch.arange(B) % 3)
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias, incidence=incidence)


def with_map(x, z, weight, bias, base_weight, base_bias) -> Tensor:
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias, weight_map="tanh")


def convolution(x, z, weight, bias, base_weight, base_bias) -> Tensor:
    return fasthyper.hyper_conv2d(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias, padding=1)


FORMS = {
    "linear": (linear, SHAPES, rules.READS),
    "over terms": (over_terms, SHAPES, rules.READS),
    "mapped": (with_map, SHAPES, mapped._READS),
    "convolution": (convolution, CONV_SHAPES, rules.READS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", SUBSETS)
def test_only_what_the_gradients_of_a_call_read_is_saved(some, form, dtype):
    f, shapes, reads = FORMS[form]
    args = arguments(shapes, some, dtype)
    for _ in range(3):  # the second call of a problem does not enter Python
        _, kept = kept_names(f, args)
        trained = [name for name, t in args.items() if t.requires_grad]
        assert kept - {"a tensor (7,)"} == {other for name in trained for other in reads[name]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", SUBSETS[1:])
def test_gradients_are_those_of_a_call_that_saves_everything(some, form):
    """An argument that is not saved is NaN in backward, so that a gradient that reads it is NaN."""
    f, shapes, _ = FORMS[form]
    for dtype in (torch.float32, torch.float64):
        args, every = arguments(shapes, some, dtype), arguments(shapes, 63, dtype)
        trained = [name for name, t in args.items() if t.requires_grad]
        for _ in range(2):
            found = torch.autograd.grad(f(**args).sin().sum(), [args[name] for name in trained])
            expected = torch.autograd.grad(f(**every).sin().sum(), [every[name] for name in trained])
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", ["apply", "cond_grad", "weight_grad"])
@pytest.mark.parametrize("some", range(1, 8))
def test_an_op_of_the_family_saves_the_other_factors(op, some, factors):
    names = rules.INPUTS[op]
    args = dict(zip(names, factors((B, N, R, I, O), names=names), strict=True))
    for k, t in enumerate(args.values()):
        t.requires_grad_(bool(some >> k & 1))
    trained = [name for name, t in args.items() if t.requires_grad]
    y, kept = kept_names(lambda **t: getattr(fasthyper.ops, op)(*t.values()), args)
    assert kept == {other for name in trained for other in names if other != name}
    assert all(t.isfinite().all() for t in torch.autograd.grad(y.sum(), [args[name] for name in trained]))


@pytest.mark.parametrize("some", range(1, 1024, 7))
def test_gradients_of_a_fused_primary_read_what_is_saved(some):
    J = 6
    shapes = {
        "x": (B, N, I), "z": (B, R), "weight1": (J, I, R), "bias1": (J, R), "base_weight1": (J, I), "base_bias1": (J,),
        "weight2": (O, J, R), "bias2": (O, R), "base_weight2": (O, J), "base_bias2": (O,),
    }  # fmt: skip

    def f(**t: Tensor) -> Tensor:
        return torch.ops.fasthyper.primary(*t.values(), "tanh")[0]

    args, every = arguments(shapes, some), arguments(shapes, 1023)
    trained = [name for name, t in args.items() if t.requires_grad]
    y, kept = kept_names(f, args)
    a = f"a tensor {(B, N, J)}"
    assert kept - {a} == {other for name in trained for other in primary._READS[name]}
    found = torch.autograd.grad(y.sin().sum(), [args[name] for name in trained])
    expected = torch.autograd.grad(f(**every).sin().sum(), [every[name] for name in trained])
    torch.testing.assert_close(found, expected)


def test_a_frozen_layer_keeps_no_input_and_allows_changing_it():
    layer = HyperLinear(64, 64, 8).requires_grad_(False)
    z = torch.randn(512, 8)
    for _ in range(3):
        h = torch.randn(512, 10, 64, requires_grad=True) * 1
        with Kept() as kept:
            y = layer(h, z)
        parameters = {p.data_ptr() for p in layer.parameters()}
        assert sum(t.nbytes for t in kept if t.data_ptr() not in parameters) == z.nbytes
        h.mul_(2)  # as after a frozen nn.Linear
        y.sum().backward()


def test_pairs_with_frozen_sets_keep_no_head():
    layer = PairwiseBilinear(I, R, O).double()
    x, z = torch.randn(B, N, I, dtype=torch.float64), torch.randn(B, 4, R, dtype=torch.float64)
    with Kept() as kept:
        layer(x, z)
    assert layer.weight.data_ptr() not in {t.data_ptr() for t in kept}
    assert {x.data_ptr(), z.data_ptr()} <= {t.data_ptr() for t in kept}


def test_an_image_that_is_not_saved_leaves_its_order_to_the_gradient():
    x = torch.randn(2, I, SIDE, SIDE, requires_grad=True)
    args = arguments(CONV_SHAPES, 0, torch.float32)
    del args["x"]
    args["z"] = args["z"][:2]
    for order in (torch.contiguous_format, torch.channels_last):
        y = convolution((x * 1).contiguous(memory_format=order), **args)
        image = torch.zeros_like(x, requires_grad=True).contiguous(memory_format=order)
        (dx,) = torch.autograd.grad(convolution(image, **args), image, torch.ones_like(y))
        assert dx.is_contiguous(memory_format=order)


def test_compiled_code_keeps_no_input_of_a_frozen_layer():
    layer = HyperLinear(I, O, R).requires_grad_(False)
    z, x = torch.randn(B, R), torch.randn(B, N, I, requires_grad=True)
    torch._dynamo.reset()
    f = torch.compile(lambda x, z: layer(x * 1, z), backend="aot_eager")
    with Kept() as kept:
        y = f(x, z)
    assert (B, N, I) not in {tuple(t.shape) for t in kept}
    y.sum().backward()
    (expected,) = torch.autograd.grad(layer(x, z).sum(), x)
    torch.testing.assert_close(x.grad, expected)
