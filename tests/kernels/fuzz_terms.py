"""Call a compiled CPU library with random incidences, and compare its results with einsum.

    python tests/kernels/fuzz_terms.py fasthyper/_compiled/cpu_avx2.so --cases 1000 --seed 0

Arguments, output and operands are those of fuzz.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from fuzz import DTYPES, EDGE, Guarded, check, guarded, main
from torch import Tensor

NAMES = ("source", "cond", "target")
SCHEDULES = {"fold": None, "generate": "cond", "project": "source", "aggregate": "target"}  # and the index of its rows
LAYOUTS = ("contiguous", "contiguous", "permuted", "sliced", "expanded", "padded", "far")
MOST_WORK = 200_000  # multiplications of a case


@dataclass(frozen=True)
class Case:
    """Operands and indices of a sum over terms, for all operators and every schedule."""

    sizes: tuple[int, int, int, int, int]  # E, N, R, I, O
    rows: tuple[int | None, int | None, int | None]  # of source, cond and target; None: the identity
    skew: float
    dtype: torch.dtype
    layouts: tuple[str, ...]  # of x, z, weight and g
    mask: tuple[bool, bool, bool]
    workspace: int
    threads: int

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def draw(rng: random.Random) -> Case:
    """Draw a case; sizes are drawn until einsum is quick."""
    size = lambda: rng.choice(EDGE) if rng.random() < 0.7 else min(400, int(math.exp(rng.uniform(0, 6))))
    while True:
        E, R, I, O = (size() for _ in range(4))
        E = E * rng.choice((0, 1, 1, 1, 4, 16)) if rng.random() < 0.5 else E
        N = rng.choice((0, 2, 3, 5, 33)) if rng.random() < 0.4 else 1
        if E * N * R * I * O <= MOST_WORK:
            break
    layouts = [rng.choice(LAYOUTS) for _ in range(4)]
    if layouts.count("expanded") > 1:  # equal terms round the same way, so their errors add up
        layouts = [layout.replace("expanded", "permuted") for layout in layouts]
    mask = [rng.random() < 0.6 for _ in range(3)]
    mask[rng.randrange(3)] = True
    return Case(
        (E, N, R, I, O),
        tuple(None if rng.random() < 0.4 else min(size(), 10 + 2 * E) for _ in NAMES),
        rng.choice((0, 0, 1, 3)),
        rng.choice(DTYPES),
        tuple(layouts),
        tuple(mask),
        rng.choice((1 << 16, 1 << 20, 32 << 20)),
        rng.choice((1, 2, 3)),
    )


@contextmanager
def operands(case: Case, rng: random.Random) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """Yield x, z, weight and g, and the three indices, each in memory of its own."""
    E, N, R, I, O = case.sizes
    S, C, T = (E if rows is None else rows for rows in case.rows)
    held, tensors, indices = [], [], []
    off = 1 if rng.random() < 0.05 else 0
    for shape, layout in zip(([S, N, I], [C, R], [O, I, R], [T, N, O]), case.layouts, strict=True):
        if math.prod(shape) == 0:
            tensors.append(torch.empty(shape, dtype=case.dtype))
            continue
        memory, view = guarded(shape, layout, case.dtype, off, rng)
        held.append(memory)
        tensors.append(view)
    for rows in case.rows:
        if rows is None or E == 0:
            indices.append(None if rows is None else torch.empty(0, dtype=torch.int64))
            continue
        memory = Guarded(E * 8, rng.random() < 0.8)
        held.append(memory)
        index = torch.frombuffer(memory.bytes, dtype=torch.int64, count=E)
        index.copy_(torch.tensor([int(rows * rng.random() ** (1 + case.skew)) for _ in range(E)]))
        indices.append(index)
    try:
        yield tensors, indices
    finally:
        tensors.clear()
        indices.clear()
        for memory in held:
            memory.free()


def expected(tensors: list[Tensor], indices: list[Tensor | None], E: int) -> list[Tensor]:
    """Return y and the three gradients in float64."""
    x, z, weight, g = (tensor.double() for tensor in tensors)
    s, c, t = (torch.arange(E) if index is None else index for index in indices)
    xs, zs, gs = x[s], z[c], g[t]
    w = torch.einsum("oir,er->eoi", weight, zs)
    return [
        torch.zeros_like(g).index_add_(0, t, torch.einsum("eoi,eni->eno", w, xs)),
        torch.zeros_like(x).index_add_(0, s, torch.einsum("eoi,eno->eni", w, gs)),
        torch.zeros_like(z).index_add_(0, c, torch.einsum("oir,eoi->er", weight, torch.einsum("eno,eni->eoi", gs, xs))),
        torch.einsum("eoi,er->oir", torch.einsum("eno,eni->eoi", gs, xs), zs),
    ]


def scaled(scale: Tensor, E: int, dtype: torch.dtype) -> Tensor:
    """Return the scale of rounding errors. Equal terms that are added one after the other round the same way."""
    return scale * max(1, E / 128) if dtype == torch.float32 else scale


def sorted_terms(schedule: str, case: Case, indices: list[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return the order and the pointer of a schedule."""
    name = SCHEDULES[schedule]
    if name is None or (index := indices[NAMES.index(name)]) is None:
        return None, None
    rows = case.rows[NAMES.index(name)]
    ptr = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(index, minlength=rows), 0, out=ptr[1:])
    return torch.argsort(index, stable=True), ptr


def run_sum_terms(case: Case, x: Tensor, indices: list[Tensor | None], rng: random.Random) -> None:
    """Add rows of x to rows of a result in float32 or in the dtype of x."""
    ops, (E, *_), rows = torch.ops.fasthyper_cpu, case.sizes, x.flatten(1).contiguous()
    source, _, target = indices
    for dtype in {torch.float32, case.dtype}:
        out = torch.randn(E if target is None else case.rows[2], rows.shape[1]).to(dtype)
        s, t = (torch.arange(E) if index is None else index for index in (source, target))
        truth = out.double().index_add(0, t, rows.double()[s])
        scale = out.double().abs().index_add(0, t, rows.double().abs()[s])
        got = torch.zeros(len(out), rows.shape[1] + 3, dtype=dtype)[:, : rows.shape[1]]  # rows that are not contiguous
        got.copy_(out)
        ops.sum_terms(got, rows, source, target, case.workspace)
        check(f"sum_terms to {dtype}", got, truth, scaled(scale, E, dtype), dtype)


def run(case: Case, rng: random.Random) -> None:
    """Run the operators on a case, and compare their results with einsum."""
    torch.set_num_threads(case.threads)
    E = case.sizes[0]
    with operands(case, rng) as (tensors, indices):
        x, z, weight, g = tensors
        truth = expected(tensors, indices, E)
        scale = [scaled(most, E, case.dtype) for most in expected([tensor.abs() for tensor in tensors], indices, E)]
        dx, dz, dh = case.mask
        given_z, given_weight = z if dx or dh else None, weight if dx or dz else None
        native = (False, True) if case.dtype == torch.bfloat16 else (False,)
        for schedule, multiplied in itertools.product(SCHEDULES, native):
            order, ptr = sorted_terms(schedule, case, indices)
            ops, options = torch.ops.fasthyper_cpu, (schedule, case.workspace, multiplied)
            y = ops.apply_terms(x, z, weight, *indices, len(g), order, ptr, *options)
            out = ops.grads_terms(x, given_z, given_weight, g, *indices, len(z), order, ptr, case.mask, *options)
            wanted = (True, *case.mask)
            for name, got, exact, most, asked in zip(
                ("y", "dx", "dz", "dH"), (y, *out), truth, scale, wanted, strict=True
            ):
                if asked:
                    # float32 sums may exceed the range of float16
                    got = got.nan_to_num() if case.dtype == torch.float16 else got
                    check(f"{schedule}{', native' * multiplied}: {name}", got, exact, most, case.dtype)
        run_sum_terms(case, x, indices, rng)


if __name__ == "__main__":
    main(draw, run, __doc__.partition("\n")[0])
