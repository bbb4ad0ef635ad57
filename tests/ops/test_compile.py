"""torch.compile and torch.export over the ops and hyper_linear: whole graphs, dynamic batch, transforms inside."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fasthyper
from fasthyper import hyper_linear

SMALL = (3, 2, 3, 4, 2)
ALL = (0, 1, 2)
FUNCTIONS = {"apply": fasthyper.ops.apply, "hyper_linear": hyper_linear}


def affine(x, z, weight, bias, base_weight, base_bias):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


@pytest.fixture(params=FUNCTIONS)
def f(request):
    return FUNCTIONS[request.param]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def squared(f):
    return lambda *args: (f(*args) ** 2).sum()


def with_gradients(f, args):
    leaves = [t.detach().requires_grad_() for t in args]
    y = f(*leaves)
    return y, torch.autograd.grad((y**2).sum(), leaves)


aot_eager = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_forward_and_backward_of_whole_graphs(backend, factors, oracle):
    compiled = torch.compile(affine, fullgraph=True, backend=backend)
    for batch in (3, 5, 8):
        args = factors((batch, 4, 5, 6, 7), names=factors.AFFINE)
        torch.testing.assert_close(with_gradients(compiled, args), with_gradients(oracle.linear, args))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_number_of_point_axes(shape, factors, oracle):
    _, z, weight, bias, base_weight, base_bias = factors(names=factors.AFFINE)
    compiled = aot_eager(affine)
    x = torch.randn(4, *shape, 3, dtype=torch.float64)
    truth = oracle.linear(x.reshape(4, -1, 3), z, weight, bias, base_weight, base_bias)
    torch.testing.assert_close(compiled(x, z, weight, bias, base_weight, base_bias), truth.reshape(4, *shape, 6))


def test_a_compiled_region_around_the_op(factors, oracle):
    """Inductor compiles the operations around the op, and passes buffers with strides that it chooses."""
    x, z, weight, _ = factors(strides="transposed")
    region = lambda f: lambda x, z, w: torch.relu(f(x.sin(), z * 2, w)).cos()
    torch.testing.assert_close(
        with_gradients(torch.compile(region(hyper_linear), fullgraph=True), (x, z, weight)),
        with_gradients(region(oracle.linear), (x, z, weight)),
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_batch_size_that_changes_does_not_recompile(f, requires_grad, factors):
    counter = CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for batch in (3, 5, 8, 13, 21, 34):
        compiled(*factors((batch, 4, 5, 6, 7), requires_grad=requires_grad)[:3])
    assert counter.frame_count <= 2


def test_batch_and_points_both_dynamic(f, factors, oracle):
    counter = CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for batch, points in ((3, 4), (5, 4), (5, 9), (12, 2)):
        args = factors((batch, points, 5, 6, 7))[:3]
        torch.testing.assert_close(compiled(*args), oracle.linear(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (0, 2, 5, 3, 6), (4, 0, 5, 3, 6), (4, 2, 0, 3, 6), (4, 2, 5, 0, 6)])
def test_sizes_zero_and_one(sizes, f, factors, oracle):
    args = factors(sizes)[:3]
    torch.testing.assert_close(with_gradients(aot_eager(f), args), with_gradients(oracle.linear, args))


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "swapped", "sliced", "expanded"])
def test_the_output_is_contiguous_as_traced(strides, f, factors, oracle):
    """Tracing assumes a contiguous output; the real output is contiguous for inputs of any strides."""
    args = factors(strides=strides)[:3]
    compiled = aot_eager(lambda *a: f(*a).view(-1) * 2)
    torch.testing.assert_close(compiled(*args), oracle.linear(*args).reshape(-1) * 2)


# Each of these is silently wrong, or raises, if the op is registered in one of the other ways.
TRANSFORMS = {
    "grad": lambda f: grad(squared(f), ALL),
    "jacrev": lambda f: jacrev(f, ALL),
    "jacfwd": lambda f: jacfwd(f, ALL),
    "hessian": lambda f: hessian(squared(f), ALL),
    "reverse over reverse": lambda f: jacrev(jacrev(f, ALL), ALL),
    "forward over forward": lambda f: jacfwd(jacfwd(f, ALL), ALL),
    "reverse over forward": lambda f: jacrev(jacfwd(f, ALL), ALL),
    "jvp": lambda f: lambda *a: jvp(f, a, tuple(torch.cos(t) for t in a)),
    "jvp of jvp": lambda f: lambda *a: jvp(lambda *b: jvp(f, b, tuple(torch.sin(t) for t in b))[1], a, a),
    "jvp of grad": lambda f: lambda *a: jvp(grad(squared(f), ALL), a, tuple(torch.cos(t) for t in a)),
    "vmap": lambda f: lambda x, z, w: vmap(f, (0, 0, None))(x[None] * x.new_ones(5, 1, 1, 1), z.expand(5, *z.shape), w),
    "vmap of grad": lambda f: (
        lambda x, z, w: vmap(grad(squared(lambda x, z, w: f(x[None], z[None], w)), ALL), (0, 0, None))(x, z, w)
    ),
    "vmap of all": lambda f: lambda *a: vmap(f)(*(torch.stack([t, 2 * t, t.sin()]) for t in a)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_in_a_compiled_region(transform, f, factors, oracle, unless_torch_fails):
    args = factors((2, 2, 3, 2, 1))[:3]
    truth = TRANSFORMS[transform](oracle.linear)
    with unless_torch_fails(lambda: aot_eager(truth)(*args)):
        torch.testing.assert_close(aot_eager(TRANSFORMS[transform](f))(*args), truth(*args))


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_a_transform_in_a_region_of_inductor(transform, factors, oracle):
    args = factors((2, 2, 3, 2, 1))[:3]
    compiled = torch.compile(TRANSFORMS[transform](hyper_linear), fullgraph=True)
    torch.testing.assert_close(compiled(*args), TRANSFORMS[transform](oracle.linear)(*args))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "jvp", "vmap", "vmap of grad", "hessian"])
def test_backward_through_a_compiled_transform(transform, f, factors, oracle, unless_torch_fails):
    """This is second order, where a compiled autograd.Function around a plain op is silently wrong."""
    args = factors((2, 2, 3, 2, 1))[:3]

    def through(f):
        leaves = [t.detach().requires_grad_() for t in args]
        out = torch.utils._pytree.tree_leaves(f(*leaves))
        return torch.autograd.grad(sum((t**2).sum() for t in out), leaves, materialize_grads=True)

    truth = TRANSFORMS[transform](oracle.linear)
    with unless_torch_fails(lambda: aot_eager(truth)(*args)):
        torch.testing.assert_close(through(aot_eager(TRANSFORMS[transform](f))), through(truth))


def test_double_backward_through_a_compiled_function_raises(f, factors):
    """AOTAutograd does not support it, and raises."""
    leaves = factors(SMALL, requires_grad=True)[:3]
    first = torch.autograd.grad((aot_eager(f)(*leaves) ** 2).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum((t**2).sum() for t in first), leaves)


def test_double_backward_in_a_compiled_function_raises(f, factors):
    """torch.autograd.grad breaks the graph; AOTAutograd does not support create_graph across the break, and raises."""

    def penalty(x, z, weight):
        (d,) = torch.autograd.grad((f(x, z, weight) ** 2).sum(), z, create_graph=True)
        return (d**2).sum()

    leaves = factors(SMALL, requires_grad=True)[:3]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(torch.compile(penalty, backend="aot_eager")(*leaves), leaves)


def test_no_grad_and_inference_mode(f, factors, oracle):
    args = factors(requires_grad=True)[:3]
    compiled = aot_eager(f)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = compiled(*args)
        assert not y.requires_grad
        torch.testing.assert_close(y, oracle.linear(*args).detach())


@pytest.mark.parametrize("some", range(1, 8))
def test_only_the_gradients_asked_for(some, f, factors, oracle):
    args = factors()[:3]
    compiled = aot_eager(f)

    def some_gradients(f):
        leaves = [t.detach().requires_grad_(bool(some >> k & 1)) for k, t in enumerate(args)]
        return torch.autograd.grad((f(*leaves) ** 2).sum(), [t for t in leaves if t.requires_grad])

    torch.testing.assert_close(some_gradients(compiled), some_gradients(oracle.linear))


def test_the_graph_has_one_op_for_forward_and_one_for_backward(factors):
    def step(x, z, weight):
        return torch.autograd.grad((fasthyper.ops.apply(x, z, weight) ** 2).sum(), (x, z, weight))

    graph = make_fx(step)(*factors(SMALL, requires_grad=True)[:3])
    names = [str(n.target) for n in graph.graph.nodes if "fasthyper" in str(n.target)]
    assert names == ["fasthyper.apply.default", "fasthyper.grads.default"]


class Layer(torch.nn.Module):
    def __init__(self, factors, names):
        super().__init__()
        self.weight, self.bias, self.base_weight, self.base_bias = map(torch.nn.Parameter, factors(names=names[2:]))

    def forward(self, x, z):
        return hyper_linear(x, z, self.weight, self.bias, base_weight=self.base_weight, base_bias=self.base_bias)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("points", [None, 2])
def test_export_with_a_dynamic_batch(strict, decomposed, points, factors, oracle):
    layer = Layer(factors, factors.AFFINE)
    x, z = torch.randn(4, *([] if points is None else [points]), 3, dtype=torch.float64), factors(names=("z",))[0]
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(layer, (x, z), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    if decomposed:
        program = program.run_decompositions()
    ours = [str(node.target) for node in program.graph.nodes if "fasthyper" in str(node.target)]
    assert ours == ([] if decomposed else ["fasthyper.hyper_linear.default"])
    for batch in (2, 4, 9):
        x = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
        z = torch.randn(batch, 5, dtype=torch.float64)
        truth = oracle.linear(x.reshape(batch, -1, 3), z, *layer.parameters()).reshape(*x.shape[:-1], 6)
        torch.testing.assert_close(program.module()(x, z), truth)
    if not decomposed:
        got = torch.autograd.grad(program.module()(x, z.requires_grad_()).sum(), z)
        torch.testing.assert_close(got, torch.autograd.grad(truth_of(oracle, layer, x, z).sum(), z))


def truth_of(oracle, layer, x, z):
    return oracle.linear(x.reshape(len(x), -1, 3), z, *layer.parameters())


def test_export_saved_and_loaded(tmp_path, factors):
    layer = Layer(factors, factors.AFFINE)
    x, z, *_ = factors()
    torch.export.save(torch.export.export(layer, (x, z)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    torch.testing.assert_close(loaded.module()(x, z), layer(x, z))


def test_autocast_in_and_around_a_region(factors):
    x, z, weight, _ = factors(dtype=torch.float32)
    compiled = aot_eager(hyper_linear)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(x, z, weight), hyper_linear(x, z, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert compiled(x, z, weight).dtype == torch.float32

    def inner(x, z, weight):
        with torch.autocast("cpu", torch.float16):
            return hyper_linear(x, z, weight)

    assert aot_eager(inner)(x, z, weight).dtype == torch.float16
