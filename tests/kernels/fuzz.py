"""Call a compiled CPU library with random operands between protected pages, and compare its results with einsum.

    python tests/kernels/fuzz.py fasthyper/_compiled/cpu_avx2.so --cases 1000 --seed 0

Each case is printed before it runs: if the process dies, the last line is the case that killed it. `--case N` runs
only this case. Its seed and its number determine a case, on every machine.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import mmap
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

AXES = {"x": "bni", "z": "br", "weight": "oir", "bias": "or", "base_weight": "oi", "base_bias": "o", "g": "bno"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = ("fold", "generate", "project")
MOST_WORK = 200_000  # multiplications of a case
# Sizes near those of vectors, blocks and panels; other sizes are random.
EDGE = (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 25, 31, 32, 33, 40, 48, 63, 64, 65, 100, 127, 128, 129, 257, 300)


class Guarded:
    """Memory that begins or ends at a protected page."""

    def __init__(self, size: int, at_end: bool):
        pages = -(-size // PAGE) * PAGE
        self._all = pages + 2 * PAGE
        private_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._from = libc.mmap(None, self._all, mmap.PROT_READ | mmap.PROT_WRITE, private_anonymous, -1, 0)
        for guard in (self._from, self._from + PAGE + pages):
            if libc.mprotect(guard, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = self._from + PAGE + (pages - size if at_end else 0)
        self.bytes = (ctypes.c_char * size).from_address(start)

    def free(self) -> None:
        libc.munmap(self._from, self._all)


@dataclass(frozen=True)
class Case:
    """Operands of one problem, for both operators, every schedule, and bfloat16 with and without its own products."""

    sizes: tuple[int, int, int, int, int]  # B, N, R, I, O
    dtype: torch.dtype
    layouts: tuple[str, ...]  # one for each tensor of AXES
    given: tuple[bool, bool, bool]  # bias, base weight, base bias
    mask: tuple[bool, ...]
    workspace: int
    threads: int

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def size(rng: random.Random) -> int:
    """Draw the size of an axis."""
    return rng.choice(EDGE) if rng.random() < 0.7 else min(400, int(math.exp(rng.uniform(0, 6))))


def draw(rng: random.Random) -> Case:
    """Draw a case; sizes are drawn until einsum is quick."""
    while True:
        B, N, R, I, O = (size(rng) for _ in range(5))
        N = 1 if rng.random() < 0.4 else N
        O = 1 if rng.random() < 0.1 else O
        if B * N * R * I * O <= MOST_WORK:
            break
    mask = [rng.random() < 0.6 for _ in range(6)]
    mask[rng.randrange(3)] = True
    given = tuple(rng.random() < 0.5 for _ in range(3))
    every = ("contiguous", "contiguous", "permuted", "sliced", "expanded", "padded", "far")
    layouts = [rng.choice(every) for _ in AXES]
    if layouts.count("expanded") > 1:  # equal terms round the same way, so their errors add up
        layouts = [layout if layout != "expanded" or rng.random() < 0.3 else "far" for layout in layouts]
        layouts[-1] = layouts[-1].replace("expanded", "permuted")
    return Case(
        (B, N, R, I, O),
        rng.choice(DTYPES),
        tuple(layouts),
        given,
        (*mask[:3], *(m and k for m, k in zip(mask[3:], given, strict=True))),
        rng.choice((1 << 20, 4 << 20, 32 << 20)),
        rng.choice((1, 2, 3)),
    )


def strides_of(shape: list[int], layout: str, rng: random.Random) -> list[int]:
    """Draw strides, in numbers, for a view of this shape."""
    order = list(range(len(shape)))
    if layout == "permuted":
        rng.shuffle(order)
    gap = {"sliced": 2, "padded": 1, "far": 1}.get(layout, 1)
    strides, step = [0] * len(shape), gap
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
        if layout == "padded":
            step += rng.randrange(1, 9)
        if layout == "far":
            step = step * rng.choice((1, 3)) + rng.choice((0, 1, 1009, 20011)) // max(1, shape[order[0]] // 16)
    if layout == "expanded":
        strides[rng.randrange(len(shape))] = 0
    return strides


def guarded(shape: list[int], layout: str, dtype: torch.dtype, off: int, rng: random.Random) -> tuple[Guarded, Tensor]:
    """Draw a tensor of this layout in memory of its own, with NaN between its numbers, `off` bytes from its begin."""
    strides = strides_of(shape, layout, rng)
    numbers = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = Guarded(numbers * dtype.itemsize + off, rng.random() < 0.8)
    flat = torch.frombuffer(memory.bytes, dtype=dtype, count=numbers, offset=off if rng.random() < 0.5 else 0)
    if numbers != math.prod(shape):
        flat.fill_(math.nan)
    view = flat.as_strided(shape, strides)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    if 0 in strides:  # all indices of the axis share one slice
        axis = strides.index(0)
        view.narrow(axis, 0, 1).copy_(values.narrow(axis, 0, 1))
    else:
        view.copy_(values)
    return memory, view


@contextmanager
def operands(case: Case, rng: random.Random) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a case."""
    length = dict(zip("bnrio", case.sizes, strict=True))
    held, tensors = [], {}
    off = 1 if rng.random() < 0.05 else 0  # bytes: some tensors are not aligned for their dtype
    for (name, axes), layout in zip(AXES.items(), case.layouts, strict=True):
        memory, tensors[name] = guarded([length[axis] for axis in axes], layout, case.dtype, off, rng)
        held.append(memory)
    try:
        yield tensors
    finally:
        tensors.clear()
        for memory in held:
            memory.free()


def expected(t: dict[str, Tensor], given: tuple[bool, ...]) -> list[Tensor]:
    """Return y and the six gradients by einsum in float64."""
    x, z, weight, bias, base_weight, base_bias, g = (t[name].double() for name in AXES)
    y = torch.einsum("bni,bio->bno", x, torch.einsum("br,oir->bio", z, weight))
    dw = torch.einsum("bni,bno->boi", x, g)
    dx = torch.einsum("bno,bio->bni", g, torch.einsum("br,oir->bio", z, weight))
    dz = torch.einsum("boi,oir->br", dw, weight)
    sums = g.sum(1)
    if given[0]:
        y, dz = y + (z @ bias.T)[:, None], dz + sums @ bias
    if given[1]:
        y, dx = y + x @ base_weight.T, dx + g @ base_weight
    if given[2]:
        y = y + base_bias
    return [y, dx, dz, torch.einsum("boi,br->oir", dw, z), sums.T @ z, dw.sum(0), sums.sum(0)]


NAMES = ("y", "dx", "dz", "dH", "dbias", "dbase", "dbase_bias")


def check(name: str, got: Tensor, truth: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Allow rounding errors of the dtype, relative to the sum of absolute terms (`scale`)."""
    info = torch.finfo(dtype)
    allowed = (64 if dtype == torch.float32 else 4) * info.eps * scale + 16 * info.eps * info.smallest_normal
    error = (got.double() - truth).abs()
    if got.shape != truth.shape or not (error <= allowed).all():
        worst = (error - allowed).nan_to_num(math.inf).max().item()
        raise AssertionError(f"{name} {tuple(got.shape)} is off by {worst:.3g} more than rounding explains")


def run(case: Case, rng: random.Random) -> None:
    """Run all operators on a case, and compare their results with einsum."""
    torch.set_num_threads(case.threads)
    run_models(case, rng)
    with operands(case, rng) as t:
        truth = expected(t, case.given)
        scale = expected({name: tensor.abs() for name, tensor in t.items()}, case.given)
        bias, base_weight, base_bias = (
            t[name] if given else None
            for name, given in zip(("bias", "base_weight", "base_bias"), case.given, strict=True)
        )
        dx, dz, dh = case.mask[:3]
        z = None if dz and not (dx or dh or case.mask[3]) else t["z"]  # dz does not read z
        weight = None if dh and not (dx or dz) else t["weight"]
        native = (False, True) if case.dtype == torch.bfloat16 else (False,)
        for schedule, multiplied in itertools.product(SCHEDULES, native):
            options = (case.workspace, multiplied)
            ops = torch.ops.fasthyper_cpu
            y = ops.apply(t["x"], t["z"], t["weight"], bias, base_weight, base_bias, schedule, *options)
            out = ops.grads(t["x"], z, weight, bias, base_weight, t["g"], case.mask, schedule, schedule, *options)
            for name, got, exact, most, asked in zip(NAMES, (y, *out), truth, scale, (True, *case.mask), strict=True):
                if got is not None and got.numel() and asked:
                    label = f"{schedule}{', native' * multiplied}: {name}"
                    # float32 sums may exceed the range of float16
                    got = got.nan_to_num() if case.dtype == torch.float16 else got
                    check(label, got, exact, most, case.dtype)
                elif asked and name in ("dx", "dz", "dH"):
                    raise AssertionError(f"{schedule}: {name} was requested but is missing")


def run_models(case: Case, rng: random.Random) -> None:
    """Run the operators of models on some of the cases: each factor has an axis of models, of any stride."""
    count, schedule = rng.choice((1, 2, 3, 5)), rng.choice(SCHEDULES)
    if rng.random() < 0.6:
        return
    length = dict(zip("bnrio", case.sizes, strict=True))
    held, ts = [], []
    for name in ("x", "z", "weight", "g"):
        shape = [count, *(length[axis] for axis in AXES[name])]
        shared = rng.random() < 0.2  # by all models
        memory, t = guarded(shape[shared:], case.layouts[[*AXES].index(name)], case.dtype, 0, rng)
        held.append(memory)
        ts.append(t.expand(shape) if shared else t)
    x, z, weight, g = ts
    mask = case.mask[:3]
    options = (case.workspace, case.dtype == torch.bfloat16 and rng.random() < 0.5)
    ops = torch.ops.fasthyper_cpu
    y = ops.apply_models(x, z, weight, schedule, *options)
    to_z_only, to_h_only = mask == (False, True, False), mask == (False, False, True)
    of = x, None if to_z_only else z, None if to_h_only else weight, g
    out = ops.grads_models(*of, mask, schedule, schedule, *options)
    rest = {name: torch.zeros([length[axis] for axis in AXES[name]]) for name in ("bias", "base_weight", "base_bias")}
    for m in range(count):
        one = {"x": x[m], "z": z[m], "weight": weight[m], "g": g[m], **rest}
        truth = expected(one, (False,) * 3)
        scale = expected({name: t.abs() for name, t in one.items()}, (False,) * 3)
        for name, got, exact, most, asked in zip(NAMES, (y, *out), truth, scale, (True, *mask), strict=False):
            if asked:
                got = got[m].nan_to_num() if case.dtype == torch.float16 else got[m]
                check(f"model {m} of {count}, {schedule}: {name}", got, exact, most, case.dtype)
    del x, z, weight, g, of, one
    ts.clear()
    for memory in held:
        memory.free()


def main(draw: Callable, run: Callable, description: str) -> None:
    """Draw and run the cases; exit with status 1 after a wrong result."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("library")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    chosen = parser.parse_args()
    torch.ops.load_library(chosen.library)
    numbers = range(chosen.cases) if chosen.case is None else [chosen.case]
    for number in numbers:
        rng = random.Random(f"{chosen.seed}:{number}")
        case = draw(rng)
        print(f"case {number} of seed {chosen.seed}: {case}", flush=True)
        try:
            run(case, rng)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            sys.exit(1)
    print(f"{len(numbers)} cases are right", flush=True)


if __name__ == "__main__":
    main(draw, run, __doc__.partition("\n")[0])
