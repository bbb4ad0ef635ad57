"""Many terms of few conditions in bfloat16, in batched products: on every processor, as on one that multiplies them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fasthyper import Incidence, hyper_linear, planner
from fasthyper.backends import cpu
from fasthyper.backends.aten import bucketed
from fasthyper.measure import peak_temporary_bytes

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"compiled CPU kernels: {cpu.unavailable()}")
E, S, C, T, R, I, O = 400, 30, 20, 25, 3, 4, 6


@pytest.fixture(params=[1 << 20, C * O * I - 1], ids=["one block", "blocks"])
def ran(request, monkeypatch):
    """Force batched products of bfloat16, in tiles of two sizes; return the names of what ran."""
    plan, called = planner.plan, []
    monkeypatch.setattr("fasthyper.processor.kernels_multiply", lambda dtype: dtype == torch.bfloat16)
    for bound in ("_LEAST_WEIGHTS", "_LEAST_TERMS"):
        monkeypatch.setattr(bucketed, bound, 1)
    for name in ("apply", "grads"):
        of = getattr(bucketed, name)
        monkeypatch.setattr(bucketed, name, lambda *a, f=of: called.append(f.__name__) or f(*a))
    planner.forget()
    fixed = lambda *a: dataclasses.replace(plan(*a), schedule="generate", tile=request.param)
    monkeypatch.setattr(planner, "plan", fixed)
    yield called
    planner.forget()


def draw(indices: str) -> Incidence:
    """Return terms whose conditions have very different numbers of terms, one of them none."""
    cond = (torch.rand(E) ** 1.5 * (C - 1)).long()
    source, target = (torch.randint(0, rows, (E,)) if name in indices else None for name, rows in (("s", S), ("t", T)))
    rows = {"num_sources": S if "s" in indices else None, "num_targets": T if "t" in indices else None}
    return Incidence(source, cond.sort()[0] if "o" in indices else cond, target, num_conds=C, **rows)


def everything(leaves, incidence, g):
    y = hyper_linear(*leaves, incidence=incidence)
    return y, *torch.autograd.grad(y, leaves, g)


def written_out(leaves, incidence, g):
    x, z, weight = leaves
    source, cond, target = incidence.source, incidence.cond, incidence.target
    W = torch.einsum("oir,cr->coi", weight, z)
    y = torch.einsum("eoi,ei->eo", W[cond], x if source is None else x[source])
    y = y if target is None else y.new_zeros(T, O).index_add(0, target, y)
    return y, *torch.autograd.grad(y, leaves, g)


def factors(incidence: Incidence):
    torch.manual_seed(0)
    rows = E if incidence.source is None else S, E if incidence.target is None else T
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((rows[0], I), (C, R), (O, I, R))]
    return leaves, torch.randn(rows[1], O).bfloat16()


@pytest.mark.parametrize("indices", ["", "o", "s", "t", "st"])
def test_errors_are_at_most_those_of_w_written_out(indices, ran):
    incidence = draw(indices)
    leaves, g = factors(incidence)
    found, usual = everything(leaves, incidence, g), written_out(leaves, incidence, g)
    assert ran == ["apply", "grads"]
    exact = written_out([t.detach().double().requires_grad_() for t in leaves], incidence, g.double())
    for got, same, truth in zip(found, usual, exact, strict=True):
        assert got.dtype == same.dtype
        assert got.shape == truth.shape
        error, allowed = (got.double() - truth).norm(), 2 * (same.double() - truth).norm()
        assert error <= allowed + torch.finfo(got.dtype).eps * truth.norm()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_each_gradient_alone(wanted, ran):
    incidence = draw("st")
    leaves, g = factors(incidence)
    _, *exact = everything(leaves, incidence, g)
    found = torch.autograd.grad(hyper_linear(*leaves, incidence=incidence), [leaves[k] for k in wanted], g)
    for got, k in zip(found, wanted, strict=True):
        assert got.equal(exact[k])


@pytest.mark.parametrize("bad", ["x", "g"])
def test_padding_spreads_no_infinity(bad, ran):
    """The slots without a term repeat the first of their condition, which may be infinite."""
    incidence = draw("")
    leaves, g = factors(incidence)
    counts = torch.bincount(incidence.cond, minlength=C)
    fewest = int(counts.where(counts > 0, E).argmin())
    with torch.no_grad():
        (leaves[0] if bad == "x" else g)[int((incidence.cond == fewest).nonzero()[0]), 0] = float("inf")
    found, usual = everything(leaves, incidence, g), written_out(leaves, incidence, g)
    for got, same in zip(found, usual, strict=True):
        assert got.isnan().equal(same.isnan())
        assert got.isinf().equal(same.isinf())


def test_sums_over_buckets_are_float32(ran):
    """In bfloat16, 257 is 256."""
    terms = 3 * 257
    zeros = torch.zeros(terms).long()
    incidence = Incidence(zeros, torch.arange(terms) % 3, zeros, num_conds=3)
    leaves = [torch.ones(shape).bfloat16().requires_grad_() for shape in ((1, 1), (3, 1), (1, 1, 1))]
    y, dx, *_ = everything(leaves, incidence, torch.ones(1, 1).bfloat16())
    assert ran == ["apply", "grads"]
    assert y.item() == dx.item() == 772


def test_sums_over_blocks_are_float32(ran, monkeypatch):
    """A sum of ones in bfloat16 stays at 256."""
    plan = planner.plan
    monkeypatch.setattr(planner, "plan", lambda *a: dataclasses.replace(plan(*a), tile=1))
    incidence = Incidence(None, torch.arange(600), None, num_conds=600)
    leaves = [torch.ones(shape).bfloat16().requires_grad_() for shape in ((600, 1), (600, 1), (1, 1, 1))]
    *_, dh = everything(leaves, incidence, torch.ones(600, 1).bfloat16())
    assert ran == ["apply", "grads"]
    assert dh.item() == 600


def test_what_does_not_fit_runs_in_the_kernels(ran, monkeypatch):
    incidence = draw("st")
    leaves, g = factors(incidence)
    for name, value in {"_LEAST_WEIGHTS": O * I + 1, "_LEAST_TERMS": E // C + 1}.items():
        with monkeypatch.context() as m:
            m.setattr(bucketed, name, value)
            everything(leaves, incidence, g)
    for few in (leaves[0].float(), leaves[0].half()):
        same = [t.to(few.dtype) for t in leaves[1:]]
        hyper_linear(few, *same, incidence=incidence)
    assert not ran
    plan = planner.plan
    of_tile = lambda tile: lambda *a: dataclasses.replace(plan(*a), tile=tile)
    most = int(torch.bincount(incidence.cond).max())
    alone = Incidence(None, incidence.cond, None, num_conds=C)
    leaves, g = factors(alone)
    monkeypatch.setattr(planner, "plan", of_tile(most * O - 1))
    everything(leaves, alone, g)
    rows = 10_000
    monkeypatch.setattr(planner, "plan", of_tile(rows * I // 2 - 1))
    many = Incidence(incidence.source, incidence.cond, None, num_sources=rows, num_conds=C)
    hyper_linear(torch.ones(rows, I).bfloat16(), *leaves[1:], incidence=many)
    assert not ran


def test_temporary_memory_does_not_grow(monkeypatch):
    monkeypatch.setattr("fasthyper.processor.kernels_multiply", lambda dtype: dtype == torch.bfloat16)
    planner.forget()
    found = []
    for count in (20_000, 40_000):
        index = lambda rows, count=count: torch.randint(0, rows, (count,))
        incidence = Incidence(index(2_000), index(40), index(2_000), num_sources=2_000, num_conds=40, num_targets=2_000)
        leaves = [torch.randn(s).bfloat16().requires_grad_() for s in ((2_000, 64), (40, 8), (64, 64, 8))]
        g = torch.randn(2_000, 64).bfloat16()
        everything(leaves, incidence, g)  # finds the order of the terms
        found.append(peak_temporary_bytes(lambda leaves=leaves, i=incidence, g=g: everything(leaves, i, g), "cpu"))
    assert found[1] - found[0] < 1 << 20
    assert found[1] <= planner.get_workspace_limit()
    planner.forget()
