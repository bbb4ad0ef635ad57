"""What the planner has to know of the GPU kernels of `triton` and `cuda`."""

from __future__ import annotations

from ..costs import Cost, Costs, gemm
from ..problem import Machine, Problem


class GpuCosts(Costs):
    """`fold` is kernels that make x ⊗ z and g·H on chip; the other schedules are torch calls on tiles."""

    def in_tiles(self, schedule: str) -> bool:
        return schedule != "fold"

    def on_chip(self, schedule: str) -> bool:
        return schedule == "fold"

    def one_pass(self, p: Problem) -> bool:
        """Return whether dx and dz come from one product G = g·H."""
        return True

    def apply(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        if schedule == "fold":
            return gemm(p.batch * p.points, p.out_features, p.in_features * p.cond_features, machine)
        return super().apply(p, schedule, machine)

    def grads(self, p: Problem, schedule: str, machine: Machine) -> Cost:
        if schedule != "fold":
            return super().grads(p, schedule, machine)
        dx, dz, dh = p.needs
        cost = gemm(p.batch * p.points, p.in_features * p.cond_features, p.out_features, machine)
        products = (1 if dx and dz and self.one_pass(p) else dx + dz) + dh
        return Cost(cost.flops * products, 0.0, cost.seconds * products, products)
