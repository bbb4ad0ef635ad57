"""Tests that need a GPU: graphs, streams, other devices, compiled code, temporary memory, launches."""

from __future__ import annotations

import pytest
import torch

import fasthyper
from fasthyper.backends import cuda, triton
from fasthyper.problem import TERM_SCHEDULES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_triton = pytest.mark.skipif(triton.unavailable() is not None, reason=f"Triton kernels: {triton.unavailable()}")
MIB = 1 << 20


def inputs(B, N, R, I, O, dtype=torch.bfloat16, device="cuda"):
    torch.manual_seed(0)
    shapes = ((B, N, I), (B, R), (O, I, R))
    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randn(B, N, O, device=device).to(dtype)


def step(tensors, g):
    y = fasthyper.hyper_linear(*tensors)
    return y, *torch.autograd.grad(y, tensors, g)


def exact(tensors, g):
    double = [t.detach().double().requires_grad_() for t in tensors]
    y = fasthyper.ops.reference.apply(*double)
    return y, *torch.autograd.grad(y, double, g.double())


def check(results, truth, dtype):
    for got, expected in zip(results, truth, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error <= 2 * torch.finfo(dtype).eps


SIZES = [
    (4800, 1, 128, 64, 64),
    (8192, 1, 25, 64, 128),
    (64, 1, 50, 784, 10),
    (300, 1, 144, 48, 48),
    (100, 30, 64, 20, 20),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_published_shapes(sizes, dtype):
    tensors, g = inputs(*sizes, dtype=dtype)
    check(step(tensors, g), exact(tensors, g), dtype if dtype != torch.float32 else torch.float16)


@pytest.mark.skipif(cuda.unavailable() is not None, reason=f"CUDA kernels: {cuda.unavailable()}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes", [*SIZES, (39168, 1, 128, 64, 64), (40000, 1, 16, 64, 160), (8000, 5, 32, 40, 40)], ids=str
)
def test_results_of_the_cuda_kernels(sizes, dtype):
    """There are many more blocks than run at once; every number of the results is compared."""
    tensors, g = inputs(*sizes, dtype=dtype)
    with fasthyper.use_backend("cuda"):
        results = step(tensors, g)
    check(results, exact(tensors, g), dtype if dtype != torch.float32 else torch.float16)


@needs_triton
def test_float32_is_as_exact_as_the_usual_way_and_tf32_is_not():
    tensors, g = inputs(2000, 1, 128, 64, 64, torch.float32)
    truth = exact(tensors, g)
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            y = fasthyper.hyper_linear(*tensors)
            errors[precision] = ((y.double() - truth[0]).norm() / truth[0].norm()).item()
        torch.set_float32_matmul_precision("highest")
        with fasthyper.use_backend("materialised"):
            usual = ((fasthyper.hyper_linear(*tensors).double() - truth[0]).norm() / truth[0].norm()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] <= 4 * usual
    assert 1e-5 < errors["high"] < 2e-3


@pytest.mark.parametrize(
    "sizes", [*SIZES, (200000, 1, 64, 32, 32), (300000, 1, 25, 32, 32), (1, 200000, 64, 2, 2)], ids=str
)
def test_temporary_memory_has_a_limit(sizes):
    tensors, g = inputs(*sizes)
    step(tensors, g)  # tiles are timed, and libraries are initialised
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(tensors, g)
    torch.cuda.synchronize()
    kept = sum(t.untyped_storage().nbytes() for t in results)
    assert torch.cuda.max_memory_allocated() - before - kept <= 33 * MIB


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_graph_replays_on_new_numbers(sizes):
    tensors, g = inputs(*sizes)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(tensors, g)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(tensors, g)
    with torch.no_grad():
        for t in (*tensors, g):
            t.copy_(torch.randn(t.shape, device="cuda"))
    graph.replay()
    check(results, exact(tensors, g), g.dtype)


@needs_triton
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_terms_of_a_graph(schedule):
    """Values, the same bits again, and calls that do not wait for the device."""
    E, S, R, I, O = 20000, 3000, 32, 48, 64
    (x, z, weight), g = inputs(S, 1, R, I, O)
    x, z, g = x.detach()[:, 0].requires_grad_(), torch.randn(E, R, device="cuda").bfloat16().requires_grad_(), g[:, 0]
    edges = torch.randint(S, (2, E), device="cuda")
    incidence = fasthyper.Incidence.from_edge_index(edges, S, S)

    def run():
        with fasthyper.use_backend("triton", schedule):
            y = fasthyper.hyper_linear(x, z, weight, incidence=incidence)
            return y, *torch.autograd.grad(y, (x, z, weight), g)

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    double = [t.detach().double().requires_grad_() for t in (x, z, weight)]
    with fasthyper.use_backend("aten"):
        y = fasthyper.hyper_linear(*double, incidence=incidence)
    check(first, (y, *torch.autograd.grad(y, double, g.double())), torch.bfloat16)


def test_a_side_stream():
    tensors, g = inputs(*SIZES[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would run before its inputs are ready
        fresh = [t.detach().neg().requires_grad_() for t in tensors]
        results = step(fresh, g)
    torch.cuda.current_stream().wait_stream(side)
    check(results, exact(fresh, g), g.dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_a_device_that_is_not_the_current_one():
    tensors, g = inputs(*SIZES[0], device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(step(tensors, g), exact(tensors, g), g.dtype)
    assert torch.cuda.current_device() == 0


def test_compiled_code_calls_the_op():
    tensors, g = inputs(*SIZES[0])
    compiled = torch.compile(lambda x, z, w: torch.relu(fasthyper.hyper_linear(x, z, w)) * 2, fullgraph=True)
    results = [compiled(*tensors)]
    results += torch.autograd.grad(results[0], tensors, g)
    double = [t.detach().double().requires_grad_() for t in tensors]
    y = torch.relu(fasthyper.ops.reference.apply(*double)) * 2
    truth = [y, *torch.autograd.grad(y, double, g.double())]
    for got, expected in zip(results, truth, strict=True):  # rounding may change the sign that relu depends on
        assert (got.double() - expected).norm() / expected.norm() < 0.05


@needs_triton
def test_results_are_the_same_under_deterministic_algorithms():
    tensors, g = inputs(*SIZES[2])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(tensors, g), step(tensors, g)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, same in zip(first, second, strict=True):
        assert torch.equal(one, same)


@needs_triton
@pytest.mark.parametrize("sizes", [(39168, 1, 128, 64, 64), (8192, 1, 64, 64, 128)], ids=str)
def test_one_launch_for_each_of_y_dxdz_and_dh(sizes):
    """A second launch adds the partial sums of a split sum."""
    tensors, g = inputs(*sizes)
    step(tensors, g)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(tensors, g)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.lower().startswith("mem")]
    assert {"fold", "dx_dz", "weight_grad"} <= set(kernels)
    assert set(kernels) <= {"fold", "dx_dz", "weight_grad", "reduce"}
    assert len(kernels) <= 6
