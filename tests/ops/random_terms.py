"""Helpers of the tests of terms: random ones, with their tensors, and their sum written out."""

from __future__ import annotations

import torch

from fasthyper import Incidence, hyper_linear


class Graph:
    """Random terms and tensors. An index that is left out is the identity."""

    def __init__(
        self,
        E=60,
        S=7,
        C=5,
        T=6,
        R=3,
        I=4,
        O=5,
        N=1,
        indices="sct",
        dtype=torch.float64,
        requires_grad=True,
        swap=False,
    ):
        generator = torch.Generator().manual_seed(E * 7 + R)

        def index(size):  # skewed, with duplicates and rows that no term names
            return (torch.rand(E, generator=generator) ** 2 * size).long().clamp(max=max(size - 1, 0))

        chosen = {"s": index(S), "c": index(C), "t": index(T)}
        self.source, self.cond, self.target = (chosen[k] if k in indices else None for k in "sct")
        S, C, T = (n if k in indices else E for n, k in ((S, "s"), (C, "c"), (T, "t")))
        self.T, self.O = T, O

        def tensor(*shape):
            t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return t.requires_grad_(requires_grad)

        points = () if N == 1 else (N,)
        self.x, self.z = tensor(S, *points, I), tensor(C, R)
        head = tensor(I, O, R).transpose(0, 1) if swap else tensor(O, I, R)
        self.weight = head.detach().requires_grad_(requires_grad)
        self.bias, self.base_weight, self.base_bias = tensor(O, R), tensor(O, I), tensor(O)
        self.g = torch.randn(T, *points, O, generator=generator, dtype=torch.float64).to(dtype)
        self.incidence = Incidence(self.source, self.cond, self.target, num_targets=T)

    @property
    def leaves(self):
        return self.x, self.z, self.weight, self.bias, self.base_weight, self.base_bias

    def layer(self, *leaves, reduce="sum", incidence=None):
        x, z, weight, bias, base_weight, base_bias = leaves
        incidence = incidence or self.incidence
        bases = {"base_weight": base_weight, "base_bias": base_bias}
        return hyper_linear(x, z, weight, bias, **bases, incidence=incidence, reduce=reduce)

    def truth(self, *leaves):
        """Return the sum term by term, W written out."""
        x, z, weight, bias, base_weight, base_bias = leaves
        x = x if self.source is None else x[self.source]
        z = z if self.cond is None else z[self.cond]
        W = torch.einsum("oir,er->eoi", weight, z) + base_weight
        b = z @ bias.T + base_bias
        flat = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        y = torch.einsum("eoi,eni->eno", W, flat) + b.unsqueeze(1)
        if self.target is not None:
            y = y.new_zeros(self.T, *y.shape[1:]).index_add(0, self.target, y)
        return y.reshape(-1, *x.shape[1:-1], self.O)
