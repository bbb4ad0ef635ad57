"""The family over terms, on every backend and schedule: values, derivatives, memory."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from random_terms import Graph
from torch.autograd import gradcheck, gradgradcheck

import fasthyper
from fasthyper import Incidence, hyper_linear
from fasthyper.measure import peak_temporary_bytes
from fasthyper.problem import TERM_SCHEDULES

MIB = 1 << 20


def check(graph: Graph) -> None:
    """Compare results and gradients with the sum in float64, and in 16 bits with the same computation in that dtype."""
    y = graph.layer(*graph.leaves)
    found = y, *torch.autograd.grad(y, graph.leaves, graph.g)
    doubles = [t.detach().double().requires_grad_() for t in graph.leaves]
    truth = graph.truth(*doubles)
    truths = truth, *torch.autograd.grad(truth, doubles, graph.g.double())
    same = graph.truth(*graph.leaves)
    written = same, *torch.autograd.grad(same, graph.leaves, graph.g)
    for got, exact, usual in zip(found, truths, written, strict=True):
        assert got.shape == exact.shape
        assert got.dtype == usual.dtype
        assert got.is_contiguous()
        error, allowed = (got.double() - exact).norm(), 2 * (usual.double() - exact).norm()
        sums = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps * (4 + graph.incidence.num_terms**0.5)
        assert error <= allowed + (torch.finfo(got.dtype).eps + sums) * exact.norm()


@pytest.mark.parametrize("indices", ["".join(s) for k in (1, 2, 3) for s in itertools.combinations("sct", k)])
@pytest.mark.parametrize("N", [1, 3])
def test_values_and_gradients(indices, N, order, dtype):
    with fasthyper.use_backend(*order):
        check(Graph(indices=indices, N=N, dtype=dtype))


@pytest.mark.parametrize(
    "sizes",
    [
        {"E": 0},
        {"E": 1, "S": 1, "C": 1, "T": 1},
        {"R": 1},
        {"I": 1, "O": 1},
        {"E": 500, "T": 1},
        {"E": 400, "S": 2, "R": 17, "I": 33, "O": 9},
        {"R": 0},
        {"I": 0},
        {"E": 300, "C": 1, "R": 8, "I": 40, "O": 24},
    ],
    ids=str,
)
def test_sizes(sizes, order, dtype):
    with fasthyper.use_backend(*order):
        check(Graph(**sizes, dtype=dtype, swap="S" in sizes))


def test_many_tiles(order):
    """A small workspace cuts rows, features and heavy rows."""
    fasthyper.set_workspace_limit(MIB)
    with fasthyper.use_backend(*order):
        check(Graph(E=3000, S=40, C=90, T=30, R=48, I=40, O=56, dtype=torch.float32))
        check(Graph(E=900, S=50, T=12, R=24, I=40, O=36, N=5, indices="st", dtype=torch.float32))


@pytest.mark.parametrize("swap", [False, True])
def test_ragged_points_with_a_large_head(order, swap):
    fasthyper.set_workspace_limit(MIB)
    graph = Graph(E=600, C=4, R=40, I=32, O=64, indices="c", dtype=torch.float32, swap=swap)
    with fasthyper.use_backend(*order):
        check(graph)
        graph.incidence = Incidence.from_batch(graph.cond.sort().values, 4)
        graph.cond = graph.incidence.cond
        check(graph)


def test_the_head_of_nn_conv_is_a_view(order):
    with fasthyper.use_backend(*order):
        check(Graph(indices="st", swap=True, dtype=torch.float32, R=16, I=8, O=24))


@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced"])
def test_any_strides(strides, order):
    graph = Graph(requires_grad=False, dtype=torch.float32)

    def view(t):
        if strides == "transposed":
            return t.mT.contiguous().mT
        if strides == "expanded":
            return t[:1].expand_as(t)
        return torch.stack([t, t], -1)[..., 0]

    for name in ("x", "z", "weight", "g"):
        setattr(graph, name, view(getattr(graph, name)))
    for t in graph.leaves:
        t.requires_grad_()
    with fasthyper.use_backend(*order):
        check(graph)


@pytest.mark.parametrize("kept", range(6))
def test_each_gradient_alone(kept, order):
    graph = Graph(requires_grad=False)
    leaves = list(graph.leaves)
    leaves[kept].requires_grad_()
    with fasthyper.use_backend(*order):
        (got,) = torch.autograd.grad(graph.layer(*leaves), leaves[kept], graph.g)
    (exact,) = torch.autograd.grad(graph.truth(*leaves), leaves[kept], graph.g)
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_derivatives_of_both_orders(reduce, order):
    graph = Graph(E=9, R=2, I=2, O=2)

    def layer(*leaves):
        return graph.layer(*leaves, reduce=reduce)

    with fasthyper.use_backend(*order):
        assert gradcheck(layer, graph.leaves, check_forward_ad=reduce != "max")
        assert gradgradcheck(layer, graph.leaves)


@pytest.mark.parametrize("op", ["apply_terms", "cond_grad_terms", "weight_grad_terms"])
def test_derivatives_of_each_op(op, order):
    graph = Graph(E=9, R=2, I=2, O=2, N=2)
    x, z, weight, g = graph.x, graph.z, graph.weight, graph.g.requires_grad_()
    factors, size = {
        "apply_terms": ((x, z, weight), [graph.T]),
        "cond_grad_terms": ((x, g, weight), [len(z)]),
        "weight_grad_terms": ((x, z, g), []),
    }[op]
    indices = graph.source, graph.cond, graph.target

    def call(*factors):
        return getattr(torch.ops.fasthyper, op)(*factors, *indices, *size)

    with fasthyper.use_backend(*order):
        assert gradcheck(call, factors, check_forward_ad=True)
        assert gradgradcheck(call, factors)
    torch.library.opcheck(getattr(torch.ops.fasthyper, op).default, (*factors, *indices, *size))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_means_and_largest(reduce):
    """Targets without a term are zero, as in PyTorch Geometric."""
    graph = Graph(E=20, T=15, requires_grad=False)
    single = copy.copy(graph)
    single.target, single.T = None, 20
    messages = single.truth(*graph.leaves)
    expected = torch.zeros(15, 5, dtype=torch.float64)
    for t in range(15):
        own = messages[graph.target == t]
        if len(own):
            expected[t] = own.mean(0) if reduce == "mean" else own.amax(0)
    torch.testing.assert_close(graph.layer(*graph.leaves, reduce=reduce), expected)


def test_without_an_index_it_is_hyper_linear():
    graph = Graph(indices="")
    plain = hyper_linear(
        graph.x, graph.z, graph.weight, graph.bias, base_weight=graph.base_weight, base_bias=graph.base_bias
    )
    torch.testing.assert_close(graph.layer(*graph.leaves), plain)


@pytest.mark.parametrize("empty", [{"I": 0}, {"O": 0}, {"R": 0}], ids=str)
def test_gradients_without_features_are_zero(empty, order):
    """Memory that is not written would hold the numbers of a freed tensor."""
    graph = Graph(E=100, indices="t", dtype=torch.float32, **empty)
    with fasthyper.use_backend(*order):
        for _ in range(5):
            y = graph.layer(*graph.leaves).sum()
            freed = [torch.full_like(t, 7) for t in (graph.x, graph.z)]
            del freed
            dx, dz = torch.autograd.grad(y, (graph.x, graph.z))
            bias_grad = graph.bias.detach().sum(0).expand_as(dz) if graph.O else torch.zeros_like(dz)
            base_grad = graph.base_weight.detach().sum(0).expand_as(dx) if graph.O else torch.zeros_like(dx)
            torch.testing.assert_close(dz, bias_grad)
            torch.testing.assert_close(dx, base_grad)


def test_float16_means_whose_sums_overflow():
    E = 70_000
    ones = torch.ones(E, 1).half()
    incidence = Incidence(target=torch.zeros(E, dtype=torch.int64))
    y = hyper_linear(ones * 10, ones, torch.ones(2, 1, 1).half(), incidence=incidence, reduce="mean")
    torch.testing.assert_close(y, torch.full((1, 2), 10.0).half())


def test_the_same_bits_every_time(order):
    graph = Graph(E=2000, S=30, C=40, T=50, R=16, I=24, O=32, dtype=torch.float32)
    with fasthyper.use_backend(*order):
        first, second = (
            [y, *torch.autograd.grad(y, graph.leaves, graph.g)] for y in (graph.layer(*graph.leaves) for _ in range(2))
        )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def temporary(E: int, dtype: torch.dtype, indices: str = "st", **sizes: int) -> int:
    graph = Graph(E=E, indices=indices, dtype=dtype, **{"S": 2304, "T": 2304, "R": 128, "I": 64, "O": 64, **sizes})
    incidence, leaves = graph.incidence, graph.leaves

    def step():
        y = graph.layer(*leaves, incidence=incidence)
        return y, torch.autograd.grad(y, leaves, graph.g)

    step()  # sorts the terms, once
    return peak_temporary_bytes(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indices", ["st", "c"])
def test_temporary_memory_does_not_grow_with_the_terms(indices, dtype):
    sizes = {"C": 300} if indices == "c" else {}
    once, twice = (temporary(E, dtype, indices, **sizes) for E in (39_168, 78_336))
    assert once < 40 * MIB
    assert twice < 40 * MIB
    assert twice - once < MIB + 39_168 * 8 * 2


@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_a_forced_schedule_runs(schedule):
    """Every schedule rounds differently, so that equal bits would show that the choice has no effect."""
    graph = Graph(E=2000, R=16, I=24, O=32, dtype=torch.float32, requires_grad=False)
    results = {}
    for name in TERM_SCHEDULES:
        with fasthyper.use_backend("auto", schedule=name):
            results[name] = graph.layer(*graph.leaves)
    assert all(not torch.equal(results[schedule], y) for name, y in results.items() if name != schedule)
