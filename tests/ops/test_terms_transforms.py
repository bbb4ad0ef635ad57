"""The family over terms, compiled, exported, under the transforms of torch and under autocast."""

from __future__ import annotations

import io

import pytest
import torch
from random_terms import Graph
from torch.func import grad, jvp, vmap

import fasthyper
from fasthyper import Incidence, hyper_linear


@pytest.mark.parametrize("name", ["grads_terms", "hyper_linear_terms", "hyper_linear_terms_grads"])
def test_opcheck(name):
    graph = Graph(E=9, R=2, I=2, O=2, N=2)
    x, z, weight, bias, base_weight, _ = graph.leaves
    indices = graph.source, graph.cond, graph.target
    args = {
        "grads_terms": (x, z, weight, graph.g, *indices, [True, False, True]),
        "hyper_linear_terms": (*graph.leaves, *indices, graph.T),
        "hyper_linear_terms_grads": (x, z, weight, bias, base_weight, graph.g, *indices, [True] * 5 + [False]),
    }[name]
    result = torch.library.opcheck(getattr(torch.ops.fasthyper, name).default, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_any_number_of_terms(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(x, z, weight, incidence):
        return hyper_linear(x, z, weight, incidence=incidence).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for E in (30, 41, 90, 120):
        graph = Graph(E=E, indices="st")
        args = graph.x, graph.z, graph.weight
        got, exact = (f(*args, graph.incidence) for f in (compiled, step))
        torch.testing.assert_close(got, exact)
        for a, b in zip(torch.autograd.grad(got, args), torch.autograd.grad(exact, args), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_incidence_made_in_compiled_code():
    def step(x, z, weight, edges):
        return hyper_linear(x, z, weight, incidence=Incidence.from_edge_index(edges, 7, 6))

    graph = Graph(indices="st")
    args = graph.x, graph.z, graph.weight, torch.stack([graph.source, graph.target])
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(got, step(*args))


def test_compiled_code_that_writes_two_indices_into_one_buffer():
    """Inductor reuses the memory of the first index for the second one, in the same tensor object, without a trace."""
    E = 2000
    x, z, weight, a = torch.randn(E, 4), torch.randn(E, 3), torch.randn(5, 4, 3), torch.randint(0, 50, (E,))

    def step(x, z, weight, a):
        y = hyper_linear(x, z, weight, incidence=Incidence(target=(a + 1) % 50, num_targets=50))
        b = (a * 7 + y[0, 0].long().abs()) % 50
        return hyper_linear(x, z, weight, incidence=Incidence(target=b, num_targets=50))

    with torch.no_grad(), fasthyper.use_backend("auto", schedule="aggregate"):
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(x, z, weight, a), step(x, z, weight, a))


def test_export_with_any_number_of_terms():
    layer = fasthyper.HyperLinear(4, 5, cond_features=3, dtype=torch.float64)
    one, other = Graph(E=40, indices="st", requires_grad=False), Graph(E=77, indices="st", requires_grad=False)
    E = torch.export.Dim("E", min=2)
    shapes = (None, {0: E}, [{0: E}, None, {0: E}])
    program = torch.export.export(layer, (one.x, one.z, one.incidence), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(other.x, other.z, other.incidence), layer(other.x, other.z, other.incidence))


def test_transforms(order):
    graph = Graph(requires_grad=False)
    x, z = (torch.stack([t, 2 * t, t - 1]) for t in (graph.x, graph.z))
    heads = torch.stack([graph.weight, -graph.weight])
    rest = graph.leaves[2:]

    def layer(x, z, weight):
        return graph.layer(x, z, weight, *rest[1:])

    def loss(x, z):
        return layer(x, z, graph.weight).square().sum()

    with fasthyper.use_backend(*order):
        each = torch.stack([layer(a, b, graph.weight) for a, b in zip(x, z, strict=True)])
        torch.testing.assert_close(vmap(lambda a, b: layer(a, b, graph.weight))(x, z), each)
        for f, batched in (
            (lambda a: layer(a, graph.z, graph.weight), x),
            (lambda a: layer(graph.x, a, graph.weight), z),
            (lambda a: layer(graph.x, graph.z, a), heads),
        ):
            torch.testing.assert_close(vmap(f)(batched), torch.stack([f(a) for a in batched]))
        got = vmap(grad(loss, argnums=(0, 1)))(x, z)
        one = [grad(loss, argnums=(0, 1))(a, b) for a, b in zip(x, z, strict=True)]
        for k in (0, 1):
            torch.testing.assert_close(got[k], torch.stack([g[k] for g in one]))
        tangents = torch.ones_like(x[0]), torch.ones_like(z[0])
        _, tangent = jvp(lambda a, b: layer(a, b, graph.weight), (x[0], z[0]), tangents)
        bases = graph.layer(x[0], z[0], graph.weight, *rest[1:])
        step = 1e-6
        moved = graph.layer(x[0] + step * tangents[0], z[0] + step * tangents[1], graph.weight, *rest[1:])
    torch.testing.assert_close(tangent, (moved - bases) / step, rtol=1e-4, atol=1e-3)


def test_vmap_over_the_indices():
    graph = Graph(requires_grad=False)
    sources = torch.stack([graph.source, graph.source.flip(0)])

    def call(source):
        rows = graph.x.unsqueeze(1), graph.z, graph.weight
        return torch.ops.fasthyper.apply_terms(*rows, source, graph.cond, graph.target, graph.T)

    torch.testing.assert_close(vmap(call)(sources), torch.stack([call(s) for s in sources]))


def test_autocast_computes_in_its_dtype():
    graph = Graph(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = graph.layer(*graph.leaves)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert graph.x.grad.dtype == torch.float32
