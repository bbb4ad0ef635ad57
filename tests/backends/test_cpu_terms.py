"""The operators of the compiled CPU kernels for sums over terms, called directly."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fasthyper.backends import cpu
from fasthyper.measure import peak_temporary_bytes

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"compiled CPU kernels: {cpu.unavailable()}")
ops = torch.ops.fasthyper_cpu
SCHEDULES = ("fold", "generate", "project", "aggregate")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = 32 << 20
NATIVE = torch.ops.fasthyper_cpu.multiplies_bfloat16


class Terms:
    """Random factors and indices, and the operators with the arguments that belong to them.

    `indices` has the first letters of the indices that are not the identity.
    """

    def __init__(self, E, S, C, T, N, R, I, O, indices, dtype=torch.float32, swapped=False, skew=1):
        torch.manual_seed(E + R)
        draw = lambda rows: (rows * torch.rand(E) ** skew).long()
        self.E = E
        self.source, self.cond, self.target = (
            draw(rows) if name in indices else None for name, rows in zip("sct", (S, C, T), strict=True)
        )
        S, C, T = (rows if name in indices else E for name, rows in zip("sct", (S, C, T), strict=True))
        self.x, self.z, self.g = (torch.randn(shape).to(dtype) for shape in ((S, N, I), (C, R), (T, N, O)))
        weight = torch.randn((I, O, R) if swapped else (O, I, R)).to(dtype)
        self.weight = weight.transpose(0, 1) if swapped else weight

    @property
    def indices(self) -> tuple[Tensor | None, ...]:
        return self.source, self.cond, self.target

    def sorted(self, schedule: str) -> tuple[Tensor | None, Tensor | None]:
        index, rows = {
            "fold": (None, 0),
            "generate": (self.cond, len(self.z)),
            "project": (self.source, len(self.x)),
            "aggregate": (self.target, len(self.g)),
        }[schedule]
        if index is None:
            return None, None
        ptr = torch.zeros(rows + 1, dtype=torch.int64)
        ptr[1:] = torch.bincount(index, minlength=rows).cumsum(0)
        return index.argsort(stable=True), ptr

    def apply(self, schedule: str, limit: int = LIMIT, native: bool = False, sort: tuple | None = None) -> Tensor:
        order, ptr = sort or self.sorted(schedule)
        arguments = (*self.indices, len(self.g), order, ptr, schedule, limit, native)
        return ops.apply_terms(self.x, self.z, self.weight, *arguments)

    def grads(self, schedule: str, mask=(True,) * 3, limit: int = LIMIT, native: bool = False) -> tuple[Tensor, ...]:
        z = self.z if mask[0] or mask[2] else None
        weight = self.weight if mask[0] or mask[1] else None
        arguments = (*self.indices, len(self.z), *self.sorted(schedule), mask, schedule, limit, native)
        return ops.grads_terms(self.x, z, weight, self.g, *arguments)

    def everything(self, schedule: str, limit: int = LIMIT, native: bool = False) -> tuple[Tensor, ...]:
        return self.apply(schedule, limit, native), *self.grads(schedule, limit=limit, native=native)

    def by_hand(self, convert=lambda t: t) -> list[Tensor]:
        """Return y, dx, dz and dH by einsum and index_add of converted factors."""
        x, z, weight, g = (convert(t) for t in (self.x, self.z, self.weight, self.g))
        s, c, t = (torch.arange(self.E) if index is None else index for index in self.indices)
        xs, zs, gs = x[s], z[c], g[t]
        w, dw = torch.einsum("oir,er->eoi", weight, zs), torch.einsum("eno,eni->eoi", gs, xs)
        return [
            torch.zeros_like(g).index_add(0, t, torch.einsum("eoi,eni->eno", w, xs)),
            torch.zeros_like(x).index_add(0, s, torch.einsum("eoi,eno->eni", w, gs)),
            torch.zeros_like(z).index_add(0, c, torch.einsum("oir,eoi->er", weight, dw)),
            torch.einsum("eoi,er->oir", dw, zs),
        ]


# Sizes of E, S, C, T, N, R, I, O beyond a block, a piece and a slab; narrow axes; no terms; no points.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (500, 40, 30, 50, 1, 32, 17, 24),
    (900, 5, 700, 3, 1, 9, 20, 11),
    (300, 400, 3, 500, 1, 64, 3, 70),
    (60, 20, 7, 15, 5, 12, 8, 33),
    (40, 30, 20, 30, 1, 130, 40, 150),
    (2000, 3, 2, 4, 1, 5, 2, 1),
    (0, 4, 5, 6, 1, 7, 8, 9),
    (30, 4, 5, 6, 0, 7, 8, 9),
]
INDICES = ["", "s", "c", "t", "st", "sct"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("indices", INDICES, ids=lambda indices: indices or "identity")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, sizes, indices, schedule, oracle):
    terms = Terms(*sizes, indices, dtype, swapped=sizes[0] % 20 == 0, skew=3)
    scales = terms.by_hand(lambda t: t.double().abs())
    for native in {False, dtype == torch.bfloat16 and NATIVE()}:
        got = terms.everything(schedule, native=native)
        for actual, truth, scale in zip(got, terms.by_hand(Tensor.double), scales, strict=True):
            # Thousands of equal terms are added one after the other, and round the same way.
            oracle.check(actual, truth, 4 * scale if dtype == torch.float32 else scale, dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_mask(schedule):
    terms = Terms(300, 20, 30, 40, 2, 12, 13, 14, "sct")
    every = terms.grads(schedule)
    for mask in itertools.product((False, True), repeat=3):
        for wanted, part, whole in zip(mask, terms.grads(schedule, mask) if any(mask) else (), every, strict=False):
            assert not wanted or torch.allclose(part, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [1 << 18, LIMIT])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_number_of_threads_changes_no_bit(schedule, limit, dtype):
    terms = Terms(3000, 200, 150, 300, 1, 40, 32, 36, "sct", dtype, skew=4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(terms.everything(schedule, limit))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("limit", [1 << 20, LIMIT])
def test_low_precision_errs_at_most_twice_as_much_as_by_hand(limit, dtype, schedule):
    terms = Terms(5000, 30, 5000, 25, 1, 12, 10, 9, "st", dtype)
    usual, exact = terms.by_hand(), terms.by_hand(Tensor.double)
    for got, by_hand, truth in zip(terms.everything(schedule, limit), usual, exact, strict=True):
        rounding = torch.finfo(dtype).eps * truth.abs()
        error = ((got.double() - truth).abs() - rounding).max()
        assert error <= 2 * (by_hand.double() - truth).abs().max()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(64, 32, 32), (4, 200, 200), (128, 128, 128)], ids=str)
def test_temporary_memory_stays_within_the_workspace(sizes, dtype, schedule):
    limit = 4 << 20
    peaks = []
    for E in (2000, 4000):
        terms = Terms(E, 300, 100, 200, 1, *sizes, "sct", dtype)
        peaks.append(peak_temporary_bytes(lambda: (terms.apply(schedule, limit), terms.grads(schedule, limit=limit))))  # noqa: B023
    assert max(peaks) <= limit
    assert abs(peaks[1] - peaks[0]) < 1 << 20


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("value", [-1, 7, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize(("name", "letter"), [("source", "s"), ("cond", "c"), ("target", "t")])
def test_an_index_out_of_range_is_an_error(name, letter, value, schedule):
    terms = Terms(50, 7, 7, 7, 1, 3, 4, 5, letter)
    sort = terms.sorted(schedule)
    getattr(terms, name)[33] = value
    terms.sorted = lambda schedule: sort
    message = f"{name} has the value {value}, but must be at least 0 and less than 7"
    with pytest.raises(ValueError, match=message):
        terms.apply(schedule)
    with pytest.raises(ValueError, match=message):
        terms.grads(schedule)


@pytest.mark.parametrize(
    ("order", "ptr", "message"),
    [
        ([0, 1, 2, 3], [0, 1, 3, 5], "ptr must rise from 0"),
        ([0, 1, 2, 3], [1, 1, 3, 4], "ptr must rise from 0"),
        ([0, 1, 2, 3], [0, 5, 3, 4], "ptr must rise from 0"),
        ([0, 1, 2, 3], [0, 1, 4], "ptr must have shape"),
        ([0, 1, 2, 4], [0, 1, 3, 4], "order has the value 4"),
        ([0, 1, 2, -1], [0, 1, 3, 4], "order has the value -1"),
        ([0, 1, 2, 2], [0, 1, 3, 4], "order must name each of the 4 terms once"),
        ([0, 1, 2], [0, 1, 3, 4], "order must have shape"),
        (None, None, "ptr is missing"),
    ],
)
def test_an_order_that_does_not_fit_is_an_error(order, ptr, message):
    terms = Terms(4, 2, 4, 3, 1, 3, 4, 5, "t")
    sort = tuple(None if t is None else torch.tensor(t) for t in (order, ptr))
    with pytest.raises(ValueError, match=message):
        terms.apply("aggregate", sort=sort)


def test_a_schedule_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="schedule must be"):
        Terms(4, 2, 4, 3, 1, 3, 4, 5, "").apply("sideways", sort=(None, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indices", [*INDICES[:3], "st"])
@pytest.mark.parametrize("limit", [1 << 12, LIMIT])
def test_sum_terms(limit, indices, dtype, oracle):
    torch.manual_seed(0)
    E, F = 700, 37
    source = torch.randint(30, (E,)) if "s" in indices else None
    target = torch.randint(50, (E,)) if "t" in indices else None
    s, t = (torch.arange(E) if index is None else index for index in (source, target))
    rows = torch.randn(30 if "s" in indices else E, F).to(dtype)
    for to in (torch.float32, dtype):
        before = torch.randn(50 if "t" in indices else E, F).to(to)
        out = before.clone()
        ops.sum_terms(out, rows, source, target, limit)
        truth = before.double().index_add(0, t, rows.double()[s])
        scale = before.double().abs().index_add(0, t, rows.double().abs()[s])
        oracle.check(out, truth, scale, to)
    for name, index in (("source", source), ("target", target)):
        if index is not None:
            last, index[-1] = index[-1].clone(), 50
            with pytest.raises(ValueError, match=f"{name} has the value 50"):
                ops.sum_terms(out, rows, source, target, limit)
            index[-1] = last
