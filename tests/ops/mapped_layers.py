"""Helpers of the tests of functions of the generated weights: the functions, and the weights written out."""

from __future__ import annotations

import torch

from fasthyper import hyper_linear

SMALL = (3, 2, 3, 2, 4)
# Written with other functions than those of the package.
PHI = {
    "abs": lambda p: torch.where(p < 0, -p, p),
    "softplus": lambda p: torch.logaddexp(p, torch.zeros_like(p)),
    "relu": lambda p: p.clamp(min=0),
    "sigmoid": lambda p: 1 / (1 + torch.exp(-p)),
    "tanh": lambda p: (torch.exp(p) - torch.exp(-p)) / (torch.exp(p) + torch.exp(-p)),
    "exp": lambda p: torch.pow(torch.e, p),
    "normalize": lambda p: p / (p * p).sum(-1, keepdim=True) ** 0.5,
    "softmax": lambda p: torch.exp(p) / torch.exp(p).sum(-1, keepdim=True),
}


def snake(p):
    return p + torch.sin(p) ** 2


def mapped(weight_map):
    def call(x, z, weight, bias, base_weight, base_bias):
        return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias, weight_map=weight_map)

    return call


def written_out(weight_map):
    phi = PHI.get(weight_map, weight_map)

    def call(x, z, weight, bias, base_weight, base_bias):
        p = torch.einsum("br,oir->boi", z, weight)
        p = p if base_weight is None else p + base_weight
        y = torch.einsum("boi,bni->bno", phi(p), x)
        y = y if bias is None else y + (z @ bias.T)[:, None]
        return y if base_bias is None else y + base_bias

    return call


def results(f, args, g):
    leaves = [None if t is None else t.detach().requires_grad_() for t in args]
    y = f(*leaves)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], g)
