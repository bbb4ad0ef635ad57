"""The costs of a schedule: flops, bytes of tiles, torch calls, and the seconds that follow from a machine's rates.

`Costs` predicts torch's own operations on tiles. A backend with other costs overrides its methods in a subclass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import processor
from .problem import ConvProblem, Machine, Pairs, Problem, TermProblem

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Cost(NamedTuple):
    """Flops, bytes of tiles moved, seconds of both, and torch calls."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    calls: int = 0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.calls + other.calls,
        )

    def __mul__(self, times: int) -> Cost:  # type: ignore[override]
        return Cost(self.flops * times, self.bytes * times, self.seconds * times, self.calls * times)


def gemm(m: float, n: float, k: float, machine: Machine, times: float = 1.0) -> Cost:
    """Return the cost of 2·m·n·k flops, which are slower if a side is too short to fill a matrix unit's registers."""
    flops = 2.0 * times * m * n * k
    short = math.prod(side / (side + machine.short_side) for side in (m, n, k)) if flops else 1.0
    return Cost(flops, 0.0, flops / (machine.flops * short), 1)


def moved(elements: float, passes: float, machine: Machine) -> Cost:
    """Return the cost of writing or reading the elements of a tile `passes` times, in cache."""
    nbytes = elements * passes * machine.work_dtype.itemsize
    return Cost(0.0, nbytes, nbytes / machine.cache_bandwidth, 1)


def _instances(B: int, N: int, m: int, n: int, machine: Machine) -> Cost:
    """Return the cost of B small products of N rows. At N = 1, reading the tile dominates, and `moved` counts it."""
    return gemm(N, m, n, machine, B) if N > 1 else Cost(2.0 * B * m * n, 0.0, 0.0, 1)


def project_pairs(p: Pairs, machine: Machine) -> Cost:
    """Predict `pairs` or `pairs_grads` with x · H first, an output at a time."""
    rows = p.batch * p.rows
    head = gemm(rows, p.cond_features, p.in_features, machine) * p.out_features
    other = gemm(p.rows, p.columns, p.cond_features, machine, p.batch) * p.out_features
    cost = moved(rows * p.columns * p.out_features, 2, machine)
    if p.op == "pairs":
        return cost + head + other
    dx, dz, dh = p.needs
    if dx or dh:  # g · z, then Hᵀ or xᵀ
        cost += other
    return cost + head * (dx + dh) + (head + other) * dz


class Costs:
    """The costs of the op family in torch's own operations, tile by tile."""

    small_products = 0.3
    """The rate of the products over a row's terms, as a share of the rate of products with H."""

    def machine(self, device: str, dtype: torch.dtype, threads: int) -> Machine:
        """Return typical rates of a type of device. Only their ratios matter, so that rough values suffice."""
        if device == "cpu":
            native = dtype not in LOW_PRECISION or processor.has_fast(dtype)
            work = dtype if native else torch.float32
            rate = 40e9 if work == torch.float64 else 80e9
            return Machine(rate * threads, 16e9 * threads, 10e9, 3e-6, 2 << 20, work)
        rate = {torch.float64: 30e12, torch.float32: 50e12}.get(dtype, 600e12)
        return Machine(rate, 5e12, 3e12, 4e-6, 16 << 20, dtype)

    def in_tiles(self, schedule: str) -> bool:
        """Return whether a schedule runs as torch calls on tiles, each call with the cost of a launch."""
        return True

    def on_chip(self, schedule: str) -> bool:
        """Return whether a kernel forms x ⊗ z and g·H on chip, so that no tile is in memory."""
        return False

    def backward(self, p: Problem) -> tuple[tuple[bool, bool, bool], ...]:
        """Return the gradients (dx, dz, dH) that are planned together, a group for each plan."""
        return (p.needs,)

    def apply(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        """Predict a forward."""
        B, N, R, I, O = p.sizes
        if schedule == "fold":  # x ⊗ z, then one product with K = I·R
            return moved(B * N * I * R, 2, machine) + gemm(B * N, O, I * R, machine)
        if schedule == "generate":  # W = z·H, then x·Wᵀ instance by instance
            return gemm(B, O * I, R, machine) + moved(B * O * I, 2, machine) + _instances(B, N, I, O, machine)
        products = gemm(p.distinct, O * R, I, machine)
        if p.shared_x:  # x·H once, then one product with z
            return products + gemm(B, N * O, R, machine) + moved(B * N * O, 2, machine)
        return products + moved(B * N * O * R, 3, machine)

    def grads(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        """Predict a backward."""
        B, N, R, I, O = p.sizes
        dx, dz, dh = p.needs
        cost = Cost()
        if schedule == "fold":
            if dx or dz:  # G = g·H, reduced with z and with x
                cost += gemm(B * N, I * R, O, machine) + moved(B * N * I * R, 2 + dx + dz, machine)
            if dh:
                cost += moved(B * N * I * R, 2, machine) + gemm(O, I * R, B * N, machine)
            return cost
        if dx:  # a forward with H transposed
            cost += Costs.apply(self, p._replace(in_features=O, out_features=I, shared_x=False), "generate", machine)
        if schedule == "generate":
            if dz or dh:  # dW = gᵀx
                cost += _instances(B, N, O, I, machine) + moved(B * O * I, 1 + dz + dh, machine)
            if dz:
                cost += gemm(B, R, O * I, machine)
            if dh:
                cost += gemm(O * I, R, B, machine)
            return cost
        if dz:
            cost += Costs.apply(self, p, "project", machine)
        if dh:  # z ⊗ g, then xᵀ
            cost += gemm(O * R, I, p.distinct, machine)
            cost += gemm(N * O, R, B, machine) if p.shared_x else moved(B * N * O * R, 2, machine)
        return cost

    def convolution(self, p: ConvProblem, schedule: str, machine: Machine) -> Cost:
        """Predict a forward or a backward of a generated convolution."""
        linear = p.of_patches()
        if schedule == "fold":
            patches = moved(p.batch * p.pixels * p.in_features, 2, machine)
            if p.op == "apply":
                return (patches + self.apply(linear, "fold", machine)) * p.groups
            return (patches * (1 + p.needs[0]) + self.grads(linear, "fold", machine)) * p.groups
        # W and dW as in a linear layer; the products with them read the image in place
        B, G, K, O = p.batch, p.groups, p.in_features, p.out_features
        passes = 1 if p.op == "apply" else p.needs[0] + (p.needs[1] or p.needs[2])
        cost = gemm(p.pixels, O, K, machine, float(B * G)) * passes
        if p.op == "apply" or p.needs[0]:
            cost += gemm(B, G * O * K, p.cond_features, machine) + moved(B * G * O * K, 2, machine)
        if p.op == "grads" and (p.needs[1] or p.needs[2]):
            each = p.needs[1] + p.needs[2]
            cost += gemm(B, G * O * K, p.cond_features, machine) * each + moved(B * G * O * K, 1 + each, machine)
        return cost

    def terms(self, p: TermProblem, schedule: str, machine: Machine) -> Cost:
        """Predict a forward or a backward over terms.

        Every requested result takes a product with H for each row and a product over each row's terms. The two results
        that come from one of these products share it.
        """
        R, I, O = p.sizes
        dx, dz, dh = p.needs
        own, others = {  # whether the row's own factor is a result, and how many of the others are
            "project": (dx, dz),
            "generate": (dz, dx),
        }.get(schedule, (False, dx + dz))
        P, Q, C = {"project": (I, O, R), "generate": (R, O, I)}.get(schedule, (O, I, R))
        if p.op == "apply":
            own, others, dh = (schedule in ("fold", "aggregate")), (schedule in ("project", "generate")), False
        rows, pairs = p.rows(schedule), p.terms * p.points
        product = gemm(rows, Q * C, P, machine) + moved(rows * Q * C, 2, machine)
        small = 2.0 * pairs * Q * C
        over_terms = Cost(small, 0.0, small / (machine.flops * self.small_products), 2)
        cost = (product + over_terms) * (own + dh)
        if others:
            cost += product + over_terms * others + moved(pairs * (Q + C), 2, machine)
        return cost
