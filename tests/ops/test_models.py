"""The family with an axis of models: values, derivatives, memory, and that vmap makes one call of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fasthyper
from fasthyper import backends, hyper_linear
from fasthyper.measure import peak_temporary_bytes
from fasthyper.nn import HyperLinear

OPS = ("apply", "cond_grad", "weight_grad")
SMALL = (3, 2, 3, 4, 2)
M = 4
MIB = 1 << 20
ops = torch.ops.fasthyper
SUBSETS = [dims for dims in itertools.product((0, None), repeat=3) if any(d == 0 for d in dims)]


def op_of_models(name):
    return getattr(ops, f"{name}_models").default


def check_each(oracle, name, got, *args):
    """Compare each model's result with the oracle, and the whole with what an op returns."""
    assert got.is_contiguous()
    assert len(got) == len(args[0])
    for one, *of in zip(got, *args, strict=True):
        oracle.check_op(name, one, *of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shared_factors(op, shared, how, dtype, factors, oracle):
    """Any factors may be one for all models, a view of stride 0."""
    ts = factors(dtype=dtype, lead=M)
    args = [ts[i] for i in oracle.INPUTS[op]]
    args = [t[:1].expand(t.shape) if k in shared else t for k, t in enumerate(args)]
    with fasthyper.use_backend(*how):
        check_each(oracle, op, op_of_models(op)(*args), *args)


@pytest.mark.parametrize("strides", ["transposed", "swapped", "sliced"])
@pytest.mark.parametrize("op", OPS)
def test_strides(op, strides, how, factors, oracle):
    ts = factors(dtype=torch.float32, strides=strides, lead=M)
    args = [ts[i] for i in oracle.INPUTS[op]]
    with fasthyper.use_backend(*how):
        check_each(oracle, op, op_of_models(op)(*args), *args)


SIZES = [(1, 1, 5, 3, 6), (1, 4, 5, 3, 6), (4, 1, 5, 3, 6), (2, 3, 16, 8, 8), (40, 1, 8, 17, 16), (3, 40, 8, 16, 17)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_gradients(sizes, how, dtype, factors, oracle):
    ts = factors(sizes, dtype, lead=M)
    with fasthyper.use_backend(*how):
        out = ops.grads_models(*ts, [True] * 3)
    for m in range(M):
        oracle.check_all([t[m] for t in out], oracle.grads, *(t[m] for t in ts))


@pytest.mark.parametrize("mask", [*itertools.product((True, False), repeat=3)], ids=str)
def test_the_mask_selects_gradients(mask, how, factors, oracle):
    ts = factors(lead=M)
    with fasthyper.use_backend(*how):
        out = ops.grads_models(*ts, list(mask))
    for k, (got, wanted) in enumerate(zip(out, mask, strict=True)):
        if wanted:
            truth = torch.stack([oracle.grads(*one)[k] for one in zip(*ts, strict=True)])
            torch.testing.assert_close(got, truth)
        else:
            assert got.shape == (0,)


@pytest.mark.parametrize("axis", range(-1, 5))
@pytest.mark.parametrize("size", [0, 1])
def test_sizes_zero_and_one(axis, size, how, dtype, factors, oracle):
    sizes = [4, 2, 5, 3, 6]
    if axis >= 0:
        sizes[axis] = size
    ts = factors(tuple(sizes), dtype, lead=size if axis < 0 else M)
    with fasthyper.use_backend(*how):
        for op in OPS:
            args = [ts[i] for i in oracle.INPUTS[op]]
            check_each(oracle, op, op_of_models(op)(*args), *args)
        for k, got in enumerate(ops.grads_models(*ts, [True] * 3)):
            assert got.shape == (ts[0], ts[1], ts[2])[k].shape


@pytest.mark.parametrize("tile", [1, 40, 200, 100000])
@pytest.mark.parametrize("name", ["aten", "cpu"])
def test_tiles_of_any_size(tile, name, tiles, factors, oracle):
    """A tile has one model, some of them, or all."""
    if backends.BACKENDS[name].unavailable() is not None:
        pytest.skip(f"no backend {name} here")
    for dtype, sizes in itertools.product((torch.float64, torch.float32, torch.bfloat16), SIZES):
        ts = factors(sizes, dtype, lead=7)
        with tiles(tile), fasthyper.use_backend(name):
            for op in OPS:
                args = [ts[i] for i in oracle.INPUTS[op]]
                check_each(oracle, op, op_of_models(op)(*args), *args)


def test_errors_name_the_axis(factors):
    x, z, weight, _ = factors(lead=M)
    with pytest.raises(ValueError, match=r"x must have shape \(4, B, N, 3\), got \(3, 4, 2, 3\)"):
        ops.apply_models(x[:3], z, weight)
    with pytest.raises(ValueError, match=r"z must have shape"):
        ops.apply_models(x, z[0], weight)


FUNCTIONS = {
    "apply": ("x", "z", "weight"),
    "cond_grad": ("x", "g", "weight"),
    "weight_grad": ("x", "z", "g"),
    "grads": ("x", "z", "weight", "g"),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    op = getattr(ops, f"{request.param}_models")
    if request.param == "grads":
        return lambda *args: op(*args, [True] * 3), FUNCTIONS["grads"]
    return op, FUNCTIONS[request.param]


def test_gradcheck(function, factors):
    f, names = function
    args = factors((2, 2, 2, 3, 2), names=names, lead=2, requires_grad=True)
    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


def test_gradgradcheck(function, factors):
    f, names = function
    args = factors((2, 2, 2, 3, 2), names=names, lead=2, requires_grad=True)
    assert gradgradcheck(f, args, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("forced", [(), ("aten", "fold"), ("materialised", "auto")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name, forced, factors):
    args = factors(names=FUNCTIONS[name], lead=M, requires_grad=True)
    more = ([True, False, True],) if name == "grads" else ()
    results = torch.library.opcheck(getattr(ops, f"{name}_models").default, (*args, *more, *forced))
    assert set(results.values()) == {"SUCCESS"}


def truth_of(op, oracle):
    return lambda *args: torch.einsum(oracle.OPS[op], *args)


@pytest.mark.parametrize("outer", SUBSETS, ids=str)
@pytest.mark.parametrize("inner", SUBSETS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_three_vmaps_over_each_other(op, outer, inner, factors, oracle):
    """The middle vmap has all arguments, so that the innermost call and the outermost meet an axis of models."""
    args = []
    for k, i in enumerate(oracle.INPUTS[op]):
        lead = [n for n, dims in ((3, outer), (2, (0, 0, 0)), (5, inner)) if dims[k] == 0]
        one = factors(SMALL)[i]
        args.append(torch.randn(*lead, *one.shape, dtype=one.dtype))
    nested = lambda f: vmap(vmap(vmap(f, inner), 0), outer)(*args)
    torch.testing.assert_close(nested(getattr(fasthyper.ops, op)), nested(truth_of(op, oracle)))


@pytest.mark.parametrize("dims", SUBSETS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_derivatives_under_and_over_vmap(op, dims, factors, oracle):
    one, many = factors(SMALL), factors(SMALL, lead=5)
    args = [(one if d is None else many)[i] for i, d in zip(oracle.INPUTS[op], dims, strict=True)]
    tangents = [torch.randn_like(t) for t in args]
    f, truth = getattr(fasthyper.ops, op), truth_of(op, oracle)
    every = (0, 1, 2)
    for transform in (
        lambda f: jvp(vmap(f, dims), tuple(args), tuple(tangents)),
        lambda f: vmap(lambda *a: jvp(f, a, tuple(a)), dims)(*args),
        lambda f: grad(lambda *a: grad(lambda *b: (vmap(f, dims)(*b) ** 2).sum())(*a).sin().sum(), every)(*args),
        lambda f: vmap(grad(lambda *a: grad(lambda *b: (f(*b) ** 2).sum())(*a).sin().sum(), every), dims)(*args),
        lambda f: vmap(jacfwd(lambda *a: f(*a).sum(0), 1), dims)(*args),
    ):
        torch.testing.assert_close(transform(f), transform(truth))


class Counter(TorchDispatchMode):
    """Counts the calls of this library's ops that reach a kernel."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasthyper":
            self.calls.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dims", SUBSETS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_vmap_over_any_arguments_is_one_call(op, dims, factors, oracle):
    one, many = factors(SMALL), factors(SMALL, lead=5)
    args = [(one if d is None else many)[i] for i, d in zip(oracle.INPUTS[op], dims, strict=True)]
    with Counter() as counter:
        vmap(getattr(fasthyper.ops, op), dims)(*args)
    assert len(counter.calls) == 1
    with Counter() as counter:
        vmap(vmap(getattr(fasthyper.ops, op), dims), (1, 1, 1))(*(torch.stack([t, t], 1) for t in args))
    assert len(counter.calls) == 1


@pytest.mark.parametrize("batched", range(1, 64))
def test_vmap_of_hyper_linear_is_one_call(batched, factors):
    """Bias and base are torch's own operations."""
    dims = tuple(0 if batched >> k & 1 else None for k in range(6))
    one, many = factors(SMALL, names=factors.AFFINE), factors(SMALL, names=factors.AFFINE, lead=3)
    args = [m if d == 0 else t for t, m, d in zip(one, many, dims, strict=True)]

    def affine(x, z, weight, bias, base_weight, base_bias):
        return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)

    with Counter() as counter:
        vmap(affine, dims)(*args)
    assert len(counter.calls) == 1
    with Counter() as counter:
        vmap(grad(lambda *a: (affine(*a) ** 2).sum(), (0, 1, 2)), dims)(*args)
    assert len(counter.calls) == 4  # forward, dx, dz and dH


def test_per_sample_gradients_of_a_layer_are_two_calls(oracle):
    layer = HyperLinear(4, 2, cond_features=3, dtype=torch.float64)
    x, z = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(params, x, z):
        return functional_call(layer, params, (x[None], z[None])).square().sum()

    with Counter() as counter:
        each = vmap(grad(loss), (None, 0, 0))(params, x, z)
    assert counter.calls == ["apply", "weight_grad_models"]
    for b in range(6):
        y = layer(x[b : b + 1], z[b : b + 1]).square().sum()
        for (name, _), d in zip(layer.named_parameters(), torch.autograd.grad(y, [*layer.parameters()]), strict=True):
            torch.testing.assert_close(each[name][b], d)


def test_backward_through_a_vmap_over_models_is_one_call():
    layers = [HyperLinear(4, 2, cond_features=3) for _ in range(5)]
    params, _ = stack_module_state(layers)
    x, z = torch.randn(6, 4), torch.randn(5, 6, 3)
    with Counter() as counter:
        y = vmap(lambda p, z: functional_call(layers[0], p, (x, z)))(params, z)
        y.square().sum().backward()
    assert counter.calls == ["apply_models", "grads_models"]
    for m, layer in enumerate(layers):
        expected = torch.autograd.grad(layer(x, z[m]).square().sum(), [*layer.parameters()])
        for (name, _), d in zip(layer.named_parameters(), expected, strict=True):
            torch.testing.assert_close(params[name].grad[m], d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forced", [("aten", "fold"), ("aten", "project"), ("materialised", None)])
def test_a_forced_backend_runs_every_model(forced, factors, oracle, monkeypatch):
    ran = []
    for name, module in backends.BACKENDS.items():
        for method in ("apply", "grads"):
            original = getattr(module, method)

            def spy(*args, _original=original, _name=name, schedule, **out):
                ran.append((_name, schedule))
                return _original(*args, schedule=schedule, **out)

            monkeypatch.setattr(module, method, spy)
    ts = factors(lead=M)
    with fasthyper.use_backend(*forced):
        check_each(oracle, "apply", ops.apply_models(*ts[:3]), *ts[:3])
        check_each(oracle, "weight_grad", ops.weight_grad_models(ts[0], ts[1], ts[3]), ts[0], ts[1], ts[3])
    assert set(ran) <= {(forced[0], forced[1] or "auto")}
    assert forced[1] is None or len(ran) == 2 * M


# M, B, N, R, I, O: per-sample gradients, small models, large models.
STACKED = [(4000, 1, 1, 16, 16, 16), (600, 8, 1, 32, 32, 32), (600, 4, 16, 16, 32, 32), (6, 64, 1, 64, 128, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("sizes", STACKED, ids=str)
@pytest.mark.parametrize("name", ["auto", "aten"])
def test_the_workspace_holds(name, sizes, transposed, dtype):
    """Temporary memory is below the limit and does not grow with M: no second tensor of the size of the heads."""

    def temporary(M):
        _, *rest = sizes
        B, N, R, I, O = rest
        x, z, g = (torch.randn(s, dtype=dtype) for s in ((M, B, N, I), (M, B, R), (M, B, N, O)))
        weight = torch.randn((M, I, O, R) if transposed else (M, O, I, R), dtype=dtype)
        weight = weight.transpose(1, 2) if transposed else weight

        def step():
            return ops.apply_models(x, z, weight), ops.grads_models(x, z, weight, g, [True] * 3)

        with fasthyper.use_backend(name):
            step()
            return peak_temporary_bytes(step)

    once, twice = temporary(sizes[0]), temporary(2 * sizes[0])
    assert once < 34 * MIB
    assert twice - once < MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heads_larger_than_the_workspace(dtype):
    """The gradients of large heads are written where they are returned."""
    fasthyper.set_workspace_limit(4 * MIB)
    x, z, g = (torch.randn(2, 1, *size, dtype=dtype) for size in ((1, 520), (12,), (1, 520)))
    weight = torch.randn(2, 520, 520, 12, dtype=dtype)

    def step():
        return ops.grads_models(x, z, weight, g, [True] * 3)

    step()
    assert peak_temporary_bytes(step) < 5 * MIB
    torch.testing.assert_close(step()[2], torch.einsum("mbno,mbni,mbr->moir", g, x, z))


def test_results_do_not_depend_on_the_number_of_threads():
    """Models that run in parallel, and those that run one by one, have the same share of the workspace."""
    for sizes in ((3, 40, 1, 16, 24, 24), (3, 4, 40, 16, 24, 24), (5, 300, 1, 32, 64, 64)):
        m, B, N, R, I, O = sizes
        x, z, weight, g = (torch.randn(s) for s in ((m, B, N, I), (m, B, R), (m, O, I, R), (m, B, N, O)))
        found = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                found.append([ops.apply_models(x, z, weight), *ops.grads_models(x, z, weight, g, [True] * 3)])
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
