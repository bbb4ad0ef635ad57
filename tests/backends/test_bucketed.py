"""Many terms of few conditions in bfloat16, in batched products: on every processor, as on one that multiplies them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fasthyper import Incidence, hyper_linear, planner, use_backend
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


@pytest.fixture
def made(monkeypatch):
    """Choose batched products of bfloat16; return the keys and values of what is computed from indices."""
    found, kept = [], bucketed.kept

    def recorded(index, key, of, make):
        def record():
            found.append((key, make()))
            return found[-1][1]

        return kept(index, key, of, record)

    monkeypatch.setattr("fasthyper.processor.kernels_multiply", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(bucketed, "kept", recorded)
    planner.forget()
    with use_backend("auto", "generate"):
        yield found
    planner.forget()


def relations(terms: int, indices: str = "st", cond: torch.Tensor | None = None, conds: int = 40) -> Incidence:
    source, target = (torch.randint(0, 2_000, (terms,)) if name in indices else None for name in "st")
    cond = torch.randint(0, conds, (terms,)) if cond is None else cond
    sources, targets = (2_000 if name in indices else None for name in "st")
    return Incidence(source, cond, target, num_sources=sources, num_conds=conds, num_targets=targets)


def operands(O: int, rows: int = 2_000):
    return [torch.randn(s).bfloat16() for s in ((rows, 64), (40, 8), (O, 64, 8))]


def test_temporary_memory_does_not_grow(made):
    found = []
    for count in (20_000, 40_000):
        incidence = relations(count)
        leaves, g = [t.requires_grad_() for t in operands(64)], torch.randn(2_000, 64).bfloat16()
        everything(leaves, incidence, g)  # finds the order of the terms
        assert made
        made.clear()
        found.append(peak_temporary_bytes(lambda leaves=leaves, i=incidence, g=g: everything(leaves, i, g), "cpu"))
        assert not made
    assert found[1] - found[0] < 1 << 20
    assert found[1] <= planner.get_workspace_limit()


def test_layers_of_all_sizes_share_what_is_kept(made):
    incidence = relations(10_000)
    hyper_linear(*operands(64), incidence=incidence)
    first = [key for key, _ in made]
    assert first
    for O in (48, 64, 96):
        hyper_linear(*operands(O), incidence=incidence)
    assert [key for key, _ in made] == first


def bytes_in(kept) -> int:
    """Return the bytes of all tensors in lists and tuples."""
    if isinstance(kept, torch.Tensor):
        return kept.untyped_storage().nbytes()
    return sum(map(bytes_in, kept)) if isinstance(kept, list | tuple) else 0


@pytest.mark.parametrize("indices", ["", "s", "t", "st"])
@pytest.mark.parametrize(("terms", "conds"), [(100_000, 40), (10_000, 100)])
def test_what_is_kept_takes_little_more_than_the_order_of_terms(terms, conds, indices, made):
    """Also with very different numbers of terms."""
    incidence = relations(terms, indices, (torch.rand(terms) ** 3 * conds).long(), conds)
    x, _, weight = operands(64, 2_000 if "s" in indices else terms)
    hyper_linear(x, torch.randn(conds, 8).bfloat16(), weight, incidence=incidence)
    assert made
    assert sum(bytes_in(value) for _, value in made) <= 1.2 * 8 * terms


def test_rows_of_a_product_are_a_small_part_of_a_tile(made, monkeypatch):
    """The slots of buckets do not depend on the width of a layer; what is cut from them does."""
    tiles, slots, takes, piece = [], [], bucketed.takes, bucketed.Piece
    monkeypatch.setattr(bucketed, "takes", lambda plan, *a: tiles.append(plan.tile) or takes(plan, *a))
    monkeypatch.setattr(bucketed, "Piece", lambda *a: slots.append(len(a[1])) or piece(*a))
    for O in (64, 512):
        hyper_linear(*operands(O), incidence=relations(10_000))
        assert 0 < O * max(slots) <= tiles[-1] // 4
        slots.clear()


def test_indices_of_one_call_take_no_more_memory_than_in_the_kernels(made, monkeypatch):
    factors, incidence = operands(64), relations(400_000)
    indices, ran = (incidence.source, incidence.cond, incidence.target), []

    def call():
        own = Incidence(*(t.clone() for t in indices), num_sources=2_000, num_conds=40, num_targets=2_000)
        y = hyper_linear(*factors, incidence=own)
        ran.append(bool(made))
        made.clear()  # what it holds outlives the call
        return y

    found = peak_temporary_bytes(call, "cpu")
    monkeypatch.setattr(bucketed, "takes", lambda *_: False)
    usual = peak_temporary_bytes(call, "cpu")
    assert ran == [True, False]
    assert found <= planner.get_workspace_limit()
    assert found <= usual + (1 << 20)
