"""The Triton kernels of the family over terms, against a float64 sum.

They run on a GPU if there is one; else in Triton's interpreter, in a separate run of `make test`.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

import fasthyper
from fasthyper import planner
from fasthyper.backends import cuda, gpu, triton
from fasthyper.backends.triton import chunks
from fasthyper.measure import peak_temporary_bytes
from fasthyper.problem import TERM_SCHEDULES, TermProblem
from fasthyper.terms import Terms

ready = pytest.mark.skipif(triton.unavailable() is not None, reason=f"Triton kernels: {triton.unavailable()}")
EPS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
"""Allowed errors, in units of rounding relative to the sum of absolute values."""
RESULTS = ("y", "dx", "dz", "dH", "dbias", "dW0", "db0")
SIZES = (4, 3, 5)  # sources, conditions, targets


class Call:
    """Random factors, and terms in any order, with duplicates and with rows that no term names.

    Args:
        terms: E.
        same: which indices are the identity: some of the letters s, c and t.
        points: N.
        features: I, R, O.
        rows: the numbers of sources, conditions and targets.
        bases: whether there are a bias, W0 and b0, which take no schedule.
    """

    def __init__(
        self,
        terms=9,
        same="",
        points=1,
        features=(5, 7, 6),
        dtype=torch.float32,
        rows=SIZES,
        bases=False,
        device="cpu",
    ):
        (I, R, O), N = features, points
        self.mask = (True,) * 3 + (bases,) * 3
        self.targets = rows[2] if "t" not in same else terms
        used = dict(zip("sct", (max(1, n - 1) for n in rows), strict=True))  # the last row has no terms
        indices = [None if name in same else torch.randint(n, (terms,), device=device) for name, n in used.items()]
        S, C, T = (terms if index is None else n for index, n in zip(indices, rows, strict=True))
        self.terms = Terms(*indices, S, C, T)
        shapes = (S, N, I), (C, R), (O, I, R), (O, R), (O, I), (O,)
        given = zip(shapes, self.mask, strict=True)
        self.factors = [torch.randn(shape, device=device).to(dtype) if k else None for shape, k in given]
        self.g = torch.randn(T, N, O, device=device).to(dtype)

    def sums(self, absolute=False):
        """Return y and all gradients in float64; those of absolute values are the scale of rounding."""
        ts = [t if t is None else t.double().cpu() for t in (*self.factors, self.g)]
        *ts, g = [t if t is None else t.abs() for t in ts] if absolute else ts
        x, z, weight, bias, base, b0 = ts
        leaves = [t.requires_grad_() for t in ts if t is not None]
        source, cond, target = (None if t is None else t.cpu() for t in self.terms[:3])
        x_e, z_e = x if source is None else x[source], z if cond is None else z[cond]
        each = torch.einsum("eni,er,oir->eno", x_e, z_e, weight)
        if bias is not None:
            each = each + x_e @ base.T + (z_e @ bias.T)[:, None] + b0
        y = each if target is None else each.new_zeros(self.terms.targets, *each.shape[1:]).index_add(0, target, each)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    def run(self, schedule):
        y = triton.apply_terms(*self.factors, terms=self.terms, schedule=schedule)
        grads = triton.grads_terms(*self.factors[:5], self.g, self.mask, terms=self.terms, schedule=schedule)
        return [y, *(t for t, wanted in zip(grads, self.mask, strict=True) if wanted)]

    def check(self, schedule, results=None):
        got = self.run(schedule) if results is None else results
        for name, t, truth, scale in zip(RESULTS[: len(got)], got, self.sums(), self.sums(absolute=True), strict=True):
            assert t.shape == truth.shape
            assert t.dtype == self.g.dtype
            assert t.is_contiguous()
            excess = (t.double().cpu() - truth).abs() - EPS[t.dtype] * torch.finfo(t.dtype).eps * scale
            assert not t.isnan().any(), f"{name} is not a number"
            assert not excess.numel() or excess.max() <= 0, (
                f"the error of {name} exceeds rounding by {excess.max():.3g}"
            )


@pytest.fixture
def call(factors):
    """Return `Call` on the device of the tests."""
    return lambda **how: Call(**how, device=factors.DEVICE)


@ready
@pytest.mark.parametrize("same", ["", "s", "ct", "sct"])
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_values_and_gradients(schedule, same, call):
    call(same=same).check(schedule)


@ready
@pytest.mark.parametrize(
    ("same", "points", "dtype"),
    [("", 1, torch.float32), ("s", 2, torch.float32), ("ct", 1, torch.bfloat16), ("sct", 1, torch.float16)],
    ids=str,
)
def test_bias_and_base(same, points, dtype, call):
    call(terms=8, same=same, points=points, dtype=dtype, bases=True).check("project")


@ready
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_16_bits(schedule, dtype, call):
    call(same="c", dtype=dtype).check(schedule)


@ready
@pytest.mark.parametrize("same", ["t", "sc"])
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_several_points(schedule, same, call):
    call(terms=6, points=2, same=same, rows=(3, 3, 3)).check(schedule)


@ready
@pytest.mark.parametrize("features", [(1, 1, 1), (20, 18, 33)], ids=str)
@pytest.mark.parametrize("schedule", ["project", "generate", "aggregate"])
def test_sizes_around_tiles(schedule, features, call):
    """All ones; and rows with so many terms that products take several at a time."""
    call(terms=40, rows=(2, 2, 2), features=features).check(schedule)


@ready
def test_sums_of_bases_in_pieces(call, monkeypatch):
    monkeypatch.setattr(chunks, "_MOST_TERMS", 3)
    call(rows=(2, 3, 2), bases=True).check("fold")


@ready
@pytest.mark.parametrize("schedule", ["project", "generate", "aggregate"])
def test_heavy_rows_in_pieces_and_chunks(schedule, call, monkeypatch):
    """Pieces of at most three terms, two pieces or five terms to a chunk: a row is in several chunks."""
    from fasthyper.backends.triton import terms

    monkeypatch.setattr(chunks, "_MOST_TERMS", 3)
    monkeypatch.setattr(terms, "_room", lambda *sizes: (2, 5))
    call(rows=(2, 3, 2)).check(schedule)


@ready
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_little_workspace(schedule, dtype, call, monkeypatch):
    """H in several slabs, sums of 16 bits without a copy in float32, blocks of a few terms in `fold`."""
    from fasthyper.backends.triton import terms

    of_plan = terms.tiling_of
    monkeypatch.setattr(terms, "tiling_of", lambda plan: of_plan(plan)._replace(elements=130))
    monkeypatch.setattr(terms, "_step", lambda *sizes: 5)
    call(same="c" if dtype == torch.float32 else "s", terms=7, dtype=dtype).check(schedule)


@ready
@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_strides(strides, call):
    one = call(terms=8)

    def strided(t):
        if strides == "transposed":
            return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
        wide = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)

    one.factors, one.g = [t if t is None else strided(t) for t in one.factors], strided(one.g)
    for schedule in ("aggregate", "project"):
        one.check(schedule)


@ready
def test_offsets_beyond_32_bits(call):
    """Rows of x are far apart; the memory between them is never touched."""
    one = call(terms=6, rows=(3, 2, 2), dtype=torch.float16)
    x, apart = one.factors[0], (1 << 30) + 64
    far = torch.empty(2 * apart + 4096, dtype=x.dtype, device=x.device).as_strided(x.shape, (apart, 8, 1))
    one.factors[0] = far.copy_(x)
    one.check("aggregate", results=one.run("aggregate"))


@ready
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_only_gradients_asked_for_are_returned(schedule, call):
    one = call(terms=8)
    x, z, weight = one.factors[:3]
    every = one.run(schedule)[1:]
    for k, given in ((0, (x, z, weight)), (1, (x, None, weight)), (2, (x, z, None))):
        mask = tuple(j == k for j in range(6))
        some = triton.grads_terms(*given, None, None, one.g, mask, terms=one.terms, schedule=schedule)
        assert [t is not None for t in some] == list(mask)
        torch.testing.assert_close(some[k], every[k])


@ready
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_the_same_bits_every_time(schedule, call):
    one = call(same="c")
    for first, second in zip(one.run(schedule), one.run(schedule), strict=True):
        assert torch.equal(first, second)


def test_no_kernel_has_atomics():
    folder = Path(fasthyper.__file__).parent / "kernels"
    assert not [path.name for path in folder.glob("*.py") if re.search(r"tl\.atomic", path.read_text())]


@ready
def test_without_terms_results_are_zero(call):
    for schedule in ("fold", "aggregate"):
        for t in call(terms=0, bases=True).run(schedule):
            assert not t.any()


@ready
def test_float64_runs_on_aten(call):
    one = call(terms=8)
    one.factors, one.g = [t if t is None else t.double() for t in one.factors], one.g.double()
    for t, truth in zip(one.run("project"), one.sums(), strict=True):
        torch.testing.assert_close(t.cpu(), truth)


@ready
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_a_second_call_does_not_wait_for_the_device(schedule, call, monkeypatch):
    """What the host reads from an index is kept: values of tensors on a GPU would have to be waited for."""
    from fasthyper.backends.triton import recording

    one = call(same="c")
    one.run(schedule)

    def waits(*args, **kwargs):
        raise AssertionError("waits for the device")

    monkeypatch.setattr(recording.Call, "launch", lambda self: None)  # the interpreter reads values
    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    one.run(schedule)
    with pytest.raises(AssertionError, match="waits"):
        Call().run(schedule)  # other indices


@ready
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_temporary_memory_does_not_grow_with_the_terms(schedule, monkeypatch):
    """Nothing is launched: only memory is allocated. The orders of the terms are kept, and are not temporary."""
    from fasthyper.backends.triton import recording

    monkeypatch.setattr(recording.Call, "launch", lambda self: None)
    peaks = []
    for more in (1, 2):
        rows = (3000 * more, 3000 * more, 3000 * more)
        one = Call(terms=20000 * more, features=(32, 32, 32), rows=rows)
        one.run(schedule)
        peaks.append(peak_temporary_bytes(lambda call=one: tuple(call.run(schedule))))
    assert max(peaks) < 33 << 20
    assert peaks[1] - peaks[0] < 1 << 20


@ready
def test_an_index_that_changes_is_sorted_again(call):
    one = call(terms=8)
    for name in ("target", "source"):
        one.check("aggregate")
        index = getattr(one.terms, name)
        index.copy_(index.flip(0))
    one.check("aggregate")


@ready
def test_an_index_of_several_incidences_is_ordered_by_each(call):
    one, other = call(terms=8), call(terms=8)
    other.terms = other.terms._replace(source=one.terms.source, cond=one.terms.cond)
    for each in (one, other, one):
        each.check("aggregate")


@ready
def test_hyper_linear_takes_it(call, factors):
    one = call(terms=8, bases=True)
    *indices, _, _, _ = one.terms
    incidence = fasthyper.Incidence(*indices, num_targets=one.terms.targets)
    leaves = [t.requires_grad_() for t in (one.factors[0].squeeze(1), *one.factors[1:])]
    with fasthyper.use_backend("triton"):
        y = fasthyper.hyper_linear(*leaves[:4], base_weight=leaves[4], base_bias=leaves[5], incidence=incidence)
        grads = torch.autograd.grad(y, leaves, one.g.squeeze(1))
    one.check("", results=[y.detach().unsqueeze(1), grads[0].unsqueeze(1), *grads[1:]])


@ready
@pytest.mark.parametrize("schedule", TERM_SCHEDULES)
def test_low_precision_errs_at_most_twice_as_much_as_writing_W_out(schedule, call):
    one = call(terms=20, features=(16, 12, 14), dtype=torch.bfloat16, rows=(4, 3, 4))
    leaves = [t.clone().requires_grad_() for t in one.factors[:3]]
    source, cond, target = one.terms[:3]
    w = (leaves[1][cond] @ leaves[2].flatten(0, 1).T).view(-1, *leaves[2].shape[:2])
    each = torch.bmm(leaves[0][source], w.mT)
    plain = torch.zeros_like(one.g).index_add(0, target, each)
    plain = [plain.detach(), *torch.autograd.grad(plain, leaves, one.g)]
    for ours, theirs, truth in zip(one.run(schedule), plain, one.sums(), strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * truth.abs()
        error = ((ours.double().cpu() - truth).abs() - rounding).max()
        assert error <= 2 * (theirs.double().cpu() - truth).abs().max()


class TestChunks:
    """How rows are cut, and where messages go: nothing here needs Triton."""

    @pytest.mark.parametrize(("pieces", "positions"), [(1, 1), (3, 4), (2, 100), (100, 7), (100, 100)])
    def test_every_position_is_in_one_piece_of_its_row(self, pieces, positions, monkeypatch):
        monkeypatch.setattr(chunks, "_MOST_TERMS", 3)
        counts = torch.tensor([0, 2, 9, 0, 3, 1, 1, 0])
        cuts = chunks.cut(counts, torch.device("cpu"), pieces, positions)
        row_of = torch.repeat_interleave(counts).tolist()
        seen, used = [], []
        for chunk in cuts.chunks:
            assert 1 <= len(chunk.pieces) <= pieces
            assert len(chunk.positions) <= positions
            seen += chunk.positions
            widths = [0]
            for k in chunk.pieces:
                span = range(int(cuts.ptr[k]), int(cuts.ptr[k + 1]))
                assert 1 <= len(span) <= 3
                assert {row_of[p] for p in span} == {int(cuts.row[k])}
                assert int(cuts.row[k]) in chunk.rows
                assert int(cuts.pieces_of[cuts.row[k]]) <= k < int(cuts.pieces_of[cuts.row[k] + 1])
                widths.append(len(span))
                used += span
            assert chunk.width == max(widths)
        assert seen == used == list(range(int(counts.sum())))
        assert cuts.splits

    def test_a_message_goes_to_its_row_within_its_chunk(self):
        rows = torch.tensor([3, 1, 3, 0, 0, 0, 2, 3, 3, 1])
        parts = chunks.whole(10, 4).chunks
        way = chunks.route(rows, 5, parts)
        for number, chunk in enumerate(parts):
            seen = []
            for d in range(way.first[number], way.first[number + 1]):
                span = way.order[int(way.ptr[d]) : int(way.ptr[d + 1])].tolist()
                assert span == sorted(span)  # in the order of the terms
                assert {int(rows[p]) for p in span} == {int(way.row[d])}
                seen += span
            assert sorted(seen) == list(chunk.positions)

    def test_no_rows(self):
        assert chunks.whole(0, 3).chunks == []
        assert chunks.cut(torch.zeros(3, dtype=torch.int64), torch.device("cpu"), 2, 2).chunks == []


class TestCosts:
    """The planner's choice for a GPU."""

    @staticmethod
    def problem(E, S, C, T, op="apply", dtype=torch.bfloat16):
        return TermProblem(op, E, S, C, T, 1, 64, 64, 64, dtype, "cuda", backend="triton")

    @pytest.mark.parametrize("op", ["apply", "grads"])
    def test_by_the_number_of_rows(self, op):
        schedule = lambda *sizes: planner.plan(self.problem(*sizes, op)).schedule
        assert schedule(5000, 5000, 5000, 5000) == "fold"  # nothing is shared
        assert schedule(1 << 20, 1 << 20, 10, 1 << 20) == "generate"
        assert schedule(1 << 20, 1000, 1 << 20, 1 << 20) == "project"
        assert schedule(1 << 20, 1 << 20, 1 << 20, 1000) == "aggregate"

    def test_more_terms_cost_more(self):
        for op, dtype, name in itertools.product(("apply", "grads"), gpu.DTYPES, TERM_SCHEDULES):
            few, many = (
                planner.plan(self.problem(E, 900, 900, 900, op, dtype), name).seconds for E in (10_000, 1 << 20)
            )
            assert 0 < few < many < float("inf")


@pytest.mark.parametrize("available", [True, False])
def test_the_cuda_backend_passes_calls_over_terms_on(available, monkeypatch):
    monkeypatch.setattr(cuda, "emulating", lambda: False)
    monkeypatch.setattr(triton, "unavailable", lambda: None if available else "no")
    chosen = triton if available else fasthyper.backends.aten
    monkeypatch.setattr(chosen, "apply_terms", lambda *factors, terms, schedule: (factors, terms, schedule))
    monkeypatch.setattr(chosen, "grads_terms", lambda *factors, terms, schedule: (factors, terms, schedule))
    assert cuda.apply_terms(1, 2, terms=3, schedule="fold") == ((1, 2), 3, "fold")
    assert cuda.grads_terms(1, 2, terms=3, schedule="fold") == ((1, 2), 3, "fold")
