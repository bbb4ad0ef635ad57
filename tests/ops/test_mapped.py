"""Functions of the generated weights: `hyper_linear(…, weight_map=…)`, against the weights written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from mapped_layers import PHI, SMALL, mapped, results, snake, written_out
from torch import nn

import fasthyper
from fasthyper import hyper_linear, maps
from fasthyper.measure import peak_temporary_bytes

MIB = 1 << 20


@pytest.fixture(params=PHI)
def name(request):
    return request.param


def compare(weight_map, args, g):
    torch.testing.assert_close(results(mapped(weight_map), args, g), results(written_out(weight_map), args, g))


# B, N, R, I, O: one point, points, one feature, one output, more points than features
SIZES = [(5, 1, 4, 3, 6), (4, 2, 5, 3, 6), (3, 7, 1, 2, 4), (6, 1, 3, 5, 1), (2, 1, 3, 1, 4)]


def test_every_map_is_tested():
    assert tuple(PHI) == maps.NAMES


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "swapped", "sliced", "expanded"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes, strides, weight_map, factors):
    args = factors(sizes, names=factors.AFFINE, strides=strides)
    (g,) = factors(sizes, names=("g",), strides=strides)
    compare(weight_map, args, g)


@pytest.mark.parametrize("elements", [1, 7, 40])
@pytest.mark.parametrize("strides", ["contiguous", "swapped", "sliced"])
def test_tiles(elements, strides, name, factors, tiles):
    """Several blocks of instances, of outputs and of points."""
    for sizes in SIZES:
        args = factors(sizes, names=factors.AFFINE, strides=strides)
        (g,) = factors(sizes, names=("g",))
        with tiles(elements):
            compare(name, args, g)


@pytest.mark.parametrize("missing", [(3,), (4,), (5,), (3, 4, 5), (4, 5)])
def test_without_some_parameters(missing, weight_map, factors):
    args = [None if k in missing else t for k, t in enumerate(factors(names=factors.AFFINE))]
    (g,) = factors(names=("g",))
    compare(weight_map, args, g)


@pytest.mark.parametrize("wanted", [s for n in (1, 2) for s in itertools.combinations(range(6), n)], ids=str)
def test_gradients_of_some_arguments(wanted, factors):
    """First and second order; the other arguments are constants."""
    args = factors(names=factors.AFFINE)
    leaves = [args[k].requires_grad_() for k in wanted]

    def two_orders(f):
        first = torch.autograd.grad((f(*args) ** 3).sum(), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum((t**2).sum() for t in first), leaves)

    torch.testing.assert_close(two_orders(mapped("tanh")), two_orders(written_out("tanh")))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("axis", range(5))
def test_sizes_zero_and_one(axis, size, weight_map, factors):
    sizes = list(SMALL)
    sizes[axis] = size
    args = factors(tuple(sizes), names=factors.AFFINE)
    (g,) = factors(tuple(sizes), names=("g",))
    compare(weight_map, args, g)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_any_number_of_point_axes(shape, weight_map, factors):
    _, *rest = factors(names=factors.AFFINE)
    x = torch.randn(4, *shape, 3, dtype=torch.float64)
    y = mapped(weight_map)(x, *rest)
    truth = written_out(weight_map)(x.reshape(4, -1, 3) if shape != (0,) else x.reshape(4, 0, 3), *rest)
    torch.testing.assert_close(y, truth.reshape(4, *shape, 6))


def test_every_backend(how, name, factors):
    args = factors(names=factors.AFFINE)
    (g,) = factors(names=("g",))
    with fasthyper.use_backend(*how):
        compare(name, args, g)


@pytest.mark.parametrize("elements", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_low_precision(native, dtype, elements, name, factors, native_low_precision, monkeypatch):
    """The error is at most twice that of W written out in the same dtype."""
    args = [t * 0.3 for t in factors((9, 3, 8, 7, 5), dtype, names=factors.AFFINE)]
    (g,) = factors((9, 3, 8, 7, 5), dtype, names=("g",))
    truth = results(written_out(name), [t.double() for t in args], g.double())
    with fasthyper.use_backend("materialised"):
        usual = results(mapped(name), args, g)
    if elements is not None:
        monkeypatch.setattr(fasthyper.planner, "tile_elements", lambda *_: elements)
    with native_low_precision(native):
        got = results(mapped(name), args, g)
    for t, u, expected in zip(got, usual, truth, strict=True):
        assert t.dtype == dtype
        allowed = 2 * (u.double() - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
        assert (t.double() - expected).abs().max() <= allowed


def test_where_a_map_has_no_derivative():
    """At zero, and rows of zeros: as torch has it, and no nan of any order."""
    x, z = torch.randn(3, 1, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    weight = torch.randn(4, 2, 2, dtype=torch.float64)
    for name, phi in (
        ("abs", torch.abs),
        ("relu", torch.relu),
        ("normalize", lambda p: nn.functional.normalize(p, dim=-1)),
    ):
        args = (x, z, weight, None, None, None)
        g = torch.randn(3, 1, 4, dtype=torch.float64)
        torch.testing.assert_close(results(mapped(name), args, g), results(written_out(phi), args, g))
        leaf = z.clone().requires_grad_()
        (first,) = torch.autograd.grad(hyper_linear(x, leaf, weight, weight_map=name).sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), leaf, allow_unused=True)[0]
        assert second is None or not second.isnan().any()


def test_large_weights():
    """Softplus and its derivative above torch's threshold, and a softmax that would overflow."""
    x, z = torch.ones(2, 1, 3, dtype=torch.float64), torch.tensor([[800.0], [-800.0]], dtype=torch.float64)
    weight = torch.randn(4, 3, 1, dtype=torch.float64)
    for name, phi in (("softplus", nn.functional.softplus), ("softmax", lambda p: p.softmax(-1))):
        g = torch.ones(2, 1, 4, dtype=torch.float64)
        args = (x, z, weight, None, None, None)
        torch.testing.assert_close(results(mapped(name), args, g), results(written_out(phi), args, g))


def test_chunks_of_instances(weight_map, factors, monkeypatch):
    """Second order, and a function as map, in several chunks: two orders of derivatives are those of one chunk."""
    monkeypatch.setattr(fasthyper.planner, "_limit", 16 * 8 * 6 * 3 * 2)  # two instances
    args = factors((7, 2, 5, 3, 6), names=factors.AFFINE, requires_grad=True)

    def orders(f):
        y = f(*args)
        first = torch.autograd.grad((y**3).sum(), args, create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), args, create_graph=True)
        return y, *first, *second, *torch.autograd.grad(sum((t**2).sum() for t in second), args)

    torch.testing.assert_close(orders(mapped(weight_map)), orders(written_out(weight_map)))
    with torch.no_grad():
        torch.testing.assert_close(mapped(weight_map)(*args), written_out(weight_map)(*args))


def test_a_map_with_parameters(factors):
    """A module as map learns, in chunks too."""
    map_ = nn.PReLU(dtype=torch.float64)
    args = factors(names=factors.AFFINE, requires_grad=True)
    got = torch.autograd.grad(mapped(map_)(*args).square().sum(), [*args, map_.weight])
    phi = lambda p: torch.where(p > 0, p, map_.weight * p)
    expected = torch.autograd.grad(written_out(phi)(*args).square().sum(), [*args, map_.weight])
    torch.testing.assert_close(got, expected)


ERRORS = {
    "unknown": ("cube", ValueError, "weight_map must be one of 'abs', .*, or a function, got 'cube'"),
    "of another type": (3, TypeError, "weight_map must be a string, a function or None, got a int"),
    "another shape": (lambda p: p.sum(-1), ValueError, r"must be elementwise: .* \(4, 6, 3\) .* shape \(4, 6\)"),
    "another dtype": (lambda p: p > 0, TypeError, "torch.float64, got a tensor of torch.bool"),
    "no tensor": (lambda p: None, TypeError, "got a NoneType"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, factors):
    weight_map, error, message = ERRORS[case]
    x, z, weight, _ = factors()
    with pytest.raises(error, match=message):
        hyper_linear(x, z, weight, weight_map=weight_map)


def test_errors_of_shapes_are_those_of_hyper_linear(weight_map, factors):
    x, z, weight, _ = factors()
    with pytest.raises(ValueError, match=r"z must have shape \(4, 5\), got \(4, 4\)"):
        hyper_linear(x, z[:, :4], weight, weight_map=weight_map)


def test_an_incidence_is_refused(factors):
    x, z, weight, _ = factors()
    incidence = fasthyper.Incidence.from_batch(torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="weight_map must be None with an incidence, got 'abs'"):
        hyper_linear(x, z[:2], weight, incidence=incidence, weight_map="abs")


def temporary(weight_map, B, N, R, I, O, dtype=torch.float32, head=lambda w: w) -> int:
    """Return the peak temporary bytes of forward + backward with all gradients."""
    weight = head(torch.randn(O, I, R).to(dtype))
    shapes = (B, N, I), (B, R), None, (O, R), (O, I), (O,)
    args = [(weight if s is None else torch.randn(s).to(dtype)).requires_grad_() for s in shapes]
    g = torch.randn(B, N, O).to(dtype)
    return peak_temporary_bytes(lambda: results_of(weight_map, args, g))


def results_of(weight_map, leaves, g):
    y = mapped(weight_map)(*leaves)
    return y, torch.autograd.grad(y, leaves, g)


def test_the_measure_sees_W():
    with fasthyper.use_backend("materialised"):
        assert temporary("abs", 4000, 1, 16, 32, 32) > 15 * MIB


MEMORY = [
    ((1000, 1, 16, 32, 32), torch.float32),
    ((300, 8, 16, 32, 32), torch.float32),
    ((1000, 1, 16, 32, 16), torch.bfloat16),
    ((3, 8, 32, 256, 64), torch.float32),  # a head of 2 MiB
    ((2, 3, 32, 64, 128), torch.bfloat16),
    ((20, 3, 8, 4096, 2), torch.float16),
]


@pytest.mark.parametrize("head", [lambda w: w, lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)])
@pytest.mark.parametrize(("sizes", "dtype"), MEMORY, ids=str)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", ["normalize"])
def test_memory(name, native, sizes, dtype, head, native_low_precision):
    fasthyper.set_workspace_limit(MIB)
    with native_low_precision(native):
        once = temporary(name, *sizes, dtype, head)
        twice = temporary(name, 2 * sizes[0], *sizes[1:], dtype, head)
    assert twice < MIB
    assert twice - once < MIB // 4


def test_memory_of_a_function_and_of_second_order():
    """W of 16 MiB is not written out; the inputs' gradients and the head's have one copy."""
    fasthyper.set_workspace_limit(4 * MIB)
    sizes = (4000, 1, 16, 32, 32)
    assert temporary(snake, *sizes) < 6 * MIB
    x, z, weight = (torch.randn(s, requires_grad=True) for s in ((4000, 1, 32), (4000, 16), (32, 32, 16)))

    def second_order():
        y = hyper_linear(x, z, weight, weight_map="tanh")
        (first,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), (x, z, weight))

    assert peak_temporary_bytes(second_order) < 12 * MIB
